/*
 * The compute operations of training, decoding and differential privacy: one table of function pointers per backend.
 *
 * Invariants
 * - Matrices are dense row-major float32 unless a struct tensor is named; shapes are in comments as (rows, columns).
 *   M is the number of token rows of a packed batch. Pointers need no alignment beyond their type's.
 * - No operation allocates or does I/O. Temporary memory is run->scratch, 64-byte aligned, of at least the bytes that
 *   the kernels_*_scratch function of that operation gives (operations without one need none): take the maximum once.
 * - **A row's result does not depend on its batchmates**: for each operation but linear_decode and attention_decode,
 *   a row's (or a segment's, for attention) output bits are the same whatever M is, wherever in the batch it stands and
 *   whatever the other rows hold, for one table, one precision and any number of threads. The exact sensitivity of
 *   DP-SGD rests on it; tests/kernels checks it.
 * - Wrong shapes are programmer errors (asserted): parsers check outside data before it gets here.
 * - Outputs do not overlap inputs unless the comment says "in place".
 *
 * Threads: an operation uses run->pool. Different runs may be used at the same time; one run by one thread at a time.
 *
 *     const struct kernel_ops *ops = kernels_cpu(KERNEL_AVX512_BF16);
 *     size_t bytes = kernels_linear_scratch(pool_threads(pool), rows_max, out_max, in_max);
 *     struct kernel_run run = {.pool = pool, .scratch = memory, .scratch_bytes = bytes, .precision = KERNEL_F32};
 *     ops->linear_forward(&run, M, &wq, NULL, NULL, x, q, false);
 */
#ifndef KERNELS_KERNELS_H
#define KERNELS_KERNELS_H

#include "base/error.h"
#include "kernels/pool.h"
#include "kernels/tensor.h"

enum kernel_isa { KERNEL_SCALAR, KERNEL_AVX2, KERNEL_AVX512, KERNEL_AVX512_VNNI, KERNEL_AVX512_BF16 };
#define KERNEL_ISA_BEST KERNEL_AVX512_BF16

/* What the products with frozen weights (linear_forward, linear_backward, cross entropy) multiply in; sums are always
 * float32, and so are linear_decode and the LoRA path. KERNEL_BF16 rounds both operands:
 * - KERNEL_AVX512_BF16 to bfloat16;
 * - KERNEL_AVX512_VNNI to whole steps of the largest magnitude in each run of 128 along the summed dimension, from its
 *   start: 8191 steps for x and dy, 2047 for weights. Runs all below 1e-30 become zeros. Under half bfloat16's error;
 * - other tables compute F32 instead. */
enum kernel_precision { KERNEL_F32, KERNEL_BF16 };

struct kernel_run {
    struct pool *pool; /* NULL: the calling thread */
    void *scratch;
    size_t scratch_bytes;
    enum kernel_precision precision;
};

enum rope_order {
    ROPE_NORM, /* pairs (2i, 2i + 1): llama GGUF, glm4 */
    ROPE_NEOX, /* pairs (i, i + rotated/2): qwen2, qwen3, gemma3 */
};

enum gate_kind { GATE_SILU, GATE_GELU_TANH };

struct attention_shape {
    int32_t heads;
    int32_t kv_heads;  /* divides heads */
    int32_t head_size; /* a multiple of 16, at most 256 */
    int32_t window;    /* 0: all earlier tokens; w: row t sees keys t-w+1 .. t */
    float scale;       /* of q·k, usually 1/√head_size */
};

/* Packed sequences: segment s has the rows offsets[s] .. offsets[s+1]-1; rows see only their own segment. */
struct segments {
    int32_t count;
    const int32_t *offsets; /* (count + 1), ascending from 0 */
};

/* Rows that carry a label: hidden row rows[i] should predict token targets[i]. Distinct rows. */
struct labels {
    int32_t count;
    const int32_t *rows;    /* (count); NULL: row i is label i's */
    const int32_t *targets; /* (count), each < vocabulary */
    const float *weights;   /* (count) factor of the row's gradient; NULL: 1. Not used by the loss outputs */
};

struct clip_params {
    double clip; /* C, > 0: the L2 bound of a unit after rounding, in gradient units */
    /* g: integer steps per gradient unit; clip·grid ≤ 2^30, and clip > √n/(2·grid). Choose a whole clip·grid: the
     * check uses the whole number below it. */
    double grid;
};

struct clip_result {
    double norm;     /* ‖g‖ before clipping; 0 if not finite */
    double factor;   /* c that was applied; 0 if not finite */
    bool finite;     /* false: NaN or infinity was found and the unit contributed zeros */
    bool clipped;    /* c < 1 */
    int32_t shrinks; /* times that the exact check made c smaller; 0 in practice */
};

/* A product of thin matrices, float32, that is added to another one: scale·rows·columnsᵀ to a linear_forward, whose
 * columns are LoRA's B (out, rank), scale·rows·columns to a linear_backward, whose columns are A (rank, in). */
struct low_rank {
    int32_t rank;
    float scale;
    const float *rows; /* (M, rank), `stride` floats apart */
    int32_t stride;
    const float *columns;
};

/* One of linear_decode's products: y = x·Wᵀ + bias + scale·h·Bᵀ. */
struct served_linear {
    const struct tensor *w;
    const float *bias; /* (w->out) or NULL */
    float *y;          /* (m, w->out) */
    const float *b;    /* LoRA's B (w->out, rank) or NULL: none */
    const float *h;    /* (m, rank) with rows h_stride floats apart: x·Aᵀ */
    int32_t rank, h_stride;
    float scale;
};

struct adamw_params {
    float lr, beta1, beta2, eps, weight_decay;
    int64_t step; /* of this update, from 1 */
};

struct kernel_ops {
    const char *name; /* of kernel_isa_name */
    enum kernel_isa isa;

    /* --- products with frozen weights -------------------------------------------------------- linear scratch --- */

    /* y = x·Wᵀ + bias + low, or y += … if accumulate. x (M, in), W (out, in), bias (out) or NULL, y (M, out); low NULL:
     * none. With low it is lora_up as well, while y is at hand. */
    void (*linear_forward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const float *bias,
                           const struct low_rank *low, const float *x, float *y, bool accumulate);
    /* dx = dy·W + low, or dx += … if accumulate. dy (M, out), dx (M, in). With low it is lora_down_backward as well. */
    void (*linear_backward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const struct low_rank *low,
                            const float *dy, float *dx, bool accumulate);
    /* The forward products of few rows (decoding, 1 ≤ m ≤ KERNEL_DECODE_ROWS) with `count` matrices of the same width:
     * reads each once. Sums in another order than linear_forward. Also the logits of a row. */
    void (*linear_decode)(const struct kernel_run *run, int32_t m, int32_t count, const struct served_linear *linears,
                          const float *x);
    /* A copy of W for answering: with w->interleaved = to, linear_decode reads only it, at the memory's speed, and
     * linear_forward takes it too, with the same bits as from data. `to` has interleaved_bytes and is best aligned to
     * 64; 0 bytes: this table reads the type as it is, and interleave must not be called. No scratch. */
    size_t (*interleaved_bytes)(const struct tensor *w);
    void (*interleave)(const struct kernel_run *run, const struct tensor *w, void *to);

    /* --- LoRA: y += s·(x·Aᵀ)·Bᵀ. A (r, in), B (out, r) float32 ------------------------------- linear scratch --- */

    /* h = x·Aᵀ. x (M, in), h (M, r). Stack the A of layers that share x: r is then the sum (up to 1024). */
    void (*lora_down)(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a, const float *x,
                      float *h);
    /* y += s·h·Bᵀ. h (M, r) with rows h_stride ≥ r floats apart, y (M, out). */
    void (*lora_up)(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                    const float *h, int32_t h_stride, float *y);
    /* dh = s·dy·B. dy (M, out), dh (M, r) with rows dh_stride ≥ r apart. */
    void (*lora_up_backward)(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                             const float *dy, float *dh, int32_t dh_stride);
    /* dx += dh·A. dh (M, r) dense (stacked as in lora_down), dx (M, in). */
    void (*lora_down_backward)(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a,
                               const float *dh, float *dx);
    /* Gradients of one unit's rows [t0, t1): gb (out, r) += s·Σ dy_t h_tᵀ and ga (r, in) += Σ dh_t x_tᵀ (dh as above
     * already carries s). Sums run over t in order, from t0. */
    void (*lora_grad_b)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t out, int32_t r, float s,
                        const float *dy, const float *h, int32_t h_stride, float *gb);
    void (*lora_grad_a)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t in, int32_t r, const float *dh,
                        int32_t dh_stride, const float *x, float *ga);

    /* --- rows ---------------------------------------------------------------------------------- no scratch --- */

    /* If add is not NULL, x += add first (in place: the residual stream). Then rstd = 1/√(mean(x²) + eps),
     * y = x·rstd·gain. x, add, y (M, n); gain (n); rstd (M) or NULL. q/k norms: M·heads rows of head_size. */
    void (*rmsnorm_forward)(const struct kernel_run *run, int32_t m, int32_t n, float eps, const float *gain, float *x,
                            const float *add, float *y, float *rstd);
    /* dx = dL/dx given dy (gain frozen), or dx += … if accumulate. x as it was normalised. dx may be dy (in place, not
     * with accumulate). */
    void (*rmsnorm_backward)(const struct kernel_run *run, int32_t m, int32_t n, const float *gain, const float *x,
                             const float *rstd, const float *dy, float *dx, bool accumulate);

    /* In place: rotates the first `rotated` values (even) of each head by its row's position; inverse rotates back,
     * which is the backward pass. x (M, heads, head_size); positions (M), each < the table's rows; table from
     * kernels_rope_table. */
    void (*rope)(const struct kernel_run *run, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
                 enum rope_order order, bool inverse, const float *table, const int32_t *positions, float *x);

    /* out = act(gate)·up. gate, up (M, n) with rows gate_stride floats apart (fused gate‖up: gate = g, up = g + n,
     * stride 2n); out (M, n) dense, may be gate if gate_stride is n. */
    void (*gated_forward)(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, const float *gate,
                          const float *up, int32_t gate_stride, float *out);
    /* In place: replaces gate by dL/dgate and up by dL/dup, given dout (M, n). */
    void (*gated_backward)(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, float *gate,
                           float *up, int32_t gate_stride, const float *dout);

    /* y = scale·W[ids]. y (M, in), ids (M) each < w->out. */
    void (*embed)(const struct kernel_run *run, int32_t m, const struct tensor *w, const int32_t *ids, float scale,
                  float *y);

    /* a += b, over n values. */
    void (*add)(const struct kernel_run *run, size_t n, const float *b, float *a);

    /* --- attention ------------------------------------------------------------------------ attention scratch --- */

    /* Causal within each segment. q, o (M, heads·head_size); k, v (M, kv_heads·head_size); lse (M, heads): the log of
     * the sum of exponentials, for the backward pass (NULL if none follows). */
    void (*attention_forward)(const struct kernel_run *run, const struct attention_shape *shape,
                              const struct segments *segments, const float *q, const float *k, const float *v, float *o,
                              float *lse);
    /* Writes dq, dk, dv (not accumulated) from do_. */
    void (*attention_backward)(const struct kernel_run *run, const struct attention_shape *shape,
                               const struct segments *segments, const float *q, const float *k, const float *v,
                               const float *o, const float *lse, const float *do_, float *dq, float *dk, float *dv);
    /* The last `rows` of `length` tokens of one sequence against its cache, which already holds their keys and values.
     * q, o (rows, heads·head_size); k, v (length, kv_heads·head_size) with rows kv_stride floats apart. Row i is at
     * position length - rows + i. */
    void (*attention_decode)(const struct kernel_run *run, const struct attention_shape *shape, int32_t rows,
                             int32_t length, const float *q, const float *k, const float *v, int32_t kv_stride,
                             float *o);

    /* --- the head ------------------------------------------------------------------------------- head scratch --- */

    /* Softmax cross entropy of the label rows: losses[i] = −log softmax(x[rows[i]]·Wᵀ)[targets[i]] (natural log), and,
     * unless dx is NULL, dx[rows[i]] = weights[i]·dlosses[i]/dx. x, dx (M, in); W (vocabulary, in); losses (count).
     * Rows of dx without a label are untouched: zero it first. Also the scoring of given tokens (dx NULL). */
    void (*cross_entropy)(const struct kernel_run *run, const struct tensor *w, const struct labels *labels,
                          const float *x, float *losses, float *dx);

    /* --- differential privacy and the optimizers, over one flat arena of n values ---------------- no scratch --- */

    /* One privacy unit: c = min(1, C'/‖g‖) with C' = C − √n/(2·grid); rounds c·grid·g to the nearest integers (ties to
     * even); checks Σ v² ≤ (grid·C)² exactly in integers, shrinking c and rounding anew if it fails; adds v to sum. A
     * unit with NaN or infinity adds nothing. Norms are summed in a fixed order in double, so the result is the same
     * on every table. Runs in the calling thread. */
    void (*clip_accumulate)(size_t n, const float *g, const struct clip_params *params, int64_t *sum,
                            struct clip_result *ret_result);
    /* Decoupled weight decay (Loshchilov and Hutter 2019). p, m, v, g (n). */
    void (*adamw)(const struct kernel_run *run, size_t n, const struct adamw_params *params, const float *g, float *m,
                  float *v, float *p);
    /* m = momentum·m + g; p -= lr·m. */
    void (*sgd_momentum)(const struct kernel_run *run, size_t n, float lr, float momentum, const float *g, float *m,
                         float *p);
};

#define KERNEL_DECODE_ROWS 8

/* The best table that this CPU runs and that is at most at_most; never NULL (KERNEL_SCALAR runs everywhere). */
const struct kernel_ops *kernels_cpu(enum kernel_isa at_most);

/* "scalar", "avx2", "avx512", "avx512-vnni", "avx512-bf16" and back; false for another name. */
const char *kernel_isa_name(enum kernel_isa isa);
bool MUST_USE kernel_isa_parse(const char *name, enum kernel_isa *ret_isa);

/* Scratch bytes, for any table; monotonic in each argument, so the maxima of a model suffice. */
size_t kernels_linear_scratch(int threads, int32_t m, int32_t out, int32_t in);
size_t kernels_attention_scratch(int threads, const struct attention_shape *shape, int32_t segment_rows_max,
                                 int32_t decode_length_max);
size_t kernels_head_scratch(int threads, int32_t label_rows, int32_t in);

/* table (positions, rotated/2, 2): cos and sin of position·base^(−2i/rotated)/scale. factors (rotated/2) divides each
 * frequency (llama 3's rope_freqs tensor), or NULL. Computed in double. */
void kernels_rope_table(int32_t positions, int32_t rotated, double base, double scale, const float *factors,
                        float *table);

#endif
