/*
 * Internal to attention_wgmma.cu: tiles as the products of a group of four warps take them, and those products.
 *
 * A tile (ROWS, D) is D/64 panels (ROWS, 64) one after the other, each as cuda.h's wgmma_matrix says; a head of another
 * size is filled up with zeros. Two forms of products are enough: where a tile's columns are the terms (scores), both
 * operands are tiles; where its rows are (sums over keys or queries), the other operand is a product before, in the
 * registers that it came in. A group has 64 rows of all its products, and warp i of it the rows 16i .. 16i+15.
 *
 * Three kinds of things happen out of order, and each has its fence:
 * - copies to tiles: async_wait, proxy_fence (products read shared memory another way than loads do), block_sync;
 * - registers written by ordinary instructions: wgmma_fence before the products that read or add to them;
 * - products: wgmma_wait before their sums are read, before registers they read change, and, with the block_sync that
 *   follows, before the tiles they read are overwritten.
 */
#ifndef KERNELS_CUDA_ATTENTION_WGMMA_H
#define KERNELS_CUDA_ATTENTION_WGMMA_H

#include "kernels/cuda/attention.h"

#define GROUP_THREADS (WARP_GROUP * WARP)
#define GROUP_ROWS 64

/* Of this thread, in a register that the compiler knows to be the same in the whole warp. */
DEVICE int group_of_thread()
{
    return shuffle((int)threadIdx.x / GROUP_THREADS, 0);
}

template <int ROWS> DEVICE int panel_at(int row, int unit)
{
    return unit / 8 * ROWS * 64 + row * 64 + ((unit % 8) ^ (row & 7)) * 8;
}

/* Starts to copy ROWS rows of `units` units, of which the rows from `valid` (≥ 1) on are zeros. */
template <int D, int ROWS, int THREADS>
DEVICE void panels_load(bf16 *tile, const bf16 *from, int32_t stride, int32_t valid, int units)
{
    const int UNITS = D / 8, STEP = THREADS / UNITS; /* rows of a pass */
    static_assert(ROWS % STEP == 0, "whole passes");
    int row = (int)threadIdx.x / UNITS, unit = (int)threadIdx.x % UNITS;
    const bf16 *at = from + (ptrdiff_t)row * stride + unit * 8;
    bf16 *to = tile + panel_at<ROWS>(row, unit);
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        bool there = row + i * STEP < valid && unit < units;
        async_copy_16(STEP % 8 == 0 ? to + i * STEP * 64 : tile + panel_at<ROWS>(row + i * STEP, unit), at,
                      there ? 16 : 0); /* 0: `at` is not looked at */
        at += (ptrdiff_t)STEP * stride;
    }
}

/* x (64, N) = a·bᵀ: 64 rows of a tile of A_ROWS, N of a tile of B_ROWS. */
template <int D, int N, int A_ROWS, int B_ROWS>
DEVICE void group_scores(float (&x)[N / 8][4], const bf16 *a, const bf16 *b)
{
    uint64_t ma = wgmma_matrix(a, A_ROWS * 128), mb = wgmma_matrix(b, B_ROWS * 128);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_shared<N>(x, ma + (k / 4 * A_ROWS * 8 + k % 4 * 2), mb + (k / 4 * B_ROWS * 8 + k % 4 * 2), k > 0);
}

/* x (64, D) += p (64, N) · b: all N rows of a tile. */
template <int D, int N> DEVICE void group_sums(float (&x)[D / 8][4], const uint32_t (&p)[N / 16][4], const bf16 *b)
{
    uint64_t mb = wgmma_matrix(b, N * 128);
#pragma unroll
    for (int k = 0; k < N / 16; k++)
        wgmma_registers<D>(x, p[k], mb + k * 128);
}

/* A product's sums, rounded, as the operand of the next. */
template <int N> DEVICE void group_pack(uint32_t (&p)[N / 16][4], const float (&x)[N / 8][4])
{
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        p[k][0] = bf16_pack(x[2 * k][0], x[2 * k][1]);
        p[k][1] = bf16_pack(x[2 * k][2], x[2 * k][3]);
        p[k][2] = bf16_pack(x[2 * k + 1][0], x[2 * k + 1][1]);
        p[k][3] = bf16_pack(x[2 * k + 1][2], x[2 * k + 1][3]);
    }
}

/* Writes factor[half]·x, the warp's 16 rows, to global memory by way of rows `row` and following of a tile that nobody
 * else uses any more: the first `valid` rows, in whole units. */
template <int D, int ROWS>
DEVICE void panels_write(bf16 *tile, int row, const float (&x)[D / 8][4], const float (&factor)[2], bf16 *to,
                         int32_t stride, int32_t valid, int units)
{
    const int UNITS = D / 8;
    int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bf16 *at = tile + panel_at<ROWS>(row + 8 * half + lane / 4, n) + 2 * (lane % 4);
            *reinterpret_cast<uint32_t *>(at) =
                bf16_pack(factor[half] * x[n][2 * half], factor[half] * x[n][2 * half + 1]);
        }
    warp_sync();
#pragma unroll
    for (int i = 0; i < 16 * UNITS / WARP; i++) {
        int at = i * WARP + lane, r = at / UNITS, unit = at % UNITS;
        if (r < valid && unit < units)
            *reinterpret_cast<uint4 *>(to + (ptrdiff_t)r * stride + unit * 8) =
                *reinterpret_cast<const uint4 *>(tile + panel_at<ROWS>(row + r, unit));
    }
}

#endif
