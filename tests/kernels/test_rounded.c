/* The products that round both inputs to integers (KERNEL_BF16 on tables with VNNI and without bfloat16), against the
 * rounding that kernels.h describes done here, and against bfloat16's error. */
#include "tests/kernels/support.h"

enum { RUN_LENGTH = 128, STEPS_X = 8191, STEPS_W = 2047 };

struct product {
    int32_t m, n, k; /* out (m, n) = a (m, k) · b (k, n) */
    const float *a, *b;
};

/* A run's values, `stride` apart, as kernels.h says. */
static void round_run(float *x, ptrdiff_t stride, int32_t n, float steps)
{
    float top = 0;
    for (int32_t i = 0; i < n; i++)
        top = fmaxf(top, fabsf(x[i * stride]));
    for (int32_t i = 0; i < n; i++)
        x[i * stride] = top >= 1e-30f ? rintf(x[i * stride] * (steps / top)) * (top * (1 / steps)) : 0;
}

static void multiply(const struct product *p, double *out)
{
    for (int32_t i = 0; i < p->m; i++) {
        for (int32_t j = 0; j < p->n; j++) {
            double sum = 0;
            for (int32_t k = 0; k < p->k; k++)
                sum += (double)p->a[i * p->k + k] * p->b[k * p->n + j];
            out[i * p->n + j] = sum;
        }
    }
}

static void round_product(struct product *p, float *a, float *b)
{
    for (int32_t k = 0; k < p->k; k += RUN_LENGTH) {
        const int32_t n = p->k - k < RUN_LENGTH ? p->k - k : RUN_LENGTH;
        for (int32_t i = 0; i < p->m; i++)
            round_run(a + (ptrdiff_t)i * p->k + k, 1, n, STEPS_X);
        for (int32_t j = 0; j < p->n; j++)
            round_run(b + (ptrdiff_t)k * p->n + j, p->n, n, STEPS_W);
    }
    p->a = a;
    p->b = b;
}

static float to_bfloat(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

static double distance(const double *want, const double *got, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (got[i] - want[i]) * (got[i] - want[i]);
    return sqrt(sum / (double)n);
}

static double size(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sqrt(sum / (double)n);
}

/* w decoded to floats, as (out, in). */
static float *decoded(const struct tensor *w)
{
    float *all = support_floats((size_t)w->out * (size_t)w->in);
    size_t row = 0;
    if (!tensor_type_row_bytes(w->type, (size_t)w->in, &row))
        abort();
    for (int32_t o = 0; o < w->out; o++)
        tensor_dequantise(w->type, (const uint8_t *)w->data + (size_t)o * row, (size_t)w->in,
                          all + (size_t)o * (size_t)w->in);
    return all;
}

static float *transposed(const float *x, int32_t rows, int32_t columns)
{
    float *y = support_floats((size_t)rows * (size_t)columns);
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < columns; j++)
            y[j * rows + i] = x[i * columns + j];
    return y;
}

static void check_product(const struct kernel_ops *ops, struct pool *pool, enum tensor_type type, int32_t m,
                          int32_t out, int32_t in, bool backward)
{
    struct kernel_run run = support_run(pool, kernels_linear_scratch(pool_threads(pool), m, out, in));
    struct tensor w = support_tensor(type, out, in);
    struct product p = {m, backward ? in : out, backward ? out : in, NULL, NULL};
    const size_t na = (size_t)p.m * (size_t)p.k, nb = (size_t)p.k * (size_t)p.n, ny = (size_t)p.m * (size_t)p.n;
    float *x = support_floats(na), *dense = decoded(&w), *y = support_floats(ny);
    float *b = backward ? support_copy(dense, nb) : transposed(dense, out, in);
    double *exact = calloc(ny, sizeof *exact), *want = calloc(ny, sizeof *want), *got = calloc(ny, sizeof *got);
    if (!exact || !want || !got)
        abort();
    for (size_t i = 0; i < na; i += 7) /* a wide range within a run: outliers, as activations have */
        x[i] *= 20;
    p.a = x;
    p.b = b;
    multiply(&p, exact);
    /* bfloat16's error */
    float *a16 = support_copy(x, na), *b16 = support_copy(b, nb);
    for (size_t i = 0; i < na; i++)
        a16[i] = to_bfloat(a16[i]);
    for (size_t i = 0; i < nb; i++)
        b16[i] = to_bfloat(b16[i]);
    p.a = a16;
    p.b = b16;
    multiply(&p, want);
    const double bfloat = distance(exact, want, ny);
    /* ours */
    float *ai = support_copy(x, na), *bi = support_copy(b, nb);
    round_product(&p, ai, bi);
    multiply(&p, want);
    run.precision = KERNEL_BF16;
    if (backward)
        ops->linear_backward(&run, m, &w, NULL, x, y, false);
    else
        ops->linear_forward(&run, m, &w, NULL, NULL, x, y, false);
    for (size_t i = 0; i < ny; i++)
        got[i] = (double)y[i];
    const double spread = size(exact, ny);
    CHECK(distance(want, got, ny) < 1e-6 * spread);
    CHECK(distance(exact, got, ny) > 1e-6 * spread); /* else nothing was rounded */
    CHECK(distance(exact, got, ny) < bfloat / 2);
    float *floats[] = {x, dense, y, b, a16, b16, ai, bi, run.scratch, (float *)(uintptr_t)w.data};
    for (size_t i = 0; i < ARRAY_LEN(floats); i++)
        free(floats[i]);
    free(exact);
    free(want);
    free(got);
}

static bool rounds_to_integers(const struct kernel_ops *ops)
{
    return ops->isa == KERNEL_AVX512_VNNI;
}

static void test_products(void)
{
    struct error err;
    struct pool *pool = NULL;
    if (pool_new(3, &pool, &err) < 0)
        abort();
    FOR_EACH_TABLE(ops)
    {
        for (int backward = 0; backward < 2 && rounds_to_integers(ops); backward++) {
            check_product(ops, pool, TENSOR_Q4_1, 13, 160, 96, backward);
            check_product(ops, pool, TENSOR_Q8_0, 130, 77, 352, backward);
            check_product(ops, pool, TENSOR_Q4_K, 7, 300, 512, backward);
            check_product(ops, pool, TENSOR_F32, 5, 131, 257, backward);   /* odd depths and columns */
            check_product(ops, pool, TENSOR_F32, 9, 4225, 2083, backward); /* deeper than a panel */
        }
    }
    pool_free(pool);
}

/* NaN, infinity, and runs too small to have steps. */
static void test_extremes(void)
{
    enum { M = 8, OUT = 70, IN = 200 };
    FOR_EACH_TABLE(ops)
    {
        if (!rounds_to_integers(ops))
            continue;
        struct kernel_run run = support_run(NULL, kernels_linear_scratch(1, M, OUT, IN));
        struct tensor w = support_tensor(TENSOR_F32, OUT, IN);
        float *x = support_floats(M * IN), *y = support_floats(M * OUT), *plain = support_floats(M * OUT);
        run.precision = KERNEL_BF16;
        ops->linear_forward(&run, M, &w, NULL, NULL, x, plain, false);
        x[1 * IN + 150] = NAN;
        x[3 * IN + 5] = -INFINITY;
        for (int i = 0; i < IN; i++)
            x[5 * IN + i] = i % 2 ? 1e-38f : -1e-41f;
        memset(x + 6 * IN, 0, IN * sizeof *x);
        ops->linear_forward(&run, M, &w, NULL, NULL, x, y, false);
        for (int o = 0; o < OUT; o++) {
            CHECK(isnan(y[1 * OUT + o]) && isnan(y[3 * OUT + o]));
            CHECK(y[5 * OUT + o] == 0 && y[6 * OUT + o] == 0);
            for (int row = 0; row < M; row += 2)
                CHECK(row == 6 || y[row * OUT + o] == plain[row * OUT + o]);
        }
        ((float *)(uintptr_t)w.data)[7 * IN + 3] = NAN; /* a weight's NaN reaches its own output alone */
        ops->linear_forward(&run, M, &w, NULL, NULL, x, y, false);
        for (int o = 0; o < OUT; o++)
            CHECK(o == 7 ? isnan(y[o]) : y[o] == plain[o]);
        free((void *)(uintptr_t)w.data);
        free(x);
        free(y);
        free(plain);
        free(run.scratch);
    }
}

int tests_rounded(void)
{
    if (!kernels_cpu(KERNEL_AVX512_VNNI) || kernels_cpu(KERNEL_AVX512_VNNI)->isa != KERNEL_AVX512_VNNI)
        fprintf(stderr, "[ skip ] products of integers: this CPU or build has no such instructions\n");
    RUN(test_products);
    RUN(test_extremes);
    return check_report();
}
