/*
 * The text form of a LoRA configuration that a signed job plan carries, and its frozen factors.
 *
 *     "layers=20-29;targets=q,v;rank=8;alpha=16;scaling=rank;mode=ffa;seed=<64 hex digits>"
 *
 * One form only, keys in this order: the text is hashed into the model hash on both sides. In ffa mode A is drawn from
 * ChaCha20 streams keyed by SHA-256("consilium/ffa/v1" ‖ seed ‖ layer ‖ target): anyone with the plan can recompute it,
 * so hashing the text binds A.
 */
#ifndef NODE_TRAIN_ADAPTER_CONFIG_H
#define NODE_TRAIN_ADAPTER_CONFIG_H

#include "base/span.h"
#include "model/lora.h"

#define ADAPTER_SEED_BYTES 32

struct adapter_config {
    struct lora_config lora;
    uint8_t seed[ADAPTER_SEED_BYTES];
};

/* ERR_CONFIG names what is wrong with the text. */
int MUST_USE adapter_config_parse(struct span text, struct adapter_config *ret_config, struct error *err);

/* Initialises lora (lora_init) with A filled from the seed and B zero. */
int MUST_USE adapter_config_build(const struct adapter_config *config, const struct model_config *model,
                                  struct lora *ret_lora, struct error *err);

#endif
