/*
 * X25519 key agreement (RFC 7748, computed by libsodium).
 *
 * The raw shared value is never a key: pass it through hkdf_labelled. Public keys that arrive are refused when they are
 * of low order (the shared value would be zero whatever the secret) or not canonical (two encodings of one point would
 * pass a test for duplicates). Thread-safe: no state.
 *
 *     struct agree_key key;
 *     agree_random(&key, &random_system);
 *     if (agree_shared(key.secret, peer_public, shared) < 0) ...refuse the peer
 */
#ifndef CRYPTO_AGREE_H
#define CRYPTO_AGREE_H

#include "base/error.h"
#include "base/rng.h"

enum { AGREE_SIZE = 32 };

struct agree_key {
    uint8_t secret[AGREE_SIZE]; /* before clamping; secret memory, wiped by the owner */
    uint8_t public_key[AGREE_SIZE];
};

void agree_random(struct agree_key *key, const struct rng *rng);
/* From 32 given bytes, clamped inside X25519 as usual. */
void agree_from_secret(struct agree_key *key, const uint8_t secret[AGREE_SIZE]);
/* 0, or ERR_INTEGRITY for a low-order or non-canonical key. */
int MUST_USE agree_check_public(const uint8_t public_key[AGREE_SIZE]);
/* ERR_INTEGRITY for a refused public key or an all-zero result; ret_shared is then untouched. */
int MUST_USE agree_shared(const uint8_t secret[AGREE_SIZE], const uint8_t peer_public[AGREE_SIZE],
                          uint8_t ret_shared[AGREE_SIZE]);

#endif
