/*
 * Accuracy of the base model or of an adapter on an evaluation file, and the majority class beside it.
 *
 * With at most DATASET_ANSWERS_MAX distinct answers in the file a record's prediction is the answer with the largest
 * log-likelihood divided by its number of tokens (end-of-message token included), otherwise the greedy answer, which
 * must equal the record's own text after outer blanks are removed. The same prompt and scorer for every row of every
 * table.
 */
#ifndef NODE_TRAIN_EVALUATE_H
#define NODE_TRAIN_EVALUATE_H

#include "model/formats/dataset.h"
#include "model/infer.h"

struct evaluate_options {
    struct backend *backend;
    size_t records_max;        /* so many, evenly spaced over the file; 0: all */
    int32_t answer_tokens_max; /* of a greedy answer */
    void (*progress)(void *ctx, size_t done, size_t total);
    void *progress_ctx;
};

struct evaluate_result {
    size_t records;
    size_t correct;
    size_t majority; /* records that carry the commonest answer */
    size_t answers;  /* distinct; 0: greedy answers were compared */
    double mean_nll; /* nats per answer token of the right answer; 0 for greedy */
};

/* lora: of host memory; NULL: the base model. ERR_RESOURCES. */
int MUST_USE evaluate(const struct evaluate_options *options, const struct model *model,
                      const struct tokenizer *tokenizer, const struct lora *lora, const struct dataset *data,
                      struct evaluate_result *ret_result, struct error *err);

#endif
