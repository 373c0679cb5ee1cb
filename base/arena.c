#include "base/arena.h"

int arena_init(struct arena *a, size_t size_bytes)
{
    size_t size = arena_cost(size_bytes ? size_bytes : 1);
    uint8_t *base = aligned_alloc(ARENA_ALIGNMENT, size);

    if (!base)
        return ERR_RESOURCES;
    memset(base, 0, size);
    *a = (struct arena){base, size, 0};
    return 0;
}

void arena_release(struct arena *a)
{
    if (!a)
        return;
    free(a->base);
    *a = (struct arena){0};
}

void *arena_take(struct arena *a, size_t bytes)
{
    size_t cost = arena_cost(bytes);
    void *at = a->base + a->used;

    assert(cost <= a->size - a->used);
    a->used += cost;
    return at;
}
