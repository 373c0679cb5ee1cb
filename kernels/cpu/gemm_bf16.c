/* The product over bfloat16 inputs. */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/interleave.h"

#ifdef __AVX512BF16__
/* n floats to bfloat16; an odd last one gets a zero partner. */
static void to_bf16(const float *src, int32_t n, uint16_t *dst)
{
    int32_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(void *)(dst + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(src + i)));
    if (i < n) {
        __m256i last = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(vec_mask(n - i), src + i));
        _mm256_mask_storeu_epi16(dst + i, vec_mask((n - i + 1) & ~1), last);
    }
}

struct convert {
    const struct gemm *g;
    uint16_t *values;
    ptrdiff_t stride;
};

static void convert_rows(void *ctx, int item, int thread)
{
    const struct convert *c = ctx;
    (void)thread;
    for (int32_t row = item * 64; row < c->g->m && row < (item + 1) * 64; row++)
        to_bf16(c->g->a + row * c->g->a_row, c->g->k, c->values + row * c->stride);
}

struct rounded_rows ISA(round_rows)(const struct kernel_run *run, const struct gemm *g, uint8_t **next,
                                    const uint8_t *end)
{
    struct convert c = {.g = g, .stride = (g->k + 1) & ~1};
    c.values = scratch_take(next, end, (size_t)g->m * (size_t)c.stride * 2);
    pool_run(run->pool, (g->m + 63) / 64, convert_rows, &c);
    return (struct rounded_rows){.values = c.values, .stride = c.stride};
}

/* 16 columns of two rows, the second one after the first in memory's order of pairs. */
INLINE void pack_pair(const float *first, const float *second, float *to)
{
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(vec_load(first)));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(vec_load(second)));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

static void pack_transposed(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc, float *panel,
                            float *tile)
{
    const ptrdiff_t stride = GEMM_TILE + 16, row_bytes = tensor_row(g->w, 1) - tensor_row(g->w, 0);
    for (int32_t r = 0; r < columns; r += VL) {
        int32_t rows = columns - r < VL ? columns - r : VL;
        for (int32_t k = 0; k < kc; k += GEMM_TILE) {
            int32_t length = kc - k < GEMM_TILE ? kc - k : GEMM_TILE;
            if (tensor_type_block(g->w->type) > 1) { /* whole runs, so an even depth */
                if (g->w->interleaved)
                    ISA(interleaved_panel)(g->w, n0 + r, (size_t)(kb + k), (size_t)length, tile, VL);
                else
                    ISA(dequantise_lanes)
                (g->w->type, tensor_row(g->w, n0 + r), row_bytes, rows, (size_t)(kb + k), (size_t)length, tile, VL);
                for (int32_t i = 0; i < length; i += 2)
                    pack_pair(tile + i * VL, tile + (i + 1) * VL, panel + r + (ptrdiff_t)((k + i) / 2) * GEMM_NR);
                continue;
            }
            for (int32_t i = 0; i < rows; i++) {
                float *to = tile + i * stride;
                ISA(dequantise)(g->w->type, tensor_row(g->w, n0 + r + i), (size_t)(kb + k), (size_t)length, to);
                to_bf16(to, length, (uint16_t *)(void *)to);
            }
            pack_rows(tile, stride, rows, (length + 1) / 2, panel + r + (ptrdiff_t)(k / 2) * GEMM_NR, GEMM_NR);
        }
    }
}

void ISA(pack_rounded)(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc, float *panel,
                       float *tile)
{
    if (g->transposed) {
        pack_transposed(g, n0, columns, kb, kc, panel, tile);
        return;
    }
    memset(tile, 0, 2 * GEMM_NR * sizeof(float));
    for (int32_t k = 0; k < kc; k += 2) {
        ISA(dequantise)(g->w->type, tensor_row(g->w, kb + k), (size_t)n0, (size_t)columns, tile);
        if (k + 1 < kc)
            ISA(dequantise)(g->w->type, tensor_row(g->w, kb + k + 1), (size_t)n0, (size_t)columns, tile + GEMM_NR);
        else
            memset(tile + GEMM_NR, 0, GEMM_NR * sizeof(float));
        for (int32_t j = 0; j < GEMM_NR; j += 16)
            pack_pair(tile + j, tile + GEMM_NR + j, panel + (ptrdiff_t)(k / 2) * GEMM_NR + j);
    }
}

INLINE void micro(const struct gemm_panel *g, int32_t row0, int nv, bool masked)
{
    /* a, b and k count pairs of bfloat16 here, which share a float's size. */
    const float *a[GEMM_ROWS];
    tile_sums acc;
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++) {
        int32_t row = row0 + i < g->m ? row0 + i : g->m - 1;
        a[i] = g->a + row * g->a_row;
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            acc[i][j] = vec_zero();
    }
    const float *b = g->b;
    for (int32_t k = 0; k < g->k; k++) {
        __m512bh bv[GEMM_VECS];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            bv[j] = (__m512bh)vec_load(b + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < GEMM_ROWS; i++) {
            __m512bh av = (__m512bh)vec_set(a[i][k]);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
        }
        b += GEMM_NR;
    }
    if (g->thin_k > 0)
        add_thin(g, row0, nv, acc);
    store_tile(g, row0, GEMM_ROWS, nv, masked, acc);
}

void ISA(panel_rounded)(const struct gemm_panel *p, const struct rounded_rows *a, int32_t row0, int32_t kb)
{
    struct gemm_panel g = *p;
    int nv = g.columns == GEMM_NR ? 0 : (g.columns + VL - 1) / VL;
    g.a = (const float *)(const void *)(a->values + row0 * a->stride + kb);
    g.a_row = a->stride / 2;
    g.k = (p->k + 1) / 2;
    for (int32_t row = 0; row < g.m; row += GEMM_ROWS) {
        if (nv == 0)
            micro(&g, row, GEMM_VECS, false);
        else if (nv == 1)
            micro(&g, row, 1, true);
        else if (nv == 2)
            micro(&g, row, 2, true);
        else
            micro(&g, row, 3, true);
    }
}
#endif
