/* gradients_write against the scalar table, and what its result may not depend on. */
#include "tests/cuda/rows.h"

struct batch {
    std::vector<int32_t> offsets; /* segments + 1 */
    int32_t segments_max;
};

static struct batch batch_of(const std::vector<int32_t> &lengths, int32_t segments_max)
{
    struct batch b = {{0}, segments_max};
    for (int32_t n : lengths)
        b.offsets.push_back(b.offsets.back() + n);
    return b;
}

/* A group of linears as the backend lays it out: x and the members' h are columns of one matrix, dy and dh of another.
 */
struct group {
    enum tensor_type type;
    int32_t rank, in;
    std::vector<int32_t> outs;
    int32_t m; /* rows that hold numbers; the matrices have more, of NaN */
    std::vector<float> xh, dyh;
    int32_t xh_width, dyh_width;

    group(enum tensor_type type_, int32_t rank_, int32_t in_, std::vector<int32_t> outs_, int32_t m_)
        : type(type_), rank(rank_), in(in_), outs(outs_), m(m_)
    {
        int32_t ranks = rank * (int32_t)outs.size(), out = 0;
        for (int32_t o : outs)
            out += o;
        xh_width = in + ranks;
        dyh_width = out + ranks;
        xh = random_elements(type, (size_t)m * (size_t)xh_width);
        dyh = random_elements(type, (size_t)m * (size_t)dyh_width);
    }
    /* columns [from, from + n) of a, dense */
    std::vector<float> columns(const std::vector<float> &a, int32_t width, int32_t from, int32_t n) const
    {
        std::vector<float> dense;
        for (int32_t t = 0; t < m; t++) {
            for (int32_t i = 0; i < n; i++)
                dense.push_back(a[(size_t)t * (size_t)width + (size_t)(from + i)]);
        }
        return dense;
    }
};

static const float scale = 0.75f;

/* The gradients of a group lie with gaps of one float: gb of each member, then ga of each. */
static size_t layout(const group &g, std::vector<size_t> *gb, std::vector<size_t> *ga)
{
    size_t at = 1;
    for (int32_t o : g.outs) {
        gb->push_back(at);
        at += (size_t)o * (size_t)g.rank + 1;
    }
    for (size_t i = 0; i < g.outs.size(); i++) {
        ga->push_back(at);
        at += (size_t)g.in * (size_t)g.rank + 1;
    }
    return at;
}

/* What base (segments_max · stride) is afterwards. `row` is the batch's first row within the matrices. */
static std::vector<float> run(const group &g, const struct batch &b, std::vector<float> base, size_t stride)
{
    int32_t extra = 3, stride_x = (g.xh_width + 7) / 8 * 8 + 8, stride_y = (g.dyh_width + 7) / 8 * 8;
    device_rows xh(g.type, g.m + extra, g.xh_width, stride_x), dyh(g.type, g.m + extra, g.dyh_width, stride_y);
    std::vector<float> padded = g.xh;
    padded.resize((size_t)(g.m + extra) * (size_t)g.xh_width, NAN);
    xh.set(padded);
    padded = g.dyh;
    padded.resize((size_t)(g.m + extra) * (size_t)g.dyh_width, NAN);
    dyh.set(padded);

    std::vector<size_t> gb, ga;
    layout(g, &gb, &ga);
    std::vector<struct gradient_job> jobs;
    int32_t dh = 0, at = 0;
    for (int32_t o : g.outs)
        dh += o;
    for (size_t i = 0; i < g.outs.size(); i++) {
        int32_t rank_at = (int32_t)i * g.rank;
        struct rows dy_rows = dyh.rows(at);
        struct rows h_rows = xh.rows(g.in + rank_at);
        struct rows dh_rows = dyh.rows(dh + rank_at);
        jobs.push_back({dy_rows, h_rows, g.outs[i], g.rank, scale, gb[i]});
        jobs.push_back({dh_rows, xh.rows(), g.rank, g.in, 1.0f, ga[i]});
        at += g.outs[i];
    }
    device_vector<int32_t> offsets(b.offsets), count(std::vector<int32_t>{(int32_t)b.offsets.size() - 1});
    device_vector<float> result(base);
    gradients_write((stream_t)0, g.type, (int32_t)jobs.size(), jobs.data(), offsets.at, count.at, b.segments_max,
                    result.at, stride);
    return result.get();
}

/* base: what was there before, numbers where a segment owns the place. They are to be overwritten. */
static std::vector<float> expect(const group &g, const struct batch &b, std::vector<float> base, size_t stride)
{
    for (float &value : base)
        value = value == value ? 0 : value;
    const struct kernel_ops *ops = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run none = {};
    std::vector<size_t> gb, ga;
    layout(g, &gb, &ga);
    int32_t dh = 0, at = 0;
    for (int32_t o : g.outs)
        dh += o;
    for (size_t i = 0; i < g.outs.size(); i++) {
        int32_t rank_at = (int32_t)i * g.rank, out = g.outs[i];
        std::vector<float> dys = g.columns(g.dyh, g.dyh_width, at, out), x = g.columns(g.xh, g.xh_width, 0, g.in);
        std::vector<float> h = g.columns(g.xh, g.xh_width, g.in + rank_at, g.rank);
        std::vector<float> dhs = g.columns(g.dyh, g.dyh_width, dh + rank_at, g.rank);
        for (size_t e = 0; e + 1 < b.offsets.size(); e++) {
            float *to = base.data() + e * stride;
            int32_t t0 = b.offsets[e], t1 = b.offsets[e + 1];
            ops->lora_grad_b(&none, t0, t1, out, g.rank, scale, dys.data(), h.data(), g.rank, to + gb[i]);
            ops->lora_grad_a(&none, t0, t1, g.in, g.rank, dhs.data(), g.rank, x.data(), to + ga[i]);
        }
        at += out;
    }
    return base;
}

/* The gaps, and what no segment owns, hold a NaN of their own: same bits before and after. */
static void compare(const std::vector<float> &got, const std::vector<float> &want)
{
    std::vector<float> a, b;
    bool gaps_kept = got.size() == want.size();
    for (size_t i = 0; i < want.size(); i++) {
        if (want[i] != want[i]) {
            gaps_kept = gaps_kept && memcmp(&got[i], &want[i], 4) == 0;
        } else {
            a.push_back(got[i]);
            b.push_back(want[i]);
        }
    }
    CHECK(gaps_kept);
    CHECK_CLOSE(a, b, 1e-5);
}

static std::vector<float> start(const group &g, int32_t owners, int32_t segments_max, size_t stride)
{
    std::vector<size_t> gb, ga;
    layout(g, &gb, &ga);
    std::vector<float> base(stride * (size_t)segments_max, NAN);
    for (int32_t e = 0; e < owners; e++) {
        for (size_t i = 0; i < g.outs.size(); i++) {
            for (size_t k = 0; k < (size_t)g.outs[i] * (size_t)g.rank; k++)
                base[(size_t)e * stride + gb[i] + k] = support_uniform();
            for (size_t k = 0; k < (size_t)g.in * (size_t)g.rank; k++)
                base[(size_t)e * stride + ga[i] + k] = support_uniform();
        }
    }
    return base;
}

static void check_group(const group &g, const std::vector<int32_t> &lengths, bool one)
{
    std::vector<size_t> gb, ga;
    size_t stride = layout(g, &gb, &ga) + 3;
    int32_t count = (int32_t)lengths.size();
    struct batch b = batch_of(lengths, count + 2);
    std::vector<float> base = start(g, one ? 1 : count, one ? 1 : count + 2, stride);
    compare(run(g, b, base, one ? 0 : stride), expect(g, b, base, one ? 0 : stride));
}

static const enum tensor_type types[] = {TENSOR_BF16, TENSOR_F32};
static const std::vector<int32_t> ragged = {5, 0, 64, 1, 130, 0, 17};
static const int32_t ragged_rows = 217;

static void test_ranks(void)
{
    for (enum tensor_type type : types) {
        for (int32_t rank : {1, 3, 4, 8, 16, 17, 64, 100})
            check_group(group(type, rank, 72, {40, 136}, ragged_rows), ragged, false);
    }
}

static void test_three_members(void)
{
    for (enum tensor_type type : types) {
        for (int32_t rank : {5, 8})
            check_group(group(type, rank, 64, {128, 8, 16}, 40), {40}, false);
    }
}

/* The width may be the smaller side. */
static void test_rank_above_width(void)
{
    for (enum tensor_type type : types)
        check_group(group(type, 100, 16, {8}, 70), {69, 1}, false);
    check_group(group(TENSOR_BF16, 256, 16, {8}, 20), {20}, false);
}

static void test_one_gradient(void)
{
    for (enum tensor_type type : types) {
        check_group(group(type, 4, 72, {40, 136}, ragged_rows), ragged, true);
        check_group(group(type, 16, 200, {64}, ragged_rows), ragged, true);
    }
}

static void test_empty(void)
{
    group g(TENSOR_BF16, 16, 72, {40}, 4);
    check_group(g, {}, false);
    check_group(g, {}, true);
    check_group(g, {0, 0}, false);
    check_group(g, {0, 0}, true);
    gradients_write((stream_t)0, TENSOR_BF16, 0, NULL, NULL, NULL, 3, NULL, 8);
    gradients_write((stream_t)0, TENSOR_BF16, 0, NULL, NULL, NULL, 0, NULL, 8);
    support_sync();
}

/* Rows of the rank side that are not even aligned to each other. */
static void test_odd_stride(void)
{
    const struct kernel_ops *ops = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run none = {};
    int32_t rank = 17, out = 72, m = 70;
    for (enum tensor_type type : types) {
        std::vector<float> h = random_elements(type, (size_t)(m * rank));
        std::vector<float> dy = random_elements(type, (size_t)(m * out));
        device_rows h_rows(type, m, rank, rank + 2, 1, h), dy_rows(type, m, out, out + 8, 0, dy);
        struct gradient_job job = {dy_rows.rows(), h_rows.rows(), out, rank, scale, 0};
        device_vector<int32_t> offsets(std::vector<int32_t>{0, m}), count(std::vector<int32_t>{1});
        std::vector<float> want((size_t)(out * rank), 1.0f);
        device_vector<float> result(want);
        gradients_write((stream_t)0, type, 1, &job, offsets.at, count.at, 1, result.at, want.size());
        want.assign(want.size(), 0.0f);
        ops->lora_grad_b(&none, 0, m, out, rank, scale, dy.data(), h.data(), rank, want.data());
        CHECK_CLOSE(result.get(), want, 1e-5);
    }
}

/* A segment's bits are the same alone and among others. */
static void test_independence(void)
{
    for (enum tensor_type type : types) {
        for (int32_t rank : {3, 16}) {
            group packed(type, rank, 72, {40, 136}, ragged_rows);
            std::vector<size_t> gb, ga;
            size_t stride = layout(packed, &gb, &ga);
            struct batch b = batch_of(ragged, (int32_t)ragged.size());
            std::vector<float> zeros(stride * ragged.size(), 0.0f), all = run(packed, b, zeros, stride);
            for (size_t e = 0; e < ragged.size(); e++) {
                group alone = packed;
                alone.m = ragged[e];
                size_t x = (size_t)b.offsets[e] * (size_t)packed.xh_width;
                size_t y = (size_t)b.offsets[e] * (size_t)packed.dyh_width;
                alone.xh.assign(packed.xh.begin() + (ptrdiff_t)x,
                                packed.xh.begin() + (ptrdiff_t)(x + (size_t)alone.m * (size_t)packed.xh_width));
                alone.dyh.assign(packed.dyh.begin() + (ptrdiff_t)y,
                                 packed.dyh.begin() + (ptrdiff_t)(y + (size_t)alone.m * (size_t)packed.dyh_width));
                zeros.assign(stride, 0.0f);
                std::vector<float> one = run(alone, batch_of({ragged[e]}, 1), zeros, stride);
                CHECK(memcmp(one.data(), all.data() + e * stride, stride * sizeof(float)) == 0);
            }
        }
    }
}

int main(void)
{
    RUN(test_ranks);
    RUN(test_three_members);
    RUN(test_rank_above_width);
    RUN(test_one_gradient);
    RUN(test_empty);
    RUN(test_odd_stride);
    RUN(test_independence);
    return check_report();
}
