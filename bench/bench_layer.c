/*
 * Time of each operation of one SmolLM2-135M training layer (f forward, b backward), so that a slow one stands out.
 *
 *     bench_layer [--threads N] [--isa NAME] [--rows M] [--segment T] [--f32] [--json]
 */
#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <time.h>

enum { WIDTH = 576, FFN = 1536, HEADS = 9, KV = 3, HEAD = 64, RANK = 16, VOCABULARY = 49152, REPEATS = 7 };

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

struct bench {
    const struct kernel_ops *ops;
    struct kernel_run run;
    int32_t m, count;
    int32_t offsets[1025], positions[8192], rows[8192], targets[8192];
    struct attention_shape shape;
    struct segments segments;
    struct labels labels;
    struct tensor square, ffn, head;
    float *p[8]; /* (m, FFN) each */
    float *table, *a, *arena;
    int64_t *sum;
};

#define WITH(b)                                                                                                        \
    const struct kernel_ops *o = (b)->ops;                                                                             \
    const struct kernel_run *run = &(b)->run;                                                                          \
    int32_t m = (b)->m;                                                                                                \
    float **p = (b)->p;                                                                                                \
    (void)o, (void)run, (void)m, (void)p

#define CASE(name, call)                                                                                               \
    static void name(struct bench *b)                                                                                  \
    {                                                                                                                  \
        WITH(b);                                                                                                       \
        call;                                                                                                          \
    }

CASE(norm_f, o->rmsnorm_forward(run, m, WIDTH, 1e-5f, p[0], p[1], NULL, p[2], p[3]))
CASE(norm_b, o->rmsnorm_backward(run, m, WIDTH, p[0], p[1], p[3], p[2], p[4], true))
CASE(rope_f, o->rope(run, m, HEADS, HEAD, HEAD, ROPE_NORM, false, b->table, b->positions, p[5]))
CASE(square_f, o->linear_forward(run, m, &b->square, NULL, NULL, p[0], p[1], false))
CASE(square_b, o->linear_backward(run, m, &b->square, NULL, p[0], p[1], false))
CASE(ffn_f, o->linear_forward(run, m, &b->ffn, NULL, NULL, p[0], p[1], false))
CASE(ffn_b, o->linear_backward(run, m, &b->ffn, NULL, p[0], p[1], false))
CASE(gate_f, o->gated_forward(run, m, FFN, GATE_SILU, p[0], p[1], FFN, p[2]))
CASE(gate_b, o->gated_backward(run, m, FFN, GATE_SILU, p[6], p[7], FFN, p[2]))
CASE(attention_f, o->attention_forward(run, &b->shape, &b->segments, p[0], p[1], p[2], p[3], p[4]))
CASE(attention_b,
     o->attention_backward(run, &b->shape, &b->segments, p[0], p[1], p[2], p[3], p[4], p[0], p[5], p[6], p[7]))
CASE(lora_down, o->lora_down(run, m, WIDTH, RANK, b->a, p[0], p[1]))
CASE(lora_up, o->lora_up(run, m, WIDTH, RANK, 1, b->a, p[0], RANK, p[5]))
CASE(lora_up_b, o->lora_up_backward(run, m, WIDTH, RANK, 1, b->a, p[0], p[1], RANK))
CASE(lora_down_b, o->lora_down_backward(run, m, WIDTH, RANK, b->a, p[0], p[5]))
CASE(head_f, o->cross_entropy(run, &b->head, &b->labels, p[0], p[1], NULL))
CASE(head_fb, o->cross_entropy(run, &b->head, &b->labels, p[0], p[1], p[2]))

static void grad_b(struct bench *b)
{
    for (int32_t s = 0; s < b->count; s++)
        b->ops->lora_grad_b(&b->run, b->offsets[s], b->offsets[s + 1], WIDTH, RANK, 1, b->p[0], b->p[1], RANK, b->p[2]);
}

static void clip(struct bench *b)
{
    struct clip_params params = {1, 1048576};
    struct clip_result result;
    b->ops->clip_accumulate(1000000, b->arena, &params, b->sum, &result);
}

static const struct {
    const char *name;
    void (*run)(struct bench *b);
} cases[] = {
    {"rmsnorm f", norm_f},
    {"rmsnorm b", norm_b},
    {"rope", rope_f},
    {"linear 576x576 f", square_f},
    {"linear 576x576 b", square_b},
    {"linear 1536x576 f", ffn_f},
    {"linear 1536x576 b", ffn_b},
    {"gate f", gate_f},
    {"gate b", gate_b},
    {"attention f", attention_f},
    {"attention b", attention_b},
    {"lora down", lora_down},
    {"lora up", lora_up},
    {"lora up b", lora_up_b},
    {"lora down b", lora_down_b},
    {"lora grad B, all units", grad_b},
    {"head f, 32 labels", head_f},
    {"head f+b, 32 labels", head_fb},
    {"clip, 1M values", clip},
};

static void prepare(struct bench *b, int32_t segment)
{
    uint32_t state = 1;
    size_t weights = (size_t)VOCABULARY * WIDTH / 32 * 34;
    uint8_t *bytes = malloc(weights);
    size_t head = kernels_head_scratch(pool_threads(b->run.pool), 32, WIDTH);
    size_t linear = kernels_linear_scratch(pool_threads(b->run.pool), b->m, FFN, FFN);
    b->shape = (struct attention_shape){HEADS, KV, HEAD, 0, 0.125f};
    size_t attention = kernels_attention_scratch(pool_threads(b->run.pool), &b->shape, segment, 1);
    b->run.scratch_bytes = (head > linear ? head : linear) + attention;
    b->run.scratch = aligned_alloc(64, (b->run.scratch_bytes + 63) & ~(size_t)63);
    bool ok = bytes && b->run.scratch;
    for (int i = 0; i < 8; i++)
        ok = (b->p[i] = malloc((size_t)b->m * FFN * sizeof(float))) && ok;
    b->table = malloc((size_t)b->m * HEAD * sizeof(float));
    b->a = calloc(WIDTH * RANK, sizeof(float));
    b->arena = malloc(1000000 * sizeof(float));
    b->sum = calloc(1000000, sizeof(int64_t));
    if (!ok || !b->table || !b->a || !b->arena || !b->sum) {
        fprintf(stderr, "bench_layer: out of memory\n");
        exit(7);
    }
    for (int i = 0; i < 8; i++) {
        for (size_t j = 0; j < (size_t)b->m * FFN; j++)
            b->p[i][j] = (float)(int32_t)(state = state * 1664525 + 1013904223) * 0x1p-31f;
    }
    for (size_t j = 0; j < 1000000; j++)
        b->arena[j] = (float)(int32_t)(state = state * 1664525 + 1013904223) * 0x1p-38f;
    for (size_t j = 0; j < weights; j++)
        bytes[j] = (uint8_t)((state = state * 1664525 + 1013904223) >> 24);
    for (size_t j = 0; j + 34 <= weights; j += 34)
        bytes[j + 1] = 0x14;
    b->square = (struct tensor){bytes, TENSOR_Q8_0, WIDTH, WIDTH};
    b->ffn = (struct tensor){bytes, TENSOR_Q8_0, FFN, WIDTH};
    b->head = (struct tensor){bytes, TENSOR_Q8_0, VOCABULARY, WIDTH};
    while (b->offsets[b->count] < b->m) {
        int32_t next = b->offsets[b->count] + segment;
        b->offsets[++b->count] = next < b->m ? next : b->m;
    }
    b->segments = (struct segments){b->count, b->offsets};
    for (int32_t i = 0; i < b->m; i++) {
        b->positions[i] = i % segment;
        b->rows[i] = i;
    }
    b->labels = (struct labels){32, b->rows, b->targets, NULL};
    kernels_rope_table(segment, HEAD, 1e5, 1, NULL, b->table);
}

int main(int argc, char **argv)
{
    static struct bench b = {.m = 512};
    enum kernel_isa isa = KERNEL_AVX512_BF16;
    long threads = 1, segment = 128;
    bool json = false;
    b.run.precision = KERNEL_BF16;
    for (int i = 1; i < argc; i++) {
        bool more = i + 1 < argc;
        if (strcmp(argv[i], "--json") == 0) {
            json = true;
        } else if (strcmp(argv[i], "--f32") == 0) {
            b.run.precision = KERNEL_F32;
        } else if (more && strcmp(argv[i], "--threads") == 0) {
            threads = strtol(argv[++i], NULL, 10);
        } else if (more && strcmp(argv[i], "--rows") == 0) {
            b.m = (int32_t)strtol(argv[++i], NULL, 10);
        } else if (more && strcmp(argv[i], "--segment") == 0) {
            segment = strtol(argv[++i], NULL, 10);
        } else if (!more || strcmp(argv[i], "--isa") != 0 || !kernel_isa_parse(argv[++i], &isa)) {
            fprintf(stderr,
                    "usage: bench_layer [--threads N] [--isa NAME] [--rows M] [--segment T] [--f32] [--json]\n");
            return 2;
        }
    }
    if (b.m < 32 || b.m > 8192 || segment < 8 || segment > 8192 || b.m / segment > 1000) {
        fprintf(stderr, "bench_layer: --rows must be 32 to 8192, --segment 8 to 8192\n");
        return 2;
    }
    struct error err = {0};
    if (pool_new((int)threads, &b.run.pool, &err) < 0) {
        fprintf(stderr, "bench_layer: %s\n", err.message);
        return -err.code;
    }
    b.ops = kernels_cpu(isa);
    prepare(&b, (int32_t)segment);
    if (!json)
        printf("%s, %d rows in segments of %ld, %ld threads\n", b.ops->name, b.m, segment, threads);
    for (size_t c = 0; c < ARRAY_LEN(cases); c++) {
        double best = INFINITY;
        for (int r = 0; r < REPEATS; r++) {
            double start = seconds();
            cases[c].run(&b);
            double took = seconds() - start;
            best = took < best ? took : best;
        }
        printf(json ? "{\"op\":\"%s\",\"ms\":%.4f}\n" : "%-24s %9.3f ms\n", cases[c].name, best * 1e3);
    }
    pool_free(b.run.pool);
    free((void *)(uintptr_t)b.head.data);
    free(b.run.scratch);
    for (int i = 0; i < 8; i++)
        free(b.p[i]);
    free(b.table);
    free(b.a);
    free(b.arena);
    free(b.sum);
    return 0;
}
