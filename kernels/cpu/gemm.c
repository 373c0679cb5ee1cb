/*
 * The blocked matrix product: an item is GEMM_COLUMNS columns of the result (times a slice of the rows if there are few
 * columns); it packs its panel of weights, decoding them on the fly, and runs a register-blocked kernel of GEMM_ROWS
 * rows by GEMM_VECS vectors over it. A is read in place, or rounded first (gemm.h). Partial tiles repeat the last row
 * and drop the copies, so each element is summed in one order everywhere.
 */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/interleave.h"

/* Fewer rows are not worth packing a panel of weights for. */
#define SLICE_ROWS_MIN 48
/* Cache lines of the next tile's rows of A to ask for; what follows them the hardware sees coming. */
#define ROW_AHEAD 2

struct job {
    const struct gemm *g;
    int32_t panels, whole;      /* of GEMM_COLUMNS columns; the first `whole` are one item each */
    int32_t slices, slice_rows; /* the others are cut into so many items of so many rows */
    int32_t kb;                 /* the depth that this round starts at */
    struct rounded_rows a;      /* if g->rounded */
    uint8_t *scratch;           /* thread t's buffers are at t·thread_bytes */
    size_t thread_bytes;
};

INLINE void micro_f32(const struct gemm_panel *g, int32_t row0, int height, int nv, bool masked)
{
    const float *a[GEMM_ROWS];
    tile_sums acc;
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
        int32_t row = row0 + i < g->m ? row0 + i : g->m - 1;
        a[i] = g->a + row * g->a_row;
        if (height == GEMM_ROWS) { /* where the next tile's row begins, and the result's lines */
            for (int j = 0; j < ROW_AHEAD; j++)
                _mm_prefetch((const char *)(a[i] + height * g->a_row + j * 16), _MM_HINT_T0);
            for (int j = 0; j < nv; j++)
                _mm_prefetch((const char *)(g->c + (row0 + i) * g->ldc + j * VL), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            acc[i][j] = vec_zero();
    }
    vmask mask = vec_mask(masked ? g->columns - (nv - 1) * VL : VL);
    const float *b = g->b;
    ptrdiff_t off = 0, a_k = g->a_k, ldb = g->ldb;
#pragma GCC unroll 2
    for (int32_t k = g->k; k > 0; k--) {
        vec bv[WIDE_VECS];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            bv[j] = masked && j == nv - 1 ? vec_load_mask(b + j * VL, mask) : vec_load(b + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
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
    if (height == GEMM_ROWS && g->thin_k > 0)
        add_thin(g, row0, nv, acc);
    store_tile(g, row0, height, nv, masked, acc);
}

INLINE void panel_f32(const struct gemm_panel *g, int height, int vecs)
{
    const int nv = g->columns == vecs * VL ? 0 : (g->columns + VL - 1) / VL;
    assert(g->columns <= vecs * VL);
    for (int32_t row = 0; row < g->m; row += height) {
        if (nv == 0)
            micro_f32(g, row, height, vecs, false);
        else if (nv == 1)
            micro_f32(g, row, height, 1, true);
        else if (nv == 2)
            micro_f32(g, row, height, 2, true);
#if WIDE_VECS == 4
        else if (nv == 3)
            micro_f32(g, row, height, 3, true);
        else if (vecs == 4)
            micro_f32(g, row, height, 4, true);
#endif
    }
}

void ISA(gemm_panel)(const struct gemm_panel *g)
{
    panel_f32(g, GEMM_ROWS, GEMM_VECS);
}

void ISA(gemm_panel_wide)(const struct gemm_panel *g)
{
    panel_f32(g, WIDE_ROWS, WIDE_VECS);
}

INLINE void turn_over(const float *src, ptrdiff_t stride, int32_t rows, int32_t k, float *panel, int32_t width)
{
    for (int32_t r = 0; r < width; r += VL) {
        int32_t left = rows - r < 0 ? 0 : rows - r < VL ? rows - r : VL;
        pack_rows(src + r * stride, stride, left, k, panel + r, width);
    }
}

void ISA(pack_transposed)(const float *src, ptrdiff_t stride, int32_t rows, int32_t k, float *panel)
{
    turn_over(src, stride, rows, k, panel, WIDE_NR);
}

/* Weights of rows n0.. and depth kb..kb+kc as panels (depth, GEMM_NR). */
static void pack_weights_transposed(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc,
                                    float *panel, float *tile)
{
    const ptrdiff_t panel_step = (ptrdiff_t)((kc + VL) & ~(VL - 1)) * GEMM_NR;
    const ptrdiff_t row_bytes = tensor_row(g->w, 1) - tensor_row(g->w, 0);
    for (int32_t r = 0; r < columns; r += VL) {
        int32_t rows = columns - r < VL ? columns - r : VL;
        float *dst = panel + r / GEMM_NR * panel_step + r % GEMM_NR;
        if (g->w->interleaved) {
            ISA(interleaved_panel)(g->w, n0 + r, (size_t)kb, (size_t)kc, dst, GEMM_NR);
            continue;
        }
        if (tensor_type_block(g->w->type) > 1) {
            ISA(dequantise_lanes)
            (g->w->type, tensor_row(g->w, n0 + r), row_bytes, rows, (size_t)kb, (size_t)kc, dst, GEMM_NR);
            continue;
        }
        for (int32_t k = 0; k < kc; k += GEMM_TILE) {
            int32_t length = kc - k < GEMM_TILE ? kc - k : GEMM_TILE;
            const ptrdiff_t stride = GEMM_TILE + 16;
            for (int32_t i = 0; i < rows; i++) {
                float *to = tile + i * stride;
                ISA(dequantise)(g->w->type, tensor_row(g->w, n0 + r + i), (size_t)(kb + k), (size_t)length, to);
            }
            pack_rows(tile, stride, rows, length, dst + (ptrdiff_t)k * GEMM_NR, GEMM_NR);
        }
    }
    /* Vectors of the last micro-panel that lie wholly beyond the columns are never read: the kernel is as narrow. */
}

static void pack_weights(const struct gemm *g, int32_t n0, int32_t columns, int32_t kb, int32_t kc, float *panel,
                         float *tile)
{
    ptrdiff_t panel_step = (ptrdiff_t)((kc + VL) & ~(VL - 1)) * GEMM_NR;
    memset(tile, 0, GEMM_COLUMNS * sizeof(float));
    const uint8_t *row = tensor_row(g->w, kb);
    const ptrdiff_t row_bytes = tensor_row(g->w, 1) - tensor_row(g->w, 0);
    if (GEMM_NR == GEMM_COLUMNS && columns == GEMM_COLUMNS) {
        ISA(dequantise_rows)(g->w->type, row, row_bytes, kc, (size_t)n0, GEMM_COLUMNS, panel, GEMM_NR);
        return;
    }
    for (int32_t k = 0; k < kc; k++, row += row_bytes) {
        ISA(dequantise)(g->w->type, row, (size_t)n0, (size_t)columns, tile);
        for (int32_t j = 0; j < GEMM_COLUMNS; j += VL)
            vec_store(panel + j / GEMM_NR * panel_step + (ptrdiff_t)k * GEMM_NR + j % GEMM_NR, vec_load(tile + j));
    }
}

/* Where a thread's panel of a thin product lies: behind its panel of weights. */
static float *low_panel(float *panel, int32_t k)
{
    return panel + (ptrdiff_t)((k < GEMM_DEPTH ? k : GEMM_DEPTH) + 32) * GEMM_COLUMNS;
}

/* The thin product's columns n0 .. n0+columns, scaled, as a panel (rank, GEMM_NR). */
static void pack_thin(const struct gemm *g, int32_t n0, int32_t columns, float *panel)
{
    const struct low_rank *low = g->low;
    const vec scale = vec_set(low->scale);
    if (g->transposed)
        turn_over(low->columns + (ptrdiff_t)n0 * low->rank, low->rank, columns, low->rank, panel, GEMM_NR);
    for (int32_t k = 0; k < low->rank; k++, panel += GEMM_NR) {
        const float *row = low->columns + (ptrdiff_t)k * g->n + n0;
        for (int32_t j = 0; j < columns; j += VL) {
            const vec x = g->transposed ? vec_load(panel + j) : vec_load_mask(row + j, vec_mask(columns - j));
            vec_store(panel + j, vec_mul(x, scale));
        }
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
    float *panel = tile + GEMM_TILE_FLOATS;
    int32_t kb = job->kb;
    int32_t kc = g->k - kb < GEMM_DEPTH ? g->k - kb : GEMM_DEPTH;
#ifdef GEMM_ROUNDED
    if (g->rounded)
        ISA(pack_rounded)(g, n0, columns, kb, kc, panel, tile);
    else
#endif
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
    if (!g->rounded)
        p.a = g->a + row0 * g->a_row + kb * g->a_k;
    if (g->low && kb + kc == g->k) {
        p.thin_k = g->low->rank;
        p.thin_a = g->low->rows + (ptrdiff_t)row0 * g->low->stride;
        p.thin_row = g->low->stride;
        p.thin_b = low_panel(panel, g->k);
    }
    for (int32_t j = 0; j < columns; j += GEMM_NR) {
        p.columns = columns - j < GEMM_NR ? columns - j : GEMM_NR;
        p.b = g->w ? panel + j / GEMM_NR * (ptrdiff_t)((kc + VL) & ~(VL - 1)) * GEMM_NR : g->b + kb * g->ldb + n0 + j;
        p.ldb = g->w ? GEMM_NR : g->ldb;
        p.bias = g->bias && kb == 0 ? g->bias + n0 + j : NULL;
        p.c = g->c + row0 * g->ldc + n0 + j;
        if (p.thin_k > 0)
            pack_thin(g, n0 + j, p.columns, low_panel(panel, g->k));
#ifdef GEMM_ROUNDED
        if (g->rounded) {
            ISA(panel_rounded)(&p, &job->a, row0, kb);
            continue;
        }
#endif
        ISA(gemm_panel)(&p);
    }
}

void ISA(gemm)(const struct kernel_run *run, const struct gemm *g)
{
    assert(!g->low || (g->w && g->alpha == 1 && g->low->rank <= GEMM_LOW_RANK_MAX));
    if (g->m <= 0)
        return;
    int threads = pool_threads(run->pool);
    struct job job = {.g = g, .panels = (g->n + GEMM_COLUMNS - 1) / GEMM_COLUMNS, .slice_rows = g->m};
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    if (g->w) {
        job.thread_bytes = gemm_thread_bytes(g->k);
        job.scratch = scratch_take(&next, end, job.thread_bytes * (size_t)threads);
    }
#ifdef GEMM_ROUNDED
    if (g->rounded)
        job.a = ISA(round_rows)(run, g, &next, end);
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
