/*
 * Models of well-known shapes with random weights: speed does not depend on what they are, as long as activations and
 * gradients stay finite and products are not by zero.
 *
 *     struct synthetic s;
 *     synthetic_init_shape(&s, synthetic_shape_find("llama-3.2-1b"), TENSOR_BF16);
 *     ... synthetic_model(&s) ...
 *     synthetic_release(&s);
 */
#ifndef BENCH_SYNTHETIC_H
#define BENCH_SYNTHETIC_H

#include "model/lora.h"
#include "model/model.h"

struct synthetic_shape {
    const char *name; /* "smollm2-135m" */
    struct model_config config;
    bool tied; /* the head is the embedding */
};

struct synthetic {
    struct model model;
    struct model_shadow shadow; /* its bfloat16 copy, if asked for */
    void *memory;
};

/* NULL: no such name. synthetic_shape_names is what a usage text lists, separated by spaces. */
const struct synthetic_shape *synthetic_shape_find(const char *name);
extern const char synthetic_shape_names[];

/* matrices: TENSOR_BF16 or TENSOR_F32 (the embedding and the head too), or TENSOR_Q4_1, TENSOR_Q4_K (where the rows do
 * not take its blocks, TENSOR_Q5_0) or TENSOR_Q8_0 (embedding and head are then Q8_0). Where the weights would take
 * more than SYNTHETIC_MEMORY_MAX bytes, all layers point at one layer's matrices, and a head of its own at the
 * embedding's: a device's copies are as many as ever, and neither the host's memory nor the time to fill it grows with
 * the depth. Ends the program when out of memory, or if a type's blocks do not fit the shape. */
#define SYNTHETIC_MEMORY_MAX ((size_t)512 << 20)
void synthetic_init_shape(struct synthetic *s, const struct synthetic_shape *shape, enum tensor_type matrices);

/* SmolLM2-135M with matrices of Q4_1 blocks, the embedding Q8_0, as in the published file. */
void synthetic_init(struct synthetic *s, bool shadow);

void synthetic_release(struct synthetic *s);
/* The one to use: the copy if there is one. */
const struct model *synthetic_model(const struct synthetic *s);

/* A is filled and B made small and random, so that no product is by zero. */
void synthetic_lora(struct lora *lora, const struct lora_config *config, const struct model *model);

double now_seconds(void);
uint32_t next_random(uint64_t *state);

#endif
