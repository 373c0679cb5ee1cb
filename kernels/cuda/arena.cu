/*
 * Flat arrays: clipping onto the integer grid, and the optimizers.
 *
 * Clipping count units of n values reads each twice: once for the norms, once to add the integers to the sum, which
 * then stays in registers across the units. That second pass also sums the integers' squares, exactly; if a unit turns
 * out to be over its bound, what it added is taken back and replaced, also exactly, before the stream goes on. Floor:
 * 8·n·count bytes read, and the sum (16·n) read and written.
 */
#include "kernels/cuda/internal.h"
#include "kernels/cuda/vectors.h"

#include <assert.h>

#define BLOCK 256
#define WARPS (BLOCK / WARP)
#define NORM_VECTORS 8 /* vectors of 4 floats a thread sums */
#define NORM_CHUNK (BLOCK * NORM_VECTORS * 4)
#define ADD_VECTORS 4
#define ADD_CHUNK (BLOCK * ADD_VECTORS * 4)
#define CHECK_BLOCK 512
#define REPAIR_BLOCKS 256
#define UNITS_MAX 64 /* of one pass */

static size_t chunks_of(size_t n, size_t chunk)
{
    return (n + chunk - 1) / chunk;
}

/* Four values from `at` on, zeros behind the end. whole: all are there, and aligned to 16. */
DEVICE void load_four(const float *g, size_t at, size_t n, bool whole, float x[4])
{
    if (whole) {
        vec_unpack<float>(vec_load(g + at), x);
        return;
    }
    for (int i = 0; i < 4; i++)
        x[i] = at + (size_t)i < n ? g[at + (size_t)i] : 0.0f;
}

/* Sum over the block in a fixed order, the same bits in every thread. shared: a T a warp; may be used again at once. */
template <typename T> DEVICE T block_sum(T x, T *shared)
{
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = x;
    block_sync();
    x = 0;
    for (unsigned i = 0; i < blockDim.x / WARP; i++)
        x += shared[i];
    block_sync();
    return x;
}

/* --- norms ------------------------------------------------------------------------------------------------------- */

/* partials (unit, chunk): sums of squares of NORM_CHUNK values. Squares of floats neither overflow nor vanish in
 * double, so a sum is finite exactly if every value is. */
KERNEL clip_squares(size_t n, const float *RESTRICT g, size_t stride, bool vectors, double *RESTRICT partials)
{
    DYNAMIC_SHARED(double, shared);
    size_t first = (size_t)blockIdx.x * NORM_CHUNK + threadIdx.x * 4;
    float x[NORM_VECTORS][4];
    double sums[4] = {0, 0, 0, 0};
    bool whole = vectors && ((size_t)blockIdx.x + 1) * NORM_CHUNK <= n;
    g += blockIdx.y * stride;
    for (int k = 0; k < NORM_VECTORS; k++)
        load_four(g, first + (size_t)k * BLOCK * 4, n, whole, x[k]);
    for (int k = 0; k < NORM_VECTORS; k++) {
        for (int i = 0; i < 4; i++)
            sums[i] += (double)x[k][i] * (double)x[k][i];
    }
    double sum = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), shared);
    if (threadIdx.x == 0)
        partials[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

/* A unit's factor, by one block: as the first half of clip_accumulate. bound: what the float norm may be. */
KERNEL clip_factors(size_t chunks, const double *RESTRICT partials, double bound, struct clip_result *units)
{
    DYNAMIC_SHARED(double, shared);
    double sum = 0;
    for (size_t i = threadIdx.x; i < chunks; i += BLOCK)
        sum += partials[blockIdx.x * chunks + i];
    sum = block_sum(sum, shared);
    if (threadIdx.x != 0)
        return;
    struct clip_result unit = {0, 0, false, false, 0};
    unit.finite = sum <= 1.7976931348623157e308; /* not for NaN */
    if (unit.finite) {
        unit.norm = sqrt(sum);
        unit.clipped = unit.norm > bound;
        unit.factor = unit.clipped ? bound / unit.norm : 1.0;
    }
    units[blockIdx.x] = unit;
}

static void find_factors(stream_t s, size_t n, int32_t count, const float *g, size_t stride, double bound,
                         struct clip_result *units, double *partials)
{
    size_t chunks = chunks_of(n, NORM_CHUNK);
    bool vectors = (uintptr_t)g % 16 == 0 && (count == 1 || stride % 4 == 0);
    if (chunks > 0)
        LAUNCH(clip_squares, dim3((unsigned)chunks, (unsigned)count), BLOCK, WARPS * sizeof(double), s, n, g, stride,
               vectors, partials);
    LAUNCH(clip_factors, (unsigned)count, BLOCK, WARPS * sizeof(double), s, chunks, partials, bound, units);
}

/* --- the integers ------------------------------------------------------------------------------------------------ */

/* Σ v² as high·2^32 + low, both sums of 32-bit halves: exact for 2^32 values, in any order. */
struct squares {
    unsigned long long low, high;
};

/* Nearest integer to x·scale, ties to even, as on the CPU: the product rounded, then 1.5·2^52 added, which leaves no
 * bits for a fraction. Below 2^31 in magnitude (its square is at most the bound's, 2^60, and a rounding), so the low
 * word of the double is the integer. */
DEVICE int32_t to_grid(float x, double scale)
{
    double shifted = __dadd_rn(__dmul_rn((double)x, scale), 0x1.8p52);
    return (int32_t)__double_as_longlong(shifted);
}

DEVICE void add_square(struct squares *sum, int32_t v)
{
    unsigned long long square = (unsigned long long)((long long)v * v);
    sum->low += square & 0xffffffffu;
    sum->high += square >> 32;
}

DEVICE bool exceeds(struct squares sum, unsigned long long limit)
{
    unsigned long long high = sum.high + (sum.low >> 32); /* the sum is high·2^32 + the low word of low */
    return high >> 32 != 0 || (high << 32 | (sum.low & 0xffffffffu)) > limit;
}

/* This thread's part of a chunk of the sum: ADD_VECTORS times 4 values, BLOCK·4 apart. */
struct sum_part {
    long long x[ADD_VECTORS][4];
};

DEVICE void load_part(sum_part *part, const int64_t *sum, size_t first, size_t n, bool whole)
{
    for (int k = 0; k < ADD_VECTORS; k++) {
        size_t at = first + (size_t)k * BLOCK * 4;
        if (whole) {
            longlong2 a = reinterpret_cast<const longlong2 *>(sum + at)[0];
            longlong2 b = reinterpret_cast<const longlong2 *>(sum + at)[1];
            part->x[k][0] = a.x, part->x[k][1] = a.y, part->x[k][2] = b.x, part->x[k][3] = b.y;
            continue;
        }
        for (int i = 0; i < 4; i++)
            part->x[k][i] = at + (size_t)i < n ? sum[at + (size_t)i] : 0;
    }
}

DEVICE void store_part(const sum_part *part, int64_t *sum, size_t first, size_t n, bool whole)
{
    for (int k = 0; k < ADD_VECTORS; k++) {
        size_t at = first + (size_t)k * BLOCK * 4;
        if (whole) {
            reinterpret_cast<longlong2 *>(sum + at)[0] = longlong2{part->x[k][0], part->x[k][1]};
            reinterpret_cast<longlong2 *>(sum + at)[1] = longlong2{part->x[k][2], part->x[k][3]};
            continue;
        }
        for (int i = 0; i < 4; i++) {
            if (at + (size_t)i < n)
                sum[at + (size_t)i] = part->x[k][i];
        }
    }
}

/* sum += the integers of all units; partials (unit, chunk): their squares. */
KERNEL LAUNCH_BOUNDS(BLOCK, 3)
    clip_add_integers(size_t n, int32_t count, const float *RESTRICT g, size_t stride, bool vectors, bool sum_vectors,
                      double grid, const struct clip_result *RESTRICT units, int64_t *RESTRICT sum,
                      struct squares *RESTRICT partials)
{
    DYNAMIC_SHARED(struct squares, shared); /* (count, WARPS) */
    size_t first = (size_t)blockIdx.x * ADD_CHUNK + threadIdx.x * 4;
    bool inside = ((size_t)blockIdx.x + 1) * ADD_CHUNK <= n, whole = vectors && inside;
    sum_part part;
    load_part(&part, sum, first, n, sum_vectors && inside);
    for (int32_t e = 0; e < count; e++, g += stride) {
        struct squares squares = {0, 0};
        if (units[e].finite) {
            double scale = units[e].factor * grid;
            float x[ADD_VECTORS][4];
            for (int k = 0; k < ADD_VECTORS; k++)
                load_four(g, first + (size_t)k * BLOCK * 4, n, whole, x[k]);
            for (int k = 0; k < ADD_VECTORS; k++) {
                for (int i = 0; i < 4; i++) {
                    int32_t v = to_grid(x[k][i], scale);
                    add_square(&squares, v);
                    part.x[k][i] += v;
                }
            }
        }
        squares.low = warp_sum(squares.low);
        squares.high = warp_sum(squares.high);
        if (threadIdx.x % WARP == 0)
            shared[e * WARPS + (int)threadIdx.x / WARP] = squares;
    }
    store_part(&part, sum, first, n, sum_vectors && inside);
    block_sync();
    for (int32_t e = (int32_t)threadIdx.x; e < count; e += BLOCK) {
        struct squares squares = {0, 0};
        for (int i = 0; i < WARPS; i++) {
            squares.low += shared[e * WARPS + i].low;
            squares.high += shared[e * WARPS + i].high;
        }
        partials[(size_t)e * gridDim.x + blockIdx.x] = squares;
    }
}

/* The exact check of a unit, by one block. If it fails, the factor shrinks until the integers pass: never seen where
 * clip·grid is whole. first_factors: what clip_add_integers used. */
KERNEL clip_check(size_t n, size_t chunks, const float *RESTRICT g, size_t stride, bool vectors, double grid,
                  unsigned long long limit_squared, const struct squares *RESTRICT partials, struct clip_result *units,
                  double *first_factors, struct clip_result *results)
{
    DYNAMIC_SHARED(unsigned long long, shared);
    struct clip_result unit = units[blockIdx.x];
    struct squares sum = {0, 0};
    double first_factor = unit.factor;
    g += blockIdx.x * stride;
    for (size_t i = threadIdx.x; i < chunks; i += CHECK_BLOCK) {
        struct squares more = partials[blockIdx.x * chunks + i];
        sum.low += more.low;
        sum.high += more.high;
    }
    sum.low = block_sum(sum.low, shared);
    sum.high = block_sum(sum.high, shared);
    while (exceeds(sum, limit_squared)) { /* all threads have the same sum */
        unit.shrinks++;
        double step = 0x1p-20 * (double)(1ull << (unit.shrinks / 4 < 63 ? unit.shrinks / 4 : 63));
        unit.factor = unit.shrinks < 64 ? __dmul_rn(unit.factor, __dadd_rn(1.0, -step)) : 0.0;
        unit.clipped = true;
        double scale = unit.factor * grid;
        sum.low = sum.high = 0;
        for (size_t at = threadIdx.x * 4; at < n; at += CHECK_BLOCK * 4) {
            float x[4];
            load_four(g, at, n, vectors && at + 4 <= n, x);
            for (int i = 0; i < 4; i++)
                add_square(&sum, to_grid(x[i], scale));
        }
        sum.low = block_sum(sum.low, shared);
        sum.high = block_sum(sum.high, shared);
    }
    if (threadIdx.x != 0)
        return;
    units[blockIdx.x] = unit;
    first_factors[blockIdx.x] = first_factor;
    if (results)
        results[blockIdx.x] = unit;
}

/* sum += the difference that shrinking made to a unit's integers. */
KERNEL clip_repair(size_t n, int32_t count, const float *RESTRICT g, size_t stride, double grid,
                   const struct clip_result *RESTRICT units, const double *RESTRICT first_factors,
                   int64_t *RESTRICT sum)
{
    for (int32_t e = 0; e < count; e++, g += stride) {
        if (units[e].shrinks == 0)
            continue;
        double was = first_factors[e] * grid, is = units[e].factor * grid;
        for (size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (size_t)gridDim.x * BLOCK)
            sum[i] += (int64_t)to_grid(g[i], is) - to_grid(g[i], was);
    }
}

/* The largest whole number that is at most a·b, exactly. */
static uint64_t product_floor(double a, double b)
{
    double p = a * b, error = fma(a, b, -p), whole = floor(p);
    if (whole == p && error < 0)
        whole -= 1;
    return (uint64_t)whole;
}

struct clip_work {
    struct clip_result *units; /* (UNITS_MAX) */
    double *first_factors;     /* (UNITS_MAX) */
    double *norms;             /* (unit, chunk of NORM_CHUNK) */
    struct squares *squares;   /* (unit, chunk of ADD_CHUNK) */
};

static size_t aligned(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static size_t lay_out(size_t n, int32_t count, void *work, struct clip_work *ret)
{
    size_t units = (size_t)(count < UNITS_MAX ? count : UNITS_MAX);
    size_t bytes[4] = {units * sizeof(struct clip_result), units * sizeof(double),
                       units * chunks_of(n, NORM_CHUNK) * sizeof(double),
                       units * chunks_of(n, ADD_CHUNK) * sizeof(struct squares)};
    uint8_t *at = static_cast<uint8_t *>(work);
    size_t offsets[5] = {0};
    for (int i = 0; i < 4; i++)
        offsets[i + 1] = offsets[i] + aligned(bytes[i]);
    if (ret) {
        ret->units = reinterpret_cast<struct clip_result *>(at);
        ret->first_factors = reinterpret_cast<double *>(at + offsets[1]);
        ret->norms = reinterpret_cast<double *>(at + offsets[2]);
        ret->squares = reinterpret_cast<struct squares *>(at + offsets[3]);
    }
    return offsets[4];
}

size_t arena_clip_work(size_t n, int32_t count)
{
    return count > 0 ? lay_out(n, count, NULL, NULL) : 0;
}

void arena_clip_accumulate(stream_t s, size_t n, int32_t count, const float *g, size_t stride,
                           const struct clip_params *params, int64_t *sum, struct clip_result *results, void *work)
{
    double bound = params->clip - sqrt((double)n) / (2 * params->grid);
    assert(params->clip > 0 && params->grid > 0 && params->clip * params->grid <= 0x1p30 && bound > 0);
    assert(n <= (size_t)1 << 32 && (count <= 1 || stride >= n));
    uint64_t limit = product_floor(params->clip, params->grid);
    size_t chunks = chunks_of(n, ADD_CHUNK);
    bool sum_vectors = (uintptr_t)sum % 16 == 0;
    struct clip_work w;
    for (int32_t first = 0; first < count; first += UNITS_MAX) {
        int32_t units = count - first < UNITS_MAX ? count - first : UNITS_MAX;
        const float *from = g + (size_t)first * stride;
        bool vectors = (uintptr_t)from % 16 == 0 && (units == 1 || stride % 4 == 0);
        (void)lay_out(n, units, work, &w);
        find_factors(s, n, units, from, stride, bound, w.units, w.norms);
        if (chunks > 0)
            LAUNCH(clip_add_integers, (unsigned)chunks, BLOCK, (size_t)units * WARPS * sizeof(struct squares), s, n,
                   units, from, stride, vectors, sum_vectors, params->grid, w.units, sum, w.squares);
        LAUNCH(clip_check, (unsigned)units, CHECK_BLOCK, CHECK_BLOCK / WARP * sizeof(unsigned long long), s, n, chunks,
               from, stride, vectors, params->grid, (unsigned long long)(limit * limit), w.squares, w.units,
               w.first_factors, results ? results + first : NULL);
        size_t repairs = chunks_of(n, BLOCK) < REPAIR_BLOCKS ? chunks_of(n, BLOCK) : REPAIR_BLOCKS;
        if (repairs > 0)
            LAUNCH(clip_repair, (unsigned)repairs, BLOCK, 0, s, n, units, from, stride, params->grid, w.units,
                   w.first_factors, sum);
    }
}

/* sum += factor·g of all units, one after the other; 4 values a thread. */
KERNEL clip_add_floats(size_t n, int32_t count, const float *RESTRICT g, size_t stride, bool vectors,
                       const struct clip_result *RESTRICT units, float *RESTRICT sum)
{
    size_t at = ((size_t)blockIdx.x * BLOCK + threadIdx.x) * 4;
    bool whole = (uintptr_t)sum % 16 == 0 && at + 4 <= n;
    float part[4];
    if (at >= n)
        return;
    vectors = vectors && at + 4 <= n;
    load_four(sum, at, n, whole, part);
    for (int32_t e = 0; e < count; e++, g += stride) {
        float x[4], factor = (float)units[e].factor;
        if (!units[e].finite)
            continue;
        load_four(g, at, n, vectors, x);
        for (int i = 0; i < 4; i++)
            part[i] += factor * x[i];
    }
    if (whole) {
        vec_store(sum + at, vec_pack<float>(part));
        return;
    }
    for (int i = 0; i < 4; i++) {
        if (at + (size_t)i < n)
            sum[at + (size_t)i] = part[i];
    }
}

void arena_clip_add(stream_t s, size_t n, int32_t count, const float *g, size_t stride, double clip, float *sum,
                    void *work)
{
    assert(clip > 0 && n <= (size_t)1 << 32 && (count <= 1 || stride >= n));
    struct clip_work w;
    for (int32_t first = 0; n > 0 && first < count; first += UNITS_MAX) {
        int32_t units = count - first < UNITS_MAX ? count - first : UNITS_MAX;
        const float *from = g + (size_t)first * stride;
        bool vectors = (uintptr_t)from % 16 == 0 && (units == 1 || stride % 4 == 0);
        (void)lay_out(n, units, work, &w);
        find_factors(s, n, units, from, stride, clip, w.units, w.norms);
        LAUNCH(clip_add_floats, (unsigned)chunks_of(n, BLOCK * 4), BLOCK, 0, s, n, units, from, stride, vectors,
               w.units, sum);
    }
}

/* --- elementwise: 4 values a thread, one by one where the arrays are not aligned --------------------------------- */

/* change(i-th values ...) by 4, in vectors where all arrays are aligned to 16. */
struct flat {
    size_t at, n;
    bool vectors;
};

DEVICE bool flat_begin(struct flat *flat, size_t n, const void *a, const void *b, const void *c, const void *d)
{
    flat->at = ((size_t)blockIdx.x * BLOCK + threadIdx.x) * 4;
    flat->n = n;
    flat->vectors = (((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)d) & 15) == 0 && flat->at + 4 <= n;
    return flat->at < n;
}

DEVICE void flat_load(const struct flat *flat, const float *from, float x[4])
{
    load_four(from, flat->at, flat->n, flat->vectors, x);
}

DEVICE void flat_store(const struct flat *flat, float *to, const float x[4])
{
    if (flat->vectors) {
        vec_store(to + flat->at, vec_pack<float>(x));
        return;
    }
    for (int i = 0; i < 4; i++) {
        if (flat->at + (size_t)i < flat->n)
            to[flat->at + (size_t)i] = x[i];
    }
}

#define LAUNCH_FLAT(kernel, n, stream, ...)                                                                            \
    do {                                                                                                               \
        assert((n) <= (size_t)1 << 32);                                                                                \
        if ((n) > 0)                                                                                                   \
            LAUNCH(kernel, (unsigned)chunks_of(n, BLOCK * 4), BLOCK, 0, stream, n, __VA_ARGS__);                       \
    } while (0)

KERNEL flat_add(size_t n, const float *RESTRICT b, float *RESTRICT a)
{
    struct flat flat;
    float x[4], y[4];
    if (!flat_begin(&flat, n, a, b, NULL, NULL))
        return;
    flat_load(&flat, a, x);
    flat_load(&flat, b, y);
    for (int i = 0; i < 4; i++)
        x[i] += y[i];
    flat_store(&flat, a, x);
}

KERNEL flat_scale_sum(size_t n, const int64_t *RESTRICT sum, double scale, float *RESTRICT out)
{
    struct flat flat;
    float x[4];
    if (!flat_begin(&flat, n, sum, out, NULL, NULL))
        return;
    if (flat.vectors) {
        longlong2 a = reinterpret_cast<const longlong2 *>(sum + flat.at)[0];
        longlong2 b = reinterpret_cast<const longlong2 *>(sum + flat.at)[1];
        x[0] = (float)((double)a.x * scale), x[1] = (float)((double)a.y * scale);
        x[2] = (float)((double)b.x * scale), x[3] = (float)((double)b.y * scale);
    } else {
        for (int i = 0; i < 4; i++)
            x[i] = flat.at + (size_t)i < n ? (float)((double)sum[flat.at + (size_t)i] * scale) : 0.0f;
    }
    flat_store(&flat, out, x);
}

KERNEL flat_divide(size_t n, double denominator, float *a)
{
    struct flat flat;
    float x[4];
    if (!flat_begin(&flat, n, a, NULL, NULL, NULL))
        return;
    flat_load(&flat, a, x);
    for (int i = 0; i < 4; i++)
        x[i] = (float)((double)x[i] / denominator);
    flat_store(&flat, a, x);
}

KERNEL flat_adamw(size_t n, struct adamw_params params, float correct1, float correct2, const float *RESTRICT g,
                  float *RESTRICT m, float *RESTRICT v, float *RESTRICT p)
{
    struct flat flat;
    float slope[4], first[4], second[4], x[4];
    if (!flat_begin(&flat, n, g, m, v, p))
        return;
    flat_load(&flat, g, slope);
    flat_load(&flat, m, first);
    flat_load(&flat, v, second);
    flat_load(&flat, p, x);
    for (int i = 0; i < 4; i++) {
        first[i] = params.beta1 * first[i] + (1.0f - params.beta1) * slope[i];
        second[i] = params.beta2 * second[i] + (1.0f - params.beta2) * slope[i] * slope[i];
        float step = params.lr * (first[i] * correct1) / (sqrtf(second[i] * correct2) + params.eps);
        x[i] = x[i] * (1.0f - params.lr * params.weight_decay) - step;
    }
    flat_store(&flat, m, first);
    flat_store(&flat, v, second);
    flat_store(&flat, p, x);
}

KERNEL flat_sgd(size_t n, float lr, float momentum, const float *RESTRICT g, float *RESTRICT m, float *RESTRICT p)
{
    struct flat flat;
    float slope[4], first[4], x[4];
    if (!flat_begin(&flat, n, g, m, p, NULL))
        return;
    flat_load(&flat, g, slope);
    flat_load(&flat, m, first);
    flat_load(&flat, p, x);
    for (int i = 0; i < 4; i++) {
        first[i] = momentum * first[i] + slope[i];
        x[i] -= lr * first[i];
    }
    flat_store(&flat, m, first);
    flat_store(&flat, p, x);
}

void arena_add(stream_t s, size_t n, const float *b, float *a)
{
    LAUNCH_FLAT(flat_add, n, s, b, a);
}

void arena_scale_sum(stream_t s, size_t n, const int64_t *sum, double scale, float *out)
{
    LAUNCH_FLAT(flat_scale_sum, n, s, sum, scale, out);
}

void arena_divide(stream_t s, size_t n, double denominator, float *a)
{
    LAUNCH_FLAT(flat_divide, n, s, denominator, a);
}

void arena_adamw(stream_t s, size_t n, const struct adamw_params *params, const float *g, float *m, float *v, float *p)
{
    float correct1 = (float)(1.0 / (1.0 - pow((double)params->beta1, (double)params->step)));
    float correct2 = (float)(1.0 / (1.0 - pow((double)params->beta2, (double)params->step)));
    assert(params->step >= 1);
    LAUNCH_FLAT(flat_adamw, n, s, *params, correct1, correct2, g, m, v, p);
}

void arena_sgd_momentum(stream_t s, size_t n, float lr, float momentum, const float *g, float *m, float *p)
{
    LAUNCH_FLAT(flat_sgd, n, s, lr, momentum, g, m, p);
}
