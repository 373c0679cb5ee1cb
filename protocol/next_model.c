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

int next_model_from_sum(const struct server_optimizer *optimizer, struct model_state state,
                        struct model_segment segment, const uint32_t *sum, uint32_t survivors, unsigned grid_bits,
                        float *next_params, float *next_momentum, struct error *err)
{
    const size_t first = (size_t)segment.offset, count = (size_t)segment.count;
    const struct model_state moved = {state.params + first, state.momentum + first, count};
    float *average;
    int rc;

    assert(count >= 1 && count <= state.words && first <= state.words - count);
    average = malloc(count * sizeof *average);
    if (!average)
        return error_set(err, ERR_RESOURCES, "no memory for an average of %zu values", count);
    rc = quantise_average(sum, count, survivors, grid_bits, average, err);
    if (rc == 0) {
        memmove(next_params, state.params, state.words * sizeof *next_params); /* may be the same memory */
        memmove(next_momentum, state.momentum, state.words * sizeof *next_momentum);
        rc = next_model_step(optimizer, moved, average, next_params + first, next_momentum + first, err);
    }
    free(average);
    return rc;
}
