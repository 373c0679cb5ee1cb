/* Scratch sizes: upper bounds for every table. */
#include "kernels/cpu/internal.h"

static int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

size_t gemm_thread_bytes(int32_t k)
{
    size_t depth = (size_t)(k < GEMM_DEPTH ? k : GEMM_DEPTH) + 32;
    size_t tile = (size_t)16 * (GEMM_TILE + 16) * sizeof(float);
    return align64(tile + depth * GEMM_COLUMNS * sizeof(float));
}

size_t kernels_linear_scratch(int threads, int32_t m, int32_t out, int32_t in)
{
    int32_t k = larger(out, in);
    size_t bf16 = align64((size_t)m * ((size_t)k + 2) * 2);
    size_t decode = (size_t)threads * align64((size_t)k * sizeof(float));
    return (size_t)threads * gemm_thread_bytes(k) + bf16 + decode + 64;
}

/* Per thread: keys and values transposed, two blocks of scores, one row of decoding scores. */
size_t kernels_attention_scratch(int threads, const struct attention_shape *shape, int32_t segment_rows_max,
                                 int32_t decode_length_max)
{
    size_t rows = ((size_t)segment_rows_max + GEMM_COLUMNS) & ~(size_t)(GEMM_COLUMNS - 1);
    size_t packed = align64(rows * ((size_t)shape->head_size + 16) * sizeof(float));
    size_t scores = align64((size_t)ATTENTION_ROWS * rows * sizeof(float));
    size_t decode = align64(((size_t)decode_length_max + 64) * sizeof(float));
    return (size_t)threads * (2 * packed + 2 * scores + decode + 256) + 64;
}

int32_t head_chunk_rows(int32_t label_rows, int32_t vocabulary)
{
    int32_t chunk = 8388608 / vocabulary;
    chunk = chunk < 8 ? 8 : chunk > 96 ? 96 : chunk;
    return label_rows < chunk ? label_rows : chunk;
}

size_t kernels_head_scratch(int threads, int32_t label_rows, int32_t vocabulary, int32_t in)
{
    /* Not monotonic in the vocabulary by itself: a larger one means fewer rows; so take the largest product. */
    size_t chunk = (size_t)(label_rows < 96 ? label_rows : 96), logits = chunk * (size_t)vocabulary;
    size_t cap = (size_t)8388608 > (size_t)8 * (size_t)vocabulary ? 8388608 : (size_t)8 * (size_t)vocabulary;
    if (logits > cap)
        logits = cap;
    size_t rows = align64(chunk * (size_t)in * sizeof(float));
    return rows + align64(logits * sizeof(float)) + 64 +
           kernels_linear_scratch(threads, (int32_t)chunk, in, in) + /* packing the forward product */
           (size_t)threads * gemm_thread_bytes(vocabulary) + align64(chunk * ((size_t)vocabulary + 2) * 2);
}
