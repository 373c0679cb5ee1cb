/*
 * What the kernels are written in: one vocabulary with two meanings.
 *
 * Compiled by nvcc these are CUDA's own things. Compiled by a C++ compiler with CUDA_SHIM defined (shim/shim.h), each
 * thread of a block is a fiber, a barrier really separates what is before it from what is after, an asynchronous copy
 * really happens only when it is waited for, and shared memory starts as NaN: the kernels' logic runs, and fails, in
 * ordinary tests.
 *
 * Rules that make both possible
 * - Launch with LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...), never with triple angle brackets.
 * - Shared memory is dynamic: DYNAMIC_SHARED(type, name), carved by hand; no __shared__ variables.
 * - Barriers are block_sync() and warp_sync(); shuffles, votes, ldmatrix_* and mma_* are done by whole warps (a warp
 *   that leaves early leaves whole). No other synchronisation, no atomics on floats, no inline assembly elsewhere.
 * - Every thread of a block that calls block_sync() calls each of them.
 * - Blocks are one-dimensional (threadIdx.x); grids may have x, y, z.
 * - FIBER_LOCAL state does not exist: no static locals, no globals but constants.
 */
#ifndef KERNELS_CUDA_CUDA_H
#define KERNELS_CUDA_CUDA_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* bfloat16: the upper half of a float. */
struct bf16 {
    uint16_t bits;
};

#define WARP 32

#ifdef CUDA_SHIM
#include "kernels/cuda/shim/shim.h"
#else

#include <cuda_runtime.h>

#define KERNEL extern "C" __global__ void /* untemplated kernels */
#define TEMPLATE_KERNEL __global__ void   /* after template <...> */
#define DEVICE __device__ __forceinline__
#define DEVICE_CALL static __device__ __noinline__ /* code that is seldom run: called, not inlined */
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DYNAMIC_SHARED(type, name)                                                                                     \
    extern __shared__ __align__(128) unsigned char dynamic_shared_[];                                                  \
    type *name = reinterpret_cast<type *>(dynamic_shared_)
#define RESTRICT __restrict__

/* shared_bytes above 48 KB need the kernel's limit raised once: LAUNCH does so. */
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                         \
    do {                                                                                                               \
        if ((shared_bytes) > 48 * 1024)                                                                                \
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(shared_bytes));            \
        kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);                                            \
    } while (0)

typedef cudaStream_t stream_t;

DEVICE float bf16_to_float(bf16 x)
{
    return __uint_as_float((uint32_t)x.bits << 16);
}

/* Round to nearest, ties to even; NaN stays NaN. */
DEVICE bf16 bf16_from_float(float x)
{
    uint16_t r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return bf16{r};
}

/* low half from a, high half from b */
DEVICE uint32_t bf16_pack(float a, float b)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}

DEVICE void block_sync()
{
    __syncthreads();
}

DEVICE void warp_sync()
{
    __syncwarp();
}

/* Whether it is true in any lane. */
DEVICE bool warp_any(bool x)
{
    return __any_sync(0xffffffffu, x);
}

DEVICE float shuffle_xor(float x, int mask)
{
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

DEVICE double shuffle_xor(double x, int mask)
{
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

DEVICE unsigned long long shuffle_xor(unsigned long long x, int mask)
{
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

DEVICE float shuffle(float x, int lane)
{
    return __shfl_sync(0xffffffffu, x, lane);
}

/* r[i] = the lane's pair of 8×8 matrix i, whose row (lane of the address) addresses come from lanes 8i .. 8i+7; 16-byte
 * aligned shared memory. */
DEVICE void ldmatrix_x4(uint32_t r[4], const void *row)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

DEVICE void ldmatrix_x4_transposed(uint32_t r[4], const void *row)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* d (16×8) += a (16×16, row-major) · b (16×8, column-major), bfloat16 in, float32 sums; PTX's m16n8k16 fragments. */
DEVICE void mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* 16 bytes from global to shared memory, of which the first `bytes` (0..16) are read and the rest become zero. Done
 * when async_wait says so. Both aligned to 16. */
DEVICE void async_copy_16(void *to, const void *from, int bytes)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

/* 16 bytes to global memory, aligned to 16, by one instruction: the compiler splits an assignment now and then. Loads
 * are not moved over it. */
DEVICE void store_16(void *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

DEVICE void async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most `pending` of this thread's latest groups are not done. Others' copies: block_sync() after it. */
template <int pending> DEVICE void async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

DEVICE float fast_exp2(float x)
{
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

DEVICE float half_bits_to_float(uint16_t h)
{
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
    return r;
}

#endif /* CUDA_SHIM */

/* --- in terms of the above ---------------------------------------------------------------------------------------- */

DEVICE float load_float(const float *p)
{
    return *p;
}

DEVICE float load_float(const bf16 *p)
{
    return bf16_to_float(*p);
}

DEVICE void store_float(float *p, float x)
{
    *p = x;
}

DEVICE void store_float(bf16 *p, float x)
{
    *p = bf16_from_float(x);
}

/* Sums over the warp in a fixed order; every lane gets the same bits. */
template <typename T> DEVICE T warp_sum(T x)
{
    for (int mask = WARP / 2; mask > 0; mask /= 2)
        x += shuffle_xor(x, mask);
    return x;
}

DEVICE float warp_max(float x)
{
    for (int mask = WARP / 2; mask > 0; mask /= 2)
        x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

#endif
