/* Tiny random models for the tests: the same weights as tests/golden/make_models.py computes, and its files' reader. */
#ifndef TESTS_MODEL_TINY_H
#define TESTS_MODEL_TINY_H

#include "kernels/backend.h"
#include "model/batch.h"
#include "model/lora.h"
#include "model/model.h"

struct tiny {
    struct model model;
    float *memory;
};

#define TINY_CONFIG                                                                                                    \
    ((struct model_config){.architecture = MODEL_LLAMA,                                                                \
                           .layer_count = 3,                                                                           \
                           .d_model = 64,                                                                              \
                           .head_count = 4,                                                                            \
                           .kv_head_count = 2,                                                                         \
                           .head_size = 16,                                                                            \
                           .d_ff = 96,                                                                                 \
                           .vocabulary = 128,                                                                          \
                           .context_length = 64,                                                                       \
                           .rope_order = ROPE_NORM,                                                                    \
                           .rope_base = 100000,                                                                        \
                           .rope_scale = 1,                                                                            \
                           .norm_eps = 1e-5f})

void tiny_init(struct tiny *tiny, const struct model_config *config, bool tied);
void tiny_release(struct tiny *tiny);
void tiny_lora(struct lora *lora, const struct lora_config *config, const struct model *model);

/* count values of make_models.py's value(tensor, count, scale) + offset */
void tiny_values(uint32_t tensor, size_t count, float scale, float offset, float *out);

struct golden {
    struct model_config config;
    struct lora_config lora;
    bool tied;
    int32_t examples, tokens;
    int32_t *offsets, *ids;
    uint8_t *learn;
    double *losses;
    float *logits;    /* (tokens, vocabulary) */
    float *gradients; /* (examples, trained) */
    size_t trained;
    uint8_t *memory;
};

/* The files, tests/golden/ARCHITECTURE_CASE.golden; NULL after the last. */
extern const char *const golden_files[];

/* Ends the program with a message if the file is missing or malformed. */
void golden_read(struct golden *golden, const char *path);
void golden_release(struct golden *golden);
void golden_batch(const struct golden *golden, struct batch *batch);

/* The instruction sets that this machine runs, weakest first; returns how many. */
int tiny_tables(const struct kernel_ops *ret[4]);

/* A CPU backend; ends the program when out of memory. */
struct backend *tiny_backend(enum kernel_isa at_most, struct pool *pool, enum kernel_precision precision);

#endif
