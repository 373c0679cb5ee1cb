#include "model/layer.h"

#include <math.h>
#include <stdlib.h>

int32_t group_rank(const struct lora *lora, int32_t layer, enum group group)
{
    int32_t adapted = 0;
    if (!lora)
        return 0;
    for (int i = 0; i < group_size(group); i++)
        adapted += lora_adapts(lora, layer, (enum lora_target)(group_first(group) + i));
    return adapted * lora->config.rank;
}

/* The group's factors; NULL if none of it is adapted. */
static const struct group_lora *group_factors(const struct lora *lora, int32_t layer, enum group group,
                                              struct group_lora *to)
{
    if (group_rank(lora, layer, group) == 0)
        return NULL;
    *to = (struct group_lora){.rank = lora->config.rank, .scale = lora->scale};
    for (int i = 0; i < group_size(group); i++) {
        const enum lora_target target = (enum lora_target)(group_first(group) + i);
        to->a[i] = lora_a(lora, layer, target);
        to->b[i] = lora_b(lora, layer, target);
    }
    return to;
}

static const struct linear_group *group_of(const struct compute *c, int32_t layer, enum group group)
{
    return &c->placed->layers[layer].groups[group];
}

void group_forward(const struct compute *c, int32_t layer, enum group group, int32_t m, struct rows x,
                   const struct rows y[], struct rows h)
{
    struct group_lora memory;
    c->be->ops->group_forward(c->be, c->use, group_of(c, layer, group), group_factors(c->lora, layer, group, &memory),
                              m, x, y, h);
}

void group_down(const struct compute *c, int32_t layer, enum group group, int32_t m, struct rows x, struct rows h)
{
    struct group_lora memory;
    const struct group_lora *lora = group_factors(c->lora, layer, group, &memory);
    if (lora)
        c->be->ops->lora_down(c->be, group_of(c, layer, group), lora, m, x, h);
}

void group_backward(const struct compute *c, int32_t layer, enum group group, int32_t m, const struct rows dy[],
                    struct rows dh, bool with_dh, struct rows dx)
{
    struct group_lora memory;
    c->be->ops->group_backward(c->be, group_of(c, layer, group), group_factors(c->lora, layer, group, &memory), m, dy,
                               dh, with_dh, dx);
}

void group_gradients(const struct compute *c, int32_t layer, enum group group, const struct placed_segments *segments,
                     const struct rows dy[], struct rows h, struct rows dh, struct rows x, float *gradients,
                     size_t stride)
{
    struct group_lora memory;
    struct group_gradient where = {.with_a = c->lora->config.mode == LORA_JOINT};
    const struct group_lora *lora = group_factors(c->lora, layer, group, &memory);
    if (!lora)
        return;
    for (int i = 0; i < group_size(group); i++) {
        const enum lora_target target = (enum lora_target)(group_first(group) + i);
        if (!lora_adapts(c->lora, layer, target))
            continue;
        const struct lora_entry *e = &c->lora->entries[c->lora->index[layer][target]];
        where.a_offset[i] = e->a_offset;
        where.b_offset[i] = e->b_offset;
    }
    c->be->ops->group_gradients(c->be, group_of(c, layer, group), lora, segments, dy, h, dh, x, &where, gradients,
                                stride);
}

void load_lora(const struct compute *c)
{
    struct linear_group *groups[MODEL_LAYERS_MAX * GROUP_COUNT];
    struct group_lora loras[MODEL_LAYERS_MAX * GROUP_COUNT];
    int32_t count = 0;
    for (int32_t layer = 0; layer < c->config->layer_count; layer++) {
        for (int group = 0; group < GROUP_COUNT; group++) {
            /* The placement is shared: only its LoRA columns are written, and only by the one trainer. */
            groups[count] = (struct linear_group *)(uintptr_t)group_of(c, layer, (enum group)group);
            loras[count] = (struct group_lora){0};
            group_factors(c->lora, layer, (enum group)group, &loras[count++]);
        }
    }
    c->be->ops->lora_load(c->be, count, groups, loras);
}

void layer_rope(const struct compute *c, int32_t m, const int32_t *positions, bool inverse, struct rows q,
                struct rows k)
{
    const int32_t size = c->config->head_size;
    c->be->ops->rope(c->be, m, c->config->head_count, size, size, c->config->rope_order, inverse, c->rope, positions,
                     q);
    c->be->ops->rope(c->be, m, c->config->kv_head_count, size, size, c->config->rope_order, inverse, c->rope, positions,
                     k);
}

int place_rope_table(struct backend *be, const struct model *model, int32_t positions, float *table, struct error *err)
{
    const struct model_config *m = &model->config;
    const size_t count = (size_t)positions * (size_t)m->head_size;
    float *host = malloc(count * sizeof *host);
    if (!host)
        return error_set(err, ERR_RESOURCES, "no memory for a table of %d positions", positions);
    kernels_rope_table(positions, m->head_size, m->rope_base, m->rope_scale, model->rope_freqs.data, host);
    be->ops->upload(be, table, host, count * sizeof *host);
    free(host);
    return 0;
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

int32_t layer_width_max(const struct model_config *config, int32_t ranks)
{
    const int32_t heads = config->head_count * config->head_size;
    int32_t widest = config->d_ff > config->d_model ? config->d_ff : config->d_model;
    if (heads > widest)
        widest = heads;
    return ranks > widest ? ranks : widest;
}
