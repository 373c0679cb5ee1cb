/*
 * Attention forward: for each segment and head, blocks of ATTENTION_ROWS queries against all keys that they may see,
 * scores kept in scratch; their powers are made panel by panel, o is divided by their sum. What the diagonal cuts off
 * is left out by tiles of WIDE_ROWS queries; keys in a tile's reach that one of its rows may not see have an exact zero
 * among the probabilities.
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
    int32_t first; /* key, a multiple of WIDE_NR, that the columns of s that are used begin at */
    float *s;      /* (rows, lds), column = key */
    ptrdiff_t lds;
};

/* How far the keys of the tile that begins at row r go. */
static int32_t tile_end(const struct block *b, int32_t r)
{
    return b->begin + least(r + WIDE_ROWS, b->rows);
}

/* s (columns j .. j + WIDE_NR − 1) = alpha·q·panelsᵀ, of each tile up to its end. */
static void scores(const struct block *b, int32_t j, const float *q, ptrdiff_t q_stride, const float *panels,
                   float alpha)
{
    struct gemm_panel p = {
        .k = b->d,
        .a_row = q_stride,
        .a_k = 1,
        .b = panels + (ptrdiff_t)j * b->d,
        .ldb = WIDE_NR,
        .alpha = alpha,
        .ldc = b->lds,
    };
    for (int32_t r = 0; r < b->rows; r += p.m) {
        const int32_t columns = tile_end(b, r) - j;
        p.m = columns < WIDE_NR ? least(WIDE_ROWS, b->rows - r) : b->rows - r;
        p.columns = least(columns, WIDE_NR);
        p.a = q + r * q_stride;
        p.c = b->s + r * b->lds + j;
        if (columns > 0)
            ISA(gemm_panel_wide)(&p);
    }
}

/* o = s·v, of each tile up to its end. */
static void mix_values(const struct block *b, const float *v, ptrdiff_t v_stride, float *o, ptrdiff_t o_stride)
{
    const int32_t end = b->begin + b->rows;
    for (int32_t j = b->first, next; j < end; j = next) {
        next = round_down(j, VALUES_DEPTH) + VALUES_DEPTH;
        for (int32_t c = 0; c < b->d; c += WIDE_NR) {
            struct gemm_panel p = {
                .columns = least(b->d - c, WIDE_NR),
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
                p.m = stop < next ? least(WIDE_ROWS, b->rows - r) : b->rows - r;
                p.k = least(stop, next) - j;
                p.a = b->s + r * b->lds + j;
                p.c = o + r * o_stride + c;
                if (p.k > 0)
                    ISA(gemm_panel_wide)(&p);
            }
        }
    }
}

/* The softmax of rows so far: scores become 2^(score − shift) panel by panel, while they are in the first cache. A
 * row's shift is the largest score of the panels up to one of them; as long as later scores are not much larger it
 * stays. */
struct row_sums {
    float sum[ATTENTION_ROWS][VL]; /* by lanes */
    float shift[ATTENTION_ROWS];
};

#define SHIFT_SLACK 16 /* a score may be so much larger: its power of 2 is far from overflow */

/* From now on the row's powers are 2^(score − top); s[0..before) are those so far. */
static void raise_shift(float *shift, float *sum, float top, float *s, int32_t before)
{
    const float old = *shift;
    *shift = top;
    if (old == -INFINITY) /* they are zeros */
        return;
    const vec by = vec_exp2(vec_set(old - top));
    for (int32_t j = 0; j < before; j += VL)
        vec_store(s + j, vec_mul(vec_load(s + j), by));
    vec_store(sum, vec_mul(vec_load(sum), by));
}

/* A panel's scores of one row at s, `columns` of them, of which the row sees lo .. hi − 1: those become powers, the
 * others zero. Whole vectors are written. before: columns of the row's earlier panels. */
INLINE void powers(float *shift, float *sums, float *s, int32_t columns, int32_t lo, int32_t hi, int32_t before,
                   bool all)
{
    const int vecs = all ? WIDE_VECS : (columns + VL - 1) / VL;
    vec x[WIDE_VECS] = {vec_zero()}, top = vec_set(-INFINITY), sum = vec_load(sums);
#pragma GCC unroll 4
    for (int i = 0; i < WIDE_VECS && i < vecs; i++) {
        x[i] = vec_load(s + i * VL);
        if (!all)
            x[i] = vec_keep(x[i], vec_mask_range(lo - i * VL, hi - i * VL), -INFINITY);
        top = vec_max(x[i], top);
    }
    if (vec_any_above(top, vec_set(*shift + SHIFT_SLACK))) {
        raise_shift(shift, sums, vec_top(top), s - before, before);
        sum = vec_load(sums);
    }
    const vec by = vec_set(*shift);
#pragma GCC unroll 4
    for (int i = 0; i < WIDE_VECS && i < vecs; i++) {
        vec e = vec_exp2(vec_sub(x[i], by));
        if (!all)
            e = vec_keep(e, vec_mask_range(lo - i * VL, hi - i * VL), 0);
        vec_store(s + i * VL, e);
        sum = vec_add(sum, e);
    }
    vec_store(sums, sum);
}

/* The panel at column j of all rows whose tiles come so far. */
static void panel_powers(const struct block *b, const struct attention_shape *shape, int32_t j, struct row_sums *sums)
{
    for (int32_t r = 0; r < b->rows; r++) {
        const int32_t columns = least(tile_end(b, round_down(r, WIDE_ROWS)) - j, WIDE_NR), query = b->begin + r;
        const int32_t lo = first_key(shape, query) - j, hi = query + 1 - j;
        float *s = b->s + r * b->lds + j;
        if (lo <= 0 && hi >= WIDE_NR)
            powers(&sums->shift[r], sums->sum[r], s, WIDE_NR, 0, WIDE_NR, j - b->first, true);
        else if (columns > 0)
            powers(&sums->shift[r], sums->sum[r], s, columns, lo, hi, j - b->first, false);
    }
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
    struct block b = {.d = d, .lds = round_up(at.n, WIDE_NR)};
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
        b.first = round_down(first_key(shape, b.begin), WIDE_NR);
        const float *q = j->q + at.q_at + b.begin * at.q_stride;
        float *o = j->o + at.q_at + b.begin * at.q_stride;
        _Alignas(64) struct row_sums sums = {0};
        for (int32_t r = 0; r < b.rows; r++)
            sums.shift[r] = -INFINITY;
        for (int32_t key = b.first; key < b.begin + b.rows; key += WIDE_NR) {
            scores(&b, key, q, at.q_stride, keys, shape->scale * LOG2_E);
            panel_powers(&b, shape, key, &sums);
        }
        mix_values(&b, j->v + at.kv_at, at.kv_stride, o, at.q_stride);
        for (int32_t r = 0; r < b.rows; r++) {
            const float sum = vec_sum(vec_load(sums.sum[r]));
            scale_row(o + r * at.q_stride, d, 1.0f / sum);
            if (j->lse)
                j->lse[at.lse_at + (ptrdiff_t)(b.begin + r) * shape->heads] = sums.shift[r] * LN_2 + logf(sum);
        }
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
