/*
 * The kernels' vocabulary (kernels/cuda/cuda.h) on the host: included by it where CUDA_SHIM is defined, never directly.
 *
 *     g++ -std=c++17 -x c++ -DCUDA_SHIM -O1 -g -I. part.cu …      the .cu files and their tests
 *     g++ -std=c++17 -DCUDA_SHIM -O2 -g -I. fiber.cpp device_host.cpp product_host.cpp
 *     gcc -std=c11 -O2 -I. base/error.c, kernels/cpu/…            and everything is linked by g++
 *
 * What a launch does
 * - LAUNCH runs the blocks one after the other, before it returns. Each thread of a block is a fiber, which runs until
 *   it waits at a barrier or a collective of its warp. Which one runs next is the order: SHIM_FORWARD lets the lowest
 *   warp run as far as it can, its lowest lane first; SHIM_REVERSE the highest; SHIM_SEEDED draws anew at every step. A
 *   kernel is right if it is right in every order.
 * - Every thread of a block must come to each block_sync(), all 32 lanes of a warp to each collective, and to the same
 *   one. What would hang or be undefined on a card ends the process with a message that names kernel, block and thread.
 * - Shared memory is 0xff bytes (NaN) when a block starts; what is behind it must stay untouched (checked at the end of
 *   the block; byte for byte under AddressSanitizer).
 * - async_copy_16 makes its 16 bytes NaN at once and copies in async_wait, reading the source then. What was not waited
 *   for never comes.
 * - wgmma_* products make their sums NaN at once and happen in wgmma_wait, which reads the operands then. Operands in
 *   shared memory that were copied there without a proxy_fence, or that changed between the first of the group's warps
 *   that gave the product and the last that waited for it, end the process; so does a product without a wgmma_fence
 *   since the last wait whose sums are in no product under way.
 * - ldmatrix_x4 reads a lane's row when that lane gets there: rows that other lanes wrote need a barrier before it.
 *
 * Between device_record_begin and device_record_end launches, copies and products are kept with their arguments and
 * done at each replay, as in a CUDA graph: what a pass left to the host, or to memory that moved since, goes missing.
 *
 * Threads: several may launch at the same time. shim_order is for before that.
 */
#ifndef KERNELS_CUDA_SHIM_SHIM_H
#define KERNELS_CUDA_SHIM_SHIM_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* --- CUDA's types and variables ---------------------------------------------------------------------------------- */

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
    unsigned x, y, z;
};

#define SHIM_VECTOR_2(name, element)                                                                                   \
    struct alignas(2 * sizeof(element)) name {                                                                         \
        element x, y;                                                                                                  \
    };                                                                                                                 \
    static inline name make_##name(element x, element y)                                                               \
    {                                                                                                                  \
        return name{x, y};                                                                                             \
    }
#define SHIM_VECTOR_4(name, element)                                                                                   \
    struct alignas(4 * sizeof(element)) name {                                                                         \
        element x, y, z, w;                                                                                            \
    };                                                                                                                 \
    static inline name make_##name(element x, element y, element z, element w)                                         \
    {                                                                                                                  \
        return name{x, y, z, w};                                                                                       \
    }
SHIM_VECTOR_2(int2, int)
SHIM_VECTOR_4(int4, int)
SHIM_VECTOR_2(uint2, unsigned)
SHIM_VECTOR_4(uint4, unsigned)
SHIM_VECTOR_2(float2, float)
SHIM_VECTOR_4(float4, float)
SHIM_VECTOR_2(double2, double)
SHIM_VECTOR_2(longlong2, long long)
SHIM_VECTOR_2(ulonglong2, unsigned long long)
SHIM_VECTOR_4(char4, signed char)
SHIM_VECTOR_4(uchar4, unsigned char)
SHIM_VECTOR_2(ushort2, unsigned short)
SHIM_VECTOR_4(ushort4, unsigned short)
#undef SHIM_VECTOR_2
#undef SHIM_VECTOR_4

extern __thread struct uint3 threadIdx, blockIdx;
extern __thread struct dim3 blockDim, gridDim;

/* --- the launch -------------------------------------------------------------------------------------------------- */

#define KERNEL extern "C" void
#define TEMPLATE_KERNEL void
#define DEVICE static inline
#define DEVICE_CALL static
#define LAUNCH_BOUNDS(threads, blocks)
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(shim_shared())
#define RESTRICT __restrict__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                         \
    shim_launch(#kernel, kernel, (grid), (block), (shared_bytes), (stream), ##__VA_ARGS__)

typedef struct shim_stream *stream_t;

enum shim_order_kind { SHIM_FORWARD, SHIM_REVERSE, SHIM_SEEDED };

/* Also CONSILIUM_SHIM_ORDER=forward|reverse|seed:N in the environment, which a call overrides. */
void shim_order(enum shim_order_kind kind, uint64_t seed);

void shim_run(const char *name, struct dim3 grid, struct dim3 block, size_t shared_bytes, void (*call)(void *ctx),
              void *ctx);
unsigned char *shim_shared(void);

template <typename T> struct shim_type {
    typedef T same;
};

/* Whether the launch is one that was told to fail: it is remembered as on a card, and nothing must run. */
bool shim_launch_fails(void);

struct shim_work {
    virtual void run() = 0;
    virtual ~shim_work() {}
};

template <typename F> struct shim_work_of : shim_work {
    F call;
    explicit shim_work_of(F call_) : call(call_) {}
    void run() override
    {
        call();
    }
};

bool shim_recording(stream_t s);
void shim_keep(stream_t s, struct shim_work *work); /* takes the work, which new made */

/* Keeps the work and returns true if s is being recorded. */
template <typename F> static inline bool shim_record(stream_t s, F call)
{
    if (!shim_recording(s))
        return false;
    shim_keep(s, new shim_work_of<F>(call));
    return true;
}

/* The arguments are converted to the kernel's parameters once, as a launch does. */
template <typename... P>
static inline void shim_launch(const char *name, void (*kernel)(P...), struct dim3 grid, struct dim3 block,
                               size_t shared_bytes, stream_t s, typename shim_type<P>::same... arguments)
{
    if (shim_launch_fails() ||
        shim_record(s, [=] { shim_launch<P...>(name, kernel, grid, block, shared_bytes, NULL, arguments...); }))
        return;
    auto call = [&] { kernel(arguments...); };
    shim_run(
        name, grid, block, shared_bytes, [](void *ctx) { (*static_cast<decltype(call) *>(ctx))(); }, &call);
}

/* --- device_host.cpp: for tests ---------------------------------------------------------------------------------- */

/* There are CONSILIUM_SHIM_DEVICES devices, 0 or 1 (the default). Their memory is CONSILIUM_SHIM_MEMORY_BYTES (default
 * 64 GiB); looked up at every allocation. */
size_t shim_live_allocations(void); /* of device_alloc, pinned memory and streams */
extern "C" {                        /* also for tests in C */
size_t shim_live_bytes(void);       /* of device_alloc */
void shim_fail_next_sync(int code); /* the next device_sync returns this ERR_ code */
/* The calling thread's launch after `others` more fails, and then so many again, until `times` have. */
void shim_fail_launches(int others, int times);
size_t shim_replays(void); /* of recordings, so far */
/* Kinds of products (all but their m) since products_new was last called: product_host.cpp. */
size_t shim_product_kinds(void);
/* From here on products of so many rows or more sum in the other order, as a library may; 0: none do. */
void shim_products_backwards(int rows);
}
/* What device_capability says from here on; 0: CONSILIUM_SHIM_CAPABILITY (default 90). Not while others launch. */
void shim_capability(int capability);

/* --- barriers and collectives ------------------------------------------------------------------------------------ */

enum shim_collective {
    SHIM_WARP_SYNC,
    SHIM_SHUFFLE_4,
    SHIM_SHUFFLE_8,
    SHIM_ANY,
    SHIM_LDMATRIX,
    SHIM_LDMATRIX_TRANSPOSED,
    SHIM_MMA,
    SHIM_WGMMA_WAIT
};

struct shim_slot {
    alignas(16) unsigned char bytes[32];
};

/* Waits for the warp; returns what each of the 32 lanes brought, valid until the lane's next collective. */
const struct shim_slot *shim_exchange(enum shim_collective kind, const void *operand, size_t bytes);
const struct shim_slot *shim_exchange_row(enum shim_collective kind, const void *row);
void shim_block_sync(void);
void shim_mma(float d[4], const uint32_t a[4], const uint32_t b[2]);
void shim_async_copy(void *to, const void *from, int bytes);
void shim_async_commit(void);
void shim_async_wait(int pending);
uint32_t shim_shared_address(const void *at);
void shim_trap(void);
void shim_proxy_fence(void);
void shim_wgmma_fence(void);
void shim_wgmma_commit(void);
void shim_wgmma_wait(int pending);
/* registers: a's fragments, or NULL: a is a matrix in shared memory, and b's rows are columns, not terms. */
void shim_wgmma(float *x, int columns, const uint32_t *registers, uint64_t a, uint64_t b, bool add);

DEVICE void block_sync()
{
    shim_block_sync();
}

DEVICE void warp_sync()
{
    shim_exchange(SHIM_WARP_SYNC, NULL, 0);
}

template <typename T> DEVICE T shim_shuffle(T x, unsigned lane)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle's type");
    const struct shim_slot *slots = shim_exchange(sizeof(T) == 4 ? SHIM_SHUFFLE_4 : SHIM_SHUFFLE_8, &x, sizeof x);
    memcpy(&x, slots[lane % 32].bytes, sizeof x);
    return x;
}

DEVICE bool warp_any(bool x)
{
    uint32_t mine = x, any = 0;
    const struct shim_slot *slots = shim_exchange(SHIM_ANY, &mine, sizeof mine);
    for (int lane = 0; lane < 32; lane++) {
        uint32_t its;
        memcpy(&its, slots[lane].bytes, sizeof its);
        any |= its;
    }
    return any != 0;
}

DEVICE float shuffle_xor(float x, int mask)
{
    return shim_shuffle(x, threadIdx.x ^ (unsigned)mask);
}

DEVICE double shuffle_xor(double x, int mask)
{
    return shim_shuffle(x, threadIdx.x ^ (unsigned)mask);
}

DEVICE unsigned long long shuffle_xor(unsigned long long x, int mask)
{
    return shim_shuffle(x, threadIdx.x ^ (unsigned)mask);
}

DEVICE float shuffle(float x, int lane)
{
    return shim_shuffle(x, (unsigned)lane);
}

DEVICE int shuffle(int x, int lane)
{
    return shim_shuffle(x, (unsigned)lane);
}

/* Lane 4i + j gets the elements 2j, 2j + 1 of row i of each matrix. */
DEVICE void ldmatrix_x4(uint32_t r[4], const void *row)
{
    const struct shim_slot *slots = shim_exchange_row(SHIM_LDMATRIX, row);
    unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; i++)
        memcpy(&r[i], slots[8 * i + lane / 4].bytes + 4 * (lane % 4), 4);
}

/* Lane 4i + j gets the elements i of rows 2j, 2j + 1 of each matrix. */
DEVICE void ldmatrix_x4_transposed(uint32_t r[4], const void *row)
{
    const struct shim_slot *slots = shim_exchange_row(SHIM_LDMATRIX_TRANSPOSED, row);
    unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (unsigned j = 0; j < 2; j++)
            memcpy(&pair[j], slots[8 * i + 2 * (lane % 4) + j].bytes + 2 * (lane / 4), 2);
        r[i] = pair[0] | (uint32_t)pair[1] << 16;
    }
}

DEVICE void mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    shim_mma(d, a, b);
}

DEVICE void async_copy_16(void *to, const void *from, int bytes)
{
    shim_async_copy(to, from, bytes);
}

DEVICE void store_16(void *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    *reinterpret_cast<uint4 *>(to) = uint4{a, b, c, d};
}

DEVICE void async_commit()
{
    shim_async_commit();
}

template <int pending> DEVICE void async_wait()
{
    static_assert(pending >= 0, "groups");
    shim_async_wait(pending);
}

#define HAVE_WGMMA 1
#define BUILT_FOR_WGMMA true

DEVICE void trap()
{
    shim_trap();
}

DEVICE uint32_t shared_address(const void *at)
{
    return shim_shared_address(at);
}

DEVICE void proxy_fence()
{
    shim_proxy_fence();
}

template <typename... T> DEVICE void wgmma_fence(T &...)
{
    shim_wgmma_fence();
}

DEVICE void wgmma_commit()
{
    shim_wgmma_commit();
}

template <int pending, typename... T> DEVICE void wgmma_wait(T &...)
{
    static_assert(pending >= 0, "groups");
    shim_wgmma_wait(pending);
}

template <int columns> DEVICE void wgmma_shared(float (&x)[columns / 8][4], uint64_t a, uint64_t b, bool add)
{
    shim_wgmma(x[0], columns, NULL, a, b, add);
}

template <int columns> DEVICE void wgmma_registers(float (&x)[columns / 8][4], const uint32_t (&a)[4], uint64_t b)
{
    shim_wgmma(x[0], columns, a, 0, b, true);
}

/* --- conversions ------------------------------------------------------------------------------------------------- */

template <typename To, typename From> DEVICE To shim_bits(From x)
{
    static_assert(sizeof(To) == sizeof(From), "same size");
    To r;
    memcpy(&r, &x, sizeof r);
    return r;
}

DEVICE float __uint_as_float(unsigned x)
{
    return shim_bits<float>(x);
}

DEVICE unsigned __float_as_uint(float x)
{
    return shim_bits<unsigned>(x);
}

DEVICE float __int_as_float(int x)
{
    return shim_bits<float>(x);
}

DEVICE int __float_as_int(float x)
{
    return shim_bits<int>(x);
}

DEVICE long long __double_as_longlong(double x)
{
    return shim_bits<long long>(x);
}

DEVICE double __longlong_as_double(long long x)
{
    return shim_bits<double>(x);
}

DEVICE float bf16_to_float(bf16 x)
{
    return __uint_as_float((uint32_t)x.bits << 16);
}

/* Adds just below half of the last kept place, and its last bit: ties go to even. NaN becomes the card's NaN. */
DEVICE bf16 bf16_from_float(float x)
{
    uint32_t u = __float_as_uint(x);
    if (x != x)
        return bf16{0x7fff};
    return bf16{(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

DEVICE uint32_t bf16_pack(float a, float b)
{
    return bf16_from_float(a).bits | (uint32_t)bf16_from_float(b).bits << 16;
}

DEVICE float fast_exp2(float x)
{
    return exp2f(x);
}

DEVICE float half_bits_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31)
        return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0)
        return sign ? -(float)mantissa * 0x1p-24f : (float)mantissa * 0x1p-24f;
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* --- intrinsics -------------------------------------------------------------------------------------------------- */

/* Macros where the C library has functions of that name. */
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __fdividef(a, b) ((float)(a) / (float)(b))
#define rsqrtf(x) (1.0f / sqrtf(x))
#define rsqrt(x) (1.0 / sqrt(x))
#define __fmaf_rn(a, b, c) fmaf(a, b, c)
#define __fma_rn(a, b, c) fma(a, b, c)
#define __fsqrt_rn(x) sqrtf(x)
#define __dsqrt_rn(x) sqrt(x)

#define SHIM_OPERATION(name, type, operator)                                                                           \
    DEVICE type name(type a, type b)                                                                                   \
    {                                                                                                                  \
        return a operator b;                                                                                           \
    }
SHIM_OPERATION(__fadd_rn, float, +)
SHIM_OPERATION(__fsub_rn, float, -)
SHIM_OPERATION(__fmul_rn, float, *)
SHIM_OPERATION(__fdiv_rn, float, /)
SHIM_OPERATION(__dadd_rn, double, +)
SHIM_OPERATION(__dsub_rn, double, -)
SHIM_OPERATION(__dmul_rn, double, *)
SHIM_OPERATION(__ddiv_rn, double, /)
#undef SHIM_OPERATION

template <typename T> DEVICE T __ldg(const T *p)
{
    return *p;
}

DEVICE long long __double2ll_rn(double x)
{
    return llrint(x);
}

DEVICE long long __float2ll_rn(float x)
{
    return llrintf(x);
}

DEVICE int __float2int_rn(float x)
{
    return (int)lrintf(x);
}

DEVICE int __double2int_rn(double x)
{
    return (int)lrint(x);
}

DEVICE float __double2float_rn(double x)
{
    return (float)x;
}

DEVICE double __ll2double_rn(long long x)
{
    return (double)x;
}

DEVICE unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

DEVICE unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((unsigned long long)a * b >> 32);
}

DEVICE int __popc(unsigned x)
{
    return __builtin_popcount(x);
}

DEVICE int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}

DEVICE int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}

DEVICE int __clzll(long long x)
{
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}

DEVICE int __ffs(int x)
{
    return __builtin_ffs(x);
}

#define SHIM_MIN_MAX(type)                                                                                             \
    DEVICE type min(type a, type b)                                                                                    \
    {                                                                                                                  \
        return b < a ? b : a;                                                                                          \
    }                                                                                                                  \
    DEVICE type max(type a, type b)                                                                                    \
    {                                                                                                                  \
        return a < b ? b : a;                                                                                          \
    }
SHIM_MIN_MAX(int)
SHIM_MIN_MAX(unsigned)
SHIM_MIN_MAX(long)
SHIM_MIN_MAX(unsigned long)
SHIM_MIN_MAX(long long)
SHIM_MIN_MAX(unsigned long long)
#undef SHIM_MIN_MAX

/* A NaN loses, as on a card. */
DEVICE float min(float a, float b)
{
    return fminf(a, b);
}

DEVICE float max(float a, float b)
{
    return fmaxf(a, b);
}

DEVICE double min(double a, double b)
{
    return fmin(a, b);
}

DEVICE double max(double a, double b)
{
    return fmax(a, b);
}

#endif
