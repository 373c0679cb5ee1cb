#include "model/train.h"

#include "base/checked.h"
#include "model/train_internal.h"

#include <stdlib.h>
#include <string.h>

#define TRAIN_TOKENS_MAX (1 << 18)

/* Hands out arena memory, or only counts it while there is no arena yet. */
struct carver {
    struct arena *arena; /* NULL: count */
    size_t bytes;
    bool overflow;
};

static void *carve(struct carver *c, size_t rows, size_t row_bytes)
{
    size_t bytes;
    if (!checked_mul(rows, row_bytes, &bytes) || !checked_align(bytes, ARENA_ALIGNMENT, &bytes) ||
        !checked_add(c->bytes, bytes, &c->bytes)) {
        c->overflow = true;
        return NULL;
    }
    return c->arena ? arena_take(c->arena, bytes) : NULL;
}

static float *carve_floats(struct carver *c, size_t rows, int64_t width)
{
    return carve(c, rows, (size_t)width * sizeof(float));
}

static void carve_layer(struct train *t, struct carver *c, const struct lora *lora, int32_t layer)
{
    const struct model_config *m = &t->compute.model->config;
    const size_t rows = (size_t)t->options.tokens_max;
    const int32_t heads = m->head_count * m->head_size, kv = m->kv_head_count * m->head_size;
    struct activations a = {
        .x = carve_floats(c, rows, m->d_model),
        .rstd1 = carve_floats(c, rows, 1),
        .q = carve_floats(c, rows, heads),
        .k = carve_floats(c, rows, kv),
        .v = carve_floats(c, rows, kv),
        .o = carve_floats(c, rows, heads),
        .lse = carve_floats(c, rows, m->head_count),
        .mid = carve_floats(c, rows, m->d_model),
        .rstd2 = carve_floats(c, rows, 1),
        .gate = carve_floats(c, rows, m->d_ff),
        .up = carve_floats(c, rows, m->d_ff),
    };
    for (int group = 0; layer >= t->lowest && group < GROUP_COUNT; group++)
        a.h[group] = carve_floats(c, rows, group_rank(lora, layer, (enum group)group));
    if (c->arena)
        *train_layer(t, layer) = a;
}

/* Hands out, or counts, all memory of a step. */
static void carve_all(struct train *t, struct carver *c, const struct lora *lora)
{
    const struct model_config *m = &t->compute.model->config;
    const struct train_options *o = &t->options;
    const size_t rows = (size_t)o->tokens_max;
    const int32_t heads = m->head_count * m->head_size, kv = m->kv_head_count * m->head_size;
    const int threads = pool_threads(o->pool);
    t->layers = carve(c, (size_t)(m->layer_count - t->lowest + 1), sizeof *t->layers);
    t->rope_table = carve_floats(c, (size_t)o->example_tokens_max, m->head_size);
    for (int32_t layer = t->lowest > 0 ? t->lowest - 1 : 0; layer < m->layer_count; layer++)
        carve_layer(t, c, lora, layer);
    t->xn = carve_floats(c, rows, m->d_model);
    t->act = carve_floats(c, rows, m->d_ff);
    t->hidden = carve_floats(c, rows, m->d_model);
    t->compact = carve_floats(c, rows, heads);
    t->compact_x = carve_floats(c, rows, m->d_model);
    t->rstd_final = carve_floats(c, rows, 1);
    t->last = carve_floats(c, rows, m->d_model);
    t->dx = carve_floats(c, rows, m->d_model);
    t->dxn = carve_floats(c, rows, m->d_model);
    t->dact = carve_floats(c, rows, m->d_ff);
    t->dq = carve_floats(c, rows, heads);
    t->dk = carve_floats(c, rows, kv);
    t->dv = carve_floats(c, rows, kv);
    t->do_ = carve_floats(c, rows, heads);
    t->dh = carve_floats(c, rows, GROUP_TARGETS_MAX * (int64_t)lora->config.rank);
    t->label_losses = carve_floats(c, rows, 1);
    t->identity = carve(c, rows, sizeof *t->identity);
    t->losses = carve(c, (size_t)o->examples_max, sizeof *t->losses);
    t->gradients = carve_floats(c, o->per_example ? (size_t)o->examples_max : 1, (int64_t)t->gradient_stride);
    t->gradient_scratch = carve(c, (size_t)threads, t->gradient_scratch_bytes);
    t->compute.run.scratch = carve(c, 1, t->compute.run.scratch_bytes);
}

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

static void set_up(struct train *t, const struct train_options *options, const struct model *model,
                   const struct lora *lora)
{
    const struct model_config *m = &model->config;
    const struct attention_shape shape = layer_attention_shape(m);
    const int threads = pool_threads(options->pool);
    t->options = *options;
    t->compute = (struct compute){.ops = options->ops, .model = model};
    t->compute.run.pool = options->pool;
    t->compute.run.precision = options->precision;
    t->lora_config = lora->config;
    t->lowest = lora->config.layer_first;
    t->lowest_group = GROUP_QKV;
    while (group_rank(lora, t->lowest, t->lowest_group) == 0)
        t->lowest_group++;
    t->gradient_stride = arena_cost(lora->trained_count * sizeof(float)) / sizeof(float);
    t->gradient_scratch_bytes = arena_cost(layer_linear_scratch(m, 1, options->example_tokens_max, lora->config.rank));
    size_t scratch = layer_linear_scratch(m, threads, options->tokens_max, lora->config.rank);
    scratch = max_size(scratch, kernels_attention_scratch(threads, &shape, options->example_tokens_max, 0));
    scratch = max_size(scratch, kernels_head_scratch(threads, options->tokens_max, m->vocabulary, m->d_model));
    t->compute.run.scratch_bytes = scratch;
}

static int check_options(const struct train_options *o, const struct model_config *model, struct error *err)
{
    assert(o->ops);
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
    return 0;
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
    struct carver c = {0};
    carve_all(t, &c, lora);
    if (c.overflow || arena_init(&t->arena, c.bytes) < 0) {
        train_free(t);
        return error_set(err, ERR_RESOURCES, "training: no memory for %zu MB of activations; lower the batch's tokens",
                         c.bytes >> 20);
    }
    t->bytes = c.bytes;
    c = (struct carver){.arena = &t->arena};
    carve_all(t, &c, lora);
    for (int32_t i = 0; i < options->tokens_max; i++)
        t->identity[i] = i;
    kernels_rope_table(options->example_tokens_max, model->config.head_size, model->config.rope_base,
                       model->config.rope_scale, model->rope_freqs.data, t->rope_table);
    t->compute.rope = t->rope_table;
    *ret_train = t;
    return 0;
}

void train_free(struct train *train)
{
    if (!train)
        return;
    arena_release(&train->arena);
    free(train);
}

size_t train_memory_bytes(const struct train *train)
{
    return train->bytes;
}

/* --- forward ---------------------------------------------------------------------------------------------------- */

static void gather_rows(const int32_t *rows, int32_t count, int32_t width, const float *from, float *to)
{
    for (int32_t i = 0; i < count; i++)
        memcpy(to + (size_t)i * (size_t)width, from + (size_t)rows[i] * (size_t)width, (size_t)width * sizeof *to);
}

/* The attention block. `below` (M, d) is added to a->x first, unless NULL: a layer's feed-forward output and the
 * residual stream under it come together in the next layer's norm. Leaves the output projection, without the residual
 * added, in a->mid for the inner rows; returns the residual rows that are to be added to it. */
static const float *forward_attention(struct train *t, int32_t layer, const float *below)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = &c->model->config;
    const struct batch *b = t->batch;
    const struct attention_shape shape = layer_attention_shape(config);
    const struct segments segments = {b->examples, b->offsets};
    struct activations *a = train_layer(t, layer);
    const bool top = layer == config->layer_count - 1;
    c->ops->rmsnorm_forward(&c->run, b->tokens, config->d_model, config->norm_eps,
                            model_gain(&c->model->layers[layer].attn_norm), a->x, below, t->xn, a->rstd1);
    group_forward(c, layer, GROUP_QKV, b->tokens, t->xn, (float *const[]){a->q, a->k, a->v}, a->h[GROUP_QKV]);
    layer_rope(c, b->tokens, b->positions, false, a->q, a->k);
    c->ops->attention_forward(&c->run, &shape, &segments, a->q, a->k, a->v, a->o, a->lse);
    if (!top) {
        group_forward(c, layer, GROUP_O, b->tokens, a->o, (float *const[]){a->mid}, a->h[GROUP_O]);
        return a->x;
    }
    gather_rows(b->label_rows, b->labels, shape.heads * shape.head_size, a->o, t->compact);
    gather_rows(b->label_rows, b->labels, config->d_model, a->x, t->compact_x);
    group_forward(c, layer, GROUP_O, b->labels, t->compact, (float *const[]){a->mid}, a->h[GROUP_O]);
    return t->compact_x;
}

/* The feed-forward block of `rows` inner rows; out (rows, d) is its output without the residual (a->mid) added. */
static void forward_feed(struct train *t, int32_t layer, int32_t rows, const float *residual, float *out)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = &c->model->config;
    struct activations *a = train_layer(t, layer);
    c->ops->rmsnorm_forward(&c->run, rows, config->d_model, config->norm_eps,
                            model_gain(&c->model->layers[layer].ffn_norm), a->mid, residual, t->xn, a->rstd2);
    group_forward(c, layer, GROUP_GATE_UP, rows, t->xn, (float *const[]){a->gate, a->up}, a->h[GROUP_GATE_UP]);
    c->ops->gated_forward(&c->run, rows, config->d_ff, GATE_SILU, a->gate, a->up, config->d_ff, t->act);
    group_forward(c, layer, GROUP_DOWN, rows, t->act, (float *const[]){out}, a->h[GROUP_DOWN]);
}

/* Fills hidden (labels, d) and what the backward pass needs. */
static void forward(struct train *t)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = &c->model->config;
    const struct batch *b = t->batch;
    const int32_t top = config->layer_count - 1;
    const float *below = NULL;
    c->ops->embed(&c->run, b->tokens, &c->model->token_embd, b->ids, 1.0f, train_layer(t, 0)->x);
    for (int32_t layer = 0; layer <= top; layer++) {
        const float *residual = forward_attention(t, layer, below);
        float *out = layer == top ? t->last : train_layer(t, layer + 1)->x;
        forward_feed(t, layer, layer == top ? b->labels : b->tokens, residual, out);
        below = train_layer(t, layer)->mid;
    }
    c->ops->rmsnorm_forward(&c->run, b->labels, config->d_model, config->norm_eps, model_gain(&c->model->output_norm),
                            t->last, below, t->hidden, t->rstd_final);
}

static void head(struct train *t, float *dhidden)
{
    const struct compute *c = &t->compute;
    const struct batch *b = t->batch;
    const struct labels labels = {b->labels, t->identity, b->label_targets, b->label_weights};
    c->ops->cross_entropy(&c->run, model_head(c->model), &labels, t->hidden, t->label_losses, dhidden);
    for (int32_t e = 0; e < b->examples; e++) {
        const int32_t first = b->label_offsets[e], end = b->label_offsets[e + 1];
        double sum = 0;
        for (int32_t i = first; i < end; i++)
            sum += t->label_losses[i];
        t->losses[e] = end > first ? sum / (end - first) : 0;
    }
}

static void check_batch(const struct train *t, const struct lora *lora, const struct batch *b)
{
    assert(b->tokens <= t->options.tokens_max && b->examples <= t->options.examples_max);
    for (int32_t i = 0; i < b->tokens; i++)
        assert(b->ids[i] >= 0 && b->ids[i] < t->compute.model->config.vocabulary);
    for (int32_t e = 0; e < b->examples; e++)
        assert(b->offsets[e + 1] - b->offsets[e] <= t->options.example_tokens_max);
    if (!lora)
        return;
    const struct lora_config *have = &lora->config, *want = &t->lora_config;
    assert(have->mode == want->mode && have->rank == want->rank && have->targets == want->targets &&
           have->layer_first == want->layer_first && have->layer_count == want->layer_count);
    (void)have;
    (void)want;
}

void train_run(struct train *train, const struct lora *lora, const struct batch *batch)
{
    const size_t gradients = train->options.per_example ? (size_t)batch->examples : 1;
    assert(lora);
    check_batch(train, lora, batch);
    memset(train->gradients, 0, gradients * train->gradient_stride * sizeof *train->gradients);
    for (int32_t e = 0; e < batch->examples; e++)
        train->losses[e] = 0;
    if (batch->labels == 0)
        return;
    train->batch = batch;
    train->compute.lora = lora;
    forward(train);
    head(train, train->dxn);
    train_backward(train);
    train->batch = NULL;
}

void train_evaluate(struct train *train, const struct lora *lora, const struct batch *batch)
{
    check_batch(train, lora, batch);
    for (int32_t e = 0; e < batch->examples; e++)
        train->losses[e] = 0;
    if (batch->labels == 0)
        return;
    train->batch = batch;
    train->compute.lora = lora;
    forward(train);
    head(train, NULL);
    train->batch = NULL;
}

double train_loss(const struct train *train, int32_t example)
{
    assert(example >= 0 && example < train->options.examples_max);
    return train->losses[example];
}

float *train_gradient(struct train *train, int32_t example)
{
    assert(example >= 0 && example < (train->options.per_example ? train->options.examples_max : 1));
    return train->gradients + (size_t)example * train->gradient_stride;
}
