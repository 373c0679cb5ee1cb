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

static size_t tensor_bytes(enum tensor_type type, int32_t out, int32_t in)
{
    size_t row = 0;
    if (!tensor_type_row_bytes(type, (size_t)in, &row))
        abort();
    return (row * (size_t)out + 63) & ~(size_t)63;
}

/* Random quants; the blocks' f16 scales are set to sensible sizes. */
static struct tensor random_tensor(uint8_t **cursor, enum tensor_type type, int32_t out, int32_t in, uint64_t *state)
{
    struct tensor t = {*cursor, type, out, in};
    const size_t bytes = tensor_bytes(type, out, in), block = tensor_type_block_bytes(type);
    for (size_t i = 0; i + 4 <= bytes; i += 4) {
        uint32_t v = next_random(state);
        memcpy(*cursor + i, &v, 4);
    }
    for (size_t i = 0; i + block <= bytes; i += block) {
        const uint16_t scale = type == TENSOR_Q8_0 ? 0x1000 : 0x2000, low = 0xac00; /* 2^-11 or 2^-7, −2^-4 */
        memcpy(*cursor + i, &scale, 2);
        if (type == TENSOR_Q4_1)
            memcpy(*cursor + i + 2, &low, 2);
    }
    *cursor += bytes;
    return t;
}

static struct tensor ones(uint8_t **cursor, int32_t n)
{
    struct tensor t = {*cursor, TENSOR_F32, 1, n};
    for (int32_t i = 0; i < n; i++)
        ((float *)(void *)*cursor)[i] = 1.0f;
    *cursor += tensor_bytes(TENSOR_F32, 1, n);
    return t;
}

static void fill_layer(struct model_layer *l, const struct model_config *c, uint8_t **cursor, uint64_t *state)
{
    const int32_t d = c->d_model, ff = c->d_ff, kv = c->kv_head_count * c->head_size;
    const enum tensor_type type = TENSOR_Q4_1;
    l->attn_norm = ones(cursor, d);
    l->q = random_tensor(cursor, type, d, d, state);
    l->k = random_tensor(cursor, type, kv, d, state);
    l->v = random_tensor(cursor, type, kv, d, state);
    l->o = random_tensor(cursor, type, d, d, state);
    l->ffn_norm = ones(cursor, d);
    l->gate = random_tensor(cursor, type, ff, d, state);
    l->up = random_tensor(cursor, type, ff, d, state);
    l->down = random_tensor(cursor, type, d, ff, state);
}

void synthetic_init(struct synthetic *s, bool shadow)
{
    uint64_t state = 1;
    struct error err = {0};
    memset(s, 0, sizeof *s);
    s->model.config = (struct model_config){.architecture = MODEL_LLAMA,
                                            .layer_count = 30,
                                            .d_model = 576,
                                            .head_count = 9,
                                            .kv_head_count = 3,
                                            .head_size = 64,
                                            .d_ff = 1536,
                                            .vocabulary = 49152,
                                            .context_length = 2048,
                                            .rope_order = ROPE_NORM,
                                            .rope_base = 100000,
                                            .rope_scale = 1,
                                            .norm_eps = 1e-5f};
    const struct model_config *c = &s->model.config;
    uint8_t *cursor = s->memory = aligned_alloc(64, (size_t)128 << 20);
    if (!cursor)
        abort();
    s->model.token_embd = random_tensor(&cursor, TENSOR_Q8_0, c->vocabulary, c->d_model, &state);
    s->model.output_norm = ones(&cursor, c->d_model);
    for (int32_t i = 0; i < c->layer_count; i++)
        fill_layer(&s->model.layers[i], c, &cursor, &state);
    if (model_validate(&s->model, &err) < 0 || (shadow && model_shadow_init(&s->shadow, &s->model, &err) < 0)) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
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
