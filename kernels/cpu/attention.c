/*
 * Attention forward: for each segment and head, blocks of ATTENTION_ROWS queries against all keys that they may see,
 * scores kept in scratch, softmax over whole rows. What the diagonal cuts off is left out by tiles of GEMM_ROWS
 * queries; keys in a tile's reach that one of its rows may not see have an exact zero among the probabilities.
 */
#include "kernels/cpu/attention.h"

/* Keys whose values are multiplied at once: they stay in the second cache while all rows of a block take them. */
#define VALUES_DEPTH 512

struct job {
    const struct attention_shape *shape;
    const struct segments *segments;
    const float *q, *k, *v;
    float *o, *lse;
    uint8_t *scratch;
    size_t thread_bytes;
};

/* A block of queries of one head, begin a multiple of ATTENTION_ROWS. */
struct block {
    int32_t begin, rows, d;
    int32_t first; /* key, a multiple of GEMM_NR, that the columns of s that are used begin at */
    float *s;      /* (rows, lds), column = key */
    ptrdiff_t lds;
};

/* How far the keys of the tile that begins at row r go. */
static int32_t tile_end(const struct block *b, int32_t r)
{
    return b->begin + least(r + GEMM_ROWS, b->rows);
}

/* s = alpha·q·panelsᵀ, of each tile up to its end. */
static void scores(const struct block *b, const float *q, ptrdiff_t q_stride, const float *panels, float alpha)
{
    const int32_t end = b->begin + b->rows;
    for (int32_t j = b->first; j < end; j += GEMM_NR) {
        struct gemm_panel p = {
            .k = b->d,
            .a_row = q_stride,
            .a_k = 1,
            .b = panels + (ptrdiff_t)j * b->d,
            .ldb = GEMM_NR,
            .alpha = alpha,
            .ldc = b->lds,
        };
        int32_t r = 0;
        for (int32_t rows; r < b->rows; r += rows) {
            const int32_t columns = tile_end(b, r) - j;
            rows = columns < GEMM_NR ? least(GEMM_ROWS, b->rows - r) : b->rows - r;
            if (columns <= 0)
                continue;
            p.m = rows;
            p.columns = least(columns, GEMM_NR);
            p.a = q + r * q_stride;
            p.c = b->s + r * b->lds + j;
            ISA(gemm_panel)(&p);
        }
    }
}

/* o = s·v, of each tile up to its end. */
static void mix_values(const struct block *b, const float *v, ptrdiff_t v_stride, float *o, ptrdiff_t o_stride)
{
    const int32_t end = b->begin + b->rows;
    for (int32_t j = b->first, next; j < end; j = next) {
        next = round_down(j, VALUES_DEPTH) + VALUES_DEPTH;
        for (int32_t c = 0; c < b->d; c += GEMM_NR) {
            struct gemm_panel p = {
                .columns = least(b->d - c, GEMM_NR),
                .a_row = b->lds,
                .a_k = 1,
                .b = v + j * v_stride + c,
                .ldb = v_stride,
                .alpha = 1,
                .ldc = o_stride,
                .accumulate = j > b->first,
            };
            for (int32_t r = 0; r < b->rows; r += p.m) {
                const int32_t stop = tile_end(b, r);
                p.m = stop < next ? least(GEMM_ROWS, b->rows - r) : b->rows - r;
                p.k = least(stop, next) - j;
                p.a = b->s + r * b->lds + j;
                p.c = o + r * o_stride + c;
                if (p.k > 0)
                    ISA(gemm_panel)(&p);
            }
        }
    }
}

/* Scores s[first..end) become 2^(s − shift) inside [lo, hi] and zero outside; returns their sum. Whole vectors are
 * written, first is at the beginning of one. */
static float exponentials(float *s, int32_t first, int32_t end, int32_t lo, int32_t hi, float shift)
{
    const vec by = vec_set(shift);
    vec sum = vec_zero(), sum2 = vec_zero();
    int32_t j = first;
    for (; j + VL <= lo; j += VL)
        vec_store(s + j, vec_zero());
    if (j < lo) {
        vec e = vec_exp2(vec_sub(vec_load(s + j), by));
        e = vec_keep(vec_drop(e, vec_mask(lo - j)), vec_mask(least(hi + 1 - j, VL)), 0);
        vec_store(s + j, e);
        sum = vec_add(sum, e);
        j += VL;
    }
    for (; j + 2 * VL <= hi + 1; j += 2 * VL) {
        vec e = vec_exp2(vec_sub(vec_load(s + j), by)), e2 = vec_exp2(vec_sub(vec_load(s + j + VL), by));
        vec_store(s + j, e);
        vec_store(s + j + VL, e2);
        sum = vec_add(sum, e);
        sum2 = vec_add(sum2, e2);
    }
    for (; j <= hi; j += VL) {
        vec e = vec_keep(vec_exp2(vec_sub(vec_load(s + j), by)), vec_mask(least(hi + 1 - j, VL)), 0);
        vec_store(s + j, e);
        sum = vec_add(sum, e);
    }
    for (; j < end; j += VL)
        vec_store(s + j, vec_zero());
    return vec_sum(vec_add(sum, sum2));
}

static float largest(const float *s, int32_t lo, int32_t hi)
{
    vec top = vec_set(-INFINITY), top2 = top;
    int32_t j = lo;
    for (; j + 2 * VL <= hi + 1; j += 2 * VL) {
        top = vec_max(top, vec_load(s + j));
        top2 = vec_max(top2, vec_load(s + j + VL));
    }
    for (; j <= hi; j += VL) {
        vmask mask = vec_mask(hi + 1 - j);
        top = vec_max(top, vec_keep(vec_load_mask(s + j, mask), mask, -INFINITY));
    }
    return vec_top(vec_max(top, top2));
}

static void scale_row(float *o, int32_t d, float by)
{
    for (int32_t c = 0; c < d; c += VL) {
        vmask mask = vec_mask(d - c);
        vec_store_mask(o + c, vec_mul(vec_load_mask(o + c, mask), vec_set(by)), mask);
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
    const int32_t d = shape->head_size;
    const struct head_place at = head_place(shape, j->segments, item / shape->heads, item % shape->heads);
    struct block b = {.d = d, .lds = round_up(at.n, GEMM_NR)};
    uint8_t *next = j->scratch + (size_t)thread * j->thread_bytes, *end = next + j->thread_bytes;
    float *keys = scratch_take(&next, end, (size_t)b.lds * ((size_t)d + 16) * sizeof(float));
    b.s = scratch_take(&next, end, (size_t)b.lds * ATTENTION_ROWS * sizeof(float));
    const int32_t stop = part_begin(at.n, part + 1);
    b.begin = part_begin(at.n, part);
    if (b.begin == stop)
        return;
    pack_panels(j->k + at.kv_at, at.kv_stride, stop, d, keys);
    for (; b.begin < stop; b.begin += ATTENTION_ROWS) {
        b.rows = least(at.n - b.begin, ATTENTION_ROWS);
        b.first = round_down(first_key(shape, b.begin), GEMM_NR);
        scores(&b, j->q + at.q_at + b.begin * at.q_stride, at.q_stride, keys, shape->scale * LOG2_E);
        float sums[ATTENTION_ROWS], *o = j->o + at.q_at + b.begin * at.q_stride;
        for (int32_t r = 0; r < b.rows; r++) {
            float *row = b.s + r * b.lds;
            const int32_t lo = first_key(shape, b.begin + r), hi = b.begin + r;
            const float top = largest(row, lo, hi);
            sums[r] = exponentials(row, b.first, tile_end(&b, round_down(r, GEMM_ROWS)), lo, hi, top);
            if (j->lse)
                j->lse[at.lse_at + (ptrdiff_t)hi * shape->heads] = top / LOG2_E + logf(sums[r]);
        }
        mix_values(&b, j->v + at.kv_at, at.kv_stride, o, at.q_stride);
        for (int32_t r = 0; r < b.rows; r++)
            scale_row(o + r * at.q_stride, d, 1.0f / sums[r]);
    }
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
                    .o = o,
                    .lse = lse,
                    .scratch = run->scratch,
                    .thread_bytes = run->scratch_bytes / (size_t)pool_threads(run->pool) & ~(size_t)63};
    pool_run(run->pool, segments->count * shape->heads * FORWARD_PARTS, forward_item, &j);
}
