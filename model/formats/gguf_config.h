/* A GGUF file's metadata as a model's hyper-parameters. Internal to gguf_model.c. */
#ifndef FORMATS_GGUF_CONFIG_H
#define FORMATS_GGUF_CONFIG_H

#include "model/formats/gguf.h"

/* All of the configuration but vocabulary, which the embedding's rows give, and qkv_bias where the tensors decide.
 * Defaults of absent keys are llama.cpp's. Keys that change what is computed, and that nobody here computes, are
 * refused. ERR_INTEGRITY names file and key. */
int MUST_USE gguf_config_read(const struct gguf *gguf, struct model_config *ret_config, struct error *err);

/* vocabulary against the tokenizer's list of tokens, and against <architecture>.vocab_size, where the file has them: an
 * id could point outside the embedding otherwise. */
int MUST_USE gguf_config_vocabulary(const struct gguf *gguf, const struct model_config *config, struct error *err);

#endif
