/*
 * Answering: products, LoRA and attention for few rows at a time. All of it is bound by reading something once: the
 * weights (out·in values), the factors, the keys and values (4·length·kv_heads·head_size bytes in bfloat16).
 *
 * - Products in bfloat16 put 16 rows of W against up to 8 rows of x on the tensor cores. The order of k within a
 * product is free as long as both sides agree, so every lane takes the values that lie together in memory and hands
 * them to the fragments as they come; nothing passes through shared memory. A decoded value is rounded to bfloat16, as
 * in the matrices that dequantise.cu makes for training.
 * - Attention cuts the keys that a row sees into at most PARTS_MAX parts, whose number and size depend on the row's
 *   position only. Parts are added up one after the other, by one block or, for few rows, by a kernel of its own: the
 *   same operations in the same order, so a row's bits do not depend on how many rows there are.
 */
#include "kernels/cuda/blocks.h"
#include "kernels/cuda/internal.h"

static int32_t ceil_divide(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

/* --- y = x·Wᵀ ---------------------------------------------------------------------------------------------------- */

#define LINEAR_THREADS 256
#define LINEAR_WARPS (LINEAR_THREADS / WARP)
#define LINEAR_ROWS 16 /* of W in a block */
#define SPAN 128       /* values of each row that a warp takes at a time: 32 for each of the 4 lanes of a row */

struct linear_call {
    int32_t m, out, in;
    const uint8_t *w;
    size_t row_bytes;
    struct rows x, y;
    float *y_float;
};

template <typename T> DEVICE void store_product(const linear_call &call, int32_t t, int32_t o, float value)
{
    if (call.y_float)
        call.y_float[(size_t)t * call.out + o] = value;
    else
        store_float(static_cast<T *>(call.y.at) + (ptrdiff_t)t * call.y.stride + o, value);
}

/* The 32 values of one row that one lane takes, two in a word. PIECES: a row in bfloat16, aligned to 16 bytes, of which
 * the lane has 4 pieces of 8 values, side by side with the other lanes'; else it has 32 values that follow each other.
 */
template <bool PIECES> DEVICE int32_t span_at(int32_t span, int lane, int piece)
{
    return span * SPAN + (PIECES ? piece * 32 + lane % 4 * 8 : lane % 4 * 32 + piece * 8);
}

template <bool PIECES> DEVICE void load_span(const bf16 *row, bool there, int32_t in, int32_t span, uint32_t out[16])
{
    for (int p = 0; p < 4; p++) {
        int32_t at = span_at<PIECES>(span, (int)threadIdx.x, p);
        vec16 v = {};
        if (there && at < in)
            v = *reinterpret_cast<const vec16 *>(row + at);
        for (int i = 0; i < 4; i++)
            out[p * 4 + i] = v.w[i];
    }
}

template <enum tensor_type W, bool PIECES>
DEVICE void load_weights(const uint8_t *row, int32_t in, int32_t span, uint32_t out[16])
{
    if constexpr (PIECES) {
        load_span<true>(reinterpret_cast<const bf16 *>(row), true, in, span, out);
    } else {
        float values[32];
        decode_run32_tail<W>(row, (size_t)span * 4 + threadIdx.x % 4, (size_t)in, values);
        for (int i = 0; i < 16; i++)
            out[i] = bf16_pack(values[2 * i], values[2 * i + 1]);
    }
}

/* The warps of a block divide the spans of its 16 rows; their sums are added in order. */
template <enum tensor_type W, bool PIECES>
TEMPLATE_KERNEL LAUNCH_BOUNDS(LINEAR_THREADS, 2) linear_tiles(const linear_call call)
{
    DYNAMIC_SHARED(float, sums); /* (warps, 8, 16) */
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int32_t first = (int32_t)blockIdx.x * LINEAR_ROWS, low = first + lane / 4, high = low + 8, last = call.out - 1;
    const uint8_t *low_row = call.w + (size_t)(low < last ? low : last) * call.row_bytes;
    const uint8_t *high_row = call.w + (size_t)(high < last ? high : last) * call.row_bytes;
    bool there = lane / 4 < call.m;
    const bf16 *x = static_cast<const bf16 *>(call.x.at) + (ptrdiff_t)(there ? lane / 4 : 0) * call.x.stride;
    int32_t spans = (call.in + SPAN - 1) / SPAN;
    float sum[2][4] = {};
    uint32_t next[2][16] = {};
    if (PIECES && warp < spans) {
        load_weights<W, PIECES>(low_row, call.in, warp, next[0]);
        load_weights<W, PIECES>(high_row, call.in, warp, next[1]);
    }
    for (int32_t span = warp; span < spans; span += LINEAR_WARPS) {
        uint32_t w[2][16], b[16];
        if (PIECES) {
            for (int i = 0; i < 16; i++) {
                w[0][i] = next[0][i];
                w[1][i] = next[1][i];
            }
        } else {
            load_weights<W, PIECES>(low_row, call.in, span, w[0]);
            load_weights<W, PIECES>(high_row, call.in, span, w[1]);
        }
        load_span<PIECES>(x, there, call.in, span, b);
        if (PIECES && span + LINEAR_WARPS < spans) {
            load_weights<W, PIECES>(low_row, call.in, span + LINEAR_WARPS, next[0]);
            load_weights<W, PIECES>(high_row, call.in, span + LINEAR_WARPS, next[1]);
        }
        for (int i = 0; i < 8; i++) {
            uint32_t a[4] = {w[0][2 * i], w[1][2 * i], w[0][2 * i + 1], w[1][2 * i + 1]};
            mma_16816(sum[i % 2], a, b + 2 * i);
        }
    }
    for (int i = 0; i < 4; i++)
        sums[(warp * 8 + lane % 4 * 2 + i % 2) * LINEAR_ROWS + lane / 4 + i / 2 * 8] = sum[0][i] + sum[1][i];
    block_sync();
    int32_t t = (int32_t)threadIdx.x / LINEAR_ROWS, o = first + (int32_t)threadIdx.x % LINEAR_ROWS;
    if (t >= call.m || o >= call.out)
        return;
    float total = 0;
    for (int i = 0; i < LINEAR_WARPS; i++)
        total += sums[i * 8 * LINEAR_ROWS + (int)threadIdx.x];
    store_product<bf16>(call, t, o, total);
}

/* float32: a warp makes one row of W by all rows of x, a lane a run of 32 at a time. */
template <enum tensor_type W> TEMPLATE_KERNEL LAUNCH_BOUNDS(LINEAR_THREADS, 2) linear_rows(const linear_call call)
{
    int lane = (int)threadIdx.x % WARP;
    int32_t o = (int32_t)blockIdx.x * LINEAR_WARPS + (int32_t)threadIdx.x / WARP;
    if (o >= call.out)
        return;
    const uint8_t *row = call.w + (size_t)o * call.row_bytes;
    const float *x = static_cast<const float *>(call.x.at);
    float sum[KERNEL_DECODE_ROWS] = {};
    for (int32_t run = lane; run * 32 < call.in; run += WARP) {
        float values[32];
        decode_run32_tail<W>(row, (size_t)run, (size_t)call.in, values);
        for (int t = 0; t < KERNEL_DECODE_ROWS; t++) {
            if (t >= call.m)
                break;
            const float *from = x + (ptrdiff_t)t * call.x.stride + run * 32;
            for (int i = 0; i < 32; i++) {
                if (run * 32 + i / 8 * 8 < call.in)
                    sum[t] = fmaf(values[i], from[i], sum[t]);
            }
        }
    }
    for (int t = 0; t < KERNEL_DECODE_ROWS; t++) {
        if (t >= call.m)
            break;
        float total = warp_sum(sum[t]);
        if (lane == 0)
            store_product<float>(call, t, o, total);
    }
}

template <enum tensor_type W> static void launch_linear(stream_t s, enum tensor_type type, const linear_call &call)
{
    if (type == TENSOR_F32) {
        auto kernel = linear_rows<W>;
        LAUNCH(kernel, (unsigned)ceil_divide(call.out, LINEAR_WARPS), LINEAR_THREADS, 0, s, call);
        return;
    }
    auto kernel = linear_tiles<W, false>;
    if constexpr (W == TENSOR_BF16) {
        if ((uintptr_t)call.w % 16 == 0 && call.row_bytes % 16 == 0)
            kernel = linear_tiles<W, true>;
    }
    LAUNCH(kernel, (unsigned)ceil_divide(call.out, LINEAR_ROWS), LINEAR_THREADS,
           LINEAR_WARPS * 8 * LINEAR_ROWS * sizeof(float), s, call);
}

void decode_linear(stream_t s, enum tensor_type type, int32_t m, int32_t out, int32_t in, enum tensor_type w_type,
                   const void *w, size_t row_bytes, struct rows x, struct rows y, float *y_float)
{
    assert(m >= 0 && m <= KERNEL_DECODE_ROWS && in % 8 == 0 && x.stride % 8 == 0 && (uintptr_t)x.at % 16 == 0);
    assert((type == TENSOR_F32 || type == TENSOR_BF16) && in % (int32_t)tensor_type_block(w_type) == 0);
    if (m == 0 || out == 0)
        return;
    struct linear_call call = {m, out, in, static_cast<const uint8_t *>(w), row_bytes, x, y, y_float};
#define CALL(w_constant) launch_linear<w_constant>(s, type, call)
    FOR_TENSOR_TYPE(w_type, CALL)
#undef CALL
}

/* --- LoRA -------------------------------------------------------------------------------------------------------- */

#define DOWN_THREADS 256
#define UP_THREADS 64

/* 4 values that are aligned to their common size, or not if ALIGNED is false. */
template <bool ALIGNED> DEVICE void load_4(const float *p, float out[4])
{
    if (ALIGNED) {
        vec16 v = *reinterpret_cast<const vec16 *>(p);
        for (int i = 0; i < 4; i++)
            out[i] = float_of_bits(v.w[i]);
    } else {
        for (int i = 0; i < 4; i++)
            out[i] = p[i];
    }
}

DEVICE void load_4_aligned(const float *p, float out[4])
{
    load_4<true>(p, out);
}

DEVICE void load_4_aligned(const bf16 *p, float out[4])
{
    uint2 v = *reinterpret_cast<const uint2 *>(p);
    out[0] = float_of_bits(v.x << 16);
    out[1] = float_of_bits(v.x & 0xffff0000u);
    out[2] = float_of_bits(v.y << 16);
    out[3] = float_of_bits(v.y & 0xffff0000u);
}

/* A block makes one column of h. */
template <typename T, bool ALIGNED>
TEMPLATE_KERNEL LAUNCH_BOUNDS(DOWN_THREADS, 2)
    lora_down(int32_t m, int32_t in, const float *RESTRICT a, struct rows x, float *RESTRICT h, int32_t h_stride)
{
    DYNAMIC_SHARED(float, sums); /* (warps, 8) */
    const int warps = DOWN_THREADS / WARP;
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    const float *row = a + (size_t)blockIdx.x * in;
    float sum[KERNEL_DECODE_ROWS] = {};
#pragma unroll 2
    for (int32_t i = (int32_t)threadIdx.x * 4; i < in; i += DOWN_THREADS * 4) {
        float w[4];
        load_4<ALIGNED>(row + i, w);
        for (int t = 0; t < KERNEL_DECODE_ROWS; t++) {
            if (t < m) {
                float v[4];
                load_4_aligned(static_cast<const T *>(x.at) + (ptrdiff_t)t * x.stride + i, v);
                for (int k = 0; k < 4; k++)
                    sum[t] = fmaf(w[k], v[k], sum[t]);
            }
        }
    }
    for (int t = 0; t < KERNEL_DECODE_ROWS; t++) {
        float total = warp_sum(sum[t]);
        if (lane == 0)
            sums[warp * KERNEL_DECODE_ROWS + t] = total;
    }
    block_sync();
    if ((int32_t)threadIdx.x < m) {
        float total = 0;
        for (int i = 0; i < warps; i++)
            total += sums[i * KERNEL_DECODE_ROWS + (int)threadIdx.x];
        h[(size_t)threadIdx.x * h_stride + blockIdx.x] = total;
    }
}

/* A thread makes one column of y. */
template <typename T>
TEMPLATE_KERNEL LAUNCH_BOUNDS(UP_THREADS, 8)
    lora_up(int32_t m, int32_t out, int32_t rank, float scale, const float *RESTRICT b, const float *RESTRICT h,
            int32_t h_stride, struct rows y)
{
    int32_t o = (int32_t)(blockIdx.x * UP_THREADS + threadIdx.x);
    if (o >= out)
        return;
    const float *row = b + (size_t)o * rank;
    float sum[KERNEL_DECODE_ROWS] = {};
#pragma unroll 8
    for (int32_t j = 0; j < rank; j++) {
        for (int t = 0; t < KERNEL_DECODE_ROWS; t++) {
            if (t < m)
                sum[t] = fmaf(h[(size_t)t * h_stride + j], row[j], sum[t]);
        }
    }
    for (int t = 0; t < KERNEL_DECODE_ROWS; t++) {
        if (t < m) {
            T *to = static_cast<T *>(y.at) + (ptrdiff_t)t * y.stride + o;
            store_float(to, fmaf(scale, sum[t], load_float(to)));
        }
    }
}

void decode_lora_down(stream_t s, enum tensor_type type, int32_t m, int32_t rank, int32_t in, const float *a,
                      struct rows x, float *h, int32_t h_stride)
{
    assert(m >= 0 && m <= KERNEL_DECODE_ROWS && in % 8 == 0 && x.stride % 8 == 0 && h_stride >= rank);
    if (m == 0 || rank == 0)
        return;
    bool aligned = (uintptr_t)a % 16 == 0;
    auto kernel = type == TENSOR_F32 ? (aligned ? lora_down<float, true> : lora_down<float, false>)
                                     : (aligned ? lora_down<bf16, true> : lora_down<bf16, false>);
    LAUNCH(kernel, (unsigned)rank, DOWN_THREADS, DOWN_THREADS / WARP * KERNEL_DECODE_ROWS * sizeof(float), s, m, in, a,
           x, h, h_stride);
}

void decode_lora_up(stream_t s, enum tensor_type type, int32_t m, int32_t out, int32_t rank, float scale,
                    const float *b, const float *h, int32_t h_stride, struct rows y)
{
    assert(m >= 0 && m <= KERNEL_DECODE_ROWS && h_stride >= rank);
    if (m == 0 || out == 0)
        return;
    auto kernel = type == TENSOR_F32 ? lora_up<float> : lora_up<bf16>;
    LAUNCH(kernel, (unsigned)ceil_divide(out, UP_THREADS), UP_THREADS, 0, s, m, out, rank, scale, b, h, h_stride, y);
}

/* --- keys and values in blocks ----------------------------------------------------------------------------------- */

/* One layer's part of a block, in bytes. */
struct kv_strides {
    size_t layer;  /* where it begins */
    size_t row;    /* between tokens */
    size_t values; /* from a key to its value */
    size_t scales; /* where the keys' scales begin */
    int32_t kv_heads, head_size;
};

static size_t element_bytes(const struct kv_layout *layout)
{
    return layout->quantised ? 1 : layout->type == TENSOR_F32 ? 4 : 2;
}

size_t kv_layer_bytes(const struct kv_layout *layout)
{
    size_t heads = (size_t)layout->kv_heads;
    size_t token = heads * (size_t)layout->head_size * element_bytes(layout) + (layout->quantised ? heads * 4 : 0);
    return (2 * KV_BLOCK * token + 255) / 256 * 256;
}

size_t kv_block_bytes(const struct kv_layout *layout)
{
    return kv_layer_bytes(layout) * (size_t)layout->layers;
}

static struct kv_strides strides_of(const struct kv_layout *layout, int32_t layer)
{
    assert(layer >= 0 && layer < layout->layers && (layout->type == TENSOR_F32 || layout->type == TENSOR_BF16));
    assert(layout->head_size % 16 == 0 && layout->head_size > 0 && layout->head_size <= 256);
    struct kv_strides k = {};
    k.layer = kv_layer_bytes(layout) * (size_t)layer;
    k.row = (size_t)layout->kv_heads * (size_t)layout->head_size * element_bytes(layout);
    k.values = KV_BLOCK * k.row;
    k.scales = 2 * k.values;
    k.kv_heads = layout->kv_heads;
    k.head_size = layout->head_size;
    return k;
}

/* 8 values of a type as they lie in memory. */
template <typename T> struct raw_8;
template <> struct raw_8<float> {
    vec16 v[2];
};
template <> struct raw_8<bf16> {
    vec16 v;
};
template <> struct raw_8<int8_t> {
    uint2 v;
};

DEVICE void unpack(const raw_8<float> &raw, float out[8])
{
    for (int i = 0; i < 8; i++)
        out[i] = float_of_bits(raw.v[i / 4].w[i % 4]);
}

DEVICE void unpack(const raw_8<bf16> &raw, float out[8])
{
    for (int i = 0; i < 4; i++) {
        out[2 * i] = float_of_bits(raw.v.w[i] << 16);
        out[2 * i + 1] = float_of_bits(raw.v.w[i] & 0xffff0000u);
    }
}

DEVICE void unpack(const raw_8<int8_t> &raw, float out[8])
{
    decode_word<255, 128, false>(raw.v.x ^ 0x80808080u, 1.0f, 0.0f, out);
    decode_word<255, 128, false>(raw.v.y ^ 0x80808080u, 1.0f, 0.0f, out + 4);
}

DEVICE void store_8(float *to, const float x[8])
{
    for (int i = 0; i < 8; i++)
        to[i] = x[i];
}

DEVICE void store_8(bf16 *to, const float x[8])
{
    vec16 v;
    for (int i = 0; i < 4; i++)
        v.w[i] = bf16_pack(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<vec16 *>(to) = v;
}

#define STORE_WARPS 4

/* A warp stores one head of one row's key or value, 8 values a lane. grid: (m, 2·kv_heads / STORE_WARPS). */
template <typename T, bool QUANTISED>
TEMPLATE_KERNEL LAUNCH_BOUNDS(STORE_WARPS *WARP, 8)
    kv_store(const kv_strides at, const kv_row *RESTRICT rows, struct rows k, struct rows v)
{
    int lane = (int)threadIdx.x % WARP, head = (int)(blockIdx.y * STORE_WARPS + threadIdx.x / WARP);
    bool is_value = head >= at.kv_heads;
    head -= is_value ? at.kv_heads : 0;
    int32_t position = rows[blockIdx.x].position;
    if (position < 0 || head >= at.kv_heads)
        return;
    struct rows from = is_value ? v : k;
    unsigned char *part = static_cast<unsigned char *>(rows[blockIdx.x].blocks[position / KV_BLOCK]) + at.layer;
    size_t token = (size_t)(position % KV_BLOCK);
    bool there = lane * 8 < at.head_size;
    float x[8] = {};
    if (there) {
        const T *source = static_cast<const T *>(from.at) + (ptrdiff_t)blockIdx.x * from.stride;
        unpack(*reinterpret_cast<const raw_8<T> *>(source + head * at.head_size + lane * 8), x);
    }
    size_t index = (size_t)(head * at.head_size + lane * 8);
    unsigned char *to = part + (is_value ? at.values : 0) + token * at.row;
    if constexpr (QUANTISED) {
        float top = 0;
        for (int i = 0; i < 8; i++)
            top = fmaxf(top, fabsf(x[i]));
        float scale = warp_max(top) / 127.0f;
        uint32_t packed[2] = {};
        for (int i = 0; i < 8; i++) {
            int value = scale > 0 ? __float2int_rn(x[i] / scale) : 0;
            value = max(-127, min(127, value));
            packed[i / 4] |= ((uint32_t)value & 255) << i % 4 * 8;
        }
        if (there)
            *reinterpret_cast<uint2 *>(to + index) = make_uint2(packed[0], packed[1]);
        float *scales = reinterpret_cast<float *>(part + at.scales) + (is_value ? KV_BLOCK * at.kv_heads : 0);
        if (lane == 0)
            scales[token * (size_t)at.kv_heads + (size_t)head] = scale;
    } else if (there) {
        store_8(reinterpret_cast<T *>(to) + index, x);
    }
}

void decode_store(stream_t s, const struct kv_layout *layout, int32_t layer, int32_t m, const struct kv_row *rows,
                  struct rows k, struct rows v)
{
    struct kv_strides at = strides_of(layout, layer);
    assert(k.stride % 8 == 0 && v.stride % 8 == 0 && (uintptr_t)k.at % 16 == 0 && (uintptr_t)v.at % 16 == 0);
    if (m <= 0)
        return;
    dim3 grid((unsigned)m, (unsigned)ceil_divide(2 * layout->kv_heads, STORE_WARPS));
    auto kernel = layout->type == TENSOR_F32 ? (layout->quantised ? kv_store<float, true> : kv_store<float, false>)
                                             : (layout->quantised ? kv_store<bf16, true> : kv_store<bf16, false>);
    LAUNCH(kernel, grid, STORE_WARPS * WARP, 0, s, at, rows, k, v);
}

/* --- attention --------------------------------------------------------------------------------------------------- */

#define ATTEND_THREADS 128
#define PARTS_MAX 32
#define PART_MIN 128         /* keys */
#define SPLIT_BLOCKS_MAX 128 /* m·kv_heads up to which parts get blocks of their own */
#define NO_SCORE -1e30f      /* below every score; its exponentials are zero */

struct attend_call {
    struct kv_strides at;
    const struct kv_row *rows;
    struct rows q, o;
    int32_t heads, window;
    float scale;      /* for exponentials of base 2 */
    float *partial_o; /* (m, parts, heads, head_size), or NULL: a block does all parts of a row and writes o */
    float *partial_s; /* (m, parts, heads, 2): top, sum */
    int32_t parts;    /* in the arrays */
};

/* The keys that a row sees. */
struct key_range {
    int32_t first, end, part, parts; /* keys; of a part; number of parts */
};

DEVICE key_range keys_of(int32_t position, int32_t window)
{
    key_range r;
    r.first = window > 0 && position >= window ? position - window + 1 : 0;
    r.end = position + 1;
    int32_t n = r.end - r.first, part = (n + PARTS_MAX - 1) / PARTS_MAX;
    part = (part + 31) / 32 * 32;
    r.part = part < PART_MIN ? PART_MIN : part;
    r.parts = (n + r.part - 1) / r.part;
    return r;
}

/* Softmax over keys so far: the largest score, the sum of exponentials and of values relative to it. */
struct softmax_state {
    float top, sum, o;
};

DEVICE void softmax_add(softmax_state *s, float top, float sum, float o)
{
    float high = fmaxf(s->top, top), keep = fast_exp2(s->top - high), take = fast_exp2(top - high);
    s->sum = fmaf(s->sum, keep, sum * take);
    s->o = fmaf(s->o, keep, o * take);
    s->top = high;
}

/* `lanes` (a power of two) lanes take one key together, 8 values each, for HEADS query heads of its group. grid:
 * (parts or 1, kv_heads · tiles of HEADS, m). */
template <typename T, typename K, int HEADS>
TEMPLATE_KERNEL LAUNCH_BOUNDS(ATTEND_THREADS, 3) attend_parts(const attend_call call, int lanes)
{
    const int unroll = sizeof(K) == 4 ? 2 : 4;
    DYNAMIC_SHARED(float, shared);
    int32_t d = call.at.head_size, group = call.heads / call.at.kv_heads, tiles = (group + HEADS - 1) / HEADS;
    int32_t kv_head = (int32_t)blockIdx.y / tiles, in_group = (int32_t)blockIdx.y % tiles * HEADS;
    int32_t head = kv_head * group + in_group, heads = min(HEADS, group - in_group); /* the first; how many */
    kv_row row = call.rows[blockIdx.z];
    T *out = static_cast<T *>(call.o.at) + (ptrdiff_t)blockIdx.z * call.o.stride + head * d;
    if (row.position < 0)
        return;
    key_range keys = keys_of(row.position, call.window);
    int32_t part = call.partial_o ? (int32_t)blockIdx.x : 0, part_end = call.partial_o ? part + 1 : keys.parts;
    if (part >= keys.parts)
        return;

    /* What the streams bring together, and, if a block does all parts, the state of each output value. */
    int lane = (int)threadIdx.x % lanes, stream = (int)threadIdx.x / lanes, streams = ATTEND_THREADS / lanes;
    float *stream_o = shared, *stream_top = stream_o + streams * HEADS * d, *stream_sum = stream_top + streams * HEADS;
    float *weight = stream_sum + streams * HEADS;
    softmax_state *state = reinterpret_cast<softmax_state *>(weight + streams * HEADS);
    for (int i = (int)threadIdx.x; !call.partial_o && i < heads * d; i += ATTEND_THREADS)
        state[i] = softmax_state{NO_SCORE, 0, 0};

    bool there = lane * 8 < d;
    float q[HEADS][8] = {};
    for (int h = 0; h < HEADS; h++) {
        if (there && h < heads) {
            const T *from = static_cast<const T *>(call.q.at) + (ptrdiff_t)blockIdx.z * call.q.stride;
            unpack(*reinterpret_cast<const raw_8<T> *>(from + (head + h) * d + lane * 8), q[h]);
        }
        for (int i = 0; i < 8; i++)
            q[h][i] *= call.scale;
    }

    for (; part < part_end; part++) {
        int32_t begin = keys.first + part * keys.part, end = min(begin + keys.part, keys.end);
        float top[HEADS], sum[HEADS], o[HEADS][8] = {};
        for (int h = 0; h < HEADS; h++) {
            top[h] = NO_SCORE;
            sum[h] = 0;
        }
        for (int32_t base = begin + stream; base - stream < end; base += streams * unroll) {
            raw_8<K> raw_k[unroll] = {}, raw_v[unroll] = {};
            float scale_k[unroll], scale_v[unroll];
            for (int u = 0; u < unroll; u++) {
                int32_t t = base + u * streams;
                scale_k[u] = scale_v[u] = 0;
                if (t < end && there) {
                    const unsigned char *block = static_cast<const unsigned char *>(row.blocks[t / KV_BLOCK]);
                    const unsigned char *from = block + call.at.layer;
                    size_t token = (size_t)(t % KV_BLOCK);
                    size_t at = token * call.at.row + (size_t)(kv_head * d + lane * 8) * sizeof(K);
                    raw_k[u] = *reinterpret_cast<const raw_8<K> *>(from + at);
                    raw_v[u] = *reinterpret_cast<const raw_8<K> *>(from + call.at.values + at);
                    if (sizeof(K) == 1) {
                        const float *scales = reinterpret_cast<const float *>(from + call.at.scales) +
                                              token * (size_t)call.at.kv_heads + (size_t)kv_head;
                        scale_k[u] = scales[0];
                        scale_v[u] = scales[KV_BLOCK * call.at.kv_heads];
                    }
                }
            }
            float score[unroll][HEADS];
            for (int u = 0; u < unroll; u++) {
                float k[8];
                unpack(raw_k[u], k);
                for (int h = 0; h < HEADS; h++) {
                    float dot = 0;
                    for (int i = 0; i < 8; i++)
                        dot = fmaf(q[h][i], k[i], dot);
                    score[u][h] = sizeof(K) == 1 ? dot * scale_k[u] : dot;
                }
            }
            for (int mask = lanes / 2; mask > 0; mask /= 2) {
                for (int u = 0; u < unroll; u++) {
                    for (int h = 0; h < HEADS; h++)
                        score[u][h] += shuffle_xor(score[u][h], mask);
                }
            }
            for (int h = 0; h < HEADS; h++) {
                float high = top[h];
                for (int u = 0; u < unroll; u++)
                    high = base + u * streams < end ? fmaxf(high, score[u][h]) : high;
                float keep = fast_exp2(top[h] - high);
                top[h] = high;
                sum[h] *= keep;
                for (int i = 0; i < 8; i++)
                    o[h][i] *= keep;
            }
            for (int u = 0; u < unroll; u++) {
                float v[8];
                unpack(raw_v[u], v);
                for (int h = 0; h < HEADS; h++) {
                    float p = base + u * streams < end ? fast_exp2(score[u][h] - top[h]) : 0.0f;
                    sum[h] += p;
                    p = sizeof(K) == 1 ? p * scale_v[u] : p;
                    for (int i = 0; i < 8; i++)
                        o[h][i] = fmaf(p, v[i], o[h][i]);
                }
            }
        }

        block_sync(); /* the part before is taken */
        for (int h = 0; h < HEADS; h++) {
            for (int i = 0; i < 8 && there; i++)
                stream_o[(stream * HEADS + h) * d + lane * 8 + i] = o[h][i];
            if (lane == 0) {
                stream_top[stream * HEADS + h] = top[h];
                stream_sum[stream * HEADS + h] = sum[h];
            }
        }
        block_sync();
        for (int i = (int)threadIdx.x; i < streams * HEADS; i += ATTEND_THREADS) {
            float high = NO_SCORE;
            for (int s = 0; s < streams; s++)
                high = fmaxf(high, stream_top[s * HEADS + i % HEADS]);
            weight[i] = fast_exp2(stream_top[i] - high);
        }
        block_sync();
        for (int i = (int)threadIdx.x; i < heads * d; i += ATTEND_THREADS) {
            int h = i / d, c = i % d;
            float high = NO_SCORE, part_sum = 0, part_o = 0;
            for (int s = 0; s < streams; s++) {
                high = fmaxf(high, stream_top[s * HEADS + h]);
                part_sum = fmaf(stream_sum[s * HEADS + h], weight[s * HEADS + h], part_sum);
                part_o = fmaf(stream_o[(s * HEADS + h) * d + c], weight[s * HEADS + h], part_o);
            }
            if (call.partial_o) {
                size_t at = ((size_t)blockIdx.z * call.parts + part) * call.heads + head + h;
                call.partial_o[at * d + c] = part_o;
                if (c == 0) {
                    call.partial_s[at * 2] = high;
                    call.partial_s[at * 2 + 1] = part_sum;
                }
            } else {
                softmax_add(&state[i], high, part_sum, part_o);
            }
        }
    }
    for (int i = (int)threadIdx.x; !call.partial_o && i < heads * d; i += ATTEND_THREADS)
        store_float(out + i, state[i].o / state[i].sum);
}

/* Adds up the parts of one row, an output value a thread. grid: (tiles of heads·head_size, m). */
template <typename T> TEMPLATE_KERNEL LAUNCH_BOUNDS(ATTEND_THREADS, 8) attend_join(const attend_call call)
{
    int32_t d = call.at.head_size, i = (int32_t)(blockIdx.x * ATTEND_THREADS + threadIdx.x);
    int32_t position = call.rows[blockIdx.y].position;
    if (i >= call.heads * d)
        return;
    T *out = static_cast<T *>(call.o.at) + (ptrdiff_t)blockIdx.y * call.o.stride + i;
    if (position < 0)
        return;
    key_range keys = keys_of(position, call.window);
    softmax_state state = {NO_SCORE, 0, 0};
#pragma unroll 4
    for (int32_t part = 0; part < keys.parts; part++) {
        size_t at = ((size_t)blockIdx.y * call.parts + part) * call.heads + i / d;
        softmax_add(&state, call.partial_s[at * 2], call.partial_s[at * 2 + 1], call.partial_o[at * d + i % d]);
    }
    store_float(out, state.o / state.sum);
}

static bool splits(const struct attention_shape *shape, int32_t m)
{
    return (int64_t)m * shape->kv_heads <= SPLIT_BLOCKS_MAX || m == 1;
}

size_t decode_attention_work(const struct attention_shape *shape, int32_t m_max)
{
    int32_t m = m_max;
    if (!splits(shape, m))
        m = SPLIT_BLOCKS_MAX / shape->kv_heads > 1 ? SPLIT_BLOCKS_MAX / shape->kv_heads : 1;
    return (size_t)(m > 0 ? m : 0) * PARTS_MAX * (size_t)shape->heads * (size_t)(shape->head_size + 2) * sizeof(float);
}

template <typename T, typename K, int HEADS>
static void launch_attention(stream_t s, const struct attend_call &call, int32_t m, int32_t group)
{
    int lanes = 2, d = call.at.head_size;
    while (lanes * 8 < d)
        lanes *= 2;
    size_t streams = ATTEND_THREADS / (size_t)lanes;
    size_t floats = streams * HEADS * (size_t)(d + 3) + (call.partial_o ? 0 : (size_t)HEADS * (size_t)d * 3);
    dim3 grid((unsigned)call.parts, (unsigned)(call.at.kv_heads * ceil_divide(group, HEADS)), (unsigned)m);
    auto kernel = attend_parts<T, K, HEADS>;
    LAUNCH(kernel, grid, ATTEND_THREADS, floats * sizeof(float), s, call, lanes);
}

template <typename T, typename K> static void attend(stream_t s, const struct attend_call &call, int32_t m)
{
    int32_t group = call.heads / call.at.kv_heads;
    if (group == 1)
        launch_attention<T, K, 1>(s, call, m, group);
    else if (group == 2)
        launch_attention<T, K, 2>(s, call, m, group);
    else
        launch_attention<T, K, 4>(s, call, m, group);
    if (call.partial_o) {
        auto kernel = attend_join<T>;
        dim3 grid((unsigned)ceil_divide(call.heads * call.at.head_size, ATTEND_THREADS), (unsigned)m);
        LAUNCH(kernel, grid, ATTEND_THREADS, 0, s, call);
    }
}

void decode_attention(stream_t s, const struct kv_layout *layout, const struct attention_shape *shape, int32_t layer,
                      int32_t m, int32_t length_max, const struct kv_row *rows, struct rows q, struct rows o,
                      void *work)
{
    assert(shape->kv_heads == layout->kv_heads && shape->head_size == layout->head_size);
    assert(shape->heads % shape->kv_heads == 0 && q.stride % 8 == 0 && (uintptr_t)q.at % 16 == 0);
    if (m <= 0)
        return;
    struct attend_call call = {};
    call.at = strides_of(layout, layer);
    call.rows = rows;
    call.q = q;
    call.o = o;
    call.heads = shape->heads;
    call.window = shape->window;
    call.scale = shape->scale * 1.44269504088896341f; /* log2 e */
    call.parts = 1;
    if (splits(shape, m)) {
        int32_t seen = shape->window > 0 && shape->window < length_max ? shape->window : length_max;
        int32_t parts = ceil_divide(seen, PART_MIN);
        call.parts = parts < 1 ? 1 : parts > PARTS_MAX ? PARTS_MAX : parts;
        call.partial_o = static_cast<float *>(work);
        call.partial_s = call.partial_o + (size_t)m * call.parts * shape->heads * shape->head_size;
    }
    if (layout->type == TENSOR_F32 && layout->quantised)
        attend<float, int8_t>(s, call, m);
    else if (layout->type == TENSOR_F32)
        attend<float, float>(s, call, m);
    else if (layout->quantised)
        attend<bf16, int8_t>(s, call, m);
    else
        attend<bf16, bf16>(s, call, m);
}
