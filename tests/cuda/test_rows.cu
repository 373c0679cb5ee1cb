/* rows_* against the scalar table: widths of every way through the kernels, ragged rows, strides, aliases. */
#include "tests/cuda/rows.h"

static const enum tensor_type elements[] = {TENSOR_F32, TENSOR_BF16};

static const struct kernel_ops *reference(void)
{
    return kernels_cpu(KERNEL_SCALAR);
}

static double tolerance(enum tensor_type type)
{
    return type == TENSOR_F32 ? 1e-5 : 4e-3;
}

/* Widths for each number of threads a row and of vectors a thread, and for rows longer than what registers hold. */
static const int32_t widths[] = {8, 24, 56, 64, 72, 136, 264, 576, 640, 768, 1032, 2056, 4104, 8200, 16392};

static struct rows nothing(void)
{
    return {NULL, 0};
}

/* --- norms ------------------------------------------------------------------------------------------------------- */

static void check_norm_forward(enum tensor_type type, int32_t m, int32_t n, bool with_add, bool with_rstd,
                               int32_t margin)
{
    size_t size = (size_t)m * (size_t)n;
    std::vector<float> x = random_elements(type, size), add = random_elements(type, size),
                       gain = random_floats((size_t)n);
    device_rows xs(type, m, n, n + margin, margin, x), adds(type, m, n, n + 2 * margin, 0, add);
    device_rows ys(type, m, n, n + 3 * margin, 0);
    device_vector<float> gains(gain), rstds(std::vector<float>((size_t)m, NAN));
    rows_norm_forward((stream_t)0, type, m, n, 1e-5f, gains.at, xs.rows(), with_add ? adds.rows() : nothing(),
                      ys.rows(), with_rstd ? rstds.at : NULL);
    std::vector<float> y(size), rstd((size_t)m), sum = x;
    for (size_t i = 0; with_add && i < size; i++)
        sum[i] = host_round(x[i] + add[i], type); /* rounded before it is squared */
    std::vector<float> want_x = sum;
    reference()->rmsnorm_forward(NULL, m, n, 1e-5f, gain.data(), sum.data(), NULL, y.data(), rstd.data());
    CHECK_CLOSE(ys.get(), y, tolerance(type));
    CHECK(xs.get() == want_x);
    if (with_rstd)
        CHECK_CLOSE(rstds.get(), rstd, 1e-5);
    else
        CHECK(rstds.get()[0] != rstds.get()[0]);
    CHECK(xs.guarded() && adds.guarded() && ys.guarded());
}

static void test_norm_forward(void)
{
    for (enum tensor_type type : elements) {
        for (int32_t n : widths) {
            check_norm_forward(type, n < 600 ? 37 : 3, n, true, true, 0);
            check_norm_forward(type, n < 600 ? 9 : 1, n, false, n % 16 == 0, 8);
        }
    }
}

static void check_norm_backward(enum tensor_type type, int32_t m, int32_t n, bool accumulate, bool in_place,
                                int32_t margin)
{
    size_t size = (size_t)m * (size_t)n;
    std::vector<float> x = random_elements(type, size), dy = random_elements(type, size),
                       gain = random_floats((size_t)n);
    std::vector<float> old = random_elements(type, size), rstd = random_floats((size_t)m);
    for (float &r : rstd)
        r = 1.5f + r;
    device_rows xs(type, m, n, n + margin, 0, x), dys(type, m, n, n + 2 * margin, margin, dy);
    device_rows dxs(type, m, n, n + 3 * margin, 0);
    if (accumulate)
        dxs.set(old);
    device_vector<float> gains(gain), rstds(rstd);
    rows_norm_backward((stream_t)0, type, m, n, gains.at, xs.rows(), rstds.at, dys.rows(),
                       in_place ? dys.rows() : dxs.rows(), accumulate);
    reference()->rmsnorm_backward(NULL, m, n, gain.data(), x.data(), rstd.data(), dy.data(), old.data(), accumulate);
    CHECK_CLOSE(in_place ? dys.get() : dxs.get(), old, tolerance(type));
    CHECK(xs.get() == x && (in_place || dys.get() == dy));
    CHECK(xs.guarded() && dys.guarded() && dxs.guarded());
}

static void test_norm_backward(void)
{
    for (enum tensor_type type : elements) {
        for (int32_t n : widths) {
            check_norm_backward(type, n < 600 ? 37 : 2, n, false, false, 0);
            check_norm_backward(type, n < 600 ? 9 : 1, n, true, false, 8);
            check_norm_backward(type, 2, n, false, true, 8);
        }
    }
}

/* A row's bits do not depend on how many rows there are nor on which it is. */
static void test_norm_independence(void)
{
    for (enum tensor_type type : elements) {
        for (int32_t n : {64, 576, 2056}) {
            const int32_t m = 21;
            std::vector<float> x = random_elements(type, (size_t)(m * n)), dy = random_elements(type, (size_t)(m * n));
            std::vector<float> gain = random_floats((size_t)n);
            device_vector<float> gains(gain), rstds(std::vector<float>((size_t)m, NAN));
            device_rows xs(type, m, n, n, 0, x), dys(type, m, n, n, 0, dy), ys(type, m, n, n), dxs(type, m, n, n);
            rows_norm_forward((stream_t)0, type, m, n, 1e-5f, gains.at, xs.rows(), nothing(), ys.rows(), rstds.at);
            rows_norm_backward((stream_t)0, type, m, n, gains.at, xs.rows(), rstds.at, dys.rows(), dxs.rows(), false);
            std::vector<float> y = ys.get(), dx = dxs.get();
            for (int32_t row : {0, 13, 20}) {
                ptrdiff_t at = (ptrdiff_t)row * n;
                device_rows one(type, 1, n, n + 8, 8, {x.begin() + at, x.begin() + at + n});
                device_rows dy_one(type, 1, n, n, 0, {dy.begin() + at, dy.begin() + at + n});
                device_rows y_one(type, 1, n, n), dx_one(type, 1, n, n);
                rows_norm_forward((stream_t)0, type, 1, n, 1e-5f, gains.at, one.rows(), nothing(), y_one.rows(),
                                  rstds.at);
                rows_norm_backward((stream_t)0, type, 1, n, gains.at, one.rows(), rstds.at, dy_one.rows(),
                                   dx_one.rows(), false);
                CHECK_SAME(y_one.get().data(), y.data() + at, (size_t)n);
                CHECK_SAME(dx_one.get().data(), dx.data() + at, (size_t)n);
            }
        }
    }
}

/* Heads inside rows of another width, forward out of place and backward in place, as the loops call them. */
static void check_head_norm(enum tensor_type type, int32_t m, int32_t heads, int32_t head_size, int32_t margin)
{
    const int32_t n = heads * head_size;
    std::vector<float> x = random_elements(type, (size_t)m * (size_t)n), dy = random_elements(type, x.size());
    std::vector<float> gain = random_floats((size_t)head_size), y(x.size()), rstd((size_t)m * (size_t)heads);
    device_rows xs(type, m, n, n + margin, margin, x), ys(type, m, n, n + 2 * margin, 0);
    device_rows dys(type, m, n, n + 3 * margin, margin, dy);
    device_vector<float> gains(gain), rstds(std::vector<float>(rstd.size(), NAN));
    rows_head_norm_forward((stream_t)0, type, m, heads, head_size, 1e-5f, gains.at, xs.rows(), ys.rows(), rstds.at);
    std::vector<float> sum = x, want(x.size());
    reference()->rmsnorm_forward(NULL, m * heads, head_size, 1e-5f, gain.data(), sum.data(), NULL, y.data(),
                                 rstd.data());
    CHECK_CLOSE(ys.get(), y, tolerance(type));
    CHECK_CLOSE(rstds.get(), rstd, 1e-5);
    rows_head_norm_backward((stream_t)0, type, m, heads, head_size, gains.at, xs.rows(), rstds.at, dys.rows(),
                            dys.rows());
    reference()->rmsnorm_backward(NULL, m * heads, head_size, gain.data(), x.data(), rstd.data(), dy.data(),
                                  want.data(), false);
    CHECK_CLOSE(dys.get(), want, tolerance(type));
    CHECK(xs.get() == x && xs.guarded() && ys.guarded() && dys.guarded());
}

static void test_head_norm(void)
{
    for (enum tensor_type type : elements) {
        check_head_norm(type, 7, 9, 64, 0);
        check_head_norm(type, 5, 3, 128, 8);
        check_head_norm(type, 3, 4, 256, 16);
        check_head_norm(type, 11, 1, 16, 8);
    }
}

static void check_bias(enum tensor_type type, int32_t m, int32_t n, int32_t margin)
{
    std::vector<float> y = random_elements(type, (size_t)m * (size_t)n), bias = random_floats((size_t)n);
    device_rows ys(type, m, n, n + margin, margin, y);
    device_vector<float> biases(bias);
    rows_add_bias((stream_t)0, type, m, n, biases.at, ys.rows());
    for (size_t i = 0; i < y.size(); i++)
        y[i] = host_round(y[i] + bias[i % (size_t)n], type);
    CHECK(ys.get() == y && ys.guarded());
}

static void test_bias(void)
{
    for (enum tensor_type type : elements)
        for (int32_t n : {8, 64, 576, 1032})
            for (int32_t m : {1, 5, 67})
                check_bias(type, m, n, m == 5 ? 8 : 0);
}

/* --- rope -------------------------------------------------------------------------------------------------------- */

static void check_rope(enum tensor_type type, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
                       enum rope_order order, bool inverse, int32_t stride, int32_t column)
{
    const int32_t places = 50, n = heads * head_size;
    std::vector<float> table((size_t)(places * rotated)), x = random_elements(type, (size_t)m * (size_t)n);
    std::vector<int32_t> positions((size_t)m);
    kernels_rope_table(places, rotated, 1e4, 1.0, NULL, table.data());
    for (int32_t &p : positions)
        p = support_below(places);
    device_vector<float> tables(table);
    device_vector<int32_t> where(positions);
    device_rows xs(type, m, n, stride, column, x);
    rows_rope((stream_t)0, type, m, heads, head_size, rotated, order, inverse, tables.at, where.at, xs.rows());
    std::vector<float> want = x;
    reference()->rope(NULL, m, heads, head_size, rotated, order, inverse, table.data(), positions.data(), want.data());
    std::vector<float> got = xs.get();
    CHECK_DISTANCE(got.data(), want.data(), want.size(), tolerance(type));
    for (size_t i = 0; i < got.size(); i++) { /* what is not rotated is not touched */
        if ((int32_t)(i % (size_t)head_size) >= rotated && got[i] != x[i]) {
            CHECK(!"the rest of a head changed");
            break;
        }
    }
    CHECK(xs.guarded());
}

static void test_rope(void)
{
    for (enum tensor_type type : elements) {
        for (enum rope_order order : {ROPE_NORM, ROPE_NEOX}) {
            for (bool inverse : {false, true}) {
                check_rope(type, 19, 9, 64, 64, order, inverse, 9 * 64, 0);
                check_rope(type, 5, 3, 64, 64, order, inverse, 960, 576); /* the keys of a fused matrix */
                check_rope(type, 4, 2, 128, 64, order, inverse, 256, 0);  /* half rotation */
                check_rope(type, 3, 1, 256, 256, order, inverse, 264, 8);
                check_rope(type, 7, 3, 10, 6, order, inverse, 33, 1); /* nothing aligned */
                check_rope(type, 6, 5, 24, 20, order, inverse, 120, 0);
            }
        }
    }
}

/* --- gates ------------------------------------------------------------------------------------------------------- */

/* Besides random ones, values where exponentials overflow or vanish. */
static std::vector<float> gate_values(enum tensor_type type, size_t n)
{
    static const float odd[] = {0, -0.0f, 300, -300, 88, -88, 104, -104, 1e-30f, -1e-30f, 12, -12};
    std::vector<float> x = random_floats(n);
    for (size_t i = 0; i < n; i++)
        x[i] = host_round(i % 7 == 3 ? odd[i / 7 % 12] : 6 * x[i], type);
    return x;
}

/* margin < 0: gate and up are the halves of one fused matrix; out takes gate's place if in_place. */
static void check_gated(enum tensor_type type, int32_t m, int32_t n, enum gate_kind kind, int32_t margin, bool in_place)
{
    size_t size = (size_t)m * (size_t)n;
    std::vector<float> gate = gate_values(type, size), up = random_elements(type, size), out(size);
    int32_t gap = margin < 0 ? 0 : margin;
    device_rows fused(type, m, 2 * n, 2 * n), gates(type, m, n, n + gap), ups(type, m, n, n + 2 * gap);
    device_rows outs(type, m, n, n + 8, 8);
    std::vector<float> both(2 * size);
    for (size_t i = 0; i < size; i++) {
        size_t at = i / (size_t)n * 2 * (size_t)n + i % (size_t)n;
        both[at] = gate[i];
        both[at + (size_t)n] = up[i];
    }
    fused.set(both);
    gates.set(gate);
    ups.set(up);
    struct rows g = margin < 0 ? fused.rows() : gates.rows(), u = margin < 0 ? fused.rows(n) : ups.rows();
    rows_gated_forward((stream_t)0, type, m, n, kind, g, u, in_place ? g : outs.rows());
    reference()->gated_forward(NULL, m, n, kind, gate.data(), up.data(), n, out.data());
    CHECK_CLOSE(in_place ? gates.get() : outs.get(), out, tolerance(type));
    CHECK(outs.guarded() && gates.guarded() && ups.guarded());
    if (in_place)
        return;
    std::vector<float> dout = random_elements(type, size);
    device_rows douts(type, m, n, n + 16, 0, dout);
    rows_gated_backward((stream_t)0, type, m, n, kind, g, u, douts.rows());
    reference()->gated_backward(NULL, m, n, kind, gate.data(), up.data(), n, dout.data());
    if (margin >= 0) {
        CHECK_CLOSE(gates.get(), gate, tolerance(type));
        CHECK_CLOSE(ups.get(), up, tolerance(type));
        CHECK(gates.guarded() && ups.guarded() && douts.guarded());
        return;
    }
    both = fused.get();
    for (size_t i = 0; i < size; i++) {
        size_t at = i / (size_t)n * 2 * (size_t)n + i % (size_t)n;
        out[i] = both[at];
        dout[i] = both[at + (size_t)n];
    }
    CHECK_CLOSE(out, gate, tolerance(type));
    CHECK_CLOSE(dout, up, tolerance(type));
    CHECK(fused.guarded());
}

static void test_gated(void)
{
    for (enum tensor_type type : elements) {
        for (enum gate_kind kind : {GATE_SILU, GATE_GELU_TANH}) {
            check_gated(type, 5, 136, kind, 0, false);
            check_gated(type, 1, 8, kind, 16, false);
            check_gated(type, 9, 1536, kind, -1, false);
            check_gated(type, 3, 72, kind, 0, true);
        }
    }
}

/* --- embedding, gathering ---------------------------------------------------------------------------------------- */

static void test_embed(void)
{
    static const enum tensor_type tables[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0,
                                              TENSOR_Q4_1, TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0,
                                              TENSOR_Q2_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};
    for (enum tensor_type type : elements) {
        for (enum tensor_type from : tables) {
            const int32_t m = 23, vocabulary = 11, n = tensor_type_block(from) == 1 ? 40 : 256;
            size_t row_bytes = 0, block = tensor_type_block_bytes(from);
            CHECK(tensor_type_row_bytes(from, (size_t)n, &row_bytes));
            std::vector<uint8_t> bytes((size_t)vocabulary * row_bytes);
            for (size_t i = 0; i < bytes.size(); i++) {
                bytes[i] = (uint8_t)(support_bits() >> 32);
                size_t behind = from == TENSOR_Q2_K ? 80 : 208; /* where scales stand that are not the block's first */
                if (block > 4 ? i % block < 4 || i % block >= behind : i % block == block - 1)
                    bytes[i] &= 0x3b; /* scales, and floats, are finite */
            }
            std::vector<int32_t> ids((size_t)m);
            for (int32_t &id : ids)
                id = support_below(vocabulary);
            ids[0] = vocabulary - 1;
            std::vector<float> want((size_t)(m * n)), row((size_t)n);
            for (int32_t t = 0; t < m; t++) {
                tensor_dequantise(from, bytes.data() + (size_t)ids[(size_t)t] * row_bytes, (size_t)n, row.data());
                for (int32_t i = 0; i < n; i++)
                    want[(size_t)(t * n + i)] = host_round(row[(size_t)i] * 1.7f, type);
            }
            device_vector<uint8_t> table(bytes);
            device_vector<int32_t> which(ids);
            device_rows ys(type, m, n, n + 24, 8);
            rows_embed((stream_t)0, type, m, n, from, table.at, row_bytes, which.at, 1.7f, ys.rows());
            CHECK(ys.get() == want && ys.guarded());
        }
    }
}

static void test_gather(void)
{
    for (enum tensor_type type : elements) {
        for (int32_t n : {8, 72, 576}) {
            const int32_t m = 40, sources = 17;
            std::vector<float> from = random_elements(type, (size_t)(sources * n)), want((size_t)(m * n), 0.0f);
            std::vector<int32_t> index((size_t)m);
            for (size_t i = 0; i < index.size(); i++) {
                index[i] = i % 5 == 2 ? -1 : support_below(sources);
                for (int32_t c = 0; index[i] >= 0 && c < n; c++)
                    want[i * (size_t)n + (size_t)c] = from[(size_t)(index[i] * n + c)];
            }
            device_vector<int32_t> indices(index);
            device_rows froms(type, sources, n, n + 8, 8, from), tos(type, m, n, n + 16, 0);
            rows_gather((stream_t)0, type, m, n, indices.at, froms.rows(), tos.rows());
            CHECK(tos.get() == want && tos.guarded() && froms.guarded());
        }
    }
}

static void test_empty(void)
{
    for (enum tensor_type type : elements) {
        device_rows x(type, 1, 16, 16);
        device_vector<float> gain(std::vector<float>(16, 1.0f));
        rows_norm_forward((stream_t)0, type, 0, 16, 1e-5f, gain.at, x.rows(), nothing(), x.rows(), NULL);
        rows_norm_backward((stream_t)0, type, 0, 16, gain.at, x.rows(), NULL, x.rows(), x.rows(), false);
        rows_rope((stream_t)0, type, 0, 1, 16, 16, ROPE_NORM, false, gain.at, NULL, x.rows());
        rows_rope((stream_t)0, type, 1, 1, 16, 0, ROPE_NORM, false, gain.at, NULL, x.rows());
        rows_gated_forward((stream_t)0, type, 0, 16, GATE_SILU, x.rows(), x.rows(), x.rows());
        rows_gated_backward((stream_t)0, type, 0, 16, GATE_SILU, x.rows(), x.rows(), x.rows());
        rows_embed((stream_t)0, type, 0, 16, TENSOR_F32, gain.at, 64, NULL, 1, x.rows());
        rows_gather((stream_t)0, type, 0, 16, NULL, x.rows(), x.rows());
        rows_head_norm_forward((stream_t)0, type, 0, 1, 16, 1e-5f, gain.at, x.rows(), x.rows(), NULL);
        rows_head_norm_backward((stream_t)0, type, 0, 1, 16, gain.at, x.rows(), NULL, x.rows(), x.rows());
        rows_add_bias((stream_t)0, type, 0, 16, gain.at, x.rows());
        std::vector<float> values = x.get();
        CHECK(std::all_of(values.begin(), values.end(), [](float v) { return v != v; }) && x.guarded());
    }
}

int main(void)
{
    RUN(test_norm_forward);
    RUN(test_norm_backward);
    RUN(test_norm_independence);
    RUN(test_head_norm);
    RUN(test_bias);
    RUN(test_rope);
    RUN(test_gated);
    RUN(test_embed);
    RUN(test_gather);
    RUN(test_empty);
    return check_report();
}
