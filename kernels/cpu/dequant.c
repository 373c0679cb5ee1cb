/* Decoding rows of weights: the same arithmetic as tensor.c (one product, one sum), hence the same bits. */
#include "kernels/cpu/simd.h"

INLINE void q4_run(const uint8_t *q, float *out, vec d, vec m)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)q), mask = _mm_set1_epi8(15);
    vec low[VECS16], high[VECS16];
    vec_from_u8(_mm_and_si128(bytes, mask), low);
    vec_from_u8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), high);
    for (int i = 0; i < VECS16; i++) {
        vec_store(out + i * VL, vec_add(vec_mul(low[i], d), m));
        vec_store(out + 16 + i * VL, vec_add(vec_mul(high[i], d), m));
    }
}

/* 16 values of 6 bits minus 32, from bytes that hold v. */
INLINE void q6_store(__m128i v, float scale, float *out)
{
    vec x[VECS16];
    vec_from_s8(_mm_sub_epi8(v, _mm_set1_epi8(32)), x);
    for (int i = 0; i < VECS16; i++)
        vec_store(out + i * VL, vec_mul(x[i], vec_set(scale)));
}

INLINE float half(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

static void q6_run(const uint8_t *b, int j, float *out)
{
    int part = j >> 2, quarter = j & 3;
    const uint8_t *low = b + part * 64 + (quarter & 1) * 32, *high = b + 128 + part * 32;
    const int8_t *scales = (const int8_t *)b + 192 + part * 8 + quarter * 2;
    float d = half(b + 208);
    for (int i = 0; i < 2; i++) {
        __m128i l = _mm_loadu_si128((const __m128i *)(const void *)(low + i * 16));
        __m128i h = _mm_loadu_si128((const __m128i *)(const void *)(high + i * 16));
        l = _mm_and_si128(_mm_srl_epi16(l, _mm_cvtsi32_si128(quarter >> 1 ? 4 : 0)), _mm_set1_epi8(15));
        h = _mm_and_si128(_mm_srl_epi16(h, _mm_cvtsi32_si128(quarter * 2)), _mm_set1_epi8(3));
        q6_store(_mm_or_si128(l, _mm_slli_epi16(h, 4)), d * (float)scales[i], out + i * 16);
    }
}

static void q2_run(const uint8_t *b, int j, float *out)
{
    const uint8_t *q = b + 16 + (j >> 2) * 32;
    float d = half(b + 80), m = half(b + 82);
    vec x[VECS16];
    for (int i = 0; i < 2; i++) {
        uint8_t packed = b[j * 2 + i];
        vec scale = vec_set(d * (float)(packed & 15)), min = vec_set(m * (float)(packed >> 4));
        __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(q + i * 16));
        bytes = _mm_and_si128(_mm_srl_epi16(bytes, _mm_cvtsi32_si128((j & 3) * 2)), _mm_set1_epi8(3));
        vec_from_u8(bytes, x);
        for (int k = 0; k < VECS16; k++)
            vec_store(out + i * 16 + k * VL, vec_sub(vec_mul(x[k], scale), min));
    }
}

static void floats(enum tensor_type type, const uint8_t *row, size_t first, size_t n, float *out)
{
    size_t i = 0;
    if (type == TENSOR_F32) {
        memcpy(out, row + first * 4, n * 4);
        return;
    }
    const uint8_t *p = row + first * 2;
    for (; i + 8 <= n; i += 8) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)(p + i * 2));
        __m256 y = type == TENSOR_F16 ? _mm256_cvtph_ps(x)
                                      : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
        _mm256_storeu_ps(out + i, y);
    }
    for (; i < n; i++)
        out[i] = type == TENSOR_F16 ? half(p + i * 2) : bfloat_to_float(p + i * 2);
}

void ISA(dequantise)(enum tensor_type type, const uint8_t *row, size_t first, size_t n, float *out)
{
    if (type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_BF16) {
        floats(type, row, first, n, out);
        return;
    }
    assert(first % 32 == 0 && n % 32 == 0);
    size_t run = first / 32, end = run + n / 32;
    switch (type) {
    case TENSOR_Q4_1:
        for (const uint8_t *b = row + run * 20; run < end; run++, b += 20, out += 32)
            q4_run(b + 4, out, vec_set(half(b)), vec_set(half(b + 2)));
        break;
    case TENSOR_Q8_0:
        for (const uint8_t *b = row + run * 34; run < end; run++, b += 34, out += 32) {
            vec d = vec_set(half(b)), x[VECS16];
            for (int i = 0; i < 2; i++) {
                vec_from_s8(_mm_loadu_si128((const __m128i *)(const void *)(b + 2 + i * 16)), x);
                for (int j = 0; j < VECS16; j++)
                    vec_store(out + i * 16 + j * VL, vec_mul(x[j], d));
            }
        }
        break;
    case TENSOR_Q2_K:
        for (; run < end; run++, out += 32)
            q2_run(row + run / 8 * 84, (int)(run % 8), out);
        break;
    case TENSOR_Q6_K:
        for (; run < end; run++, out += 32)
            q6_run(row + run / 8 * 210, (int)(run % 8), out);
        break;
    default:
        for (; run < end; run++, out += 32)
            decode_run32(type, row, run, out);
    }
}
