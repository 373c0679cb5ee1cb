/* From a parsed GGUF file to a validated struct model: architecture llama. */
#include "model/formats/gguf.h"

#include "base/checked.h"

#include <math.h>

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

static bool scales_finite(const struct gguf_tensor *t)
{
    if (t->type == TENSOR_F32)
        return finite32(t->data, t->bytes);
    if (t->type == TENSOR_BF16)
        return finite16(t->data, t->bytes, 2, 0, 1, 0x7f80);
    for (size_t i = 0; i < ARRAY_LEN(scale_layouts); i++) {
        const struct scale_layout *l = &scale_layouts[i];
        if (l->type == t->type)
            return finite16(t->data, t->bytes, tensor_type_block_bytes(t->type), l->first, l->count, 0x7c00);
    }
    return false; /* a type that the kernels know and this table does not: refuse rather than trust */
}

static int read_count(const struct gguf *g, const char *key, uint32_t high, int32_t *ret, struct error *err)
{
    uint32_t value;
    int rc = gguf_get_u32(g, key, 1, high, &value, err);
    if (rc == 0)
        *ret = (int32_t)value;
    return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
}

/* An optional f32, which keeps its default when the key is absent. */
static int read_optional(const struct gguf *g, const char *key, float *value, struct error *err)
{
    return gguf_has(g, key) ? gguf_get_f32(g, key, value, err) : 0;
}

/* Keys that change what the model computes in ways that nobody here computes. Ignoring them would be wrong answers. */
static int refuse_unsupported(const struct gguf *g, struct error *err)
{
    static const char *const keys[] = {
        "llama.expert_count",
        "llama.attention.sliding_window",
        "llama.attention.clamp_kqv",
        "llama.attention.scale",
        "llama.logit_scale",
        "llama.residual_scale",
        "llama.embedding_scale",
        "llama.final_logit_softcapping",
        "llama.attention.max_alibi_bias",
    };
    for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
        uint32_t experts = 1;
        if (!gguf_has(g, keys[i]))
            continue;
        if (i == 0 && gguf_get_u32(g, keys[i], 0, UINT32_MAX, &experts, NULL) == 0 && experts == 0)
            continue;
        return error_set(err, ERR_INTEGRITY, "%s: key %s is set, which is not supported", gguf_name(g), keys[i]);
    }
    return 0;
}

static int read_rope(const struct gguf *g, struct model_config *c, struct error *err)
{
    float base = 10000.0f, factor = 1.0f;
    uint32_t rotated = (uint32_t)c->head_size;
    int rc = read_optional(g, "llama.rope.freq_base", &base, err);
    if (rc == 0 && gguf_has(g, "llama.rope.scaling.type")) {
        struct span type;
        rc = gguf_get_string(g, "llama.rope.scaling.type", &type, err);
        if (rc == 0 && span_equal(type, span_str("linear")))
            rc = read_optional(g, "llama.rope.scaling.factor", &factor, err);
        else if (rc == 0 && !span_equal(type, span_str("none")))
            rc = error_set(err, ERR_INTEGRITY,
                           "%s: key llama.rope.scaling.type names a kind that is not supported "
                           "(none and linear are)",
                           gguf_name(g));
    }
    if (rc == 0 && gguf_has(g, "llama.rope.dimension_count"))
        rc = gguf_get_u32(g, "llama.rope.dimension_count", 2, MODEL_HEAD_SIZE_MAX, &rotated, err);
    if (rc == 0 && rotated != (uint32_t)c->head_size)
        rc = error_set(err, ERR_INTEGRITY, "%s: key llama.rope.dimension_count is %u, expected the head size %d",
                       gguf_name(g), rotated, c->head_size);
    c->rope_order = ROPE_NORM;
    c->rope_base = base;
    c->rope_scale = factor;
    return rc;
}

/* head_size = d_model / head_count unless the file says otherwise, for keys and values alike. */
static int read_heads(const struct gguf *g, struct model_config *c, struct error *err)
{
    uint32_t size = 0, value_size = 0;
    int rc = read_count(g, "llama.attention.head_count", MODEL_WIDTH_MAX, &c->head_count, err);
    c->kv_head_count = c->head_count;
    if (rc == 0 && gguf_has(g, "llama.attention.head_count_kv"))
        rc = read_count(g, "llama.attention.head_count_kv", MODEL_WIDTH_MAX, &c->kv_head_count, err);
    if (rc == 0 && gguf_has(g, "llama.attention.key_length"))
        rc = gguf_get_u32(g, "llama.attention.key_length", 1, MODEL_HEAD_SIZE_MAX, &size, err);
    if (rc == 0 && gguf_has(g, "llama.attention.value_length"))
        rc = gguf_get_u32(g, "llama.attention.value_length", 1, MODEL_HEAD_SIZE_MAX, &value_size, err);
    if (rc < 0)
        return rc;
    if (size == 0 && c->d_model % c->head_count != 0)
        return error_set(err, ERR_INTEGRITY, "%s: key llama.attention.head_count: %d heads do not divide the width %d",
                         gguf_name(g), c->head_count, c->d_model);
    c->head_size = size ? (int32_t)size : c->d_model / c->head_count;
    if (value_size && (int32_t)value_size != c->head_size)
        return error_set(err, ERR_INTEGRITY, "%s: key llama.attention.value_length is %u, expected %d as for keys",
                         gguf_name(g), value_size, c->head_size);
    return 0;
}

static int read_config(const struct gguf *g, struct model_config *c, struct error *err)
{
    struct span architecture;
    float eps = 0;
    char shown[32];
    int rc = gguf_get_string(g, "general.architecture", &architecture, err);
    if (rc < 0)
        return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
    if (!span_equal(architecture, span_str("llama"))) {
        size_t n = 0;
        for (; n < architecture.len && n + 1 < sizeof shown; n++)
            shown[n] = architecture.ptr[n] > 0x20 && architecture.ptr[n] < 0x7f ? (char)architecture.ptr[n] : '?';
        shown[n] = '\0';
        return error_set(err, ERR_INTEGRITY, "%s: key general.architecture is %s, expected llama", gguf_name(g), shown);
    }
    c->architecture = MODEL_LLAMA;
    rc = refuse_unsupported(g, err);
    if (rc == 0)
        rc = read_count(g, "llama.block_count", MODEL_LAYERS_MAX, &c->layer_count, err);
    if (rc == 0)
        rc = read_count(g, "llama.context_length", MODEL_CONTEXT_MAX, &c->context_length, err);
    if (rc == 0)
        rc = read_count(g, "llama.embedding_length", MODEL_WIDTH_MAX, &c->d_model, err);
    if (rc == 0)
        rc = read_count(g, "llama.feed_forward_length", MODEL_WIDTH_MAX, &c->d_ff, err);
    if (rc == 0)
        rc = read_heads(g, c, err);
    if (rc == 0)
        rc = read_rope(g, c, err);
    if (rc == 0)
        rc = gguf_get_f32(g, "llama.attention.layer_norm_rms_epsilon", &eps, err);
    c->norm_eps = eps;
    return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
}

/* Borrows a tensor by name. rows and columns are checked by model_validate. */
static int borrow(const struct gguf *g, const char *name, bool required, size_t *used, struct tensor *ret,
                  struct error *err)
{
    const struct gguf_tensor *t = gguf_tensor_find(g, name);
    if (!t)
        return required ? error_set(err, ERR_INTEGRITY, "%s: the tensor %s is missing", gguf_name(g), name) : 0;
    if (t->dim_count > 2 || t->dims[0] > MODEL_WIDTH_MAX || t->dims[1] > MODEL_VOCABULARY_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: tensor %s has %u dimensions %llu x %llu, at most %d x %d are allowed",
                         gguf_name(g), name, t->dim_count, (unsigned long long)t->dims[0],
                         (unsigned long long)t->dims[1], MODEL_WIDTH_MAX, MODEL_VOCABULARY_MAX);
    if (!scales_finite(t))
        return error_set(err, ERR_INTEGRITY, "%s: tensor %s holds a scale or value that is NaN or infinite",
                         gguf_name(g), name);
    *ret = (struct tensor){t->data, t->type, (int32_t)t->dims[1], (int32_t)t->dims[0]};
    ++*used;
    return 0;
}

static int borrow_layer(const struct gguf *g, int32_t layer, size_t *used, struct model_layer *l, struct error *err)
{
    const struct {
        const char *name;
        struct tensor *tensor;
    } rows[] = {
        {"attn_norm", &l->attn_norm}, {"attn_q", &l->q},          {"attn_k", &l->k},      {"attn_v", &l->v},
        {"attn_output", &l->o},       {"ffn_norm", &l->ffn_norm}, {"ffn_gate", &l->gate}, {"ffn_up", &l->up},
        {"ffn_down", &l->down},
    };
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, rows[i].name);
        int rc = borrow(g, name, true, used, rows[i].tensor, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* The vocabulary of the embedding must be the tokenizer's, or an id could point outside it. */
static int check_vocabulary(const struct gguf *g, const struct model_config *c, struct error *err)
{
    struct gguf_array tokens;
    uint32_t size;
    int rc = 0;
    if (gguf_has(g, "tokenizer.ggml.tokens")) {
        rc = gguf_get_array(g, "tokenizer.ggml.tokens", GGUF_STRING, MODEL_VOCABULARY_MAX, &tokens, err);
        if (rc == 0 && tokens.count != (uint64_t)c->vocabulary)
            return error_set(err, ERR_INTEGRITY,
                             "%s: key tokenizer.ggml.tokens has %llu tokens, but token_embd.weight "
                             "has %d rows",
                             gguf_name(g), (unsigned long long)tokens.count, c->vocabulary);
    }
    if (rc == 0 && gguf_has(g, "llama.vocab_size")) {
        rc = gguf_get_u32(g, "llama.vocab_size", 1, MODEL_VOCABULARY_MAX, &size, err);
        if (rc == 0 && size != (uint32_t)c->vocabulary)
            return error_set(err, ERR_INTEGRITY, "%s: key llama.vocab_size is %u, but token_embd.weight has %d rows",
                             gguf_name(g), size, c->vocabulary);
    }
    return rc;
}

int gguf_load_model(const struct gguf *gguf, struct model *ret_model, struct error *err)
{
    struct model *m = calloc(1, sizeof *m);
    size_t used = 0;
    if (!m)
        return error_set(err, ERR_RESOURCES, "%s: no memory", gguf_name(gguf));
    int rc = read_config(gguf, &m->config, err);
    if (rc == 0)
        rc = borrow(gguf, "token_embd.weight", true, &used, &m->token_embd, err);
    if (rc == 0)
        rc = borrow(gguf, "output_norm.weight", true, &used, &m->output_norm, err);
    if (rc == 0)
        rc = borrow(gguf, "output.weight", false, &used, &m->output, err);
    if (rc == 0)
        rc = borrow(gguf, "rope_freqs.weight", false, &used, &m->rope_freqs, err);
    for (int32_t layer = 0; rc == 0 && layer < m->config.layer_count; layer++)
        rc = borrow_layer(gguf, layer, &used, &m->layers[layer], err);
    if (rc == 0 && used != gguf_tensor_count(gguf))
        rc = error_set(err, ERR_INTEGRITY,
                       "%s: %zu tensors are not part of a llama model of %d layers (biases and the like are not "
                       "supported)",
                       gguf_name(gguf), gguf_tensor_count(gguf) - used, m->config.layer_count);
    m->config.vocabulary = m->token_embd.out;
    if (rc == 0)
        rc = check_vocabulary(gguf, &m->config, err);
    if (rc == 0 && (rc = model_validate(m, err)) < 0)
        error_prefix(err, "%s", gguf_name(gguf));
    if (rc == 0)
        *ret_model = *m;
    free(m);
    return rc;
}
