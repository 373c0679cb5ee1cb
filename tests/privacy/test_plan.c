#include "tests/privacy/support.h"

#include "privacy/plan.h"

static struct dp_plan good(void)
{
    struct dp_plan p = {.mode = DP_RECORD,
                        .neighbour = DP_ADD_REMOVE,
                        .unit = "record",
                        .q = 0.04,
                        .z = 1.5,
                        .clip = 1,
                        .grid_clip = DP_GRID_CLIP,
                        .steps_per_round = 5,
                        .rounds = 20,
                        .delta = 1e-5,
                        .epsilon = 8,
                        .units = 2000,
                        .dimensions = 460800};
    return p;
}

static void test_good(void **state)
{
    struct dp_plan p = good();
    struct error err = {0};
    (void)state;
    assert_int_equal(dp_plan_check(&p, &err), 0);
    assert_int_equal(dp_plan_steps(&p), 100);
    assert_near(dp_plan_denominator(&p), 80, 1e-9);
    assert_near(dp_plan_clip(&p), 1 - sqrt(460800) / 2 / 1048576, 1e-12);
}

static void test_variance_is_exact(void **state)
{
    struct dp_plan p = good();
    (void)state;
    p.z = 1;
    assert_true(dp_plan_variance(&p) == (uint64_t)1 << 40);
    p.z = 1.5;
    assert_true(dp_plan_variance(&p) == (uint64_t)9 << 38);
    p.z = nextafter(1, 2); /* (2^20 + 2^-32)^2: just above, and up it goes */
    assert_true(dp_plan_variance(&p) == ((uint64_t)1 << 40) + 1);
    p.z = 0.7;
    long double exact = (long double)0.7 * 1048576 * ((long double)0.7 * 1048576);
    assert_true(dp_plan_variance(&p) == (uint64_t)ceill(exact));
    p.z = 1e300;
    assert_true(dp_plan_variance(&p) == UINT64_MAX);
    p.z = 1e-300;
    assert_true(dp_plan_variance(&p) == 1);
}

#define REFUSED(change)                                                                                                \
    do {                                                                                                               \
        struct dp_plan p = good();                                                                                     \
        struct error err = {0};                                                                                        \
        change;                                                                                                        \
        if (dp_plan_check(&p, &err) != ERR_CONFIG || !err.message[0])                                                  \
            fail_msg("accepted: %s", #change);                                                                         \
    } while (0)

static void test_refusals(void **state)
{
    (void)state;
    REFUSED(p.q = NAN);
    REFUSED(p.q = 0);
    REFUSED(p.q = 1.01);
    REFUSED(p.z = INFINITY);
    REFUSED(p.z = 0);
    REFUSED(p.z = 300); /* variance past the sampler */
    REFUSED(p.clip = -1);
    REFUSED(p.grid_clip = 4096); /* rounding loss */
    REFUSED(p.dimensions = (uint64_t)1 << 40);
    REFUSED(p.delta = 1e-3); /* above 1 / units */
    REFUSED(p.delta = NAN);
    REFUSED(p.units = 0);
    REFUSED(p.neighbour = 2);
    REFUSED(p.mode = 9);
    REFUSED(p.rounds = 0);
    REFUSED(p.unit[0] = 0);
    REFUSED(p.z = 0.5); /* over the target */
    REFUSED(p.epsilon = 0.5);
}

static void test_rounding_boundary(void **state)
{
    struct dp_plan p = good();
    (void)state;
    p.dimensions = 1000000; /* √d / 2 = 500 */
    p.grid_clip = 10000;
    assert_int_equal(dp_plan_check_ranges(&p, NULL), 0);
    p.grid_clip = 9999;
    assert_int_equal(dp_plan_check_ranges(&p, NULL), ERR_CONFIG);
}

static void test_encoding(void **state)
{
    struct dp_plan p = good(), decoded;
    struct buffer b;
    uint8_t h1[DP_HASH_SIZE], h2[DP_HASH_SIZE];
    (void)state;
    buffer_init(&b, 512);
    dp_plan_encode(&p, &b);
    struct reader r = reader_of(buffer_span(&b));
    dp_plan_decode(&r, &decoded);
    assert_true(reader_done(&r));
    dp_plan_hash(&p, h1);
    dp_plan_hash(&decoded, h2);
    assert_memory_equal(h1, h2, sizeof h1);
    p.z = nextafter(p.z, 2);
    dp_plan_hash(&p, h2);
    assert_memory_not_equal(h1, h2, sizeof h1);
    for (size_t len = 0; len < b.len; len++) {
        r = reader_of(span_of(b.data, len));
        dp_plan_decode(&r, &decoded);
        assert_false(reader_done(&r));
    }
    b.data[1] = 7; /* a mode that does not exist */
    r = reader_of(buffer_span(&b));
    dp_plan_decode(&r, &decoded);
    assert_true(r.failed);
    buffer_release(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_good), cmocka_unit_test(test_variance_is_exact),
                                       cmocka_unit_test(test_refusals), cmocka_unit_test(test_rounding_boundary),
                                       cmocka_unit_test(test_encoding)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
