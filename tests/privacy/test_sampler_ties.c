/*
 * The same sampler compiled with 2-bit words: every comparison of random reals ties one time in four, so the paths that
 * draw further words are taken all the time and the distribution must still be exact.
 */
#define GAUSSIAN_WORD_BITS 2
#include "privacy/sampler.c"

#include "crypto/random.h"
#include "tests/privacy/chi2.h"

static void test_exact_with_ties(void **state)
{
    static const uint64_t variances[] = {1, 2, 3, 7, 16, 50, 333, 1000};
    static const uint8_t key[RANDOM_SEED_SIZE] = {4};
    struct random_stream stream;
    (void)state;
    random_stream_init(&stream, key, "test");
    struct rng rng = random_stream_rng(&stream);
    for (size_t i = 0; i < ARRAY_LEN(variances); i++) {
        double score = chi2_score(variances[i], &rng, 200000);
        if (fabs(score) > 4.5)
            fail_msg("variance %u: chi-square is %.2f standard deviations off", (unsigned)variances[i], score);
    }
    random_stream_release(&stream);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_exact_with_ties)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
