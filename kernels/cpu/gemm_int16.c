/*
 * The product over inputs rounded to integers: each run of INT16_DEPTH values of a row of A, and of a column of
 * weights, becomes whole steps of its largest magnitude / STEPS; a run's product is an exact sum of integers, then
 * scaled and added to the result in float32. STEPS_A·STEPS_B·INT16_DEPTH < 2^31, so that no sum overflows. The weights
 * get fewer steps: a run of theirs spreads over a few of its standard deviations, one of activations or gradients over
 * dozens.
 */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/interleave.h"

#if defined(__AVX512VNNI__) && !defined(__AVX512BF16__)
#define STEPS_A 8191
#define STEPS_B 2047
_Static_assert((int64_t)STEPS_A *STEPS_B *INT16_DEPTH < INT32_MAX, "a run's sum overflows");
/* A run all below this is zeros: its steps' reciprocal might overflow. */
#define LEAST 1e-30f
/* Pairs of rows of B that the kernel asks for ahead of their use. */
#define PAIRS_AHEAD 8

/* The largest magnitude's bits: a NaN's are above infinity's, and both above all numbers'. */
INLINE __m512i magnitude(__m512 x)
{
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

/* From a run's largest magnitude: values · by are steps, steps · scale are values. A NaN or an infinity makes the run's
 * products NaN. */
INLINE void run_scales(__m512i largest, float steps, __m512 *by, __m512 *scale)
{
    const __m512 top = _mm512_castsi512_ps(largest);
    const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_set1_ps(LEAST), _CMP_GE_OQ);
    const __mmask16 bad = _mm512_cmpgt_epi32_mask(largest, _mm512_set1_epi32(0x7f7fffff));
    *by = _mm512_maskz_div_ps(some, _mm512_set1_ps(steps), top);
    *scale = _mm512_maskz_mul_ps(some, top, _mm512_set1_ps(1 / steps));
    *scale = _mm512_mask_mov_ps(*scale, bad, _mm512_set1_ps(NAN));
}

/* INT16_DEPTH floats. */
INLINE float round_whole_run(const float *src, float steps, int16_t *dst)
{
    enum { VECTORS = INT16_DEPTH / 16 };
    __m512 x[VECTORS], by, scale;
    __m512i largest = _mm512_setzero_si512();
    /* packs works within quarters of a vector: this puts its 8-byte pieces in order. */
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) {
        x[i] = _mm512_loadu_ps(src + i * 16);
        largest = _mm512_max_epu32(largest, magnitude(x[i]));
    }
    run_scales(_mm512_set1_epi32((int)_mm512_reduce_max_epu32(largest)), steps, &by, &scale);
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i += 2) {
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], by));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(x[i + 1], by));
        _mm512_storeu_si512(dst + i * 16, _mm512_permutexvar_epi64(order, _mm512_packs_epi32(low, high)));
    }
    return _mm512_cvtss_f32(scale);
}

/* n ≤ INT16_DEPTH floats; an odd last one gets a zero partner. dst may begin where src does. */
INLINE float round_run(const float *src, int32_t n, float steps, int16_t *dst)
{
    if (n == INT16_DEPTH)
        return round_whole_run(src, steps, dst);
    __m512i largest = _mm512_setzero_si512();
    for (int32_t i = 0; i < n; i += 16)
        largest = _mm512_max_epu32(largest, magnitude(vec_load_mask(src + i, vec_mask(n - i))));
    __m512 by, scale;
    run_scales(_mm512_set1_epi32((int)_mm512_reduce_max_epu32(largest)), steps, &by, &scale);
    for (int32_t i = 0; i < n; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(vec_load_mask(src + i, vec_mask(n - i)), by));
        _mm512_mask_cvtepi32_storeu_epi16(dst + i, vec_mask((n - i + 1) & ~1), whole);
    }
    return _mm512_cvtss_f32(scale);
}

struct convert {
    const struct gemm *g;
    int16_t *values;
    ptrdiff_t stride, blocks;
    float *scales;
};

static void convert_rows(void *ctx, int item, int thread)
{
    const struct convert *c = ctx;
    const int32_t k = c->g->k;
    (void)thread;
    for (int32_t row = item * 16; row < c->g->m && row < (item + 1) * 16; row++) {
        const float *src = c->g->a + row * c->g->a_row;
        for (int32_t i = 0; i < k; i += INT16_DEPTH) {
            const int32_t n = k - i < INT16_DEPTH ? k - i : INT16_DEPTH;
            c->scales[row * c->blocks + i / INT16_DEPTH] =
                round_run(src + i, n, STEPS_A, c->values + row * c->stride + i);
        }
    }
}

struct rounded_rows ISA(round_rows)(const struct kernel_run *run, const struct gemm *g, uint8_t **next,
                                    const uint8_t *end)
{
    struct convert c = {.g = g, .stride = (g->k + 1) & ~1, .blocks = (g->k + INT16_DEPTH - 1) / INT16_DEPTH};
    c.values = scratch_take(next, end, (size_t)g->m * (size_t)c.stride * 2);
    c.scales = scratch_take(next, end, (size_t)g->m * (size_t)c.blocks * sizeof(float));
    pool_run(run->pool, (g->m + 15) / 16, convert_rows, &c);
    return (struct rounded_rows){(const uint16_t *)c.values, c.stride, c.scales, c.blocks};
}

/* Where a panel's scales (blocks, GEMM_NR) lie: behind its pairs. */
INLINE float *panel_scales(float *panel, int32_t kc)
{
    return panel + (ptrdiff_t)((kc + 1) / 2) * GEMM_NR;
}

/* 16 columns of n ≤ INT16_DEPTH rows of tile, `width` apart. */
INLINE void pack_columns(const float *tile, ptrdiff_t width, int32_t n, float *panel, float *scales)
{
    __m512i largest = _mm512_setzero_si512();
    for (int32_t k = 0; k < n; k++)
        largest = _mm512_max_epu32(largest, magnitude(vec_load(tile + k * width)));
    __m512 by, scale;
    run_scales(largest, STEPS_B, &by, &scale);
    vec_store(scales, scale);
    for (int32_t k = 0; k < n; k += 2) {
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(vec_load(tile + k * width), by));
        const __m512i high = k + 1 < n ? _mm512_cvtps_epi32(_mm512_mul_ps(vec_load(tile + (k + 1) * width), by))
                                       : _mm512_setzero_si512();
        /* (low & 0xffff) | high << 16 */
        _mm512_storeu_si512(panel + (ptrdiff_t)(k / 2) * GEMM_NR,
                            _mm512_mask_mov_epi16(_mm512_slli_epi32(high, 16), 0x55555555, low));
    }
}

/* Columns are rows of w: each is rounded along its depth, then turned over in pairs. */
static void pack_transposed(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc, float *panel,
                            float *tile)
{
    const ptrdiff_t stride = GEMM_TILE + 16;
    const ptrdiff_t row_bytes = tensor_row(g->w, 1) - tensor_row(g->w, 0);
    float *scales = panel_scales(panel, kc);
    for (int32_t r = 0; r < columns; r += VL) {
        int32_t rows = columns - r < VL ? columns - r : VL;
        const bool quantised = tensor_type_block(g->w->type) > 1;
        for (int32_t k = 0; quantised && k < kc; k += INT16_DEPTH) {
            const int32_t n = kc - k < INT16_DEPTH ? kc - k : INT16_DEPTH;
            if (g->w->interleaved)
                ISA(interleaved_panel)(g->w, n0 + r, (size_t)(kb + k), (size_t)n, tile, VL);
            else
                ISA(dequantise_lanes)
            (g->w->type, tensor_row(g->w, n0 + r), row_bytes, rows, (size_t)(kb + k), (size_t)n, tile, VL);
            pack_columns(tile, VL, n, panel + r + (ptrdiff_t)(k / 2) * GEMM_NR, scales + k / INT16_DEPTH * GEMM_NR + r);
        }
        for (int32_t k = 0; !quantised && k < kc; k += GEMM_TILE) {
            int32_t length = kc - k < GEMM_TILE ? kc - k : GEMM_TILE;
            for (int32_t i = 0; i < rows; i++) {
                float *to = tile + i * stride;
                ISA(dequantise)(g->w->type, tensor_row(g->w, n0 + r + i), (size_t)(kb + k), (size_t)length, to);
                for (int32_t at = 0; at < length; at += INT16_DEPTH) {
                    const int32_t n = length - at < INT16_DEPTH ? length - at : INT16_DEPTH;
                    scales[(k + at) / INT16_DEPTH * GEMM_NR + r + i] =
                        round_run(to + at, n, STEPS_B, (int16_t *)(void *)to + at);
                }
            }
            pack_rows(tile, stride, rows, (length + 1) / 2, panel + r + (ptrdiff_t)(k / 2) * GEMM_NR, GEMM_NR);
        }
    }
}

void ISA(pack_rounded)(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc, float *panel,
                       float *tile)
{
    enum { WIDTH = GEMM_COLUMNS };
    if (g->transposed) {
        pack_transposed(g, n0, columns, kb, kc, panel, tile);
        return;
    }
    const ptrdiff_t row_bytes = tensor_row(g->w, 1) - tensor_row(g->w, 0);
    if (columns < WIDTH)
        memset(tile, 0, INT16_DEPTH * WIDTH * sizeof *tile);
    for (int32_t k = 0; k < kc; k += INT16_DEPTH) {
        const int32_t n = kc - k < INT16_DEPTH ? kc - k : INT16_DEPTH;
        ISA(dequantise_rows)
        (g->w->type, tensor_row(g->w, kb + k), row_bytes, n, (size_t)n0, (size_t)columns, tile, WIDTH);
        float *scales = panel_scales(panel, kc) + k / INT16_DEPTH * GEMM_NR;
        for (int32_t at = 0; at < columns; at += 16)
            pack_columns(tile + at, WIDTH, n, panel + (ptrdiff_t)(k / 2) * GEMM_NR + at, scales + at);
    }
}

/* acc + the sums of two products each: _mm512_dpwssd_epi32, which gcc 12 surrounds with copies of acc in this loop. */
INLINE __m512i add_pairs(__m512i acc, __m512i a, __m512i b)
{
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}

INLINE void micro(const struct gemm_panel *g, const struct rounded_rows *a, int32_t block, int32_t row0, int32_t first,
                  int nv, bool masked)
{
    const int32_t *at[GEMM_ROWS];
    const float *scale_a[GEMM_ROWS];
    float memory[GEMM_ROWS * GEMM_NR] __attribute__((aligned(64))), *sums = memory;
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++) {
        const int32_t row = first + (row0 + i < g->m ? row0 + i : g->m - 1);
        at[i] = (const int32_t *)(const void *)(a->values + row * a->stride + (ptrdiff_t)block * INT16_DEPTH);
        scale_a[i] = a->scales + row * a->blocks + block;
    }
    const float *b = g->b, *scale_b = g->b + (ptrdiff_t)((g->k + 1) / 2) * GEMM_NR;
    const int32_t pairs = (g->k + 1) / 2;
    for (int32_t run = 0, pair = 0; pair < pairs; run++, scale_b += GEMM_NR) {
        const int32_t end = pairs - pair < INT16_DEPTH / 2 ? pairs : pair + INT16_DEPTH / 2;
        __m512i acc[GEMM_ROWS][GEMM_VECS];
#pragma GCC unroll 8
        for (int i = 0; i < GEMM_ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                acc[i][j] = _mm512_setzero_si512();
        /* The result's lines, two rows a run, before they are written. */
        for (int i = 2 * run; i < 2 * run + 2 && i < GEMM_ROWS && row0 + i < g->m; i++)
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                _mm_prefetch((const char *)(g->c + (row0 + i) * g->ldc + j * VL), _MM_HINT_T0);
#pragma GCC unroll 2
        for (; pair < end; pair++, b += GEMM_NR) {
            __m512i bv[GEMM_VECS];
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                bv[j] = _mm512_loadu_si512(b + j * VL);
#pragma GCC unroll 8
            for (int i = 0; i < GEMM_ROWS; i++) {
                const __m512i av = _mm512_set1_epi32(at[i][pair]);
#pragma GCC unroll 4
                for (int j = 0; j < nv; j++)
                    acc[i][j] = add_pairs(acc[i][j], av, bv[j]);
            }
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) /* a cache line each; B comes from the second cache */
                _mm_prefetch((const char *)(b + (ptrdiff_t)PAIRS_AHEAD * GEMM_NR + j * VL), _MM_HINT_T0);
        }
        /* The integers need all registers: the sums stay in memory, and gcc keeps its hands off both. */
#pragma GCC unroll 8
        for (int i = 0; i < GEMM_ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                __asm__ volatile("" : "+v"(acc[i][j]));
        __asm__ volatile("" : "+r"(sums) : : "memory");
#pragma GCC unroll 8
        for (int i = 0; i < GEMM_ROWS; i++) {
            const vec scale = vec_set(scale_a[i][run]);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) {
                float *sum = sums + i * GEMM_NR + j * VL;
                const vec value = _mm512_cvtepi32_ps(acc[i][j]), by = vec_mul(scale, vec_load(scale_b + j * VL));
                vec_store(sum, run == 0 ? vec_mul(value, by) : vec_fma(value, by, vec_load(sum)));
            }
        }
    }
    tile_sums sum;
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            sum[i][j] = vec_load(sums + i * GEMM_NR + j * VL);
    if (g->thin_k > 0)
        add_thin(g, row0, nv, sum);
    store_tile(g, row0, GEMM_ROWS, nv, masked, sum);
}

void ISA(panel_rounded)(const struct gemm_panel *p, const struct rounded_rows *a, int32_t row0, int32_t kb)
{
    const int32_t block = kb / INT16_DEPTH;
    const int nv = p->columns == GEMM_NR ? 0 : (p->columns + VL - 1) / VL;
    for (int32_t row = 0; row < p->m; row += GEMM_ROWS) {
        if (nv == 0)
            micro(p, a, block, row, row0, GEMM_VECS, false);
        else if (nv == 1)
            micro(p, a, block, row, row0, 1, true);
        else if (nv == 2)
            micro(p, a, block, row, row0, 2, true);
        else
            micro(p, a, block, row, row0, 3, true);
    }
}
#endif
