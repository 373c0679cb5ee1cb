/* What happens to each row by itself: norms, rope, gates, embedding. */
#include "kernels/cpu/simd.h"

#define ROWS_ITEM 16 /* rows in one work item */

static int items(int32_t m)
{
    return (m + ROWS_ITEM - 1) / ROWS_ITEM;
}

static int32_t item_end(int item, int32_t m)
{
    return (item + 1) * ROWS_ITEM < m ? (item + 1) * ROWS_ITEM : m;
}

struct norm_job {
    int32_t m, n;
    float eps;
    const float *gain, *add, *x, *dy;
    float *x_out, *y, *rstd;
    bool accumulate;
};

static void norm_forward_rows(void *ctx, int item, int thread)
{
    const struct norm_job *j = ctx;
    (void)thread;
    for (int32_t row = item * ROWS_ITEM; row < item_end(item, j->m); row++) {
        float *x = j->x_out + (ptrdiff_t)row * j->n, *y = j->y + (ptrdiff_t)row * j->n;
        const float *add = j->add ? j->add + (ptrdiff_t)row * j->n : NULL;
        vec squares = vec_zero();
        for (int32_t i = 0; i < j->n; i += VL) {
            vmask mask = vec_mask(j->n - i);
            vec v = vec_load_mask(x + i, mask);
            if (add) {
                v = vec_add(v, vec_load_mask(add + i, mask));
                vec_store_mask(x + i, v, mask);
            }
            squares = vec_fma(v, v, squares);
        }
        float rstd = 1.0f / sqrtf(vec_sum(squares) / (float)j->n + j->eps);
        for (int32_t i = 0; i < j->n; i += VL) {
            vmask mask = vec_mask(j->n - i);
            vec v = vec_mul(vec_load_mask(x + i, mask), vec_set(rstd));
            vec_store_mask(y + i, vec_mul(v, vec_load_mask(j->gain + i, mask)), mask);
        }
        if (j->rstd)
            j->rstd[row] = rstd;
    }
}

void ISA(rmsnorm_forward)(const struct kernel_run *run, int32_t m, int32_t n, float eps, const float *gain, float *x,
                          const float *add, float *y, float *rstd)
{
    struct norm_job j = {.m = m, .n = n, .eps = eps, .gain = gain, .add = add, .x_out = x, .y = y, .rstd = rstd};
    pool_run(run->pool, items(m), norm_forward_rows, &j);
}

/* With y = x·rstd·gain: dx = rstd·(gain·dy) − x·(rstd³/n)·Σ gain·dy·x. */
static void norm_backward_rows(void *ctx, int item, int thread)
{
    const struct norm_job *j = ctx;
    (void)thread;
    for (int32_t row = item * ROWS_ITEM; row < item_end(item, j->m); row++) {
        ptrdiff_t at = (ptrdiff_t)row * j->n;
        const float *x = j->x + at, *dy = j->dy + at;
        float *dx = j->y + at, rstd = j->rstd[row];
        vec sum = vec_zero();
        for (int32_t i = 0; i < j->n; i += VL) {
            vmask mask = vec_mask(j->n - i);
            vec gdy = vec_mul(vec_load_mask(j->gain + i, mask), vec_load_mask(dy + i, mask));
            sum = vec_fma(gdy, vec_load_mask(x + i, mask), sum);
        }
        vec along = vec_set(-vec_sum(sum) * rstd * rstd * rstd / (float)j->n), scale = vec_set(rstd);
        for (int32_t i = 0; i < j->n; i += VL) {
            vmask mask = vec_mask(j->n - i);
            vec gdy = vec_mul(vec_load_mask(j->gain + i, mask), vec_load_mask(dy + i, mask));
            vec d = vec_fma(vec_load_mask(x + i, mask), along, vec_mul(gdy, scale));
            if (j->accumulate)
                d = vec_add(d, vec_load_mask(dx + i, mask));
            vec_store_mask(dx + i, d, mask);
        }
    }
}

void ISA(rmsnorm_backward)(const struct kernel_run *run, int32_t m, int32_t n, const float *gain, const float *x,
                           const float *rstd, const float *dy, float *dx, bool accumulate)
{
    struct norm_job j = {.m = m,
                         .n = n,
                         .gain = gain,
                         .x = x,
                         .rstd = (float *)(uintptr_t)rstd,
                         .dy = dy,
                         .y = dx,
                         .accumulate = accumulate};
    pool_run(run->pool, items(m), norm_backward_rows, &j);
}

struct rope_job {
    int32_t m, heads, head_size, rotated;
    enum rope_order order;
    float sign;
    const float *table;
    const int32_t *positions;
    float *x;
};

INLINE void rotate(float *a, float *b, float c, float s)
{
    float x = *a, y = *b;
    *a = x * c - y * s;
    *b = x * s + y * c;
}

static void rope_rows(void *ctx, int item, int thread)
{
    const struct rope_job *j = ctx;
    int32_t half = j->rotated / 2;
    (void)thread;
    for (int32_t row = item * ROWS_ITEM; row < item_end(item, j->m); row++) {
        const float *t = j->table + (ptrdiff_t)j->positions[row] * j->rotated;
        for (int32_t h = 0; h < j->heads; h++) {
            float *x = j->x + ((ptrdiff_t)row * j->heads + h) * j->head_size;
            if (j->order == ROPE_NORM) {
                for (int32_t i = 0; i < half; i++)
                    rotate(&x[2 * i], &x[2 * i + 1], t[2 * i], t[2 * i + 1] * j->sign);
            } else {
                for (int32_t i = 0; i < half; i++)
                    rotate(&x[i], &x[i + half], t[2 * i], t[2 * i + 1] * j->sign);
            }
        }
    }
}

void ISA(rope)(const struct kernel_run *run, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
               enum rope_order order, bool inverse, const float *table, const int32_t *positions, float *x)
{
    assert(rotated % 2 == 0 && rotated <= head_size);
    struct rope_job j = {.m = m,
                         .heads = heads,
                         .head_size = head_size,
                         .rotated = rotated,
                         .order = order,
                         .sign = inverse ? -1.0f : 1.0f,
                         .table = table,
                         .positions = positions,
                         .x = x};
    pool_run(run->pool, items(m), rope_rows, &j);
}

struct gate_job {
    int32_t m, n, stride;
    enum gate_kind kind;
    const float *gate_in, *up_in, *dout;
    float *gate, *up, *out;
};

/* The activation's value and derivative. SiLU: x·σ(x). GELU: x·σ(2u), u = √(2/π)(x + 0.044715x³), which is the tanh
 * form because (1 + tanh u)/2 = σ(2u). */
INLINE vec activate(vec x, enum gate_kind kind, vec *ret_slope)
{
    vec one = vec_set(1), u = x, du = one;
    if (kind == GATE_GELU_TANH) {
        const float c = 1.5957691216057308f; /* 2√(2/π) */
        vec xx = vec_mul(x, x);
        u = vec_mul(x, vec_fma(xx, vec_set(c * 0.044715f), vec_set(c)));
        du = vec_fma(xx, vec_set(3 * c * 0.044715f), vec_set(c));
    }
    vec sigma = vec_div(one, vec_add(one, vec_exp(vec_sub(vec_zero(), u))));
    vec value = vec_mul(x, sigma);
    *ret_slope = vec_fma(vec_mul(value, vec_sub(one, sigma)), du, sigma);
    return value;
}

static void gate_forward_rows(void *ctx, int item, int thread)
{
    const struct gate_job *j = ctx;
    (void)thread;
    for (int32_t row = item * ROWS_ITEM; row < item_end(item, j->m); row++) {
        const float *gate = j->gate_in + (ptrdiff_t)row * j->stride, *up = j->up_in + (ptrdiff_t)row * j->stride;
        float *out = j->out + (ptrdiff_t)row * j->n;
        for (int32_t i = 0; i < j->n; i += VL) {
            vmask mask = vec_mask(j->n - i);
            vec slope, a = activate(vec_load_mask(gate + i, mask), j->kind, &slope);
            vec_store_mask(out + i, vec_mul(a, vec_load_mask(up + i, mask)), mask);
        }
    }
}

void ISA(gated_forward)(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, const float *gate,
                        const float *up, int32_t gate_stride, float *out)
{
    struct gate_job j = {.m = m, .n = n, .stride = gate_stride, .kind = kind, .gate_in = gate, .up_in = up, .out = out};
    pool_run(run->pool, items(m), gate_forward_rows, &j);
}

static void gate_backward_rows(void *ctx, int item, int thread)
{
    const struct gate_job *j = ctx;
    (void)thread;
    for (int32_t row = item * ROWS_ITEM; row < item_end(item, j->m); row++) {
        float *gate = j->gate + (ptrdiff_t)row * j->stride, *up = j->up + (ptrdiff_t)row * j->stride;
        const float *dout = j->dout + (ptrdiff_t)row * j->n;
        for (int32_t i = 0; i < j->n; i += VL) {
            vmask mask = vec_mask(j->n - i);
            vec slope, a = activate(vec_load_mask(gate + i, mask), j->kind, &slope), d = vec_load_mask(dout + i, mask);
            vec_store_mask(gate + i, vec_mul(vec_mul(d, vec_load_mask(up + i, mask)), slope), mask);
            vec_store_mask(up + i, vec_mul(d, a), mask);
        }
    }
}

void ISA(gated_backward)(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, float *gate,
                         float *up, int32_t gate_stride, const float *dout)
{
    struct gate_job j = {.m = m, .n = n, .stride = gate_stride, .kind = kind, .gate = gate, .up = up, .dout = dout};
    pool_run(run->pool, items(m), gate_backward_rows, &j);
}

struct embed_job {
    int32_t m;
    const struct tensor *w;
    const int32_t *ids;
    float scale;
    float *y;
};

static void embed_rows(void *ctx, int item, int thread)
{
    const struct embed_job *j = ctx;
    (void)thread;
    for (int32_t row = item * ROWS_ITEM; row < item_end(item, j->m); row++) {
        float *y = j->y + (ptrdiff_t)row * j->w->in;
        ISA(dequantise)(j->w->type, tensor_row(j->w, j->ids[row]), 0, (size_t)j->w->in, y);
        for (int32_t i = 0; i < j->w->in; i++)
            y[i] *= j->scale;
    }
}

void ISA(embed)(const struct kernel_run *run, int32_t m, const struct tensor *w, const int32_t *ids, float scale,
                float *y)
{
    struct embed_job j = {.m = m, .w = w, .ids = ids, .scale = scale, .y = y};
    pool_run(run->pool, items(m), embed_rows, &j);
}
