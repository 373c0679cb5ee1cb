/*
 * From a float update to ring integers and back.
 *
 * delta is clipped to L2 norm update_clip (a contraction), multiplied by g = 2^grid_bits, rounded stochastically (up
 * with the probability of its fraction, from a cryptographic rng), clamped to +-clamp, and stored modulo 2^32. Sums of
 * n such vectors are exact while n*clamp < 2^31 (ring_clamp). The average divides by survivors * 2^grid_bits in double
 * and is the same bits on every IEEE machine. Thread-safe; nothing is allocated.
 *
 *     quantise_update(delta, d, 1.0, 20, clamp, &rng, ring, &info, &err);
 *     ... the ring sum of all sites ...
 *     quantise_average(sum, d, survivors, 20, average, &err);
 */
#ifndef PROTOCOL_QUANTISE_H
#define PROTOCOL_QUANTISE_H

#include "base/error.h"
#include "base/rng.h"

enum { GRID_BITS_MAX = 30 };

/* For the site's own eyes only: never sent, never logged. */
struct quantise_info {
    double norm;        /* L2, before the clip */
    double scale;       /* what the clip multiplied by, 1 when it did nothing */
    uint64_t saturated; /* values that met +-clamp */
};

/* delta: (words); ret_ring: (words). ret_info may be NULL. ERR_INTEGRITY for NaN or Inf (names the first index). */
int MUST_USE quantise_update(const float *delta, size_t words, double update_clip, unsigned grid_bits, uint32_t clamp,
                             const struct rng *rng, uint32_t *ret_ring, struct quantise_info *ret_info,
                             struct error *err);

/* sum: (words) ring sum of `survivors` sites; ret_average: (words) floats. */
int MUST_USE quantise_average(const uint32_t *sum, size_t words, uint32_t survivors, unsigned grid_bits,
                              float *ret_average, struct error *err);

#endif
