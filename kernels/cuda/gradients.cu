/*
 * Per-example LoRA gradients: one factor of one segment is Σ_t wide_tᵀ·thin_t, where thin has the rank's columns. What
 * it costs is reading wide once (2·T·width bytes in bfloat16; 2·T·width·rank FLOPs are far below what the tensor cores
 * do in that time up to rank 64).
 *
 * A block makes 64 columns of wide by RANKS of thin for one segment. Rows come in stages of 64 through a ring in shared
 * memory; of each stage four pairs of warps take 16 rows each, and the four sums are added in order at the end. So the
 * order of a sum depends on the row's place within its segment alone. A segment's last stage is filled up with zeros.
 *
 * The rank's columns may begin anywhere in their matrix: the 16-byte pieces that hold them are loaded whole, and the
 * columns before and behind become columns of the result that nobody stores.
 */
#include "kernels/cuda/blocks.h"
#include "kernels/cuda/internal.h"

#define THREADS 256
#define TILE 64  /* columns of wide in a block */
#define STAGE 64 /* rows in a stage */
#define SLICES 4 /* parts of a stage, each summed by itself */

/* A job as the kernels see it. */
struct gradient_part {
    const void *wide, *thin; /* thin: at the 16-byte piece that holds the first rank column */
    int32_t wide_stride, thin_stride;
    int32_t width, rank;
    int32_t shift;     /* columns between thin and the first of the rank */
    bool wide_is_left; /* the result is (width, rank); else (rank, width) */
    float scale;
    size_t offset;
};

struct gradient_parts {
    struct gradient_part part[GRADIENT_JOBS_MAX];
    int32_t count;
    const int32_t *offsets, *offsets_count;
    float *base;
    size_t stride;
};

/* The rows [first, last) of the block's segment; empty if there is none. */
DEVICE int32_t segment_rows(const gradient_parts &parts, int32_t segment, int32_t *ret_first)
{
    int32_t count = *parts.offsets_count;
    *ret_first = 0;
    if (parts.stride == 0)
        return parts.offsets[count];
    if (segment >= count)
        return 0;
    *ret_first = parts.offsets[segment];
    return parts.offsets[segment + 1] - *ret_first;
}

/* Where piece `piece` (8 values) of row t is in a tile of PIECES pieces a row: mixed so that 8 rows of one piece lie in
 * different banks. */
template <int PIECES> DEVICE int tile_at(int t, int piece)
{
    return (t * PIECES + (piece ^ (t / (8 / PIECES) & (PIECES - 1)))) * 8;
}

/* tile (STAGE, 8·PIECES) = rows [0, rows) of from, columns [column, ...) as far as there are any below width. */
template <int PIECES>
DEVICE void load_tile(bf16 *tile, const bf16 *from, int32_t stride, int32_t rows, int32_t column, int32_t width)
{
    for (int i = (int)threadIdx.x; i < STAGE * PIECES; i += THREADS) {
        int t = i / PIECES, piece = i % PIECES, at = column + piece * 8;
        bool there = t < rows && at < width;
        async_copy_16(tile + tile_at<PIECES>(t, piece), there ? from + (ptrdiff_t)t * stride + at : from,
                      there ? 16 : 0);
    }
}

template <int RANKS> struct gradient_memory {
    static const int stages = RANKS == 64 ? 5 : 6;
    static const int stage_values = STAGE * (TILE + RANKS);
    static const size_t bytes = (size_t)stages * stage_values * sizeof(bf16);
};

/* grid: (tiles of wide · jobs, segments, tiles of thin). */
template <int RANKS> TEMPLATE_KERNEL LAUNCH_BOUNDS(THREADS, 2) gradients_tiles(const gradient_parts parts)
{
    typedef gradient_memory<RANKS> memory;
    const int stages = memory::stages, pairs = RANKS / 16;
    DYNAMIC_SHARED(bf16, shared);
    const gradient_part &part = parts.part[blockIdx.x % (unsigned)parts.count];
    int32_t column = (int32_t)(blockIdx.x / (unsigned)parts.count) * TILE, thin_column = (int32_t)blockIdx.z * RANKS;
    int32_t thin_width = part.shift + part.rank, first, rows = segment_rows(parts, (int32_t)blockIdx.y, &first);
    if (column >= part.width || thin_column >= thin_width || rows == 0)
        return;

    const bf16 *wide = static_cast<const bf16 *>(part.wide) + (ptrdiff_t)first * part.wide_stride;
    const bf16 *thin = static_cast<const bf16 *>(part.thin) + (ptrdiff_t)first * part.thin_stride;
    int32_t steps = (rows + STAGE - 1) / STAGE;
    auto load = [&](int32_t step) {
        if (step < steps) {
            bf16 *tile = shared + step % stages * memory::stage_values;
            int32_t at = step * STAGE;
            load_tile<TILE / 8>(tile, wide + (ptrdiff_t)at * part.wide_stride, part.wide_stride, rows - at, column,
                                part.width);
            load_tile<RANKS / 8>(tile + STAGE * TILE, thin + (ptrdiff_t)at * part.thin_stride, part.thin_stride,
                                 rows - at, thin_column, thin_width);
        }
        async_commit();
    };

    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int half = warp % 2, slice = warp / 2; /* the warp's 32 columns of wide; its rows of a stage */
    int wide_t = slice * 16 + (lane & 7) + (lane >> 4) * 8, wide_piece = half * 4 + (lane >> 3 & 1);
    int thin_t = slice * 16 + (lane & 15), thin_piece = lane >> 4;
    float sum[2][pairs * 2][4] = {}; /* 16 columns of wide; 8 of thin; the fragment */

    for (int32_t step = 0; step < stages - 1; step++)
        load(step);
    for (int32_t step = 0; step < steps; step++) {
        async_wait<stages - 2>();
        block_sync();
        load(step + stages - 1);
        const bf16 *tile = shared + step % stages * memory::stage_values;
        uint32_t a[2][4];
        for (int i = 0; i < 2; i++)
            ldmatrix_x4_transposed(a[i], tile + tile_at<TILE / 8>(wide_t, wide_piece + i * 2));
        for (int j = 0; j < pairs; j++) {
            uint32_t b[4];
            ldmatrix_x4_transposed(b, tile + STAGE * TILE + tile_at<RANKS / 8>(thin_t, thin_piece + j * 2));
            for (int i = 0; i < 2; i++) {
                mma_16816(sum[i][j * 2], a[i], b);
                mma_16816(sum[i][j * 2 + 1], a[i], b + 2);
            }
        }
    }
    async_wait<0>();
    block_sync();

    /* The slices' sums side by side, rows of the result padded by 4 against bank conflicts. */
    bool by_width = part.wide_is_left;
    const int pitch_width = RANKS + 4, pitch_rank = TILE + 4;
    const int slice_values = TILE * pitch_width > RANKS * pitch_rank ? TILE * pitch_width : RANKS * pitch_rank;
    static_assert((size_t)SLICES * slice_values * sizeof(float) <= memory::bytes, "the ring's memory holds the sums");
    float *sums = reinterpret_cast<float *>(shared), *own = sums + slice * slice_values;
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < pairs * 2; j++) {
            for (int k = 0; k < 4; k++) {
                int n = half * 32 + i * 16 + lane / 4 + k / 2 * 8, r = j * 8 + lane % 4 * 2 + k % 2;
                own[by_width ? n * pitch_width + r : r * pitch_rank + n] = sum[i][j][k];
            }
        }
    }
    block_sync();
    float *to = parts.base + (size_t)blockIdx.y * parts.stride + part.offset;
    for (int i = (int)threadIdx.x; i < TILE * RANKS; i += THREADS) {
        int n = by_width ? i / RANKS : i % TILE, r = by_width ? i % RANKS : i / TILE;
        int32_t at = column + n, rank_at = thin_column + r - part.shift;
        if (at >= part.width || rank_at < 0 || rank_at >= part.rank)
            continue;
        const float *from = sums + (by_width ? n * pitch_width + r : r * pitch_rank + n);
        float total = from[0];
        for (int s = 1; s < SLICES; s++)
            total += from[s * slice_values];
        float *out = to + (by_width ? (size_t)at * part.rank + rank_at : (size_t)rank_at * part.width + at);
        *out = fmaf(part.scale, total, *out);
    }
}

/* The same in order of the rows, for float32 and for matrices whose rows are not aligned: a thread makes one column of
 * wide by 4 of thin. grid: (tiles of wide · jobs, segments, tiles of 16 of thin). */
template <typename T> TEMPLATE_KERNEL LAUNCH_BOUNDS(THREADS, 2) gradients_plain(const gradient_parts parts)
{
    const gradient_part &part = parts.part[blockIdx.x % (unsigned)parts.count];
    int32_t column = (int32_t)(blockIdx.x / (unsigned)parts.count) * TILE + (int32_t)threadIdx.x % TILE;
    int32_t rank_at = ((int32_t)blockIdx.z * (THREADS / TILE) + (int32_t)threadIdx.x / TILE) * 4;
    int32_t first, rows = segment_rows(parts, (int32_t)blockIdx.y, &first);
    if (column >= part.width || rank_at >= part.rank || rows == 0)
        return;
    const T *wide = static_cast<const T *>(part.wide) + (ptrdiff_t)first * part.wide_stride + column;
    const T *thin = static_cast<const T *>(part.thin) + (ptrdiff_t)first * part.thin_stride + part.shift + rank_at;
    float sum[4] = {};
#pragma unroll 4
    for (int32_t t = 0; t < rows; t++) {
        float value = load_float(wide + (ptrdiff_t)t * part.wide_stride);
        for (int r = 0; r < 4; r++) {
            if (rank_at + r < part.rank)
                sum[r] = fmaf(value, load_float(thin + (ptrdiff_t)t * part.thin_stride + r), sum[r]);
        }
    }
    float *to = parts.base + (size_t)blockIdx.y * parts.stride + part.offset;
    for (int r = 0; r < 4; r++) {
        if (rank_at + r < part.rank) {
            float *out = to + (part.wide_is_left ? (size_t)column * part.rank + rank_at + r
                                                 : (size_t)(rank_at + r) * part.width + column);
            *out = fmaf(part.scale, sum[r], *out);
        }
    }
}

/* --- the host's side -----------------------------------------------------------------------------------------------
 */

static bool aligned_rows(struct rows x)
{
    return (uintptr_t)x.at % 16 == 0 && x.stride % 8 == 0;
}

/* Can be read in whole pieces of 16 bytes. */
static bool suits_wide(enum tensor_type type, struct rows x, int32_t width)
{
    return type == TENSOR_BF16 && aligned_rows(x) && width % 8 == 0;
}

/* The wider factor is `wide`, unless only the other one can be. Returns whether the tiles' kernel can do it. */
static bool plan_job(enum tensor_type type, const struct gradient_job *job, struct gradient_part *ret_part)
{
    bool left_suits = suits_wide(type, job->left, job->left_width);
    bool right_suits = suits_wide(type, job->right, job->right_width);
    bool left = job->left_width >= job->right_width;
    if (left_suits != right_suits)
        left = left_suits;
    struct rows wide = left ? job->left : job->right, thin = left ? job->right : job->left;
    struct gradient_part part = {};
    part.wide = wide.at;
    part.thin = thin.at;
    part.wide_stride = wide.stride;
    part.thin_stride = thin.stride;
    part.width = left ? job->left_width : job->right_width;
    part.rank = left ? job->right_width : job->left_width;
    part.wide_is_left = left;
    part.scale = job->scale;
    part.offset = job->offset;
    bool tiles = (left_suits || right_suits) && thin.stride % 8 == 0;
    if (tiles) {
        part.shift = (int32_t)((uintptr_t)thin.at % 16 / sizeof(bf16));
        part.thin = static_cast<const bf16 *>(thin.at) - part.shift;
    }
    *ret_part = part;
    return tiles;
}

static int32_t ceil_divide(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

static dim3 grid_of(const struct gradient_parts *parts, int32_t segments_max, int32_t ranks)
{
    int32_t width = 0, thin = 0;
    for (int32_t i = 0; i < parts->count; i++) {
        const struct gradient_part *part = &parts->part[i];
        width = part->width > width ? part->width : width;
        thin = part->shift + part->rank > thin ? part->shift + part->rank : thin;
    }
    return dim3((unsigned)(ceil_divide(width, TILE) * parts->count), parts->stride ? (unsigned)segments_max : 1u,
                (unsigned)ceil_divide(thin, ranks));
}

template <int RANKS> static void launch_tiles(stream_t s, const struct gradient_parts *parts, int32_t segments_max)
{
    dim3 grid = grid_of(parts, segments_max, RANKS);
    auto kernel = gradients_tiles<RANKS>;
    LAUNCH(kernel, grid, THREADS, gradient_memory<RANKS>::bytes, s, *parts);
}

void gradients_add(stream_t s, enum tensor_type type, int32_t count, const struct gradient_job *jobs,
                   const int32_t *offsets, const int32_t *offsets_count, int32_t segments_max, float *base,
                   size_t stride)
{
    assert(count >= 0 && count <= GRADIENT_JOBS_MAX && (type == TENSOR_F32 || type == TENSOR_BF16));
    struct gradient_parts tiles = {}, plain = {};
    tiles.offsets = offsets;
    tiles.offsets_count = offsets_count;
    tiles.base = base;
    tiles.stride = stride;
    plain = tiles;
    int32_t thin = 0;
    for (int32_t i = 0; i < count; i++) {
        struct gradient_part part;
        bool suits = plan_job(type, &jobs[i], &part);
        if (part.width == 0 || part.rank == 0)
            continue;
        struct gradient_parts *parts = suits ? &tiles : &plain;
        parts->part[parts->count++] = part;
        if (suits && part.shift + part.rank > thin)
            thin = part.shift + part.rank;
    }
    if (segments_max <= 0)
        return;
    if (tiles.count && thin <= 16)
        launch_tiles<16>(s, &tiles, segments_max);
    else if (tiles.count && thin <= 32)
        launch_tiles<32>(s, &tiles, segments_max);
    else if (tiles.count)
        launch_tiles<64>(s, &tiles, segments_max);
    if (plain.count) {
        dim3 grid = grid_of(&plain, segments_max, THREADS / TILE * 4);
        auto kernel = type == TENSOR_F32 ? gradients_plain<float> : gradients_plain<bf16>;
        LAUNCH(kernel, grid, THREADS, 0, s, plain);
    }
}
