/*
 * Attention in float32, for cards and tests where bfloat16 is not wanted: a warp has one row of one head. Lanes take a
 * row of the other side each for the scores, 32 at a time, and every 32nd column each for the sums. Nothing here is
 * tuned: it costs 4·size FLOPs a score on the ordinary units and reads what the other side has anew for each row.
 */
#include "kernels/cuda/attention.h"

#define COLUMNS (256 / WARP) /* of a lane, at most */
#define ROWS 16              /* of a block */
#define BLOCKS (ATTENTION_TILE / ROWS)
static_assert(BLOCKS <= ATTENTION_TILE_PARTS, "the grid's bound counts on it");

DEVICE const float *floats_at(struct rows x, int32_t row, int32_t column)
{
    return static_cast<const float *>(x.at) + (ptrdiff_t)row * x.stride + column;
}

DEVICE float dot_of_rows(const float *a, const float *b, int32_t n) /* n a multiple of 4 */
{
    float sum = 0;
    for (int32_t i = 0; i < n; i += 4) {
        float4 x = *reinterpret_cast<const float4 *>(a + i), y = *reinterpret_cast<const float4 *>(b + i);
        sum += (x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w);
    }
    return sum;
}

/* acc[i] += Σ over the lanes' weights of rows `row`+lane, lanes below count, column lane + 32·i. */
DEVICE void add_rows(float acc[COLUMNS], float weight, struct rows x, int32_t row, int32_t column, int32_t count,
                     int32_t size)
{
    int lane = (int)threadIdx.x % WARP;
    for (int from = 0; from < count; from++) {
        float w = shuffle(weight, from);
        const float *at = floats_at(x, row + from, column);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++)
            if (lane + WARP * i < size)
                acc[i] += w * at[lane + WARP * i];
    }
}

DEVICE void store_row(struct rows x, int32_t row, int32_t column, const float acc[COLUMNS], float factor, int32_t size)
{
    int lane = (int)threadIdx.x % WARP;
    float *to = static_cast<float *>(x.at) + (ptrdiff_t)row * x.stride + column;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
        if (lane + WARP * i < size)
            to[lane + WARP * i] = factor * acc[i];
}

/* The warp's rows are ret->at + warp, + 4, ... up to ROWS or the end. */
DEVICE bool plain_block(const struct attention_call &c, struct attention_block *ret)
{
    return attention_block_of<ROWS>(c.tiles, (int)blockIdx.y, ret);
}

/* grid: (heads, list entries · BLOCKS) */
KERNEL attention_plain_forward_rows(const struct attention_call c)
{
    int lane = (int)threadIdx.x % WARP;
    int32_t head = (int32_t)blockIdx.x, column = head * c.size, kv_column = head / c.group * c.size;
    struct attention_block b;
    if (!plain_block(c, &b))
        return;
    for (int32_t t = b.at + (int)threadIdx.x / WARP; t < min(b.at + ROWS, b.length); t += ATTENTION_WARPS) {
        const float *q = floats_at(c.q, b.first + t, column);
        float acc[COLUMNS] = {}, top = -INFINITY, sum = 0;
        for (int32_t from = max(t - c.window + 1, 0); from <= t; from += WARP) {
            int32_t count = min(t + 1 - from, WARP);
            float score = -INFINITY;
            if (lane < count)
                score = c.scale * dot_of_rows(q, floats_at(c.k, b.first + from + lane, kv_column), c.size);
            float now = fmaxf(top, warp_max(score)), factor = expf(top - now), p = expf(score - now);
            top = now;
            sum = sum * factor + warp_sum(p);
#pragma unroll
            for (int i = 0; i < COLUMNS; i++)
                acc[i] *= factor;
            add_rows(acc, p, c.v, b.first + from, kv_column, count, c.size);
        }
        store_row(c.o, b.first + t, column, acc, 1.0f / sum, c.size);
        if (c.lse && lane == 0)
            c.lse[(ptrdiff_t)(b.first + t) * c.heads + head] = top + logf(sum);
    }
}

/* dq, and delta for the next kernel. grid: (heads, list entries · BLOCKS) */
KERNEL attention_plain_backward_q(const struct attention_call c)
{
    int lane = (int)threadIdx.x % WARP;
    int32_t head = (int32_t)blockIdx.x, column = head * c.size, kv_column = head / c.group * c.size;
    struct attention_block b;
    if (!plain_block(c, &b))
        return;
    for (int32_t t = b.at + (int)threadIdx.x / WARP; t < min(b.at + ROWS, b.length); t += ATTENTION_WARPS) {
        const float *q = floats_at(c.q, b.first + t, column), *g = floats_at(c.g, b.first + t, column);
        float delta = dot_of_rows(g, floats_at(c.o, b.first + t, column), c.size), acc[COLUMNS] = {};
        float lse = c.lse[(ptrdiff_t)(b.first + t) * c.heads + head];
        if (lane == 0)
            c.delta[(ptrdiff_t)(b.first + t) * c.heads + head] = delta;
        for (int32_t from = max(t - c.window + 1, 0); from <= t; from += WARP) {
            int32_t count = min(t + 1 - from, WARP), row = b.first + from + lane;
            float ds = 0;
            if (lane < count)
                ds = expf(c.scale * dot_of_rows(q, floats_at(c.k, row, kv_column), c.size) - lse) *
                     (dot_of_rows(g, floats_at(c.v, row, kv_column), c.size) - delta);
            add_rows(acc, ds, c.k, b.first + from, kv_column, count, c.size);
        }
        store_row(c.dq, b.first + t, column, acc, c.scale, c.size);
    }
}

/* grid: (kv_heads, list entries · BLOCKS) */
KERNEL attention_plain_backward_kv(const struct attention_call c)
{
    int lane = (int)threadIdx.x % WARP;
    int32_t kv_head = (int32_t)blockIdx.x, kv_column = kv_head * c.size;
    struct attention_block b;
    if (!plain_block(c, &b))
        return;
    for (int32_t t = b.at + (int)threadIdx.x / WARP; t < min(b.at + ROWS, b.length); t += ATTENTION_WARPS) {
        const float *k = floats_at(c.k, b.first + t, kv_column), *v = floats_at(c.v, b.first + t, kv_column);
        float dk[COLUMNS] = {}, dv[COLUMNS] = {};
        int32_t end = min(b.length, t + c.window);
        for (int32_t head = kv_head * c.group; head < (kv_head + 1) * c.group; head++) {
            for (int32_t from = t; from < end; from += WARP) {
                int32_t count = min(end - from, WARP), row = b.first + from + lane;
                float p = 0, ds = 0;
                if (lane < count) {
                    ptrdiff_t at = (ptrdiff_t)row * c.heads + head;
                    p = expf(c.scale * dot_of_rows(floats_at(c.q, row, head * c.size), k, c.size) - c.lse[at]);
                    ds = p * (dot_of_rows(floats_at(c.g, row, head * c.size), v, c.size) - c.delta[at]);
                }
                add_rows(dv, p, c.g, b.first + from, head * c.size, count, c.size);
                add_rows(dk, ds, c.q, b.first + from, head * c.size, count, c.size);
            }
        }
        store_row(c.dk, b.first + t, kv_column, dk, c.scale, c.size);
        store_row(c.dv, b.first + t, kv_column, dv, 1, c.size);
    }
}

void attention_plain_forward(stream_t s, const struct attention_call *call, int32_t tiles_max)
{
    dim3 grid((unsigned)call->heads, (unsigned)(tiles_max * BLOCKS));
    LAUNCH(attention_plain_forward_rows, grid, ATTENTION_THREADS, 0, s, *call);
}

void attention_plain_backward(stream_t s, const struct attention_call *call, int32_t tiles_max)
{
    dim3 grid((unsigned)call->heads, (unsigned)(tiles_max * BLOCKS));
    dim3 kv_grid((unsigned)call->kv_heads, (unsigned)(tiles_max * BLOCKS));
    LAUNCH(attention_plain_backward_q, grid, ATTENTION_THREADS, 0, s, *call);
    LAUNCH(attention_plain_backward_kv, kv_grid, ATTENTION_THREADS, 0, s, *call);
}
