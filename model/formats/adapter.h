/*
 * LoRA adapters in the two common forms.
 *
 * PEFT: a folder with adapter_config.json and adapter_model.safetensors, tensors
 * base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight (rank, in) and .lora_B.weight (out, rank).
 * GGUF: general.type = adapter, adapter.type = lora, tensors blk.N.attn_q.weight.lora_a [in, rank], .lora_b [rank,
 * out].
 *
 * The names are the same for all architectures, but for glm4's matrix of gate and up: mlp.gate_up_proj, blk.N.ffn_up.
 *
 * llama's GGUF files hold the rows of q and k in another order than Hugging Face's (pairs side by side, for NORM rope).
 * The rows of lora_B of q and k are brought into the form's order, from the one that the model holds. Both forms hold A
 * and B, also when one of them is frozen. An import accepts a full grid only: one range of layers, the same targets in
 * each.
 *
 * Scaling: PEFT says use_rslora for α/√r. The GGUF form knows α/r only: it gets α·√r as its alpha, which gives the same
 * factor. In that form alpha 0 means no scaling (1), as llama.cpp reads it.
 *
 *     if (adapter_export_peft(&lora, &model.config, folder, "HuggingFaceTB/SmolLM2-135M-Instruct", err) < 0) ...
 *     if (adapter_import(path, &model.config, LORA_JOINT, &lora, err) < 0) ...
 */
#ifndef FORMATS_ADAPTER_H
#define FORMATS_ADAPTER_H

#include "base/buffer.h"
#include "model/lora.h"

#define ADAPTER_BYTES_MAX ((size_t)4 << 30)

/* Into memory; the buffers' maxima bound the sizes. base_name goes into adapter_config.json. */
int MUST_USE adapter_encode_peft(const struct lora *lora, const struct model_config *model, const char *base_name,
                                 struct buffer *config_json, struct buffer *tensors, struct error *err);
int MUST_USE adapter_encode_gguf(const struct lora *lora, const struct model_config *model, struct buffer *out,
                                 struct error *err);

/* Into files, each written atomically. The folder is made if absent. */
int MUST_USE adapter_export_peft(const struct lora *lora, const struct model_config *model, const char *folder,
                                 const char *base_name, struct error *err);
int MUST_USE adapter_export_gguf(const struct lora *lora, const struct model_config *model, const char *path,
                                 struct error *err);

/* From a PEFT folder or a GGUF file, whichever path is. The shape (rank, alpha, layers, targets) comes from the
 * adapter, the mode from the caller; ret_lora is initialised and owned by the caller. ERR_INTEGRITY names file and
 * field if the adapter is malformed, does not fit the model, or holds values that are not finite. */
int MUST_USE adapter_import(const char *path, const struct model_config *model, enum lora_mode mode,
                            struct lora *ret_lora, struct error *err);
int MUST_USE adapter_decode_peft(struct span config_json, struct span tensors, const char *name,
                                 const struct model_config *model, enum lora_mode mode, struct lora *ret_lora,
                                 struct error *err);
int MUST_USE adapter_decode_gguf(struct span bytes, const char *name, const struct model_config *model,
                                 enum lora_mode mode, struct lora *ret_lora, struct error *err);

#endif
