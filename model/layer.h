/*
 * Internal to model/: one layer's parts over a backend, shared by training and inference.
 *
 * A group is a run of targets that read the same input (model/placed.h). Where the backend is fused, a group's outputs
 * are the columns of one matrix and LoRA's h = x·Aᵀ lies in the columns behind x; group_outputs and lora_columns make
 * the views either way.
 */
#ifndef MODEL_LAYER_H
#define MODEL_LAYER_H

#include "model/placed.h"

struct compute {
    struct backend *be;
    const struct placed_model *placed;
    const struct model_config *config;
    const struct lora *lora;   /* of the backend's memory; NULL: none */
    const float *rope;         /* dev, of kernels_rope_table */
    const float *rope_sliding; /* of the layers that slide; the same one where they are rotated alike */
    enum group_use use;
};

#define GROUP_TARGETS_MAX BACKEND_GROUP_MAX

/* The group's targets are first .. first + size - 1. Where gate and up are one matrix, it is the target up. */
static inline enum lora_target group_first(const struct model_config *config, enum group group)
{
    static const uint8_t first[GROUP_COUNT] = {LORA_Q, LORA_O, LORA_GATE, LORA_DOWN};
    return group == GROUP_GATE_UP && config->fused_gate_up ? LORA_UP : (enum lora_target)first[group];
}

static inline int group_size(const struct model_config *config, enum group group)
{
    static const uint8_t size[GROUP_COUNT] = {3, 1, 2, 1};
    return group == GROUP_GATE_UP && config->fused_gate_up ? 1 : size[group];
}

/* Columns of the group's h in this layer: adapted targets × rank; 0 without LoRA. */
int32_t group_rank(const struct lora *lora, int32_t layer, enum group group);

/* The operations of backend.h on this layer's group with c->lora's factors. */
void group_forward(const struct compute *c, int32_t layer, enum group group, int32_t m, struct rows x,
                   const struct rows y[], struct rows h);
void group_down(const struct compute *c, int32_t layer, enum group group, int32_t m, struct rows x, struct rows h);
void group_backward(const struct compute *c, int32_t layer, enum group group, int32_t m, const struct rows dy[],
                    struct rows dh, bool with_dh, struct rows dx);
/* Into gradients + e·stride (trained_count) of each segment, or all into one where stride is 0. */
void group_gradients(const struct compute *c, int32_t layer, enum group group, const struct placed_segments *segments,
                     const struct rows dy[], struct rows h, struct rows dh, struct rows x, float *gradients,
                     size_t stride);
/* Hands the factors of all layers to the backend, for GROUP_TRAIN use. */
void load_lora(const struct compute *c);

/* The outputs of the group GATE_UP, given views of gate and up: one of both columns where they are one matrix. */
static inline int32_t gate_up_width(const struct model_config *config)
{
    return config->fused_gate_up ? 2 * config->d_ff : config->d_ff;
}

/* Rotates q (m, heads·head_size) and k (m, kv·head_size) in place. positions dev (m). */
void layer_rope(const struct compute *c, int32_t layer, int32_t m, const int32_t *positions, bool inverse,
                struct rows q, struct rows k);

/* kernels_rope_table of the model for so many positions: rope_table_floats of them into table (dev), which c->rope and
 * c->rope_sliding then point into. ERR_RESOURCES. */
size_t rope_table_floats(const struct model_config *config, int32_t positions);
int MUST_USE place_rope_table(struct compute *c, const struct model *model, int32_t positions, float *table,
                              struct error *err);

/* Of one layer; of all, without a window. */
struct attention_shape layer_attention_shape(const struct model_config *config, int32_t layer);
struct attention_shape model_attention_shape(const struct model_config *config);

/* Widest input or output of any linear, and of `ranks` stacked LoRA columns. */
int32_t layer_width_max(const struct model_config *config, int32_t ranks);

#endif
