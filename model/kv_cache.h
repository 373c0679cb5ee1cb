/* Internal to model/: the insides of a sequence's cache. See infer.h. */
#ifndef MODEL_KV_CACHE_H
#define MODEL_KV_CACHE_H

#include "model/infer.h"

struct kv_cache {
    int32_t layer_count, kv_width, d_model;
    int32_t length, length_max;
    int32_t *ids;  /* (length_max) */
    float *keys;   /* (layer_count, length_max, kv_width) rotated */
    float *values; /* likewise */
    float *hidden; /* (d_model) final normalised row of the last token */
    bool hidden_valid;
};

static inline float *kv_cache_keys(const struct kv_cache *cache, int32_t layer)
{
    return cache->keys + (size_t)layer * (size_t)cache->length_max * (size_t)cache->kv_width;
}

static inline float *kv_cache_values(const struct kv_cache *cache, int32_t layer)
{
    return cache->values + (size_t)layer * (size_t)cache->length_max * (size_t)cache->kv_width;
}

#endif
