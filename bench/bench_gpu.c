/*
 * Speed on a card: whole training steps, decoding, and every operation against its floor. bench/gpu_table.py documents
 * what is printed and turns it into a table; scripts/bench.sh gpu runs it beside PyTorch + PEFT.
 *
 *     bench_gpu --shape NAME [--batch B] [--tokens T] [--rank R] [--labels all|quarter] [--dp on|off]
 *               [--base bf16|q4_1] [--keep-quantised] [--level L] [--steps N] [--json]
 *     bench_gpu --decode --shape NAME [--base ...] [--context N] [--json]
 *     bench_gpu --ops --shape NAME [--batch B] [--tokens T] [--base ...] [--context N] [--floors FLOPS:BYTES] [--json]
 *
 * --floors: only the floors, from ceilings that are given (FLOP/s and bytes a second). Needs no card and no weights.
 * --brief: small ceilings and few repeats. For tests, which run it on the kernels' host build; its figures say nothing.
 *
 * With dp on a step is a logical batch of 32 examples, and the same steps without DP are measured in the same run.
 */
#include "bench/gpu.h"
#include "model/infer.h"
#include "model/train.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOGICAL_BATCH 32
#define STEPS_MAX 64

enum { OPTION_DECODE = 256, OPTION_OPS, OPTION_KEEP, OPTION_KV, OPTION_BRIEF, OPTION_FLOORS };

static const struct option options[] = {
    {"shape", required_argument, NULL, 's'},
    {"batch", required_argument, NULL, 'b'},
    {"tokens", required_argument, NULL, 't'},
    {"rank", required_argument, NULL, 'r'},
    {"labels", required_argument, NULL, 'l'},
    {"dp", required_argument, NULL, 'd'},
    {"base", required_argument, NULL, 'w'},
    {"level", required_argument, NULL, 'v'},
    {"steps", required_argument, NULL, 'n'},
    {"context", required_argument, NULL, 'c'},
    {"brief", no_argument, NULL, OPTION_BRIEF},
    {"decode", no_argument, NULL, OPTION_DECODE},
    {"ops", no_argument, NULL, OPTION_OPS},
    {"floors", required_argument, NULL, OPTION_FLOORS},
    {"keep-quantised", no_argument, NULL, OPTION_KEEP},
    {"quantise-kv", no_argument, NULL, OPTION_KV},
    {"json", no_argument, NULL, 'j'},
    {NULL, 0, NULL, 0},
};

static void die(const char *what)
{
    fprintf(stderr, "bench_gpu: %s\n", what);
    exit(1);
}

void gpu_check(int rc, const struct error *err)
{
    if (rc < 0)
        die(err->message);
}

static void parse(int argc, char **argv, struct gpu_settings *s)
{
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        const int number = optarg ? (int)strtol(optarg, NULL, 10) : 0;
        char behind;
        switch (c) {
        case 's':
            if (!(s->shape = synthetic_shape_find(optarg)))
                die("no such shape");
            break;
        case 'b':
            s->batch = number;
            break;
        case 't':
            s->tokens = number;
            break;
        case 'r':
            s->rank = number;
            break;
        case 'l':
            s->labels = optarg;
            break;
        case 'd':
            s->dp = strcmp(optarg, "on") == 0;
            break;
        case 'w':
            s->base = optarg;
            break;
        case 'v':
            s->level = number;
            break;
        case 'n':
            s->steps = number;
            break;
        case 'c':
            s->context = number;
            break;
        case 'j':
            s->json = true;
            break;
        case OPTION_DECODE:
            s->decode = true;
            break;
        case OPTION_OPS:
            s->ops = true;
            break;
        case OPTION_FLOORS:
            s->floors = true;
            if (sscanf(optarg, "%lf:%lf%c", &s->given.flops, &s->given.bytes, &behind) != 2 || !(s->given.flops > 0) ||
                !(s->given.bytes > 0))
                die("--floors takes two positive numbers, as in 650e12:4.25e12");
            break;
        case OPTION_BRIEF:
            s->brief = true;
            break;
        case OPTION_KEEP:
            s->keep_quantised = true;
            break;
        case OPTION_KV:
            s->quantise_kv = true;
            break;
        default:
            exit(2);
        }
    }
    if (s->floors && !s->ops)
        die("--floors goes with --ops");
    if (!s->shape || s->batch < 1 || s->tokens < 2 || s->rank < 1 || s->steps < 1 || s->steps > STEPS_MAX ||
        s->context < 1) {
        fprintf(stderr, "bench_gpu: --shape is one of: %s; numbers must be positive\n", synthetic_shape_names);
        exit(2);
    }
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, compare);
    return values[n / 2];
}

void gpu_wait(struct backend *be)
{
    struct error err = {0};
    gpu_check(be->ops->sync(be, &err), &err);
}

static struct backend *open_card(const struct gpu_settings *s)
{
    const struct backend_cuda_options card = {
        .precision = KERNEL_BF16, .tune = true, .keep_quantised = s->keep_quantised, .quantise_kv = s->quantise_kv};
    struct backend *be = NULL;
    struct error err = {0};
    gpu_check(backend_cuda_new(&card, &be, &err), &err);
    return be;
}

void gpu_place(const struct gpu_settings *s, struct backend *be, const struct model *model,
               struct placed_model **placed, struct lora *host, struct lora *lora)
{
    struct error err = {0};
    const struct lora_config config = {
        .mode = LORA_JOINT, .rank = s->rank, .alpha = 2 * s->rank, .targets = LORA_TARGETS_ALL};
    synthetic_lora(host, &config, model);
    gpu_check(placed_model_new(be, model, s->rank, placed, &err), &err);
    gpu_check(lora_place(lora, host, be, &err), &err);
}

/* --- ceilings ---------------------------------------------------------------------------------------------------- */

double gpu_time(const struct gpu_settings *s, struct backend *be, int repeat, void (*call)(void *ctx), void *ctx)
{
    double times[7];
    const int runs = s->brief ? 1 : (int)ARRAY_LEN(times);
    if (s->brief)
        repeat = 1;
    for (int i = s->brief; i < 2; i++)
        call(ctx);
    gpu_wait(be);
    for (int i = 0; i < runs; i++) {
        const double start = now_seconds();
        for (int r = 0; r < repeat; r++)
            call(ctx);
        gpu_wait(be);
        times[i] = (now_seconds() - start) / repeat;
    }
    return median(times, runs);
}

struct product_call {
    struct backend *be;
    const struct linear_group *g;
    int32_t m;
    struct rows x, y[BACKEND_GROUP_MAX], none;
    bool backward;
};

static void call_product(void *ctx)
{
    const struct product_call *p = ctx;
    if (p->backward)
        p->be->ops->group_backward(p->be, p->g, NULL, p->m, p->y, p->none, false, p->x);
    else
        p->be->ops->group_forward(p->be, GROUP_TRAIN, p->g, NULL, p->m, p->x, p->y, p->none);
}

void *gpu_take(struct backend *be, size_t values)
{
    void *at = NULL;
    struct error err = {0};
    gpu_check(be->ops->alloc(be, values * 2, &at, &err), &err);
    return at;
}

void gpu_fill(struct backend *be, void *at, size_t values)
{
    const size_t chunk = (size_t)1 << 20;
    uint16_t *host = malloc(chunk * sizeof *host);
    uint64_t state = 11;
    if (!host)
        abort();
    for (size_t i = 0; i < chunk; i++) {
        const uint32_t r = next_random(&state);
        host[i] = (uint16_t)((r & 0x80ff) | 0x3f00); /* ±0.5 to ±2 */
    }
    for (size_t i = 0; i < values; i += chunk)
        be->ops->upload(be, (uint16_t *)at + i, host, (values - i < chunk ? values - i : chunk) * sizeof *host);
    free(host);
}

static void set_outputs(struct product_call *p, void *y)
{
    int32_t total = 0;
    for (int32_t i = 0; i < p->g->count; i++)
        total += p->g->out[i];
    struct rows at = {y, total};
    for (int32_t i = 0; i < p->g->count; i++) {
        p->y[i] = at;
        at = rows_from(p->be, at, p->g->out[i]);
    }
}

static double product_flops(const struct product_call *p)
{
    double out = 0;
    for (int32_t i = 0; i < p->g->count; i++)
        out += p->g->out[i];
    return 2.0 * p->m * out * p->g->in;
}

double gpu_peak(const struct gpu_settings *s, struct backend *be)
{
    const int32_t n = s->brief ? 64 : 8192;
    const size_t values = (size_t)n * (size_t)n;
    struct error err = {0};
    struct linear_group g;
    uint16_t *host = malloc(values * sizeof *host);
    uint64_t state = 5;
    if (!host)
        abort();
    for (size_t i = 0; i < values; i++)
        host[i] = (uint16_t)((next_random(&state) & 0x80ff) | 0x3c00);
    const struct tensor w = {host, TENSOR_BF16, n, n}, *const all[1] = {&w};
    gpu_check(be->ops->group_new(be, 1, all, 0, &g, &err), &err);
    struct product_call p = {.be = be, .g = &g, .m = n, .x = {gpu_take(be, values), n}};
    void *y = gpu_take(be, values);
    gpu_fill(be, p.x.at, values);
    set_outputs(&p, y);
    const double seconds = gpu_time(s, be, 10, call_product, &p);
    be->ops->group_free(be, &g);
    be->ops->release(be, p.x.at);
    be->ops->release(be, y);
    free(host);
    return product_flops(&p) / seconds;
}

/* The step's products, forward and backward, of one layer and of the head, over their FLOPs; printed one by one. */
static double measure_products(const struct gpu_settings *s, struct backend *be, const struct placed_model *placed,
                               int32_t m)
{
    const struct linear_group *groups[GROUP_COUNT + 1];
    static const char *const names[] = {"qkv", "o", "gate_up", "down", "head"};
    double flops = 0, seconds = 0;
    size_t widest = 0;
    for (int i = 0; i < GROUP_COUNT; i++)
        groups[i] = &placed->layers[0].groups[i];
    groups[GROUP_COUNT] = &placed->head;
    const int32_t head_rows = m < 1024 ? m : 1024;
    for (int i = 0; i <= GROUP_COUNT; i++) {
        size_t out = 0;
        for (int32_t j = 0; j < groups[i]->count; j++)
            out += (size_t)groups[i]->out[j];
        const size_t rows = (size_t)(i == GROUP_COUNT ? head_rows : m);
        widest = out * rows > widest ? out * rows : widest;
        widest = (size_t)groups[i]->in * rows > widest ? (size_t)groups[i]->in * rows : widest;
    }
    void *x = gpu_take(be, widest), *y = gpu_take(be, widest);
    gpu_fill(be, x, widest);
    gpu_fill(be, y, widest);
    for (int i = 0; i <= GROUP_COUNT; i++) {
        for (int backward = 0; backward < 2; backward++) {
            struct product_call p = {.be = be,
                                     .g = groups[i],
                                     .m = i == GROUP_COUNT ? head_rows : m,
                                     .x = {x, groups[i]->in},
                                     .backward = backward == 1};
            set_outputs(&p, y);
            const double one = gpu_time(s, be, 4, call_product, &p),
                         times = i == GROUP_COUNT ? (double)m / head_rows : placed->model->config.layer_count;
            if (!s->json)
                fprintf(stderr, "%-8s %-8s %8.1f us  %6.1f TFLOP/s\n", names[i], backward ? "backward" : "forward",
                        1e6 * one, product_flops(&p) / one / 1e12);
            flops += times * product_flops(&p);
            seconds += times * one;
        }
    }
    be->ops->release(be, x);
    be->ops->release(be, y);
    return flops / seconds;
}

struct copy_call {
    struct backend *be;
    void *to, *from;
    size_t bytes;
};

static void call_copy(void *ctx)
{
    const struct copy_call *c = ctx;
    c->be->ops->copy(c->be, c->to, c->from, c->bytes);
}

double gpu_copy_rate(const struct gpu_settings *s, struct backend *be)
{
    const size_t values = (size_t)1 << (s->brief ? 12 : 30);
    struct copy_call c = {be, gpu_take(be, values), gpu_take(be, values), values * 2};
    const double seconds = gpu_time(s, be, 4, call_copy, &c);
    be->ops->release(be, c.to);
    be->ops->release(be, c.from);
    return 2.0 * (double)c.bytes / seconds;
}

/* --- a training step --------------------------------------------------------------------------------------------- */

struct step {
    const struct gpu_settings *s;
    struct backend *be;
    const struct model *model;
    struct placed_model *placed;
    struct lora host, lora;
    size_t n;
    struct train *train;
    struct batch batch;
    int micro_batches;
    bool dp;
    int64_t *sum;
    float *gradient, *m, *v;
    int64_t steps;
    uint32_t vector;
    uint64_t state;
};

static void fill_batch(struct batch *batch, const struct gpu_settings *s, uint64_t *state)
{
    const int first = strcmp(s->labels, "quarter") == 0 ? s->tokens - s->tokens / 4 : 1;
    int32_t *ids = calloc((size_t)s->tokens, sizeof *ids);
    uint8_t *learn = calloc((size_t)s->tokens, 1);
    if (!ids || !learn)
        abort();
    memset(learn + first, 1, (size_t)(s->tokens - first));
    batch_clear(batch);
    for (int e = 0; e < s->batch; e++) {
        for (int i = 0; i < s->tokens; i++)
            ids[i] = (int32_t)(next_random(state) % (uint32_t)s->shape->config.vocabulary);
        if (!batch_add(batch, &(struct batch_example){ids, learn, s->tokens}))
            abort();
    }
    free(ids);
    free(learn);
}

static void one_step(struct step *t)
{
    static const uint8_t key[32] = {1, 2, 3};
    const struct clip_params clip = {.clip = 1, .grid = 65536};
    struct backend *be = t->be;
    struct gaussian gaussian;
    if (!gaussian_init(&gaussian, (uint64_t)1 << 32))
        die("the noise's variance");
    be->ops->zero(be, t->gradient, t->n * sizeof *t->gradient);
    if (t->dp) {
        be->ops->zero(be, t->sum, t->n * sizeof *t->sum);
        be->ops->noise_begin(be, key, t->vector++, &gaussian, t->n);
    }
    for (int i = 0; i < t->micro_batches; i++) {
        train_run(t->train, &t->lora, &t->batch);
        if (t->dp)
            be->ops->clip_accumulate(be, t->n, t->batch.examples, train_gradient(t->train, 0),
                                     train_gradient_stride(t->train), &clip, t->sum, NULL);
        else
            be->ops->add(be, t->n, train_gradient(t->train, 0), t->gradient);
    }
    if (t->dp) {
        be->ops->noise_add(be, t->n, t->sum);
        be->ops->scale_sum(be, t->n, t->sum, 1.0 / (65536.0 * t->batch.examples * t->micro_batches), t->gradient);
    } else {
        be->ops->divide(be, t->n, t->batch.examples * t->micro_batches, t->gradient);
    }
    const struct adamw_params adamw = {1e-5f, 0.9f, 0.999f, 1e-8f, 0, ++t->steps};
    be->ops->adamw(be, t->n, &adamw, t->gradient, t->m, t->v, t->lora.trained);
    gpu_wait(be);
}

struct measured {
    double seconds; /* the median step */
    double loss;
    int level;
    size_t bytes;
};

static struct measured measure_steps(struct step *t, bool dp, int micro_batches)
{
    const struct gpu_settings *s = t->s;
    struct error err = {0};
    double times[STEPS_MAX];
    const int32_t rows = s->batch * s->tokens;
    const struct train_options train_options = {.backend = t->be,
                                                .placed = t->placed,
                                                .tokens_max = rows,
                                                .examples_max = s->batch,
                                                .example_tokens_max = s->tokens,
                                                .per_example = dp,
                                                .noise = dp,
                                                .checkpoint_level = s->level};
    t->dp = dp;
    t->micro_batches = micro_batches;
    gpu_check(train_new(&train_options, t->model, &t->host, &t->train, &err), &err);
    fill_batch(&t->batch, s, &t->state);
    for (int i = 0; i < 3; i++) /* run, record, replay */
        one_step(t);
    const int wanted = (s->steps + micro_batches - 1) / micro_batches;
    const int steps = wanted > 2 || s->brief ? wanted : 3;
    for (int i = 0; i < steps; i++) {
        const double start = now_seconds();
        one_step(t);
        times[i] = now_seconds() - start;
    }
    const struct measured result = {median(times, steps), train_loss(t->train, 0), train_level(t->train),
                                    train_memory_bytes(t->train)};
    train_free(t->train);
    t->train = NULL;
    return result;
}

static void step_init(struct step *t, const struct gpu_settings *s, struct backend *be, const struct model *model)
{
    struct error err = {0};
    void *memory = NULL;
    *t = (struct step){.s = s, .be = be, .model = model, .state = 3};
    gpu_place(s, be, model, &t->placed, &t->host, &t->lora);
    t->n = t->host.trained_count;
    gpu_check(be->ops->alloc(be, t->n * (sizeof *t->sum + 3 * sizeof(float)), &memory, &err), &err);
    t->sum = memory;
    t->gradient = (float *)(t->sum + t->n);
    t->m = t->gradient + t->n;
    t->v = t->m + t->n;
    gpu_check(batch_init(&t->batch, s->batch * s->tokens, s->batch, &err), &err);
}

static void step_release(struct step *t)
{
    batch_release(&t->batch);
    t->be->ops->release(t->be, t->sum);
    lora_unplace(&t->lora);
    placed_model_free(t->placed);
    lora_release(&t->host);
}

/* As gpu_table.py says: 4 a weight, 3.5 of the causal attention's forward, 6 a LoRA weight; the head by label rows. */
static double flops_per_token(const struct gpu_settings *s, const struct model *model, size_t lora)
{
    const struct model_config *c = &model->config;
    const double head = (double)c->vocabulary * c->d_model;
    const double labelled =
        strcmp(s->labels, "quarter") == 0 ? (double)(s->tokens / 4) / s->tokens : (double)(s->tokens - 1) / s->tokens;
    const double attention = 2.0 * s->tokens * c->head_count * c->head_size * c->layer_count;
    return 4 * ((double)model_weight_count(model) - head + head * labelled) + 3.5 * attention + 6.0 * (double)lora;
}

static void bench_train(const struct gpu_settings *s, struct backend *be, const struct model *model)
{
    struct step t;
    struct measured off = {0}, on = {0};
    step_init(&t, s, be, model);
    const double peak = gpu_peak(s, be), weighted = measure_products(s, be, t.placed, s->batch * s->tokens);
    const int logical = s->brief ? 2 * s->batch : LOGICAL_BATCH;
    const int micro = s->dp ? (logical + s->batch - 1) / s->batch : 1;
    const double rows = (double)s->batch * s->tokens * micro;
    off = measure_steps(&t, false, micro);
    if (s->dp)
        on = measure_steps(&t, true, micro);
    const struct measured *m = s->dp ? &on : &off;
    const double flops = flops_per_token(s, model, t.n);
    if (s->json) {
        printf("{\"program\":\"bench_gpu\",\"kind\":\"train\",\"shape\":\"%s\",\"batch\":%d,\"tokens\":%d,\"rank\":%d,"
               "\"labels\":\"%s\",\"dp\":\"%s\",\"base\":\"%s%s\",\"steps\":%d,\"micro_batches\":%d,"
               "\"level\":%d,\"step_ms\":%.3f,\"tokens_per_second\":%.1f,\"memory_bytes\":%zu,\"flops_per_token\":%.6e,"
               "\"loss\":%.4f,\"gemm_tflops\":{\"peak\":%.1f,\"weighted\":%.1f}",
               s->shape->name, s->batch, s->tokens, s->rank, s->labels, s->dp ? "on" : "off", s->base,
               s->keep_quantised ? " kept" : "", s->steps, micro, m->level, 1e3 * m->seconds, rows / m->seconds,
               m->bytes, flops, m->loss, peak / 1e12, weighted / 1e12);
        if (s->dp)
            printf(",\"tokens_per_second_without_dp\":%.1f", rows / off.seconds);
        printf("}\n");
    } else {
        printf("%s  %d x %d  base %s  dp %s  level %d  step %.2f ms = %.0f tokens/s = %.3f of the shape's products "
               "(%.0f TFLOP/s), %.3f of 8192^3 (%.0f)  loss %.3f\n",
               s->shape->name, s->batch, s->tokens, s->base, s->dp ? "on" : "off", m->level, 1e3 * m->seconds,
               rows / m->seconds, rows / m->seconds * flops / weighted, weighted / 1e12,
               rows / m->seconds * flops / peak, peak / 1e12, m->loss);
        if (s->dp)
            printf("without dp %.0f tokens/s: dp costs %.2f %%\n", rows / off.seconds,
                   100 * (on.seconds / off.seconds - 1));
    }
    step_release(&t);
}

/* --- decoding ---------------------------------------------------------------------------------------------------- */

static void bench_decode(const struct gpu_settings *s, struct backend *be, const struct model *model)
{
    struct infer *infer = NULL;
    struct kv_cache *cache = NULL;
    struct error err = {0};
    const int32_t vocabulary = model->config.vocabulary, context = s->context, answer = s->brief ? 4 : 128;
    int32_t *ids = calloc((size_t)context, sizeof *ids);
    uint64_t state = 5;
    double times[5], prefill[5];
    const int repeats = s->brief ? 1 : (int)ARRAY_LEN(times);
    const struct infer_options infer_options = {.backend = be, .rows_max = 512, .context_max = context + answer + 1};
    if (!ids)
        abort();
    for (int32_t i = 0; i < context; i++)
        ids[i] = (int32_t)(next_random(&state) % (uint32_t)vocabulary);
    gpu_check(infer_new(&infer_options, model, &infer, &err), &err);
    gpu_check(kv_cache_new(be, model, context + answer + 1, &cache, &err), &err);
    for (int repeat = 0; repeat < repeats; repeat++) {
        kv_cache_truncate(cache, 0);
        const struct infer_extend prompt = {cache, ids, context};
        const double start = now_seconds();
        gpu_check(infer_extend(infer, NULL, &prompt, 1, &err), &err);
        const double began = now_seconds();
        for (int32_t i = 0; i < answer; i++) {
            int32_t best = 0;
            gpu_check(infer_likeliest(infer, cache, &best, &err), &err);
            const struct infer_extend one = {cache, &best, 1};
            gpu_check(infer_extend(infer, NULL, &one, 1, &err), &err);
        }
        times[repeat] = (now_seconds() - began) / answer;
        prefill[repeat] = began - start;
    }
    const double token = median(times, repeats), prompt = median(prefill, repeats);
    if (s->json)
        printf(
            "{\"program\":\"bench_gpu\",\"kind\":\"decode\",\"shape\":\"%s\",\"base\":\"%s\",\"batch\":1,"
            "\"context\":%d,\"quantised_kv\":%s,\"decode_tokens_per_second\":%.1f,\"prompt_tokens_per_second\":%.1f}\n",
            s->shape->name, s->base, context, s->quantise_kv ? "true" : "false", 1 / token, context / prompt);
    else
        printf("%s  base %s  %.1f tokens/s after %d tokens of context, prompt %.0f tokens/s\n", s->shape->name, s->base,
               1 / token, context, context / prompt);
    kv_cache_free(cache);
    infer_free(infer);
    free(ids);
}

int main(int argc, char **argv)
{
    struct gpu_settings s = {.base = "bf16",
                             .labels = "all",
                             .batch = 4,
                             .tokens = 1024,
                             .rank = 16,
                             .steps = 10,
                             .level = TRAIN_LEVEL_AUTO,
                             .context = 512};
    struct synthetic synthetic;
    parse(argc, argv, &s);
    if (s.ops && s.floors) {
        gpu_floors(&s);
        return 0;
    }
    struct backend *be = open_card(&s);
    synthetic_init_shape(&synthetic, s.shape, strcmp(s.base, "q4_1") == 0 ? TENSOR_Q4_1 : TENSOR_BF16);
    const struct model *model = synthetic_model(&synthetic);
    if (s.decode)
        bench_decode(&s, be, model);
    else if (s.ops)
        gpu_ops(&s, be, model);
    else
        bench_train(&s, be, model);
    backend_free(be);
    synthetic_release(&synthetic);
    return 0;
}
