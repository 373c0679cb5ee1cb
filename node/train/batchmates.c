#include "node/train/batchmates.h"

#include <stdlib.h>
#include <string.h>

struct examples {
    const struct batchmates_probe *probe;
    int32_t *ids;
    uint8_t *learn;
    int32_t length; /* of the one that is compared */
};

/* Example number `seed`, each fourth token learnt; 0 is the one that is compared. */
static bool add(struct examples *e, uint32_t seed)
{
    const int32_t most = e->probe->example_tokens_max;
    const int32_t length = seed == 0 ? e->length : 1 + (int32_t)(seed * 37 % (uint32_t)most);
    for (int32_t i = 0; i < length; i++) {
        e->ids[i] = (int32_t)(((uint32_t)i * 7919u + seed * 104729u + 17u) % (uint32_t)e->probe->vocabulary);
        e->learn[i] = (uint32_t)i % 4 == 3 - seed % 4;
    }
    return batch_add(e->probe->batch, &(struct batch_example){e->ids, e->learn, length});
}

/* Mates from `seed` on until the batch has no room for them, or for the compared one, or `count` are in. */
static void add_mates(struct examples *e, uint32_t seed, int32_t count, bool keep_room)
{
    struct batch *b = e->probe->batch;
    const int32_t tokens = keep_room ? e->length : 0, examples = keep_room ? 1 : 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t longest = b->tokens + e->probe->example_tokens_max + tokens;
        if (b->examples + 1 + examples > b->examples_max || (keep_room && longest > b->tokens_max) ||
            !add(e, seed + (uint32_t)i))
            return;
    }
}

/* Runs the batch and fetches the gradient of its example `place`. */
static int gradient_of(const struct batchmates_probe *p, int32_t place, float *gradient, struct error *err)
{
    train_run(p->train, p->lora, p->batch);
    p->backend->ops->download(p->backend, gradient, train_gradient(p->train, place),
                              p->lora->trained_count * sizeof *gradient);
    return p->backend->ops->sync(p->backend, err);
}

static int compare(struct examples *e, float *alone, float *beside, bool *ret_same, struct error *err)
{
    enum { FULL, SMALL, PLACES };
    const struct batchmates_probe *p = e->probe;
    const int32_t before[PLACES] = {p->batch->examples_max / 2, 1};
    int rc;

    batch_clear(p->batch);
    if (!add(e, 0))
        assert(!"a batch without room for one example");
    if ((rc = gradient_of(p, 0, alone, err)) < 0)
        return rc;
    for (uint32_t i = 0; i < PLACES && *ret_same; i++) {
        batch_clear(p->batch);
        add_mates(e, 1 + 100 * i, before[i], true);
        const int32_t place = p->batch->examples;
        if (!add(e, 0))
            assert(!"room was kept for it");
        if (i == FULL)
            add_mates(e, 50 + 100 * i, p->batch->examples_max, false);
        if ((rc = gradient_of(p, place, beside, err)) < 0)
            return rc;
        *ret_same = memcmp(alone, beside, p->lora->trained_count * sizeof *alone) == 0;
    }
    return 0;
}

int batchmates_check(const struct batchmates_probe *probe, bool *ret_same, struct error *err)
{
    const size_t most = (size_t)probe->example_tokens_max, n = probe->lora->trained_count;
    struct examples e = {.probe = probe, .length = probe->example_tokens_max / 2 + 1};
    float *gradients = malloc(2 * n * sizeof *gradients);
    int rc;

    e.ids = malloc(most * sizeof *e.ids);
    e.learn = malloc(most);
    *ret_same = true;
    if (!gradients || !e.ids || !e.learn)
        rc = error_set(err, ERR_RESOURCES, "no memory to compare gradients of %zu values", n);
    else
        rc = compare(&e, gradients, gradients + n, ret_same, err);
    free(gradients);
    free(e.ids);
    free(e.learn);
    return rc;
}
