/*
 * The 32 quants of one run of a quantised row, as bytes, and what makes values of them: (q − bias)·d + m. Included by
 * SIMD sources only; `type` is a constant wherever this is inlined, so that each type has a loop of its own.
 */
#ifndef KERNELS_CPU_QUANTS_H
#define KERNELS_CPU_QUANTS_H

#include "kernels/cpu/simd.h"

#define EACH_QUANTISED_TYPE(do_it)                                                                                     \
    do_it(TENSOR_Q4_0) do_it(TENSOR_Q4_1) do_it(TENSOR_Q5_0) do_it(TENSOR_Q5_1) do_it(TENSOR_Q8_0) do_it(TENSOR_Q2_K)  \
        do_it(TENSOR_Q4_K) do_it(TENSOR_Q5_K) do_it(TENSOR_Q6_K)

INLINE float quants_half(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

INLINE __m256i quants_load(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* 16 bytes: low nibbles are values 0 to 15, high ones 16 to 31. */
INLINE __m256i quants_nibbles(const uint8_t *p)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)p);
    __m256i both = _mm256_broadcastsi128_si256(bytes); /* shifted by dwords: what crosses bytes is masked away */
    both = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

/* 16 in byte i where bit i is set. */
INLINE __m256i quants_fifth_bits(const uint8_t *p)
{
    int32_t bits;
    memcpy(&bits, p, 4);
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), mask);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, mask), _mm256_set1_epi8(16));
}

/* Run j of a block of Q4_K (five false) or Q5_K. */
INLINE __m256i quants_k45(const uint8_t *b, int j, bool five)
{
    __m256i q = quants_load(b + (five ? 48 : 16) + j / 2 * 32);
    q = _mm256_and_si256(_mm256_srl_epi16(q, _mm_cvtsi32_si128(j & 1 ? 4 : 0)), _mm256_set1_epi8(15));
    if (!five)
        return q;
    __m256i high = _mm256_srl_epi16(quants_load(b + 16), _mm_cvtsi32_si128(j));
    high = _mm256_and_si256(high, _mm256_set1_epi8(1));
    return _mm256_or_si256(q, _mm256_slli_epi16(high, 4));
}

INLINE __m256i quants_q6k(const uint8_t *b, int j)
{
    const int part = j >> 2, quarter = j & 3;
    __m256i low = quants_load(b + part * 64 + (quarter & 1) * 32), high = quants_load(b + 128 + part * 32);
    low = _mm256_and_si256(_mm256_srl_epi16(low, _mm_cvtsi32_si128(quarter >> 1 ? 4 : 0)), _mm256_set1_epi8(15));
    high = _mm256_and_si256(_mm256_srl_epi16(high, _mm_cvtsi32_si128(quarter * 2)), _mm256_set1_epi8(3));
    return _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
}

/* Four 2-bit values to a byte: a run takes the same two bits of 32 bytes. */
INLINE __m256i quants_q2k(const uint8_t *b, int j)
{
    const __m256i q = _mm256_srl_epi16(quants_load(b + 16 + (j >> 2) * 32), _mm_cvtsi32_si128((j & 3) * 2));
    return _mm256_and_si256(q, _mm256_set1_epi8(3));
}

/* The 6-bit scale and minimum of run j out of the 12 packed bytes of Q4_K and Q5_K. */
INLINE void quants_k_scale(const uint8_t *s, int j, uint8_t *scale, uint8_t *min)
{
    *scale = (uint8_t)(j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
    *min = (uint8_t)(j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4);
}

/* Unsigned bytes. Q8_0's are moved up by 128. */
INLINE __m256i quants_bytes(enum tensor_type type, const uint8_t *row, size_t run)
{
    switch (type) {
    case TENSOR_Q4_0:
        return quants_nibbles(row + run * 18 + 2);
    case TENSOR_Q4_1:
        return quants_nibbles(row + run * 20 + 4);
    case TENSOR_Q5_0:
        return _mm256_or_si256(quants_nibbles(row + run * 22 + 6), quants_fifth_bits(row + run * 22 + 2));
    case TENSOR_Q5_1:
        return _mm256_or_si256(quants_nibbles(row + run * 24 + 8), quants_fifth_bits(row + run * 24 + 4));
    case TENSOR_Q4_K:
        return quants_k45(row + run / 8 * 144, (int)(run % 8), false);
    case TENSOR_Q5_K:
        return quants_k45(row + run / 8 * 176, (int)(run % 8), true);
    case TENSOR_Q2_K:
        return quants_q2k(row + run / 8 * 84, (int)(run % 8));
    case TENSOR_Q6_K:
        return quants_q6k(row + run / 8 * 210, (int)(run % 8));
    default:
        return _mm256_xor_si256(quants_load(row + run * 34 + 2), _mm256_set1_epi8((char)-128));
    }
}

INLINE int quants_bias(enum tensor_type type)
{
    return type == TENSOR_Q4_0   ? 8
           : type == TENSOR_Q5_0 ? 16
           : type == TENSOR_Q6_K ? 32
           : type == TENSOR_Q8_0 ? 128
                                 : 0;
}

/* d and m of a run's halves. */
INLINE void quants_scales(enum tensor_type type, const uint8_t *row, size_t run, float d[2], float m[2])
{
    const uint8_t *b;
    m[0] = m[1] = 0;
    switch (type) {
    case TENSOR_Q4_1:
    case TENSOR_Q5_1:
        b = row + run * (type == TENSOR_Q4_1 ? 20 : 24);
        d[0] = d[1] = quants_half(b);
        m[0] = m[1] = quants_half(b + 2);
        return;
    case TENSOR_Q4_K:
    case TENSOR_Q5_K: {
        b = row + run / 8 * (type == TENSOR_Q4_K ? 144 : 176);
        uint8_t scale, min;
        quants_k_scale(b + 4, (int)(run % 8), &scale, &min);
        d[0] = d[1] = quants_half(b) * (float)scale;
        m[0] = m[1] = -(quants_half(b + 2) * (float)min);
        return;
    }
    case TENSOR_Q2_K:
        b = row + run / 8 * 84;
        for (int half = 0; half < 2; half++) {
            const uint8_t packed = b[run % 8 * 2 + (size_t)half];
            d[half] = quants_half(b + 80) * (float)(packed & 15);
            m[half] = -(quants_half(b + 82) * (float)(packed >> 4));
        }
        return;
    case TENSOR_Q6_K: {
        b = row + run / 8 * 210;
        const int8_t *s = (const int8_t *)b + 192 + run % 8 * 2;
        d[0] = quants_half(b + 208) * (float)s[0];
        d[1] = quants_half(b + 208) * (float)s[1];
        return;
    }
    default:
        d[0] = d[1] = quants_half(row + run * (type == TENSOR_Q4_0 ? 18 : type == TENSOR_Q5_0 ? 22 : 34));
    }
}

#endif
