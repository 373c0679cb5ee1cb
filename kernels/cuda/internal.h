/*
 * Internal to kernels/cuda: the functions behind the table of backend.cu. Each enqueues kernels on a stream and
 * returns; none allocates, none waits. Arrays are device memory unless said otherwise. `type` is the element of struct
 * rows: TENSOR_F32 or TENSOR_BF16. Widths and strides are multiples of 8 elements and pointers of 16 bytes, except
 * where a comment says any; m and counts are any, 0 included.
 *
 * Sums run in an order that depends on the row's (segment's, example's) own shape only: see backend.h.
 */
#ifndef KERNELS_CUDA_INTERNAL_H
#define KERNELS_CUDA_INTERNAL_H

extern "C" {
#include "base/gaussian.h"
#include "kernels/backend.h"
}
#include "kernels/cuda/cuda.h"

/* --- rows.cu: what happens to each row by itself ----------------------------------------------------------------- */

/* x += add (add.at may be NULL), y = x·rstd·gain; the sum is rounded to the element before it is squared. One warp or
 * one block a row. y may have other strides than x. rstd (m) or NULL. */
void rows_norm_forward(stream_t s, enum tensor_type type, int32_t m, int32_t n, float eps, const float *gain,
                       struct rows x, struct rows add, struct rows y, float *rstd);
void rows_norm_backward(stream_t s, enum tensor_type type, int32_t m, int32_t n, const float *gain, struct rows x,
                        const float *rstd, struct rows dy, struct rows dx, bool accumulate);
/* The norms of each head of a row by itself: n is head_size, a row holds heads of them; rstd (m, heads). */
void rows_head_norm_forward(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t head_size, float eps,
                            const float *gain, struct rows x, struct rows y, float *rstd);
void rows_head_norm_backward(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t head_size,
                             const float *gain, struct rows x, const float *rstd, struct rows dy, struct rows dx);
/* y += bias (n), rounded to the element once more. bias aligned to 16 bytes. */
void rows_add_bias(stream_t s, enum tensor_type type, int32_t m, int32_t n, const float *bias, struct rows y);
/* head_size and rotated any even numbers; x any stride. table (positions, rotated): cos, sin pairs as in kernels.h. */
void rows_rope(stream_t s, enum tensor_type type, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
               enum rope_order order, bool inverse, const float *table, const int32_t *positions, struct rows x);
void rows_gated_forward(stream_t s, enum tensor_type type, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                        struct rows up, struct rows out);
void rows_gated_backward(stream_t s, enum tensor_type type, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                         struct rows up, struct rows dout);
/* y[i] = scale·decoded row ids[i] of a table of any tensor type whose rows lie row_bytes apart. */
void rows_embed(stream_t s, enum tensor_type type, int32_t m, int32_t n, enum tensor_type table_type, const void *table,
                size_t row_bytes, const int32_t *ids, float scale, struct rows y);
void rows_gather(stream_t s, enum tensor_type type, int32_t m, int32_t n, const int32_t *index, struct rows from,
                 struct rows to);

/* --- dequantise.cu ----------------------------------------------------------------------------------------------- */

/* out row r = decoded row r of a matrix (rows, n) of any tensor type, rows row_bytes apart; the same values as
 * tensor_dequantise, rounded to the element. n a multiple of the type's block, out.stride any. */
void dequantise_matrix(stream_t s, enum tensor_type type, int32_t rows, int32_t n, enum tensor_type from_type,
                       const void *from, size_t row_bytes, struct rows out);

/* The LoRA parts of an augmented matrix (see product.h): to (rows, columns) = scale·from (rows, columns), dense
 * float32; any sizes below 2^31 values. Many parts are one launch. */
#define LORA_PARTS_MAX 84 /* what a kernel's arguments hold */
struct lora_part {
    const float *from;
    struct rows to;
    int32_t rows, columns;
    float scale;
};
void lora_place(stream_t s, enum tensor_type type, int32_t count, const struct lora_part *parts);

/* --- attention_*.cu
 * ---------------------------------------------------------------------------------------------------
 */

/* Tiles of packed sequences: the work list of a batch. tiles[i] = {first row of the segment, its length, the tile's
 * first row within it, segment number}; entries past the count have length 0. Filled by the host (backend.cu) for tiles
 * of ATTENTION_TILE rows, heavy (late) tiles first; a kernel's grid has one block an entry (tiles_max) and head. */
#define ATTENTION_TILE 128
#define ATTENTION_TILE_PARTS 8 /* blocks for an entry and head at most */
#define GRID_YZ_MAX 65535      /* of a grid, in y and in z */
struct attention_tile {
    int32_t first, length, at, segment;
};

/* Causal attention within segments, as kernels.h's; head sizes that are multiples of 16 up to 256, tuned for 64, 128
 * and 256. lse (rows, heads) = natural log of the sum of exponentials of scale·q·k, or NULL. */
void attention_forward(stream_t s, enum tensor_type type, const struct attention_shape *shape,
                       const struct attention_tile *tiles, int32_t tiles_max, struct rows q, struct rows k,
                       struct rows v, struct rows o, float *lse);
/* delta (rows, heads): work memory. m: rows of the batch, all segments within. dq, dk, dv are overwritten for the
 * segments' rows. work: attention_backward_work bytes (may be 0). Deterministic: no atomics. */
size_t attention_backward_work(enum tensor_type type, const struct attention_shape *shape, int32_t rows_max);
void attention_backward(stream_t s, enum tensor_type type, const struct attention_shape *shape,
                        const struct attention_tile *tiles, int32_t tiles_max, int32_t m, struct rows q, struct rows k,
                        struct rows v, struct rows o, const float *lse, struct rows do_, struct rows dq, struct rows dk,
                        struct rows dv, float *delta, void *work);

/* --- decode.cu: answering ---------------------------------------------------------------------------------------- */

/* A cache's block holds KV_BLOCK tokens of all layers. For layer l the block's part begins at l·kv_layer_bytes():
 * keys (KV_BLOCK, kv_width), values likewise, elements of `type` or int8; if quantised then float32 scales of keys
 * (KV_BLOCK, kv_heads) and of values behind them: value = int8·scale, scale = largest magnitude of the head / 127. */
#define KV_BLOCK 32
struct kv_layout {
    enum tensor_type type;
    bool quantised;
    int32_t layers, kv_heads, head_size;
};
size_t kv_layer_bytes(const struct kv_layout *layout); /* a multiple of 256 */
size_t kv_block_bytes(const struct kv_layout *layout);

/* One row of a pass on the device: where its sequence's blocks are and at which position it stands. blocks[i] is the
 * block of tokens i·KV_BLOCK and following. position below 0: a row of another round, skipped: its o is left alone. */
struct kv_row {
    void *const *blocks;
    int32_t position;
};

/* Writes keys and values of m rows at their positions. */
void decode_store(stream_t s, const struct kv_layout *layout, int32_t layer, int32_t m, const struct kv_row *rows,
                  struct rows k, struct rows v);
/* Attention of m rows over positions 0..position of their sequences (or the window's). Split over parts of the sequence
 * where m·heads alone would not fill the card; work: decode_attention_work(m_max, …) bytes. length_max bounds
 * position + 1. */
size_t decode_attention_work(const struct attention_shape *shape, int32_t m_max);
void decode_attention(stream_t s, const struct kv_layout *layout, const struct attention_shape *shape, int32_t layer,
                      int32_t m, int32_t length_max, const struct kv_row *rows, struct rows q, struct rows o,
                      void *work);

/* y = x·Wᵀ for few rows, 1 ≤ m ≤ KERNEL_DECODE_ROWS: W (out, in) of any tensor type, rows row_bytes apart, is read once
 * and decoded in registers; float32 sums. y_float (m, out) dense float32 if not NULL, else y. */
void decode_linear(stream_t s, enum tensor_type type, int32_t m, int32_t out, int32_t in, enum tensor_type w_type,
                   const void *w, size_t row_bytes, struct rows x, struct rows y, float *y_float);
/* y += scale·(x·Aᵀ)·Bᵀ for few rows; a (rank, in), b (out, rank) float32; h (m, rank) float32 work memory, which
 * decode_lora_down writes and decode_lora_up reads (stacked A: call down once with the sum of the ranks; h_stride). */
void decode_lora_down(stream_t s, enum tensor_type type, int32_t m, int32_t rank, int32_t in, const float *a,
                      struct rows x, float *h, int32_t h_stride);
void decode_lora_up(stream_t s, enum tensor_type type, int32_t m, int32_t out, int32_t rank, float scale,
                    const float *b, const float *h, int32_t h_stride, struct rows y);

/* --- head.cu ----------------------------------------------------------------------------------------------------- */

/* ids[i]: where row i of dense logits (m, n) is largest, the smallest id among equals. NaN is below everything; 0 if
 * there is nothing else. work: head_likeliest_work(m) bytes. */
size_t head_likeliest_work(int32_t m);
void head_likeliest(stream_t s, int32_t m, int32_t n, const float *logits, int32_t *ids, void *work);

/* Rows of logits (count, n), n any, stride a multiple of 8, element `type`: losses[i] = −log softmax(row)[targets[i]],
 * and, if gradient, the row becomes weights[i]·(softmax − onehot) in place. */
void head_softmax(stream_t s, enum tensor_type type, int32_t count, int32_t n, struct rows logits,
                  const int32_t *targets, const float *weights, float *losses, bool gradient);

/* --- gradients.cu: per-example LoRA gradients -------------------------------------------------------------------- */

/* One factor's gradient: to[e·stride + offset ...] = scale·Σ_t left_t ⊗ right_t over the rows of segment e, where the
 * result is (left_width, right_width) row-major float32. gb: left = dy, right = h, scale s. ga: left = dh (scale 1),
 * right = x. One of the widths is the LoRA rank (any, at most 256; its rows' alignment may be 2 elements), the other a
 * multiple of 8. Offsets and stride are floats. */
struct gradient_job {
    struct rows left, right;
    int32_t left_width, right_width;
    float scale;
    size_t offset;
};
#define GRADIENT_JOBS_MAX 6
/* count jobs of one group over all segments at once. offsets (segments + 1) dev; a kernel takes segments_max and looks
 * the count up at offsets_count (dev, one int). A segment without rows gets zeros. If stride is 0, all rows from 0 to
 * the last offset are one segment. */
void gradients_write(stream_t s, enum tensor_type type, int32_t count, const struct gradient_job *jobs,
                     const int32_t *offsets, const int32_t *offsets_count, int32_t segments_max, float *base,
                     size_t stride);

/* --- arena.cu: flat arrays, clipping, optimizers ----------------------------------------------------------------- */

/* For each of count units: as clip_accumulate of kernels.h, with the norm's double sums in an order that depends on n
 * only; the integers are checked exactly (128-bit sum of squares) and the factor shrunk until they pass. results
 * (count) dev. work: arena_clip_work(n, count) bytes. */
size_t arena_clip_work(size_t n, int32_t count);
void arena_clip_accumulate(stream_t s, size_t n, int32_t count, const float *g, size_t stride,
                           const struct clip_params *params, int64_t *sum, struct clip_result *results, void *work);
void arena_clip_add(stream_t s, size_t n, int32_t count, const float *g, size_t stride, double clip, float *sum,
                    void *work);
void arena_add(stream_t s, size_t n, const float *b, float *a);
void arena_scale_sum(stream_t s, size_t n, const int64_t *sum, double scale, float *out);
void arena_divide(stream_t s, size_t n, double denominator, float *a);
void arena_adamw(stream_t s, size_t n, const struct adamw_params *params, const float *g, float *m, float *v, float *p);
void arena_sgd_momentum(stream_t s, size_t n, float lr, float momentum, const float *g, float *m, float *p);

/* --- noise.cu: discrete Gaussian noise --------------------------------------------------------------------------- */

/* out (count) dev, overwritten: coordinates of vector `number` under `key` (host memory, 32 bytes, read before it
 * returns), the same bits as privacy/noise_vector.h, which says how: number from noise_source_take, one call for each.
 * Never between device_record_begin and _end: a replay would give the same noise again. *failed (dev) becomes 1 if the
 * noise must not be used and is left alone otherwise. */
void noise_fill(stream_t s, const uint8_t key[32], uint32_t number, const struct gaussian *gaussian, size_t count,
                int64_t *out, int32_t *failed);

#endif
