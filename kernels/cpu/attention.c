/*
 * Attention: for each segment and head, blocks of ATTENTION_ROWS queries (counted from the segment's start) against
 * all keys that they may see, scores kept in scratch, softmax over whole rows. Backward recomputes the scores from the
 * saved log-sum-exp. Keys that a row may not see have an exact zero among the probabilities.
 */
#include "kernels/cpu/simd.h"

struct job {
    const struct attention_shape *shape;
    const struct segments *segments;
    const float *q, *k, *v, *o, *lse, *do_;
    float *o_out, *lse_out, *dq, *dk, *dv;
    uint8_t *scratch;
    size_t thread_bytes;
    /* backward */
    float *sums;        /* dk and dv of one head each */
    size_t head_floats; /* of them */
    int32_t segment;
};

static int32_t round_up(int32_t n, int32_t to)
{
    return (n + to - 1) / to * to;
}

/* Key panels: (head_size, GEMM_NR) per GEMM_NR keys. */
static void pack_keys(const float *k, ptrdiff_t stride, int32_t n, int32_t d, float *panels)
{
    for (int32_t j = 0; j < n; j += GEMM_NR) {
        int32_t rows = n - j < GEMM_NR ? n - j : GEMM_NR;
        ISA(pack_transposed)(k + j * stride, stride, rows, d, panels + (ptrdiff_t)(j / GEMM_NR) * d * GEMM_NR);
    }
}

/* s (rows, lds), columns first .. end − 1 (first a multiple of GEMM_NR) = scale·a·panelsᵀ. */
static void scores(const float *a, ptrdiff_t a_row, int32_t rows, int32_t d, const float *panels, int32_t first,
                   int32_t end, float scale, float *s, ptrdiff_t lds)
{
    for (int32_t j = first; j < end; j += GEMM_NR) {
        struct gemm_panel p = {
            .m = rows,
            .k = d,
            .columns = end - j < GEMM_NR ? end - j : GEMM_NR,
            .a = a,
            .a_row = a_row,
            .a_k = 1,
            .b = panels + (ptrdiff_t)(j / GEMM_NR) * d * GEMM_NR,
            .ldb = GEMM_NR,
            .alpha = scale,
            .c = s + j,
            .ldc = lds,
        };
        ISA(gemm_panel)(&p);
    }
}

/* c (m, n) = alpha·A·B (+ c), B rows ldb apart. */
static void product(int32_t m, int32_t n, int32_t k, const float *a, ptrdiff_t a_row, ptrdiff_t a_k, const float *b,
                    ptrdiff_t ldb, float alpha, float *c, ptrdiff_t ldc, bool accumulate)
{
    for (int32_t j = 0; j < n; j += GEMM_NR) {
        struct gemm_panel p = {
            .m = m,
            .k = k,
            .columns = n - j < GEMM_NR ? n - j : GEMM_NR,
            .a = a,
            .a_row = a_row,
            .a_k = a_k,
            .b = b + j,
            .ldb = ldb,
            .alpha = alpha,
            .c = c + j,
            .ldc = ldc,
            .accumulate = accumulate,
        };
        ISA(gemm_panel)(&p);
    }
}

/* The first key that query i sees. */
static int32_t first_key(const struct attention_shape *shape, int32_t i)
{
    return shape->window > 0 && i >= shape->window ? i - shape->window + 1 : 0;
}

/* Scores s[0..n) become exp(s − shift) inside [lo, hi] and zero outside; returns their sum. lo < n. */
static float exponentials(float *s, int32_t first, int32_t n, int32_t lo, int32_t hi, float shift)
{
    vec sum = vec_zero();
    for (int32_t j = first; j < n; j += VL) {
        vec e = vec_exp(vec_sub(vec_load_mask(s + j, vec_mask(n - j)), vec_set(shift)));
        if (j + VL > hi + 1)
            e = vec_keep(e, vec_mask(hi + 1 - j < 0 ? 0 : hi + 1 - j), 0);
        if (j < lo)
            e = vec_sub(e, vec_keep(e, vec_mask(lo - j < VL ? lo - j : VL), 0));
        sum = vec_add(sum, e);
        vec_store_mask(s + j, e, vec_mask(n - j));
    }
    return vec_sum(sum);
}

static float largest(const float *s, int32_t lo, int32_t hi)
{
    vec top = vec_set(-INFINITY);
    for (int32_t j = lo; j <= hi; j += VL) {
        vmask mask = vec_mask(hi + 1 - j);
        top = vec_max(top, vec_keep(vec_load_mask(s + j, mask), mask, -INFINITY));
    }
    return vec_top(top);
}

static void scale_row(float *s, int32_t first, int32_t n, float by)
{
    for (int32_t j = first; j < n; j += VL) {
        vmask mask = vec_mask(n - j);
        vec_store_mask(s + j, vec_mul(vec_load_mask(s + j, mask), vec_set(by)), mask);
    }
}

/* An item is one head of one segment, and of its query blocks the lower three quarters or the rest, which see more: the
 * more even the items, the shorter the wait for the last. */
#define FORWARD_PARTS 2

static int32_t part_begin(int32_t n, int part)
{
    const int32_t blocks = (n + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    return part == 0 ? 0 : part == FORWARD_PARTS || blocks < 4 ? n : blocks * 3 / 4 * ATTENTION_ROWS;
}

static void forward_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const struct attention_shape *shape = j->shape;
    const int part = item % FORWARD_PARTS;
    item /= FORWARD_PARTS;
    int32_t head = item % shape->heads, segment = item / shape->heads, d = shape->head_size;
    int32_t start = j->segments->offsets[segment], n = j->segments->offsets[segment + 1] - start;
    ptrdiff_t q_stride = (ptrdiff_t)shape->heads * d, kv_stride = (ptrdiff_t)shape->kv_heads * d;
    int32_t kv_head = head / (shape->heads / shape->kv_heads);
    const float *q = j->q + start * q_stride + (ptrdiff_t)head * d;
    const float *k = j->k + start * kv_stride + (ptrdiff_t)kv_head * d;
    const float *v = j->v + start * kv_stride + (ptrdiff_t)kv_head * d;
    float *o = j->o_out + start * q_stride + (ptrdiff_t)head * d;
    int32_t lds = round_up(n, GEMM_NR);
    uint8_t *next = j->scratch + (size_t)thread * j->thread_bytes, *end = next + j->thread_bytes;
    float *keys = scratch_take(&next, end, (size_t)lds * ((size_t)d + 16) * sizeof(float));
    float *s = scratch_take(&next, end, (size_t)lds * ATTENTION_ROWS * sizeof(float));
    const int32_t begin = part_begin(n, part), stop = part_begin(n, part + 1);
    if (begin == stop)
        return;
    pack_keys(k, kv_stride, stop, d, keys);
    for (int32_t i0 = begin; i0 < stop; i0 += ATTENTION_ROWS) {
        int32_t rows = n - i0 < ATTENTION_ROWS ? n - i0 : ATTENTION_ROWS, keys_end = i0 + rows;
        int32_t first = first_key(shape, i0) / GEMM_NR * GEMM_NR;
        scores(q + i0 * q_stride, q_stride, rows, d, keys, first, keys_end, shape->scale, s, lds);
        for (int32_t i = 0; i < rows; i++) {
            float *row = s + (ptrdiff_t)i * lds;
            int32_t lo = first_key(shape, i0 + i), hi = i0 + i;
            float top = largest(row, lo, hi), sum = exponentials(row, first, keys_end, lo, hi, top);
            scale_row(row, first, keys_end, 1.0f / sum);
            if (j->lse_out)
                j->lse_out[(ptrdiff_t)(start + i0 + i) * shape->heads + head] = top + logf(sum);
        }
        product(rows, d, keys_end - first, s + first, lds, 1, v + first * kv_stride, kv_stride, 1, o + i0 * q_stride,
                q_stride, false);
    }
}

static size_t thread_share(const struct kernel_run *run)
{
    return run->scratch_bytes / (size_t)pool_threads(run->pool) & ~(size_t)63;
}

void ISA(attention_forward)(const struct kernel_run *run, const struct attention_shape *shape,
                            const struct segments *segments, const float *q, const float *k, const float *v, float *o,
                            float *lse)
{
    assert(shape->heads % shape->kv_heads == 0);
    struct job j = {.shape = shape,
                    .segments = segments,
                    .q = q,
                    .k = k,
                    .v = v,
                    .o_out = o,
                    .lse_out = lse,
                    .scratch = run->scratch,
                    .thread_bytes = thread_share(run)};
    pool_run(run->pool, segments->count * shape->heads * FORWARD_PARTS, forward_item, &j);
}

/* From the probabilities p and their gradients dp (in place): ds = p·(dp − Σ do·o). */
static void softmax_backward(const float *p, float *dp, int32_t first, int32_t n, float delta)
{
    for (int32_t j = first; j < n; j += VL) {
        vmask mask = vec_mask(n - j);
        vec d = vec_sub(vec_load_mask(dp + j, mask), vec_set(delta));
        vec_store_mask(dp + j, vec_mul(d, vec_load_mask(p + j, mask)), mask);
    }
}

static float dot(const float *a, const float *b, int32_t n)
{
    vec sum = vec_zero();
    for (int32_t i = 0; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        sum = vec_fma(vec_load_mask(a + i, mask), vec_load_mask(b + i, mask), sum);
    }
    return vec_sum(sum);
}

/* What one head asks of its keys and values: dk, dv (n, d) from zero, and the head's dq. */
static void backward_head(const struct job *j, int32_t segment, int32_t head, uint8_t *scratch, float *dk, float *dv)
{
    const struct attention_shape *shape = j->shape;
    int32_t kv_head = head / (shape->heads / shape->kv_heads), d = shape->head_size;
    int32_t start = j->segments->offsets[segment], n = j->segments->offsets[segment + 1] - start;
    ptrdiff_t q_stride = (ptrdiff_t)shape->heads * d, kv_stride = (ptrdiff_t)shape->kv_heads * d;
    ptrdiff_t kv_at = start * kv_stride + (ptrdiff_t)kv_head * d;
    const float *k = j->k + kv_at;
    int32_t lds = round_up(n, GEMM_NR);
    uint8_t *next = scratch, *end = next + j->thread_bytes;
    float *keys = scratch_take(&next, end, (size_t)lds * ((size_t)d + 16) * sizeof(float));
    float *values = scratch_take(&next, end, (size_t)lds * ((size_t)d + 16) * sizeof(float));
    float *p = scratch_take(&next, end, (size_t)lds * ATTENTION_ROWS * sizeof(float));
    float *dp = scratch_take(&next, end, (size_t)lds * ATTENTION_ROWS * sizeof(float));
    pack_keys(k, kv_stride, n, d, keys);
    pack_keys(j->v + kv_at, kv_stride, n, d, values);
    memset(dk, 0, (size_t)n * (size_t)d * sizeof(float));
    memset(dv, 0, (size_t)n * (size_t)d * sizeof(float));
    for (int32_t i0 = 0; i0 < n; i0 += ATTENTION_ROWS) {
        int32_t rows = n - i0 < ATTENTION_ROWS ? n - i0 : ATTENTION_ROWS, keys_end = i0 + rows;
        int32_t first = first_key(shape, i0) / GEMM_NR * GEMM_NR, count = keys_end - first;
        ptrdiff_t at = (start + i0) * q_stride + (ptrdiff_t)head * d;
        scores(j->q + at, q_stride, rows, d, keys, first, keys_end, shape->scale, p, lds);
        scores(j->do_ + at, q_stride, rows, d, values, first, keys_end, 1, dp, lds);
        for (int32_t i = 0; i < rows; i++) {
            float *row = p + (ptrdiff_t)i * lds;
            float lse = j->lse[(ptrdiff_t)(start + i0 + i) * shape->heads + head];
            exponentials(row, first, keys_end, first_key(shape, i0 + i), i0 + i, lse);
            float delta = dot(j->do_ + at + i * q_stride, j->o + at + i * q_stride, d);
            softmax_backward(row, dp + (ptrdiff_t)i * lds, first, keys_end, delta);
        }
        product(count, d, rows, p + first, 1, lds, j->do_ + at, q_stride, 1, dv + (ptrdiff_t)first * d, d, true);
        product(count, d, rows, dp + first, 1, lds, j->q + at, q_stride, shape->scale, dk + (ptrdiff_t)first * d, d,
                true);
        product(rows, d, count, dp + first, lds, 1, k + first * kv_stride, kv_stride, shape->scale, j->dq + at,
                q_stride, false);
    }
}

/* The heads of one key-value head are summed in order, however the work is shared out. */
static void add_head(const struct job *j, int32_t segment, int32_t head, const float *dk, const float *dv)
{
    const int32_t d = j->shape->head_size, group = j->shape->heads / j->shape->kv_heads;
    const int32_t start = j->segments->offsets[segment], n = j->segments->offsets[segment + 1] - start;
    const ptrdiff_t stride = (ptrdiff_t)j->shape->kv_heads * d, at = start * stride + (ptrdiff_t)(head / group) * d;
    for (int32_t t = 0; t < n; t++) {
        float *to_k = j->dk + at + t * stride, *to_v = j->dv + at + t * stride;
        for (int32_t i = 0; i < d; i += VL) {
            vec k = vec_load(dk + (ptrdiff_t)t * d + i), v = vec_load(dv + (ptrdiff_t)t * d + i);
            vec_store(to_k + i, head % group ? vec_add(vec_load(to_k + i), k) : k);
            vec_store(to_v + i, head % group ? vec_add(vec_load(to_v + i), v) : v);
        }
    }
}

/* An item is one key-value head of one segment. */
static void backward_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const int32_t group = j->shape->heads / j->shape->kv_heads, kv_head = item % j->shape->kv_heads;
    const int32_t segment = item / j->shape->kv_heads;
    float *dk = j->sums + (size_t)thread * j->head_floats, *dv = dk + j->head_floats / 2;
    for (int32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        backward_head(j, segment, head, j->scratch + (size_t)thread * j->thread_bytes, dk, dv);
        add_head(j, segment, head, dk, dv);
    }
}

/* An item is one head of j->segment, with sums of its own; then one key-value head. */
static void backward_head_item(void *ctx, int head, int thread)
{
    const struct job *j = ctx;
    float *dk = j->sums + (size_t)head * j->head_floats;
    backward_head(j, j->segment, head, j->scratch + (size_t)thread * j->thread_bytes, dk, dk + j->head_floats / 2);
}

static void backward_add_item(void *ctx, int kv_head, int thread)
{
    const struct job *j = ctx;
    const int32_t group = j->shape->heads / j->shape->kv_heads;
    (void)thread;
    for (int32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const float *dk = j->sums + (size_t)head * j->head_floats;
        add_head(j, j->segment, head, dk, dk + j->head_floats / 2);
    }
}

void ISA(attention_backward)(const struct kernel_run *run, const struct attention_shape *shape,
                             const struct segments *segments, const float *q, const float *k, const float *v,
                             const float *o, const float *lse, const float *do_, float *dq, float *dk, float *dv)
{
    struct job j = {.shape = shape,
                    .segments = segments,
                    .q = q,
                    .k = k,
                    .v = v,
                    .o = o,
                    .lse = lse,
                    .do_ = do_,
                    .dq = dq,
                    .dk = dk,
                    .dv = dv,
                    .scratch = run->scratch};
    const int threads = pool_threads(run->pool);
    int32_t longest = 0;
    for (int32_t s = 0; s < segments->count; s++) {
        const int32_t n = segments->offsets[s + 1] - segments->offsets[s];
        longest = n > longest ? n : longest;
    }
    const int sums = shape->heads > threads ? shape->heads : threads;
    j.head_floats = attention_head_floats(longest, shape->head_size);
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    j.sums = scratch_take(&next, end, (size_t)sums * j.head_floats * sizeof(float));
    j.scratch = next;
    j.thread_bytes = (size_t)(end - next) / (size_t)threads & ~(size_t)63;
    /* Few segments have few key-value heads: then the heads are shared out. */
    if (segments->count * shape->kv_heads >= 4 * threads || threads == 1) {
        pool_run(run->pool, segments->count * shape->kv_heads, backward_item, &j);
        return;
    }
    for (j.segment = 0; j.segment < segments->count; j.segment++) {
        pool_run(run->pool, shape->heads, backward_head_item, &j);
        pool_run(run->pool, shape->kv_heads, backward_add_item, &j);
    }
}
