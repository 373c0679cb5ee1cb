#include "tests/privacy/chi2.h"

#include "crypto/random.h"

#include <time.h>

static const uint8_t key[RANDOM_SEED_SIZE] = {9, 1};

static void test_chi2(void **state)
{
    static const uint64_t variances[] = {1, 2, 5, 9, 100, 2500};
    struct random_stream stream;
    (void)state;
    random_stream_init(&stream, key, "chi2");
    struct rng rng = random_stream_rng(&stream);
    for (size_t i = 0; i < ARRAY_LEN(variances); i++) {
        double score = chi2_score(variances[i], &rng, 300000);
        if (fabs(score) > 4.5)
            fail_msg("variance %u: chi-square is %.2f standard deviations off", (unsigned)variances[i], score);
    }
    random_stream_release(&stream);
}

/* Moments, tail and low bits at the scale that plans use: σ = 1.2 · 2^20. */
static void test_large_sigma(void **state)
{
    enum { DRAWS = 1000000 };
    struct random_stream stream;
    struct noise n;
    double sigma = 1.2 * 1048576, sums[5] = {0}, beyond2 = 0, beyond4 = 0, odd = 0;
    (void)state;
    random_stream_init(&stream, key, "large");
    struct rng rng = random_stream_rng(&stream);
    assert_int_equal(noise_init(&n, (uint64_t)ceil(sigma * sigma), &rng, NULL), 0);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < DRAWS; i++) {
        int64_t v = noise_draw(&n);
        double x = (double)v / sigma;
        odd += v & 1;
        sums[1] += x;
        sums[2] += x * x;
        sums[3] += x * x * x;
        sums[4] += x * x * x * x;
        beyond2 += fabs(x) > 2;
        beyond4 += fabs(x) > 4;
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    print_message("%.1f M samples/s\n",
                  DRAWS / 1e6 / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec)));
    noise_release(&n);
    random_stream_release(&stream);
    double root = sqrt(DRAWS);
    assert_near(sums[1] / root, 0, 5);
    assert_near((sums[2] - DRAWS) / root, 0, 5 * sqrt(2));
    assert_near(sums[3] / root, 0, 5 * sqrt(15));
    assert_near((sums[4] - 3.0 * DRAWS) / root, 0, 5 * sqrt(96));
    double p2 = erfc(M_SQRT2), p4 = erfc(2 * M_SQRT2);
    assert_near((beyond2 - DRAWS * p2) / sqrt(DRAWS * p2), 0, 5);
    assert_near((beyond4 - DRAWS * p4) / sqrt(DRAWS * p4), 0, 5);
    assert_near((odd - DRAWS / 2.0) / (root / 2), 0, 5);
}

static void test_known_answer(void **state)
{
    struct random_stream a, b;
    struct noise na, nb;
    int64_t x[100], y[100] = {0};
    (void)state;
    assert_int_equal(noise_self_test(&random_system, NULL), 0);
    random_stream_init(&a, key, "same");
    random_stream_init(&b, key, "same");
    struct rng ra = random_stream_rng(&a), rb = random_stream_rng(&b);
    assert_int_equal(noise_init(&na, (uint64_t)1 << 40, &ra, NULL), 0);
    assert_int_equal(noise_init(&nb, (uint64_t)1 << 40, &rb, NULL), 0);
    noise_fill(&na, x, 100);
    noise_add(&nb, y, 100);
    assert_memory_equal(x, y, sizeof x);
    noise_fill(&na, y, 100); /* the stream goes on, it does not repeat */
    assert_memory_not_equal(x, y, sizeof x);
}

static void constant_fill(void *ctx, void *out, size_t len)
{
    (void)ctx;
    for (size_t i = 0; i < len; i++)
        ((uint8_t *)out)[i] = i % 8 < 4 ? 0x80 : 0x10; /* descending for ever is impossible, but nothing is random */
}

static void test_self_test_sees_bad_randomness(void **state)
{
    struct rng bad = {constant_fill, NULL};
    struct error err = {0};
    (void)state;
    assert_int_equal(noise_self_test(&bad, &err), ERR_BUG);
}

static void test_bounds(void **state)
{
    struct noise n;
    (void)state;
    assert_int_equal(noise_init(&n, 0, &random_system, NULL), ERR_CONFIG);
    assert_int_equal(noise_init(&n, NOISE_VARIANCE_MAX + 1, &random_system, NULL), ERR_CONFIG);
    assert_int_equal(noise_init(&n, NOISE_VARIANCE_MAX, &random_system, NULL), 0);
    double squares = 0;
    for (int i = 0; i < 20000; i++) {
        double x = (double)noise_draw(&n) / 67108864;
        squares += x * x;
    }
    assert_near((squares - 20000) / sqrt(40000), 0, 5);
    noise_release(&n);
}

static void test_poisson(void **state)
{
    enum { UNITS = 500, ROUNDS = 4000 };
    uint32_t indices[UNITS], count;
    double each[UNITS] = {0}, sum = 0, squares = 0, pairs = 0;
    uint64_t threshold;
    bool all;
    struct random_stream stream;
    (void)state;
    random_stream_init(&stream, key, "poisson");
    struct rng rng = random_stream_rng(&stream);
    for (int r = 0; r < ROUNDS; r++) {
        assert_int_equal(poisson_sample(0.04, UNITS, &rng, indices, &count, NULL), 0);
        sum += count;
        squares += (double)count * count;
        for (uint32_t i = 0; i < count; i++) {
            assert_true(indices[i] < UNITS && (i == 0 || indices[i] > indices[i - 1]));
            each[indices[i]]++;
            pairs += i > 0 && indices[i] == indices[i - 1] + 1;
        }
    }
    /* A shuffled batch would have variance 0; binomial: N q (1 − q) = 19.2. */
    double mean = sum / ROUNDS, variance = squares / ROUNDS - mean * mean;
    assert_near(mean, 20, 5 * sqrt(19.2 / ROUNDS));
    assert_near(variance, 19.2, 5 * 19.2 * sqrt(2.0 / ROUNDS));
    for (int i = 0; i < UNITS; i++)
        assert_near(each[i], ROUNDS * 0.04, 5.5 * sqrt(ROUNDS * 0.04 * 0.96));
    double expected = (double)ROUNDS * (UNITS - 1) * 0.04 * 0.04; /* neighbours are independent */
    assert_near(pairs, expected, 6 * sqrt(expected * 1.1));
    assert_int_equal(poisson_sample(1, 7, &rng, indices, &count, NULL), 0);
    assert_int_equal(count, 7);
    assert_int_equal(poisson_sample(1e-12, 7, &rng, indices, &count, NULL), 0);
    assert_int_equal(count, 0);
    assert_int_equal(poisson_sample(NAN, 7, &rng, indices, &count, NULL), ERR_CONFIG);
    assert_int_equal(poisson_threshold(0.5, &threshold, &all, NULL), 0);
    assert_true(threshold == (uint64_t)1 << 63 && !all);
    random_stream_release(&stream);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chi2),         cmocka_unit_test(test_large_sigma),
        cmocka_unit_test(test_known_answer), cmocka_unit_test(test_self_test_sees_bad_randomness),
        cmocka_unit_test(test_bounds),       cmocka_unit_test(test_poisson)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
