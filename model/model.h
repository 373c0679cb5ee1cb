/*
 * A frozen base model: its hyper-parameters and its tensors, which are borrowed memory (a mapped GGUF file or a heap
 * block). A loader fills struct model and calls model_validate(); everything else in model/ takes validated models
 * only.
 *
 * The one architecture is llama (SmolLM2 is one): pre-norm RMS, rotary positions in NORM (interleaved) order as in
 * llama's GGUF files, whose q and k rows are permuted for it relative to Hugging Face; grouped heads; SiLU gate.
 *
 * Immutable once validated, so any number of threads may share one.
 *
 *     struct model model = {.config = {.architecture = MODEL_LLAMA, .layer_count = 30, ...}};
 *     model.layers[0].q = (struct tensor){data, TENSOR_Q4_1, 576, 576};
 *     if (model_validate(&model, err) < 0) return err->code;
 */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include "base/error.h"
#include "kernels/kernels.h"

#define MODEL_LAYERS_MAX 128
#define MODEL_WIDTH_MAX 65536 /* d_model, d_ff, heads·head_size */
#define MODEL_VOCABULARY_MAX (1 << 20)
#define MODEL_CONTEXT_MAX (1 << 20)
#define MODEL_HEAD_SIZE_MAX 256

enum model_architecture { MODEL_LLAMA = 1 };

struct model_config {
    enum model_architecture architecture;
    int32_t layer_count;
    int32_t d_model; /* width of the residual stream */
    int32_t head_count;
    int32_t kv_head_count; /* divides head_count */
    int32_t head_size;     /* a multiple of 16 */
    int32_t d_ff;
    int32_t vocabulary;
    int32_t context_length; /* positions that the model was made for */
    enum rope_order rope_order;
    double rope_base;
    double rope_scale; /* divides the positions' angles; 1: none */
    float norm_eps;
};

/* Matrices (out, in) as the kernels want them. The norms are gains: type TENSOR_F32, out 1, in d_model, 4-byte aligned.
 */
struct model_layer {
    struct tensor attn_norm, q, k, v, o;
    struct tensor ffn_norm, gate, up, down;
};

struct model {
    struct model_config config;
    struct tensor token_embd;  /* (vocabulary, d_model) */
    struct tensor output_norm; /* gain */
    struct tensor output;      /* (vocabulary, d_model), or data NULL: the head is tied to token_embd */
    struct tensor rope_freqs;  /* TENSOR_F32 (1, head_size/2) dividing each frequency (llama 3), or data NULL */
    struct model_layer layers[MODEL_LAYERS_MAX]; /* the first layer_count are used */
};

/* Checks the hyper-parameters against the bounds above and every tensor's type, shape and alignment against them (a
 * loader sees to it that the data lies within the file). ERR_INTEGRITY names the tensor, its shape and the expected. */
int MUST_USE model_validate(const struct model *model, struct error *err);

/* The head's matrix: output, or token_embd if tied. */
const struct tensor *model_head(const struct model *model);

/* Multiply-add weights a token meets: all matrices but the embedding look-up, the head included. */
size_t model_weight_count(const struct model *model);

/* The gain of a norm tensor. */
static inline const float *model_gain(const struct tensor *norm)
{
    return norm->data;
}

/* A copy of the model whose matrices are held as bfloat16 on the heap: no decoding of quantised blocks at each step, at
 * 2 bytes a weight. The copy still borrows the original's norms. The products in KERNEL_BF16 precision give the same
 * bits with either. */
struct model_shadow {
    struct model model; /* valid while the original's memory is */
    void *memory;       /* owned */
};
int MUST_USE model_shadow_init(struct model_shadow *shadow, const struct model *model, struct error *err);
void model_shadow_release(struct model_shadow *shadow); /* accepts NULL and zeroed */
size_t model_shadow_bytes(const struct model *model);

#endif
