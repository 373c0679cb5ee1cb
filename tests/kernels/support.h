/* Shared by the kernel tests: tables, random data, scratch. */
#ifndef TESTS_KERNELS_SUPPORT_H
#define TESTS_KERNELS_SUPPORT_H

#include "kernels/kernels.h"
#include "tests/check.h"

/* xorshift64*, so that every run tests the same data. */
static uint64_t support_state = 0x2545f4914f6cdd1du;

static inline uint64_t support_bits(void)
{
    support_state ^= support_state >> 12;
    support_state ^= support_state << 25;
    support_state ^= support_state >> 27;
    return support_state * 0x2545f4914f6cdd1du;
}

static inline float support_uniform(void) /* −1 .. 1 */
{
    return (float)(int32_t)(support_bits() >> 32) * 0x1p-31f;
}

static inline float *support_floats(size_t n)
{
    float *x = malloc((n ? n : 1) * sizeof(float));
    if (!x)
        abort();
    for (size_t i = 0; i < n; i++)
        x[i] = support_uniform();
    return x;
}

static inline float *support_copy(const float *x, size_t n)
{
    float *y = malloc((n ? n : 1) * sizeof(float));
    if (!y)
        abort();
    memcpy(y, x, n * sizeof(float));
    return y;
}

/* A random matrix with sane scales. Free data. */
static inline struct tensor support_tensor(enum tensor_type type, int32_t out, int32_t in)
{
    size_t row = 0, block = tensor_type_block_bytes(type);
    if (!tensor_type_row_bytes(type, (size_t)in, &row))
        abort();
    if (type == TENSOR_F32)
        return (struct tensor){support_floats((size_t)out * (size_t)in), type, out, in};
    uint8_t *data = malloc(row * (size_t)out);
    if (!data)
        abort();
    for (size_t i = 0; i < row * (size_t)out; i++)
        data[i] = (uint8_t)support_bits();
    for (size_t b = 0; b < row * (size_t)out; b += block) {
        if (type == TENSOR_F16 || type == TENSOR_BF16) {
            data[b + 1] = (uint8_t)((data[b + 1] & 0x83) | (type == TENSOR_F16 ? 0x30 : 0x3c));
        } else if (type == TENSOR_Q6_K) {
            data[b + 208] = 0x10;
            data[b + 209] = 0x0c;
        } else if (type == TENSOR_Q2_K) {
            data[b + 81] = 0x24 | (data[b + 81] & 0x80);
            data[b + 83] = 0x28;
        } else {
            data[b + 1] = 0x24 | (data[b + 1] & 0x80); /* about 1/60 */
            if (type == TENSOR_Q4_1 || type == TENSOR_Q5_1 || type == TENSOR_Q4_K || type == TENSOR_Q5_K)
                data[b + 3] = 0x28;
        }
    }
    return (struct tensor){data, type, out, in};
}

static inline struct kernel_run support_run(struct pool *pool, size_t bytes)
{
    struct kernel_run run = {.pool = pool, .scratch_bytes = (bytes + 63) & ~(size_t)63};
    run.scratch = aligned_alloc(64, run.scratch_bytes ? run.scratch_bytes : 64);
    if (!run.scratch)
        abort();
    memset(run.scratch, 0xff, run.scratch_bytes); /* NaN: unwritten scratch shows */
    return run;
}

/* Largest |a − b| over the largest |b| (or 0.1: sums that cancel have no scale of their own); infinite for NaN. */
static inline double support_distance(const float *a, const float *b, size_t n)
{
    double top = 0.1, gap = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (!(d < INFINITY))
            return INFINITY;
        gap = d > gap ? d : gap;
        top = fabs((double)b[i]) > top ? fabs((double)b[i]) : top;
    }
    return gap / top;
}

#define CHECK_CLOSE(a, b, n, tolerance)                                                                                \
    do {                                                                                                               \
        double distance_ = support_distance(a, b, n);                                                                  \
        check_count++;                                                                                                 \
        if (!(distance_ <= (tolerance))) {                                                                             \
            check_failures++;                                                                                          \
            fprintf(stderr, "%s:%d: %s and %s differ by %g\n", __FILE__, __LINE__, #a, #b, distance_);                 \
        }                                                                                                              \
    } while (0)

#define CHECK_SAME(a, b, n) CHECK(memcmp(a, b, (n) * sizeof(*(a))) == 0)

/* Runs test(ops) for each table of this machine above the scalar one, and says what is missing. */
#define FOR_EACH_TABLE(ops)                                                                                            \
    for (int isa_ = KERNEL_SCALAR; isa_ <= KERNEL_AVX512_BF16; isa_++)                                                 \
        for (const struct kernel_ops *ops = kernels_cpu((enum kernel_isa)isa_); ops && (int)ops->isa == isa_;          \
             ops = NULL)

/* One file of tests each; returns the number of failures. */
int tests_independence(void);
int tests_gradients(void);
int tests_tensor(void);
int tests_clip(void);
int tests_rounded(void);
int tests_decode(struct pool *pool);
int tests_attention(struct pool *pool);
int tests_attention_long(void);

#endif
