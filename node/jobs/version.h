/*
 * An adapter version of a job as a site keeps it: the whole model state, what it follows from, and how it was trained.
 *
 * A version is named by its job and by the round that made it. Its model hash binds base model, LoRA configuration,
 * frozen factors, parameters and server momentum. A site stores a version only after it recomputed it in that round, or
 * after it verified a quorum's co-signatures on it, and signs the whole file with its own key; loading checks that
 * signature and the hash, so a changed byte anywhere in the file is ERR_INTEGRITY.
 *
 * File (state/adapters/<job>/<round>.adapter), canonical encoding: 20 bytes "consilium adapter 1\n" · bytes LoRA text ·
 * bytes training options · base hash [32] · statement (cosign.h's fields) · bytes proof (empty if recomputed here) ·
 * u64 words · params · momentum (float32, little-endian) · signature [64] over all before it. What the words are, the
 * LoRA text's mode says (node/train/adapter_config.h); a program that does not know the mode refuses the text.
 */
#ifndef NODE_JOBS_VERSION_H
#define NODE_JOBS_VERSION_H

#include "model/lora.h"
#include "node/vault/vault.h"
#include "protocol/cosign.h"
#include "protocol/job_plan.h"

struct version {
    uint8_t base_hash[HASH_SIZE];
    uint8_t lora_text[PLAN_LORA_MAX];
    size_t lora_text_len;
    char options[PLAN_TEXT_MAX];       /* the plan's train.options: how a question has to be put (system message) */
    struct cosign_statement statement; /* round 0: the job's first, all-zero state; no file */
    uint8_t model_hash[HASH_SIZE];
    uint8_t adapter_sha256[HASH_SIZE]; /* SHA-256 of the parameters' bytes: the name that people see */
    float *params, *momentum;          /* (words), owned */
    size_t words;
    bool proven; /* loaded with a quorum's co-signatures; false: recomputed here */
};

void version_release(struct version *v); /* accepts NULL and zeroed */

/* The state that a job starts from: params and momentum zero. ERR_RESOURCES. */
int MUST_USE version_first(struct version *ret_v, const struct job_plan *plan, size_t words, struct error *err);

/* From a state received or recomputed: copies the arrays and computes both hashes. state: 2·words floats, params first.
 */
int MUST_USE version_from_state(struct version *ret_v, const struct job_plan *plan,
                                const struct cosign_statement *statement, const float *state, size_t words,
                                struct error *err);

/* Durable. proof: the co-signatures of a version that was fetched; empty for one recomputed here. */
int MUST_USE version_store(const struct version *v, const struct vault *vault, struct span proof, struct error *err);
int MUST_USE version_load(struct version *ret_v, const struct vault *vault, const char *job, uint32_t round,
                          struct error *err);
/* The adapter that its state describes, for the model that it was trained on: ERR_CONFIG if base_hash is another's (a
 * llama's folder and its GGUF file would take each other's adapters, and answer nonsense). Caller: lora_release. */
int MUST_USE version_adapter(const struct version *v, const uint8_t base_hash[HASH_SIZE],
                             const struct model_config *model, struct lora *ret_lora, struct error *err);
/* Where it lies. out has NODE_PATH_SIZE bytes. */
void version_path(const struct config *config, const char *job, uint32_t round, char *out);

#endif
