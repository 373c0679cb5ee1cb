#include "model/formats/model_parts.h"

#include <math.h>
#include <string.h>

void model_parts_traits(struct model_config *config)
{
    const enum model_architecture a = config->architecture;
    config->gate = a == MODEL_GEMMA3 ? GATE_GELU_TANH : GATE_SILU;
    config->qkv_bias = a == MODEL_QWEN2;
    config->qk_norm = a == MODEL_QWEN3 || a == MODEL_GEMMA3;
    config->post_norms = a == MODEL_GEMMA3 || a == MODEL_GLM4;
    config->fused_gate_up = a == MODEL_GLM4;
    config->embedding_scale = a == MODEL_GEMMA3 ? sqrt((double)config->d_model) : 0;
}

bool model_parts_period(const bool *slides, int32_t count, int32_t *ret_period)
{
    int32_t first = 0, sliding = 0; /* first: the lowest layer that does not slide */
    assert(count >= 1 && count <= MODEL_LAYERS_MAX);
    while (first < count && slides[first])
        first++;
    for (int32_t i = 0; i < count; i++)
        sliding += slides[i];
    if (sliding > 0) {
        if (first + 1 > MODEL_LAYERS_MAX)
            return false;
        for (int32_t i = 0; i < count; i++)
            if (slides[i] != ((i + 1) % (first + 1) != 0))
                return false;
    }
    *ret_period = sliding > 0 ? first + 1 : 0;
    return true;
}

/* Where in a block the float16 scales stand; up to two. float16 is not finite if its exponent bits are all ones. */
struct scale_layout {
    enum tensor_type type;
    size_t first, count;
};

static const struct scale_layout scale_layouts[] = {
    {TENSOR_F16, 0, 1},  {TENSOR_Q4_0, 0, 1},  {TENSOR_Q4_1, 0, 2}, {TENSOR_Q5_0, 0, 1}, {TENSOR_Q5_1, 0, 2},
    {TENSOR_Q8_0, 0, 1}, {TENSOR_Q2_K, 80, 2}, {TENSOR_Q4_K, 0, 2}, {TENSOR_Q5_K, 0, 2}, {TENSOR_Q6_K, 208, 1},
};

/* True if every field of `bits` width with this exponent mask, at these places of every block, is finite. */
static bool finite16(const uint8_t *data, size_t bytes, size_t stride, size_t first, size_t count, uint16_t mask)
{
    bool bad = false;
    for (size_t at = first; at + 2 * count <= bytes; at += stride) {
        for (size_t i = 0; i < count; i++) {
            uint16_t v;
            memcpy(&v, data + at + 2 * i, sizeof v);
            bad |= (v & mask) == mask;
        }
    }
    return !bad;
}

static bool finite32(const uint8_t *data, size_t bytes)
{
    bool bad = false;
    for (size_t at = 0; at + 4 <= bytes; at += 4) {
        uint32_t v;
        memcpy(&v, data + at, sizeof v);
        bad |= (v & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

bool model_parts_finite(enum tensor_type type, const void *data, size_t bytes)
{
    if (type == TENSOR_F32)
        return finite32(data, bytes);
    if (type == TENSOR_BF16)
        return finite16(data, bytes, 2, 0, 1, 0x7f80);
    for (size_t i = 0; i < ARRAY_LEN(scale_layouts); i++) {
        const struct scale_layout *l = &scale_layouts[i];
        if (l->type == type)
            return finite16(data, bytes, tensor_type_block_bytes(type), l->first, l->count, 0x7c00);
    }
    return false; /* a type that the kernels know and this table does not: refuse rather than trust */
}

bool model_parts_divisors(const struct tensor *vector)
{
    for (int32_t i = 0; vector->data && i < vector->in; i++)
        if (!(model_vector(vector)[i] > 0) || !isfinite(model_vector(vector)[i]))
            return false;
    return true;
}

const char *model_parts_printable(const char *text, size_t len, char out[64])
{
    size_t n = 0;
    for (; n < len && n < 63; n++)
        out[n] = text[n] >= 0x20 && text[n] < 0x7f ? text[n] : '?';
    out[n] = '\0';
    return out;
}
