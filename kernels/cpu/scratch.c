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

size_t kernels_head_scratch(int threads, int32_t label_rows, int32_t in)
{
    const int32_t chunk = label_rows < HEAD_ROWS ? label_rows : HEAD_ROWS;
    const size_t rows =
        2 * align64((size_t)chunk * (size_t)in * sizeof(float)) + align64((size_t)chunk * sizeof(struct head_row));
    return rows + align64((size_t)chunk * HEAD_STRIDE * sizeof(float)) + 64 +
           kernels_linear_scratch(threads, chunk, HEAD_WORDS, in);
}
