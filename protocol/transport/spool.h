/*
 * Where the aggregator keeps uploads until it has used them: one file per (job, round, attempt, site, name).
 *
 *     FOLDER/<job>/r<round>.a<attempt>/<site>/<name>.part   while chunks arrive
 *                                             <name>.done   committed: verified and durable
 *                                             <name>.map    size, chunk size, root and the hash of each chunk held
 *
 * A path is built from ids that tls_id_valid accepted and from numbers, never from other text of a peer. A chunk counts
 * as held when its hash is in the map; after a restart each one is hashed again before it counts, so a power cut costs
 * at most the chunks that had not reached the disk. COMMIT compares the Merkle root, fdatasyncs, renames, syncs the
 * folder and only then answers.
 *
 * Thread rule: one thread (that of the rpc_server).
 *
 *     struct spool_config config = {.folder = "/var/lib/consilium/spool", .quota_bytes = 8ull << 30, .allow = allow};
 *     ...
 *     in the handler:  if (method >= TRANSFER_BEGIN && method <= TRANSFER_COMMIT)
 *                          return spool_handle(spool, peer->site, method, body, reply);
 */
#ifndef PROTOCOL_TRANSPORT_SPOOL_H
#define PROTOCOL_TRANSPORT_SPOOL_H

#include "protocol/transport/transfer.h"

struct spool_config {
    const char *folder;        /* made when absent, mode 0700 */
    uint64_t quota_bytes;      /* sum of the announced sizes of all uploads present */
    uint64_t upload_bytes_max; /* of one upload; 0: the quota */
    uint32_t uploads_max;      /* 0: 4096 */
    uint32_t chunk_bytes_max;  /* 0: RPC_CHUNK_BYTES_DEFAULT */
    /* Is this site allowed to begin this upload now (round open, size as expected)? Negative: refused with err. NULL:
     * always. Called at each BEGIN of an upload that is not committed. */
    int (*allow)(void *ctx, const char *site, const struct transfer_begin *begin, struct error *err);
    /* After an upload became durable, before its acknowledgement. May be called again for the same upload: the site
     * asks again when the answer was lost. Negative: the site gets err and will ask again. NULL: none. */
    int (*committed)(void *ctx, const char *site, const struct transfer_id *id, uint64_t size_bytes, struct error *err);
    void *ctx;
};

struct spool;

/* Opens or makes the folder and takes stock of it. */
int MUST_USE spool_open(struct spool **ret, const struct spool_config *config, struct error *err);
void spool_close(struct spool *spool);

/* TRANSFER_BEGIN, PUT or COMMIT: an rpc handler's body. */
int MUST_USE spool_handle(struct spool *spool, const char *site, uint16_t method, struct span body,
                          struct rpc_reply *reply);

/* The bytes of a committed upload, read-only; release with file_unmap. ERR_NOT_FOUND when absent or not committed;
 * ERR_INTEGRITY when the file changed on disk since (checked once after each start). */
int MUST_USE spool_map(struct spool *spool, const char *site, const struct transfer_id *id, struct span *ret_bytes,
                       struct error *err);
bool spool_committed(struct spool *spool, const char *site, const struct transfer_id *id);

/* Removes one upload; or every upload of a round's attempt. Absent: 0. */
int MUST_USE spool_remove(struct spool *spool, const char *site, const struct transfer_id *id, struct error *err);
int MUST_USE spool_remove_round(struct spool *spool, const char *job, uint32_t round, uint32_t attempt,
                                struct error *err);

/* Removes every upload: at the start of a server whose rounds do not survive it. */
int MUST_USE spool_clear(struct spool *spool, struct error *err);

/* Calls back for each committed upload of a round's attempt (after a restart: to rebuild the accumulator), in the order
 * of site then name. A negative return stops it and is returned. */
int MUST_USE spool_each_committed(struct spool *spool, const char *job, uint32_t round, uint32_t attempt,
                                  int (*visit)(void *ctx, const char *site, const struct transfer_id *id,
                                               uint64_t size_bytes),
                                  void *ctx);

uint64_t spool_bytes(const struct spool *spool);

#endif
