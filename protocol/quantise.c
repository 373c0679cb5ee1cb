#include "protocol/quantise.h"

#include <math.h>

enum { DRAWS = 1024 };

int quantise_update(const float *delta, size_t words, double update_clip, unsigned grid_bits, uint32_t clamp,
                    const struct rng *rng, uint32_t *ret_ring, struct quantise_info *ret_info, struct error *err)
{
    double sum = 0.0, scale = 1.0, factor;
    uint64_t saturated = 0;
    uint32_t draws[DRAWS];

    assert(grid_bits >= 1 && grid_bits <= GRID_BITS_MAX && clamp > 0 && clamp <= INT32_MAX);
    assert(update_clip > 0 && isfinite(update_clip));
    for (size_t i = 0; i < words; i++) {
        if (!isfinite(delta[i]))
            return error_set(err, ERR_INTEGRITY,
                             "the update has a value that is not finite at index %zu: lower the learning rate", i);
        sum += (double)delta[i] * delta[i]; /* 2^256 is far inside a double: cannot overflow */
    }
    double norm = sqrt(sum);
    if (norm > update_clip)
        scale = update_clip / norm;
    factor = scale * ldexp(1.0, (int)grid_bits);
    for (size_t i = 0; i < words; i++) {
        if (i % DRAWS == 0)
            rng_fill(rng, draws, sizeof draws);
        double x = (double)delta[i] * factor;
        double down = floor(x);
        double v = down + ((double)draws[i % DRAWS] * 0x1p-32 < x - down ? 1.0 : 0.0);
        if (v > clamp || v < -(double)clamp) {
            v = v > 0 ? (double)clamp : -(double)clamp;
            saturated++;
        }
        ret_ring[i] = (uint32_t)(int32_t)v;
    }
    if (ret_info)
        *ret_info = (struct quantise_info){norm, scale, saturated};
    return 0;
}

int quantise_average(const uint32_t *sum, size_t words, uint32_t survivors, unsigned grid_bits, float *ret_average,
                     struct error *err)
{
    if (survivors == 0 || grid_bits < 1 || grid_bits > GRID_BITS_MAX)
        return error_set(err, ERR_INTEGRITY, "no average over %u survivors on a grid of %u bits", survivors, grid_bits);
    double denominator = (double)survivors * ldexp(1.0, (int)grid_bits);
    for (size_t i = 0; i < words; i++)
        ret_average[i] = (float)((double)(int32_t)sum[i] / denominator);
    return 0;
}
