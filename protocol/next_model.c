#include "protocol/next_model.h"

#include "crypto/hash.h"
#include "protocol/quantise.h"

#include <math.h>
#include <stdlib.h>

_Static_assert(sizeof(float) == 4, "IEEE binary32");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "floats are hashed in memory order");

void model_state_hash(const struct model_basis *basis, struct model_state state, uint8_t ret_hash[32])
{
    struct hash h;

    hash_begin(&h, "consilium/model/v1");
    hash_part(&h, span_of(basis->base_hash, HASH_SIZE));
    hash_part(&h, basis->lora_config);
    hash_part(&h, span_of(basis->frozen_hash, HASH_SIZE));
    hash_part_u64(&h, state.words);
    hash_part(&h, span_of(state.params, state.words * sizeof(float)));
    hash_part(&h, span_of(state.momentum, state.words * sizeof(float)));
    hash_end(&h, ret_hash);
}

int next_model_step(const struct server_optimizer *optimizer, struct model_state state, const float *average,
                    float *next_params, float *next_momentum, struct error *err)
{
    const float lr = optimizer->lr, beta = optimizer->momentum;
    bool finite = true;

    assert(optimizer->kind == SERVER_FEDAVG || optimizer->kind == SERVER_FEDAVGM);
    for (size_t i = 0; i < state.words; i++) {
        float v = state.momentum[i], step = average[i];
        if (optimizer->kind == SERVER_FEDAVGM) {
            float kept = beta * v; /* its own statement: one rounding a operation, on every machine */
            v = kept + step;
            step = v;
        }
        float scaled = lr * step;
        float p = state.params[i] + scaled;
        next_momentum[i] = v;
        next_params[i] = p;
        finite = finite && isfinite(p) && isfinite(v);
    }
    if (!finite)
        return error_set(err, ERR_INTEGRITY, "the next model has values that are not finite: the model is refused");
    return 0;
}

int next_model_from_sum(const struct server_optimizer *optimizer, struct model_state state, const uint32_t *sum,
                        uint32_t survivors, unsigned grid_bits, float *next_params, float *next_momentum,
                        struct error *err)
{
    float *average = malloc(state.words * sizeof *average);
    int rc;

    if (!average)
        return error_set(err, ERR_RESOURCES, "no memory for an average of %zu values", state.words);
    rc = quantise_average(sum, state.words, survivors, grid_bits, average, err);
    if (rc == 0)
        rc = next_model_step(optimizer, state, average, next_params, next_momentum, err);
    free(average);
    return rc;
}
