/*
 * What averaging LoRA factors loses: sites train from one global adapter, their factors are averaged, and the update
 * that the averages stand for is compared with the average of the sites' updates.
 *
 *     averaging --model FILE_OR_FOLDER [--rounds R] [--steps S] [--batch B] [--rank r] [--learning-rate L]
 *               [--layers FIRST] [--targets qv|all] [--threads N] [--precision bf16|f32] [--json] SITE.jsonl...
 *
 * One line a mode (joint, ffa, alternating) and round. For the adapted linears together, with W_i = s·B_i·A_i of site i
 * and the bar the mean over sites:   error = ‖s·B̄·Ā − mean(W_i)‖ / ‖mean(W_i) − W‖   (Frobenius), W the round's start.
 * It is the part of a round's update that averaging changed: 0 but for float32 where one factor is frozen. No noise, no
 * clipping; AdamW, each site its own records in the order of the file.
 */
#include "bench/checked.h"
#include "bench/synthetic.h"
#include "kernels/backend.h"
#include "model/formats/chat.h"
#include "model/formats/dataset.h"
#include "model/formats/model_file.h"
#include "model/optimizer.h"
#include "model/train.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SITES_MAX 32
#define TOKENS_MAX 128 /* of one record */

struct settings {
    const char *model;
    int rounds, steps, batch, rank, layers, threads;
    float learning_rate;
    uint32_t targets;
    enum kernel_precision precision; /* KERNEL_F32 unless asked for */
    bool json;
};

static const struct option options[] = {
    {"model", required_argument, NULL, 'm'},   {"rounds", required_argument, NULL, 'R'},
    {"steps", required_argument, NULL, 'S'},   {"batch", required_argument, NULL, 'B'},
    {"rank", required_argument, NULL, 'r'},    {"learning-rate", required_argument, NULL, 'l'},
    {"layers", required_argument, NULL, 'L'},  {"targets", required_argument, NULL, 'g'},
    {"threads", required_argument, NULL, 't'}, {"precision", required_argument, NULL, 'p'},
    {"json", no_argument, NULL, 'j'},          {NULL, 0, NULL, 0},
};

static void parse(int argc, char **argv, struct settings *s)
{
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'm':
            s->model = optarg;
            break;
        case 'R':
            s->rounds = bench_number(optarg, 1, 1000);
            break;
        case 'S':
            s->steps = bench_number(optarg, 1, 10000);
            break;
        case 'B':
            s->batch = bench_number(optarg, 1, 1024);
            break;
        case 'r':
            s->rank = bench_number(optarg, 1, LORA_RANK_MAX);
            break;
        case 'l':
            s->learning_rate = strtof(optarg, NULL);
            break;
        case 'L':
            s->layers = bench_number(optarg, 0, MODEL_LAYERS_MAX);
            break;
        case 'g':
            s->targets = strcmp(optarg, "all") == 0 ? LORA_TARGETS_ALL : s->targets;
            break;
        case 't':
            s->threads = bench_number(optarg, 1, 256);
            break;
        case 'p':
            s->precision = strcmp(optarg, "bf16") == 0 ? KERNEL_BF16 : KERNEL_F32;
            break;
        case 'j':
            s->json = true;
            break;
        default:
            exit(2);
        }
    }
    if (!s->model || argc - optind < 2 || argc - optind > SITES_MAX) {
        fprintf(stderr, "averaging: --model and 2 to %d files of records are needed\n", SITES_MAX);
        exit(2);
    }
}

static void *take(size_t count, size_t size)
{
    void *at = calloc(count, size);
    if (!at) {
        fprintf(stderr, "averaging: out of memory\n");
        exit(1);
    }
    return at;
}

/* All factors of a lora, A section ‖ B section whatever the mode is. */
struct factors {
    float *a, *b; /* (a_count), (b_count) */
};

struct run {
    const struct settings *s;
    const struct model *model;
    struct backend *backend;
    struct dataset *data[SITES_MAX];
    size_t next[SITES_MAX]; /* record */
    int sites;
    size_t a_count, b_count;
    struct lora lora;
    struct train *train;
    struct optimizer optimizer;
    struct batch batch;
    float *mean; /* gradient */
    struct factors start, average, own[SITES_MAX];
};

/* Where the lora's sections are: joint has both in trained. */
static struct factors sections(const struct run *r)
{
    switch (r->lora.config.mode) {
    case LORA_JOINT:
        return (struct factors){r->lora.trained, r->lora.trained + r->a_count};
    case LORA_FFA:
        return (struct factors){r->lora.frozen, r->lora.trained};
    default:
        return (struct factors){r->lora.trained, r->lora.frozen};
    }
}

static void copy_factors(const struct run *r, struct factors from, struct factors to)
{
    memcpy(to.a, from.a, r->a_count * sizeof *to.a);
    memcpy(to.b, from.b, r->b_count * sizeof *to.b);
}

static void local_step(struct run *r, int site)
{
    const size_t n = r->lora.trained_count;
    batch_clear(&r->batch);
    for (int i = 0; i < r->s->batch; i++) {
        struct batch_example example;
        dataset_example(r->data[site], r->next[site]++ % dataset_count(r->data[site]), &example);
        if (!batch_add(&r->batch, &example))
            abort();
    }
    train_run(r->train, &r->lora, &r->batch);
    for (size_t i = 0; i < n; i++)
        r->mean[i] = train_gradient(r->train, 0)[i] / (float)r->s->batch;
    optimizer_step(&r->optimizer, r->mean, r->lora.trained);
}

/* to += weight·B·A of one linear; to (out, in). */
static void add_product(const struct lora_entry *e, int32_t rank, struct factors f, double weight, double *to)
{
    for (int32_t o = 0; o < e->out; o++)
        for (int32_t k = 0; k < rank; k++) {
            const double b = weight * f.b[e->b_offset + (size_t)o * (size_t)rank + (size_t)k];
            const float *a = f.a + e->a_offset + (size_t)k * (size_t)e->in;
            double *row = to + (size_t)o * (size_t)e->in;
            for (int32_t i = 0; i < e->in; i++)
                row[i] += b * a[i];
        }
}

static double squares(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

/* The lora's entries have offsets of its mode's arenas; joint's B offsets begin behind A. */
static double averaging_error(struct run *r)
{
    double wrong = 0, update = 0;
    for (int32_t k = 0; k < r->lora.entry_count; k++) {
        struct lora_entry e = r->lora.entries[k];
        const size_t n = (size_t)e.out * (size_t)e.in;
        double *of_mean = take(n, sizeof *of_mean), *mean_of = take(n, sizeof *mean_of);
        e.b_offset -= r->lora.config.mode == LORA_JOINT ? r->a_count : 0;
        for (int i = 0; i < r->sites; i++)
            add_product(&e, r->s->rank, r->own[i], 1.0 / r->sites, mean_of);
        add_product(&e, r->s->rank, r->average, 1, of_mean);
        for (size_t i = 0; i < n; i++)
            of_mean[i] -= mean_of[i];
        add_product(&e, r->s->rank, r->start, -1, mean_of);
        wrong += squares(of_mean, n);
        update += squares(mean_of, n);
        free(of_mean);
        free(mean_of);
    }
    return sqrt(wrong / update);
}

static void average_sites(struct run *r)
{
    for (size_t i = 0; i < r->a_count; i++) {
        double sum = 0;
        for (int k = 0; k < r->sites; k++)
            sum += r->own[k].a[i];
        r->average.a[i] = (float)(sum / r->sites);
    }
    for (size_t i = 0; i < r->b_count; i++) {
        double sum = 0;
        for (int k = 0; k < r->sites; k++)
            sum += r->own[k].b[i];
        r->average.b[i] = (float)(sum / r->sites);
    }
}

static void federated_round(struct run *r, const char *name, int round)
{
    double loss = 0;
    copy_factors(r, sections(r), r->start);
    for (int site = 0; site < r->sites; site++) {
        copy_factors(r, r->start, sections(r));
        optimizer_reset(&r->optimizer, r->lora.trained_count);
        for (int step = 0; step < r->s->steps; step++)
            local_step(r, site);
        for (int e = 0; e < r->s->batch; e++)
            loss += train_loss(r->train, e) / r->s->batch / r->sites;
        copy_factors(r, sections(r), r->own[site]);
    }
    average_sites(r);
    copy_factors(r, r->average, sections(r));
    if (r->s->json)
        printf("{\"mode\":\"%s\",\"round\":%d,\"error\":%.3e,\"loss\":%.4f}\n", name, round, averaging_error(r), loss);
    else
        printf("%-12s round %2d  error %.3e  loss at the sites %.4f\n", name, round, averaging_error(r), loss);
    fflush(stdout);
}

static void fill(void *ctx, void *out, size_t len)
{
    uint8_t *bytes = out;
    for (size_t i = 0; i < len; i++)
        bytes[i] = (uint8_t)next_random(ctx);
}

static struct rng constant_stream(void *ctx, uint32_t layer, enum lora_target target)
{
    (void)layer;
    (void)target;
    return (struct rng){fill, ctx};
}

static void run_mode(struct run *r, const char *name, enum lora_mode mode, bool alternating)
{
    const struct settings *s = r->s;
    struct error err = {0};
    const struct lora_config config = {.mode = mode,
                                       .rank = s->rank,
                                       .alpha = 2 * s->rank,
                                       .layer_first = s->layers < r->model->config.layer_count ? s->layers : 0,
                                       .targets = s->targets};
    const struct optimizer_config adamw = {
        .kind = OPTIMIZER_ADAMW, .lr = s->learning_rate, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};
    bench_check(lora_init(&r->lora, &config, &r->model->config, &err), &err);
    uint64_t state = 1;
    lora_fill_a(&r->lora, constant_stream, &state);
    const size_t total = r->lora.trained_count + r->lora.frozen_count;
    r->a_count = 0;
    for (int32_t i = 0; i < r->lora.entry_count; i++)
        r->a_count += (size_t)s->rank * (size_t)r->lora.entries[i].in;
    r->b_count = total - r->a_count;
    const size_t half = r->a_count > r->b_count ? r->a_count : r->b_count;
    struct train_options train_options = {.backend = r->backend,
                                          .tokens_max = TOKENS_MAX * s->batch,
                                          .examples_max = s->batch,
                                          .example_tokens_max = TOKENS_MAX,
                                          .alternating = alternating};
    bench_check(train_new(&train_options, r->model, &r->lora, &r->train, &err), &err);
    bench_check(optimizer_init(&r->optimizer, &adamw, r->backend, mode == LORA_JOINT ? total : half, &err), &err);
    r->mean = take(total, sizeof *r->mean);
    struct factors *all[SITES_MAX + 2] = {&r->start, &r->average};
    for (int i = 0; i < r->sites; i++)
        all[2 + i] = &r->own[i];
    for (int i = 0; i < r->sites + 2; i++)
        *all[i] = (struct factors){take(r->a_count, sizeof(float)), take(r->b_count, sizeof(float))};
    memset(r->next, 0, sizeof r->next);
    for (int round = 1; round <= s->rounds; round++) {
        federated_round(r, name, round);
        if (alternating)
            lora_exchange(&r->lora);
    }
    for (int i = 0; i < r->sites + 2; i++) {
        free(all[i]->a);
        free(all[i]->b);
    }
    free(r->mean);
    optimizer_release(&r->optimizer);
    train_free(r->train);
    lora_release(&r->lora);
}

int main(int argc, char **argv)
{
    struct settings s = {.rounds = 8,
                         .steps = 4,
                         .batch = 16,
                         .rank = 8,
                         .layers = 20,
                         .threads = 2,
                         .learning_rate = 2e-3f,
                         .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V)};
    struct run r = {.s = &s};
    struct model_file *file;
    struct tokenizer *tokenizer;
    struct pool *pool;
    struct error err = {0};
    parse(argc, argv, &s);
    bench_check(model_file_open(s.model, &file, &err), &err);
    bench_check(model_file_tokenizer(file, &tokenizer, &err), &err);
    r.model = model_file_model(file);
    r.sites = argc - optind;
    for (int i = 0; i < r.sites; i++) {
        const struct dataset_options data = {
            .tokenizer = tokenizer, .chat = {.system = CHAT_SYSTEM_NONE}, .tokens_max = TOKENS_MAX};
        bench_check(dataset_load(argv[optind + i], &data, &r.data[i], &err), &err);
    }
    bench_check(pool_new(s.threads, &pool, &err), &err);
    bench_check(backend_cpu_new(kernels_cpu(KERNEL_AVX512_BF16), pool, s.precision, &r.backend, &err), &err);
    bench_check(batch_init(&r.batch, TOKENS_MAX * s.batch, s.batch, &err), &err);
    run_mode(&r, "joint", LORA_JOINT, false);
    run_mode(&r, "ffa", LORA_FFA, false);
    run_mode(&r, "alternating", LORA_FFA, true);
    batch_release(&r.batch);
    backend_free(r.backend);
    pool_free(pool);
    for (int i = 0; i < r.sites; i++)
        dataset_free(r.data[i]);
    tokenizer_free(tokenizer);
    model_file_close(file);
    return 0;
}
