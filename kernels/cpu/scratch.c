/* Scratch sizes: upper bounds for every table. */
#include "kernels/cpu/internal.h"

static int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

size_t gemm_thread_bytes(int32_t k)
{
    size_t depth = (size_t)(k < GEMM_DEPTH ? k : GEMM_DEPTH) + 32;
    depth += GEMM_LOW_RANK_MAX + 16;
    return align64((GEMM_TILE_FLOATS + depth * GEMM_COLUMNS_MAX) * sizeof(float));
}

static size_t rounded_scales(int32_t m, int32_t k)
{
    return align64((size_t)m * ((size_t)k / INT16_DEPTH + 1) * sizeof(float));
}

size_t kernels_linear_scratch(int threads, int32_t m, int32_t out, int32_t in)
{
    int32_t k = larger(out, in);
    size_t rounded = align64((size_t)m * ((size_t)k + 2) * 2) + rounded_scales(m, k);
    /* A decoded row a thread, and sums of 16 values of x each. */
    size_t decode = (size_t)threads * align64((size_t)k * sizeof(float));
    decode += align64(KERNEL_DECODE_ROWS * ((size_t)k / 16) * sizeof(float));
    return (size_t)threads * gemm_thread_bytes(k) + rounded + decode + 64;
}

/* A thread's: forward keys transposed and a block of scores; backward a chunk's queries and gradients, as they are and
 * transposed, and two squares of probabilities. */
static size_t attention_thread_bytes(int32_t segment_rows, int32_t head_size)
{
    const size_t rows = ((size_t)segment_rows + GEMM_COLUMNS_MAX) & ~(size_t)(GEMM_COLUMNS_MAX - 1);
    const size_t d = (size_t)head_size + 16, chunk = (size_t)attention_chunk_rows(head_size);
    const size_t forward = rows * d + rows * ATTENTION_ROWS;
    const size_t backward = (2 * (chunk + GEMM_COLUMNS_MAX) + 2 * chunk) * d + 2 * chunk + 2 * ATTENTION_KEYS * chunk;
    return align64((forward > backward ? forward : backward) * sizeof(float)) + 1024;
}

/* And backward the sums of the parts; for decoding what the spans of one row give, and a row of scores. */
size_t kernels_attention_scratch(int threads, const struct attention_shape *shape, int32_t segment_rows_max,
                                 int32_t decode_length_max)
{
    size_t decode =
        align64((size_t)ATTENTION_SPANS_MAX * (size_t)shape->heads * (size_t)shape->head_size * sizeof(float));
    decode += 2 * align64((size_t)shape->heads * ATTENTION_SPANS_MAX * sizeof(float));
    decode += align64(((size_t)decode_length_max + 64) * sizeof(float));
    const size_t sums =
        attention_sums(threads, shape, segment_rows_max) * attention_part_floats(segment_rows_max, shape->head_size);
    return (size_t)threads * attention_thread_bytes(segment_rows_max, shape->head_size) +
           align64(sums * sizeof(float)) + (decode_length_max > 0 ? decode : 0) + 64;
}

/* Each chunk decodes all of the head's weights, twice: many rows, but logits of no more than 128 MB. */
#define HEAD_LOGITS_MAX 33554432
#define HEAD_ROWS_MAX 512
#define HEAD_ROWS_MIN 8

int32_t head_chunk_rows(int32_t label_rows, int32_t vocabulary)
{
    int32_t chunk = HEAD_LOGITS_MAX / vocabulary;
    chunk = chunk < HEAD_ROWS_MIN ? HEAD_ROWS_MIN : chunk > HEAD_ROWS_MAX ? HEAD_ROWS_MAX : chunk;
    return label_rows < chunk ? label_rows : chunk;
}

size_t kernels_head_scratch(int threads, int32_t label_rows, int32_t vocabulary, int32_t in)
{
    /* Not monotonic in the vocabulary by itself: a larger one means fewer rows; so take the largest product. */
    const size_t chunk = (size_t)(label_rows < HEAD_ROWS_MAX ? label_rows : HEAD_ROWS_MAX);
    const size_t stride = (size_t)head_row_stride(vocabulary), least = HEAD_ROWS_MIN * stride;
    const size_t most = (size_t)HEAD_LOGITS_MAX + (size_t)HEAD_ROWS_MAX * 80, cap = most > least ? most : least;
    const size_t logits = chunk * stride < cap ? chunk * stride : cap;
    size_t rows = align64(chunk * (size_t)in * sizeof(float));
    return rows + align64(logits * sizeof(float)) + 64 +
           kernels_linear_scratch(threads, (int32_t)chunk, in, in) + /* packing the forward product */
           (size_t)threads * gemm_thread_bytes(vocabulary) + align64(chunk * ((size_t)vocabulary + 2) * 2) +
           rounded_scales((int32_t)chunk, vocabulary);
}
