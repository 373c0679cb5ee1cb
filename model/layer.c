#include "model/layer.h"

#include <stdlib.h>

int32_t group_rank(const struct lora *lora, int32_t layer, enum group group)
{
    static const uint8_t first[GROUP_COUNT + 1] = {LORA_Q, LORA_O, LORA_GATE, LORA_DOWN, LORA_TARGET_COUNT};
    int32_t adapted = 0;
    if (!lora)
        return 0;
    for (int target = first[group]; target < first[group + 1]; target++)
        adapted += lora_adapts(lora, layer, (enum lora_target)target);
    return adapted * lora->config.rank;
}

/* The group's factors; NULL if none of it is adapted. */
static const struct group_lora *group_factors(const struct compute *c, int32_t layer, enum group group,
                                              struct group_lora *to)
{
    const struct lora *lora = c->lora;
    if (group_rank(lora, layer, group) == 0)
        return NULL;
    *to = (struct group_lora){.rank = lora->config.rank, .scale = lora->scale};
    for (int i = 0; i < group_size(c->config, group); i++) {
        const enum lora_target target = (enum lora_target)(group_first(c->config, group) + i);
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
    c->be->ops->group_forward(c->be, c->use, group_of(c, layer, group), group_factors(c, layer, group, &memory), m, x,
                              y, h);
}

void group_down(const struct compute *c, int32_t layer, enum group group, int32_t m, struct rows x, struct rows h)
{
    struct group_lora memory;
    const struct group_lora *lora = group_factors(c, layer, group, &memory);
    if (lora)
        c->be->ops->lora_down(c->be, group_of(c, layer, group), lora, m, x, h);
}

void group_backward(const struct compute *c, int32_t layer, enum group group, int32_t m, const struct rows dy[],
                    struct rows dh, bool with_dh, struct rows dx)
{
    struct group_lora memory;
    c->be->ops->group_backward(c->be, group_of(c, layer, group), group_factors(c, layer, group, &memory), m, dy, dh,
                               with_dh, dx);
}

void group_gradients(const struct compute *c, int32_t layer, enum group group, const struct placed_segments *segments,
                     const struct rows dy[], struct rows h, struct rows dh, struct rows x, float *gradients,
                     size_t stride)
{
    struct group_lora memory;
    const enum lora_mode mode = c->lora->config.mode;
    struct group_gradient where = {.with_a = mode != LORA_FFA, .with_b = mode != LORA_FFB};
    const struct group_lora *lora = group_factors(c, layer, group, &memory);
    if (!lora)
        return;
    for (int i = 0; i < group_size(c->config, group); i++) {
        const enum lora_target target = (enum lora_target)(group_first(c->config, group) + i);
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
            group_factors(c, layer, (enum group)group, &loras[count++]);
        }
    }
    c->be->ops->lora_load(c->be, count, groups, loras);
}

void layer_rope(const struct compute *c, int32_t layer, int32_t m, const int32_t *positions, bool inverse,
                struct rows q, struct rows k)
{
    const struct model_config *config = c->config;
    const float *table = model_layer_slides(config, layer) ? c->rope_sliding : c->rope;
    const int32_t size = config->head_size, rotated = model_rotated(config);
    c->be->ops->rope(c->be, m, config->head_count, size, rotated, config->rope_order, inverse, table, positions, q);
    c->be->ops->rope(c->be, m, config->kv_head_count, size, rotated, config->rope_order, inverse, table, positions, k);
}

static bool two_tables(const struct model_config *config)
{
    return config->window > 0 && config->rope_base_sliding > 0;
}

size_t rope_table_floats(const struct model_config *config, int32_t positions)
{
    return (size_t)positions * (size_t)model_rotated(config) * (two_tables(config) ? 2 : 1);
}

int place_rope_table(struct compute *c, const struct model *model, int32_t positions, float *table, struct error *err)
{
    const struct model_config *m = &model->config;
    const size_t count = rope_table_floats(m, positions), second = two_tables(m) ? count / 2 : 0;
    float *host = malloc(count * sizeof *host);
    if (!host)
        return error_set(err, ERR_RESOURCES, "no memory for a table of %d positions", positions);
    kernels_rope_table(positions, model_rotated(m), m->rope_base, m->rope_scale, model->rope_freqs.data, host);
    if (second > 0)
        kernels_rope_table(positions, model_rotated(m), m->rope_base_sliding, 1, NULL, host + second);
    c->be->ops->upload(c->be, table, host, count * sizeof *host);
    c->rope = table;
    c->rope_sliding = table + second;
    free(host);
    return 0;
}

struct attention_shape model_attention_shape(const struct model_config *config)
{
    return (struct attention_shape){
        .heads = config->head_count,
        .kv_heads = config->kv_head_count,
        .head_size = config->head_size,
        .window = 0,
        .scale = (float)model_attention_scale(config),
    };
}

struct attention_shape layer_attention_shape(const struct model_config *config, int32_t layer)
{
    struct attention_shape shape = model_attention_shape(config);
    shape.window = model_layer_slides(config, layer) ? config->window : 0;
    return shape;
}

int32_t layer_width_max(const struct model_config *config, int32_t ranks)
{
    const int32_t heads = config->head_count * config->head_size;
    int32_t widest = gate_up_width(config) > config->d_model ? gate_up_width(config) : config->d_model;
    if (heads > widest)
        widest = heads;
    return ranks > widest ? ranks : widest;
}
