/*
 * A site's side of the federation: one loop that asks the aggregator for the next event and does its part.
 *
 *     event OPEN      -> policy, consent, budget; reserve in the ledger; train; quantise; M1     (round.c)
 *     event KEYS …    -> the secure-aggregation client's next message                            (round.c)
 *     event RESULT    -> recompute the next model, store it, swap it in, co-sign                 (round.c)
 *     nothing, or the aggregator is away -> wait and ask again                                   (federation.c)
 *
 * An attempt lives in memory only: after a restart the site lets it go and joins the next round, catching up with the
 * newest version if it missed one. Errors of one job are journalled and end that site's part in the round, never the
 * daemon. One thread.
 */
#ifndef NODE_JOBS_FEDERATION_H
#define NODE_JOBS_FEDERATION_H

#include "base/clock.h"
#include "base/log.h"
#include "base/rng.h"
#include "node/jobs/local_plan.h"
#include "node/jobs/site_store.h"
#include "node/jobs/version.h"
#include "node/serve/slot.h"
#include "node/site.h"
#include "node/train/adapter_config.h"
#include "node/train/trainer.h"
#include "node/vault/vault.h"
#include "privacy/ledger.h"
#include "protocol/client.h"
#include "protocol/session.h"
#include "protocol/transport/rpc.h"
#include "runtime/journal.h"

/* What is kept from round to round of one job. */
struct job_runtime {
    struct job_plan plan;
    struct adapter_config adapter;
    struct local_plan local;
    struct lora lora; /* trained is work memory; the truth is in version */
    struct dataset *data;
    uint8_t commitment[HASH_SIZE]; /* to the bytes that data was read from */
    struct trainer *trainer;
    struct version version; /* newest that this site holds */
    bool present;
};

struct attempt {
    struct secagg_client *client; /* NULL: no attempt under way */
    uint64_t reservation;         /* ledger sequence, 0 without DP */
    bool released;                /* the reservation has ended */
    bool masked;                  /* the vector was uploaded and acknowledged */
    uint32_t *ring;               /* (ring_words) owned: the quantised update, then the masked vector */
    size_t ring_words;
    int64_t opened_ms;
    struct rpc_counters before;
};

struct federation {
    const struct config *config;
    const struct clock *clock;
    const struct rng *rng;
    struct site *site;
    struct vault *vault;
    struct site_store *store;
    struct journal *journal;
    struct slot *slot;
    struct log_context log;
    volatile int *stop; /* set by a signal */

    struct ledger *ledger; /* opened by the first job with DP */
    struct rpc_client *rpc;
    struct session_cursor cursor;
    struct job_runtime job;
    struct attempt attempt;
    int64_t beat_ms; /* last sign of life sent while training */
    /* A job that this site's policy, its people or its hours keep it from; "" when there is none. */
    struct session_event unwilling;
    struct job_plan unwilling_plan;
};

/* Runs until *f->stop. The fields above the blank line are the caller's. ERR_CONFIG and ERR_INTEGRITY at start only. */
int MUST_USE federation_run(struct federation *f, struct error *err);

/* --- round.c -------------------------------------------------------------------------------------------------- */

/* Does this site's part for one event. A negative return means that its part in the attempt has ended; err says why. */
int MUST_USE round_on_event(struct federation *f, const struct session_event *event, struct error *err);
/* While nothing happens: tells the aggregator when what kept this site from a job has changed. */
void round_reconsider(struct federation *f);
void round_drop(struct federation *f, const char *reason); /* ends the attempt: burns what was not released, wipes */
void job_runtime_release(struct job_runtime *job);

/* --- federation.c, for round.c -------------------------------------------------------------------------------- */

/* One idempotent call, repeated while the aggregator cannot be reached, for at most deadline_ms. ERR_AGAIN: the stage
 * is closed there. */
int MUST_USE federation_call(struct federation *f, uint16_t method, struct span request, struct buffer *reply,
                             int64_t deadline_ms, struct error *err);
/* Sends the site's half of a stage of the event's attempt. */
int MUST_USE federation_send(struct federation *f, enum session_stage stage, const struct session_event *event,
                             struct span payload, struct error *err);

/* --- adopt.c: versions ---------------------------------------------------------------------------------------- */

/* Makes v the job's current version and swaps it in for answering; takes over v. */
int MUST_USE adopt_version(struct federation *f, struct version *v, struct error *err);
/* Loads the last version in use from disk into the slot at start; a changed file is reported and not used, and the
 * newest intact one before it answers instead. */
void adopt_at_start(struct federation *f);
/* Before a round that starts from another version than the one held here: may this site go back? A newer one held here
 * found no quorum and was taken back, which is exactly one step, and never away from a version that a quorum signed;
 * anything else is ERR_INTEGRITY. version 0: goes back to the job's first state here; else adopt_missing does. */
int MUST_USE adopt_withdrawal(struct federation *f, const struct secagg_info *info, uint64_t version,
                              struct error *err);
/* May the version that a verified statement names take the place of held? of_round: that round starts from it; NULL:
 * the job has ended. ERR_INTEGRITY for another version than announced, one that the round does not start from, one made
 * later than the round, or one older than a held version that a quorum signed. */
int MUST_USE adopt_check(const struct version *held, const struct secagg_info *of_round, const char *job,
                         uint64_t version, const struct cosign_statement *statement, struct error *err);
/* Fetches and verifies the version that M0 names, with its proof. */
int MUST_USE adopt_missing(struct federation *f, const struct secagg_info *info, uint64_t version, struct error *err);
/* The same for the last version of a job that has ended; info is that of any of its openings. */
int MUST_USE adopt_last(struct federation *f, const struct secagg_info *info, uint64_t version, struct error *err);

#endif
