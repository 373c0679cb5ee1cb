/*
 * One upload of a spool: its files, its map of chunk hashes, and what the disk says about them. Private to the spool.
 *
 * The map file: "CSPOOL1\n", u64 size, u32 chunk, u32 n, root[32], then n hashes of 32 bytes, all zero for a chunk that
 * is not held.
 */
#ifndef PROTOCOL_TRANSPORT_SPOOL_UPLOAD_H
#define PROTOCOL_TRANSPORT_SPOOL_UPLOAD_H

#include "base/reader.h"
#include "crypto/hash.h"
#include "protocol/transport/spool.h"

#define SPOOL_PATH_SIZE 4096

struct upload {
    char site[TLS_ID_SIZE];
    struct transfer_begin begin;
    uint32_t chunks;
    uint32_t held;
    uint8_t (*leaves)[HASH_SIZE]; /* (chunks); zero: not held */
    bool committed;
    bool verified; /* a committed file was hashed in this process, or written by it */
    struct upload *next;
};

bool transfer_id_read(struct reader *r, struct transfer_id *ret);

/* The path of an upload's file; suffix ".part", ".done" or ".map". ERR_CONFIG when the folder's path is too long. */
int MUST_USE upload_path(const char *folder, const char *site, const struct transfer_id *id, const char *suffix,
                         char out[SPOOL_PATH_SIZE], struct error *err);

/* Makes the folder, the map and the .part of full size. */
int MUST_USE upload_create(const char *folder, const char *site, const struct transfer_begin *begin,
                           struct upload **ret, struct error *err);
/* From the disk; of a .part every chunk is hashed again, and what does not match is not held. ERR_NOT_FOUND. */
int MUST_USE upload_load(const char *folder, const char *site, const struct transfer_id *id, struct upload **ret,
                         struct error *err);
void upload_free(struct upload *u);

bool upload_has(const struct upload *u, uint32_t index);
int MUST_USE upload_put(const char *folder, struct upload *u, uint32_t index, struct span bytes, struct error *err);
/* Compares the root, makes it durable, renames. ERR_AGAIN: chunks missing; ERR_INTEGRITY: the root differs. */
int MUST_USE upload_commit(const char *folder, struct upload *u, struct error *err);
int MUST_USE upload_verify(struct upload *u, struct span bytes, struct error *err);
/* Removes the files. Absent ones are no error. */
int MUST_USE upload_unlink(const char *folder, const char *site, const struct transfer_id *id, struct error *err);

/* Reads a map file's head. */
int MUST_USE upload_read_map(const char *path, struct transfer_begin *ret_begin, struct buffer *ret_leaves,
                             struct error *err);

#endif
