/* What the loaders of base models share (gguf_config.c, gguf_model.c, hf_config.c, hf_model.c). Internal to
 * model/formats. */
#ifndef FORMATS_MODEL_PARTS_H
#define FORMATS_MODEL_PARTS_H

#include "model/model.h"

/* What the architecture itself decides, once config->architecture and d_model are known: gate, qk_norm, post_norms,
 * fused_gate_up, embedding_scale, and qkv_bias for qwen2 (glm4 has it in some sizes: the loader decides). */
void model_parts_traits(struct model_config *config);

/* Which layers slide as model_config's period: the layers period − 1, 2·period − 1, … do not. *ret_period is 0 if none
 * does. False if no period up to MODEL_LAYERS_MAX gives this list; count: 1 to MODEL_LAYERS_MAX. */
bool MUST_USE model_parts_period(const bool *slides, int32_t count, int32_t *ret_period);

/* True if all values, or all scales of the blocks, are finite. `bytes` is a whole number of blocks. */
bool MUST_USE model_parts_finite(enum tensor_type type, const void *data, size_t bytes);

/* True if every value of a vector that divides frequencies is positive and finite (or it is absent). */
bool MUST_USE model_parts_divisors(const struct tensor *vector);

/* text with everything but printable ASCII replaced, for messages; returns out. */
const char *model_parts_printable(const char *text, size_t len, char out[64]);

#endif
