#include "tests/formats/models.h"

#include "tests/formats/fixtures.h"

#include <math.h>

#define VALUES_MAX ((MODELS_VOCABULARY + 1) * MODELS_D + 2 * MODELS_FF * MODELS_D)

static bool same(const char *a, const char *b)
{
    return a && strcmp(a, b) == 0;
}

size_t models_rows(enum model_architecture architecture, struct models_row rows[16])
{
    enum { LLAMA = 1, QWEN2 = 2, QWEN3 = 4, GEMMA3 = 8, GLM4 = 16, ALL = 31 };
    const int32_t d = MODELS_D, heads = MODELS_HEADS * MODELS_HEAD, kv = MODELS_KV * MODELS_HEAD, ff = MODELS_FF;
    const struct {
        unsigned mask;
        struct models_row row;
    } all[] = {
        {ALL, {offsetof(struct model_layer, attn_norm), "attn_norm.weight", "input_layernorm.weight", d, 0}},
        {ALL, {offsetof(struct model_layer, q), "attn_q.weight", "self_attn.q_proj.weight", heads, d}},
        {ALL, {offsetof(struct model_layer, k), "attn_k.weight", "self_attn.k_proj.weight", kv, d}},
        {ALL, {offsetof(struct model_layer, v), "attn_v.weight", "self_attn.v_proj.weight", kv, d}},
        {ALL, {offsetof(struct model_layer, o), "attn_output.weight", "self_attn.o_proj.weight", d, heads}},
        {QWEN2 | GLM4, {offsetof(struct model_layer, q_bias), "attn_q.bias", "self_attn.q_proj.bias", heads, 0}},
        {QWEN2 | GLM4, {offsetof(struct model_layer, k_bias), "attn_k.bias", "self_attn.k_proj.bias", kv, 0}},
        {QWEN2 | GLM4, {offsetof(struct model_layer, v_bias), "attn_v.bias", "self_attn.v_proj.bias", kv, 0}},
        {QWEN3 | GEMMA3,
         {offsetof(struct model_layer, q_norm), "attn_q_norm.weight", "self_attn.q_norm.weight", MODELS_HEAD, 0}},
        {QWEN3 | GEMMA3,
         {offsetof(struct model_layer, k_norm), "attn_k_norm.weight", "self_attn.k_norm.weight", MODELS_HEAD, 0}},
        {GEMMA3,
         {offsetof(struct model_layer, attn_post_norm), "post_attention_norm.weight", "post_attention_layernorm.weight",
          d, 0}},
        {GLM4,
         {offsetof(struct model_layer, attn_post_norm), "post_attention_norm.weight", "post_self_attn_layernorm.weight",
          d, 0}},
        {GEMMA3, {offsetof(struct model_layer, ffn_norm), "ffn_norm.weight", "pre_feedforward_layernorm.weight", d, 0}},
        {ALL & ~GEMMA3,
         {offsetof(struct model_layer, ffn_norm), "ffn_norm.weight", "post_attention_layernorm.weight", d, 0}},
        {ALL & ~GLM4, {offsetof(struct model_layer, gate), "ffn_gate.weight", "mlp.gate_proj.weight", ff, d}},
        {ALL & ~GLM4, {offsetof(struct model_layer, up), "ffn_up.weight", "mlp.up_proj.weight", ff, d}},
        {GLM4, {offsetof(struct model_layer, up), "ffn_up.weight", "mlp.gate_up_proj.weight", 2 * ff, d}},
        {ALL, {offsetof(struct model_layer, down), "ffn_down.weight", "mlp.down_proj.weight", d, ff}},
        {GEMMA3,
         {offsetof(struct model_layer, ffn_post_norm), "post_ffw_norm.weight", "post_feedforward_layernorm.weight", d,
          0}},
        {GLM4,
         {offsetof(struct model_layer, ffn_post_norm), "post_ffw_norm.weight", "post_mlp_layernorm.weight", d, 0}},
    };
    size_t count = 0;
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        if (all[i].mask >> (architecture - 1) & 1)
            rows[count++] = all[i].row;
    return count;
}

float models_value(int32_t layer, size_t row)
{
    return (float)(16 * (layer + 1) + (int32_t)row + 1); /* at most 8 bits: exact in bfloat16 */
}

/* --- GGUF ------------------------------------------------------------------------------------------------------- */

static void put_u32(struct gguf_writer *w, const struct models_flaw *f, const char *architecture, const char *key,
                    uint32_t value)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", architecture, key);
    if (!same(f->drop, name))
        gguf_writer_u32(w, name, value);
}

static void put_f32(struct gguf_writer *w, const char *architecture, const char *key, float value)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", architecture, key);
    gguf_writer_f32(w, name, value);
}

/* The values stay in *memory, which grows, until the file is written. */
static void put_gguf(struct gguf_writer *w, const struct models_flaw *f, const char *name, int32_t out, int32_t in,
                     float value, float **memory)
{
    float *values = *memory;
    const uint64_t rows = (uint64_t)out + same(f->reshape, name);
    const size_t count = (size_t)rows * (size_t)(in ? in : 1);
    if (same(f->drop, name))
        return;
    for (size_t i = 0; i < count; i++)
        values[i] = same(f->poison, name) && i == count - 1 ? NAN : value;
    *memory += count;
    if (in)
        gguf_writer_tensor(w, name, TENSOR_F32, 2, (uint64_t[]){(uint64_t)in, rows}, span_of(values, 4 * count));
    else
        gguf_writer_tensor(w, name, TENSOR_F32, 1, (uint64_t[]){rows}, span_of(values, 4 * count));
}

static void put_keys(struct gguf_writer *w, enum model_architecture architecture, const struct models_flaw *f)
{
    const char *name = model_architecture_name(architecture);
    gguf_writer_string(w, "general.architecture", span_str(name));
    put_u32(w, f, name, "block_count", MODELS_LAYERS);
    put_u32(w, f, name, "context_length", 64);
    put_u32(w, f, name, "embedding_length", MODELS_D);
    put_u32(w, f, name, "feed_forward_length", MODELS_FF);
    put_u32(w, f, name, "attention.head_count", MODELS_HEADS);
    put_u32(w, f, name, "attention.head_count_kv", MODELS_KV);
    put_f32(w, name, "attention.layer_norm_rms_epsilon", 1e-5f);
    if (architecture == MODEL_GLM4)
        put_u32(w, f, name, "rope.dimension_count", MODELS_HEAD / 2);
    if (architecture == MODEL_GEMMA3) {
        put_u32(w, f, name, "attention.sliding_window", 9);
        put_u32(w, f, name, "attention.key_length", MODELS_HEAD);
        put_f32(w, name, "rope.freq_base", 1e6f);
    }
    if (f->more)
        f->more(w);
}

void models_gguf(enum model_architecture architecture, const struct models_flaw *f, struct buffer *out)
{
    struct models_row rows[16];
    const size_t count = models_rows(architecture, rows);
    struct gguf_writer w;
    float *memory = calloc((MODELS_LAYERS + 1) * (size_t)VALUES_MAX * 3, sizeof *memory), *at = memory;
    gguf_writer_init(&w, 1 << 16);
    put_keys(&w, architecture, f);
    put_gguf(&w, f, "token_embd.weight", MODELS_VOCABULARY, MODELS_D, models_value(-1, 0), &at);
    put_gguf(&w, f, "output_norm.weight", MODELS_D, 0, models_value(-1, 1), &at);
    if (f->untied)
        put_gguf(&w, f, "output.weight", MODELS_VOCABULARY, MODELS_D, models_value(-1, 2), &at);
    for (int32_t layer = 0; layer < MODELS_LAYERS; layer++)
        for (size_t i = 0; i < count; i++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%d.%s", layer, rows[i].gguf);
            put_gguf(&w, f, name, rows[i].out, rows[i].in, models_value(layer, i), &at);
        }
    if (f->extra)
        put_gguf(&w, f, f->extra, MODELS_D, 0, 1, &at);
    buffer_init(out, 1 << 20);
    assert_int_equal(gguf_writer_finish(&w, out, NULL), 0);
    gguf_writer_release(&w);
    free(memory);
}

/* --- Hugging Face ----------------------------------------------------------------------------------------------- */

void models_config(enum model_architecture architecture, const struct models_flaw *f, struct buffer *out)
{
    static const char *const types[] = {"", "llama", "qwen2", "qwen3", "gemma3_text", "glm4"};
    json_t *config =
        json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:b, s:b}", "model_type", types[architecture],
                  "hidden_size", MODELS_D, "intermediate_size", MODELS_FF, "num_hidden_layers", MODELS_LAYERS,
                  "num_attention_heads", MODELS_HEADS, "num_key_value_heads", MODELS_KV, "head_dim", MODELS_HEAD,
                  "vocab_size", MODELS_VOCABULARY, "max_position_embeddings", 64, "rms_norm_eps", 1e-5,
                  "tie_word_embeddings", !f->untied, "use_cache", 1);
    if (architecture == MODEL_GEMMA3)
        json_object_update_new(config, json_pack("{s:i, s:i}", "sliding_window", 9, "query_pre_attn_scalar", 16));
    if (f->edit) {
        json_t *edit = json_loads(f->edit, 0, NULL);
        assert_non_null(edit);
        json_object_update_new(config, edit);
    }
    if (f->drop)
        json_object_del(config, f->drop);
    char *text = json_dumps(config, 0);
    buffer_init(out, 1 << 16);
    buffer_append(out, text, strlen(text));
    free(text);
    json_decref(config);
}

struct weights {
    const struct models_flaw *flaw;
    json_t *header;
    struct buffer data;
};

/* Matrices are BF16, vectors F32. */
static void put_hf(struct weights *w, const char *name, int32_t out, int32_t in, float value)
{
    const struct models_flaw *f = w->flaw;
    const int32_t rows = out + same(f->reshape, name);
    const size_t begin = w->data.len, count = (size_t)rows * (size_t)(in ? in : 1);
    if (same(f->drop, name))
        return;
    for (size_t i = 0; i < count; i++) {
        const float v = same(f->poison, name) && !f->dtype && i == count - 1 ? INFINITY : value;
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        if (in)
            buffer_u16(&w->data, (uint16_t)(bits >> 16));
        else
            buffer_u32(&w->data, bits);
    }
    const char *dtype = same(f->poison, name) && f->dtype ? f->dtype : in ? "BF16" : "F32";
    json_t *shape = in ? json_pack("[i, i]", rows, in) : json_pack("[i]", rows);
    json_object_set_new(w->header, name,
                        json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtype, "shape", shape, "data_offsets",
                                  (json_int_t)begin, (json_int_t)w->data.len));
}

void models_weights(enum model_architecture architecture, const struct models_flaw *f, int32_t first, int32_t end,
                    struct buffer *out)
{
    struct models_row rows[16];
    const size_t count = models_rows(architecture, rows);
    struct weights w = {.flaw = f, .header = json_object()};
    buffer_init(&w.data, 1 << 20);
    if (f->misaligned && first < 0) {
        json_object_set_new(w.header, "model.layers.0.self_attn.rotary_emb.inv_freq",
                            json_pack("{s:s, s:[i], s:[i, i]}", "dtype", "U8", "shape", 1, "data_offsets", 0, 1));
        buffer_u8(&w.data, 7);
    }
    if (first < 0) {
        put_hf(&w, "model.embed_tokens.weight", MODELS_VOCABULARY, MODELS_D, models_value(-1, 0));
        put_hf(&w, "model.norm.weight", MODELS_D, 0, models_value(-1, 1));
        if (f->untied)
            put_hf(&w, "lm_head.weight", MODELS_VOCABULARY, MODELS_D, models_value(-1, 2));
    }
    for (int32_t layer = first < 0 ? 0 : first; layer < end; layer++)
        for (size_t i = 0; i < count; i++) {
            char name[96];
            snprintf(name, sizeof name, "model.layers.%d.%s", layer, rows[i].hf);
            put_hf(&w, name, rows[i].out, rows[i].in, models_value(layer, i));
        }
    if (f->extra && first < 0)
        put_hf(&w, f->extra, MODELS_D, 0, 1);
    char *text = json_dumps(w.header, JSON_COMPACT);
    buffer_init(out, 1 << 20);
    buffer_u64(out, (strlen(text) + 7) / 8 * 8);
    buffer_append(out, text, strlen(text));
    while (out->len % 8 != 0)
        buffer_u8(out, ' ');
    buffer_append(out, w.data.data, w.data.len);
    assert_true(buffer_ok(out) && buffer_ok(&w.data));
    free(text);
    json_decref(w.header);
    buffer_release(&w.data);
}

/* --- what was loaded -------------------------------------------------------------------------------------------- */

static void expect_tensor(const struct tensor *t, int32_t out, int32_t in, float value, const char *name)
{
    float *row = malloc(sizeof *row * (size_t)(in ? in : out));
    size_t bytes = 0;
    if (!t->data)
        fail_msg("%s is not there", name);
    assert_int_equal(t->out, in ? out : 1);
    assert_int_equal(t->in, in ? in : out);
    assert_true(tensor_type_row_bytes(t->type, (size_t)t->in, &bytes));
    for (int32_t r = 0; r < t->out; r++) {
        tensor_dequantise(t->type, (const uint8_t *)t->data + (size_t)r * bytes, (size_t)t->in, row);
        for (int32_t i = 0; i < t->in; i++)
            if (row[i] != value)
                fail_msg("%s: row %d, column %d is %g, expected %g", name, r, i, (double)row[i], (double)value);
    }
    free(row);
}

void models_expect(const struct model *model, float shift)
{
    struct models_row rows[16];
    const size_t count = models_rows(model->config.architecture, rows);
    assert_int_equal(model->config.layer_count, MODELS_LAYERS);
    expect_tensor(&model->token_embd, MODELS_VOCABULARY, MODELS_D, models_value(-1, 0), "embedding");
    expect_tensor(&model->output_norm, MODELS_D, 0, models_value(-1, 1) + shift, "output norm");
    if (model->output.data)
        expect_tensor(&model->output, MODELS_VOCABULARY, MODELS_D, models_value(-1, 2), "head");
    for (int32_t layer = 0; layer < MODELS_LAYERS; layer++)
        for (size_t i = 0; i < count; i++) {
            const bool norm = strstr(rows[i].gguf, "norm") != NULL;
            const uint8_t *at = (const uint8_t *)&model->layers[layer] + rows[i].offset;
            expect_tensor((const struct tensor *)(const void *)at, rows[i].out, rows[i].in,
                          models_value(layer, i) + (norm ? shift : 0), rows[i].gguf);
        }
}
