/* What adapter.c and adapter_import.c share: tensor names, and the order of the rows of q and k. */
#ifndef FORMATS_ADAPTER_NAMES_H
#define FORMATS_ADAPTER_NAMES_H

#include "model/lora.h"

#define ADAPTER_NAME_BYTES 96

/* factor: 'a' or 'b'. A matrix that holds gate and up is ffn_up in GGUF and gate_up_proj in PEFT. */
void adapter_gguf_name(int32_t layer, enum lora_target target, char factor, char out[ADAPTER_NAME_BYTES]);
void adapter_peft_name(const struct model_config *model, int32_t layer, enum lora_target target, char factor,
                       char out[ADAPTER_NAME_BYTES]);

/* The order of the rows of q and k in the two forms. They differ for llama only: its GGUF files are permuted. What the
 * model itself holds is its rope_order: a llama of a Hugging Face folder has PEFT's. */
#define ADAPTER_PEFT_ORDER ROPE_NEOX
#define ADAPTER_GGUF_ORDER ROPE_NORM

/* Copies B (out, rank) from one order of rows to the other. Architectures but llama and targets but q and k keep
 * theirs. from_rows and to_rows do not overlap. */
void adapter_order_rows(const struct model_config *model, enum lora_target target, int32_t out, int32_t rank,
                        enum rope_order from, enum rope_order to, const float *from_rows, float *to_rows);

#endif
