/*
 * A row's bits do not depend on its batchmates: the promise that DP-SGD's exact sensitivity rests on. One batch is
 * computed as it is, then again permuted, cut down, padded with other rows, and on another number of threads.
 */
#include "tests/kernels/support.h"

enum { IN = 96, OUT = 150, RANK = 9, ROWS = 203, HEADS = 4, KV = 2, D = 32 };

/* Example of `length` rows placed at `at` in a batch of other random rows; every result for its rows is collected. */
struct result {
    float low_y[64 * OUT], low_dx[64 * IN];
    float y[64 * OUT], dx[64 * IN], h[64 * RANK], up[64 * OUT], dh[64 * RANK], down[64 * IN], gb[OUT * RANK];
    float ga[RANK * IN], norm[64 * IN], o[64 * HEADS * D], lse[64 * HEADS], dq[64 * HEADS * D], dk[64 * KV * D];
    float dv[64 * KV * D], gate[64 * IN], losses[16], head[64 * IN];
};

struct example {
    int32_t length;
    struct tensor w, vocabulary;
    float *a, *b, *x, *dy, *q, *k, *v, *gain;
};

static void put(float *batch, const float *rows, int32_t at, int32_t length, int32_t width)
{
    memcpy(batch + (size_t)at * (size_t)width, rows, (size_t)length * (size_t)width * sizeof(float));
}

static void get(float *rows, const float *batch, int32_t at, int32_t length, int32_t width)
{
    memcpy(rows, batch + (size_t)at * (size_t)width, (size_t)length * (size_t)width * sizeof(float));
}

static void compute(const struct kernel_ops *ops, enum kernel_precision precision, int threads, const struct example *e,
                    int32_t m, int32_t at, struct result *r)
{
    struct pool *pool = NULL;
    struct error err = {0};
    if (pool_new(threads, &pool, &err) < 0)
        abort();
    struct attention_shape shape = {HEADS, KV, D, 0, 0.2f};
    size_t bytes = kernels_linear_scratch(threads, m, OUT, IN);
    size_t more = kernels_attention_scratch(threads, &shape, m, 1);
    size_t head = kernels_head_scratch(threads, m, IN);
    struct kernel_run run = support_run(pool, bytes + more + head);
    run.precision = precision;
    size_t rows = (size_t)m;
    float *x = support_floats(rows * IN), *dy = support_floats(rows * OUT), *y = support_floats(rows * OUT);
    float *dx = support_floats(rows * IN), *h = support_floats(rows * RANK), *dh = support_floats(rows * RANK);
    float *q = support_floats(rows * HEADS * D), *k = support_floats(rows * KV * D), *v = support_floats(rows * KV * D);
    float *o = support_floats(rows * HEADS * D), *lse = support_floats(rows * HEADS), *dq = support_floats(rows * 128);
    float *dk = support_floats(rows * KV * D), *dv = support_floats(rows * KV * D), *rstd = support_floats(rows);
    int32_t n = e->length;
    memset(r, 0, sizeof(*r));
    put(x, e->x, at, n, IN);
    put(dy, e->dy, at, n, OUT);
    put(q, e->q, at, n, HEADS * D);
    put(k, e->k, at, n, KV * D);
    put(v, e->v, at, n, KV * D);
    ops->linear_forward(&run, m, &e->w, NULL, NULL, x, y, false);
    get(r->y, y, at, n, OUT);
    ops->linear_backward(&run, m, &e->w, NULL, dy, dx, false);
    get(r->dx, dx, at, n, IN);
    ops->lora_down(&run, m, IN, RANK, e->a, x, h);
    get(r->h, h, at, n, RANK);
    ops->lora_up(&run, m, OUT, RANK, 0.5f, e->b, h, RANK, y);
    get(r->up, y, at, n, OUT);
    ops->lora_up_backward(&run, m, OUT, RANK, 0.5f, e->b, dy, dh, RANK);
    get(r->dh, dh, at, n, RANK);
    const struct low_rank forward = {RANK, 0.5f, h, RANK, e->b}, backward = {RANK, 0.7f, dh, RANK, e->a};
    ops->linear_forward(&run, m, &e->w, NULL, &forward, x, y, false);
    get(r->low_y, y, at, n, OUT);
    ops->linear_backward(&run, m, &e->w, &backward, dy, dx, false);
    get(r->low_dx, dx, at, n, IN);
    ops->linear_backward(&run, m, &e->w, NULL, dy, dx, false);
    ops->lora_down_backward(&run, m, IN, RANK, e->a, dh, dx);
    get(r->down, dx, at, n, IN);
    ops->lora_grad_b(&run, at, at + n, OUT, RANK, 0.5f, dy, h, RANK, r->gb);
    ops->lora_grad_a(&run, at, at + n, IN, RANK, dh, RANK, x, r->ga);
    ops->gated_forward(&run, m, IN, GATE_SILU, x, dx, IN, dx);
    get(r->gate, dx, at, n, IN);
    ops->rmsnorm_forward(&run, m, IN, 1e-5f, e->gain, x, NULL, dx, rstd);
    get(r->norm, dx, at, n, IN);
    int32_t offsets[4] = {0}, count = 0;
    if (at > 0)
        offsets[++count] = at;
    offsets[++count] = at + n;
    if (at + n < m)
        offsets[++count] = m;
    struct segments segments = {count, offsets};
    ops->attention_forward(&run, &shape, &segments, q, k, v, o, lse);
    get(r->o, o, at, n, HEADS * D);
    get(r->lse, lse, at, n, HEADS);
    put(dq, e->q, at, n, HEADS * D); /* any gradient will do */
    ops->attention_backward(&run, &shape, &segments, q, k, v, o, lse, q, dq, dk, dv);
    get(r->dq, dq, at, n, HEADS * D);
    get(r->dk, dk, at, n, KV * D);
    get(r->dv, dv, at, n, KV * D);
    int32_t label_rows[ROWS], targets[ROWS];
    float losses[ROWS];
    for (int32_t i = 0; i < m; i++) {
        label_rows[i] = i;
        targets[i] = i >= at && i < at + n ? (i - at) * 5 : 1;
    }
    struct labels labels = {m, label_rows, targets, NULL};
    ops->cross_entropy(&run, &e->vocabulary, &labels, x, losses, dx);
    for (int32_t i = 0; i < n && i < 16; i++)
        r->losses[i] = losses[at + i];
    get(r->head, dx, at, n, IN);
    float *all[] = {x, dy, y, dx, h, dh, q, k, v, o, lse, dq, dk, dv, rstd, run.scratch};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        free(all[i]);
    pool_free(pool);
}

#define SAME(field) CHECK_SAME(got->field, want->field, ARRAY_LEN(want->field))

static void compare(const struct result *got, const struct result *want)
{
    SAME(y);
    SAME(low_y);
    SAME(low_dx);
    SAME(dx);
    SAME(h);
    SAME(up);
    SAME(dh);
    SAME(down);
    SAME(gb);
    SAME(ga);
    SAME(gate);
    SAME(norm);
    SAME(o);
    SAME(lse);
    SAME(dq);
    SAME(dk);
    SAME(dv);
    SAME(losses);
    SAME(head);
}

static void test_batchmates(void)
{
    static struct result want, got;
    static const int32_t places[][3] = {/* rows, at, threads */ {60, 0, 1},
                                        {61, 1, 1},
                                        {203, 143, 1},
                                        {203, 77, 1},
                                        {203, 5, 2},
                                        {203, 142, 3},
                                        {100, 37, 4}};
    FOR_EACH_TABLE(ops)
    {
        for (int precision = KERNEL_F32; precision <= KERNEL_BF16; precision++) {
            struct example e = {.length = 59, .w = support_tensor(TENSOR_Q4_1, OUT, IN)};
            e.vocabulary = support_tensor(TENSOR_Q8_0, 2600, IN);
            e.a = support_floats(RANK * IN);
            e.b = support_floats(OUT * RANK);
            e.x = support_floats(64 * IN);
            e.dy = support_floats(64 * OUT);
            e.q = support_floats(64 * HEADS * D);
            e.k = support_floats(64 * KV * D);
            e.v = support_floats(64 * KV * D);
            e.gain = support_floats(IN);
            compute(ops, (enum kernel_precision)precision, 1, &e, e.length, 0, &want);
            bool quick = ops->isa == KERNEL_SCALAR;
            for (size_t i = 0; i < (quick ? 2 : ARRAY_LEN(places)); i++) {
                compute(ops, (enum kernel_precision)precision, places[i][2], &e, places[i][0], places[i][1], &got);
                compare(&got, &want);
            }
            float *all[] = {e.a, e.b, e.x, e.dy, e.q, e.k, e.v, e.gain};
            for (size_t i = 0; i < ARRAY_LEN(all); i++)
                free(all[i]);
            free((void *)(uintptr_t)e.w.data);
            free((void *)(uintptr_t)e.vocabulary.data);
        }
    }
}

int tests_independence(void)
{
    RUN(test_batchmates);
    return check_report();
}
