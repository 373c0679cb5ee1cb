#include "tests/privacy/chi2.h"
#include "tests/privacy/noise_reference.h"

#include "crypto/random.h"
#include "privacy/noise_vector.h"

#include <time.h>

static const uint8_t seed_key[RANDOM_SEED_SIZE] = {9, 2};

static uint32_t get_u32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static void source_init(struct noise_source *source, uint64_t variance)
{
    struct random_stream stream;
    random_stream_init(&stream, seed_key, "seeds");
    struct rng rng = random_stream_rng(&stream);
    assert_int_equal(noise_source_init(source, variance, &rng, NULL), 0);
    random_stream_release(&stream);
}

/* Every coordinate is what the definition says, on any number of threads, and added to what was there. */
static void test_reference(void **state)
{
    enum { COUNT_MAX = 4097 };
    static int64_t expected[COUNT_MAX], vector[COUNT_MAX + 1];
    (void)state;
    for (size_t v = 0; v < ARRAY_LEN(noise_variances); v++)
        for (size_t c = 0; c < ARRAY_LEN(noise_counts); c++) {
            size_t count = noise_counts[c];
            for (int threads = 1; threads <= 5; threads += 2) {
                struct noise_source source;
                uint32_t key[8];
                source_init(&source, noise_variances[v]);
                source.vectors = (uint32_t)(1000 * c);
                for (int i = 0; i < 8; i++)
                    key[i] = get_u32(source.key + 4 * i);
                reference_noise(key, (uint32_t)(1000 * c), noise_variances[v], count, expected);
                for (size_t i = 0; i <= count; i++)
                    vector[i] = (int64_t)i - 7;
                noise_vector_add(&source, vector, count, threads);
                for (size_t i = 0; i < count; i++)
                    assert_int_equal(vector[i], expected[i] + (int64_t)i - 7);
                assert_int_equal(vector[count], (int64_t)count - 7); /* nothing beyond */
                assert_int_equal(source.vectors, 1000 * c + 1);
                noise_source_release(&source);
            }
        }
}

/* Many chunks on several threads at once, each more than a handful. */
static void test_threads(void **state)
{
    enum { COUNT = 64 * 64 * 40 + 17 };
    int64_t *one = calloc(COUNT, sizeof *one), *many = calloc(COUNT, sizeof *many);
    struct noise_source a, b;
    (void)state;
    assert_non_null(one);
    assert_non_null(many);
    source_init(&a, (uint64_t)1 << 40);
    source_init(&b, (uint64_t)1 << 40);
    for (int i = 0; i < 3; i++) {
        noise_vector_add(&a, one, COUNT, 1);
        noise_vector_add(&b, many, COUNT, 7);
        assert_memory_equal(one, many, COUNT * sizeof *one);
    }
    free(one);
    free(many);
}

/* Chunks of a vector, vectors of a source and sources differ in every coordinate, but for chance: σ is 2^26. */
static void test_nothing_repeats(void **state)
{
    enum { COUNT = 256 };
    int64_t v[3][COUNT] = {{0}};
    struct noise_source source, other;
    (void)state;
    source_init(&source, NOISE_VARIANCE_MAX);
    assert_int_equal(noise_source_init(&other, NOISE_VARIANCE_MAX, &random_system, NULL), 0);
    noise_vector_add(&source, v[0], COUNT, 2);
    noise_vector_add(&source, v[1], COUNT, 2);
    noise_vector_add(&other, v[2], COUNT, 2);
    assert_int_equal(noise_source_take(&source), 2);
    assert_int_equal(noise_source_take(&source), 3);
    size_t same = 0;
    for (size_t i = 0; i < COUNT; i++)
        for (size_t j = 0; j < COUNT; j++) {
            same += v[0][i] == v[1][j];
            same += v[0][i] == v[2][j];
            same += i != j && v[0][i] == v[0][j];
        }
    assert_in_range(same, 0, 4);
    noise_source_release(&source);
    assert_int_equal(source.key[0], 0);
    noise_source_release(NULL);
}

/* The key: a seed of 32 bytes, HKDF with the label. */
static void test_key(void **state)
{
    struct random_stream stream;
    struct noise_source source;
    uint8_t seed[RANDOM_SEED_SIZE], expected[RANDOM_SEED_SIZE];
    (void)state;
    random_stream_init(&stream, seed_key, "seeds");
    random_stream_fill(&stream, seed, sizeof seed);
    random_stream_key(expected, seed, "dp-noise");
    source_init(&source, 1);
    assert_memory_equal(source.key, expected, sizeof expected);
    random_stream_release(&stream);
    noise_source_release(&source);
}

static void test_bounds(void **state)
{
    struct noise_source source;
    (void)state;
    assert_int_equal(noise_source_init(&source, 0, &random_system, NULL), ERR_CONFIG);
    assert_int_equal(noise_source_init(&source, NOISE_VARIANCE_MAX + 1, &random_system, NULL), ERR_CONFIG);
    assert_int_equal(noise_source_self_test(&random_system, NULL), 0);
}

/* χ² over whole vectors, and of the coordinate at each place of a chunk (the first words of many streams). */
static void test_chi2(void **state)
{
    enum { COUNT = 300032 };
    static const uint64_t variances[] = {1, 5, 100, 2500};
    static int64_t vector[COUNT], firsts[COUNT / GAUSSIAN_CHUNK];
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(variances); i++) {
        struct noise_source source;
        source_init(&source, variances[i]);
        memset(vector, 0, sizeof vector);
        noise_vector_add(&source, vector, COUNT, 3);
        double score = chi2_of(variances[i], vector, COUNT);
        for (size_t c = 0; c < ARRAY_LEN(firsts); c++)
            firsts[c] = vector[c * GAUSSIAN_CHUNK];
        double first_score = chi2_of(variances[i], firsts, ARRAY_LEN(firsts));
        if (fabs(score) > 4.5 || fabs(first_score) > 4.5)
            fail_msg("variance %u: chi-square is %.2f and %.2f standard deviations off", (unsigned)variances[i], score,
                     first_score);
        noise_source_release(&source);
    }
}

/* Moments, and correlations between neighbours and between the same places of neighbouring chunks. */
static void test_moments(void **state)
{
    enum { COUNT = 1 << 20 };
    int64_t *vector = calloc(COUNT, sizeof *vector);
    struct noise_source source;
    struct timespec a, b;
    double sigma = 1.2 * 1048576, sums[5] = {0}, neighbours = 0, chunks = 0, odd = 0, root = sqrt(COUNT);
    (void)state;
    assert_non_null(vector);
    source_init(&source, (uint64_t)ceil(sigma * sigma));
    clock_gettime(CLOCK_MONOTONIC, &a);
    noise_vector_add(&source, vector, COUNT, 1);
    clock_gettime(CLOCK_MONOTONIC, &b);
    print_message("%.1f M samples/s on one thread\n",
                  COUNT / 1e6 / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec)));
    for (size_t i = 0; i < COUNT; i++) {
        double x = (double)vector[i] / sigma;
        odd += vector[i] & 1;
        for (int k = 1; k <= 4; k++)
            sums[k] += pow(x, k);
        neighbours += i >= 1 ? x * ((double)vector[i - 1] / sigma) : 0;
        chunks += i >= GAUSSIAN_CHUNK ? x * ((double)vector[i - GAUSSIAN_CHUNK] / sigma) : 0;
    }
    assert_near(sums[1] / root, 0, 5);
    assert_near((sums[2] - COUNT) / root, 0, 5 * sqrt(2));
    assert_near(sums[3] / root, 0, 5 * sqrt(15));
    assert_near((sums[4] - 3.0 * COUNT) / root, 0, 5 * sqrt(96));
    assert_near(neighbours / root, 0, 5);
    assert_near(chunks / root, 0, 5);
    assert_near((odd - COUNT / 2.0) / (root / 2), 0, 5);
    noise_source_release(&source);
    free(vector);
}

/* RFC 8439, 2.3.2: the reference's block function. */
static void test_rfc8439_block(void **state)
{
    static const uint32_t expected[16] = {0xe4e7f110, 0x15593bd1, 0x1fdd0f50, 0xc47120a3, 0xc7f4d1c7, 0x0368c033,
                                          0x9aaa2204, 0x4e6cd4c3, 0x466482d2, 0x09aa9f07, 0x05d7c214, 0xa2028bd9,
                                          0xd19c12b5, 0xb94e16de, 0xe883d0cb, 0x4e3c50a2};
    static const uint32_t nonce[3] = {0x09000000, 0x4a000000, 0};
    uint32_t key[8], block[16];
    (void)state;
    for (uint32_t i = 0; i < 8; i++)
        key[i] = 0x03020100 + 0x04040404 * i;
    reference_chacha20_block(key, 1, nonce, block);
    assert_memory_equal(block, expected, sizeof block);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_rfc8439_block), cmocka_unit_test(test_reference),
                                       cmocka_unit_test(test_threads),       cmocka_unit_test(test_nothing_repeats),
                                       cmocka_unit_test(test_bounds),        cmocka_unit_test(test_key),
                                       cmocka_unit_test(test_chi2),          cmocka_unit_test(test_moments)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
