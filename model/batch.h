/*
 * A packed batch of training examples: the token rows of all examples one after the other, no padding.
 *
 * Row t predicts token t+1 of its example; a row carries a label if that next token is to be learnt (the assistant's).
 * An example's loss is the mean over its label tokens. Memory is taken once, at init.
 *
 *     struct batch batch;
 *     if (batch_init(&batch, 512, 16, err) < 0) return err->code;
 *     batch_clear(&batch);
 *     while (i < n && batch_add(&batch, &examples[i])) i++;   // false: full, run this one first
 *     train_run(train, &lora, &batch);
 */
#ifndef MODEL_BATCH_H
#define MODEL_BATCH_H

#include "base/error.h"
#include "kernels/kernels.h"

/* One tokenised example. learn[i] != 0: token i is to be predicted (learn[0] has no effect: nothing precedes it). */
struct batch_example {
    const int32_t *ids;   /* (length) */
    const uint8_t *learn; /* (length) */
    int32_t length;       /* ≥ 1 */
};

struct batch {
    int32_t tokens_max, examples_max;
    int32_t tokens, examples, labels;
    int32_t *ids;           /* (tokens) */
    int32_t *positions;     /* (tokens) from 0 in each example */
    int32_t *offsets;       /* (examples + 1) first row of each example */
    int32_t *label_rows;    /* (labels) rows, ascending */
    int32_t *label_targets; /* (labels) the token that the row is to predict */
    float *label_weights;   /* (labels) 1/(labels of its example) */
    int32_t *label_offsets; /* (examples + 1) first label of each example */
    void *memory;           /* owned; the arrays above lie in it */
};

int MUST_USE batch_init(struct batch *batch, int32_t tokens_max, int32_t examples_max, struct error *err);
void batch_release(struct batch *batch); /* accepts NULL and zeroed */
void batch_clear(struct batch *batch);

/* False, and the batch unchanged, if there is no room. An example without labels is taken; its loss and gradient are 0.
 * Ids are not checked here: the tokenizer bounds them, and train_run asserts them. */
bool MUST_USE batch_add(struct batch *batch, const struct batch_example *example);

#endif
