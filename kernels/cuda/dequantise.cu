/*
 * Whole matrices of weights to rows, and the LoRA parts of an augmented matrix. The floor is the matrix read once and
 * written once; a thread writes 16 bytes, so that a warp's are 512 in a row, and reads the few that they come from.
 */
#include "kernels/cuda/internal.h"
#include "kernels/cuda/blocks.h"

#include <assert.h>

#define BLOCK 256
#define PARTS 2 /* vectors a thread: loads in flight */

static unsigned blocks_for(int64_t items, int64_t a_block)
{
    int64_t blocks = (items + a_block - 1) / a_block;
    assert(items <= INT32_MAX);
    return (unsigned)blocks;
}

/* A thread decodes two vectors of a run of 32, 16 values apart: they share the run's scale and often their bytes, and
 * neighbouring threads' stores fill whole 32-byte sectors. */
template <typename E, enum tensor_type TYPE>
TEMPLATE_KERNEL dequantise_runs(uint32_t items, struct divisor a_row, const uint8_t *RESTRICT from, size_t row_bytes,
                                E *RESTRICT out, int64_t stride)
{
    const int V = VECTOR<E>, PER_RUN = 16 / V;
    uint32_t item = blockIdx.x * BLOCK + threadIdx.x, row = divide(item, a_row), within = item - row * a_row.by;
    size_t run = within / PER_RUN, at = within % PER_RUN * V;
    float low[V], high[V];
    if (item >= items)
        return;
    from += row * row_bytes;
    out += row * stride + (int64_t)(run * 32 + at);
    decode_part<TYPE, V>(from, run * 32 + at, low);
    decode_part<TYPE, V>(from, run * 32 + at + 16, high);
    vec16 a = vec_pack<E>(low), b = vec_pack<E>(high);
    store_16(out, a.w[0], a.w[1], a.w[2], a.w[3]);
    store_16(out + 16, b.w[0], b.w[1], b.w[2], b.w[3]);
}

/* Unquantised rows of any number of whole vectors. */
template <typename E, enum tensor_type TYPE>
TEMPLATE_KERNEL convert_vectors(uint32_t items, struct divisor a_row, const uint8_t *RESTRICT from, size_t row_bytes,
                                E *RESTRICT out, int64_t stride)
{
    const int V = VECTOR<E>;
    uint32_t first = blockIdx.x * (BLOCK * PARTS) + threadIdx.x;
    float x[PARTS][V];
    for (int k = 0; k < PARTS; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, a_row), at = (item - row * a_row.by) * V;
        if (item < items)
            decode_part<TYPE, V>(from + row * row_bytes, at, x[k]);
    }
    for (int k = 0; k < PARTS; k++) {
        uint32_t item = first + (uint32_t)k * BLOCK, row = divide(item, a_row), at = (item - row * a_row.by) * V;
        if (item < items)
            vec_store(out + row * stride + at, vec_pack<E>(x[k]));
    }
}

/* Widths and strides that are not whole vectors: a thread a value. */
template <typename E, enum tensor_type TYPE>
TEMPLATE_KERNEL convert_values(uint32_t items, uint32_t n, const uint8_t *RESTRICT from, size_t row_bytes,
                               E *RESTRICT out, int64_t stride)
{
    uint32_t item = blockIdx.x * BLOCK + threadIdx.x, row = item / n, at = item % n;
    if (item < items)
        store_float(out + row * stride + at, decode_value<TYPE>(from + row * row_bytes, at));
}

template <typename E, enum tensor_type TYPE>
static void launch_dequantise(stream_t s, int32_t rows, int32_t n, const uint8_t *from, size_t row_bytes, E *out,
                              int32_t stride)
{
    const int V = VECTOR<E>;
    constexpr bool runs = TYPE != TENSOR_F32 && TYPE != TENSOR_F16 && TYPE != TENSOR_BF16;
    if ((uintptr_t)out % 16 != 0 || stride % V != 0 || n % V != 0) {
        int64_t items = (int64_t)rows * n;
        LAUNCH((convert_values<E, TYPE>), blocks_for(items, BLOCK), BLOCK, 0, s, (uint32_t)items, (uint32_t)n, from,
               row_bytes, out, (int64_t)stride);
    } else if constexpr (runs) {
        int64_t items = (int64_t)rows * (n / (2 * V));
        LAUNCH((dequantise_runs<E, TYPE>), blocks_for(items, BLOCK), BLOCK, 0, s, (uint32_t)items,
               divisor_of((uint32_t)(n / (2 * V))), from, row_bytes, out, (int64_t)stride);
    } else {
        int64_t items = (int64_t)rows * (n / V);
        LAUNCH((convert_vectors<E, TYPE>), blocks_for(items, BLOCK * PARTS), BLOCK, 0, s, (uint32_t)items,
               divisor_of((uint32_t)(n / V)), from, row_bytes, out, (int64_t)stride);
    }
}

void dequantise_matrix(stream_t s, enum tensor_type type, int32_t rows, int32_t n, enum tensor_type from_type,
                       const void *from, size_t row_bytes, struct rows out)
{
    assert((type == TENSOR_F32 || type == TENSOR_BF16) && (rows <= 1 || out.stride >= n));
    if (rows <= 0 || n <= 0)
        return;
    assert_tensor_rows(from_type, n, from, row_bytes);
    const uint8_t *bytes = static_cast<const uint8_t *>(from);
#define CALL(TYPE)                                                                                                     \
    if (type == TENSOR_BF16)                                                                                           \
        launch_dequantise<bf16, TYPE>(s, rows, n, bytes, row_bytes, static_cast<bf16 *>(out.at), out.stride);          \
    else                                                                                                               \
        launch_dequantise<float, TYPE>(s, rows, n, bytes, row_bytes, static_cast<float *>(out.at), out.stride)
    FOR_TENSOR_TYPE(from_type, CALL)
#undef CALL
}

/* --- LoRA's parts ------------------------------------------------------------------------------------------------ */

struct lora_parts {
    struct lora_part part[LORA_PARTS_MAX];
};

#define PLACE_BLOCKS 48 /* of one part: many parts fill the card */

/* grid: (PLACE_BLOCKS, parts). A thread a value: the narrow side may be any rank. */
template <typename E> TEMPLATE_KERNEL place(const lora_parts parts)
{
    const lora_part &part = parts.part[blockIdx.y];
    const uint32_t items = (uint32_t)part.rows * (uint32_t)part.columns;
    E *to = static_cast<E *>(part.to.at);
    for (uint32_t item = blockIdx.x * BLOCK + threadIdx.x; item < items; item += gridDim.x * BLOCK) {
        uint32_t row = item / (uint32_t)part.columns, at = item % (uint32_t)part.columns;
        store_float(to + (int64_t)row * part.to.stride + at, part.scale * part.from[item]);
    }
}

void lora_place(stream_t s, enum tensor_type type, int32_t count, const struct lora_part *parts)
{
    assert(type == TENSOR_F32 || type == TENSOR_BF16);
    for (int32_t first = 0; first < count; first += LORA_PARTS_MAX) {
        struct lora_parts some = {};
        const int32_t n = count - first < LORA_PARTS_MAX ? count - first : LORA_PARTS_MAX;
        for (int32_t i = 0; i < n; i++) {
            some.part[i] = parts[first + i];
            assert(some.part[i].rows <= 1 || some.part[i].to.stride >= some.part[i].columns);
        }
        const dim3 grid(PLACE_BLOCKS, (unsigned)n);
        if (type == TENSOR_BF16)
            LAUNCH((place<bf16>), grid, BLOCK, 0, s, some);
        else
            LAUNCH((place<float>), grid, BLOCK, 0, s, some);
    }
}
