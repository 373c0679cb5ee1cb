/*
 * Weights for serving: 16 rows of W side by side, a lane each, made once and read from then on.
 *
 * Row by row a product with one x needs a sum across lanes for each row and a scale for each 32 weights. Here a vector
 * holds one position of 16 rows: scales are loaded for 16 rows at once, x is broadcast, and nothing is summed across
 * lanes. The copy has the file's precision and, within 3 %, its size.
 *
 * A group is 16 rows; those beyond the last are zeros. Its blocks of 32 or 256 positions follow each other, each
 *
 *     half d[16], and where the type has minima half m[16]
 *     for each run of 32 positions
 *         types in blocks of 256: 32 bytes of scales. Q4_K, Q5_K: scale[16], minimum[16]. Q2_K, Q6_K: scale[16] of the
 *             first 16 positions (Q2_K: the minimum in its high nibble), then of the others
 *         quants, bits·64 bytes. 8 bits: bytes (32, 16). Fewer: words of 32 bits (bits, 16), and a row's `bits` words
 *             are one string of 32·bits bits, lowest first. What the file moves up by a bias is in two's complement.
 *
 * Included by SIMD sources only; `type` is a constant wherever this is inlined.
 */
#ifndef KERNELS_CPU_INTERLEAVE_H
#define KERNELS_CPU_INTERLEAVE_H

#include "kernels/cpu/quants.h"

#define LANES 16 /* rows of a group */

INLINE int lanes_bits(enum tensor_type type)
{
    switch (type) {
    case TENSOR_Q2_K:
        return 2;
    case TENSOR_Q5_0:
    case TENSOR_Q5_1:
    case TENSOR_Q5_K:
        return 5;
    case TENSOR_Q6_K:
        return 6;
    case TENSOR_Q8_0:
        return 8;
    default:
        return 4;
    }
}

INLINE bool lanes_signed(enum tensor_type type)
{
    return type == TENSOR_Q4_0 || type == TENSOR_Q5_0 || type == TENSOR_Q6_K || type == TENSOR_Q8_0;
}

/* Runs of a block; more than one means that each has scales of its own. */
INLINE int lanes_runs(enum tensor_type type)
{
    return type == TENSOR_Q2_K || type == TENSOR_Q4_K || type == TENSOR_Q5_K || type == TENSOR_Q6_K ? 8 : 1;
}

/* Scales of a run. */
INLINE int lanes_parts(enum tensor_type type)
{
    return type == TENSOR_Q2_K || type == TENSOR_Q6_K ? 2 : 1;
}

INLINE size_t lanes_head_bytes(enum tensor_type type)
{
    return lanes_signed(type) ? 32 : 64;
}

INLINE size_t lanes_scale_bytes(enum tensor_type type)
{
    return lanes_runs(type) > 1 ? 32 : 0;
}

INLINE size_t lanes_run_bytes(enum tensor_type type)
{
    return lanes_scale_bytes(type) + (size_t)lanes_bits(type) * 64;
}

INLINE size_t lanes_block_bytes(enum tensor_type type)
{
    return lanes_head_bytes(type) + (size_t)lanes_runs(type) * lanes_run_bytes(type);
}

/* Of interleave.c: where the group of 16 rows that row belongs to begins; and rows row .. row + VL − 1 at positions
 * first .. first + n − 1, one position each `stride` floats of `to`, with the bits of dequantise. */
const uint8_t *ISA(interleaved_group)(const struct tensor *w, int32_t row);
void ISA(interleaved_panel)(const struct tensor *w, int32_t row, size_t first, size_t n, float *to, ptrdiff_t stride);

/* --- vectors: VL of the 16 lanes, which begin where the caller's pointers say ------------------------------------- */

/* Makes floats of quants by looking them up, where there are instructions for it. */
struct lanes_table {
#ifdef __AVX512F__
    __m512 low, high;
#else
    char none;
#endif
};

INLINE struct lanes_table lanes_table(enum tensor_type type)
{
    struct lanes_table t = {0};
#ifdef __AVX512F__
    const int bits = lanes_bits(type);
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i above = _mm512_or_si512(index, _mm512_set1_epi32(16));
    const __m128i left = _mm_cvtsi32_si128(32 - bits);
    const __m512i low = _mm512_sll_epi32(index, left), high = _mm512_sll_epi32(above, left);
    const bool with_sign = lanes_signed(type);
    t.low = _mm512_cvtepi32_ps(with_sign ? _mm512_sra_epi32(low, left) : _mm512_srl_epi32(low, left));
    t.high = _mm512_cvtepi32_ps(with_sign ? _mm512_sra_epi32(high, left) : _mm512_srl_epi32(high, left));
#else
    (void)type;
#endif
    return t;
}

INLINE vec lanes_halves(const uint8_t *p)
{
#ifdef __AVX512F__
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
#endif
}

/* Bytes with or without sign. */
INLINE vec lanes_bytes(const uint8_t *p, bool with_sign)
{
#ifdef __AVX512F__
    const __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm512_cvtepi32_ps(with_sign ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#else
    const __m128i x = _mm_loadl_epi64((const __m128i *)(const void *)p);
    return _mm256_cvtepi32_ps(with_sign ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#endif
}

/* The quants at position k < 32 of a run; q: its quants. */
INLINE vec lanes_quant(enum tensor_type type, const struct lanes_table *t, const uint8_t *q, int k)
{
    const int bits = lanes_bits(type);
    if (bits == 8)
        return lanes_bytes(q + k * LANES, true);
    const int shift = k * bits % 32;
    const uint8_t *word = q + k * bits / 32 * 64;
    const bool cut = shift + bits > 32; /* the rest is in the next word */
#ifdef __AVX512F__
    __m512i x = _mm512_loadu_si512(word);
    if (shift > 0)
        x = _mm512_srli_epi32(x, (unsigned)shift);
    if (cut)
        x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_loadu_si512(word + 64), (unsigned)(32 - shift)));
    if (bits <= 4)
        return _mm512_permutexvar_ps(x, t->low);
    if (bits == 5)
        return _mm512_permutex2var_ps(t->low, x, t->high);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 26), 26)); /* Q6_K */
#else
    (void)t;
    __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)word);
    if (shift > 0)
        x = _mm256_srli_epi32(x, shift);
    if (cut) {
        const __m256i next = _mm256_loadu_si256((const __m256i *)(const void *)(word + 64));
        x = _mm256_or_si256(x, _mm256_slli_epi32(next, 32 - shift));
    }
    if (lanes_signed(type))
        x = _mm256_srai_epi32(_mm256_slli_epi32(x, 32 - bits), 32 - bits);
    else
        x = _mm256_and_si256(x, _mm256_set1_epi32((1 << bits) - 1));
    return _mm256_cvtepi32_ps(x);
#endif
}

/* d and m (or −dmin) of a block at its first lane's half. */
INLINE void lanes_block_scales(enum tensor_type type, const uint8_t *block, vec *d, vec *m)
{
    *d = lanes_halves(block);
    *m = lanes_signed(type) ? vec_zero() : lanes_halves(block + 2 * LANES);
}

/* The scale of a run's part and, where the type has minima, what is added: value = q·scale + min. */
INLINE void lanes_scales(enum tensor_type type, const uint8_t *scales, int part, vec d, vec m, vec *scale, vec *min)
{
    *scale = d;
    *min = m;
    if (lanes_runs(type) == 1)
        return;
    const uint8_t *bytes = scales + part * LANES;
    if (type == TENSOR_Q6_K) {
        *scale = vec_mul(d, lanes_bytes(bytes, true));
        return;
    }
    vec minimum;
    if (type == TENSOR_Q2_K) {
#ifdef __AVX512F__
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)bytes));
        minimum = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
        *scale = vec_mul(d, _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15))));
#else
        const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)bytes));
        minimum = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
        *scale = vec_mul(d, _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15))));
#endif
    } else {
        *scale = vec_mul(d, lanes_bytes(bytes, false));
        minimum = lanes_bytes(bytes + LANES, false);
    }
    *min = vec_sub(vec_zero(), vec_mul(m, minimum));
}

#endif
