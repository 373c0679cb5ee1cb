#include "model/train_internal.h"

static const struct rows no_rows = {NULL, 0};

/* Whether the A gradients of this group want the group's input. */
static bool wants_input(const struct train *t, int32_t layer, enum group group)
{
    return t->compute.lora->config.mode != LORA_FFA && group_rank(t->compute.lora, layer, group) > 0;
}

static bool is_lowest(const struct train *t, int32_t layer, enum group group)
{
    return layer == t->lowest && group == t->lowest_group;
}

/* Where dh goes: behind the last of dy's columns where fused, of width `columns` in all. */
static struct rows dh_rows(const struct train *t, int32_t layer, enum group group, const struct rows dy[],
                           int32_t last_width)
{
    const struct backend *be = t->compute.be;
    const int32_t rank = group_rank(t->compute.lora, layer, group);
    if (be->fused)
        return rows_from(be, dy[group_size(t->compute.config, group) - 1], last_width);
    return (struct rows){t->dh.at, rank};
}

/* One group's backward pass: the gradients of its factors, and dx unless at NULL. rows and segments are the inner ones
 * in the top layer's later groups. */
static void backward_group(struct train *t, int32_t layer, enum group group, int32_t rows,
                           const struct placed_segments *segments, const struct rows dy[], int32_t last_width,
                           struct rows x, struct rows dx)
{
    const struct compute *c = &t->compute;
    const bool with_a = c->lora->config.mode != LORA_FFA;
    const struct rows dh = dh_rows(t, layer, group, dy, last_width);
    group_backward(c, layer, group, rows, dy, dh, with_a, dx);
    if (group_rank(c->lora, layer, group) > 0)
        group_gradients(c, layer, group, segments, dy, train_layer(t, layer)->h[group], dh, x, t->gradients,
                        t->options.per_example ? t->gradient_stride : 0);
}

/* What levels 1 and 2 did not keep is computed again, with the same operations and so to the same bits. */
static void recompute(struct train *t, int32_t layer, int32_t rows)
{
    struct activations *a = train_layer(t, layer);
    if (t->level == 0)
        return;
    const struct rows residual = t->level > 1 ? train_forward_attention(t, layer, no_rows) : no_rows;
    train_forward_gate(t, layer, rows, residual);
    group_down(&t->compute, layer, GROUP_DOWN, rows, a->act, a->h[GROUP_DOWN]);
}

/* The gradient at a block's output before its norm, given the one behind it; dx itself where there is no norm. */
static struct rows behind_norm(struct train *t, int32_t rows, const float *gain, struct rows x, const float *rstd,
                               struct rows dx)
{
    const struct compute *c = &t->compute;
    if (!c->config->post_norms)
        return dx;
    c->be->ops->norm_backward(c->be, rows, c->config->d_model, gain, x, rstd, dx, t->dblock, false);
    return t->dblock;
}

/* The feed-forward block: dx (rows, d) becomes the gradient at a->mid. False if nothing below is adapted. */
static bool backward_feed(struct train *t, int32_t layer, int32_t rows, const struct placed_segments *segments,
                          struct rows dx)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = c->config;
    struct backend *be = c->be;
    const struct placed_layer *weights = &c->placed->layers[layer];
    const bool have_inputs = t->keep_inputs || t->level > 0;
    struct activations *a = train_layer(t, layer);
    bool stop = is_lowest(t, layer, GROUP_DOWN);
    const struct rows dout = behind_norm(t, rows, weights->ffn_post_norm, a->down_out, a->rstd_down, dx);
    if (!have_inputs && wants_input(t, layer, GROUP_DOWN))
        be->ops->gated_forward(be, rows, config->d_ff, config->gate, a->gate, a->up, a->act);
    backward_group(t, layer, GROUP_DOWN, rows, segments, &dout, config->d_model, a->act, stop ? no_rows : t->dact);
    if (stop)
        return false;
    be->ops->gated_backward(be, rows, config->d_ff, config->gate, a->gate, a->up, t->dact);
    stop = is_lowest(t, layer, GROUP_GATE_UP);
    if (!have_inputs && wants_input(t, layer, GROUP_GATE_UP))
        be->ops->norm_forward(be, rows, config->d_model, config->norm_eps, weights->ffn_norm, a->mid, no_rows, a->xn2,
                              NULL);
    backward_group(t, layer, GROUP_GATE_UP, rows, segments, train_gate_up(a).rows, gate_up_width(config), a->xn2,
                   stop ? no_rows : t->dxn);
    if (stop)
        return false;
    be->ops->norm_backward(be, rows, config->d_model, weights->ffn_norm, a->mid, a->rstd2, t->dxn, dx, true);
    return true;
}

/* The attention block, from dx at a->mid (inner rows in the top layer) to t->dx at a->x. False if nothing below is
 * adapted. */
static bool backward_attention(struct train *t, int32_t layer, bool inner, int32_t rows,
                               const struct placed_segments *segments, struct rows dx)
{
    const struct compute *c = &t->compute;
    const struct model_config *config = c->config;
    struct backend *be = c->be;
    const struct placed_layer *weights = &c->placed->layers[layer];
    const struct attention_shape shape = layer_attention_shape(config, layer);
    const int32_t heads = shape.heads * shape.head_size, kv = shape.kv_heads * shape.head_size;
    struct activations *a = train_layer(t, layer);
    bool stop = is_lowest(t, layer, GROUP_O);
    const struct rows do_ = inner ? t->do_inner : t->do_;
    const struct rows dout = behind_norm(t, rows, weights->attn_post_norm, a->o_out, a->rstd_o, dx);
    backward_group(t, layer, GROUP_O, rows, segments, &dout, config->d_model, inner ? t->compact : a->o,
                   stop ? no_rows : do_);
    if (stop)
        return false;
    if (inner) { /* back to where the label rows stand; the other rows are zero */
        be->ops->gather(be, t->rows, heads, t->batch_arrays.row_label, t->do_inner, t->do_);
        be->ops->gather(be, t->rows, config->d_model, t->batch_arrays.row_label, dx, t->dx);
    }
    be->ops->attention_backward(be, &shape, &t->tokens, t->rows, a->q, a->k, a->v, a->o, a->lse, t->do_, t->dq, t->dk,
                                t->dv);
    layer_rope(c, layer, t->rows, t->batch_arrays.positions, true, t->dq, t->dk);
    if (config->qk_norm) {
        be->ops->head_norm_backward(be, t->rows, shape.heads, shape.head_size, weights->q_norm, a->q_raw, a->rstd_q,
                                    t->dq, t->dq);
        be->ops->head_norm_backward(be, t->rows, shape.kv_heads, shape.head_size, weights->k_norm, a->k_raw, a->rstd_k,
                                    t->dk, t->dk);
    }
    stop = layer == t->lowest;
    if (!t->keep_inputs && t->level < 2 && wants_input(t, layer, GROUP_QKV))
        be->ops->norm_forward(be, t->rows, config->d_model, config->norm_eps, weights->attn_norm, a->x, no_rows, a->xn1,
                              NULL);
    backward_group(t, layer, GROUP_QKV, t->rows, &t->tokens, (const struct rows[]){t->dq, t->dk, t->dv}, kv, a->xn1,
                   stop ? no_rows : t->dxn);
    if (stop)
        return false;
    be->ops->norm_backward(be, t->rows, config->d_model, weights->attn_norm, a->x, a->rstd1, t->dxn, t->dx, true);
    return true;
}

void train_backward(struct train *t)
{
    const struct compute *c = &t->compute;
    struct backend *be = c->be;
    const int32_t top = c->config->layer_count - 1;
    be->ops->norm_backward(be, t->inner_rows, c->config->d_model, c->placed->output_norm, t->last, t->rstd_final,
                           t->dxn, t->dx_inner, false);
    for (int32_t layer = top; layer >= t->lowest; layer--) {
        const bool inner = layer == top;
        const int32_t rows = inner ? t->inner_rows : t->rows;
        const struct placed_segments *segments = inner ? &t->labels : &t->tokens;
        const struct rows dx = inner ? t->dx_inner : t->dx;
        recompute(t, layer, rows);
        if (!backward_feed(t, layer, rows, segments, dx) || !backward_attention(t, layer, inner, rows, segments, dx))
            return;
    }
}
