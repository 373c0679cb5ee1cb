/*
 * Causal attention forward in bfloat16: a block has 64 or 128 query rows of one head and goes over the keys that they
 * see, from the diagonal back, keeping each row's largest score and sum of exponentials (FlashAttention-2, Dao 2023).
 *
 * FLOPs: 4·T²/2·size a head and sequence; bytes: q, k, v and o once, the blocks of one sequence find k and v in L2. At
 * 62 % of an H100's peak, which is what mma.sync reaches, 610 TFLOP/s; a warp reads 24 (M = 2) or 36 (M = 1) bytes of
 * shared memory for 1024 FLOPs, and each of the exponentials costs as much time as 128 of its products' FLOPs.
 *
 * Order of sums: key tiles begin at the segment's first row and are done from the diagonal back, so that a row's first
 * tile always holds a key that it sees, its own.
 */
#include "kernels/cuda/attention.h"

template <int D, int M, int KEYS> struct forward_memory {
    static const int rows = 16 * M * ATTENTION_WARPS;
    static const size_t bytes = (size_t)(rows + 4 * KEYS) * D * sizeof(bf16);
};

/* A tile's scores become exponentials; the rows' largest scores and sums follow, and o is scaled to them. */
template <int D, int M, int KEYS>
DEVICE void softmax_tile(float s[M][KEYS / 8][4], float top[M][2], float sum[M][2], float o[M][D / 8][4], float scale2)
{
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = top[m][half], part = 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                now = fmaxf(now, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            now = fmaxf(now, shuffle_xor(now, 1));
            now = fmaxf(now, shuffle_xor(now, 2));
            float base = now * scale2, factor = fast_exp2(top[m][half] * scale2 - base);
            top[m][half] = now;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[m][n][e] = fast_exp2(fmaf(s[m][n][e], scale2, -base));
                    part += s[m][n][e];
                }
            }
            sum[m][half] = sum[m][half] * factor + part;
            if (factor != 1) { /* rare after the first tiles */
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    o[m][n][2 * half] *= factor;
                    o[m][n][2 * half + 1] *= factor;
                }
            }
        }
    }
}

/* grid: (heads, list entries · blocks an entry) */
template <int D, int M, int KEYS>
TEMPLATE_KERNEL LAUNCH_BOUNDS(ATTENTION_THREADS, D == 64 ? 3 : 2) attention_forward_tiles(const struct attention_call c)
{
    const int ROWS = forward_memory<D, M, KEYS>::rows;
    DYNAMIC_SHARED(bf16, qs);     /* (ROWS, D) */
    bf16 *ks = qs + ROWS * D;     /* (2 stages, KEYS, D) */
    bf16 *vs = ks + 2 * KEYS * D; /* (2 stages, KEYS, D) */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, units = c.size / 8;
    int32_t head = (int32_t)blockIdx.x;
    struct attention_block b;
    if (!attention_block_of<ROWS>(c.tiles, (int)blockIdx.y, &b))
        return;
    int32_t kv_column = head / c.group * c.size;

    int32_t row0 = b.at + warp * 16 * M; /* of the warp */
    int32_t last = (min(b.at + ROWS, b.length) - 1) / KEYS, lowest = max(b.at - c.window + 1, 0) / KEYS;
    tile_load<D, ROWS>(qs, attention_at(c.q, b.first + b.at, head * c.size), c.q.stride, b.length - b.at, units);
    tile_load<D, KEYS>(ks, attention_at(c.k, b.first + last * KEYS, kv_column), c.k.stride, b.length - last * KEYS,
                       units);
    tile_load<D, KEYS>(vs, attention_at(c.v, b.first + last * KEYS, kv_column), c.v.stride, b.length - last * KEYS,
                       units);
    async_commit();

    float o[M][D / 8][4], top[M][2], sum[M][2];
    float scale2 = c.scale * ATTENTION_LOG2E;
    warp_fill<M, D / 8>(o, 0);
#pragma unroll
    for (int m = 0; m < M; m++) {
        top[m][0] = top[m][1] = -INFINITY;
        sum[m][0] = sum[m][1] = 0;
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
        if (row0 >= b.length || key0 >= row0 + 16 * M || row0 - (key0 + KEYS - 1) >= c.window)
            continue;

        float s[M][KEYS / 8][4];
        warp_fill<M, KEYS / 8>(s, 0);
        warp_product_transposed<D, M, KEYS / 8>(s, qs, warp * 16 * M * D, (ROWS + stage * KEYS) * D);
        if (key0 + KEYS - 1 > row0 || row0 + 16 * M - 1 - key0 >= c.window)
            mask_tile<M, KEYS / 8>(s, row0 - key0, c.window, -INFINITY);
        softmax_tile<D, M, KEYS>(s, top, sum, o, scale2);
        warp_product<D, M, KEYS / 8>(o, s, qs, (ROWS + (2 + stage) * KEYS) * D);
    }

    if (row0 >= b.length)
        return;
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t row = row0 + 16 * m + lane / 4 + 8 * half;
            float all = sum[m][half];
            all += shuffle_xor(all, 1);
            all += shuffle_xor(all, 2);
            factor[m][half] = 1.0f / all;
            if (c.lse && lane % 4 == 0 && row < b.length)
                c.lse[(ptrdiff_t)(b.first + row) * c.heads + head] = top[m][half] * c.scale + logf(all);
        }
    }
    tile_store<D, M>(qs, warp * 16 * M, o, factor); /* its rows of q are this warp's alone */
    warp_sync();
    tile_write<D, M>(qs, warp * 16 * M, attention_at(c.o, b.first + row0, head * c.size), c.o.stride, b.length - row0,
                     units);
}

template <int D, int M, int KEYS> static void launch_forward(stream_t s, const struct attention_call *c, int32_t tiles)
{
    typedef forward_memory<D, M, KEYS> memory;
    auto kernel = attention_forward_tiles<D, M, KEYS>;
    dim3 grid((unsigned)c->heads, (unsigned)(tiles * (ATTENTION_TILE / memory::rows)));
    LAUNCH(kernel, grid, ATTENTION_THREADS, memory::bytes, s, *c);
}

void attention_forward(stream_t s, enum tensor_type type, const struct attention_shape *shape,
                       const struct attention_tile *tiles, int32_t tiles_max, struct rows q, struct rows k,
                       struct rows v, struct rows o, float *lse)
{
    struct attention_call c = attention_call_of(shape, tiles);
    c.q = q;
    c.k = k;
    c.v = v;
    c.o = o;
    c.lse = lse;
    if (tiles_max == 0)
        return;
    if (type != TENSOR_BF16)
        attention_plain_forward(s, &c, tiles_max);
    else if (attention_has_wgmma())
        attention_wgmma_forward(s, &c, tiles_max);
    else if (c.size <= 64)
        launch_forward<64, 2, 64>(s, &c, tiles_max);
    else if (c.size <= 128)
        launch_forward<128, 2, 64>(s, &c, tiles_max);
    else
        launch_forward<256, 1, 32>(s, &c, tiles_max);
}
