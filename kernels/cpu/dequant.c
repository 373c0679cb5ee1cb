/* Decoding rows of weights: the same arithmetic as tensor.c (one product, one sum), hence the same bits. */
#include "kernels/cpu/quants.h"

/* Types whose values are a product alone: a zero's sign is the product's. */
INLINE bool products_only(enum tensor_type type)
{
    return type == TENSOR_Q4_0 || type == TENSOR_Q5_0 || type == TENSOR_Q6_K || type == TENSOR_Q8_0;
}

/* Runs first .. end − 1. */
INLINE void runs(enum tensor_type type, const uint8_t *row, size_t first, size_t end, float *out)
{
    const __m256i bias = _mm256_set1_epi8((char)quants_bias(type));
    for (size_t run = first; run < end; run++, out += 32) {
        float d[2], m;
        const __m256i bytes = _mm256_sub_epi8(quants_bytes(type, row, run), bias);
        quants_scales(type, row, run, d, &m);
        for (int half = 0; half < 2; half++) {
            vec x[VECS16];
            vec_from_s8(half ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes), x);
            for (int i = 0; i < VECS16; i++) {
                vec y = vec_mul(x[i], vec_set(d[half]));
                if (!products_only(type))
                    y = vec_add(y, vec_set(m));
                vec_store(out + half * 16 + i * VL, y);
            }
        }
    }
}

static void q2_run(const uint8_t *b, int j, float *out)
{
    const uint8_t *q = b + 16 + (j >> 2) * 32;
    float d = quants_half(b + 80), m = quants_half(b + 82);
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
    const uint8_t *p = row + first * 2;
    for (; i + 8 <= n; i += 8) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)(p + i * 2));
        __m256 y = type == TENSOR_F16 ? _mm256_cvtph_ps(x)
                                      : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
        _mm256_storeu_ps(out + i, y);
    }
    for (; i < n; i++)
        out[i] = type == TENSOR_F16 ? quants_half(p + i * 2) : bfloat_to_float(p + i * 2);
}

/* One type's loop over rows. */
#define ROWS(type, decode)                                                                                             \
    case type:                                                                                                         \
        for (int32_t i = 0; i < rows; i++, row += row_bytes, out += stride)                                            \
            decode;                                                                                                    \
        break

void ISA(dequantise_rows)(enum tensor_type type, const uint8_t *row, ptrdiff_t row_bytes, int32_t rows, size_t first,
                          size_t n, float *out, ptrdiff_t stride)
{
    const size_t run = first / 32, end = run + n / 32;
    assert(tensor_type_block(type) == 1 || (first % 32 == 0 && n % 32 == 0));
    switch (type) {
        ROWS(TENSOR_Q4_0, runs(TENSOR_Q4_0, row, run, end, out));
        ROWS(TENSOR_Q4_1, runs(TENSOR_Q4_1, row, run, end, out));
        ROWS(TENSOR_Q5_0, runs(TENSOR_Q5_0, row, run, end, out));
        ROWS(TENSOR_Q5_1, runs(TENSOR_Q5_1, row, run, end, out));
        ROWS(TENSOR_Q8_0, runs(TENSOR_Q8_0, row, run, end, out));
        ROWS(TENSOR_Q4_K, runs(TENSOR_Q4_K, row, run, end, out));
        ROWS(TENSOR_Q5_K, runs(TENSOR_Q5_K, row, run, end, out));
        ROWS(TENSOR_Q6_K, runs(TENSOR_Q6_K, row, run, end, out));
        ROWS(TENSOR_Q2_K,
             for (size_t k = run; k < end; k++) q2_run(row + k / 8 * 84, (int)(k % 8), out + (k - run) * 32));
        ROWS(TENSOR_F32, memcpy(out, row + first * 4, n * 4));
    default: /* 16 bits */
        for (int32_t i = 0; i < rows; i++, row += row_bytes, out += stride)
            floats(type, row, first, n, out);
    }
}

void ISA(dequantise)(enum tensor_type type, const uint8_t *row, size_t first, size_t n, float *out)
{
    ISA(dequantise_rows)(type, row, 0, 1, first, n, out, 0);
}
