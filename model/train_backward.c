#include "model/train_internal.h"

#include <string.h>

/* The gradients of one group in one layer, one pool item per example. */
struct gradient_job {
    struct train *train;
    int32_t layer;
    enum group group;
    const int32_t *offsets; /* rows of each example */
    const float *const *dy;
    const float *x; /* NULL in LORA_FFA mode */
};

static void example_gradient(void *ctx, int example, int thread)
{
    const struct gradient_job *job = ctx;
    struct train *t = job->train;
    const struct kernel_run run = {
        .pool = NULL,
        .scratch = t->gradient_scratch + (size_t)thread * t->gradient_scratch_bytes,
        .scratch_bytes = t->gradient_scratch_bytes,
        .precision = t->compute.run.precision,
    };
    if (job->offsets[example] < job->offsets[example + 1])
        group_gradient(&t->compute, &run, job->layer, job->group, job->offsets[example], job->offsets[example + 1],
                       job->dy, train_layer(t, job->layer)->h[job->group], t->dh, job->x, train_gradient(t, example));
}

/* One group's backward pass: the gradients of its factors, and dx unless NULL. rows and offsets are the inner ones in
 * the top layer's later groups. */
static void backward_group(struct train *t, int32_t layer, enum group group, int32_t rows, const int32_t *offsets,
                           const float *const dy[], const float *x, float *dx)
{
    const struct compute *c = &t->compute;
    const bool joint = c->lora->config.mode == LORA_JOINT;
    group_backward(c, layer, group, rows, dy, t->dh, joint, dx);
    if (group_rank(c->lora, layer, group) == 0)
        return;
    if (!t->options.per_example) {
        group_gradient(c, &c->run, layer, group, 0, rows, dy, train_layer(t, layer)->h[group], t->dh, x, t->gradients);
        return;
    }
    struct gradient_job job = {t, layer, group, offsets, dy, x};
    pool_run(t->options.pool, t->batch->examples, example_gradient, &job);
}

/* Whether the A gradients of this group want the group's input, which is recomputed rather than kept. */
static bool wants_input(const struct train *t, int32_t layer, enum group group)
{
    return t->compute.lora->config.mode == LORA_JOINT && group_rank(t->compute.lora, layer, group) > 0;
}

static bool is_lowest(const struct train *t, int32_t layer, enum group group)
{
    return layer == t->lowest && group == t->lowest_group;
}

static void normalise_again(struct train *t, int32_t rows, const struct tensor *gain, float *x)
{
    const struct compute *c = &t->compute;
    c->ops->rmsnorm_forward(&c->run, rows, c->model->config.d_model, c->model->config.norm_eps, model_gain(gain), x,
                            NULL, t->xn, NULL);
}

/* The feed-forward block: dx (rows, d) becomes the gradient at a->mid. False if nothing below is adapted. */
static bool backward_feed(struct train *t, int32_t layer, int32_t rows, const int32_t *offsets)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = &c->model->config;
    const struct model_layer *weights = &c->model->layers[layer];
    struct activations *a = train_layer(t, layer);
    bool stop = is_lowest(t, layer, GROUP_DOWN);
    if (wants_input(t, layer, GROUP_DOWN))
        c->ops->gated_forward(&c->run, rows, config->d_ff, GATE_SILU, a->gate, a->up, config->d_ff, t->act);
    backward_group(t, layer, GROUP_DOWN, rows, offsets, (const float *const[]){t->dx}, t->act, stop ? NULL : t->dact);
    if (stop)
        return false;
    c->ops->gated_backward(&c->run, rows, config->d_ff, GATE_SILU, a->gate, a->up, config->d_ff, t->dact);
    stop = is_lowest(t, layer, GROUP_GATE_UP);
    if (wants_input(t, layer, GROUP_GATE_UP))
        normalise_again(t, rows, &weights->ffn_norm, a->mid);
    backward_group(t, layer, GROUP_GATE_UP, rows, offsets, (const float *const[]){a->gate, a->up}, t->xn,
                   stop ? NULL : t->dxn);
    if (stop)
        return false;
    c->ops->rmsnorm_backward(&c->run, rows, config->d_model, model_gain(&weights->ffn_norm), a->mid, a->rstd2, t->dxn,
                             t->dx, true);
    return true;
}

/* Spreads `count` rows back to where they were gathered from, in place: rows ascend, so going down none is overwritten
 * before it is moved. The other rows become zero. */
static void scatter_rows(const int32_t *rows, int32_t count, int32_t total, int32_t width, float *x)
{
    const size_t n = (size_t)width, bytes = n * sizeof *x;
    int32_t from = count - 1;
    for (int32_t to = total - 1; to >= 0; to--) {
        if (from >= 0 && rows[from] == to) {
            if (from != to)
                memcpy(x + (size_t)to * n, x + (size_t)from * n, bytes);
            from--;
        } else {
            memset(x + (size_t)to * n, 0, bytes);
        }
    }
}

/* The attention block, from dx at a->mid to dx at a->x. False if nothing below is adapted. */
static bool backward_attention(struct train *t, int32_t layer, bool inner, int32_t rows, const int32_t *offsets)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = &c->model->config;
    const struct model_layer *weights = &c->model->layers[layer];
    const struct batch *b = t->batch;
    const struct attention_shape shape = layer_attention_shape(config);
    const struct segments segments = {b->examples, b->offsets};
    struct activations *a = train_layer(t, layer);
    bool stop = is_lowest(t, layer, GROUP_O);
    backward_group(t, layer, GROUP_O, rows, offsets, (const float *const[]){t->dx}, inner ? t->compact : a->o,
                   stop ? NULL : t->do_);
    if (stop)
        return false;
    if (inner) {
        scatter_rows(b->label_rows, b->labels, b->tokens, shape.heads * shape.head_size, t->do_);
        scatter_rows(b->label_rows, b->labels, b->tokens, config->d_model, t->dx);
    }
    c->ops->attention_backward(&c->run, &shape, &segments, a->q, a->k, a->v, a->o, a->lse, t->do_, t->dq, t->dk, t->dv);
    layer_rope(c, b->tokens, b->positions, true, t->dq, t->dk);
    stop = layer == t->lowest;
    if (wants_input(t, layer, GROUP_QKV))
        normalise_again(t, b->tokens, &weights->attn_norm, a->x);
    backward_group(t, layer, GROUP_QKV, b->tokens, b->offsets, (const float *const[]){t->dq, t->dk, t->dv}, t->xn,
                   stop ? NULL : t->dxn);
    if (stop)
        return false;
    c->ops->rmsnorm_backward(&c->run, b->tokens, config->d_model, model_gain(&weights->attn_norm), a->x, a->rstd1,
                             t->dxn, t->dx, true);
    return true;
}

void train_backward(struct train *t)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = &c->model->config;
    const struct batch *b = t->batch;
    const int32_t top = config->layer_count - 1;
    c->ops->rmsnorm_backward(&c->run, b->labels, config->d_model, model_gain(&c->model->output_norm), t->last,
                             t->rstd_final, t->dxn, t->dx, false);
    for (int32_t layer = top; layer >= t->lowest; layer--) {
        const bool inner = layer == top;
        const int32_t rows = inner ? b->labels : b->tokens;
        const int32_t *offsets = inner ? b->label_offsets : b->offsets;
        if (!backward_feed(t, layer, rows, offsets) || !backward_attention(t, layer, inner, rows, offsets))
            return;
    }
}
