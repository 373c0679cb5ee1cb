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
 *   that leaves early leaves whole), wgmma_* by whole groups of four. No other synchronisation, no atomics on floats,
 * no inline assembly elsewhere.
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
#define WARP_GROUP 4 /* warps of a group: 4i .. 4i+3 of a block */

#ifdef CUDA_SHIM
#include "kernels/cuda/shim/shim.h"
#else

#include <cuda_runtime.h>

#define KERNEL extern "C" __global__ void /* untemplated kernels */
#define TEMPLATE_KERNEL __global__ void   /* after template <...> */
#define DEVICE __device__ __forceinline__
#define DEVICE_CALL static __device__ __noinline__ /* code that is seldom run: called, not inlined */
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DYNAMIC_SHARED(type, name) /* aligned as wgmma_matrix wants it */                                              \
    extern __shared__ __align__(1024) unsigned char dynamic_shared_[];                                                 \
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

DEVICE int shuffle(int x, int lane)
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

/* --- products of a group of warps: compute capability 9.0 ---------------------------------------------------------
 *
 * Only code for sm_90a has them, and a build may be for several cards: where not HAVE_WGMMA, a kernel of theirs is a
 * trap(), and the host launches it only if BUILT_FOR_WGMMA, that is, sm_90a is among what the build is for, and
 * device_capability() is 90. */
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAVE_WGMMA 1
#else
#define HAVE_WGMMA 0
#endif
#ifdef CUDA_SM_90A
#define BUILT_FOR_WGMMA true
#else
#define BUILT_FOR_WGMMA false
#endif

DEVICE void trap()
{
    __trap();
}

/* Bytes from the beginning of the block's window of shared memory. */
DEVICE uint32_t shared_address(const void *at)
{
    return (uint32_t)__cvta_generic_to_shared(at);
}

/* What this thread, async_copy_16 included, wrote to shared memory can be read by products: after it is there, and
 * before the barrier that says so to the others. */
DEVICE void proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Uses of the registers stay on their side. */
template <int N> DEVICE void wgmma_hold(float (&x)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+f"(x[n][e])::"memory");
}

template <int N> DEVICE void wgmma_hold(uint32_t (&x)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+r"(x[n][e])::"memory");
}

/* Before products that read registers, sums or operands, which were written since the last wait: name them. */
template <typename... T> DEVICE void wgmma_fence(T &...x)
{
    (wgmma_hold(x), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* Products since the last commit become a group. */
DEVICE void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most `pending` of the latest groups are not done. Name the sums that are read from here on. Until its
 * products were waited for, a sum must not be looked at, nor any of their operands be changed. */
template <int pending, typename... T> DEVICE void wgmma_wait(T &...x)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
    (wgmma_hold(x), ...);
}

#define WGMMA_4(x, n) "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])
#define WGMMA_16(x, n) WGMMA_4(x, n), WGMMA_4(x, n + 1), WGMMA_4(x, n + 2), WGMMA_4(x, n + 3)
#define WGMMA_32(x, n) WGMMA_16(x, n), WGMMA_16(x, n + 4)
#define WGMMA_64(x, n) WGMMA_32(x, n), WGMMA_32(x, n + 8)
#define WGMMA_128(x, n) WGMMA_64(x, n), WGMMA_64(x, n + 16)
#define WGMMA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64                                                                                                 \
    WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                  \
                   ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_128                                                                                                \
    WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                  \
                   ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                  \
                   ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"      \
                   ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
/* columns, and sums of a thread; the numbers of the operands behind the sums */
#define WGMMA_SHARED(columns, count, a_name, b_name, add_name)                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add_name ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" WGMMA_NAMES_##count                \
                 "}, %" #a_name ", %" #b_name ", p, 1, 1, 0, 0;\n}"                                                    \
                 : WGMMA_##count(x, 0)                                                                                 \
                 : "l"(a), "l"(b), "r"((int)add))
#define WGMMA_REGISTERS(columns, count, a0, a1, a2, a3, b_name)                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" WGMMA_NAMES_##count                \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_name ", 1, 1, 1, 1;"                              \
                 : WGMMA_##count(x, 0)                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

/* x (64, columns) = (add: +=) a (64, 16) · bᵀ (columns, 16), both matrices in shared memory with rows of terms. Warp i
 * of the group has rows 16i .. 16i+15 of x, in mma_16816's fragments: x[n] are columns 8n .. 8n+7. */
template <int columns> DEVICE void wgmma_shared(float (&x)[columns / 8][4], uint64_t a, uint64_t b, bool add)
{
    static_assert(columns == 32 || columns == 64 || columns == 128, "one of those written out");
    if constexpr (columns == 32)
        WGMMA_SHARED(32, 16, 16, 17, 18);
    else if constexpr (columns == 64)
        WGMMA_SHARED(64, 32, 32, 33, 34);
    else
        WGMMA_SHARED(128, 64, 64, 65, 66);
}

/* x (64, columns) += a (64, 16) · b (16, columns): each warp's 16 rows of a are mma_16816's fragments, b's rows in
 * shared memory are terms. */
template <int columns> DEVICE void wgmma_registers(float (&x)[columns / 8][4], const uint32_t (&a)[4], uint64_t b)
{
    static_assert(columns == 64 || columns == 128 || columns == 256, "one of those written out");
    if constexpr (columns == 64)
        WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36);
    else if constexpr (columns == 128)
        WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68);
    else
        WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132);
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

/* A matrix of bfloat16 in shared memory as the products of a group take it: panels of 64 columns, whose rows are 128
 * bytes; unit u (16 bytes) of row r stands at u ^ (r % 8), which is the 128-byte swizzle of the hardware. A panel
 * begins at a multiple of 1024 bytes, since the hardware takes r % 8 from the address; eight rows are 1024 bytes.
 *
 * The descriptor of the matrix that begins at `at` has, in units of 16 bytes, the address in bits 0 .. 13, the distance
 * between panels in bits 16 .. 29, looked at where rows are terms and so a product may go over several panels, the
 * distance between eights of rows in bits 32 .. 45, and the kind of swizzle in 62 and 63. A matrix further on is
 * + bytes / 16: 16 columns 32 bytes (within a panel: the swizzle is of addresses), 16 rows 2048 bytes. */
DEVICE uint64_t wgmma_matrix(const bf16 *at, int panel_bytes)
{
    return (uint64_t)((shared_address(at) & 0x3ffff) >> 4) | (uint64_t)(panel_bytes >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
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
