/*
 * Matrix products at a model's shapes, against the peak that register-only multiply-adds reach in the same run.
 *
 *     bench_gemm [--threads N] [--isa NAME] [--rows M] [--json]
 *
 * Weights are Q4_1 (random bits), as in the default model; the time includes decoding and packing them.
 */
#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <time.h>

#define REPEATS 7

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t state = 0x9e3779b97f4a7c15u;

static uint64_t noise(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

struct bench {
    const struct kernel_ops *ops;
    struct kernel_run run;
    int32_t m;
    float *x, *y;
    uint8_t *weights;
    bool json;
};

static void fill(struct bench *b, size_t floats, size_t weight_bytes)
{
    for (size_t i = 0; i < floats; i++)
        b->x[i] = (float)(int32_t)noise() * 0x1p-31f;
    for (size_t i = 0; i < weight_bytes; i++)
        b->weights[i] = (uint8_t)noise();
    for (size_t i = 0; i + 20 <= weight_bytes; i += 20) {
        b->weights[i + 1] = 0x28; /* finite, small scales */
        b->weights[i + 3] = 0xa8;
    }
}

/* The best of REPEATS, in GFLOP/s. */
static double measure(struct bench *b, const struct tensor *w, bool backward, int32_t m)
{
    double best = INFINITY, flops = 2.0 * m * w->in * w->out;
    int inner = (int)(2e8 / flops) + 1;
    for (int r = 0; r < REPEATS; r++) {
        double start = seconds();
        for (int i = 0; i < inner; i++) {
            const struct served_linear part = {w, NULL, b->y};
            if (m <= KERNEL_DECODE_ROWS)
                b->ops->linear_decode(&b->run, m, 1, &part, b->x);
            else if (backward)
                b->ops->linear_backward(&b->run, m, w, NULL, b->x, b->y, false);
            else
                b->ops->linear_forward(&b->run, m, w, NULL, NULL, b->x, b->y, false);
        }
        double took = (seconds() - start) / inner;
        best = took < best ? took : best;
    }
    return flops / best * 1e-9;
}

#if defined(__x86_64__)
/* ROUNDS × 12 independent instructions on registers only: 12 cover the latency of any current core. */
#define ROUNDS 4000000
#define SPIN(instruction, width)                                                                                       \
    for (long i = 0; i < ROUNDS; i++)                                                                                  \
    __asm__ volatile(                                                                                                  \
        ".irp r,4,5,6,7,8,9,10,11,12,13,14,15\n " instruction " %%" width "0, %%" width "1, %%" width "\\r\n .endr" :: \
            : "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

static void spin(enum kernel_isa isa, bool bf16)
{
    __asm__ volatile("vxorps %%ymm0, %%ymm0, %%ymm0\n vxorps %%ymm1, %%ymm1, %%ymm1" ::: "xmm0", "xmm1");
    if (isa == KERNEL_AVX2)
        SPIN("vfmadd231ps", "ymm");
    else if (bf16 && isa == KERNEL_AVX512_BF16)
        SPIN("vdpbf16ps", "zmm");
    else if (bf16)
        SPIN("vpdpwssd", "zmm");
    else
        SPIN("vfmadd231ps", "zmm");
}

/* GFLOP/s of one core that does nothing but multiply-adds with this table's instructions; 0 for the scalar table. */
static double peak(const struct bench *b)
{
    double best = INFINITY, flops = b->ops->isa == KERNEL_AVX2 ? 16 : b->run.precision == KERNEL_BF16 ? 64 : 32;
    if (b->ops->isa == KERNEL_SCALAR)
        return 0;
    for (int r = 0; r < REPEATS; r++) {
        double start = seconds();
        spin(b->ops->isa, b->run.precision == KERNEL_BF16);
        double took = seconds() - start;
        best = took < best ? took : best;
    }
    return ROUNDS * 12.0 * flops / best * 1e-9;
}
#else
static double peak(const struct bench *b)
{
    (void)b;
    return 0;
}
#endif

static void table(struct bench *b, enum kernel_precision precision)
{
    static const int32_t shapes[][2] = {{576, 576}, {192, 576}, {1536, 576}, {576, 1536}, {4096, 576}};
    b->run.precision = precision;
    double top = peak(b);
    const char *name = precision == KERNEL_BF16 ? "bf16" : "f32";
    if (!b->json)
        printf("%s, %s, %d threads: one core's peak %.1f GFLOP/s\n%8s %8s %8s %10s %10s\n", b->ops->name, name,
               pool_threads(b->run.pool), top, "rows", "out", "in", "forward", "backward");
    for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
        struct tensor w = {.data = b->weights, .type = TENSOR_Q4_1, .out = shapes[i][0], .in = shapes[i][1]};
        double forward = measure(b, &w, false, b->m), backward = measure(b, &w, true, b->m);
        double decode = measure(b, &w, false, 1);
        if (b->json)
            printf(
                "{\"isa\":\"%s\",\"precision\":\"%s\",\"threads\":%d,\"rows\":%d,\"out\":%d,\"in\":%d,"
                "\"core_peak_gflops\":%.1f,\"forward_gflops\":%.1f,\"backward_gflops\":%.1f,\"decode_gflops\":%.2f}\n",
                b->ops->name, name, pool_threads(b->run.pool), b->m, w.out, w.in, top, forward, backward, decode);
        else
            printf("%8d %8d %8d %10.1f %10.1f   decode %.2f\n", b->m, w.out, w.in, forward, backward, decode);
    }
}

int main(int argc, char **argv)
{
    struct bench b = {.m = 512};
    enum kernel_isa isa = KERNEL_AVX512_BF16;
    long threads = 1;
    for (int i = 1; i < argc; i++) {
        bool more = i + 1 < argc;
        if (strcmp(argv[i], "--json") == 0) {
            b.json = true;
        } else if (more && strcmp(argv[i], "--threads") == 0) {
            threads = strtol(argv[++i], NULL, 10);
        } else if (more && strcmp(argv[i], "--rows") == 0) {
            b.m = (int32_t)strtol(argv[++i], NULL, 10);
        } else if (!more || strcmp(argv[i], "--isa") != 0 || !kernel_isa_parse(argv[++i], &isa)) {
            fprintf(stderr,
                    "usage: bench_gemm [--threads N] [--isa scalar|avx2|avx512|avx512-vnni|avx512-bf16] [--rows M] "
                    "[--json]\n");
            return 2;
        }
    }
    if (b.m < 9 || b.m > 8192) {
        fprintf(stderr, "bench_gemm: --rows must be 9 to 8192\n");
        return 2;
    }
    struct error err = {0};
    struct pool *pool = NULL;
    if (pool_new((int)threads, &pool, &err) < 0) {
        fprintf(stderr, "bench_gemm: %s\n", err.message);
        return -err.code;
    }
    int32_t rows = b.m > 960 ? b.m : 960;
    size_t floats = (size_t)rows * 4096, weights = (size_t)4096 * 1536 / 32 * 20;
    b.ops = kernels_cpu(isa);
    b.run.pool = pool;
    b.run.scratch_bytes = kernels_linear_scratch((int)threads, rows, 4096, 4096);
    b.run.scratch = aligned_alloc(64, (b.run.scratch_bytes + 63) & ~(size_t)63);
    b.x = malloc(floats * sizeof(float));
    b.y = malloc(floats * sizeof(float));
    b.weights = malloc(weights);
    if (!b.run.scratch || !b.x || !b.y || !b.weights) {
        fprintf(stderr, "bench_gemm: out of memory\n");
        return 7;
    }
    fill(&b, floats, weights);
    table(&b, KERNEL_F32);
    if (b.ops->isa >= KERNEL_AVX512_VNNI) /* rounded to what the table multiplies fastest */
        table(&b, KERNEL_BF16);
    pool_free(pool);
    free(b.run.scratch);
    free(b.x);
    free(b.y);
    free(b.weights);
    return 0;
}
