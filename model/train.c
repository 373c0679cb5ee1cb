#include "model/train.h"

#include "base/megabytes.h"
#include "model/carve.h"
#include "model/train_internal.h"

#include <stdlib.h>
#include <string.h>

#define TRAIN_TOKENS_MAX (1 << 18)
/* Padded row counts are multiples of a fraction of the most, so that few recorded passes serve all batches. */
#define ROW_BUCKETS 8

static const struct rows no_rows = {NULL, 0};

/* --- memory ------------------------------------------------------------------------------------------------------ */

static size_t padded(const struct train *t)
{
    return (size_t)backend_rows(t->compute.be, t->options.tokens_max);
}

/* The two inputs and the product of the feed-forward block, with LoRA's h of their groups. */
static void carve_gate(struct train *t, struct carver *c, const struct lora *lora, int32_t layer, bool inputs,
                       struct activations *a)
{
    const struct model_config *m = t->compute.config;
    const int32_t up_rank = group_rank(lora, layer, GROUP_GATE_UP), down_rank = group_rank(lora, layer, GROUP_DOWN);
    const int32_t widths[2] = {m->d_ff, m->d_ff};
    if (m->fused_gate_up) {
        a->gate = carve_rows(c, padded(t), gate_up_width(m), up_rank);
        a->up = a->gate.at ? rows_from(c->be, a->gate, m->d_ff) : a->gate;
    } else {
        carve_outputs(c, padded(t), 2, widths, up_rank, (struct rows *const[]){&a->gate, &a->up});
    }
    if (inputs) {
        a->xn2 = carve_rows(c, padded(t), m->d_model, up_rank);
        a->act = carve_rows(c, padded(t), m->d_ff, down_rank);
    }
    a->h[GROUP_GATE_UP] = carve_lora(c, padded(t), a->xn2, m->d_model, up_rank);
    a->h[GROUP_DOWN] = carve_lora(c, padded(t), a->act, m->d_ff, down_rank);
}

static void carve_attention(struct train *t, struct carver *c, const struct lora *lora, int32_t layer, bool inputs,
                            struct activations *a)
{
    const struct model_config *m = t->compute.config;
    const int32_t heads = m->head_count * m->head_size, kv = m->kv_head_count * m->head_size;
    const int32_t qkv_rank = group_rank(lora, layer, GROUP_QKV), o_rank = group_rank(lora, layer, GROUP_O);
    const int32_t widths[3] = {heads, kv, kv};
    carve_outputs(c, padded(t), 3, widths, 0, (struct rows *const[]){&a->q_raw, &a->k_raw, &a->v});
    a->q = a->q_raw;
    a->k = a->k_raw;
    if (m->qk_norm) {
        a->q = carve_rows(c, padded(t), heads, 0);
        a->k = carve_rows(c, padded(t), kv, 0);
        a->rstd_q = carve_floats(c, padded(t), (size_t)m->head_count);
        a->rstd_k = carve_floats(c, padded(t), (size_t)m->kv_head_count);
    }
    a->o = carve_rows(c, padded(t), heads, o_rank);
    a->lse = carve_floats(c, padded(t), (size_t)m->head_count);
    a->mid = a->o_out = carve_rows(c, padded(t), m->d_model, 0);
    if (m->post_norms) {
        a->o_out = carve_rows(c, padded(t), m->d_model, 0);
        a->rstd_o = carve_floats(c, padded(t), 1);
    }
    a->rstd1 = carve_floats(c, padded(t), 1);
    a->rstd2 = carve_floats(c, padded(t), 1);
    if (inputs)
        a->xn1 = carve_rows(c, padded(t), m->d_model, qkv_rank);
    a->h[GROUP_QKV] = carve_lora(c, padded(t), a->xn1, m->d_model, qkv_rank);
    /* The top layer's o reads gathered rows. */
    a->h[GROUP_O] = carve_lora(c, padded(t), layer == m->layer_count - 1 ? t->compact : a->o, heads, o_rank);
}

/* The activations of all layers. What a level does not keep is carved once, with the layer that has the most LoRA
 * columns as the model of its strides: all adapted layers adapt the same targets. */
static void carve_layers(struct train *t, struct carver *c, const struct lora *lora)
{
    const struct model_config *m = t->compute.config;
    const int32_t lowest = t->lowest;
    struct activations shared = {0}; /* inputs that no layer keeps, and at level 1 or 2 the rest */
    shared.xn1 = carve_rows(c, padded(t), m->d_model, group_rank(lora, lowest, GROUP_QKV));
    if (t->level > 0 || !t->keep_inputs) {
        shared.xn2 = carve_rows(c, padded(t), m->d_model, group_rank(lora, lowest, GROUP_GATE_UP));
        shared.act = carve_rows(c, padded(t), m->d_ff, group_rank(lora, lowest, GROUP_DOWN));
    }
    if (t->level > 1)
        carve_attention(t, c, lora, lowest, false, &shared);
    if (t->level > 0)
        carve_gate(t, c, lora, lowest, false, &shared);
    for (int32_t layer = lowest > 0 ? lowest - 1 : 0; layer < m->layer_count; layer++) {
        const bool adapted = layer >= lowest;
        struct activations a = shared;
        a.x = carve_rows(c, padded(t), m->d_model, 0);
        if (m->post_norms) {
            a.down_out = carve_rows(c, padded(t), m->d_model, 0);
            a.rstd_down = carve_floats(c, padded(t), 1);
        }
        if (t->level < 2 || !adapted)
            carve_attention(t, c, adapted ? lora : NULL, layer, t->keep_inputs && adapted, &a);
        else if (layer == m->layer_count - 1)
            a.h[GROUP_O] =
                carve_lora(c, padded(t), t->compact, m->head_count * m->head_size, group_rank(lora, layer, GROUP_O));
        if (t->level < 1 || !adapted)
            carve_gate(t, c, adapted ? lora : NULL, layer, shared.xn2.stride == 0, &a);
        if (!adapted)
            memset(a.h, 0, sizeof a.h);
        if (c->device)
            *train_layer(t, layer) = a;
    }
}

static void carve_gradients(struct train *t, struct carver *c, const struct lora *lora)
{
    const struct model_config *m = t->compute.config;
    const int32_t heads = m->head_count * m->head_size, kv = m->kv_head_count * m->head_size;
    const int32_t widths[3] = {heads, kv, kv};
    const int32_t o_rank = group_rank(lora, t->lowest, GROUP_O), down_rank = group_rank(lora, t->lowest, GROUP_DOWN);
    const int32_t narrow = o_rank > down_rank ? o_rank : down_rank;
    t->dx = carve_rows(c, padded(t), m->d_model, narrow);
    t->dx_inner = carve_rows(c, padded(t), m->d_model, narrow);
    t->dxn = carve_rows(c, padded(t), m->d_model, 0);
    if (m->post_norms)
        t->dblock = carve_rows(c, padded(t), m->d_model, narrow);
    t->dact = carve_rows(c, padded(t), m->d_ff, 0);
    carve_outputs(c, padded(t), 3, widths, group_rank(lora, t->lowest, GROUP_QKV),
                  (struct rows *const[]){&t->dq, &t->dk, &t->dv});
    t->do_ = carve_rows(c, padded(t), heads, 0);
    t->do_inner = carve_rows(c, padded(t), heads, 0);
    if (!c->be->fused)
        t->dh.at = carve_floats(c, padded(t), GROUP_TARGETS_MAX * (size_t)lora->config.rank);
    t->gradients = carve_floats(c, t->options.per_example ? (size_t)t->options.examples_max : 1, t->gradient_stride);
}

static void carve_staged(struct carver *c, bool host, size_t rows, struct staged *s)
{
    int32_t *all = host ? carve_host(c, 6 * rows, sizeof *all) : carve(c, 6 * rows, sizeof *all);
    if (!all)
        return;
    *s = (struct staged){.ids = all,
                         .positions = all + rows,
                         .row_label = all + 2 * rows,
                         .label_rows = all + 3 * rows,
                         .targets = all + 4 * rows,
                         .weights = (float *)(all + 5 * rows)};
}

/* Hands out, or counts, all memory of a step. */
static void carve_all(struct train *t, struct carver *c, const struct lora *lora)
{
    const struct model_config *m = t->compute.config;
    const struct train_options *o = &t->options;
    const int32_t heads = m->head_count * m->head_size;
    t->layers = carve_host(c, (size_t)(m->layer_count - t->lowest + 1), sizeof *t->layers);
    t->losses = carve_host(c, (size_t)o->examples_max, sizeof *t->losses);
    t->label_losses = carve_host(c, padded(t), sizeof *t->label_losses);
    t->label_offsets = carve_host(c, (size_t)o->examples_max + 1, sizeof *t->label_offsets);
    carve_staged(c, true, padded(t), &t->host_batch);
    carve_staged(c, false, padded(t), &t->batch_arrays);
    t->rope_table = carve_floats(c, rope_table_floats(m, o->example_tokens_max), 1);
    t->compact = carve_rows(c, padded(t), heads, group_rank(lora, m->layer_count - 1, GROUP_O));
    t->compact_x = carve_rows(c, padded(t), m->d_model, 0);
    carve_layers(t, c, lora);
    t->hidden = carve_rows(c, padded(t), m->d_model, 0);
    t->rstd_final = carve_floats(c, padded(t), 1);
    t->losses_dev = carve_floats(c, padded(t), 1);
    t->last = carve_rows(c, padded(t), m->d_model, 0);
    carve_gradients(t, c, lora);
}

static size_t bytes_at_level(struct train *t, const struct lora *lora, int level)
{
    struct carver c = {.be = t->compute.be};
    const int was = t->level;
    t->level = level;
    carve_all(t, &c, lora);
    t->level = was;
    return c.overflow ? SIZE_MAX : c.device_bytes;
}

static void choose_level(struct train *t, const struct lora *lora)
{
    const size_t room = t->compute.be->ops->free_bytes(t->compute.be);
    t->level = t->options.checkpoint_level;
    for (int level = 0; t->level < 0; level++)
        if (level == 2 || bytes_at_level(t, lora, level) <= room)
            t->level = level;
}

static int take_memory(struct train *t, const struct lora *lora, struct error *err)
{
    struct backend *be = t->compute.be;
    struct carver c = {.be = be};
    carve_all(t, &c, lora);
    if (c.overflow || arena_init(&t->host, c.host_bytes) < 0)
        return error_set(err, ERR_RESOURCES, "training: no memory for a batch of %d tokens; lower the batch's tokens",
                         t->options.tokens_max);
    char size[MEGABYTES_SIZE];
    int rc = be->ops->alloc(be, c.device_bytes, &t->device, err);
    if (rc < 0)
        return error_prefix(err, "training, %s of activations for a batch of %d tokens (device.batch_tokens)",
                            megabytes(size, c.device_bytes), t->options.tokens_max);
    t->device_bytes = c.device_bytes;
    c = (struct carver){.be = be, .device = t->device, .host = &t->host};
    carve_all(t, &c, lora);
    return 0;
}

/* --- set-up ------------------------------------------------------------------------------------------------------- */

static int check_options(const struct train_options *o, const struct model_config *model, struct error *err)
{
    assert(o->backend);
    if (o->tokens_max < 1 || o->tokens_max > TRAIN_TOKENS_MAX)
        return error_set(err, ERR_CONFIG, "training: %d tokens a batch is outside 1 to %d", o->tokens_max,
                         TRAIN_TOKENS_MAX);
    if (o->examples_max < 1 || o->examples_max > o->tokens_max)
        return error_set(err, ERR_CONFIG, "training: %d examples a batch is outside 1 to the batch's %d tokens",
                         o->examples_max, o->tokens_max);
    if (o->example_tokens_max < 1 || o->example_tokens_max > o->tokens_max ||
        o->example_tokens_max > model->context_length)
        return error_set(err, ERR_CONFIG,
                         "training: examples of %d tokens do not fit a batch of %d tokens or the model's context of %d",
                         o->example_tokens_max, o->tokens_max, model->context_length);
    if (o->checkpoint_level < TRAIN_LEVEL_AUTO || o->checkpoint_level > 2)
        return error_set(err, ERR_CONFIG, "training: checkpoint level %d is outside 0 to 2", o->checkpoint_level);
    return 0;
}

static int place(struct train *t, const struct model *model, const struct lora *lora, struct error *err)
{
    struct compute *c = &t->compute;
    c->placed = t->options.placed;
    if (!c->placed) {
        int rc = placed_model_new(c->be, model, lora->config.rank, &t->own_placed, err);
        if (rc < 0)
            return rc;
        c->placed = t->own_placed;
    }
    assert(c->placed->model == model && c->placed->rank_max >= lora->config.rank);
    return 0;
}

static void set_up(struct train *t, const struct train_options *options, const struct model *model,
                   const struct lora *lora)
{
    t->options = *options;
    t->compute = (struct compute){.be = options->backend, .config = &model->config, .use = GROUP_TRAIN};
    t->lora_config = lora->config;
    assert(!options->alternating || lora->config.mode != LORA_JOINT);
    t->trained_count = lora->trained_count;
    if (options->alternating && lora->frozen_count > lora->trained_count)
        t->trained_count = lora->frozen_count;
    t->lowest = lora->config.layer_first;
    t->lowest_group = GROUP_QKV;
    while (group_rank(lora, t->lowest, t->lowest_group) == 0)
        t->lowest_group++;
    t->keep_inputs = options->backend->fused; /* LoRA's h lies in their columns */
    t->gradient_stride = arena_cost(t->trained_count * sizeof(float)) / sizeof(float);
}

/* The most factor values of one group, A and B. */
static size_t group_values_max(const struct train *t, const struct lora *lora)
{
    size_t most = 0;
    for (int32_t layer = 0; layer < t->compute.config->layer_count; layer++) {
        for (int group = 0; group < GROUP_COUNT; group++) {
            const int first = (int)group_first(t->compute.config, (enum group)group);
            size_t values = 0;
            for (int i = first; i < first + group_size(t->compute.config, (enum group)group); i++) {
                if (!lora_adapts(lora, layer, (enum lora_target)i))
                    continue;
                const struct lora_entry *e = &lora->entries[lora->index[layer][i]];
                values += (size_t)lora->config.rank * ((size_t)e->in + (size_t)e->out);
            }
            most = values > most ? values : most;
        }
    }
    return most;
}

static int reserve(struct train *t, const struct lora *lora, struct error *err)
{
    const struct model_config *m = t->compute.config;
    const struct backend_needs needs = {
        .rows = (int32_t)padded(t),
        .width = layer_width_max(m, GROUP_TARGETS_MAX * t->lora_config.rank),
        .shape = model_attention_shape(m),
        .segment_rows = t->options.example_tokens_max,
        .label_rows = (int32_t)padded(t),
        .vocabulary = m->vocabulary,
        .d_model = m->d_model,
        .arena = t->trained_count,
        .units = t->options.per_example ? t->options.examples_max : 1,
        .summed = t->options.per_example ? 0 : group_values_max(t, lora),
        .noise = t->options.noise,
    };
    return t->compute.be->ops->reserve(t->compute.be, &needs, err);
}

/* A device that chooses by timing how to compute does so on a full batch of nothing, once: what it chooses must not
 * depend on the first records that are drawn. */
static int warm_up(struct train *t, const struct lora *lora, struct error *err)
{
    struct batch batch;
    struct lora placed;
    int32_t *ids = calloc((size_t)t->options.example_tokens_max, sizeof *ids);
    uint8_t *learn = malloc((size_t)t->options.example_tokens_max);
    int rc = ids && learn ? batch_init(&batch, t->options.tokens_max, t->options.examples_max, err)
                          : error_set(err, ERR_RESOURCES, "training: no memory for a batch");
    if (rc == 0 && (rc = lora_place(&placed, lora, t->compute.be, err)) == 0) {
        memset(learn, 1, (size_t)t->options.example_tokens_max);
        batch_clear(&batch);
        while (batch_add(&batch, &(struct batch_example){ids, learn, t->options.example_tokens_max}))
            continue;
        train_run(t, &placed, &batch);
        if (t->options.alternating) { /* the other half's products too */
            lora_exchange(&placed);
            train_run(t, &placed, &batch);
        }
        rc = t->compute.be->ops->sync(t->compute.be, err);
        lora_unplace(&placed);
    }
    if (ids && learn)
        batch_release(&batch);
    free(ids);
    free(learn);
    return rc;
}

int train_new(const struct train_options *options, const struct model *model, const struct lora *lora,
              struct train **ret_train, struct error *err)
{
    int rc = check_options(options, &model->config, err);
    if (rc < 0)
        return rc;
    struct train *t = calloc(1, sizeof *t);
    if (!t)
        return error_set(err, ERR_RESOURCES, "training: no memory");
    set_up(t, options, model, lora);
    struct backend *be = t->compute.be;
    if ((rc = place(t, model, lora, err)) < 0 || (rc = reserve(t, lora, err)) < 0 ||
        (rc = be->ops->segments_new(be, (int32_t)padded(t), options->examples_max, &t->tokens, err)) < 0 ||
        (rc = be->ops->segments_new(be, (int32_t)padded(t), options->examples_max, &t->labels, err)) < 0)
        goto out;
    choose_level(t, lora);
    if ((rc = take_memory(t, lora, err)) < 0 ||
        (rc = place_rope_table(&t->compute, model, options->example_tokens_max, t->rope_table, err)) < 0)
        goto out;
    if (be->tuned && (rc = warm_up(t, lora, err)) < 0)
        goto out;
    t->graphs = be->ops->graph_cache_new(be);
    if ((rc = be->ops->sync(be, err)) < 0)
        goto out;
    *ret_train = t;
    return 0;
out:
    train_free(t);
    return rc;
}

void train_free(struct train *train)
{
    if (!train)
        return;
    struct backend *be = train->compute.be;
    be->ops->graph_cache_free(be, train->graphs);
    be->ops->segments_free(be, &train->tokens);
    be->ops->segments_free(be, &train->labels);
    be->ops->release(be, train->device);
    arena_release(&train->host);
    placed_model_free(train->own_placed);
    free(train);
}

size_t train_memory_bytes(const struct train *train)
{
    return train->device_bytes;
}

int train_level(const struct train *train)
{
    return train->level;
}

/* --- forward ----------------------------------------------------------------------------------------------------- */

/* The attention block. below is added to a->x first: a layer's feed-forward output and the residual stream under it
 * come together in the next layer's norm. Leaves the block's output, without the residual added, in a->mid for the
 * inner rows. */
struct rows train_forward_attention(struct train *t, int32_t layer, struct rows below)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = c->config;
    const struct placed_layer *weights = &c->placed->layers[layer];
    struct backend *be = c->be;
    const struct attention_shape shape = layer_attention_shape(config, layer);
    const bool inner = layer == config->layer_count - 1;
    const int32_t rows = inner ? t->inner_rows : t->rows;
    struct activations *a = train_layer(t, layer);
    be->ops->norm_forward(be, t->rows, config->d_model, config->norm_eps, weights->attn_norm, a->x, below, a->xn1,
                          a->rstd1);
    group_forward(c, layer, GROUP_QKV, t->rows, a->xn1, (const struct rows[]){a->q_raw, a->k_raw, a->v},
                  a->h[GROUP_QKV]);
    if (config->qk_norm) {
        be->ops->head_norm_forward(be, t->rows, shape.heads, shape.head_size, config->norm_eps, weights->q_norm,
                                   a->q_raw, a->q, a->rstd_q);
        be->ops->head_norm_forward(be, t->rows, shape.kv_heads, shape.head_size, config->norm_eps, weights->k_norm,
                                   a->k_raw, a->k, a->rstd_k);
    }
    layer_rope(c, layer, t->rows, t->batch_arrays.positions, false, a->q, a->k);
    be->ops->attention_forward(be, &shape, &t->tokens, t->rows, a->q, a->k, a->v, a->o, a->lse);
    if (inner) {
        be->ops->gather(be, rows, shape.heads * shape.head_size, t->batch_arrays.label_rows, a->o, t->compact);
        be->ops->gather(be, rows, config->d_model, t->batch_arrays.label_rows, a->x, t->compact_x);
    }
    group_forward(c, layer, GROUP_O, rows, inner ? t->compact : a->o, &a->o_out, a->h[GROUP_O]);
    if (config->post_norms)
        be->ops->norm_forward(be, rows, config->d_model, config->norm_eps, weights->attn_post_norm, a->o_out, no_rows,
                              a->mid, a->rstd_o);
    return inner ? t->compact_x : a->x;
}

void train_forward_gate(struct train *t, int32_t layer, int32_t rows, struct rows residual)
{
    const struct compute *c = &t->compute;
    struct backend *be = c->be;
    struct activations *a = train_layer(t, layer);
    be->ops->norm_forward(be, rows, c->config->d_model, c->config->norm_eps, c->placed->layers[layer].ffn_norm, a->mid,
                          residual, a->xn2, a->rstd2);
    group_forward(c, layer, GROUP_GATE_UP, rows, a->xn2, train_gate_up(a).rows, a->h[GROUP_GATE_UP]);
    be->ops->gated_forward(be, rows, c->config->d_ff, c->config->gate, a->gate, a->up, a->act);
}

/* From act to `out`, without the residual stream in a->mid added. */
static void forward_down(struct train *t, int32_t layer, int32_t rows, struct rows out)
{
    const struct compute *c = &t->compute;
    struct activations *a = train_layer(t, layer);
    const bool post = c->config->post_norms;
    group_forward(c, layer, GROUP_DOWN, rows, a->act, post ? &a->down_out : &out, a->h[GROUP_DOWN]);
    if (post)
        c->be->ops->norm_forward(c->be, rows, c->config->d_model, c->config->norm_eps,
                                 c->placed->layers[layer].ffn_post_norm, a->down_out, no_rows, out, a->rstd_down);
}

/* Fills hidden (labels, d) and what the backward pass needs. */
static void forward(struct train *t)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = c->config;
    struct backend *be = c->be;
    const int32_t top = config->layer_count - 1;
    struct rows below = no_rows;
    be->ops->embed(be, t->rows, &c->placed->embedding, t->batch_arrays.ids, model_embedding_scale(config),
                   train_layer(t, 0)->x);
    for (int32_t layer = 0; layer <= top; layer++) {
        const int32_t rows = layer == top ? t->inner_rows : t->rows;
        const struct rows residual = train_forward_attention(t, layer, below);
        train_forward_gate(t, layer, rows, residual);
        forward_down(t, layer, rows, layer == top ? t->last : train_layer(t, layer + 1)->x);
        below = train_layer(t, layer)->mid;
    }
    be->ops->norm_forward(be, t->inner_rows, config->d_model, config->norm_eps, c->placed->output_norm, t->last, below,
                          t->hidden, t->rstd_final);
}

static void head(struct train *t, struct rows dhidden)
{
    struct backend *be = t->compute.be;
    const struct placed_labels labels = {t->inner_rows, t->batch_arrays.targets, t->batch_arrays.weights};
    be->ops->cross_entropy(be, &t->compute.placed->head, &labels, t->hidden, t->losses_dev, dhidden);
}

/* --- runs -------------------------------------------------------------------------------------------------------- */

static void check_batch(const struct train *t, const struct lora *lora, const struct batch *b)
{
    assert(b->tokens <= t->options.tokens_max && b->examples <= t->options.examples_max);
    for (int32_t i = 0; i < b->tokens; i++)
        assert(b->ids[i] >= 0 && b->ids[i] < t->compute.config->vocabulary);
    for (int32_t e = 0; e < b->examples; e++)
        assert(b->offsets[e + 1] - b->offsets[e] <= t->options.example_tokens_max);
    if (!lora)
        return;
    const struct lora_config *have = &lora->config, *want = &t->lora_config;
    assert(have->mode == want->mode || (t->options.alternating && have->mode != LORA_JOINT));
    assert(have->rank == want->rank && have->targets == want->targets && have->layer_first == want->layer_first &&
           have->layer_count == want->layer_count);
    assert(t->compute.be->host_memory || lora->backend);
    (void)have;
    (void)want;
}

/* n rows, padded to one of a few sizes. */
static int32_t bucket(const struct train *t, int32_t n)
{
    const struct backend *be = t->compute.be;
    const int32_t most = (int32_t)padded(t), step = be->row_multiple > 1 ? backend_rows(be, most / ROW_BUCKETS + 1) : 1;
    const int32_t up = (n + step - 1) / step * step;
    return up < most ? up : most;
}

/* Brings the batch to the device, padded: padding rows hold token 0, no label and weight 0. */
static void stage(struct train *t, const struct batch *b)
{
    struct backend *be = t->compute.be;
    struct staged *h = &t->host_batch, *d = &t->batch_arrays;
    const size_t n = padded(t);
    t->rows = bucket(t, b->tokens);
    t->inner_rows = bucket(t, b->labels);
    memset(h->ids, 0, n * sizeof(int32_t));
    memset(h->positions, 0, n * sizeof(int32_t));
    memset(h->row_label, 0xff, 2 * n * sizeof(int32_t)); /* −1, label_rows too */
    memset(h->targets, 0, 2 * n * sizeof(int32_t));      /* weights too */
    memcpy(h->ids, b->ids, (size_t)b->tokens * sizeof(int32_t));
    memcpy(h->positions, b->positions, (size_t)b->tokens * sizeof(int32_t));
    memcpy(h->targets, b->label_targets, (size_t)b->labels * sizeof(int32_t));
    memcpy(h->weights, b->label_weights, (size_t)b->labels * sizeof(float));
    for (int32_t i = 0; i < b->labels; i++) {
        h->label_rows[i] = b->label_rows[i];
        h->row_label[b->label_rows[i]] = i;
    }
    be->ops->upload(be, d->ids, h->ids, 6 * n * sizeof(int32_t));
    be->ops->segments_set(be, &t->tokens, b->examples, b->offsets);
    be->ops->segments_set(be, &t->labels, b->examples, b->label_offsets);
}

static void record_step(void *ctx)
{
    struct train *t = ctx;
    load_lora(&t->compute);
    forward(t);
    head(t, t->dxn);
    train_backward(t);
}

static void record_evaluation(void *ctx)
{
    struct train *t = ctx;
    if (t->compute.lora)
        load_lora(&t->compute);
    forward(t);
    head(t, no_rows);
}

static void run(struct train *t, const struct lora *lora, const struct batch *b, void (*record)(void *ctx))
{
    struct backend *be = t->compute.be;
    const size_t offsets = ((size_t)b->examples + 1) * sizeof *b->label_offsets;
    memset(t->losses, 0, (size_t)b->examples * sizeof *t->losses);
    t->scored = b->labels;
    t->label_offsets_count = b->examples;
    memcpy(t->label_offsets, b->label_offsets, offsets);
    if (b->labels == 0)
        return;
    t->compute.lora = lora;
    stage(t, b);
    uint32_t scale = 0;
    if (lora)
        memcpy(&scale, &lora->scale, sizeof scale);
    const uint64_t key[4] = {
        (uint64_t)t->rows << 32 | (uint64_t)t->inner_rows, (uint64_t)scale << 32 | (record == record_step ? 1 : 2),
        lora ? (uint64_t)(uintptr_t)lora->trained : 0, lora ? (uint64_t)(uintptr_t)lora->frozen : 0};
    be->ops->run_recorded(be, t->graphs, key, record, t);
}

void train_run(struct train *train, const struct lora *lora, const struct batch *batch)
{
    struct backend *be = train->compute.be;
    const size_t gradients = train->options.per_example ? (size_t)batch->examples : 1;
    assert(lora);
    check_batch(train, lora, batch);
    if (batch->labels == 0) /* the pass writes every value of every example's gradient, but there is none then */
        be->ops->zero(be, train->gradients, gradients * train->gradient_stride * sizeof *train->gradients);
    run(train, lora, batch, record_step);
}

void train_evaluate(struct train *train, const struct lora *lora, const struct batch *batch)
{
    check_batch(train, lora, batch);
    run(train, lora, batch, record_evaluation);
}

/* Fetches the label losses of the last run and means them by example. */
static void fetch_losses(struct train *t)
{
    struct backend *be = t->compute.be;
    be->ops->download(be, t->label_losses, t->losses_dev, (size_t)t->scored * sizeof *t->label_losses);
    t->scored = 0;
    for (int32_t e = 0; e < t->label_offsets_count; e++) {
        const int32_t first = t->label_offsets[e], end = t->label_offsets[e + 1];
        double sum = 0;
        for (int32_t i = first; i < end; i++)
            sum += t->label_losses[i];
        t->losses[e] = end > first ? sum / (end - first) : 0;
    }
}

double train_loss(struct train *train, int32_t example)
{
    assert(example >= 0 && example < train->options.examples_max);
    if (train->scored > 0)
        fetch_losses(train);
    return train->losses[example];
}

float *train_gradient(struct train *train, int32_t example)
{
    assert(example >= 0 && example < (train->options.per_example ? train->options.examples_max : 1));
    return train->gradients + (size_t)example * train->gradient_stride;
}

size_t train_gradient_stride(const struct train *train)
{
    return train->gradient_stride;
}

void train_wipe(struct train *train)
{
    struct backend *be = train->compute.be;
    const size_t gradients = train->options.per_example ? (size_t)train->options.examples_max : 1;
    be->ops->zero(be, train->gradients, gradients * train->gradient_stride * sizeof *train->gradients);
    be->ops->zero(be, train->batch_arrays.ids, 6 * padded(train) * sizeof(int32_t));
    memset(train->host_batch.ids, 0, 6 * padded(train) * sizeof(int32_t));
}
