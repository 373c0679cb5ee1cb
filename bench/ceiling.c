#include "bench/ceiling.h"

#include "bench/common.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* --- OpenBLAS ----------------------------------------------------------------------------------------------------- */

struct blas {
    void *library;
    void (*sgemm)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a,
                  int lda, const float *b, int ldb, float beta, float *c, int ldc);
};

static void *symbol(void *library, const char *name)
{
    void *at = dlsym(library, name);
    if (!at)
        bench_fail("OpenBLAS lacks a function that this needs");
    return at;
}

static struct blas *blas_open(const struct kernel_ops *ops, int threads, char *name, size_t name_size)
{
    struct blas *b = calloc(1, sizeof *b);
    char text[16];
    if (!b)
        bench_fail("out of memory");
    /* Read once, while the library is loaded. */
    if (ops->isa >= KERNEL_AVX512)
        setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
    snprintf(text, sizeof text, "%d", threads);
    setenv("OPENBLAS_NUM_THREADS", text, 1);
    b->library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!b->library) {
        free(b);
        snprintf(name, name_size, "none");
        return NULL;
    }
    char *(*core)(void), *(*config)(void);
    void *at = symbol(b->library, "openblas_get_corename");
    memcpy(&core, &at, sizeof core);
    at = symbol(b->library, "openblas_get_config");
    memcpy(&config, &at, sizeof config);
    at = symbol(b->library, "cblas_sgemm");
    memcpy(&b->sgemm, &at, sizeof b->sgemm);
    int major = 0, minor = 0, patch = 0;
    if (sscanf(config(), "OpenBLAS %d.%d.%d", &major, &minor, &patch) != 3)
        major = 0;
    snprintf(name, name_size, "OpenBLAS %d.%d.%d %s", major, minor, patch, core());
    return b;
}

/* --- products ----------------------------------------------------------------------------------------------------- */

static void add_shape(struct ceiling *c, int32_t out, int32_t in, double times)
{
    for (int i = 0; i < c->count; i += 2) {
        if (c->shapes[i].n == out && c->shapes[i].k == in) {
            c->shapes[i].weight += times;
            c->shapes[i + 1].weight += times;
            return;
        }
    }
    if (c->count + 2 > CEILING_SHAPES_MAX)
        bench_fail("too many shapes");
    c->shapes[c->count++] = (struct ceiling_shape){.n = out, .k = in, .weight = times};
    c->shapes[c->count++] = (struct ceiling_shape){.n = in, .k = out, .backward = true, .weight = times};
}

static float *random_floats(size_t n)
{
    uint64_t state = 11;
    float *x = aligned_alloc(64, (n * sizeof *x + 63) & ~(size_t)63);
    if (!x)
        bench_fail("out of memory for measuring the ceiling");
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(int32_t)next_random(&state) * 0x1p-31f;
    return x;
}

void ceiling_init(struct ceiling *c, const struct kernel_ops *ops, struct pool *pool, enum kernel_precision precision,
                  const struct model *model, int32_t rows)
{
    const struct model_config *m = &model->config;
    const int32_t heads = m->head_count * m->head_size, kv = m->kv_head_count * m->head_size;
    const double layers = m->layer_count;
    memset(c, 0, sizeof *c);
    c->ops = ops;
    c->rows = rows;
    add_shape(c, heads, m->d_model, layers);
    add_shape(c, kv, m->d_model, 2 * layers);
    add_shape(c, m->d_model, heads, layers);
    add_shape(c, m->d_ff, m->d_model, 2 * layers);
    add_shape(c, m->d_model, m->d_ff, layers);
    add_shape(c, m->vocabulary, m->d_model, 1);
    size_t widest = 0, weights = 0;
    int32_t deepest = 0;
    for (int i = 0; i < c->count; i++) {
        const struct ceiling_shape *s = &c->shapes[i];
        widest = (size_t)s->n > widest ? (size_t)s->n : widest;
        weights = (size_t)s->n * (size_t)s->k > weights ? (size_t)s->n * (size_t)s->k : weights;
        deepest = s->n > deepest ? s->n : deepest;
    }
    c->a = random_floats(widest * (size_t)rows);
    c->c = random_floats(widest * (size_t)rows);
    c->w = random_floats(weights);
    c->run = (struct kernel_run){.pool = pool, .precision = precision};
    c->run.scratch_bytes = (kernels_linear_scratch(pool_threads(pool), rows, deepest, deepest) + 63) & ~(size_t)63;
    c->run.scratch = aligned_alloc(64, c->run.scratch_bytes);
    if (!c->run.scratch)
        bench_fail("out of memory for measuring the ceiling");
    c->blas = blas_open(ops, pool_threads(pool), c->blas_name, sizeof c->blas_name);
}

static void own_product(struct ceiling *c, const struct ceiling_shape *s)
{
    const struct tensor w = {c->w, TENSOR_F32, s->backward ? s->k : s->n, s->backward ? s->n : s->k};
    if (s->backward)
        c->ops->linear_backward(&c->run, c->rows, &w, NULL, c->a, c->c, false);
    else
        c->ops->linear_forward(&c->run, c->rows, &w, NULL, NULL, c->a, c->c, false);
}

/* Ours first, then OpenBLAS's, then a pause: its threads spin for some ten milliseconds after their last product. */
void ceiling_round(struct ceiling *c)
{
    if (c->rounds == CEILING_ROUNDS_MAX)
        return;
    for (int i = 0; i < c->count; i++) {
        const double t0 = now_seconds();
        own_product(c, &c->shapes[i]);
        c->shapes[i].own[c->rounds] = now_seconds() - t0;
    }
    for (int i = 0; i < c->count; i++) {
        struct ceiling_shape *s = &c->shapes[i];
        s->blas[c->rounds] = INFINITY;
        if (!c->blas)
            continue;
        const double t0 = now_seconds();
        /* 101: row-major; 111: as it is; 112: transposed */
        c->blas->sgemm(101, 111, s->backward ? 111 : 112, c->rows, s->n, s->k, 1, c->a, s->k, c->w,
                       s->backward ? s->n : s->k, 0, c->c, s->n);
        s->blas[c->rounds] = now_seconds() - t0;
    }
    if (c->blas)
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    c->rounds++;
}

enum which { OWN = 1, BLAS = 2 };

static double rate(struct ceiling *c, unsigned which)
{
    double flops = 0, seconds = 0;
    for (int i = 0; i < c->count; i++) {
        struct ceiling_shape *s = &c->shapes[i];
        const double own = which & OWN ? bench_median(s->own, c->rounds) : INFINITY;
        const double blas = which & BLAS ? bench_median(s->blas, c->rounds) : INFINITY;
        flops += s->weight * 2.0 * c->rows * s->n * s->k;
        seconds += s->weight * (own < blas ? own : blas);
    }
    return flops / seconds;
}

double ceiling_flops(struct ceiling *c)
{
    return rate(c, OWN | BLAS);
}

double ceiling_own_flops(struct ceiling *c)
{
    return rate(c, OWN);
}

double ceiling_blas_flops(struct ceiling *c)
{
    return c->blas ? rate(c, BLAS) : 0;
}

void ceiling_release(struct ceiling *c)
{
    free(c->a);
    free(c->c);
    free(c->w);
    free(c->run.scratch);
    free(c->blas); /* the library stays: its threads do not like to be unmapped */
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

#define READ_BYTES ((size_t)256 << 20)
#define READ_ITEMS 256

struct reading {
    const uint64_t *from;
    uint64_t sums[READ_ITEMS];
};

static void read_item(void *ctx, int item, int thread)
{
    struct reading *r = ctx;
    const size_t n = READ_BYTES / READ_ITEMS / sizeof *r->from;
    const uint64_t *at = r->from + (size_t)item * n;
    uint64_t sums[32] = {0};
    (void)thread;
    for (size_t i = 0; i < n; i += 32)
        for (int j = 0; j < 32; j++) /* wide and independent: the compiler makes vectors of it */
            sums[j] += at[i + (size_t)j];
    for (int j = 0; j < 32; j++)
        r->sums[item] += sums[j];
}

double ceiling_read_bandwidth(struct pool *pool)
{
    static struct reading r;
    uint64_t *memory = malloc(READ_BYTES);
    double times[9];
    if (!memory)
        bench_fail("out of memory for measuring the memory");
    memset(memory, 1, READ_BYTES);
    r.from = memory;
    for (size_t i = 0; i < ARRAY_LEN(times); i++) {
        const double t0 = now_seconds();
        pool_run(pool, READ_ITEMS, read_item, &r);
        times[i] = now_seconds() - t0;
    }
    free(memory);
    return (double)READ_BYTES / bench_median(times, ARRAY_LEN(times));
}
