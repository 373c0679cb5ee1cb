/*
 * The CPU as a backend: the coarse operations of kernels/backend.h over one table of kernels.h, a thread pool and one
 * block of scratch. Device memory is host memory; rows are dense float32, so every stride equals its width.
 */
#include "kernels/backend.h"

#include "kernels/cpu/internal.h"

#include <math.h>
#include <sys/mman.h>

struct cpu {
    struct backend base;
    const struct kernel_ops *k;
    struct kernel_run run; /* scratch grows by reserve() */
    size_t thread_bytes;   /* of each thread's own piece, for operations that split over examples or sequences */
    uint8_t *thread_scratch;
    const struct kv_piece *pieces;
    int32_t piece_count;
    int32_t *groups; /* (group_count + 1) first piece of each kv's run; (groups_max + 1) long */
    int32_t group_count, groups_max;
};

static struct cpu *cpu_of(struct backend *be)
{
    return (struct cpu *)(void *)be;
}

static float *dense(struct rows x, int32_t width)
{
    assert(x.stride == width);
    (void)width;
    return x.at;
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

static void cpu_free(struct backend *be)
{
    struct cpu *c = cpu_of(be);
    free(c->run.scratch);
    free(c->thread_scratch);
    free(c->groups);
    free(c);
}

/* Large blocks begin at a large page and ask for such: walks through activations then miss fewer address translations.
 */
#define LARGE_PAGE ((size_t)2 << 20)

static void *block_new(size_t bytes)
{
    const size_t unit = bytes >= 2 * LARGE_PAGE ? LARGE_PAGE : 64, size = (bytes + unit - 1) / unit * unit;
    void *at = size < bytes ? NULL : aligned_alloc(unit, size ? size : unit);
#ifdef MADV_HUGEPAGE
    if (at && unit == LARGE_PAGE)
        (void)madvise(at, size, MADV_HUGEPAGE); /* only a hint: without, pages are small */
#endif
    return at;
}

static int cpu_alloc(struct backend *be, size_t bytes, void **ret, struct error *err)
{
    void *at = block_new(bytes);
    (void)be;
    if (!at)
        return error_set(err, ERR_RESOURCES, "no memory for %zu MB", bytes >> 20);
    memset(at, 0, bytes);
    *ret = at;
    return 0;
}

static void cpu_release(struct backend *be, void *at)
{
    (void)be;
    free(at);
}

static void cpu_copy(struct backend *be, void *to, const void *from, size_t bytes)
{
    (void)be;
    if (bytes > 0 && to != from)
        memcpy(to, from, bytes);
}

static void cpu_zero(struct backend *be, void *at, size_t bytes)
{
    (void)be;
    memset(at, 0, bytes);
}

static int cpu_sync(struct backend *be, struct error *err)
{
    (void)be;
    (void)err;
    return 0;
}

static size_t cpu_free_bytes(struct backend *be)
{
    (void)be;
    return SIZE_MAX;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static int grow(uint8_t **block, size_t *have, size_t pieces, size_t want, struct error *err)
{
    if (want <= *have)
        return 0;
    uint8_t *memory = block_new(align64(want) * pieces);
    if (!memory)
        return error_set(err, ERR_RESOURCES, "no memory for %zu MB of work space", (want * pieces) >> 20);
    memset(memory, 0, align64(want) * pieces);
    free(*block);
    *block = memory;
    *have = align64(want);
    return 0;
}

static int cpu_reserve(struct backend *be, const struct backend_needs *n, struct error *err)
{
    struct cpu *c = cpu_of(be);
    const int threads = be->threads;
    size_t scratch = kernels_linear_scratch(threads, n->rows, n->width, n->width);
    /* Threads work alone on one example's gradients, or on one sequence's attention. */
    size_t thread = n->decode_length > 0 ? 0 : kernels_linear_scratch(1, n->segment_rows, n->width, n->width);
    scratch = larger(scratch, kernels_attention_scratch(threads, &n->shape, n->segment_rows, n->decode_length));
    thread = larger(thread, kernels_attention_scratch(1, &n->shape, n->segment_rows, n->decode_length));
    scratch = larger(scratch, kernels_head_scratch(threads, n->label_rows, n->d_model));
    uint8_t *block = c->run.scratch;
    int rc = grow(&block, &c->run.scratch_bytes, 1, scratch, err);
    c->run.scratch = block;
    if (rc == 0)
        rc = grow(&c->thread_scratch, &c->thread_bytes, (size_t)threads, thread, err);
    if (rc == 0 && n->decode_length > 0 && n->rows > c->groups_max) {
        free(c->groups);
        c->groups_max = 0;
        if (!(c->groups = calloc((size_t)n->rows + 1, sizeof *c->groups)))
            return error_set(err, ERR_RESOURCES, "no memory for %d sequences", n->rows);
        c->groups_max = n->rows;
    }
    return rc;
}

static void cpu_trim(struct backend *be)
{
    struct cpu *c = cpu_of(be);
    free(c->run.scratch);
    free(c->thread_scratch);
    c->run.scratch = NULL;
    c->thread_scratch = NULL;
    c->run.scratch_bytes = c->thread_bytes = 0;
}

static struct kernel_run thread_run(const struct cpu *c, int thread)
{
    return (struct kernel_run){.pool = NULL,
                               .scratch = c->thread_scratch + (size_t)thread * c->thread_bytes,
                               .scratch_bytes = c->thread_bytes,
                               .precision = c->run.precision};
}

static void cpu_run_recorded(struct backend *be, struct graph_cache *cache, const uint64_t key[4],
                             void (*record)(void *ctx), void *ctx)
{
    (void)be;
    (void)cache;
    (void)key;
    record(ctx);
}

static struct graph_cache *cpu_graph_cache_new(struct backend *be)
{
    (void)be;
    return NULL;
}

static void cpu_graph_cache_free(struct backend *be, struct graph_cache *cache)
{
    (void)be;
    (void)cache;
}

/* --- linears with LoRA ------------------------------------------------------------------------------------------- */

static int cpu_weights_fit(struct backend *be, size_t values, size_t given_bytes, struct error *err)
{
    (void)be;
    (void)values;
    (void)given_bytes;
    (void)err;
    return 0;
}

static int cpu_group_new(struct backend *be, int32_t count, const struct tensor *const w[], int32_t rank_max,
                         struct linear_group *ret, struct error *err)
{
    struct linear_group g = {.count = count, .in = w[0]->in};
    (void)be;
    (void)rank_max;
    (void)err;
    assert(count >= 1 && count <= BACKEND_GROUP_MAX);
    for (int32_t i = 0; i < count; i++) {
        assert(w[i]->in == g.in);
        g.w[i] = *w[i];
        g.out[i] = w[i]->out;
    }
    *ret = g;
    return 0;
}

static void cpu_group_free(struct backend *be, struct linear_group *group)
{
    (void)be;
    (void)group;
}

/* Memory that is read from end to end: fewer and larger pages, where the system gives them. */
static void *huge_alloc(size_t bytes)
{
    const size_t page = (size_t)2 << 20;
    if (bytes > SIZE_MAX - page)
        return NULL;
    bytes = (bytes + page - 1) & ~(page - 1);
    void *at = aligned_alloc(page, bytes);
#ifdef MADV_HUGEPAGE
    if (at)
        (void)!madvise(at, bytes, MADV_HUGEPAGE);
#endif
    return at;
}

static void *cpu_serving_copy(struct backend *be, int32_t count, struct linear_group *const groups[])
{
    struct cpu *c = cpu_of(be);
    size_t bytes = 0;
    for (int32_t g = 0; g < count; g++)
        for (int32_t i = 0; i < groups[g]->count; i++)
            bytes += align64(c->k->interleaved_bytes(&groups[g]->w[i])); /* about what they take already */
    uint8_t *memory = bytes > 0 ? huge_alloc(bytes) : NULL, *next = memory;
    for (int32_t g = 0; memory && g < count; g++) {
        for (int32_t i = 0; i < groups[g]->count; i++) {
            struct tensor *w = &groups[g]->w[i];
            const size_t size = c->k->interleaved_bytes(w);
            if (size == 0)
                continue;
            c->k->interleave(&c->run, w, next);
            w->interleaved = next;
            next += align64(size);
        }
    }
    return memory;
}

static void cpu_lora_load(struct backend *be, int32_t count, struct linear_group *const groups[],
                          const struct group_lora loras[])
{
    (void)be;
    (void)count;
    (void)groups;
    (void)loras;
}

static void cpu_lora_down(struct backend *be, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                          struct rows x, struct rows h)
{
    struct cpu *c = cpu_of(be);
    const int32_t r = group_stacked_rank(g, lora);
    if (r > 0)
        c->k->lora_down(&c->run, m, g->in, r, group_stacked_a(g, lora), dense(x, g->in), dense(h, r));
}

/* The factors are few rows too: h in one round of the threads, all the rest in another. */
static void decode_group(struct cpu *c, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                         const float *x, const struct rows y[], float *h)
{
    struct served_linear linears[BACKEND_GROUP_MAX];
    const int32_t r = group_stacked_rank(g, lora);
    if (r > 0) {
        const struct tensor a = {group_stacked_a(g, lora), TENSOR_F32, r, g->in};
        const struct served_linear down = {.w = &a, .y = h};
        c->k->linear_decode(&c->run, m, 1, &down, x);
    }
    for (int32_t i = 0; i < g->count; i++) {
        linears[i] = (struct served_linear){.w = &g->w[i], .bias = g->bias[i], .y = dense(y[i], g->out[i])};
        if (r == 0 || !lora->a[i])
            continue;
        linears[i].b = lora->b[i];
        linears[i].h = h;
        linears[i].rank = lora->rank;
        linears[i].h_stride = r;
        linears[i].scale = lora->scale;
        h += lora->rank;
    }
    c->k->linear_decode(&c->run, m, g->count, linears, x);
}

static void cpu_group_forward(struct backend *be, enum group_use use, const struct linear_group *g,
                              const struct group_lora *lora, int32_t m, struct rows x, const struct rows y[],
                              struct rows h)
{
    struct cpu *c = cpu_of(be);
    const int32_t r = group_stacked_rank(g, lora);
    const float *column = h.at;
    if (use == GROUP_SERVE && m <= KERNEL_DECODE_ROWS) {
        decode_group(c, g, lora, m, dense(x, g->in), y, r > 0 ? dense(h, r) : NULL);
        return;
    }
    if (r > 0)
        cpu_lora_down(be, g, lora, m, x, h);
    for (int32_t i = 0; i < g->count; i++) {
        struct low_rank low = {.rows = column, .stride = r};
        const bool adapted = r > 0 && lora->a[i];
        if (adapted) {
            low.rank = lora->rank;
            low.scale = lora->scale;
            low.columns = lora->b[i];
            column += lora->rank;
        }
        c->k->linear_forward(&c->run, m, &g->w[i], g->bias[i], adapted ? &low : NULL, dense(x, g->in),
                             dense(y[i], g->out[i]), false);
    }
}

static void cpu_group_backward(struct backend *be, const struct linear_group *g, const struct group_lora *lora,
                               int32_t m, const struct rows dy[], struct rows dh, bool with_dh, struct rows dx)
{
    struct cpu *c = cpu_of(be);
    const int32_t r = group_stacked_rank(g, lora);
    float *column = dh.at;
    for (int32_t i = 0; r > 0 && (dx.at || with_dh) && i < g->count; i++) {
        if (!lora->a[i])
            continue;
        c->k->lora_up_backward(&c->run, m, g->out[i], lora->rank, lora->scale, lora->b[i], dense(dy[i], g->out[i]),
                               column, r);
        column += lora->rank;
    }
    for (int32_t i = 0; dx.at && i < g->count; i++) {
        struct low_rank low = {.rank = r, .scale = 1, .rows = dh.at, .stride = r};
        if (r > 0 && i + 1 == g->count)
            low.columns = group_stacked_a(g, lora);
        c->k->linear_backward(&c->run, m, &g->w[i], low.columns ? &low : NULL, dense(dy[i], g->out[i]),
                              dense(dx, g->in), i > 0);
    }
}

struct gradient_work {
    struct cpu *c;
    const struct linear_group *g;
    const struct group_lora *lora;
    const struct placed_segments *segments;
    const struct rows *dy;
    struct rows h, dh, x;
    const struct group_gradient *where;
    float *base;
    size_t stride;
};

static void gradients_of(const struct gradient_work *w, const struct kernel_run *run, int32_t t0, int32_t t1, float *to)
{
    const struct kernel_ops *k = w->c->k;
    const int32_t r = group_stacked_rank(w->g, w->lora), rank = w->lora->rank;
    int32_t column = 0;
    for (int32_t i = 0; i < w->g->count; i++) {
        if (!w->lora->a[i])
            continue;
        if (w->where->with_b) {
            memset(to + w->where->b_offset[i], 0, (size_t)w->g->out[i] * (size_t)rank * sizeof *to);
            k->lora_grad_b(run, t0, t1, w->g->out[i], rank, w->lora->scale, dense(w->dy[i], w->g->out[i]),
                           (const float *)w->h.at + column, r, to + w->where->b_offset[i]);
        }
        if (w->where->with_a) {
            memset(to + w->where->a_offset[i], 0, (size_t)w->g->in * (size_t)rank * sizeof *to);
            k->lora_grad_a(run, t0, t1, w->g->in, rank, (const float *)w->dh.at + column, r, dense(w->x, w->g->in),
                           to + w->where->a_offset[i]);
        }
        column += rank;
    }
}

static void gradients_item(void *ctx, int segment, int thread)
{
    const struct gradient_work *w = ctx;
    const struct kernel_run run = thread_run(w->c, thread);
    const int32_t *offsets = w->segments->offsets;
    gradients_of(w, &run, offsets[segment], offsets[segment + 1], w->base + (size_t)segment * w->stride);
}

static void cpu_group_gradients(struct backend *be, const struct linear_group *g, const struct group_lora *lora,
                                const struct placed_segments *segments, const struct rows dy[], struct rows h,
                                struct rows dh, struct rows x, const struct group_gradient *where, float *base,
                                size_t stride)
{
    struct cpu *c = cpu_of(be);
    struct gradient_work w = {c, g, lora, segments, dy, h, dh, x, where, base, stride};
    if (group_stacked_rank(g, lora) == 0)
        return;
    /* A thread a segment, or, where there are few, all threads for each: the bits are the same. */
    if (stride > 0 && segments->count >= 2 * be->threads) {
        pool_run(c->run.pool, segments->count, gradients_item, &w);
        return;
    }
    for (int32_t i = 0; stride > 0 && i < segments->count; i++)
        gradients_of(&w, &c->run, segments->offsets[i], segments->offsets[i + 1], base + (size_t)i * stride);
    if (stride == 0)
        gradients_of(&w, &c->run, 0, segments->offsets[segments->count], base);
}

/* --- rows -------------------------------------------------------------------------------------------------------- */

static void cpu_norm_forward(struct backend *be, int32_t m, int32_t n, float eps, const float *gain, struct rows x,
                             struct rows add, struct rows y, float *rstd)
{
    struct cpu *c = cpu_of(be);
    c->k->rmsnorm_forward(&c->run, m, n, eps, gain, dense(x, n), add.at ? dense(add, n) : NULL, dense(y, n), rstd);
}

static void cpu_norm_backward(struct backend *be, int32_t m, int32_t n, const float *gain, struct rows x,
                              const float *rstd, struct rows dy, struct rows dx, bool accumulate)
{
    struct cpu *c = cpu_of(be);
    c->k->rmsnorm_backward(&c->run, m, n, gain, dense(x, n), rstd, dense(dy, n), dense(dx, n), accumulate);
}

static void cpu_head_norm_forward(struct backend *be, int32_t m, int32_t heads, int32_t head_size, float eps,
                                  const float *gain, struct rows x, struct rows y, float *rstd)
{
    struct cpu *c = cpu_of(be);
    const int32_t n = heads * head_size;
    c->k->rmsnorm_forward(&c->run, m * heads, head_size, eps, gain, dense(x, n), NULL, dense(y, n), rstd);
}

static void cpu_head_norm_backward(struct backend *be, int32_t m, int32_t heads, int32_t head_size, const float *gain,
                                   struct rows x, const float *rstd, struct rows dy, struct rows dx)
{
    struct cpu *c = cpu_of(be);
    const int32_t n = heads * head_size;
    c->k->rmsnorm_backward(&c->run, m * heads, head_size, gain, dense(x, n), rstd, dense(dy, n), dense(dx, n), false);
}

static void cpu_rope(struct backend *be, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
                     enum rope_order order, bool inverse, const float *table, const int32_t *positions, struct rows x)
{
    struct cpu *c = cpu_of(be);
    c->k->rope(&c->run, m, heads, head_size, rotated, order, inverse, table, positions, dense(x, heads * head_size));
}

static void cpu_gated_forward(struct backend *be, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                              struct rows up, struct rows out)
{
    struct cpu *c = cpu_of(be);
    assert(gate.stride == up.stride);
    c->k->gated_forward(&c->run, m, n, kind, gate.at, up.at, gate.stride, dense(out, n));
}

static void cpu_gated_backward(struct backend *be, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                               struct rows up, struct rows dout)
{
    struct cpu *c = cpu_of(be);
    assert(gate.stride == up.stride);
    c->k->gated_backward(&c->run, m, n, kind, gate.at, up.at, gate.stride, dense(dout, n));
}

static void cpu_embed(struct backend *be, int32_t m, const struct linear_group *table, const int32_t *ids, float scale,
                      struct rows y)
{
    struct cpu *c = cpu_of(be);
    c->k->embed(&c->run, m, &table->w[0], ids, scale, dense(y, table->in));
}

static void cpu_gather(struct backend *be, int32_t m, int32_t width, const int32_t *index, struct rows from,
                       struct rows to)
{
    const size_t n = (size_t)width;
    const float *source = from.at;
    float *target = dense(to, width);
    (void)be;
    for (int32_t i = 0; i < m; i++) {
        if (index[i] < 0)
            memset(target + (size_t)i * n, 0, n * sizeof *target);
        else
            memcpy(target + (size_t)i * n, source + (size_t)index[i] * (size_t)from.stride, n * sizeof *target);
    }
}

/* --- attention --------------------------------------------------------------------------------------------------- */

static int cpu_segments_new(struct backend *be, int32_t rows_max, int32_t count_max, struct placed_segments *ret,
                            struct error *err)
{
    (void)be;
    (void)err;
    *ret = (struct placed_segments){.rows_max = rows_max, .count_max = count_max};
    return 0;
}

static void cpu_segments_free(struct backend *be, struct placed_segments *segments)
{
    (void)be;
    *segments = (struct placed_segments){0};
}

static void cpu_segments_set(struct backend *be, struct placed_segments *segments, int32_t count,
                             const int32_t *offsets)
{
    (void)be;
    assert(count <= segments->count_max);
    segments->count = count;
    segments->offsets = offsets;
}

static void cpu_attention_forward(struct backend *be, const struct attention_shape *shape,
                                  const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                                  struct rows v, struct rows o, float *lse)
{
    struct cpu *c = cpu_of(be);
    const struct segments s = {segments->count, segments->offsets};
    const int32_t heads = shape->heads * shape->head_size, kv = shape->kv_heads * shape->head_size;
    (void)m;
    c->k->attention_forward(&c->run, shape, &s, dense(q, heads), dense(k, kv), dense(v, kv), dense(o, heads), lse);
}

static void cpu_attention_backward(struct backend *be, const struct attention_shape *shape,
                                   const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                                   struct rows v, struct rows o, const float *lse, struct rows do_, struct rows dq,
                                   struct rows dk, struct rows dv)
{
    struct cpu *c = cpu_of(be);
    const struct segments s = {segments->count, segments->offsets};
    const int32_t heads = shape->heads * shape->head_size, kv = shape->kv_heads * shape->head_size;
    (void)m;
    c->k->attention_backward(&c->run, shape, &s, dense(q, heads), dense(k, kv), dense(v, kv), dense(o, heads), lse,
                             dense(do_, heads), dense(dq, heads), dense(dk, kv), dense(dv, kv));
}

struct kv {
    int32_t layers, width, length_max;
    float *keys, *values; /* (layers, length_max, width) */
};

static float *kv_layer(const struct kv *kv, float *base, int32_t layer)
{
    return base + (size_t)layer * (size_t)kv->length_max * (size_t)kv->width;
}

static void cpu_kv_free(struct backend *be, struct kv *kv)
{
    (void)be;
    if (!kv)
        return;
    free(kv->keys);
    free(kv->values);
    free(kv);
}

static int cpu_kv_new(struct backend *be, int32_t layers, int32_t kv_heads, int32_t head_size, int32_t length_max,
                      struct kv **ret, struct error *err)
{
    const size_t floats = (size_t)layers * (size_t)kv_heads * (size_t)head_size * (size_t)length_max;
    struct kv *kv = calloc(1, sizeof *kv);
    if (kv) {
        *kv = (struct kv){layers, kv_heads * head_size, length_max, NULL, NULL};
        kv->keys = calloc(floats, sizeof *kv->keys);
        kv->values = calloc(floats, sizeof *kv->values);
    }
    if (!kv || !kv->keys || !kv->values) {
        cpu_kv_free(be, kv);
        return error_set(err, ERR_RESOURCES, "no memory for the keys and values of %d tokens", length_max);
    }
    *ret = kv;
    return 0;
}

static void cpu_kv_copy(struct backend *be, struct kv *to, const struct kv *from, int32_t length)
{
    const size_t bytes = (size_t)length * (size_t)from->width * sizeof(float);
    (void)be;
    assert(to->layers == from->layers && to->width == from->width && length <= to->length_max);
    for (int32_t layer = 0; layer < from->layers; layer++) {
        memcpy(kv_layer(to, to->keys, layer), kv_layer(from, from->keys, layer), bytes);
        memcpy(kv_layer(to, to->values, layer), kv_layer(from, from->values, layer), bytes);
    }
}

static uint64_t cpu_pieces_set(struct backend *be, const struct kv_piece *pieces, int32_t count)
{
    struct cpu *c = cpu_of(be);
    c->pieces = pieces;
    c->piece_count = count;
    c->group_count = 0;
    for (int32_t i = 0; i < count; i++) {
        if (i == 0 || pieces[i].kv != pieces[i - 1].kv) {
            assert(c->group_count < c->groups_max);
            c->groups[c->group_count++] = i;
        }
    }
    if (c->groups)
        c->groups[c->group_count] = count;
    return 0;
}

struct attend_work {
    struct cpu *c;
    const struct attention_shape *shape;
    int32_t layer;
    const float *q, *k, *v;
    float *o;
};

static void attend_piece(const struct attend_work *w, const struct kernel_run *run, const struct kv_piece *p)
{
    const size_t width = (size_t)p->kv->width, row = (size_t)p->row, bytes = (size_t)p->count * width * sizeof(float);
    const size_t heads = (size_t)w->shape->heads * (size_t)w->shape->head_size;
    float *keys = kv_layer(p->kv, p->kv->keys, w->layer), *values = kv_layer(p->kv, p->kv->values, w->layer);
    memcpy(keys + (size_t)p->start * width, w->k + row * width, bytes);
    memcpy(values + (size_t)p->start * width, w->v + row * width, bytes);
    if (w->q)
        w->c->k->attention_decode(run, w->shape, p->count, p->start + p->count, w->q + row * heads, keys, values,
                                  p->kv->width, w->o + row * heads);
}

/* A pool item: the pieces of one sequence, one after the other. */
static void attend_group(void *ctx, int group, int thread)
{
    const struct attend_work *w = ctx;
    const struct kernel_run run = thread_run(w->c, thread);
    for (int32_t i = w->c->groups[group]; i < w->c->groups[group + 1]; i++)
        attend_piece(w, &run, &w->c->pieces[i]);
}

static void cpu_attend(struct backend *be, const struct attention_shape *shape, int32_t layer, struct rows q,
                       struct rows k, struct rows v, struct rows o)
{
    struct cpu *c = cpu_of(be);
    const int32_t heads = shape->heads * shape->head_size, kv = shape->kv_heads * shape->head_size;
    struct attend_work w = {
        c, shape, layer, q.at ? dense(q, heads) : NULL, dense(k, kv), dense(v, kv), q.at ? dense(o, heads) : NULL};
    if (c->group_count >= be->threads) {
        pool_run(c->run.pool, c->group_count, attend_group, &w);
        return;
    }
    for (int32_t i = 0; i < c->piece_count; i++)
        attend_piece(&w, &c->run, &c->pieces[i]);
}

/* --- the head ---------------------------------------------------------------------------------------------------- */

static void cpu_cross_entropy(struct backend *be, const struct linear_group *head, const struct placed_labels *labels,
                              struct rows x, float *losses, struct rows dx)
{
    struct cpu *c = cpu_of(be);
    const struct labels l = {labels->count, NULL, labels->targets, labels->weights};
    c->k->cross_entropy(&c->run, &head->w[0], &l, dense(x, head->in), losses, dx.at ? dense(dx, head->in) : NULL);
}

static void cpu_logits(struct backend *be, const struct linear_group *head, int32_t m, struct rows x, float *logits)
{
    struct cpu *c = cpu_of(be);
    assert(m <= KERNEL_DECODE_ROWS);
    const struct served_linear part = {&head->w[0], NULL, logits};
    c->k->linear_decode(&c->run, m, 1, &part, dense(x, head->in));
}

/* --- arenas ------------------------------------------------------------------------------------------------------ */

static void cpu_clip_accumulate(struct backend *be, size_t n, int32_t count, const float *g, size_t stride,
                                const struct clip_params *params, int64_t *sum, struct clip_result *results)
{
    struct cpu *c = cpu_of(be);
    for (int32_t e = 0; e < count; e++) {
        struct clip_result result;
        c->k->clip_accumulate(n, g + (size_t)e * stride, params, sum, &result);
        if (results)
            results[e] = result;
    }
}

static void cpu_clip_add(struct backend *be, size_t n, int32_t count, const float *g, size_t stride, double clip,
                         float *sum)
{
    (void)be;
    for (int32_t e = 0; e < count; e++) {
        const float *unit = g + (size_t)e * stride;
        double norm = 0;
        for (size_t i = 0; i < n; i++)
            norm += (double)unit[i] * unit[i];
        norm = sqrt(norm);
        for (size_t i = 0; isfinite(norm) && i < n; i++)
            sum[i] += norm > clip ? (float)(unit[i] * (clip / norm)) : unit[i];
    }
}

static void cpu_add(struct backend *be, size_t n, const float *b, float *a)
{
    struct cpu *c = cpu_of(be);
    c->k->add(&c->run, n, b, a);
}

static void cpu_scale_sum(struct backend *be, size_t n, const int64_t *sum, double scale, float *out)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        out[i] = (float)((double)sum[i] * scale);
}

static void cpu_divide(struct backend *be, size_t n, double denominator, float *a)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        a[i] = (float)(a[i] / denominator);
}

static void cpu_adamw(struct backend *be, size_t n, const struct adamw_params *params, const float *g, float *m,
                      float *v, float *p)
{
    struct cpu *c = cpu_of(be);
    c->k->adamw(&c->run, n, params, g, m, v, p);
}

static void cpu_sgd_momentum(struct backend *be, size_t n, float lr, float momentum, const float *g, float *m, float *p)
{
    struct cpu *c = cpu_of(be);
    c->k->sgd_momentum(&c->run, n, lr, momentum, g, m, p);
}

static const struct backend_ops cpu_ops = {
    .free = cpu_free,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .upload = cpu_copy,
    .download = cpu_copy,
    .copy = cpu_copy,
    .zero = cpu_zero,
    .sync = cpu_sync,
    .free_bytes = cpu_free_bytes,
    .reserve = cpu_reserve,
    .trim = cpu_trim,
    .run_recorded = cpu_run_recorded,
    .graph_cache_new = cpu_graph_cache_new,
    .graph_cache_free = cpu_graph_cache_free,
    .weights_fit = cpu_weights_fit,
    .group_new = cpu_group_new,
    .group_free = cpu_group_free,
    .serving_copy = cpu_serving_copy,
    .lora_load = cpu_lora_load,
    .group_forward = cpu_group_forward,
    .lora_down = cpu_lora_down,
    .group_backward = cpu_group_backward,
    .group_gradients = cpu_group_gradients,
    .norm_forward = cpu_norm_forward,
    .norm_backward = cpu_norm_backward,
    .head_norm_forward = cpu_head_norm_forward,
    .head_norm_backward = cpu_head_norm_backward,
    .rope = cpu_rope,
    .gated_forward = cpu_gated_forward,
    .gated_backward = cpu_gated_backward,
    .embed = cpu_embed,
    .gather = cpu_gather,
    .segments_new = cpu_segments_new,
    .segments_free = cpu_segments_free,
    .segments_set = cpu_segments_set,
    .attention_forward = cpu_attention_forward,
    .attention_backward = cpu_attention_backward,
    .kv_new = cpu_kv_new,
    .kv_free = cpu_kv_free,
    .kv_copy = cpu_kv_copy,
    .pieces_set = cpu_pieces_set,
    .attend = cpu_attend,
    .cross_entropy = cpu_cross_entropy,
    .logits = cpu_logits,
    .clip_accumulate = cpu_clip_accumulate,
    .clip_add = cpu_clip_add,
    .add = cpu_add,
    .scale_sum = cpu_scale_sum,
    .divide = cpu_divide,
    .adamw = cpu_adamw,
    .sgd_momentum = cpu_sgd_momentum,
};

int backend_cpu_new(const struct kernel_ops *ops, struct pool *pool, enum kernel_precision precision,
                    struct backend **ret_backend, struct error *err)
{
    struct cpu *c = calloc(1, sizeof *c);
    if (!c)
        return error_set(err, ERR_RESOURCES, "no memory for the compute backend");
    c->base = (struct backend){
        .ops = &cpu_ops,
        .element = TENSOR_F32,
        .host_memory = true,
        .width_multiple = 1,
        .row_multiple = 1,
        .threads = pool_threads(pool),
    };
    snprintf(c->base.name, sizeof c->base.name, "%s", ops->name);
    c->k = ops;
    c->run = (struct kernel_run){.pool = pool, .precision = precision};
    *ret_backend = &c->base;
    return 0;
}
