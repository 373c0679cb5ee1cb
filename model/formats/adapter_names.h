/* What adapter.c and adapter_import.c share: tensor names, and the order of the rows of q and k. */
#ifndef FORMATS_ADAPTER_NAMES_H
#define FORMATS_ADAPTER_NAMES_H

#include "model/lora.h"

#define ADAPTER_NAME_BYTES 96

/* factor: 'a' or 'b'. */
void adapter_gguf_name(int32_t layer, enum lora_target target, char factor, char out[ADAPTER_NAME_BYTES]);
void adapter_peft_name(int32_t layer, enum lora_target target, char factor, char out[ADAPTER_NAME_BYTES]);

/* Copies B (out, rank) from GGUF's order of rows to PEFT's, or back. Targets but q and k, and models whose rope is not
 * in NORM order, keep theirs. from and to do not overlap. */
void adapter_permute_rows(const struct model_config *model, enum lora_target target, int32_t out, int32_t rank,
                          bool to_peft, const float *from, float *to);

#endif
