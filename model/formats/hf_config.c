#include "model/formats/hf_config.h"

#include "model/formats/hf_rope.h"
#include "model/formats/json_fields.h"
#include "model/formats/model_parts.h"

#include <math.h>
#include <string.h>

/* model_type, and the only class whose computation is known here. */
static const struct {
    const char *type, *class_name;
    enum model_architecture architecture;
} types[] = {
    {"llama", "LlamaForCausalLM", MODEL_LLAMA}, {"qwen2", "Qwen2ForCausalLM", MODEL_QWEN2},
    {"qwen3", "Qwen3ForCausalLM", MODEL_QWEN3}, {"gemma3_text", "Gemma3ForCausalLM", MODEL_GEMMA3},
    {"glm4", "Glm4ForCausalLM", MODEL_GLM4},
};

static int read_architecture(const struct json_fields *f, struct model_config *c)
{
    const char *type = NULL;
    const json_t *classes = json_object_get(f->object, "architectures");
    char shown[64];
    int rc = json_fields_require(f, "model_type");
    if (rc == 0)
        rc = json_fields_string(f, "model_type", &type);
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        if (strcmp(type, types[i].type) != 0)
            continue;
        const char *class_name = json_string_value(json_array_get(classes, 0));
        c->architecture = types[i].architecture;
        if (json_fields_has(f, "architectures") &&
            (json_array_size(classes) != 1 || !class_name || strcmp(class_name, types[i].class_name) != 0))
            return error_set(f->err, ERR_INTEGRITY, "%s: architectures is not [\"%s\"]", f->file, types[i].class_name);
        return 0;
    }
    return error_set(f->err, ERR_INTEGRITY, "%s: model_type is %s, expected llama, qwen2, qwen3, gemma3_text or glm4",
                     f->file, model_parts_printable(type, strlen(type), shown));
}

/* Fields that change what the model computes in ways that nobody here computes. */
static int refuse_unsupported(const struct json_fields *f, const struct model_config *c)
{
    static const char *const never[] = {
        "quantization_config", "final_logit_softcapping", "attn_logit_softcapping", "clip_qkv",
        "logits_scaling",      "attention_multiplier",    "residual_multiplier",    "embedding_multiplier",
        "num_local_experts",
    };
    static const char *const flags[] = {"mlp_bias", "use_bidirectional_attention"};
    bool set = false, causal = true;
    int32_t extra = 0;
    int rc = 0;
    for (size_t i = 0; i < ARRAY_LEN(never); i++)
        if (json_fields_has(f, never[i]))
            return json_fields_fail(f, never[i], "is set, which is not supported");
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(flags); i++)
        if ((rc = json_fields_bool(f, flags[i], &set)) == 0 && set)
            return json_fields_fail(f, flags[i], "is true, which is not supported");
    if (rc == 0 && c->architecture != MODEL_QWEN2 && c->architecture != MODEL_GLM4 &&
        (rc = json_fields_bool(f, "attention_bias", &set)) == 0 && set)
        return json_fields_fail(f, "attention_bias", "is true, which is supported for glm4 only");
    if (rc == 0 && (rc = json_fields_bool(f, "is_causal", &causal)) == 0 && !causal)
        return json_fields_fail(f, "is_causal", "is false, which is not supported");
    if (rc == 0 && (rc = json_fields_int(f, "num_nextn_predict_layers", 0, INT32_MAX, &extra)) == 0 && extra > 0)
        return json_fields_fail(f, "num_nextn_predict_layers", "is not 0, which is not supported");
    if (rc == 0 && json_object_get(json_object_get(f->object, "auto_map"), "AutoModelForCausalLM"))
        return json_fields_fail(f, "auto_map", "names code of its own for the model, which is never run");
    return rc;
}

static int read_sizes(const struct json_fields *f, struct model_config *c)
{
    const struct {
        const char *name;
        int32_t *value;
        int32_t high;
    } counts[] = {
        {"num_hidden_layers", &c->layer_count, MODEL_LAYERS_MAX},
        {"hidden_size", &c->d_model, MODEL_WIDTH_MAX},
        {"intermediate_size", &c->d_ff, MODEL_WIDTH_MAX},
        {"num_attention_heads", &c->head_count, MODEL_WIDTH_MAX},
        {"vocab_size", &c->vocabulary, MODEL_VOCABULARY_MAX},
        {"max_position_embeddings", &c->context_length, MODEL_CONTEXT_MAX},
    };
    double eps = 0;
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(counts); i++)
        if ((rc = json_fields_require(f, counts[i].name)) == 0)
            rc = json_fields_int(f, counts[i].name, 1, counts[i].high, counts[i].value);
    if (rc == 0 && (rc = json_fields_require(f, "rms_norm_eps")) == 0)
        rc = json_fields_number(f, "rms_norm_eps", 1e-12, 0.1, &eps);
    c->norm_eps = (float)eps;
    return rc;
}

/* transformers' defaults of absent fields differ by architecture; where they are sizes of one particular model, the
 * field is asked for instead. */
static int read_heads(const struct json_fields *f, struct model_config *c)
{
    const bool llama = c->architecture == MODEL_LLAMA, qwen2 = c->architecture == MODEL_QWEN2;
    int rc = llama ? 0 : json_fields_require(f, "num_key_value_heads");
    c->kv_head_count = c->head_count;
    if (rc == 0)
        rc = json_fields_int(f, "num_key_value_heads", 1, c->head_count, &c->kv_head_count);
    if (rc == 0 && !llama && !qwen2)
        rc = json_fields_require(f, "head_dim");
    if (rc == 0)
        rc = json_fields_int(f, "head_dim", 1, MODEL_HEAD_SIZE_MAX, &c->head_size);
    if (rc == 0 && c->head_size == 0) {
        if (c->d_model % c->head_count != 0)
            return json_fields_fail(f, "num_attention_heads", "does not divide hidden_size");
        c->head_size = c->d_model / c->head_count;
    }
    return rc;
}

static int read_gate(const struct json_fields *f, const struct model_config *c)
{
    const bool gemma = c->architecture == MODEL_GEMMA3;
    const char *name = gemma ? "hidden_activation" : "hidden_act", *wanted = gemma ? "gelu_pytorch_tanh" : "silu";
    const char *found = wanted;
    int rc = json_fields_string(f, name, &found);
    if (rc == 0 && strcmp(found, wanted) != 0)
        return error_set(f->err, ERR_INTEGRITY, "%s: %s is not %s", f->file, name, wanted);
    return rc;
}

/* layer_types, if the file has it: one name for each layer. */
static int read_layer_types(const struct json_fields *f, int32_t layers, bool *slides)
{
    const json_t *list = json_object_get(f->object, "layer_types");
    if (!json_fields_has(f, "layer_types"))
        return 0;
    if (!json_is_array(list) || json_array_size(list) != (size_t)layers)
        return json_fields_fail(f, "layer_types", "is no list with one text for each layer");
    for (int32_t i = 0; i < layers; i++) {
        const char *type = json_string_value(json_array_get(list, (size_t)i));
        if (!type || (strcmp(type, "full_attention") != 0 && strcmp(type, "sliding_attention") != 0))
            return json_fields_fail(f, "layer_types", "holds something else than full_attention and sliding_attention");
        slides[i] = strcmp(type, "sliding_attention") == 0;
    }
    return 0;
}

/* The window in tokens (0: none) and the layers that slide where layer_types does not say it. */
static int read_defaults(const struct json_fields *f, const struct model_config *c, int32_t *window, bool *slides)
{
    const bool gemma = c->architecture == MODEL_GEMMA3;
    bool use = gemma;
    int32_t first = 28, period = 6;
    int rc = gemma ? 0 : json_fields_bool(f, "use_sliding_window", &use);
    *window = json_object_get(f->object, "sliding_window") ? 0 : 4096; /* null: none */
    if (rc == 0)
        rc = json_fields_int(f, "sliding_window", 1, MODEL_CONTEXT_MAX, window);
    if (rc == 0)
        rc = json_fields_int(f, "max_window_layers", 0, INT32_MAX, &first);
    if (rc == 0)
        rc = json_fields_int(f, "sliding_window_pattern", 1, INT32_MAX, &period);
    *window = use ? *window : 0;
    for (int32_t i = 0; i < c->layer_count; i++)
        slides[i] = gemma ? (i + 1) % period != 0 : *window > 0 && i >= first;
    return rc;
}

static int read_windows(const struct json_fields *f, struct model_config *c)
{
    const bool windows = c->architecture != MODEL_LLAMA && c->architecture != MODEL_GLM4;
    bool slides[MODEL_LAYERS_MAX] = {false};
    int32_t window = 0;
    int rc = 0;
    if (!windows && json_fields_has(f, "sliding_window"))
        return json_fields_fail(f, "sliding_window", "is set, which is not supported for this model_type");
    if (windows)
        rc = read_defaults(f, c, &window, slides);
    if (rc == 0)
        rc = read_layer_types(f, c->layer_count, slides);
    if (rc < 0)
        return rc;
    if (!model_parts_period(slides, c->layer_count, &c->window_period))
        return json_fields_fail(f, "layer_types", "has full_attention not at regular distances");
    if (c->window_period > 0 && window == 0)
        return json_fields_fail(f, "sliding_window", "is missing, but some layers slide");
    c->window = c->window_period > 0 ? window : 0;
    return 0;
}

static int read_rest(const struct json_fields *f, struct hf_config *config)
{
    struct model_config *c = &config->model;
    double scalar = 256;
    int rc = 0;
    config->tied = c->architecture == MODEL_GEMMA3;
    rc = json_fields_bool(f, "tie_word_embeddings", &config->tied);
    if (rc == 0 && c->architecture == MODEL_GEMMA3 &&
        (rc = json_fields_number(f, "query_pre_attn_scalar", 1, 1e6, &scalar)) == 0)
        c->attention_scale = 1 / sqrt(scalar);
    if (rc == 0 && c->architecture == MODEL_GLM4) {
        c->qkv_bias = true;
        rc = json_fields_bool(f, "attention_bias", &c->qkv_bias);
    }
    return rc;
}

int hf_config_parse(struct span json, const char *file, struct hf_config *ret_config, struct error *err)
{
    struct json_fields f = {NULL, file, "", err};
    struct hf_config config = {.tied = false};
    struct model_config *c = &config.model;
    json_t *root = NULL;
    int rc = json_fields_load(json, HF_CONFIG_BYTES_MAX, file, &root, err);
    f.object = root;
    if (rc == 0)
        rc = read_architecture(&f, c);
    if (rc == 0)
        rc = refuse_unsupported(&f, c);
    if (rc == 0)
        rc = read_sizes(&f, c);
    if (rc == 0)
        rc = read_heads(&f, c);
    if (rc == 0)
        rc = read_gate(&f, c);
    if (rc == 0)
        rc = read_windows(&f, c);
    if (rc == 0)
        rc = hf_rope_read(&f, &config);
    model_parts_traits(c);
    if (rc == 0)
        rc = read_rest(&f, &config);
    json_decref(root);
    if (rc == 0)
        *ret_config = config;
    return rc;
}
