#include "model/formats/gguf_config.h"

#include "model/formats/model_parts.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* One file and the prefix of its keys. */
struct keys {
    const struct gguf *gguf;
    enum model_architecture architecture;
    char key[96]; /* the last one asked for */
    struct error *err;
};

static const char *key(struct keys *k, const char *name)
{
    snprintf(k->key, sizeof k->key, "%s.%s", model_architecture_name(k->architecture), name);
    return k->key;
}

static bool has(struct keys *k, const char *name)
{
    return gguf_has(k->gguf, key(k, name));
}

static int not_supported(struct keys *k)
{
    return error_set(k->err, ERR_INTEGRITY, "%s: key %s is set, which is not supported", gguf_name(k->gguf), k->key);
}

static int read_count(struct keys *k, const char *name, uint32_t high, int32_t *ret)
{
    uint32_t value;
    int rc = gguf_get_u32(k->gguf, key(k, name), 1, high, &value, k->err);
    if (rc == 0)
        *ret = (int32_t)value;
    return rc;
}

/* An optional f32, which keeps its default when the key is absent. */
static int read_optional(struct keys *k, const char *name, float *value)
{
    return has(k, name) ? gguf_get_f32(k->gguf, k->key, value, k->err) : 0;
}

/* Keys that change what the model computes in ways that nobody here computes. Ignoring them would be wrong answers.
 * Numbers that say "none" are let through. */
static int refuse_unsupported(struct keys *k)
{
    static const char *const never[] = {
        "attention.clamp_kqv",
        "attention.scale",
        "attention.output_scale",
        "attention.temperature_scale",
        "attention.temperature_length",
        "attention.max_alibi_bias",
        "attention.shared_kv_layers",
        "attention.relative_buckets_count",
        "attn_logit_softcapping",
        "logit_scale",
        "residual_scale",
        "embedding_scale",
        "swiglu_clamp_exp",
        "rope.dimension_sections",
        "rope.scaling.alpha",
    };
    static const char *const zero[] = {"expert_count", "nextn_predict_layers"};
    static const char *const one[] = {"rope.scaling.attn_factor"};
    for (size_t i = 0; i < ARRAY_LEN(never); i++)
        if (has(k, never[i]))
            return not_supported(k);
    for (size_t i = 0; i < ARRAY_LEN(zero); i++) {
        uint32_t value = 1;
        if (has(k, zero[i]) && (gguf_get_u32(k->gguf, k->key, 0, UINT32_MAX, &value, NULL) < 0 || value != 0))
            return not_supported(k);
    }
    for (size_t i = 0; i < ARRAY_LEN(one); i++) {
        float value = 0;
        if (has(k, one[i]) && (gguf_get_f32(k->gguf, k->key, &value, NULL) < 0 || value != 1))
            return not_supported(k);
    }
    float cap = 1;
    if (has(k, "final_logit_softcapping") && (gguf_get_f32(k->gguf, k->key, &cap, NULL) < 0 || cap != 0))
        return not_supported(k);
    bool causal = false;
    if (has(k, "attention.causal") && (gguf_get_bool(k->gguf, k->key, &causal, NULL) < 0 || !causal))
        return not_supported(k);
    if (k->architecture != MODEL_GEMMA3 && has(k, "attention.sliding_window"))
        return not_supported(k);
    return 0;
}

/* A second number of the same thing, which must be the first. */
static int must_equal(struct keys *k, const char *name, int32_t expected, const char *why)
{
    uint32_t value = 0;
    int rc = has(k, name) ? gguf_get_u32(k->gguf, k->key, 0, UINT32_MAX, &value, k->err) : 0;
    if (rc == 0 && has(k, name) && value != (uint32_t)expected)
        return error_set(k->err, ERR_INTEGRITY, "%s: key %s is %u, expected %d %s", gguf_name(k->gguf), k->key, value,
                         expected, why);
    return rc;
}

/* head_size = d_model / head_count unless the file says otherwise, for keys and values alike. */
static int read_heads(struct keys *k, struct model_config *c)
{
    uint32_t size = 0;
    int rc = read_count(k, "attention.head_count", MODEL_WIDTH_MAX, &c->head_count);
    c->kv_head_count = c->head_count;
    if (rc == 0 && has(k, "attention.head_count_kv"))
        rc = read_count(k, "attention.head_count_kv", MODEL_WIDTH_MAX, &c->kv_head_count);
    if (rc == 0 && has(k, "attention.key_length"))
        rc = gguf_get_u32(k->gguf, k->key, 1, MODEL_HEAD_SIZE_MAX, &size, k->err);
    if (rc < 0)
        return rc;
    if (size == 0 && c->d_model % c->head_count != 0)
        return error_set(k->err, ERR_INTEGRITY, "%s: key %s: %d heads do not divide the width %d", gguf_name(k->gguf),
                         key(k, "attention.head_count"), c->head_count, c->d_model);
    c->head_size = size ? (int32_t)size : c->d_model / c->head_count;
    rc = must_equal(k, "attention.value_length", c->head_size, "as for keys");
    if (rc == 0)
        rc = must_equal(k, "attention.key_length_swa", c->head_size, "as in other layers");
    if (rc == 0)
        rc = must_equal(k, "attention.value_length_swa", c->head_size, "as in other layers");
    return rc;
}

/* A factor without a type is a linear one; before there was a type, its key was rope.scale_linear. */
static int read_rope_scale(struct keys *k, float *ret_factor)
{
    struct span type = span_str("linear");
    float factor = 0;
    int rc = has(k, "rope.scaling.type") ? gguf_get_string(k->gguf, k->key, &type, k->err) : 0;
    const bool linear = rc == 0 && span_equal(type, span_str("linear"));
    if (rc == 0 && !linear && !span_equal(type, span_str("none")))
        return error_set(k->err, ERR_INTEGRITY, "%s: key %s names a kind that is not supported (none and linear are)",
                         gguf_name(k->gguf), k->key);
    if (rc == 0)
        rc = read_optional(k, has(k, "rope.scaling.factor") ? "rope.scaling.factor" : "rope.scale_linear", &factor);
    if (rc == 0 && factor < 0)
        return error_set(k->err, ERR_INTEGRITY, "%s: key %s is %g, expected a positive number", gguf_name(k->gguf),
                         k->key, (double)factor);
    *ret_factor = linear && factor != 0 ? factor : 1;
    return rc;
}

static int read_rope(struct keys *k, struct model_config *c)
{
    float base = 10000.0f, factor = 1.0f;
    int rc = read_optional(k, "rope.freq_base", &base);
    if (rc == 0)
        rc = read_rope_scale(k, &factor);
    c->rotated = c->head_size;
    if (rc == 0 && c->architecture == MODEL_GLM4 && has(k, "rope.dimension_count"))
        rc = read_count(k, "rope.dimension_count", (uint32_t)c->head_size, &c->rotated);
    else if (rc == 0)
        rc = must_equal(k, "rope.dimension_count", c->head_size, "(the head size)");
    if (rc == 0)
        rc = must_equal(k, "rope.dimension_count_swa", c->rotated, "as in other layers");
    c->rope_order = c->architecture == MODEL_LLAMA || c->architecture == MODEL_GLM4 ? ROPE_NORM : ROPE_NEOX;
    c->rope_base = base;
    c->rope_scale = factor;
    return rc;
}

/* The pattern is a period, or one bool for each layer; absent, every sixth layer sees everything. */
static int read_pattern(struct keys *k, struct model_config *c)
{
    struct gguf_array list;
    bool slides[MODEL_LAYERS_MAX];
    uint32_t period = 6;
    int rc = 0;
    if (has(k, "attention.sliding_window_pattern")) {
        rc = gguf_get_array(k->gguf, k->key, GGUF_BOOL, MODEL_LAYERS_MAX, &list, NULL);
        if (rc < 0)
            return read_count(k, "attention.sliding_window_pattern", MODEL_LAYERS_MAX, &c->window_period);
        if (list.count != (uint64_t)c->layer_count)
            return error_set(k->err, ERR_INTEGRITY, "%s: key %s has %llu elements, expected one for each of %d layers",
                             gguf_name(k->gguf), k->key, (unsigned long long)list.count, c->layer_count);
        for (int32_t i = 0; i < c->layer_count; i++)
            slides[i] = list.bytes.ptr[i] != 0;
        if (!model_parts_period(slides, c->layer_count, &c->window_period))
            return error_set(k->err, ERR_INTEGRITY,
                             "%s: key %s: the layers that see everything are not at regular distances",
                             gguf_name(k->gguf), k->key);
        return 0;
    }
    c->window_period = (int32_t)period;
    return rc;
}

static int read_windows(struct keys *k, struct model_config *c)
{
    float base = 10000.0f;
    uint32_t window = 0;
    int rc =
        has(k, "attention.sliding_window") ? gguf_get_u32(k->gguf, k->key, 0, MODEL_CONTEXT_MAX, &window, k->err) : 0;
    if (rc < 0 || window == 0)
        return rc;
    rc = read_pattern(k, c);
    if (rc == 0)
        rc = read_optional(k, "rope.freq_base_swa", &base);
    if (c->window_period <= 1) { /* no layer slides */
        c->window_period = 0;
        return rc;
    }
    c->window = (int32_t)window;
    c->rope_base_sliding = base;
    return rc;
}

/* The 27B model alone divides by the root of width / heads, and the file does not say so: llama.cpp knows it by its 62
 * layers. */
static double attention_scale(const struct model_config *c)
{
    return c->architecture == MODEL_GEMMA3 && c->layer_count == 62 ? 1 / sqrt((double)(c->d_model / c->head_count)) : 0;
}

static int read_architecture(const struct gguf *g, enum model_architecture *ret, struct error *err)
{
    struct span name;
    char text[16] = "", shown[64];
    int rc = gguf_get_string(g, "general.architecture", &name, err);
    if (rc < 0)
        return rc;
    if (name.len < sizeof text)
        memcpy(text, name.ptr, name.len);
    if (strlen(text) != name.len || !model_architecture_parse(text, ret))
        return error_set(err, ERR_INTEGRITY,
                         "%s: key general.architecture is %s, expected llama, qwen2, qwen3, gemma3 or glm4",
                         gguf_name(g), model_parts_printable((const char *)name.ptr, name.len, shown));
    return 0;
}

static int read_all(struct keys *k, struct model_config *c)
{
    float eps = 0;
    int rc = refuse_unsupported(k);
    if (rc == 0)
        rc = read_count(k, "block_count", MODEL_LAYERS_MAX, &c->layer_count);
    if (rc == 0)
        rc = read_count(k, "context_length", MODEL_CONTEXT_MAX, &c->context_length);
    if (rc == 0)
        rc = read_count(k, "embedding_length", MODEL_WIDTH_MAX, &c->d_model);
    if (rc == 0)
        rc = read_count(k, "feed_forward_length", MODEL_WIDTH_MAX, &c->d_ff);
    if (rc == 0)
        rc = read_heads(k, c);
    if (rc == 0)
        rc = read_rope(k, c);
    if (rc == 0 && c->architecture == MODEL_GEMMA3)
        rc = read_windows(k, c);
    if (rc == 0)
        rc = gguf_get_f32(k->gguf, key(k, "attention.layer_norm_rms_epsilon"), &eps, k->err);
    c->norm_eps = eps;
    return rc;
}

int gguf_config_read(const struct gguf *gguf, struct model_config *ret_config, struct error *err)
{
    struct model_config c = {0};
    int rc = read_architecture(gguf, &c.architecture, err);
    if (rc == 0)
        rc = read_all(&(struct keys){.gguf = gguf, .architecture = c.architecture, .err = err}, &c);
    if (rc < 0)
        return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
    model_parts_traits(&c);
    c.attention_scale = attention_scale(&c);
    *ret_config = c;
    return 0;
}

int gguf_config_vocabulary(const struct gguf *gguf, const struct model_config *config, struct error *err)
{
    struct keys k = {.gguf = gguf, .architecture = config->architecture, .err = err};
    struct gguf_array tokens;
    int rc = 0;
    if (gguf_has(gguf, "tokenizer.ggml.tokens"))
        rc = gguf_get_array(gguf, "tokenizer.ggml.tokens", GGUF_STRING, MODEL_VOCABULARY_MAX, &tokens, err);
    if (rc == 0 && gguf_has(gguf, "tokenizer.ggml.tokens") && tokens.count != (uint64_t)config->vocabulary)
        return error_set(err, ERR_INTEGRITY,
                         "%s: key tokenizer.ggml.tokens has %llu tokens, but token_embd.weight has %d rows",
                         gguf_name(gguf), (unsigned long long)tokens.count, config->vocabulary);
    return rc < 0 ? rc : must_equal(&k, "vocab_size", config->vocabulary, "(the rows of token_embd.weight)");
}
