#include "helpers.h"

#include "crypto/shamir.h"

#include <sodium.h>

static void split_and_combine(void **state)
{
    static const struct {
        uint32_t t, n;
    } cases[] = {{1, 1}, {1, 3}, {3, 3}, {4, 5}, {7, 10}, {22, 32}};
    struct random_stream stream;
    struct rng rng = fixed_rng(&stream, 1);

    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(cases); k++) {
        uint8_t secret[32], shares[32][32], held[32][32], out[32];
        uint32_t order[32], t = cases[k].t, n = cases[k].n;
        shamir_random(secret, &rng);
        assert_int_equal(shamir_split(secret, t, n, &rng, shares, NULL), 0);
        for (int repeat = 0; repeat < 8; repeat++) {
            struct shamir_combiner c;
            uint32_t count = t + (uint32_t)rng_below(&rng, n - t + 1);
            for (uint32_t i = 0; i < n; i++)
                order[i] = i + 1;
            for (uint32_t i = 0; i < count; i++) {
                uint32_t j = i + (uint32_t)rng_below(&rng, n - i), keep = order[i];
                order[i] = order[j];
                order[j] = keep;
                memcpy(held[i], shares[order[i] - 1], 32);
            }
            assert_int_equal(shamir_combiner_init(&c, order, count, NULL), 0);
            assert_int_equal(shamir_combine(&c, (const uint8_t(*)[32])held, out), 0);
            assert_memory_equal(out, secret, 32);
            held[0][0] ^= 1; /* a wrong share gives another secret, or is refused */
            if (shamir_combine(&c, (const uint8_t(*)[32])held, out) == 0)
                assert_memory_not_equal(out, secret, 32);
            shamir_combiner_release(&c);
            if (t > 1) { /* one share too few */
                assert_int_equal(shamir_combiner_init(&c, order, t - 1, NULL), 0);
                held[0][0] ^= 1;
                assert_int_equal(shamir_combine(&c, (const uint8_t(*)[32])held, out), 0);
                assert_memory_not_equal(out, secret, 32);
                shamir_combiner_release(&c);
            }
        }
    }
}

/* Computed by hand: f(x) = 5 + 3x + 2x² over the integers, f(1) = 10, f(3) = 32, f(4) = 49; and the coefficients that
 * the stream gave, read back by evaluating the polynomial here. */
static void direct_computation(void **state)
{
    const uint32_t indices[] = {4, 1, 3};
    uint8_t shares[3][32] = {{49}, {10}, {32}}, out[32], five[32] = {5};
    struct shamir_combiner c;
    struct random_stream stream;
    struct rng rng = fixed_rng(&stream, 2);
    uint8_t a[2][32], secret[32], dealt[6][32];

    (void)state;
    assert_int_equal(shamir_combiner_init(&c, indices, 3, NULL), 0);
    assert_int_equal(shamir_combine(&c, (const uint8_t(*)[32])shares, out), 0);
    assert_memory_equal(out, five, 32);
    shamir_combiner_release(&c);

    shamir_random(secret, &rng);
    shamir_random(a[0], &rng);
    shamir_random(a[1], &rng);
    rng = fixed_rng(&stream, 2); /* the same draws again: secret, then the two coefficients */
    shamir_random(out, &rng);
    assert_int_equal(shamir_split(secret, 3, 6, &rng, dealt, NULL), 0);
    for (uint8_t x = 1; x <= 6; x++) {
        uint8_t sx[32] = {x}, x2[32], value[32], term[32];
        crypto_core_ristretto255_scalar_mul(x2, sx, sx);
        crypto_core_ristretto255_scalar_mul(term, a[0], sx);
        crypto_core_ristretto255_scalar_add(value, secret, term);
        crypto_core_ristretto255_scalar_mul(term, a[1], x2);
        crypto_core_ristretto255_scalar_add(value, value, term);
        assert_memory_equal(value, dealt[x - 1], 32);
    }
}

static void large_indices(void **state)
{
    /* 65535-wide differences take the path that flushes the 64-bit product */
    uint32_t indices[9];
    uint8_t shares[9][32] = {{0}}, out[32], expected[32] = {7};
    struct shamir_combiner c;

    (void)state;
    for (uint32_t i = 0; i < 9; i++) { /* f(x) = 7 + x */
        uint32_t value;
        indices[i] = i % 2 ? 65535 - i : 1 + i;
        value = 7 + indices[i];
        for (int b = 0; b < 4; b++)
            shares[i][b] = (uint8_t)(value >> 8 * b);
    }
    assert_int_equal(shamir_combiner_init(&c, indices, 9, NULL), 0);
    assert_int_equal(shamir_combine(&c, (const uint8_t(*)[32])shares, out), 0);
    assert_memory_equal(out, expected, 32);
    shamir_combiner_release(&c);
}

static void bad_input_is_refused(void **state)
{
    /* L itself, little-endian (RFC 9496), and L − 1 */
    static const char order_hex[] = "edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010";
    const uint32_t zero[] = {1, 0, 2}, twice[] = {1, 2, 1}, big[] = {1, 65536}, good[] = {1, 2};
    uint8_t order[32], shares[3][32] = {{1}, {1}, {1}}, out[32] = {9};
    struct shamir_combiner c;
    struct error err = {0};

    (void)state;
    from_hex(order_hex, order);
    assert_false(shamir_is_canonical(order));
    assert_int_equal(shamir_split(order, 2, 3, &random_system, shares, &err), ERR_INTEGRITY);
    memcpy(shares[1], order, 32);
    assert_int_equal(shamir_combiner_init(&c, good, 2, &err), 0);
    assert_int_equal(shamir_combine(&c, (const uint8_t(*)[32])shares, out), ERR_INTEGRITY);
    assert_int_equal(out[0], 9);
    shamir_combiner_release(&c);
    order[0]--;
    assert_true(shamir_is_canonical(order));
    assert_int_equal(shamir_combiner_init(&c, zero, 3, &err), ERR_INTEGRITY);
    assert_int_equal(shamir_combiner_init(&c, twice, 3, &err), ERR_INTEGRITY);
    assert_int_equal(shamir_combiner_init(&c, big, 2, &err), ERR_INTEGRITY);
    assert_int_equal(shamir_combiner_init(&c, good, 0, &err), ERR_INTEGRITY);
    assert_int_equal(shamir_split(order, 0, 3, &random_system, shares, &err), ERR_CONFIG);
    assert_int_equal(shamir_split(order, 4, 3, &random_system, shares, &err), ERR_CONFIG);
    shamir_combiner_release(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(split_and_combine),
        cmocka_unit_test(direct_computation),
        cmocka_unit_test(large_indices),
        cmocka_unit_test(bad_input_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
