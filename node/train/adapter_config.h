/*
 * The text form of a LoRA configuration that a signed job plan carries, and its frozen factors.
 *
 *     "layers=20-29;targets=q,v;rank=8;alpha=16;scaling=rank;mode=ffa;seed=<64 hex digits>"
 *
 * One form only, keys in this order: the text is hashed into the model hash on both sides. The first A, A0, is drawn
 * from ChaCha20 streams keyed by SHA-256("consilium/ffa/v1" ‖ seed ‖ layer ‖ target): anyone with the plan can
 * recompute it, so hashing the text binds A0.
 *
 * The state is the vector that a federation agrees on; at first all zeros. What it holds depends on the mode:
 *
 *     ffa          B section                      A = A0
 *     alternating  (A − A0) section ‖ B section   A = A0 + the first, one float32 addition a value
 *     joint        none: not in federations, since averaging A and B is not averaging the update B·A
 *
 * In mode alternating a struct lora is LORA_FFA (B trained) or LORA_FFB (A trained), adapter_config_turn.
 */
#ifndef NODE_TRAIN_ADAPTER_CONFIG_H
#define NODE_TRAIN_ADAPTER_CONFIG_H

#include "base/span.h"
#include "model/lora.h"

#define ADAPTER_SEED_BYTES 32

struct adapter_config {
    struct lora_config lora; /* alternating: mode LORA_FFA, as the first round is */
    bool alternating;
    uint8_t seed[ADAPTER_SEED_BYTES];
};

/* ERR_CONFIG names what is wrong with the text. */
int MUST_USE adapter_config_parse(struct span text, struct adapter_config *ret_config, struct error *err);

/* Initialises lora (lora_init) with A filled from the seed and B zero. */
int MUST_USE adapter_config_build(const struct adapter_config *config, const struct model_config *model,
                                  struct lora *ret_lora, struct error *err);

/* Values of the state, and of the A section at its start if rounds train A and B in turn (0 otherwise): what a job
 * plan's split_words must be. */
size_t adapter_config_words(const struct adapter_config *config, const struct lora *lora);
size_t adapter_config_split(const struct adapter_config *config, const struct lora *lora);

/* May a federation train this adapter by a plan that cuts its state at split_words? ERR_POLICY: A and B are trained
 * together, or the plan cuts elsewhere than between them. */
int MUST_USE adapter_config_check_plan(const struct adapter_config *config, const struct lora *lora,
                                       uint64_t split_words, struct error *err);

/* Makes lora, of adapter_config_build, the adapter that a state describes; whichever factor is trained. ERR_INTEGRITY:
 * the state has another size, or the mode has none. */
int MUST_USE adapter_config_apply(const struct adapter_config *config, const float *state, size_t words,
                                  struct lora *lora, struct error *err);
/* build and apply in one: an adapter to serve, evaluate or export. */
int MUST_USE adapter_config_load(const struct adapter_config *config, const struct model_config *model,
                                 const float *state, size_t words, struct lora *ret_lora, struct error *err);

/* Chooses which factor is trained: the segment's of an alternating job (the A section begins at 0). No value moves.
 * Nothing to do in the other modes. */
void adapter_config_turn(const struct adapter_config *config, uint64_t segment_offset, struct lora *lora);

#endif
