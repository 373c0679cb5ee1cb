#include "model/formats/hf_model.h"

#include "model/formats/hf_config.h"
#include "model/formats/model_parts.h"

#include <stdlib.h>
#include <string.h>

#define COPY_ALIGNMENT 64u

/* A piece of memory of the model's own; a list. */
struct block {
    struct block *next;
    _Alignas(COPY_ALIGNMENT) uint8_t bytes[];
};

struct hf_model {
    struct model model;
    struct safetensors **shards; /* (count) */
    size_t count;
    struct block *blocks;
};

/* What one call of hf_model_parse works with. */
struct load {
    struct hf_model *hf;
    const struct hf_index *index;
    const struct hf_config *config;
    bool **used; /* (count) (tensors of the shard): in the order of safetensors_at */
    struct error *err;
};

static void *own(struct load *l, size_t bytes)
{
    const size_t size = (sizeof(struct block) + bytes + COPY_ALIGNMENT - 1) & ~(size_t)(COPY_ALIGNMENT - 1);
    struct block *b = aligned_alloc(COPY_ALIGNMENT, size);
    if (!b)
        return NULL;
    b->next = l->hf->blocks;
    l->hf->blocks = b;
    return b->bytes;
}

static int fail(const struct load *l, int32_t shard, const char *name, const char *what)
{
    return error_set(l->err, ERR_INTEGRITY, "%s: tensor %s %s", safetensors_name(l->hf->shards[shard]), name, what);
}

/* The tensor and its shard, now used; NULL if it is absent. */
static const struct safetensors_tensor *find(const struct load *l, const char *name, int32_t *ret_shard)
{
    const int32_t shard = l->index ? hf_index_find(l->index, name) : 0;
    const struct safetensors_tensor *t = shard >= 0 ? safetensors_find(l->hf->shards[shard], name) : NULL;
    if (t)
        l->used[shard][t - safetensors_at(l->hf->shards[shard], 0)] = true;
    *ret_shard = shard;
    return t;
}

static int get(const struct load *l, const char *name, uint32_t dims, const struct safetensors_tensor **ret)
{
    int32_t shard;
    const struct safetensors_tensor *t = find(l, name, &shard);
    if (!t)
        return error_set(l->err, ERR_INTEGRITY, "the tensor %s is missing", name);
    if (t->type == SAFETENSORS_OTHER)
        return fail(l, shard, name, "has a dtype that is not supported (BF16, F16 and F32 are)");
    if (t->dim_count != dims)
        return fail(l, shard, name, dims == 1 ? "is no vector" : "is no matrix");
    if (t->dims[dims - 1] == 0 || t->dims[dims - 1] > MODEL_WIDTH_MAX || t->dims[0] == 0 ||
        t->dims[0] > MODEL_VOCABULARY_MAX)
        return fail(l, shard, name, "has a dimension that is 0 or too large");
    static const enum tensor_type types[] = {TENSOR_F32, TENSOR_F16, TENSOR_BF16};
    if (!model_parts_finite(types[t->type], t->data.ptr, t->data.len))
        return fail(l, shard, name, "holds a value that is NaN or infinite");
    *ret = t;
    return 0;
}

static int take_matrix(struct load *l, const char *name, struct tensor *ret)
{
    static const enum tensor_type types[] = {TENSOR_F32, TENSOR_F16, TENSOR_BF16};
    const struct safetensors_tensor *t = NULL;
    int rc = get(l, name, 2, &t);
    if (rc < 0)
        return rc;
    *ret = (struct tensor){t->data.ptr, types[t->type], (int32_t)t->dims[0], (int32_t)t->dims[1]};
    if ((uintptr_t)t->data.ptr % tensor_type_alignment(ret->type) == 0)
        return 0;
    void *copy = own(l, t->data.len);
    if (!copy)
        return error_set(l->err, ERR_RESOURCES, "no memory to copy the tensor %s", name);
    memcpy(copy, t->data.ptr, t->data.len);
    ret->data = copy;
    return 0;
}

/* offset is added to every value. */
static int take_vector(struct load *l, const char *name, float offset, struct tensor *ret)
{
    const struct safetensors_tensor *t = NULL;
    int rc = get(l, name, 1, &t);
    if (rc < 0)
        return rc;
    float *values = own(l, (size_t)t->dims[0] * sizeof *values);
    if (!values)
        return error_set(l->err, ERR_RESOURCES, "no memory to convert the tensor %s", name);
    bool known = safetensors_floats(t, values);
    assert(known);
    (void)known;
    for (uint64_t i = 0; i < t->dims[0]; i++)
        values[i] += offset;
    *ret = (struct tensor){values, TENSOR_F32, 1, (int32_t)t->dims[0]};
    return 0;
}

/* Which norm stands where: gemma3 and glm4 give the same names to different places. */
static int take_layer(struct load *l, int32_t layer, struct model_layer *to)
{
    const struct model_config *c = &l->hf->model.config;
    const bool gemma = c->architecture == MODEL_GEMMA3, bias = c->qkv_bias, fused = c->fused_gate_up;
    const float shift = gemma ? 1.0f : 0.0f;
    const struct {
        const char *name;
        struct tensor *tensor;
        bool wanted, matrix;
    } rows[] = {
        {"input_layernorm.weight", &to->attn_norm, true, false},
        {"self_attn.q_proj.weight", &to->q, true, true},
        {"self_attn.k_proj.weight", &to->k, true, true},
        {"self_attn.v_proj.weight", &to->v, true, true},
        {"self_attn.o_proj.weight", &to->o, true, true},
        {"self_attn.q_proj.bias", &to->q_bias, bias, false},
        {"self_attn.k_proj.bias", &to->k_bias, bias, false},
        {"self_attn.v_proj.bias", &to->v_bias, bias, false},
        {"self_attn.q_norm.weight", &to->q_norm, c->qk_norm, false},
        {"self_attn.k_norm.weight", &to->k_norm, c->qk_norm, false},
        {gemma ? "post_attention_layernorm.weight" : "post_self_attn_layernorm.weight", &to->attn_post_norm,
         c->post_norms, false},
        {gemma ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight", &to->ffn_norm, true, false},
        {"mlp.gate_proj.weight", &to->gate, !fused, true},
        {fused ? "mlp.gate_up_proj.weight" : "mlp.up_proj.weight", &to->up, true, true},
        {"mlp.down_proj.weight", &to->down, true, true},
        {gemma ? "post_feedforward_layernorm.weight" : "post_mlp_layernorm.weight", &to->ffn_post_norm, c->post_norms,
         false},
    };
    char name[96];
    int32_t shard;
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        snprintf(name, sizeof name, "model.layers.%d.%s", layer, rows[i].name);
        int rc = !rows[i].wanted  ? 0
                 : rows[i].matrix ? take_matrix(l, name, rows[i].tensor)
                                  : take_vector(l, name, shift, rows[i].tensor);
        if (rc < 0)
            return rc;
    }
    /* Old llama folders hold the frequencies, which config.json gives as well; transformers does not read them. */
    snprintf(name, sizeof name, "model.layers.%d.self_attn.rotary_emb.inv_freq", layer);
    (void)find(l, name, &shard);
    return 0;
}

/* A tied head may be in the file once more, if it is the same. */
static int take_head(struct load *l)
{
    struct model *m = &l->hf->model;
    int32_t shard;
    const struct safetensors_tensor *head = find(l, "lm_head.weight", &shard), *embedding;
    if (!l->config->tied)
        return take_matrix(l, "lm_head.weight", &m->output);
    embedding = head ? find(l, "model.embed_tokens.weight", &shard) : NULL;
    if (head && (head->type != embedding->type || !span_equal(head->data, embedding->data)))
        return error_set(l->err, ERR_INTEGRITY,
                         "tie_word_embeddings is true, but the tensor lm_head.weight is not model.embed_tokens.weight");
    return 0;
}

static int take_factors(struct load *l)
{
    const size_t bytes = (size_t)l->config->factor_count * sizeof *l->config->factors;
    if (bytes == 0)
        return 0;
    float *values = own(l, bytes);
    if (!values)
        return error_set(l->err, ERR_RESOURCES, "no memory for %d frequencies", l->config->factor_count);
    memcpy(values, l->config->factors, bytes);
    l->hf->model.rope_freqs = (struct tensor){values, TENSOR_F32, 1, l->config->factor_count};
    return 0;
}

static int refuse_unused(const struct load *l)
{
    char shown[64];
    for (size_t i = 0; i < l->hf->count; i++)
        for (size_t j = 0; j < safetensors_count(l->hf->shards[i]); j++) {
            const char *name = safetensors_at(l->hf->shards[i], j)->name;
            if (!l->used[i][j])
                return fail(l, (int32_t)i, model_parts_printable(name, strlen(name), shown),
                            "is not part of this architecture as config.json describes it");
        }
    return 0;
}

static int take_all(struct load *l)
{
    struct model *m = &l->hf->model;
    const float shift = m->config.architecture == MODEL_GEMMA3 ? 1.0f : 0.0f;
    int rc = take_matrix(l, "model.embed_tokens.weight", &m->token_embd);
    if (rc == 0)
        rc = take_vector(l, "model.norm.weight", shift, &m->output_norm);
    if (rc == 0)
        rc = take_head(l);
    if (rc == 0)
        rc = take_factors(l);
    for (int32_t layer = 0; rc == 0 && layer < m->config.layer_count; layer++)
        rc = take_layer(l, layer, &m->layers[layer]);
    if (rc == 0)
        rc = refuse_unused(l);
    return rc == 0 ? model_validate(m, l->err) : rc;
}

static int open_shards(struct load *l, const struct hf_file *files)
{
    struct hf_model *hf = l->hf;
    for (size_t i = 0; i < hf->count; i++) {
        int rc = safetensors_parse(files[i].bytes, files[i].name, &hf->shards[i], l->err);
        if (rc < 0)
            return rc;
        l->used[i] = calloc(safetensors_count(hf->shards[i]) + 1, sizeof **l->used);
        if (!l->used[i])
            return error_set(l->err, ERR_RESOURCES, "no memory");
    }
    return l->index ? hf_index_check(l->index, (const struct safetensors *const *)hf->shards, l->err) : 0;
}

int hf_model_parse(const char *name, struct span config_json, const struct hf_index *index, const struct hf_file *files,
                   struct hf_model **ret_model, struct error *err)
{
    const size_t count = index ? hf_index_shard_count(index) : 1;
    struct hf_model *hf = calloc(1, sizeof *hf);
    struct hf_config *config = calloc(1, sizeof *config);
    struct load l = {.hf = hf, .index = index, .config = config, .used = calloc(count, sizeof *l.used), .err = err};
    int rc = ERR_RESOURCES;
    if (hf)
        hf->shards = calloc(count, sizeof *hf->shards);
    if (!hf || !config || !l.used || !hf->shards) {
        error_set(err, rc, "no memory");
        goto out;
    }
    hf->count = count;
    rc = hf_config_parse(config_json, "config.json", config, err);
    hf->model.config = config->model;
    if (rc == 0)
        rc = open_shards(&l, files);
    if (rc == 0)
        rc = take_all(&l);
out:
    for (size_t i = 0; l.used && i < count; i++)
        free(l.used[i]);
    free(l.used);
    free(config);
    if (rc < 0) {
        error_prefix(err, "%s", name);
        hf_model_free(hf);
    } else {
        *ret_model = hf;
    }
    return rc;
}

void hf_model_free(struct hf_model *hf)
{
    if (!hf)
        return;
    for (size_t i = 0; i < hf->count; i++)
        safetensors_close(hf->shards[i]);
    free(hf->shards);
    while (hf->blocks) {
        struct block *next = hf->blocks->next;
        free(hf->blocks);
        hf->blocks = next;
    }
    free(hf);
}

const struct model *hf_model_get(const struct hf_model *hf)
{
    return &hf->model;
}
