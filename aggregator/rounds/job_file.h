/*
 * job.yaml: what the ML team asks for, and the signed plan that it becomes.
 *
 * The aggregator has no model code. The shapes that it needs, to count the parameters of the adapter, come from a model
 * card: the JSON that `consilium-node model describe FILE` prints.
 */
#ifndef AGGREGATOR_ROUNDS_JOB_FILE_H
#define AGGREGATOR_ROUNDS_JOB_FILE_H

#include "base/rng.h"
#include "protocol/job_plan.h"
#include "runtime/config.h"

extern const struct config_schema job_schema;

/* Fills plan (unsigned) and the number of parameters of the model state: those of B, in mode alternating of A and B.
 * rng draws the public seed of frozen factors, if job.yaml has none. ERR_CONFIG names file:line and key. */
int MUST_USE job_file_plan(const struct config *job, const struct rng *rng, int64_t now_s, struct job_plan *ret_plan,
                           uint64_t *ret_words, struct error *err);

#endif
