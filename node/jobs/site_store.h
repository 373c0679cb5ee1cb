/*
 * A site's durable memory of its jobs (state/node.sqlite): which attempts it opened and what it signed in them, the
 * peers' ledger heads, the decisions on jobs, and which adapter is current. Implements protocol/record.h's interfaces.
 *
 * Every function that writes is durable when it returns. One thread, several processes (the daemon and the command
 * line).
 */
#ifndef NODE_JOBS_SITE_STORE_H
#define NODE_JOBS_SITE_STORE_H

#include "base/buffer.h"
#include "protocol/record.h"
#include "protocol/roster.h"
#include "runtime/config.h"

struct site_store;

int MUST_USE site_store_open(struct site_store **ret_store, const struct config *config, struct error *err);
void site_store_close(struct site_store *s);

/* The injected interfaces of the secure-aggregation client; borrow s. */
struct secagg_log site_store_log(struct site_store *s);
struct secagg_witness site_store_witness(struct site_store *s);

/* Whether this site helped to open a sum over updates of this model in another round, of any job, without DP. Then it
 * does not do so again. */
int MUST_USE site_store_unmasked(struct site_store *s, const uint8_t model_hash[HASH_SIZE], const char *job,
                                 uint32_t round, bool *ret_unmasked, struct error *err);

/* Jobs. "pending" until a person decides; a plan whose hash differs from the one decided on is pending again. */
enum consent { CONSENT_PENDING, CONSENT_APPROVED, CONSENT_DENIED };
const char *consent_name(enum consent consent);
/* Enters the job if its plan is new, with the opening message (M0, which carries the signed plan), and tells the
 * decision on it. */
int MUST_USE site_store_consent(struct site_store *s, const char *job, const uint8_t plan_hash[HASH_SIZE],
                                struct span opening, enum consent *ret_consent, struct error *err);
/* The decision alone, changing nothing. ERR_NOT_FOUND if the job is unknown or has another plan by now. */
int MUST_USE site_store_decision(struct site_store *s, const char *job, const uint8_t plan_hash[HASH_SIZE],
                                 enum consent *ret_consent, struct error *err);
/* The decision is on the plan that a person read; NULL: whatever the plan (to deny). ERR_NOT_FOUND for an unknown job,
 * ERR_POLICY when another plan has taken its place. */
int MUST_USE site_store_decide(struct site_store *s, const char *job, const uint8_t plan_hash[HASH_SIZE],
                               enum consent consent, struct error *err);
/* The opening of a known job appended to out, and the decision. ERR_NOT_FOUND. */
int MUST_USE site_store_plan(struct site_store *s, const char *job, struct buffer *out, enum consent *ret_consent,
                             struct error *err);
int MUST_USE site_store_each_job(struct site_store *s, int (*visit)(void *ctx, const char *job, enum consent consent),
                                 void *ctx, struct error *err);

/* The adapter version (the round that made it; 0: none yet) held for a job; and the one that is served. */
int MUST_USE site_store_version(struct site_store *s, const char *job, uint32_t *ret_round, struct error *err);
int MUST_USE site_store_set_version(struct site_store *s, const char *job, uint32_t round, struct error *err);
/* ret_job has SITE_ID_SIZE bytes. ERR_NOT_FOUND while nothing is served. */
int MUST_USE site_store_served(struct site_store *s, char *ret_job, uint32_t *ret_round, struct error *err);
int MUST_USE site_store_set_served(struct site_store *s, const char *job, uint32_t round, struct error *err);

/* The number of records that this site declared, fixed at the first use; 0 if not yet. */
int MUST_USE site_store_declared(struct site_store *s, uint64_t *ret_records, struct error *err);
int MUST_USE site_store_set_declared(struct site_store *s, uint64_t records, struct error *err);

/* Whether this site has opened a privacy ledger: then it must be there, and an empty one is no substitute. */
int MUST_USE site_store_has_ledger(struct site_store *s, bool *ret_has, struct error *err);
int MUST_USE site_store_set_has_ledger(struct site_store *s, struct error *err);

#endif
