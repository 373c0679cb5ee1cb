/*
 * Training speed: LoRA on all seven linears (A and B, joint), every token of every sequence labelled, against the
 * matrix-product ceiling measured in the same run.
 *
 *     train [--shape smollm2-135m | --model FILE] [--quant q4_1] [--threads 2] [--seq 512] [--batch 32] [--rank 16]
 *           [--dp on] [--precision f32] [--json]      --help lists the rest
 *
 * An optimiser step of `batch` sequences runs as `batch` micro-batches of one sequence, so that memory does not grow
 * with the batch; the median micro-batch counts. With --dp on each sequence's gradient is clipped onto the integer
 * grid, and where the build has privacy/, the exact discrete Gaussian is drawn; the same run also times each
 * micro-batch without, so that the two can be compared on a machine whose speed wanders.
 *
 * FLOPs a token: 4 for each weight that a token meets (forward and the gradient of the input, the head included), 3.5
 * times the causal attention's forward, 6 for each LoRA weight. The ceiling is the rate of the step's products with
 * frozen weights alone, over those FLOPs.
 */
#include "bench/ceiling.h"
#include "bench/common.h"
#include "model/optimizer.h"
#include "model/train.h"

#ifdef BENCH_PRIVACY
#include "crypto/random.h"
#include "privacy/noise_vector.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCH_MAX 4096

struct bench {
    struct bench_options o;
    struct bench_model m;
    struct pool *pool;
    struct backend *be;
    struct lora lora;
    struct batch batch;
    struct train *train;
    struct optimizer optimizer;
    float *sum;        /* (trained_count) the batch's gradient */
    int64_t *grid_sum; /* with DP */
    int32_t *ids;      /* (seq) */
    uint8_t *learn;    /* (seq) */
    struct ceiling ceiling;
    int32_t layer_first;
    double step[BATCH_MAX], with[BATCH_MAX],
        without[BATCH_MAX];       /* seconds of each micro-batch: pass, then either way */
    double end_with, end_without; /* and once a step */
    long allocations;
    size_t rss;
    bool noise;
};

static void check(int rc, const struct error *err)
{
    if (rc < 0)
        bench_fail(err->message);
}

static double flops_per_token(const struct bench *b)
{
    const struct model_config *c = &b->m.model->config;
    const double adapted = c->layer_count - b->layer_first, head = (double)c->d_model * c->vocabulary;
    const double layer = ((double)model_weight_count(b->m.model) - head) / c->layer_count;
    const double attention = 2.0 * b->o.seq * c->head_count * c->head_size;
    double lora = 0;
    for (int32_t i = 0; i < b->lora.entry_count; i++)
        lora += (double)b->o.rank * (b->lora.entries[i].in + b->lora.entries[i].out);
    /* Below the lowest adapted layer nothing goes backward. */
    return 2 * (layer * (c->layer_count + adapted) + 2 * head) + attention * (c->layer_count + 2.5 * adapted) +
           6 * lora;
}

static void init(struct bench *b)
{
    struct error err = {0};
    const struct bench_options *o = &b->o;
    bench_model_open(&b->m, o);
    const struct model *model = b->m.model;
    b->layer_first = o->layers > 0 && o->layers < model->config.layer_count ? model->config.layer_count - o->layers : 0;
    const struct lora_config config = {.mode = LORA_JOINT,
                                       .rank = o->rank,
                                       .alpha = 2 * o->rank,
                                       .layer_first = b->layer_first,
                                       .targets = LORA_TARGETS_ALL};
    synthetic_lora(&b->lora, &config, model);
    check(pool_new(o->threads, &b->pool, &err), &err);
    check(backend_cpu_new(kernels_cpu(o->isa), b->pool, o->precision, &b->be, &err), &err);
    check(batch_init(&b->batch, o->seq, 1, &err), &err);
    const struct train_options options = {.backend = b->be,
                                          .tokens_max = o->seq,
                                          .examples_max = 1,
                                          .example_tokens_max = o->seq,
                                          .per_example = true,
                                          .checkpoint_level = o->level};
    check(train_new(&options, model, &b->lora, &b->train, &err), &err);
    const struct optimizer_config adamw = {
        .kind = OPTIMIZER_ADAMW, .lr = 1e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};
    check(optimizer_init(&b->optimizer, &adamw, b->be, b->lora.trained_count, &err), &err);
    b->sum = calloc(b->lora.trained_count, sizeof *b->sum);
    b->grid_sum = o->dp ? calloc(b->lora.trained_count, sizeof *b->grid_sum) : NULL;
    b->ids = calloc((size_t)o->seq, sizeof *b->ids);
    b->learn = malloc((size_t)o->seq);
    if (!b->sum || (o->dp && !b->grid_sum) || !b->ids || !b->learn)
        bench_fail("out of memory");
    memset(b->learn, 1, (size_t)o->seq);
}

/* A sequence of random tokens: all but the first are predicted. */
static void fill_batch(struct bench *b, uint64_t *state)
{
    batch_clear(&b->batch);
    for (int i = 0; i < b->o.seq; i++)
        b->ids[i] = (int32_t)(next_random(state) % (uint32_t)b->m.model->config.vocabulary);
    if (!batch_add(&b->batch, &(struct batch_example){b->ids, b->learn, b->o.seq}))
        bench_fail("the sequence does not fit its batch");
}

/* --- what follows a pass: the gradient into the batch's sum, either way --------------------------------------------
 */

static const struct clip_params clip = {.clip = 1.0, .grid = 1048576};

static void gather_plain(struct bench *b)
{
    b->be->ops->add(b->be, b->lora.trained_count, train_gradient(b->train, 0), b->sum);
}

static void gather_private(struct bench *b)
{
    b->be->ops->clip_accumulate(b->be, b->lora.trained_count, 1, train_gradient(b->train, 0),
                                train_gradient_stride(b->train), &clip, b->grid_sum, NULL);
}

static void finish_plain(struct bench *b)
{
    b->be->ops->divide(b->be, b->lora.trained_count, b->o.batch, b->sum);
    optimizer_step(&b->optimizer, b->sum, b->lora.trained);
}

static void finish_private(struct bench *b)
{
#ifdef BENCH_PRIVACY
    struct noise_source source;
    struct error err = {0};
    const uint64_t deviation = (uint64_t)(clip.clip * clip.grid); /* noise multiplier 1 */
    check(noise_source_init(&source, deviation * deviation, &random_system, &err), &err);
    noise_vector_add(&source, b->grid_sum, b->lora.trained_count, b->o.threads);
    noise_source_release(&source);
    b->noise = true;
#endif
    b->be->ops->scale_sum(b->be, b->lora.trained_count, b->grid_sum, 1 / (clip.grid * b->o.batch), b->sum);
    optimizer_step(&b->optimizer, b->sum, b->lora.trained);
}

static void measure(struct bench *b)
{
    uint64_t state = 3;
    double t0 = 0, t1 = 0, t2 = 0;
    for (int i = -1; i < b->o.batch; i++) { /* one to warm up */
        bench_turn(&b->o);
        fill_batch(b, &state);
        long before = bench_allocations();
        t0 = now_seconds();
        train_run(b->train, &b->lora, &b->batch);
        t1 = now_seconds();
        gather_plain(b);
        t2 = now_seconds();
        if (b->o.dp)
            gather_private(b);
        const double t3 = now_seconds();
        if (i < 0)
            continue;
        b->allocations += bench_allocations() - before;
        b->step[i] = t1 - t0;
        b->without[i] = t2 - t1;
        b->with[i] = t3 - t2;
        if (b->o.ceiling && i % (b->o.batch / 8 + 1) == 0) {
            if (b->ceiling.ops == NULL) {
                b->rss = bench_peak_rss_bytes();
                ceiling_init(&b->ceiling, kernels_cpu(b->o.isa), b->pool, b->o.precision, b->m.model, b->o.seq);
                ceiling_round(&b->ceiling); /* to warm up */
                b->ceiling.rounds = 0;
            }
            ceiling_round(&b->ceiling);
        }
    }
    const long before = bench_allocations();
    t0 = now_seconds();
    finish_plain(b);
    b->allocations += bench_allocations() - before;
    t1 = now_seconds();
    if (b->o.dp)
        finish_private(b);
    t2 = now_seconds();
    b->end_without = t1 - t0;
    b->end_with = t2 - t1;
    if (b->rss == 0)
        b->rss = bench_peak_rss_bytes();
}

static void report(struct bench *b)
{
    const struct bench_options *o = &b->o;
    const double pass = bench_median(b->step, o->batch), flops = flops_per_token(b);
    const double plain = pass + bench_median(b->without, o->batch) + b->end_without / o->batch;
    const double private = pass + bench_median(b->with, o->batch) + b->end_with / o->batch;
    const double speed = o->seq / (o->dp ? private : plain);
    const double ceiling = o->ceiling ? ceiling_flops(&b->ceiling) : 0, tokens = ceiling / flops;
    const double own = o->ceiling ? ceiling_own_flops(&b->ceiling) : 0;
    const double blas = o->ceiling ? ceiling_blas_flops(&b->ceiling) : 0;
    const char *precision = o->precision == KERNEL_BF16 ? "bf16" : "f32";
    if (!o->json) {
        printf("%s, %s, %s, %d threads, %d tokens x %d, rank %d: %.1f tokens/s (%.1f GFLOP/s), %.0f MB, %ld "
               "allocations\n",
               b->m.name, b->be->name, precision, o->threads, o->seq, o->batch, o->rank, speed, speed * flops * 1e-9,
               (double)b->rss * 1e-6, b->allocations);
        if (o->ceiling)
            printf("ceiling %.1f tokens/s: %.1f GFLOP/s (own %.1f, %s %.1f); fraction %.3f\n", tokens, ceiling * 1e-9,
                   own * 1e-9, b->ceiling.blas_name, blas * 1e-9, speed / tokens);
        if (o->dp)
            printf("without DP in the same run %.1f tokens/s: DP costs %.2f %%%s\n", o->seq / plain,
                   100 * (private / plain - 1), b->noise ? "" : " (without its noise: this build has no privacy/)");
        return;
    }
    printf("{\"program\":\"train\",\"model\":\"%s\",\"isa\":\"%s\",\"precision\":\"%s\",\"threads\":%d,\"seq\":%d,"
           "\"batch\":%d,\"rank\":%d,\"layers\":%d,\"level\":%d,\"dp\":%s,\"noise\":%s,\"tokens_per_second\":%.2f,"
           "\"tokens_per_second_without_dp\":%.2f,\"dp_cost\":%.5f,\"flops_per_token\":%.0f,"
           "\"ceiling_tokens_per_second\":%.2f,\"ceiling_fraction\":%.4f,\"ceiling_gflops\":%.1f,\"own_gflops\":%.1f,"
           "\"blas\":\"%s\",\"blas_gflops\":%.1f,\"peak_rss_bytes\":%zu,\"allocations_per_step\":%ld}\n",
           b->m.name, b->be->name, precision, o->threads, o->seq, o->batch, o->rank,
           b->m.model->config.layer_count - b->layer_first, train_level(b->train), o->dp ? "true" : "false",
           b->noise ? "true" : "false", speed, o->seq / plain, o->dp ? private / plain - 1 : 0.0, flops, tokens,
           o->ceiling ? speed / tokens : 0.0, ceiling * 1e-9, own * 1e-9, o->ceiling ? b->ceiling.blas_name : "",
           blas * 1e-9, b->rss, b->allocations);
}

int main(int argc, char **argv)
{
    static struct bench b = {.o = BENCH_DEFAULTS};
    bench_parse(argc, argv, &b.o);
    init(&b);
    measure(&b);
    report(&b);
    if (b.o.ceiling)
        ceiling_release(&b.ceiling);
    optimizer_release(&b.optimizer);
    train_free(b.train);
    batch_release(&b.batch);
    backend_free(b.be);
    pool_free(b.pool);
    lora_release(&b.lora);
    bench_model_close(&b.m);
    free(b.sum);
    free(b.grid_sum);
    free(b.ids);
    free(b.learn);
    return 0;
}
