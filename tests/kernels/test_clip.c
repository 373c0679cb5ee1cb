/* The clip onto the integer grid: exactness, hostile values, ties, and that nothing over the bound is ever added. */
#include "tests/kernels/support.h"

enum { N = 5003 };

static struct clip_result clip(size_t n, const float *g, double c, double grid, int64_t *sum)
{
    struct clip_params params = {.clip = c, .grid = grid};
    struct clip_result result = {.shrinks = -1};
    kernels_cpu(KERNEL_AVX512_BF16)->clip_accumulate(n, g, &params, sum, &result);
    return result;
}

static double norm_of(size_t n, const int64_t *v)
{
    long double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (long double)v[i] * (long double)v[i];
    return (double)sqrtl(sum);
}

static void test_below_the_bound(void)
{
    float g[6] = {0.5f, -0.25f, 2.5f / 1024, 3.5f / 1024, -2.5f / 1024, 0.0f};
    int64_t sum[6] = {1, 1, 1, 1, 1, 1};
    struct clip_result r = clip(6, g, 1, 1024, sum);
    CHECK(r.finite && !r.clipped && r.factor == 1 && r.shrinks == 0);
    CHECK_NEAR(r.norm, sqrt(0.3125 + (6.25 + 12.25 + 6.25) / 1048576), 1e-12);
    /* Ties go to even, and the sum is added to. */
    CHECK(sum[0] == 513 && sum[1] == -255 && sum[2] == 3 && sum[3] == 5 && sum[4] == -1 && sum[5] == 1);
}

static void test_bound_holds(void)
{
    for (int round = 0; round < 40; round++) {
        float *g = support_floats(N), scale = ldexpf(1, (int)(support_bits() % 200) - 90);
        int64_t sum[N] = {0};
        for (int i = 0; i < N; i++)
            g[i] *= scale;
        double c = round % 2 ? 1.0 : 0.37, grid = round % 3 ? 1048576 : 4096;
        struct clip_result r = clip(N, g, c, grid, sum);
        CHECK(r.finite && r.shrinks == 0 && norm_of(N, sum) <= c * grid);
        if (r.clipped) /* and is not far below it */
            CHECK(norm_of(N, sum) >= c * grid - 2 * sqrt(N));
        free(g);
    }
}

/* Halves that all round away from zero: the worst case of the bound, met exactly. */
static void test_worst_rounding(void)
{
    float g[400];
    int64_t sum[400] = {0};
    for (int i = 0; i < 400; i++)
        g[i] = 1.5f;
    struct clip_result r = clip(400, g, 40, 1, sum);
    CHECK(!r.clipped && norm_of(400, sum) == 40 && r.shrinks == 0);
    memset(sum, 0, sizeof(sum));
    r = clip(400, g, 39.9, 1, sum); /* factor pulls below one and a half */
    CHECK(r.clipped && norm_of(400, sum) <= 39.9);
}

/* A bound that is not whole is taken down to the next whole one, and then rounding can break it: the check mends it. */
static void test_exact_check(void)
{
    float g[3] = {0.5045f, 0.5045f, 0.5045f};
    int64_t sum[3] = {0};
    struct clip_result r = clip(3, g, 1.74, 1, sum);
    CHECK(r.shrinks > 0 && r.clipped && r.factor < 1 && norm_of(3, sum) <= 1);
}

static void test_hostile_values(void)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t b = 0; b < ARRAY_LEN(bad); b++) {
        for (int at = 0; at < 37; at += 4) {
            float g[37] = {0};
            int64_t sum[37] = {0}, zero[37] = {0};
            g[1] = 1;
            g[at] = bad[b];
            struct clip_result r = clip(37, g, 1, 1024, sum);
            CHECK(!r.finite && r.norm == 0 && r.factor == 0);
            CHECK_SAME(sum, zero, 37);
        }
    }
    float huge[16], tiny[16];
    int64_t sum[16] = {0}, zero[16] = {0};
    for (int i = 0; i < 16; i++) {
        huge[i] = i % 2 ? -3.4e38f : 3.4e38f;
        tiny[i] = 1e-45f;
    }
    struct clip_result r = clip(16, huge, 1, 1024, sum);
    CHECK(r.finite && r.clipped && norm_of(16, sum) <= 1024 && sum[0] >= 255 && sum[1] == -sum[0]);
    memset(sum, 0, sizeof(sum));
    r = clip(16, tiny, 1, 1024, sum);
    CHECK(r.finite && !r.clipped && r.norm > 0);
    CHECK_SAME(sum, zero, 16);
    float none[16] = {0};
    r = clip(16, none, 1, 1024, sum);
    CHECK(r.finite && !r.clipped && r.norm == 0 && r.factor == 1);
    CHECK_SAME(sum, zero, 16);
}

static void test_micro_batches(void)
{
    float *a = support_floats(N), *b = support_floats(N);
    int64_t one[N] = {0}, two[N] = {0};
    (void)clip(N, a, 1, 1048576, one);
    (void)clip(N, b, 1, 1048576, one);
    (void)clip(N, b, 1, 1048576, two);
    (void)clip(N, a, 1, 1048576, two);
    CHECK_SAME(one, two, N);
    free(a);
    free(b);
}

int tests_clip(void)
{
    RUN(test_below_the_bound);
    RUN(test_bound_holds);
    RUN(test_worst_rounding);
    RUN(test_exact_check);
    RUN(test_hostile_values);
    RUN(test_micro_batches);
    return check_report();
}
