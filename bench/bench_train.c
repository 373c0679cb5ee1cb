/*
 * Training speed: per-example LoRA gradients on a model of SmolLM2-135M's shape with a Q4_1 base.
 *
 *     bench_train [--threads N] [--tokens T] [--examples E] [--labels L] [--layers K] [--rank R] [--targets qv|all]
 *                 [--mode ffa|joint] [--precision bf16|f32] [--shadow] [--steps S] [--json]
 *
 * T tokens an example, the last L learnt; the top K layers are adapted.
 */
#include "bench/synthetic.h"
#include "model/train.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct settings {
    int threads, tokens, examples, labels, layers, rank, steps;
    uint32_t targets;
    enum lora_mode mode;
    enum kernel_precision precision;
    bool shadow, json;
};

static const struct option options[] = {
    {"threads", required_argument, NULL, 't'},
    {"tokens", required_argument, NULL, 'T'},
    {"examples", required_argument, NULL, 'E'},
    {"labels", required_argument, NULL, 'L'},
    {"layers", required_argument, NULL, 'K'},
    {"rank", required_argument, NULL, 'r'},
    {"targets", required_argument, NULL, 'g'},
    {"mode", required_argument, NULL, 'm'},
    {"precision", required_argument, NULL, 'p'},
    {"shadow", no_argument, NULL, 's'},
    {"steps", required_argument, NULL, 'n'},
    {"json", no_argument, NULL, 'j'},
    {NULL, 0, NULL, 0},
};

static void parse(int argc, char **argv, struct settings *s)
{
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        int number = optarg ? (int)strtol(optarg, NULL, 10) : 0;
        switch (c) {
        case 't':
            s->threads = number;
            break;
        case 'T':
            s->tokens = number;
            break;
        case 'E':
            s->examples = number;
            break;
        case 'L':
            s->labels = number;
            break;
        case 'K':
            s->layers = number;
            break;
        case 'r':
            s->rank = number;
            break;
        case 'n':
            s->steps = number;
            break;
        case 'g':
            s->targets = strcmp(optarg, "all") == 0 ? LORA_TARGETS_ALL : s->targets;
            break;
        case 'm':
            s->mode = strcmp(optarg, "joint") == 0 ? LORA_JOINT : LORA_FFA;
            break;
        case 'p':
            s->precision = strcmp(optarg, "f32") == 0 ? KERNEL_F32 : KERNEL_BF16;
            break;
        case 's':
            s->shadow = true;
            break;
        case 'j':
            s->json = true;
            break;
        default:
            exit(2);
        }
    }
    if (s->tokens < 2 || s->labels < 1 || s->labels >= s->tokens || s->examples < 1 || s->steps < 1 || s->layers < 1 ||
        s->layers > 30) {
        fprintf(stderr, "bench_train: numbers out of range\n");
        exit(2);
    }
}

/* Floating-point operations of a step's matrix products: all layers forward, the adapted ones backward, and the head on
 * the label rows both ways. The top layer beyond its attention counts its label rows only. */
static double step_flops(const struct model *m, const struct settings *s)
{
    const struct model_config *c = &m->config;
    const double d = c->d_model, heads = c->head_count * c->head_size, kv = c->kv_head_count * c->head_size;
    const double attention = d * (heads + 2 * kv), rest = heads * d + 3.0 * d * c->d_ff;
    const double rows = (double)s->examples * s->tokens, inner = (double)s->examples * s->labels;
    double macs = c->layer_count * attention * rows + rest * ((c->layer_count - 1) * rows + inner);
    macs += (s->layers - 1) * attention * rows + rest * ((s->layers - 1) * rows + inner);
    macs += 2 * inner * d * c->vocabulary;
    return 2 * macs;
}

static void fill_batch(struct batch *batch, const struct settings *s, uint64_t *state)
{
    int32_t *ids = calloc((size_t)s->tokens, sizeof *ids);
    uint8_t *learn = calloc((size_t)s->tokens, 1);
    if (!ids || !learn)
        abort();
    memset(learn + s->tokens - s->labels, 1, (size_t)s->labels);
    batch_clear(batch);
    for (int e = 0; e < s->examples; e++) {
        for (int i = 0; i < s->tokens; i++)
            ids[i] = (int32_t)(next_random(state) % 49152);
        if (!batch_add(batch, &(struct batch_example){ids, learn, s->tokens}))
            abort();
    }
    free(ids);
    free(learn);
}

int main(int argc, char **argv)
{
    struct settings s = {.threads = 1,
                         .tokens = 35,
                         .examples = 16,
                         .labels = 5,
                         .layers = 10,
                         .rank = 8,
                         .steps = 5,
                         .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V),
                         .mode = LORA_FFA,
                         .precision = KERNEL_BF16};
    struct synthetic synthetic;
    struct lora lora;
    struct batch batch;
    struct train *train;
    struct pool *pool = NULL;
    struct backend *backend = NULL;
    struct error err = {0};
    uint64_t state = 3;
    parse(argc, argv, &s);
    synthetic_init(&synthetic, s.shadow);
    const struct model *model = synthetic_model(&synthetic);
    struct lora_config config = {
        .mode = s.mode, .rank = s.rank, .alpha = 2 * s.rank, .layer_first = 30 - s.layers, .targets = s.targets};
    synthetic_lora(&lora, &config, model);
    const struct kernel_ops *ops = kernels_cpu(KERNEL_AVX512_BF16);
    const int32_t rows = s.tokens * s.examples;
    if (pool_new(s.threads, &pool, &err) < 0 || batch_init(&batch, rows, s.examples, &err) < 0)
        goto fail;
    if (backend_cpu_new(ops, pool, s.precision, &backend, &err) < 0)
        goto fail;
    struct train_options train_options = {.backend = backend,
                                          .tokens_max = rows,
                                          .examples_max = s.examples,
                                          .example_tokens_max = s.tokens,
                                          .per_example = true};
    if (train_new(&train_options, model, &lora, &train, &err) < 0)
        goto fail;
    double forward = 1e30, step = 1e30, loss = 0;
    for (int i = 0; i <= s.steps; i++) { /* the first one warms up */
        fill_batch(&batch, &s, &state);
        double t0 = now_seconds();
        train_evaluate(train, &lora, &batch);
        double t1 = now_seconds();
        train_run(train, &lora, &batch);
        double t2 = now_seconds();
        loss = train_loss(train, 0);
        if (i > 0 && t1 - t0 < forward)
            forward = t1 - t0;
        if (i > 0 && t2 - t1 < step)
            step = t2 - t1;
    }
    const double flops = step_flops(model, &s);
    if (s.json)
        printf("{\"backend\":\"%s\",\"threads\":%d,\"rows\":%d,\"step_ms\":%.2f,\"forward_ms\":%.2f,"
               "\"train_tokens_per_s\":%.1f,\"forward_tokens_per_s\":%.1f,\"gflops\":%.1f,\"memory_mb\":%.1f,"
               "\"loss\":%.4f}\n",
               ops->name, s.threads, rows, 1e3 * step, 1e3 * forward, rows / step, rows / forward, flops / step / 1e9,
               (double)train_memory_bytes(train) / 1e6, loss);
    else
        printf("%-12s threads %d rows %5d  step %8.2f ms = %8.1f tokens/s (%6.1f GFLOP/s)  forward %8.2f ms = %8.1f "
               "tokens/s  memory %.1f MB\n",
               ops->name, s.threads, rows, 1e3 * step, rows / step, flops / step / 1e9, 1e3 * forward, rows / forward,
               (double)train_memory_bytes(train) / 1e6);
    train_free(train);
    backend_free(backend);
    batch_release(&batch);
    pool_free(pool);
    lora_release(&lora);
    synthetic_release(&synthetic);
    return 0;
fail:
    fprintf(stderr, "%s\n", err.message);
    return 1;
}
