/*
 * The server optimizer: from the sum of the sites' updates to the next global model.
 *
 * The aggregator computes it and every node recomputes it bit for bit: plain C, float32, elementwise, no contraction,
 * no library function whose result may differ between machines. A model that does not follow from the sum is refused.
 *
 *   FedAvg    params' = params + lr * average                        momentum' = momentum
 *   FedAvgM   momentum' = beta * momentum + average,  params' = params + lr * momentum'
 *
 * A round may move one segment of the state only (job_plan_segment): everything beside it, parameters and momentum,
 * stays as it is, bit for bit.
 *
 * Model hash = labelled hash (crypto/hash.h) "consilium/model/v1" of: base file hash, LoRA configuration, frozen A
 * hash, words, params, momentum; floats little-endian. Thread-safe; only next_model_from_sum allocates.
 */
#ifndef PROTOCOL_NEXT_MODEL_H
#define PROTOCOL_NEXT_MODEL_H

#include "base/error.h"
#include "base/span.h"

enum server_optimizer_kind { SERVER_FEDAVG = 1, SERVER_FEDAVGM = 2 };

struct server_optimizer {
    enum server_optimizer_kind kind;
    float lr;       /* > 0 */
    float momentum; /* [0, 1), FedAvgM only, else 0 */
};

/* What a model is besides its state. */
struct model_basis {
    uint8_t base_hash[32];   /* SHA-256 of the base model's file */
    struct span lora_config; /* canonical encoding, model/lora's; borrowed */
    uint8_t frozen_hash[32]; /* of the frozen factors A; zeros when nothing is frozen */
};

/* A model state: both arrays (words), borrowed. */
struct model_state {
    const float *params;
    const float *momentum;
    size_t words;
};

/* The values of a state that a round moves: what the sites train and send. */
struct model_segment {
    uint64_t offset, count; /* count >= 1, offset + count within the state */
};

void model_state_hash(const struct model_basis *basis, struct model_state state, uint8_t ret_hash[32]);

/* average, next_params, next_momentum: (words). The outputs may alias the state's arrays (elementwise).
 * ERR_INTEGRITY when a result is not finite; the outputs are then to be thrown away. */
int MUST_USE next_model_step(const struct server_optimizer *optimizer, struct model_state state, const float *average,
                             float *next_params, float *next_momentum, struct error *err);

/* The same from the ring sum (segment.count): averages over the survivors and steps the segment; the rest of the state
 * is copied. The outputs may be the state's arrays. */
int MUST_USE next_model_from_sum(const struct server_optimizer *optimizer, struct model_state state,
                                 struct model_segment segment, const uint32_t *sum, uint32_t survivors,
                                 unsigned grid_bits, float *next_params, float *next_momentum, struct error *err);

#endif
