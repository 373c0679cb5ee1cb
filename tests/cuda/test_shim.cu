/*
 * The vocabulary of kernels/cuda/cuda.h: what each primitive means, under the shim and on a card; and, under the shim,
 * that what is wrong with a kernel shows.
 */
#include "kernels/cuda/product.h"
#include "tests/cuda/support.h"

#ifdef CUDA_SHIM
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

static const stream_t stream = (stream_t)0;

/* --- conversions ------------------------------------------------------------------------------------------------- */

KERNEL convert_all(float *halves, bf16 *again, bf16 *rounded, uint32_t *packed, const float *x)
{
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; /* all 2^16 of them */
    halves[i] = half_bits_to_float((uint16_t)i);
    again[i] = bf16_from_float(bf16_to_float(bf16{(uint16_t)i}));
    rounded[i] = bf16_from_float(x[i]);
    packed[i] = bf16_pack(x[i], -x[i]);
}

static void test_conversions(void)
{
    const int n = 1 << 16;
    device_array<float> halves(n), x(n);
    device_array<bf16> again(n), rounded(n);
    device_array<uint32_t> packed(n);
    for (int i = 0; i < n; i++) { /* each bfloat16 of a quarter of them, and what lies around its upper neighbour */
        static const uint32_t below[] = {0, 0x7fff, 0x8000, 0x8001};
        uint32_t u = (uint32_t)(i / 4) << 18 | (uint32_t)(i >> 8 & 1) << 16 | below[i % 4];
        memcpy(&x[i], &u, 4);
    }
    x.put();
    LAUNCH(convert_all, n / 256, 256, 0, stream, halves.dev, again.dev, rounded.dev, packed.dev, x.dev);
    halves.get(), again.get(), rounded.get(), packed.get();
    int bad = 0;
    for (int i = 0; i < n; i++) {
        int exponent = i >> 10 & 31, mantissa = i & 1023;
        double value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
        value = i & 0x8000 ? -value : value;
        if (exponent == 31)
            bad += mantissa ? halves[i] == halves[i] : halves[i] != (i & 0x8000 ? -INFINITY : INFINITY);
        else
            bad += (double)halves[i] != value || (signbit(halves[i]) ? 1 : 0) != i >> 15;
        bool nan = (i & 0x7fff) > 0x7f80;
        bad += nan ? host_float(again[i]) == host_float(again[i]) : again[i].bits != i;
    }
    CHECK(bad == 0);
    for (int i = 0; i < n; i++) {
        if (x[i] != x[i]) {
            bad += host_float(rounded[i]) == host_float(rounded[i]);
            continue;
        }
        uint32_t u;
        memcpy(&u, &x[i], 4);
        uint32_t lower = u >> 16, rest = u & 0xffff;
        bool up = rest > 0x8000 || (rest == 0x8000 && (lower & 1));
        bad += rounded[i].bits != (uint16_t)(lower + up);
        bad += packed[i] != (rounded[i].bits | (uint32_t)(rounded[i].bits ^ 0x8000) << 16);
        bad += host_bf16(x[i]).bits != rounded[i].bits;
    }
    CHECK(bad == 0);
}

/* --- collectives ------------------------------------------------------------------------------------------------- */

/* out (threads, 4 kinds, 32 masks or lanes) */
KERNEL shuffle_all(double *out)
{
    double *mine = out + threadIdx.x * 128;
    float x = (float)threadIdx.x + 0.5f;
    for (int i = 0; i < 32; i++) {
        mine[i] = (double)shuffle_xor(x, i);
        mine[32 + i] = shuffle_xor((double)x * 1e100, i);
        mine[64 + i] = (double)shuffle_xor((unsigned long long)threadIdx.x << 40, i);
        mine[96 + i] = (double)shuffle(x, i);
    }
}

KERNEL warp_totals(float *sums, float *tops, int *any)
{
    any[threadIdx.x] = warp_any(threadIdx.x == 37) + 2 * warp_any(threadIdx.x >= 32);
    sums[threadIdx.x] = warp_sum((float)threadIdx.x);
    tops[threadIdx.x] = warp_max(threadIdx.x == 37 ? 1000.0f : (float)(threadIdx.x % 7));
}

static void test_shuffles(void)
{
    const int threads = 96;
    device_array<double> out(threads * 128);
    device_array<float> sums(threads), tops(threads);
    device_array<int> any(threads);
    LAUNCH(shuffle_all, 1, threads, 0, stream, out.dev);
    LAUNCH(warp_totals, 1, threads, 0, stream, sums.dev, tops.dev, any.dev);
    out.get(), sums.get(), tops.get(), any.get();
    int bad = 0;
    for (int t = 0; t < threads; t++) {
        for (int i = 0; i < 32; i++) {
            int other = t ^ i, lane = t / 32 * 32 + i;
            bad += out[t * 128 + i] != other + 0.5;
            bad += out[t * 128 + 32 + i] != (other + 0.5) * 1e100;
            bad += out[t * 128 + 64 + i] != ldexp(other, 40);
            bad += out[t * 128 + 96 + i] != lane + 0.5;
        }
        bad += sums[t] != (float)(t / 32 * 1024 + 496);
        bad += any[t] != (t < 32 ? 0 : t < 64 ? 3 : 2);
        bad += tops[t] != (t / 32 == 1 ? 1000.0f : 6.0f);
    }
    CHECK(bad == 0);
}

/* Four matrices of 8 rows of 8, in shared memory at odd places; out (2 forms, 32 lanes, 4). */
KERNEL load_matrices(const bf16 *in, uint32_t *out)
{
    DYNAMIC_SHARED(bf16, shared);
    unsigned lane = threadIdx.x;
    bf16 *row = shared + (lane * 5 % 32) * 8; /* row lane % 8 of matrix lane / 8 */
    for (int i = 0; i < 8; i++)
        row[i] = in[lane * 8 + i];
    warp_sync();
    ldmatrix_x4(out + lane * 4, row);
    ldmatrix_x4_transposed(out + 128 + lane * 4, row);
}

static void test_ldmatrix(void)
{
    device_array<bf16> in(256);
    device_array<uint32_t> out(256);
    for (int i = 0; i < 256; i++)
        in[i].bits = (uint16_t)(i + 1000);
    in.put();
    LAUNCH(load_matrices, 1, 32, 512, stream, in.dev, out.dev);
    out.get();
    int bad = 0;
    for (unsigned matrix = 0; matrix < 4; matrix++) {
        for (unsigned i = 0; i < 8; i++) {
            for (unsigned j = 0; j < 8; j++) {
                /* PTX: element (i, j) is the half j % 2 of lane 4i + j / 2 */
                uint32_t plain = out[(4 * i + j / 2) * 4 + matrix] >> 16 * (j % 2) & 0xffff;
                uint32_t turned = out[128 + (4 * j + i / 2) * 4 + matrix] >> 16 * (i % 2) & 0xffff;
                bad += plain != in[matrix * 64 + i * 8 + j].bits;
                bad += turned != in[matrix * 64 + i * 8 + j].bits;
            }
        }
    }
    CHECK(bad == 0);
}

/* c (16, 8) += a (16, 16)·b (16, 8), all row-major: fragments loaded element by element as PTX describes them, and
 * again by ldmatrix as kernels do it. out (2, 16, 8). */
KERNEL multiply(const bf16 *a, const bf16 *b, const float *c, float *out)
{
    DYNAMIC_SHARED(bf16, shared); /* a, then b */
    unsigned lane = threadIdx.x, group = lane / 4, in_group = lane % 4;
    uint32_t fa[4], fb[4];
    float d[4];
    for (unsigned i = lane; i < 256; i += 32)
        shared[i] = a[i];
    for (unsigned i = lane; i < 128; i += 32)
        shared[256 + i] = b[i];
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = group + i % 2 * 8, column = in_group * 2 + i / 2 * 8;
        fa[i] = a[row * 16 + column].bits | (uint32_t)a[row * 16 + column + 1].bits << 16;
    }
    for (unsigned i = 0; i < 2; i++) {
        unsigned k = in_group * 2 + i * 8;
        fb[i] = b[k * 8 + group].bits | (uint32_t)b[(k + 1) * 8 + group].bits << 16;
    }
    for (unsigned i = 0; i < 4; i++)
        d[i] = c[(group + i / 2 * 8) * 8 + in_group * 2 + i % 2];
    mma_16816(d, fa, fb);
    for (unsigned i = 0; i < 4; i++)
        out[(group + i / 2 * 8) * 8 + in_group * 2 + i % 2] = d[i];

    warp_sync();
    ldmatrix_x4(fa, shared + (lane % 16) * 16 + lane / 16 * 8);
    ldmatrix_x4_transposed(fb, shared + 256 + (lane % 16) * 8); /* two matrices, twice */
    for (unsigned i = 0; i < 4; i++)
        d[i] = c[(group + i / 2 * 8) * 8 + in_group * 2 + i % 2];
    mma_16816(d, fa, fb);
    for (unsigned i = 0; i < 4; i++)
        out[128 + (group + i / 2 * 8) * 8 + in_group * 2 + i % 2] = d[i];
}

static void test_mma(void)
{
    device_array<bf16> a(256), b(128);
    device_array<float> c(128), out(256);
    float want[128];
    a.fill_uniform();
    b.fill_uniform();
    c.fill_uniform();
    out.poison();
    LAUNCH(multiply, 1, 32, (256 + 128) * 2, stream, a.dev, b.dev, c.dev, out.dev);
    out.get();
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            double sum = (double)c[i * 8 + j];
            for (int k = 0; k < 16; k++)
                sum += (double)host_float(a[i * 16 + k]) * (double)host_float(b[k * 8 + j]);
            want[i * 8 + j] = (float)sum;
        }
    }
    CHECK_DISTANCE(out.host, want, 128, 1e-6);
    CHECK_DISTANCE(out.host + 128, want, 128, 1e-6);
}

/* --- barriers ---------------------------------------------------------------------------------------------------- */

/* A value goes `rounds` times from thread t to thread (t + step) % threads, through one buffer. */
KERNEL pass_on(int rounds, int step, int *out)
{
    DYNAMIC_SHARED(int, shared);
    int x = (int)threadIdx.x;
    for (int r = 0; r < rounds; r++) {
        block_sync();
        shared[threadIdx.x] = x;
        block_sync();
        x = shared[(threadIdx.x + (unsigned)step) % blockDim.x];
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}

static void test_block_sync(void)
{
    static const int threads[] = {1, 31, 32, 128, 1000, 1024};
    for (size_t i = 0; i < ARRAY_LEN(threads); i++) {
        int n = threads[i], bad = 0;
        device_array<int> out((size_t)n * 2);
        LAUNCH(pass_on, 2, n, n * sizeof(int), stream, 5, 33, out.dev);
        out.get();
        for (int t = 0; t < 2 * n; t++)
            bad += out[t] != (t % n + 5 * 33) % n;
        CHECK(bad == 0);
    }
}

/* --- asynchronous copies ----------------------------------------------------------------------------------------- */

/* Rows of 16 bytes in two groups, of which the first is waited for first; out (32 lanes, 2). */
KERNEL copy_groups(const uint32_t *in, uint32_t *out)
{
    DYNAMIC_SHARED(uint32_t, shared);
    unsigned lane = threadIdx.x;
    for (unsigned group = 0; group < 2; group++) {
        async_copy_16(shared + (group * 32 + lane) * 4, in + (group * 32 + lane) * 4, (int)(lane % 5) * 4);
        async_commit();
    }
    async_wait<1>();
    warp_sync();
    out[lane] = 0;
    for (unsigned i = 0; i < 4; i++)
        out[lane] += shared[(31 - lane) * 4 + i];
    async_wait<0>();
    warp_sync();
    out[32 + lane] = 0;
    for (unsigned i = 0; i < 4; i++)
        out[32 + lane] += shared[(63 - lane) * 4 + i];
}

static void test_async_copies(void)
{
    device_array<uint32_t> in(256), out(64);
    for (uint32_t i = 0; i < 256; i++)
        in[i] = i * i + 1;
    in.put();
    LAUNCH(copy_groups, 1, 32, 1024, stream, in.dev, out.dev);
    out.get();
    int bad = 0;
    for (uint32_t i = 0; i < 64; i++) {
        uint32_t sum = 0, lane = 31 - i % 32;
        for (uint32_t j = 0; j < lane % 5; j++)
            sum += in[(i / 32 * 32 + lane) * 4 + j];
        bad += out[i] != sum;
    }
    CHECK(bad == 0);
}

/* --- products ---------------------------------------------------------------------------------------------------- */

template <typename T>
static void product_case(int32_t m, int32_t n, int32_t k, bool a_transposed, bool b_transposed, float beta,
                         enum tensor_type c_type)
{
    struct error err = {};
    int32_t pad = 8, lda = (a_transposed ? m : k) + pad, ldb = (b_transposed ? k : n) + pad, ldc = n + pad;
    device_array<T> a((size_t)lda * (a_transposed ? k : m)), b((size_t)ldb * (b_transposed ? n : k));
    device_array<float> c((size_t)ldc * m);
    device_array<bf16> c_short((size_t)ldc * m);
    float *want = static_cast<float *>(malloc((size_t)ldc * m * sizeof(float)));
    if (!want)
        abort();
    a.fill_uniform();
    b.fill_uniform();
    c.fill_uniform();
    if (beta == 0)
        c.poison();
    for (int32_t i = 0; i < m; i++) { /* behind the columns: untouched */
        for (int32_t j = n; j < ldc; j++)
            c[(size_t)i * ldc + j] = 7;
    }
    c.put();
    for (size_t i = 0; i < c.n; i++) {
        c_short[i] = host_bf16(c[i]);
        want[i] = c_type == TENSOR_BF16 ? host_float(c_short[i]) : c[i];
    }
    c_short.put();
    for (int32_t i = 0; i < m; i++) {
        for (int32_t j = 0; j < n; j++) {
            double sum = 0;
            for (int32_t l = 0; l < k; l++)
                sum += (double)host_float(a[a_transposed ? (size_t)l * lda + i : (size_t)i * lda + l]) *
                       (double)host_float(b[b_transposed ? (size_t)j * ldb + l : (size_t)l * ldb + j]);
            float *w = &want[(size_t)i * ldc + j];
            *w = (float)(1.5 * sum + (beta != 0 ? (double)beta * (double)*w : 0));
        }
    }
    struct products *products = products_new(element_type<T>::type, false, &err);
    CHECK(products != NULL);
    struct product p = {};
    p.m = m, p.n = n, p.k = k;
    p.a = a.dev, p.lda = lda, p.a_transposed = a_transposed;
    p.b = b.dev, p.ldb = ldb, p.b_transposed = b_transposed;
    p.alpha = 1.5f, p.beta = beta;
    p.c = c_type == TENSOR_BF16 ? (void *)c_short.dev : (void *)c.dev;
    p.ldc = ldc, p.c_type = c_type;
    CHECK(product_run(products, stream, &p) == 0);
    c.get(), c_short.get();
    if (c_type == TENSOR_BF16)
        CHECK_DISTANCE(c_short.host, want, c.n, 4e-3);
    else
        CHECK_DISTANCE(c.host, want, c.n, 1e-6);
    int bad = 0;
    for (int32_t i = 0; i < m; i++) {
        for (int32_t j = n; j < ldc; j++)
            bad += c[(size_t)i * ldc + j] != 7 || host_float(c_short[(size_t)i * ldc + j]) != 7;
    }
    CHECK(bad == 0);
    products_free(products);
    free(want);
}

static void test_products(void)
{
    for (int form = 0; form < 4; form++) {
        bool at = form & 1, bt = form & 2;
        product_case<float>(24, 40, 16, at, bt, 0, TENSOR_F32);
        product_case<bf16>(16, 8, 64, at, bt, 1, TENSOR_BF16);
        product_case<bf16>(32, 24, 8, at, bt, 0, TENSOR_F32);
        product_case<bf16>(8, 48, 40, at, bt, 0, TENSOR_BF16);
    }
    product_case<float>(8, 8, 8, false, true, 0.5f, TENSOR_F32);
}

/* --- products of a group of warps --------------------------------------------------------------------------------- */

enum mistake {
    NO_MISTAKE,
    NO_BARRIER_BEFORE_READ,  /* block_sync between writing a tile and reading it */
    NO_BARRIER_BEFORE_WRITE, /* block_sync between reading a tile and writing the next */
    NO_ASYNC_WAIT,
    WAIT_FOR_TOO_FEW,
    NO_ASYNC_COMMIT,
    NO_WARP_SYNC_BEFORE_READ,
    NO_WARP_SYNC_BEFORE_WRITE,
    NO_WARP_SYNC_BEFORE_LDMATRIX,
    NO_PROXY_FENCE,
    NO_WGMMA_FENCE,
    NO_WGMMA_COMMIT,
    NO_WGMMA_WAIT,
    WGMMA_WAIT_FOR_TOO_FEW,
    OPERAND_CHANGED,
    REGISTER_CHANGED,
    MISTAKES
};

/* out (128 rows, 128) = (a·bᵀ rounded)·b for a (128, 128), b (64, 128): two groups, two panels. */
KERNEL multiply_twice(enum mistake mistake, const bf16 *a, const bf16 *b, float *out)
{
#if HAVE_WGMMA
    DYNAMIC_SHARED(bf16, shared); /* panels: a (2, 128, 64), b (2, 64, 64) */
    bf16 *bs = shared + 128 * 128;
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, group = shuffle(warp / WARP_GROUP, 0);
    for (int i = (int)threadIdx.x; i < 192 * 16; i += 256) {
        int row = i / 16, unit = i % 16, r = row < 128 ? row : row - 128, rows = row < 128 ? 128 : 64;
        bf16 *to = row < 128 ? shared : bs;
        async_copy_16(to + unit / 8 * rows * 64 + r * 64 + (unit % 8 ^ r % 8) * 8,
                      (row < 128 ? a : b) + r * 128 + unit * 8, 16);
    }
    async_commit();
    async_wait<0>();
    if (mistake != NO_PROXY_FENCE)
        proxy_fence();
    block_sync();
    float s[8][4], x[16][4] = {};
    uint32_t p[4][4];
    uint64_t ma = wgmma_matrix(shared + group * 64 * 64, 128 * 128), mb = wgmma_matrix(bs, 64 * 128);
    if (mistake != NO_WGMMA_FENCE)
        wgmma_fence();
    for (int k = 0; k < 8; k++)
        wgmma_shared<64>(s, ma + (k / 4 * 1024 + k % 4 * 2), mb + (k / 4 * 512 + k % 4 * 2), k > 0);
    if (mistake != NO_WGMMA_COMMIT)
        wgmma_commit();
    if (mistake == OPERAND_CHANGED && threadIdx.x == 255)
        shared[128 * 128 - 1].bits ^= 1;
    if (mistake == WGMMA_WAIT_FOR_TOO_FEW)
        wgmma_wait<1>(s);
    else if (mistake != NO_WGMMA_WAIT)
        wgmma_wait<0>(s);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++)
            p[k][i] = bf16_pack(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
    wgmma_fence(p, x);
    for (int k = 0; k < 4; k++)
        wgmma_registers<128>(x, p[k], mb + k * 128);
    wgmma_commit();
    if (mistake == REGISTER_CHANGED)
        p[3][3] ^= 0x4000;
    wgmma_wait<0>(x);
    for (int n = 0; n < 16; n++)
        for (int e = 0; e < 4; e++)
            out[(warp * 16 + lane / 4 + e / 2 * 8) * 128 + n * 8 + lane % 4 * 2 + e % 2] = x[n][e];
#else
    (void)mistake, (void)a, (void)b, (void)out;
    trap();
#endif
}

#define MULTIPLY_TWICE_SHARED (192 * 128 * sizeof(bf16))

/* Whether the result is right. */
static bool run_multiply_twice(enum mistake mistake)
{
    device_array<bf16> a(128 * 128), b(64 * 128);
    device_array<float> out(128 * 128);
    static float want[128 * 128];
    a.fill_uniform();
    b.fill_uniform();
    out.poison();
    LAUNCH(multiply_twice, 1, 256, MULTIPLY_TWICE_SHARED, stream, mistake, a.dev, b.dev, out.dev);
    out.get();
    for (int i = 0; i < 128; i++) {
        float scores[64];
        for (int j = 0; j < 64; j++) {
            float sum = 0;
            for (int k = 0; k < 128; k++)
                sum += host_float(a[i * 128 + k]) * host_float(b[j * 128 + k]);
            scores[j] = host_float(host_bf16(sum));
        }
        for (int j = 0; j < 128; j++) {
            want[i * 128 + j] = 0;
            for (int k = 0; k < 64; k++)
                want[i * 128 + j] += scores[k] * host_float(b[k * 128 + j]);
        }
    }
    return distance(out.host, want, 128 * 128) < 1e-4; /* a sum on a rounding's edge may fall to the other side */
}

static void test_wgmma(void)
{
    if (BUILT_FOR_WGMMA && device_capability() == 90)
        CHECK(run_multiply_twice(NO_MISTAKE));
}

#ifdef CUDA_SHIM

/* --- the shim: a forgotten barrier shows ------------------------------------------------------------------------- */

/* Sums tiles of 128 values the way attention goes through keys: fetched by all, read by all. out (128) = Σ tiles,
 * turned. */
template <enum mistake mistake> TEMPLATE_KERNEL sum_tiles(int tiles, const float *in, float *out)
{
    DYNAMIC_SHARED(float, shared); /* 2 stages of 128 */
    float sum = 0;
    for (int stage = 0; stage < 2; stage++) {
        if (threadIdx.x < 32)
            async_copy_16(shared + stage * 128 + threadIdx.x * 4, in + stage * 128 + threadIdx.x * 4, 16);
        if (mistake != NO_ASYNC_COMMIT)
            async_commit();
    }
    for (int tile = 0; tile < tiles; tile++) {
        if (mistake == WAIT_FOR_TOO_FEW)
            async_wait<2>();
        else if (mistake != NO_ASYNC_WAIT)
            async_wait<1>();
        if (mistake != NO_BARRIER_BEFORE_READ)
            block_sync();
        sum += shared[tile % 2 * 128 + 127 - threadIdx.x];
        if (mistake != NO_BARRIER_BEFORE_WRITE)
            block_sync();
        if (threadIdx.x < 32 && tile + 2 < tiles)
            async_copy_16(shared + tile % 2 * 128 + threadIdx.x * 4, in + (tile + 2) * 128 + threadIdx.x * 4, 16);
        if (mistake != NO_ASYNC_COMMIT)
            async_commit();
    }
    out[threadIdx.x] = sum;
}

/* The same within each warp: 32 values at a time, through the warp's own memory and, once, ldmatrix. */
template <enum mistake mistake> TEMPLATE_KERNEL sum_in_warp(int tiles, const float *in, float *out)
{
    DYNAMIC_SHARED(float, all);
    float *shared = all + threadIdx.x / 32 * 128;
    unsigned lane = threadIdx.x % 32;
    float sum = 0;
    for (int tile = 0; tile < tiles; tile++) {
        shared[lane] = in[tile * 128 + threadIdx.x];
        if (mistake != NO_WARP_SYNC_BEFORE_READ)
            warp_sync();
        sum += shared[31 - lane];
        if (mistake != NO_WARP_SYNC_BEFORE_WRITE)
            warp_sync();
    }
    for (unsigned i = 0; i < 4; i++)
        shared[i * 32 + lane] = 1; /* 32 rows of 16 bytes, each written by 4 lanes */
    if (mistake != NO_WARP_SYNC_BEFORE_LDMATRIX)
        warp_sync();
    uint32_t r[4];
    ldmatrix_x4(r, shared + lane * 4);
    for (unsigned i = 0; i < 4; i++)
        sum += r[i] == 0x3f800000 ? 0 : 1;
    out[threadIdx.x] = sum;
}

static const struct {
    enum shim_order_kind kind;
    uint64_t seed;
} orders[] = {{SHIM_FORWARD, 0}, {SHIM_REVERSE, 0}, {SHIM_SEEDED, 1}, {SHIM_SEEDED, 2}};

/* In how many of the orders a kernel of sums is right. */
static int right_orders(void (*kernel)(int, const float *, float *), int group)
{
    const int tiles = 5;
    int right = 0;
    device_array<float> in(tiles * 128), out(128);
    in.fill_uniform();
    for (size_t i = 0; i < ARRAY_LEN(orders); i++) {
        int bad = 0;
        out.poison();
        shim_order(orders[i].kind, orders[i].seed);
        LAUNCH(kernel, 1, 128, 2048, stream, tiles, in.dev, out.dev);
        out.get();
        for (int t = 0; t < 128; t++) {
            float sum = 0;
            for (int tile = 0; tile < tiles; tile++)
                sum += in[(size_t)(tile * 128 + t / group * group + group - 1 - t % group)];
            bad += !(out[(size_t)t] == sum);
        }
        right += bad == 0;
    }
    shim_order(SHIM_FORWARD, 0);
    return right;
}

static void test_mistakes_show(void)
{
    const int all = (int)ARRAY_LEN(orders);
    CHECK(right_orders(sum_tiles<NO_MISTAKE>, 128) == all);
    CHECK(right_orders(sum_tiles<NO_BARRIER_BEFORE_READ>, 128) < all);
    CHECK(right_orders(sum_tiles<NO_BARRIER_BEFORE_WRITE>, 128) < all);
    CHECK(right_orders(sum_tiles<NO_ASYNC_WAIT>, 128) == 0);
    CHECK(right_orders(sum_tiles<WAIT_FOR_TOO_FEW>, 128) == 0);
    CHECK(right_orders(sum_tiles<NO_ASYNC_COMMIT>, 128) == 0);
    CHECK(right_orders(sum_in_warp<NO_MISTAKE>, 32) == all);
    CHECK(right_orders(sum_in_warp<NO_WARP_SYNC_BEFORE_READ>, 32) < all);
    CHECK(right_orders(sum_in_warp<NO_WARP_SYNC_BEFORE_WRITE>, 32) < all);
    CHECK(right_orders(sum_in_warp<NO_WARP_SYNC_BEFORE_LDMATRIX>, 32) < all);
    CHECK(!run_multiply_twice(NO_WGMMA_COMMIT));
    CHECK(!run_multiply_twice(NO_WGMMA_WAIT));
    CHECK(!run_multiply_twice(WGMMA_WAIT_FOR_TOO_FEW));
    CHECK(!run_multiply_twice(REGISTER_CHANGED));
}

/* --- the shim: order, memory, errors ----------------------------------------------------------------------------- */

KERNEL note_order(int *count, int *threads, int *blocks)
{
    threads[*count] = (int)threadIdx.x;
    blocks[(*count)++] = (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    block_sync();
    threads[*count] = (int)threadIdx.x;
    blocks[(*count)++] = -1;
}

/* 64 threads, twice each, in 12 blocks. */
struct noted {
    int threads[12 * 128], blocks[12 * 128];
};

static void note(enum shim_order_kind kind, uint64_t seed, struct noted *ret)
{
    device_array<int> count(1), threads(12 * 128), blocks(12 * 128);
    shim_order(kind, seed);
    LAUNCH(note_order, dim3(2, 3, 2), 64, 0, stream, count.dev, threads.dev, blocks.dev);
    shim_order(SHIM_FORWARD, 0);
    count.get(), threads.get(), blocks.get();
    CHECK(count[0] == 12 * 128);
    memcpy(ret->threads, threads.host, sizeof ret->threads);
    memcpy(ret->blocks, blocks.host, sizeof ret->blocks);
}

static void test_orders(void)
{
    static struct noted forward, reverse, one, same, two;
    note(SHIM_FORWARD, 0, &forward);
    note(SHIM_REVERSE, 0, &reverse);
    note(SHIM_SEEDED, 1, &one);
    note(SHIM_SEEDED, 1, &same);
    note(SHIM_SEEDED, 2, &two);
    int bad = 0;
    for (int i = 0; i < 12 * 128; i++) {
        bad += forward.threads[i] != i % 64 || reverse.threads[i] != 63 - i % 64;
        bad += forward.blocks[i] != (i % 128 < 64 ? i / 128 : -1) ||
               reverse.blocks[i] != (i % 128 < 64 ? 11 - i / 128 : -1);
    }
    CHECK(bad == 0);
    CHECK(memcmp(&one, &same, sizeof one) == 0);
    CHECK(memcmp(one.threads, two.threads, sizeof one.threads) != 0);
    CHECK(memcmp(one.threads, one.threads + 64, 64 * sizeof(int)) != 0);
    CHECK(memcmp(one.threads, forward.threads, sizeof one.threads) != 0);
    for (int i = 0; i < 12; i++) { /* every block, every thread, once */
        uint64_t seen[2] = {0, 0};
        int before = 0;
        for (int j = 0; j < 128; j++)
            seen[j / 64] |= (uint64_t)1 << one.threads[i * 128 + j];
        for (int j = 0; j < i; j++)
            before += one.blocks[j * 128] == one.blocks[i * 128];
        CHECK(before == 0 && seen[0] == UINT64_MAX && seen[1] == UINT64_MAX);
    }
}

KERNEL read_shared(int n, uint32_t *out)
{
    DYNAMIC_SHARED(uint32_t, shared);
    for (unsigned i = threadIdx.x; i < (unsigned)n; i += blockDim.x) {
        out[blockIdx.x * (unsigned)n + i] = shared[i];
        shared[i] = 5;
    }
}

static void test_shared_starts_as_nan(void)
{
    device_array<uint32_t> out(2 * 300);
    LAUNCH(read_shared, 2, 64, 300 * 4, stream, 300, out.dev);
    out.get();
    int bad = 0;
    for (int i = 0; i < 600; i++)
        bad += out[(size_t)i] != 0xffffffff;
    CHECK(bad == 0);
}

/* The source is read by the wait, not before. */
KERNEL copy_late(uint32_t *from, uint32_t *out)
{
    DYNAMIC_SHARED(uint32_t, shared);
    async_copy_16(shared, from, 16);
    async_commit();
    out[0] = shared[0];
    from[0] = 6;
    async_wait<0>();
    out[1] = shared[0];
}

static void test_copies_come_late(void)
{
    device_array<uint32_t> from(4), out(2);
    LAUNCH(copy_late, 1, 1, 16, stream, from.dev, out.dev);
    out.get();
    CHECK(out[0] == 0xffffffff && out[1] == 6);
}

KERNEL wrong(int what, const unsigned char *in)
{
    DYNAMIC_SHARED(unsigned char, shared);
    volatile unsigned char *behind = shared;
    uint32_t r[4] = {0, 0, 0, 0};
    float d[4] = {0, 0, 0, 0};
    switch (what) {
    case 0: /* one thread returns early */
        if (threadIdx.x == 40)
            return;
        block_sync();
        break;
    case 1:
        if (threadIdx.x == 40)
            return;
        warp_sync();
        break;
    case 2:
        if (threadIdx.x == 40)
            warp_sync();
        else
            shuffle_xor(1.0f, 1);
        break;
    case 3: /* one lane waits for the block, the rest for the warp */
        if (threadIdx.x == 40)
            block_sync();
        else
            mma_16816(d, r, r);
        break;
    case 4:
        if (threadIdx.x == 40)
            behind[1024 + 3] = 1;
        break;
    case 5:
        async_copy_16(shared + 8, in, 16);
        break;
    case 6:
        async_copy_16(shared, in + 4, 16);
        break;
    case 7:
        async_copy_16(shared + 1024, in, 16);
        break;
    case 8:
        ldmatrix_x4(r, shared + 2 * threadIdx.x);
        break;
    case 9:
        ldmatrix_x4_transposed(r, in);
        break;
    case 10:
        LAUNCH(wrong, 1, 64, 1024, stream, 4, in);
        break;
    case 11:
        async_copy_16(shared, in, 17);
        break;
    case 13: {
        float x[8][4] = {};
        wgmma_fence(x);
        wgmma_shared<64>(x, wgmma_matrix(reinterpret_cast<bf16 *>(shared) + 64 * (threadIdx.x == 40), 0),
                         wgmma_matrix(reinterpret_cast<bf16 *>(shared), 0), false);
        wgmma_commit();
        wgmma_wait<0>(x);
        break;
    }
    case 14: {
        float x[8][4] = {};
        wgmma_fence(x);
        wgmma_shared<64>(x, wgmma_matrix(reinterpret_cast<bf16 *>(shared), 0),
                         wgmma_matrix(reinterpret_cast<bf16 *>(shared) + 1024, 0), false);
        break;
    }
    case 15:
        trap();
        break;
    case 12: /* a barrier that half of the block never reaches, each half by itself whole */
        if (threadIdx.x < 32)
            block_sync();
        break;
    default:
        break;
    }
}

static const struct {
    int what;
    struct dim3 grid, block;
    size_t shared_bytes;
    const char *says;
} wrongs[] = {
    {0, 1, 64, 1024, "barrier not reached by all threads: 63 wait in block_sync, 1 returned"},
    {1, 1, 64, 1024, "warp_sync not reached by all lanes of warp 1: lanes fffffeff wait, 00000000 wait in block_sync"},
    {2, 1, 64, 1024, "a lane in warp_sync, where lanes 000000ff of its warp wait in a shuffle"},
    {3, 1, 64, 1024, "mma_16816 not reached by all lanes of warp 1: lanes fffffeff wait, 00000100 wait in block_sync"},
    {1, 1, 40, 1024, "warp_sync in a warp of 8 lanes"},
#if !defined(__SANITIZE_ADDRESS__)
    {4, 1, 64, 1024, "byte 3 behind 1024 bytes of shared memory was written"},
#else
    {4, 1, 64, 1024, "heap-buffer-overflow"},
#endif
    {5, 1, 64, 1024, "async_copy_16: shared memory at byte 8, not 16-byte aligned"},
    {6, 1, 64, 1024, "from an address that is not 16-byte aligned"},
    {7, 1, 64, 1024, "async_copy_16: byte 1024 of 1024 bytes of shared memory"},
    {8, 1, 64, 1024, "ldmatrix_x4: shared memory at byte 2, not 16-byte aligned"},
    {9, 1, 64, 1024, "bytes of shared memory"},
    {10, 1, 64, 1024, "launched by a kernel"},
    {11, 1, 64, 1024, "of 17 bytes"},
    {12, 1, 64, 1024, "barrier not reached by all threads: 32 wait in block_sync, 32 returned"},
    {13, 1, 128, 16384, "lanes 0 and 8 of warp 1 have different products"},
    {13, 1, 64, 16384, "wgmma in a block of 64 threads, not of whole groups"},
    {14, 1, 128, 8192, "bytes of shared memory"},
    {15, 1, 64, 0, "trap"},
    {100 + NO_PROXY_FENCE, 1, 64, 0, "without a proxy_fence since"},
    {100 + NO_WGMMA_FENCE, 1, 64, 0, "wgmma without a wgmma_fence since the last wait"},
    {100 + OPERAND_CHANGED, 1, 64, 0, "shared memory changed under a product"},
    {99, 0, 64, 0, "a grid of 0 x 1 x 1 blocks"},
    {99, dim3(1, 65536, 1), 64, 0, "a grid of 1 x 65536 x 1 blocks"},
    {99, 1, 1025, 0, "a block of 1025 x 1 x 1 threads"},
    {99, 1, dim3(32, 2, 1), 0, "a block of 32 x 2 x 1 threads"},
    {99, 1, 0, 0, "a block of 0 x 1 x 1 threads"},
    {99, 1, 64, 227 * 1024 + 1, "232449 bytes of shared memory"},
};

static void test_wrong_kernels_end_the_process(void)
{
    device_array<unsigned char> in(4096);
    for (size_t i = 0; i < ARRAY_LEN(wrongs); i++) {
        static char text[1 << 16];
        size_t length = 0;
        ssize_t got;
        int ends[2], status = 0;
        if (pipe(ends) != 0)
            abort();
        pid_t child = fork();
        if (child == 0) {
            dup2(ends[1], 2);
            close(ends[0]);
            alarm(20);
            if (wrongs[i].what >= 100)
                run_multiply_twice((enum mistake)(wrongs[i].what - 100));
            LAUNCH(wrong, wrongs[i].grid, wrongs[i].block, wrongs[i].shared_bytes, stream, wrongs[i].what, in.dev);
            _exit(0);
        }
        close(ends[1]);
        while ((got = read(ends[0], text + length, sizeof text - 1 - length)) > 0)
            length += (size_t)got;
        text[length] = 0;
        close(ends[0]);
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        bool ended = WIFSIGNALED(status) ? WTERMSIG(status) == SIGABRT : WEXITSTATUS(status) != 0;
        CHECK(ended);
        CHECK(strstr(text, wrongs[i].says) != NULL);
        if (!ended || !strstr(text, wrongs[i].says))
            fprintf(stderr, "case %zu should say \"%s\", said:\n%s\n", i, wrongs[i].says, text);
    }
}

/* --- the shim: devices and threads ------------------------------------------------------------------------------- */

static void test_device(void)
{
    struct error err = {};
    struct device_info info = {};
    void *a = NULL, *b = NULL;
    stream_t s = NULL;
    size_t live = shim_live_allocations(), bytes = shim_live_bytes();
    CHECK(device_open(1, &info, &err) == ERR_NOT_FOUND && info.major == 0 && err.message[0] != 0);
    CHECK(device_open(0, &info, &err) == 0);
    CHECK(info.major == 9 && info.minor == 0 && strcmp(info.name, "shim") == 0 && info.memory_bytes >= info.free_bytes);

    CHECK(setenv("CONSILIUM_SHIM_MEMORY_BYTES", "10000", 1) == 0);
    CHECK(device_open(0, &info, &err) == 0 && info.memory_bytes == 10000);
    CHECK(device_free_bytes() == 10000 - bytes);
    CHECK(device_alloc(5000 - bytes, &a) == 0 && (uintptr_t)a % 256 == 0);
    int bad = 0;
    for (size_t i = 0; a && i < 5000 - bytes; i++)
        bad += static_cast<unsigned char *>(a)[i] != 0;
    CHECK(bad == 0);
    CHECK(device_alloc(5001, &b) == ERR_RESOURCES && b == NULL);
    CHECK(device_alloc(SIZE_MAX, &b) == ERR_RESOURCES && b == NULL);
    CHECK(device_alloc(0, &b) == 0 && b != NULL);
    device_release(b);
    device_release(NULL);
    CHECK(shim_live_allocations() == live + 1 && shim_live_bytes() > bytes);
    device_release(a);
    CHECK(unsetenv("CONSILIUM_SHIM_MEMORY_BYTES") == 0);

    shim_capability(0);
    CHECK(setenv("CONSILIUM_SHIM_CAPABILITY", "89", 1) == 0);
    CHECK(device_capability() == 89);
    shim_capability(80);
    CHECK(device_capability() == 80 && device_open(0, &info, &err) == 0 && info.major == 8 && info.minor == 0);
    shim_capability(0);
    CHECK(unsetenv("CONSILIUM_SHIM_CAPABILITY") == 0 && device_capability() == 90);

    CHECK(device_pinned_alloc(10, &a) == 0 && device_stream_new(&s) == 0);
    CHECK(shim_live_allocations() == live + 2);
    shim_fail_next_sync(ERR_RESOURCES);
    CHECK(device_sync(s, &err) == ERR_RESOURCES && err.code == ERR_RESOURCES);
    CHECK(device_sync(s, &err) == 0);
    device_pinned_release(a);
    device_stream_free(s);
    CHECK(shim_live_allocations() == live && shim_live_bytes() == bytes);
}

/* What is recorded is done at each replay, with the arguments of its recording and what memory holds then. */
static void test_recordings(void)
{
    struct error err;
    stream_t s;
    void *from = NULL, *to = NULL, *more = NULL;
    const size_t live = shim_live_allocations(), replays = shim_replays();
    CHECK(device_stream_new(&s) == 0 && device_alloc(400, &from) == 0 && device_alloc(400, &to) == 0);
    int *source = static_cast<int *>(from), *target = static_cast<int *>(to), argument = 5;
    auto work = [&] {
        LAUNCH(pass_on, 2, 50, 50 * sizeof(int), s, argument, 33, target);
        device_copy(s, source, target, 400);
        device_zero(s, target, 4);
    };
    CHECK(device_record_begin(s));
    work();
    CHECK(target[1] == 0 && source[1] == 0);
    struct recording *r = device_record_end(s);
    CHECK(r != NULL && target[1] == 0);
    argument = 6;
    for (int i = 0; r && i < 2; i++) {
        memset(from, 0, 400);
        memset(to, 0, 400);
        device_replay(s, r);
        for (int t = 0; t < 100; t++)
            CHECK(source[t] == (t % 50 + 5 * 33) % 50 && target[t] == (t == 0 ? 0 : source[t]));
    }
    CHECK(shim_replays() == replays + 2);
    device_recording_free(r);
    work();
    CHECK(source[1] == (1 + 6 * 33) % 50);

    CHECK(device_record_begin(s) && device_alloc(4, &more) == ERR_RESOURCES && device_record_end(s) == NULL);
    CHECK(device_record_begin(s) && device_sync(s, &err) == ERR_FAILED && device_record_end(s) == NULL);
    CHECK(device_record_begin(s));
    shim_fail_launches(1, 1);
    work();
    CHECK(!device_failed());
    work();
    CHECK(device_failed() && device_record_end(s) == NULL && !device_failed());
    shim_fail_launches(0, 1);
    work();
    CHECK(device_failed() && device_sync(s, &err) == ERR_FAILED && !device_failed() && device_sync(s, &err) == 0);
    device_release(from);
    device_release(to);
    device_stream_free(s);
    CHECK(shim_live_allocations() == live);
}

static void *launch_often(void *ctx)
{
    intptr_t bad = 0;
    device_array<int> out(2 * 200);
    for (int i = 0; i < 20; i++) {
        LAUNCH(pass_on, 2, 200, 200 * sizeof(int), stream, 5, 33, out.dev);
        out.get();
        for (int t = 0; t < 400; t++)
            bad += out[(size_t)t] != (t % 200 + 5 * 33) % 200;
    }
    (void)ctx;
    return (void *)bad;
}

static void test_two_threads(void)
{
    pthread_t threads[2];
    void *bad[2];
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, launch_often, NULL) == 0);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], &bad[i]) == 0 && bad[i] == NULL);
}

#endif

static void test_primitives(void)
{
    test_conversions();
    test_shuffles();
    test_ldmatrix();
    test_mma();
    test_block_sync();
    test_async_copies();
    test_wgmma();
}

int main(void)
{
#ifdef CUDA_SHIM
    for (size_t i = 0; i < ARRAY_LEN(orders); i++) {
        shim_order(orders[i].kind, orders[i].seed);
        RUN(test_primitives);
    }
    shim_order(SHIM_FORWARD, 0);
    RUN(test_mistakes_show);
    RUN(test_orders);
    RUN(test_shared_starts_as_nan);
    RUN(test_copies_come_late);
    RUN(test_wrong_kernels_end_the_process);
    RUN(test_device);
    RUN(test_recordings);
    RUN(test_two_threads);
#else
    RUN(test_primitives);
#endif
    RUN(test_products);
    return check_report();
}
