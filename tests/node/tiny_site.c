#include "tests/node/tiny_site.h"

#include "base/file.h"
#include "crypto/random.h"
#include "model/formats/safetensors.h"
#include "tests/formats/fixtures.h"

#include <ftw.h>
#include <sys/stat.h>

#define WIDTH 64
#define FEED 96
#define HEADS 4
#define KV_HEADS 2
#define LAYERS 2
#define CONTEXT 4096
#define NORM_EPS 1e-5f
#define TENSORS_MAX (3 + 9 * LAYERS)

struct weights {
    struct random_stream random;
    enum tensor_type type; /* of the matrices */
    struct weight {
        char gguf[64], folder[64];
        uint64_t in, out; /* out 1: a vector */
        float *values;
    } all[TENSORS_MAX];
    size_t count;
    void *written[2 * TENSORS_MAX]; /* what was made for a file */
    size_t written_count;
};

/* What bfloat16 keeps, so that both types can hold the same model. */
static uint16_t bf16_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Uniform in ±scale, or ones for the gains of norms. */
static void draw(struct weights *weights, const char *gguf, const char *folder, uint64_t in, uint64_t out, float scale)
{
    const struct rng rng = random_stream_rng(&weights->random);
    struct weight *w = &weights->all[weights->count++];
    *w = (struct weight){.in = in, .out = out, .values = calloc(in * out, sizeof(float))};
    assert_non_null(w->values);
    snprintf(w->gguf, sizeof w->gguf, "%s", gguf);
    snprintf(w->folder, sizeof w->folder, "%s", folder);
    for (size_t i = 0; i < in * out; i++)
        w->values[i] = scale > 0 ? (float)(2 * rng_unit(&rng) - 1) * scale : 1;
    if (strcmp(gguf, "output.weight") == 0)
        memset(w->values, 0, 3 * in * sizeof(float)); /* the control tokens */
}

static void draw_layer(struct weights *weights, int layer)
{
    const struct {
        const char *gguf, *folder;
        uint64_t in, out;
        float scale;
    } rows[] = {{"attn_norm", "input_layernorm", WIDTH, 1, 0},
                {"attn_q", "self_attn.q_proj", WIDTH, WIDTH, 0.4f},
                {"attn_k", "self_attn.k_proj", WIDTH, WIDTH * KV_HEADS / HEADS, 0.4f},
                {"attn_v", "self_attn.v_proj", WIDTH, WIDTH * KV_HEADS / HEADS, 0.4f},
                {"attn_output", "self_attn.o_proj", WIDTH, WIDTH, 0.3f},
                {"ffn_norm", "post_attention_layernorm", WIDTH, 1, 0},
                {"ffn_gate", "mlp.gate_proj", WIDTH, FEED, 0.3f},
                {"ffn_up", "mlp.up_proj", WIDTH, FEED, 0.3f},
                {"ffn_down", "mlp.down_proj", FEED, WIDTH, 0.3f}};
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        char gguf[64], folder[64];
        snprintf(gguf, sizeof gguf, "blk.%d.%s.weight", layer, rows[i].gguf);
        snprintf(folder, sizeof folder, "model.layers.%d.%s.weight", layer, rows[i].folder);
        draw(weights, gguf, folder, rows[i].in, rows[i].out, rows[i].scale);
    }
}

static struct weights *draw_all(const json_t *golden, enum tensor_type type)
{
    const uint8_t seed[RANDOM_SEED_SIZE] = {7};
    const uint64_t vocabulary = json_array_size(json_object_get(json_object_get(golden, "small"), "tokens"));
    struct weights *weights = calloc(1, sizeof *weights);
    assert_non_null(weights);
    weights->type = type;
    random_stream_init(&weights->random, seed, "tests/tiny-site");
    draw(weights, "token_embd.weight", "model.embed_tokens.weight", WIDTH, vocabulary, 1);
    draw(weights, "output_norm.weight", "model.norm.weight", WIDTH, 1, 0);
    draw(weights, "output.weight", "lm_head.weight", WIDTH, vocabulary, 0.5f);
    for (int layer = 0; layer < LAYERS; layer++)
        draw_layer(weights, layer);
    return weights;
}

static void weights_free(struct weights *weights)
{
    for (size_t i = 0; i < weights->count; i++)
        free(weights->all[i].values);
    for (size_t i = 0; i < weights->written_count; i++)
        free(weights->written[i]);
    random_stream_release(&weights->random);
    free(weights);
}

/* A tensor's bytes as a file has them: vectors are F32 in either form. */
static struct span encoded(struct weights *weights, const struct weight *w, const float *values)
{
    const size_t count = w->in * w->out;
    uint16_t *halves;
    if (w->out == 1 || weights->type == TENSOR_F32)
        return span_of(values, count * sizeof *values);
    assert_int_equal(weights->type, TENSOR_BF16);
    halves = weights->written[weights->written_count++] = calloc(count, sizeof *halves);
    assert_non_null(halves);
    for (size_t i = 0; i < count; i++)
        halves[i] = bf16_bits(values[i]);
    return span_of(halves, count * sizeof *halves);
}

static void write_file(const char *folder, const char *name, struct span bytes)
{
    char path[256];
    struct error err = {0};
    if (folder)
        file_join(path, sizeof path, folder, name);
    if (file_write_atomic(folder ? path : name, bytes, 0600, &err) < 0)
        fail_msg("%s", err.message);
}

void tiny_site_write_model(const char *path, enum tensor_type type)
{
    struct gguf_writer w;
    struct buffer bytes;
    json_t *golden = fixture_golden();
    struct weights *weights = draw_all(golden, type);

    gguf_writer_init(&w, 1 << 20);
    gguf_writer_string(&w, "general.architecture", span_str("llama"));
    gguf_writer_u32(&w, "llama.block_count", LAYERS);
    gguf_writer_u32(&w, "llama.context_length", CONTEXT);
    gguf_writer_u32(&w, "llama.embedding_length", WIDTH);
    gguf_writer_u32(&w, "llama.feed_forward_length", FEED);
    gguf_writer_u32(&w, "llama.attention.head_count", HEADS);
    gguf_writer_u32(&w, "llama.attention.head_count_kv", KV_HEADS);
    gguf_writer_f32(&w, "llama.attention.layer_norm_rms_epsilon", NORM_EPS);
    fixture_vocabulary(&w, golden);
    for (size_t i = 0; i < weights->count; i++) {
        const struct weight *weight = &weights->all[i];
        gguf_writer_tensor(&w, weight->gguf, weight->out > 1 ? type : TENSOR_F32, weight->out > 1 ? 2 : 1,
                           (uint64_t[]){weight->in, weight->out}, encoded(weights, weight, weight->values));
    }
    buffer_init(&bytes, 8 << 20);
    assert_int_equal(gguf_writer_finish(&w, &bytes, NULL), 0);
    write_file(NULL, path, buffer_span(&bytes));
    buffer_release(&bytes);
    gguf_writer_release(&w);
    weights_free(weights);
    json_decref(golden);
}

/* --- as a Hugging Face folder ----------------------------------------------------------------------------------- */

/* A head's rows of q and k: pairs side by side in a llama's GGUF file, the first halves before the second here. */
static const float *in_folder_order(struct weights *weights, const struct weight *w)
{
    const uint64_t size = WIDTH / HEADS;
    float *values;
    if (!strstr(w->folder, "q_proj") && !strstr(w->folder, "k_proj"))
        return w->values;
    values = weights->written[weights->written_count++] = calloc(w->in * w->out, sizeof *values);
    assert_non_null(values);
    for (uint64_t row = 0; row < w->out; row++) {
        const uint64_t head = row / size, at = row % size;
        memcpy(values + row * w->in, w->values + (head * size + 2 * (at % (size / 2)) + at / (size / 2)) * w->in,
               w->in * sizeof *values);
    }
    return values;
}

/* The tensors from first up to end as one file; their names go into the index. */
static void write_shard(struct weights *weights, const char *folder, const char *name, size_t first, size_t end,
                        json_t *index)
{
    struct safetensors_tensor tensors[TENSORS_MAX];
    struct buffer bytes;
    for (size_t i = first; i < end; i++) {
        const struct weight *w = &weights->all[i];
        const bool vector = w->out == 1;
        tensors[i - first] =
            (struct safetensors_tensor){w->folder,
                                        vector || weights->type == TENSOR_F32 ? SAFETENSORS_F32 : SAFETENSORS_BF16,
                                        vector ? 1 : 2,
                                        {vector ? w->in : w->out, w->in},
                                        encoded(weights, w, in_folder_order(weights, w))};
        json_object_set_new(index, w->folder, json_string(name));
    }
    buffer_init(&bytes, 8 << 20);
    assert_int_equal(safetensors_write(tensors, end - first, &bytes, NULL), 0);
    write_file(folder, name, buffer_span(&bytes));
    buffer_release(&bytes);
}

static void write_json(const char *folder, const char *name, json_t *owned)
{
    char *text = json_dumps(owned, 0);
    assert_non_null(text);
    write_file(folder, name, span_str(text));
    free(text);
    json_decref(owned);
}

void tiny_site_write_folder(const char *path, enum tensor_type type)
{
    json_t *golden = fixture_golden(), *index = json_object();
    json_t *tokens = json_object_get(json_object_get(golden, "small"), "tokens");
    struct weights *weights = draw_all(golden, type);
    const size_t half = weights->count / 2;
    char *tokenizer = fixture_vocabulary_json(golden), text[256];
    struct error err = {0};

    if (file_make_folder(path, 0700, &err) < 0)
        fail_msg("%s", err.message);
    write_json(path, "config.json",
               json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b}", "model_type", "llama",
                         "hidden_size", WIDTH, "intermediate_size", FEED, "num_hidden_layers", LAYERS,
                         "num_attention_heads", HEADS, "num_key_value_heads", KV_HEADS, "vocab_size",
                         (int)json_array_size(tokens), "max_position_embeddings", CONTEXT, "rms_norm_eps",
                         (double)NORM_EPS, "rope_theta", 10000.0, "tie_word_embeddings", 0));
    write_file(path, "tokenizer.json", span_str(tokenizer));
    /* With the length that transformers writes where there is no maximum: no 64-bit integer. */
    snprintf(text, sizeof text,
             "{\"model_max_length\": 1000000000000000019884624838656, \"bos_token\": \"%s\", \"eos_token\": \"%s\"}",
             json_string_value(json_array_get(tokens, 1)), json_string_value(json_array_get(tokens, 2)));
    write_file(path, "tokenizer_config.json", span_str(text));
    write_shard(weights, path, "model-00001-of-00002.safetensors", 0, half, index);
    write_shard(weights, path, "model-00002-of-00002.safetensors", half, weights->count, index);
    write_json(path, "model.safetensors.index.json",
               json_pack("{s:{s:i}, s:o}", "metadata", "total_size", 0, "weight_map", index));
    free(tokenizer);
    weights_free(weights);
    json_decref(golden);
}

/* --- a site over one of them ------------------------------------------------------------------------------------ */

static struct config *parse(const char *folder, const char *model, const char *serve, const char *device)
{
    struct config *config;
    struct error err = {0};
    char text[2048], under[512] = "";

    /* A real model's answers must not hang on which instructions this CPU has. */
    if (!device)
        device = strncmp(model, folder, strlen(folder)) == 0 ? "  kind: cpu\n  precision: bf16\n"
                                                             : "  kind: cpu\n  precision: f32\n";
    if (serve)
        snprintf(under, sizeof under, serve, folder, folder);
    snprintf(text, sizeof text,
             "version: 1\nsite: clinic-a\nstate: %s\naggregator:\n  url: tcp://127.0.0.1:1\n  federation: test\n"
             "model:\n  path: %s\ndevice:\n%s%s%s",
             folder, model, device, serve ? "serve:\n" : "", under);
    if (config_parse(&config, &node_schema, span_str(text), "node.yaml", folder, &err) < 0 ||
        config_finish(config, &err) < 0)
        fail_msg("%s", err.message);
    return config;
}

struct config *tiny_site_config(const struct tiny_site *t, const char *serve, const char *device)
{
    return parse(t->folder, config_path(t->config, "model.path"), serve, device);
}

void tiny_site_open(struct tiny_site *t, const char *serve, const char *model)
{
    struct error err = {0};
    char path[128];
    const char *form = getenv("CONSILIUM_TEST_FORM");
    const bool as_folder = form && strcmp(form, "folder") == 0;

    *t = (struct tiny_site){.folder = "/tmp/consilium-site-XXXXXX"};
    assert_non_null(mkdtemp(t->folder));
    snprintf(path, sizeof path, "%s/%s", t->folder, as_folder ? "tiny" : "tiny.gguf");
    if (!model && as_folder)
        tiny_site_write_folder(path, TENSOR_F32);
    else if (!model)
        tiny_site_write_model(path, TENSOR_F32);
    t->config = parse(t->folder, model ? model : path, serve, NULL);
    if (site_open(&t->site, t->config, &err) < 0)
        fail_msg("%s", err.message);
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *where)
{
    (void)info, (void)kind, (void)where;
    return remove(path);
}

void tiny_site_remove(const char *path)
{
    nftw(path, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

void tiny_site_release(struct tiny_site *t)
{
    site_release(&t->site);
    config_free(t->config);
    tiny_site_remove(t->folder);
}

struct served_adapter *tiny_adapter(const struct tiny_site *t, uint32_t version)
{
    const struct lora_config config = {
        .mode = LORA_JOINT, .rank = 4, .alpha = 16, .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V)};
    const uint8_t seed[RANDOM_SEED_SIZE] = {(uint8_t)version, 1};
    struct served_adapter *a = calloc(1, sizeof *a);
    struct random_stream random;
    struct error err = {0};

    assert_non_null(a);
    if (lora_init(&a->lora, &config, &t->site.model.config, &err) < 0)
        fail_msg("%s", err.message);
    random_stream_init(&random, seed, "tests/tiny-adapter");
    const struct rng rng = random_stream_rng(&random);
    for (size_t i = 0; i < a->lora.trained_count; i++)
        a->lora.trained[i] = (float)(2 * rng_unit(&rng) - 1) * 0.3f;
    random_stream_release(&random);
    a->references = 1;
    a->version = version;
    snprintf(a->job, sizeof a->job, "triage");
    snprintf(a->system_message, sizeof a->system_message, "default");
    for (size_t i = 0; i < sizeof a->sha256 - 1; i++)
        a->sha256[i] = "0123456789abcdef"[version % 16];
    return a;
}
