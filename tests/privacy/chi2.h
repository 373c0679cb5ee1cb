/* χ² of discrete Gaussian draws against the exact probabilities. */
#ifndef TESTS_PRIVACY_CHI2_H
#define TESTS_PRIVACY_CHI2_H

#include "tests/privacy/support.h"

#include "privacy/sampler.h"

/* (statistic − degrees) / √(2 degrees): about a standard normal when the sampler is exact. */
static double chi2_score(uint64_t variance, const struct rng *rng, int draws)
{
    enum { SPAN = 400 };
    static double counts[2 * SPAN + 1], p[2 * SPAN + 1];
    struct noise n;
    double total = 0, statistic = 0, pooled_count = 0, pooled = 0;
    int cells = 0;
    assert_int_equal(noise_init(&n, variance, rng, NULL), 0);
    for (int x = -SPAN; x <= SPAN; x++) {
        counts[x + SPAN] = 0;
        total += p[x + SPAN] = exp(-(double)x * x / (2.0 * (double)variance));
    }
    for (int i = 0; i < draws; i++) {
        int64_t x = noise_draw(&n);
        assert_true(x >= -SPAN && x <= SPAN);
        counts[x + SPAN]++;
    }
    noise_release(&n);
    for (int i = 0; i <= 2 * SPAN; i++) {
        double expected = draws * p[i] / total;
        if (expected < 10) { /* the tails are one cell */
            pooled += expected;
            pooled_count += counts[i];
            continue;
        }
        statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
        cells++;
    }
    if (pooled > 5) {
        statistic += (pooled_count - pooled) * (pooled_count - pooled) / pooled;
        cells++;
    }
    return (statistic - (cells - 1)) / sqrt(2.0 * (cells - 1));
}

#endif
