#include "model/kv_cache.h"

#include "base/checked.h"

#include <stdlib.h>
#include <string.h>

int kv_cache_new(struct backend *backend, const struct model *model, int32_t length_max, struct kv_cache **ret_cache,
                 struct error *err)
{
    const struct model_config *c = &model->config;
    const size_t width = (size_t)c->kv_head_count * (size_t)c->head_size;
    size_t floats;
    int rc = 0;
    if (length_max < 1 || length_max > c->context_length)
        return error_set(err, ERR_CONFIG, "a cache of %d tokens is outside 1 to the model's context of %d", length_max,
                         c->context_length);
    struct kv_cache *cache = calloc(1, sizeof *cache);
    if (!cache || !checked_mul(width * (size_t)c->layer_count, (size_t)length_max, &floats)) {
        rc = error_set(err, ERR_RESOURCES, "no memory for a cache of %d tokens", length_max);
        goto out;
    }
    cache->backend = backend;
    cache->layer_count = c->layer_count;
    cache->kv_width = (int32_t)width;
    cache->d_model = c->d_model;
    cache->length_max = length_max;
    cache->hidden.stride = c->d_model;
    cache->ids = calloc((size_t)length_max, sizeof *cache->ids);
    if (!cache->ids)
        rc = error_set(err, ERR_RESOURCES, "no memory for a cache of %d tokens", length_max);
    else if ((rc = backend->ops->alloc(backend, (size_t)c->d_model * backend_element_bytes(backend), &cache->hidden.at,
                                       err)) == 0)
        rc = backend->ops->kv_new(backend, c->layer_count, c->kv_head_count, c->head_size, length_max, &cache->kv, err);
    if (rc == 0) {
        *ret_cache = cache;
        return 0;
    }
out:
    kv_cache_free(cache);
    return rc;
}

void kv_cache_free(struct kv_cache *cache)
{
    if (!cache)
        return;
    if (cache->backend) {
        cache->backend->ops->kv_free(cache->backend, cache->kv);
        cache->backend->ops->release(cache->backend, cache->hidden.at);
    }
    free(cache->ids);
    free(cache);
}

int32_t kv_cache_length(const struct kv_cache *cache)
{
    return cache->length;
}

int32_t kv_cache_room(const struct kv_cache *cache)
{
    return cache->length_max - cache->length;
}

const int32_t *kv_cache_ids(const struct kv_cache *cache)
{
    return cache->ids;
}

void kv_cache_truncate(struct kv_cache *cache, int32_t length)
{
    assert(length >= 0 && length <= cache->length);
    if (length == cache->length)
        return;
    cache->length = length;
    cache->hidden_valid = false;
}

int32_t kv_cache_common(const struct kv_cache *cache, const int32_t *ids, int32_t count)
{
    int32_t n = 0;
    while (n < count - 1 && n < cache->length && cache->ids[n] == ids[n])
        n++;
    return n;
}

void kv_cache_copy(struct kv_cache *to, const struct kv_cache *from, int32_t length)
{
    assert(length >= 0 && length <= from->length && length <= to->length_max && to != from);
    assert(to->layer_count == from->layer_count && to->kv_width == from->kv_width && to->d_model == from->d_model);
    struct backend *be = to->backend;
    assert(be == from->backend);
    be->ops->kv_copy(be, to->kv, from->kv, length);
    memcpy(to->ids, from->ids, (size_t)length * sizeof *to->ids);
    to->length = length;
    to->hidden_valid = from->hidden_valid && length == from->length;
    if (to->hidden_valid)
        be->ops->copy(be, to->hidden.at, from->hidden.at, (size_t)from->d_model * backend_element_bytes(be));
}
