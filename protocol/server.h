/*
 * One attempt of secure aggregation at the aggregator. Sans-I/O, one accumulator in memory whatever n is.
 *
 * There is no function that returns one site's vector: vectors go into the accumulator masked and only the sum of the
 * survivors comes out, exact, after t sites opened the masks. One thread at a time; returned spans are borrowed and
 * stay valid until secagg_server_free.
 *
 *     secagg_server_new(&s, &config, &err)
 *     for stage in M1 M3 M5 M7 M9:
 *         secagg_server_broadcast(s, site)            M0, M2, M4 (its own for each site), M6, M8
 *         secagg_server_receive(s, site, message, &err)   until secagg_server_complete(s) or the deadline
 *         at M5 also: secagg_server_add_vector(s, site, bytes, &err) once its upload is committed
 *         secagg_server_close_stage(s, &err)          ERR_AGAIN below the floor: wait or abort
 *     secagg_server_sum(s), then the server optimizer, then
 *     secagg_server_result(s, &in, &m10, &err)        M10, and the statement for struct cosign_collector
 */
#ifndef PROTOCOL_SERVER_H
#define PROTOCOL_SERVER_H

#include "protocol/cosign.h"
#include "protocol/job_plan.h"

#include "base/rng.h"

struct secagg_server;

enum secagg_stage { /* the message being collected */
                    STAGE_ADVERTISE = 1,
                    STAGE_SHARES = 3,
                    STAGE_MASKED = 5,
                    STAGE_CONSISTENCY = 7,
                    STAGE_UNMASK = 9,
                    STAGE_RESULT = 10, /* the sum is ready */
                    STAGE_DEAD = 255,
};

struct secagg_server_config {
    const struct roster *roster;     /* borrowed for the server's life */
    const struct sign_key *identity; /* the aggregator's; borrowed for the server's life */
    struct span signed_plan;         /* copied */
    uint32_t round, attempt;
    const char *const *invited; /* (invited_len) ids of rostered trainers, any order; copied */
    uint32_t invited_len;
    const uint8_t *model_hash; /* (32) */
    uint64_t words;            /* of the model state; the round's vector is what the plan gives of it */
    uint32_t chunk_bytes;      /* multiple of 4, at most 4 MiB */
    uint32_t suite;            /* enum mask_suite; 0: AES-256-CTR */
    const struct rng *rng;     /* for M0's nonce */
    int64_t now_s;
};

int MUST_USE secagg_server_new(struct secagg_server **ret_server, const struct secagg_server_config *config,
                               struct error *err);
void secagg_server_free(struct secagg_server *s); /* accepts NULL */

/* What the round moves of the state; its count is the length d of vectors and sum. */
struct model_segment secagg_server_segment(const struct secagg_server *s);
enum secagg_stage secagg_server_stage(const struct secagg_server *s);
const struct quorum *secagg_server_quorum(const struct secagg_server *s);
/* The broadcast of the stage being collected; for M4 each site has its own. Empty span for a site that is no longer in
 * the attempt: it gets an ABORT event. */
struct span secagg_server_broadcast(const struct secagg_server *s, const char *site);
/* Is an answer of this site still missing in the stage being collected? */
bool secagg_server_waits_for(const struct secagg_server *s, const char *site);

/* One message of an authenticated site. 0 for an accepted one and for an identical repeat. ERR_AGAIN: too late or too
 * early for this stage (discard; harmless). ERR_INTEGRITY: malformed, bad signature, bad share; names the site. The
 * attempt goes on without it as long as the floors hold. */
int MUST_USE secagg_server_receive(struct secagg_server *s, const char *site, struct span message, struct error *err);
/* After its M5: the committed upload (4 * d bytes). Verifies the signed root, then adds. A repeat is 0. */
int MUST_USE secagg_server_add_vector(struct secagg_server *s, const char *site, struct span bytes, struct error *err);

bool secagg_server_complete(const struct secagg_server *s); /* nobody is missing: close at once */
/* Ends the stage with those who answered. ERR_AGAIN: fewer than the stage needs (nothing changed). ERR_INTEGRITY: the
 * attempt is dead, the message names the culprit. Closing STAGE_UNMASK removes the masks: afterwards the sum is ready.
 */
int MUST_USE secagg_server_close_stage(struct secagg_server *s, struct error *err);
uint32_t secagg_server_needed(const struct secagg_server *s);   /* answers the stage needs */
uint32_t secagg_server_answered(const struct secagg_server *s); /* answers it has */

const uint32_t *secagg_server_sum(const struct secagg_server *s); /* (d), NULL before STAGE_RESULT */
uint32_t secagg_server_survivors(const struct secagg_server *s);  /* |U3|, 0 before M6 */
bool secagg_server_is_survivor(const struct secagg_server *s, const char *site);
uint32_t secagg_server_dropouts_recovered(const struct secagg_server *s); /* |U2 \ U3| */

/* M10 for the next model computed by the caller (next_model_from_sum); ret_statement starts the cosign_collector. */
int MUST_USE secagg_server_result(struct secagg_server *s, const uint8_t next_hash[HASH_SIZE], struct span *ret_m10,
                                  struct cosign_statement *ret_statement, struct error *err);

#endif
