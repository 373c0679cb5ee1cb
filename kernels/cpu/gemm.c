/*
 * The blocked matrix product: an item is GEMM_COLUMNS columns of the result (times a slice of the rows if there are few
 * columns); it packs its panel of weights, decoding them on the fly, and runs a register-blocked kernel of GEMM_ROWS
 * rows by GEMM_VECS vectors over it. A is read in place. Partial tiles repeat the last row and drop the copies, so
 * each element is summed in one order everywhere.
 */
#include "kernels/cpu/interleave.h"

/* Fewer rows are not worth packing a panel of weights for. */
#define SLICE_ROWS_MIN 48

struct job {
    const struct gemm *g;
    int32_t panels, whole;      /* of GEMM_COLUMNS columns; the first `whole` are one item each */
    int32_t slices, slice_rows; /* the others are cut into so many items of so many rows */
    int32_t kb;                 /* the depth that this round starts at */
    const uint16_t *a16;        /* (m, k16) or NULL */
    ptrdiff_t k16;
    uint8_t *scratch; /* thread t's buffers are at t·thread_bytes */
    size_t thread_bytes;
};

INLINE void store_tile(const struct gemm_panel *g, int32_t row0, int nv, bool masked, vec acc[GEMM_ROWS][GEMM_VECS])
{
    vec alpha = vec_set(g->alpha);
    vmask mask = vec_mask(masked ? g->columns - (nv - 1) * VL : VL);
    int rows = g->m - row0 < GEMM_ROWS ? g->m - row0 : GEMM_ROWS;
    vec bias[GEMM_VECS];
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) {
        bias[j] = vec_zero();
        if (g->bias)
            bias[j] = masked && j == nv - 1 ? vec_load_mask(g->bias + j * VL, mask) : vec_load(g->bias + j * VL);
    }
#pragma GCC unroll 6
    for (int i = 0; i < GEMM_ROWS; i++) {
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

INLINE void micro_f32(const struct gemm_panel *g, int32_t row0, int nv, bool masked)
{
    const float *a[GEMM_ROWS];
    vec acc[GEMM_ROWS][GEMM_VECS];
#pragma GCC unroll 6
    for (int i = 0; i < GEMM_ROWS; i++) {
        int32_t row = row0 + i < g->m ? row0 + i : g->m - 1;
        a[i] = g->a + row * g->a_row;
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            acc[i][j] = vec_zero();
    }
    vmask mask = vec_mask(masked ? g->columns - (nv - 1) * VL : VL);
    const float *b = g->b;
    ptrdiff_t off = 0, a_k = g->a_k, ldb = g->ldb;
    for (int32_t k = g->k; k > 0; k--) {
        vec bv[GEMM_VECS];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            bv[j] = masked && j == nv - 1 ? vec_load_mask(b + j * VL, mask) : vec_load(b + j * VL);
#pragma GCC unroll 6
        for (int i = 0; i < GEMM_ROWS; i++) {
            vec av = vec_set(a[i][off]);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                acc[i][j] = vec_fma(av, bv[j], acc[i][j]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < nv * VL; j += 16) /* a cache line; B comes from the second cache */
            _mm_prefetch((const char *)(b + GEMM_AHEAD * ldb + j), _MM_HINT_T0);
        b += ldb;
        off += a_k;
    }
    store_tile(g, row0, nv, masked, acc);
}

void ISA(gemm_panel)(const struct gemm_panel *g)
{
    if (g->columns == GEMM_NR) {
        for (int32_t row = 0; row < g->m; row += GEMM_ROWS)
            micro_f32(g, row, GEMM_VECS, false);
        return;
    }
    int nv = (g->columns + VL - 1) / VL;
    for (int32_t row = 0; row < g->m; row += GEMM_ROWS) {
        switch (nv) {
        case 1:
            micro_f32(g, row, 1, true);
            break;
        case 2:
            micro_f32(g, row, 2, true);
            break;
#if GEMM_VECS == 4
        case 3:
            micro_f32(g, row, 3, true);
            break;
        default:
            micro_f32(g, row, 4, true);
            break;
#endif
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

/* Full tiles in registers, ragged ones by elements. words: 32-bit elements in a row. */
static void pack_rows(const float *src, ptrdiff_t stride, int32_t rows, int32_t words, float *dst)
{
    int32_t w = 0;
    if (rows == VL) {
        for (; w + VL <= words; w += VL)
            transpose(src + w, stride, dst + (ptrdiff_t)w * GEMM_NR, GEMM_NR);
    }
    for (; w < words; w++) {
        for (int32_t r = 0; r < VL; r++)
            dst[(ptrdiff_t)w * GEMM_NR + r] = r < rows ? src[r * stride + w] : 0.0f;
    }
}

void ISA(pack_transposed)(const float *src, ptrdiff_t stride, int32_t rows, int32_t k, float *panel)
{
    for (int32_t r = 0; r < GEMM_NR; r += VL) {
        int32_t left = rows - r < 0 ? 0 : rows - r < VL ? rows - r : VL;
        pack_rows(src + r * stride, stride, left, k, panel + r);
    }
}

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

INLINE void micro_bf16(const struct gemm_panel *g, int32_t row0, int nv, bool masked)
{
    /* a, b and k count pairs of bfloat16 here, which share a float's size. */
    const float *a[GEMM_ROWS];
    vec acc[GEMM_ROWS][GEMM_VECS];
#pragma GCC unroll 6
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
#pragma GCC unroll 6
        for (int i = 0; i < GEMM_ROWS; i++) {
            __m512bh av = (__m512bh)vec_set(a[i][k]);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
        }
        b += GEMM_NR;
    }
    store_tile(g, row0, nv, masked, acc);
}

static void panel_bf16(const struct gemm_panel *g)
{
    int nv = g->columns == GEMM_NR ? 0 : (g->columns + VL - 1) / VL;
    for (int32_t row = 0; row < g->m; row += GEMM_ROWS) {
        switch (nv) {
        case 0:
            micro_bf16(g, row, 4, false);
            break;
        case 1:
            micro_bf16(g, row, 1, true);
            break;
        case 2:
            micro_bf16(g, row, 2, true);
            break;
        case 3:
            micro_bf16(g, row, 3, true);
            break;
        default:
            micro_bf16(g, row, 4, true);
            break;
        }
    }
}

struct convert {
    const struct gemm *g;
    uint16_t *a16;
    ptrdiff_t k16;
};

static void convert_rows(void *ctx, int item, int thread)
{
    const struct convert *c = ctx;
    (void)thread;
    for (int32_t row = item * 64; row < c->g->m && row < (item + 1) * 64; row++)
        to_bf16(c->g->a + row * c->g->a_row, c->g->k, c->a16 + row * c->k16);
}
#endif

/* Weights of rows n0.. and depth kb..kb+kc as panels (depth, GEMM_NR); bf16: depth in pairs. */
static void pack_weights_transposed(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc,
                                    float *panel, float *tile)
{
    ptrdiff_t panel_step = (ptrdiff_t)((kc + VL) & ~(VL - 1)) * GEMM_NR;
    for (int32_t r = 0; r < columns; r += VL) {
        int32_t rows = columns - r < VL ? columns - r : VL;
        float *dst = panel + r / GEMM_NR * panel_step + r % GEMM_NR;
        if (g->w->interleaved && !g->bf16) {
            ISA(interleaved_panel)(g->w, n0 + r, (size_t)kb, (size_t)kc, dst, GEMM_NR);
            continue;
        }
        for (int32_t k = 0; k < kc; k += GEMM_TILE) {
            int32_t length = kc - k < GEMM_TILE ? kc - k : GEMM_TILE;
            const ptrdiff_t stride = GEMM_TILE + 16;
            for (int32_t i = 0; i < rows; i++) {
                float *to = tile + i * stride;
                ISA(dequantise)(g->w->type, tensor_row(g->w, n0 + r + i), (size_t)(kb + k), (size_t)length, to);
#ifdef __AVX512BF16__
                if (g->bf16)
                    to_bf16(to, length, (uint16_t *)(void *)to);
#endif
            }
            int32_t words = g->bf16 ? (length + 1) / 2 : length;
            pack_rows(tile, stride, rows, words, dst + (ptrdiff_t)(g->bf16 ? k / 2 : k) * GEMM_NR);
        }
    }
    /* Vectors of the last micro-panel that lie wholly beyond the columns are never read: the kernel is as narrow. */
}

static void pack_weights(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc, float *panel,
                         float *tile)
{
    ptrdiff_t panel_step = (ptrdiff_t)((kc + VL) & ~(VL - 1)) * GEMM_NR;
    memset(tile, 0, 2 * GEMM_COLUMNS * sizeof(float));
#ifdef __AVX512BF16__
    if (g->bf16) {
        for (int32_t k = 0; k < kc; k += 2) {
            ISA(dequantise)(g->w->type, tensor_row(g->w, kb + k), (size_t)n0, (size_t)columns, tile);
            if (k + 1 < kc)
                ISA(dequantise)
            (g->w->type, tensor_row(g->w, kb + k + 1), (size_t)n0, (size_t)columns, tile + GEMM_COLUMNS);
            else memset(tile + GEMM_COLUMNS, 0, GEMM_COLUMNS * sizeof(float));
            for (int32_t j = 0; j < GEMM_COLUMNS; j += 16) {
                __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(vec_load(tile + j)));
                __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(vec_load(tile + GEMM_COLUMNS + j)));
                _mm512_storeu_si512(panel + (ptrdiff_t)(k / 2) * GEMM_NR + j,
                                    _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
        return;
    }
#endif
    const uint8_t *row = tensor_row(g->w, kb);
    const ptrdiff_t row_bytes = tensor_row(g->w, 1) - tensor_row(g->w, 0);
    for (int32_t k = 0; k < kc; k++, row += row_bytes) {
        if (GEMM_NR == GEMM_COLUMNS && columns == GEMM_COLUMNS) {
            ISA(dequantise)(g->w->type, row, (size_t)n0, GEMM_COLUMNS, panel + (ptrdiff_t)k * GEMM_NR);
            continue;
        }
        ISA(dequantise)(g->w->type, row, (size_t)n0, (size_t)columns, tile);
        for (int32_t j = 0; j < GEMM_COLUMNS; j += VL)
            vec_store(panel + j / GEMM_NR * panel_step + (ptrdiff_t)k * GEMM_NR + j % GEMM_NR, vec_load(tile + j));
    }
}

static void gemm_item(void *ctx, int item, int thread)
{
    const struct job *job = ctx;
    const struct gemm *g = job->g;
    const bool whole = item < job->whole;
    int32_t panel_index = whole ? item : job->whole + (item - job->whole) / job->slices;
    int32_t n0 = panel_index * GEMM_COLUMNS;
    int32_t row0 = whole ? 0 : (item - job->whole) % job->slices * job->slice_rows;
    int32_t columns = g->n - n0 < GEMM_COLUMNS ? g->n - n0 : GEMM_COLUMNS;
    int32_t rows = whole || g->m - row0 < job->slice_rows ? g->m - row0 : job->slice_rows;
    float *tile = (float *)(void *)(job->scratch + (size_t)thread * job->thread_bytes);
    float *panel = tile + VL * (GEMM_TILE + 16);
    int32_t kb = job->kb;
    int32_t kc = g->k - kb < GEMM_DEPTH ? g->k - kb : GEMM_DEPTH;
    if (g->w && g->transposed)
        pack_weights_transposed(g, n0, columns, kb, kc, panel, tile);
    else if (g->w)
        pack_weights(g, n0, columns, kb, kc, panel, tile);
    struct gemm_panel p = {
        .m = rows,
        .k = kc,
        .a_row = g->a_row,
        .a_k = g->a_k,
        .alpha = g->alpha,
        .ldc = g->ldc,
        .accumulate = g->accumulate || kb > 0,
    };
    if (!g->bf16)
        p.a = g->a + row0 * g->a_row + kb * g->a_k;
    for (int32_t j = 0; j < columns; j += GEMM_NR) {
        p.columns = columns - j < GEMM_NR ? columns - j : GEMM_NR;
        p.b = g->w ? panel + j / GEMM_NR * (ptrdiff_t)((kc + VL) & ~(VL - 1)) * GEMM_NR : g->b + kb * g->ldb + n0 + j;
        p.ldb = g->w ? GEMM_NR : g->ldb;
        p.bias = g->bias && kb == 0 ? g->bias + n0 + j : NULL;
        p.c = g->c + row0 * g->ldc + n0 + j;
#ifdef __AVX512BF16__
        if (g->bf16) {
            p.a = (const float *)(const void *)(job->a16 + row0 * job->k16 + kb);
            p.a_row = job->k16 / 2;
            p.k = (kc + 1) / 2;
            panel_bf16(&p);
            continue;
        }
#endif
        ISA(gemm_panel)(&p);
    }
}

void ISA(gemm)(const struct kernel_run *run, const struct gemm *g)
{
    if (g->m <= 0)
        return;
    int threads = pool_threads(run->pool);
    struct job job = {.g = g, .panels = (g->n + GEMM_COLUMNS - 1) / GEMM_COLUMNS, .slice_rows = g->m};
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    if (g->w) {
        job.thread_bytes = gemm_thread_bytes(g->k);
        job.scratch = scratch_take(&next, end, job.thread_bytes * (size_t)threads);
    }
#ifdef __AVX512BF16__
    if (g->bf16) {
        struct convert c = {.g = g, .k16 = (g->k + 1) & ~1};
        c.a16 = scratch_take(&next, end, (size_t)g->m * (size_t)c.k16 * 2);
        job.a16 = c.a16;
        job.k16 = c.k16;
        pool_run(run->pool, (g->m + 63) / 64, convert_rows, &c);
    }
#endif
    /* Whole panels for as many rounds of all threads as there are; the panels left over are cut into slices of rows,
     * one a thread, so that none waits for the others. */
    job.whole = job.panels - job.panels % threads;
    job.slices = 1;
    if (job.whole < job.panels) {
        const int32_t most = (g->m + SLICE_ROWS_MIN - 1) / SLICE_ROWS_MIN;
        job.slices = threads < most ? threads : most;
        int32_t rows = (g->m + job.slices - 1) / job.slices;
        job.slice_rows = (rows + GEMM_ROWS - 1) / GEMM_ROWS * GEMM_ROWS;
        job.slices = (g->m + job.slice_rows - 1) / job.slice_rows;
    }
    const int items = job.whole + (job.panels - job.whole) * job.slices;
    /* Depth outside: the weights of one round stay in cache while all panels take their columns of them. */
    for (job.kb = 0; job.kb < g->k; job.kb += GEMM_DEPTH)
        pool_run(run->pool, items, gemm_item, &job);
}
