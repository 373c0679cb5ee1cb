#include "model/layer.h"

#include <math.h>

int32_t group_rank(const struct lora *lora, int32_t layer, enum group group)
{
    int32_t adapted = 0;
    if (!lora)
        return 0;
    for (int i = 0; i < group_size(group); i++)
        adapted += lora_adapts(lora, layer, (enum lora_target)(group_first(group) + i));
    return adapted * lora->config.rank;
}

static const struct tensor *weight(const struct model *model, int32_t layer, enum lora_target target)
{
    const struct model_layer *l = &model->layers[layer];
    const struct tensor *const all[LORA_TARGET_COUNT] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    return all[target];
}

/* The stacked A of the group's adapted targets: their first one's. */
static const float *group_a(const struct lora *lora, int32_t layer, enum group group)
{
    for (int i = 0; i < group_size(group); i++) {
        const float *a = lora_a(lora, layer, (enum lora_target)(group_first(group) + i));
        if (a)
            return a;
    }
    return NULL;
}

void group_forward(const struct compute *c, int32_t layer, enum group group, int32_t m, const float *x,
                   float *const y[], float *h)
{
    const int32_t r = group_rank(c->lora, layer, group);
    const enum lora_target first = group_first(group);
    if (r > 0)
        c->ops->lora_down(&c->run, m, weight(c->model, layer, first)->in, r, group_a(c->lora, layer, group), x, h);
    const float *column = h;
    for (int i = 0; i < group_size(group); i++) {
        const enum lora_target target = (enum lora_target)(first + i);
        const struct tensor *w = weight(c->model, layer, target);
        if (c->decode && m <= KERNEL_DECODE_ROWS)
            c->ops->linear_decode(&c->run, m, w, NULL, x, y[i]);
        else
            c->ops->linear_forward(&c->run, m, w, NULL, x, y[i], false);
        if (r == 0 || !lora_adapts(c->lora, layer, target))
            continue;
        const int32_t rank = c->lora->config.rank;
        c->ops->lora_up(&c->run, m, w->out, rank, c->lora->scale, lora_b(c->lora, layer, target), column, r, y[i]);
        column += rank;
    }
}

void group_backward(const struct compute *c, int32_t layer, enum group group, int32_t m, const float *const dy[],
                    float *dh, bool with_dh, float *dx)
{
    const int32_t r = group_rank(c->lora, layer, group);
    const enum lora_target first = group_first(group);
    float *column = dh;
    for (int i = 0; i < group_size(group); i++) {
        const enum lora_target target = (enum lora_target)(first + i);
        const struct tensor *w = weight(c->model, layer, target);
        if (dx)
            c->ops->linear_backward(&c->run, m, w, dy[i], dx, i > 0);
        if (r == 0 || !(dx || with_dh) || !lora_adapts(c->lora, layer, target))
            continue;
        const int32_t rank = c->lora->config.rank;
        c->ops->lora_up_backward(&c->run, m, w->out, rank, c->lora->scale, lora_b(c->lora, layer, target), dy[i],
                                 column, r);
        column += rank;
    }
    if (dx && r > 0)
        c->ops->lora_down_backward(&c->run, m, weight(c->model, layer, first)->in, r, group_a(c->lora, layer, group),
                                   dh, dx);
}

void group_gradient(const struct compute *c, const struct kernel_run *run, int32_t layer, enum group group, int32_t t0,
                    int32_t t1, const float *const dy[], const float *h, const float *dh, const float *x,
                    float *gradient)
{
    const int32_t r = group_rank(c->lora, layer, group), rank = c->lora->config.rank;
    int32_t column = 0;
    for (int i = 0; i < group_size(group); i++) {
        const enum lora_target target = (enum lora_target)(group_first(group) + i);
        if (!lora_adapts(c->lora, layer, target))
            continue;
        const struct lora_entry *e = &c->lora->entries[c->lora->index[layer][target]];
        c->ops->lora_grad_b(run, t0, t1, e->out, rank, c->lora->scale, dy[i], h + column, r, gradient + e->b_offset);
        if (c->lora->config.mode == LORA_JOINT)
            c->ops->lora_grad_a(run, t0, t1, e->in, rank, dh + column, r, x, gradient + e->a_offset);
        column += rank;
    }
}

void layer_rope(const struct compute *c, int32_t m, const int32_t *positions, bool inverse, float *q, float *k)
{
    const struct model_config *config = &c->model->config;
    const int32_t size = config->head_size;
    c->ops->rope(&c->run, m, config->head_count, size, size, config->rope_order, inverse, c->rope, positions, q);
    c->ops->rope(&c->run, m, config->kv_head_count, size, size, config->rope_order, inverse, c->rope, positions, k);
}

struct attention_shape layer_attention_shape(const struct model_config *config)
{
    return (struct attention_shape){
        .heads = config->head_count,
        .kv_heads = config->kv_head_count,
        .head_size = config->head_size,
        .window = 0,
        .scale = (float)(1 / sqrt((double)config->head_size)),
    };
}

size_t layer_linear_scratch(const struct model_config *config, int threads, int32_t m, int32_t rank)
{
    const int32_t heads = config->head_count * config->head_size;
    int32_t widest = config->d_ff > config->d_model ? config->d_ff : config->d_model;
    if (heads > widest)
        widest = heads;
    if (GROUP_TARGETS_MAX * rank > widest)
        widest = GROUP_TARGETS_MAX * rank;
    return kernels_linear_scratch(threads, m, widest, widest);
}
