/* Shared by the tests of kernels/cuda, which run under the shim and on a card: device arrays, random data, distances.
 */
#ifndef TESTS_CUDA_SUPPORT_H
#define TESTS_CUDA_SUPPORT_H

extern "C" {
#include "kernels/kernels.h"
}
#include "kernels/cuda/device.h"
#include "tests/check.h"

/* xorshift64*, so that every run tests the same data. */
static uint64_t support_state = 0x2545f4914f6cdd1du;

static inline uint64_t support_bits(void)
{
    support_state ^= support_state >> 12;
    support_state ^= support_state << 25;
    support_state ^= support_state >> 27;
    return support_state * 0x2545f4914f6cdd1du;
}

static inline float support_uniform(void) /* −1 .. 1 */
{
    return (float)(int32_t)(support_bits() >> 32) * 0x1p-31f;
}

static inline int32_t support_below(int32_t bound) /* 0 .. bound−1 */
{
    return (int32_t)((support_bits() >> 32) * (uint64_t)bound >> 32);
}

/* bfloat16 on the host, also where cuda.h's are for the card. */
static inline bf16 host_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if (x != x)
        return bf16{0x7fff};
    return bf16{(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

static inline float host_float(bf16 x)
{
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline float host_float(float x)
{
    return x;
}

static inline void host_store(float *to, float x)
{
    *to = x;
}

static inline void host_store(bf16 *to, float x)
{
    *to = host_bf16(x);
}

static inline float host_round(float x, enum tensor_type type) /* as an element of that type */
{
    return type == TENSOR_BF16 ? host_float(host_bf16(x)) : x;
}

template <typename T> struct element_type;
template <> struct element_type<float> {
    static const enum tensor_type type = TENSOR_F32;
};
template <> struct element_type<bf16> {
    static const enum tensor_type type = TENSOR_BF16;
};

static inline void support_ok(int code)
{
    if (code < 0) {
        fprintf(stderr, "device error %d\n", code);
        exit(1);
    }
}

/* The null stream: in order with everything. */
static inline void support_sync(void)
{
    struct error err = {};
    if (device_sync((stream_t)0, &err) < 0) {
        fprintf(stderr, "device_sync: %s\n", err.message);
        exit(1);
    }
}

/* n elements twice: `host`, which the test reads and writes, and `dev`. Bytes behind the device's n are guarded: get()
 * ends the test if a kernel wrote them. */
template <typename T> struct device_array {
    static const size_t guard = 64; /* bytes */
    size_t n;
    T *host, *dev;

    explicit device_array(size_t n_) : n(n_), host(NULL), dev(NULL)
    {
        unsigned char pattern[guard];
        memset(pattern, 0xa5, guard);
        host = static_cast<T *>(calloc(n ? n : 1, sizeof(T)));
        if (!host)
            abort();
        support_ok(device_alloc(n * sizeof(T) + guard, reinterpret_cast<void **>(&dev)));
        device_upload((stream_t)0, dev + n, pattern, guard);
        put();
    }
    device_array(const device_array &) = delete;
    device_array &operator=(const device_array &) = delete;
    ~device_array()
    {
        device_release(dev);
        free(host);
    }

    void put() /* host → dev */
    {
        device_upload((stream_t)0, dev, host, n * sizeof(T));
        support_sync();
    }
    void get() /* dev → host, after everything before */
    {
        unsigned char pattern[guard];
        device_download((stream_t)0, host, dev, n * sizeof(T));
        device_download((stream_t)0, pattern, dev + n, guard);
        support_sync();
        for (size_t i = 0; i < guard; i++) {
            if (pattern[i] != 0xa5) {
                fprintf(stderr, "byte %zu behind an array of %zu elements was written\n", i, n);
                exit(1);
            }
        }
    }
    void poison() /* NaN for float and bf16, −1 for integers, on both sides */
    {
        memset(static_cast<void *>(host), 0xff, n * sizeof(T));
        put();
    }
    void fill_uniform(float scale = 1) /* and put; float and bf16 only */
    {
        for (size_t i = 0; i < n; i++)
            host_store(&host[i], scale * support_uniform());
        put();
    }
    T &operator[](size_t i)
    {
        return host[i];
    }
    const T &operator[](size_t i) const
    {
        return host[i];
    }
};

/* The values as floats: what the CPU's reference takes. Free them. */
template <typename T> static inline float *support_floats_of(const device_array<T> &a)
{
    float *x = static_cast<float *>(malloc((a.n ? a.n : 1) * sizeof(float)));
    if (!x)
        abort();
    for (size_t i = 0; i < a.n; i++)
        x[i] = host_float(a.host[i]);
    return x;
}

static inline bool support_poisoned(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u == 0xffffffff;
}

static inline bool support_poisoned(bf16 x)
{
    return x.bits == 0xffff;
}

/* ‖a − b‖ / ‖b‖ over all n; infinite where either has a NaN. 0/0 is 0. */
template <typename A, typename B> static inline double distance(const A *a, const B *b, size_t n)
{
    double gap = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double x = (double)host_float(a[i]), y = (double)host_float(b[i]);
        gap += (x - y) * (x - y);
        norm += y * y;
    }
    if (!(gap >= 0 && norm < INFINITY))
        return INFINITY;
    return norm > 0 ? sqrt(gap / norm) : sqrt(gap);
}

#define CHECK_DISTANCE(a, b, n, tolerance)                                                                             \
    do {                                                                                                               \
        double distance_ = distance(a, b, n);                                                                          \
        check_count++;                                                                                                 \
        if (!(distance_ <= (tolerance))) {                                                                             \
            check_failures++;                                                                                          \
            fprintf(stderr, "%s:%d: %s and %s are %g apart\n", __FILE__, __LINE__, #a, #b, distance_);                 \
        }                                                                                                              \
    } while (0)

#define CHECK_SAME(a, b, n) CHECK(memcmp(a, b, (n) * sizeof(*(a))) == 0)

#ifndef CUDA_SHIM
/* Without a card a test says so and is skipped (77), before its main begins. */
static const struct support_card {
    support_card()
    {
        struct device_info info;
        struct error err = {};
        if (device_open(0, &info, &err) < 0) {
            fprintf(stderr, "skipped: %s\n", err.message);
            exit(77);
        }
        fprintf(stderr, "on %s\n", info.name);
    }
} support_card_;
#endif

#endif
