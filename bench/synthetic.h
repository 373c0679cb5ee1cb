/* A model of SmolLM2-135M's shape with random weights: speed does not depend on what they are. */
#ifndef BENCH_SYNTHETIC_H
#define BENCH_SYNTHETIC_H

#include "model/lora.h"
#include "model/model.h"

struct synthetic {
    struct model model;
    struct model_shadow shadow; /* its bfloat16 copy, if asked for */
    void *memory;
};

/* Matrices of Q4_1 blocks, the embedding Q8_0, as in the published file. Ends the program when out of memory. */
void synthetic_init(struct synthetic *s, bool shadow);
void synthetic_release(struct synthetic *s);
/* The one to use: the copy if there is one. */
const struct model *synthetic_model(const struct synthetic *s);

/* A is filled and B made small and random, so that no product is by zero. */
void synthetic_lora(struct lora *lora, const struct lora_config *config, const struct model *model);

double now_seconds(void);
uint32_t next_random(uint64_t *state);

#endif
