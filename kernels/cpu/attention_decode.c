/*
 * Attention of few rows over a cache, which is what is read: an item is a stretch of the keys and values and all heads
 * of a row, so that each thread reads its stretches once and in order. What the stretches of a row give is put together
 * by their largest scores. Where they begin depends on the row's position alone: bits do not depend on the threads.
 */
#include "kernels/cpu/simd.h"

#define BLOCK 64 /* keys whose scores are held at once: those keys, and then values, stay in the first cache */

struct job {
    const struct attention_shape *shape;
    int32_t rows, length;
    const float *q, *k, *v;
    float *o;
    ptrdiff_t kv_stride;
    int32_t spans, span_keys; /* of a single row; 1 if there are several rows */
    float *partial;           /* (spans, heads, head_size) not divided by their sums */
    float *tops, *sums;       /* (heads, ATTENTION_SPANS_MAX) largest score, and sum of exponentials relative to it */
};

/* s[0..n), and up to 3 more of no meaning, = scale·q·k; returns the largest of the n. */
INLINE float block_scores(const float *q, const float *k, ptrdiff_t stride, int32_t n, int vectors, float scale,
                          float *s)
{
    for (int32_t t = 0; t < n; t += 4) {
        const float *key[4];
        vec sum[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            key[j] = k + (t + j < n ? t + j : n - 1) * stride;
            sum[j] = vec_zero();
        }
        for (int i = 0; i < vectors; i++) {
            const vec x = vec_load(q + i * VL);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[j] = vec_fma(x, vec_load(key[j] + i * VL), sum[j]);
        }
        vec_sum4(sum, s + t);
    }
    vec top = vec_set(-INFINITY);
    for (int32_t t = 0; t < n; t += VL) {
        const vmask mask = vec_mask(n - t);
        const vec x = vec_mul(vec_load_mask(s + t, mask), vec_set(scale));
        vec_store_mask(s + t, x, mask);
        top = vec_max(top, vec_keep(x, mask, -INFINITY));
    }
    return vec_top(top);
}

/* A head over n ≤ BLOCK more keys: o, top and sum go on from what they were. vectors: those of a head. */
INLINE void head_block(const float *q, const float *k, const float *v, ptrdiff_t stride, int32_t n, int vectors,
                       float scale, float *o, float *top, float *sum)
{
    float s[BLOCK];
    vec acc[256 / VL], total = vec_zero();
    const float here = block_scores(q, k, stride, n, vectors, scale, s), larger = here > *top ? here : *top;
    for (int32_t t = 0; t < n; t += VL) {
        const vmask mask = vec_mask(n - t);
        const vec e = vec_keep(vec_exp(vec_sub(vec_load_mask(s + t, mask), vec_set(larger))), mask, 0);
        total = vec_add(total, e);
        vec_store_mask(s + t, e, mask);
    }
    const vec rescale = vec_exp(vec_set(*top - larger));
    for (int i = 0; i < vectors; i++)
        acc[i] = vec_mul(vec_load(o + i * VL), rescale);
    for (int32_t t = 0; t < n; t++) {
#pragma GCC unroll 16
        for (int i = 0; i < vectors; i++)
            acc[i] = vec_fma(vec_set(s[t]), vec_load(v + t * stride + i * VL), acc[i]);
    }
    for (int i = 0; i < vectors; i++)
        vec_store(o + i * VL, acc[i]);
    *sum = *sum * vec_first(rescale) + vec_sum(total);
    *top = larger;
}

static void any_head_block(const float *q, const float *k, const float *v, ptrdiff_t stride, int32_t n, int32_t d,
                           float scale, float *o, float *top, float *sum)
{
    switch (d / VL) { /* constants, so that a head stays in registers */
    case 4:
        head_block(q, k, v, stride, n, 4, scale, o, top, sum);
        break;
    case 8:
        head_block(q, k, v, stride, n, 8, scale, o, top, sum);
        break;
    case 16:
        head_block(q, k, v, stride, n, 16, scale, o, top, sum);
        break;
    default:
        head_block(q, k, v, stride, n, d / VL, scale, o, top, sum);
    }
}

/* The keys that a row sees: [*ret_lo, return value). */
static int32_t keys_end(const struct job *j, int32_t row, int32_t *ret_lo)
{
    const int32_t end = j->length - j->rows + row + 1, window = j->shape->window;
    *ret_lo = window > 0 && end > window ? end - window : 0;
    return end;
}

/* An item is a row's whole range, or one span of a single row. */
static void decode_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const struct attention_shape *shape = j->shape;
    const int32_t row = j->rows == 1 ? 0 : item, span = item - row, d = shape->head_size;
    const int32_t group = shape->heads / shape->kv_heads;
    int32_t lo, end = keys_end(j, row, &lo);
    lo += span * j->span_keys;
    end = j->span_keys < end - lo ? lo + j->span_keys : end;
    const float *q = j->q + (ptrdiff_t)row * shape->heads * d;
    float *o =
        j->rows == 1 ? j->partial + (ptrdiff_t)span * shape->heads * d : j->o + (ptrdiff_t)row * shape->heads * d;
    float tops[BLOCK], sums[BLOCK]; /* of as many heads at once */
    (void)thread;
    for (int32_t head0 = 0; head0 < shape->heads; head0 += BLOCK) {
        const int32_t heads = shape->heads - head0 < BLOCK ? shape->heads - head0 : BLOCK;
        memset(o + (ptrdiff_t)head0 * d, 0, (size_t)heads * (size_t)d * sizeof *o);
        for (int32_t h = 0; h < heads; h++) {
            tops[h] = -INFINITY;
            sums[h] = 0;
        }
        for (int32_t t = lo; t < end; t += BLOCK) {
            for (int32_t h = 0; h < heads; h++) {
                const ptrdiff_t at = t * j->kv_stride + (ptrdiff_t)((head0 + h) / group) * d;
                any_head_block(q + (ptrdiff_t)(head0 + h) * d, j->k + at, j->v + at, j->kv_stride,
                               end - t < BLOCK ? end - t : BLOCK, d, shape->scale, o + (ptrdiff_t)(head0 + h) * d,
                               &tops[h], &sums[h]);
            }
        }
        for (int32_t h = 0; h < heads; h++) {
            float *of_head = o + (ptrdiff_t)(head0 + h) * d;
            for (int32_t i = 0; j->rows > 1 && i < d; i += VL)
                vec_store(of_head + i, vec_mul(vec_load(of_head + i), vec_set(1.0f / sums[h])));
            if (j->rows > 1)
                continue;
            j->tops[(head0 + h) * ATTENTION_SPANS_MAX + span] = tops[h];
            j->sums[(head0 + h) * ATTENTION_SPANS_MAX + span] = sums[h];
        }
    }
}

/* One head's o out of its spans'. */
static void join_spans(const struct job *j, int32_t head)
{
    const int32_t d = j->shape->head_size;
    const float *tops = j->tops + head * ATTENTION_SPANS_MAX, *sums = j->sums + head * ATTENTION_SPANS_MAX;
    float by[ATTENTION_SPANS_MAX], top = tops[0];
    vec total = vec_zero();
    for (int32_t s = 1; s < j->spans; s++)
        top = tops[s] > top ? tops[s] : top;
    for (int32_t s = 0; s < j->spans; s += VL) {
        const vmask mask = vec_mask(j->spans - s);
        const vec e = vec_exp(vec_sub(vec_load_mask(tops + s, mask), vec_set(top)));
        total = vec_fma(vec_keep(e, mask, 0), vec_load_mask(sums + s, mask), total);
        vec_store_mask(by + s, e, mask);
    }
    const vec divide = vec_set(1.0f / vec_sum(total));
    for (int32_t i = 0; i < d; i += VL) {
        vec acc = vec_zero();
        for (int32_t s = 0; s < j->spans; s++)
            acc = vec_fma(vec_set(by[s]), vec_load(j->partial + ((ptrdiff_t)s * j->shape->heads + head) * d + i), acc);
        vec_store(j->o + (ptrdiff_t)head * d + i, vec_mul(acc, divide));
    }
}

void ISA(attention_decode)(const struct kernel_run *run, const struct attention_shape *shape, int32_t rows,
                           int32_t length, const float *q, const float *k, const float *v, int32_t kv_stride, float *o)
{
    assert(shape->head_size % 16 == 0 && shape->head_size <= 256 && rows >= 1 && rows <= length);
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    const size_t heads = (size_t)shape->heads;
    struct job j = {.shape = shape,
                    .rows = rows,
                    .length = length,
                    .q = q,
                    .k = k,
                    .v = v,
                    .o = o,
                    .kv_stride = kv_stride,
                    .spans = 1,
                    .span_keys = length};
    if (rows == 1) {
        int32_t lo;
        const int32_t keys = keys_end(&j, 0, &lo) - lo;
        j.span_keys = attention_span_keys(keys);
        j.spans = (keys + j.span_keys - 1) / j.span_keys;
        j.partial = scratch_take(&next, end, (size_t)j.spans * heads * (size_t)shape->head_size * sizeof *j.partial);
        j.tops = scratch_take(&next, end, heads * ATTENTION_SPANS_MAX * sizeof *j.tops);
        j.sums = scratch_take(&next, end, heads * ATTENTION_SPANS_MAX * sizeof *j.sums);
    }
    pool_run(run->pool, rows * j.spans, decode_item, &j);
    for (int32_t head = 0; rows == 1 && head < shape->heads; head++)
        join_spans(&j, head);
}
