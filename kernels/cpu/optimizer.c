/* Steps over a flat arena, and the residual sum. Plain loops: the compiler vectorises them without changing a bit. */
#include "kernels/cpu/simd.h"

#define VALUES_ITEM 16384

struct job {
    size_t n;
    const float *g;
    float *m, *v, *p;
    float lr, momentum;
    struct adamw_params adamw;
    float correct1, correct2;
};

static int items(size_t n)
{
    return (int)((n + VALUES_ITEM - 1) / VALUES_ITEM);
}

static void adamw_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    size_t first = (size_t)item * VALUES_ITEM, end = first + VALUES_ITEM < j->n ? first + VALUES_ITEM : j->n;
    const float b1 = j->adamw.beta1, b2 = j->adamw.beta2, lr = j->adamw.lr, eps = j->adamw.eps;
    const float decay = 1.0f - lr * j->adamw.weight_decay, c1 = j->correct1, c2 = j->correct2;
    const float *restrict g = j->g;
    float *restrict m = j->m, *restrict v = j->v, *restrict p = j->p;
    (void)thread;
    for (size_t i = first; i < end; i++) {
        m[i] = b1 * m[i] + (1.0f - b1) * g[i];
        v[i] = b2 * v[i] + (1.0f - b2) * g[i] * g[i];
        p[i] = p[i] * decay - lr * (m[i] * c1) / (sqrtf(v[i] * c2) + eps);
    }
}

void ISA(adamw)(const struct kernel_run *run, size_t n, const struct adamw_params *params, const float *g, float *m,
                float *v, float *p)
{
    struct job j = {.n = n, .g = g, .m = m, .v = v, .p = p, .adamw = *params};
    assert(params->step >= 1);
    j.correct1 = (float)(1.0 / (1.0 - pow(params->beta1, (double)params->step)));
    j.correct2 = (float)(1.0 / (1.0 - pow(params->beta2, (double)params->step)));
    pool_run(run->pool, items(n), adamw_item, &j);
}

static void sgd_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    size_t first = (size_t)item * VALUES_ITEM, end = first + VALUES_ITEM < j->n ? first + VALUES_ITEM : j->n;
    const float *restrict g = j->g;
    float *restrict m = j->m, *restrict p = j->p;
    const float momentum = j->momentum, lr = j->lr;
    (void)thread;
    for (size_t i = first; i < end; i++) {
        m[i] = momentum * m[i] + g[i];
        p[i] -= lr * m[i];
    }
}

void ISA(sgd_momentum)(const struct kernel_run *run, size_t n, float lr, float momentum, const float *g, float *m,
                       float *p)
{
    struct job j = {.n = n, .g = g, .m = m, .p = p, .lr = lr, .momentum = momentum};
    pool_run(run->pool, items(n), sgd_item, &j);
}

static void add_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    size_t first = (size_t)item * VALUES_ITEM, end = first + VALUES_ITEM < j->n ? first + VALUES_ITEM : j->n;
    const float *restrict b = j->g;
    float *restrict a = j->p;
    (void)thread;
    for (size_t i = first; i < end; i++)
        a[i] += b[i];
}

void ISA(add)(const struct kernel_run *run, size_t n, const float *b, float *a)
{
    struct job j = {.n = n, .g = b, .p = a};
    pool_run(run->pool, items(n), add_item, &j);
}
