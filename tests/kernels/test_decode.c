/* linear_decode against sums in double precision, interleaved copies against the rows they were made of, and
 * attention_decode against the scalar one. */
#include "tests/kernels/support.h"

static const enum tensor_type quantised[] = {
    TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0, TENSOR_Q2_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K,
};

static struct pool *pool;

/* Guards behind the copy: its bytes are all that is written, and nothing beyond is summed. */
static void *make_copy(const struct kernel_ops *ops, const struct tensor *w)
{
    struct kernel_run run = {.pool = pool};
    const size_t bytes = ops->interleaved_bytes(w);
    uint8_t *copy = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    if (!copy)
        abort();
    memset(copy, 0xff, (bytes + 127) & ~(size_t)63);
    ops->interleave(&run, w, copy);
    CHECK(copy[bytes] == 0xff && copy[bytes + 63 - bytes % 64] == 0xff);
    return copy;
}

/* y = x·Wᵀ + bias + scale·h·Bᵀ, and magnitude the sum of the products' absolute values: what rounding is relative to.
 */
static void exact(const struct served_linear *l, int32_t m, const float *x, double *y, double *magnitude)
{
    const struct tensor *w = l->w;
    float *row = support_floats((size_t)w->in);
    size_t bytes = 0;
    CHECK(tensor_type_row_bytes(w->type, (size_t)w->in, &bytes));
    for (int32_t o = 0; o < w->out; o++) {
        tensor_dequantise(w->type, (const uint8_t *)w->data + (size_t)o * bytes, (size_t)w->in, row);
        for (int32_t i = 0; i < m; i++) {
            const size_t at = (size_t)i * (size_t)w->out + (size_t)o;
            y[at] = magnitude[at] = 0;
            for (int32_t k = 0; k < w->in; k++) {
                y[at] += (double)row[k] * (double)x[(size_t)i * (size_t)w->in + (size_t)k];
                magnitude[at] += fabs((double)row[k] * (double)x[(size_t)i * (size_t)w->in + (size_t)k]);
            }
            y[at] += l->bias ? (double)l->bias[o] : 0;
            for (int32_t r = 0; l->b && r < l->rank; r++)
                y[at] += (double)l->scale * (double)l->b[o * l->rank + r] * (double)l->h[i * l->h_stride + r];
        }
    }
    free(row);
}

static void check_against_exact(const struct served_linear *l, int32_t m, const float *x)
{
    const struct tensor *w = l->w;
    const size_t n = (size_t)m * (size_t)w->out;
    double *want = malloc(n * sizeof *want), *magnitude = malloc(n * sizeof *magnitude), worst = 0;
    if (!want || !magnitude)
        abort();
    exact(l, m, x, want, magnitude);
    for (size_t i = 0; i < n; i++) {
        const double off = fabs((double)l->y[i] - want[i]) / (magnitude[i] + 1);
        worst = off <= worst ? worst : off; /* a NaN stays */
    }
    CHECK(worst <= 2e-6);
    if (!(worst <= 2e-6))
        fprintf(stderr, "  %s, %d of %d x %d: off by %g\n", tensor_type_name(w->type), m, w->out, w->in, worst);
    free(want);
    free(magnitude);
}

/* `count` linears of the given types and heights over one x in one call, with and without copies. */
static void check_decode(const struct kernel_ops *ops, int32_t m, int32_t in, int32_t count,
                         const enum tensor_type types[], const int32_t out[])
{
    struct kernel_run run = support_run(pool, kernels_linear_scratch(pool_threads(pool), m, in, in));
    float *x = support_floats((size_t)m * (size_t)in), *bias[3] = {NULL}, *y[3] = {NULL};
    float *b[3] = {NULL}, *h[3] = {NULL};
    struct tensor w[3] = {{0}};
    const void *data[3] = {NULL};
    void *copies[3] = {NULL};
    struct served_linear linears[3];
    for (int32_t i = 0; i < count; i++) {
        w[i] = support_tensor(types[i], out[i], in);
        data[i] = w[i].data;
        if (ops->interleaved_bytes(&w[i]) > 0)
            copies[i] = make_copy(ops, &w[i]);
        bias[i] = i == 1 ? NULL : support_floats((size_t)out[i]);
        y[i] = support_floats((size_t)m * (size_t)out[i] + 1);
        linears[i] = (struct served_linear){.w = &w[i], .bias = bias[i], .y = y[i]};
        if ((i + m) % 2 == 0)
            continue;
        linears[i].rank = 5 + 16 * (m % 3); /* and its columns of h, behind the others' */
        linears[i].h_stride = linears[i].rank + 3;
        linears[i].scale = 0.75f;
        linears[i].b = b[i] = support_floats((size_t)(out[i] * linears[i].rank));
        linears[i].h = h[i] = support_floats((size_t)(m * linears[i].h_stride));
    }
    for (int with_copies = 0; with_copies < 2; with_copies++) {
        for (int32_t i = 0; i < count; i++) {
            const size_t n = (size_t)m * (size_t)out[i];
            w[i].interleaved = with_copies ? copies[i] : NULL;
            w[i].data = w[i].interleaved ? NULL : data[i]; /* with a copy nothing else is read */
            for (size_t k = 0; k <= n; k++)
                y[i][k] = 12345;
        }
        ops->linear_decode(&run, m, count, linears, x);
        for (int32_t i = 0; i < count; i++) {
            w[i].data = data[i];
            check_against_exact(&linears[i], m, x);
            CHECK(y[i][(size_t)m * (size_t)out[i]] == 12345);
        }
    }
    for (int32_t i = 0; i < count; i++) {
        free((void *)(uintptr_t)data[i]);
        free(copies[i]);
        free(bias[i]);
        free(y[i]);
        free(b[i]);
        free(h[i]);
    }
    free(x);
    free(run.scratch);
}

static void test_decode(void)
{
    static const int32_t heights[] = {1, 7, 16, 33, 130};
    static const enum tensor_type all[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0,
                                           TENSOR_Q4_1, TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0,
                                           TENSOR_Q2_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};
    FOR_EACH_TABLE(ops)
    {
        for (size_t t = 0; t < ARRAY_LEN(all); t++) {
            const int32_t block = tensor_type_block(all[t]) == 256 ? 256 : 32;
            for (int32_t m = 1; m <= KERNEL_DECODE_ROWS; m++) {
                check_decode(ops, m, block, 1, &all[t], &heights[m % 5]);
                check_decode(ops, m, 3 * block, 1, &all[t], &heights[(m + 1) % 5]);
            }
            check_decode(ops, 1, 4096 + 3 * block, 1, &all[t], &heights[3]);
            check_decode(ops, 3, 4096 + 3 * block, 1, &all[t], &heights[2]);
        }
        /* Groups of linears, of several types, some without a copy; items begin and end inside them. */
        check_decode(ops, 1, 512, 3, (const enum tensor_type[]){TENSOR_Q4_K, TENSOR_Q4_K, TENSOR_Q6_K},
                     (const int32_t[]){190, 16, 65});
        check_decode(ops, 2, 512, 3, (const enum tensor_type[]){TENSOR_Q8_0, TENSOR_F16, TENSOR_Q2_K},
                     (const int32_t[]){3, 100, 64});
        check_decode(ops, 8, 64, 2, (const enum tensor_type[]){TENSOR_F32, TENSOR_Q5_1}, (const int32_t[]){40, 40});
        check_decode(ops, 1, 63, 1, (const enum tensor_type[]){TENSOR_F32}, (const int32_t[]){5});
    }
}

/* Prompts take the copy too: the same bits as from the rows. */
static void check_panels(const struct kernel_ops *ops, enum kernel_precision precision, enum tensor_type type,
                         int32_t m, int32_t out, int32_t in)
{
    struct kernel_run run = support_run(pool, kernels_linear_scratch(pool_threads(pool), m, out, in));
    struct tensor w = support_tensor(type, out, in);
    const void *data = w.data;
    const size_t n = (size_t)m * (size_t)out;
    float *x = support_floats((size_t)m * (size_t)in), *y = support_floats(n), *want = support_floats(n);
    void *copy = ops->interleaved_bytes(&w) > 0 ? make_copy(ops, &w) : NULL;
    run.precision = precision;
    ops->linear_forward(&run, m, &w, NULL, NULL, x, want, false);
    w.interleaved = copy;
    w.data = copy ? NULL : data; /* nothing but the copy is read */
    ops->linear_forward(&run, m, &w, NULL, NULL, x, y, false);
    CHECK_SAME(y, want, n);
    free((void *)(uintptr_t)data);
    free(copy);
    free(x);
    free(y);
    free(want);
    free(run.scratch);
}

static void test_panels(void)
{
    FOR_EACH_TABLE(ops)
    {
        for (size_t t = 0; t < ARRAY_LEN(quantised); t++) {
            const int32_t block = tensor_type_block(quantised[t]) == 256 ? 256 : 32;
            for (int precision = KERNEL_F32; precision <= KERNEL_BF16; precision++) {
                check_panels(ops, (enum kernel_precision)precision, quantised[t], 9, 77, 3 * block);
                check_panels(ops, (enum kernel_precision)precision, quantised[t], 2, 130,
                             2048 + block); /* two panels */
                check_panels(ops, (enum kernel_precision)precision, quantised[t], 1, 5, block);
            }
        }
    }
}

static void check_attention(const struct kernel_ops *ops, const struct attention_shape *shape, int32_t rows,
                            int32_t length)
{
    const size_t nq = (size_t)rows * (size_t)(shape->heads * shape->head_size);
    const int32_t stride = shape->kv_heads * shape->head_size;
    struct kernel_run run = support_run(pool, kernels_attention_scratch(pool_threads(pool), shape, 1, length));
    float *q = support_floats(nq), *k = support_floats((size_t)length * (size_t)stride);
    float *v = support_floats((size_t)length * (size_t)stride), *o = support_floats(nq), *want = support_floats(nq);
    for (int32_t i = 0; i < stride; i++) /* one key that a head looks at, far behind, and one that it does not */
        k[(length / 3) * stride + i] *= 9;
    ops->attention_decode(&run, shape, rows, length, q, k, v, stride, o);
    kernels_cpu(KERNEL_SCALAR)->attention_decode(&run, shape, rows, length, q, k, v, stride, want);
    CHECK_CLOSE(o, want, nq, 3e-5);
    struct kernel_run alone = {.scratch = run.scratch, .scratch_bytes = run.scratch_bytes};
    ops->attention_decode(&alone, shape, rows, length, q, k, v, stride, want);
    CHECK(ops->isa == KERNEL_SCALAR || memcmp(o, want, nq * sizeof *o) == 0); /* whatever the threads */
    float *all[] = {q, k, v, o, want, run.scratch};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        free(all[i]);
}

static void test_attention(void)
{
    static const struct attention_shape shapes[] = {
        {9, 3, 64, 0, 0.9f}, {4, 1, 256, 40, 0.4f}, {2, 2, 128, 1, 1}, {70, 10, 16, 0, 2}, {3, 1, 48, 300, 1},
    };
    static const int32_t lengths[] = {1, 31, 32, 33, 64, 65, 544, 1023, 1024, 1025, 2100};
    FOR_EACH_TABLE(ops)
    {
        for (size_t s = 0; s < ARRAY_LEN(shapes); s++)
            for (size_t l = 0; l < ARRAY_LEN(lengths); l++)
                for (int32_t rows = 1; rows <= 3 && rows <= lengths[l]; rows++)
                    check_attention(ops, &shapes[s], rows, lengths[l]);
    }
}

/* The copy is no burden: at most 3 % larger than what it is made of, where no rows are padded. */
static void test_size(void)
{
    FOR_EACH_TABLE(ops)
    {
        for (size_t t = 0; t < ARRAY_LEN(quantised); t++) {
            const struct tensor w = {NULL, quantised[t], 64, 512};
            const size_t block = tensor_type_block(w.type), size = 64 * 512 / block * tensor_type_block_bytes(w.type);
            if (ops->isa == KERNEL_SCALAR)
                CHECK(ops->interleaved_bytes(&w) == 0);
            else
                CHECK(ops->interleaved_bytes(&w) >= size && ops->interleaved_bytes(&w) <= size + size * 3 / 100);
        }
        const struct tensor dense = {NULL, TENSOR_F16, 64, 512};
        CHECK(ops->interleaved_bytes(&dense) == 0);
    }
}

int tests_decode(struct pool *use)
{
    pool = use;
    RUN(test_size);
    RUN(test_decode);
    RUN(test_panels);
    RUN(test_attention);
    return check_failures;
}
