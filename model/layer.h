/*
 * Internal to model/: the linears of one layer with their LoRA factors, shared by training and inference.
 *
 * A group is a run of targets that read the same input: q, k, v · o · gate, up · down. The A factors of a group's
 * adapted targets are adjacent in lora.h's order, so one product gives the stacked h (m, adapted·rank) of all.
 */
#ifndef MODEL_LAYER_H
#define MODEL_LAYER_H

#include "model/lora.h"
#include "model/model.h"

struct compute {
    const struct kernel_ops *ops;
    struct kernel_run run;
    const struct model *model;
    const struct lora *lora; /* NULL: none */
    const float *rope;       /* table of kernels_rope_table */
    bool decode;             /* few rows go through linear_decode */
};

enum group { GROUP_QKV, GROUP_O, GROUP_GATE_UP, GROUP_DOWN, GROUP_COUNT };

#define GROUP_TARGETS_MAX 3

/* The group's targets are first .. first + count - 1. */
static inline enum lora_target group_first(enum group group)
{
    static const uint8_t first[GROUP_COUNT] = {LORA_Q, LORA_O, LORA_GATE, LORA_DOWN};
    return (enum lora_target)first[group];
}

static inline int group_size(enum group group)
{
    static const uint8_t size[GROUP_COUNT] = {3, 1, 2, 1};
    return size[group];
}

/* Columns of the group's h in this layer: adapted targets × rank; 0 without LoRA. */
int32_t group_rank(const struct lora *lora, int32_t layer, enum group group);

/* y[i] = x·Wᵢᵀ + s·(x·Aᵢᵀ)·Bᵢᵀ. x (m, in), y[i] (m, outᵢ), h (m, group_rank) is written. */
void group_forward(const struct compute *c, int32_t layer, enum group group, int32_t m, const float *x,
                   float *const y[], float *h);

/* dx (m, in), overwritten, or NULL if nothing below wants it; dh (m, group_rank) is written if dx is or with_dh is. */
void group_backward(const struct compute *c, int32_t layer, enum group group, int32_t m, const float *const dy[],
                    float *dh, bool with_dh, float *dx);

/* Adds the gradients of rows t0..t1-1 into gradient (trained_count). x and dh are read in LORA_JOINT mode only. */
void group_gradient(const struct compute *c, const struct kernel_run *run, int32_t layer, enum group group, int32_t t0,
                    int32_t t1, const float *const dy[], const float *h, const float *dh, const float *x,
                    float *gradient);

/* Rotates q (m, heads·head_size) and k (m, kv·head_size) in place. */
void layer_rope(const struct compute *c, int32_t m, const int32_t *positions, bool inverse, float *q, float *k);

struct attention_shape layer_attention_shape(const struct model_config *config);

/* Scratch for every linear of the model, the LoRA products of this rank included, at up to m rows. */
size_t layer_linear_scratch(const struct model_config *config, int threads, int32_t m, int32_t rank);

#endif
