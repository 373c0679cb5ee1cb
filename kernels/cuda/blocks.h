/*
 * Internal to kernels/cuda: decoding values of any tensor type into registers, bit for bit as tensor_dequantise.
 *
 * A quantised value is v·d (+ m) with v of at most 8 bits, d and m a half times at most 7 bits: v·d is exact in
 * float32, so it may be fused with the sum, and v may be left shifted by 8 when d is divided by 256. A field of a word
 * becomes a float by setting it into the mantissa of 2^23 and subtracting that: no conversion instructions.
 *
 * Alignment: rows of Q4_K and Q5_K to 16 bytes, of Q4_1, Q5_1 and Q2_K to 4, of the other quantised types to 2, as
 * blocks that follow each other without gaps have it. Nothing outside the row's matrix is read; Q6_K may read 2 bytes
 * of the blocks beside the wanted one.
 */
#ifndef KERNELS_CUDA_BLOCKS_H
#define KERNELS_CUDA_BLOCKS_H

extern "C" {
#include "kernels/tensor.h"
}
#include "kernels/cuda/vectors.h"

#include <assert.h>

DEVICE uint32_t load_u16(const uint8_t *p) /* aligned to 2 */
{
    return *reinterpret_cast<const uint16_t *>(p);
}

DEVICE uint32_t load_u32(const uint8_t *p) /* aligned to 4 */
{
    return *reinterpret_cast<const uint32_t *>(p);
}

DEVICE uint32_t load_u32_of_halves(const uint8_t *p) /* aligned to 2 */
{
    return load_u16(p) | load_u16(p + 2) << 16;
}

/* The word that begins `shift` bits (0 or 16) within low. */
DEVICE uint32_t word_between(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> shift);
}

/* WORDS words from p, aligned to 2: whole words are loaded, so 2 bytes before p or up to 4 behind are read too. */
template <int WORDS> DEVICE void load_words(const uint8_t *p, uint32_t w[WORDS])
{
    uint32_t shift = ((uint32_t)(uintptr_t)p & 2) * 8, low;
    const uint8_t *base = p - shift / 8;
    low = load_u32(base);
    for (int i = 0; i < WORDS; i++) {
        uint32_t high = load_u32(base + 4 * i + 4);
        w[i] = word_between(low, high, shift);
        low = high;
    }
}

/* A block of one half and WORDS words, aligned to 2, read as WORDS aligned words and one half: no byte outside it. */
template <int WORDS> DEVICE uint32_t load_block(const uint8_t *b, uint32_t w[WORDS])
{
    bool odd = ((uint32_t)(uintptr_t)b & 2) != 0; /* then the words are aligned and the half is before them */
    const uint8_t *base = odd ? b + 2 : b;
    uint32_t half = load_u16(odd ? b : base + 4 * WORDS), shift = odd ? 0 : 16, low = load_u32(base), first = low;
    for (int i = 0; i < WORDS; i++) {
        uint32_t high = i + 1 < WORDS ? load_u32(base + 4 * i + 4) : half;
        w[i] = word_between(low, high, shift);
        low = high;
    }
    return odd ? half : first & 0xffff;
}

DEVICE float field(uint32_t w, uint32_t mask, uint32_t bias)
{
    return float_of_bits((w & mask) | 0x4b000000u) - (float)(8388608u + bias);
}

/* out[i] = (byte i of w, masked, − bias)·d, + m if ADD. */
template <uint32_t MASK, uint32_t BIAS, bool ADD> DEVICE void decode_word(uint32_t w, float d, float m, float *out)
{
    float d256 = d * (1.0f / 256);
    uint32_t upper = w >> 16;
    out[0] = field(w, MASK, BIAS) * d;
    out[1] = field(w, MASK << 8, BIAS << 8) * d256;
    out[2] = field(upper, MASK, BIAS) * d;
    out[3] = field(upper, MASK << 8, BIAS << 8) * d256;
    for (int i = 0; ADD && i < 4; i++)
        out[i] += m;
}

/* Four bits to bit 4 of the four bytes. */
DEVICE uint32_t spread_bits(uint32_t bits)
{
    return ((bits & 15) * 0x00204081u & 0x01010101u) << 4;
}

/* The 6-bit scale and minimum of sub-block j out of Q4_K's and Q5_K's 12 bytes, which are w[1..3] of the header. */
DEVICE void decode_k_scale(const vec16 &header, int j, float *ret_d, float *ret_m)
{
    uint32_t shift = (uint32_t)(j & 3) * 8, a = header.w[1] >> shift, b = header.w[2] >> shift,
             c = header.w[3] >> shift;
    uint32_t scale = j < 4 ? a & 63 : (c & 15) | (a >> 6 & 3) << 4;
    uint32_t min = j < 4 ? b & 63 : (c >> 4 & 15) | (b >> 6 & 3) << 4;
    *ret_d = half_bits_to_float((uint16_t)header.w[0]) * (float)(int)scale;
    *ret_m = half_bits_to_float((uint16_t)(header.w[0] >> 16)) * (float)(int)min;
}

/* N values (4, 8 or 16) of a row from value `first` on, a multiple of N. */
template <enum tensor_type TYPE, int N> DEVICE void decode_part(const uint8_t *row, size_t first, float *out)
{
    static_assert(N == 4 || N == 8 || N == 16, "parts lie within half a run");
    if constexpr (TYPE == TENSOR_F32 || TYPE == TENSOR_F16 || TYPE == TENSOR_BF16) {
        const int size = TYPE == TENSOR_F32 ? 4 : 2;
        const uint8_t *p = row + first * size;
        uint32_t w[N * size / 4];
        if constexpr (N * size % 16 == 0) {
            if (((uintptr_t)p & 15) == 0) {
                for (int i = 0; i < N * size / 16; i++) {
                    vec16 v = reinterpret_cast<const vec16 *>(p)[i];
                    for (int j = 0; j < 4; j++)
                        w[i * 4 + j] = v.w[j];
                }
            } else {
                for (int i = 0; i < N * size / 4; i++)
                    w[i] = size == 4 ? load_u32(p + i * 4) : load_u32_of_halves(p + i * 4);
            }
        } else {
            for (int i = 0; i < N * size / 4; i++)
                w[i] = load_u32_of_halves(p + i * 4);
        }
        for (int i = 0; i < N; i++) {
            if (TYPE == TENSOR_F32)
                out[i] = float_of_bits(w[i]);
            else if (TYPE == TENSOR_F16)
                out[i] = half_bits_to_float((uint16_t)(w[i / 2] >> i % 2 * 16));
            else
                out[i] = float_of_bits(i % 2 ? w[i / 2] & 0xffff0000u : w[i / 2] << 16);
        }
    } else {
        size_t run = first / 32;
        int at = (int)(first % 32), byte = at % 16; /* within the run; within its bytes of two nibbles */
        uint32_t nibble = at >= 16 ? 4 : 0;
        if constexpr (TYPE == TENSOR_Q4_0) {
            const uint8_t *b = row + run * 18;
            float d = half_bits_to_float((uint16_t)load_u16(b));
            for (int i = 0; i < N; i += 4)
                decode_word<15, 8, false>(load_u32_of_halves(b + 2 + byte + i) >> nibble, d, 0.0f, out + i);
        } else if constexpr (TYPE == TENSOR_Q4_1) {
            const uint8_t *b = row + run * 20;
            uint32_t header = load_u32(b);
            float d = half_bits_to_float((uint16_t)header), m = half_bits_to_float((uint16_t)(header >> 16));
            for (int i = 0; i < N; i += 4)
                decode_word<15, 0, true>(load_u32(b + 4 + byte + i) >> nibble, d, m, out + i);
        } else if constexpr (TYPE == TENSOR_Q5_0) {
            const uint8_t *b = row + run * 22;
            float d = half_bits_to_float((uint16_t)load_u16(b));
            uint32_t high = load_u32_of_halves(b + 2) >> at;
            for (int i = 0; i < N; i += 4) {
                uint32_t w = load_u32_of_halves(b + 6 + byte + i) >> nibble & 0x0f0f0f0fu;
                decode_word<31, 16, false>(w | spread_bits(high >> i), d, 0.0f, out + i);
            }
        } else if constexpr (TYPE == TENSOR_Q5_1) {
            const uint8_t *b = row + run * 24;
            uint32_t header = load_u32(b), high = load_u32(b + 4) >> at;
            float d = half_bits_to_float((uint16_t)header), m = half_bits_to_float((uint16_t)(header >> 16));
            for (int i = 0; i < N; i += 4) {
                uint32_t w = load_u32(b + 8 + byte + i) >> nibble & 0x0f0f0f0fu;
                decode_word<31, 0, true>(w | spread_bits(high >> i), d, m, out + i);
            }
        } else if constexpr (TYPE == TENSOR_Q8_0) {
            const uint8_t *b = row + run * 34;
            float d = half_bits_to_float((uint16_t)load_u16(b));
            for (int i = 0; i < N; i += 4)
                decode_word<255, 128, false>(load_u32_of_halves(b + 2 + at + i) ^ 0x80808080u, d, 0.0f, out + i);
        } else if constexpr (TYPE == TENSOR_Q2_K) {
            const uint8_t *b = row + run / 8 * 84;
            int j = (int)(run % 8);
            uint32_t header = load_u32(b + 80), packed = b[j * 2 + at / 16];
            float d = half_bits_to_float((uint16_t)header) * (float)(int)(packed & 15);
            float m = half_bits_to_float((uint16_t)(header >> 16)) * (float)(int)(packed >> 4);
            for (int i = 0; i < N; i += 4)
                decode_word<3, 0, true>(load_u32(b + 16 + (j >> 2) * 32 + at + i) >> (j & 3) * 2, d, -m, out + i);
        } else if constexpr (TYPE == TENSOR_Q4_K || TYPE == TENSOR_Q5_K) {
            const bool five = TYPE == TENSOR_Q5_K;
            const uint8_t *b = row + run / 8 * (five ? 176 : 144);
            int j = (int)(run % 8);
            float d, m;
            decode_k_scale(*reinterpret_cast<const vec16 *>(b), j, &d, &m);
            const uint8_t *q = b + (five ? 48 : 16) + j / 2 * 32 + at;
            for (int i = 0; i < N; i += 4) {
                uint32_t w = load_u32(q + i) >> (j & 1) * 4 & 0x0f0f0f0fu;
                if (five)
                    w |= (load_u32(b + 16 + at + i) >> j & 0x01010101u) << 4;
                decode_word<31, 0, true>(w, d, -m, out + i);
            }
        } else {
            static_assert(TYPE == TENSOR_Q6_K, "a type without a decoder");
            const uint8_t *b = row + run / 8 * 210;
            int half = (int)(run >> 2 & 1), quarter = (int)(run & 3);
            float d = half_bits_to_float((uint16_t)load_u16(b + 208));
            d *= (float)(int8_t)b[192 + half * 8 + quarter * 2 + at / 16];
            uint32_t low[N / 4], high[N / 4];
            load_words<N / 4>(b + half * 64 + (quarter & 1) * 32 + at, low);
            load_words<N / 4>(b + 128 + half * 32 + at, high);
            for (int i = 0; i < N / 4; i++) {
                uint32_t w = low[i] >> (quarter >> 1) * 4 & 0x0f0f0f0fu;
                w |= (high[i] >> quarter * 2 & 0x03030303u) << 4;
                decode_word<63, 32, false>(w, d, 0.0f, out + i * 4);
            }
        }
    }
}

/* Values 32·run .. 32·run + 31 of a row, each byte of it loaded once. */
template <enum tensor_type TYPE> DEVICE void decode_run32(const uint8_t *row, size_t run, float out[32])
{
    if constexpr (TYPE == TENSOR_Q4_0) {
        uint32_t w[4];
        float d = half_bits_to_float((uint16_t)load_block<4>(row + run * 18, w));
        for (int i = 0; i < 4; i++) {
            decode_word<15, 8, false>(w[i], d, 0.0f, out + i * 4);
            decode_word<15, 8, false>(w[i] >> 4, d, 0.0f, out + 16 + i * 4);
        }
    } else if constexpr (TYPE == TENSOR_Q5_0) {
        uint32_t w[5];
        float d = half_bits_to_float((uint16_t)load_block<5>(row + run * 22, w));
        for (int i = 0; i < 4; i++) {
            uint32_t low = (w[i + 1] & 0x0f0f0f0fu) | spread_bits(w[0] >> i * 4);
            uint32_t high = (w[i + 1] >> 4 & 0x0f0f0f0fu) | spread_bits(w[0] >> (16 + i * 4));
            decode_word<31, 16, false>(low, d, 0.0f, out + i * 4);
            decode_word<31, 16, false>(high, d, 0.0f, out + 16 + i * 4);
        }
    } else if constexpr (TYPE == TENSOR_Q8_0) {
        uint32_t w[8];
        float d = half_bits_to_float((uint16_t)load_block<8>(row + run * 34, w));
        for (int i = 0; i < 8; i++)
            decode_word<255, 128, false>(w[i] ^ 0x80808080u, d, 0.0f, out + i * 4);
    } else if constexpr (TYPE == TENSOR_Q4_K || TYPE == TENSOR_Q5_K) {
        const bool five = TYPE == TENSOR_Q5_K;
        const uint8_t *b = row + run / 8 * (five ? 176 : 144);
        int j = (int)(run % 8);
        float d, m;
        decode_k_scale(*reinterpret_cast<const vec16 *>(b), j, &d, &m);
        const vec16 *q = reinterpret_cast<const vec16 *>(b + (five ? 48 : 16) + j / 2 * 32);
        for (int i = 0; i < 2; i++) {
            vec16 v = q[i], top = reinterpret_cast<const vec16 *>(b + 16)[i];
            for (int k = 0; k < 4; k++) {
                uint32_t w = v.w[k] >> (j & 1) * 4 & 0x0f0f0f0fu;
                if (five)
                    w |= (top.w[k] >> j & 0x01010101u) << 4;
                decode_word<31, 0, true>(w, d, -m, out + i * 16 + k * 4);
            }
        }
    } else if constexpr (TYPE == TENSOR_Q6_K) {
        const uint8_t *b = row + run / 8 * 210;
        int half = (int)(run >> 2 & 1), quarter = (int)(run & 3);
        float d = half_bits_to_float((uint16_t)load_u16(b + 208));
        uint32_t scales = load_u16(b + 192 + half * 8 + quarter * 2), low[8], high[8];
        load_words<8>(b + half * 64 + (quarter & 1) * 32, low);
        load_words<8>(b + 128 + half * 32, high);
        for (int i = 0; i < 8; i++) {
            uint32_t w = low[i] >> (quarter >> 1) * 4 & 0x0f0f0f0fu;
            w |= (high[i] >> quarter * 2 & 0x03030303u) << 4;
            decode_word<63, 32, false>(w, d * (float)(int8_t)(scales >> i / 4 * 8), 0.0f, out + i * 4);
        }
    } else { /* the compiler sees that both halves load the same words */
        decode_part<TYPE, 16>(row, run * 32, out);
        decode_part<TYPE, 16>(row, run * 32 + 16, out + 16);
    }
}

/* One value; any type. For tails of the unquantised ones. */
template <enum tensor_type TYPE> DEVICE float decode_value(const uint8_t *row, size_t at)
{
    if constexpr (TYPE == TENSOR_F32) {
        return float_of_bits(load_u32(row + at * 4));
    } else if constexpr (TYPE == TENSOR_F16) {
        return half_bits_to_float((uint16_t)load_u16(row + at * 2));
    } else if constexpr (TYPE == TENSOR_BF16) {
        return float_of_bits(load_u16(row + at * 2) << 16);
    } else {
        float part[4];
        decode_part<TYPE, 4>(row, at / 4 * 4, part);
        return at % 4 == 0 ? part[0] : at % 4 == 1 ? part[1] : at % 4 == 2 ? part[2] : part[3];
    }
}

/* decode_run32 of a row of n values, zeros behind its end. */
template <enum tensor_type TYPE> DEVICE void decode_run32_tail(const uint8_t *row, size_t run, size_t n, float out[32])
{
    if (run * 32 + 32 <= n) {
        decode_run32<TYPE>(row, run, out);
        return;
    }
    for (int i = 0; i < 32; i++)
        out[i] = run * 32 + (size_t)i < n ? decode_value<TYPE>(row, run * 32 + (size_t)i) : 0.0f;
}

/* What the decoders need of a matrix, asserted before a launch. */
static inline void assert_tensor_rows(enum tensor_type type, int32_t n, const void *at, size_t row_bytes)
{
    size_t least = 0, block = tensor_type_block_bytes(type);
    size_t alignment = block % 16 == 0 ? 16 : block % 4 == 0 ? 4 : 2;
    bool whole = tensor_type_row_bytes(type, (size_t)n, &least);
    assert(whole && row_bytes >= least && row_bytes % alignment == 0 && (uintptr_t)at % alignment == 0);
    (void)at, (void)row_bytes, (void)whole, (void)alignment;
}

/* CALL(type constant) for the type, on the host: instantiates a template for every tensor type. */
#define FOR_TENSOR_TYPE(type, CALL)                                                                                    \
    switch (type) {                                                                                                    \
    case TENSOR_F32:                                                                                                   \
        CALL(TENSOR_F32);                                                                                              \
        break;                                                                                                         \
    case TENSOR_F16:                                                                                                   \
        CALL(TENSOR_F16);                                                                                              \
        break;                                                                                                         \
    case TENSOR_BF16:                                                                                                  \
        CALL(TENSOR_BF16);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q4_0:                                                                                                  \
        CALL(TENSOR_Q4_0);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q4_1:                                                                                                  \
        CALL(TENSOR_Q4_1);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q5_0:                                                                                                  \
        CALL(TENSOR_Q5_0);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q5_1:                                                                                                  \
        CALL(TENSOR_Q5_1);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q8_0:                                                                                                  \
        CALL(TENSOR_Q8_0);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q2_K:                                                                                                  \
        CALL(TENSOR_Q2_K);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q4_K:                                                                                                  \
        CALL(TENSOR_Q4_K);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q5_K:                                                                                                  \
        CALL(TENSOR_Q5_K);                                                                                             \
        break;                                                                                                         \
    case TENSOR_Q6_K:                                                                                                  \
        CALL(TENSOR_Q6_K);                                                                                             \
        break;                                                                                                         \
    }

#endif
