#include "tests/node/tiny_site.h"

#include "base/file.h"
#include "crypto/random.h"
#include "tests/formats/fixtures.h"

#include <dirent.h>
#include <unistd.h>

#define WIDTH 64
#define FEED 96
#define HEADS 4
#define KV_HEADS 2
#define LAYERS 2
#define TENSORS_MAX (3 + 9 * LAYERS)

struct weights {
    struct gguf_writer *w;
    struct random_stream random;
    float *memory[TENSORS_MAX];
    size_t count;
};

/* Uniform in ±scale, or ones for the gains of norms. */
static void put(struct weights *weights, const char *name, uint64_t in, uint64_t out, float scale)
{
    const struct rng rng = random_stream_rng(&weights->random);
    float *values = calloc(in * out, sizeof *values);
    assert_non_null(values);
    for (size_t i = 0; i < in * out; i++)
        values[i] = scale > 0 ? (float)(2 * rng_unit(&rng) - 1) * scale : 1;
    if (strcmp(name, "output.weight") == 0)
        memset(values, 0, 3 * in * sizeof *values); /* the control tokens */
    gguf_writer_tensor(weights->w, name, TENSOR_F32, out > 1 ? 2 : 1, (uint64_t[]){in, out},
                       span_of(values, in * out * sizeof *values));
    weights->memory[weights->count++] = values;
}

static void put_layer(struct weights *weights, int layer)
{
    const struct {
        const char *name;
        uint64_t in, out;
        float scale;
    } rows[] = {{"attn_norm", WIDTH, 1, 0},
                {"attn_q", WIDTH, WIDTH, 0.4f},
                {"attn_k", WIDTH, WIDTH * KV_HEADS / HEADS, 0.4f},
                {"attn_v", WIDTH, WIDTH * KV_HEADS / HEADS, 0.4f},
                {"attn_output", WIDTH, WIDTH, 0.3f},
                {"ffn_norm", WIDTH, 1, 0},
                {"ffn_gate", WIDTH, FEED, 0.3f},
                {"ffn_up", WIDTH, FEED, 0.3f},
                {"ffn_down", FEED, WIDTH, 0.3f}};
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, rows[i].name);
        put(weights, name, rows[i].in, rows[i].out, rows[i].scale);
    }
}

void tiny_site_write_model(const char *path)
{
    const uint8_t seed[RANDOM_SEED_SIZE] = {7};
    struct gguf_writer w;
    struct weights weights = {.w = &w};
    struct buffer bytes;
    struct error err = {0};
    json_t *golden = fixture_golden();
    const uint64_t vocabulary = json_array_size(json_object_get(json_object_get(golden, "small"), "tokens"));

    random_stream_init(&weights.random, seed, "tests/tiny-site");
    gguf_writer_init(&w, 1 << 20);
    gguf_writer_string(&w, "general.architecture", span_str("llama"));
    gguf_writer_u32(&w, "llama.block_count", LAYERS);
    gguf_writer_u32(&w, "llama.context_length", 4096);
    gguf_writer_u32(&w, "llama.embedding_length", WIDTH);
    gguf_writer_u32(&w, "llama.feed_forward_length", FEED);
    gguf_writer_u32(&w, "llama.attention.head_count", HEADS);
    gguf_writer_u32(&w, "llama.attention.head_count_kv", KV_HEADS);
    gguf_writer_f32(&w, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    fixture_vocabulary(&w, golden);
    put(&weights, "token_embd.weight", WIDTH, vocabulary, 1);
    put(&weights, "output_norm.weight", WIDTH, 1, 0);
    put(&weights, "output.weight", WIDTH, vocabulary, 0.5f);
    for (int layer = 0; layer < LAYERS; layer++)
        put_layer(&weights, layer);
    buffer_init(&bytes, 8 << 20);
    assert_int_equal(gguf_writer_finish(&w, &bytes, &err), 0);
    assert_int_equal(file_write_atomic(path, buffer_span(&bytes), 0600, &err), 0);
    for (size_t i = 0; i < weights.count; i++)
        free(weights.memory[i]);
    buffer_release(&bytes);
    gguf_writer_release(&w);
    random_stream_release(&weights.random);
    json_decref(golden);
}

static struct config *parse(const char *folder, const char *model, const char *serve)
{
    struct config *config;
    struct error err = {0};
    char text[2048], under[512] = "";
    /* A real model's answers must not hang on which instructions this CPU has. */
    const char *precision = strstr(model, "tiny.gguf") ? "bf16" : "f32";

    if (serve)
        snprintf(under, sizeof under, serve, folder, folder);
    snprintf(text, sizeof text,
             "version: 1\nsite: clinic-a\nstate: %s\naggregator:\n  url: tcp://127.0.0.1:1\n  federation: test\n"
             "model:\n  path: %s\ndevice:\n  kind: cpu\n  precision: %s\n%s%s",
             folder, model, precision, serve ? "serve:\n" : "", under);
    if (config_parse(&config, &node_schema, span_str(text), "node.yaml", folder, &err) < 0 ||
        config_finish(config, &err) < 0)
        fail_msg("%s", err.message);
    return config;
}

struct config *tiny_site_config(const struct tiny_site *t, const char *serve)
{
    return parse(t->folder, config_path(t->config, "model.path"), serve);
}

void tiny_site_open(struct tiny_site *t, const char *serve, const char *model)
{
    struct error err = {0};
    char path[128];

    *t = (struct tiny_site){.folder = "/tmp/consilium-site-XXXXXX"};
    assert_non_null(mkdtemp(t->folder));
    snprintf(path, sizeof path, "%s/tiny.gguf", t->folder);
    if (!model)
        tiny_site_write_model(path);
    t->config = parse(t->folder, model ? model : path, serve);
    if (site_open(&t->site, t->config, &err) < 0)
        fail_msg("%s", err.message);
}

void tiny_site_release(struct tiny_site *t)
{
    DIR *folder = opendir(t->folder);
    struct dirent *entry;

    site_release(&t->site);
    config_free(t->config);
    while (folder && (entry = readdir(folder))) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", t->folder, entry->d_name);
        if (entry->d_name[0] != '.')
            unlink(path);
    }
    if (folder)
        closedir(folder);
    rmdir(t->folder);
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
