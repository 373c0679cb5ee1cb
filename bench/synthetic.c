#include "bench/synthetic.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

/* What the models of an architecture share, and the sizes of those that tests use. Llama 3.2 comes without its
 * stretched rotary frequencies. */
#define LLAMA .architecture = MODEL_LLAMA, .head_size = 64, .rope_order = ROPE_NORM, .rope_scale = 1, .norm_eps = 1e-5f
#define GLM4                                                                                                           \
    .architecture = MODEL_GLM4, .rope_order = ROPE_NORM, .rope_base = 10000, .rope_scale = 1, .norm_eps = 1e-5f,       \
    .qkv_bias = true, .post_norms = true, .fused_gate_up = true
#define QWEN3                                                                                                          \
    .architecture = MODEL_QWEN3, .head_size = 128, .rope_order = ROPE_NEOX, .rope_base = 1000000, .rope_scale = 1,     \
    .norm_eps = 1e-6f, .qk_norm = true
#define GEMMA3                                                                                                         \
    .architecture = MODEL_GEMMA3, .head_size = 256, .rope_order = ROPE_NEOX, .rope_base = 1000000, .rope_scale = 1,    \
    .rope_base_sliding = 10000, .norm_eps = 1e-6f, .gate = GATE_GELU_TANH, .qk_norm = true, .post_norms = true
#define TINY                                                                                                           \
    .layer_count = 2, .d_model = 128, .head_count = 2, .kv_head_count = 1, .d_ff = 256, .vocabulary = 256,             \
    .context_length = 512

static const struct synthetic_shape shapes[] = {
    {.name = "smollm2-135m",
     .config = {LLAMA, .layer_count = 30, .d_model = 576, .head_count = 9, .kv_head_count = 3, .d_ff = 1536,
                .vocabulary = 49152, .context_length = 2048, .rope_base = 100000},
     .tied = true},
    {.name = "llama-3.2-1b",
     .config = {LLAMA, .layer_count = 16, .d_model = 2048, .head_count = 32, .kv_head_count = 8, .d_ff = 8192,
                .vocabulary = 128256, .context_length = 131072, .rope_base = 500000},
     .tied = true},
    {.name = "glm-4-9b",
     .config = {GLM4, .layer_count = 40, .d_model = 4096, .head_count = 32, .kv_head_count = 2, .head_size = 128,
                .rotated = 64, .d_ff = 13696, .vocabulary = 151552, .context_length = 32768},
     .tied = false},
    {.name = "qwen3-0.6b",
     .config = {QWEN3, .layer_count = 28, .d_model = 1024, .head_count = 16, .kv_head_count = 8, .d_ff = 3072,
                .vocabulary = 151936, .context_length = 40960},
     .tied = true},
    {.name = "gemma-3-270m",
     .config = {GEMMA3, .layer_count = 18, .d_model = 640, .head_count = 4, .kv_head_count = 1, .d_ff = 2048,
                .vocabulary = 262144, .context_length = 32768, .window = 512, .window_period = 6,
                .embedding_scale = 25.298221281347036},
     .tied = true},
    {.name = "tiny", .config = {LLAMA, TINY, .rope_base = 10000}, .tied = false},
    {.name = "tiny-glm4", .config = {GLM4, TINY, .head_size = 64, .rotated = 32}, .tied = false},
    {.name = "tiny-qwen3", .config = {QWEN3, TINY}, .tied = true},
    {.name = "tiny-gemma3",
     .config = {GEMMA3, TINY, .window = 32, .window_period = 2, .embedding_scale = 11.313708498984761},
     .tied = true},
};
const char synthetic_shape_names[] =
    "smollm2-135m llama-3.2-1b glm-4-9b qwen3-0.6b gemma-3-270m tiny tiny-glm4 tiny-qwen3 tiny-gemma3";

const struct synthetic_shape *synthetic_shape_find(const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(shapes); i++)
        if (strcmp(shapes[i].name, name) == 0)
            return &shapes[i];
    return NULL;
}

static void fail(const char *message)
{
    fprintf(stderr, "%s\n", message);
    exit(1);
}

/* Rows that are no whole number of Q4_K's blocks are Q5_0, as llama.cpp has it. */
static enum tensor_type fitting(enum tensor_type type, int32_t in)
{
    return type == TENSOR_Q4_K && in % 256 != 0 ? TENSOR_Q5_0 : type;
}

static size_t tensor_bytes(enum tensor_type type, int32_t out, int32_t in)
{
    size_t row = 0;
    if (!tensor_type_row_bytes(fitting(type, in), (size_t)in, &row))
        fail("a row of this model's shape is no whole number of the type's blocks");
    return (row * (size_t)out + 63) & ~(size_t)63;
}

/* Writes the scales (f16) of one block so that its weights' mean is about 0 and their deviation 0.03. */
static void set_scales(enum tensor_type type, uint8_t *block)
{
    static const uint16_t q8_0[1] = {0x1000};         /* 2^-11 */
    static const uint16_t q4_1[2] = {0x2000, 0xab80}; /* 2^-7, −7.5·2^-7 */
    static const uint16_t q4_k[2] = {0x0800, 0x1380}; /* 2^-13, 7.5·2^-13 */
    static const uint16_t q5_0[1] = {0x1c00};         /* 2^-8 */
    if (type == TENSOR_Q8_0)
        memcpy(block, q8_0, sizeof q8_0);
    else if (type == TENSOR_Q4_1)
        memcpy(block, q4_1, sizeof q4_1);
    else if (type == TENSOR_Q4_K)
        memcpy(block, q4_k, sizeof q4_k);
    else if (type == TENSOR_Q5_0)
        memcpy(block, q5_0, sizeof q5_0);
    else
        fail("synthetic weights come as F32, BF16, Q8_0, Q4_1 or Q4_K only");
}

/* Quants are random bits with sensible scales. A float has random sign and mantissa, and one of four exponents: sizes
 * from 2^-9 to 2^-5, deviation 0.014. */
static struct tensor random_tensor(uint8_t **cursor, enum tensor_type wanted, int32_t out, int32_t in, uint64_t *state)
{
    const enum tensor_type type = fitting(wanted, in);
    struct tensor t = {*cursor, type, out, in};
    const size_t bytes = tensor_bytes(type, out, in), block = tensor_type_block_bytes(type);
    const bool bf16 = type == TENSOR_BF16, floats = bf16 || type == TENSOR_F32;
    const uint32_t mask = bf16 ? 0x81ff81ff : floats ? 0x81ffffff : 0xffffffff;
    const uint32_t base = bf16 ? 0x3b003b00 : floats ? 0x3b000000 : 0;
    for (size_t i = 0; i + 4 <= bytes; i += 4) {
        uint32_t v = (next_random(state) & mask) + base;
        memcpy(*cursor + i, &v, 4);
    }
    if (!floats)
        for (size_t i = 0; i + block <= bytes; i += block)
            set_scales(type, *cursor + i);
    *cursor += bytes;
    return t;
}

/* A gain or a bias: `value`, and none if n is 0. */
static struct tensor vector_of(uint8_t **cursor, int32_t n, float value)
{
    struct tensor t = {*cursor, TENSOR_F32, 1, n};
    if (n == 0)
        return (struct tensor){0};
    for (int32_t i = 0; i < n; i++)
        ((float *)(void *)*cursor)[i] = value;
    *cursor += tensor_bytes(TENSOR_F32, 1, n);
    return t;
}

static void fill_layer(struct model_layer *l, const struct model_config *c, enum tensor_type type, uint8_t **cursor,
                       uint64_t *state)
{
    const int32_t d = c->d_model, heads = c->head_count * c->head_size, kv = c->kv_head_count * c->head_size;
    const int32_t head_norm = c->qk_norm ? c->head_size : 0, post = c->post_norms ? d : 0;
    l->attn_norm = vector_of(cursor, d, 1);
    l->q = random_tensor(cursor, type, heads, d, state);
    l->k = random_tensor(cursor, type, kv, d, state);
    l->v = random_tensor(cursor, type, kv, d, state);
    l->q_bias = vector_of(cursor, c->qkv_bias ? heads : 0, 0.02f);
    l->k_bias = vector_of(cursor, c->qkv_bias ? kv : 0, 0.02f);
    l->v_bias = vector_of(cursor, c->qkv_bias ? kv : 0, 0.02f);
    l->q_norm = vector_of(cursor, head_norm, 1);
    l->k_norm = vector_of(cursor, head_norm, 1);
    l->o = random_tensor(cursor, type, d, heads, state);
    l->attn_post_norm = vector_of(cursor, post, 1);
    l->ffn_norm = vector_of(cursor, d, 1);
    if (!c->fused_gate_up)
        l->gate = random_tensor(cursor, type, c->d_ff, d, state);
    l->up = random_tensor(cursor, type, c->fused_gate_up ? 2 * c->d_ff : c->d_ff, d, state);
    l->down = random_tensor(cursor, type, d, c->d_ff, state);
    l->ffn_post_norm = vector_of(cursor, post, 1);
}

/* At least what fill_layer takes. */
static size_t layer_bytes(const struct model_config *c, enum tensor_type type)
{
    const int32_t d = c->d_model, ff = c->d_ff, heads = c->head_count * c->head_size;
    const int32_t kv = c->kv_head_count * c->head_size;
    const size_t vectors = 4 * tensor_bytes(TENSOR_F32, 1, d) + 2 * tensor_bytes(TENSOR_F32, 1, c->head_size) +
                           tensor_bytes(TENSOR_F32, 1, heads) + 2 * tensor_bytes(TENSOR_F32, 1, kv);
    return vectors + tensor_bytes(type, heads, d) + 2 * tensor_bytes(type, kv, d) + tensor_bytes(type, d, heads) +
           2 * tensor_bytes(type, ff, d) + tensor_bytes(type, d, ff);
}

void synthetic_init_shape(struct synthetic *s, const struct synthetic_shape *shape, enum tensor_type matrices)
{
    const struct model_config *c = &shape->config;
    const enum tensor_type embedding = matrices == TENSOR_BF16 || matrices == TENSOR_F32 ? matrices : TENSOR_Q8_0;
    const size_t layer = layer_bytes(c, matrices), vocabulary = tensor_bytes(embedding, c->vocabulary, c->d_model);
    const size_t all = layer * (size_t)c->layer_count + vocabulary * (shape->tied ? 1 : 2);
    const bool shared = all > SYNTHETIC_MEMORY_MAX;
    const size_t held = shared ? layer + vocabulary : all;
    uint64_t state = 1;
    struct error err = {0};
    memset(s, 0, sizeof *s);
    s->model.config = *c;
    uint8_t *cursor = s->memory = aligned_alloc(64, held + tensor_bytes(TENSOR_F32, 1, c->d_model));
    if (!cursor)
        fail("no memory for a synthetic model");
    s->model.token_embd = random_tensor(&cursor, embedding, c->vocabulary, c->d_model, &state);
    s->model.output_norm = vector_of(&cursor, c->d_model, 1);
    for (int32_t i = 0; i < c->layer_count; i++)
        if (i > 0 && shared)
            s->model.layers[i] = s->model.layers[0];
        else
            fill_layer(&s->model.layers[i], c, matrices, &cursor, &state);
    if (!shape->tied && shared)
        s->model.output = s->model.token_embd;
    else if (!shape->tied)
        s->model.output = random_tensor(&cursor, embedding, c->vocabulary, c->d_model, &state);
    if (model_validate(&s->model, &err) < 0)
        fail(err.message);
}

void synthetic_init(struct synthetic *s, bool shadow)
{
    struct error err = {0};
    synthetic_init_shape(s, synthetic_shape_find("smollm2-135m"), TENSOR_Q4_1);
    if (shadow && model_shadow_init(&s->shadow, &s->model, &err) < 0)
        fail(err.message);
}

void synthetic_release(struct synthetic *s)
{
    model_shadow_release(&s->shadow);
    free(s->memory);
}

const struct model *synthetic_model(const struct synthetic *s)
{
    return s->shadow.memory ? &s->shadow.model : &s->model;
}

void synthetic_lora(struct lora *lora, const struct lora_config *config, const struct model *model)
{
    uint64_t state = 7;
    struct error err = {0};
    if (lora_init(lora, config, &model->config, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    for (size_t i = 0; i < lora->trained_count; i++)
        lora->trained[i] = ((float)(next_random(&state) & 0xffff) - 32768.0f) * 0x1p-21f;
    for (size_t i = 0; i < lora->frozen_count; i++)
        lora->frozen[i] = ((float)(next_random(&state) & 0xffff) - 32768.0f) * 0x1p-19f;
}
