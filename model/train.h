/*
 * The training step: forward through the frozen model with LoRA, cross entropy on the label rows, backward down to the
 * lowest adapted layer, and each example's own flat LoRA gradient. One loop for every backend.
 *
 * Invariants
 * - Everything is allocated by train_new; train_run allocates nothing.
 * - An example's loss and gradient have the same bits whatever its batchmates, its place in the batch and the number of
 *   threads are (with one backend). DP-SGD's sensitivity rests on it.
 * - A gradient has the trained_count floats of the run's lora in lora.h's canonical order: what clip_accumulate, adamw
 * and sgd take. The checkpoint level does not change its bits.
 *
 * One struct train is used by one thread at a time; the model and the LoRA factors are only read.
 *
 *     struct train_options options = {.backend = backend, .tokens_max = 512, .examples_max = 16,
 *                                     .example_tokens_max = 128, .per_example = true};
 *     if (train_new(&options, &model, &lora, &train, err) < 0) return err->code;
 *     train_run(train, &lora, &batch);
 *     backend->ops->clip_accumulate(backend, lora.trained_count, batch.examples, train_gradient(train, 0),
 *                                   train_gradient_stride(train), &clip, sum, NULL);
 */
#ifndef MODEL_TRAIN_H
#define MODEL_TRAIN_H

#include "kernels/backend.h"
#include "model/batch.h"
#include "model/lora.h"
#include "model/model.h"

struct placed_model;

/* What the forward pass keeps for the backward pass, in order of memory: 0 all; 1 not the gate, up and their input and
 * product, which are computed again; 2 only the residual stream at each layer. */
#define TRAIN_LEVEL_AUTO (-1) /* the lowest that fits backend->ops->free_bytes */

struct train_options {
    struct backend *backend;     /* borrowed */
    struct placed_model *placed; /* the model on it, with room for this rank; NULL: train_new places it for itself */
    int32_t tokens_max;          /* rows of a batch */
    int32_t examples_max;        /* examples of a batch */
    int32_t example_tokens_max;  /* rows of one example, ≤ the model's context_length */
    bool per_example;            /* one gradient per example (DP); false: one, the sum over the batch's examples */
    bool alternating;     /* lora is LORA_FFA or LORA_FFB, and either of them may come to train_run (lora_exchange) */
    bool noise;           /* the backend's noise_begin will be called for trained_count values */
    int checkpoint_level; /* 0, 1, 2 or TRAIN_LEVEL_AUTO */
};

struct train;

/* The model must outlive ret_train; lora gives the shape only. ERR_CONFIG for impossible limits; ERR_RESOURCES: a
 * smaller tokens_max may do. */
int MUST_USE train_new(const struct train_options *options, const struct model *model, const struct lora *lora,
                       struct train **ret_train, struct error *err);
void train_free(struct train *train);                 /* accepts NULL */
size_t train_memory_bytes(const struct train *train); /* of the backend; the placed model is not counted */
int train_level(const struct train *train);

/* Forward and backward. batch within the limits (asserted) and possibly empty; lora of the shape given to train_new and
 * of the backend's memory (model/placed.h). A device's failure shows at the backend's next sync. */
void train_run(struct train *train, const struct lora *lora, const struct batch *batch);

/* Forward only: losses, no gradients. lora NULL: the base model. */
void train_evaluate(struct train *train, const struct lora *lora, const struct batch *batch);

/* Of the last run, valid until the next. Loss in nats: the mean over the example's label tokens (0 without labels).
 * Waits for the device. */
double train_loss(struct train *train, int32_t example);
/* Memory of the backend, (trained_count): dloss(example)/dtrained; with per_example false, example must be 0 and it is
 * the sum over all. The caller may scale it in place. */
float *train_gradient(struct train *train, int32_t example);
size_t train_gradient_stride(const struct train *train); /* floats between examples' gradients */

/* Overwrites the gradients and the tokens of the last run with zeros. */
void train_wipe(struct train *train);

#endif
