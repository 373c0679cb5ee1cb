/* Attention against the scalar CPU reference: packed segments, windows, groups, head sizes, strides; and that a
 * segment's results do not depend on what it is packed with. */
#include <algorithm>
#include <vector>

#include "kernels/cuda/internal.h"
#include "tests/cuda/support.h"

/* A segment: its length, and how many rows that belong to nothing stand before it. Its data follow from its seed. */
struct piece {
    int32_t length, gap;
    uint64_t seed;
};

#define GUARD 8    /* columns behind each matrix that no kernel may touch */
#define EMPTY 2    /* entries behind the list's end */
#define ROWS_END 3 /* rows behind the last segment */

static struct attention_shape shape_of(int32_t heads, int32_t kv_heads, int32_t head_size, int32_t window)
{
    return attention_shape{heads, kv_heads, head_size, window, 1.0f / sqrtf((float)head_size)};
}

/* A batch on the device: q|k|v fused in one matrix, so are dq|dk|dv. */
template <typename T> struct batch {
    struct attention_shape shape;
    std::vector<piece> pieces;
    int32_t rows, q_width, kv_width, stride, o_stride, tiles_max;
    device_array<T> qkv, o, g, gradients;
    device_array<float> lse, delta;
    device_array<attention_tile> tiles;
    device_array<unsigned char> work;

    static int32_t rows_of(const std::vector<piece> &pieces)
    {
        int32_t rows = ROWS_END;
        for (const piece &p : pieces)
            rows += p.gap + p.length;
        return rows;
    }

    static int32_t tiles_of(const std::vector<piece> &pieces)
    {
        int32_t tiles = EMPTY;
        for (const piece &p : pieces)
            tiles += (p.length + ATTENTION_TILE - 1) / ATTENTION_TILE;
        return tiles;
    }

    batch(const struct attention_shape &shape_, const std::vector<piece> &pieces_, float q_scale = 4)
        : shape(shape_), pieces(pieces_), rows(rows_of(pieces_)), q_width(shape.heads * shape.head_size),
          kv_width(shape.kv_heads * shape.head_size), stride(q_width + 2 * kv_width + GUARD), o_stride(q_width + GUARD),
          tiles_max(tiles_of(pieces_)), qkv((size_t)rows * stride), o((size_t)rows * o_stride),
          g((size_t)rows * o_stride), gradients((size_t)rows * stride), lse((size_t)rows * shape.heads),
          delta((size_t)rows * shape.heads), tiles((size_t)tiles_max),
          work(attention_backward_work(element_type<T>::type, &shape, rows))
    {
        qkv.poison();
        o.poison();
        g.poison();
        gradients.poison();
        lse.poison();
        delta.poison();
        work.poison();
        int32_t row = 0, count = 0;
        for (size_t i = 0; i < pieces.size(); i++) {
            uint64_t state = support_state;
            support_state = 0x9e3779b97f4a7c15u * (pieces[i].seed + 1);
            row += pieces[i].gap;
            for (int32_t t = 0; t < pieces[i].length; t++) {
                for (int32_t c = 0; c < stride - GUARD; c++)
                    host_store(&qkv[(size_t)(row + t) * stride + c], (c < q_width ? q_scale : 1) * support_uniform());
                for (int32_t c = 0; c < q_width; c++)
                    host_store(&g[(size_t)(row + t) * o_stride + c], support_uniform());
            }
            support_state = state;
            for (int32_t at = 0; at < pieces[i].length; at += ATTENTION_TILE)
                tiles[count++] = attention_tile{row, pieces[i].length, at, (int32_t)i};
            row += pieces[i].length;
        }
        std::stable_sort(tiles.host, tiles.host + count,
                         [](const attention_tile &a, const attention_tile &b) { return a.at > b.at; });
        memset(tiles.host + count, 0, EMPTY * sizeof(attention_tile));
        qkv.put();
        g.put();
        tiles.put();
    }

    struct rows at(device_array<T> &matrix, int32_t column)
    {
        return rows_of(matrix.dev, column, &matrix == &o || &matrix == &g ? o_stride : stride);
    }
    static struct rows rows_of(T *dev, int32_t column, int32_t stride)
    {
        struct rows r = {dev + column, stride};
        return r;
    }

    void forward(bool with_lse = true)
    {
        attention_forward((stream_t)0, element_type<T>::type, &shape, tiles.dev, tiles_max, at(qkv, 0),
                          at(qkv, q_width), at(qkv, q_width + kv_width), at(o, 0), with_lse ? lse.dev : NULL);
        o.get();
        lse.get();
    }
    void backward()
    {
        attention_backward((stream_t)0, element_type<T>::type, &shape, tiles.dev, tiles_max, rows, at(qkv, 0),
                           at(qkv, q_width), at(qkv, q_width + kv_width), at(o, 0), lse.dev, at(g, 0), at(gradients, 0),
                           at(gradients, q_width), at(gradients, q_width + kv_width), delta.dev,
                           work.n ? work.dev : NULL);
        gradients.get();
        work.get();
        delta.get();
    }

    /* The first row of piece i. */
    int32_t first_row(size_t i) const
    {
        int32_t row = pieces[i].gap;
        for (size_t j = 0; j < i; j++)
            row += pieces[j].gap + pieces[j].length;
        return row;
    }
};

/* Values of `width` columns from `column`, a dense float copy of a piece's rows. */
template <typename T>
static std::vector<float> dense(const device_array<T> &x, int32_t stride, int32_t row, int32_t rows, int32_t column,
                                int32_t width)
{
    std::vector<float> y((size_t)rows * width + 1);
    for (int32_t t = 0; t < rows; t++)
        for (int32_t c = 0; c < width; c++)
            y[(size_t)t * width + c] = host_float(x[(size_t)(row + t) * stride + column + c]);
    return y;
}

/* The largest relative distance of one row of one head; rows are taken to be at least a third of the usual size or
 * 0.01: the dq of a query with one key is 0. */
static double worst_row(const std::vector<float> &got, const std::vector<float> &want, int32_t size)
{
    size_t n = (want.size() - 1) / (size_t)size;
    double norm = 0, worst = 0;
    for (float x : want)
        norm += (double)x * x;
    double usual = sqrt(norm / fmax((double)n, 1));
    for (size_t i = 0; i < n; i++) {
        double gap = 0, own = 0;
        for (int32_t c = 0; c < size; c++) {
            double x = got[i * size + c], y = want[i * size + c];
            gap += (x - y) * (x - y);
            own += y * y;
        }
        double d = sqrt(gap) / fmax(fmax(sqrt(own), usual / 3), 1e-2);
        worst = d <= worst ? worst : d; /* NaN stays */
        if (d != d)
            return INFINITY;
    }
    return worst;
}

#define CHECK_ROWS(got, want, size, tolerance)                                                                         \
    do {                                                                                                               \
        double worst_ = worst_row(got, want, size);                                                                    \
        check_count++;                                                                                                 \
        if (!(worst_ <= (tolerance))) {                                                                                \
            check_failures++;                                                                                          \
            fprintf(stderr, "%s:%d: %s: a row is %g off (%d/%d heads of %d, window %d, %d rows)\n", __FILE__,          \
                    __LINE__, #got, worst_, b.shape.heads, b.shape.kv_heads, b.shape.head_size, b.shape.window,        \
                    b.rows);                                                                                           \
        }                                                                                                              \
    } while (0)

/* Columns `width` and following, and rows of no piece, are as they were. */
template <typename T> static bool untouched(const batch<T> &b, const device_array<T> &x, int32_t stride, int32_t width)
{
    std::vector<bool> inside((size_t)b.rows, false);
    for (size_t i = 0; i < b.pieces.size(); i++)
        for (int32_t t = 0; t < b.pieces[i].length; t++)
            inside[(size_t)(b.first_row(i) + t)] = true;
    for (int32_t row = 0; row < b.rows; row++)
        for (int32_t c = inside[(size_t)row] ? width : 0; c < stride; c++)
            if (!support_poisoned(x[(size_t)row * stride + c]))
                return false;
    return true;
}

template <typename T> static void compare(batch<T> &b)
{
    const bool exact = element_type<T>::type == TENSOR_F32;
    const double tolerance = exact ? 1e-5 : 8e-3;
    const struct kernel_ops *ops = kernels_cpu(KERNEL_SCALAR);
    int32_t size = b.shape.head_size, heads = b.shape.heads;
    b.forward();
    b.backward();
    CHECK(untouched(b, b.o, b.o_stride, b.q_width));
    CHECK(untouched(b, b.gradients, b.stride, b.stride - GUARD));
    for (size_t i = 0; i < b.pieces.size(); i++) {
        int32_t row = b.first_row(i), n = b.pieces[i].length, offsets[2] = {0, n};
        struct segments one = {1, offsets};
        std::vector<float> scratch((size_t)n + 16);
        struct kernel_run run = {};
        run.scratch = scratch.data();
        run.scratch_bytes = scratch.size() * sizeof(float);
        std::vector<float> q = dense(b.qkv, b.stride, row, n, 0, b.q_width),
                           k = dense(b.qkv, b.stride, row, n, b.q_width, b.kv_width),
                           v = dense(b.qkv, b.stride, row, n, b.q_width + b.kv_width, b.kv_width),
                           g = dense(b.g, b.o_stride, row, n, 0, b.q_width),
                           o = dense(b.o, b.o_stride, row, n, 0, b.q_width),
                           lse = dense(b.lse, heads, row, n, 0, heads),
                           dq = dense(b.gradients, b.stride, row, n, 0, b.q_width),
                           dk = dense(b.gradients, b.stride, row, n, b.q_width, b.kv_width),
                           dv = dense(b.gradients, b.stride, row, n, b.q_width + b.kv_width, b.kv_width);
        std::vector<float> want_o(o.size()), want_lse(lse.size()), want_dq(dq.size()), want_dk(dk.size()),
            want_dv(dv.size());
        ops->attention_forward(&run, &b.shape, &one, q.data(), k.data(), v.data(), want_o.data(), want_lse.data());
        CHECK_ROWS(o, want_o, size, tolerance);
        for (int32_t j = 0; j < n * heads; j++)
            if (!(fabsf(lse[(size_t)j] - want_lse[(size_t)j]) <= 2e-5f * fmaxf(1, fabsf(want_lse[(size_t)j])))) {
                CHECK_NEAR(lse[(size_t)j], want_lse[(size_t)j], 2e-5);
                break;
            }
        ops->attention_backward(&run, &b.shape, &one, q.data(), k.data(), v.data(), o.data(), lse.data(), g.data(),
                                want_dq.data(), want_dk.data(), want_dv.data());
        CHECK_ROWS(dq, want_dq, size, tolerance);
        CHECK_ROWS(dk, want_dk, size, tolerance);
        CHECK_ROWS(dv, want_dv, size, tolerance);
    }
}

static const std::vector<piece> ragged = {{65, 0, 1}, {1, 2, 2}, {129, 0, 3}, {5, 1, 4}, {64, 0, 5}, {63, 0, 6}};
static const std::vector<piece> small = {{70, 1, 1}, {1, 0, 2}, {20, 0, 3}};
static const std::vector<piece> few = {{70, 1, 1}, {1, 0, 2}, {133, 0, 3}};

template <typename T>
static void compare_shape(int32_t heads, int32_t kv_heads, int32_t size, int32_t window,
                          const std::vector<piece> &pieces)
{
    batch<T> b(shape_of(heads, kv_heads, size, window), pieces);
    compare(b);
}

static void test_sizes(void) /* the tuned head sizes, every length */
{
    compare_shape<bf16>(2, 1, 64, 0, ragged);
    compare_shape<bf16>(2, 1, 128, 0, ragged);
    compare_shape<bf16>(1, 1, 256, 0, ragged);
}

static void test_padded_sizes(void) /* the others are filled up with zeros, and their neighbours are not read */
{
    compare_shape<bf16>(3, 3, 16, 0, few);
    compare_shape<bf16>(2, 2, 48, 17, few);
    compare_shape<bf16>(2, 1, 80, 0, few);
    compare_shape<bf16>(2, 1, 112, 64, {{70, 1, 1}});
    compare_shape<bf16>(2, 2, 144, 0, {{70, 1, 1}});
}

static void test_windows(void)
{
    for (int32_t window : {1, 2, 17, 64, 66, 100}) { /* 2 and 66: one key of a tile is seen by one row of a warp */
        compare_shape<bf16>(1, 1, 64, window, {{200, 0, 7}, {90, 1, 8}});
        compare_shape<bf16>(1, 1, 128, window, {{200, 0, 7}});
    }
    compare_shape<bf16>(1, 1, 256, 17, {{150, 0, 7}});
    compare_shape<bf16>(1, 1, 256, 64, {{150, 0, 7}});
    compare_shape<bf16>(1, 1, 64, 263, {{263, 0, 7}}); /* as wide as the segment */
    compare_shape<bf16>(1, 1, 64, INT32_MAX, {{70, 0, 7}});
}

static void test_groups(void) /* query heads of a kv head: in one block, and in parts */
{
    compare_shape<bf16>(9, 3, 64, 0, small);
    compare_shape<bf16>(8, 2, 64, 0, small);  /* parts of 2 */
    compare_shape<bf16>(7, 1, 64, 30, small); /* parts of 2, the last 1 */
    compare_shape<bf16>(4, 1, 128, 0, small);
    compare_shape<bf16>(4, 1, 256, 0, {{70, 1, 1}});
    compare_shape<bf16>(4, 1, 16, 0, {{70, 1, 1}});
}

static void test_long(void) /* several blocks of 128 rows, scores that are far apart */
{
    for (int32_t size : {64, 128}) {
        batch<bf16> b(shape_of(1, 1, size, 0), {{389, 0, 9}}, 30);
        compare(b);
    }
}

static void test_float(void)
{
    compare_shape<float>(2, 1, 64, 0, ragged);
    compare_shape<float>(4, 2, 16, 17, few);
    compare_shape<float>(3, 1, 48, 64, few);
    compare_shape<float>(1, 1, 256, 0, few);
}

static void test_empty(void)
{
    batch<bf16> b(shape_of(2, 1, 64, 0), {});
    b.forward();
    b.backward();
    CHECK(untouched(b, b.o, b.o_stride, b.q_width) && untouched(b, b.gradients, b.stride, b.q_width));
    b.tiles_max = 0;
    b.forward();
    b.backward();
    batch<float> f(shape_of(4, 1, 64, 0), {});
    f.forward();
    f.backward();
    CHECK(untouched(f, f.o, f.o_stride, f.q_width) && untouched(f, f.gradients, f.stride, f.q_width));
}

static void test_no_lse(void)
{
    batch<bf16> a(shape_of(2, 1, 64, 0), few), b(shape_of(2, 1, 64, 0), few);
    a.forward();
    b.forward(false);
    CHECK_SAME(a.o.host, b.o.host, a.o.n);
    for (size_t i = 0; i < b.lse.n; i++)
        if (!support_poisoned(b.lse[i])) {
            CHECK(support_poisoned(b.lse[i]));
            break;
        }
}

/* Segment `seed` has the same bits in both batches. */
template <typename T> static void check_same_segment(const batch<T> &a, size_t i, const batch<T> &b, size_t j)
{
    int32_t n = a.pieces[i].length;
    bool same_o = true, same_lse = true, same_gradients = true;
    for (int32_t t = 0; t < n; t++) {
        size_t x = (size_t)(a.first_row(i) + t), y = (size_t)(b.first_row(j) + t), heads = (size_t)a.shape.heads;
        same_o &= memcmp(a.o.host + x * a.o_stride, b.o.host + y * b.o_stride, (size_t)a.q_width * sizeof(T)) == 0;
        same_lse &= memcmp(a.lse.host + x * heads, b.lse.host + y * heads, heads * sizeof(float)) == 0;
        same_gradients &= memcmp(a.gradients.host + x * a.stride, b.gradients.host + y * b.stride,
                                 (size_t)(a.stride - GUARD) * sizeof(T)) == 0;
    }
    CHECK(a.pieces[i].seed == b.pieces[j].seed && n == b.pieces[j].length);
    CHECK(same_o);
    CHECK(same_lse);
    CHECK(same_gradients);
}

template <typename T> static void independence(const struct attention_shape &shape)
{
    batch<T> alone(shape, {{137, 0, 1}}), first(shape, {{137, 3, 1}, {5, 0, 2}}),
        later(shape, {{70, 1, 3}, {7, 0, 4}, {137, 0, 1}, {20, 0, 5}});
    for (batch<T> *b : {&alone, &first, &later}) {
        b->forward();
        b->backward();
    }
    check_same_segment(alone, 0, first, 0);
    check_same_segment(alone, 0, later, 2);
}

static void test_independence(void)
{
    independence<bf16>(shape_of(2, 1, 64, 0));
    independence<bf16>(shape_of(4, 1, 64, 100)); /* in parts */
    independence<bf16>(shape_of(1, 1, 128, 0));
    independence<bf16>(shape_of(1, 1, 256, 100));
    independence<float>(shape_of(2, 1, 16, 0));
}

static void test_bf16(void)
{
    test_sizes();
    test_padded_sizes();
    test_windows();
    test_groups();
    test_long();
    test_empty();
    test_no_lse();
    test_independence();
}

int main(void)
{
#ifdef CUDA_SHIM
    for (int capability : {90, 89}) { /* products of groups of warps, and of warps with the least shared memory */
        shim_capability(capability);
        RUN(test_bf16);
    }
#else
    RUN(test_bf16);
#endif
    RUN(test_float);
    return check_report();
}
