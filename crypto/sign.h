/*
 * Ed25519 (RFC 8032, computed by libsodium) over labelled messages, never over bare bytes.
 *
 * What is signed is "consilium signature v1" ‖ 0x00 ‖ the labelled hash of (label, parts), crypto/hash.h.
 * The prefix keeps these signatures apart from the ones that the same identity key makes in TLS and in certificates.
 * Labels name the message kind and version, for example "consilium/m5"; parts start with what binds the message: the
 * site id and the previous hash. Verification refuses low-order keys and non-canonical signatures. Thread-safe: no
 * state.
 *
 *     const struct span parts[] = {span_str(site), span_of(h2, HASH_SIZE), span_of(root, HASH_SIZE)};
 *     sign_parts(&key, "consilium/m5", parts, 3, signature);
 */
#ifndef CRYPTO_SIGN_H
#define CRYPTO_SIGN_H

#include "base/error.h"
#include "base/rng.h"
#include "base/span.h"

enum { SIGN_SIZE = 64, SIGN_PUBLIC_SIZE = 32, SIGN_SEED_SIZE = 32, SIGN_SECRET_SIZE = 64 };

struct sign_key {
    uint8_t secret[SIGN_SECRET_SIZE]; /* seed ‖ public key; secret memory, wiped by the owner */
    uint8_t public_key[SIGN_PUBLIC_SIZE];
};

void sign_key_random(struct sign_key *key, const struct rng *rng);
void sign_key_from_seed(struct sign_key *key, const uint8_t seed[SIGN_SEED_SIZE]);

void sign_parts(const struct sign_key *key, const char *label, const struct span *parts, size_t count,
                uint8_t out[SIGN_SIZE]);
/* 0, or ERR_INTEGRITY. */
int MUST_USE sign_verify(const uint8_t public_key[SIGN_PUBLIC_SIZE], const char *label, const struct span *parts,
                         size_t count, const uint8_t signature[SIGN_SIZE]);

/* The same over one labelled hash that was made in pieces with hash_begin(label) … hash_end. */
void sign_hash(const struct sign_key *key, const uint8_t labelled_hash[32], uint8_t out[SIGN_SIZE]);
int MUST_USE sign_verify_hash(const uint8_t public_key[SIGN_PUBLIC_SIZE], const uint8_t labelled_hash[32],
                              const uint8_t signature[SIGN_SIZE]);

#endif
