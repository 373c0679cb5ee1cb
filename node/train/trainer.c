#include "node/train/trainer.h"

#include "crypto/random.h"
#include "privacy/sampler.h"

#include <math.h>

#define EXAMPLES_PER_MICRO_BATCH 64

struct trainer {
    struct trainer_options options;
    const struct dataset *data;
    size_t count; /* trained floats */
    struct train *train;
    struct batch batch;
    struct optimizer optimizer;
    uint32_t *sample; /* (units) indices */
    int64_t *sum;     /* (count) grid units */
    float *gradient;  /* (count) */
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
    free(t->sample);
    free(t->sum);
    free(t->gradient);
    free(t);
}

int trainer_new(const struct trainer_options *options, const struct model *model, const struct lora *lora,
                const struct dataset *data, struct trainer **ret_trainer, struct error *err)
{
    int32_t tokens_max =
        options->tokens_max > options->example_tokens_max ? options->tokens_max : options->example_tokens_max;
    struct train_options train_options = {.ops = options->ops,
                                          .pool = options->pool,
                                          .precision = options->precision,
                                          .tokens_max = tokens_max,
                                          .examples_max = EXAMPLES_PER_MICRO_BATCH,
                                          .example_tokens_max = options->example_tokens_max,
                                          .per_example = options->plan.mode != DP_NONE || options->plan.clip > 0};
    struct trainer *t = calloc(1, sizeof *t);
    int rc;

    if (!t)
        return error_set(err, ERR_RESOURCES, "out of memory for the trainer");
    t->options = *options;
    t->data = data;
    t->count = lora->trained_count;
    t->sample = malloc(sizeof *t->sample * (dataset_count(data) ? dataset_count(data) : 1));
    t->sum = calloc(t->count, sizeof *t->sum);
    t->gradient = calloc(t->count, sizeof *t->gradient);
    if (!t->sample || !t->sum || !t->gradient)
        rc = error_set(err, ERR_RESOURCES, "out of memory for %zu trained parameters", t->count);
    else if ((rc = train_new(&train_options, model, lora, &t->train, err)) == 0 &&
             (rc = batch_init(&t->batch, tokens_max, EXAMPLES_PER_MICRO_BATCH, err)) == 0)
        rc = optimizer_init(&t->optimizer, &options->optimizer, t->count, err);
    if (rc < 0) {
        trainer_free(t);
        return rc;
    }
    *ret_trainer = t;
    return 0;
}

/* Adds what the micro-batch's examples contribute: integers under DP, floats otherwise. */
static void accumulate(struct trainer *t)
{
    const struct kernel_ops *ops = t->options.ops;
    const struct kernel_run run = {.pool = t->options.pool};
    const struct clip_params clip = {.clip = t->options.plan.clip,
                                     .grid = private_mode(t) ? dp_plan_grid(&t->options.plan) : 0};

    if (!private_mode(t) && !(t->options.plan.clip > 0)) {
        ops->add(&run, t->count, train_gradient(t->train, 0), t->gradient);
        return;
    }
    for (int32_t e = 0; e < t->batch.examples; e++) {
        float *g = train_gradient(t->train, e);
        if (private_mode(t)) {
            struct clip_result result;
            ops->clip_accumulate(t->count, g, &clip, t->sum, &result);
        } else {
            double norm = 0;
            for (size_t i = 0; i < t->count; i++)
                norm += (double)g[i] * g[i];
            norm = sqrt(norm);
            if (!isfinite(norm))
                continue;
            for (size_t i = 0; i < t->count; i++)
                t->gradient[i] += norm > clip.clip ? (float)(g[i] * (clip.clip / norm)) : g[i];
        }
    }
}

/* Noise, then the mean over the declared q·N: what the optimizer sees. */
static void finish_step(struct trainer *t, struct noise *noise)
{
    double denominator = dp_plan_denominator(&t->options.plan);

    if (private_mode(t)) {
        double scale = 1.0 / (dp_plan_grid(&t->options.plan) * denominator);
        noise_add(noise, t->sum, t->count);
        for (size_t i = 0; i < t->count; i++)
            t->gradient[i] = (float)((double)t->sum[i] * scale);
    } else {
        for (size_t i = 0; i < t->count; i++)
            t->gradient[i] = (float)(t->gradient[i] / denominator);
    }
}

static int one_step(struct trainer *t, struct lora *lora, const struct rng *sampling, struct noise *noise,
                    uint32_t step, const struct trainer_progress *progress, struct error *err)
{
    struct kernel_run run = {.pool = t->options.pool, .precision = t->options.precision};
    uint32_t sampled = 0, done = 0;
    int rc = poisson_sample(t->options.plan.q, (uint32_t)dataset_count(t->data), sampling, t->sample, &sampled, err);

    if (rc < 0)
        return rc;
    memset(t->sum, 0, t->count * sizeof *t->sum);
    memset(t->gradient, 0, t->count * sizeof *t->gradient);
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
        train_run(t->train, lora, &t->batch);
        accumulate(t);
        if (progress && progress->report(progress->ctx, step, t->options.plan.steps_per_round, done, sampled))
            return error_set(err, ERR_AGAIN, "training was stopped");
    }
    finish_step(t, noise);
    optimizer_step(&t->optimizer, t->options.ops, &run, t->gradient, lora->trained);
    return 0;
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
    struct random_stream sampling_stream, noise_stream;
    struct rng sampling, noise_source;
    struct noise noise = {0};
    int rc = 0;

    assert(lora->trained_count == t->count);
    random_stream_seeded(&sampling_stream, rng, "sampling");
    random_stream_seeded(&noise_stream, rng, "dp-noise");
    sampling = random_stream_rng(&sampling_stream);
    noise_source = random_stream_rng(&noise_stream);
    if (private_mode(t) && (rc = noise_self_test(rng, err)) == 0)
        rc = noise_init(&noise, dp_plan_variance(&t->options.plan), &noise_source, err);
    optimizer_reset(&t->optimizer);
    for (uint32_t step = 0; rc == 0 && step < t->options.plan.steps_per_round; step++) {
        t->optimizer.config.lr = decayed_rate(t, first_step + step);
        rc = one_step(t, lora, &sampling, &noise, step, progress, err);
    }
    if (private_mode(t))
        noise_release(&noise);
    random_stream_release(&sampling_stream);
    random_stream_release(&noise_stream);
    explicit_bzero(t->gradient, t->count * sizeof *t->gradient);
    explicit_bzero(t->sum, t->count * sizeof *t->sum);
    return rc;
}
