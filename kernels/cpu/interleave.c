/* Making the copy of a quantised matrix that interleave.h describes, and decoding it into panels of a product. */
#include "kernels/cpu/interleave.h"

static size_t group_bytes(enum tensor_type type, int32_t in)
{
    return (size_t)in / 32 / (size_t)lanes_runs(type) * lanes_block_bytes(type);
}

size_t ISA(interleaved_bytes)(const struct tensor *w)
{
    if (tensor_type_block(w->type) == 1)
        return 0;
    return ((size_t)w->out + LANES - 1) / LANES * group_bytes(w->type, w->in);
}

const uint8_t *ISA(interleaved_group)(const struct tensor *w, int32_t row)
{
    return (const uint8_t *)w->interleaved + (size_t)(row / LANES) * group_bytes(w->type, w->in);
}

/* --- making it ---------------------------------------------------------------------------------------------------- */

/* 8 numbers of `bits` bits in a byte each, moved together. */
INLINE uint64_t squeeze(uint64_t x, int bits)
{
    const uint64_t bytes = 0x00ff00ff00ff00ff, halves = 0x0000ffff0000ffff, words = 0x00000000ffffffff;
    x = (x & bytes) | (x & ~bytes) >> (8 - bits);
    x = (x & halves) | (x & ~halves) >> (16 - 2 * bits);
    return (x & words) | (x & ~words) >> (32 - 4 * bits);
}

/* Quants of one row's run, to its lane. */
INLINE void put_quants(enum tensor_type type, const uint8_t *row, size_t run, uint8_t *to, int lane)
{
    const int bits = lanes_bits(type);
    const __m256i bias = _mm256_set1_epi8((char)quants_bias(type));
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    union {
        uint8_t bytes[32];
        uint64_t eights[4];
    } q;
    uint8_t string[40];
    const __m256i whole = _mm256_and_si256(_mm256_sub_epi8(quants_bytes(type, row, run), bias), mask);
    _mm256_storeu_si256((__m256i *)(void *)q.bytes, whole);
    if (bits == 8) {
        for (int k = 0; k < 32; k++)
            to[k * LANES + lane] = q.bytes[k];
        return;
    }
    for (int i = 0; i < 4; i++) {
        const uint64_t together = squeeze(q.eights[i], bits);
        memcpy(string + i * bits, &together, 8); /* beyond its `bits` bytes: written again, or not looked at */
    }
    for (int i = 0; i < bits; i++)
        memcpy(to + i * 64 + lane * 4, string + i * 4, 4);
}

/* Scales of one row's run in a block of 256. */
INLINE void put_scales(enum tensor_type type, const uint8_t *block, int run, uint8_t *to, int lane)
{
    if (type == TENSOR_Q2_K || type == TENSOR_Q6_K) {
        const uint8_t *scales = block + (type == TENSOR_Q6_K ? 192 : 0) + 2 * run;
        to[lane] = scales[0];
        to[LANES + lane] = scales[1];
    } else {
        quants_k_scale(block + 4, run, &to[lane], &to[LANES + lane]);
    }
}

/* One row of a group whose lanes were zero. */
INLINE void put_row(enum tensor_type type, const uint8_t *row, int32_t in, uint8_t *to, int lane)
{
    const size_t runs = (size_t)lanes_runs(type), blocks = (size_t)in / 32 / runs,
                 bytes = tensor_type_block_bytes(type);
    const size_t d = type == TENSOR_Q6_K ? 208 : type == TENSOR_Q2_K ? 80 : 0;
    for (size_t b = 0; b < blocks; b++, to += lanes_block_bytes(type)) {
        const uint8_t *block = row + b * bytes;
        memcpy(to + 2 * lane, block + d, 2);
        if (!lanes_signed(type))
            memcpy(to + 2 * (LANES + lane), block + d + 2, 2);
        uint8_t *at = to + lanes_head_bytes(type);
        for (size_t run = 0; run < runs; run++, at += lanes_run_bytes(type)) {
            if (runs > 1)
                put_scales(type, block, (int)run, at, lane);
            put_quants(type, row, b * runs + run, at + lanes_scale_bytes(type), lane);
        }
    }
}

struct job {
    const struct tensor *w;
    uint8_t *to;
};

static void interleave_item(void *ctx, int group, int thread)
{
    const struct job *j = ctx;
    const struct tensor *w = j->w;
    const size_t bytes = group_bytes(w->type, w->in);
    uint8_t *to = j->to + (size_t)group * bytes;
    (void)thread;
    memset(to, 0, bytes);
    for (int lane = 0; lane < LANES && group * LANES + lane < w->out; lane++) {
        const uint8_t *row = tensor_row(w, group * LANES + lane);
        switch (w->type) {
#define PUT(type)                                                                                                      \
    case type:                                                                                                         \
        put_row(type, row, w->in, to, lane);                                                                           \
        break;
            EACH_QUANTISED_TYPE(PUT)
#undef PUT
        default:
            assert(!"a type that stays row-major");
        }
    }
}

void ISA(interleave)(const struct kernel_run *run, const struct tensor *w, void *to)
{
    struct job j = {w, to};
    pool_run(run->pool, (w->out + LANES - 1) / LANES, interleave_item, &j);
}

/* --- panels ------------------------------------------------------------------------------------------------------- */

/* The same arithmetic as dequant.c, hence the same bits. */
INLINE void panel(enum tensor_type type, const uint8_t *group, int lane, size_t first, size_t runs, float *to,
                  ptrdiff_t stride)
{
    const struct lanes_table table = lanes_table(type);
    const size_t per_block = (size_t)lanes_runs(type);
    vec d = vec_zero(), m = vec_zero();
    for (size_t run = first; run < first + runs; run++) {
        const uint8_t *block = group + run / per_block * lanes_block_bytes(type);
        const uint8_t *at = block + lanes_head_bytes(type) + run % per_block * lanes_run_bytes(type);
        const uint8_t *q = at + lanes_scale_bytes(type) + lane * (type == TENSOR_Q8_0 ? 1 : 4);
        lanes_block_scales(type, block + 2 * lane, &d, &m);
#pragma GCC unroll 2
        for (int part = 0; part < lanes_parts(type); part++) {
            vec scale, min;
            lanes_scales(type, at + lane, part, d, m, &scale, &min);
            const int count = 32 / lanes_parts(type);
#pragma GCC unroll 32
            for (int k = part * count; k < (part + 1) * count; k++, to += stride) {
                vec x = vec_mul(lanes_quant(type, &table, q, k), scale);
                vec_store(to, lanes_signed(type) ? x : vec_add(x, min));
            }
        }
    }
}

void ISA(interleaved_panel)(const struct tensor *w, int32_t row, size_t first, size_t n, float *to, ptrdiff_t stride)
{
    const uint8_t *group = ISA(interleaved_group)(w, row);
    assert(first % 32 == 0 && n % 32 == 0 && row % VL == 0);
    switch (w->type) {
#define PANEL(type)                                                                                                    \
    case type:                                                                                                         \
        panel(type, group, row % LANES, first / 32, n / 32, to, stride);                                               \
        break;
        EACH_QUANTISED_TYPE(PANEL)
#undef PANEL
    default:
        assert(!"a type that stays row-major");
    }
}
