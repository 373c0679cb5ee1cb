/*
 * Softmax cross entropy over rows of logits. A block a row reads it once for the maximum and the sum of exponentials
 * (each thread keeps both over its part and rescales the sum when its maximum rises), and once more, by then mostly
 * from the cache, to replace it by the gradient. Floor with gradient: the row read and written once.
 */
#include "kernels/cuda/internal.h"
#include "kernels/cuda/vectors.h"

#include <assert.h>

/* Threads a row, by its length: few blocks at a time where rows are long, so that a row is still in the second-level
 * cache when it is read again. */
#define WIDEST 1024
#define WIDEST_BYTES (128 * 1024) /* rows above it */
#define WIDE 512
#define NARROW 128
#define BATCH 4 /* vectors a thread has in flight */

#define LOWEST (-3.402823466e38f) /* below every logit, but not −∞, whose differences are NaN */

/* To float32's precision or to bfloat16's. */
template <typename E> DEVICE float exponential(float x)
{
    if constexpr (sizeof(E) == 4)
        return expf(x);
    else
        return fast_exp2(x * 1.4426950408889634f);
}

/* Combines over the block, in an order that depends on nothing but THREADS. partial: 2·THREADS/WARP floats. */
template <typename E, int THREADS> DEVICE void combine(float *top, float *sum, float *partial)
{
    float warp_top = warp_max(*top);
    float warp_total = warp_sum(*sum * exponential<E>(*top - warp_top));
    if (threadIdx.x % WARP == 0) {
        partial[threadIdx.x / WARP * 2] = warp_top;
        partial[threadIdx.x / WARP * 2 + 1] = warp_total;
    }
    block_sync();
    int lane = (int)threadIdx.x % WARP; /* each warp combines all of them */
    float of_warp = lane < THREADS / WARP ? partial[lane * 2] : LOWEST;
    float total = lane < THREADS / WARP ? partial[lane * 2 + 1] : 0.0f, block_top = warp_max(of_warp);
    total = warp_sum(total * exponential<E>(of_warp - block_top));
    *top = block_top;
    *sum = total;
}

/* BATCH vectors of this thread from vector `at` on; what is behind the row's end is far below. */
template <typename E, int THREADS> DEVICE void load_batch(const E *row, int at, int n, float x[BATCH][VECTOR<E>])
{
    const int V = VECTOR<E>;
    vec16 v[BATCH];
    for (int k = 0; k < BATCH; k++) {
        if ((at + k * THREADS) * V < n)
            v[k] = vec_load(row + (at + k * THREADS) * V);
    }
    for (int k = 0; k < BATCH; k++) {
        int first = (at + k * THREADS) * V;
        vec_unpack<E>(v[k], x[k]);
        if (first + V > n) {
            for (int i = 0; i < V; i++)
                x[k][i] = first + i < n ? x[k][i] : -INFINITY;
        }
    }
}

template <typename E, int THREADS>
TEMPLATE_KERNEL LAUNCH_BOUNDS(THREADS, 1024 / THREADS)
    softmax_loss(int32_t n, E *logits, int32_t stride, const int32_t *RESTRICT targets, const float *RESTRICT weights,
                 float *losses, bool gradient)
{
    DYNAMIC_SHARED(float, partial);
    const int V = VECTOR<E>;
    E *row = logits + (int64_t)blockIdx.x * stride;
    int target = targets[blockIdx.x], padded = (n + 7) / 8 * 8;
    float at_target = load_float(row + target), top = LOWEST, sum = 0, x[BATCH][V];
    for (int at = (int)threadIdx.x; at * V < n; at += BATCH * THREADS) {
        load_batch<E, THREADS>(row, at, n, x);
        float higher = top, more = 0;
        for (int k = 0; k < BATCH; k++) {
            for (int i = 0; i < V; i++)
                higher = fmaxf(higher, x[k][i]);
        }
        for (int k = 0; k < BATCH; k++) {
            for (int i = 0; i < V; i++)
                more += exponential<E>(x[k][i] - higher);
        }
        sum = sum * exponential<E>(top - higher) + more;
        top = higher;
    }
    combine<E, THREADS>(&top, &sum, partial); /* after it every thread has read at_target */
    if (threadIdx.x == 0)
        losses[blockIdx.x] = top - at_target + logf(sum);
    if (!gradient)
        return;
    float weight = weights ? weights[blockIdx.x] : 1.0f, scale = weight / sum;
    for (int at = (int)threadIdx.x; at * V < padded; at += BATCH * THREADS) {
        load_batch<E, THREADS>(row, at, n, x);
        for (int k = 0; k < BATCH; k++) {
            int first = (at + k * THREADS) * V;
            if (first >= padded)
                break;
            for (int i = 0; i < V; i++)
                x[k][i] = exponential<E>(x[k][i] - top) * scale;
            if ((unsigned)(target - first) < (unsigned)V) {
                for (int i = 0; i < V; i++)
                    x[k][i] -= first + i == target ? weight : 0.0f;
            }
            vec_store(row + first, vec_pack<E>(x[k]));
        }
    }
}

template <typename E>
static void launch_softmax(stream_t s, int32_t count, int32_t n, E *logits, int32_t stride, const int32_t *targets,
                           const float *weights, float *losses, bool gradient)
{
#define CALL(THREADS)                                                                                                  \
    LAUNCH((softmax_loss<E, THREADS>), (unsigned)count, THREADS, 2 * THREADS / WARP * sizeof(float), s, n, logits,     \
           stride, targets, weights, losses, gradient)
    if ((size_t)n * sizeof(E) > WIDEST_BYTES)
        CALL(WIDEST);
    else if (n > NARROW * BATCH * VECTOR<E>)
        CALL(WIDE);
    else
        CALL(NARROW);
#undef CALL
}

void head_softmax(stream_t s, enum tensor_type type, int32_t count, int32_t n, struct rows logits,
                  const int32_t *targets, const float *weights, float *losses, bool gradient)
{
    if (count <= 0)
        return;
    assert(n > 0 && n <= 1 << 30 && logits.stride % 8 == 0 && logits.stride >= n && (uintptr_t)logits.at % 16 == 0);
    if (type == TENSOR_BF16)
        launch_softmax(s, count, n, static_cast<bf16 *>(logits.at), logits.stride, targets, weights, losses, gradient);
    else if (type == TENSOR_F32)
        launch_softmax(s, count, n, static_cast<float *>(logits.at), logits.stride, targets, weights, losses, gradient);
    else
        assert(!"an element that rows do not have");
}

/* --- the likeliest token ----------------------------------------------------------------------------------------- */

#define PARTS 64 /* blocks of a row */
#define PART_THREADS 256

/* A number that is larger for a larger logit and, among equal ones, for a smaller id; 0 for NaN. */
DEVICE unsigned long long rank_of(float x, int32_t id)
{
    unsigned bits = __float_as_uint(x + 0.0f); /* −0 is 0 */
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return x != x ? 0 : (unsigned long long)bits << 32 | (0xffffffffu - (unsigned)id);
}

/* The block's largest; partial: a word a warp. Every thread gets it. */
DEVICE unsigned long long block_largest(unsigned long long x, unsigned long long *partial)
{
    for (int mask = WARP / 2; mask > 0; mask /= 2)
        x = max(x, shuffle_xor(x, mask));
    if (threadIdx.x % WARP == 0)
        partial[threadIdx.x / WARP] = x;
    block_sync();
    for (unsigned i = 0; i < blockDim.x / WARP; i++)
        x = max(x, partial[i]);
    return x;
}

/* best (row, part). grid: (PARTS, rows). */
TEMPLATE_KERNEL likeliest_parts(int32_t n, const float *RESTRICT logits, unsigned long long *RESTRICT best)
{
    DYNAMIC_SHARED(unsigned long long, partial);
    unsigned long long largest = 0;
    logits += (ptrdiff_t)blockIdx.y * n;
    for (int32_t i = (int32_t)(blockIdx.x * PART_THREADS + threadIdx.x); i < n; i += PARTS * PART_THREADS)
        largest = max(largest, rank_of(logits[i], i));
    largest = block_largest(largest, partial);
    if (threadIdx.x == 0)
        best[blockIdx.y * PARTS + blockIdx.x] = largest;
}

/* A block a row. */
TEMPLATE_KERNEL likeliest_of_parts(const unsigned long long *RESTRICT best, int32_t *RESTRICT ids)
{
    DYNAMIC_SHARED(unsigned long long, partial);
    const unsigned long long largest = block_largest(best[blockIdx.x * PARTS + threadIdx.x], partial);
    if (threadIdx.x == 0)
        ids[blockIdx.x] = largest ? (int32_t)(0xffffffffu - (unsigned)largest) : 0;
}

size_t head_likeliest_work(int32_t m)
{
    return (size_t)m * PARTS * sizeof(unsigned long long);
}

void head_likeliest(stream_t s, int32_t m, int32_t n, const float *logits, int32_t *ids, void *work)
{
    assert(m >= 0 && n > 0 && n <= 1 << 30);
    if (m == 0)
        return;
    unsigned long long *best = static_cast<unsigned long long *>(work);
    LAUNCH(likeliest_parts, dim3(PARTS, (unsigned)m), PART_THREADS, PART_THREADS / WARP * sizeof *best, s, n, logits,
           best);
    LAUNCH(likeliest_of_parts, (unsigned)m, PARTS, PARTS / WARP * sizeof *best, s, best, ids);
}
