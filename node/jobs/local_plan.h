/*
 * What a signed job plan means at one site: its own sampling rate and noise, and the trainer's settings.
 *
 * The plan fixes the target epsilon and delta, the clip, the expected batch and the number of steps. In `record` mode
 * the noise is this site's own matter (it protects only its own records), so with noise_multiplier 0 in the plan the
 * site takes q = batch / N of its declared N records and the least z that keeps the target over all steps of the job. A
 * plan that states q and z itself is used as it is, if it keeps its target. The plan's grid must be the one that this
 * version trains with, 2^20 steps to the clip.
 */
#ifndef NODE_JOBS_LOCAL_PLAN_H
#define NODE_JOBS_LOCAL_PLAN_H

#include "model/optimizer.h"
#include "privacy/plan.h"
#include "protocol/job_plan.h"

struct local_plan {
    struct dp_plan dp;
    struct optimizer_config optimizer;
    double decay;                       /* of the learning rate, see node/train/trainer.h */
    char system_message[PLAN_TEXT_MAX]; /* "default", "none" or the text */
};

/* dimensions: floats sent. ERR_CONFIG names the field of the plan that does not fit this site. */
int MUST_USE local_plan_make(struct local_plan *ret_local, const struct job_plan *plan, uint64_t declared_records,
                             uint64_t dimensions, struct error *err);

/* The system message in a plan's training options: "default", "none" or the text. */
void local_plan_system_message(const char *options, char *out, size_t size);

#endif
