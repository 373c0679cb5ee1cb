/*
 * The two implementations of struct rng (base/rng.h).
 *
 * random_system: the kernel's generator through libsodium's randombytes_buf. Any thread. Every key, nonce and mask
 * secret comes from it, and so do the 32-byte seeds of the streams below when they must be secret.
 *
 * struct random_stream: the ChaCha20 keystream (RFC 8439 block function, key = HKDF-SHA256(key, info =
 * "consilium/stream" ‖ label), nonce and first counter 0). The 32-bit block counter carries into the first nonce word,
 * so 2^70 bytes may be drawn. The same key and label give the same bytes on every machine whatever the sizes of the
 * draws. One thread at a time; a stream is neither copied nor stored: two copies would repeat their output.
 *
 *     struct random_stream stream;
 *     random_stream_init(&stream, seed, "dp-noise");
 *     struct rng rng = random_stream_rng(&stream);
 *     uint64_t v = rng_u64(&rng);
 *     random_stream_release(&stream);
 *
 * random_stream_key and random_stream_nonce open many streams under one key: the same keystream, for a nonce of the
 * caller's, who must never use a (key, nonce) twice for secrets. Such a stream ends after 2^32 blocks (the process ends
 * rather than that its counter carries into another stream's nonce).
 */
#ifndef CRYPTO_RANDOM_H
#define CRYPTO_RANDOM_H

#include "base/rng.h"

#include <stdbool.h>

extern const struct rng random_system;

enum { RANDOM_SEED_SIZE = 32, RANDOM_NONCE_SIZE = 12, RANDOM_STREAM_BUFFER = 1024 };

struct random_stream {
    uint8_t key[RANDOM_SEED_SIZE];
    uint8_t nonce[RANDOM_NONCE_SIZE];
    bool one_nonce;      /* next_block stays below 2^32 */
    uint64_t next_block; /* of 64 bytes, not yet in buffer */
    size_t used;         /* bytes of buffer handed out, and wiped */
    uint8_t buffer[RANDOM_STREAM_BUFFER];
};

void random_stream_init(struct random_stream *s, const uint8_t key[RANDOM_SEED_SIZE], const char *label);
/* A stream whose key is drawn from `source` (random_system outside tests). */
void random_stream_seeded(struct random_stream *s, const struct rng *source, const char *label);
/* The key that random_stream_init derives. */
void random_stream_key(uint8_t ret_key[RANDOM_SEED_SIZE], const uint8_t key[RANDOM_SEED_SIZE], const char *label);
/* From block 0 of (key, nonce); key as random_stream_key gives it. */
void random_stream_nonce(struct random_stream *s, const uint8_t key[RANDOM_SEED_SIZE],
                         const uint8_t nonce[RANDOM_NONCE_SIZE]);
void random_stream_fill(struct random_stream *s, void *out, size_t len);
/* Borrows s, which must outlive it and must not move. */
struct rng random_stream_rng(struct random_stream *s);
/* Wipes the key and what was not handed out. Accepts NULL. */
void random_stream_release(struct random_stream *s);

#endif
