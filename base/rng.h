/*
 * The one injected source of randomness and secrets.
 *
 * Nothing else in the tree draws random numbers. The system source (libsodium) and the keyed ChaCha20 stream for tests,
 * frozen LoRA factors and DP noise are in crypto/random.h. An implementation never fails: it ends the process instead.
 */
#ifndef BASE_RNG_H
#define BASE_RNG_H

#include <stddef.h>
#include <stdint.h>

struct rng {
    void (*fill)(void *ctx, void *out, size_t len);
    void *ctx;
};

static inline void rng_fill(const struct rng *rng, void *out, size_t len)
{
    rng->fill(rng->ctx, out, len);
}

static inline uint64_t rng_u64(const struct rng *rng)
{
    uint64_t v;
    rng->fill(rng->ctx, &v, sizeof v);
    return v;
}

/* Uniform in [0, bound), bound ≥ 1, without modulo bias. */
static inline uint64_t rng_below(const struct rng *rng, uint64_t bound)
{
    uint64_t limit = UINT64_MAX - (UINT64_MAX % bound + 1) % bound;
    uint64_t v;
    do
        v = rng_u64(rng);
    while (v > limit);
    return v % bound;
}

/* Uniform in [0, 1), 53 bits. Not for DP noise: the exact sampler uses integers only. */
static inline double rng_unit(const struct rng *rng)
{
    return (double)(rng_u64(rng) >> 11) * 0x1p-53;
}

#endif
