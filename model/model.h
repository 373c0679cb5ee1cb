/*
 * A frozen base model: its hyper-parameters and its tensors, which are borrowed memory (a mapped GGUF file or a heap
 * block). A loader fills struct model and calls model_validate(); everything else in model/ takes validated models
 * only.
 *
 * All architectures are one transformer with parts that are there or not (struct model_config): RMS norms before each
 * block, and after it where post_norms; rotary positions over the first `rotated` values of a head, in either order;
 * grouped heads, with biases or norms of q and k; sliding windows in some layers; a gated feed-forward block.
 *
 *     llama   (SmolLM2, Llama 3)  none of the options. GGUF files hold the rows of q and k permuted for NORM order; the
 *                                 Hugging Face layout is NEOX order: rope_order says which one a struct model holds
 *     qwen2   qkv_bias            qwen3   qk_norm, a head_size of its own
 *     gemma3  qk_norm, post_norms, windows with a rotary base of their own, tanh-approximated GELU, scaled embedding
 *     glm4    qkv_bias (9B), post_norms, half of each head rotated (NORM order), gate and up as one matrix
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
#include "base/span.h"
#include "kernels/kernels.h"

#define MODEL_LAYERS_MAX 128
#define MODEL_WIDTH_MAX 65536 /* d_model, d_ff, heads·head_size */
#define MODEL_VOCABULARY_MAX (1 << 20)
#define MODEL_CONTEXT_MAX (1 << 20)
#define MODEL_HEAD_SIZE_MAX 256

enum model_architecture { MODEL_LLAMA = 1, MODEL_QWEN2, MODEL_QWEN3, MODEL_GEMMA3, MODEL_GLM4 };
#define MODEL_ARCHITECTURE_COUNT 5

struct model_config {
    enum model_architecture architecture;
    int32_t layer_count;
    int32_t d_model; /* width of the residual stream */
    int32_t head_count;
    int32_t kv_head_count; /* divides head_count */
    int32_t head_size;     /* a multiple of 16 */
    int32_t rotated;       /* leading values of a head that are rotated, even; 0: all */
    int32_t d_ff;
    int32_t vocabulary;
    int32_t context_length; /* positions that the model was made for */
    enum rope_order rope_order;
    double rope_base;
    double rope_scale;        /* divides the positions' angles; 1: none */
    int32_t window;           /* tokens that a row of a sliding layer sees, itself included; 0: no layer slides */
    int32_t window_period;    /* the layers period − 1, 2·period − 1, … see everything, the others slide */
    double rope_base_sliding; /* of the sliding layers, whose scale is 1; 0: they are rotated as the others */
    double attention_scale;   /* of q·k; 0: 1/√head_size */
    double embedding_scale;   /* of the embedded tokens; 0: 1 */
    enum gate_kind gate;
    bool qkv_bias;      /* q_bias, k_bias, v_bias */
    bool qk_norm;       /* q_norm, k_norm: each head's q and k are normalised before they are rotated */
    bool post_norms;    /* attn_post_norm, ffn_post_norm: of a block's output, before it joins the residual stream */
    bool fused_gate_up; /* up holds gate's rows and then up's: (2·d_ff, d_model); gate is absent */
    float norm_eps;
};

/* Matrices (out, in) as the kernels want them. Norms (gains, in d_model; q_norm and k_norm head_size) and biases (in
 * the linear's outputs) are vectors: type TENSOR_F32, out 1, 4-byte aligned. What the configuration has not is zeroed.
 */
struct model_layer {
    struct tensor attn_norm, q, k, v, o;
    struct tensor q_bias, k_bias, v_bias, q_norm, k_norm, attn_post_norm;
    struct tensor ffn_norm, gate, up, down, ffn_post_norm;
};

struct model {
    struct model_config config;
    struct tensor token_embd;  /* (vocabulary, d_model) */
    struct tensor output_norm; /* gain */
    struct tensor output;      /* (vocabulary, d_model), or data NULL: the head is tied to token_embd */
    struct tensor rope_freqs;  /* TENSOR_F32 (1, rotated/2) dividing each frequency (llama 3), or data NULL */
    struct model_layer layers[MODEL_LAYERS_MAX]; /* the first layer_count are used */
    struct span
        map; /* of base/file.h, in which the matrices lie, lent so that its pages may rest; empty: other memory */
};

/* Checks the hyper-parameters against the bounds above and every tensor's type, shape and alignment against them (a
 * loader sees to it that the data lies within the file). ERR_INTEGRITY names the tensor, its shape and the expected. */
int MUST_USE model_validate(const struct model *model, struct error *err);

/* "llama", "qwen2", "qwen3", "gemma3", "glm4": general.architecture of GGUF files. Parsing: false for another name. */
const char *model_architecture_name(enum model_architecture architecture);
bool MUST_USE model_architecture_parse(const char *name, enum model_architecture *ret_architecture);

/* The zeroes of the configuration filled in. */
static inline int32_t model_rotated(const struct model_config *config)
{
    return config->rotated ? config->rotated : config->head_size;
}
double model_attention_scale(const struct model_config *config);
static inline float model_embedding_scale(const struct model_config *config)
{
    return config->embedding_scale > 0 ? (float)config->embedding_scale : 1.0f;
}
static inline bool model_layer_slides(const struct model_config *config, int32_t layer)
{
    return config->window > 0 && (layer + 1) % config->window_period != 0;
}

/* The head's matrix: output, or token_embd if tied. */
const struct tensor *model_head(const struct model *model);

/* Multiply-add weights a token meets: all matrices but the embedding look-up, the head included. */
size_t model_weight_count(const struct model *model);

/* The values of a norm or bias; NULL if it is absent. */
static inline const float *model_vector(const struct tensor *vector)
{
    return vector->data;
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
