/* Internal to kernels/cuda: 16 bytes of elements (4 float32 or 8 bfloat16) as the unit of every access to rows. */
#ifndef KERNELS_CUDA_VECTORS_H
#define KERNELS_CUDA_VECTORS_H

#include "kernels/cuda/cuda.h"

struct alignas(16) vec16 {
    uint32_t w[4];
};

template <typename E> constexpr int VECTOR = 16 / (int)sizeof(E);

DEVICE float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

DEVICE uint32_t bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

DEVICE vec16 vec_load(const void *p)
{
    uint4 v = *reinterpret_cast<const uint4 *>(p);
    return vec16{{v.x, v.y, v.z, v.w}};
}

DEVICE void vec_store(void *p, const vec16 &v)
{
    *reinterpret_cast<uint4 *>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

DEVICE vec16 vec_zero()
{
    return vec16{{0, 0, 0, 0}};
}

template <typename E> DEVICE void vec_unpack(const vec16 &v, float *x)
{
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(E) == 4) {
            x[i] = float_of_bits(v.w[i]);
        } else {
            x[2 * i] = float_of_bits(v.w[i] << 16);
            x[2 * i + 1] = float_of_bits(v.w[i] & 0xffff0000u);
        }
    }
}

/* Rounds to the element. */
template <typename E> DEVICE vec16 vec_pack(const float *x)
{
    vec16 v;
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(E) == 4)
            v.w[i] = bits_of_float(x[i]);
        else
            v.w[i] = bf16_pack(x[2 * i], x[2 * i + 1]);
    }
    return v;
}

/* VECTOR<E> floats, aligned to 16. */
template <typename E> DEVICE void load_floats(const float *p, float *x)
{
    for (int i = 0; i < VECTOR<E>; i += 4)
        vec_unpack<float>(vec_load(p + i), x + i);
}

/* Division by a number that the host knows, as a product and a shift: exact for numerators below 2^31. With
 * 2^(log−1) < d ≤ 2^log and multiplier = ⌊2^(31+log)/d⌋ + 1 the quotient's error is below numerator/2^31 · 1/d. */
struct divisor {
    uint32_t by, multiplier, shift;
};

static inline struct divisor divisor_of(uint32_t by) /* by > 0 */
{
    struct divisor d = {by, 0, 31};
    while (((uint64_t)1 << (d.shift - 31)) < by)
        d.shift++;
    d.multiplier = (uint32_t)(((uint64_t)1 << d.shift) / by + 1);
    return d;
}

DEVICE uint32_t divide(uint32_t x, struct divisor d)
{
    return (uint32_t)(((uint64_t)x * d.multiplier) >> d.shift);
}

#endif
