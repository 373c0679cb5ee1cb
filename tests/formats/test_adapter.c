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

static void make_lora(struct lora *lora, enum lora_mode mode, enum lora_scaling scaling)
{
    const struct lora_config config = {.mode = mode,
                                       .scaling = scaling,
                                       .rank = 4,
                                       .alpha = 8,
                                       .layer_first = 1,
                                       .layer_count = 2,
                                       .targets = LORA_TARGETS_ALL};
    assert_int_equal(lora_init(lora, &config, &model, NULL), 0);
    for (size_t i = 0; i < lora->trained_count; i++)
        lora->trained[i] = (float)i;
    for (size_t i = 0; i < lora->frozen_count; i++)
        lora->frozen[i] = -(float)i;
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

static void test_round_trips(void **state)
{
    (void)state;
    for (int variant = 0; variant < 4; variant++) {
        const enum lora_mode mode = variant % 2 ? LORA_FFA : LORA_JOINT;
        struct lora lora, back;
        struct buffer config, tensors, gguf;
        struct error err = {0};
        make_lora(&lora, mode, variant / 2 ? LORA_SCALE_SQRT_RANK : LORA_SCALE_RANK);
        buffer_init(&config, 1 << 16);
        buffer_init(&tensors, 1 << 20);
        buffer_init(&gguf, 1 << 20);
        assert_int_equal(adapter_encode_peft(&lora, &model, "base", &config, &tensors, &err), 0);
        if (adapter_decode_peft(buffer_span(&config), buffer_span(&tensors), "a", &model, mode, &back, &err) < 0)
            fail_msg("%s", err.message);
        expect_same(&lora, &back);
        lora_release(&back);
        assert_int_equal(adapter_encode_gguf(&lora, &model, &gguf, &err), 0);
        if (adapter_decode_gguf(buffer_span(&gguf), "a", &model, mode, &back, &err) < 0)
            fail_msg("%s", err.message);
        expect_same(&lora, &back);
        lora_release(&back);
        lora_release(&lora);
        buffer_release(&config);
        buffer_release(&tensors);
        buffer_release(&gguf);
    }
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
        cmocka_unit_test(test_broken_safetensors),
        cmocka_unit_test(test_broken_adapters),
        cmocka_unit_test(test_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
