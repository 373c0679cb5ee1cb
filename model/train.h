/*
 * The training step: forward through the frozen model with LoRA, cross entropy on the label rows, backward down to the
 * lowest adapted layer, and each example's own flat LoRA gradient.
 *
 * Invariants
 * - Everything is allocated by train_new; train_run allocates nothing.
 * - An example's loss and gradient have the same bits whatever its batchmates, its place in the batch and the number of
 *   threads are (with one op table and one precision). DP-SGD's sensitivity rests on it.
 * - A gradient has lora->trained_count floats in lora.h's canonical order: what clip_accumulate, adamw and sgd take.
 *
 * One struct train is used by one thread at a time; the model and the LoRA factors are only read.
 *
 *     struct train_options options = {.ops = kernels_cpu(KERNEL_AVX512_BF16), .pool = pool,
 *                                     .precision = KERNEL_BF16, .tokens_max = 512, .examples_max = 16,
 *                                     .example_tokens_max = 128, .per_example = true};
 *     if (train_new(&options, &model, &lora, &train, err) < 0) return err->code;
 *     train_run(train, &lora, &batch);
 *     for (int32_t e = 0; e < batch.examples; e++)
 *         ops->clip_accumulate(lora.trained_count, train_gradient(train, e), &clip, sum, &result);
 */
#ifndef MODEL_TRAIN_H
#define MODEL_TRAIN_H

#include "model/batch.h"
#include "model/lora.h"
#include "model/model.h"

struct train_options {
    const struct kernel_ops *ops;
    struct pool *pool; /* borrowed; NULL: the calling thread */
    enum kernel_precision precision;
    int32_t tokens_max;         /* rows of a batch */
    int32_t examples_max;       /* examples of a batch */
    int32_t example_tokens_max; /* rows of one example, ≤ the model's context_length */
    bool per_example;           /* one gradient per example (DP); false: one, the sum over the batch's examples */
};

struct train;

/* Memory about 4·(5·d_model + 2·kv + 2·d_ff) bytes per row and adapted layer, and 4·trained_count per gradient. The
 * model must outlive ret_train; lora gives the shape only. ERR_CONFIG for impossible limits, ERR_RESOURCES. */
int MUST_USE train_new(const struct train_options *options, const struct model *model, const struct lora *lora,
                       struct train **ret_train, struct error *err);
void train_free(struct train *train); /* accepts NULL */
size_t train_memory_bytes(const struct train *train);

/* Forward and backward. batch within the limits (asserted) and possibly empty; lora of the shape given to train_new. */
void train_run(struct train *train, const struct lora *lora, const struct batch *batch);

/* Forward only: losses, no gradients. lora NULL: the base model. */
void train_evaluate(struct train *train, const struct lora *lora, const struct batch *batch);

/* Of the last run, valid until the next. Loss in nats: the mean over the example's label tokens (0 without labels). */
double train_loss(const struct train *train, int32_t example);
/* (trained_count): dloss(example)/dtrained; with per_example false, example must be 0 and it is the sum over all. The
 * caller may scale it in place. */
float *train_gradient(struct train *train, int32_t example);

#endif
