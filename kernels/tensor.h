/*
 * Tensor element types: their numbers, block sizes, row sizes, and decoding a row to float.
 *
 * The enumerators are the type numbers of GGUF v3 (format: the ggml project's gguf.md), so a parser may cast after
 * tensor_type_known(). All multi-byte fields are little-endian, and so must the machine be. Pure functions.
 *
 *     size_t bytes;
 *     if (!tensor_type_known(type) || !tensor_type_row_bytes(type, in, &bytes)) return error_set(...);
 */
#ifndef KERNELS_TENSOR_H
#define KERNELS_TENSOR_H

#include "base/error.h"

enum tensor_type {
    TENSOR_F32 = 0,
    TENSOR_F16 = 1,
    TENSOR_Q4_0 = 2,
    TENSOR_Q4_1 = 3,
    TENSOR_Q5_0 = 6,
    TENSOR_Q5_1 = 7,
    TENSOR_Q8_0 = 8,
    TENSOR_Q2_K = 10,
    TENSOR_Q4_K = 12,
    TENSOR_Q5_K = 13,
    TENSOR_Q6_K = 14,
    TENSOR_BF16 = 30,
};

bool tensor_type_known(uint32_t type);
const char *tensor_type_name(enum tensor_type type); /* "Q4_1"; "unknown" */
size_t tensor_type_block(enum tensor_type type);     /* values in a block: 1, 32 or 256 */
size_t tensor_type_block_bytes(enum tensor_type type);
size_t tensor_type_alignment(enum tensor_type type); /* bytes that a tensor's start must be aligned to: 1, 2 or 4 */

/* Bytes of one row of n values. False (ret untouched) if n is not a whole number of blocks or the size overflows. */
bool MUST_USE tensor_type_row_bytes(enum tensor_type type, size_t n, size_t *ret);

/* Decodes n values (whole blocks) to out[n]. Plain C; the fast decoders inside the operations give the same bits. */
void tensor_dequantise(enum tensor_type type, const void *row, size_t n, float *out);

/* A borrowed frozen matrix, row-major, usually inside a mapped file. in is a whole number of blocks. */
struct tensor {
    const void *data;
    enum tensor_type type;
    int32_t out; /* rows: output features */
    int32_t in;  /* columns: input features, contiguous */
    /* The same values in the layout that a kernel table made of them (kernels.h, interleave), borrowed; NULL: none.
     * Operations of that table read it instead of data where it is faster. */
    const void *interleaved;
};

#endif
