/* arena_*: the clip's integers bit for bit, its exact check and repair, hostile units; optimizers against the CPU's. */
#include "tests/cuda/rows.h"

static const struct kernel_ops *reference(void)
{
    return kernels_cpu(KERNEL_SCALAR);
}

/* The integers that a factor stands for, by the CPU's rounding. */
static int64_t grid_integer(float g, double scale)
{
    double shifted = (double)g * scale + 0x1.8p52;
    return (int64_t)(shifted - 0x1.8p52);
}

static double integer_norm(const std::vector<int64_t> &v)
{
    long double sum = 0;
    for (int64_t x : v)
        sum += (long double)x * (long double)x;
    return (double)sqrtl(sum);
}

/* One call for all units into a sum that holds numbers already; returns the results. */
struct clipped {
    std::vector<struct clip_result> results;
    std::vector<int64_t> sum;
};

static struct clipped clip(size_t n, int32_t count, size_t stride, const std::vector<float> &g, double c, double grid,
                           int64_t begin, size_t shift)
{
    struct clip_params params = {c, grid};
    std::vector<float> moved(shift, NAN); /* shift: floats that the units are away from alignment */
    moved.insert(moved.end(), g.begin(), g.end());
    device_vector<float> gs(moved);
    device_vector<int64_t> sums(std::vector<int64_t>(n + 4 + shift, begin));
    device_vector<struct clip_result> results(std::vector<struct clip_result>((size_t)count));
    device_vector<uint8_t> work(std::vector<uint8_t>(arena_clip_work(n, count), 0xff));
    arena_clip_accumulate((stream_t)0, n, count, gs.at + shift, stride, &params, sums.at + shift, results.at, work.at);
    struct clipped r = {results.get(), sums.get()};
    r.sum.erase(r.sum.begin(), r.sum.begin() + (ptrdiff_t)shift);
    for (size_t i = n; i < n + 4; i++)
        CHECK(r.sum[i] == begin);
    r.sum.resize(n);
    return r;
}

/* Results as the CPU's but for the last bits of norm and factor; the sum exactly what those factors say. */
static struct clipped check_clip(size_t n, int32_t count, size_t stride, const std::vector<float> &g, double c,
                                 double grid, size_t shift = 0)
{
    struct clip_params params = {c, grid};
    struct clipped got = clip(n, count, stride, g, c, grid, 1000, shift);
    std::vector<int64_t> want(n, 1000), unit(n);
    for (int32_t e = 0; e < count; e++) {
        struct clip_result r = got.results[(size_t)e], cpu = {};
        const float *from = g.data() + (size_t)e * stride;
        std::fill(unit.begin(), unit.end(), 0);
        reference()->clip_accumulate(n, from, &params, unit.data(), &cpu);
        CHECK(r.finite == cpu.finite && r.clipped == cpu.clipped && r.shrinks == cpu.shrinks);
        CHECK_NEAR(r.norm / (cpu.norm > 0 ? cpu.norm : 1), cpu.norm > 0 ? 1 : 0, 1e-14);
        CHECK_NEAR(r.factor / (cpu.factor > 0 ? cpu.factor : 1), cpu.factor > 0 ? 1 : 0, 1e-14);
        for (size_t i = 0; i < n; i++)
            unit[i] = r.finite ? grid_integer(from[i], r.factor * grid) : 0;
        CHECK(integer_norm(unit) <= c * grid);
        for (size_t i = 0; i < n; i++)
            want[i] += unit[i];
    }
    CHECK(got.sum == want);
    return got;
}

static std::vector<float> units(int32_t count, size_t stride, float scale)
{
    std::vector<float> g = random_floats((size_t)count * stride);
    for (size_t i = 0; i < g.size(); i++)
        g[i] *= scale * (float)(1 + i / stride % 5);
    return g;
}

static void test_clip(void)
{
    for (size_t n : {1, 3, 4, 1023, 4096, 4097, 8192, 20011}) {
        size_t stride = (n + 7) / 4 * 4;
        check_clip(n, 3, stride, units(3, stride, 1), 1, 1048576);        /* clipped */
        check_clip(n, 2, stride, units(2, stride, 1e-4f), 0.37, 1048576); /* mostly not */
        check_clip(n, 2, n, units(2, n, 1e30f), 0x1p10, 0x1p20);          /* the largest grid, far above the bound */
        check_clip(n, 2, n + 1, units(2, n + 1, 1e-3f), 1, 1048576, 1);   /* nothing aligned */
    }
}

static void test_many_units(void) /* more than one pass of UNITS_MAX */
{
    const int32_t count = 67;
    std::vector<float> g = units(count, 40, 1);
    g[3 * 40 + 7] = NAN;
    g[66 * 40] = INFINITY;
    struct clipped got = check_clip(37, count, 40, g, 0.5, 65536);
    CHECK(!got.results[3].finite && !got.results[66].finite && got.results[65].finite);
}

static void test_ties(void)
{
    std::vector<float> g = {0.5f, -0.25f, 2.5f / 1024, 3.5f / 1024, -2.5f / 1024, 0.0f};
    struct clipped got = clip(6, 1, 6, g, 1, 1024, 1, 0);
    const int64_t want[6] = {513, -255, 3, 5, -1, 1};
    CHECK(got.results[0].finite && !got.results[0].clipped && got.results[0].factor == 1);
    CHECK_SAME(got.sum.data(), want, 6);
}

/* A bound that is not whole is taken down to the next whole one, and then rounding can break it: the check shrinks the
 * factor and takes back what was added. The other units are not touched by that. */
static void test_exact_check(void)
{
    std::vector<float> g(4 * 3, 0.5045f);
    g[4] = 0.9f, g[5] = g[6] = 0;
    struct clipped got = check_clip(3, 3, 4, g, 1.74, 1);
    CHECK(got.results[0].shrinks > 0 && got.results[1].shrinks == 0 && got.results[2].shrinks > 0);
    CHECK(got.results[0].clipped && got.results[0].factor < 1 && got.results[1].factor <= 1);
    /* The same over several blocks: 5000 values that all round up, of which fewer may. */
    std::vector<float> many(5000 * 2, 0.50001f);
    std::fill(many.begin(), many.begin() + 5000, 0.25f);
    got = check_clip(5000, 2, 5000, many, 70.8, 1);
    CHECK(got.results[0].shrinks == 0 && got.results[1].shrinks > 0);
    CHECK(got.sum == std::vector<int64_t>(5000, 1000));
    /* Squares above 2^32: three times 100000, a step over ⌊100000·√3⌋. */
    got = check_clip(3, 1, 4, std::vector<float>(4, 200000.0f), 173205.0808, 1);
    CHECK(got.results[0].shrinks > 0);
}

static void test_hostile_values(void)
{
    float loaded; /* a NaN whose payload would show in the integers */
    memset(&loaded, 0xff, sizeof loaded);
    for (float bad : {(float)NAN, loaded, INFINITY, -INFINITY}) {
        for (size_t at : {0, 1, 4095, 4096, 9000}) {
            std::vector<float> g = units(3, 9004, 1);
            g[9004 + at] = bad;
            struct clipped got = check_clip(9001, 3, 9004, g, 1, 1024);
            CHECK(!got.results[1].finite && got.results[1].norm == 0 && got.results[1].factor == 0);
        }
    }
    std::vector<float> extremes(64, 0.0f);
    for (size_t i = 0; i < 16; i++) {
        extremes[i] = i % 2 ? -3.4e38f : 3.4e38f;
        extremes[16 + i] = 1e-45f;
    }
    struct clipped got = check_clip(16, 3, 16, extremes, 1, 1024);
    CHECK(got.results[0].finite && got.results[1].norm > 0 && got.results[2].factor == 1);
}

/* Integers do not depend on how the units are grouped, nor on their place. */
static void test_clip_independence(void)
{
    const size_t n = 5001, stride = 5004;
    std::vector<float> g = units(4, stride, 0.3f);
    struct clipped all = clip(n, 4, stride, g, 1, 1048576, 0, 0);
    std::vector<int64_t> sum(n);
    for (size_t e = 4; e-- > 0;) {
        std::vector<float> one(g.begin() + (ptrdiff_t)(e * stride), g.begin() + (ptrdiff_t)((e + 1) * stride));
        struct clipped alone = clip(n, 1, n, one, 1, 1048576, 0, e);
        CHECK(alone.results[0].factor == all.results[e].factor && alone.results[0].norm == all.results[e].norm);
        for (size_t i = 0; i < n; i++)
            sum[i] += alone.sum[i];
    }
    CHECK(sum == all.sum);
}

static void test_clip_empty(void)
{
    struct clip_params params = {1, 1024};
    device_vector<struct clip_result> results(std::vector<struct clip_result>(2));
    device_vector<uint8_t> work(std::vector<uint8_t>(arena_clip_work(0, 2)));
    device_vector<float> g(std::vector<float>(8, 1.0f));
    device_vector<int64_t> sum(std::vector<int64_t>(8, 5));
    arena_clip_accumulate((stream_t)0, 8, 0, g.at, 8, &params, sum.at, results.at, work.at);
    arena_clip_accumulate((stream_t)0, 0, 2, g.at, 4, &params, sum.at, results.at, work.at);
    CHECK(sum.get() == std::vector<int64_t>(8, 5) && results.get()[1].finite && results.get()[1].factor == 1);
    /* Results are not asked for. */
    device_vector<uint8_t> more(std::vector<uint8_t>(arena_clip_work(8, 1)));
    arena_clip_accumulate((stream_t)0, 8, 1, g.at, 8, &params, sum.at, NULL, more.at);
    CHECK(sum.get()[0] > 5);
}

static void test_clip_add(void)
{
    for (size_t n : {1, 37, 4096, 9001}) {
        for (size_t margin : {0, 3, 4}) {
            const int32_t count = 70;
            size_t stride = n + margin;
            std::vector<float> g = units(count, stride, 0.01f), want = random_floats(n), begin = want;
            g[5 * stride] = NAN;
            for (int32_t e = 0; e < count; e++) {
                double norm = 0;
                for (size_t i = 0; i < n; i++)
                    norm += (double)g[(size_t)e * stride + i] * (double)g[(size_t)e * stride + i];
                norm = sqrt(norm);
                for (size_t i = 0; e != 5 && i < n; i++)
                    want[i] += (float)((double)g[(size_t)e * stride + i] * fmin(1, 0.4 / norm));
            }
            device_vector<float> gs(g), sum(begin);
            device_vector<uint8_t> work(std::vector<uint8_t>(arena_clip_work(n, count), 0xff));
            arena_clip_add((stream_t)0, n, count, gs.at, stride, 0.4, sum.at, work.at);
            CHECK_CLOSE(sum.get(), want, 1e-6);
            arena_clip_add((stream_t)0, n, 0, gs.at, stride, 0.4, sum.at, work.at);
            arena_clip_add((stream_t)0, 0, 1, gs.at, stride, 0.4, sum.at, work.at);
            CHECK_CLOSE(sum.get(), want, 1e-6);
        }
    }
}

/* shift: floats that the arrays are away from alignment. The value behind the end stays. */
static void check_optimizers(size_t n, size_t shift)
{
    std::vector<float> g = random_floats(n), m = random_floats(n), v = random_floats(n), p = random_floats(n);
    for (float &x : v)
        x *= x;
    auto placed = [&](const std::vector<float> &x) {
        std::vector<float> y(shift, NAN);
        y.insert(y.end(), x.begin(), x.end());
        y.push_back(12345);
        return y;
    };
    auto taken = [&](const device_vector<float> &x) {
        std::vector<float> y = x.get();
        CHECK(y.back() == 12345);
        return std::vector<float>(y.begin() + (ptrdiff_t)shift, y.end() - 1);
    };
    device_vector<float> gs(placed(g)), ms(placed(m)), vs(placed(v)), ps(placed(p));
    struct adamw_params params = {1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 7};
    arena_adamw((stream_t)0, n, &params, gs.at + shift, ms.at + shift, vs.at + shift, ps.at + shift);
    reference()->adamw(NULL, n, &params, g.data(), m.data(), v.data(), p.data());
    CHECK_CLOSE(taken(ms), m, 1e-6);
    CHECK_CLOSE(taken(vs), v, 1e-6);
    CHECK_CLOSE(taken(ps), p, 1e-6);
    ms.set(placed(m));
    ps.set(placed(p));
    arena_sgd_momentum((stream_t)0, n, 0.05f, 0.9f, gs.at + shift, ms.at + shift, ps.at + shift);
    reference()->sgd_momentum(NULL, n, 0.05f, 0.9f, g.data(), m.data(), p.data());
    CHECK_CLOSE(taken(ms), m, 1e-6);
    CHECK_CLOSE(taken(ps), p, 1e-6);
    CHECK(taken(gs) == g);
    std::vector<float> sum(n), quotient(n), scaled(n);
    std::vector<int64_t> integers(n + shift);
    for (size_t i = 0; i < n; i++) {
        integers[i + shift] = (int64_t)support_bits() >> (i % 60);
        scaled[i] = (float)((double)integers[i + shift] * 0x1.23456789p-23);
        sum[i] = g[i] + m[i];
        quotient[i] = (float)((double)sum[i] / 37.3);
    }
    ms.set(placed(m));
    arena_add((stream_t)0, n, gs.at + shift, ms.at + shift);
    CHECK(taken(ms) == sum);
    arena_divide((stream_t)0, n, 37.3, ms.at + shift);
    CHECK(taken(ms) == quotient);
    device_vector<int64_t> ints(integers);
    arena_scale_sum((stream_t)0, n, ints.at + shift, 0x1.23456789p-23, ps.at + shift);
    CHECK(taken(ps) == scaled);
}

static void test_optimizers(void)
{
    for (size_t n : {1, 4, 1023, 1024, 5002}) {
        check_optimizers(n, 0);
        check_optimizers(n, 1);
    }
    arena_add((stream_t)0, 0, NULL, NULL);
    arena_divide((stream_t)0, 0, 1, NULL);
    arena_scale_sum((stream_t)0, 0, NULL, 1, NULL);
    arena_sgd_momentum((stream_t)0, 0, 1, 1, NULL, NULL, NULL);
}

int main(void)
{
    RUN(test_clip);
    RUN(test_many_units);
    RUN(test_ties);
    RUN(test_exact_check);
    RUN(test_hostile_values);
    RUN(test_clip_independence);
    RUN(test_clip_empty);
    RUN(test_clip_add);
    RUN(test_optimizers);
    return check_report();
}
