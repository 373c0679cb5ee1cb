/*
 * The coordinator's loop: one thread that serves requests and moves one round at a time through its stages.
 *
 *     gather   enough sites are connected                 -> OPEN (M0)
 *     M1       sites train and advertise                   -> KEYS (M2)
 *     M3       encrypted shares                            -> DELIVER (M4)
 *     M5       masked vectors: spooled, verified, added    -> SURVIVORS (M6)
 *     M7       signatures on the survivor list             -> QUORUM (M8)
 *     M9       shares that open the survivors' self masks and the dropouts' pair masks -> the exact sum
 *     M10      next model computed, stored, announced      -> RESULT
 *     cosign   a quorum vouches for the new version        -> the next round
 *
 * A stage ends when everybody answered; after its grace when enough did; at its deadline it fails and the round is
 * skipped. The engine never holds one site's update in the clear: vectors arrive masked and only their sum is unmasked.
 */
#ifndef AGGREGATOR_ROUNDS_ENGINE_H
#define AGGREGATOR_ROUNDS_ENGINE_H

#include "aggregator/registry/registry.h"
#include "aggregator/rounds/book.h"
#include "base/log.h"
#include "protocol/server.h"
#include "protocol/session.h"
#include "protocol/transport/spool.h"
#include "runtime/journal.h"

/* One rostered site as the engine sees it. */
struct engine_site {
    char id[SITE_ID_SIZE];
    struct session_cursor cursor; /* of its current event */
    enum session_event_kind kind;
    struct buffer payload;
    char job[SESSION_JOB_SIZE]; /* of the event */
    uint64_t round;
    uint32_t attempt;
    uint64_t held;              /* token of its waiting NEXT; 0: none */
    int64_t seen_ms;            /* monotonic, last request; -1: never */
    bool declined;              /* this round */
    bool unwilling;             /* to take part in this job until it says otherwise or connects anew */
    struct rpc_counters before; /* at the round's opening */
};

enum engine_phase { PHASE_IDLE, PHASE_GATHER, PHASE_ATTEMPT, PHASE_COSIGN };

struct engine {
    const struct config *config;
    const struct clock *clock;
    const struct rng *rng;
    struct registry *registry;
    struct book *book;
    struct journal *journal;
    volatile int *stop;
    struct log_context log;

    struct rpc_server *server;
    struct spool *spool;
    uint64_t epoch, sequence;
    struct engine_site *sites; /* (site_count), every trainer of the roster */
    size_t site_count;

    enum engine_phase phase;
    int64_t phase_since_ms;
    int64_t polled_ms; /* when the book was last asked for a job */
    int64_t told_ms;   /* when the log last said that sites are waited for */
    struct book_job job;
    struct job_plan plan;
    struct buffer signed_plan;
    float *state; /* (2·words): current parameters and momentum */
    uint8_t state_sha256[HASH_SIZE];
    struct secagg_server *attempt;
    uint32_t round;
    enum secagg_stage stage; /* whose answers are collected */
    uint32_t dropouts;       /* of the last sum: sites gone after their shares, whose masks the others opened */
    int64_t enough_since_ms; /* -1: not enough yet */
    uint32_t *sum;           /* (sum_words) of the last finished round, for download */
    size_t sum_words;        /* at most the state's */
    uint8_t sum_sha256[HASH_SIZE];
    struct cosign_collector *cosign;
};

/* Runs until *e->stop. The fields above the blank line are the caller's. */
int MUST_USE engine_run(struct engine *e, struct error *err);

/* --- handler.c: what sites ask; called from the loop ---------------------------------------------------------- */

int engine_handle(void *ctx, const struct rpc_peer *peer, uint16_t method, struct span body, struct rpc_reply *reply);
/* A new current event for a site; answers its waiting request. */
void engine_set_event(struct engine *e, struct engine_site *site, enum session_event_kind kind, struct span payload);
bool engine_connected(const struct engine *e, const struct engine_site *site);

#endif
