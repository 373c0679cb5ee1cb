/*
 * Mask streams: the one-time pads over Z_2^32 and Z_2^64 that hide a site's vector.
 *
 * A stream is the keystream of AES-256 in counter mode (NIST SP 800-38A) or of ChaCha20 (RFC 8439), nonce and first
 * counter 0, one key per (attempt, pair or self, vector name, ring), so no two vectors share a stream. Word i is bytes
 * 4i to 4i+3 (8i to 8i+7 in 64 bits) of it, little-endian, and may be produced without the words before it: any
 * chunking gives identical results. Of a pair, the site with the lower id adds the stream and the other subtracts it.
 *
 * mask_apply brings all k streams onto one 16 KiB tile before the next tile, so the vector passes through memory once.
 * A cipher failure ends the process: a vector never leaves with a mask missing. One thread at a time per stream (it
 * holds cipher state); threads that share the work make their own streams from the keys.
 *
 *     uint8_t key[MASK_KEY_SIZE];
 *     mask_pair_key(shared, h2, "main", 32, own_id, peer_id, key);
 *     if (mask_stream_init(&stream, MASK_SUITE_AES_256_CTR, key, &err) < 0) ...
 *     mask_apply(streams, signs, k, vector, 0, words);
 */
#ifndef CRYPTO_MASK_H
#define CRYPTO_MASK_H

#include "base/error.h"

enum { MASK_KEY_SIZE = 32 };

/* Ids travel in M0. 0 is invalid; ids above 2 are free for suites with a hybrid post-quantum agreement. */
enum mask_suite { MASK_SUITE_AES_256_CTR = 1, MASK_SUITE_CHACHA20 = 2 };

struct mask_stream {
    struct evp_cipher_ctx_st *cipher; /* OpenSSL's EVP_CIPHER_CTX, owned */
    enum mask_suite suite;
};

bool mask_suite_known(uint32_t suite);
const char *mask_suite_name(enum mask_suite suite);

/* key = HKDF-SHA256(shared, salt = h2, labelled info (crypto/hash.h) of "consilium/mask/pair", vector, ring_bits, lower
 * id, higher id). Both ends get the same key in either order of ids. ring_bits is 32 or 64, the ids differ (asserted).
 */
void mask_pair_key(const uint8_t shared[32], const uint8_t h2[32], const char *vector, unsigned ring_bits,
                   const char *id_a, const char *id_b, uint8_t out[MASK_KEY_SIZE]);
/* The self mask: HKDF-SHA256(b, salt = h2, labelled info of "consilium/mask/self", vector, ring_bits, id). */
void mask_self_key(const uint8_t b[32], const uint8_t h2[32], const char *vector, unsigned ring_bits, const char *id,
                   uint8_t out[MASK_KEY_SIZE]);
/* +1 if own sorts before peer (bytewise), else −1. The self mask is always +1. */
int mask_pair_sign(const char *own, const char *peer);

/* Copies the key into the cipher; the caller wipes his. ERR_CONFIG for an unknown suite, ERR_RESOURCES. */
int MUST_USE mask_stream_init(struct mask_stream *s, enum mask_suite suite, const uint8_t key[MASK_KEY_SIZE],
                              struct error *err);
void mask_stream_release(struct mask_stream *s); /* wipes; accepts NULL and zeroed */

/* vector[i] += Σ_j signs[j] · stream_j[first_word + i] mod 2^32 for i < words; signs are +1 or −1 (asserted). */
void mask_apply(struct mask_stream *const *streams, const int *signs, size_t k, uint32_t *vector, uint64_t first_word,
                size_t words);
/* The same over Z_2^64, for small statistics. */
void mask_apply64(struct mask_stream *const *streams, const int *signs, size_t k, uint64_t *vector, uint64_t first_word,
                  size_t words);

#endif
