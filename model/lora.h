/*
 * LoRA factors on the linears of a range of layers: y += s·(x·Aᵀ)·Bᵀ (Hu et al. 2021), A (rank, in), B (out, rank).
 *
 * Canonical order (the federated payload; all nodes must agree on it). The A section is, for each layer from
 * layer_first up and each adapted target in the order of enum lora_target, A row-major; the B section is the same with
 * B. No padding. LORA_JOINT: trained = A section ‖ B section, frozen is empty. LORA_FFA: trained = B section, frozen =
 * A section (Sun et al. 2024). LORA_FFB: the other way round. With one factor frozen the update B·A is linear in the
 * other, so averaging that one over sites is exactly averaging the update; averaging A and B that were trained together
 * is not (docs/exactness.md measures by how much). Alternating training takes FFA and FFB in turn, with lora_exchange.
 *
 * The memory belongs to the struct. The shape never changes after init; the values are the caller's to write. Readers
 * may share one; a writer must be alone.
 *
 *     struct lora lora;
 *     struct lora_config config = {.mode = LORA_FFA, .rank = 8, .alpha = 16, .layer_first = 20, .layer_count = 10,
 *                                  .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V)};
 *     if (lora_init(&lora, &config, &model.config, err) < 0) return err->code;
 *     lora_fill_a(&lora, stream_of_tensor, &seed);  // B is zero: the adapter starts as no change
 */
#ifndef MODEL_LORA_H
#define MODEL_LORA_H

#include "base/buffer.h"
#include "base/error.h"
#include "base/rng.h"
#include "model/model.h"

#define LORA_RANK_MAX 256

enum lora_mode { LORA_JOINT = 1, LORA_FFA = 2, LORA_FFB = 3 };
enum lora_scaling { LORA_SCALE_RANK = 1, LORA_SCALE_SQRT_RANK = 2 }; /* s = α/r, or α/√r (rank-stabilised) */

/* Where a model holds gate and up as one matrix (fused_gate_up), LORA_UP is that matrix, and LORA_GATE beside it is
 * dropped from the targets. */
enum lora_target { LORA_Q, LORA_K, LORA_V, LORA_O, LORA_GATE, LORA_UP, LORA_DOWN, LORA_TARGET_COUNT };
#define LORA_TARGET_BIT(target) (1u << (target))
#define LORA_TARGETS_ALL ((1u << LORA_TARGET_COUNT) - 1)

struct lora_config {
    enum lora_mode mode;
    enum lora_scaling scaling; /* 0 means LORA_SCALE_RANK */
    int32_t rank;
    double alpha;
    int32_t layer_first; /* lowest adapted layer: training stops its backward pass there */
    int32_t layer_count; /* 0 means up to the top */
    uint32_t targets;    /* LORA_TARGET_BIT()s */
};

/* Where one adapted linear's factors stand. */
struct lora_entry {
    int32_t layer;
    enum lora_target target;
    int32_t in, out;
    size_t a_offset; /* floats: into frozen for LORA_FFA, into trained otherwise */
    size_t b_offset; /* floats: into frozen for LORA_FFB, into trained otherwise */
};

struct lora {
    struct lora_config config; /* defaults filled in */
    float scale;               /* s */
    float *trained;            /* (trained_count): the federated payload */
    size_t trained_count;
    float *frozen; /* (frozen_count) or NULL */
    size_t frozen_count;
    int32_t entry_count;
    struct backend *backend;    /* whose memory trained and frozen are (model/placed.h); NULL: the host's, owned */
    struct lora_entry *entries; /* (entry_count) in canonical order */
    int32_t index[MODEL_LAYERS_MAX][LORA_TARGET_COUNT]; /* into entries, or -1 */
};

/* Everything zero. ERR_CONFIG for a rank, range or targets that the model cannot have; ERR_RESOURCES. */
int MUST_USE lora_init(struct lora *lora, const struct lora_config *config, const struct model_config *model,
                       struct error *err);
void lora_release(struct lora *lora); /* accepts NULL and zeroed */

/* Fills every A: rows and columns in order, each value (2n + 1 − 2^24)·2^-24/√in with n the low 24 bits of one
 * little-endian u32 of the tensor's own stream. Integers and exactly rounded operations only: the same bits on every
 * machine. stream is called once per entry in canonical order; B is left alone. */
void lora_fill_a(struct lora *lora, struct rng (*stream)(void *ctx, uint32_t layer, enum lora_target target),
                 void *ctx);

/* LORA_FFA becomes LORA_FFB and back: the arenas change places, no value moves. Not for LORA_JOINT (asserted). */
void lora_exchange(struct lora *lora);

/* The factors of one linear; NULL if it is not adapted. */
const float *lora_a(const struct lora *lora, int32_t layer, enum lora_target target); /* (rank, in) */
const float *lora_b(const struct lora *lora, int32_t layer, enum lora_target target); /* (out, rank) */
static inline bool lora_adapts(const struct lora *lora, int32_t layer, enum lora_target target)
{
    return lora->index[layer][target] >= 0;
}

/* in and out features of a target in this model. */
void lora_target_shape(const struct model_config *model, enum lora_target target, int32_t *ret_in, int32_t *ret_out);

/* "q", "k", "v", "o", "gate", "up", "down" and back. */
const char *lora_target_name(enum lora_target target);
bool MUST_USE lora_target_parse(const char *name, enum lora_target *ret_target);

/* Appends the canonical encoding of the configuration and of every entry's shape: u32 version 1, mode, scaling, rank;
 * f64 alpha; u32 layer_first, layer_count, targets, entry_count; per entry u32 layer, target, in, out. For hashing. */
void lora_encode(const struct lora *lora, struct buffer *out);

#endif
