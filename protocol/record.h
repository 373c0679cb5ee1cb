/*
 * What a site must remember on disk about an attempt, and what it remembers about its peers. Injected: the node's
 * database implements it, the simulator keeps it in memory.
 *
 * record() is called before the message that depends on it leaves, and returns 0 only once the record is durable
 * (fsynced). Rules, all inside one transaction:
 *
 *   RECORD_OPEN       bytes = H0. Refuse (ERR_INTEGRITY) unless (round, attempt) is greater than every recorded one of
 *                     this job.
 *   RECORD_SURVIVORS  bytes = H3. 0 if absent (store it) or equal; ERR_INTEGRITY if another H3 is stored for
 *                     (job, round, attempt).
 *   RECORD_UNMASK     bytes = SHA-256 of M9. 0 if no M9 is stored for (job, round), whatever the attempt, or an equal
 *                     one; ERR_INTEGRITY otherwise.
 *   RECORD_UNMASK_MODEL  only for a plan without differential privacy, before RECORD_UNMASK; bytes = hash of the model
 *                     that the round starts from. ERR_INTEGRITY if these bytes are stored for another (job, round), of
 *                     any job; 0 and stored otherwise. Sums over two sets of sites of updates of one model show, by
 *                     their difference, the update of a site that is in one of them only; with DP the noise differs.
 */
#ifndef PROTOCOL_RECORD_H
#define PROTOCOL_RECORD_H

#include "base/error.h"
#include "base/span.h"

enum secagg_record { RECORD_OPEN = 1, RECORD_SURVIVORS = 2, RECORD_UNMASK = 3, RECORD_UNMASK_MODEL = 4 };

struct secagg_log {
    int (*record)(void *ctx, enum secagg_record kind, const char *job, uint32_t round, uint32_t attempt,
                  struct span bytes, struct error *err);
    void *ctx;
};

/* check(): called for each advert of M2 with the peer's ledger head. Stores the highest; ERR_INTEGRITY when the
 * sequence is lower than the stored one, or equal with another head (a restored snapshot or a clone). */
struct secagg_witness {
    int (*check)(void *ctx, const char *site, uint64_t sequence, const uint8_t head[32], struct error *err);
    void *ctx;
};

#endif
