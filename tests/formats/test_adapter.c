/* safetensors and LoRA adapters: round trips, the order of q's and k's rows, and broken files. */
#include "tests/formats/fixtures.h"

#include "base/file.h"
#include "model/formats/adapter.h"
#include "model/formats/safetensors.h"

#include <math.h>

static const struct model_config model = {.architecture = MODEL_LLAMA,
                                          .layer_count = 4,
                                          .d_model = 32,
                                          .head_count = 2,
                                          .kv_head_count = 1,
                                          .head_size = 16,
                                          .d_ff = 64,
                                          .vocabulary = 48,
                                          .context_length = 64,
                                          .rope_order = ROPE_NORM,
                                          .rope_base = 1e4,
                                          .rope_scale = 1,
                                          .norm_eps = 1e-5f};

static void make_lora_of(struct lora *lora, const struct model_config *m, enum lora_mode mode,
                         enum lora_scaling scaling)
{
    const struct lora_config config = {.mode = mode,
                                       .scaling = scaling,
                                       .rank = 4,
                                       .alpha = 8,
                                       .layer_first = 1,
                                       .layer_count = 2,
                                       .targets = LORA_TARGETS_ALL};
    assert_int_equal(lora_init(lora, &config, m, NULL), 0);
    for (size_t i = 0; i < lora->trained_count; i++)
        lora->trained[i] = (float)i;
    for (size_t i = 0; i < lora->frozen_count; i++)
        lora->frozen[i] = -(float)i;
}

static void make_lora(struct lora *lora, enum lora_mode mode, enum lora_scaling scaling)
{
    make_lora_of(lora, &model, mode, scaling);
}

static void expect_same(const struct lora *a, const struct lora *b)
{
    assert_int_equal(a->config.layer_first, b->config.layer_first);
    assert_int_equal(a->config.layer_count, b->config.layer_count);
    assert_int_equal(a->config.targets, b->config.targets);
    assert_true(fabsf(a->scale - b->scale) < 1e-6f);
    assert_int_equal(a->trained_count, b->trained_count);
    assert_memory_equal(a->trained, b->trained, a->trained_count * sizeof(float));
    assert_int_equal(a->frozen_count, b->frozen_count);
    if (a->frozen_count > 0)
        assert_memory_equal(a->frozen, b->frozen, a->frozen_count * sizeof(float));
}

/* The model above as another architecture; order: of llama's rows. */
static struct model_config model_of(enum model_architecture architecture, enum rope_order order)
{
    struct model_config c = model;
    c.architecture = architecture;
    c.rope_order = architecture == MODEL_LLAMA ? order : architecture == MODEL_GLM4 ? ROPE_NORM : ROPE_NEOX;
    c.fused_gate_up = architecture == MODEL_GLM4;
    return c;
}

static void round_trip(const struct model_config *m, enum lora_mode mode, enum lora_scaling scaling)
{
    struct lora lora, back;
    struct buffer config, tensors, gguf;
    struct error err = {0};
    make_lora_of(&lora, m, mode, scaling);
    buffer_init(&config, 1 << 16);
    buffer_init(&tensors, 1 << 20);
    buffer_init(&gguf, 1 << 20);
    assert_int_equal(adapter_encode_peft(&lora, m, "base", &config, &tensors, &err), 0);
    if (adapter_decode_peft(buffer_span(&config), buffer_span(&tensors), "a", m, mode, &back, &err) < 0)
        fail_msg("%s", err.message);
    expect_same(&lora, &back);
    assert_int_equal(back.config.scaling, scaling);
    lora_release(&back);
    assert_int_equal(adapter_encode_gguf(&lora, m, &gguf, &err), 0);
    if (adapter_decode_gguf(buffer_span(&gguf), "a", m, mode, &back, &err) < 0)
        fail_msg("%s", err.message);
    expect_same(&lora, &back);
    lora_release(&back);
    lora_release(&lora);
    buffer_release(&config);
    buffer_release(&tensors);
    buffer_release(&gguf);
}

static void test_round_trips(void **state)
{
    (void)state;
    for (int variant = 0; variant < 4; variant++) {
        const enum lora_mode mode = variant % 2 ? LORA_FFA : LORA_JOINT;
        const enum lora_scaling scaling = variant / 2 ? LORA_SCALE_SQRT_RANK : LORA_SCALE_RANK;
        for (int a = MODEL_LLAMA; a <= MODEL_GLM4; a++)
            for (int order = ROPE_NORM; order <= ROPE_NEOX; order++) {
                const struct model_config m = model_of((enum model_architecture)a, (enum rope_order)order);
                round_trip(&m, mode, scaling);
            }
    }
}

/* The same adapter of a llama that holds its rows in either order: both forms come out the same. */
static void test_forms_do_not_depend_on_the_order_held(void **state)
{
    const struct model_config norm = model_of(MODEL_LLAMA, ROPE_NORM), neox = model_of(MODEL_LLAMA, ROPE_NEOX);
    struct lora first, second;
    struct buffer config, peft[2], gguf[2];
    struct error err = {0};
    (void)state;
    make_lora(&first, LORA_JOINT, LORA_SCALE_RANK);
    buffer_init(&config, 1 << 16);
    for (int i = 0; i < 2; i++) {
        buffer_init(&peft[i], 1 << 20);
        buffer_init(&gguf[i], 1 << 20);
    }
    assert_int_equal(adapter_encode_peft(&first, &norm, "base", &config, &peft[0], &err), 0);
    assert_int_equal(adapter_encode_gguf(&first, &norm, &gguf[0], &err), 0);
    assert_int_equal(adapter_decode_gguf(buffer_span(&gguf[0]), "a", &neox, LORA_JOINT, &second, &err), 0);
    assert_memory_not_equal(first.trained, second.trained, first.trained_count * sizeof(float));
    buffer_clear(&config);
    assert_int_equal(adapter_encode_peft(&second, &neox, "base", &config, &peft[1], &err), 0);
    assert_int_equal(adapter_encode_gguf(&second, &neox, &gguf[1], &err), 0);
    assert_int_equal(peft[0].len, peft[1].len);
    assert_memory_equal(peft[0].data, peft[1].data, peft[0].len);
    assert_int_equal(gguf[0].len, gguf[1].len);
    assert_memory_equal(gguf[0].data, gguf[1].data, gguf[0].len);
    lora_release(&first);
    lora_release(&second);
    buffer_release(&config);
    for (int i = 0; i < 2; i++) {
        buffer_release(&peft[i]);
        buffer_release(&gguf[i]);
    }
}

static const float *values_of(const struct safetensors *file, const char *name)
{
    static float values[2 * 64 * 32];
    const struct safetensors_tensor *t = safetensors_find(file, name);
    if (!t)
        fail_msg("%s is not there", name);
    assert_true(safetensors_floats(t, values));
    return values;
}

/* glm4: NORM order as llama's files, but no permutation; one matrix of gate and up. */
static void test_glm4(void **state)
{
    const struct model_config m = model_of(MODEL_GLM4, ROPE_NORM);
    struct lora lora;
    struct buffer config, tensors, bytes;
    struct safetensors *file = NULL;
    struct gguf *gguf = NULL;
    (void)state;
    make_lora_of(&lora, &m, LORA_JOINT, LORA_SCALE_RANK);
    buffer_init(&config, 1 << 16);
    buffer_init(&tensors, 1 << 20);
    buffer_init(&bytes, 1 << 20);
    assert_int_equal(adapter_encode_peft(&lora, &m, "base", &config, &tensors, NULL), 0);
    assert_int_equal(adapter_encode_gguf(&lora, &m, &bytes, NULL), 0);
    assert_int_equal(safetensors_parse(buffer_span(&tensors), "a", &file, NULL), 0);
    assert_int_equal(gguf_parse(buffer_span(&bytes), "a", &gguf, NULL), 0);
    assert_int_equal(safetensors_count(file), 2 * 2 * 6);
#define LAYER "base_model.model.model.layers.1."
    assert_memory_equal(values_of(file, LAYER "self_attn.q_proj.lora_B.weight"), lora_b(&lora, 1, LORA_Q), 32 * 4 * 4);
    assert_memory_equal(values_of(file, LAYER "mlp.gate_up_proj.lora_B.weight"), lora_b(&lora, 1, LORA_UP),
                        2 * 64 * 4 * 4);
    const struct gguf_tensor *up = gguf_tensor_find(gguf, "blk.1.ffn_up.weight.lora_b");
    assert_non_null(up);
    assert_true(up->dims[0] == 4 && up->dims[1] == 2 * 64);
    assert_memory_equal(up->data, lora_b(&lora, 1, LORA_UP), up->bytes);
    assert_non_null(memmem(config.data, config.len, "\"gate_up_proj\"", 14));
    assert_null(memmem(config.data, config.len, "\"up_proj\"", 9));
    safetensors_close(file);
    gguf_close(gguf);
    lora_release(&lora);
    buffer_release(&config);
    buffer_release(&tensors);
    buffer_release(&bytes);
}

/* What a reader that knows alpha / rank only makes of the file. */
static void test_gguf_alpha(void **state)
{
    const struct model_config other = model_of(MODEL_QWEN2, ROPE_NEOX);
    struct lora lora, back;
    struct buffer bytes;
    struct gguf *gguf = NULL;
    struct error err = {0};
    float alpha = 0, zero = 0;
    (void)state;
    make_lora(&lora, LORA_JOINT, LORA_SCALE_SQRT_RANK);
    assert_true(lora.scale == 4); /* 8/√4 */
    buffer_init(&bytes, 1 << 20);
    assert_int_equal(adapter_encode_gguf(&lora, &model, &bytes, NULL), 0);
    assert_int_equal(gguf_parse(buffer_span(&bytes), "a", &gguf, NULL), 0);
    assert_int_equal(gguf_get_f32(gguf, "adapter.lora.alpha", &alpha, NULL), 0);
    assert_true(alpha / 4 == lora.scale);
    gguf_close(gguf);
    fixture_refused(adapter_decode_gguf(buffer_span(&bytes), "a", &other, LORA_JOINT, &back, &err), &err, ERR_INTEGRITY,
                    "general.architecture is not \"qwen2\"", NULL);
    /* alpha 0 is no scaling */
    uint8_t *at = memmem(bytes.data, bytes.len, "adapter.lora.alpha", 18);
    memcpy(at + 18 + 4, &zero, sizeof zero);
    assert_int_equal(adapter_decode_gguf(buffer_span(&bytes), "a", &model, LORA_JOINT, &back, &err), 0);
    assert_true(back.scale == 1);
    lora_release(&back);
    lora.config.alpha = 0;
    fixture_refused(adapter_encode_gguf(&lora, &model, &bytes, &err), &err, ERR_CONFIG, "alpha is 0", NULL);
    lora_release(&lora);
    buffer_release(&bytes);
}

/* llama.cpp's converter: reshape (heads, 2, d/2), swap the last two. So its row 1 of a head is Hugging Face's row d/2.
 */
static void test_rows_of_q_and_k_are_unpermuted(void **state)
{
    struct lora lora;
    struct buffer config, tensors;
    struct safetensors *file = NULL;
    float q[32 * 4], v[16 * 4];
    (void)state;
    make_lora(&lora, LORA_JOINT, LORA_SCALE_RANK);
    buffer_init(&config, 1 << 16);
    buffer_init(&tensors, 1 << 20);
    assert_int_equal(adapter_encode_peft(&lora, &model, "base", &config, &tensors, NULL), 0);
    assert_int_equal(safetensors_parse(buffer_span(&tensors), "a", &file, NULL), 0);
    assert_int_equal(safetensors_count(file), 2 * 2 * 7);
    assert_true(safetensors_floats(
        safetensors_find(file, "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"), q));
    assert_true(safetensors_floats(
        safetensors_find(file, "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"), v));
    const float *b = lora_b(&lora, 1, LORA_Q);
    for (int head = 0; head < 2; head++)
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 8; i++)
                assert_memory_equal(q + (head * 16 + half * 8 + i) * 4, b + (head * 16 + 2 * i + half) * 4, 16);
    assert_memory_equal(v, lora_b(&lora, 2, LORA_V), sizeof v);
    safetensors_close(file);
    lora_release(&lora);
    buffer_release(&config);
    buffer_release(&tensors);
}

static void refuse_header(const char *header, size_t data_bytes, const char *expected)
{
    struct buffer bytes;
    struct safetensors *file = NULL;
    struct error err = {0};
    buffer_init(&bytes, 1 << 16);
    buffer_u64(&bytes, strlen(header));
    buffer_append(&bytes, header, strlen(header));
    for (size_t i = 0; i < data_bytes; i++)
        buffer_u8(&bytes, 0);
    fixture_refused(safetensors_parse(buffer_span(&bytes), "x.safetensors", &file, &err), &err, ERR_INTEGRITY,
                    "x.safetensors", expected, NULL);
    buffer_release(&bytes);
}

static void test_broken_safetensors(void **state)
{
    struct safetensors *file = NULL;
    struct error err = {0};
    (void)state;
#define T(shape, offsets) "{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
    refuse_header("[]", 0, "not a JSON object");
    refuse_header("{\"a\":", 0, "not valid JSON");
    refuse_header("{\"a\":" T("[1]", "[0,4]") ",\"a\":" T("[1]", "[0,4]") "}", 4, "stands twice");
    refuse_header("{\"a\":" T("[1]", "[0,4]") ",\"b\":" T("[1]", "[0,4]") "}", 4, "overlap");
    refuse_header("{\"a\":" T("[1]", "[4,8]") "}", 8, "hole");
    refuse_header("{\"a\":" T("[1]", "[0,4]") "}", 8, "belong to none");
    refuse_header("{\"a\":" T("[2]", "[0,4]") "}", 4, "exactly");
    refuse_header("{\"a\":" T("[1]", "[0,400]") "}", 4, "outside");
    refuse_header("{\"a\":" T("[1]", "[4,0]") "}", 4, "outside");
    refuse_header("{\"a\":" T("[-1]", "[0,4]") "}", 4, "shape");
    refuse_header("{\"a\":" T("[4611686018427387904,16]", "[0,4]") "}", 4, "shape");
    refuse_header("{\"a\":" T("[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "shape");
    refuse_header("{\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype");
    refuse_header("{\"a\":7}", 4, "dtype");
    fixture_refused(safetensors_parse(span_of("\xff\xff\xff\xff\xff\xff\xff\x7f{}", 10), "x", &file, &err), &err,
                    ERR_INTEGRITY, "header claims", NULL);
    fixture_refused(safetensors_parse(span_of("abc", 3), "x", &file, &err), &err, ERR_INTEGRITY, "too short", NULL);
}

/* Replaces text of equal length in the encoded adapter and expects a refusal. */
static void refuse_adapter(const char *from, const char *to, bool in_config, const char *expected)
{
    struct lora lora, back;
    struct buffer config, tensors;
    struct error err = {0};
    make_lora(&lora, LORA_JOINT, LORA_SCALE_RANK);
    if (!from)
        lora.trained[17] = NAN;
    buffer_init(&config, 1 << 16);
    buffer_init(&tensors, 1 << 20);
    assert_int_equal(adapter_encode_peft(&lora, &model, "base", &config, &tensors, NULL), 0);
    struct buffer *b = in_config ? &config : &tensors;
    if (from) {
        void *at = memmem(b->data, b->len, from, strlen(from));
        assert_non_null(at);
        memcpy(at, to, strlen(to));
    }
    fixture_refused(
        adapter_decode_peft(buffer_span(&config), buffer_span(&tensors), "a", &model, LORA_JOINT, &back, &err), &err,
        ERR_INTEGRITY, expected, NULL);
    lora_release(&lora);
    buffer_release(&config);
    buffer_release(&tensors);
}

static void test_broken_adapters(void **state)
{
    (void)state;
    refuse_adapter("\"r\": 4", "\"r\": 5", true, "expected 5 x 32");
    refuse_adapter("\"r\": 4", "\"r\": 0", true, "r is no integer");
    refuse_adapter("LORA", "IA3 ", true, "peft_type");
    refuse_adapter("\"none\"", "\"all \"", true, "bias");
    refuse_adapter("{", "[", true, "not a JSON object");
    refuse_adapter("layers.1.self_attn.q_proj.lora_A", "layers.1.self_attn.z_proj.lora_A", false, "lora_A is missing");
    refuse_adapter("layers.1.mlp.up_proj.lora_B.weight", "layers.1.mlp.up_proj.lora_B.weighs", false, "missing");
    refuse_adapter(NULL, NULL, false, "not finite");
}

/* Fields of adapter_config.json beside the good ones. */
static void test_adapter_config(void **state)
{
    static const struct {
        const char *edit, *expected;
    } cases[] = {
        {"{\"r\": 4.0}", "r is no integer from 1 to 256"},
        {"{\"r\": 257}", "r is no integer from 1 to 256"},
        {"{\"r\": null}", "r is missing"},
        {"{\"lora_alpha\": \"8\"}", "lora_alpha is no number"},
        {"{\"lora_alpha\": -1}", "lora_alpha is no number"},
        {"{\"use_rslora\": 1}", "use_rslora is neither true nor false"},
        {"{\"use_dora\": true}", "use_dora is set"},
        {"{\"use_qalora\": true}", "use_qalora is set"},
        {"{\"fan_in_fan_out\": true}", "fan_in_fan_out is set"},
        {"{\"lora_bias\": true}", "lora_bias is set"},
        {"{\"bias\": \"lora_only\"}", "bias is not none"},
        {"{\"peft_type\": null}", "peft_type is not LORA"},
        {"{\"rank_pattern\": {\"q_proj\": 8}}", "rank_pattern is set"},
        {"{\"alpha_pattern\": {\"q_proj\": 8}}", "alpha_pattern is set"},
        {"{\"modules_to_save\": [\"lm_head\"]}", "modules_to_save is set"},
        {"{\"target_parameters\": [\"x\"]}", "target_parameters is set"},
        {"{\"trainable_token_indices\": [1]}", "trainable_token_indices is set"},
        {"{\"layer_replication\": [[0, 4]]}", "layer_replication is set"},
        {"{\"alora_invocation_tokens\": [1]}", "alora_invocation_tokens is set"},
        {"{\"init_lora_weights\": \"pissa\"}", "init_lora_weights names a start"},
    };
    static const char *const fine[] = {"{\"init_lora_weights\": \"gaussian\", \"rank_pattern\": {}, \"use_dora\": "
                                       "false, \"modules_to_save\": null, \"lora_dropout\": 0.1}"};
    struct lora lora, back;
    struct buffer config, tensors;
    struct error err = {0};
    (void)state;
    make_lora(&lora, LORA_JOINT, LORA_SCALE_RANK);
    buffer_init(&config, 1 << 16);
    buffer_init(&tensors, 1 << 20);
    assert_int_equal(adapter_encode_peft(&lora, &model, "base", &config, &tensors, NULL), 0);
    for (size_t i = 0; i < ARRAY_LEN(cases) + ARRAY_LEN(fine); i++) {
        const bool bad = i < ARRAY_LEN(cases);
        json_t *root = json_loadb((const char *)config.data, config.len, 0, NULL);
        json_object_update_new(root, json_loads(bad ? cases[i].edit : fine[i - ARRAY_LEN(cases)], 0, NULL));
        char *text = json_dumps(root, 0);
        int rc = adapter_decode_peft(span_str(text), buffer_span(&tensors), "a", &model, LORA_JOINT, &back, &err);
        if (bad)
            fixture_refused(rc, &err, ERR_INTEGRITY, "a: adapter_config.json: ", cases[i].expected, NULL);
        else
            assert_int_equal(rc, 0);
        if (rc == 0)
            lora_release(&back);
        free(text);
        json_decref(root);
    }
    lora_release(&lora);
    buffer_release(&config);
    buffer_release(&tensors);
}

static void test_files(void **state)
{
    char folder[] = "/tmp/test_adapter.XXXXXX", path[64];
    struct lora lora, back;
    struct error err = {0};
    (void)state;
    make_lora(&lora, LORA_FFA, LORA_SCALE_RANK);
    assert_non_null(mkdtemp(folder));
    assert_int_equal(adapter_export_peft(&lora, &model, folder, "base", &err), 0);
    assert_int_equal(adapter_import(folder, &model, LORA_FFA, &back, &err), 0);
    expect_same(&lora, &back);
    lora_release(&back);
    file_join(path, sizeof path, folder, "a.gguf");
    assert_int_equal(adapter_export_gguf(&lora, &model, path, &err), 0);
    assert_int_equal(adapter_import(path, &model, LORA_FFA, &back, &err), 0);
    expect_same(&lora, &back);
    lora_release(&back);
    lora_release(&lora);
    remove(path);
    file_join(path, sizeof path, folder, "adapter_config.json");
    remove(path);
    file_join(path, sizeof path, folder, "adapter_model.safetensors");
    remove(path);
    remove(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_rows_of_q_and_k_are_unpermuted),
        cmocka_unit_test(test_forms_do_not_depend_on_the_order_held),
        cmocka_unit_test(test_glm4),
        cmocka_unit_test(test_gguf_alpha),
        cmocka_unit_test(test_adapter_config),
        cmocka_unit_test(test_broken_safetensors),
        cmocka_unit_test(test_broken_adapters),
        cmocka_unit_test(test_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
