/*
 * A model, and LoRA factors, placed on a backend: what the loops of training and inference read.
 *
 * On the CPU placing copies nothing (placed_model_serve does); on a card it uploads the weights. A placed model may be
 * shared by several users of its backend: it is only read, but for the LoRA columns that GROUP_TRAIN use writes, so at
 * most one struct train may exist on it at a time.
 *
 *     struct placed_model *placed;
 *     if (placed_model_new(backend, &model, rank, &placed, err) < 0) return err->code;
 *     struct train_options options = {.backend = backend, .placed = placed, ...};
 *
 * Factors: a struct lora whose arenas are the backend's memory. Where backend->host_memory it is the host's own arenas,
 * so nothing has to be moved and a host lora may be used as it is.
 *
 *     struct lora placed;
 *     lora_place(&placed, &lora, backend, err);     lora_upload(&placed, &lora);     lora_download(&lora, &placed);
 */
#ifndef MODEL_PLACED_H
#define MODEL_PLACED_H

#include "kernels/backend.h"
#include "model/lora.h"
#include "model/model.h"

/* Targets that read the same input: q, k, v · o · gate, up · down. */
enum group { GROUP_QKV, GROUP_O, GROUP_GATE_UP, GROUP_DOWN, GROUP_COUNT };

struct placed_layer {
    struct linear_group groups[GROUP_COUNT];
    const float *attn_norm, *ffn_norm, *attn_post_norm, *ffn_post_norm; /* dev (d_model); NULL: none */
    const float *q_norm, *k_norm;                                       /* dev (head_size); NULL: none */
};

struct placed_model {
    const struct model *model;
    struct backend *backend; /* that it was placed through; must outlive it */
    int32_t rank_max;
    struct linear_group embedding, head; /* groups of one; the same placement if tied */
    bool tied;
    const float *output_norm; /* dev (d_model) */
    void *vectors;            /* owned memory of all norms and biases; NULL where they are borrowed */
    void *serving;            /* of placed_model_serve; NULL: none */
    struct placed_layer layers[MODEL_LAYERS_MAX];
};

/* Whether the backend can take the model's shapes and, about, whether its weights fit now: ERR_CONFIG or ERR_RESOURCES
 * with the reason, else 0. placed_model_new checks it too. */
int MUST_USE placed_model_check(struct backend *backend, const struct model *model, struct error *err);

/* rank: the largest LoRA rank that training will use on it; 0: no training. The model must outlive it. ERR_CONFIG: a
 * shape that the device cannot take; ERR_RESOURCES: not enough device memory, with how much was wanted. */
int MUST_USE placed_model_new(struct backend *backend, const struct model *model, int32_t rank,
                              struct placed_model **ret_placed, struct error *err);
void placed_model_free(struct placed_model *placed); /* accepts NULL */
/* Before answering, and before the model is shared: lets the backend copy the weights into the layout that tokens one
 * by one are computed from fastest. On the CPU about the weights' size again; from then on hardly anything but the copy
 * is read, and the pages of model->map rest. Without that memory, or on a backend that has no such layout, nothing
 * happens. Once. */
void placed_model_serve(struct placed_model *placed);

/* ret is lora's shape with arenas on the backend, holding lora's values. lora must outlive it. */
int MUST_USE lora_place(struct lora *ret_placed, const struct lora *lora, struct backend *backend, struct error *err);
void lora_unplace(struct lora *placed); /* accepts zeroed */
/* Trained and frozen values, host to device, and trained values back. Same shape (asserted). */
void lora_upload(struct lora *placed, const struct lora *lora);
void lora_download(struct lora *lora, const struct lora *placed);

#endif
