/*
 * The site's policy is final: a job that asks for less protection than node.yaml demands is refused here.
 *
 * Floors on sites, colluders and honest sites are checked again against M0 by the secure-aggregation client.
 */
#ifndef NODE_JOBS_POLICY_H
#define NODE_JOBS_POLICY_H

#include "base/clock.h"
#include "protocol/client.h"
#include "runtime/config.h"

/* ERR_POLICY with the first rule that the plan breaks; ERR_CONFIG if the plan is for another base model. */
int MUST_USE policy_check_plan(const struct config *config, const struct job_plan *plan,
                               const uint8_t base_hash[HASH_SIZE], struct error *err);

/* ERR_POLICY outside policy.hours (local time); the message tells when training may start next. */
int MUST_USE policy_check_hours(const struct config *config, const struct clock *clock, struct error *err);

/* A floor that node.yaml leaves unset is 0: the protocol's default for the number of sites invited. */
struct secagg_policy policy_secagg(const struct config *config);

#endif
