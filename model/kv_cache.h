/* Internal to model/: the insides of a sequence's cache. See infer.h. */
#ifndef MODEL_KV_CACHE_H
#define MODEL_KV_CACHE_H

#include "model/infer.h"

struct kv_cache {
    struct backend *backend;
    int32_t layer_count, kv_width, d_model;
    int32_t length, length_max;
    int32_t *ids;       /* (length_max) host */
    struct kv *kv;      /* keys, rotated, and values */
    struct rows hidden; /* (1, d_model) final normalised row of the last token */
    bool hidden_valid;
};

#endif
