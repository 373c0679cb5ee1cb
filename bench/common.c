#include "bench/common.h"

#ifdef BENCH_FORMATS
#include "model/formats/gguf.h"
#endif

#include <getopt.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

/* --- allocation counters (linked with --wrap) --------------------------------------------------------------------- */

static atomic_long allocations;

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_aligned_alloc(size_t alignment, size_t n);

void *__wrap_malloc(size_t n)
{
    allocations++;
    return __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    allocations++;
    return __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    allocations++;
    return __real_realloc(p, n);
}

void *__wrap_aligned_alloc(size_t alignment, size_t n)
{
    allocations++;
    return __real_aligned_alloc(alignment, n);
}

long bench_allocations(void)
{
    return allocations;
}

size_t bench_peak_rss_bytes(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (size_t)usage.ru_maxrss * 1024 : 0;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

void bench_turn(const struct bench_options *options)
{
    char line[8];
    if (!options->turns)
        return;
    if (puts("turn") < 0 || fflush(stdout) != 0 || fgets(line, sizeof line, stdin) == NULL)
        bench_fail("--turns: nobody gives turns on standard input");
}

void bench_fail(const char *message)
{
    fprintf(stderr, "%s\n", message);
    exit(1);
}

/* --- options ------------------------------------------------------------------------------------------------------ */

static const char usage_text[] =
    "  --shape NAME       random weights of this shape (smollm2-135m); or\n"
    "  --model FILE       a GGUF file\n"
    "  --quant TYPE       of the random weights: q4_1 (default), q8_0, q4_k, bf16, f32\n"
    "  --threads N        2\n"
    "  --seq T            tokens of a sequence, or of the prompt: 512\n"
    "  --batch B          train: sequences of an optimiser step, one after the other: 32\n"
    "  --rank R           LoRA rank: 16 (infer: none is measured)\n"
    "  --layers K         train: adapt the upper K layers only (default: all)\n"
    "  --dp on|off        train: clip each sequence's gradient and add noise: off\n"
    "  --level L          train: checkpoint level 0 to 2: 0\n"
    "  --tokens N         infer: tokens decoded after the prompt: 64\n"
    "  --rounds N         infer: how often all is measured, the median counts: 3\n"
    "  --precision P      f32 (default) or bf16 (faster products of less precision, as kernels/kernels.h says)\n"
    "  --isa NAME         at most: scalar, avx2, avx512, avx512-vnni, avx512-bf16\n"
    "  --no-ceiling       do not measure what the machine could do\n"
    "  --turns            say 'turn' and wait for a line before each sequence or round (bench/in_turns.py)\n"
    "  --json             one JSON object\n";

enum { SHAPE = 256, MODEL, QUANT, THREADS, SEQ, BATCH, RANK, LAYERS, DP, LEVEL, TOKENS, ROUNDS, PRECISION, ISA_NAME };

static const struct option options_known[] = {
    {"shape", required_argument, NULL, SHAPE},
    {"model", required_argument, NULL, MODEL},
    {"quant", required_argument, NULL, QUANT},
    {"threads", required_argument, NULL, THREADS},
    {"seq", required_argument, NULL, SEQ},
    {"batch", required_argument, NULL, BATCH},
    {"rank", required_argument, NULL, RANK},
    {"layers", required_argument, NULL, LAYERS},
    {"dp", required_argument, NULL, DP},
    {"level", required_argument, NULL, LEVEL},
    {"tokens", required_argument, NULL, TOKENS},
    {"rounds", required_argument, NULL, ROUNDS},
    {"precision", required_argument, NULL, PRECISION},
    {"isa", required_argument, NULL, ISA_NAME},
    {"no-ceiling", no_argument, NULL, 'c'},
    {"turns", no_argument, NULL, 't'},
    {"json", no_argument, NULL, 'j'},
    {"help", no_argument, NULL, 'h'},
    {NULL, 0, NULL, 0},
};

static void bad(const char *option, const char *value, const char *expected)
{
    fprintf(stderr, "--%s %s: expected %s\n", option, value, expected);
    exit(2);
}

static int number(const char *option, int low, int high)
{
    char *end, range[64];
    const long n = strtol(optarg, &end, 10);
    if (*optarg == '\0' || *end != '\0' || n < low || n > high) {
        snprintf(range, sizeof range, "a number from %d to %d", low, high);
        bad(option, optarg, range);
    }
    return (int)n;
}

static enum tensor_type quant(void)
{
    static const struct {
        const char *name;
        enum tensor_type type;
    } types[] = {
        {"q4_1", TENSOR_Q4_1}, {"q8_0", TENSOR_Q8_0}, {"q4_k", TENSOR_Q4_K}, {"bf16", TENSOR_BF16}, {"f32", TENSOR_F32},
    };
    for (size_t i = 0; i < ARRAY_LEN(types); i++)
        if (strcmp(optarg, types[i].name) == 0)
            return types[i].type;
    bad("quant", optarg, "q4_1, q8_0, q4_k, bf16 or f32");
    return TENSOR_F32;
}

static bool is_first(const char *option, const char *first, const char *second)
{
    if (strcmp(optarg, first) != 0 && strcmp(optarg, second) != 0) {
        fprintf(stderr, "--%s %s: expected %s or %s\n", option, optarg, first, second);
        exit(2);
    }
    return strcmp(optarg, first) == 0;
}

static void take(int option, struct bench_options *o)
{
    switch (option) {
    case SHAPE:
        o->shape = optarg;
        break;
    case MODEL:
        o->file = optarg;
        break;
    case QUANT:
        o->type = quant();
        break;
    case THREADS:
        o->threads = number("threads", 1, POOL_THREADS_MAX);
        break;
    case SEQ:
        o->seq = number("seq", 2, 65536);
        break;
    case BATCH:
        o->batch = number("batch", 1, 4096);
        break;
    case RANK:
        o->rank = number("rank", 1, LORA_RANK_MAX);
        break;
    case LAYERS:
        o->layers = number("layers", 1, MODEL_LAYERS_MAX);
        break;
    case DP:
        o->dp = is_first("dp", "on", "off");
        break;
    case LEVEL:
        o->level = number("level", 0, 2);
        break;
    case TOKENS:
        o->tokens = number("tokens", 1, 4096);
        break;
    case ROUNDS:
        o->rounds = number("rounds", 1, 100);
        break;
    case PRECISION:
        o->precision = is_first("precision", "bf16", "f32") ? KERNEL_BF16 : KERNEL_F32;
        break;
    case ISA_NAME:
        if (!kernel_isa_parse(optarg, &o->isa))
            bad("isa", optarg, "scalar, avx2, avx512, avx512-vnni or avx512-bf16");
        break;
    }
}

void bench_parse(int argc, char **argv, struct bench_options *options)
{
    for (int c; (c = getopt_long(argc, argv, "", options_known, NULL)) != -1;) {
        if (c == 'h') {
            printf("usage: %s [options]\n%s", argv[0], usage_text);
            exit(0);
        } else if (c == 'j') {
            options->json = true;
        } else if (c == 't') {
            options->turns = true;
        } else if (c == 'c') {
            options->ceiling = false;
        } else if (c == '?') {
            exit(2);
        } else {
            take(c, options);
        }
    }
    if (optind < argc)
        bad("help", argv[optind], "options only");
}

/* --- the model ---------------------------------------------------------------------------------------------------- */

static void open_file(struct bench_model *m, const char *path)
{
#ifdef BENCH_FORMATS
    struct error err = {0};
    if (gguf_open(path, &m->gguf, &err) < 0 || gguf_load_model(m->gguf, &m->loaded, &err) < 0)
        bench_fail(err.message);
    m->model = &m->loaded;
    m->name = gguf_name(m->gguf);
#else
    (void)m;
    (void)path;
    bench_fail("--model is not available: this build has only the core (CONSILIUM_CORE_ONLY), without model/formats");
#endif
}

void bench_model_open(struct bench_model *m, const struct bench_options *options)
{
    memset(m, 0, sizeof *m);
    if (options->file) {
        open_file(m, options->file);
        return;
    }
    const struct synthetic_shape *shape = synthetic_shape_find(options->shape);
    if (!shape)
        bad("shape", options->shape, synthetic_shape_names);
    synthetic_init_shape(&m->synthetic, shape, options->type);
    /* The table of positions is all that a context length means here. */
    if (m->synthetic.model.config.context_length < options->seq + options->tokens)
        m->synthetic.model.config.context_length = options->seq + options->tokens;
    m->model = synthetic_model(&m->synthetic);
    m->name = shape->name;
}

void bench_model_close(struct bench_model *m)
{
#ifdef BENCH_FORMATS
    gguf_close(m->gguf);
#endif
    if (m->synthetic.memory)
        synthetic_release(&m->synthetic);
}

static size_t matrix_bytes(const struct tensor *t)
{
    size_t row = 0;
    if (!tensor_type_row_bytes(t->type, (size_t)t->in, &row))
        bench_fail("a matrix has no whole number of blocks in a row");
    return row * (size_t)t->out;
}

size_t bench_weight_bytes(const struct model *model)
{
    size_t bytes = matrix_bytes(model_head(model));
    for (int32_t i = 0; i < model->config.layer_count; i++) {
        const struct model_layer *l = &model->layers[i];
        bytes += matrix_bytes(&l->q) + matrix_bytes(&l->k) + matrix_bytes(&l->v) + matrix_bytes(&l->o) +
                 matrix_bytes(&l->gate) + matrix_bytes(&l->up) + matrix_bytes(&l->down);
    }
    return bytes;
}
