#include "node/train/trainer.h"

#include "base/log.h"
#include "crypto/random.h"
#include "model/placed.h"
#include "node/train/batchmates.h"
#include "privacy/noise_vector.h"
#include "privacy/sampler.h"

#include <string.h>

#define EXAMPLES_PER_MICRO_BATCH 64

static const struct log_context log_trainer = {.component = "trainer"};

struct trainer {
    struct trainer_options options;
    const struct dataset *data;
    size_t capacity; /* trained floats at most: of the longer factor where they alternate */
    size_t count;    /* trained floats of this round */
    struct backend *be;
    struct placed_model *placed;
    struct lora lora; /* on the backend */
    struct train *train;
    struct batch batch;
    struct optimizer optimizer;
    bool one_by_one;  /* one example a micro-batch: others would change its gradient's bits */
    bool noise_begun; /* on the device, and not added yet */
    uint32_t *sample; /* (units) indices */
    int64_t *sum;     /* dev (capacity) grid units */
    float *gradient;  /* dev (capacity) */
};

static bool private_mode(const struct trainer *t)
{
    return t->options.plan.mode != DP_NONE;
}

void trainer_free(struct trainer *t)
{
    if (!t)
        return;
    train_free(t->train);
    batch_release(&t->batch);
    optimizer_release(&t->optimizer);
    lora_unplace(&t->lora);
    placed_model_free(t->placed);
    if (t->be) {
        t->be->ops->release(t->be, t->sum);
        t->be->ops->release(t->be, t->gradient);
    }
    free(t->sample);
    free(t);
}

/* The step's memory; where the device has too little of it, with smaller micro-batches, down to the longest example. */
static int fit_train(struct trainer *t, const struct model *model, const struct lora *lora, struct error *err)
{
    const struct trainer_options *o = &t->options;
    struct train_options options = {.backend = t->be,
                                    .placed = t->placed,
                                    .tokens_max =
                                        o->tokens_max > o->example_tokens_max ? o->tokens_max : o->example_tokens_max,
                                    .examples_max = EXAMPLES_PER_MICRO_BATCH,
                                    .example_tokens_max = o->example_tokens_max,
                                    .per_example = o->plan.mode != DP_NONE || o->plan.clip > 0,
                                    .alternating = o->alternating,
                                    .noise = o->plan.mode != DP_NONE,
                                    .checkpoint_level = t->be->host_memory ? 0 : TRAIN_LEVEL_AUTO};
    if (t->one_by_one) {
        options.tokens_max = o->example_tokens_max;
        options.examples_max = 1;
    }
    for (;;) {
        if (options.examples_max > options.tokens_max)
            options.examples_max = options.tokens_max;
        int rc = train_new(&options, model, lora, &t->train, err);
        if (rc != ERR_RESOURCES || t->be->host_memory ||
            (options.tokens_max == o->example_tokens_max && options.examples_max == 1)) {
            t->options.tokens_max = options.tokens_max;
            return rc < 0 ? rc : batch_init(&t->batch, options.tokens_max, options.examples_max, err);
        }
        t->be->ops->trim(t->be);
        options.tokens_max =
            options.tokens_max / 2 > o->example_tokens_max ? options.tokens_max / 2 : o->example_tokens_max;
        options.examples_max = options.examples_max > 1 ? options.examples_max / 2 : 1;
    }
}

static int allocate(struct trainer *t, const struct model *model, const struct lora *lora, struct error *err)
{
    const size_t units = dataset_count(t->data) ? dataset_count(t->data) : 1;
    void *sum = NULL, *gradient = NULL;
    int rc;

    t->sample = malloc(sizeof *t->sample * units);
    if (!t->sample)
        return error_set(err, ERR_RESOURCES, "out of memory for a sample of %zu records", units);
    if ((rc = placed_model_new(t->be, model, lora->config.rank, &t->placed, err)) < 0 ||
        (rc = lora_place(&t->lora, lora, t->be, err)) < 0 ||
        (rc = t->be->ops->alloc(t->be, t->capacity * sizeof *t->sum, &sum, err)) < 0)
        return rc;
    t->sum = sum;
    if ((rc = t->be->ops->alloc(t->be, t->capacity * sizeof *t->gradient, &gradient, err)) < 0)
        return rc;
    t->gradient = gradient;
    if ((rc = optimizer_init(&t->optimizer, &t->options.optimizer, t->be, t->capacity, err)) < 0)
        return rc;
    return fit_train(t, model, lora, err);
}

/* A device that draws noise by itself must draw the CPU's, bit for bit, before anything it draws may be released. */
static int check_device_noise(struct trainer *t, struct error *err)
{
    enum { CHECKED = 1000 };
    struct noise_source known = {.key = {0x63, 0x68, 0x65, 0x63, 0x6b}};
    const size_t n = t->capacity < CHECKED ? t->capacity : CHECKED;
    int64_t drawn[CHECKED], wanted[CHECKED] = {0};
    int rc;

    if (!private_mode(t) || !t->be->ops->noise_begin)
        return 0;
    if (!gaussian_init(&known.gaussian, dp_plan_variance(&t->options.plan)))
        return error_set(err, ERR_CONFIG, "the plan's noise variance is out of range");
    t->be->ops->zero(t->be, t->sum, n * sizeof *t->sum);
    t->be->ops->noise_begin(t->be, known.key, known.vectors, &known.gaussian, n);
    t->be->ops->noise_add(t->be, n, t->sum);
    t->be->ops->download(t->be, drawn, t->sum, n * sizeof *drawn);
    if ((rc = t->be->ops->sync(t->be, err)) < 0)
        return rc;
    noise_vector_add(&known, wanted, n, 1);
    if (memcmp(drawn, wanted, n * sizeof *drawn) != 0)
        return error_set(err, ERR_BUG, "%s draws other noise than the CPU: this build must not release anything",
                         t->be->name);
    return 0;
}

/* Made-up factors of lora's shape on the backend, none of them zero, until the next upload. */
static int upload_made_up(struct trainer *t, const struct lora *lora, struct error *err)
{
    struct lora made = *lora;
    const size_t frozen = lora->frozen ? lora->frozen_count : 0, n = lora->trained_count + frozen;
    float *values = malloc(n * sizeof *values);

    if (!values)
        return error_set(err, ERR_RESOURCES, "out of memory for %zu made-up factors", n);
    for (size_t i = 0; i < n; i++)
        values[i] = ((float)((uint32_t)i * 2654435761u >> 16) - 32767.5f) * 0x1p-20f;
    made.trained = values;
    made.frozen = frozen ? values + lora->trained_count : NULL;
    lora_upload(&t->lora, &made);
    int rc = t->be->ops->sync(t->be, err);
    free(values);
    return rc;
}

/* Where others in its micro-batch change the bits of an example's gradient, each is computed alone: the sensitivity
 * that the noise hides counts on it. */
static int check_device_gradients(struct trainer *t, const struct model *model, const struct lora *lora,
                                  struct error *err)
{
    const struct batchmates_probe probe = {.train = t->train,
                                           .backend = t->be,
                                           .lora = &t->lora,
                                           .batch = &t->batch,
                                           .example_tokens_max = t->options.example_tokens_max,
                                           .vocabulary = model->config.vocabulary};
    bool same = true, other = true;
    int rc;

    if (!private_mode(t) || t->be->host_memory || t->batch.examples_max == 1)
        return 0;
    if ((rc = upload_made_up(t, lora, err)) < 0 || (rc = batchmates_check(&probe, &same, err)) < 0)
        return rc;
    if (t->options.alternating) {
        lora_exchange(&t->lora);
        rc = batchmates_check(&probe, &other, err);
        lora_exchange(&t->lora);
    }
    if (rc < 0 || (same && other))
        return rc;
    t->one_by_one = true;
    log_warn(
        &log_trainer,
        "%s gives a record's gradient other bits beside other records: each is computed alone, which is slower, so "
        "that the noise hides what the plan says",
        t->be->name);
    train_free(t->train);
    t->train = NULL;
    batch_release(&t->batch);
    t->batch = (struct batch){0};
    return fit_train(t, model, lora, err);
}

int trainer_new(const struct trainer_options *options, const struct model *model, const struct lora *lora,
                const struct dataset *data, struct trainer **ret_trainer, struct error *err)
{
    struct trainer *t = calloc(1, sizeof *t);
    int rc;

    if (!t)
        return error_set(err, ERR_RESOURCES, "out of memory for the trainer");
    t->options = *options;
    t->data = data;
    t->capacity = lora->trained_count;
    if (options->alternating && lora->frozen_count > t->capacity)
        t->capacity = lora->frozen_count;
    t->be = options->backend;
    if ((rc = allocate(t, model, lora, err)) < 0 || (rc = check_device_noise(t, err)) < 0 ||
        (rc = check_device_gradients(t, model, lora, err)) < 0) {
        trainer_free(t);
        return rc;
    }
    *ret_trainer = t;
    return 0;
}

int32_t trainer_tokens_max(const struct trainer *t)
{
    return t->options.tokens_max;
}

int trainer_level(const struct trainer *t)
{
    return train_level(t->train);
}

/* Adds what the micro-batch's examples contribute: integers under DP, floats otherwise. */
static void accumulate(struct trainer *t)
{
    const struct backend_ops *ops = t->be->ops;
    const size_t stride = train_gradient_stride(t->train);
    const double clip = t->options.plan.clip;

    if (private_mode(t)) {
        const struct clip_params params = {.clip = clip, .grid = dp_plan_grid(&t->options.plan)};
        ops->clip_accumulate(t->be, t->count, t->batch.examples, train_gradient(t->train, 0), stride, &params, t->sum,
                             NULL);
    } else if (clip > 0) {
        ops->clip_add(t->be, t->count, t->batch.examples, train_gradient(t->train, 0), stride, clip, t->gradient);
    } else {
        ops->add(t->be, t->count, train_gradient(t->train, 0), t->gradient);
    }
}

/* A device draws the step's noise while it computes the step; the CPU draws it at the end. */
static void begin_noise(struct trainer *t, struct noise_source *noise)
{
    if (!private_mode(t) || !t->be->ops->noise_begin)
        return;
    t->be->ops->noise_begin(t->be, noise->key, noise_source_take(noise), &noise->gaussian, t->count);
    t->noise_begun = true;
}

/* Noise, then the mean over the declared q·N: what the optimizer sees. */
static void finish_step(struct trainer *t, struct noise_source *noise)
{
    const double denominator = dp_plan_denominator(&t->options.plan);

    if (!private_mode(t)) {
        t->be->ops->divide(t->be, t->count, denominator, t->gradient);
        return;
    }
    if (t->noise_begun)
        t->be->ops->noise_add(t->be, t->count, t->sum);
    else
        noise_vector_add(noise, t->sum, t->count, t->options.threads > 0 ? t->options.threads : 1);
    t->noise_begun = false;
    t->be->ops->scale_sum(t->be, t->count, t->sum, 1.0 / (dp_plan_grid(&t->options.plan) * denominator), t->gradient);
}

static int one_step(struct trainer *t, const struct rng *sampling, struct noise_source *noise, uint32_t step,
                    const struct trainer_progress *progress, struct error *err)
{
    uint32_t sampled = 0, done = 0;
    int rc = poisson_sample(t->options.plan.q, (uint32_t)dataset_count(t->data), sampling, t->sample, &sampled, err);

    if (rc < 0)
        return rc;
    t->be->ops->zero(t->be, t->sum, t->count * sizeof *t->sum);
    t->be->ops->zero(t->be, t->gradient, t->count * sizeof *t->gradient);
    begin_noise(t, noise);
    while (done < sampled) {
        batch_clear(&t->batch);
        while (done < sampled) {
            struct batch_example example;
            dataset_example(t->data, t->sample[done], &example);
            if (!batch_add(&t->batch, &example))
                break;
            done++;
        }
        assert(t->batch.examples > 0); /* no example is longer than the batch */
        train_run(t->train, &t->lora, &t->batch);
        accumulate(t);
        if (progress && progress->report(progress->ctx, step, t->options.plan.steps_per_round, done, sampled))
            return error_set(err, ERR_AGAIN, "training was stopped");
    }
    finish_step(t, noise);
    optimizer_step(&t->optimizer, t->gradient, t->lora.trained);
    return t->be->ops->sync(t->be, err);
}

static float decayed_rate(const struct trainer *t, uint64_t step)
{
    double total = (double)dp_plan_steps(&t->options.plan);
    double done = total > 0 ? (double)step / total : 0;

    return (float)(t->options.optimizer.lr * (1 - t->options.decay * (done < 1 ? done : 1)));
}

int trainer_round(struct trainer *t, struct lora *lora, uint64_t first_step, const struct rng *rng,
                  const struct trainer_progress *progress, struct error *err)
{
    struct random_stream sampling_stream;
    struct noise_source noise = {0};
    struct rng sampling;
    int rc = 0;

    if (t->options.alternating && lora->config.mode != t->lora.config.mode)
        lora_exchange(&t->lora);
    assert(lora->config.mode == t->lora.config.mode && lora->trained_count == t->lora.trained_count);
    t->count = lora->trained_count;
    random_stream_seeded(&sampling_stream, rng, "sampling");
    sampling = random_stream_rng(&sampling_stream);
    if (private_mode(t) && (rc = noise_source_self_test(rng, err)) == 0)
        rc = noise_source_init(&noise, dp_plan_variance(&t->options.plan), rng, err);
    /* On the CPU the factors that are trained are the caller's own. */
    if (t->be->host_memory) {
        t->lora.trained = lora->trained;
        t->lora.frozen = lora->frozen;
    } else {
        lora_upload(&t->lora, lora);
    }
    optimizer_reset(&t->optimizer, t->count);
    for (uint32_t step = 0; rc == 0 && step < t->options.plan.steps_per_round; step++) {
        t->optimizer.config.lr = decayed_rate(t, first_step + step);
        rc = one_step(t, &sampling, &noise, step, progress, err);
    }
    if (rc == 0 && !t->be->host_memory) {
        lora_download(lora, &t->lora);
        rc = t->be->ops->sync(t->be, err);
    }
    if (t->noise_begun) { /* of a step that was stopped: adding it wipes it, and the sum is wiped below */
        t->be->ops->noise_add(t->be, t->count, t->sum);
        t->noise_begun = false;
    }
    noise_source_release(&noise);
    random_stream_release(&sampling_stream);
    t->be->ops->zero(t->be, t->gradient, t->count * sizeof *t->gradient);
    t->be->ops->zero(t->be, t->sum, t->count * sizeof *t->sum);
    train_wipe(t->train);
    return rc;
}
