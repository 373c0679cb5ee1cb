/* What the files of kernels/cpu share: decoding ranges of a row, half-precision, pieces of scratch. Private. */
#ifndef KERNELS_CPU_INTERNAL_H
#define KERNELS_CPU_INTERNAL_H

#include "kernels/kernels.h"

#include <string.h>

/* Depth (k) of a packed panel: a deeper product is summed panel by panel, always at these multiples. */
#define GEMM_DEPTH 2048
/* Rows of B that the kernel asks for ahead of its use. */
#define GEMM_AHEAD 4
/* Columns of the result that one work item computes, and of weights packed at once, at most. */
#define GEMM_COLUMNS_MAX 64
/* Columns of a row decoded at once while packing. */
#define GEMM_TILE 256
/* Rank of a product of thin matrices that is added on the way. */
#define GEMM_LOW_RANK_MAX 128
/* Values of k that are rounded to integers together; divides GEMM_DEPTH and GEMM_TILE. */
#define INT16_DEPTH 128
/* Room for rows before they are turned over, and for a run's depth of a panel's columns before it is rounded. */
#define GEMM_TILE_FLOATS (INT16_DEPTH * GEMM_COLUMNS_MAX)
/* Query rows of one block of attention forward; blocks start at the segment, so a row's sums do not depend on its
 * batchmates. */
#define ATTENTION_ROWS 48

/* Backward: queries of one chunk, keys of one block. Multiples of the tiles' 6 rows and of 16. Two squares of
 * probabilities and six copies of a chunk's rows should fit the second cache. */
#define ATTENTION_KEYS 192
#define ATTENTION_CHUNK_MIN 96
static inline int32_t attention_chunk_rows(int32_t head_size)
{
    return head_size <= 64 ? 192 : ATTENTION_CHUNK_MIN;
}

/* Backward: parts of a segment's queries that threads can take, each about as much work: no more than have a chunk of
 * queries of some depth, and no more sums than there are heads. */
#define ATTENTION_PART_ROWS 256
#define ATTENTION_PARTS_MAX 4
static inline int attention_parts(const struct attention_shape *shape, int32_t segment_rows)
{
    const int32_t heads = shape->heads / shape->kv_heads + 1;
    const int32_t cap = heads < ATTENTION_PARTS_MAX ? heads : ATTENTION_PARTS_MAX;
    if (segment_rows < ATTENTION_PART_ROWS * 2)
        return segment_rows < 2 * ATTENTION_CHUNK_MIN ? 1 : 2;
    return segment_rows / ATTENTION_PART_ROWS < cap ? segment_rows / ATTENTION_PART_ROWS : cap;
}

/* dk and dv of one head of a segment; how many of them the parts need. */
static inline size_t attention_part_floats(int32_t segment_rows, int32_t head_size)
{
    return ((size_t)2 * (size_t)segment_rows * (size_t)head_size + 15) & ~(size_t)15;
}
static inline size_t attention_sums(int threads, const struct attention_shape *shape, int32_t segment_rows)
{
    const size_t slots = (size_t)(shape->kv_heads > threads ? shape->kv_heads : threads);
    return slots * (size_t)(attention_parts(shape, segment_rows) - 1);
}

/* Decoding attention: stretches of the keys of one row. */
#define ATTENTION_SPANS_MAX 32
static inline int32_t attention_span_keys(int32_t keys)
{
    return 32 * ((keys + 32 * ATTENTION_SPANS_MAX - 1) / (32 * ATTENTION_SPANS_MAX));
}

static inline float float_from_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline float bfloat_to_float(const uint8_t *p)
{
    return float_from_bits((uint32_t)p[0] << 16 | (uint32_t)p[1] << 24);
}

/* IEEE binary16, little-endian bytes. Exact, denormals included. */
static inline float half_to_float(const uint8_t *p)
{
    uint32_t h = (uint32_t)p[0] | (uint32_t)p[1] << 8, sign = (h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity, NaN */
        return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400)
        return float_from_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
    float f = (float)magnitude * 0x1p-24f;
    return sign ? -f : f;
}

/* Values [first, first + n) of a row; quantised types need multiples of 32. */
void tensor_dequantise_range(enum tensor_type type, const void *row, size_t first, size_t n, float *out);
/* Run `run` of 32 values of a quantised row. */
void decode_run32(enum tensor_type type, const uint8_t *row, size_t run, float *out);

static inline const uint8_t *tensor_row(const struct tensor *w, int32_t row)
{
    size_t bytes = (size_t)w->in / tensor_type_block(w->type) * tensor_type_block_bytes(w->type);
    return (const uint8_t *)w->data + bytes * (size_t)row;
}

static inline size_t align64(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* The next `bytes` of a scratch block, 64-byte aligned; asserts that they are there. */
static inline void *scratch_take(uint8_t **next, const uint8_t *end, size_t bytes)
{
    uint8_t *piece = *next;
    assert(align64(bytes) <= (size_t)(end - piece));
    (void)end;
    *next = piece + align64(bytes);
    return piece;
}

/* Bytes of one thread's packing buffers for products as deep as k (internal to the linear scratch). */
size_t gemm_thread_bytes(int32_t k);
/* Label rows and words whose logits are held at once: many rows, as each block of words is decoded twice for them, and
 * whole panels of every table on two threads and runs of INT16_DEPTH. Floats between the rows are no multiple of a
 * page, or all rows would compete for the same lines of a cache. */
#define HEAD_ROWS 512
#define HEAD_WORDS 1920
#define HEAD_STRIDE (HEAD_WORDS + 16)
_Static_assert(HEAD_WORDS % INT16_DEPTH == 0 && HEAD_WORDS <= GEMM_DEPTH, "a block of words is one round of a product");

/* What is known of a label row after some blocks of the vocabulary. */
struct head_row {
    float top;    /* the largest logit */
    float others; /* Σ exp(z − top), the target's excepted */
    float target; /* its logit */
};

/* Shared by every table. */
void clip_accumulate(size_t n, const float *g, const struct clip_params *params, int64_t *sum,
                     struct clip_result *ret_result);

extern const struct kernel_ops kernel_ops_scalar;
extern const struct kernel_ops kernel_ops_avx2;
extern const struct kernel_ops kernel_ops_avx512;
extern const struct kernel_ops kernel_ops_avx512_vnni;
extern const struct kernel_ops kernel_ops_avx512_bf16;

#endif
