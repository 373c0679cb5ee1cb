/*
 * Local optimizers over the flat trained arena of a struct lora.
 *
 * State is two (AdamW) or one (SGD with momentum) arrays of the arena's length in the backend's memory, taken at init;
 * a step allocates nothing. Where arenas take turns, init with the longer one and say at each reset which it is.
 *
 *     struct optimizer optimizer;
 *     struct optimizer_config config = {.kind = OPTIMIZER_ADAMW, .lr = 2e-3f, .beta1 = 0.9f, .beta2 = 0.999f,
 *                                       .eps = 1e-8f};
 *     if (optimizer_init(&optimizer, &config, backend, lora.trained_count, err) < 0) return err->code;
 *     optimizer_step(&optimizer, gradient, lora.trained);
 */
#ifndef MODEL_OPTIMIZER_H
#define MODEL_OPTIMIZER_H

#include "base/error.h"
#include "kernels/backend.h"

enum optimizer_kind { OPTIMIZER_SGD = 1, OPTIMIZER_ADAMW = 2 };

struct optimizer_config {
    enum optimizer_kind kind;
    float lr;
    float momentum;          /* SGD: 0 ≤ momentum < 1 */
    float beta1, beta2, eps; /* AdamW */
    float weight_decay;      /* AdamW, decoupled */
};

struct optimizer {
    struct optimizer_config config;
    struct backend *backend; /* borrowed */
    size_t capacity;         /* parameters at most */
    size_t count;            /* parameters now */
    int64_t steps;           /* done */
    float *m, *v;            /* dev (capacity) each, v NULL for SGD; owned */
};

/* ERR_CONFIG names a setting out of range; ERR_RESOURCES. */
int MUST_USE optimizer_init(struct optimizer *optimizer, const struct optimizer_config *config, struct backend *backend,
                            size_t count, struct error *err);
void optimizer_release(struct optimizer *optimizer); /* accepts NULL and zeroed */
/* Moments and step count to zero: a new round, of count parameters, at most those of init. */
void optimizer_reset(struct optimizer *optimizer, size_t count);

/* parameters (count) updated in place by the mean or noised gradient (count), both of the backend's memory. */
void optimizer_step(struct optimizer *optimizer, const float *gradient, float *parameters);

#endif
