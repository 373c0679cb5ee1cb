/* head_softmax against the scalar table: losses, gradients, padding columns, extremes. */
#include "tests/cuda/rows.h"

/* The scalar table's loss and gradient of given logits: cross entropy with the identity as the head's matrix would need
 * vocabulary² values, so the formula is written out, in double. */
static void softmax_reference(int32_t n, const float *z, int32_t target, float weight, float *loss, float *gradient)
{
    double top = -INFINITY, sum = 0;
    for (int32_t i = 0; i < n; i++)
        top = fmax(top, (double)z[i]);
    for (int32_t i = 0; i < n; i++)
        sum += exp((double)z[i] - top);
    *loss = (float)(top - (double)z[target] + log(sum));
    for (int32_t i = 0; i < n; i++)
        gradient[i] = (float)((double)weight * (exp((double)z[i] - top) / sum - (i == target)));
}

/* spread: how far apart the logits are. */
static void check_softmax(enum tensor_type type, int32_t count, int32_t n, int32_t margin, float spread, bool weighted)
{
    int32_t padded = (n + 7) / 8 * 8;
    size_t size = (size_t)count * (size_t)n;
    std::vector<float> z = random_floats(size), weights = random_floats((size_t)count), losses((size_t)count);
    std::vector<float> gradient(size), padding((size_t)(count * (padded - n)), 0.0f);
    std::vector<int32_t> targets((size_t)count);
    for (float &v : z)
        v = host_round(spread * v, type);
    for (int32_t t = 0; t < count; t++) {
        targets[(size_t)t] = t % 3 == 0 ? n - 1 : support_below(n);
        softmax_reference(n, z.data() + (size_t)t * (size_t)n, targets[(size_t)t], weighted ? weights[(size_t)t] : 1.0f,
                          &losses[(size_t)t], gradient.data() + (size_t)t * (size_t)n);
    }
    /* The row's own columns, and those behind it up to the next 8, which begin as NaN. */
    device_rows rows(type, count, padded, padded + margin, 0), inner(type, count, n, padded + margin, 0, z);
    device_vector<int32_t> target(targets);
    device_vector<float> weight(weights), loss(std::vector<float>((size_t)count, NAN));
    head_softmax((stream_t)0, type, count, n, inner.rows(), target.at, weighted ? weight.at : NULL, loss.at, false);
    CHECK_CLOSE(loss.get(), losses, type == TENSOR_F32 ? 1e-5 : 1e-4);
    CHECK(inner.get() == z && inner.guarded()); /* without gradient nothing is written */
    std::vector<float> first = loss.get();
    rows.memory.set(inner.memory.get());
    loss.set(std::vector<float>((size_t)count, NAN));
    head_softmax((stream_t)0, type, count, n, rows.rows(), target.at, weighted ? weight.at : NULL, loss.at, true);
    CHECK(loss.get() == first);
    std::vector<float> got = rows.get(), inside, behind;
    for (int32_t t = 0; t < count; t++) {
        inside.insert(inside.end(), got.begin() + (ptrdiff_t)t * padded, got.begin() + (ptrdiff_t)t * padded + n);
        behind.insert(behind.end(), got.begin() + (ptrdiff_t)t * padded + n, got.begin() + (ptrdiff_t)(t + 1) * padded);
    }
    CHECK_DISTANCE(inside.data(), gradient.data(), size, type == TENSOR_F32 ? 1e-5 : 4e-3);
    CHECK(behind == padding && rows.guarded());
}

static void test_widths(void)
{
    for (enum tensor_type type : {TENSOR_F32, TENSOR_BF16}) {
        for (int32_t n : {1, 5, 8, 9, 259, 2047, 2052, 4096, 4097, 8191, 20003}) {
            check_softmax(type, n < 5000 ? 7 : 2, n, 0, 4, true);
            check_softmax(type, 1, n, 16, 4, false);
        }
    }
}

static void test_long(void) /* a block's threads go round several times */
{
    check_softmax(TENSOR_F32, 1, 40001, 8, 4, true);
    check_softmax(TENSOR_BF16, 1, 70003, 8, 4, true);
}

static void test_spread(void) /* one logit has nearly all the mass, or sums of exponentials rise late */
{
    for (enum tensor_type type : {TENSOR_F32, TENSOR_BF16}) {
        check_softmax(type, 4, 3001, 8, 80, true);
        check_softmax(type, 4, 3001, 8, 1e30f, true);
        check_softmax(type, 4, 3001, 8, 0, true);
    }
}

/* Infinite logits: −∞ everywhere a thread looks is no mass; +∞ and NaN are not hidden. */
static void test_infinite(void)
{
    const int32_t n = 2304;
    std::vector<float> z((size_t)n * 3, -INFINITY);
    z[5] = 1, z[6] = 2;
    z[(size_t)n] = INFINITY;
    z[(size_t)(2 * n)] = NAN;
    z[(size_t)(2 * n + 1)] = 1;
    device_rows rows(TENSOR_F32, 3, n, n, 0, z);
    device_vector<int32_t> targets(std::vector<int32_t>{6, 1, 1});
    device_vector<float> losses(std::vector<float>(3, 0.0f));
    head_softmax((stream_t)0, TENSOR_F32, 3, n, rows.rows(), targets.at, NULL, losses.at, true);
    std::vector<float> loss = losses.get(), gradient = rows.get();
    CHECK_NEAR(loss[0], log1p(exp(-1)), 1e-6);
    CHECK_NEAR(gradient[5], 1 / (1 + exp(1)), 1e-6);
    CHECK(gradient[7] == 0 && !isfinite(loss[1]) && !isfinite(loss[2]));
    CHECK(std::any_of(gradient.begin() + n, gradient.begin() + 2 * n, [](float v) { return v != v; }));
    CHECK(std::any_of(gradient.begin() + 2 * n, gradient.end(), [](float v) { return v != v; }));
}

static void test_independence(void)
{
    const int32_t n = 5003, m = 6;
    std::vector<float> z = random_elements(TENSOR_BF16, (size_t)(m * n));
    device_rows all(TENSOR_BF16, m, n, 5008, 0, z);
    device_vector<int32_t> targets(std::vector<int32_t>((size_t)m, 77));
    device_vector<float> losses(std::vector<float>((size_t)m, NAN));
    head_softmax((stream_t)0, TENSOR_BF16, m, n, all.rows(), targets.at, NULL, losses.at, true);
    for (int32_t row : {0, 4}) {
        ptrdiff_t at = (ptrdiff_t)row * n;
        device_rows one(TENSOR_BF16, 1, n, 5024, 8, {z.begin() + at, z.begin() + at + n});
        device_vector<float> loss(std::vector<float>(1, NAN));
        head_softmax((stream_t)0, TENSOR_BF16, 1, n, one.rows(), targets.at, NULL, loss.at, true);
        CHECK_SAME(one.get().data(), all.get().data() + at, (size_t)n);
        CHECK(loss.get()[0] == losses.get()[(size_t)row]);
    }
}

static int32_t first_largest(const float *x, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

static void check_likeliest(int32_t m, int32_t n, const std::vector<float> &z, const std::vector<int32_t> &want)
{
    device_vector<float> logits(z);
    device_vector<int32_t> ids(std::vector<int32_t>((size_t)m, -5));
    device_vector<uint8_t> work(std::vector<uint8_t>(head_likeliest_work(m), 0xff));
    head_likeliest((stream_t)0, m, n, logits.at, ids.at, work.at);
    const std::vector<int32_t> got = ids.get();
    for (int32_t i = 0; i < m; i++)
        CHECK(got[(size_t)i] == want[(size_t)i]);
}

static void test_likeliest(void)
{
    for (int32_t n : {1, 2, 31, 64, 255, 257, 16384, 16385, 40001}) {
        for (int32_t m : {1, 8}) {
            std::vector<float> z = random_elements(TENSOR_BF16, (size_t)(m * n)); /* coarse: many are equal */
            for (float &x : z)
                x = floorf(4 * x) / 4;
            std::vector<int32_t> want;
            for (int32_t i = 0; i < m; i++)
                want.push_back(first_largest(z.data() + (size_t)i * (size_t)n, n));
            check_likeliest(m, n, z, want);
        }
    }
    const int32_t n = 500;
    std::vector<float> z((size_t)n * 6, -INFINITY);
    z[3] = NAN, z[499] = -1e38f; /* NaN is not chosen */
    z[(size_t)n + 7] = INFINITY, z[(size_t)n + 9] = INFINITY;
    for (int32_t i = 0; i < n; i++)
        z[(size_t)(2 * n + i)] = i % 2 ? 0.0f : -0.0f; /* equal */
    for (int32_t i = 0; i < n; i++)
        z[(size_t)(3 * n + i)] = NAN;
    for (int32_t i = 0; i < n; i++)
        z[(size_t)(4 * n + i)] = -1.0f - (float)((i + 123) * 7 % 500) * 0x1p-20f; /* all below zero */
    check_likeliest(6, n, z, {499, 7, 0, 0, 377, 0});
    check_likeliest(0, n, z, {});
}

static void test_empty(void)
{
    device_rows rows(TENSOR_F32, 1, 8, 8);
    head_softmax((stream_t)0, TENSOR_F32, 0, 8, rows.rows(), NULL, NULL, NULL, true);
    CHECK(rows.get()[0] != rows.get()[0]);
}

int main(void)
{
    RUN(test_widths);
    RUN(test_long);
    RUN(test_spread);
    RUN(test_infinite);
    RUN(test_independence);
    RUN(test_likeliest);
    RUN(test_empty);
    return check_report();
}
