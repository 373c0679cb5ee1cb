/*
 * Shamir's secret sharing over Z_L, L = 2^252 + 27742317777372353535851937790883648493 the order of ristretto255 (RFC
 * 9496), with libsodium's scalar arithmetic (constant time). Scalars are 32 bytes little-endian below L.
 *
 * A polynomial of degree t − 1 with uniform coefficients, the secret at 0, the share of index i (from 1) its value at
 * i. Any t shares give the secret, t − 1 say nothing. Combining does not detect wrong shares: the caller checks the
 * result against the advertised key or hash. A combiner holds the Lagrange coefficients of one set of indices and
 * serves any number of secrets. Thread-safe; a ready combiner may be shared.
 *
 *     shamir_split(secret, 4, 5, &random_system, shares);
 *     struct shamir_combiner c;
 *     if (shamir_combiner_init(&c, (uint32_t[]){1, 2, 4, 5}, 4, &err) < 0) ...
 *     if (shamir_combine(&c, held, secret) < 0) ...          held: 4 shares in the order of the indices
 *     shamir_combiner_release(&c);
 */
#ifndef CRYPTO_SHAMIR_H
#define CRYPTO_SHAMIR_H

#include "base/error.h"
#include "base/rng.h"

enum { SHAMIR_SIZE = 32, SHAMIR_SHARES_MAX = 65535 };

/* Uniform modulo L (64 random bytes reduced). */
void shamir_random(uint8_t out[SHAMIR_SIZE], const struct rng *rng);
bool MUST_USE shamir_is_canonical(const uint8_t scalar[SHAMIR_SIZE]);

/* shares: (n, 32), share of index i at shares[i − 1]. ERR_CONFIG unless 1 ≤ threshold ≤ n ≤ SHAMIR_SHARES_MAX;
 * ERR_INTEGRITY for a secret that is not below L; ERR_RESOURCES. Coefficients are wiped. */
int MUST_USE shamir_split(const uint8_t secret[SHAMIR_SIZE], uint32_t threshold, uint32_t n, const struct rng *rng,
                          uint8_t (*ret_shares)[SHAMIR_SIZE], struct error *err);

struct shamir_combiner {
    size_t count;
    uint8_t (*coefficients)[SHAMIR_SIZE]; /* (count, 32), owned */
};

/* indices: exactly as many as shares will be given, at least the threshold (the caller's duty), each in 1..65535 and
 * distinct, ERR_INTEGRITY otherwise. */
int MUST_USE shamir_combiner_init(struct shamir_combiner *c, const uint32_t *indices, size_t count, struct error *err);
void shamir_combiner_release(struct shamir_combiner *c); /* accepts NULL and zeroed */
/* shares: (count, 32) in the order of the indices. ERR_INTEGRITY for a share that is not below L. */
int MUST_USE shamir_combine(const struct shamir_combiner *c, const uint8_t (*shares)[SHAMIR_SIZE],
                            uint8_t ret_secret[SHAMIR_SIZE]);

#endif
