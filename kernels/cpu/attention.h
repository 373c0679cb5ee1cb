/*
 * What attention's two directions share. Queries and keys are counted from their segment's start, and so are blocks of
 * them: what a row sums, and in which order, does not depend on what else is in the batch.
 *
 * Included by SIMD sources only.
 */
#ifndef KERNELS_CPU_ATTENTION_H
#define KERNELS_CPU_ATTENTION_H

#include "kernels/cpu/simd.h"

#define LOG2_E 1.44269504088896341f
#define LN_2 0.693147180559945309f

/* One head of one segment: row t of q, o and their gradients is at t·q_stride, of k and v at t·kv_stride. */
struct head_place {
    int32_t n; /* rows */
    ptrdiff_t q_stride, kv_stride;
    ptrdiff_t q_at, kv_at; /* of row 0 */
    ptrdiff_t lse_at;      /* row t at lse_at + t·heads */
};

INLINE struct head_place head_place(const struct attention_shape *shape, const struct segments *segments,
                                    int32_t segment, int32_t head)
{
    const int32_t start = segments->offsets[segment], d = shape->head_size;
    struct head_place p = {.n = segments->offsets[segment + 1] - start};
    p.q_stride = (ptrdiff_t)shape->heads * d;
    p.kv_stride = (ptrdiff_t)shape->kv_heads * d;
    p.q_at = start * p.q_stride + (ptrdiff_t)head * d;
    p.kv_at = start * p.kv_stride + (ptrdiff_t)(head / (shape->heads / shape->kv_heads)) * d;
    p.lse_at = (ptrdiff_t)start * shape->heads + head;
    return p;
}

/* The first key that query i sees. */
INLINE int32_t first_key(const struct attention_shape *shape, int32_t i)
{
    return shape->window > 0 && i >= shape->window ? i - shape->window + 1 : 0;
}

INLINE int32_t least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

INLINE int32_t most(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* n ≥ 0 */
INLINE int32_t round_down(int32_t n, int32_t to)
{
    return n / to * to;
}

INLINE int32_t round_up(int32_t n, int32_t to)
{
    return (n + to - 1) / to * to;
}

/* Rows as panels (d, WIDE_NR) of WIDE_NR rows each, rows that are not there zero. */
INLINE void pack_panels(const float *rows, ptrdiff_t stride, int32_t n, int32_t d, float *panels)
{
    for (int32_t j = 0; j < n; j += WIDE_NR)
        ISA(pack_transposed)(rows + j * stride, stride, least(n - j, WIDE_NR), d, panels + (ptrdiff_t)j * d);
}

#endif
