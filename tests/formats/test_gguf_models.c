/* GGUF files of every architecture: what metadata and tensors become, and what is refused. */
#include "tests/formats/fixtures.h"
#include "tests/formats/models.h"

#include <math.h>

static int load(enum model_architecture architecture, const struct models_flaw *flaw, struct model *model,
                struct error *err, bool expect)
{
    struct buffer bytes;
    struct gguf *gguf = NULL;
    models_gguf(architecture, flaw, &bytes);
    int rc = gguf_parse(buffer_span(&bytes), "test.gguf", &gguf, err);
    if (rc == 0)
        rc = gguf_load_model(gguf, model, err);
    if (expect && rc == 0)
        models_expect(model, 0);
    gguf_close(gguf);
    buffer_release(&bytes);
    return rc;
}

/* Loads, with every tensor in its place; the caller looks at the configuration. */
static struct model_config good(enum model_architecture architecture, const struct models_flaw *flaw)
{
    struct model *model = calloc(1, sizeof *model);
    struct error err = {0};
    if (load(architecture, flaw, model, &err, true) < 0)
        fail_msg("%s: %s", model_architecture_name(architecture), err.message);
    const struct model_config config = model->config;
    assert_int_equal(model->output.data != NULL, flaw->untied);
    free(model);
    return config;
}

static void refused(enum model_architecture architecture, const struct models_flaw *flaw, const char *expected)
{
    struct model *model = calloc(1, sizeof *model);
    struct error err = {0};
    fixture_refused(load(architecture, flaw, model, &err, false), &err, ERR_INTEGRITY, "test.gguf", expected, NULL);
    free(model);
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
            assert_int_equal(model_rotated(&c), glm ? MODELS_HEAD / 2 : MODELS_HEAD);
            assert_int_equal(c.rope_order, a == MODEL_LLAMA || glm ? ROPE_NORM : ROPE_NEOX);
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
        }
    }
}

static void linear(struct gguf_writer *w)
{
    gguf_writer_string(w, "gemma3.rope.scaling.type", span_str("linear"));
    gguf_writer_f32(w, "gemma3.rope.scaling.factor", 8);
    gguf_writer_f32(w, "gemma3.rope.freq_base_swa", 5000);
    gguf_writer_u32(w, "gemma3.attention.sliding_window_pattern", 3);
}

static void without_type(struct gguf_writer *w)
{
    gguf_writer_f32(w, "qwen3.rope.scaling.factor", 4);
}

static void old_name(struct gguf_writer *w)
{
    gguf_writer_f32(w, "qwen3.rope.scale_linear", 4);
}

static void none(struct gguf_writer *w)
{
    gguf_writer_string(w, "qwen3.rope.scaling.type", span_str("none"));
    gguf_writer_f32(w, "qwen3.rope.scaling.factor", 4);
}

static void all_full(struct gguf_writer *w)
{
    gguf_writer_u32(w, "gemma3.attention.sliding_window_pattern", 1);
}

static void test_positions_and_windows(void **state)
{
    struct model_config c = good(MODEL_GEMMA3, &(struct models_flaw){.more = linear});
    (void)state;
    assert_true(c.rope_scale == 8 && c.rope_base == 1e6 && c.rope_base_sliding == 5000 && c.window_period == 3);
    assert_true(good(MODEL_QWEN3, &(struct models_flaw){.more = without_type}).rope_scale == 4);
    assert_true(good(MODEL_QWEN3, &(struct models_flaw){.more = old_name}).rope_scale == 4);
    assert_true(good(MODEL_QWEN3, &(struct models_flaw){.more = none}).rope_scale == 1);
    c = good(MODEL_GEMMA3, &(struct models_flaw){.drop = "gemma3.attention.sliding_window"});
    assert_true(c.window == 0 && c.window_period == 0 && c.rope_base_sliding == 0);
    c = good(MODEL_GEMMA3, &(struct models_flaw){.more = all_full});
    assert_true(c.window == 0 && c.window_period == 0 && c.rope_base_sliding == 0);
}

/* A pattern of one bool for each layer. */
static void bools(struct gguf_writer *w, const char *pattern, uint32_t type)
{
    const char *key = "gemma3.attention.sliding_window_pattern";
    buffer_u64(&w->pairs, strlen(key));
    buffer_append(&w->pairs, key, strlen(key));
    buffer_u32(&w->pairs, GGUF_ARRAY);
    buffer_u32(&w->pairs, type);
    buffer_u64(&w->pairs, strlen(pattern));
    for (size_t i = 0; pattern[i]; i++)
        buffer_u8(&w->pairs, pattern[i] == '1');
    w->pair_count++;
}

static void bools_period(struct gguf_writer *w)
{
    bools(w, "1101101", GGUF_BOOL);
}
static void bools_all(struct gguf_writer *w)
{
    bools(w, "1111111", GGUF_BOOL);
}
static void bools_uneven(struct gguf_writer *w)
{
    bools(w, "1100101", GGUF_BOOL);
}
static void bools_few(struct gguf_writer *w)
{
    bools(w, "110110", GGUF_BOOL);
}
static void bools_bytes(struct gguf_writer *w)
{
    bools(w, "1101101", GGUF_U8);
}

static void test_patterns(void **state)
{
    (void)state;
    assert_int_equal(good(MODEL_GEMMA3, &(struct models_flaw){.more = bools_period}).window_period, 3);
    const struct model_config c = good(MODEL_GEMMA3, &(struct models_flaw){.more = bools_all});
    for (int32_t layer = 0; layer < MODELS_LAYERS; layer++)
        assert_true(model_layer_slides(&c, layer));
    refused(MODEL_GEMMA3, &(struct models_flaw){.more = bools_uneven}, "not at regular distances");
    refused(MODEL_GEMMA3, &(struct models_flaw){.more = bools_few}, "one for each of 7 layers");
    refused(MODEL_GEMMA3, &(struct models_flaw){.more = bools_bytes}, "sliding_window_pattern has type");
}

#define SETS(name, call)                                                                                               \
    static void set_##name(struct gguf_writer *w)                                                                      \
    {                                                                                                                  \
        call;                                                                                                          \
    }
SETS(experts, gguf_writer_u32(w, "qwen3.expert_count", 8))
SETS(no_experts, gguf_writer_u32(w, "qwen3.expert_count", 0))
SETS(window, gguf_writer_u32(w, "qwen2.attention.sliding_window", 9))
SETS(softcap, gguf_writer_f32(w, "gemma3.final_logit_softcapping", 30))
SETS(no_softcap, gguf_writer_f32(w, "gemma3.final_logit_softcapping", 0))
SETS(scale, gguf_writer_f32(w, "llama.attention.scale", 0.1f))
SETS(causal, gguf_writer_bool(w, "qwen3.attention.causal", false))
SETS(is_causal, gguf_writer_bool(w, "qwen3.attention.causal", true))
SETS(factor, gguf_writer_f32(w, "glm4.rope.scaling.attn_factor", 0.5f))
SETS(nextn, gguf_writer_u32(w, "glm4.nextn_predict_layers", 1))
SETS(yarn, gguf_writer_string(w, "qwen2.rope.scaling.type", span_str("yarn")))
SETS(negative, gguf_writer_f32(w, "qwen2.rope.scaling.factor", -2))
SETS(sections, gguf_writer_i32s(w, "glm4.rope.dimension_sections", (const int32_t[]){8, 12, 12, 0}, 4))
SETS(partial, gguf_writer_u32(w, "qwen3.rope.dimension_count", 8))
SETS(value_length, gguf_writer_u32(w, "qwen3.attention.value_length", 8))
SETS(swa_length, gguf_writer_u32(w, "gemma3.attention.key_length_swa", 8))
SETS(swa_count, gguf_writer_u32(w, "gemma3.rope.dimension_count_swa", 8))
SETS(rows, gguf_writer_u32(w, "glm4.vocab_size", 41))
SETS(swa_base, gguf_writer_f32(w, "gemma3.rope.freq_base_swa", 0.5f))

static void test_keys_that_change_the_computation(void **state)
{
    static const struct {
        enum model_architecture architecture;
        void (*more)(struct gguf_writer *w);
        const char *expected;
    } cases[] = {
        {MODEL_QWEN3, set_experts, "qwen3.expert_count is set"},
        {MODEL_QWEN2, set_window, "qwen2.attention.sliding_window is set"},
        {MODEL_GEMMA3, set_softcap, "gemma3.final_logit_softcapping is set"},
        {MODEL_LLAMA, set_scale, "llama.attention.scale is set"},
        {MODEL_QWEN3, set_causal, "qwen3.attention.causal is set"},
        {MODEL_GLM4, set_factor, "glm4.rope.scaling.attn_factor is set"},
        {MODEL_GLM4, set_nextn, "glm4.nextn_predict_layers is set"},
        {MODEL_QWEN2, set_yarn, "qwen2.rope.scaling.type names a kind"},
        {MODEL_QWEN2, set_negative, "qwen2.rope.scaling.factor is -2"},
        {MODEL_GLM4, set_sections, "glm4.rope.dimension_sections is set"},
        {MODEL_QWEN3, set_partial, "qwen3.rope.dimension_count is 8, expected 16"},
        {MODEL_QWEN3, set_value_length, "qwen3.attention.value_length is 8, expected 16"},
        {MODEL_GEMMA3, set_swa_length, "gemma3.attention.key_length_swa is 8, expected 16"},
        {MODEL_GEMMA3, set_swa_count, "gemma3.rope.dimension_count_swa is 8, expected 16"},
        {MODEL_GLM4, set_rows, "glm4.vocab_size is 41, expected 40"},
        {MODEL_GEMMA3, set_swa_base, "rotary base 0.5 of sliding layers"},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++)
        refused(cases[i].architecture, &(struct models_flaw){.more = cases[i].more}, cases[i].expected);
    (void)good(MODEL_QWEN3, &(struct models_flaw){.more = set_no_experts});
    (void)good(MODEL_GEMMA3, &(struct models_flaw){.more = set_no_softcap});
    (void)good(MODEL_QWEN3, &(struct models_flaw){.more = set_is_causal});
}

/* Each tensor of each architecture in turn: missing, of another shape, not finite. */
static void test_every_tensor_is_checked(void **state)
{
    (void)state;
    for (int a = MODEL_LLAMA; a <= MODEL_GLM4; a++) {
        struct models_row rows[16];
        const size_t count = models_rows((enum model_architecture)a, rows);
        for (size_t i = 0; i < count; i++) {
            char name[64], expected[128], bare[64];
            snprintf(name, sizeof name, "blk.3.%s", rows[i].gguf);
            snprintf(expected, sizeof expected, "the tensor %s is missing", name);
            refused((enum model_architecture)a, &(struct models_flaw){.drop = name}, expected);
            snprintf(bare, sizeof bare, "%.*s",
                     (int)(strstr(rows[i].gguf, ".weight") ? strstr(rows[i].gguf, ".weight") - rows[i].gguf : 48),
                     rows[i].gguf);
            refused((enum model_architecture)a, &(struct models_flaw){.reshape = name}, bare);
            snprintf(expected, sizeof expected, "tensor %s holds a scale or value that is NaN", name);
            refused((enum model_architecture)a, &(struct models_flaw){.poison = name}, expected);
        }
    }
}

static void factors(struct gguf_writer *w, float first)
{
    static float values[8];
    for (int i = 0; i < 8; i++)
        values[i] = i ? 8 : first;
    gguf_writer_tensor(w, "rope_freqs.weight", TENSOR_F32, 1, (uint64_t[]){8}, span_of(values, sizeof values));
}

static void good_factors(struct gguf_writer *w)
{
    factors(w, 1);
}

static void zero_factors(struct gguf_writer *w)
{
    factors(w, 0);
}

static void test_left_over_tensors(void **state)
{
    (void)state;
    refused(MODEL_LLAMA, &(struct models_flaw){.extra = "blk.0.attn_q.bias"}, "1 tensors are not part of a llama");
    refused(MODEL_QWEN3, &(struct models_flaw){.extra = "blk.0.attn_q.bias"}, "1 tensors are not part of a qwen3");
    refused(MODEL_QWEN2, &(struct models_flaw){.extra = "blk.0.attn_output.bias"}, "1 tensors are not part");
    refused(MODEL_GLM4, &(struct models_flaw){.extra = "blk.0.ffn_gate.weight"}, "1 tensors are not part");
    refused(MODEL_GLM4, &(struct models_flaw){.extra = "blk.7.attn_norm.weight"}, "1 tensors are not part");
    (void)good(MODEL_LLAMA, &(struct models_flaw){.more = good_factors});
    refused(MODEL_LLAMA, &(struct models_flaw){.more = zero_factors},
            "rope_freqs.weight holds a value that is not pos");
    refused(MODEL_QWEN3, &(struct models_flaw){.more = good_factors}, "1 tensors are not part");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_architecture),
        cmocka_unit_test(test_positions_and_windows),
        cmocka_unit_test(test_patterns),
        cmocka_unit_test(test_keys_that_change_the_computation),
        cmocka_unit_test(test_every_tensor_is_checked),
        cmocka_unit_test(test_left_over_tensors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
