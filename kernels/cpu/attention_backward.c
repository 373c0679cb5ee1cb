/*
 * Attention backward, from the saved log-sum-exp: nothing is kept of the forward pass but o and lse.
 *
 * For a chunk of queries and a block of keys the scores and the gradients of the probabilities are computed with a row
 * for each key, in scratch; from them dv and dk as deep as the chunk, dq as deep as the block. Tiles of WIDE_ROWS keys
 * or queries stop where the mask or the window cuts them off. What a tile writes first it writes, then it adds.
 *
 * An item is the heads of one key-value head in one part of a segment's queries: a part's dq, and dk, dv of its own
 * keys, are written in place; what it adds to the keys of earlier parts goes to sums of its own, which are added
 * afterwards in the order of the parts. Parts depend on the segment's length and the shape alone, and so do the bits.
 */
#include "kernels/cpu/attention.h"

struct job {
    const struct attention_shape *shape;
    const struct segments *segments;
    const float *q, *k, *v, *o, *lse, *do_;
    float *dq, *dk, *dv;
    uint8_t *scratch;
    size_t thread_bytes;
    float *sums; /* (slots, parts − 1, dk and dv): a slot for each thread, or for each key-value head of a segment */
    size_t part_floats; /* of one part's dk and dv */
    int32_t segment;
};

/* Queries begin .. begin + rows − 1 of one head. */
struct chunk {
    int32_t begin, rows;
    ptrdiff_t lds;               /* of p and dp */
    float *q_panels, *do_panels; /* transposed, WIDE_NR queries each */
    float *q, *do_;              /* (rows, d) */
    float *lse, *delta;          /* lse in units of ln 2; Σ do·o */
    float *p, *dp;               /* (ATTENTION_KEYS, lds): of the block of keys at hand */
};

/* One head in one part, and keys first .. end − 1 of the block of keys that begins at `block`, which is row 0 of p. */
struct place {
    const struct attention_shape *shape;
    struct head_place at;
    int32_t part_begin; /* earlier keys' dk, dv go to the sums */
    bool first_head;    /* of the key-value head: it writes what the others add to */
    float *dk, *dv;     /* row 0 of the head, q_stride and kv_stride apart */
    float *dq;
    float *dk_sum, *dv_sum; /* (part_begin, d) */
    const float *k, *v;
    int32_t block, first, end;
};

static int32_t part_begin(const struct attention_shape *shape, int32_t n, int part)
{
    const int parts = attention_parts(shape, n);
    if (part == 0 || part == parts)
        return part == 0 ? 0 : n;
    const float share = (float)part / (float)parts;
    const bool even = shape->window > 0 && shape->window < n / 2; /* then all queries see as many keys */
    const int32_t begin = (int32_t)((float)n * (even ? share : sqrtf(share)));
    return round_down(begin + ATTENTION_CHUNK_MIN / 2, ATTENTION_CHUNK_MIN);
}

static struct chunk chunk_take(const struct attention_shape *shape, uint8_t *next, const uint8_t *end)
{
    const int32_t d = shape->head_size, rows = attention_chunk_rows(d);
    const size_t panels = (size_t)round_up(rows, WIDE_NR) * ((size_t)d + 16) * sizeof(float);
    const size_t copies = (size_t)rows * (size_t)d * sizeof(float), row = (size_t)rows * sizeof(float);
    struct chunk c = {.lds = rows};
    c.q_panels = scratch_take(&next, end, panels);
    c.do_panels = scratch_take(&next, end, panels);
    c.q = scratch_take(&next, end, copies);
    c.do_ = scratch_take(&next, end, copies);
    c.lse = scratch_take(&next, end, row);
    c.delta = scratch_take(&next, end, row);
    c.p = scratch_take(&next, end, ATTENTION_KEYS * row);
    c.dp = scratch_take(&next, end, ATTENTION_KEYS * row);
    return c;
}

/* Rows asked for ahead of their use: they are too far apart for the hardware to see them coming. */
#define CHUNK_AHEAD 8

static void chunk_load(struct chunk *c, const struct job *j, const struct head_place *at, int32_t begin, int32_t rows)
{
    const int32_t d = j->shape->head_size;
    const ptrdiff_t offset = at->q_at + begin * at->q_stride;
    c->begin = begin;
    c->rows = rows;
    for (int32_t r = 0; r < rows; r++) {
        const ptrdiff_t from = offset + r * at->q_stride, to = (ptrdiff_t)r * d,
                        ahead = from + CHUNK_AHEAD * at->q_stride;
        vec sum = vec_zero();
        for (int32_t i = 0; i < d; i += VL) {
            const vmask mask = vec_mask(d - i);
            const vec x = vec_load_mask(j->do_ + from + i, mask);
            vec_store_mask(c->do_ + to + i, x, mask);
            vec_store_mask(c->q + to + i, vec_load_mask(j->q + from + i, mask), mask);
            sum = vec_fma(x, vec_load_mask(j->o + from + i, mask), sum);
            _mm_prefetch((const char *)(j->do_ + ahead + i), _MM_HINT_T0);
            _mm_prefetch((const char *)(j->q + ahead + i), _MM_HINT_T0);
            _mm_prefetch((const char *)(j->o + ahead + i), _MM_HINT_T0);
        }
        c->delta[r] = vec_sum(sum);
        c->lse[r] = j->lse[at->lse_at + (ptrdiff_t)(begin + r) * j->shape->heads] * LOG2_E;
    }
    for (int32_t r = rows; r < round_up(rows, VL); r++)
        c->lse[r] = c->delta[r] = 0;
    pack_panels(c->q, d, rows, d, c->q_panels);
    pack_panels(c->do_, d, rows, d, c->do_panels);
}

/* The queries of the chunk that see a key of the tile at `key` end here, or where no tile of queries that one of these
 * belongs to goes on. */
static int32_t seen_until(const struct chunk *c, const struct place *l, int32_t key)
{
    const int32_t window = l->shape->window, last = key + WIDE_ROWS - 1 - c->begin;
    return window > 0 && window < c->rows - last ? last + window : c->rows;
}

/* Scores of one key become probabilities e, dp becomes ds = e·(dp − delta): of queries first .. end − 1, in whole
 * vectors. Those outside [lo, hi) do not see the key: zeros. */
static void softmax_backward(const struct chunk *c, float *p, float *dp, int32_t first, int32_t end, int32_t lo,
                             int32_t hi)
{
    for (int32_t j = first; j < end; j += VL) {
        vec e = vec_exp2(vec_sub(vec_load(p + j), vec_load(c->lse + j)));
        vec ds = vec_mul(e, vec_sub(vec_load(dp + j), vec_load(c->delta + j)));
        if (j < lo || j + VL > hi) {
            const vmask seen = vec_mask_range(lo - j, hi - j);
            e = vec_keep(e, seen, 0);
            ds = vec_keep(ds, seen, 0);
        }
        vec_store(p + j, e);
        vec_store(dp + j, ds);
    }
}

/* Keys of which a panel's p and dp are made at once: they are in the first cache when they become probabilities. */
#define PANEL_KEYS 48

/* p and dp, which becomes ds, of the block: (keys, queries), a panel of queries at a time. A panel takes all tiles of
 * keys of which a tile of its queries sees one. */
static void probabilities(const struct chunk *c, const struct place *l)
{
    const int32_t d = l->shape->head_size, window = l->shape->window;
    for (int32_t j = 0; j < c->rows; j += WIDE_NR) {
        const int32_t width = least(c->rows - j, WIDE_NR), query = c->begin + j;
        const int32_t seen = most(first_key(l->shape, query) - (WIDE_ROWS - 1), 0);
        const int32_t end = least(l->end, round_up(query + width, WIDE_ROWS));
        const int32_t whole = least(end, round_down(query, WIDE_ROWS)); /* no mask before this one */
        for (int32_t key = most(l->first, round_down(seen, WIDE_ROWS)), next; key < end; key = next) {
            next = least(key + (key < whole ? PANEL_KEYS : WIDE_ROWS), key < whole ? whole : end);
            const int32_t skip = key < whole ? 0 : round_down(most(key - query, 0), VL);
            const ptrdiff_t row = (key - l->block) * c->lds;
            struct gemm_panel p = {
                .m = next - key,
                .k = d,
                .columns = width - skip,
                .a = l->k + key * l->at.kv_stride,
                .a_row = l->at.kv_stride,
                .a_k = 1,
                .b = c->q_panels + (ptrdiff_t)j * d + skip,
                .ldb = WIDE_NR,
                .alpha = l->shape->scale * LOG2_E,
                .c = c->p + row + j + skip,
                .ldc = c->lds,
            };
            ISA(gemm_panel_wide)(&p);
            p.a = l->v + key * l->at.kv_stride;
            p.b = c->do_panels + (ptrdiff_t)j * d + skip;
            p.c = c->dp + row + j + skip;
            p.alpha = 1;
            ISA(gemm_panel_wide)(&p);
            for (int32_t i = 0; i < next - key; i++) {
                const int32_t lo = key + i - c->begin, hi = window > 0 && window < c->rows - lo ? lo + window : c->rows;
                softmax_backward(c, c->p + row + i * c->lds, c->dp + row + i * c->lds, j + skip, j + width, lo, hi);
            }
        }
    }
}

/* From p (or ds) and rows (chunk, d), which are do (or q): adds alpha·pᵀ·rows to dv (or dk) and its sums. */
static void add_to_keys(const struct chunk *c, const struct place *l, const float *p, const float *rows, float alpha,
                        float *to, float *sum)
{
    const int32_t d = l->shape->head_size;
    for (int32_t col = 0; col < d; col += WIDE_NR) {
        for (int32_t key = l->first; key < l->end; key += WIDE_ROWS) {
            const int32_t first = most(key - c->begin, 0);
            const bool own = key >= l->part_begin;
            struct gemm_panel g = {
                .m = least(l->end - key, WIDE_ROWS),
                .k = seen_until(c, l, key) - first,
                .columns = least(d - col, WIDE_NR),
                .a = p + (key - l->block) * c->lds + first,
                .a_row = c->lds,
                .a_k = 1,
                .b = rows + (ptrdiff_t)first * d + col,
                .ldb = d,
                .alpha = alpha,
                .accumulate = !l->first_head || (c->begin > key && c->begin > l->part_begin),
                .c = (own ? to + key * l->at.kv_stride : sum + (ptrdiff_t)key * d) + col,
                .ldc = own ? l->at.kv_stride : d,
            };
            ISA(gemm_panel_wide)(&g);
        }
    }
}

/* dq (+)= scale·ds·k over the keys of the block. */
static void add_to_queries(const struct chunk *c, const struct place *l)
{
    const int32_t d = l->shape->head_size;
    for (int32_t col = 0; col < d; col += WIDE_NR) {
        for (int32_t r = 0; r < c->rows; r += WIDE_ROWS) {
            const int32_t query = c->begin + r, from = first_key(l->shape, query), key = most(l->first, from);
            struct gemm_panel g = {
                .m = least(c->rows - r, WIDE_ROWS),
                .k = least(l->end, query + WIDE_ROWS) - key,
                .columns = least(d - col, WIDE_NR),
                .a = c->dp + (key - l->block) * c->lds + r,
                .a_row = 1,
                .a_k = c->lds,
                .b = l->k + key * l->at.kv_stride + col,
                .ldb = l->at.kv_stride,
                .alpha = l->shape->scale,
                .accumulate = from < l->block,
                .c = l->dq + query * l->at.q_stride + col,
                .ldc = l->at.q_stride,
            };
            if (g.k > 0)
                ISA(gemm_panel_wide)(&g);
        }
    }
}

/* The part's gradients of all heads of one key-value head. sums: (dk, dv) of (part's begin, d) each. */
static void backward_part(const struct job *j, int32_t segment, int32_t kv_head, int part, int thread, float *sums)
{
    const struct attention_shape *shape = j->shape;
    const int32_t group = shape->heads / shape->kv_heads;
    uint8_t *scratch = j->scratch + (size_t)thread * j->thread_bytes;
    struct chunk c = chunk_take(shape, scratch, scratch + j->thread_bytes);
    for (int32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        struct place l = {.shape = shape,
                          .at = head_place(shape, j->segments, segment, head),
                          .first_head = head == kv_head * group,
                          .dk_sum = sums,
                          .dv_sum = sums ? sums + j->part_floats / 2 : NULL};
        const int32_t end = part_begin(shape, l.at.n, part + 1);
        l.part_begin = part_begin(shape, l.at.n, part);
        l.dq = j->dq + l.at.q_at;
        l.dk = j->dk + l.at.kv_at;
        l.dv = j->dv + l.at.kv_at;
        l.k = j->k + l.at.kv_at;
        l.v = j->v + l.at.kv_at;
        for (int32_t begin = l.part_begin; begin < end; begin += (int32_t)c.lds) {
            chunk_load(&c, j, &l.at, begin, least(end - begin, (int32_t)c.lds));
            const int32_t first = round_down(first_key(shape, begin), WIDE_ROWS), stop = begin + c.rows;
            for (l.block = round_down(first, ATTENTION_KEYS); l.block < stop; l.block += ATTENTION_KEYS) {
                l.first = most(first, l.block);
                l.end = least(stop, l.block + ATTENTION_KEYS);
                probabilities(&c, &l);
                add_to_keys(&c, &l, c.p, c.do_, 1, l.dv, l.dv_sum);
                add_to_keys(&c, &l, c.dp, c.q, shape->scale, l.dk, l.dk_sum);
                add_to_queries(&c, &l);
            }
        }
    }
}

/* The sums of part `part` ≥ 1 in a slot. */
static float *part_sums(const struct job *j, int32_t n, int32_t slot, int part)
{
    const int each = attention_parts(j->shape, n) - 1;
    return part == 0 ? NULL : j->sums + (size_t)(slot * each + part - 1) * j->part_floats;
}

/* Keys first .. end − 1 of a key-value head get what later parts have for them. */
static void add_sums(const struct job *j, int32_t segment, int32_t kv_head, int32_t slot, int32_t first, int32_t end)
{
    const int32_t d = j->shape->head_size, group = j->shape->heads / j->shape->kv_heads;
    const struct head_place at = head_place(j->shape, j->segments, segment, kv_head * group);
    for (int part = 1; part < attention_parts(j->shape, at.n); part++) {
        const float *dk_sum = part_sums(j, at.n, slot, part), *dv_sum = dk_sum + j->part_floats / 2;
        const int32_t begin = part_begin(j->shape, at.n, part);
        const int32_t from = most(first, round_down(first_key(j->shape, begin), WIDE_ROWS));
        for (int32_t key = from; key < least(end, begin); key++) {
            float *dk = j->dk + at.kv_at + key * at.kv_stride, *dv = j->dv + at.kv_at + key * at.kv_stride;
            const ptrdiff_t row = (ptrdiff_t)key * d;
            for (int32_t i = 0; i < d; i += VL) {
                const vmask mask = vec_mask(d - i);
                vec_store_mask(dk + i, vec_add(vec_load_mask(dk + i, mask), vec_load_mask(dk_sum + row + i, mask)),
                               mask);
                vec_store_mask(dv + i, vec_add(vec_load_mask(dv + i, mask), vec_load_mask(dv_sum + row + i, mask)),
                               mask);
            }
        }
    }
}

static int32_t segment_rows(const struct job *j, int32_t segment)
{
    return j->segments->offsets[segment + 1] - j->segments->offsets[segment];
}

/* One key-value head of one segment, all its parts. */
static void whole_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const int32_t kv_head = item % j->shape->kv_heads, segment = item / j->shape->kv_heads;
    const int32_t n = segment_rows(j, segment);
    for (int part = 0; part < attention_parts(j->shape, n); part++)
        backward_part(j, segment, kv_head, part, thread, part_sums(j, n, thread, part));
    add_sums(j, segment, kv_head, thread, 0, n);
}

/* One part of one key-value head of j->segment; then, of some of its keys, the sums. */
static void part_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const int32_t kv_head = item % j->shape->kv_heads;
    const int part = item / j->shape->kv_heads;
    backward_part(j, j->segment, kv_head, part, thread, part_sums(j, segment_rows(j, j->segment), kv_head, part));
}

#define SUMS_ROWS 48 /* keys of one item */

static void sums_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const int32_t first = item / j->shape->kv_heads * SUMS_ROWS, kv_head = item % j->shape->kv_heads;
    (void)thread;
    add_sums(j, j->segment, kv_head, kv_head, first, first + SUMS_ROWS);
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
                    .dv = dv};
    const int threads = pool_threads(run->pool);
    int32_t longest = 0;
    for (int32_t s = 0; s < segments->count; s++)
        longest = most(longest, segment_rows(&j, s));
    j.part_floats = attention_part_floats(longest, shape->head_size);
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    const size_t sums = attention_sums(threads, shape, longest);
    j.sums = scratch_take(&next, end, sums * j.part_floats * sizeof(float));
    j.scratch = next;
    j.thread_bytes = (size_t)(end - next) / (size_t)threads & ~(size_t)63;
    /* Few segments have few key-value heads: then the parts are shared out. */
    if (segments->count * shape->kv_heads >= 4 * threads || threads == 1) {
        pool_run(run->pool, segments->count * shape->kv_heads, whole_item, &j);
        return;
    }
    for (j.segment = 0; j.segment < segments->count; j.segment++) {
        const int32_t n = segment_rows(&j, j.segment), parts = attention_parts(shape, n);
        pool_run(run->pool, shape->kv_heads * parts, part_item, &j);
        if (parts > 1)
            pool_run(run->pool, (n + SUMS_ROWS - 1) / SUMS_ROWS * shape->kv_heads, sums_item, &j);
    }
}
