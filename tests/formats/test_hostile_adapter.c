/*
 * safetensors files and LoRA adapters made to hurt: the classes of the published weaknesses of other loaders, each of
 * which must end in an error that names the field. (test_adapter.c, a: the simpler damages. test_hostile_gguf.c: the
 * container that GGUF adapters share with models.)
 *
 * class                                       | known from                              | tests
 * a header's length past the file, or huge    | safetensors' audit, openasr pull 73     | test_header, a: broken
 * a header that parses into gigabytes         | reports of "header bloating"            | test_bloated_header
 * nesting as deep as the header is long       | -                                       | test_header
 * a key twice, also when written differently  | safetensors issue 401                   | test_header, a: broken
 * text behind the header's object             | safetensors' audit (polyglots)          | test_header
 * __metadata__ that is no list of texts       | -                                       | test_header
 * overlaps, holes, bytes that belong to none  | safetensors' audit                      | test_offsets, a: broken
 * offsets of another size than the shape      | mlx issue 3363, ds4 pull 543            | test_shapes
 * the product of a shape wraps                | LiteRT issue 9255                       | test_shapes
 * an unknown type escapes the checks          | imp issue 1603                          | test_shapes
 * numbers that are negative or no integers    | -                                       | test_offsets, _shapes
 * factors of a shape that the model denies    | -                                       | test_factor_shapes, _gguf
 * a rank or alpha of 0, huge, or no number    | -                                       | test_config, _gguf
 * factors missing or left over                | -                                       | test_factor_names, _gguf
 * NaN and infinite values                     | -                                       | test_values, _gguf
 * quantised factors, another model's adapter  | -                                       | test_gguf
 */
#include "tests/formats/fixtures.h"

#include "model/formats/adapter.h"
#include "model/formats/safetensors.h"

#include <math.h>

static const struct model_config model = {.architecture = MODEL_LLAMA,
                                          .layer_count = 2,
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

/* --- safetensors -------------------------------------------------------------------------------------------------- */

static void refuse_bytes(struct span bytes, const char *expected)
{
    struct safetensors *file = NULL;
    struct error err = {0};
    uint8_t *exact = malloc(bytes.len ? bytes.len : 1);
    memcpy(exact, bytes.ptr, bytes.len);
    fixture_refused(safetensors_parse(span_of(exact, bytes.len), "bad.safetensors", &file, &err), &err, ERR_INTEGRITY,
                    "bad.safetensors", expected, NULL);
    free(exact);
}

static void refuse(struct span header, size_t data_bytes, const char *expected)
{
    struct buffer b;
    buffer_init(&b, 200u << 20);
    buffer_u64(&b, header.len);
    buffer_append(&b, header.ptr, header.len);
    memset(buffer_extend(&b, data_bytes), 0, data_bytes);
    assert_true(buffer_ok(&b));
    refuse_bytes(buffer_span(&b), expected);
    buffer_release(&b);
}

#define REFUSE(header, data_bytes, expected) refuse(span_str(header), data_bytes, expected)

static void test_header(void **state)
{
    static const uint64_t lengths[] = {UINT64_MAX, UINT64_MAX - 7, 1ull << 63, 1ull << 32, SAFETENSORS_HEADER_MAX + 1,
                                       3};
    uint8_t bytes[10] = {0};
    struct buffer deep;
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(lengths); i++) { /* 2 bytes follow */
        memcpy(bytes, &lengths[i], 8);
        memcpy(bytes + 8, "{}", 2);
        refuse_bytes(span_of(bytes, sizeof bytes), "the header claims");
    }
    for (size_t n = 0; n < 8; n++)
        refuse_bytes(span_of(bytes, n), "too short");
    REFUSE("", 0, "not a JSON object");
    REFUSE(" {}", 0, "not a JSON object"); /* the format has it begin at once */
    REFUSE("[{}]", 0, "not a JSON object");
    REFUSE("{}{}", 0, "not valid JSON");
    REFUSE("{} \xff", 0, "not valid JSON");
    REFUSE("{\"a\xff\":1}", 0, "not valid JSON");
    REFUSE("{\"a\\u0000b\":1}", 0, "not valid JSON"); /* two names for who compares C strings */
    REFUSE("{\"a\":1,\"\\u0061\":1}", 0, "stands twice");
    REFUSE("{\"__metadata__\":1}", 0, "__metadata__");
    REFUSE("{\"__metadata__\":[]}", 0, "__metadata__");
    REFUSE("{\"__metadata__\":{\"a\":{}}}", 0, "__metadata__");
    buffer_init(&deep, 1 << 20);
    buffer_printf(&deep, "{\"a\":");
    for (int i = 0; i < 100000; i++)
        buffer_u8(&deep, '[');
    refuse(buffer_span(&deep), 0, "not valid JSON");
    buffer_release(&deep);
}

/* Ten megabytes that jansson would make a gigabyte of; and the look at them is not deceived by texts. */
static void test_bloated_header(void **state)
{
    struct buffer b;
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        static const char *const parts[] = {"[],", "{},", "0,"};
        buffer_init(&b, 16u << 20);
        buffer_printf(&b, "{\"a\\\"[[\":[");
        for (int i = 0; i < 3000000; i++)
            buffer_append(&b, parts[kind], strlen(parts[kind]));
        buffer_printf(&b, "0]}");
        refuse(buffer_span(&b), 0, "more values than");
        buffer_release(&b);
    }
    buffer_init(&b, 16u << 20); /* commas in a text are no values */
    buffer_printf(&b, "{\"__metadata__\":{\"a\":\"\\\\\",\"b\":\"\\\"");
    for (int i = 0; i < 3000000; i++)
        buffer_append(&b, ",[{", 3);
    buffer_printf(&b, "\"}}");
    struct buffer file;
    struct safetensors *good = NULL;
    struct error err = {0};
    buffer_init(&file, 32u << 20);
    buffer_u64(&file, b.len);
    buffer_append(&file, b.data, b.len);
    if (safetensors_parse(buffer_span(&file), "good", &good, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(safetensors_count(good), 0);
    safetensors_close(good);
    buffer_release(&file);
    buffer_release(&b);
}

#define T(dtype, shape, offsets) "{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define ONE(dtype, shape, offsets) "{\"the.tensor\":" T(dtype, shape, offsets) "}"

static void test_offsets(void **state)
{
    static const char *const wrong[] = {"[0]",
                                        "[0,4,8]",
                                        "[]",
                                        "{}",
                                        "4",
                                        "[0.0,4]",
                                        "[\"0\",4]",
                                        "[0,null]",
                                        "[0,4.5]",
                                        "[true,4]",
                                        "[-4,0]",
                                        "[4,0]",
                                        "[-1,3]",
                                        "[0,9]",
                                        "[0,9223372036854775807]",
                                        "[9223372036854775803,9223372036854775807]"};
    char header[256];
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(wrong); i++) {
        snprintf(header, sizeof header, ONE("\"F32\"", "[1]", "%s"), wrong[i]);
        refuse(span_str(header), 8, "the.tensor");
    }
    REFUSE("{\"the.tensor\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets is missing");
    REFUSE(ONE("\"F32\"", "[1]", "[0,9223372036854775808]"), 4, "not valid JSON");
    REFUSE(ONE("\"F32\"", "[1]", "[0,18446744073709551620]"), 4, "not valid JSON"); /* 4 modulo 2^64 */
    REFUSE("{\"a\":" T("\"F32\"", "[2]", "[0,8]") ",\"b\":" T("\"F32\"", "[0]", "[4,4]") "}", 8, "overlap");
    REFUSE("{\"a\":" T("\"F32\"", "[2]", "[0,8]") ",\"b\":" T("\"F32\"", "[1]", "[4,8]") "}", 8, "overlap");
    REFUSE("{\"a\":" T("\"F32\"", "[1]", "[0,4]") ",\"b\":" T("\"F32\"", "[1]", "[8,12]") "}", 12, "hole");
    REFUSE("{}", 1, "1 bytes after the last tensor");
}

static void test_shapes(void **state)
{
    static const char *const wrong[] = {"1",
                                        "{}",
                                        "\"1\"",
                                        "[1.0]",
                                        "[\"1\"]",
                                        "[[1]]",
                                        "[null]",
                                        "[-1]",
                                        "[-1,-1]",
                                        "[4294967296,4294967296]",
                                        "[4611686018427387904]",
                                        "[4611686018427387905]", /* · 4 bytes: 2^64, and 2^64 + 4 */
                                        "[9223372036854775807,9223372036854775807]",
                                        "[0,9223372036854775807,9223372036854775807]",
                                        "[9223372036854775807,9223372036854775807,0]",
                                        "[1,1,1,1,1,1,1,1,1]"};
    static const char *const types[] = {"\"f32\"", "\"F8_E5M2\"", "\"\"", "\"F321\"", "7", "null", "[\"F32\"]"};
    char header[256], name[1024];
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(wrong); i++) {
        snprintf(header, sizeof header, ONE("\"F32\"", "%s", "[0,4]"), wrong[i]);
        refuse(span_str(header), 4, "the.tensor: shape");
    }
    REFUSE(ONE("\"F32\"", "[1000,1000]", "[0,4]"), 4, "data_offsets do not hold exactly"); /* mlx's report */
    REFUSE(ONE("\"F16\"", "[1]", "[0,4]"), 4, "data_offsets do not hold exactly");
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        snprintf(header, sizeof header, ONE("%s", "[1]", "[0,4]"), types[i]);
        refuse(span_str(header), 4, "the.tensor: dtype");
    }
    snprintf(name, sizeof name, "{\"%0600d\":" T("\"F32\"", "[1]", "[0,4]") "}", 7);
    refuse(span_str(name), 4, "the name is too long");
    REFUSE("{\"the.tensor\":[]}", 4, "the.tensor: dtype");
}

/* --- adapters ----------------------------------------------------------------------------------------------------- */

#define NAME(layer, module, factor) "base_model.model.model.layers." layer "." module ".lora_" factor ".weight"
#define Q_A NAME("0", "self_attn.q_proj", "A")
#define Q_B NAME("0", "self_attn.q_proj", "B")
#define CONFIG "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4}"

struct part {
    const char *name;
    enum safetensors_type type;
    uint32_t dim_count;
    uint64_t dims[3];
};

static float values[64 * 64];

static int decode(const char *config, const struct part *parts, size_t count, struct error *err)
{
    struct safetensors_tensor tensors[8];
    struct buffer b;
    struct lora lora = {0};
    buffer_init(&b, 1 << 20);
    for (size_t i = 0; i < count; i++) {
        const struct part *p = &parts[i];
        size_t bytes = p->type == SAFETENSORS_F32 ? 4 : 2;
        for (uint32_t d = 0; d < p->dim_count; d++)
            bytes *= p->dims[d];
        tensors[i] = (struct safetensors_tensor){.name = p->name, .type = p->type, .dim_count = p->dim_count};
        memcpy(tensors[i].dims, p->dims, sizeof p->dims);
        tensors[i].data = span_of(values, bytes);
    }
    assert_int_equal(safetensors_write(tensors, count, &b, NULL), 0);
    int rc = adapter_decode_peft(span_str(config), buffer_span(&b), "bad", &model, LORA_JOINT, &lora, err);
    if (rc == 0)
        lora_release(&lora);
    buffer_release(&b);
    return rc;
}

static void refuse_parts(const char *config, const struct part *parts, size_t count, const char *expected)
{
    struct error err = {0};
    fixture_refused(decode(config, parts, count, &err), &err, ERR_INTEGRITY, "bad", expected, NULL);
}

static const struct part good[] = {{Q_A, SAFETENSORS_F32, 2, {2, 32}}, {Q_B, SAFETENSORS_F32, 2, {32, 2}}};

static void test_config(void **state)
{
    static const char *const ranks[] = {"0", "-1", "257", "4294967298", "2.0", "\"2\"", "true", "null", "[2]"};
    static const char *const alphas[] = {"0", "-4", "1e7", "\"4\"", "null", "true"};
    static const char *const wrong[] = {"",
                                        "[]",
                                        "{\"peft_type\":\"LORA\",\"r\":2,\"r\":2,\"lora_alpha\":4}",
                                        "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":1e400}",
                                        "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":NaN}",
                                        CONFIG " {}"};
    char config[128];
    struct error err = {0};
    (void)state;
    if (decode(CONFIG, good, 2, &err) < 0)
        fail_msg("%s", err.message);
    for (size_t i = 0; i < ARRAY_LEN(ranks); i++) {
        snprintf(config, sizeof config, "{\"peft_type\":\"LORA\",\"r\":%s,\"lora_alpha\":4}", ranks[i]);
        refuse_parts(config, good, 2, strcmp(ranks[i], "null") == 0 ? "r is missing" : "r is no integer from 1");
    }
    for (size_t i = 0; i < ARRAY_LEN(alphas); i++) {
        snprintf(config, sizeof config, "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":%s}", alphas[i]);
        refuse_parts(config, good, 2, "alpha");
    }
    for (size_t i = 0; i < ARRAY_LEN(wrong); i++)
        refuse_parts(wrong[i], good, 2, "bad: not a JSON object");
    refuse_parts("{\"peft_type\":7,\"r\":2,\"lora_alpha\":4}", good, 2, "peft_type");
    refuse_parts("{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"use_dora\":true}", good, 2, "use_dora");
    refuse_parts("{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"rank_pattern\":{\"q_proj\":300}}", good, 2,
                 "rank_pattern");
}

static void test_factor_shapes(void **state)
{
    static const struct {
        struct part a, b;
        const char *expected;
    } cases[] = {
        {{Q_A, 0, 2, {1, 32}}, {Q_B, 0, 2, {32, 2}}, "q, lora_A is 1 x 32, expected 2 x 32"},
        {{Q_A, 0, 2, {3, 32}}, {Q_B, 0, 2, {32, 2}}, "q, lora_A is 3 x 32, expected 2 x 32"},
        {{Q_A, 0, 2, {2, 31}}, {Q_B, 0, 2, {32, 2}}, "q, lora_A is 2 x 31, expected 2 x 32"},
        {{Q_A, 0, 2, {32, 2}}, {Q_B, 0, 2, {32, 2}}, "q, lora_A is 32 x 2, expected 2 x 32"},
        {{Q_A, 0, 2, {2, 32}}, {Q_B, 0, 2, {33, 2}}, "q, lora_B is 33 x 2, expected 32 x 2"},
        {{Q_A, 0, 2, {2, 32}}, {Q_B, 0, 2, {2, 32}}, "q, lora_B is 2 x 32, expected 32 x 2"},
        {{Q_A, 0, 2, {0, 32}}, {Q_B, 0, 2, {32, 0}}, "q, lora_A is 0 x 32, expected 2 x 32"},
        {{Q_A, 0, 1, {64}}, {Q_B, 0, 2, {32, 2}}, "q, lora_A is no matrix"},
        {{Q_A, 0, 3, {2, 32, 1}}, {Q_B, 0, 2, {32, 2}}, "q, lora_A is no matrix"},
        {{Q_A, 0, 0, {0}}, {Q_B, 0, 2, {32, 2}}, "q, lora_A is no matrix"},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++)
        refuse_parts(CONFIG, (struct part[]){cases[i].a, cases[i].b}, 2, cases[i].expected);
}

static void test_factor_names(void **state)
{
    static const char *const extra[] = {NAME("2", "self_attn.q_proj", "A"),  NAME("00", "self_attn.q_proj", "A"),
                                        NAME("-1", "self_attn.q_proj", "A"), NAME("0", "self_attn.x_proj", "A"),
                                        "base_model.model.lm_head.weight",   "x"};
    struct part parts[4] = {good[0], good[1]};
    (void)state;
    refuse_parts(CONFIG, parts, 0, "no LoRA tensor");
    refuse_parts(CONFIG, parts, 1, "q: lora_B is missing");
    refuse_parts(CONFIG, parts + 1, 1, "q: lora_A is missing");
    for (size_t i = 0; i < ARRAY_LEN(extra); i++) {
        parts[2] = (struct part){extra[i], SAFETENSORS_F32, 2, {2, 32}};
        refuse_parts(CONFIG, parts, 3, "1 tensors are no LoRA factors");
    }
    parts[2] = (struct part){NAME("1", "self_attn.k_proj", "A"), SAFETENSORS_F32, 2, {2, 32}};
    parts[3] = (struct part){NAME("1", "self_attn.k_proj", "B"), SAFETENSORS_F32, 2, {16, 2}};
    refuse_parts(CONFIG, parts, 4, "layer 1 adapts other linears than layer 0");
}

static void test_values(void **state)
{
    static const struct {
        enum safetensors_type type;
        uint32_t bits[3];
    } types[] = {{SAFETENSORS_F32, {0x7f800000, 0xff800000, 0x7fc00001}},
                 {SAFETENSORS_F16, {0x7c00, 0xfc00, 0x7e01}},
                 {SAFETENSORS_BF16, {0x7f80, 0xff80, 0x7fc1}}};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        const size_t size = types[i].type == SAFETENSORS_F32 ? 4 : 2;
        for (size_t k = 0; k < 3; k++) {
            for (int last = 0; last < 2; last++) {
                struct part parts[2] = {good[0], good[1]};
                parts[0].type = parts[1].type = types[i].type;
                memcpy((uint8_t *)values + (last ? 63 * size : 0), &types[i].bits[k], size);
                refuse_parts(CONFIG, parts, 2, "q, lora_A holds a value that is not finite");
                memset(values, 0, sizeof values);
            }
        }
    }
}

/* --- the GGUF form ------------------------------------------------------------------------------------------------ */

struct wrong {
    const char *type, *architecture, *kind;
    float alpha; /* 0: 4 */
    enum tensor_type tensor;
    uint64_t in, rank_a, rank_b, out; /* 0: as it should be */
    const char *a, *b;
    uint32_t dim_count;
    const char *expected;
};

static int decode_gguf(const struct wrong *x, struct error *err)
{
    struct gguf_writer w;
    struct buffer b;
    struct lora lora = {0};
    const uint64_t a_dims[] = {x->in ? x->in : 32, x->rank_a ? x->rank_a : 2, 1};
    const uint64_t b_dims[] = {x->rank_b ? x->rank_b : 2, x->out ? x->out : 32, 1};
    size_t row = 0;
    gguf_writer_init(&w, 1 << 16);
    gguf_writer_string(&w, "general.type", span_str(x->type ? x->type : "adapter"));
    gguf_writer_string(&w, "general.architecture", span_str(x->architecture ? x->architecture : "llama"));
    gguf_writer_string(&w, "adapter.type", span_str(x->kind ? x->kind : "lora"));
    gguf_writer_f32(&w, "adapter.lora.alpha", x->alpha != 0 ? x->alpha : 4);
    assert_true(tensor_type_row_bytes(x->tensor, a_dims[0], &row) && row * a_dims[1] <= sizeof values);
    gguf_writer_tensor(&w, x->a ? x->a : "blk.0.attn_q.weight.lora_a", x->tensor, x->dim_count ? x->dim_count : 2,
                       a_dims, span_of(values, row * a_dims[1]));
    gguf_writer_tensor(&w, x->b ? x->b : "blk.0.attn_q.weight.lora_b", TENSOR_F32, 2, b_dims,
                       span_of(values, 4 * b_dims[0] * b_dims[1]));
    buffer_init(&b, 1 << 20);
    assert_int_equal(gguf_writer_finish(&w, &b, NULL), 0);
    int rc = adapter_decode_gguf(buffer_span(&b), "bad.gguf", &model, LORA_FFA, &lora, err);
    if (rc == 0)
        lora_release(&lora);
    buffer_release(&b);
    gguf_writer_release(&w);
    return rc;
}

static void test_gguf(void **state)
{
    static const struct wrong cases[] = {
        {.type = "model", .expected = "general.type"},
        {.architecture = "gpt2", .expected = "general.architecture"},
        {.kind = "ia3", .expected = "adapter.type"},
        {.alpha = NAN, .expected = "adapter.lora.alpha is not a finite number"},
        {.alpha = INFINITY, .expected = "adapter.lora.alpha is not a finite number"},
        {.alpha = -1, .expected = "alpha -1"},
        {.alpha = 1e30f, .expected = "alpha 1e+30"},
        {.tensor = TENSOR_Q8_0, .expected = "q, lora_A is no matrix of F32, F16 or BF16"},
        {.dim_count = 3, .expected = "q, lora_A is no matrix"},
        {.dim_count = 1, .expected = "q, lora_A is no matrix"},
        {.in = 31, .expected = "q, lora_A is 2 x 31, expected 2 x 32"},
        {.rank_b = 3, .expected = "q, lora_B is 32 x 3, expected 32 x 2"},
        {.rank_a = 3, .expected = "q, lora_B is 32 x 2, expected 32 x 3"},
        {.out = 33, .expected = "q, lora_B is 33 x 2, expected 32 x 2"},
        {.in = 1, .rank_a = LORA_RANK_MAX + 1, .expected = "rank 257 is outside"},
        {.a = "blk.0.attn_q.weight.lora_c", .expected = "lora_A is missing"},
        {.b = "blk.2.attn_q.weight.lora_b", .expected = "lora_B is missing"},
        {.a = "token_embd.weight.lora_a", .b = "token_embd.weight.lora_b", .expected = "no LoRA tensor"},
    };
    struct error err = {0};
    (void)state;
    if (decode_gguf(&(struct wrong){0}, &err) < 0)
        fail_msg("%s", err.message);
    for (size_t i = 0; i < ARRAY_LEN(cases); i++)
        fixture_refused(decode_gguf(&cases[i], &err), &err, ERR_INTEGRITY, "bad.gguf", cases[i].expected, NULL);
    values[63] = NAN;
    fixture_refused(decode_gguf(&(struct wrong){0}, &err), &err, ERR_INTEGRITY, "q, lora_A holds a value", NULL);
    values[63] = 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_header),       cmocka_unit_test(test_bloated_header),
        cmocka_unit_test(test_offsets),      cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_config),       cmocka_unit_test(test_factor_shapes),
        cmocka_unit_test(test_factor_names), cmocka_unit_test(test_values),
        cmocka_unit_test(test_gguf),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
