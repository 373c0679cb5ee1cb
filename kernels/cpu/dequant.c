/* Decoding rows of weights: the same arithmetic as tensor.c (one product, one sum), hence the same bits. */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/quants.h"

/* Rows asked for ahead of their use: a panel takes little of each. */
#define ROWS_AHEAD 12

/* Types whose values are a product alone: a zero's sign is the product's. */
INLINE bool products_only(enum tensor_type type)
{
    return type == TENSOR_Q4_0 || type == TENSOR_Q5_0 || type == TENSOR_Q6_K || type == TENSOR_Q8_0;
}

/* Half runs, of 16 values, first .. end − 1. */
INLINE void halves(enum tensor_type type, const uint8_t *row, size_t first, size_t end, float *out)
{
    const __m256i bias = _mm256_set1_epi8((char)quants_bias(type));
    for (size_t run = first / 2; run * 2 < end; run++) {
        float d[2], m[2];
        const __m256i bytes = _mm256_sub_epi8(quants_bytes(type, row, run), bias);
        quants_scales(type, row, run, d, m);
        for (size_t half = 0; half < 2; half++) {
            if (run * 2 + half < first || run * 2 + half >= end)
                continue;
            vec x[VECS16];
            vec_from_s8(half ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes), x);
            for (int i = 0; i < VECS16; i++, out += VL) {
                vec y = vec_mul(x[i], vec_set(d[half]));
                if (!products_only(type))
                    y = vec_add(y, vec_set(m[half]));
                vec_store(out, y);
            }
        }
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
#define ROWS(type)                                                                                                     \
    case type:                                                                                                         \
        for (int32_t i = 0; i < rows; i++, row += row_bytes, out += stride) {                                          \
            _mm_prefetch((const char *)row + ahead, _MM_HINT_T0);                                                      \
            halves(type, row, first / 16, (first + n) / 16, out);                                                      \
        }                                                                                                              \
        break;

void ISA(dequantise_rows)(enum tensor_type type, const uint8_t *row, ptrdiff_t row_bytes, int32_t rows, size_t first,
                          size_t n, float *out, ptrdiff_t stride)
{
    const size_t block = tensor_type_block(type);
    const ptrdiff_t ahead = ROWS_AHEAD * row_bytes + (ptrdiff_t)(first / block * tensor_type_block_bytes(type));
    assert(block == 1 || (first % 16 == 0 && n % 16 == 0));
    switch (type) {
        EACH_QUANTISED_TYPE(ROWS)
    case TENSOR_F32:
        for (int32_t i = 0; i < rows; i++, row += row_bytes, out += stride)
            memcpy(out, row + first * 4, n * 4);
        break;
    default: /* 16 bits */
        for (int32_t i = 0; i < rows; i++, row += row_bytes, out += stride)
            floats(type, row, first, n, out);
    }
}

void ISA(dequantise)(enum tensor_type type, const uint8_t *row, size_t first, size_t n, float *out)
{
    ISA(dequantise_rows)(type, row, 0, 1, first, n, out, 0);
}

/* --- turned over ----------------------------------------------------------------------------------------------------
 */

/* Rows of 32 bytes as words of 32 bits: word w of all rows. */
#ifdef __AVX512F__
typedef __m512i words;
INLINE void turn_words(const __m256i q[VL], words out[8])
{
    __m512i t[8], u[8];
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                  odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_inserti64x4(_mm512_castsi256_si512(q[i]), q[i + 8], 1);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        u[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
        u[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
        t[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
        t[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
        t[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        out[i] = _mm512_permutex2var_epi64(t[i], even, t[4 + i]);
        out[4 + i] = _mm512_permutex2var_epi64(t[i], odd, t[4 + i]);
    }
}
INLINE vec byte_values(words x, int byte, bool with_sign)
{
    if (with_sign)
        x = _mm512_srai_epi32(_mm512_slli_epi32(x, (unsigned)(24 - 8 * byte)), 24);
    else
        x = _mm512_and_si512(_mm512_srli_epi32(x, (unsigned)(8 * byte)), _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(x);
}
#else
typedef __m256i words;
INLINE void turn_words(const __m256i q[VL], words out[8])
{
    __m256i t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        u[i] = _mm256_unpacklo_epi32(q[i], q[i + 1]);
        u[i + 1] = _mm256_unpackhi_epi32(q[i], q[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm256_unpacklo_epi64(u[i], u[i + 2]);
        t[i + 1] = _mm256_unpackhi_epi64(u[i], u[i + 2]);
        t[i + 2] = _mm256_unpacklo_epi64(u[i + 1], u[i + 3]);
        t[i + 3] = _mm256_unpackhi_epi64(u[i + 1], u[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x20);
        out[4 + i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x31);
    }
}
INLINE vec byte_values(words x, int byte, bool with_sign)
{
    if (with_sign)
        x = _mm256_srai_epi32(_mm256_slli_epi32(x, 24 - 8 * byte), 24);
    else
        x = _mm256_and_si256(_mm256_srli_epi32(x, 8 * byte), _mm256_set1_epi32(255));
    return _mm256_cvtepi32_ps(x);
}
#endif

/* Runs first .. end − 1. */
INLINE void lanes(enum tensor_type type, const uint8_t *row, ptrdiff_t row_bytes, int32_t rows, size_t first,
                  size_t end, float *out, ptrdiff_t stride)
{
    const __m256i bias = _mm256_set1_epi8((char)quants_bias(type));
    const uint8_t *at[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
        at[i] = row + (i < rows ? i : rows - 1) * row_bytes;
    for (size_t run = first; run < end; run++) {
        __m256i q[VL];
        words turned[8];
        vec d[2], m[2];
        float scales[4][VL] __attribute__((aligned(64)));
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) {
            float rd[2], rm[2];
            q[i] = _mm256_sub_epi8(quants_bytes(type, at[i], run), bias);
            quants_scales(type, at[i], run, rd, rm);
            scales[0][i] = rd[0];
            scales[1][i] = rd[1];
            scales[2][i] = rm[0];
            scales[3][i] = rm[1];
        }
        for (int half = 0; half < 2; half++) {
            d[half] = vec_load(scales[half]);
            m[half] = vec_load(scales[2 + half]);
        }
        turn_words(q, turned);
#pragma GCC unroll 32
        for (int k = 0; k < 32; k++, out += stride) {
            const vec y = vec_mul(byte_values(turned[k / 4], k % 4, products_only(type)), d[k / 16]);
            vec_store(out, products_only(type) ? y : vec_add(y, m[k / 16]));
        }
    }
}

void ISA(dequantise_lanes)(enum tensor_type type, const uint8_t *row, ptrdiff_t row_bytes, int32_t rows, size_t first,
                           size_t n, float *out, ptrdiff_t stride)
{
    assert(first % 32 == 0 && n % 32 == 0);
    switch (type) {
#define LANES_OF(type)                                                                                                 \
    case type:                                                                                                         \
        lanes(type, row, row_bytes, rows, first / 32, (first + n) / 32, out, stride);                                  \
        break;
        EACH_QUANTISED_TYPE(LANES_OF)
    default:
        assert(!"a type that is not quantised");
    }
}
