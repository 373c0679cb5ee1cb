#include "model/model.h"

#include "base/checked.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int check_range(const char *name, int64_t value, int64_t low, int64_t high, struct error *err)
{
    if (value < low || value > high)
        return error_set(err, ERR_INTEGRITY, "model: %s is %lld, expected %lld to %lld", name, (long long)value,
                         (long long)low, (long long)high);
    return 0;
}

static int check_config(const struct model_config *c, struct error *err)
{
    const struct {
        const char *name;
        int64_t value, low, high;
    } ranges[] = {
        {"the number of layers", c->layer_count, 1, MODEL_LAYERS_MAX},
        {"the width", c->d_model, 1, MODEL_WIDTH_MAX},
        {"the number of heads", c->head_count, 1, MODEL_WIDTH_MAX},
        {"the number of key/value heads", c->kv_head_count, 1, c->head_count},
        {"the head size", c->head_size, 16, MODEL_HEAD_SIZE_MAX},
        {"the feed-forward width", c->d_ff, 1, MODEL_WIDTH_MAX},
        {"the vocabulary", c->vocabulary, 1, MODEL_VOCABULARY_MAX},
        {"the context length", c->context_length, 1, MODEL_CONTEXT_MAX},
        {"heads times head size", (int64_t)c->head_count * c->head_size, 1, MODEL_WIDTH_MAX},
    };
    if (c->architecture != MODEL_LLAMA)
        return error_set(err, ERR_INTEGRITY, "model: architecture %d is not supported, expected llama",
                         (int)c->architecture);
    for (size_t i = 0; i < ARRAY_LEN(ranges); i++)
        if (check_range(ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high, err) < 0)
            return ERR_INTEGRITY;
    if (c->head_count % c->kv_head_count != 0)
        return error_set(err, ERR_INTEGRITY, "model: %d heads cannot share %d key/value heads evenly", c->head_count,
                         c->kv_head_count);
    if (c->head_size % 16 != 0)
        return error_set(err, ERR_INTEGRITY, "model: head size %d is not a multiple of 16", c->head_size);
    if (c->rope_order != ROPE_NORM && c->rope_order != ROPE_NEOX)
        return error_set(err, ERR_INTEGRITY, "model: unknown order of rotary positions");
    if (!(c->rope_base >= 1 && c->rope_base <= 1e9) || !(c->rope_scale > 0 && c->rope_scale <= 1e6))
        return error_set(err, ERR_INTEGRITY, "model: rotary base %g or scale %g is out of range (1..1e9, 0..1e6)",
                         c->rope_base, c->rope_scale);
    if (!(c->norm_eps > 0 && c->norm_eps < 1))
        return error_set(err, ERR_INTEGRITY, "model: the norm's epsilon is %g, expected more than 0 and less than 1",
                         (double)c->norm_eps);
    return 0;
}

static int check_matrix(const char *name, int layer, const struct tensor *t, int32_t out, int32_t in, struct error *err)
{
    char where[64];
    size_t bytes;
    if (layer >= 0)
        snprintf(where, sizeof where, "blk.%d.%s", layer, name);
    else
        snprintf(where, sizeof where, "%s", name);
    if (!t->data)
        return error_set(err, ERR_INTEGRITY, "model: tensor %s is missing", where);
    if (t->out != out || t->in != in)
        return error_set(err, ERR_INTEGRITY,
                         "model: tensor %s is %d x %d (rows x columns), but the hyper-parameters ask for %d x %d",
                         where, t->out, t->in, out, in);
    if (!tensor_type_known((uint32_t)t->type))
        return error_set(err, ERR_INTEGRITY, "model: tensor %s has element type %d, which is not supported", where,
                         (int)t->type);
    if (!tensor_type_row_bytes(t->type, (size_t)in, &bytes) || !checked_mul(bytes, (size_t)out, &bytes))
        return error_set(err, ERR_INTEGRITY, "model: tensor %s: rows of %d values are no whole number of %s blocks",
                         where, in, tensor_type_name(t->type));
    if ((uintptr_t)t->data % tensor_type_alignment(t->type) != 0)
        return error_set(err, ERR_INTEGRITY, "model: tensor %s is not aligned to %zu bytes", where,
                         tensor_type_alignment(t->type));
    return 0;
}

static int check_gain(const char *name, int layer, const struct tensor *t, int32_t n, struct error *err)
{
    int rc = check_matrix(name, layer, t, 1, n, err);
    if (rc < 0)
        return rc;
    if (t->type != TENSOR_F32)
        return error_set(err, ERR_INTEGRITY, "model: tensor %s of layer %d has type %s, expected F32", name, layer,
                         tensor_type_name(t->type));
    for (int32_t i = 0; i < n; i++)
        if (!isfinite(model_gain(t)[i]))
            return error_set(err, ERR_INTEGRITY, "model: tensor %s of layer %d holds a value that is not finite", name,
                             layer);
    return 0;
}

static int check_layer(const struct model *model, int layer, struct error *err)
{
    const struct model_config *c = &model->config;
    const struct model_layer *l = &model->layers[layer];
    const int32_t heads = c->head_count * c->head_size, kv = c->kv_head_count * c->head_size;
    const struct {
        const char *name;
        const struct tensor *tensor;
        int32_t out, in;
    } matrices[] = {
        {"attn_q", &l->q, heads, c->d_model},        {"attn_k", &l->k, kv, c->d_model},
        {"attn_v", &l->v, kv, c->d_model},           {"attn_output", &l->o, c->d_model, heads},
        {"ffn_gate", &l->gate, c->d_ff, c->d_model}, {"ffn_up", &l->up, c->d_ff, c->d_model},
        {"ffn_down", &l->down, c->d_model, c->d_ff},
    };
    int rc = check_gain("attn_norm", layer, &l->attn_norm, c->d_model, err);
    if (rc == 0)
        rc = check_gain("ffn_norm", layer, &l->ffn_norm, c->d_model, err);
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(matrices); i++)
        rc = check_matrix(matrices[i].name, layer, matrices[i].tensor, matrices[i].out, matrices[i].in, err);
    return rc;
}

int model_validate(const struct model *model, struct error *err)
{
    const struct model_config *c = &model->config;
    int rc = check_config(c, err);
    if (rc == 0)
        rc = check_matrix("token_embd", -1, &model->token_embd, c->vocabulary, c->d_model, err);
    if (rc == 0)
        rc = check_gain("output_norm", -1, &model->output_norm, c->d_model, err);
    if (rc == 0 && model->output.data)
        rc = check_matrix("output", -1, &model->output, c->vocabulary, c->d_model, err);
    if (rc == 0 && model->rope_freqs.data)
        rc = check_gain("rope_freqs", -1, &model->rope_freqs, c->head_size / 2, err);
    for (int32_t layer = 0; rc == 0 && layer < c->layer_count; layer++)
        rc = check_layer(model, layer, err);
    return rc;
}

const struct tensor *model_head(const struct model *model)
{
    return model->output.data ? &model->output : &model->token_embd;
}

static size_t tensor_values(const struct tensor *t)
{
    return (size_t)t->out * (size_t)t->in;
}

/* The matrices of a layer one by one; NULL after the last. */
static struct tensor *layer_matrix(struct model_layer *l, size_t i)
{
    struct tensor *const all[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    return i < ARRAY_LEN(all) ? all[i] : NULL;
}

size_t model_weight_count(const struct model *model)
{
    size_t count = tensor_values(model_head(model));
    for (int32_t layer = 0; layer < model->config.layer_count; layer++) {
        struct model_layer l = model->layers[layer];
        for (size_t i = 0; layer_matrix(&l, i); i++)
            count += tensor_values(layer_matrix(&l, i));
    }
    return count;
}

#define SHADOW_ALIGNMENT 64u

static size_t shadow_cost(const struct tensor *t)
{
    return t->data ? (2 * tensor_values(t) + SHADOW_ALIGNMENT - 1) & ~(size_t)(SHADOW_ALIGNMENT - 1) : 0;
}

size_t model_shadow_bytes(const struct model *model)
{
    size_t bytes = shadow_cost(&model->token_embd) + shadow_cost(&model->output);
    for (int32_t layer = 0; layer < model->config.layer_count; layer++) {
        struct model_layer l = model->layers[layer];
        for (size_t i = 0; layer_matrix(&l, i); i++)
            bytes += shadow_cost(layer_matrix(&l, i));
    }
    return bytes;
}

/* Round to nearest, ties to even; NaN keeps its sign and becomes quiet. */
static uint16_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Replaces t by its bfloat16 copy at *cursor, which moves on. row (in) is work memory. */
static void shadow_tensor(struct tensor *t, float *row, uint8_t **cursor)
{
    size_t row_bytes = 0;
    if (!t->data)
        return;
    uint16_t *out = (void *)*cursor;
    const uint8_t *source = t->data;
    bool whole = tensor_type_row_bytes(t->type, (size_t)t->in, &row_bytes);
    assert(whole);
    (void)whole;
    *cursor += shadow_cost(t);
    for (int32_t r = 0; r < t->out; r++) {
        tensor_dequantise(t->type, source + (size_t)r * row_bytes, (size_t)t->in, row);
        for (int32_t i = 0; i < t->in; i++)
            out[(size_t)r * (size_t)t->in + (size_t)i] = bf16_of(row[i]);
    }
    t->data = out;
    t->type = TENSOR_BF16;
}

int model_shadow_init(struct model_shadow *shadow, const struct model *model, struct error *err)
{
    size_t bytes = model_shadow_bytes(model);
    float *row = malloc(sizeof *row * MODEL_WIDTH_MAX);
    uint8_t *memory = aligned_alloc(SHADOW_ALIGNMENT, bytes);
    if (!row || !memory) {
        free(row);
        free(memory);
        return error_set(err, ERR_RESOURCES, "no memory for a bfloat16 copy of the model (%zu MB)", bytes >> 20);
    }
    shadow->model = *model;
    shadow->memory = memory;
    shadow_tensor(&shadow->model.token_embd, row, &memory);
    shadow_tensor(&shadow->model.output, row, &memory);
    for (int32_t layer = 0; layer < model->config.layer_count; layer++)
        for (size_t i = 0; layer_matrix(&shadow->model.layers[layer], i); i++)
            shadow_tensor(layer_matrix(&shadow->model.layers[layer], i), row, &memory);
    free(row);
    return 0;
}

void model_shadow_release(struct model_shadow *shadow)
{
    if (!shadow)
        return;
    free(shadow->memory);
    memset(shadow, 0, sizeof *shadow);
}
