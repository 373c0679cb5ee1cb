#include "privacy/accountant.h"

#include <math.h>

double rdp_order(size_t i)
{
    assert(i < RDP_ORDERS);
    if (i < 99)
        return (double)(11 + i) / 10;
    if (i < 152)
        return (double)(i - 99 + 11);
    return (double)(128u << (i - 152));
}

static double log_add(double a, double b)
{
    double high = a > b ? a : b, low = a > b ? b : a;
    return low == -INFINITY ? high : high + log1p(exp(low - high));
}

/* log(e^a − e^b), a ≥ b */
static double log_sub(double a, double b)
{
    return b == -INFINITY ? a : a + log(-expm1(b - a));
}

static double log_erfc(double x)
{
    if (x < 25)
        return log(erfc(x));
    /* Asymptotic series, where erfc underflows: Abramowitz and Stegun 7.1.23. */
    double y = 1 / (x * x);
    return -x * x - log(x) - 0.5 * log(M_PI) + log1p(y * (-0.5 + y * (0.75 - y * 1.875)));
}

/* log A for integer alpha. */
static double log_moment_integer(double q, double z, unsigned alpha)
{
    double sum = -INFINITY, log_q = log(q), log_p = log1p(-q);
    for (unsigned i = 0; i <= alpha; i++) {
        double binomial = lgamma(alpha + 1.0) - lgamma(i + 1.0) - lgamma(alpha - i + 1.0);
        double term = binomial + i * log_q + (alpha - i) * log_p + ((double)i * i - i) / (2 * z * z);
        sum = log_add(sum, term);
    }
    return sum;
}

/* log A for fractional alpha: the binomial series is infinite and its coefficients change sign. */
static double log_moment_fractional(double q, double z, double alpha)
{
    double z0 = z * z * log(1 / q - 1) + 0.5, log_q = log(q), log_p = log1p(-q), root = M_SQRT2 * z;
    double positive = -INFINITY, negative = -INFINITY; /* sums of the terms of each sign, in logs */
    double log_binomial = 0;                           /* log |C(alpha, i)| */
    bool minus = false;
    for (unsigned i = 0; i < 1000; i++) {
        double j = alpha - i;
        double t0 = log_binomial + i * log_q + j * log_p + ((double)i * i - i) / (2 * z * z) - M_LN2 +
                    log_erfc((i - z0) / root);
        double t1 =
            log_binomial + j * log_q + i * log_p + (j * j - j) / (2 * z * z) - M_LN2 + log_erfc((z0 - j) / root);
        double *sum = minus ? &negative : &positive;
        *sum = log_add(*sum, log_add(t0, t1));
        if (i > alpha && fmax(t0, t1) < -40 && positive > negative)
            return log_sub(positive, negative);
        double factor = j / (i + 1); /* C(alpha, i + 1) = C(alpha, i) (alpha − i) / (i + 1) */
        log_binomial += log(fabs(factor));
        minus = minus != (factor < 0);
    }
    return INFINITY;
}

double rdp_step(double q, double z, double alpha)
{
    assert(q > 0 && q <= 1 && z > 0 && isfinite(z) && alpha > 1 && isfinite(alpha));
    if (q == 1)
        return alpha / (2 * z * z);
    bool integer = alpha == floor(alpha) && alpha <= 4096;
    double moment = integer ? log_moment_integer(q, z, (unsigned)alpha) : log_moment_fractional(q, z, alpha);
    if (isnan(moment))
        return INFINITY;
    return fmax(moment, 0) / (alpha - 1); /* A ≥ 1; round-off can leave it just below */
}

void rdp_curve(double q, double z, uint64_t steps, double curve[RDP_ORDERS])
{
    for (size_t i = 0; i < RDP_ORDERS; i++)
        curve[i] = steps ? (double)steps * rdp_step(q, z, rdp_order(i)) : 0;
}

double rdp_to_epsilon(double alpha, double rdp, double delta)
{
    if (alpha <= 1.01 || !(rdp < INFINITY))
        return INFINITY;
    if (delta * delta > -expm1(-rdp)) /* total variation alone gives (0, δ): Bretagnolle–Huber */
        return 0;
    return fmax(0, rdp + log1p(-1 / alpha) - log(delta * alpha) / (alpha - 1));
}

double rdp_from_epsilon(double alpha, double epsilon, double delta)
{
    return epsilon - log1p(-1 / alpha) + log(delta * alpha) / (alpha - 1);
}

double rdp_curve_epsilon(const double *orders, const double *curve, size_t count, double delta, double *ret_order)
{
    double best = INFINITY, order = orders[0];
    for (size_t i = 0; i < count; i++) {
        double epsilon = rdp_to_epsilon(orders[i], curve[i], delta);
        if (epsilon < best) {
            best = epsilon;
            order = orders[i];
        }
    }
    *ret_order = order;
    return best;
}

static int check(double q, double delta, uint64_t steps, struct error *err)
{
    if (!(q > 0 && q <= 1))
        return error_set(err, ERR_CONFIG, "sampling rate %g: expected a number above 0 and at most 1", q);
    if (!(delta > 0 && delta < 1))
        return error_set(err, ERR_CONFIG, "delta %g: expected a number between 0 and 1, such as 1e-5", delta);
    if (steps > (uint64_t)1 << 40)
        return error_set(err, ERR_CONFIG, "%llu steps: expected at most 2^40", (unsigned long long)steps);
    return 0;
}

static double epsilon_of(double q, double z, uint64_t steps, double delta, double *ret_order)
{
    double orders[RDP_ORDERS], curve[RDP_ORDERS];
    for (size_t i = 0; i < RDP_ORDERS; i++)
        orders[i] = rdp_order(i);
    rdp_curve(q, z, steps, curve);
    return rdp_curve_epsilon(orders, curve, RDP_ORDERS, delta, ret_order);
}

int accountant_epsilon(double q, double z, uint64_t steps, double delta, double *ret_epsilon, double *ret_order,
                       struct error *err)
{
    int rc = check(q, delta, steps, err);
    if (rc < 0)
        return rc;
    if (!(z >= 0.01 && z <= 1e6))
        return error_set(err, ERR_CONFIG, "noise multiplier %g: expected a number from 0.01 to 1e6", z);
    *ret_epsilon = epsilon_of(q, z, steps, delta, ret_order);
    return 0;
}

int accountant_calibrate(double epsilon, double delta, double q, uint64_t steps, double *ret_z, struct error *err)
{
    double order, low = 0.05, high = 1;
    int rc = check(q, delta, steps, err);
    if (rc < 0)
        return rc;
    if (!(epsilon > 0 && epsilon <= 1000))
        return error_set(err, ERR_CONFIG, "epsilon %g: expected a number above 0 and at most 1000", epsilon);
    while (epsilon_of(q, high, steps, delta, &order) > epsilon) {
        low = high;
        high *= 2;
        if (high > 1e4)
            return error_set(err, ERR_CONFIG,
                             "no noise multiplier below 10000 gives epsilon %g at delta %g for %llu steps at rate %g",
                             epsilon, delta, (unsigned long long)steps, q);
    }
    while (high - low > 1e-7 * high) {
        double middle = (low + high) / 2;
        if (epsilon_of(q, middle, steps, delta, &order) > epsilon)
            low = middle;
        else
            high = middle;
    }
    *ret_z = high;
    return 0;
}
