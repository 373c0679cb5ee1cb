/*
 * Exact discrete Gaussian noise and Poisson sampling, by integers only.
 *
 * Discrete Gaussian: P(x) ∝ exp(−x²/(2σ²)) over the integers (Canonne, Kamath, Steinke, "The Discrete Gaussian for
 * Differential Privacy", 2020, algorithm 3), by the arithmetic of base/gaussian_draw.h. Random bytes are read in blocks
 * from the injected stream and wiped. One thread per struct noise; the time a draw takes depends on the secret value,
 * so generate it off any path that a peer can time. A whole vector at once, on several threads: privacy/noise_vector.h.
 *
 *     struct noise n;
 *     rc = noise_init(&n, plan_variance, &rng, &err);
 *     noise_add(&n, vector, d);            vector[i] += one draw each
 *     noise_release(&n);
 */
#ifndef PRIVACY_SAMPLER_H
#define PRIVACY_SAMPLER_H

#include "base/error.h"
#include "base/gaussian.h"
#include "base/rng.h"

#define NOISE_VARIANCE_MAX GAUSSIAN_VARIANCE_MAX
#define NOISE_WORDS 640 /* what GAUSSIAN_CHUNK draws take, most often */

struct noise {
    struct gaussian gaussian; /* σ in grid units */
    const struct rng *rng;
    uint32_t signs; /* unused random bits */
    unsigned signs_left;
    unsigned next; /* words[next..NOISE_WORDS) are unused */
    uint32_t words[NOISE_WORDS];
};

/* variance in 1..NOISE_VARIANCE_MAX, otherwise ERR_CONFIG. rng must outlive it. */
int MUST_USE noise_init(struct noise *n, uint64_t variance, const struct rng *rng, struct error *err);
void noise_release(struct noise *n); /* wipes the unused random words */
/* As a new one: rng now gives other bytes than those that were read ahead, which are wiped. */
void noise_restart(struct noise *n);
int64_t noise_draw(struct noise *n);
void noise_fill(struct noise *n, int64_t *out, size_t count);
/* vector[i] += draw; asserts that no element leaves int64 (sums of clipped grids are far from it). */
void noise_add(struct noise *n, int64_t *vector, size_t count);

/* ⌊q·2^64⌋, exactly; q = 1 gives 0 with *ret_all true. ERR_CONFIG unless 0 < q ≤ 1. */
int MUST_USE poisson_threshold(double q, uint64_t *ret_threshold, bool *ret_all, struct error *err);
/*
 * One Poisson sample: each unit 0..units−1 is included when its own u64 is below ⌊q·2^64⌋. Indices ascending into
 * indices[units]; the number may be 0, and then the step is still done (noise only).
 */
int MUST_USE poisson_sample(double q, uint32_t units, const struct rng *rng, uint32_t *indices, uint32_t *ret_count,
                            struct error *err);

/* Repeats a fixed known-answer draw and a coarse moment check on the live stream before the first use: ERR_BUG. */
int MUST_USE noise_self_test(const struct rng *rng, struct error *err);

#endif
