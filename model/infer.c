#include "model/infer.h"

#include "base/arena.h"
#include "base/checked.h"
#include "model/kv_cache.h"
#include "model/layer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Consecutive tokens of one sequence in a packed pass. */
struct piece {
    struct kv_cache *cache;
    int32_t start; /* position of its first token */
    int32_t count;
    int32_t row; /* its first row in the pass */
};

struct infer {
    struct infer_options options;
    struct compute compute;
    struct arena arena;
    size_t scratch_thread_bytes; /* attention in one thread */
    uint8_t *scratch_threads;
    float *rope_table;
    float *logits; /* (KERNEL_DECODE_ROWS, vocabulary) */
    float *rows;   /* (KERNEL_DECODE_ROWS, d_model) hidden rows for them */

    int32_t tokens;       /* rows of the pass being built */
    int32_t piece_count;  /* in use */
    int32_t group_count;  /* runs of pieces with one cache */
    int32_t wanted_count; /* rows whose final hidden row is wanted */
    struct piece *pieces; /* (rows_max) */
    int32_t *groups;      /* (rows_max + 1) first piece of each */
    int32_t *offsets;     /* (rows_max + 1) first row of each piece */
    int32_t *ids;         /* (rows_max) likewise below */
    int32_t *positions;   /*  */
    int32_t *wanted;      /* rows, ascending */
    int32_t *identity;    /* 0, 1, 2 … */
    int32_t *targets;     /* of the wanted rows, when scoring */
    int32_t *owners;      /* candidate of each wanted row, when scoring */
    float *losses;        /* of the wanted rows, when scoring */
    float *x, *xn, *q, *k, *v, *o, *mid, *gate, *up, *compact, *compact_x, *hidden, *h;
};

/* --- memory ----------------------------------------------------------------------------------------------------- */

/* Hands out memory, or only counts it while the arena is empty. */
static void *carve(struct arena *arena, size_t *bytes, size_t rows, size_t row_bytes)
{
    size_t n = arena_cost(rows * row_bytes); /* bounded by check_options and model_validate: below 2^48 */
    *bytes += n;
    return arena->base ? arena_take(arena, n) : NULL;
}

static size_t carve_all(struct infer *f)
{
    const struct model_config *m = &f->compute.model->config;
    const struct infer_options *o = &f->options;
    const size_t rows = (size_t)o->rows_max, value = sizeof(float);
    const size_t d = (size_t)m->d_model * value, ff = (size_t)m->d_ff * value;
    const size_t heads = (size_t)m->head_count * (size_t)m->head_size * value;
    const size_t kv = (size_t)m->kv_head_count * (size_t)m->head_size * value;
    struct arena *a = &f->arena;
    size_t n = 0;
    f->scratch_threads = carve(a, &n, (size_t)pool_threads(o->pool), f->scratch_thread_bytes);
    f->compute.run.scratch = carve(a, &n, 1, f->compute.run.scratch_bytes);
    f->rope_table = carve(a, &n, (size_t)o->context_max, (size_t)m->head_size * value);
    f->logits = carve(a, &n, KERNEL_DECODE_ROWS, (size_t)m->vocabulary * value);
    f->rows = carve(a, &n, KERNEL_DECODE_ROWS, d);
    f->pieces = carve(a, &n, rows, sizeof *f->pieces);
    int32_t **const arrays[] = {&f->groups, &f->offsets,  &f->ids,     &f->positions,
                                &f->wanted, &f->identity, &f->targets, &f->owners};
    for (size_t i = 0; i < ARRAY_LEN(arrays); i++)
        *arrays[i] = carve(a, &n, rows + 1, sizeof(int32_t));
    f->losses = carve(a, &n, rows, value);
    f->x = carve(a, &n, rows, d);
    f->xn = carve(a, &n, rows, d);
    f->q = carve(a, &n, rows, heads);
    f->k = carve(a, &n, rows, kv);
    f->v = carve(a, &n, rows, kv);
    f->o = carve(a, &n, rows, heads);
    f->mid = carve(a, &n, rows, d);
    f->gate = carve(a, &n, rows, ff);
    f->up = carve(a, &n, rows, ff);
    f->compact = carve(a, &n, rows, heads);
    f->compact_x = carve(a, &n, rows, d);
    f->hidden = carve(a, &n, rows, d);
    f->h = carve(a, &n, rows, GROUP_TARGETS_MAX * (size_t)o->rank_max * value);
    return n;
}

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

static int check_options(const struct infer_options *o, const struct model_config *model, struct error *err)
{
    assert(o->ops);
    if (o->rows_max < 1 || o->rows_max > 1 << 16)
        return error_set(err, ERR_CONFIG, "inference: %d rows a pass is outside 1 to 65536", o->rows_max);
    if (o->context_max < 1 || o->context_max > model->context_length)
        return error_set(err, ERR_CONFIG, "inference: a context of %d tokens is outside 1 to the model's %d",
                         o->context_max, model->context_length);
    if (o->rank_max < 0 || o->rank_max > LORA_RANK_MAX)
        return error_set(err, ERR_CONFIG, "inference: LoRA rank %d is outside 0 to %d", o->rank_max, LORA_RANK_MAX);
    return 0;
}

int infer_new(const struct infer_options *options, const struct model *model, struct infer **ret_infer,
              struct error *err)
{
    const struct model_config *m = &model->config;
    const struct attention_shape shape = layer_attention_shape(m);
    int rc = check_options(options, m, err);
    if (rc < 0)
        return rc;
    struct infer *f = calloc(1, sizeof *f);
    if (!f)
        return error_set(err, ERR_RESOURCES, "inference: no memory");
    const int threads = pool_threads(options->pool);
    f->options = *options;
    f->compute = (struct compute){.ops = options->ops, .model = model, .decode = true};
    f->compute.run.pool = options->pool;
    f->compute.run.precision = options->precision;
    size_t scratch = layer_linear_scratch(m, threads, options->rows_max, options->rank_max);
    scratch = max_size(scratch, kernels_attention_scratch(threads, &shape, options->rows_max, options->context_max));
    scratch = max_size(scratch, kernels_head_scratch(threads, options->rows_max, m->vocabulary, m->d_model));
    f->compute.run.scratch_bytes = scratch;
    f->scratch_thread_bytes = arena_cost(kernels_attention_scratch(1, &shape, options->rows_max, options->context_max));
    size_t bytes = carve_all(f);
    if (arena_init(&f->arena, bytes) < 0) {
        infer_free(f);
        return error_set(err, ERR_RESOURCES, "inference: no memory for %zu MB of activations; lower the rows of a pass",
                         bytes >> 20);
    }
    carve_all(f);
    for (int32_t i = 0; i < options->rows_max; i++)
        f->identity[i] = i;
    kernels_rope_table(options->context_max, m->head_size, m->rope_base, m->rope_scale, model->rope_freqs.data,
                       f->rope_table);
    f->compute.rope = f->rope_table;
    *ret_infer = f;
    return 0;
}

void infer_free(struct infer *infer)
{
    if (!infer)
        return;
    arena_release(&infer->arena);
    free(infer);
}

/* --- one packed pass -------------------------------------------------------------------------------------------- */

static void pass_begin(struct infer *f, const struct lora *lora)
{
    assert(!lora || lora->config.rank <= f->options.rank_max);
    f->compute.lora = lora;
    f->tokens = f->piece_count = f->group_count = f->wanted_count = 0;
    f->groups[0] = f->offsets[0] = 0;
}

static int32_t pass_room(const struct infer *f)
{
    return f->options.rows_max - f->tokens;
}

/* Appends tokens that stand at positions start.. of the cache's sequence. Pieces of one cache must follow each other;
 * when they start at the same position they are alternatives, computed one by one over the same cache slots. */
static void pass_add(struct infer *f, struct kv_cache *cache, int32_t start, const int32_t *ids, int32_t count)
{
    assert(count >= 1 && count <= pass_room(f));
    const bool new_group = f->piece_count == 0 || f->pieces[f->piece_count - 1].cache != cache;
    for (int32_t i = 0; new_group && i < f->group_count; i++)
        assert(f->pieces[f->groups[i]].cache != cache);
    f->group_count += new_group;
    f->pieces[f->piece_count++] = (struct piece){cache, start, count, f->tokens};
    f->groups[f->group_count] = f->piece_count;
    for (int32_t i = 0; i < count; i++) {
        f->ids[f->tokens] = ids[i];
        f->positions[f->tokens++] = start + i;
    }
    f->offsets[f->piece_count] = f->tokens;
}

struct attention_job {
    struct infer *f;
    int32_t layer;
    bool attend; /* false: the keys and values are stored only */
};

/* Stores a piece's keys and values in its cache, and attends over it. */
static void attend_piece(const struct attention_job *job, const struct kernel_run *run, const struct piece *p)
{
    struct infer *f = job->f;
    const struct attention_shape shape = layer_attention_shape(&f->compute.model->config);
    const size_t kv = (size_t)p->cache->kv_width, row = (size_t)p->row, bytes = (size_t)p->count * kv * sizeof(float);
    const size_t heads = (size_t)shape.heads * (size_t)shape.head_size;
    float *keys = kv_cache_keys(p->cache, job->layer), *values = kv_cache_values(p->cache, job->layer);
    memcpy(keys + (size_t)p->start * kv, f->k + row * kv, bytes);
    memcpy(values + (size_t)p->start * kv, f->v + row * kv, bytes);
    if (job->attend)
        f->compute.ops->attention_decode(run, &shape, p->count, p->start + p->count, f->q + row * heads, keys, values,
                                         p->cache->kv_width, f->o + row * heads);
}

/* A pool item: the pieces of one cache, one after the other. */
static void attend_group(void *ctx, int group, int thread)
{
    const struct attention_job *job = ctx;
    const struct infer *f = job->f;
    const struct kernel_run run = {.pool = NULL,
                                   .scratch = f->scratch_threads + (size_t)thread * f->scratch_thread_bytes,
                                   .scratch_bytes = f->scratch_thread_bytes,
                                   .precision = f->compute.run.precision};
    for (int32_t i = f->groups[group]; i < f->groups[group + 1]; i++)
        attend_piece(job, &run, &f->pieces[i]);
}

/* Whole fresh prompts go through the packed attention of training, everything else piece by piece. */
static void attention(struct infer *f, int32_t layer)
{
    const struct attention_shape shape = layer_attention_shape(&f->compute.model->config);
    const struct segments segments = {f->piece_count, f->offsets};
    struct attention_job job = {f, layer, true};
    bool fresh = true;
    for (int32_t i = 0; i < f->piece_count; i++)
        fresh = fresh && f->pieces[i].start == 0;
    if (fresh) {
        f->compute.ops->attention_forward(&f->compute.run, &shape, &segments, f->q, f->k, f->v, f->o, NULL);
        job.attend = false;
    }
    if (f->group_count >= pool_threads(f->options.pool)) {
        pool_run(f->options.pool, f->group_count, attend_group, &job);
        return;
    }
    for (int32_t i = 0; i < f->piece_count; i++)
        attend_piece(&job, &f->compute.run, &f->pieces[i]);
}

static void gather_rows(const int32_t *rows, int32_t count, int32_t width, const float *from, float *to)
{
    for (int32_t i = 0; i < count; i++)
        memcpy(to + (size_t)i * (size_t)width, from + (size_t)rows[i] * (size_t)width, (size_t)width * sizeof *to);
}

/* One layer over all rows, but in the top layer only the wanted rows beyond the attention. below is the previous
 * layer's residual stream that its feed-forward output in x lacks, or NULL. */
static void pass_layer(struct infer *f, int32_t layer, const float *below)
{
    const struct compute *c = &f->compute;
    const struct model_config *m = &c->model->config;
    const struct model_layer *weights = &c->model->layers[layer];
    int32_t rows = f->tokens;
    const float *o = f->o, *residual = f->x;
    c->ops->rmsnorm_forward(&c->run, rows, m->d_model, m->norm_eps, model_gain(&weights->attn_norm), f->x, below, f->xn,
                            NULL);
    group_forward(c, layer, GROUP_QKV, rows, f->xn, (float *const[]){f->q, f->k, f->v}, f->h);
    layer_rope(c, rows, f->positions, false, f->q, f->k);
    attention(f, layer);
    if (layer == m->layer_count - 1) {
        rows = f->wanted_count;
        if (rows == 0)
            return;
        gather_rows(f->wanted, rows, m->head_count * m->head_size, f->o, f->compact);
        gather_rows(f->wanted, rows, m->d_model, f->x, f->compact_x);
        o = f->compact;
        residual = f->compact_x;
    }
    group_forward(c, layer, GROUP_O, rows, o, (float *const[]){f->mid}, f->h);
    c->ops->rmsnorm_forward(&c->run, rows, m->d_model, m->norm_eps, model_gain(&weights->ffn_norm), f->mid, residual,
                            f->xn, NULL);
    group_forward(c, layer, GROUP_GATE_UP, rows, f->xn, (float *const[]){f->gate, f->up}, f->h);
    c->ops->gated_forward(&c->run, rows, m->d_ff, GATE_SILU, f->gate, f->up, m->d_ff, f->gate);
    group_forward(c, layer, GROUP_DOWN, rows, f->gate, (float *const[]){f->x}, f->h);
}

/* Runs the pass; hidden (wanted_count, d) are the wanted rows, normalised for the head. */
static void pass_run(struct infer *f)
{
    const struct compute *c = &f->compute;
    const struct model_config *m = &c->model->config;
    const float *below = NULL;
    c->ops->embed(&c->run, f->tokens, &c->model->token_embd, f->ids, 1.0f, f->x);
    for (int32_t layer = 0; layer < m->layer_count; layer++) {
        pass_layer(f, layer, below);
        below = f->mid;
    }
    if (f->wanted_count > 0)
        c->ops->rmsnorm_forward(&c->run, f->wanted_count, m->d_model, m->norm_eps, model_gain(&c->model->output_norm),
                                f->x, below, f->hidden, NULL);
}

/* --- extending -------------------------------------------------------------------------------------------------- */

static int check_ids(const struct infer *f, const int32_t *ids, int32_t count, struct error *err)
{
    const int32_t vocabulary = f->compute.model->config.vocabulary;
    for (int32_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocabulary)
            return error_set(err, ERR_CONFIG, "token %d of %d is outside the model's vocabulary of %d", i + 1, count,
                             vocabulary);
    return 0;
}

/* `count` more tokens fit the cache and the rotary table. */
static int check_room(const struct infer *f, const struct kv_cache *cache, int32_t count, struct error *err)
{
    int32_t room = kv_cache_room(cache), table = f->options.context_max - cache->length;
    if (table < room)
        room = table;
    if (count > room)
        return error_set(err, ERR_CONFIG, "%d tokens do not fit: the sequence has %d and room for %d more", count,
                         cache->length, room);
    return 0;
}

/* The pass just run has computed these tokens of the items; last rows wanted are the items' ends. */
static void finish_extend(struct infer *f)
{
    const size_t d = (size_t)f->compute.model->config.d_model;
    for (int32_t i = 0; i < f->piece_count; i++) {
        struct piece *p = &f->pieces[i];
        memcpy(p->cache->ids + p->start, f->ids + p->row, (size_t)p->count * sizeof *f->ids);
        p->cache->length = p->start + p->count;
        p->cache->hidden_valid = false;
    }
    for (int32_t i = 0, piece = 0; i < f->wanted_count; i++) {
        while (f->pieces[piece].row + f->pieces[piece].count - 1 != f->wanted[i])
            piece++;
        memcpy(f->pieces[piece].cache->hidden, f->hidden + (size_t)i * d, d * sizeof(float));
        f->pieces[piece].cache->hidden_valid = true;
    }
}

int infer_extend(struct infer *infer, const struct lora *lora, const struct infer_extend *items, int32_t count,
                 struct error *err)
{
    for (int32_t i = 0; i < count; i++) {
        assert(items[i].count >= 1);
        int rc = check_ids(infer, items[i].ids, items[i].count, err);
        if (rc == 0)
            rc = check_room(infer, items[i].cache, items[i].count, err);
        if (rc < 0)
            return rc;
    }
    pass_begin(infer, lora);
    for (int32_t i = 0; i < count; i++) {
        for (int32_t done = 0; done < items[i].count;) {
            if (pass_room(infer) == 0) {
                pass_run(infer);
                finish_extend(infer);
                pass_begin(infer, lora);
            }
            int32_t n = items[i].count - done;
            if (n > pass_room(infer))
                n = pass_room(infer);
            pass_add(infer, items[i].cache, items[i].cache->length, items[i].ids + done, n);
            done += n;
            if (done == items[i].count)
                infer->wanted[infer->wanted_count++] = infer->tokens - 1;
        }
    }
    if (infer->tokens > 0) {
        pass_run(infer);
        finish_extend(infer);
    }
    return 0;
}

void infer_logits(struct infer *infer, const struct kv_cache *cache, float *logits)
{
    assert(cache->hidden_valid);
    const struct compute *c = &infer->compute;
    c->ops->linear_decode(&c->run, 1, model_head(c->model), NULL, cache->hidden, logits);
}

/* --- scoring ---------------------------------------------------------------------------------------------------- */

static double log_sum_exp(const float *x, int32_t n)
{
    float largest = x[0];
    double sum = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > largest)
            largest = x[i];
    for (int32_t i = 0; i < n; i++)
        sum += expf(x[i] - largest);
    return largest + log(sum);
}

/* The first tokens: one row of logits per cache serves all its candidates; up to KERNEL_DECODE_ROWS caches at once.
 * Returns the candidate after the last one done. */
static int32_t score_first_tokens(struct infer *f, struct infer_candidate *candidates, int32_t begin, int32_t count)
{
    const struct compute *c = &f->compute;
    const struct model_config *m = &c->model->config;
    const struct kv_cache *cache = NULL;
    int32_t rows = 0, end = begin;
    for (; end < count; end++) {
        if (candidates[end].cache == cache)
            continue;
        if (rows == KERNEL_DECODE_ROWS)
            break;
        cache = candidates[end].cache;
        memcpy(f->rows + (size_t)rows++ * (size_t)m->d_model, cache->hidden, (size_t)m->d_model * sizeof(float));
    }
    c->ops->linear_decode(&c->run, rows, model_head(c->model), NULL, f->rows, f->logits);
    const float *logits = f->logits - m->vocabulary;
    double total = 0;
    cache = NULL;
    for (int32_t i = begin; i < end; i++) {
        if (candidates[i].cache != cache) {
            cache = candidates[i].cache;
            logits += m->vocabulary;
            total = log_sum_exp(logits, m->vocabulary);
        }
        candidates[i].log_likelihood = logits[candidates[i].ids[0]] - total;
    }
    return end;
}

/* Runs the pass of candidates' inner tokens and adds what each wanted row says of its next token. */
static void score_pass(struct infer *f, struct infer_candidate *candidates)
{
    const struct compute *c = &f->compute;
    if (f->tokens == 0)
        return;
    pass_run(f);
    const struct labels labels = {f->wanted_count, f->identity, f->targets, NULL};
    c->ops->cross_entropy(&c->run, model_head(c->model), &labels, f->hidden, f->losses, NULL);
    for (int32_t i = 0; i < f->wanted_count; i++)
        candidates[f->owners[i]].log_likelihood -= f->losses[i];
}

int infer_score(struct infer *infer, const struct lora *lora, struct infer_candidate *candidates, int32_t count,
                struct error *err)
{
    for (int32_t i = 0; i < count; i++) {
        const struct infer_candidate *k = &candidates[i];
        assert(k->count >= 1 && k->cache->hidden_valid);
        int rc = check_ids(infer, k->ids, k->count, err);
        if (rc == 0)
            rc = check_room(infer, k->cache, k->count - 1, err);
        if (rc == 0 && k->count - 1 > infer->options.rows_max)
            rc = error_set(err, ERR_CONFIG, "a continuation of %d tokens exceeds the %d rows of a pass", k->count,
                           infer->options.rows_max);
        if (rc < 0)
            return rc;
    }
    for (int32_t done = 0; done < count;)
        done = score_first_tokens(infer, candidates, done, count);
    pass_begin(infer, lora);
    for (int32_t i = 0; i < count; i++) {
        const struct infer_candidate *k = &candidates[i];
        if (k->count == 1)
            continue;
        if (k->count - 1 > pass_room(infer)) {
            score_pass(infer, candidates);
            pass_begin(infer, lora);
        }
        for (int32_t t = 1; t < k->count; t++) {
            infer->owners[infer->wanted_count] = i;
            infer->targets[infer->wanted_count] = k->ids[t];
            infer->wanted[infer->wanted_count++] = infer->tokens + t - 1;
        }
        pass_add(infer, k->cache, k->cache->length, k->ids, k->count - 1);
    }
    score_pass(infer, candidates);
    return 0;
}
