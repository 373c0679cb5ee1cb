/*
 * Few rows against a frozen matrix: each thread decodes one row of W at a time and takes its dot products. In
 * KERNEL_BF16 precision, and with VNNI, quantised rows are not decoded: x is rounded to 16 bits in runs of 32, as two
 * bytes each, and the products with the quants are exact sums of integers, scaled run by run. One byte each would be
 * faster and changes what small models say.
 */
#include "kernels/cpu/quants.h"

#define OUTPUTS 16 /* rows of W in one work item */

struct job {
    int32_t m;
    const struct tensor *w;
    const float *bias, *x;
    float *y;
    uint8_t *rows;
    size_t row_bytes;
    const struct rounded *rounded; /* (m) x in 16 bits, or NULL */
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

#ifdef __AVX512VNNI__
/* One row of x, run by run. */
struct rounded {
    const int8_t *high, *low; /* (runs, 32): q = 256·high + low */
    const int32_t *start;     /* (runs, 8): what the sums of four products each begin with: −bias·Σ q */
    const float *pairs;       /* (runs, 2): the scale d, and d·Σ q of the run */
    const float *d, *sum;     /* (runs): the same apart */
};

/* Sums of four products each of a run, the bias gone. */
INLINE __m256 run_sums(enum tensor_type type, const uint8_t *row, const struct rounded *x, size_t run)
{
    const __m256i high = quants_load((const uint8_t *)x->high + run * 32);
    const __m256i low = quants_load((const uint8_t *)x->low + run * 32), w = quants_bytes(type, row, run);
    const __m256i start =
        quants_bias(type) ? quants_load((const uint8_t *)(x->start + run * 8)) : _mm256_setzero_si256();
    const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, high);
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(sums, 8), _mm256_dpbusd_epi32(start, w, low)));
}

INLINE float total(__m256 a, __m256 b)
{
    const __m256 all = _mm256_add_ps(a, b);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Blocks of one run, `stride` bytes long, that begin with the halves d or d, m. */
INLINE float dot_small(enum tensor_type type, size_t stride, const uint8_t *row, const struct rounded *x, size_t runs)
{
    const bool with_min = type == TENSOR_Q4_1 || type == TENSOR_Q5_1;
    __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, mins = _mm256_setzero_ps();
    for (size_t run = 0; run < runs; run += 2) {
#pragma GCC unroll 2
        for (size_t k = 0; k < 2; k++) {
            if (k == 1 && run + 1 == runs)
                break;
            int32_t halves;
            memcpy(&halves, row + (run + k) * stride, 4);
            __m256 scale = _mm256_cvtph_ps(_mm_set1_epi32(halves)); /* d, m, d, m … */
            if (with_min) {
                double pair;
                memcpy(&pair, x->pairs + 2 * (run + k), 8);
                scale = _mm256_mul_ps(scale, _mm256_castpd_ps(_mm256_set1_pd(pair)));
                mins = _mm256_add_ps(mins, scale);
                scale = _mm256_moveldup_ps(scale);
            } else {
                scale = _mm256_mul_ps(_mm256_moveldup_ps(scale), _mm256_set1_ps(x->d[run + k]));
            }
            acc[k] = _mm256_fmadd_ps(run_sums(type, row, x, run + k), scale, acc[k]);
        }
    }
    const float sum = total(acc[0], acc[1]);
    return with_min ? sum + _mm256_cvtss_f32(_mm256_permute_ps(mins, 1)) : sum;
}

/* The 8 scales and 8 minima, 6 bits each, of a block of Q4_K or Q5_K. */
INLINE void k_scales(const uint8_t *packed, uint64_t *scales, uint64_t *mins)
{
    uint32_t a, b, c;
    memcpy(&a, packed, 4);
    memcpy(&b, packed + 4, 4);
    memcpy(&c, packed + 8, 4);
    const uint32_t high_scales = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
    const uint32_t high_mins = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    *scales = (a & 0x3f3f3f3f) | (uint64_t)high_scales << 32;
    *mins = (b & 0x3f3f3f3f) | (uint64_t)high_mins << 32;
}

INLINE float dot_k45(enum tensor_type type, const uint8_t *row, const struct rounded *x, size_t runs)
{
    __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, mins = _mm256_setzero_ps();
    float scales[8] __attribute__((aligned(32)));
    for (size_t run = 0; run < runs; run += 8) {
        const uint8_t *b = row + run / 8 * (type == TENSOR_Q4_K ? 144 : 176);
        uint64_t packed_scales, packed_mins;
        k_scales(b + 4, &packed_scales, &packed_mins);
        __m256 d = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)packed_scales)));
        __m256 m = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)packed_mins)));
        d = _mm256_mul_ps(d, _mm256_set1_ps(quants_half(b)));
        m = _mm256_mul_ps(m, _mm256_set1_ps(quants_half(b + 2)));
        _mm256_store_ps(scales, _mm256_mul_ps(d, _mm256_loadu_ps(x->d + run)));
        mins = _mm256_fnmadd_ps(m, _mm256_loadu_ps(x->sum + run), mins);
#pragma GCC unroll 8
        for (size_t k = 0; k < 8; k++)
            acc[k % 2] = _mm256_fmadd_ps(run_sums(type, row, x, run + k), _mm256_set1_ps(scales[k]), acc[k % 2]);
    }
    return total(_mm256_add_ps(acc[0], acc[1]), mins);
}

INLINE float dot_q6k(const uint8_t *row, const struct rounded *x, size_t runs)
{
    __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    float scales[16] __attribute__((aligned(64)));
    for (size_t run = 0; run < runs; run += 8) {
        const uint8_t *b = row + run / 8 * 210;
        const __m512i whole = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(b + 192)));
        _mm512_store_ps(scales, _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(quants_half(b + 208))));
#pragma GCC unroll 8
        for (size_t k = 0; k < 8; k++) {
            double pair;
            memcpy(&pair, scales + 2 * k, 8);
            __m256 scale = _mm256_permutevar8x32_ps(_mm256_castpd_ps(_mm256_set1_pd(pair)), spread);
            scale = _mm256_mul_ps(scale, _mm256_set1_ps(x->d[run + k]));
            acc[k % 2] = _mm256_fmadd_ps(run_sums(TENSOR_Q6_K, row, x, run + k), scale, acc[k % 2]);
        }
    }
    return total(acc[0], acc[1]);
}

static float dot_rounded(enum tensor_type type, const uint8_t *row, const struct rounded *x, size_t runs)
{
    switch (type) {
    case TENSOR_Q4_0:
        return dot_small(TENSOR_Q4_0, 18, row, x, runs);
    case TENSOR_Q4_1:
        return dot_small(TENSOR_Q4_1, 20, row, x, runs);
    case TENSOR_Q5_0:
        return dot_small(TENSOR_Q5_0, 22, row, x, runs);
    case TENSOR_Q5_1:
        return dot_small(TENSOR_Q5_1, 24, row, x, runs);
    case TENSOR_Q8_0:
        return dot_small(TENSOR_Q8_0, 34, row, x, runs);
    case TENSOR_Q4_K:
        return dot_k45(TENSOR_Q4_K, row, x, runs);
    case TENSOR_Q5_K:
        return dot_k45(TENSOR_Q5_K, row, x, runs);
    default:
        return dot_q6k(row, x, runs);
    }
}

INLINE __m512i round_half(__m512 steps, int8_t *high, int8_t *low)
{
    const __m512i whole = _mm512_cvtps_epi32(steps);
    const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(steps, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(256));
    const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(rest));
    _mm_storeu_si128((__m128i *)(void *)high, _mm512_cvtsepi32_epi8(whole));
    _mm_storeu_si128((__m128i *)(void *)low, bytes);
    return _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_cvtepi8_epi32(bytes));
}

/* To steps of a 32512th of the run's largest value; a NaN or an infinity makes the row's results NaN. */
static void round_run(const float *x, int bias, int8_t *high, int8_t *low, int32_t *start, float *d, float *sum)
{
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const float bad = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_sub_ps(a, a), _mm512_sub_ps(b, b)));
    const __m512 by = _mm512_set1_ps(top > 0 ? 127 / top : 0);
    const __m512i first = round_half(_mm512_mul_ps(a, by), high, low);
    const __m512i second = round_half(_mm512_mul_ps(b, by), high + 16, low + 16);
    const __m256i ones = _mm256_set1_epi8(1), zero = _mm256_setzero_si256();
    __m256i sums = _mm256_slli_epi32(_mm256_dpbusd_epi32(zero, ones, quants_load((const uint8_t *)high)), 8);
    sums = _mm256_dpbusd_epi32(sums, ones, quants_load((const uint8_t *)low));
    _mm256_storeu_si256((__m256i *)(void *)start, _mm256_mullo_epi32(sums, _mm256_set1_epi32(-bias)));
    *d = top / 127 / 256 + bad;
    *sum = *d * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
}

/* Where this product may round x to 16 bits, does it; else j->rounded stays NULL. */
static void round_input(const struct kernel_run *run, struct job *j, struct rounded rounded[KERNEL_DECODE_ROWS],
                        uint8_t **next, const uint8_t *end)
{
    const size_t runs = (size_t)j->w->in / 32;
    if (run->precision != KERNEL_BF16 || tensor_type_block(j->w->type) == 1)
        return;
    for (int32_t r = 0; r < j->m; r++) {
        int8_t *high = scratch_take(next, end, runs * 32), *low = scratch_take(next, end, runs * 32);
        int32_t *start = scratch_take(next, end, runs * 32);
        float *d = scratch_take(next, end, runs * 4), *sum = scratch_take(next, end, runs * 4);
        float *pairs = scratch_take(next, end, runs * 8);
        for (size_t i = 0; i < runs; i++) {
            round_run(j->x + ((size_t)r * runs + i) * 32, quants_bias(j->w->type), high + i * 32, low + i * 32,
                      start + i * 8, d + i, sum + i);
            pairs[2 * i] = d[i];
            pairs[2 * i + 1] = sum[i];
        }
        rounded[r] = (struct rounded){high, low, start, pairs, d, sum};
    }
    j->rounded = rounded;
}
#endif

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
    const uint8_t *row = tensor_row(w, item * OUTPUTS);
    const ptrdiff_t row_bytes = tensor_row(w, 1) - tensor_row(w, 0);
    for (int32_t o = item * OUTPUTS; o < end; o++, row += row_bytes) {
        float bias = j->bias ? j->bias[o] : 0.0f;
#ifdef __AVX512VNNI__
        if (j->rounded) {
            for (int32_t i = 0; i < j->m; i++)
                j->y[(ptrdiff_t)i * w->out + o] = dot_rounded(w->type, row, &j->rounded[i], (size_t)w->in / 32) + bias;
            continue;
        }
#endif
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
#ifdef __AVX512VNNI__
    struct rounded rounded[KERNEL_DECODE_ROWS];
    round_input(run, &j, rounded, &next, end);
#endif
    pool_run(run->pool, (w->out + OUTPUTS - 1) / OUTPUTS, decode_item, &j);
}
