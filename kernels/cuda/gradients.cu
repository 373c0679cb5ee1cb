/*
 * Per-example LoRA gradients: one factor of one segment is Σ_t wide_tᵀ·thin_t, where thin has the rank's columns. What
 * it costs is reading wide once (2·T·width bytes in bfloat16; 2·T·width·rank FLOPs are far below what the tensor cores
 * do in that time up to rank 64).
 *
 * A block makes 64 columns of wide by up to 64 of thin for one segment. Rows come in stages of ROWS, which its warps
 * take in turn: warp w takes stages w, w + SLICES, ... and sums them in registers, from a ring of its own in shared
 * memory, so that no warp waits for another. The warps' sums are added in their order at the end. So the order of a sum
 * depends on the row's place within its segment alone. A segment's last stage is filled up with zeros.
 *
 * Results are written, not added: nothing has to be zeroed before, and a segment without rows gets zeros.
 *
 * The rank's columns may begin anywhere in their matrix: the 16-byte pieces that hold them are loaded whole, and the
 * columns before and behind become columns of the result that nobody stores.
 */
#include "kernels/cuda/blocks.h"
#include "kernels/cuda/internal.h"

#define TILE 64     /* columns of wide in a block */
#define ROWS 16     /* in a stage */
#define SLICES 4    /* warps of a block */
#define THREADS 256 /* of the plain kernel */

/* Chosen so that an SM has 12 to 16 warps, each with 8 KB of wide under way. */
template <int PAIRS> constexpr int STAGES = PAIRS == 4 ? 4 : 5;

template <int PAIRS> constexpr int BLOCKS = PAIRS == 1 ? 4 : PAIRS == 4 ? 2 : 3;

/* A job as the kernels see it. */
struct gradient_part {
    const void *wide, *thin; /* thin: at the 16-byte piece that holds the first rank column */
    int32_t wide_stride, thin_stride;
    int32_t width, rank;
    int32_t shift;        /* columns between thin and the first of the rank */
    int32_t pairs;        /* thin is done in tiles of 16·pairs columns */
    int32_t first, tiles; /* blocks: the job's first of all, and for one tile of thin */
    bool wide_is_left;    /* the result is (width, rank); else (rank, width) */
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

/* The rows [first, first + result) of the block's segment; −1 if there is no such segment. */
DEVICE int32_t segment_rows(const gradient_parts &parts, int32_t segment, int32_t *ret_first)
{
    int32_t count = *parts.offsets_count;
    *ret_first = 0;
    if (parts.stride == 0)
        return parts.offsets[count];
    if (segment >= count)
        return -1;
    *ret_first = parts.offsets[segment];
    return parts.offsets[segment + 1] - *ret_first;
}

/* Sums of 64 columns of wide and 16·PAIRS of thin in a warp: [8 columns][16 of thin][the fragment of thinᵀ·wide]. */
template <int PAIRS> struct tile_sums {
    float at[8][PAIRS][4];
};
/* Which columns a lane's sums are: lane/4 = g, lane%4 = q. */
DEVICE int sum_half(int j, int)
{
    return j / 4;
}

DEVICE int sum_column(int q, int j, int c) /* within its half */
{
    return j % 4 * 8 + q * 2 + c % 2;
}

template <int PAIRS> DEVICE int sum_rank(int g, int p, int c)
{
    return p * 16 + c / 2 * 8 + g;
}

/* Where piece `piece` (8 values) of row t is in a tile of PIECES pieces a row: mixed so that 8 rows of one piece lie in
 * different banks (of 6 pieces: in half of them). */
template <int PIECES> DEVICE int tile_at(int t, int piece)
{
    if constexpr (PIECES == 6)
        return (t * PIECES + piece) * 8;
    else
        return (t * PIECES + (piece ^ (t / (8 / PIECES) & (PIECES - 1)))) * 8;
}

template <int PAIRS> constexpr int STAGE_VALUES = (64 + 16 * PAIRS) * ROWS;
template <int PAIRS> constexpr size_t RING_BYTES = (size_t)SLICES *STAGES<PAIRS> *STAGE_VALUES<PAIRS> * sizeof(bf16);

/* The warp's sums over stages slice, slice + SLICES, ... of ROWS rows. thin_width: columns from thin on. ring: the
 * block's; each warp has its own part, so that only warps wait. */
template <int PAIRS>
DEVICE void sum_rows(const gradient_part &part, const bf16 *wide, const bf16 *thin, int32_t rows, int32_t column,
                     int32_t thin_width, int slice, bf16 *ring, tile_sums<PAIRS> &sums)
{
    const int pieces = PAIRS * 2, stages = STAGES<PAIRS>;
    int lane = (int)threadIdx.x % WARP;
    ring += (int)threadIdx.x / WARP * stages * STAGE_VALUES<PAIRS>;
    const int32_t wide_stride = part.wide_stride, thin_stride = part.thin_stride;
    int32_t at = column + lane % 8 * 8, first = slice * ROWS;
    wide += at < part.width ? at : part.width - 8; /* columns past the end are summed and not stored */
    wide += (ptrdiff_t)(first + lane / 8) * wide_stride;
    thin += (ptrdiff_t)first * thin_stride;
    const ptrdiff_t wide_step = (ptrdiff_t)SLICES * ROWS * wide_stride;
    const ptrdiff_t thin_step = (ptrdiff_t)SLICES * ROWS * thin_stride;

    int32_t left = rows - first; /* rows from the next stage to load on */
    auto load = [&](int stage) {
        bf16 *tile = ring + stage * STAGE_VALUES<PAIRS>;
        if (left > 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int t = lane / 8 + i * 4;
                async_copy_16(tile + tile_at<8>(t, lane % 8), t < left ? wide + (ptrdiff_t)(i * 4) * wide_stride : wide,
                              t < left ? 16 : 0);
            }
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                int t = (i * WARP + lane) / pieces, piece = (i * WARP + lane) % pieces;
                bool there = t < left && piece * 8 < thin_width;
                async_copy_16(tile + ROWS * 64 + tile_at<pieces>(t, piece),
                              there ? thin + (ptrdiff_t)t * thin_stride + piece * 8 : thin, there ? 16 : 0);
            }
            left -= SLICES * ROWS;
            wide += wide_step;
            thin += thin_step;
        }
        async_commit();
    };
#pragma unroll
    for (int d = 0; d < stages - 1; d++)
        load(d);
    int stage = 0;
    for (int32_t t0 = first; t0 < rows; t0 += SLICES * ROWS) {
        async_wait<stages - 2>();
        warp_sync();
        load(stage == 0 ? stages - 1 : stage - 1);
        const bf16 *tile = ring + stage * STAGE_VALUES<PAIRS>;
        stage = stage == stages - 1 ? 0 : stage + 1;
        uint32_t a[PAIRS][4];
        for (int p = 0; p < PAIRS; p++)
            ldmatrix_x4_transposed(a[p], tile + ROWS * 64 +
                                             tile_at<pieces>((lane & 7) + (lane >> 4) * 8, p * 2 + (lane >> 3 & 1)));
        for (int i = 0; i < 4; i++) {
            uint32_t b[4];
            ldmatrix_x4_transposed(b, tile + tile_at<8>(lane & 15, i * 2 + (lane >> 4)));
            for (int p = 0; p < PAIRS; p++) {
                mma_16816(sums.at[i * 2][p], a[p], b);
                mma_16816(sums.at[i * 2 + 1][p], a[p], b + 2);
            }
        }
    }
    async_wait<0>();
    block_sync();
}

/* Sums of a half of the tile in shared memory; rows padded against bank conflicts. */
template <int PAIRS> constexpr int BY_WIDTH_PITCH = 16 * PAIRS + 1;
constexpr int BY_RANK_PITCH = 33;
template <int PAIRS>
constexpr int SLICE_VALUES =
    32 * BY_WIDTH_PITCH<PAIRS> > 16 * PAIRS *BY_RANK_PITCH ? 32 * BY_WIDTH_PITCH<PAIRS> : 16 * PAIRS *BY_RANK_PITCH;

template <int PAIRS> constexpr size_t tile_bytes()
{
    const size_t sums = (size_t)SLICES * SLICE_VALUES<PAIRS> * sizeof(float);
    const size_t own = RING_BYTES<PAIRS> > sums ? RING_BYTES<PAIRS> : sums;
    if constexpr (PAIRS == 1)
        return own;
    else
        return own > tile_bytes<PAIRS - 1>() ? own : tile_bytes<PAIRS - 1>();
}

template <int PAIRS> DEVICE void sum_tile(const gradient_parts &parts, const gradient_part &part, void *shared)
{
    const int ranks = PAIRS * 16, count = ranks / SLICES; /* values of a half that a thread stores */
    static_assert(ranks % SLICES == 0, "each thread stores the same number of values");
    int32_t item = (int32_t)blockIdx.x - part.first, first, rows = segment_rows(parts, (int32_t)blockIdx.y, &first);
    if (rows < 0)
        return;
    int lane = (int)threadIdx.x % WARP, slice = (int)threadIdx.x / WARP;
    int32_t column = item % part.tiles * 64, thin_column = item / part.tiles * ranks;
    const bf16 *wide = static_cast<const bf16 *>(part.wide) + (ptrdiff_t)first * part.wide_stride;
    const bf16 *thin = static_cast<const bf16 *>(part.thin) + (ptrdiff_t)first * part.thin_stride + thin_column;
    tile_sums<PAIRS> sums = {};
    sum_rows<PAIRS>(part, wide, thin, rows, column, part.shift + part.rank - thin_column, slice,
                    static_cast<bf16 *>(shared), sums);

    bool by_width = part.wide_is_left;
    float *to = parts.base + (size_t)blockIdx.y * parts.stride + part.offset;
    /* Where the thread's value k is in the result; NULL: nowhere. */
    auto place = [&](int half, int k) {
        int i = k * SLICES * WARP + (int)threadIdx.x;
        int32_t n = column + half * 32 + (by_width ? i / ranks : i % 32);
        int32_t r = thin_column - part.shift + (by_width ? i % ranks : i / 32);
        if (n >= part.width || r < 0 || r >= part.rank)
            return static_cast<float *>(NULL);
        return to + (by_width ? (size_t)n * part.rank + r : (size_t)r * part.width + n);
    };
    float *tile = static_cast<float *>(shared);
    float *own = tile + slice * SLICE_VALUES<PAIRS>;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (int j = 0; j < 8; j++) {
            for (int p = 0; p < PAIRS; p++) {
                for (int c = 0; c < 4; c++) {
                    int n = sum_column(lane % 4, j, c), r = sum_rank<PAIRS>(lane / 4, p, c);
                    if (sum_half(j, c) == half)
                        own[by_width ? n * BY_WIDTH_PITCH<PAIRS> + r : r * BY_RANK_PITCH + n] = sums.at[j][p][c];
                }
            }
        }
        block_sync();
#pragma unroll
        for (int k = 0; k < count; k++) {
            int i = k * SLICES * WARP + (int)threadIdx.x;
            const float *from =
                tile + (by_width ? i / ranks * BY_WIDTH_PITCH<PAIRS> + i % ranks : i / 32 * BY_RANK_PITCH + i % 32);
            float total = from[0];
            for (int s = 1; s < SLICES; s++)
                total += from[s * SLICE_VALUES<PAIRS>];
            float *at = place(half, k);
            if (at)
                *at = part.scale * total;
        }
        if (half == 0)
            block_sync();
    }
}

/* grid: (items, segments). MOST: the largest of the jobs' pairs. */
template <int MOST>
TEMPLATE_KERNEL LAUNCH_BOUNDS(SLICES *WARP, BLOCKS<MOST>) gradients_tiles(const gradient_parts parts)
{
    DYNAMIC_SHARED(float, shared);
    int32_t job = 0;
    while (job + 1 < parts.count && (int32_t)blockIdx.x >= parts.part[job + 1].first)
        job++;
    const gradient_part &part = parts.part[job];
    if (MOST == 1 || part.pairs == 1)
        sum_tile<1>(parts, part, shared);
    else if (MOST == 2 || part.pairs == 2)
        sum_tile<(MOST < 2 ? 1 : 2)>(parts, part, shared);
    else if (MOST == 3 || part.pairs == 3)
        sum_tile<(MOST < 3 ? 1 : 3)>(parts, part, shared);
    else
        sum_tile<(MOST < 4 ? 1 : 4)>(parts, part, shared);
}

/* The same in order of the rows, for float32 and for matrices whose rows are not aligned: a thread makes one column of
 * wide by 4 of thin. grid: (tiles of wide · jobs, segments, tiles of 16 of thin). */
template <typename T> TEMPLATE_KERNEL LAUNCH_BOUNDS(THREADS, 2) gradients_plain(const gradient_parts parts)
{
    const gradient_part &part = parts.part[blockIdx.x % (unsigned)parts.count];
    int32_t column = (int32_t)(blockIdx.x / (unsigned)parts.count) * TILE + (int32_t)threadIdx.x % TILE;
    int32_t rank_at = ((int32_t)blockIdx.z * (THREADS / TILE) + (int32_t)threadIdx.x / TILE) * 4;
    int32_t first, rows = segment_rows(parts, (int32_t)blockIdx.y, &first);
    if (column >= part.width || rank_at >= part.rank || rows < 0)
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
            *out = part.scale * sum[r];
        }
    }
}

/* --- the host's side --------------------------------------------------------------------------------------------- */

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

static dim3 grid_of(const struct gradient_parts *parts, int32_t segments_max)
{
    int32_t width = 0, thin = 0;
    for (int32_t i = 0; i < parts->count; i++) {
        const struct gradient_part *part = &parts->part[i];
        width = part->width > width ? part->width : width;
        thin = part->rank > thin ? part->rank : thin;
    }
    return dim3((unsigned)(ceil_divide(width, TILE) * parts->count), parts->stride ? (unsigned)segments_max : 1u,
                (unsigned)ceil_divide(thin, THREADS / TILE * 4));
}

template <int MOST> static void launch_tiles(stream_t s, struct gradient_parts *parts, int32_t segments_max)
{
    int32_t items = 0;
    for (int32_t i = 0; i < parts->count; i++) {
        struct gradient_part *part = &parts->part[i];
        part->first = items;
        part->tiles = ceil_divide(part->width, TILE);
        items += part->tiles * ceil_divide(part->shift + part->rank, part->pairs * 16);
    }
    dim3 grid((unsigned)items, parts->stride ? (unsigned)segments_max : 1u);
    auto kernel = gradients_tiles<MOST>;
    LAUNCH(kernel, grid, SLICES * WARP, tile_bytes<MOST>(), s, *parts);
}

/* Adds a job behind those of at least its pairs: the longest blocks start first. */
static void list_part(struct gradient_parts *parts, struct gradient_part part)
{
    int32_t i = parts->count++;
    for (; i > 0 && parts->part[i - 1].pairs < part.pairs; i--)
        parts->part[i] = parts->part[i - 1];
    parts->part[i] = part;
}

void gradients_write(stream_t s, enum tensor_type type, int32_t count, const struct gradient_job *jobs,
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
    for (int32_t i = 0; i < count; i++) {
        struct gradient_part part;
        bool suits = plan_job(type, &jobs[i], &part);
        if (part.width == 0 || part.rank == 0)
            continue;
        int32_t pairs = ceil_divide(part.shift + part.rank, 16);
        part.pairs = pairs < 4 ? pairs : 4;
        list_part(suits ? &tiles : &plain, part);
    }
    if (segments_max <= 0)
        return;
    if (tiles.count) {
        int32_t most = tiles.part[0].pairs;
        auto launch = most == 1   ? launch_tiles<1>
                      : most == 2 ? launch_tiles<2>
                      : most == 3 ? launch_tiles<3>
                                  : launch_tiles<4>;
        launch(s, &tiles, segments_max);
    }
    if (plain.count) {
        dim3 grid = grid_of(&plain, segments_max);
        auto kernel = type == TENSOR_F32 ? gradients_plain<float> : gradients_plain<bf16>;
        LAUNCH(kernel, grid, THREADS, 0, s, plain);
    }
}
