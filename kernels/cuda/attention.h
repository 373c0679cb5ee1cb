/*
 * Internal to the attention kernels: tiles of bfloat16 in shared memory and what a warp of mma_16816 reads from them.
 *
 * A tile has D = 64, 128 or 256 columns; a head of another size is filled up with zeros, which change no product. Rows
 * are cut into units of 16 bytes, and unit u of row r stands at u ^ (r % 8): the eight rows that ldmatrix reads at once
 * lie in different banks, and so do the eight that a warp writes.
 *
 * What groups of warps multiply lies otherwise: attention_wgmma.h.
 *
 * All blocks have 4 warps. A warp has 16·M rows of its own; what the other side of its products has streams by in
 * tiles of two stages, one being filled while the other is used.
 */
#ifndef KERNELS_CUDA_ATTENTION_H
#define KERNELS_CUDA_ATTENTION_H

#include "kernels/cuda/device.h"
#include "kernels/cuda/internal.h"

#include <assert.h>

#define ATTENTION_WARPS 4
#define ATTENTION_THREADS (ATTENTION_WARPS * WARP)
#define ATTENTION_LOG2E 1.4426950408889634f
#define ATTENTION_NO_WINDOW 0x3fffffff

/* What all kernels get. Strides are in elements. */
struct attention_call {
    const struct attention_tile *tiles;
    int32_t heads, kv_heads, group, size;
    int32_t window; /* ATTENTION_NO_WINDOW: none. Row t sees keys s with 0 ≤ t − s < window */
    float scale;
    struct rows q, k, v, o, g, dq, dk, dv; /* g: dL/do */
    float *lse, *delta;                    /* (rows, heads) */
};

/* For attention_plain.cu: the same in float32, straight from the formulas. */
void attention_plain_forward(stream_t s, const struct attention_call *call, int32_t tiles_max);
void attention_plain_backward(stream_t s, const struct attention_call *call, int32_t tiles_max);

static inline struct attention_call attention_call_of(const struct attention_shape *shape,
                                                      const struct attention_tile *tiles)
{
    struct attention_call call = {};
    assert(shape->head_size > 0 && shape->head_size % 16 == 0 && shape->head_size <= 256);
    assert(shape->kv_heads > 0 && shape->heads % shape->kv_heads == 0 && shape->scale > 0 && shape->window >= 0);
    call.tiles = tiles;
    call.heads = shape->heads;
    call.kv_heads = shape->kv_heads;
    call.group = shape->heads / shape->kv_heads;
    call.size = shape->head_size;
    call.window = shape->window > 0 && shape->window < ATTENTION_NO_WINDOW ? shape->window : ATTENTION_NO_WINDOW;
    call.scale = shape->scale;
    return call;
}

/* The rows of a block: rows at .. at+ROWS−1 of the segment of `length` rows that begins at row `first`. */
struct attention_block {
    int32_t first, length, at;
};

/* Entry `index` of the list, of which each block takes ROWS rows: entries that hold more stand for several blocks, the
 * later (heavier) first. False: nothing to do. */
template <int ROWS>
DEVICE bool attention_block_of(const struct attention_tile *tiles, int index, struct attention_block *ret)
{
    const int PARTS = ATTENTION_TILE / ROWS;
    static_assert(ATTENTION_TILE % ROWS == 0 && PARTS <= ATTENTION_TILE_PARTS, "whole blocks");
    struct attention_tile tile = tiles[index / PARTS];
    ret->first = tile.first;
    ret->length = tile.length;
    ret->at = tile.at + (PARTS - 1 - index % PARTS) * ROWS;
    return ret->at < tile.length;
}

/* Column `column` of row `row`. */
DEVICE bf16 *attention_at(struct rows x, int32_t row, int32_t column)
{
    return static_cast<bf16 *>(x.at) + (ptrdiff_t)row * x.stride + column;
}

/* --- tiles in shared memory ------------------------------------------------------------------------------------ */

template <int D> DEVICE int tile_at(int row, int unit)
{
    return row * D + (unit ^ (row & 7)) * 8;
}

/* Starts to copy ROWS rows of `units` units, of which the rows from `valid` (≥ 1) on are zeros. */
template <int D, int ROWS> DEVICE void tile_load(bf16 *tile, const bf16 *from, int32_t stride, int32_t valid, int units)
{
    const int UNITS = D / 8, STEP = ATTENTION_THREADS / UNITS; /* rows of a pass */
    static_assert(ROWS % STEP == 0, "whole passes");
    int row = (int)threadIdx.x / UNITS, unit = (int)threadIdx.x % UNITS;
    const bf16 *at = from + row * stride + unit * 8;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        bool there = row + i * STEP < valid && unit < units;
        async_copy_16(tile + tile_at<D>(row + i * STEP, unit), at, there ? 16 : 0); /* 0: `at` is not looked at */
        at += (ptrdiff_t)STEP * stride;
    }
}

/* Operands of mma_16816 from 16 rows that begin at `at` (elements of `shared`, a row whose number is a multiple of 8),
 * columns 16·k and following. */

/* Where the lane's row begins at `lane_at`: 16·k is a change of its unit's low bits and a distance. Written so that one
 * register, not one for each k, is kept between products. */
DEVICE const bf16 *tile_lane(const bf16 *shared, int lane_at, int k)
{
    return shared + (lane_at ^ (k % 4 * 16)) + k / 4 * 64;
}

/* The lane's row and unit: of A, and of B where the tile's rows are the terms of the sum (ldmatrix_x4_transposed). */
template <int D> DEVICE int lane_of_a(int at)
{
    int lane = (int)threadIdx.x % WARP;
    return at + lane % 16 * D + ((lane / 16) ^ (lane % 8)) * 8;
}

/* Of B where the tile's rows are the product's columns. */
template <int D> DEVICE int lane_of_b(int at)
{
    int lane = (int)threadIdx.x % WARP;
    return at + (lane / 16 * 8 + lane % 8) * D + ((lane / 8 % 2) ^ (lane % 8)) * 8;
}

/* --- products of a warp ----------------------------------------------------------------------------------------------
 * Sums are (16·M, 8·N) in PTX's C fragments: x[m][n][e] is row 16m + lane/4 + 8·(e/2), column 8n + 2·(lane%4) + e%2. */

/* x += a·bᵀ: 16·M rows from a_at, 8·N rows from b_at, of D columns each. */
template <int D, int M, int N>
DEVICE void warp_product_transposed(float x[M][N][4], const bf16 *shared, int a_at, int b_at)
{
    int a = lane_of_a<D>(a_at), b = lane_of_b<D>(b_at);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t fa[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            ldmatrix_x4(fa[m], tile_lane(shared, a, k) + 16 * m * D);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[4];
            ldmatrix_x4(fb, tile_lane(shared, b, k) + 8 * n * D);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816(x[m][n], fa[m], fb);
                mma_16816(x[m][n + 1], fa[m], fb + 2);
            }
        }
    }
}

/* x (16·M, D) += p (16·M, 8·N) rounded to bfloat16 · b: 8·N rows from b_at. */
template <int D, int M, int N>
DEVICE void warp_product(float x[M][D / 8][4], const float p[M][N][4], const bf16 *shared, int b_at)
{
    int b = lane_of_a<D>(b_at);
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t fa[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) { /* a sum's fragments are an A's, 16 columns at a time */
            fa[m][0] = bf16_pack(p[m][2 * k][0], p[m][2 * k][1]);
            fa[m][1] = bf16_pack(p[m][2 * k][2], p[m][2 * k][3]);
            fa[m][2] = bf16_pack(p[m][2 * k + 1][0], p[m][2 * k + 1][1]);
            fa[m][3] = bf16_pack(p[m][2 * k + 1][2], p[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t fb[4];
            ldmatrix_x4_transposed(fb, tile_lane(shared, b, n / 2) + 16 * k * D);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816(x[m][n], fa[m], fb);
                mma_16816(x[m][n + 1], fa[m], fb + 2);
            }
        }
    }
}

template <int M, int N> DEVICE void warp_fill(float x[M][N][4], float value)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                x[m][n][e] = value;
}

/* x = value where the row of the product is not 0 .. window−1 ahead of the column. ahead: row 0's distance to column 0.
 */
template <int M, int N> DEVICE void mask_tile(float x[M][N][4], int32_t ahead, int32_t window, float value)
{
    int lane = (int)threadIdx.x % WARP;
    int32_t base = ahead + lane / 4 - 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if ((uint32_t)(base + 16 * m + e / 2 * 8 - 8 * n - e % 2) >= (uint32_t)window)
                    x[m][n][e] = value;
}

/* The same of a product whose rows are keys and columns queries. ahead: column 0's distance to row 0. */
template <int M, int N> DEVICE void mask_tile_transposed(float x[M][N][4], int32_t ahead, int32_t window, float value)
{
    int lane = (int)threadIdx.x % WARP;
    int32_t base = ahead - lane / 4 + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if ((uint32_t)(base - 16 * m - e / 2 * 8 + 8 * n + e % 2) >= (uint32_t)window)
                    x[m][n][e] = value;
}

/* Writes factor[m][e/2]·x to rows [row, row + 16·M) of a tile that only this warp still uses; warp_sync before reading
 * them. */
template <int D, int M>
DEVICE void tile_store(bf16 *tile, int row, const float x[M][D / 8][4], const float factor[M][2])
{
    int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float f = factor[m][half];
                bf16 *at = tile + tile_at<D>(row + 16 * m + 8 * half + lane / 4, n) + 2 * (lane % 4);
                *reinterpret_cast<uint32_t *>(at) = bf16_pack(f * x[m][n][2 * half], f * x[m][n][2 * half + 1]);
            }
}

/* Copies the warp's 16·M rows from `row` of a tile to global memory, the first `valid` of them, in whole units. */
template <int D, int M>
DEVICE void tile_write(const bf16 *tile, int row, bf16 *to, int32_t stride, int32_t valid, int units)
{
    const int UNITS = D / 8;
    int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 16 * M * UNITS / WARP; i++) {
        int at = i * WARP + lane, r = at / UNITS, unit = at % UNITS;
        if (r < valid && unit < units)
            *reinterpret_cast<uint4 *>(to + (ptrdiff_t)r * stride + unit * 8) =
                *reinterpret_cast<const uint4 *>(tile + tile_at<D>(row + r, unit));
    }
}

/* --- backward: what both its kinds of kernels share ------------------------------------------------------------ */

DEVICE float dot_of_words(uint32_t a, uint32_t b) /* of two bfloat16 each */
{
    return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
           __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}

/* delta of the warp's 16·M rows from row0 of the segment, to `deltas` in shared memory and to c.delta. */
template <int D, int M>
DEVICE void make_deltas(const struct attention_call &c, const struct attention_block &b, int32_t row0, int32_t head,
                        float *deltas)
{
    const int LANES = D / 8, PASS = WARP / LANES; /* lanes a row; rows at once */
    int lane = (int)threadIdx.x % WARP, unit = lane % LANES;
#pragma unroll 4
    for (int r = lane / LANES; r < 16 * M; r += PASS) {
        float sum = 0;
        if (row0 + r < b.length && unit < c.size / 8) {
            int32_t column = head * c.size + unit * 8;
            uint4 x = *reinterpret_cast<const uint4 *>(attention_at(c.o, b.first + row0 + r, column));
            uint4 y = *reinterpret_cast<const uint4 *>(attention_at(c.g, b.first + row0 + r, column));
            sum = (dot_of_words(x.x, y.x) + dot_of_words(x.y, y.y)) + (dot_of_words(x.z, y.z) + dot_of_words(x.w, y.w));
        }
        for (int mask = LANES / 2; mask > 0; mask /= 2)
            sum += shuffle_xor(sum, mask);
        if (unit == 0) {
            deltas[r] = sum;
            if (row0 + r < b.length)
                c.delta[(ptrdiff_t)(b.first + row0 + r) * c.heads + head] = sum;
        }
    }
}

/* Which query heads of a group a block takes: `each` (the last part maybe fewer), in `count` parts. */
struct head_parts {
    int32_t count, each;
    float *work; /* (2: dk, dv; rows; kv_heads; count; size); NULL: one part */
    int32_t rows;
};

/* As few parts as make 8 blocks of each key tile, but at least 2 query heads each, and none for groups below 4: a part
 * costs writing and reading float gradients. */
static inline void divide_heads(const struct attention_call *c, struct head_parts *ret)
{
    int32_t wanted = (8 + c->kv_heads - 1) / c->kv_heads;
    ret->each = c->group;
    if (c->group >= 4 && wanted > 1)
        ret->each = (c->group + wanted - 1) / wanted > 2 ? (c->group + wanted - 1) / wanted : 2;
    ret->count = (c->group + ret->each - 1) / ret->each;
    ret->work = NULL;
    ret->rows = 0;
}

enum { MAKE_DK = 1, MAKE_DV = 2 };

/* Writes the warp's rows of a gradient as float sums of one part. x as above, of 16·M keys from key0. */
template <int D, int M>
DEVICE void write_part(const struct head_parts &parts, const struct attention_call &c, const struct attention_block &b,
                       int32_t key0, int32_t head, int32_t part, bool is_dv, const float x[M][D / 8][4], float scale)
{
    int lane = (int)threadIdx.x % WARP;
    ptrdiff_t row_values = (ptrdiff_t)c.kv_heads * parts.count * c.size;
    float *to = parts.work + (is_dv ? parts.rows * row_values : 0) + (b.first + key0) * row_values +
                (head * parts.count + part) * c.size;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                int r = 16 * m + 8 * half + lane / 4, column = 8 * n + 2 * (lane % 4);
                if (key0 + r < b.length && column < c.size)
                    *reinterpret_cast<float2 *>(to + r * row_values + column) =
                        make_float2(scale * x[m][n][2 * half], scale * x[m][n][2 * half + 1]);
            }
}

/* --- attention_wgmma.cu: the same by products of groups of warps ----------------------------------------------- */

/* Whether the calling thread's device takes these. Their sums have another order, so results other bits. */
static inline bool attention_has_wgmma(void)
{
    return BUILT_FOR_WGMMA && device_capability() == 90;
}

/* parts->work set: leaves the parts' sums there. */
void attention_wgmma_forward(stream_t s, const struct attention_call *call, int32_t tiles_max);
void attention_wgmma_backward(stream_t s, const struct attention_call *call, const struct head_parts *parts,
                              int32_t tiles_max);

#endif
