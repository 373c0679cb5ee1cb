/* Published values (sources in docs/privacy.md's vector table) for the Rényi accountant. */
#include "tests/privacy/support.h"

#include "privacy/accountant.h"

static void test_orders(void **state)
{
    (void)state;
    assert_near(rdp_order(0), 1.1, 1e-15);
    assert_near(rdp_order(98), 10.9, 1e-15);
    assert_near(rdp_order(99), 11, 0);
    assert_near(rdp_order(151), 63, 0);
    assert_near(rdp_order(152), 128, 0);
    assert_near(rdp_order(RDP_ORDERS - 1), 1024, 0);
}

static void test_rdp_vectors(void **state)
{
    static const double expected[][2] = {
        {1.5, 6.500708969e-4}, {2.5, 1.085418057e-3}, {5, 2.18075656e-3}, {50, 2.38460375e-2}, {100, 167.416308}};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(expected); i++) {
        double v = 50 * rdp_step(0.01, 2.5, expected[i][0]);
        assert_near(v, expected[i][1], 1e-6 * expected[i][1]);
    }
    assert_near(rdp_step(1, 2, 7), 7.0 / 8, 1e-15);
}

static void test_fractional_meets_integer(void **state)
{
    (void)state;
    for (int a = 2; a <= 60; a += 7)
        assert_near(rdp_step(0.04, 1.3, a + 1e-7), rdp_step(0.04, 1.3, a), 1e-5 * rdp_step(0.04, 1.3, a));
}

static void test_conversion(void **state)
{
    double orders[31], curve[31], order;
    (void)state;
    for (int i = 0; i < 31; i++) {
        orders[i] = i + 2;
        curve[i] = 1.1;
    }
    assert_near(rdp_curve_epsilon(orders, curve, 31, 1e-5, &order), 1.32783806176, 1e-7);
    assert_near(order, 32, 0);
    assert_near(rdp_to_epsilon(8, rdp_from_epsilon(8, 3, 1e-5), 1e-5), 3, 1e-12);
    assert_true(isinf(rdp_to_epsilon(1.005, 0.1, 1e-5)));
    assert_near(rdp_to_epsilon(20, 1e-12, 1e-5), 0, 0);
}

static void test_epsilon(void **state)
{
    double epsilon, order;
    (void)state;
    assert_int_equal(accountant_epsilon(0.04, 1.5, 2250, 1e-5, &epsilon, &order, NULL), 0);
    assert_near(epsilon, 7.32911117143, 1e-7);
    assert_int_equal(accountant_epsilon(1, 4.530877117, 1, 1e-6, &epsilon, &order, NULL), 0);
    assert_near(epsilon, 1, 1e-6);
}

static void test_calibrate(void **state)
{
    static const struct {
        double epsilon, delta, q;
        uint64_t steps;
        double z, tolerance;
    } rows[] = {
        {8, 1e-5, .04, 2250, 1.415787, 1e-5}, {8, 1e-5, .04, 2000, 1.356134, 1e-5}, {1, 1e-6, .01, 1000, 1.660, 1.1e-3},
        {3, 1e-6, .01, 1000, .917, 1.1e-3},   {8, 1e-6, .01, 1000, .645, 1.1e-3},   {1, 1e-6, .04, 500, 4.209, 1.1e-3},
        {3, 1e-6, .04, 500, 1.712, 1.1e-3},   {8, 1e-6, .04, 500, .957, 1.1e-3},    {1, 1e-5, .1, 200, 5.889, 1.1e-3},
        {3, 1e-5, .1, 200, 2.336, 1.1e-3},    {8, 1e-5, .1, 200, 1.196, 1.1e-3}};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        double z, epsilon, order;
        assert_int_equal(accountant_calibrate(rows[i].epsilon, rows[i].delta, rows[i].q, rows[i].steps, &z, NULL), 0);
        assert_near(z, rows[i].z, rows[i].tolerance);
        assert_int_equal(accountant_epsilon(rows[i].q, z, rows[i].steps, rows[i].delta, &epsilon, &order, NULL), 0);
        assert_true(epsilon <= rows[i].epsilon && epsilon > rows[i].epsilon * 0.99999);
    }
}

static void test_refusals(void **state)
{
    double out = 7, order;
    struct error err = {0};
    (void)state;
    assert_int_equal(accountant_epsilon(NAN, 1, 1, 1e-5, &out, &order, &err), ERR_CONFIG);
    assert_int_equal(accountant_epsilon(0.1, NAN, 1, 1e-5, &out, &order, &err), ERR_CONFIG);
    assert_int_equal(accountant_epsilon(0.1, INFINITY, 1, 1e-5, &out, &order, &err), ERR_CONFIG);
    assert_int_equal(accountant_epsilon(0.1, 1, 1, 0, &out, &order, &err), ERR_CONFIG);
    assert_int_equal(accountant_epsilon(1.1, 1, 1, 1e-5, &out, &order, &err), ERR_CONFIG);
    assert_int_equal(accountant_calibrate(1e-9, 1e-9, 1, 1000000, &out, &err), ERR_CONFIG);
    assert_near(out, 7, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_orders),
                                       cmocka_unit_test(test_rdp_vectors),
                                       cmocka_unit_test(test_fractional_meets_integer),
                                       cmocka_unit_test(test_conversion),
                                       cmocka_unit_test(test_epsilon),
                                       cmocka_unit_test(test_calibrate),
                                       cmocka_unit_test(test_refusals)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
