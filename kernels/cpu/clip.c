/*
 * Clip one unit's gradient onto the integer grid. The bound on what one unit adds must hold for the integers that are
 * added, not for the floats they came from: hence the exact check.
 */
#include "kernels/cpu/internal.h"

#include <math.h>

#define LANES 8

/* Sum of squares in LANES interleaved double sums, added in order: the same bits everywhere. Squares of floats neither
 * overflow nor vanish in double, so the sum is finite exactly if every value is. */
static double sum_of_squares(size_t n, const float *g)
{
    double lanes[LANES] = {0}, sum = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++)
            lanes[j] += (double)g[i + (size_t)j] * (double)g[i + (size_t)j];
    }
    for (; i < n; i++)
        lanes[0] += (double)g[i] * (double)g[i];
    for (int j = 0; j < LANES; j++)
        sum += lanes[j];
    return sum;
}

/* Nearest integer, ties to even, for |x| < 2^51: adding 1.5·2^52 leaves no bits for a fraction. */
static inline int64_t round_even(double x)
{
    double shifted = x + 0x1.8p52;
    return (int64_t)(shifted - 0x1.8p52);
}

static unsigned __int128 integer_squares(size_t n, const float *g, double scale)
{
    unsigned __int128 sum = 0;
    for (size_t i = 0; i < n; i += LANES) {
        uint64_t block = 0; /* 8 squares below 2^61 */
        size_t end = n - i < LANES ? n : i + LANES;
        for (size_t j = i; j < end; j++) {
            int64_t v = round_even((double)g[j] * scale);
            block += (uint64_t)(v * v);
        }
        sum += block;
    }
    return sum;
}

/* The largest whole number that is at most a·b, exactly. */
static uint64_t product_floor(double a, double b)
{
    double p = a * b, error = fma(a, b, -p), whole = floor(p);
    if (whole == p && error < 0)
        whole -= 1;
    return (uint64_t)whole;
}

void clip_accumulate(size_t n, const float *g, const struct clip_params *params, int64_t *sum,
                     struct clip_result *ret_result)
{
    struct clip_result result = {0};
    double slack = sqrt((double)n) / (2 * params->grid), bound = params->clip - slack;
    assert(params->clip > 0 && params->grid > 0 && params->clip * params->grid <= 0x1p30 && bound > 0);
    uint64_t limit = product_floor(params->clip, params->grid);
    unsigned __int128 limit_squared = (unsigned __int128)limit * limit;
    double squares = sum_of_squares(n, g);
    result.finite = isfinite(squares);
    if (!result.finite) {
        *ret_result = result;
        return;
    }
    result.norm = sqrt(squares);
    result.clipped = result.norm > bound;
    result.factor = result.clipped ? bound / result.norm : 1.0;
    /* A factor that underflowed to an absurd scale cannot occur: norm < 2^160. Each shrink halves the excess away; at
     * factor 0 every integer is 0, so the loop ends. */
    while (integer_squares(n, g, result.factor * params->grid) > limit_squared) {
        result.shrinks++;
        result.factor =
            result.shrinks < 64 ? result.factor * (1 - 0x1p-20 * (double)(1ull << (result.shrinks / 4))) : 0.0;
        result.clipped = true;
    }
    double scale = result.factor * params->grid;
    for (size_t i = 0; i < n; i++)
        sum[i] += round_even((double)g[i] * scale);
    *ret_result = result;
}
