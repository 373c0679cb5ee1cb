/* Decoding rows of weights: the same arithmetic as tensor.c (one product, one sum), hence the same bits. */
#include "kernels/cpu/quants.h"

/* Runs first .. end − 1. Q6_K and Q8_0 have no sum: a zero's sign is the product's. */
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
                if (type != TENSOR_Q6_K && type != TENSOR_Q8_0)
                    y = vec_add(y, vec_set(m));
                vec_store(out + half * 16 + i * VL, y);
            }
        }
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
        out[i] = type == TENSOR_F16 ? quants_half(p + i * 2) : bfloat_to_float(p + i * 2);
}

void ISA(dequantise)(enum tensor_type type, const uint8_t *row, size_t first, size_t n, float *out)
{
    if (type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_BF16) {
        floats(type, row, first, n, out);
        return;
    }
    assert(first % 32 == 0 && n % 32 == 0);
    const size_t run = first / 32, end = run + n / 32;
    switch (type) {
    case TENSOR_Q4_0:
        runs(TENSOR_Q4_0, row, run, end, out);
        break;
    case TENSOR_Q4_1:
        runs(TENSOR_Q4_1, row, run, end, out);
        break;
    case TENSOR_Q5_0:
        runs(TENSOR_Q5_0, row, run, end, out);
        break;
    case TENSOR_Q5_1:
        runs(TENSOR_Q5_1, row, run, end, out);
        break;
    case TENSOR_Q8_0:
        runs(TENSOR_Q8_0, row, run, end, out);
        break;
    case TENSOR_Q4_K:
        runs(TENSOR_Q4_K, row, run, end, out);
        break;
    case TENSOR_Q5_K:
        runs(TENSOR_Q5_K, row, run, end, out);
        break;
    case TENSOR_Q6_K:
        runs(TENSOR_Q6_K, row, run, end, out);
        break;
    default:
        for (size_t i = run; i < end; i++, out += 32)
            decode_run32(type, row, i, out);
    }
}
