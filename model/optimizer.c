#include "model/optimizer.h"

#include <string.h>

static int check_config(const struct optimizer_config *c, struct error *err)
{
    if (c->kind != OPTIMIZER_SGD && c->kind != OPTIMIZER_ADAMW)
        return error_set(err, ERR_CONFIG, "optimizer: unknown kind %d", (int)c->kind);
    if (!(c->lr > 0 && c->lr <= 1e3f))
        return error_set(err, ERR_CONFIG, "optimizer: learning rate %g is outside 0 to 1000", (double)c->lr);
    if (c->kind == OPTIMIZER_SGD && !(c->momentum >= 0 && c->momentum < 1))
        return error_set(err, ERR_CONFIG, "optimizer: momentum %g is outside 0 to 1", (double)c->momentum);
    if (c->kind == OPTIMIZER_SGD && c->weight_decay != 0)
        return error_set(err, ERR_CONFIG, "optimizer: weight decay goes with adamw only");
    if (c->kind == OPTIMIZER_ADAMW &&
        !(c->beta1 >= 0 && c->beta1 < 1 && c->beta2 >= 0 && c->beta2 < 1 && c->eps > 0 && c->eps < 1))
        return error_set(err, ERR_CONFIG, "optimizer: betas must lie in 0 to 1 and epsilon above 0");
    if (c->kind == OPTIMIZER_ADAMW && !(c->weight_decay >= 0 && c->weight_decay <= 1))
        return error_set(err, ERR_CONFIG, "optimizer: weight decay %g is outside 0 to 1", (double)c->weight_decay);
    return 0;
}

int optimizer_init(struct optimizer *optimizer, const struct optimizer_config *config, struct backend *backend,
                   size_t count, struct error *err)
{
    int rc = check_config(config, err);
    if (rc < 0)
        return rc;
    assert(count > 0);
    const size_t arrays = config->kind == OPTIMIZER_ADAMW ? 2 : 1;
    void *memory = NULL;
    rc = backend->ops->alloc(backend, arrays * count * sizeof(float), &memory, err);
    if (rc < 0)
        return error_prefix(err, "optimizer: the moments of %zu parameters", count);
    float *m = memory;
    *optimizer = (struct optimizer){
        .config = *config,
        .backend = backend,
        .capacity = count,
        .count = count,
        .m = m,
        .v = arrays == 2 ? m + count : NULL,
    };
    return 0;
}

void optimizer_release(struct optimizer *optimizer)
{
    if (!optimizer || !optimizer->backend)
        return;
    optimizer->backend->ops->release(optimizer->backend, optimizer->m); /* v lies in the same block */
    memset(optimizer, 0, sizeof *optimizer);
}

void optimizer_reset(struct optimizer *optimizer, size_t count)
{
    struct backend *be = optimizer->backend;
    assert(count > 0 && count <= optimizer->capacity);
    be->ops->zero(be, optimizer->m, (optimizer->v ? 2 : 1) * optimizer->capacity * sizeof *optimizer->m);
    optimizer->count = count;
    optimizer->steps = 0;
}

void optimizer_step(struct optimizer *optimizer, const float *gradient, float *parameters)
{
    const struct optimizer_config *c = &optimizer->config;
    struct backend *be = optimizer->backend;
    optimizer->steps++;
    if (c->kind == OPTIMIZER_SGD) {
        be->ops->sgd_momentum(be, optimizer->count, c->lr, c->momentum, gradient, optimizer->m, parameters);
        return;
    }
    const struct adamw_params params = {.lr = c->lr,
                                        .beta1 = c->beta1,
                                        .beta2 = c->beta2,
                                        .eps = c->eps,
                                        .weight_decay = c->weight_decay,
                                        .step = optimizer->steps};
    be->ops->adamw(be, optimizer->count, &params, gradient, optimizer->m, optimizer->v, parameters);
}
