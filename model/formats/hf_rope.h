/* The rotary positions of a config.json, in the forms before and after transformers 5. Internal to hf_config.c. */
#ifndef FORMATS_HF_ROPE_H
#define FORMATS_HF_ROPE_H

#include "model/formats/hf_config.h"
#include "model/formats/json_fields.h"

/* Fills rope_order, rotated, rope_base, rope_scale, factors and, where config->model.window is set for gemma3,
 * rope_base_sliding; architecture, head_size, context_length and window are read. */
int MUST_USE hf_rope_read(const struct json_fields *f, struct hf_config *config);

#endif
