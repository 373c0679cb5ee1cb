/*
 * The parameters of the exact discrete Gaussian, P(x) ∝ exp(−x²/(2σ²)) over the integers, σ² an integer. The draw
 * itself is base/gaussian_draw.h; both are plain integer arithmetic, shared by privacy/ and the CUDA kernels.
 */
#ifndef BASE_GAUSSIAN_H
#define BASE_GAUSSIAN_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#define GAUSSIAN_VARIANCE_MAX ((uint64_t)1 << 52)

/*
 * A vector of noise is cut into chunks of this many coordinates, and each chunk has a stream of random words of its
 * own, so that chunks can be drawn in any order and at once (privacy/noise_vector.h). Part of the noise's definition.
 */
#define GAUSSIAN_CHUNK 64

struct gaussian {
    unsigned __int128 denominator; /* 2σ²t² */
    uint64_t variance;             /* σ² */
    uint64_t scale;                /* t = ⌊σ⌋ + 1 of the discrete Laplace: 2 to 2^26 + 1 */
    uint64_t denominator_high;     /* its leading bits, denominator >> shift */
    unsigned shift;
};

/* False, and nothing written, unless variance is 1 to GAUSSIAN_VARIANCE_MAX. */
static inline bool gaussian_init(struct gaussian *g, uint64_t variance)
{
    if (variance == 0 || variance > GAUSSIAN_VARIANCE_MAX)
        return false;
    uint64_t root = (uint64_t)sqrt((double)variance);
    while (root * root > variance)
        root--;
    while ((root + 1) * (root + 1) <= variance)
        root++;
    g->variance = variance;
    g->scale = root + 1;
    g->denominator = (unsigned __int128)2 * variance * g->scale * g->scale;
    g->shift = 0;
    while (g->denominator >> g->shift >> 62)
        g->shift++;
    g->denominator_high = (uint64_t)(g->denominator >> g->shift);
    return true;
}

#endif
