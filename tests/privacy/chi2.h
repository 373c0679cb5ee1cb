/* χ² of discrete Gaussian draws against the exact probabilities. */
#ifndef TESTS_PRIVACY_CHI2_H
#define TESTS_PRIVACY_CHI2_H

#include "tests/privacy/support.h"

#include "privacy/sampler.h"

/* (statistic − degrees) / √(2 degrees): about a standard normal when the sampler is exact. */
static double chi2_of(uint64_t variance, const int64_t *x, size_t draws)
{
    enum { SPAN = 400 };
    static double counts[2 * SPAN + 1], p[2 * SPAN + 1];
    double total = 0, statistic = 0, pooled_count = 0, pooled = 0;
    int cells = 0;
    for (int i = -SPAN; i <= SPAN; i++) {
        counts[i + SPAN] = 0;
        total += p[i + SPAN] = exp(-(double)i * i / (2.0 * (double)variance));
    }
    for (size_t i = 0; i < draws; i++) {
        assert_true(x[i] >= -SPAN && x[i] <= SPAN);
        counts[x[i] + SPAN]++;
    }
    for (int i = 0; i <= 2 * SPAN; i++) {
        double expected = (double)draws * p[i] / total;
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

/* Of draws from rng. */
static inline double chi2_score(uint64_t variance, const struct rng *rng, size_t draws)
{
    int64_t *x = malloc(draws * sizeof *x);
    struct noise n;
    assert_non_null(x);
    assert_int_equal(noise_init(&n, variance, rng, NULL), 0);
    noise_fill(&n, x, draws);
    noise_release(&n);
    double score = chi2_of(variance, x, draws);
    free(x);
    return score;
}

#endif
