/*
 * Causal attention backward in bfloat16. With p = exp(scale·q·k − lse), g = dL/do and delta = Σ g·o of a row:
 *
 *     dv = pᵀ·g      ds = p·(g·vᵀ − delta)      dq = scale·ds·k      dk = scale·dsᵀ·q
 *
 * in two kernels: dq by query tiles (3 products; it also makes delta), then dk and dv by key tiles (4 products). A
 * single kernel would need 5, but has to add to dq (or dk) from many blocks: with atomics the order, so the bits, would
 * change from run to run; in a fixed order it takes float partials of T/128 times dq's size. Seven products also leave
 * each kernel's sums in registers and need no shared memory between scores and sums: the second computes the transposed
 * scores, keys by queries, whose fragments are the next product's operand as they are.
 *
 * FLOPs: 14·T²/2·size a head and sequence, of which 10 are counted as useful; bytes: q, k, v, o, g, lse in, dq, dk, dv
 * out once, tiles of the other side from L2: 128 to 256 FLOPs a byte.
 *
 * Order of sums: tiles begin at the segment's first row. dk and dv of a row add up query heads in order and each one's
 * queries in order; where there are few kv heads, a block takes only some of a group's query heads, and the parts'
 * float sums are added in order by a last kernel. How many parts depends on the shape's heads only.
 */
#include "kernels/cuda/attention.h"

/* --- dq -------------------------------------------------------------------------------------------------------- */

template <int D, int M, int KEYS> struct backward_q_memory {
    static const int rows = 16 * M * ATTENTION_WARPS;
    static const size_t bytes = (size_t)(2 * rows + 4 * KEYS) * D * sizeof(bf16) + rows * sizeof(float);
};

/* s becomes ds (without the scale): s·scale2 − lse2 is the exponent, dp has delta taken off already. */
template <int M, int N>
DEVICE void score_gradients(float s[M][N][4], const float dp[M][N][4], const float lse2[M][2], float scale2)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n][e] = fast_exp2(fmaf(s[m][n][e], scale2, -lse2[m][e / 2])) * dp[m][n][e];
}

/* grid: (heads, list entries · blocks an entry). CHUNK keys of a tile at a time. */
template <int D, int M, int KEYS, int CHUNK>
TEMPLATE_KERNEL LAUNCH_BOUNDS(ATTENTION_THREADS, D == 64 ? 3 : 2) attention_backward_q(const struct attention_call c)
{
    const int ROWS = backward_q_memory<D, M, KEYS>::rows, N = CHUNK / 8;
    DYNAMIC_SHARED(bf16, qs);                                     /* (ROWS, D) */
    bf16 *gs = qs + ROWS * D;                                     /* (ROWS, D) */
    bf16 *ks = gs + ROWS * D;                                     /* (2 stages, KEYS, D) */
    bf16 *vs = ks + 2 * KEYS * D;                                 /* (2 stages, KEYS, D) */
    float *deltas = reinterpret_cast<float *>(vs + 2 * KEYS * D); /* (ROWS) */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, units = c.size / 8;
    int32_t head = (int32_t)blockIdx.x, kv_column = head / c.group * c.size;
    struct attention_block b;
    if (!attention_block_of<ROWS>(c.tiles, (int)blockIdx.y, &b))
        return;

    int32_t row0 = b.at + warp * 16 * M; /* of the warp */
    int32_t last = (min(b.at + ROWS, b.length) - 1) / KEYS, lowest = max(b.at - c.window + 1, 0) / KEYS;
    tile_load<D, ROWS>(qs, attention_at(c.q, b.first + b.at, head * c.size), c.q.stride, b.length - b.at, units);
    tile_load<D, ROWS>(gs, attention_at(c.g, b.first + b.at, head * c.size), c.g.stride, b.length - b.at, units);
    tile_load<D, KEYS>(ks, attention_at(c.k, b.first + last * KEYS, kv_column), c.k.stride, b.length - last * KEYS,
                       units);
    tile_load<D, KEYS>(vs, attention_at(c.v, b.first + last * KEYS, kv_column), c.v.stride, b.length - last * KEYS,
                       units);
    async_commit();

    float dq[M][D / 8][4], lse2[M][2], delta[M][2];
    float scale2 = c.scale * ATTENTION_LOG2E;
    warp_fill<M, D / 8>(dq, 0);
    make_deltas<D, M>(c, b, row0, head, deltas + warp * 16 * M);
    warp_sync();
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t r = 16 * m + 8 * half + lane / 4;
            bool there = row0 + r < b.length;
            lse2[m][half] = there ? c.lse[(ptrdiff_t)(b.first + row0 + r) * c.heads + head] * ATTENTION_LOG2E : 0;
            delta[m][half] = deltas[warp * 16 * M + r];
        }
    }
    int stage = 0;
    for (int32_t tile = last; tile >= lowest; tile--, stage ^= 1) {
        int32_t key0 = tile * KEYS, next = key0 - KEYS;
        async_wait<0>();
        block_sync(); /* all see this tile, and none still uses the one before, whose place the next takes */
        if (tile > lowest) {
            int at = (stage ^ 1) * KEYS * D;
            tile_load<D, KEYS>(ks + at, attention_at(c.k, b.first + next, kv_column), c.k.stride, KEYS, units);
            tile_load<D, KEYS>(vs + at, attention_at(c.v, b.first + next, kv_column), c.v.stride, KEYS, units);
            async_commit();
        }
#pragma unroll 1
        for (int chunk = 0; chunk < KEYS; chunk += CHUNK) {
            int32_t ahead = row0 - key0 - chunk;
            if (row0 >= b.length || ahead + 16 * M <= 0 || ahead - (CHUNK - 1) >= c.window)
                continue;
            int k_at = (2 * ROWS + stage * KEYS + chunk) * D, v_at = k_at + 2 * KEYS * D;
            float s[M][N][4], dp[M][N][4];
            warp_fill<M, N>(s, 0);
            warp_product_transposed<D, M, N>(s, qs, warp * 16 * M * D, k_at);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        dp[m][n][e] = -delta[m][e / 2];
            warp_product_transposed<D, M, N>(dp, qs, (ROWS + warp * 16 * M) * D, v_at);
            if (ahead < CHUNK - 1 || ahead + 16 * M - 1 >= c.window)
                mask_tile<M, N>(s, ahead, c.window, -INFINITY);
            score_gradients<M, N>(s, dp, lse2, scale2);
            warp_product<D, M, N>(dq, s, qs, k_at);
        }
    }

    if (row0 >= b.length)
        return;
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
        factor[m][0] = factor[m][1] = c.scale;
    tile_store<D, M>(qs, warp * 16 * M, dq, factor); /* its rows of q are this warp's alone */
    warp_sync();
    tile_write<D, M>(qs, warp * 16 * M, attention_at(c.dq, b.first + row0, head * c.size), c.dq.stride, b.length - row0,
                     units);
}

/* --- dk and dv ------------------------------------------------------------------------------------------------- */

template <int D, int M, int QUERIES, int MAKE> struct backward_kv_memory {
    static const int rows = 16 * M * ATTENTION_WARPS;
    static const int fixed_rows = MAKE & MAKE_DK ? 2 * rows : rows; /* keys, and values where dk is made */
    static const size_t bytes = (size_t)(fixed_rows + 4 * QUERIES) * D * sizeof(bf16) + 2 * 2 * QUERIES * sizeof(float);
};

/* Writes one of the gradients of the warp's keys. */
template <int D, int M>
DEVICE void write_gradient(const struct head_parts &parts, const struct attention_call &c,
                           const struct attention_block &b, int32_t key0, int32_t head, int32_t part, bool is_dv,
                           const float x[M][D / 8][4], float scale, bf16 *tile, int row)
{
    if (parts.work) {
        write_part<D, M>(parts, c, b, key0, head, part, is_dv, x, scale);
        return;
    }
    struct rows to = is_dv ? c.dv : c.dk;
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
        factor[m][0] = factor[m][1] = scale;
    tile_store<D, M>(tile, row, x, factor); /* its rows of keys and values are this warp's alone */
    warp_sync();
    tile_write<D, M>(tile, row, attention_at(to, b.first + key0, head * c.size), to.stride, b.length - key0,
                     c.size / 8);
}

/* grid: (parts, kv_heads, list entries · blocks an entry), of which the last entries, which are the first keys and seen
 * by most queries, go first. MAKE: MAKE_DK, MAKE_DV or both, as registers allow. */
template <int D, int M, int QUERIES, int CHUNK, int MAKE>
TEMPLATE_KERNEL LAUNCH_BOUNDS(ATTENTION_THREADS, 2)
    attention_backward_kv(const struct attention_call c, const struct head_parts parts)
{
    typedef backward_kv_memory<D, M, QUERIES, MAKE> memory;
    const int ROWS = memory::rows, N = CHUNK / 8;
    const bool DK = (MAKE & MAKE_DK) != 0, DV = (MAKE & MAKE_DV) != 0;
    DYNAMIC_SHARED(bf16, ks);                                      /* (ROWS, D) */
    bf16 *vs = ks + ROWS * D;                                      /* (ROWS, D), where DK */
    bf16 *qs = ks + memory::fixed_rows * D;                        /* (2 stages, QUERIES, D) */
    bf16 *gs = qs + 2 * QUERIES * D;                               /* (2 stages, QUERIES, D) */
    float *lses = reinterpret_cast<float *>(gs + 2 * QUERIES * D); /* (2 stages: lse·log2 e, delta; QUERIES) */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, units = c.size / 8;
    int32_t part = (int32_t)blockIdx.x, kv_head = (int32_t)blockIdx.y;
    struct attention_block b;
    if (!attention_block_of<ROWS>(c.tiles, (int)(gridDim.z - 1 - blockIdx.z), &b))
        return;

    int32_t key0 = b.at + warp * 16 * M; /* of the warp */
    int32_t head = kv_head * c.group + part * parts.each;
    int32_t head_end = min(head + parts.each, (kv_head + 1) * c.group);
    int32_t lowest = b.at / QUERIES, last = min(b.length - 1, b.at + ROWS - 1 + c.window - 1) / QUERIES;
    tile_load<D, ROWS>(ks, attention_at(c.k, b.first + b.at, kv_head * c.size), c.k.stride, b.length - b.at, units);
    if (DK)
        tile_load<D, ROWS>(vs, attention_at(c.v, b.first + b.at, kv_head * c.size), c.v.stride, b.length - b.at, units);

    /* The first QUERIES threads bring lse, as many after them delta. Queries behind the end: p = exp2(−∞) = 0. */
    int kind = (int)threadIdx.x / QUERIES, index = (int)threadIdx.x % QUERIES;
    auto load_row = [&](int32_t tile, int32_t of_head) {
        int32_t row = tile * QUERIES + index;
        ptrdiff_t at = (ptrdiff_t)(b.first + row) * c.heads + of_head;
        if (kind == 0)
            return row < b.length ? c.lse[at] * ATTENTION_LOG2E : INFINITY;
        return DK && kind == 1 && row < b.length ? c.delta[at] : 0.0f;
    };
    auto load_tiles = [&](int32_t tile, int32_t of_head, int to) {
        int32_t row = b.first + tile * QUERIES, valid = b.length - tile * QUERIES;
        tile_load<D, QUERIES>(qs + to * QUERIES * D, attention_at(c.q, row, of_head * c.size), c.q.stride, valid,
                              units);
        tile_load<D, QUERIES>(gs + to * QUERIES * D, attention_at(c.g, row, of_head * c.size), c.g.stride, valid,
                              units);
        async_commit();
    };

    float dk[M][DK ? D / 8 : 1][4], dv[M][DV ? D / 8 : 1][4];
    float scale2 = c.scale * ATTENTION_LOG2E;
    if constexpr (DK)
        warp_fill<M, D / 8>(dk, 0);
    if constexpr (DV)
        warp_fill<M, D / 8>(dv, 0);
    load_tiles(lowest, head, 0);
    if (kind < 2)
        lses[threadIdx.x] = load_row(lowest, head);

    int stage = 0;
    int32_t tile = lowest;
    while (head < head_end) {
        int32_t next = tile < last ? tile + 1 : lowest, next_head = tile < last ? head : head + 1;
        float next_row = 0;
        async_wait<0>();
        block_sync(); /* all see this tile, and none still uses the one before, whose place the next takes */
        if (next_head < head_end) {
            load_tiles(next, next_head, stage ^ 1);
            next_row = load_row(next, next_head);
        }
#pragma unroll 1
        for (int chunk = 0; chunk < QUERIES; chunk += CHUNK) {
            int32_t ahead = tile * QUERIES + chunk - key0; /* of the first query, to the first key */
            if (key0 >= b.length || ahead + CHUNK <= 0 || ahead - (16 * M - 1) >= c.window)
                continue;
            int q_at = (memory::fixed_rows + stage * QUERIES + chunk) * D, g_at = q_at + 2 * QUERIES * D;
            const float *lse = lses + stage * 2 * QUERIES + chunk + 2 * (lane % 4), *delta = lse + QUERIES;
            float p[M][N][4];
            warp_fill<M, N>(p, 0);
            warp_product_transposed<D, M, N>(p, ks, warp * 16 * M * D, q_at);
            if (ahead < 16 * M - 1 || ahead + CHUNK - 1 >= c.window)
                mask_tile_transposed<M, N>(p, ahead, c.window, -INFINITY);
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 l = *reinterpret_cast<const float2 *>(lse + 8 * n);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        p[m][n][e] = fast_exp2(fmaf(p[m][n][e], scale2, e % 2 ? -l.y : -l.x));
            }
            if constexpr (DV)
                warp_product<D, M, N>(dv, p, ks, g_at);
            if constexpr (DK) {
                float dp[M][N][4];
#pragma unroll
                for (int n = 0; n < N; n++) {
                    float2 d = *reinterpret_cast<const float2 *>(delta + 8 * n);
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            dp[m][n][e] = e % 2 ? -d.y : -d.x;
                }
                warp_product_transposed<D, M, N>(dp, ks, (ROWS + warp * 16 * M) * D, g_at);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < N; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            p[m][n][e] *= dp[m][n][e];
                warp_product<D, M, N>(dk, p, ks, q_at);
            }
        }
        if (kind < 2)
            lses[(stage ^ 1) * 2 * QUERIES + threadIdx.x] = next_row;
        stage ^= 1;
        tile = next;
        head = next_head;
    }

    if (key0 >= b.length)
        return;
    if constexpr (DV)
        write_gradient<D, M>(parts, c, b, key0, kv_head, part, true, dv, 1.0f, DK ? vs : ks, warp * 16 * M);
    if constexpr (DK)
        write_gradient<D, M>(parts, c, b, key0, kv_head, part, false, dk, c.scale, ks, warp * 16 * M);
}

/* dk and dv = the parts' sums, in order. grid: (8 parts of a list entry, list entries); a thread makes 4 values. */
KERNEL attention_add_parts(const struct attention_call c, const struct head_parts parts)
{
    const int ROWS = ATTENTION_TILE / 8;
    struct attention_tile tile = c.tiles[blockIdx.y];
    int32_t at = tile.at + (int32_t)blockIdx.x * ROWS, rows = min(ROWS, tile.length - at);
    int32_t quads = c.kv_heads * c.size / 4; /* of a row */
    for (int32_t i = (int32_t)threadIdx.x; i < 2 * rows * quads; i += ATTENTION_THREADS) {
        int32_t which = i / (rows * quads), row = tile.first + at + i / quads % rows, column = i % quads * 4;
        struct rows to = which ? c.dv : c.dk;
        const float *from = parts.work + ((ptrdiff_t)which * parts.rows + row) * c.kv_heads * parts.count * c.size +
                            column / c.size * parts.count * c.size + column % c.size;
        float4 sum = *reinterpret_cast<const float4 *>(from);
        for (int32_t p = 1; p < parts.count; p++) {
            float4 x = *reinterpret_cast<const float4 *>(from + p * c.size);
            sum.x += x.x;
            sum.y += x.y;
            sum.z += x.z;
            sum.w += x.w;
        }
        *reinterpret_cast<uint2 *>(attention_at(to, row, column)) =
            make_uint2(bf16_pack(sum.x, sum.y), bf16_pack(sum.z, sum.w));
    }
}

/* --- launching ------------------------------------------------------------------------------------------------- */

template <int D, int M, int KEYS, int CHUNK>
static void launch_backward_q(stream_t s, const struct attention_call *c, int32_t tiles)
{
    typedef backward_q_memory<D, M, KEYS> memory;
    auto kernel = attention_backward_q<D, M, KEYS, CHUNK>;
    dim3 grid((unsigned)c->heads, (unsigned)(tiles * (ATTENTION_TILE / memory::rows)));
    LAUNCH(kernel, grid, ATTENTION_THREADS, memory::bytes, s, *c);
}

template <int D, int M, int QUERIES, int CHUNK, int MAKE>
static void launch_backward_kv(stream_t s, const struct attention_call *c, int32_t tiles,
                               const struct head_parts *parts)
{
    typedef backward_kv_memory<D, M, QUERIES, MAKE> memory;
    auto kernel = attention_backward_kv<D, M, QUERIES, CHUNK, MAKE>;
    dim3 grid((unsigned)parts->count, (unsigned)c->kv_heads, (unsigned)(tiles * (ATTENTION_TILE / memory::rows)));
    LAUNCH(kernel, grid, ATTENTION_THREADS, memory::bytes, s, *c, *parts);
}

size_t attention_backward_work(enum tensor_type type, const struct attention_shape *shape, int32_t rows_max)
{
    struct attention_call c = attention_call_of(shape, NULL);
    struct head_parts parts;
    divide_heads(&c, &parts);
    if (type != TENSOR_BF16 || parts.count == 1)
        return 0;
    return 2 * sizeof(float) * (size_t)rows_max * (size_t)c.kv_heads * (size_t)parts.count * (size_t)c.size;
}

void attention_backward(stream_t s, enum tensor_type type, const struct attention_shape *shape,
                        const struct attention_tile *tiles, int32_t tiles_max, int32_t m, struct rows q, struct rows k,
                        struct rows v, struct rows o, const float *lse, struct rows do_, struct rows dq, struct rows dk,
                        struct rows dv, float *delta, void *work)
{
    struct attention_call c = attention_call_of(shape, tiles);
    struct head_parts parts;
    c.q = q;
    c.k = k;
    c.v = v;
    c.o = o;
    c.g = do_;
    c.dq = dq;
    c.dk = dk;
    c.dv = dv;
    c.lse = const_cast<float *>(lse);
    c.delta = delta;
    if (tiles_max == 0)
        return;
    if (type != TENSOR_BF16) {
        attention_plain_backward(s, &c, tiles_max);
        return;
    }
    divide_heads(&c, &parts);
    if (parts.count > 1) {
        assert(work);
        parts.work = static_cast<float *>(work);
        parts.rows = m;
    }
    if (attention_has_wgmma()) {
        attention_wgmma_backward(s, &c, &parts, tiles_max);
    } else if (c.size <= 64) {
        launch_backward_q<64, 2, 64, 32>(s, &c, tiles_max);
        launch_backward_kv<64, 2, 64, 32, MAKE_DK | MAKE_DV>(s, &c, tiles_max, &parts);
    } else if (c.size <= 128) {
        launch_backward_q<128, 2, 32, 32>(s, &c, tiles_max);
        launch_backward_kv<128, 1, 64, 64, MAKE_DK | MAKE_DV>(s, &c, tiles_max, &parts);
    } else { /* both sums of 256 columns are more than the registers hold */
        launch_backward_q<256, 1, 16, 16>(s, &c, tiles_max);
        launch_backward_kv<256, 1, 16, 16, MAKE_DV>(s, &c, tiles_max, &parts);
        launch_backward_kv<256, 1, 16, 16, MAKE_DK>(s, &c, tiles_max, &parts);
    }
    if (parts.work) {
        dim3 grid(8, (unsigned)tiles_max);
        LAUNCH(attention_add_parts, grid, ATTENTION_THREADS, 0, s, c, parts);
    }
}
