/*
 * What happens to each row by itself: norms, biases, rope, gates, embedding, gathering.
 *
 * All are bound by memory: the floor is the bytes of the rows read and written, and each is read once. What depends on
 * a row's width (threads a row, order of its sum) depends on nothing else.
 */
#include "kernels/cuda/internal.h"
#include "kernels/cuda/blocks.h"

#include <assert.h>

#define BLOCK 256

/* CALL(element type) */
#define FOR_ELEMENT(type, CALL)                                                                                        \
    do {                                                                                                               \
        assert((type) == TENSOR_F32 || (type) == TENSOR_BF16);                                                         \
        if ((type) == TENSOR_BF16) {                                                                                   \
            CALL(bf16);                                                                                                \
        } else {                                                                                                       \
            CALL(float);                                                                                               \
        }                                                                                                              \
    } while (0)

static void assert_rows(enum tensor_type type, int32_t n, struct rows x)
{
    (void)type, (void)n, (void)x;
    assert(n >= 0 && n % 8 == 0 && x.stride >= n && x.stride % 8 == 0 && (uintptr_t)x.at % 16 == 0);
}

static unsigned blocks_for(int64_t items, int64_t a_block)
{
    int64_t blocks = (items + a_block - 1) / a_block;
    assert(blocks <= INT32_MAX);
    return (unsigned)blocks;
}

/* --- norms ------------------------------------------------------------------------------------------------------- */

/* Sum over the LANES threads of a row, 8, 16 or 32 of a warp or the whole block, in a fixed order; all get its bits.
 * shared: LANES/WARP floats. */
template <int LANES> DEVICE float row_sum(float x, float *shared)
{
    for (int mask = (LANES < WARP ? LANES : WARP) / 2; mask > 0; mask /= 2)
        x += shuffle_xor(x, mask);
    if constexpr (LANES > WARP) {
        if (threadIdx.x % WARP == 0)
            shared[threadIdx.x / WARP] = x;
        block_sync();
        x = 0;
        for (int i = 0; i < LANES / WARP; i++)
            x += shared[i];
    }
    return x;
}

template <typename E> DEVICE float vec_squares(const vec16 &v, float sum)
{
    float x[VECTOR<E>];
    vec_unpack<E>(v, x);
    for (int i = 0; i < VECTOR<E>; i++)
        sum += x[i] * x[i];
    return sum;
}

template <typename E> DEVICE vec16 vec_add(const vec16 &a, const vec16 &b)
{
    float x[VECTOR<E>], y[VECTOR<E>];
    vec_unpack<E>(a, x);
    vec_unpack<E>(b, y);
    for (int i = 0; i < VECTOR<E>; i++)
        x[i] += y[i];
    return vec_pack<E>(x);
}

template <typename E> DEVICE vec16 vec_normed(const vec16 &v, float rstd, const float *gain)
{
    float x[VECTOR<E>], g[VECTOR<E>];
    vec_unpack<E>(v, x);
    load_floats<E>(gain, g);
    for (int i = 0; i < VECTOR<E>; i++)
        x[i] = x[i] * rstd * g[i];
    return vec_pack<E>(x);
}

/* Where row i of a norm begins. A row of the matrix holds `heads` of them, one after the other (1: all of it). */
template <typename E> DEVICE E *norm_row(E *at, int64_t row, int32_t heads, int32_t n, int32_t stride)
{
    if (heads == 1)
        return at + row * stride;
    int32_t whole = (int32_t)row / heads;
    return at + (int64_t)whole * stride + (int64_t)((int32_t)row - whole * heads) * n;
}

/* Rows of at most LANES·K vectors, which stay in registers between the sum and the scaling. */
template <typename E, int LANES, int K>
TEMPLATE_KERNEL norm_forward(int32_t m, int32_t heads, int32_t n, float eps, const float *RESTRICT gain, E *x,
                             int32_t x_stride, const E *add, int32_t add_stride, E *y, int32_t y_stride, float *rstd)
{
    DYNAMIC_SHARED(float, shared);
    int64_t row = LANES > WARP ? blockIdx.x : (int64_t)blockIdx.x * (BLOCK / LANES) + threadIdx.x / LANES;
    int lane = (int)threadIdx.x % LANES, vectors = row < m ? n / VECTOR<E> : 0;
    vec16 kept[K];
    x = norm_row(x, row, heads, n, x_stride);
    for (int k = 0; k < K; k++) {
        int at = lane + k * LANES;
        kept[k] = at < vectors ? vec_load(x + at * VECTOR<E>) : vec_zero();
    }
    if (add) {
        vec16 more[K];
        add = norm_row(add, row, heads, n, add_stride);
        for (int k = 0; k < K; k++) {
            int at = lane + k * LANES;
            more[k] = at < vectors ? vec_load(add + at * VECTOR<E>) : vec_zero();
        }
        for (int k = 0; k < K; k++) {
            int at = lane + k * LANES;
            kept[k] = vec_add<E>(kept[k], more[k]);
            if (at < vectors)
                vec_store(x + at * VECTOR<E>, kept[k]);
        }
    }
    float squares = 0;
    for (int k = 0; k < K; k++)
        squares = vec_squares<E>(kept[k], squares);
    float scale = 1.0f / sqrtf(row_sum<LANES>(squares, shared) / (float)n + eps);
    y = norm_row(y, row, heads, n, y_stride);
    for (int k = 0; k < K; k++) {
        int at = lane + k * LANES;
        if (at < vectors)
            vec_store(y + at * VECTOR<E>, vec_normed<E>(kept[k], scale, gain + at * VECTOR<E>));
    }
    if (rstd && lane == 0 && row < m)
        rstd[row] = scale;
}

/* Rows of any length: read twice, the second time mostly from the cache. */
template <typename E, int LANES>
TEMPLATE_KERNEL norm_forward_long(int32_t m, int32_t heads, int32_t n, float eps, const float *RESTRICT gain, E *x,
                                  int32_t x_stride, const E *add, int32_t add_stride, E *y, int32_t y_stride,
                                  float *rstd)
{
    DYNAMIC_SHARED(float, shared);
    int64_t row = blockIdx.x;
    float squares = 0;
    (void)m;
    x = norm_row(x, row, heads, n, x_stride);
    y = norm_row(y, row, heads, n, y_stride);
    add = add ? norm_row(add, row, heads, n, add_stride) : add;
    for (int at = (int)threadIdx.x; at < n / VECTOR<E>; at += LANES) {
        vec16 v = vec_load(x + at * VECTOR<E>);
        if (add) {
            v = vec_add<E>(v, vec_load(add + at * VECTOR<E>));
            vec_store(x + at * VECTOR<E>, v);
        }
        squares = vec_squares<E>(v, squares);
    }
    float scale = 1.0f / sqrtf(row_sum<LANES>(squares, shared) / (float)n + eps);
    for (int at = (int)threadIdx.x; at < n / VECTOR<E>; at += LANES)
        vec_store(y + at * VECTOR<E>, vec_normed<E>(vec_load(x + at * VECTOR<E>), scale, gain + at * VECTOR<E>));
    if (rstd && threadIdx.x == 0)
        rstd[row] = scale;
}

/* CALL(threads a row, vectors a thread) for rows of `vectors` vectors; 0 vectors a thread: any number. */
#define FOR_ROW_SHAPE(vectors, CALL)                                                                                   \
    do {                                                                                                               \
        if ((vectors) <= 8)                                                                                            \
            CALL(8, 1);                                                                                                \
        else if ((vectors) <= 16)                                                                                      \
            CALL(16, 1);                                                                                               \
        else if ((vectors) <= 32)                                                                                      \
            CALL(32, 1);                                                                                               \
        else if ((vectors) <= 64)                                                                                      \
            CALL(32, 2);                                                                                               \
        else if ((vectors) <= 96)                                                                                      \
            CALL(32, 3);                                                                                               \
        else if ((vectors) <= 128)                                                                                     \
            CALL(32, 4);                                                                                               \
        else if ((vectors) <= 256)                                                                                     \
            CALL(64, 4);                                                                                               \
        else if ((vectors) <= 512)                                                                                     \
            CALL(128, 4);                                                                                              \
        else if ((vectors) <= 1024)                                                                                    \
            CALL(256, 4);                                                                                              \
        else if ((vectors) <= 2048)                                                                                    \
            CALL(512, 4);                                                                                              \
        else                                                                                                           \
            CALL(1024, 0);                                                                                             \
    } while (0)

/* Threads of a block and rows that they do. */
constexpr int norm_threads(int lanes)
{
    return lanes > WARP ? lanes : BLOCK;
}

template <typename E, int LANES, int K>
static void launch_norm_forward(stream_t s, int32_t m, int32_t heads, int32_t n, float eps, const float *gain,
                                struct rows x, struct rows add, struct rows y, float *rstd)
{
    E *x_at = static_cast<E *>(x.at), *y_at = static_cast<E *>(y.at);
    const E *add_at = static_cast<const E *>(add.at);
    if constexpr (K == 0)
        LAUNCH((norm_forward_long<E, LANES>), (unsigned)m, LANES, LANES / WARP * sizeof(float), s, m, heads, n, eps,
               gain, x_at, x.stride, add_at, add.stride, y_at, y.stride, rstd);
    else
        LAUNCH((norm_forward<E, LANES, K>), blocks_for(m, norm_threads(LANES) / LANES), norm_threads(LANES),
               norm_threads(LANES) / WARP * sizeof(float), s, m, heads, n, eps, gain, x_at, x.stride, add_at,
               add.stride, y_at, y.stride, rstd);
}

template <typename E>
static void norm_forward_shaped(stream_t s, int32_t m, int32_t heads, int32_t n, float eps, const float *gain,
                                struct rows x, struct rows add, struct rows y, float *rstd)
{
#define CALL(LANES, K) launch_norm_forward<E, LANES, K>(s, m, heads, n, eps, gain, x, add, y, rstd)
    FOR_ROW_SHAPE(n / VECTOR<E>, CALL);
#undef CALL
}

/* m norms of n values, `heads` of them a row. */
static void norm_forward_of(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t n, float eps,
                            const float *gain, struct rows x, struct rows add, struct rows y, float *rstd)
{
    if (m <= 0)
        return;
    assert_rows(type, heads * n, x);
    assert_rows(type, heads * n, y);
    assert(n % 8 == 0);
    if (add.at)
        assert_rows(type, heads * n, add);
#define CALL(E) norm_forward_shaped<E>(s, m, heads, n, eps, gain, x, add, y, rstd)
    FOR_ELEMENT(type, CALL);
#undef CALL
}

void rows_norm_forward(stream_t s, enum tensor_type type, int32_t m, int32_t n, float eps, const float *gain,
                       struct rows x, struct rows add, struct rows y, float *rstd)
{
    norm_forward_of(s, type, m, 1, n, eps, gain, x, add, y, rstd);
}

void rows_head_norm_forward(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t head_size, float eps,
                            const float *gain, struct rows x, struct rows y, float *rstd)
{
    const struct rows none = {NULL, 0};
    norm_forward_of(s, type, m * heads, heads, head_size, eps, gain, x, none, y, rstd);
}

/* Σ gain·dy·x of a vector, added to sum. */
template <typename E> DEVICE float vec_along(const vec16 &x, const vec16 &dy, const float *gain, float sum)
{
    float a[VECTOR<E>], b[VECTOR<E>], g[VECTOR<E>];
    vec_unpack<E>(x, a);
    vec_unpack<E>(dy, b);
    load_floats<E>(gain, g);
    for (int i = 0; i < VECTOR<E>; i++)
        sum += g[i] * b[i] * a[i];
    return sum;
}

/* old + rstd·gain·dy − x·along */
template <typename E>
DEVICE vec16 vec_norm_slope(const vec16 &x, const vec16 &dy, const vec16 &old, const float *gain, float rstd,
                            float along)
{
    float a[VECTOR<E>], b[VECTOR<E>], o[VECTOR<E>], g[VECTOR<E>];
    vec_unpack<E>(x, a);
    vec_unpack<E>(dy, b);
    vec_unpack<E>(old, o);
    load_floats<E>(gain, g);
    for (int i = 0; i < VECTOR<E>; i++)
        o[i] += rstd * g[i] * b[i] - a[i] * along;
    return vec_pack<E>(o);
}

/* With y = x·rstd·gain: dx = rstd·(gain·dy) − x·(rstd³/n)·Σ gain·dy·x. dx may be dy. */
template <typename E, int LANES, int K>
TEMPLATE_KERNEL norm_backward(int32_t m, int32_t heads, int32_t n, const float *RESTRICT gain, const E *x,
                              int32_t x_stride, const float *rstd, const E *dy, int32_t dy_stride, E *dx,
                              int32_t dx_stride, bool accumulate)
{
    DYNAMIC_SHARED(float, shared);
    int64_t row = LANES > WARP ? blockIdx.x : (int64_t)blockIdx.x * (BLOCK / LANES) + threadIdx.x / LANES;
    int lane = (int)threadIdx.x % LANES, vectors = row < m ? n / VECTOR<E> : 0;
    float r = row < m ? rstd[row] : 0.0f, sum = 0;
    vec16 xs[K], dys[K], old[K];
    x = norm_row(x, row, heads, n, x_stride);
    dy = norm_row(dy, row, heads, n, dy_stride);
    dx = norm_row(dx, row, heads, n, dx_stride);
    for (int k = 0; k < K; k++) {
        int at = lane + k * LANES;
        xs[k] = at < vectors ? vec_load(x + at * VECTOR<E>) : vec_zero();
        dys[k] = at < vectors ? vec_load(dy + at * VECTOR<E>) : vec_zero();
        old[k] = accumulate && at < vectors ? vec_load(dx + at * VECTOR<E>) : vec_zero();
    }
    for (int k = 0; k < K; k++) {
        int at = lane + k * LANES;
        if (at < vectors)
            sum = vec_along<E>(xs[k], dys[k], gain + at * VECTOR<E>, sum);
    }
    float along = row_sum<LANES>(sum, shared) * (r * r * r / (float)n);
    for (int k = 0; k < K; k++) {
        int at = lane + k * LANES;
        if (at < vectors)
            vec_store(dx + at * VECTOR<E>, vec_norm_slope<E>(xs[k], dys[k], old[k], gain + at * VECTOR<E>, r, along));
    }
}

template <typename E, int LANES>
TEMPLATE_KERNEL norm_backward_long(int32_t m, int32_t heads, int32_t n, const float *RESTRICT gain, const E *x,
                                   int32_t x_stride, const float *rstd, const E *dy, int32_t dy_stride, E *dx,
                                   int32_t dx_stride, bool accumulate)
{
    DYNAMIC_SHARED(float, shared);
    int64_t row = blockIdx.x;
    float r = rstd[row], sum = 0;
    (void)m;
    x = norm_row(x, row, heads, n, x_stride);
    dy = norm_row(dy, row, heads, n, dy_stride);
    dx = norm_row(dx, row, heads, n, dx_stride);
    for (int at = (int)threadIdx.x; at < n / VECTOR<E>; at += LANES)
        sum = vec_along<E>(vec_load(x + at * VECTOR<E>), vec_load(dy + at * VECTOR<E>), gain + at * VECTOR<E>, sum);
    float along = row_sum<LANES>(sum, shared) * (r * r * r / (float)n);
    for (int at = (int)threadIdx.x; at < n / VECTOR<E>; at += LANES) {
        vec16 old = accumulate ? vec_load(dx + at * VECTOR<E>) : vec_zero();
        vec_store(dx + at * VECTOR<E>, vec_norm_slope<E>(vec_load(x + at * VECTOR<E>), vec_load(dy + at * VECTOR<E>),
                                                         old, gain + at * VECTOR<E>, r, along));
    }
}

template <typename E, int LANES, int K>
static void launch_norm_backward(stream_t s, int32_t m, int32_t heads, int32_t n, const float *gain, struct rows x,
                                 const float *rstd, struct rows dy, struct rows dx, bool accumulate)
{
    const E *x_at = static_cast<const E *>(x.at), *dy_at = static_cast<const E *>(dy.at);
    E *dx_at = static_cast<E *>(dx.at);
    if constexpr (K == 0)
        LAUNCH((norm_backward_long<E, LANES>), (unsigned)m, LANES, LANES / WARP * sizeof(float), s, m, heads, n, gain,
               x_at, x.stride, rstd, dy_at, dy.stride, dx_at, dx.stride, accumulate);
    else
        LAUNCH((norm_backward<E, LANES, K>), blocks_for(m, norm_threads(LANES) / LANES), norm_threads(LANES),
               norm_threads(LANES) / WARP * sizeof(float), s, m, heads, n, gain, x_at, x.stride, rstd, dy_at, dy.stride,
               dx_at, dx.stride, accumulate);
}

template <typename E>
static void norm_backward_shaped(stream_t s, int32_t m, int32_t heads, int32_t n, const float *gain, struct rows x,
                                 const float *rstd, struct rows dy, struct rows dx, bool accumulate)
{
#define CALL(LANES, K) launch_norm_backward<E, LANES, K>(s, m, heads, n, gain, x, rstd, dy, dx, accumulate)
    FOR_ROW_SHAPE(n / VECTOR<E>, CALL);
#undef CALL
}

static void norm_backward_of(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t n, const float *gain,
                             struct rows x, const float *rstd, struct rows dy, struct rows dx, bool accumulate)
{
    if (m <= 0)
        return;
    assert_rows(type, heads * n, x);
    assert_rows(type, heads * n, dy);
    assert_rows(type, heads * n, dx);
    assert(!accumulate || dx.at != dy.at);
#define CALL(E) norm_backward_shaped<E>(s, m, heads, n, gain, x, rstd, dy, dx, accumulate)
    FOR_ELEMENT(type, CALL);
#undef CALL
}

void rows_norm_backward(stream_t s, enum tensor_type type, int32_t m, int32_t n, const float *gain, struct rows x,
                        const float *rstd, struct rows dy, struct rows dx, bool accumulate)
{
    norm_backward_of(s, type, m, 1, n, gain, x, rstd, dy, dx, accumulate);
}

void rows_head_norm_backward(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t head_size,
                             const float *gain, struct rows x, const float *rstd, struct rows dy, struct rows dx)
{
    norm_backward_of(s, type, m * heads, heads, head_size, gain, x, rstd, dy, dx, false);
}

/* --- biases ------------------------------------------------------------------------------------------------------ */

template <typename E> TEMPLATE_KERNEL add_bias(int32_t m, int32_t n, const float *RESTRICT bias, E *y, int32_t y_stride)
{
    int64_t item = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    int32_t vectors = n / VECTOR<E>, row = (int32_t)(item / vectors), at = (int32_t)(item % vectors) * VECTOR<E>;
    if (row >= m)
        return;
    float x[VECTOR<E>], b[VECTOR<E>];
    y += (int64_t)row * y_stride + at;
    vec_unpack<E>(vec_load(y), x);
    load_floats<E>(bias + at, b);
    for (int i = 0; i < VECTOR<E>; i++)
        x[i] += b[i];
    vec_store(y, vec_pack<E>(x));
}

void rows_add_bias(stream_t s, enum tensor_type type, int32_t m, int32_t n, const float *bias, struct rows y)
{
    if (m <= 0)
        return;
    assert_rows(type, n, y);
    assert((uintptr_t)bias % 16 == 0);
#define CALL(E)                                                                                                        \
    LAUNCH((add_bias<E>), blocks_for((int64_t)m *(n / VECTOR<E>), BLOCK), BLOCK, 0, s, m, n, bias,                     \
           static_cast<E *>(y.at), y.stride)
    FOR_ELEMENT(type, CALL);
#undef CALL
}

/* --- rope -------------------------------------------------------------------------------------------------------- */

#define ROPE_HEADS 4 /* heads a thread, which share the cosines and sines in its registers */

/* A thread has a vector (two with NEOX: both halves) of up to ROPE_HEADS heads, head = group + j·groups, so that
 * neighbouring threads have neighbouring memory. chunks: vectors (pairs of them) of a head's rotated part. */
template <typename E, bool NEOX>
TEMPLATE_KERNEL rope_vectors(uint32_t items, int32_t heads, struct divisor groups, int32_t head_size, int32_t rotated,
                             struct divisor chunks, float sign, const float *RESTRICT table,
                             const int32_t *RESTRICT positions, E *x, int32_t stride)
{
    const int V = VECTOR<E>, PAIRS = NEOX ? V : V / 2;
    uint32_t item = blockIdx.x * BLOCK + threadIdx.x;
    if (item >= items)
        return;
    uint32_t rest = divide(item, chunks), chunk = item - rest * chunks.by;
    uint32_t row = divide(rest, groups), group = rest - row * groups.by;
    float turn[2 * PAIRS];
    const float *from = table + (int64_t)positions[row] * rotated + chunk * 2 * PAIRS;
    for (int i = 0; i < 2 * PAIRS; i += 4)
        vec_unpack<float>(vec_load(from + i), turn + i);
    vec16 low[ROPE_HEADS], high[ROPE_HEADS];
    x += (int64_t)row * stride + chunk * V;
    for (int j = 0; j < ROPE_HEADS; j++) {
        int32_t head = (int32_t)(group + (uint32_t)j * groups.by);
        if (head < heads) {
            low[j] = vec_load(x + head * head_size);
            if constexpr (NEOX)
                high[j] = vec_load(x + head * head_size + rotated / 2);
        }
    }
    for (int j = 0; j < ROPE_HEADS; j++) {
        int32_t head = (int32_t)(group + (uint32_t)j * groups.by);
        if (head >= heads)
            continue;
        float a[V], b[V];
        vec_unpack<E>(low[j], a);
        if constexpr (NEOX)
            vec_unpack<E>(high[j], b);
        for (int i = 0; i < PAIRS; i++) {
            float *first = NEOX ? &a[i] : &a[2 * i], *second = NEOX ? &b[i] : &a[2 * i + 1];
            float c = turn[2 * i], s = turn[2 * i + 1] * sign, u = *first, v = *second;
            *first = u * c - v * s;
            *second = u * s + v * c;
        }
        vec_store(x + head * head_size, vec_pack<E>(a));
        if constexpr (NEOX)
            vec_store(x + head * head_size + rotated / 2, vec_pack<E>(b));
    }
}

/* Any widths: a thread a pair. */
template <typename E>
TEMPLATE_KERNEL rope_pairs(int64_t items, int32_t heads, int32_t head_size, int32_t rotated, bool neox, float sign,
                           const float *RESTRICT table, const int32_t *RESTRICT positions, E *x, int32_t stride)
{
    int64_t item = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    if (item >= items)
        return;
    int32_t half = rotated / 2, i = (int32_t)(item % half);
    int64_t rest = item / half, row = rest / heads;
    E *head = x + row * stride + rest % heads * head_size;
    E *first = head + (neox ? i : 2 * i), *second = head + (neox ? i + half : 2 * i + 1);
    const float *turn = table + (int64_t)positions[row] * rotated + 2 * i;
    float c = turn[0], s = turn[1] * sign, u = load_float(first), v = load_float(second);
    store_float(first, u * c - v * s);
    store_float(second, u * s + v * c);
}

template <typename E>
static void rope_shaped(stream_t s, int32_t m, int32_t heads, int32_t head_size, int32_t rotated, bool neox, float sign,
                        const float *table, const int32_t *positions, struct rows x)
{
    const int V = VECTOR<E>, width = neox ? 2 * V : V;
    E *at = static_cast<E *>(x.at);
    int32_t chunks = rotated / width, groups = (heads + ROPE_HEADS - 1) / ROPE_HEADS;
    int64_t items = (int64_t)m * groups * chunks, pairs = (int64_t)m * heads * (rotated / 2);
    bool aligned = rotated % width == 0 && head_size % V == 0 && x.stride % V == 0 && (uintptr_t)x.at % 16 == 0 &&
                   (uintptr_t)table % 16 == 0;
    if (aligned && items <= INT32_MAX && neox)
        LAUNCH((rope_vectors<E, true>), blocks_for(items, BLOCK), BLOCK, 0, s, (uint32_t)items, heads,
               divisor_of((uint32_t)groups), head_size, rotated, divisor_of((uint32_t)chunks), sign, table, positions,
               at, x.stride);
    else if (aligned && items <= INT32_MAX)
        LAUNCH((rope_vectors<E, false>), blocks_for(items, BLOCK), BLOCK, 0, s, (uint32_t)items, heads,
               divisor_of((uint32_t)groups), head_size, rotated, divisor_of((uint32_t)chunks), sign, table, positions,
               at, x.stride);
    else
        LAUNCH((rope_pairs<E>), blocks_for(pairs, BLOCK), BLOCK, 0, s, pairs, heads, head_size, rotated, neox, sign,
               table, positions, at, x.stride);
}

void rows_rope(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
               enum rope_order order, bool inverse, const float *table, const int32_t *positions, struct rows x)
{
    assert(rotated % 2 == 0 && rotated <= head_size && (m <= 1 || x.stride >= heads * head_size));
    if (m <= 0 || heads <= 0 || rotated <= 0)
        return;
    float sign = inverse ? -1.0f : 1.0f;
#define CALL(E) rope_shaped<E>(s, m, heads, head_size, rotated, order == ROPE_NEOX, sign, table, positions, x)
    FOR_ELEMENT(type, CALL);
#undef CALL
}

/* --- gates ------------------------------------------------------------------------------------------------------- */

#define LOG2_E 1.4426950408889634f

/* σ(u), to float32's precision or to bfloat16's. exp overflows to infinity, whose reciprocal is the right 0. */
template <typename E> DEVICE float sigmoid(float u)
{
    if constexpr (sizeof(E) == 4)
        return 1.0f / (1.0f + expf(-u));
    else
        return __fdividef(1.0f, 1.0f + fast_exp2(-LOG2_E * u));
}

/* The activation and its slope. SiLU: x·σ(x). GELU: x·σ(2u), u = √(2/π)(x + 0.044715x³), which is the tanh form because
 * (1 + tanh u)/2 = σ(2u). */
template <typename E, enum gate_kind KIND> DEVICE float activate(float x, float *ret_slope)
{
    float u = x, du = 1;
    if (KIND == GATE_GELU_TANH) {
        const float c = 1.5957691216057308f; /* 2√(2/π) */
        u = x * (c + c * 0.044715f * (x * x));
        du = c + 3 * c * 0.044715f * (x * x);
    }
    float sigma = sigmoid<E>(u), value = x * sigma;
    *ret_slope = sigma + value * (1.0f - sigma) * du;
    return value;
}

#define GATE_VECTORS 2 /* vectors a thread: loads in flight */

template <typename E, enum gate_kind KIND>
TEMPLATE_KERNEL gate_forward(uint32_t items, struct divisor vectors, const E *gate, int32_t gate_stride, const E *up,
                             int32_t up_stride, E *out, int32_t out_stride)
{
    const int V = VECTOR<E>;
    uint32_t first = blockIdx.x * (BLOCK * GATE_VECTORS) + threadIdx.x;
    vec16 g[GATE_VECTORS], u[GATE_VECTORS];
    for (int k = 0; k < GATE_VECTORS; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, vectors), at = (item - row * vectors.by) * V;
        if (item < items) {
            g[k] = vec_load(gate + (int64_t)row * gate_stride + at);
            u[k] = vec_load(up + (int64_t)row * up_stride + at);
        }
    }
    for (int k = 0; k < GATE_VECTORS; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, vectors), at = (item - row * vectors.by) * V;
        if (item >= items)
            return;
        float x[V], y[V], slope;
        vec_unpack<E>(g[k], x);
        vec_unpack<E>(u[k], y);
        for (int i = 0; i < V; i++)
            x[i] = activate<E, KIND>(x[i], &slope) * y[i];
        vec_store(out + (int64_t)row * out_stride + at, vec_pack<E>(x));
    }
}

template <typename E, enum gate_kind KIND>
TEMPLATE_KERNEL gate_backward(uint32_t items, struct divisor vectors, E *gate, int32_t gate_stride, E *up,
                              int32_t up_stride, const E *dout, int32_t dout_stride)
{
    const int V = VECTOR<E>;
    uint32_t first = blockIdx.x * (BLOCK * GATE_VECTORS) + threadIdx.x;
    vec16 g[GATE_VECTORS], u[GATE_VECTORS], d[GATE_VECTORS];
    for (int k = 0; k < GATE_VECTORS; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, vectors), at = (item - row * vectors.by) * V;
        if (item < items) {
            g[k] = vec_load(gate + (int64_t)row * gate_stride + at);
            u[k] = vec_load(up + (int64_t)row * up_stride + at);
            d[k] = vec_load(dout + (int64_t)row * dout_stride + at);
        }
    }
    for (int k = 0; k < GATE_VECTORS; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, vectors), at = (item - row * vectors.by) * V;
        if (item >= items)
            return;
        float x[V], y[V], z[V];
        vec_unpack<E>(g[k], x);
        vec_unpack<E>(u[k], y);
        vec_unpack<E>(d[k], z);
        for (int i = 0; i < V; i++) {
            float slope, value = activate<E, KIND>(x[i], &slope);
            x[i] = z[i] * y[i] * slope;
            y[i] = z[i] * value;
        }
        vec_store(gate + (int64_t)row * gate_stride + at, vec_pack<E>(x));
        vec_store(up + (int64_t)row * up_stride + at, vec_pack<E>(y));
    }
}

/* Vectors of a batch of rows, for kernels that number them through. */
static uint32_t vectors_of(int32_t m, int32_t n, int vector)
{
    int64_t items = (int64_t)m * (n / vector);
    assert(items <= INT32_MAX);
    return (uint32_t)items;
}

template <typename E, enum gate_kind KIND>
static void launch_gate(stream_t s, int32_t m, int32_t n, struct rows gate, struct rows up, struct rows other,
                        bool backward)
{
    uint32_t items = vectors_of(m, n, VECTOR<E>);
    struct divisor vectors = divisor_of((uint32_t)(n / VECTOR<E>));
    unsigned blocks = blocks_for(items, BLOCK * GATE_VECTORS);
    E *g = static_cast<E *>(gate.at), *u = static_cast<E *>(up.at), *o = static_cast<E *>(other.at);
    if (backward)
        LAUNCH((gate_backward<E, KIND>), blocks, BLOCK, 0, s, items, vectors, g, gate.stride, u, up.stride, o,
               other.stride);
    else
        LAUNCH((gate_forward<E, KIND>), blocks, BLOCK, 0, s, items, vectors, g, gate.stride, u, up.stride, o,
               other.stride);
}

static void gated(stream_t s, enum tensor_type type, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                  struct rows up, struct rows other, bool backward)
{
    if (m <= 0 || n <= 0)
        return;
    assert_rows(type, n, gate);
    assert_rows(type, n, up);
    assert_rows(type, n, other);
#define CALL(E)                                                                                                        \
    if (kind == GATE_SILU)                                                                                             \
        launch_gate<E, GATE_SILU>(s, m, n, gate, up, other, backward);                                                 \
    else                                                                                                               \
        launch_gate<E, GATE_GELU_TANH>(s, m, n, gate, up, other, backward)
    FOR_ELEMENT(type, CALL);
#undef CALL
}

void rows_gated_forward(stream_t s, enum tensor_type type, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                        struct rows up, struct rows out)
{
    gated(s, type, m, n, kind, gate, up, out, false);
}

void rows_gated_backward(stream_t s, enum tensor_type type, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                         struct rows up, struct rows dout)
{
    gated(s, type, m, n, kind, gate, up, dout, true);
}

/* --- embedding, gathering ---------------------------------------------------------------------------------------- */

template <typename E, enum tensor_type TYPE>
TEMPLATE_KERNEL embed(uint32_t items, struct divisor vectors, const uint8_t *RESTRICT table, size_t row_bytes,
                      const int32_t *RESTRICT ids, float scale, E *y, int32_t stride)
{
    const int V = VECTOR<E>;
    uint32_t item = blockIdx.x * BLOCK + threadIdx.x, row = divide(item, vectors), at = (item - row * vectors.by) * V;
    if (item >= items)
        return;
    float x[V];
    decode_part<TYPE, V>(table + (size_t)ids[row] * row_bytes, at, x);
    for (int i = 0; i < V; i++)
        x[i] *= scale;
    vec_store(y + (int64_t)row * stride + at, vec_pack<E>(x));
}

template <typename E>
static void launch_embed(stream_t s, int32_t m, int32_t n, enum tensor_type table_type, const void *table,
                         size_t row_bytes, const int32_t *ids, float scale, struct rows y)
{
    uint32_t items = vectors_of(m, n, VECTOR<E>);
    struct divisor vectors = divisor_of((uint32_t)(n / VECTOR<E>));
    const uint8_t *from = static_cast<const uint8_t *>(table);
    E *to = static_cast<E *>(y.at);
#define CALL(TYPE)                                                                                                     \
    LAUNCH((embed<E, TYPE>), blocks_for(items, BLOCK), BLOCK, 0, s, items, vectors, from, row_bytes, ids, scale, to,   \
           y.stride)
    FOR_TENSOR_TYPE(table_type, CALL)
#undef CALL
}

void rows_embed(stream_t s, enum tensor_type type, int32_t m, int32_t n, enum tensor_type table_type, const void *table,
                size_t row_bytes, const int32_t *ids, float scale, struct rows y)
{
    if (m <= 0 || n <= 0)
        return;
    assert_rows(type, n, y);
    assert_tensor_rows(table_type, n, table, row_bytes);
#define CALL(E) launch_embed<E>(s, m, n, table_type, table, row_bytes, ids, scale, y)
    FOR_ELEMENT(type, CALL);
#undef CALL
}

/* Elements do not matter here, only 16-byte units; strides are in units. */
KERNEL gather_units(uint32_t items, struct divisor units, const int32_t *RESTRICT index, const vec16 *RESTRICT from,
                    int64_t from_stride, vec16 *RESTRICT to, int64_t to_stride)
{
    uint32_t first = blockIdx.x * (BLOCK * 2) + threadIdx.x;
    vec16 v[2];
    for (int k = 0; k < 2; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, units), at = item - row * units.by;
        int32_t source = item < items ? index[row] : -1;
        v[k] = source >= 0 ? from[source * from_stride + at] : vec_zero();
    }
    for (int k = 0; k < 2; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, units), at = item - row * units.by;
        if (item < items)
            to[row * to_stride + at] = v[k];
    }
}

void rows_gather(stream_t s, enum tensor_type type, int32_t m, int32_t n, const int32_t *index, struct rows from,
                 struct rows to)
{
    int per = type == TENSOR_BF16 ? VECTOR<bf16> : VECTOR<float>;
    if (m <= 0 || n <= 0)
        return;
    assert_rows(type, n, to);
    assert_rows(type, n, from);
    uint32_t items = vectors_of(m, n, per);
    LAUNCH(gather_units, blocks_for(items, BLOCK * 2), BLOCK, 0, s, items, divisor_of((uint32_t)(n / per)), index,
           static_cast<const vec16 *>(from.at), (int64_t)from.stride / per, static_cast<vec16 *>(to.at),
           (int64_t)to.stride / per);
}
