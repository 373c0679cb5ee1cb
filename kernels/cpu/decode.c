/* Few rows against a frozen matrix: each thread decodes one row of W at a time and takes its dot products. */
#include "kernels/cpu/simd.h"

#define OUTPUTS 16 /* rows of W in one work item */

struct job {
    int32_t m;
    const struct tensor *w;
    const float *bias, *x;
    float *y;
    uint8_t *rows;
    size_t row_bytes;
};

INLINE float dot(const float *a, const float *b, int32_t n)
{
    vec s0 = vec_zero(), s1 = vec_zero(), s2 = vec_zero(), s3 = vec_zero();
    int32_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        s0 = vec_fma(vec_load(a + i), vec_load(b + i), s0);
        s1 = vec_fma(vec_load(a + i + VL), vec_load(b + i + VL), s1);
        s2 = vec_fma(vec_load(a + i + 2 * VL), vec_load(b + i + 2 * VL), s2);
        s3 = vec_fma(vec_load(a + i + 3 * VL), vec_load(b + i + 3 * VL), s3);
    }
    for (; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        s0 = vec_fma(vec_load_mask(a + i, mask), vec_load_mask(b + i, mask), s0);
    }
    return vec_sum(vec_add(vec_add(s0, s1), vec_add(s2, s3)));
}

#ifdef __AVX512F__
/* One row of Q4_1 against one x without a decoded copy: Σ (q·d + m)·x = Σ_blocks d·Σ q·x + m·Σ x, per lane. */
static float dot_q4_1(const uint8_t *row, const float *x, int32_t n)
{
    vec s0 = vec_zero(), s1 = vec_zero();
    const __m128i mask = _mm_set1_epi8(15);
    for (int32_t i = 0; i < n; i += 32, row += 20) {
        __m128i scales = _mm_loadu_si32(row), bytes = _mm_loadu_si128((const __m128i *)(const void *)(row + 4));
        __m128 dm = _mm_cvtph_ps(scales);
        vec d = _mm512_broadcastss_ps(dm), m = _mm512_broadcastss_ps(_mm_movehdup_ps(dm)), low[1], high[1];
        vec_from_u8(_mm_and_si128(bytes, mask), low);
        vec_from_u8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), high);
        s0 = vec_fma(vec_fma(low[0], d, m), vec_load(x + i), s0);
        s1 = vec_fma(vec_fma(high[0], d, m), vec_load(x + i + 16), s1);
    }
    return vec_sum(vec_add(s0, s1));
}

static float dot_q8_0(const uint8_t *row, const float *x, int32_t n)
{
    vec s0 = vec_zero(), s1 = vec_zero();
    for (int32_t i = 0; i < n; i += 32, row += 34) {
        vec d = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_loadu_si16(row))), low[1], high[1];
        vec_from_s8(_mm_loadu_si128((const __m128i *)(const void *)(row + 2)), low);
        vec_from_s8(_mm_loadu_si128((const __m128i *)(const void *)(row + 18)), high);
        s0 = vec_fma(vec_mul(low[0], d), vec_load(x + i), s0);
        s1 = vec_fma(vec_mul(high[0], d), vec_load(x + i + 16), s1);
    }
    return vec_sum(vec_add(s0, s1));
}
#endif

static void decode_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const struct tensor *w = j->w;
    float *buffer = (float *)(void *)(j->rows + (size_t)thread * j->row_bytes);
    int32_t end = (item + 1) * OUTPUTS < w->out ? (item + 1) * OUTPUTS : w->out;
    for (int32_t o = item * OUTPUTS; o < end; o++) {
        float bias = j->bias ? j->bias[o] : 0.0f;
        const uint8_t *row = tensor_row(w, o);
#ifdef __AVX512F__
        if (j->m == 1 && w->type == TENSOR_Q4_1) {
            j->y[o] = dot_q4_1(row, j->x, w->in) + bias;
            continue;
        }
        if (j->m == 1 && w->type == TENSOR_Q8_0) {
            j->y[o] = dot_q8_0(row, j->x, w->in) + bias;
            continue;
        }
#endif
        const float *values = buffer;
        if (w->type == TENSOR_F32)
            values = (const float *)(const void *)row;
        else
            ISA(dequantise)(w->type, row, 0, (size_t)w->in, buffer);
        for (int32_t i = 0; i < j->m; i++)
            j->y[(ptrdiff_t)i * w->out + o] = dot(values, j->x + (ptrdiff_t)i * w->in, w->in) + bias;
    }
}

void ISA(linear_decode)(const struct kernel_run *run, int32_t m, const struct tensor *w, const float *bias,
                        const float *x, float *y)
{
    assert(m >= 1 && m <= KERNEL_DECODE_ROWS);
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    struct job j = {.m = m, .w = w, .bias = bias, .x = x, .y = y};
    j.row_bytes = align64((size_t)w->in * sizeof(float));
    j.rows = scratch_take(&next, end, j.row_bytes * (size_t)pool_threads(run->pool));
    pool_run(run->pool, (w->out + OUTPUTS - 1) / OUTPUTS, decode_item, &j);
}
