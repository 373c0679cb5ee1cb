#include "model/placed.h"

#include "base/file.h"
#include "model/layer.h"

#include <stdlib.h>
#include <string.h>

/* --- the model --------------------------------------------------------------------------------------------------- */

static const struct tensor *layer_weight(const struct model_layer *l, enum lora_target target)
{
    const struct tensor *const all[LORA_TARGET_COUNT] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    return all[target];
}

/* Norms and biases: one device block, handed out in turn. */
struct vectors {
    struct backend *be;
    uint8_t *next; /* NULL: count, or borrow where host memory will do */
    size_t bytes;
};

static void place_vector(struct vectors *v, const struct tensor *from, const float **to)
{
    const size_t bytes = ((size_t)from->in * sizeof(float) + 255) & ~(size_t)255;
    *to = model_vector(from);
    if (!from->data)
        return;
    v->bytes += bytes;
    if (!v->next)
        return;
    v->be->ops->upload(v->be, v->next, from->data, (size_t)from->in * sizeof(float));
    *to = (const float *)(const void *)v->next;
    v->next += bytes;
}

static void place_all_vectors(struct placed_model *p, struct vectors *v)
{
    const struct model *m = p->model;
    place_vector(v, &m->output_norm, &p->output_norm);
    for (int32_t i = 0; i < m->config.layer_count; i++) {
        const struct model_layer *l = &m->layers[i];
        struct placed_layer *to = &p->layers[i];
        const float **bias = to->groups[GROUP_QKV].bias;
        place_vector(v, &l->attn_norm, &to->attn_norm);
        place_vector(v, &l->q_bias, &bias[0]);
        place_vector(v, &l->k_bias, &bias[1]);
        place_vector(v, &l->v_bias, &bias[2]);
        place_vector(v, &l->q_norm, &to->q_norm);
        place_vector(v, &l->k_norm, &to->k_norm);
        place_vector(v, &l->attn_post_norm, &to->attn_post_norm);
        place_vector(v, &l->ffn_norm, &to->ffn_norm);
        place_vector(v, &l->ffn_post_norm, &to->ffn_post_norm);
    }
}

/* After the groups, which do not know of their biases. */
static int place_vectors(struct placed_model *p, struct error *err)
{
    struct vectors v = {.be = p->backend};
    place_all_vectors(p, &v);
    if (v.be->host_memory)
        return 0;
    int rc = v.be->ops->alloc(v.be, v.bytes, &p->vectors, err);
    if (rc < 0)
        return rc;
    v.next = p->vectors;
    place_all_vectors(p, &v);
    return 0;
}

static void count_weights(const struct tensor *w, size_t *values, size_t *bytes)
{
    size_t row = 0;
    if (!tensor_type_row_bytes(w->type, (size_t)w->in, &row)) /* validated models have whole blocks */
        assert(!"a row that is no whole number of blocks");
    *values += (size_t)w->out * (size_t)w->in;
    *bytes += (size_t)w->out * row;
}

int placed_model_check(struct backend *backend, const struct model *model, struct error *err)
{
    const struct model_config *c = &model->config;
    const int32_t widths[] = {c->d_model, c->head_count * c->head_size, c->kv_head_count * c->head_size, c->d_ff};
    size_t values = 0, bytes = 0;
    for (size_t i = 0; i < ARRAY_LEN(widths); i++)
        if (widths[i] % backend->width_multiple != 0)
            return error_set(err, ERR_CONFIG, "the model has matrices %d wide; %s takes multiples of %d", widths[i],
                             backend->name, backend->width_multiple);
    count_weights(&model->token_embd, &values, &bytes);
    if (model_head(model) != &model->token_embd)
        count_weights(&model->output, &values, &bytes);
    for (int32_t layer = 0; layer < c->layer_count; layer++)
        for (int target = 0; target < LORA_TARGET_COUNT; target++)
            if (layer_weight(&model->layers[layer], (enum lora_target)target)->data)
                count_weights(layer_weight(&model->layers[layer], (enum lora_target)target), &values, &bytes);
    return backend->ops->weights_fit(backend, values, bytes, err);
}

static int place_layer(struct placed_model *p, int32_t layer, struct error *err)
{
    struct backend *be = p->backend;
    for (int group = 0; group < GROUP_COUNT; group++) {
        const struct tensor *w[GROUP_TARGETS_MAX] = {NULL};
        const struct model_config *config = &p->model->config;
        const int size = group_size(config, (enum group)group), first = (int)group_first(config, (enum group)group);
        for (int i = 0; i < size; i++)
            w[i] = layer_weight(&p->model->layers[layer], (enum lora_target)(first + i));
        int rc = be->ops->group_new(be, size, w, size * p->rank_max, &p->layers[layer].groups[group], err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int placed_model_new(struct backend *backend, const struct model *model, int32_t rank, struct placed_model **ret_placed,
                     struct error *err)
{
    const struct tensor *embedding = &model->token_embd, *head = model_head(model);
    struct placed_model *p = calloc(1, sizeof *p);
    if (!p)
        return error_set(err, ERR_RESOURCES, "no memory for the model's table");
    p->model = model;
    p->backend = backend;
    p->rank_max = rank;
    p->tied = head == embedding;
    int rc = placed_model_check(backend, model, err);
    if (rc == 0)
        rc = backend->ops->group_new(backend, 1, &embedding, 0, &p->embedding, err);
    if (rc == 0 && p->tied)
        p->head = p->embedding;
    else if (rc == 0)
        rc = backend->ops->group_new(backend, 1, &head, 0, &p->head, err);
    for (int32_t layer = 0; rc == 0 && layer < model->config.layer_count; layer++)
        rc = place_layer(p, layer, err);
    if (rc == 0)
        rc = place_vectors(p, err);
    if (rc == 0)
        rc = backend->ops->sync(backend, err);
    if (rc < 0) {
        placed_model_free(p);
        return error_prefix(err, "placing the model on %s", backend->name);
    }
    *ret_placed = p;
    return 0;
}

void placed_model_serve(struct placed_model *p)
{
    struct linear_group *groups[MODEL_LAYERS_MAX * GROUP_COUNT + 1];
    const struct backend_ops *ops = p->backend->ops;
    int32_t count = 0;
    assert(!p->serving);
    for (int32_t layer = 0; layer < p->model->config.layer_count; layer++)
        for (int group = 0; group < GROUP_COUNT; group++)
            groups[count++] = &p->layers[layer].groups[group];
    groups[count++] = &p->head;
    if (ops->serving_copy)
        p->serving = ops->serving_copy(p->backend, count, groups);
    if (p->serving)
        file_map_rest(p->model->map);
}

void placed_model_free(struct placed_model *p)
{
    if (!p)
        return;
    struct backend *be = p->backend;
    for (int32_t layer = 0; layer < p->model->config.layer_count; layer++)
        for (int group = 0; group < GROUP_COUNT; group++)
            be->ops->group_free(be, &p->layers[layer].groups[group]);
    be->ops->group_free(be, &p->embedding);
    if (!p->tied)
        be->ops->group_free(be, &p->head);
    be->ops->release(be, p->vectors);
    be->ops->release(be, p->serving);
    free(p);
}

/* --- LoRA factors ------------------------------------------------------------------------------------------------ */

int lora_place(struct lora *ret_placed, const struct lora *lora, struct backend *backend, struct error *err)
{
    struct lora placed = *lora;
    placed.backend = backend;
    if (!backend->host_memory) {
        void *trained = NULL, *frozen = NULL;
        int rc = backend->ops->alloc(backend, lora->trained_count * sizeof(float), &trained, err);
        if (rc == 0 && lora->frozen)
            rc = backend->ops->alloc(backend, lora->frozen_count * sizeof(float), &frozen, err);
        if (rc < 0) {
            backend->ops->release(backend, trained);
            return rc;
        }
        placed.trained = trained;
        placed.frozen = frozen;
        lora_upload(&placed, lora);
    }
    *ret_placed = placed;
    return 0;
}

void lora_unplace(struct lora *placed)
{
    if (placed->backend && !placed->backend->host_memory) {
        placed->backend->ops->release(placed->backend, placed->trained);
        placed->backend->ops->release(placed->backend, placed->frozen);
    }
    memset(placed, 0, sizeof *placed);
}

void lora_upload(struct lora *placed, const struct lora *lora)
{
    struct backend *be = placed->backend;
    assert(be && placed->trained_count == lora->trained_count && placed->frozen_count == lora->frozen_count);
    be->ops->upload(be, placed->trained, lora->trained, lora->trained_count * sizeof(float));
    if (placed->frozen)
        be->ops->upload(be, placed->frozen, lora->frozen, lora->frozen_count * sizeof(float));
}

void lora_download(struct lora *lora, const struct lora *placed)
{
    struct backend *be = placed->backend;
    assert(be && placed->trained_count == lora->trained_count);
    be->ops->download(be, lora->trained, placed->trained, lora->trained_count * sizeof(float));
}
