/* From a parsed GGUF file to a validated struct model. */
#include "model/formats/gguf_config.h"
#include "model/formats/model_parts.h"

#include <stdio.h>
#include <stdlib.h>

/* Borrows a tensor by name. rows and columns are checked by model_validate. */
static int borrow(const struct gguf *g, const char *name, bool required, size_t *used, struct tensor *ret,
                  struct error *err)
{
    const struct gguf_tensor *t = gguf_tensor_find(g, name);
    if (!t)
        return required ? error_set(err, ERR_INTEGRITY, "%s: the tensor %s is missing", gguf_name(g), name) : 0;
    if (t->dim_count > 2 || t->dims[0] > MODEL_WIDTH_MAX || t->dims[1] > MODEL_VOCABULARY_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: tensor %s has %u dimensions %llu x %llu, at most %d x %d are allowed",
                         gguf_name(g), name, t->dim_count, (unsigned long long)t->dims[0],
                         (unsigned long long)t->dims[1], MODEL_WIDTH_MAX, MODEL_VOCABULARY_MAX);
    if (!model_parts_finite(t->type, t->data, t->bytes))
        return error_set(err, ERR_INTEGRITY, "%s: tensor %s holds a scale or value that is NaN or infinite",
                         gguf_name(g), name);
    *ret = (struct tensor){t->data, t->type, (int32_t)t->dims[1], (int32_t)t->dims[0]};
    ++*used;
    return 0;
}

static int borrow_layer(const struct gguf *g, const struct model_config *c, int32_t layer, size_t *used,
                        struct model_layer *l, struct error *err)
{
    const struct {
        const char *name;
        struct tensor *tensor;
        bool wanted;
    } rows[] = {
        {"attn_norm.weight", &l->attn_norm, true},
        {"attn_q.weight", &l->q, true},
        {"attn_k.weight", &l->k, true},
        {"attn_v.weight", &l->v, true},
        {"attn_output.weight", &l->o, true},
        {"attn_q.bias", &l->q_bias, c->qkv_bias},
        {"attn_k.bias", &l->k_bias, c->qkv_bias},
        {"attn_v.bias", &l->v_bias, c->qkv_bias},
        {"attn_q_norm.weight", &l->q_norm, c->qk_norm},
        {"attn_k_norm.weight", &l->k_norm, c->qk_norm},
        {"post_attention_norm.weight", &l->attn_post_norm, c->post_norms},
        {"ffn_norm.weight", &l->ffn_norm, true},
        {"ffn_gate.weight", &l->gate, !c->fused_gate_up},
        {"ffn_up.weight", &l->up, true},
        {"ffn_down.weight", &l->down, true},
        {"post_ffw_norm.weight", &l->ffn_post_norm, c->post_norms},
    };
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%d.%s", layer, rows[i].name);
        int rc = rows[i].wanted ? borrow(g, name, true, used, rows[i].tensor, err) : 0;
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int borrow_all(const struct gguf *g, struct model *m, struct error *err)
{
    const struct model_config *c = &m->config;
    size_t used = 0;
    int rc = borrow(g, "token_embd.weight", true, &used, &m->token_embd, err);
    if (rc == 0)
        rc = borrow(g, "output_norm.weight", true, &used, &m->output_norm, err);
    if (rc == 0)
        rc = borrow(g, "output.weight", false, &used, &m->output, err);
    if (rc == 0 && c->architecture == MODEL_LLAMA)
        rc = borrow(g, "rope_freqs.weight", false, &used, &m->rope_freqs, err);
    for (int32_t layer = 0; rc == 0 && layer < c->layer_count; layer++)
        rc = borrow_layer(g, c, layer, &used, &m->layers[layer], err);
    if (rc == 0 && used != gguf_tensor_count(g))
        rc = error_set(err, ERR_INTEGRITY,
                       "%s: %zu tensors are not part of a %s model of %d layers (other biases and the like are not "
                       "supported)",
                       gguf_name(g), gguf_tensor_count(g) - used, model_architecture_name(c->architecture),
                       c->layer_count);
    return rc;
}

int gguf_load_model(const struct gguf *gguf, struct model *ret_model, struct error *err)
{
    struct model *m = calloc(1, sizeof *m);
    if (!m)
        return error_set(err, ERR_RESOURCES, "%s: no memory", gguf_name(gguf));
    int rc = gguf_config_read(gguf, &m->config, err);
    if (rc == 0 && m->config.architecture == MODEL_GLM4)
        m->config.qkv_bias = gguf_tensor_find(gguf, "blk.0.attn_q.bias") != NULL;
    if (rc == 0)
        rc = borrow_all(gguf, m, err);
    m->config.vocabulary = m->token_embd.out;
    if (rc == 0)
        rc = gguf_config_vocabulary(gguf, &m->config, err);
    if (rc == 0 && (rc = model_validate(m, err)) < 0)
        error_prefix(err, "%s", gguf_name(gguf));
    if (rc == 0 && !model_parts_divisors(&m->rope_freqs))
        rc = error_set(err, ERR_INTEGRITY, "%s: tensor rope_freqs.weight holds a value that is not positive",
                       gguf_name(gguf));
    m->map = gguf_map(gguf);
    if (rc == 0)
        *ret_model = *m;
    free(m);
    return rc;
}
