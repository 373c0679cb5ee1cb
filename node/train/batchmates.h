/*
 * Whether a device computes an example's gradient to the same bits whoever shares its micro-batch.
 *
 * The sensitivity of a clipped integer sum is exact only then (docs/privacy.md): where a matrix library chose another
 * order of summation for another number of rows, removing one record would change what the others add. On the CPU each
 * row's sums run in one order by construction; a card is asked here, with made-up examples of the sizes that will come.
 */
#ifndef NODE_TRAIN_BATCHMATES_H
#define NODE_TRAIN_BATCHMATES_H

#include "model/lora.h"
#include "model/train.h"

struct batchmates_probe {
    struct train *train;     /* with a gradient per example */
    struct backend *backend; /* its */
    const struct lora *lora; /* on the backend, no factor zero: a gradient that is zero shows nothing */
    struct batch *batch;     /* of the trainer's size; its contents are lost */
    int32_t example_tokens_max;
    int32_t vocabulary;
};

/* Compares one example's gradient alone, in the middle of a full micro-batch, and behind a single short example.
 * ret_same is true where there is room for one example only. ERR_RESOURCES; the device's failure. */
int MUST_USE batchmates_check(const struct batchmates_probe *probe, bool *ret_same, struct error *err);

#endif
