/* Block layouts of the ggml project (ggml-common.h describes them); every decoder works on runs of 32 values. */
#include "kernels/tensor.h"

#include "base/checked.h"
#include "kernels/cpu/internal.h"

#include <string.h>

static const struct {
    enum tensor_type type;
    const char *name;
    uint16_t block, bytes, alignment;
} types[] = {
    {TENSOR_F32, "F32", 1, 4, 4},       {TENSOR_F16, "F16", 1, 2, 2},       {TENSOR_BF16, "BF16", 1, 2, 2},
    {TENSOR_Q4_0, "Q4_0", 32, 18, 2},   {TENSOR_Q4_1, "Q4_1", 32, 20, 2},   {TENSOR_Q5_0, "Q5_0", 32, 22, 2},
    {TENSOR_Q5_1, "Q5_1", 32, 24, 2},   {TENSOR_Q8_0, "Q8_0", 32, 34, 2},   {TENSOR_Q2_K, "Q2_K", 256, 84, 2},
    {TENSOR_Q4_K, "Q4_K", 256, 144, 2}, {TENSOR_Q5_K, "Q5_K", 256, 176, 2}, {TENSOR_Q6_K, "Q6_K", 256, 210, 2},
};

static int type_index(uint32_t type)
{
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        if (types[i].type == type)
            return (int)i;
    }
    return -1;
}

bool tensor_type_known(uint32_t type)
{
    return type_index(type) >= 0;
}

const char *tensor_type_name(enum tensor_type type)
{
    int i = type_index(type);
    return i < 0 ? "unknown" : types[i].name;
}

size_t tensor_type_block(enum tensor_type type)
{
    int i = type_index(type);
    assert(i >= 0);
    return types[i].block;
}

size_t tensor_type_block_bytes(enum tensor_type type)
{
    int i = type_index(type);
    assert(i >= 0);
    return types[i].bytes;
}

size_t tensor_type_alignment(enum tensor_type type)
{
    int i = type_index(type);
    assert(i >= 0);
    return types[i].alignment;
}

bool tensor_type_row_bytes(enum tensor_type type, size_t n, size_t *ret)
{
    int i = type_index(type);
    if (i < 0 || n % types[i].block != 0)
        return false;
    return checked_mul(n / types[i].block, types[i].bytes, ret);
}

/* x + −0 is x for every x; x + 0 is not for x = −0, which a negative scale makes. */
#define NO_MINIMUM (-0.0f)

static void decode_q4(const uint8_t *b, float *out, float d, float m, int bias)
{
    for (int i = 0; i < 16; i++) {
        out[i] = (float)((b[i] & 15) - bias) * d + m;
        out[i + 16] = (float)((b[i] >> 4) - bias) * d + m;
    }
}

static void decode_q5(const uint8_t *high, const uint8_t *b, float *out, float d, float m, int bias)
{
    uint32_t h;
    memcpy(&h, high, 4);
    for (int i = 0; i < 16; i++) {
        out[i] = (float)((int)((b[i] & 15) | (h >> i & 1) << 4) - bias) * d + m;
        out[i + 16] = (float)((int)(b[i] >> 4 | (h >> (i + 16) & 1) << 4) - bias) * d + m;
    }
}

/* Four 2-bit values to a byte: a run takes the same two bits of 32 bytes. Each 16 values have a scale and a minimum. */
static void decode_q2k(const uint8_t *b, int j, float *out)
{
    const uint8_t *q = b + 16 + (j >> 2) * 32;
    for (int i = 0; i < 32; i++) {
        uint8_t packed = b[j * 2 + i / 16];
        float d = half_to_float(b + 80) * (float)(packed & 15), m = half_to_float(b + 82) * (float)(packed >> 4);
        out[i] = (float)(q[i] >> (j & 3) * 2 & 3) * d - m;
    }
}

/* The 6-bit scale and minimum of sub-block j out of the 12 packed bytes of Q4_K and Q5_K. */
static void k_scale(const uint8_t *s, int j, float *scale, float *min)
{
    if (j < 4) {
        *scale = (float)(s[j] & 63);
        *min = (float)(s[j + 4] & 63);
    } else {
        *scale = (float)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *min = (float)(s[j + 4] >> 4 | (s[j] >> 6) << 4);
    }
}

static void decode_k45(const uint8_t *b, int j, bool five, float *out)
{
    float scale, min;
    k_scale(b + 4, j, &scale, &min);
    float d = half_to_float(b) * scale, m = half_to_float(b + 2) * min;
    const uint8_t *high = b + 16, *q = b + (five ? 48 : 16) + j / 2 * 32;
    for (int i = 0; i < 32; i++) {
        int v = j & 1 ? q[i] >> 4 : q[i] & 15;
        if (five)
            v += (high[i] >> j & 1) << 4;
        out[i] = (float)v * d - m;
    }
}

static void decode_q6k(const uint8_t *b, int j, float *out)
{
    int half = j >> 2, quarter = j & 3;
    const uint8_t *low = b + half * 64 + (quarter & 1) * 32, *high = b + 128 + half * 32;
    const int8_t *scales = (const int8_t *)b + 192 + half * 8 + quarter * 2;
    float d = half_to_float(b + 208);
    for (int i = 0; i < 32; i++) {
        int v = (low[i] >> (quarter >> 1) * 4 & 15) | (high[i] >> quarter * 2 & 3) << 4;
        out[i] = (float)(v - 32) * (d * (float)scales[i / 16]);
    }
}

void decode_run32(enum tensor_type type, const uint8_t *row, size_t run, float *out)
{
    const uint8_t *b;
    switch (type) {
    case TENSOR_Q4_0:
        b = row + run * 18;
        decode_q4(b + 2, out, half_to_float(b), NO_MINIMUM, 8);
        break;
    case TENSOR_Q4_1:
        b = row + run * 20;
        decode_q4(b + 4, out, half_to_float(b), half_to_float(b + 2), 0);
        break;
    case TENSOR_Q5_0:
        b = row + run * 22;
        decode_q5(b + 2, b + 6, out, half_to_float(b), NO_MINIMUM, 16);
        break;
    case TENSOR_Q5_1:
        b = row + run * 24;
        decode_q5(b + 4, b + 8, out, half_to_float(b), half_to_float(b + 2), 0);
        break;
    case TENSOR_Q8_0:
        b = row + run * 34;
        for (int i = 0; i < 32; i++)
            out[i] = (float)(int8_t)b[2 + i] * half_to_float(b);
        break;
    case TENSOR_Q2_K:
        decode_q2k(row + run / 8 * 84, (int)(run % 8), out);
        break;
    case TENSOR_Q4_K:
        decode_k45(row + run / 8 * 144, (int)(run % 8), false, out);
        break;
    case TENSOR_Q5_K:
        decode_k45(row + run / 8 * 176, (int)(run % 8), true, out);
        break;
    case TENSOR_Q6_K:
        decode_q6k(row + run / 8 * 210, (int)(run % 8), out);
        break;
    default:
        assert(!"a type without runs of 32");
    }
}

void tensor_dequantise_range(enum tensor_type type, const void *row, size_t first, size_t n, float *out)
{
    const uint8_t *bytes = row;
    switch (type) {
    case TENSOR_F32:
        memcpy(out, bytes + first * 4, n * 4);
        return;
    case TENSOR_F16:
        for (size_t i = 0; i < n; i++)
            out[i] = half_to_float(bytes + (first + i) * 2);
        return;
    case TENSOR_BF16:
        for (size_t i = 0; i < n; i++)
            out[i] = bfloat_to_float(bytes + (first + i) * 2);
        return;
    default:
        assert(first % 32 == 0 && n % 32 == 0);
        for (size_t i = 0; i < n / 32; i++)
            decode_run32(type, bytes, first / 32 + i, out + i * 32);
    }
}

void tensor_dequantise(enum tensor_type type, const void *row, size_t n, float *out)
{
    assert(n % tensor_type_block(type) == 0);
    tensor_dequantise_range(type, row, 0, n, out);
}
