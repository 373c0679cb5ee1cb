/*
 * Few rows of x against frozen matrices, which are read once. Where a matrix has an interleaved copy, 16 of its rows
 * are summed side by side (interleave.h). Rows of floats are taken in fours; other rows are decoded one at a time.
 * Float32 throughout, in either precision.
 */
#include "kernels/cpu/interleave.h"

#define ITEMS_A_THREAD 4 /* few, so that a thread reads long stretches; more than one, for threads that fall behind */
#define FEW 4            /* rows of a small matrix that are done at once */
#define AHEAD 1024       /* bytes of weights asked for before they are needed */

struct job {
    int32_t m, in, count;
    const struct served_linear *linears;
    const float *x;
    const float *sums; /* (m, in/16): of 16 values of x each */
    int32_t unit;      /* rows of W that are done at once: LANES, or fewer where there are few and none interleaved */
    int32_t groups;    /* of so many rows, of all linears together */
    int32_t per_item;
    uint8_t *rows;
    size_t row_bytes;
};

/* --- interleaved -------------------------------------------------------------------------------------------------- */

/* y (m, LANES) of one group and `m` rows of x, a constant. */
INLINE void group_product(enum tensor_type type, int m, const uint8_t *group, const struct job *j, int32_t row,
                          float y[][LANES])
{
    enum { CHAINS_MAX = 4 };
    const struct lanes_table table = lanes_table(type);
    const int chains = CHAINS_MAX / m, runs = lanes_runs(type), parts = lanes_parts(type), count = 32 / parts;
    const uint8_t *end = group + (size_t)j->in / 32 / (size_t)runs * lanes_block_bytes(type);
    for (int lane = 0; lane < LANES; lane += VL) {
        const float *x = j->x + (ptrdiff_t)row * j->in, *sums = j->sums + (ptrdiff_t)row * (j->in / 16);
        vec acc[CHAINS_MAX], d, dmin, scale, min;
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
            acc[i] = vec_zero();
        for (const uint8_t *at = group; at < end;) {
            lanes_block_scales(type, at + 2 * lane, &d, &dmin);
            at += lanes_head_bytes(type);
            for (int run = 0; run < runs; run++, at += lanes_run_bytes(type), x += 32, sums += 2) {
                const uint8_t *q = at + lanes_scale_bytes(type) + lane * (type == TENSOR_Q8_0 ? 1 : 4);
                for (size_t line = 0; line < lanes_run_bytes(type) && lane == 0; line += 64)
                    _mm_prefetch((const char *)(at + AHEAD + line), _MM_HINT_T0);
#pragma GCC unroll 2
                for (int part = 0; part < parts; part++) {
                    vec s[CHAINS_MAX];
#pragma GCC unroll 32
                    for (int k = part * count; k < (part + 1) * count; k++) {
                        const vec value = lanes_quant(type, &table, q, k);
#pragma GCC unroll 4
                        for (int i = 0; i < m; i++) {
                            const int chain = i * chains + k % chains;
                            const vec by = vec_set(x[(ptrdiff_t)i * j->in + k]);
                            s[chain] = k - part * count < chains ? vec_mul(value, by) : vec_fma(value, by, s[chain]);
                        }
                    }
                    lanes_scales(type, at + lane, part, d, dmin, &scale, &min);
#pragma GCC unroll 4
                    for (int i = 0; i < m; i++) {
                        vec sum = s[i * chains];
                        if (chains > 1)
                            sum = vec_add(sum, s[i * chains + 1]);
                        if (chains > 2)
                            sum = vec_add(sum, vec_add(s[i * chains + 2], s[i * chains + 3]));
                        acc[i] = vec_fma(sum, scale, acc[i]);
                        const float *of_row = sums + (ptrdiff_t)i * (j->in / 16);
                        for (int half = part; !lanes_signed(type) && half < part + 3 - parts; half++)
                            acc[i] = vec_fma(min, vec_set(of_row[half]), acc[i]);
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
            vec_store(&y[i][lane], acc[i]);
    }
}

/* Rows of x in fours, twos and ones: the weights of a group come from the first cache after the first time. */
INLINE void group_rows(enum tensor_type type, const uint8_t *group, const struct job *j, float y[][LANES])
{
    int32_t row = 0;
    for (; row + 4 <= j->m; row += 4)
        group_product(type, 4, group, j, row, y + row);
    if (row + 2 <= j->m) {
        group_product(type, 2, group, j, row, y + row);
        row += 2;
    }
    if (row < j->m)
        group_product(type, 1, group, j, row, y + row);
}

static void interleaved(const struct job *j, const struct served_linear *l, int32_t o)
{
    float y[KERNEL_DECODE_ROWS][LANES];
    const struct tensor *w = l->w;
    const uint8_t *group = ISA(interleaved_group)(w, o);
    switch (w->type) {
#define ROWS(type)                                                                                                     \
    case type:                                                                                                         \
        group_rows(type, group, j, y);                                                                                 \
        break;
        EACH_QUANTISED_TYPE(ROWS)
#undef ROWS
    default:
        assert(!"a type that stays row-major");
    }
    for (int lane = 0; lane < LANES; lane += VL) {
        const vmask mask = vec_mask(w->out - o - lane);
        const vec bias = l->bias ? vec_load_mask(l->bias + o + lane, mask) : vec_zero();
        for (int32_t i = 0; i < j->m && o + lane < w->out; i++)
            vec_store_mask(l->y + (ptrdiff_t)i * w->out + o + lane, vec_add(vec_load(&y[i][lane]), bias), mask);
    }
}

/* --- row by row --------------------------------------------------------------------------------------------------- */

INLINE float dot(const float *a, const float *b, int32_t n)
{
    vec s0 = vec_zero(), s1 = vec_zero(), s2 = vec_zero(), s3 = vec_zero();
    int32_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        s0 = vec_fma(vec_load(a + i), vec_load(b + i), s0);
        s1 = vec_fma(vec_load(a + i + VL), vec_load(b + i + VL), s1);
        s2 = vec_fma(vec_load(a + i + 2 * VL), vec_load(b + i + 2 * VL), s2);
        s3 = vec_fma(vec_load(a + i + 3 * VL), vec_load(b + i + 3 * VL), s3);
    }
    for (; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        s0 = vec_fma(vec_load_mask(a + i, mask), vec_load_mask(b + i, mask), s0);
    }
    return vec_sum(vec_add(vec_add(s0, s1), vec_add(s2, s3)));
}

INLINE vec dense_values(enum tensor_type type, const uint8_t *row, int32_t i)
{
    if (type == TENSOR_F32)
        return vec_load((const float *)(const void *)row + i);
    if (type == TENSOR_F16)
        return lanes_halves(row + 2 * i);
#ifdef __AVX512F__
    const __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(row + 2 * i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
#else
    const __m128i x = _mm_loadu_si128((const __m128i *)(const void *)(row + 2 * i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
#endif
}

/* Four rows against n values, a multiple of 32; asks for the four rows behind them. */
INLINE void dense_rows(enum tensor_type type, const uint8_t *row, ptrdiff_t row_bytes, const float *x, int32_t n,
                       float out[4])
{
    vec s[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    for (int32_t i = 0; i < n; i += 32) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const uint8_t *at = row + r * row_bytes;
            _mm_prefetch((const char *)(at + 4 * row_bytes) + row_bytes / n * i, _MM_HINT_T0);
            if (type == TENSOR_F32)
                _mm_prefetch((const char *)(at + 4 * row_bytes) + 4 * i + 64, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int k = 0; k < 32; k += VL)
                s[r] = vec_fma(dense_values(type, at, i + k), vec_load(x + i + k), s[r]);
        }
    }
    vec_sum4(s, out);
}

/* Rows of floats need no decoded copy. */
static void dense_by_fours(const struct job *j, const struct served_linear *l, int32_t o)
{
    const struct tensor *w = l->w;
    const uint8_t *row = tensor_row(w, o);
    const ptrdiff_t row_bytes = tensor_row(w, 1) - tensor_row(w, 0);
    for (int32_t i = 0; i < j->m; i++) {
        const float *x = j->x + (ptrdiff_t)i * w->in;
        float *y = l->y + (ptrdiff_t)i * w->out + o, sums[4];
        if (w->type == TENSOR_F32)
            dense_rows(TENSOR_F32, row, row_bytes, x, w->in, sums);
        else if (w->type == TENSOR_F16)
            dense_rows(TENSOR_F16, row, row_bytes, x, w->in, sums);
        else
            dense_rows(TENSOR_BF16, row, row_bytes, x, w->in, sums);
        for (int r = 0; r < 4; r++)
            y[r] = sums[r] + (l->bias ? l->bias[o + r] : 0.0f);
    }
}

static void row_by_row(const struct job *j, const struct served_linear *l, int32_t first, float *buffer)
{
    const struct tensor *w = l->w;
    const int32_t end = first + j->unit < w->out ? first + j->unit : w->out;
    int32_t o = first;
    for (; tensor_type_block(w->type) == 1 && w->in % 32 == 0 && o + 4 <= end; o += 4)
        dense_by_fours(j, l, o);
    for (; o < end; o++) {
        const uint8_t *row = tensor_row(w, o);
        const float bias = l->bias ? l->bias[o] : 0.0f, *values = buffer;
        if (w->type == TENSOR_F32)
            values = (const float *)(const void *)row;
        else
            ISA(dequantise)(w->type, row, 0, (size_t)w->in, buffer);
        for (int32_t i = 0; i < j->m; i++)
            l->y[(ptrdiff_t)i * w->out + o] = dot(values, j->x + (ptrdiff_t)i * w->in, w->in) + bias;
    }
}

static void add_lora(const struct job *j, const struct served_linear *l, int32_t first)
{
    const int32_t out = l->w->out, end = first + j->unit < out ? first + j->unit : out;
    for (int32_t i = 0; i < j->m; i++) {
        const float *h = l->h + (ptrdiff_t)i * l->h_stride;
        for (int32_t o = first; o < end; o++)
            l->y[(ptrdiff_t)i * out + o] += l->scale * dot(l->b + (ptrdiff_t)o * l->rank, h, l->rank);
    }
}

static int32_t groups_of(const struct job *j, const struct tensor *w)
{
    return (w->out + j->unit - 1) / j->unit;
}

static void decode_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    const struct served_linear *l = j->linears;
    int32_t group = item * j->per_item, left = j->per_item;
    if (left > j->groups - group)
        left = j->groups - group;
    for (; group >= groups_of(j, l->w); l++)
        group -= groups_of(j, l->w);
    for (; left > 0; left--, group++) {
        if (group == groups_of(j, l->w)) {
            group = 0;
            l++;
        }
        const int32_t row = group * j->unit;
        if (l->w->interleaved)
            interleaved(j, l, row);
        else
            row_by_row(j, l, row, (float *)(void *)(j->rows + (size_t)thread * j->row_bytes));
        if (l->b)
            add_lora(j, l, row);
    }
}

static void sum_sixteens(const float *x, size_t n, float *sums)
{
    for (size_t i = 0; i < n / 16; i++, x += 16) {
        vec sum = vec_load(x);
        for (int v = 1; v < VECS16; v++)
            sum = vec_add(sum, vec_load(x + v * VL));
        sums[i] = vec_sum(sum);
    }
}

void ISA(linear_decode)(const struct kernel_run *run, int32_t m, int32_t count, const struct served_linear *linears,
                        const float *x)
{
    assert(m >= 1 && m <= KERNEL_DECODE_ROWS && count >= 1);
    const int threads = pool_threads(run->pool);
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    struct job j = {.m = m, .in = linears[0].w->in, .count = count, .linears = linears, .x = x};
    j.row_bytes = align64((size_t)j.in * sizeof(float));
    j.rows = scratch_take(&next, end, j.row_bytes * (size_t)threads);
    float *sums = scratch_take(&next, end, (size_t)m * ((size_t)j.in / 16) * sizeof *sums);
    bool any_interleaved = false;
    int64_t rows = 0;
    for (int32_t i = 0; i < count; i++) {
        assert(linears[i].w->in == j.in);
        any_interleaved = any_interleaved || linears[i].w->interleaved;
        rows += linears[i].w->out;
    }
    j.unit = any_interleaved || rows >= (int64_t)LANES * threads * ITEMS_A_THREAD ? LANES : FEW;
    for (int32_t i = 0; i < count; i++)
        j.groups += groups_of(&j, linears[i].w);
    for (int32_t i = 0; i < m && any_interleaved; i++)
        sum_sixteens(x + (ptrdiff_t)i * j.in, (size_t)j.in, sums + (ptrdiff_t)i * (j.in / 16));
    j.sums = sums;
    j.per_item = (j.groups + threads * ITEMS_A_THREAD - 1) / (threads * ITEMS_A_THREAD);
    pool_run(run->pool, (j.groups + j.per_item - 1) / j.per_item, decode_item, &j);
}
