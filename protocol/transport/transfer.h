/*
 * Uploads and downloads in chunks, on top of rpc.h: resumable, idempotent, verified.
 *
 * Upload: BEGIN names the upload and fixes its size, chunk size and Merkle root (RFC 6962, leaf i = chunk i); the
 * answer is the set of chunks already held. PUT sends one chunk, any number of times. COMMIT makes the server compare
 * the root and make the file durable before it answers. An upload id names one content for ever: another root under the
 * same id is refused. Download: GET of a range of a named object, whose SHA-256 the caller knows beforehand.
 *
 * Encodings (base/buffer.h): id = string job, u32 round, u32 attempt, string name. BEGIN = id, u64 size, u32 chunk,
 * root[32] -> u8 committed, u32 n, bytes bitmap (bit i of byte i/8: chunk i is held). PUT = id, u32 i, bytes -> empty.
 * COMMIT = id -> empty. GET = string name, sha256[32], u64 offset, u32 length -> u64 total, bytes.
 *
 * A node:
 *
 *     struct transfer_options options = {.deadline_ms = 600000, .clock = &clock_system, .rng = rng};
 *     struct transfer_id id = {.job = "icd", .round = 7, .attempt = 1, .name = "masked"};
 *     if (transfer_upload(&channel, &id, vector, &options, &err) < 0) ... call it again: it resumes
 */
#ifndef PROTOCOL_TRANSPORT_TRANSFER_H
#define PROTOCOL_TRANSPORT_TRANSFER_H

#include "protocol/transport/rpc.h"

/* Methods reserved for transfers. */
enum { TRANSFER_BEGIN = 0x0100, TRANSFER_PUT = 0x0101, TRANSFER_COMMIT = 0x0102, TRANSFER_GET = 0x0103 };

#define TRANSFER_CHUNK_BYTES_MIN 1024
#define TRANSFER_CHUNKS_MAX (1u << 16)

/* job and name: tls_id_valid. */
struct transfer_id {
    char job[TLS_ID_SIZE];
    uint32_t round;
    uint32_t attempt;
    char name[TLS_ID_SIZE];
};

struct transfer_begin {
    struct transfer_id id;
    uint64_t size_bytes; /* ≥ 1 */
    uint32_t chunk_bytes;
    uint8_t root[TLS_HASH_BYTES];
};

struct transfer_get {
    char name[TLS_ID_SIZE];
    uint8_t sha256[TLS_HASH_BYTES];
    uint64_t offset;
    uint32_t length;
};

struct transfer_options {
    uint32_t chunk_bytes; /* 0: the largest power of two that the channel carries */
    int call_timeout_ms;  /* 0: 60 s for each request */
    int64_t deadline_ms;  /* a transfer repeats after ERR_CONNECT and ERR_TIMEOUT until then; 0: no repetition */
    const struct clock *clock;
    const struct rng *rng;
    void (*progress)(void *ctx, uint64_t done_bytes, uint64_t total_bytes); /* NULL: none */
    void *progress_ctx;
};

/* Borrows data until it returns. 0: the server has the whole of it, verified and durable. */
int MUST_USE transfer_upload(const struct rpc_channel *channel, const struct transfer_id *id, struct span data,
                             const struct transfer_options *options, struct error *err);

/* Appends the object to out (bounded by its maximum); ERR_INTEGRITY and out as before when the hash differs. */
int MUST_USE transfer_download(const struct rpc_channel *channel, const char *name,
                               const uint8_t sha256[TLS_HASH_BYTES], struct buffer *out,
                               const struct transfer_options *options, struct error *err);

/* To a file, resuming from path.part, renamed to path once complete, durable and verified; at most size_max bytes. */
int MUST_USE transfer_download_file(const struct rpc_channel *channel, const char *name,
                                    const uint8_t sha256[TLS_HASH_BYTES], const char *path, uint64_t size_max,
                                    const struct transfer_options *options, struct error *err);

/* The Merkle root that BEGIN announces. data.len ≥ 1, chunk_bytes ≥ 1. */
void transfer_root(struct span data, uint32_t chunk_bytes, uint8_t ret_root[TLS_HASH_BYTES]);

/* Server side of GET: decode, look the object up by name and hash, and answer from memory or from a file. */
int MUST_USE transfer_get_decode(struct span body, struct transfer_get *ret, struct error *err);
int MUST_USE transfer_get_reply(const struct transfer_get *get, struct span object, struct rpc_reply *reply);
int MUST_USE transfer_get_reply_file(const struct transfer_get *get, const char *path, struct rpc_reply *reply);

/* For spools and tests. */
int MUST_USE transfer_begin_decode(struct span body, struct transfer_begin *ret, struct error *err);
void transfer_id_encode(struct buffer *out, const struct transfer_id *id);

#endif
