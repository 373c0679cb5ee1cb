/* Hugging Face folders: config.json field by field, tensors, shards and their index, and the files on disk. */
#include "tests/formats/fixtures.h"
#include "tests/formats/models.h"

#include "base/file.h"
#include "model/formats/hf_config.h"
#include "model/formats/hf_model.h"
#include "model/formats/model_file.h"

#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

/* The bytes at an address that is `skew` past a multiple of 64, in a block of their exact size. */
static int parse(const struct buffer *config, const struct buffer *weights, size_t skew, struct hf_model **ret,
                 uint8_t **memory, struct error *err)
{
    *memory = aligned_alloc(64, (weights->len + skew + 63) / 64 * 64);
    memcpy(*memory + skew, weights->data, weights->len);
    const struct hf_file file = {"model.safetensors", span_of(*memory + skew, weights->len)};
    return hf_model_parse("folder", buffer_span(config), NULL, &file, ret, err);
}

static int load(enum model_architecture architecture, const struct models_flaw *flaw, size_t skew,
                struct model_config *ret_config, struct error *err)
{
    struct buffer config, weights;
    struct hf_model *hf = NULL;
    uint8_t *memory;
    models_config(architecture, flaw, &config);
    models_weights(architecture, flaw, -1, MODELS_LAYERS, &weights);
    int rc = parse(&config, &weights, skew, &hf, &memory, err);
    if (rc == 0 && ret_config) {
        models_expect(hf_model_get(hf), architecture == MODEL_GEMMA3 ? 1 : 0);
        assert_int_equal(hf_model_get(hf)->output.data != NULL, flaw->untied);
        *ret_config = hf_model_get(hf)->config;
    }
    hf_model_free(hf);
    free(memory);
    buffer_release(&config);
    buffer_release(&weights);
    return rc;
}

static struct model_config good(enum model_architecture architecture, const struct models_flaw *flaw)
{
    struct model_config config = {0};
    struct error err = {0};
    if (load(architecture, flaw, 0, &config, &err) < 0)
        fail_msg("%s: %s", model_architecture_name(architecture), err.message);
    return config;
}

static void refused(enum model_architecture architecture, const struct models_flaw *flaw, const char *expected)
{
    struct error err = {0};
    fixture_refused(load(architecture, flaw, 0, NULL, &err), &err, ERR_INTEGRITY, "folder: ", expected, NULL);
}

static void test_every_architecture(void **state)
{
    (void)state;
    for (int a = MODEL_LLAMA; a <= MODEL_GLM4; a++) {
        for (int untied = 0; untied < 2; untied++) {
            const struct model_config c = good((enum model_architecture)a, &(struct models_flaw){.untied = untied});
            const bool gemma = a == MODEL_GEMMA3, glm = a == MODEL_GLM4;
            assert_int_equal(c.architecture, a);
            assert_int_equal(c.head_size, MODELS_HEAD);
            assert_int_equal(c.rotated, glm ? MODELS_HEAD / 2 : MODELS_HEAD);
            assert_int_equal(c.rope_order, glm ? ROPE_NORM : ROPE_NEOX);
            assert_int_equal(c.gate, gemma ? GATE_GELU_TANH : GATE_SILU);
            assert_int_equal(c.qkv_bias, a == MODEL_QWEN2 || glm);
            assert_int_equal(c.qk_norm, a == MODEL_QWEN3 || gemma);
            assert_int_equal(c.post_norms, gemma || glm);
            assert_int_equal(c.fused_gate_up, glm);
            assert_int_equal(c.window, gemma ? 9 : 0);
            assert_int_equal(c.window_period, gemma ? 6 : 0);
            assert_true(c.rope_base == (gemma ? 1e6 : 1e4) && c.rope_scale == 1);
            assert_true(c.rope_base_sliding == (gemma ? 1e4 : 0));
            assert_true(c.embedding_scale == (gemma ? sqrt(MODELS_D) : 0));
            assert_true(model_attention_scale(&c) == 0.25);
            assert_true(c.norm_eps == 1e-5f);
        }
    }
}

static void test_data_that_lies_askew(void **state)
{
    struct error err = {0};
    struct model_config config;
    (void)state;
    for (size_t skew = 1; skew < 8; skew++)
        if (load(MODEL_QWEN2, &(struct models_flaw){0}, skew, &config, &err) < 0)
            fail_msg("%s", err.message);
    /* One byte before all others, of a tensor that is left alone. */
    if (load(MODEL_LLAMA, &(struct models_flaw){.misaligned = true}, 0, &config, &err) < 0)
        fail_msg("%s", err.message);
}

#define EDIT(text) (&(struct models_flaw){.edit = text})

static void test_positions(void **state)
{
    struct model_config c = good(MODEL_LLAMA, EDIT("{\"rope_theta\": 500000.0}"));
    (void)state;
    assert_true(c.rope_base == 5e5);
    c = good(MODEL_QWEN3, EDIT("{\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 1000000}}"));
    assert_true(c.rope_base == 1e6);
    c = good(MODEL_QWEN3, EDIT("{\"rope_theta\": 2e4, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.5}}"));
    assert_true(c.rope_base == 2e4 && c.rope_scale == 2.5);
    c = good(MODEL_GEMMA3, EDIT("{\"rope_theta\": 2e6, \"rope_local_base_freq\": 3e4, \"rope_scaling\": "
                                "{\"rope_type\": \"linear\", \"factor\": 8}}"));
    assert_true(c.rope_base == 2e6 && c.rope_base_sliding == 3e4 && c.rope_scale == 8);
    c = good(MODEL_GEMMA3,
             EDIT("{\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"linear\", \"factor\": 8, "
                  "\"rope_theta\": 4e6}, \"sliding_attention\": {\"rope_type\": \"default\", \"rope_theta\": 5e4}}}"));
    assert_true(c.rope_base == 4e6 && c.rope_base_sliding == 5e4 && c.rope_scale == 8);
    assert_int_equal(good(MODEL_GLM4, EDIT("{\"partial_rotary_factor\": 0.25}")).rotated, MODELS_HEAD / 4);
    c = good(MODEL_GLM4, EDIT("{\"rope_parameters\": {\"rope_theta\": 1e4, \"partial_rotary_factor\": 1.0}}"));
    assert_int_equal(c.rotated, MODELS_HEAD);
}

/* Against transformers 5.17's inv_freq for rope_theta 10000, head_dim 16, factor 8, low 1, high 4, original 32:
 * (unscaled / scaled) = 1, 1, then between, then 8. */
static void test_llama3_factors(void **state)
{
    static const char edit[] = "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": "
                               "1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 32}}";
    static const float expected[8] = {1.0f, 3.29953932762146f, 8, 8, 8, 8, 8, 8};
    struct buffer config;
    struct hf_config parsed;
    (void)state;
    models_config(MODEL_LLAMA, EDIT(edit), &config);
    assert_int_equal(hf_config_parse(buffer_span(&config), "config.json", &parsed, NULL), 0);
    assert_int_equal(parsed.factor_count, 8);
    for (int i = 0; i < 8; i++)
        assert_true(fabsf(parsed.factors[i] - expected[i]) < 1e-6f * expected[i]);
    buffer_release(&config);
    (void)good(MODEL_LLAMA, EDIT(edit));
}

static void test_windows(void **state)
{
    struct model_config c;
    (void)state;
    c = good(MODEL_GEMMA3, EDIT("{\"sliding_window_pattern\": 3}"));
    assert_int_equal(c.window_period, 3);
    c = good(MODEL_GEMMA3, EDIT("{\"sliding_window_pattern\": 1, \"sliding_window\": null}"));
    assert_true(c.window == 0 && c.window_period == 0 && c.rope_base_sliding == 0);
#define S "\"sliding_attention\""
#define F "\"full_attention\""
    c = good(MODEL_GEMMA3, EDIT("{\"layer_types\": [" S "," F "," S "," F "," S "," F "," S "]}"));
    assert_int_equal(c.window_period, 2);
    c = good(MODEL_QWEN2, EDIT("{\"use_sliding_window\": true, \"sliding_window\": 5, \"max_window_layers\": 0}"));
    assert_int_equal(c.window, 5);
    assert_true(c.rope_base_sliding == 0);
    for (int32_t i = 0; i < MODELS_LAYERS; i++)
        assert_true(model_layer_slides(&c, i));
    c = good(MODEL_QWEN2, EDIT("{\"use_sliding_window\": true, \"sliding_window\": 5, \"max_window_layers\": 7}"));
    assert_int_equal(c.window, 0);
    c = good(MODEL_QWEN3, EDIT("{\"use_sliding_window\": false, \"sliding_window\": 5, \"max_window_layers\": 3}"));
    assert_int_equal(c.window, 0);
    refused(MODEL_QWEN2, EDIT("{\"use_sliding_window\": true, \"sliding_window\": 5, \"max_window_layers\": 3}"),
            "layer_types has full_attention not at regular distances");
    refused(MODEL_GEMMA3, EDIT("{\"layer_types\": [" S "," F "," S "," S "," S "," F "," S "]}"),
            "layer_types has full_attention not at regular distances");
    refused(MODEL_GEMMA3, EDIT("{\"layer_types\": [" S "," F "]}"), "layer_types is no list with one text for each");
    refused(MODEL_QWEN3, EDIT("{\"layer_types\": [" F "," F "," F "," F "," F "," F ", \"linear_attention\"]}"),
            "layer_types holds something else");
    refused(MODEL_QWEN3, EDIT("{\"layer_types\": [" S "," S "," S "," S "," S "," S "," S "]}"),
            "sliding_window is missing");
    refused(MODEL_GEMMA3, EDIT("{\"sliding_window\": null}"), "sliding_window is missing");
    refused(MODEL_LLAMA, EDIT("{\"sliding_window\": 4096}"), "sliding_window is set");
}

static void test_fields_are_checked(void **state)
{
    static const struct {
        enum model_architecture architecture;
        const char *edit, *expected;
    } cases[] = {
        {MODEL_LLAMA, "{\"model_type\": \"mistral\"}", "model_type is mistral, expected llama"},
        {MODEL_LLAMA, "{\"model_type\": 7}", "model_type is no text"},
        {MODEL_QWEN2, "{\"architectures\": [\"Qwen2ForSequenceClassification\"]}", "architectures is not [\"Qwen2For"},
        {MODEL_QWEN2, "{\"architectures\": []}", "architectures is not [\"Qwen2ForCausalLM\"]"},
        {MODEL_LLAMA, "{\"hidden_size\": null}", "hidden_size is missing"},
        {MODEL_LLAMA, "{\"hidden_size\": 32.0}", "hidden_size is no integer from 1 to"},
        {MODEL_LLAMA, "{\"hidden_size\": 0}", "hidden_size is no integer from 1 to"},
        {MODEL_LLAMA, "{\"hidden_size\": 9223372036854775807}", "hidden_size is no integer from 1 to"},
        {MODEL_LLAMA, "{\"num_hidden_layers\": 129}", "num_hidden_layers is no integer from 1 to 128"},
        {MODEL_LLAMA, "{\"num_hidden_layers\": 8}", "the tensor model.layers.7.input_layernorm.weight is missing"},
        {MODEL_LLAMA, "{\"num_hidden_layers\": 6}", "model.layers.6."},
        {MODEL_LLAMA, "{\"intermediate_size\": 64}", "ffn_up is 48 x 32"},
        {MODEL_LLAMA, "{\"vocab_size\": 41}", "token_embd is 40 x 32"},
        {MODEL_LLAMA, "{\"num_attention_heads\": 1}", "attn_q is 32 x 32"},
        {MODEL_LLAMA, "{\"num_key_value_heads\": 3}", "num_key_value_heads is no integer from 1 to 2"},
        {MODEL_QWEN2, "{\"num_key_value_heads\": null}", "num_key_value_heads is missing"},
        {MODEL_QWEN3, "{\"head_dim\": null}", "head_dim is missing"},
        {MODEL_QWEN3, "{\"head_dim\": 300}", "head_dim is no integer from 1 to 256"},
        {MODEL_QWEN2, "{\"head_dim\": null, \"num_attention_heads\": 3}", "num_attention_heads does not divide"},
        {MODEL_LLAMA, "{\"rms_norm_eps\": \"1e-5\"}", "rms_norm_eps is no number"},
        {MODEL_LLAMA, "{\"rms_norm_eps\": 0}", "rms_norm_eps is no number from"},
        {MODEL_LLAMA, "{\"tie_word_embeddings\": 1}", "tie_word_embeddings is neither true nor false"},
        {MODEL_LLAMA, "{\"hidden_act\": \"gelu\"}", "hidden_act is not silu"},
        {MODEL_GEMMA3, "{\"hidden_activation\": \"silu\"}", "hidden_activation is not gelu_pytorch_tanh"},
        {MODEL_LLAMA, "{\"attention_bias\": true}", "attention_bias is true"},
        {MODEL_QWEN3, "{\"attention_bias\": true}", "attention_bias is true"},
        {MODEL_GLM4, "{\"attention_bias\": false}", "self_attn."},
        {MODEL_LLAMA, "{\"mlp_bias\": true}", "mlp_bias is true"},
        {MODEL_GEMMA3, "{\"use_bidirectional_attention\": true}", "use_bidirectional_attention is true"},
        {MODEL_GEMMA3, "{\"final_logit_softcapping\": 30.0}", "final_logit_softcapping is set"},
        {MODEL_GEMMA3, "{\"attn_logit_softcapping\": 50.0}", "attn_logit_softcapping is set"},
        {MODEL_GEMMA3, "{\"query_pre_attn_scalar\": 0}", "query_pre_attn_scalar is no number"},
        {MODEL_QWEN2, "{\"is_causal\": false}", "is_causal is false"},
        {MODEL_LLAMA, "{\"quantization_config\": {\"bits\": 4}}", "quantization_config is set"},
        {MODEL_GLM4, "{\"num_nextn_predict_layers\": 1}", "num_nextn_predict_layers is not 0"},
        {MODEL_LLAMA, "{\"auto_map\": {\"AutoModelForCausalLM\": \"x.Y\"}}", "auto_map names code"},
        {MODEL_LLAMA, "{\"rope_theta\": 0.5}", "rope_theta is no number from 1"},
        {MODEL_LLAMA, "{\"rope_scaling\": 8}", "rope_scaling is no object"},
        {MODEL_LLAMA, "{\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}}", "rope_scaling.rope_type is a kind"},
        {MODEL_QWEN2, "{\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2}}", "rope_scaling.rope_type is a kind"},
        {MODEL_LLAMA, "{\"rope_scaling\": {\"type\": \"linear\"}}", "rope_scaling.factor is missing"},
        {MODEL_LLAMA, "{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0.5}}",
         "rope_scaling.factor is no number"},
        {MODEL_LLAMA, "{\"rope_scaling\": {\"type\": \"linear\", \"rope_type\": \"llama3\"}}", "are not the same"},
        {MODEL_LLAMA, "{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2, \"mrope_section\": [1]}}",
         "holds a field that is not supported"},
        {MODEL_LLAMA, "{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}, \"rope_parameters\": {}}", "both"},
        {MODEL_LLAMA,
         "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": "
         "4}}",
         "high_freq_factor is not above"},
        {MODEL_LLAMA, "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4}}",
         "high_freq_factor is missing"},
        {MODEL_GEMMA3,
         "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": "
         "4}}",
         "llama3 is not supported for gemma3"},
        {MODEL_GEMMA3, "{\"rope_parameters\": {\"rope_theta\": 1e4}}", "rope_parameters holds something else"},
        {MODEL_GEMMA3, "{\"rope_parameters\": {\"sliding_attention\": {\"rope_type\": \"linear\", \"factor\": 2}}}",
         "sliding_attention is scaled"},
        {MODEL_QWEN3, "{\"partial_rotary_factor\": 0.5}", "partial_rotary_factor is not 1"},
        {MODEL_GLM4, "{\"partial_rotary_factor\": 0.1}", "leaves no even number"},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++)
        refused(cases[i].architecture, EDIT(cases[i].edit), cases[i].expected);
    (void)good(MODEL_LLAMA, &(struct models_flaw){.drop = "head_dim"});
    (void)good(MODEL_LLAMA, EDIT("{\"architectures\": [\"LlamaForCausalLM\"], \"mlp_bias\": false}"));
}

static void test_config_is_json(void **state)
{
    static const char *const texts[] = {"",
                                        "[]",
                                        "{",
                                        "{\"model_type\": \"llama\", \"model_type\": \"llama\"}",
                                        "{\"model_type\": \"llama\\u0000\"}",
                                        "{\"rms_norm_eps\": Infinity}"};
    struct hf_config config;
    struct error err = {0};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(texts); i++)
        fixture_refused(hf_config_parse(span_str(texts[i]), "config.json", &config, &err), &err, ERR_INTEGRITY,
                        "config.json: not a JSON object", NULL);
    struct buffer deep;
    buffer_init(&deep, HF_CONFIG_BYTES_MAX + 2);
    for (int i = 0; i < 100000; i++)
        buffer_append(&deep, "{\"a\":", 5);
    fixture_refused(hf_config_parse(buffer_span(&deep), "config.json", &config, &err), &err, ERR_INTEGRITY,
                    "not a JSON object", NULL);
    memset(buffer_extend(&deep, HF_CONFIG_BYTES_MAX + 1 - deep.len), ' ', HF_CONFIG_BYTES_MAX + 1 - deep.len);
    buffer_release(&deep);
    uint8_t *large = calloc(1, HF_CONFIG_BYTES_MAX + 1);
    fixture_refused(hf_config_parse(span_of(large, HF_CONFIG_BYTES_MAX + 1), "config.json", &config, &err), &err,
                    ERR_INTEGRITY, "at most", NULL);
    free(large);
}

static void test_every_tensor_is_checked(void **state)
{
    (void)state;
    for (int a = MODEL_LLAMA; a <= MODEL_GLM4; a++) {
        const enum model_architecture architecture = (enum model_architecture)a;
        struct models_row rows[16];
        const size_t count = models_rows(architecture, rows);
        for (size_t i = 0; i < count; i++) {
            char name[96], expected[160];
            snprintf(name, sizeof name, "model.layers.3.%s", rows[i].hf);
            snprintf(expected, sizeof expected, "the tensor %s is missing", name);
            refused(architecture, &(struct models_flaw){.drop = name}, expected);
            refused(architecture, &(struct models_flaw){.reshape = name}, "hyper-parameters ask for");
            snprintf(expected, sizeof expected, "tensor %s holds a value that is NaN or infinite", name);
            refused(architecture, &(struct models_flaw){.poison = name}, expected);
        }
    }
    refused(MODEL_LLAMA, &(struct models_flaw){.drop = "model.norm.weight"}, "model.norm.weight is missing");
    refused(MODEL_LLAMA, &(struct models_flaw){.drop = "lm_head.weight", .untied = true}, "lm_head.weight is missing");
    refused(MODEL_LLAMA, &(struct models_flaw){.poison = "model.norm.weight", .dtype = "I32"}, "dtype that is not");
    refused(MODEL_LLAMA, &(struct models_flaw){.extra = "model.layers.0.self_attn.q_proj.bias"},
            "tensor model.layers.0.self_attn.q_proj.bias is not part of this architecture");
    refused(MODEL_QWEN2, &(struct models_flaw){.extra = "score.weight"}, "tensor score.weight is not part");
    /* The head of a tied model may be there once more, if it is the same. */
    refused(MODEL_LLAMA, &(struct models_flaw){.untied = true, .edit = "{\"tie_word_embeddings\": true}"},
            "lm_head.weight is not model.embed_tokens.weight");
}

/* --- shards ------------------------------------------------------------------------------------------------------ */

/* Three shards: the first has what is outside layers and layers 0 and 1, the others the rest. */
struct sharded {
    struct buffer config, index, weights[3];
};

static void make_sharded(enum model_architecture architecture, struct sharded *s)
{
    static const int32_t bounds[4] = {-1, 2, 5, MODELS_LAYERS};
    static const char *const names[3] = {"model-1.safetensors", "model-2.safetensors", "model-3.safetensors"};
    json_t *map = json_object(), *root = json_pack("{s:{s:i}}", "metadata", "total_size", 1);
    struct error err = {0};
    models_config(architecture, &(struct models_flaw){0}, &s->config);
    for (int i = 0; i < 3; i++) {
        struct safetensors *file = NULL;
        models_weights(architecture, &(struct models_flaw){0}, bounds[i], bounds[i + 1], &s->weights[i]);
        assert_int_equal(safetensors_parse(buffer_span(&s->weights[i]), names[i], &file, &err), 0);
        for (size_t j = 0; j < safetensors_count(file); j++)
            json_object_set_new(map, safetensors_at(file, j)->name, json_string(names[i]));
        safetensors_close(file);
    }
    json_object_set_new(root, "weight_map", map);
    char *text = json_dumps(root, 0);
    buffer_init(&s->index, 1 << 20);
    buffer_append(&s->index, text, strlen(text));
    free(text);
    json_decref(root);
}

static void release_sharded(struct sharded *s)
{
    buffer_release(&s->config);
    buffer_release(&s->index);
    for (int i = 0; i < 3; i++)
        buffer_release(&s->weights[i]);
}

static int load_sharded(const struct sharded *s, struct error *err)
{
    struct hf_index *index = NULL;
    struct hf_model *hf = NULL;
    struct hf_file files[3];
    int rc = hf_index_parse(buffer_span(&s->index), "index.json", &index, err);
    if (rc == 0) {
        assert_int_equal(hf_index_shard_count(index), 3);
        for (size_t i = 0; i < 3; i++)
            files[i] = (struct hf_file){hf_index_shard(index, i), buffer_span(&s->weights[i])};
        rc = hf_model_parse("folder", buffer_span(&s->config), index, files, &hf, err);
    }
    hf_index_free(index);
    if (rc == 0)
        models_expect(hf_model_get(hf), 0);
    hf_model_free(hf);
    return rc;
}

/* Replaces the first occurrence of a text in the index by one of the same length. */
static void index_refused(const char *from, const char *to, const char *expected)
{
    struct sharded s;
    struct error err = {0};
    make_sharded(MODEL_QWEN2, &s);
    uint8_t *at = memmem(s.index.data, s.index.len, from, strlen(from));
    assert_non_null(at);
    assert_int_equal(strlen(from), strlen(to));
    memcpy(at, to, strlen(to));
    fixture_refused(load_sharded(&s, &err), &err, ERR_INTEGRITY, "index.json", expected, NULL);
    release_sharded(&s);
}

static void test_shards(void **state)
{
    struct sharded s;
    struct error err = {0};
    (void)state;
    make_sharded(MODEL_QWEN2, &s);
    if (load_sharded(&s, &err) < 0)
        fail_msg("%s", err.message);
    release_sharded(&s);
    index_refused("model-2.safetensors", "model-3.safetensors", "is not in the file model-3.safetensors");
    index_refused("model.norm.weight", "model.norm.weighs", "the tensor model.norm.weighs is not in the file");
    index_refused("model-1.safetensors", "../el1.safetensors/", "expected a plain name");
    index_refused("model-1.safetensors", "..del-1.safetensors", "expected a plain name");
    index_refused("model-1.safetensors", "/odel-1.safetensors", "expected a plain name");
    index_refused("model-1.safetensors", "a/del-1.safetensors", "expected a plain name");
    index_refused("model-1.safetensors", "model-1.safetensorz", "expected a plain name");
    index_refused("model-1.safetensors", "model%1.safetensors", "expected a plain name");
    index_refused("\"model-1.safetensors\"", "[                   ]", "something else than names of files");
    index_refused("\"weight_map\"", "\"weight_mop\"", "weight_map is missing");
}

/* A tensor of a shard that the index does not name would be used by nobody. */
static void test_index_is_complete(void **state)
{
    struct sharded s;
    struct error err = {0};
    json_error_t problem;
    (void)state;
    make_sharded(MODEL_QWEN2, &s);
    json_t *root = json_loadb((const char *)s.index.data, s.index.len, 0, &problem);
    json_object_del(json_object_get(root, "weight_map"), "model.layers.6.mlp.up_proj.weight");
    char *text = json_dumps(root, 0);
    buffer_clear(&s.index);
    buffer_append(&s.index, text, strlen(text));
    fixture_refused(load_sharded(&s, &err), &err, ERR_INTEGRITY, "its files hold 86 tensors, but weight_map names 85",
                    NULL);
    free(text);
    json_decref(root);
    release_sharded(&s);
}

static void test_too_many_shards(void **state)
{
    struct hf_index *index = NULL;
    struct error err = {0};
    struct buffer text;
    (void)state;
    buffer_init(&text, 1 << 20);
    buffer_printf(&text, "{\"weight_map\": {");
    for (unsigned i = 0; i <= HF_SHARDS_MAX; i++)
        buffer_printf(&text, "%s\"t%u\": \"%u.safetensors\"", i ? "," : "", i, i);
    buffer_printf(&text, "}}");
    fixture_refused(hf_index_parse(buffer_span(&text), "index.json", &index, &err), &err, ERR_INTEGRITY,
                    "more than 1024 files", NULL);
    buffer_release(&text);
}

/* --- on disk ----------------------------------------------------------------------------------------------------- */

static void put(const char *folder, const char *name, const struct buffer *bytes)
{
    char path[256];
    struct error err = {0};
    file_join(path, sizeof path, folder, name);
    if (file_write_atomic(path, buffer_span(bytes), 0600, &err) < 0)
        fail_msg("%s", err.message);
}

static void drop(const char *folder, const char *name)
{
    char path[256];
    file_join(path, sizeof path, folder, name);
    remove(path);
}

static void open_refused(const char *folder, int code, const char *expected)
{
    struct model_file *file = NULL;
    struct error err = {0};
    fixture_refused(model_file_open(folder, &file, &err), &err, code, expected, NULL);
}

static void expect_parts(const char *path, const char *const *names, size_t count)
{
    struct model_file *file = NULL;
    struct error err = {0};
    if (model_file_open(path, &file, &err) < 0)
        fail_msg("%s", err.message);
    models_expect(model_file_model(file), 0);
    assert_int_equal(model_file_part_count(file), count);
    for (size_t i = 0; i < count; i++) {
        assert_string_equal(model_file_part(file, i).name, names[i]);
        assert_true(model_file_part(file, i).bytes.len > 0);
    }
    model_file_close(file);
}

static void test_folder_with_shards(void **state)
{
    char folder[] = "/tmp/test_hf.XXXXXX", slash[32], from[64], to[64];
    static const char *const parts[] = {"config.json",         "tokenizer.json",      "tokenizer_config.json",
                                        "chat_template.jinja", "model-1.safetensors", "model-2.safetensors",
                                        "model-3.safetensors"};
    struct sharded s;
    struct buffer other;
    (void)state;
    assert_non_null(mkdtemp(folder));
    make_sharded(MODEL_QWEN2, &s);
    open_refused(folder, ERR_NOT_FOUND, "config.json: cannot open");
    put(folder, "config.json", &s.config);
    open_refused(folder, ERR_NOT_FOUND, "model.safetensors: cannot open");
    put(folder, "model.safetensors.index.json", &s.index);
    open_refused(folder, ERR_NOT_FOUND, "model-1.safetensors: cannot open");
    for (int i = 0; i < 3; i++)
        put(folder, parts[4 + i], &s.weights[i]);
    buffer_init(&other, 16);
    buffer_append(&other, "{}", 2);
    for (int i = 1; i <= 3; i++)
        put(folder, parts[i], &other);
    expect_parts(folder, parts, ARRAY_LEN(parts));
    snprintf(slash, sizeof slash, "%s//", folder);
    expect_parts(slash, parts, ARRAY_LEN(parts));
    /* A link is refused, to a file of the same folder as well. */
    file_join(from, sizeof from, folder, "model-2.safetensors");
    file_join(to, sizeof to, folder, "moved");
    assert_int_equal(rename(from, to), 0);
    assert_int_equal(symlink("moved", from), 0);
    open_refused(folder, ERR_CONFIG, "model-2.safetensors is a symbolic link");
    remove(from);
    assert_int_equal(mkfifo(from, 0600), 0);
    open_refused(folder, ERR_CONFIG, "model-2.safetensors: not a file");
    for (size_t i = 0; i < ARRAY_LEN(parts); i++)
        drop(folder, parts[i]);
    drop(folder, "model.safetensors.index.json");
    drop(folder, "moved");
    assert_int_equal(rmdir(folder), 0);
    buffer_release(&other);
    release_sharded(&s);
}

static void test_single_files(void **state)
{
    char folder[] = "/tmp/test_hf.XXXXXX", path[64];
    static const char *const parts[] = {"config.json", "model.safetensors"}, *const gguf_parts[] = {"a.gguf"};
    const struct models_flaw none = {0};
    struct buffer config, weights, gguf;
    struct tokenizer *tokenizer = NULL;
    struct model_file *file = NULL;
    struct error err = {0};
    (void)state;
    assert_non_null(mkdtemp(folder));
    models_config(MODEL_GLM4, &none, &config);
    models_weights(MODEL_GLM4, &none, -1, MODELS_LAYERS, &weights);
    models_gguf(MODEL_GLM4, &none, &gguf);
    put(folder, "config.json", &config);
    put(folder, "model.safetensors", &weights);
    put(folder, "a.gguf", &gguf);
    expect_parts(folder, parts, 2);
    file_join(path, sizeof path, folder, "a.gguf");
    expect_parts(path, gguf_parts, 1);
    assert_int_equal(model_file_open(folder, &file, &err), 0);
    assert_string_equal(model_file_name(file), folder + strlen("/tmp/"));
    assert_true(model_file_is_folder(file));
    fixture_refused(model_file_tokenizer(file, &tokenizer, &err), &err, ERR_NOT_FOUND, "tokenizer.json is missing",
                    NULL);
    model_file_close(file);
    drop(folder, "config.json");
    drop(folder, "model.safetensors");
    drop(folder, "a.gguf");
    assert_int_equal(rmdir(folder), 0);
    open_refused(folder, ERR_NOT_FOUND, "cannot open");
    buffer_release(&config);
    buffer_release(&weights);
    buffer_release(&gguf);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_architecture),
        cmocka_unit_test(test_data_that_lies_askew),
        cmocka_unit_test(test_positions),
        cmocka_unit_test(test_llama3_factors),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_fields_are_checked),
        cmocka_unit_test(test_config_is_json),
        cmocka_unit_test(test_every_tensor_is_checked),
        cmocka_unit_test(test_shards),
        cmocka_unit_test(test_index_is_complete),
        cmocka_unit_test(test_too_many_shards),
        cmocka_unit_test(test_folder_with_shards),
        cmocka_unit_test(test_single_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
