#include "model/infer.h"

#include "base/megabytes.h"
#include "model/carve.h"
#include "model/kv_cache.h"
#include "model/layer.h"
#include "model/sampling.h"

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

/* Of one pass; on the host and, in one upload, on the device. */
struct pass_arrays {
    int32_t *ids, *positions, *targets; /* (rows_max) */
    int32_t *wanted;                    /* (rows_max) rows, ascending, whose final hidden row is wanted */
};

struct infer {
    struct infer_options options;
    struct compute compute;
    struct placed_model *own_placed; /* if the caller gave none */
    void *device;                    /* one block of the backend's memory */
    struct arena host;
    struct graph_cache *graphs;

    int32_t tokens;             /* rows of the pass being built */
    int32_t piece_count;        /* in use */
    int32_t wanted_count;       /* rows wanted */
    bool fresh;                 /* every piece starts a sequence */
    struct piece *pieces;       /* (rows_max) */
    struct kv_piece *kv_pieces; /* (rows_max) the same for the backend */
    int32_t *offsets;           /* (rows_max + 1) first row of each piece */
    int32_t *owners;            /* (rows_max) candidate of each wanted row, when scoring */
    float *losses;              /* (rows_max) of the wanted rows, when scoring */
    float *logits;              /* (KERNEL_DECODE_ROWS, vocabulary) */
    struct pass_arrays arrays, device_arrays;

    struct placed_segments segments;
    float *rope_table, *losses_dev;
    struct rows rows; /* (KERNEL_DECODE_ROWS, d_model) hidden rows to be scored */
    struct rows x, xn, q, k, v, o, mid, gate, up, act, compact, compact_x, last, hidden;
    struct rows q_raw, k_raw; /* before their norms; q and k themselves where they have none */
    struct rows block;        /* (rows_max, d_model) a block's output before its norm; at NULL where there is none */
    void *h;
};

static const struct rows no_rows = {NULL, 0};

/* --- memory ----------------------------------------------------------------------------------------------------- */

static void carve_arrays(struct carver *c, bool host, size_t rows, struct pass_arrays *a)
{
    int32_t *all = host ? carve_host(c, 4 * rows, sizeof *all) : carve(c, 4 * rows, sizeof *all);
    if (all)
        *a = (struct pass_arrays){all, all + rows, all + 2 * rows, all + 3 * rows};
}

static void carve_all(struct infer *f, struct carver *c)
{
    const struct model_config *m = f->compute.config;
    const struct infer_options *o = &f->options;
    const size_t rows = (size_t)o->rows_max;
    const int32_t heads = m->head_count * m->head_size, kv = m->kv_head_count * m->head_size;
    const int32_t qkv[3] = {heads, kv, kv}, gate_up[2] = {m->d_ff, m->d_ff};
    f->pieces = carve_host(c, rows, sizeof *f->pieces);
    f->kv_pieces = carve_host(c, rows, sizeof *f->kv_pieces);
    f->offsets = carve_host(c, rows + 1, sizeof *f->offsets);
    f->owners = carve_host(c, rows, sizeof *f->owners);
    f->losses = carve_host(c, rows, sizeof *f->losses);
    f->logits = carve_host(c, KERNEL_DECODE_ROWS, (size_t)m->vocabulary * sizeof *f->logits);
    carve_arrays(c, true, rows, &f->arrays);
    carve_arrays(c, false, rows, &f->device_arrays);
    f->rope_table = carve_floats(c, rope_table_floats(m, o->context_max), 1);
    f->losses_dev = carve_floats(c, rows, 1);
    f->rows = carve_rows(c, KERNEL_DECODE_ROWS, m->d_model, 0);
    f->x = carve_rows(c, rows, m->d_model, 0);
    f->xn = carve_rows(c, rows, m->d_model, 0);
    carve_outputs(c, rows, 3, qkv, 0, (struct rows *const[]){&f->q_raw, &f->k_raw, &f->v});
    f->q = m->qk_norm ? carve_rows(c, rows, heads, 0) : f->q_raw;
    f->k = m->qk_norm ? carve_rows(c, rows, kv, 0) : f->k_raw;
    f->o = carve_rows(c, rows, heads, 0);
    f->mid = carve_rows(c, rows, m->d_model, 0);
    if (m->post_norms)
        f->block = carve_rows(c, rows, m->d_model, 0);
    if (m->fused_gate_up) {
        f->gate = carve_rows(c, rows, gate_up_width(m), 0);
        f->up = f->gate.at ? rows_from(c->be, f->gate, m->d_ff) : f->gate;
    } else {
        carve_outputs(c, rows, 2, gate_up, 0, (struct rows *const[]){&f->gate, &f->up});
    }
    f->act = carve_rows(c, rows, m->d_ff, 0);
    f->compact = carve_rows(c, rows, heads, 0);
    f->compact_x = carve_rows(c, rows, m->d_model, 0);
    f->last = carve_rows(c, rows, m->d_model, 0);
    f->hidden = carve_rows(c, rows, m->d_model, 0);
    f->h = carve_floats(c, rows, GROUP_TARGETS_MAX * (size_t)o->rank_max);
}

static int check_options(const struct infer_options *o, const struct model_config *model, struct error *err)
{
    assert(o->backend);
    if (o->rows_max < 1 || o->rows_max > 1 << 16)
        return error_set(err, ERR_CONFIG, "inference: %d rows a pass is outside 1 to 65536", o->rows_max);
    if (o->context_max < 1 || o->context_max > model->context_length)
        return error_set(err, ERR_CONFIG, "inference: a context of %d tokens is outside 1 to the model's %d",
                         o->context_max, model->context_length);
    if (o->rank_max < 0 || o->rank_max > LORA_RANK_MAX)
        return error_set(err, ERR_CONFIG, "inference: LoRA rank %d is outside 0 to %d", o->rank_max, LORA_RANK_MAX);
    return 0;
}

static int take_memory(struct infer *f, struct error *err)
{
    struct backend *be = f->compute.be;
    struct carver c = {.be = be};
    carve_all(f, &c);
    if (c.overflow || arena_init(&f->host, c.host_bytes) < 0)
        return error_set(err, ERR_RESOURCES, "inference: no memory for %d rows; lower the rows of a pass",
                         f->options.rows_max);
    char size[MEGABYTES_SIZE];
    int rc = be->ops->alloc(be, c.device_bytes, &f->device, err);
    if (rc < 0)
        return error_prefix(err, "inference, %s of activations", megabytes(size, c.device_bytes));
    c = (struct carver){.be = be, .device = f->device, .host = &f->host};
    carve_all(f, &c);
    return 0;
}

static int reserve(struct infer *f, struct error *err)
{
    const struct model_config *m = f->compute.config;
    const struct backend_needs needs = {
        .rows = f->options.rows_max,
        .width = layer_width_max(m, GROUP_TARGETS_MAX * f->options.rank_max),
        .rank_max = f->options.rank_max,
        .shape = model_attention_shape(m),
        .segment_rows = f->options.rows_max,
        .decode_length = f->options.context_max,
        .label_rows = f->options.rows_max,
        .vocabulary = m->vocabulary,
        .d_model = m->d_model,
    };
    return f->compute.be->ops->reserve(f->compute.be, &needs, err);
}

int infer_new(const struct infer_options *options, const struct model *model, struct infer **ret_infer,
              struct error *err)
{
    int rc = check_options(options, &model->config, err);
    if (rc < 0)
        return rc;
    struct infer *f = calloc(1, sizeof *f);
    if (!f)
        return error_set(err, ERR_RESOURCES, "inference: no memory");
    struct backend *be = options->backend;
    f->options = *options;
    f->compute = (struct compute){.be = be, .config = &model->config, .use = GROUP_SERVE, .placed = options->placed};
    if (!options->placed && (rc = placed_model_new(be, model, 0, &f->own_placed, err)) < 0)
        goto out;
    if (f->own_placed)
        f->compute.placed = f->own_placed;
    if (f->own_placed && options->answering)
        placed_model_serve(f->own_placed);
    assert(f->compute.placed->model == model);
    if ((rc = reserve(f, err)) < 0 || (rc = take_memory(f, err)) < 0 ||
        (rc = be->ops->segments_new(be, options->rows_max, options->rows_max, &f->segments, err)) < 0 ||
        (rc = place_rope_table(&f->compute, model, options->context_max, f->rope_table, err)) < 0)
        goto out;
    f->graphs = be->ops->graph_cache_new(be);
    if ((rc = be->ops->sync(be, err)) < 0)
        goto out;
    *ret_infer = f;
    return 0;
out:
    infer_free(f);
    return rc;
}

void infer_free(struct infer *infer)
{
    if (!infer)
        return;
    struct backend *be = infer->compute.be;
    be->ops->graph_cache_free(be, infer->graphs);
    be->ops->segments_free(be, &infer->segments);
    be->ops->release(be, infer->device);
    arena_release(&infer->host);
    placed_model_free(infer->own_placed);
    free(infer);
}

/* --- one packed pass -------------------------------------------------------------------------------------------- */

static void pass_begin(struct infer *f, const struct lora *lora)
{
    assert(!lora || lora->config.rank <= f->options.rank_max);
    assert(!lora || lora->backend || f->compute.be->host_memory);
    f->compute.lora = lora;
    f->tokens = f->piece_count = f->wanted_count = 0;
    f->fresh = true;
    f->offsets[0] = 0;
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
    for (int32_t i = 0; i < f->piece_count; i++) /* pieces of one cache stand together */
        assert(f->pieces[i].cache != cache || f->pieces[f->piece_count - 1].cache == cache);
    f->kv_pieces[f->piece_count] = (struct kv_piece){cache->kv, start, count, f->tokens};
    f->pieces[f->piece_count++] = (struct piece){cache, start, count, f->tokens};
    f->fresh = f->fresh && start == 0;
    for (int32_t i = 0; i < count; i++) {
        f->arrays.ids[f->tokens] = ids[i];
        f->arrays.positions[f->tokens++] = start + i;
    }
    f->offsets[f->piece_count] = f->tokens;
}

/* Whole fresh prompts go through the packed attention of training, everything else piece by piece. */
static void attention(struct infer *f, int32_t layer)
{
    struct backend *be = f->compute.be;
    const struct attention_shape shape = layer_attention_shape(f->compute.config, layer);
    if (f->fresh)
        be->ops->attention_forward(be, &shape, &f->segments, f->tokens, f->q, f->k, f->v, f->o, NULL);
    be->ops->attend(be, &shape, layer, f->fresh ? no_rows : f->q, f->k, f->v, f->o);
}

/* LoRA's columns of a group: dense. */
static struct rows lora_rows(const struct infer *f, int32_t layer, enum group group)
{
    return (struct rows){f->h, group_rank(f->compute.lora, layer, group)};
}

/* A block's last linear, and the norm behind it where the model has one. */
static void block_output(struct infer *f, int32_t layer, enum group group, int32_t rows, struct rows x,
                         const float *gain, struct rows to)
{
    const struct compute *c = &f->compute;
    const struct model_config *m = c->config;
    group_forward(c, layer, group, rows, x, m->post_norms ? &f->block : &to, lora_rows(f, layer, group));
    if (m->post_norms)
        c->be->ops->norm_forward(c->be, rows, m->d_model, m->norm_eps, gain, f->block, no_rows, to, NULL);
}

/* One layer over all rows, but in the top layer only the wanted rows beyond the attention. below is the previous
 * layer's residual stream that its feed-forward output in x lacks, or at NULL. */
static void pass_layer(struct infer *f, int32_t layer, struct rows below)
{
    const struct compute *c = &f->compute;
    const struct model_config *m = c->config;
    const struct placed_layer *weights = &c->placed->layers[layer];
    struct backend *be = c->be;
    const bool top = layer == m->layer_count - 1;
    const int32_t rows = top ? f->wanted_count : f->tokens;
    be->ops->norm_forward(be, f->tokens, m->d_model, m->norm_eps, weights->attn_norm, f->x, below, f->xn, NULL);
    group_forward(c, layer, GROUP_QKV, f->tokens, f->xn, (const struct rows[]){f->q_raw, f->k_raw, f->v},
                  lora_rows(f, layer, GROUP_QKV));
    if (m->qk_norm) {
        be->ops->head_norm_forward(be, f->tokens, m->head_count, m->head_size, m->norm_eps, weights->q_norm, f->q_raw,
                                   f->q, NULL);
        be->ops->head_norm_forward(be, f->tokens, m->kv_head_count, m->head_size, m->norm_eps, weights->k_norm,
                                   f->k_raw, f->k, NULL);
    }
    layer_rope(c, layer, f->tokens, f->device_arrays.positions, false, f->q, f->k);
    attention(f, layer);
    if (rows == 0)
        return;
    if (top) {
        be->ops->gather(be, rows, m->head_count * m->head_size, f->device_arrays.wanted, f->o, f->compact);
        be->ops->gather(be, rows, m->d_model, f->device_arrays.wanted, f->x, f->compact_x);
    }
    block_output(f, layer, GROUP_O, rows, top ? f->compact : f->o, weights->attn_post_norm, f->mid);
    be->ops->norm_forward(be, rows, m->d_model, m->norm_eps, weights->ffn_norm, f->mid, top ? f->compact_x : f->x,
                          f->xn, NULL);
    group_forward(c, layer, GROUP_GATE_UP, rows, f->xn, (const struct rows[]){f->gate, f->up},
                  lora_rows(f, layer, GROUP_GATE_UP));
    be->ops->gated_forward(be, rows, m->d_ff, m->gate, f->gate, f->up, f->act);
    block_output(f, layer, GROUP_DOWN, rows, f->act, weights->ffn_post_norm, top ? f->last : f->x);
}

static void record_pass(void *ctx)
{
    struct infer *f = ctx;
    const struct compute *c = &f->compute;
    const struct model_config *m = c->config;
    struct backend *be = c->be;
    struct rows below = no_rows;
    be->ops->embed(be, f->tokens, &c->placed->embedding, f->device_arrays.ids, model_embedding_scale(m), f->x);
    for (int32_t layer = 0; layer < m->layer_count; layer++) {
        pass_layer(f, layer, below);
        below = f->mid;
    }
    if (f->wanted_count > 0)
        be->ops->norm_forward(be, f->wanted_count, m->d_model, m->norm_eps, c->placed->output_norm, f->last, below,
                              f->hidden, NULL);
}

/* Two adapters never share a key while both live: their memory is apart; and one that takes the place of a freed one
 * has other memory or, with the same shape, other values only. */
static uint64_t lora_key(const struct lora *lora)
{
    uint32_t scale;
    if (!lora)
        return 0;
    memcpy(&scale, &lora->scale, sizeof scale);
    const uint64_t words[] = {
        (uint64_t)(uintptr_t)lora->trained, (uint64_t)(uintptr_t)lora->frozen, scale,
        (uint64_t)lora->config.mode,        (uint64_t)lora->config.rank,       lora->config.targets,
        (uint64_t)lora->config.layer_first, (uint64_t)lora->config.layer_count};
    uint64_t key = 14695981039346656037u; /* FNV-1a, a word at a time, then a finishing mix */
    for (size_t i = 0; i < ARRAY_LEN(words); i++)
        key = (key ^ words[i]) * 1099511628211u;
    return (key ^ key >> 29) | 1;
}

/* Runs the pass; hidden (wanted_count, d) are the wanted rows, normalised for the head. */
static void pass_run(struct infer *f)
{
    struct backend *be = f->compute.be;
    be->ops->upload(be, f->device_arrays.ids, f->arrays.ids, 4 * (size_t)f->options.rows_max * sizeof(int32_t));
    const uint64_t pieces = be->ops->pieces_set(be, f->kv_pieces, f->piece_count);
    be->ops->segments_set(be, &f->segments, f->piece_count, f->offsets);
    const uint64_t key[4] = {(uint64_t)f->tokens << 32 | (uint64_t)f->wanted_count, pieces << 1 | f->fresh,
                             lora_key(f->compute.lora),
                             f->compute.lora ? (uint64_t)(uintptr_t)f->compute.lora->trained : 0};
    be->ops->run_recorded(be, f->graphs, key, record_pass, f);
}

/* --- extending -------------------------------------------------------------------------------------------------- */

static int check_ids(const struct infer *f, const int32_t *ids, int32_t count, struct error *err)
{
    const int32_t vocabulary = f->compute.config->vocabulary;
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
    struct backend *be = f->compute.be;
    const size_t bytes = (size_t)f->compute.config->d_model * backend_element_bytes(be);
    for (int32_t i = 0; i < f->piece_count; i++) {
        struct piece *p = &f->pieces[i];
        memcpy(p->cache->ids + p->start, f->arrays.ids + p->row, (size_t)p->count * sizeof *f->arrays.ids);
        p->cache->length = p->start + p->count;
        p->cache->hidden_valid = false;
    }
    for (int32_t i = 0, piece = 0; i < f->wanted_count; i++) {
        while (f->pieces[piece].row + f->pieces[piece].count - 1 != f->arrays.wanted[i])
            piece++;
        be->ops->copy(be, f->pieces[piece].cache->hidden.at, (uint8_t *)f->hidden.at + (size_t)i * bytes, bytes);
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
                infer->arrays.wanted[infer->wanted_count++] = infer->tokens - 1;
        }
    }
    if (infer->tokens > 0) {
        pass_run(infer);
        finish_extend(infer);
    }
    return infer->compute.be->ops->sync(infer->compute.be, err);
}

int infer_logits(struct infer *infer, const struct kv_cache *cache, float *logits, struct error *err)
{
    struct backend *be = infer->compute.be;
    assert(cache->hidden_valid);
    be->ops->logits(be, &infer->compute.placed->head, 1, cache->hidden, logits);
    return be->ops->sync(be, err);
}

int infer_likeliest(struct infer *infer, const struct kv_cache *cache, int32_t *ret_id, struct error *err)
{
    struct backend *be = infer->compute.be;
    int32_t id = 0;
    assert(cache->hidden_valid);
    if (be->ops->likeliest)
        be->ops->likeliest(be, &infer->compute.placed->head, 1, cache->hidden, &id);
    else
        be->ops->logits(be, &infer->compute.placed->head, 1, cache->hidden, infer->logits);
    int rc = be->ops->sync(be, err);
    if (rc == 0)
        *ret_id = be->ops->likeliest ? id : likeliest_token(infer->logits, infer->compute.config->vocabulary);
    return rc;
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
    struct backend *be = f->compute.be;
    const struct model_config *m = f->compute.config;
    const size_t bytes = (size_t)m->d_model * backend_element_bytes(be);
    const struct kv_cache *cache = NULL;
    int32_t rows = 0, end = begin;
    for (; end < count; end++) {
        if (candidates[end].cache == cache)
            continue;
        if (rows == KERNEL_DECODE_ROWS)
            break;
        cache = candidates[end].cache;
        be->ops->copy(be, (uint8_t *)f->rows.at + (size_t)rows++ * bytes, cache->hidden.at, bytes);
    }
    be->ops->logits(be, &f->compute.placed->head, rows, f->rows, f->logits);
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
    struct backend *be = f->compute.be;
    if (f->tokens == 0)
        return;
    pass_run(f);
    const struct placed_labels labels = {f->wanted_count, f->device_arrays.targets, NULL};
    be->ops->cross_entropy(be, &f->compute.placed->head, &labels, f->hidden, f->losses_dev, no_rows);
    be->ops->download(be, f->losses, f->losses_dev, (size_t)f->wanted_count * sizeof *f->losses);
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
    int32_t alternatives = 0; /* of the last cache, in this pass */
    for (int32_t i = 0; i < count; i++) {
        const struct infer_candidate *k = &candidates[i];
        if (k->count == 1)
            continue;
        alternatives = i > 0 && candidates[i - 1].cache == k->cache ? alternatives + 1 : 1;
        if (k->count - 1 > pass_room(infer) || alternatives > BACKEND_ALTERNATIVES_MAX) {
            score_pass(infer, candidates);
            pass_begin(infer, lora);
            alternatives = 1;
        }
        for (int32_t t = 1; t < k->count; t++) {
            infer->owners[infer->wanted_count] = i;
            infer->arrays.targets[infer->wanted_count] = k->ids[t];
            infer->arrays.wanted[infer->wanted_count++] = infer->tokens + t - 1;
        }
        pass_add(infer, k->cache, k->cache->length, k->ids, k->count - 1);
    }
    score_pass(infer, candidates);
    return infer->compute.be->ops->sync(infer->compute.be, err);
}
