/*
 * The SIMD sources are written once against this header and compiled once per instruction set; ISA(name) gives each
 * copy its own name. A vec holds VL floats; a mask covers the first n of them. No inline function of another header
 * may be emitted out of line from these objects in a form that needs their instructions: everything here is static.
 */
#ifndef KERNELS_CPU_SIMD_H
#define KERNELS_CPU_SIMD_H

#include "kernels/cpu/internal.h"

#include <immintrin.h>
#include <math.h>

#define ISA_JOIN2(name, suffix) name##_##suffix
#define ISA_JOIN(name, suffix) ISA_JOIN2(name, suffix)
#define ISA(name) ISA_JOIN(name, KERNEL_SUFFIX)

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
#define VL 16
/* Tiles of the result that stay in registers, 24 of 32: 8 rows of 3 vectors for weights, whose panels come from the
 * second cache, and 6 × 4 for attention, whose heads are multiples of 64 wide. */
#define GEMM_ROWS 8
#define GEMM_VECS 3
#define GEMM_COLUMNS 48
#define WIDE_VECS 4
typedef __m512 vec;
typedef __mmask16 vmask;
INLINE vec vec_zero(void)
{
    return _mm512_setzero_ps();
}
INLINE vec vec_set(float x)
{
    return _mm512_set1_ps(x);
}
INLINE vec vec_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
INLINE void vec_store(float *p, vec x)
{
    _mm512_storeu_ps(p, x);
}
INLINE vmask vec_mask(int n)
{
    return (vmask)(n >= 16 ? 0xffff : (1u << n) - 1);
}
INLINE vmask vec_mask_range(int lo, int hi) /* lanes lo .. hi − 1, which may lie outside of the vector */
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(lo)), lane,
                                        _mm512_set1_epi32(hi));
}
INLINE vec vec_load_mask(const float *p, vmask m)
{
    return _mm512_maskz_loadu_ps(m, p);
}
INLINE void vec_store_mask(float *p, vec x, vmask m)
{
    _mm512_mask_storeu_ps(p, m, x);
}
INLINE vec vec_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}
INLINE vec vec_sub(vec a, vec b)
{
    return _mm512_sub_ps(a, b);
}
INLINE vec vec_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}
INLINE vec vec_div(vec a, vec b)
{
    return _mm512_div_ps(a, b);
}
INLINE vec vec_fma(vec a, vec b, vec c) /* a·b + c */
{
    return _mm512_fmadd_ps(a, b, c);
}
INLINE vec vec_max(vec a, vec b)
{
    return _mm512_max_ps(a, b);
}
INLINE vec vec_min(vec a, vec b)
{
    return _mm512_min_ps(a, b);
}
INLINE vec vec_keep(vec x, vmask m, float other)
{
    return _mm512_mask_blend_ps(m, _mm512_set1_ps(other), x);
}
INLINE bool vec_any_above(vec a, vec b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}
INLINE float vec_sum(vec x)
{
    return _mm512_reduce_add_ps(x);
}
INLINE float vec_top(vec x)
{
    return _mm512_reduce_max_ps(x);
}
INLINE float vec_first(vec x)
{
    return _mm512_cvtss_f32(x);
}
/* 16 unsigned or signed bytes to floats. */
INLINE void vec_from_u8(__m128i bytes, vec out[1])
{
    out[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
INLINE void vec_from_s8(__m128i bytes, vec out[1])
{
    out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#else
#define VL 8
#define GEMM_ROWS 6 /* 12 of 16 registers */
#define GEMM_VECS 2
#define GEMM_COLUMNS 64
#define WIDE_VECS 2
typedef __m256 vec;
typedef __m256i vmask;
INLINE vec vec_zero(void)
{
    return _mm256_setzero_ps();
}
INLINE vec vec_set(float x)
{
    return _mm256_set1_ps(x);
}
INLINE vec vec_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
INLINE void vec_store(float *p, vec x)
{
    _mm256_storeu_ps(p, x);
}
INLINE vmask vec_mask(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vmask vec_mask_range(int lo, int hi)
{
    return _mm256_andnot_si256(vec_mask(lo), vec_mask(hi));
}
INLINE vec vec_load_mask(const float *p, vmask m)
{
    return _mm256_maskload_ps(p, m);
}
INLINE void vec_store_mask(float *p, vec x, vmask m)
{
    _mm256_maskstore_ps(p, m, x);
}
INLINE vec vec_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}
INLINE vec vec_sub(vec a, vec b)
{
    return _mm256_sub_ps(a, b);
}
INLINE vec vec_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}
INLINE vec vec_div(vec a, vec b)
{
    return _mm256_div_ps(a, b);
}
INLINE vec vec_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}
INLINE vec vec_max(vec a, vec b)
{
    return _mm256_max_ps(a, b);
}
INLINE vec vec_min(vec a, vec b)
{
    return _mm256_min_ps(a, b);
}
INLINE vec vec_keep(vec x, vmask m, float other)
{
    return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(m));
}
INLINE bool vec_any_above(vec a, vec b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
INLINE float vec_sum(vec x)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float vec_top(vec x)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
INLINE float vec_first(vec x)
{
    return _mm256_cvtss_f32(x);
}
INLINE void vec_from_u8(__m128i bytes, vec out[2])
{
    out[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    out[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
}
INLINE void vec_from_s8(__m128i bytes, vec out[2])
{
    out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    out[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
}
#endif

#define VECS16 (16 / VL)         /* vectors that hold 16 floats */
#define GEMM_NR (GEMM_VECS * VL) /* columns of a micro-panel */
#define WIDE_ROWS 6
#define WIDE_NR (WIDE_VECS * VL)

/* The sums of four vectors. */
INLINE void vec_sum4(const vec s[4], float out[4])
{
#ifdef __AVX512F__
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
    const __m256 half = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
#endif
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* Adding it to a value within ±2^22 rounds that to a whole number and leaves the number + 127 in the lowest bits. */
#define EXP_ROUND 12583039.0f /* 1.5·2^23 + 127 */

/* p·2^n, where rounded = n + EXP_ROUND and n is in −126..127. */
INLINE vec exp_scale(vec p, vec n, vec rounded)
{
#ifdef __AVX512F__
    (void)rounded;
    return _mm512_scalef_ps(p, n);
#else
    (void)n;
    return vec_mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(rounded), 23)));
#endif
}

/* e^x within 2 units in the last place; saturates below −87 (to about 1e-38) and above 88, keeps a NaN. Range
 * reduction by ln 2 in two parts, then 1 + r·P(r), P of degree 5, least largest relative error (2e-9) on |r| ≤ ln(2)/2.
 */
INLINE vec vec_exp(vec x)
{
    x = vec_max(vec_set(-87.0f), vec_min(vec_set(88.0f), x)); /* the second operand is what a NaN gives */
    vec rounded = vec_fma(x, vec_set(1.44269504088896341f), vec_set(EXP_ROUND));
    vec n = vec_sub(rounded, vec_set(EXP_ROUND));
    vec r = vec_fma(n, vec_set(-0.693359375f), x);
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    vec p = vec_set(0x1.6ae720p-10f);
    p = vec_fma(p, r, vec_set(0x1.126794p-7f));
    p = vec_fma(p, r, vec_set(0x1.555822p-5f));
    p = vec_fma(p, r, vec_set(0x1.55541ap-3f));
    p = vec_fma(p, r, vec_set(0x1.fffffcp-2f));
    p = vec_fma(p, r, vec_set(1.0f));
    p = vec_fma(p, r, vec_set(1.0f));
    return exp_scale(p, n, rounded);
}

/* 2^x for x ≤ 127, likewise; saturates below −126. Where the scale of x can be folded into what made it, this saves
 * the reduction. */
INLINE vec vec_exp2(vec x)
{
    x = vec_max(vec_set(-126.0f), x);
    vec rounded = vec_add(x, vec_set(EXP_ROUND));
    vec n = vec_sub(rounded, vec_set(EXP_ROUND));
    vec r = vec_sub(x, n);
    vec p = vec_set(0x1.41fbbcp-13f);
    p = vec_fma(p, r, vec_set(0x1.5f3e54p-10f));
    p = vec_fma(p, r, vec_set(0x1.3b2d4cp-7f));
    p = vec_fma(p, r, vec_set(0x1.c6aee8p-5f));
    p = vec_fma(p, r, vec_set(0x1.ebfbdcp-3f));
    p = vec_fma(p, r, vec_set(0x1.62e430p-1f));
    p = vec_fma(p, r, vec_set(1.0f));
    return exp_scale(p, n, rounded);
}

/*
 * One product C (m, n) = alpha·A·B + bias (+ C). A(i, k) is a[i·a_row + k·a_k]. B comes from w, packed per call
 * (transposed: B = Wᵀ, so n = out, k = in; else n = in, k = out), or, if w is NULL, from b with rows ldb apart.
 * Each C(i, j) is the sum over k in order, fused, from zero, at most GEMM_DEPTH deep, then added: nothing about the
 * other rows or the partition enters. rounded: both operands are, as gemm.h says.
 */
struct gemm {
    int32_t m, n, k;
    const float *a;
    ptrdiff_t a_row, a_k;
    const struct tensor *w;
    bool transposed;
    const float *b;
    ptrdiff_t ldb;
    float alpha;
    const float *bias; /* (n) or NULL */
    bool accumulate;
    float *c;
    ptrdiff_t ldc;
    bool rounded;               /* only where may_round() */
    const struct low_rank *low; /* added, of rank ≤ GEMM_LOW_RANK_MAX; only with w. NULL: none */
};

/* Rounding needs the instructions and is asked for by the run. */
INLINE bool may_round(const struct kernel_run *run)
{
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
    return run->precision == KERNEL_BF16;
#else
    (void)run;
    return false;
#endif
}

void ISA(gemm)(const struct kernel_run *run, const struct gemm *g);

/* One thread, one panel: C (m, columns) (+)= alpha·A·B with B at b, rows ldb apart, and bias if not NULL. */
struct gemm_panel {
    int32_t m, k, columns;
    const float *a;
    ptrdiff_t a_row, a_k;
    const float *b;
    ptrdiff_t ldb;
    float alpha;
    const float *bias;
    bool accumulate;
    float *c;
    ptrdiff_t ldc;
    int32_t thin_k; /* more depth, float32 in every kind of product: rows of thin_a against thin_b (thin_k, GEMM_NR) */
    const float *thin_a, *thin_b;
    ptrdiff_t thin_row;
};
void ISA(gemm_panel)(const struct gemm_panel *g);      /* of up to GEMM_NR columns */
void ISA(gemm_panel_wide)(const struct gemm_panel *g); /* of up to WIDE_NR columns, and no thin product */

/* Writes rows [0, rows) of src (row j at src + j·stride, k values each) transposed: panel (k, WIDE_NR), rows beyond
 * `rows` zero. panel has room for k rounded up to VL. */
void ISA(pack_transposed)(const float *src, ptrdiff_t stride, int32_t rows, int32_t k, float *panel);

/* Values [first, first + n) of a row; quantised types need multiples of 16. */
void ISA(dequantise)(enum tensor_type type, const uint8_t *row, size_t first, size_t n, float *out);
/* The same of `rows` rows that are row_bytes apart, to rows of out that are stride floats apart. */
void ISA(dequantise_rows)(enum tensor_type type, const uint8_t *row, ptrdiff_t row_bytes, int32_t rows, size_t first,
                          size_t n, float *out, ptrdiff_t stride);
/* The same values turned over: VL rows (if `rows` are fewer, the last one again) in the lanes of a vector, one position
 * each `stride` floats of out. Quantised types only; multiples of 32. */
void ISA(dequantise_lanes)(enum tensor_type type, const uint8_t *row, ptrdiff_t row_bytes, int32_t rows, size_t first,
                           size_t n, float *out, ptrdiff_t stride);

/* The operations of this instruction set, for table.c. */
void ISA(linear_forward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const float *bias,
                         const struct low_rank *low, const float *x, float *y, bool accumulate);
void ISA(linear_backward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const struct low_rank *low,
                          const float *dy, float *dx, bool accumulate);
void ISA(linear_decode)(const struct kernel_run *run, int32_t m, int32_t count, const struct served_linear *linears,
                        const float *x);
size_t ISA(interleaved_bytes)(const struct tensor *w);
void ISA(interleave)(const struct kernel_run *run, const struct tensor *w, void *to);
void ISA(lora_down)(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a, const float *x,
                    float *h);
void ISA(lora_up)(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                  const float *h, int32_t h_stride, float *y);
void ISA(lora_up_backward)(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                           const float *dy, float *dh, int32_t dh_stride);
void ISA(lora_down_backward)(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a,
                             const float *dh, float *dx);
void ISA(lora_grad_b)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t out, int32_t r, float s,
                      const float *dy, const float *h, int32_t h_stride, float *gb);
void ISA(lora_grad_a)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t in, int32_t r, const float *dh,
                      int32_t dh_stride, const float *x, float *ga);
void ISA(rmsnorm_forward)(const struct kernel_run *run, int32_t m, int32_t n, float eps, const float *gain, float *x,
                          const float *add, float *y, float *rstd);
void ISA(rmsnorm_backward)(const struct kernel_run *run, int32_t m, int32_t n, const float *gain, const float *x,
                           const float *rstd, const float *dy, float *dx, bool accumulate);
void ISA(rope)(const struct kernel_run *run, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
               enum rope_order order, bool inverse, const float *table, const int32_t *positions, float *x);
void ISA(gated_forward)(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, const float *gate,
                        const float *up, int32_t gate_stride, float *out);
void ISA(gated_backward)(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, float *gate,
                         float *up, int32_t gate_stride, const float *dout);
void ISA(embed)(const struct kernel_run *run, int32_t m, const struct tensor *w, const int32_t *ids, float scale,
                float *y);
void ISA(add)(const struct kernel_run *run, size_t n, const float *b, float *a);
void ISA(attention_forward)(const struct kernel_run *run, const struct attention_shape *shape,
                            const struct segments *segments, const float *q, const float *k, const float *v, float *o,
                            float *lse);
void ISA(attention_backward)(const struct kernel_run *run, const struct attention_shape *shape,
                             const struct segments *segments, const float *q, const float *k, const float *v,
                             const float *o, const float *lse, const float *do_, float *dq, float *dk, float *dv);
void ISA(attention_decode)(const struct kernel_run *run, const struct attention_shape *shape, int32_t rows,
                           int32_t length, const float *q, const float *k, const float *v, int32_t kv_stride, float *o);
void ISA(cross_entropy)(const struct kernel_run *run, const struct tensor *w, const struct labels *labels,
                        const float *x, float *losses, float *dx);
void ISA(adamw)(const struct kernel_run *run, size_t n, const struct adamw_params *params, const float *g, float *m,
                float *v, float *p);
void ISA(sgd_momentum)(const struct kernel_run *run, size_t n, float lr, float momentum, const float *g, float *m,
                       float *p);

#endif
