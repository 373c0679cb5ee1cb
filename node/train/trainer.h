/*
 * One site's share of a round: from its own examples to a locally trained adapter, under record-level DP or without.
 *
 *     examples ─ Poisson sample ─ micro-batches ─ per-example LoRA gradients ─ clip ─ integer grid ─ int64 sum
 *       ─ + exact discrete Gaussian noise ─ /(g·q·N) ─ local optimizer step        (repeated steps_per_round times)
 *
 * Invariants
 * - The caller has reserved the steps in the ledger, durably, before trainer_round is called: sampling spends.
 * - The denominator is the declared q·N, never the realised batch; an empty sample is a step like any other.
 * - Noise is added once per step to the sum of the whole sample, whatever the micro-batches were.
 * - The same released bits do not depend on threads or batchmates, nor on the CPU on the micro-batch's size, given the
 *   same random streams.
 *
 * Everything is allocated by trainer_new; trainer_round allocates nothing. One thread.
 */
#ifndef NODE_TRAIN_TRAINER_H
#define NODE_TRAIN_TRAINER_H

#include "base/rng.h"
#include "model/formats/dataset.h"
#include "model/lora.h"
#include "model/optimizer.h"
#include "model/train.h"
#include "privacy/plan.h"

struct trainer_options {
    struct backend *backend; /* borrowed */
    int threads;             /* of the CPU, where noise is drawn on it */
    int32_t tokens_max;      /* rows of a micro-batch; fewer are taken where the device's memory does not allow them */
    int32_t example_tokens_max; /* longest example of the data set */
    struct optimizer_config optimizer;
    double decay;     /* [0, 1]: the learning rate of step s of all T is lr·(1 − decay·s/T) */
    bool alternating; /* trainer_round takes lora with either of its factors trained (lora_exchange) */
    /* DP_RECORD: everything is used. DP_NONE: q, units, steps_per_round; clip, if > 0, clips without noise. */
    struct dp_plan plan;
};

struct trainer;

/* Under DP a device is asked whether it draws the CPU's noise (ERR_BUG if not) and whether others in its micro-batch
 * change an example's gradient (batchmates.h): then each is computed alone, and a warning says so.
 *
 * model, data and lora, which gives the shape, must outlive it. ERR_CONFIG; ERR_RESOURCES: not even a micro-batch of
 * the longest example fits. */
int MUST_USE trainer_new(const struct trainer_options *options, const struct model *model, const struct lora *lora,
                         const struct dataset *data, struct trainer **ret_trainer, struct error *err);
void trainer_free(struct trainer *t); /* accepts NULL */

/* Progress between micro-batches: step of steps, and examples done and sampled in this step, for the site's own screen
 * only. A true return stops the round with ERR_AGAIN (what was reserved stays spent). */
struct trainer_progress {
    bool (*report)(void *ctx, uint32_t step, uint32_t steps, uint32_t done, uint32_t sampled);
    void *ctx;
};

int32_t trainer_tokens_max(const struct trainer *t); /* the micro-batch that fitted */
int trainer_level(const struct trainer *t);          /* and its checkpoint level (model/train.h) */

/* Trains lora->trained in place from its present values; the optimizer starts anew. lora has the shape that trainer_new
 * was given (asserted), with its factors exchanged or not if options.alternating. first_step: steps of the job done in
 * earlier rounds. rng: the system source in production (sampling and noise streams are seeded from it). progress may
 * be NULL. */
int MUST_USE trainer_round(struct trainer *t, struct lora *lora, uint64_t first_step, const struct rng *rng,
                           const struct trainer_progress *progress, struct error *err);

#endif
