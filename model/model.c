#include "model/model.h"

#include "base/checked.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const architecture_names[MODEL_ARCHITECTURE_COUNT + 1] = {NULL,    "llama",  "qwen2",
                                                                             "qwen3", "gemma3", "glm4"};

const char *model_architecture_name(enum model_architecture architecture)
{
    assert(architecture >= 1 && architecture <= MODEL_ARCHITECTURE_COUNT);
    return architecture_names[architecture];
}

bool model_architecture_parse(const char *name, enum model_architecture *ret_architecture)
{
    for (int i = 1; i <= MODEL_ARCHITECTURE_COUNT; i++) {
        if (strcmp(name, architecture_names[i]) == 0) {
            *ret_architecture = (enum model_architecture)i;
            return true;
        }
    }
    return false;
}

double model_attention_scale(const struct model_config *config)
{
    return config->attention_scale > 0 ? config->attention_scale : 1 / sqrt((double)config->head_size);
}

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
        {"the rotated part of a head", model_rotated(c), 2, c->head_size},
        {"the width of gate and up", c->fused_gate_up ? 2 * (int64_t)c->d_ff : c->d_ff, 1, MODEL_WIDTH_MAX},
        {"the sliding window", c->window, 0, MODEL_CONTEXT_MAX},
        {"the period of sliding layers", c->window_period, c->window > 0 ? 1 : 0, MODEL_LAYERS_MAX},
    };
    if (c->architecture < 1 || c->architecture > MODEL_ARCHITECTURE_COUNT)
        return error_set(err, ERR_INTEGRITY, "model: architecture %d is not one of llama, qwen2, qwen3, gemma3, glm4",
                         (int)c->architecture);
    for (size_t i = 0; i < ARRAY_LEN(ranges); i++)
        if (check_range(ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high, err) < 0)
            return ERR_INTEGRITY;
    if (c->head_count % c->kv_head_count != 0)
        return error_set(err, ERR_INTEGRITY, "model: %d heads cannot share %d key/value heads evenly", c->head_count,
                         c->kv_head_count);
    if (c->head_size % 16 != 0)
        return error_set(err, ERR_INTEGRITY, "model: head size %d is not a multiple of 16", c->head_size);
    if (model_rotated(c) % 2 != 0)
        return error_set(err, ERR_INTEGRITY, "model: %d values of a head are rotated, expected an even number",
                         model_rotated(c));
    if (c->gate != GATE_SILU && c->gate != GATE_GELU_TANH)
        return error_set(err, ERR_INTEGRITY, "model: unknown activation of the gate");
    if (c->rope_order != ROPE_NORM && c->rope_order != ROPE_NEOX)
        return error_set(err, ERR_INTEGRITY, "model: unknown order of rotary positions");
    if (!(c->rope_base >= 1 && c->rope_base <= 1e9) || !(c->rope_scale > 0 && c->rope_scale <= 1e6))
        return error_set(err, ERR_INTEGRITY, "model: rotary base %g or scale %g is out of range (1..1e9, 0..1e6)",
                         c->rope_base, c->rope_scale);
    if (c->rope_base_sliding != 0 && !(c->rope_base_sliding >= 1 && c->rope_base_sliding <= 1e9))
        return error_set(err, ERR_INTEGRITY, "model: rotary base %g of sliding layers is out of range (1..1e9)",
                         c->rope_base_sliding);
    if (!(c->attention_scale >= 0 && c->attention_scale <= 1) ||
        !(c->embedding_scale >= 0 && c->embedding_scale <= 1e4))
        return error_set(err, ERR_INTEGRITY,
                         "model: attention scale %g or embedding scale %g is out of range (0..1, 0..10000)",
                         c->attention_scale, c->embedding_scale);
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

/* wanted: whether the configuration has it. */
static int check_vector(const char *name, int layer, const struct tensor *t, int32_t n, bool wanted, struct error *err)
{
    if (!wanted && !t->data)
        return 0;
    if (!wanted)
        return error_set(err, ERR_INTEGRITY, "model: tensor blk.%d.%s is not part of this architecture", layer, name);
    int rc = check_matrix(name, layer, t, 1, n, err);
    if (rc < 0)
        return rc;
    if (t->type != TENSOR_F32)
        return error_set(err, ERR_INTEGRITY, "model: tensor %s of layer %d has type %s, expected F32", name, layer,
                         tensor_type_name(t->type));
    for (int32_t i = 0; i < n; i++)
        if (!isfinite(model_vector(t)[i]))
            return error_set(err, ERR_INTEGRITY, "model: tensor %s of layer %d holds a value that is not finite", name,
                             layer);
    return 0;
}

static int check_layer(const struct model *model, int layer, struct error *err)
{
    const struct model_config *c = &model->config;
    const struct model_layer *l = &model->layers[layer];
    const int32_t heads = c->head_count * c->head_size, kv = c->kv_head_count * c->head_size, d = c->d_model;
    const int32_t up = c->fused_gate_up ? 2 * c->d_ff : c->d_ff;
    const struct {
        const char *name;
        const struct tensor *tensor;
        int32_t out, in;
    } matrices[] = {
        {"attn_q", &l->q, heads, d},        {"attn_k", &l->k, kv, d},  {"attn_v", &l->v, kv, d},
        {"attn_output", &l->o, d, heads},   {"ffn_up", &l->up, up, d}, {"ffn_down", &l->down, d, c->d_ff},
        {"ffn_gate", &l->gate, c->d_ff, d},
    };
    const struct {
        const char *name;
        const struct tensor *tensor;
        int32_t n;
        bool wanted;
    } vectors[] = {
        {"attn_norm", &l->attn_norm, d, true},
        {"ffn_norm", &l->ffn_norm, d, true},
        {"attn_q.bias", &l->q_bias, heads, c->qkv_bias},
        {"attn_k.bias", &l->k_bias, kv, c->qkv_bias},
        {"attn_v.bias", &l->v_bias, kv, c->qkv_bias},
        {"attn_q_norm", &l->q_norm, c->head_size, c->qk_norm},
        {"attn_k_norm", &l->k_norm, c->head_size, c->qk_norm},
        {"post_attention_norm", &l->attn_post_norm, d, c->post_norms},
        {"post_ffw_norm", &l->ffn_post_norm, d, c->post_norms},
    };
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(vectors); i++)
        rc = check_vector(vectors[i].name, layer, vectors[i].tensor, vectors[i].n, vectors[i].wanted, err);
    if (rc == 0 && c->fused_gate_up && l->gate.data)
        rc = error_set(err, ERR_INTEGRITY, "model: tensor blk.%d.ffn_gate beside one that holds gate and up", layer);
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(matrices) - c->fused_gate_up; i++)
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
        rc = check_vector("output_norm", -1, &model->output_norm, c->d_model, true, err);
    if (rc == 0 && model->output.data)
        rc = check_matrix("output", -1, &model->output, c->vocabulary, c->d_model, err);
    if (rc == 0 && model->rope_freqs.data)
        rc = check_vector("rope_freqs", -1, &model->rope_freqs, model_rotated(c) / 2, true, err);
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
