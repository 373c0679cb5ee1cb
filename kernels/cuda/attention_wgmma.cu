/*
 * Causal attention in bfloat16 for compute capability 9.0, whose tensor cores reach their full rate only by products of
 * groups of four warps that read shared memory themselves. Otherwise as attention_forward.cu and attention_backward.cu,
 * where the formulas, FLOPs and bytes are: the same blocks, tiles and kernels.
 *
 * A warp executes 64 instructions where mma_16816 needs thousands, and no operand but the probabilities goes through
 * registers; what is left of the time is the exponentials and waiting. So blocks are few and small enough that two to
 * four fit on a multiprocessor and fill each other's gaps, as far as 256 columns let them.
 *
 * A row's bits do not depend on what else is in the batch: tiles begin at the segment's first row; a group's 64 rows,
 * and so the tiles it takes and masks, depend on the row's place in its segment; a product of 64 rows sums up each row
 * by itself, in the hardware's fixed order; rows and terms behind the segment's end are zeros; and where a branch looks
 * at a whole warp (scaling old sums) it leaves out what would multiply by 1.
 */
#include "kernels/cuda/attention_wgmma.h"

/* --- forward ----------------------------------------------------------------------------------------------------- */

template <int D, int GROUPS, int KEYS> struct wgmma_forward_memory {
    static const int rows = GROUP_ROWS * GROUPS;
    static const size_t bytes = (size_t)(rows + 4 * KEYS) * D * sizeof(bf16);
};

/* Scores become exponentials; the rows' largest scores and sums follow. factor: what older sums are to be scaled by. */
template <int KEYS>
DEVICE void softmax_tile(float (&s)[KEYS / 8][4], float (&top)[2], float (&sum)[2], float (&factor)[2], float scale2)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float now = top[half], now2 = now, part = 0, part2 = 0; /* two chains each */
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            now = fmaxf(now, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            now2 = fmaxf(now2, fmaxf(s[n + 1][2 * half], s[n + 1][2 * half + 1]));
        }
        now = fmaxf(now, now2);
        now = fmaxf(now, shuffle_xor(now, 1));
        now = fmaxf(now, shuffle_xor(now, 2));
        float base = now * scale2;
        factor[half] = fast_exp2(top[half] * scale2 - base);
        top[half] = now;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            s[n][2 * half] = fast_exp2(fmaf(s[n][2 * half], scale2, -base));
            s[n][2 * half + 1] = fast_exp2(fmaf(s[n][2 * half + 1], scale2, -base));
            part += s[n][2 * half];
            part2 += s[n][2 * half + 1];
        }
        sum[half] = sum[half] * factor[half] + (part + part2);
    }
}

template <int D> DEVICE void scale_sums(float (&o)[D / 8][4], const float (&factor)[2])
{
    if (!warp_any(factor[0] != 1 || factor[1] != 1)) /* rare after the first tiles */
        return;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        o[n][0] *= factor[0];
        o[n][1] *= factor[0];
        o[n][2] *= factor[1];
        o[n][3] *= factor[1];
    }
}

/* grid: (heads, list entries · blocks an entry). BLOCKS: on a multiprocessor. */
template <int D, int GROUPS, int KEYS, int BLOCKS>
TEMPLATE_KERNEL LAUNCH_BOUNDS(GROUPS *GROUP_THREADS, BLOCKS) wgmma_forward(const struct attention_call c)
{
#if HAVE_WGMMA
    const int ROWS = GROUP_ROWS * GROUPS, THREADS = GROUP_THREADS * GROUPS;
    DYNAMIC_SHARED(bf16, qs);     /* (ROWS, D) */
    bf16 *ks = qs + ROWS * D;     /* (2 stages, KEYS, D) */
    bf16 *vs = ks + 2 * KEYS * D; /* (2 stages, KEYS, D) */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, units = c.size / 8;
    int group = group_of_thread(), mine = group * GROUP_ROWS + warp % WARP_GROUP * 16; /* the warp's first row */
    int32_t head = (int32_t)blockIdx.x, kv_column = head / c.group * c.size;
    struct attention_block b;
    if (!attention_block_of<ROWS>(c.tiles, (int)blockIdx.y, &b))
        return;

    int32_t group0 = b.at + group * GROUP_ROWS, row0 = b.at + mine;
    int32_t last = (min(b.at + ROWS, b.length) - 1) / KEYS, lowest = max(b.at - c.window + 1, 0) / KEYS;
    int32_t my_last = min(last, (group0 + GROUP_ROWS - 1) / KEYS), my_lowest = max(group0 - c.window + 1, 0) / KEYS;
    if (group0 >= b.length)
        my_last = my_lowest - 1; /* no tiles */
    auto load_tiles = [&](int32_t tile) {
        int32_t row = b.first + tile * KEYS, valid = b.length - tile * KEYS, to = tile & 1;
        panels_load<D, KEYS, THREADS>(ks + to * KEYS * D, attention_at(c.k, row, kv_column), c.k.stride, valid, units);
        panels_load<D, KEYS, THREADS>(vs + to * KEYS * D, attention_at(c.v, row, kv_column), c.v.stride, valid, units);
        async_commit();
    };
    panels_load<D, ROWS, THREADS>(qs, attention_at(c.q, b.first + b.at, head * c.size), c.q.stride, b.length - b.at,
                                  units);
    load_tiles(last);

    float o[D / 8][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, factor[2];
    uint32_t p[KEYS / 16][4];
    float scale2 = c.scale * ATTENTION_LOG2E;
    warp_fill<1, D / 8>(&o, 0);
    auto arrive = [&](int32_t tile) {
        async_wait<0>();
        proxy_fence();
        block_sync(); /* all see this tile, and none still uses the one before, whose place the next takes */
        if (tile > lowest)
            load_tiles(tile - 1);
    };
    int32_t tile = last; /* a loop without a condition in it: with one, ptxas is short of registers */
    for (; tile > max(my_last, my_lowest - 1); tile--)
        arrive(tile);
    for (; tile >= my_lowest; tile--) {
        arrive(tile);
        int32_t ahead = group0 - tile * KEYS;
        float s[KEYS / 8][4];
        wgmma_fence();
        group_scores<D, KEYS, ROWS, KEYS>(s, qs + group * GROUP_ROWS * 64, ks + (tile & 1) * KEYS * D);
        wgmma_commit();
        wgmma_wait<0>(s);
        if (ahead < KEYS - 1 || ahead + GROUP_ROWS - 1 >= c.window)
            mask_tile<1, KEYS / 8>(&s, row0 - tile * KEYS, c.window, -INFINITY);
        softmax_tile<KEYS>(s, top, sum, factor, scale2);
        scale_sums<D>(o, factor);
        group_pack<KEYS>(p, s);
        wgmma_fence(o, p);
        group_sums<D, KEYS>(o, p, vs + (tile & 1) * KEYS * D);
        wgmma_commit();
        wgmma_wait<0>(o);
    }
    for (; tile >= lowest; tile--)
        arrive(tile);

    block_sync(); /* none still uses q, whose place o takes */
    if (row0 >= b.length)
        return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int32_t row = row0 + lane / 4 + 8 * half;
        float all = sum[half];
        all += shuffle_xor(all, 1);
        all += shuffle_xor(all, 2);
        factor[half] = 1.0f / all;
        if (c.lse && lane % 4 == 0 && row < b.length)
            c.lse[(ptrdiff_t)(b.first + row) * c.heads + head] = top[half] * c.scale + logf(all);
    }
    panels_write<D, ROWS>(qs, mine, o, factor, attention_at(c.o, b.first + row0, head * c.size), c.o.stride,
                          b.length - row0, units);
#else
    (void)c;
    trap();
#endif
}

/* --- dq ---------------------------------------------------------------------------------------------------------- */

template <int D, int GROUPS, int KEYS> struct wgmma_q_memory {
    static const int rows = GROUP_ROWS * GROUPS;
    static const size_t bytes = (size_t)(2 * rows + 4 * KEYS) * D * sizeof(bf16) + rows * sizeof(float);
};

/* grid: (heads, list entries · blocks an entry) */
template <int D, int GROUPS, int KEYS, int BLOCKS>
TEMPLATE_KERNEL LAUNCH_BOUNDS(GROUPS *GROUP_THREADS, BLOCKS) wgmma_backward_q(const struct attention_call c)
{
#if HAVE_WGMMA
    const int ROWS = GROUP_ROWS * GROUPS, THREADS = GROUP_THREADS * GROUPS, N = KEYS / 8;
    DYNAMIC_SHARED(bf16, qs);                                     /* (ROWS, D) */
    bf16 *gs = qs + ROWS * D;                                     /* (ROWS, D) */
    bf16 *ks = gs + ROWS * D;                                     /* (2 stages, KEYS, D) */
    bf16 *vs = ks + 2 * KEYS * D;                                 /* (2 stages, KEYS, D) */
    float *deltas = reinterpret_cast<float *>(vs + 2 * KEYS * D); /* (ROWS) */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, units = c.size / 8;
    int group = group_of_thread(), mine = group * GROUP_ROWS + warp % WARP_GROUP * 16; /* the warp's first row */
    int32_t head = (int32_t)blockIdx.x, kv_column = head / c.group * c.size;
    struct attention_block b;
    if (!attention_block_of<ROWS>(c.tiles, (int)blockIdx.y, &b))
        return;

    int32_t group0 = b.at + group * GROUP_ROWS, row0 = b.at + mine;
    int32_t last = (min(b.at + ROWS, b.length) - 1) / KEYS, lowest = max(b.at - c.window + 1, 0) / KEYS;
    auto load_tiles = [&](int32_t tile, int to) {
        int32_t row = b.first + tile * KEYS, valid = b.length - tile * KEYS;
        panels_load<D, KEYS, THREADS>(ks + to * KEYS * D, attention_at(c.k, row, kv_column), c.k.stride, valid, units);
        panels_load<D, KEYS, THREADS>(vs + to * KEYS * D, attention_at(c.v, row, kv_column), c.v.stride, valid, units);
        async_commit();
    };
    panels_load<D, ROWS, THREADS>(qs, attention_at(c.q, b.first + b.at, head * c.size), c.q.stride, b.length - b.at,
                                  units);
    panels_load<D, ROWS, THREADS>(gs, attention_at(c.g, b.first + b.at, head * c.size), c.g.stride, b.length - b.at,
                                  units);
    load_tiles(last, 0);

    float dq[D / 8][4], lse2[2], delta[2];
    uint32_t p[KEYS / 16][4];
    float scale2 = c.scale * ATTENTION_LOG2E;
    warp_fill<1, D / 8>(&dq, 0);
    make_deltas<D, 1>(c, b, row0, head, deltas + mine);
    warp_sync();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int32_t r = 8 * half + lane / 4;
        bool there = row0 + r < b.length;
        lse2[half] = there ? c.lse[(ptrdiff_t)(b.first + row0 + r) * c.heads + head] * ATTENTION_LOG2E : 0;
        delta[half] = deltas[mine + r];
    }
    int stage = 0;
    for (int32_t tile = last; tile >= lowest; tile--, stage ^= 1) {
        int32_t ahead = group0 - tile * KEYS;
        async_wait<0>();
        proxy_fence();
        block_sync(); /* all see this tile, and none still uses the one before, whose place the next takes */
        if (tile > lowest)
            load_tiles(tile - 1, stage ^ 1);
        if (group0 >= b.length || ahead + GROUP_ROWS <= 0 || ahead - (KEYS - 1) >= c.window)
            continue;

        const bf16 *k = ks + stage * KEYS * D, *v = vs + stage * KEYS * D;
        float s[N][4], dp[N][4];
        wgmma_fence();
        group_scores<D, KEYS, ROWS, KEYS>(s, qs + group * GROUP_ROWS * 64, k);
        wgmma_commit();
        group_scores<D, KEYS, ROWS, KEYS>(dp, gs + group * GROUP_ROWS * 64, v);
        wgmma_commit();
        wgmma_wait<1>(s);
        if (ahead < KEYS - 1 || ahead + GROUP_ROWS - 1 >= c.window)
            mask_tile<1, N>(&s, row0 - tile * KEYS, c.window, -INFINITY);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] = fast_exp2(fmaf(s[n][e], scale2, -lse2[e / 2]));
        wgmma_wait<0>(dp);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] *= dp[n][e] - delta[e / 2];
        group_pack<KEYS>(p, s);
        wgmma_fence(p, dq);
        group_sums<D, KEYS>(dq, p, k);
        wgmma_commit();
        wgmma_wait<0>(dq);
    }

    block_sync(); /* none still uses q, whose place dq takes */
    if (row0 >= b.length)
        return;
    const float factor[2] = {c.scale, c.scale};
    panels_write<D, ROWS>(qs, mine, dq, factor, attention_at(c.dq, b.first + row0, head * c.size), c.dq.stride,
                          b.length - row0, units);
#else
    (void)c;
    trap();
#endif
}

/* --- dk and dv --------------------------------------------------------------------------------------------------- */

template <int D, int GROUPS, int QUERIES, int STAGES, int MAKE> struct wgmma_kv_memory {
    static const int rows = GROUP_ROWS * GROUPS;
    static const int fixed_rows = MAKE & MAKE_DK ? 2 * rows : rows; /* keys, and values where dk is made */
    static const size_t bytes =
        (size_t)(fixed_rows + 2 * STAGES * QUERIES) * D * sizeof(bf16) + STAGES * 2 * QUERIES * sizeof(float);
};

/* Writes one of the gradients of the warp's 16 keys. */
template <int D, int ROWS>
DEVICE void write_gradient(const struct head_parts &parts, const struct attention_call &c,
                           const struct attention_block &b, int32_t key0, int32_t head, int32_t part, bool is_dv,
                           const float (&x)[D / 8][4], float scale, bf16 *tile, int row)
{
    if (parts.work) {
        write_part<D, 1>(parts, c, b, key0, head, part, is_dv, &x, scale);
        return;
    }
    struct rows to = is_dv ? c.dv : c.dk;
    const float factor[2] = {scale, scale};
    panels_write<D, ROWS>(tile, row, x, factor, attention_at(to, b.first + key0, head * c.size), to.stride,
                          b.length - key0, c.size / 8);
}

/* grid: (parts, kv_heads, list entries · blocks an entry), of which the last entries, which are the first keys and seen
 * by most queries, go first. MAKE: MAKE_DK, MAKE_DV or both, as registers allow. With 3 stages, a tile's last product
 * still runs while the next tile's first are issued. */
template <int D, int GROUPS, int QUERIES, int STAGES, int MAKE, int BLOCKS>
TEMPLATE_KERNEL LAUNCH_BOUNDS(GROUPS *GROUP_THREADS, BLOCKS)
    wgmma_backward_kv(const struct attention_call c, const struct head_parts parts)
{
#if HAVE_WGMMA
    typedef wgmma_kv_memory<D, GROUPS, QUERIES, STAGES, MAKE> memory;
    const int ROWS = GROUP_ROWS * GROUPS, THREADS = GROUP_THREADS * GROUPS, N = QUERIES / 8;
    const bool DK = (MAKE & MAKE_DK) != 0, DV = (MAKE & MAKE_DV) != 0;
    static_assert(STAGES == 2 || STAGES == 3, "whose tiles products may still read: the one before");
    DYNAMIC_SHARED(bf16, ks);                                           /* (ROWS, D) */
    bf16 *vs = ks + ROWS * D;                                           /* (ROWS, D), where DK */
    bf16 *qs = ks + memory::fixed_rows * D;                             /* (STAGES, QUERIES, D) */
    bf16 *gs = qs + STAGES * QUERIES * D;                               /* (STAGES, QUERIES, D) */
    float *lses = reinterpret_cast<float *>(gs + STAGES * QUERIES * D); /* (STAGES: lse·log2 e, delta; QUERIES) */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, units = c.size / 8;
    int group = group_of_thread(), mine = group * GROUP_ROWS + warp % WARP_GROUP * 16; /* the warp's first key */
    int32_t part = (int32_t)blockIdx.x, kv_head = (int32_t)blockIdx.y;
    struct attention_block b;
    if (!attention_block_of<ROWS>(c.tiles, (int)(gridDim.z - 1 - blockIdx.z), &b))
        return;

    int32_t group0 = b.at + group * GROUP_ROWS, key0 = b.at + mine;
    int32_t head = kv_head * c.group + part * parts.each;
    int32_t head_end = min(head + parts.each, (kv_head + 1) * c.group);
    int32_t lowest = b.at / QUERIES, last = min(b.length - 1, b.at + ROWS - 1 + c.window - 1) / QUERIES;
    panels_load<D, ROWS, THREADS>(ks, attention_at(c.k, b.first + b.at, kv_head * c.size), c.k.stride, b.length - b.at,
                                  units);
    if (DK)
        panels_load<D, ROWS, THREADS>(vs, attention_at(c.v, b.first + b.at, kv_head * c.size), c.v.stride,
                                      b.length - b.at, units);

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
        panels_load<D, QUERIES, THREADS>(qs + to * QUERIES * D, attention_at(c.q, row, of_head * c.size), c.q.stride,
                                         valid, units);
        panels_load<D, QUERIES, THREADS>(gs + to * QUERIES * D, attention_at(c.g, row, of_head * c.size), c.g.stride,
                                         valid, units);
        async_commit();
    };

    float dk[DK ? D / 8 : 1][4], dv[DV ? D / 8 : 1][4];
    uint32_t p[QUERIES / 16][4], ds[QUERIES / 16][4];
    float scale2 = c.scale * ATTENTION_LOG2E;
    if constexpr (DK)
        warp_fill<1, D / 8>(&dk, 0);
    if constexpr (DV)
        warp_fill<1, D / 8>(&dv, 0);
    load_tiles(lowest, head, 0);
    if (kind < 2)
        lses[threadIdx.x] = load_row(lowest, head);

    int stage = 0;
    int32_t tile = lowest;
    while (head < head_end) {
        int32_t next = tile < last ? tile + 1 : lowest, next_head = tile < last ? head : head + 1;
        int following = stage + 1 == STAGES ? 0 : stage + 1;
        float next_row = 0;
        async_wait<0>();
        proxy_fence();
        block_sync(); /* all see this tile, and none still uses that STAGES − 1 before, whose place the next takes */
        if (next_head < head_end) {
            load_tiles(next, next_head, following);
            next_row = load_row(next, next_head);
        }
        int32_t ahead = tile * QUERIES - group0; /* of the first query, to the group's first key */
        if (group0 < b.length && ahead + QUERIES > 0 && ahead - (GROUP_ROWS - 1) < c.window) {
            const bf16 *q = qs + stage * QUERIES * D, *g = gs + stage * QUERIES * D;
            const float *lse = lses + stage * 2 * QUERIES + 2 * (lane % 4), *delta = lse + QUERIES;
            float s[N][4], dp[DK ? N : 1][4];
            wgmma_fence();
            group_scores<D, QUERIES, ROWS, QUERIES>(s, ks + group * GROUP_ROWS * 64, q);
            wgmma_commit();
            if constexpr (DK) {
                group_scores<D, QUERIES, ROWS, QUERIES>(dp, vs + group * GROUP_ROWS * 64, g);
                wgmma_commit();
            }
            wgmma_wait<DK ? 1 : 0>(s); /* and the tile before is done with */
            if (ahead < GROUP_ROWS - 1 || ahead + QUERIES - 1 >= c.window)
                mask_tile_transposed<1, N>(&s, tile * QUERIES - key0, c.window, -INFINITY);
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 l = *reinterpret_cast<const float2 *>(lse + 8 * n);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[n][e] = fast_exp2(fmaf(s[n][e], scale2, e % 2 ? -l.y : -l.x));
            }
            if constexpr (DV) {
                group_pack<QUERIES>(p, s);
                wgmma_fence(p, dv);
                group_sums<D, QUERIES>(dv, p, g);
                wgmma_commit();
            }
            if constexpr (DK) {
                wgmma_wait<DV ? 1 : 0>(dp);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    float2 d = *reinterpret_cast<const float2 *>(delta + 8 * n);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[n][e] *= dp[n][e] - (e % 2 ? d.y : d.x);
                }
                group_pack<QUERIES>(ds, s);
                wgmma_fence(ds, dk);
                group_sums<D, QUERIES>(dk, ds, q);
                wgmma_commit();
            }
            if (STAGES == 2)
                wgmma_wait<0>(dk, dv);
        } else if (STAGES == 3) {
            wgmma_wait<0>(); /* a tile that is skipped has no products to wait for that before with */
        }
        if (kind < 2)
            lses[following * 2 * QUERIES + threadIdx.x] = next_row;
        stage = following;
        tile = next;
        head = next_head;
    }

    if (STAGES == 3)
        wgmma_wait<0>(dk, dv);
    block_sync(); /* none still uses keys and values, whose place the gradients take */
    if (key0 >= b.length)
        return;
    if constexpr (DV)
        write_gradient<D, ROWS>(parts, c, b, key0, kv_head, part, true, dv, 1.0f, DK ? vs : ks, mine);
    if constexpr (DK)
        write_gradient<D, ROWS>(parts, c, b, key0, kv_head, part, false, dk, c.scale, ks, mine);
#else
    (void)c;
    (void)parts;
    trap();
#endif
}

/* --- launching --------------------------------------------------------------------------------------------------- */

template <int D, int GROUPS, int KEYS, int BLOCKS>
static void launch_forward(stream_t s, const struct attention_call *c, int32_t tiles)
{
    typedef wgmma_forward_memory<D, GROUPS, KEYS> memory;
    auto kernel = wgmma_forward<D, GROUPS, KEYS, BLOCKS>;
    dim3 grid((unsigned)c->heads, (unsigned)(tiles * (ATTENTION_TILE / memory::rows)));
    LAUNCH(kernel, grid, GROUPS * GROUP_THREADS, memory::bytes, s, *c);
}

template <int D, int GROUPS, int KEYS, int BLOCKS>
static void launch_backward_q(stream_t s, const struct attention_call *c, int32_t tiles)
{
    typedef wgmma_q_memory<D, GROUPS, KEYS> memory;
    auto kernel = wgmma_backward_q<D, GROUPS, KEYS, BLOCKS>;
    dim3 grid((unsigned)c->heads, (unsigned)(tiles * (ATTENTION_TILE / memory::rows)));
    LAUNCH(kernel, grid, GROUPS * GROUP_THREADS, memory::bytes, s, *c);
}

template <int D, int GROUPS, int QUERIES, int STAGES, int MAKE, int BLOCKS>
static void launch_backward_kv(stream_t s, const struct attention_call *c, const struct head_parts *parts,
                               int32_t tiles)
{
    typedef wgmma_kv_memory<D, GROUPS, QUERIES, STAGES, MAKE> memory;
    auto kernel = wgmma_backward_kv<D, GROUPS, QUERIES, STAGES, MAKE, BLOCKS>;
    dim3 grid((unsigned)parts->count, (unsigned)c->kv_heads, (unsigned)(tiles * (ATTENTION_TILE / memory::rows)));
    LAUNCH(kernel, grid, GROUPS * GROUP_THREADS, memory::bytes, s, *c, *parts);
}

void attention_wgmma_forward(stream_t s, const struct attention_call *call, int32_t tiles_max)
{
    if (call->size <= 64)
        launch_forward<64, 2, 128, 2>(s, call, tiles_max);
    else if (call->size <= 128)
        launch_forward<128, 2, 64, 2>(s, call, tiles_max);
    else
        launch_forward<256, 2, 64, 1>(s, call, tiles_max);
}

void attention_wgmma_backward(stream_t s, const struct attention_call *call, const struct head_parts *parts,
                              int32_t tiles_max)
{
    if (call->size <= 64) {
        launch_backward_q<64, 1, 64, 4>(s, call, tiles_max);
        launch_backward_kv<64, 1, 64, 2, MAKE_DK | MAKE_DV, 3>(s, call, parts, tiles_max);
    } else if (call->size <= 128) {
        launch_backward_q<128, 2, 32, 2>(s, call, tiles_max);
        launch_backward_kv<128, 2, 64, 3, MAKE_DK | MAKE_DV, 1>(s, call, parts, tiles_max);
    } else { /* both sums of 256 columns are more than the registers hold */
        launch_backward_q<256, 2, 32, 1>(s, call, tiles_max);
        launch_backward_kv<256, 1, 64, 2, MAKE_DV, 1>(s, call, parts, tiles_max);
        launch_backward_kv<256, 1, 64, 2, MAKE_DK, 1>(s, call, parts, tiles_max);
    }
}
