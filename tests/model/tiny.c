#include "tests/model/tiny.h"

#include "base/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void tiny_values(uint32_t tensor, size_t count, float scale, float offset, float *out)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t x = (uint32_t)i + tensor * 0x9E3779B9u;
        x ^= x >> 16;
        x *= 0x7FEB352Du;
        x ^= x >> 15;
        x *= 0x846CA68Bu;
        x ^= x >> 16;
        out[i] = (float)((int32_t)(x >> 16) - 32768) / 32768.0f * scale + offset;
    }
}

static struct tensor fill(float **cursor, uint32_t tensor, int32_t out, int32_t in, float scale, float offset)
{
    struct tensor t = {*cursor, TENSOR_F32, out, in};
    tiny_values(tensor, (size_t)out * (size_t)in, scale, offset, *cursor);
    *cursor += (size_t)out * (size_t)in;
    return t;
}

/* Floats of a whole model, each part's maximum taken. */
static size_t tiny_floats(const struct model_config *c)
{
    const size_t d = (size_t)c->d_model, heads = (size_t)c->head_count * (size_t)c->head_size;
    const size_t kv = (size_t)c->kv_head_count * (size_t)c->head_size, ff = (size_t)c->d_ff;
    const size_t layer = d * (2 * heads + 2 * kv + 3 * ff + 4) + heads + 2 * kv + 2 * (size_t)c->head_size;
    return d * (2 * (size_t)c->vocabulary + 1) + (size_t)c->layer_count * layer;
}

static void fill_layer(const struct model_config *c, uint32_t id, float **cursor, struct model_layer *l)
{
    const int32_t d = c->d_model, heads = c->head_count * c->head_size, kv = c->kv_head_count * c->head_size;
    l->q = fill(cursor, id + 0, heads, d, 0.125f, 0);
    l->k = fill(cursor, id + 1, kv, d, 0.125f, 0);
    l->v = fill(cursor, id + 2, kv, d, 0.125f, 0);
    l->o = fill(cursor, id + 3, d, heads, 0.125f, 0);
    if (!c->fused_gate_up)
        l->gate = fill(cursor, id + 4, c->d_ff, d, 0.125f, 0);
    l->up = fill(cursor, id + 5, c->fused_gate_up ? 2 * c->d_ff : c->d_ff, d, 0.125f, 0);
    l->down = fill(cursor, id + 6, d, c->d_ff, 0.125f, 0);
    l->attn_norm = fill(cursor, id + 7, 1, d, 0.25f, 1);
    l->ffn_norm = fill(cursor, id + 8, 1, d, 0.25f, 1);
    if (c->post_norms) {
        l->attn_post_norm = fill(cursor, id + 9, 1, d, 0.25f, 1);
        l->ffn_post_norm = fill(cursor, id + 17, 1, d, 0.25f, 1);
    }
    if (c->qk_norm) {
        l->q_norm = fill(cursor, id + 18, 1, c->head_size, 0.25f, 1);
        l->k_norm = fill(cursor, id + 19, 1, c->head_size, 0.25f, 1);
    }
    if (c->qkv_bias) {
        l->q_bias = fill(cursor, id + 27, 1, heads, 0.25f, 0);
        l->k_bias = fill(cursor, id + 28, 1, kv, 0.25f, 0);
        l->v_bias = fill(cursor, id + 29, 1, kv, 0.25f, 0);
    }
}

void tiny_init(struct tiny *tiny, const struct model_config *config, bool tied)
{
    const int32_t d = config->d_model;
    memset(tiny, 0, sizeof *tiny);
    tiny->memory = malloc(tiny_floats(config) * sizeof(float));
    float *cursor = tiny->memory;
    struct model *m = &tiny->model;
    m->config = *config;
    m->token_embd = fill(&cursor, 0, config->vocabulary, d, 0.5f, 0);
    m->output_norm = fill(&cursor, 1, 1, d, 0.25f, 1);
    if (!tied)
        m->output = fill(&cursor, 2, config->vocabulary, d, 0.5f, 0);
    for (int32_t i = 0; i < config->layer_count; i++)
        fill_layer(config, 32 * ((uint32_t)i + 1), &cursor, &m->layers[i]);
    struct error err = {0};
    if (model_validate(m, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
}

void tiny_release(struct tiny *tiny)
{
    free(tiny->memory);
}

void tiny_lora(struct lora *lora, const struct lora_config *config, const struct model *model)
{
    struct error err = {0};
    if (lora_init(lora, config, &model->config, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    const size_t rank = (size_t)config->rank;
    for (int32_t i = 0; i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        const uint32_t id = 32 * ((uint32_t)e->layer + 1) + (uint32_t)e->target;
        float *a = (lora->frozen ? lora->frozen : lora->trained) + e->a_offset;
        tiny_values(id + 10, rank * (size_t)e->in, 0.125f, 0, a);
        tiny_values(id + 20, rank * (size_t)e->out, 0.125f, 0, lora->trained + e->b_offset);
    }
}

static const uint8_t *take(const uint8_t **cursor, size_t bytes)
{
    const uint8_t *at = *cursor;
    *cursor += bytes;
    return at;
}

/* A copy, since the file's arrays are not aligned. */
static void *copy(const uint8_t **cursor, size_t bytes, uint8_t **memory)
{
    void *at = *memory;
    memcpy(at, take(cursor, bytes), bytes);
    *memory += (bytes + 7) & ~(size_t)7;
    return at;
}

const char *const golden_files[] = {
    "tests/golden/llama_joint_all.golden",    "tests/golden/llama_ffa_qv.golden",
    "tests/golden/llama_joint_middle.golden", "tests/golden/qwen2_joint_all.golden",
    "tests/golden/qwen3_joint_all.golden",    "tests/golden/gemma3_joint_all.golden",
    "tests/golden/gemma3_ffa_ko.golden",      "tests/golden/glm4_joint_all.golden",
    "tests/golden/glm4_joint_up.golden",      NULL,
};

static void read_config(const int32_t h[24], const double f[5], struct golden *g)
{
    const int32_t flags = h[22];
    g->config = (struct model_config){
        .architecture = (enum model_architecture)h[16],
        .layer_count = h[0],
        .d_model = h[1],
        .head_count = h[2],
        .kv_head_count = h[3],
        .head_size = h[4],
        .rotated = h[17],
        .d_ff = h[5],
        .vocabulary = h[6],
        .context_length = 64,
        .rope_order = h[18] ? ROPE_NEOX : ROPE_NORM,
        .rope_base = f[0],
        .rope_scale = 1,
        .window = h[19],
        .window_period = h[20],
        .rope_base_sliding = f[1],
        .attention_scale = f[2],
        .embedding_scale = f[3],
        .gate = h[21] ? GATE_GELU_TANH : GATE_SILU,
        .qkv_bias = flags & 1,
        .qk_norm = flags & 2,
        .post_norms = flags & 4,
        .fused_gate_up = flags & 8,
        .norm_eps = (float)f[4],
    };
    g->lora = (struct lora_config){.mode = (enum lora_mode)h[8],
                                   .rank = h[9],
                                   .alpha = h[10],
                                   .layer_first = h[11],
                                   .layer_count = h[12],
                                   .targets = (uint32_t)h[13]};
}

void golden_read(struct golden *g, const char *path)
{
    struct span file;
    struct error err = {0};
    int32_t h[24];
    double f[5];
    if (file_map(path, &file, &err) < 0 || file.len < 4 + sizeof h + sizeof f || memcmp(file.ptr, "CGL2", 4) != 0) {
        fprintf(stderr, "%s: not a golden file %s\n", path, err.message);
        exit(1);
    }
    const uint8_t *cursor = file.ptr + 4;
    memcpy(h, take(&cursor, sizeof h), sizeof h);
    memcpy(f, take(&cursor, sizeof f), sizeof f);
    *g = (struct golden){.tied = h[7] != 0, .examples = h[14], .tokens = h[15]};
    read_config(h, f, g);
    const size_t examples = (size_t)g->examples, tokens = (size_t)g->tokens;
    uint8_t *memory = g->memory = malloc(file.len + 64);
    g->offsets = copy(&cursor, (examples + 1) * 4, &memory);
    g->ids = copy(&cursor, tokens * 4, &memory);
    g->learn = copy(&cursor, tokens, &memory);
    g->losses = copy(&cursor, examples * 8, &memory);
    g->logits = copy(&cursor, tokens * (size_t)g->config.vocabulary * 4, &memory);
    size_t left = (size_t)(file.ptr + file.len - cursor);
    g->trained = left / 4 / examples;
    g->gradients = copy(&cursor, left, &memory);
    file_unmap(file);
}

void golden_release(struct golden *golden)
{
    free(golden->memory);
}

void golden_batch(const struct golden *g, struct batch *batch)
{
    struct error err = {0};
    if (batch_init(batch, g->tokens, g->examples, &err) < 0)
        exit(1);
    batch_clear(batch);
    for (int32_t e = 0; e < g->examples; e++) {
        const int32_t at = g->offsets[e];
        struct batch_example example = {g->ids + at, g->learn + at, g->offsets[e + 1] - at};
        if (!batch_add(batch, &example))
            exit(1);
    }
}

int tiny_tables(const struct kernel_ops *ret[4])
{
    int count = 0;
    for (int isa = KERNEL_SCALAR; isa <= KERNEL_AVX512_BF16; isa++) {
        const struct kernel_ops *ops = kernels_cpu((enum kernel_isa)isa);
        if (ops->isa == (enum kernel_isa)isa)
            ret[count++] = ops;
    }
    return count;
}

struct backend *tiny_backend(enum kernel_isa at_most, struct pool *pool, enum kernel_precision precision)
{
    struct backend *backend = NULL;
    struct error err = {0};
    if (backend_cpu_new(kernels_cpu(at_most), pool, precision, &backend, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    return backend;
}
