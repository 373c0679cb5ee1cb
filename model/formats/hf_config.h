/*
 * config.json of a Hugging Face folder as a model's hyper-parameters. Source of fields and defaults: transformers'
 * configuration classes (Llama, Qwen2, Qwen3, Gemma3Text, Glm4), version 5 (rope_parameters) and before (rope_theta,
 * rope_scaling).
 *
 * Fields that change what is computed are checked one by one; what nobody here computes is refused. The many that do
 * not (initializer_range, use_cache ...) are not looked at.
 */
#ifndef FORMATS_HF_CONFIG_H
#define FORMATS_HF_CONFIG_H

#include "base/span.h"
#include "model/model.h"

#define HF_CONFIG_BYTES_MAX ((size_t)1 << 20)

struct hf_config {
    struct model_config model;
    bool tied;                              /* the head is the embedding */
    int32_t factor_count;                   /* 0, or rotated / 2: llama 3's scaling */
    float factors[MODEL_HEAD_SIZE_MAX / 2]; /* dividing each frequency, all positive */
};

/* ERR_INTEGRITY names file and field. */
int MUST_USE hf_config_parse(struct span json, const char *file, struct hf_config *ret_config, struct error *err);

#endif
