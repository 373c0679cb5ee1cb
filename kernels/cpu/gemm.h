/*
 * What the products of gemm.c, gemm_bf16.c and gemm_int16.c share: writing a tile of the result, turning rows of
 * weights into panels, and how the driver sees a product over rounded inputs. Included by SIMD sources only.
 *
 * A product over rounded inputs reads A once, as pairs of 16-bit values in scratch, and weights as panels of such pairs
 * (depth/2, GEMM_NR), so that one instruction multiplies two of a row's values with two of a column's and adds both
 * into a 32-bit sum. gemm_bf16.c rounds to bfloat16. gemm_int16.c rounds runs of INT16_DEPTH values to steps of a
 * fraction of the run's largest, for CPUs that have the instruction for integers alone.
 */
#ifndef KERNELS_CPU_GEMM_H
#define KERNELS_CPU_GEMM_H

#include "kernels/cpu/simd.h"

/* Accumulators of any tile: rows and vectors that it does not have are never touched. */
typedef vec tile_sums[GEMM_ROWS][WIDE_VECS];
_Static_assert(WIDE_ROWS <= GEMM_ROWS && GEMM_VECS <= WIDE_VECS, "tile_sums holds both kinds of tile");

/* height and nv: the tile's rows and vectors. */
INLINE void store_tile(const struct gemm_panel *g, int32_t row0, int height, int nv, bool masked, tile_sums acc)
{
    vec alpha = vec_set(g->alpha);
    vmask mask = vec_mask(masked ? g->columns - (nv - 1) * VL : VL);
    int rows = g->m - row0 < height ? g->m - row0 : height;
    vec bias[WIDE_VECS];
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) {
        bias[j] = vec_zero();
        if (g->bias)
            bias[j] = masked && j == nv - 1 ? vec_load_mask(g->bias + j * VL, mask) : vec_load(g->bias + j * VL);
    }
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
        if (i < rows) {
            float *c = g->c + (row0 + i) * g->ldc;
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) {
                vec old = bias[j];
                bool last = masked && j == nv - 1;
                if (g->accumulate)
                    old = vec_add(old, last ? vec_load_mask(c + j * VL, mask) : vec_load(c + j * VL));
                vec sum = vec_fma(acc[i][j], alpha, old);
                if (last)
                    vec_store_mask(c + j * VL, sum, mask);
                else
                    vec_store(c + j * VL, sum);
            }
        }
    }
}

/* The thin product's part of a tile of GEMM_ROWS rows. */
INLINE void add_thin(const struct gemm_panel *g, int32_t row0, int nv, tile_sums acc)
{
    const float *a[GEMM_ROWS], *b = g->thin_b;
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++)
        a[i] = g->thin_a + (row0 + i < g->m ? row0 + i : g->m - 1) * g->thin_row;
    for (int32_t k = 0; k < g->thin_k; k++, b += GEMM_NR) {
        vec bv[WIDE_VECS];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            bv[j] = vec_load(b + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < GEMM_ROWS; i++) {
            const vec av = vec_set(a[i][k]);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                acc[i][j] = vec_fma(av, bv[j], acc[i][j]);
        }
    }
}

/* 32-bit elements, VL × VL; column c of the rows goes to dst + c·dst_stride. */
INLINE void transpose(const float *src, ptrdiff_t stride, float *dst, ptrdiff_t dst_stride)
{
#ifdef __AVX512F__
    __m512 t[16], u[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512 x = _mm512_loadu_ps(src + 2 * i * stride), y = _mm512_loadu_ps(src + (2 * i + 1) * stride);
        t[2 * i] = _mm512_unpacklo_ps(x, y);
        t[2 * i + 1] = _mm512_unpackhi_ps(x, y);
    }
#define PD(a) _mm512_castps_pd(a)
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(PD(t[i]), PD(t[i + 2])));
        u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(PD(t[i]), PD(t[i + 2])));
        u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(PD(t[i + 1]), PD(t[i + 3])));
        u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(PD(t[i + 1]), PD(t[i + 3])));
    }
#undef PD
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512 even = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), odd = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
        __m512 even2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
        __m512 odd2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
        _mm512_storeu_ps(dst + c * dst_stride, _mm512_shuffle_f32x4(even, even2, 0x88));
        _mm512_storeu_ps(dst + (4 + c) * dst_stride, _mm512_shuffle_f32x4(odd, odd2, 0x88));
        _mm512_storeu_ps(dst + (8 + c) * dst_stride, _mm512_shuffle_f32x4(even, even2, 0xdd));
        _mm512_storeu_ps(dst + (12 + c) * dst_stride, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
    }
#else
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m256 x = _mm256_loadu_ps(src + 2 * i * stride), y = _mm256_loadu_ps(src + (2 * i + 1) * stride);
        t[2 * i] = _mm256_unpacklo_ps(x, y);
        t[2 * i + 1] = _mm256_unpackhi_ps(x, y);
    }
#define PD(a) _mm256_castps_pd(a)
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(PD(t[i]), PD(t[i + 2])));
        u[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(PD(t[i]), PD(t[i + 2])));
        u[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(PD(t[i + 1]), PD(t[i + 3])));
        u[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(PD(t[i + 1]), PD(t[i + 3])));
    }
#undef PD
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        _mm256_storeu_ps(dst + c * dst_stride, _mm256_permute2f128_ps(u[c], u[4 + c], 0x20));
        _mm256_storeu_ps(dst + (4 + c) * dst_stride, _mm256_permute2f128_ps(u[c], u[4 + c], 0x31));
    }
#endif
}

/* rows ≤ VL of src turned over: element w of all to dst + w·dst_stride, rows beyond `rows` zero. Full tiles in
 * registers, ragged ones by elements. words: 32-bit elements in a row. */
INLINE void pack_rows(const float *src, ptrdiff_t stride, int32_t rows, int32_t words, float *dst, ptrdiff_t dst_stride)
{
    int32_t w = 0;
    if (rows == VL) {
        for (; w + VL <= words; w += VL)
            transpose(src + w, stride, dst + w * dst_stride, dst_stride);
    }
    for (; w < words; w++) {
        for (int32_t r = 0; r < VL; r++)
            dst[w * dst_stride + r] = r < rows ? src[r * stride + w] : 0.0f;
    }
}

_Static_assert(VL *(GEMM_TILE + 16) <= GEMM_TILE_FLOATS, "rows to be turned over have room");

/* A (m, k) rounded. */
struct rounded_rows {
    const uint16_t *values; /* (m, stride), an odd depth's last value paired with zero */
    ptrdiff_t stride;
    const float *scales; /* (m, blocks), of runs of INT16_DEPTH; NULL where rounded to bfloat16 */
    ptrdiff_t blocks;
};

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#define GEMM_ROUNDED
/* Takes scratch from *next. */
struct rounded_rows ISA(round_rows)(const struct kernel_run *run, const struct gemm *g, uint8_t **next,
                                    const uint8_t *end);
/* Weights of rows n0.. (transposed) or columns n0.. and depth kb..kb+kc as one panel. tile: GEMM_TILE_FLOATS. */
void ISA(pack_rounded)(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc, float *panel,
                       float *tile);
/* One panel, as gemm_panel: of p, a and its strides are not read and k is the depth in values. Rows from row0 of a,
 * depth from kb (a multiple of GEMM_DEPTH). */
void ISA(panel_rounded)(const struct gemm_panel *p, const struct rounded_rows *a, int32_t row0, int32_t kb);
#endif

#endif
