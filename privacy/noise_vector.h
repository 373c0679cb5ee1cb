/*
 * Discrete Gaussian noise for whole vectors, in parallel, with the same bits on any number of threads and on a GPU.
 *
 * A draw takes an unpredictable number of random words, so one stream of words cannot be cut among threads. Instead a
 * vector is cut into chunks of GAUSSIAN_CHUNK coordinates (the last may be shorter), and each chunk draws its
 * coordinates in order, as noise_draw does, from a ChaCha20 keystream of its own: key = the source's, block function
 * and counter (from 0) of RFC 8439, nonce = vector number (32 bits) ‖ chunk number (64 bits), both little endian; word
 * i of the stream is its bytes 4i … 4i+3, little endian.
 *
 * Invariants
 * - A source numbers its vectors itself, from 0, and never gives a number twice; its key is drawn by it and used for
 *   nothing else. So no (key, nonce) is used twice, and different chunks' words are as independent as those of one
 *   stream: the noise is exact as noise_draw's is. A source is neither copied nor stored, both would repeat noise.
 * - The key is as secret as the noise. Wiped here: keys, words and counters when they are done with.
 * - kernels/cuda/noise.cu makes the same numbers from the key and a number that noise_source_take has given.
 *
 * One thread at a time per source.
 *
 *     struct noise_source noise;
 *     if (noise_source_init(&noise, plan_variance, &random_system, err) < 0) return err->code;
 *     noise_vector_add(&noise, vector, count, threads);
 *     noise_source_release(&noise);
 */
#ifndef PRIVACY_NOISE_VECTOR_H
#define PRIVACY_NOISE_VECTOR_H

#include "base/error.h"
#include "base/gaussian.h"
#include "base/rng.h"

#define NOISE_THREADS_MAX 256

struct noise_source {
    uint8_t key[32];
    struct gaussian gaussian; /* σ in grid units */
    uint32_t vectors;         /* numbers given */
};

/* key = HKDF of a seed drawn from seeds, label "dp-noise" (crypto/random.h). Variance in 1..NOISE_VARIANCE_MAX,
 * otherwise ERR_CONFIG. */
int MUST_USE noise_source_init(struct noise_source *source, uint64_t variance, const struct rng *seeds,
                               struct error *err);
void noise_source_release(struct noise_source *source); /* wipes it; accepts NULL */

/* The number of the next vector, for whoever makes it elsewhere. The process ends after 2^32 − 1 of them. */
uint32_t noise_source_take(struct noise_source *source);
/* The source's next vector: vector[i] += its coordinate i. The process ends if a sum leaves int64 (sums of clipped
 * grids are far from it). threads ≥ 1, of which at most NOISE_THREADS_MAX are used, fewer if they cannot be had. */
void noise_vector_add(struct noise_source *source, int64_t *vector, size_t count, int threads);

/* noise_self_test, and a known answer of the division into chunks: before a source's first use. ERR_BUG. */
int MUST_USE noise_source_self_test(const struct rng *rng, struct error *err);

#endif
