/*
 * One table of coarse operations per device: what the transformer's loops in model/ are written in.
 *
 * A struct backend is an opened device: kernels/cpu/backend.c (over the tables of kernels.h, one per instruction set)
 * or kernels/cuda/backend.cu. The loops know neither; they ask it for memory, for the layout that it wants, and run.
 *
 * Invariants
 * - Activations are struct rows: a pointer and a row stride in elements of backend->element (F32 or BF16). Sums are
 *   float32 inside every operation. What is not rows (gains, rstd, lse, losses, gradients, LoRA factors) is float32.
 * - "dev" in a comment: memory of backend->ops->alloc, which is host memory if backend->host_memory. Everything else is
 *   host memory. Operations are enqueued in order and may return before they are done; download() and sync() wait.
 * - No operation allocates device memory once warmed up, except the ones called _new.
 * - A row's, a segment's or an example's result has the same bits whatever its batchmates are and wherever in the batch
 *   it stands (kernels.h says why); attend() and group_forward in SERVE use are exempt.
 * - Training pads its row counts to backend_rows(), so that few recorded passes serve all batches; any count is taken.
 *   What padding rows hold never reaches another row.
 * - Wrong shapes are programmer errors (asserted). A device's failure during an operation is latched and comes back as
 *   the error of the next sync(): out of memory is ERR_RESOURCES.
 *
 * Threads: one backend is used by one thread at a time. Several backends may be open on one device.
 *
 *     struct backend *be;
 *     if (backend_cpu_new(kernels_cpu(KERNEL_AVX512_BF16), pool, KERNEL_BF16, &be, err) < 0) return err->code;
 *     be->ops->norm_forward(be, m, d, eps, gain, x, no_rows, xn, rstd);
 *     backend_free(be);
 */
#ifndef KERNELS_BACKEND_H
#define KERNELS_BACKEND_H

#include "base/gaussian.h"
#include "kernels/kernels.h"

struct backend;

struct rows {
    void *at;       /* dev; element type of the backend. NULL: none */
    int32_t stride; /* elements between rows */
};

#define BACKEND_GROUP_MAX 3
#define BACKEND_ALTERNATIVES_MAX 64 /* pieces of one kv in a pass */
#define BACKEND_NAME_SIZE 96

/* Linears that read the same input, placed on the device: q, k, v · o · gate, up · down. Their outputs are columns of
 * one matrix where backend->fused, and separate matrices where not. */
struct linear_group {
    int32_t count, in;
    int32_t out[BACKEND_GROUP_MAX];
    struct tensor w[BACKEND_GROUP_MAX];   /* as given: host memory, which must stay */
    const float *bias[BACKEND_GROUP_MAX]; /* dev (out), added to the outputs: group_new's caller sets it. NULL: none */
    void *placed;                         /* the backend's own */
};

/* LoRA factors on a group: y_i += scale·(x·Aᵢᵀ)·Bᵢᵀ. a[i] (rank, in), b[i] (out[i], rank), dev float32; NULL: not
 * adapted. The A of the adapted members are adjacent in memory, in order (model/lora.h). */
struct group_lora {
    int32_t rank;
    float scale;
    const float *a[BACKEND_GROUP_MAX], *b[BACKEND_GROUP_MAX];
};

/* TRAIN: lora_load was called with these factors. SERVE: factors at will, few rows go through a product that reads the
 * weights once. */
enum group_use { GROUP_TRAIN, GROUP_SERVE };

/* Packed sequences on the device: see segments_new. */
struct placed_segments {
    int32_t count_max, rows_max;
    int32_t count;          /* set by segments_set; offsets of the last set, host, borrowed until the next set */
    const int32_t *offsets; /* (count + 1) */
    void *placed;
};

/* Where a group's gradients go in an example's flat gradient. */
struct group_gradient {
    size_t a_offset[BACKEND_GROUP_MAX], b_offset[BACKEND_GROUP_MAX]; /* floats; only adapted members' are read */
    bool with_a, with_b;                                             /* which factors' gradients are wanted */
};

/* Label rows on the device: row rows[i] should predict targets[i]; weights[i] is the factor of its gradient. */
struct placed_labels {
    int32_t count;          /* padded rows: count ≤ these are computed, the rest ignored */
    const int32_t *targets; /* dev (count) */
    const float *weights;   /* dev (count) */
};

/* One sequence's keys and values on the device. */
struct kv;

/* A run of consecutive tokens of one sequence in a packed pass. */
struct kv_piece {
    struct kv *kv;
    int32_t start; /* position of its first token: the kv holds the positions below */
    int32_t count;
    int32_t row; /* its first row in the pass */
};

/* What the operations of one user (a training step, an answerer) will ask of the backend's work memory at most. */
struct backend_needs {
    int32_t rows;     /* of any operation over activations */
    int32_t width;    /* widest input or output of a linear, stacked LoRA ranks included */
    int32_t rank_max; /* largest LoRA rank in SERVE use */
    struct attention_shape shape;
    int32_t segment_rows;  /* longest segment */
    int32_t decode_length; /* longest sequence of attend(); 0: never called */
    int32_t label_rows, vocabulary, d_model;
    size_t arena;  /* n of clip_accumulate and clip_add */
    int32_t units; /* and their count */
    size_t summed; /* most values of a group's gradients where those of all rows are one sum; 0: they never are */
    bool noise;    /* of so many values too */
};

struct graph_cache; /* recorded passes, see run_recorded */

struct backend_ops {
    void (*free)(struct backend *be);

    /* --- memory ------------------------------------------------------------------------------------------------- */

    /* dev bytes, zeroed, aligned to 256. ERR_RESOURCES: the device or the limit is exhausted. */
    int (*alloc)(struct backend *be, size_t bytes, void **ret, struct error *err);
    void (*release)(struct backend *be, void *at); /* accepts NULL */
    /* Upload returns once `from` may be changed. Download waits for everything before it. */
    void (*upload)(struct backend *be, void *to, const void *from, size_t bytes);
    void (*download)(struct backend *be, void *to, const void *from, size_t bytes);
    void (*copy)(struct backend *be, void *to, const void *from, size_t bytes); /* dev to dev */
    void (*zero)(struct backend *be, void *at, size_t bytes);
    int (*sync)(struct backend *be, struct error *err); /* waits; 0 or the first latched failure */
    /* Bytes that alloc can still give, about. */
    size_t (*free_bytes)(struct backend *be);
    /* Work memory for these needs; before the first operation. ERR_RESOURCES, and then none of the backend's users may
     * go on without reserving again. trim gives all of it back: whoever goes on must reserve again. */
    int (*reserve)(struct backend *be, const struct backend_needs *needs, struct error *err);
    void (*trim)(struct backend *be);
    /* Runs record(ctx), which may only enqueue operations, or replays what an earlier call with the same cache and key
     * recorded: pointers, padded row counts and scalars must then be the same ones. key: 4 words of the caller's. */
    void (*run_recorded)(struct backend *be, struct graph_cache *cache, const uint64_t key[4],
                         void (*record)(void *ctx), void *ctx);
    struct graph_cache *(*graph_cache_new)(struct backend *be); /* may be NULL: nothing is recorded */
    void (*graph_cache_free)(struct backend *be, struct graph_cache *cache);

    /* --- weights ------------------------------------------------------------------------------------------------ */

    /* Before a model is placed: how many values its matrices have and how many bytes they take as they are. The device
     * decides whether to keep dense copies of quantised ones. ERR_RESOURCES: not even as they are. */
    int (*weights_fit)(struct backend *be, size_t values, size_t given_bytes, struct error *err);
    /* Places count linears over one input. rank_max: LoRA columns to reserve, the largest count·rank of TRAIN use.
     * ERR_CONFIG: shapes that the device cannot take; ERR_RESOURCES. */
    int (*group_new)(struct backend *be, int32_t count, const struct tensor *const w[], int32_t rank_max,
                     struct linear_group *ret, struct error *err);
    void (*group_free)(struct backend *be, struct linear_group *group); /* accepts zeroed */
    /* Groups that will be answered with, token by token: makes the copy of their weights that is read fastest and lets
     * the groups use it. Returns its memory, which must stay as long as the groups and go to release; NULL: there is
     * none, or no memory for one, and they are used as they are. The pointer is NULL where group_new does as well. */
    void *(*serving_copy)(struct backend *be, int32_t count, struct linear_group *const groups[]);
    /* Takes the factors of count groups for GROUP_TRAIN use; again after they changed. A rank of 0: none. */
    void (*lora_load)(struct backend *be, int32_t count, struct linear_group *const groups[],
                      const struct group_lora loras[]);

    /* y_i = x·Wᵢᵀ + biasᵢ + scale·(x·Aᵢᵀ)·Bᵢᵀ. x (m, in); h (m, adapted·rank) is written. Where backend->fused and in
     * TRAIN use, h are the columns behind x's (backend_lora_columns wide). lora NULL: none, h is not touched. */
    void (*group_forward)(struct backend *be, enum group_use use, const struct linear_group *group,
                          const struct group_lora *lora, int32_t m, struct rows x, const struct rows y[],
                          struct rows h);
    /* Only h = x·Aᵀ, as group_forward in TRAIN use writes it. */
    void (*lora_down)(struct backend *be, const struct linear_group *group, const struct group_lora *lora, int32_t m,
                      struct rows x, struct rows h);
    /* dx (m, in) overwritten, or at NULL. dh (m, adapted·rank) written if dx or with_dh; where fused, the columns
     * behind the last dy's. */
    void (*group_backward)(struct backend *be, const struct linear_group *group, const struct group_lora *lora,
                           int32_t m, const struct rows dy[], struct rows dh, bool with_dh, struct rows dx);
    /* Writes the gradients of each segment's rows into its own gradient (base + e·stride), zeros where it has none, or
     * the sum of all into base where stride is 0. x and dh are read only where with_a, h only where with_b. */
    void (*group_gradients)(struct backend *be, const struct linear_group *group, const struct group_lora *lora,
                            const struct placed_segments *segments, const struct rows dy[], struct rows h,
                            struct rows dh, struct rows x, const struct group_gradient *where, float *base,
                            size_t stride);

    /* --- rows --------------------------------------------------------------------------------------------------- */

    /* As kernels.h says, over rows; add.at NULL: none; rstd dev (m) or NULL. */
    void (*norm_forward)(struct backend *be, int32_t m, int32_t n, float eps, const float *gain, struct rows x,
                         struct rows add, struct rows y, float *rstd);
    void (*norm_backward)(struct backend *be, int32_t m, int32_t n, const float *gain, struct rows x, const float *rstd,
                          struct rows dy, struct rows dx, bool accumulate);
    /* The norms of each head of a row by itself: x, y, dy, dx (m, heads·head_size), gain (head_size), rstd dev (m,
     * heads), for the forward pass or NULL. dx may be dy; y is not x. */
    void (*head_norm_forward)(struct backend *be, int32_t m, int32_t heads, int32_t head_size, float eps,
                              const float *gain, struct rows x, struct rows y, float *rstd);
    void (*head_norm_backward)(struct backend *be, int32_t m, int32_t heads, int32_t head_size, const float *gain,
                               struct rows x, const float *rstd, struct rows dy, struct rows dx);
    void (*rope)(struct backend *be, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
                 enum rope_order order, bool inverse, const float *table, const int32_t *positions, struct rows x);
    void (*gated_forward)(struct backend *be, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                          struct rows up, struct rows out);
    /* In place: gate and up become their gradients. */
    void (*gated_backward)(struct backend *be, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                           struct rows up, struct rows dout);
    /* y = scale·table[ids]; table is a group of one (the head, where tied). ids dev (m). */
    void (*embed)(struct backend *be, int32_t m, const struct linear_group *table, const int32_t *ids, float scale,
                  struct rows y);
    /* to[i] = from[index[i]], i < m; an index below 0 gives zeros. to and from do not overlap. index dev (m). */
    void (*gather)(struct backend *be, int32_t m, int32_t width, const int32_t *index, struct rows from,
                   struct rows to);

    /* --- attention ---------------------------------------------------------------------------------------------- */

    /* ERR_CONFIG: more rows or segments than the device takes at once; ERR_RESOURCES. */
    int (*segments_new)(struct backend *be, int32_t rows_max, int32_t count_max, struct placed_segments *ret,
                        struct error *err);
    void (*segments_free)(struct backend *be, struct placed_segments *segments);
    void (*segments_set)(struct backend *be, struct placed_segments *segments, int32_t count, const int32_t *offsets);

    /* Causal within each segment; lse dev (m, heads) or NULL. m: padded rows. Rows outside all segments: unspecified.
     */
    void (*attention_forward)(struct backend *be, const struct attention_shape *shape,
                              const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                              struct rows v, struct rows o, float *lse);
    void (*attention_backward)(struct backend *be, const struct attention_shape *shape,
                               const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                               struct rows v, struct rows o, const float *lse, struct rows do_, struct rows dq,
                               struct rows dk, struct rows dv);

    /* Room for length_max tokens of `layers` layers. ERR_RESOURCES. */
    int (*kv_new)(struct backend *be, int32_t layers, int32_t kv_heads, int32_t head_size, int32_t length_max,
                  struct kv **ret, struct error *err);
    void (*kv_free)(struct backend *be, struct kv *kv); /* accepts NULL */
    void (*kv_copy)(struct backend *be, struct kv *to, const struct kv *from, int32_t length);
    /* The pieces of the pass that the next attend() calls are about. Pieces of one kv stand together; those that start
     * at the same position are alternatives, done one after the other. Returns a word for the key of run_recorded. */
    uint64_t (*pieces_set)(struct backend *be, const struct kv_piece *pieces, int32_t count);
    /* Stores the pieces' keys and values at their positions, and each row attends to its sequence's earlier tokens and
     * itself. q, o (m, heads·size), k, v (m, kv_heads·size); with q.at NULL it only stores. */
    void (*attend)(struct backend *be, const struct attention_shape *shape, int32_t layer, struct rows q, struct rows k,
                   struct rows v, struct rows o);

    /* --- the head ----------------------------------------------------------------------------------------------- */

    /* losses dev (count); dx (count, in) or at NULL: row i of x is label row i. As kernels.h's cross_entropy. */
    void (*cross_entropy)(struct backend *be, const struct linear_group *head, const struct placed_labels *labels,
                          struct rows x, float *losses, struct rows dx);
    /* logits (m, vocabulary) host, m ≤ KERNEL_DECODE_ROWS; waits. */
    void (*logits)(struct backend *be, const struct linear_group *head, int32_t m, struct rows x, float *logits);
    /* ids (m) host: where each row of the logits is largest, the smallest id among equals; waits as logits does, but
     * for m numbers. NULL where logits are the host's anyway. */
    void (*likeliest)(struct backend *be, const struct linear_group *head, int32_t m, struct rows x, int32_t *ids);

    /* --- arenas: dev arrays of n values ------------------------------------------------------------------------- */

    /* For each unit e < count: clip_accumulate (kernels.h) of g + e·stride into sum. results (count) host or NULL; with
     * results it waits. */
    void (*clip_accumulate)(struct backend *be, size_t n, int32_t count, const float *g, size_t stride,
                            const struct clip_params *params, int64_t *sum, struct clip_result *results);
    /* Without the grid, for jobs without DP: sum += g·min(1, clip/‖g‖) for each unit; units with NaN or infinity add
     * nothing. */
    void (*clip_add)(struct backend *be, size_t n, int32_t count, const float *g, size_t stride, double clip,
                     float *sum);
    void (*add)(struct backend *be, size_t n, const float *b, float *a);                           /* a += b */
    void (*scale_sum)(struct backend *be, size_t n, const int64_t *sum, double scale, float *out); /* out = scale·sum */
    void (*divide)(struct backend *be, size_t n, double denominator, float *a); /* a /= denominator */
    /* Noise: begins drawing vector `number` under `key` (32 bytes, read before it returns) of privacy/noise_vector.h,
     * with the same bits, beside whatever else runs; noise_add adds it to sum (n as begun) and wipes it. One at a time.
     * Both NULL where noise is the caller's to draw (on the CPU). A failed draw is latched: nothing may be released. */
    void (*noise_begin)(struct backend *be, const uint8_t key[32], uint32_t number, const struct gaussian *gaussian,
                        size_t n);
    void (*noise_add)(struct backend *be, size_t n, int64_t *sum);
    void (*adamw)(struct backend *be, size_t n, const struct adamw_params *params, const float *g, float *m, float *v,
                  float *p);
    void (*sgd_momentum)(struct backend *be, size_t n, float lr, float momentum, const float *g, float *m, float *p);
};

struct backend {
    const struct backend_ops *ops;
    char name[BACKEND_NAME_SIZE]; /* "avx512-bf16", "cuda:0 NVIDIA H100 …" */
    enum tensor_type element;     /* of struct rows: TENSOR_F32 or TENSOR_BF16 */
    bool host_memory;             /* dev memory is host memory */
    bool tuned;                   /* how to compute is chosen by timing at first use: train.c warms up */
    bool fused;                   /* a group's outputs, and LoRA's h and dh behind them, are columns of one matrix */
    int32_t width_multiple;       /* widths of matrices must be multiples of this */
    int32_t row_multiple;         /* row counts are padded to a multiple of this */
    int threads;                  /* of the CPU */
};

static inline void backend_free(struct backend *be) /* accepts NULL */
{
    if (be)
        be->ops->free(be);
}

/* Adapted members × rank: the columns of h. */
static inline int32_t group_stacked_rank(const struct linear_group *group, const struct group_lora *lora)
{
    int32_t adapted = 0;
    for (int32_t i = 0; lora && i < group->count; i++)
        adapted += lora->a[i] != NULL;
    return lora ? adapted * lora->rank : 0;
}

/* The adapted members' A, one under the other: their first one's. */
static inline const float *group_stacked_a(const struct linear_group *group, const struct group_lora *lora)
{
    for (int32_t i = 0; i < group->count; i++)
        if (lora->a[i])
            return lora->a[i];
    return NULL;
}

static inline int32_t backend_rows(const struct backend *be, int32_t m)
{
    return (m + be->row_multiple - 1) / be->row_multiple * be->row_multiple;
}

static inline size_t backend_element_bytes(const struct backend *be)
{
    return be->element == TENSOR_BF16 ? 2 : 4;
}

/* Columns that LoRA takes behind a fused matrix: whole steps of a product over bfloat16, so that its rows stay aligned
 * and the products with them as fast as without. */
static inline int32_t backend_lora_columns(int32_t rank)
{
    return (rank + 63) / 64 * 64;
}

/* The view of x from column `column` on. */
static inline struct rows rows_from(const struct backend *be, struct rows x, int32_t column)
{
    x.at = (uint8_t *)x.at + (size_t)column * backend_element_bytes(be);
    return x;
}

/* ops, pool (borrowed; NULL: the calling thread) and precision as in kernels.h. Scratch grows with what it is asked to
 * do, at the _new calls and at first use. ERR_RESOURCES. */
int MUST_USE backend_cpu_new(const struct kernel_ops *ops, struct pool *pool, enum kernel_precision precision,
                             struct backend **ret_backend, struct error *err);

struct backend_cuda_options {
    int device;                      /* ordinal among the visible ones */
    enum kernel_precision precision; /* KERNEL_BF16: rows are bfloat16; KERNEL_F32: float32 */
    size_t memory_limit_bytes;       /* 0: what the card has free */
    bool quantise_kv;                /* keys and values of sequences as 8-bit integers, a scale a head and token */
    bool keep_quantised;             /* decode quantised weights at each use, even where their bfloat16 copies fit */
    bool tune;  /* choose the products' algorithms by timing them: faster, and another run's bits */
    bool eager; /* record nothing: for debugging */
};

bool backend_cuda_built(void); /* whether this build can open a device at all */
/* Opens a device. A message says in plain words why not: ERR_NOT_FOUND no build with CUDA, no driver or no such device;
 * ERR_CONFIG the card is too old; ERR_RESOURCES. Built without CUDA, it exists and always answers ERR_NOT_FOUND. */
int MUST_USE backend_cuda_new(const struct backend_cuda_options *options, struct backend **ret_backend,
                              struct error *err);

#endif
