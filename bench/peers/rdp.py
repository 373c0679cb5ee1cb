"""Renyi accountant of the Poisson-subsampled Gaussian, as design/privacy.md states it (add/remove neighbours)."""

import math

ORDERS = [1 + x / 10.0 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]


def _log_add(a, b):
    low, high = min(a, b), max(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _log_sub(a, b):
    return -math.inf if a <= b else a + math.log1p(-math.exp(b - a))


def _log_erfc(x):
    """log erfc(x) without underflow (asymptotic series beyond 25)."""
    if x < 25:
        return math.log(math.erfc(x))
    return -x * x - math.log(x) - 0.5 * math.log(math.pi) + math.log1p(-0.5 / x**2 + 0.75 / x**4)


def _log_a_integer(q, sigma, alpha):
    total = -math.inf
    for i in range(alpha + 1):
        binomial = math.lgamma(alpha + 1) - math.lgamma(i + 1) - math.lgamma(alpha - i + 1)
        term = binomial + i * math.log(q) + (alpha - i) * math.log1p(-q) + (i * i - i) / (2 * sigma**2)
        total = _log_add(total, term)
    return total


def _log_a_fractional(q, sigma, alpha):
    first, second = -math.inf, -math.inf
    z0 = sigma**2 * math.log(1 / q - 1) + 0.5
    sign, log_binomial = 1, 0.0
    for i in range(1000):
        j = alpha - i
        t0 = log_binomial + i * math.log(q) + j * math.log1p(-q)
        t1 = log_binomial + j * math.log(q) + i * math.log1p(-q)
        s0 = math.log(0.5) + t0 + (i * i - i) / (2 * sigma**2) + _log_erfc((i - z0) / (math.sqrt(2) * sigma))
        s1 = math.log(0.5) + t1 + (j * j - j) / (2 * sigma**2) + _log_erfc((z0 - j) / (math.sqrt(2) * sigma))
        if sign > 0:
            first, second = _log_add(first, s0), _log_add(second, s1)
        else:
            first, second = _log_sub(first, s0), _log_sub(second, s1)
        if max(s0, s1) < -30 and i > alpha:
            return _log_add(first, second)
        factor = (alpha - i) / (i + 1)
        sign = sign if factor > 0 else -sign
        log_binomial += math.log(abs(factor))
    return math.inf


def rdp(q, sigma, alpha):
    """Renyi epsilon of one step at order alpha."""
    if q == 1:
        return alpha / (2 * sigma**2)
    log_a = _log_a_integer(q, sigma, int(alpha)) if alpha == int(alpha) else _log_a_fractional(q, sigma, alpha)
    return log_a / (alpha - 1)


def epsilon(q, sigma, steps, delta):
    """(epsilon, order) of `steps` steps at noise multiplier sigma."""
    best = (math.inf, 0)
    for alpha in ORDERS:
        if alpha <= 1.01:
            continue
        value = steps * rdp(q, sigma, alpha)
        value += math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)
        best = min(best, (max(value, 0.0), alpha))
    return best


def noise_multiplier(q, steps, target, delta):
    """The smallest sigma (to 1e-4, rounded up) whose epsilon is at most target."""
    low, high = 0.2, 100.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(q, middle, steps, delta)[0] <= target else (middle, high)
    return math.ceil(high * 1e4) / 1e4


if __name__ == "__main__":
    for order, expected in ((1.5, 6.500708969e-4), (2.5, 1.085418057e-3), (5, 2.18075656e-3), (50, 2.38460375e-2)):
        value = 50 * rdp(0.01, 2.5, order)
        assert abs(value / expected - 1) < 1e-6, (order, value, expected)
    assert abs(epsilon(0.04, 1.5, 2250, 1e-5)[0] - 7.32911117143) < 1e-6
    assert abs(noise_multiplier(0.04, 2250, 8, 1e-5) - 1.415787) < 2e-4
    print("rdp.py: published values reproduced")
