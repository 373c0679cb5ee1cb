/*
 * Attention of every table against the scalar one; and of segments long enough for several parts, chunks and blocks of
 * keys, that the bits of one do not depend on the threads or on what else is in the batch.
 */
#include "tests/kernels/support.h"

static struct pool *pool;

static void check_attention(const struct kernel_ops *ops, int32_t heads, int32_t kv_heads, int32_t d, int32_t window,
                            const int32_t *offsets, int32_t count)
{
    const struct kernel_ops *reference = kernels_cpu(KERNEL_SCALAR);
    struct attention_shape shape = {heads, kv_heads, d, window, 0.3f};
    struct segments segments = {count, offsets};
    size_t m = (size_t)offsets[count], nq = m * (size_t)(heads * d), nk = m * (size_t)(kv_heads * d);
    struct kernel_run run =
        support_run(pool, kernels_attention_scratch(pool_threads(pool), &shape, (int32_t)m, (int32_t)m));
    float *q = support_floats(nq), *k = support_floats(nk), *v = support_floats(nk), *grad = support_floats(nq);
    float *o = support_floats(nq), *ow = support_floats(nq), *lse = support_floats(m * (size_t)heads);
    float *lsew = support_floats(m * (size_t)heads), *dq = support_floats(nq), *dk = support_floats(nk);
    float *dv = support_floats(nk), *dqw = support_floats(nq), *dkw = support_floats(nk), *dvw = support_floats(nk);
    ops->attention_forward(&run, &shape, &segments, q, k, v, o, lse);
    reference->attention_forward(&run, &shape, &segments, q, k, v, ow, lsew);
    CHECK_CLOSE(o, ow, nq, 1e-5);
    CHECK_CLOSE(lse, lsew, m * (size_t)heads, 1e-5);
    ops->attention_backward(&run, &shape, &segments, q, k, v, ow, lsew, grad, dq, dk, dv);
    reference->attention_backward(&run, &shape, &segments, q, k, v, ow, lsew, grad, dqw, dkw, dvw);
    CHECK_CLOSE(dq, dqw, nq, 2e-5);
    CHECK_CLOSE(dk, dkw, nk, 2e-5);
    CHECK_CLOSE(dv, dvw, nk, 2e-5);
    /* Decoding the last rows of the first segment gives what the packed pass gave them. */
    int32_t length = offsets[1], rows = length < 3 ? length : 3;
    ops->attention_decode(&run, &shape, rows, length, q + (size_t)(length - rows) * (size_t)(heads * d), k, v,
                          kv_heads * d, o);
    CHECK_CLOSE(o, (ow + (size_t)(length - rows) * (size_t)(heads * d)), (size_t)(rows * heads * d), 1e-5);
    float *all[] = {q, k, v, grad, o, ow, lse, lsew, dq, dk, dv, dqw, dkw, dvw, run.scratch};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        free(all[i]);
}

static void test_attention(void)
{
    static const int32_t ragged[] = {0, 5, 6, 71, 201}, one[] = {0, 1}, whole[] = {0, 97}, edge[] = {0, 48, 112, 113};
    FOR_EACH_TABLE(ops)
    {
        check_attention(ops, 6, 2, 32, 0, ragged, 4);
        check_attention(ops, 4, 1, 64, 17, ragged, 4);
        check_attention(ops, 2, 2, 16, 1, whole, 1);
        check_attention(ops, 3, 3, 48, 0, one, 1);
        check_attention(ops, 2, 1, 256, 64, edge, 3);
        check_attention(ops, 9, 3, 64, 0, edge, 3);
    }
}

int tests_attention(struct pool *with)
{
    pool = with;
    RUN(test_attention);
    return check_failures;
}

static void test_long_segments(void)
{
    static const int32_t three[] = {0, 513, 533, 829}, one[] = {0, 1031};
    FOR_EACH_TABLE(ops)
    {
        if (ops->isa == KERNEL_SCALAR)
            continue;
        check_attention(ops, 3, 1, 32, 0, three, 3);
        check_attention(ops, 4, 4, 16, 100, three, 3);
        check_attention(ops, 3, 1, 16, 0, one, 1);
        check_attention(ops, 2, 1, 80, 555, one, 1);
        check_attention(ops, 2, 2, 128, 0, three, 3);
        check_attention(ops, 1, 1, 16, 3, one, 1);
    }
}

/* Later keys have ever larger scores: powers of the panels before them must be brought to a new scale, again and again,
 * before one leaves the range of floats, and in the end amount to nothing. Key 130 has by far the largest. */
static void test_rising_scores(void)
{
    enum { N = 200, SIZE = 16 };
    static const int32_t offsets[] = {0, N};
    const struct segments segments = {1, offsets};
    for (int trial = 0; trial < 4; trial++) {
        const float top = trial % 2 ? 90 : 7;
        const struct attention_shape shape = {1, 1, SIZE, trial / 2 * 100, 1};
        FOR_EACH_TABLE(ops)
        {
            struct kernel_run run = support_run(pool, kernels_attention_scratch(pool_threads(pool), &shape, N, 1));
            float *q = support_floats(N * SIZE), *k = support_floats(N * SIZE), *v = support_floats(N * SIZE);
            float *o = support_floats(N * SIZE), *ow = support_floats(N * SIZE), lse[N], lsew[N];
            for (int32_t t = 0; t < N; t++) {
                q[t * SIZE] = 1;
                k[t * SIZE] = t == 130 ? top : (float)t * 0.25f - 100;
            }
            ops->attention_forward(&run, &shape, &segments, q, k, v, o, lse);
            kernels_cpu(KERNEL_SCALAR)->attention_forward(&run, &shape, &segments, q, k, v, ow, lsew);
            CHECK_CLOSE(o, ow, N * SIZE, 4e-5);
            CHECK_CLOSE(lse, lsew, N, 1e-6);
            float *all[] = {q, k, v, o, ow, run.scratch};
            for (size_t i = 0; i < ARRAY_LEN(all); i++)
                free(all[i]);
        }
    }
}

enum { HEADS = 3, KV = 1, D = 32, ROWS = 1031 };

struct arrays {
    float *q, *k, *v, *grad;       /* given */
    float *o, *lse, *dq, *dk, *dv; /* results */
};

static struct arrays arrays_new(size_t rows)
{
    const size_t nq = rows * HEADS * D, nk = rows * KV * D;
    return (struct arrays){support_floats(nq), support_floats(nk), support_floats(nk),
                           support_floats(nq), support_floats(nq), support_floats(rows * HEADS),
                           support_floats(nq), support_floats(nk), support_floats(nk)};
}

static void arrays_free(struct arrays *a)
{
    float *all[] = {a->q, a->k, a->v, a->grad, a->o, a->lse, a->dq, a->dk, a->dv};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        free(all[i]);
}

static void pass(const struct kernel_ops *ops, int threads, int32_t window, int32_t count, const int32_t *offsets,
                 const struct arrays *a)
{
    struct pool *own = NULL;
    struct error err = {0};
    if (pool_new(threads, &own, &err) < 0)
        abort();
    const struct attention_shape shape = {HEADS, KV, D, window, 0.2f};
    const struct segments segments = {count, offsets};
    struct kernel_run run = support_run(own, kernels_attention_scratch(threads, &shape, ROWS, 1));
    ops->attention_forward(&run, &shape, &segments, a->q, a->k, a->v, a->o, a->lse);
    ops->attention_backward(&run, &shape, &segments, a->q, a->k, a->v, a->o, a->lse, a->grad, a->dq, a->dk, a->dv);
    free(run.scratch);
    pool_free(own);
}

static void test_long_independence(void)
{
    static const int32_t lone[] = {0, ROWS};
    enum { AT = 77, BATCH = AT + ROWS + 5 * 90 };
    int32_t batch[] = {0, AT, AT + ROWS, 0, 0, 0, 0, 0}; /* seven segments: few for two threads, enough for one */
    for (int i = 3; i < 8; i++)
        batch[i] = batch[i - 1] + 90;
    FOR_EACH_TABLE(ops)
    {
        if (ops->isa == KERNEL_SCALAR)
            continue;
        for (int32_t window = 0; window <= 300; window += 300) {
            struct arrays a = arrays_new(ROWS), b = arrays_new(BATCH);
            const size_t nq = (size_t)ROWS * HEADS * D, nk = (size_t)ROWS * KV * D;
            const size_t q_at = (size_t)AT * HEADS * D, k_at = (size_t)AT * KV * D;
            memcpy(b.q + q_at, a.q, nq * sizeof(float));
            memcpy(b.k + k_at, a.k, nk * sizeof(float));
            memcpy(b.v + k_at, a.v, nk * sizeof(float));
            memcpy(b.grad + q_at, a.grad, nq * sizeof(float));
            pass(ops, 1, window, 1, lone, &a);
            for (int threads = 1; threads <= 3; threads++) {
                pass(ops, threads, window, ARRAY_LEN(batch) - 1, batch, &b);
                CHECK_SAME(b.o + q_at, a.o, nq);
                CHECK_SAME((b.lse + (size_t)AT * HEADS), a.lse, (size_t)ROWS * HEADS);
                CHECK_SAME(b.dq + q_at, a.dq, nq);
                CHECK_SAME(b.dk + k_at, a.dk, nk);
                CHECK_SAME(b.dv + k_at, a.dv, nk);
            }
            arrays_free(&a);
            arrays_free(&b);
        }
    }
}

int tests_attention_long(void)
{
    struct error err = {0};
    for (int threads = 1; threads <= 2; threads++) {
        if (pool_new(threads, &pool, &err) < 0)
            abort();
        RUN(test_rising_scores);
        RUN(test_long_segments);
        pool_free(pool);
    }
    RUN(test_long_independence);
    return check_report();
}
