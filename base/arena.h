/*
 * One aligned block handed out piece by piece: the buffers of a training step, allocated once.
 *
 * arena_take never allocates; it asserts that the arena was sized for it. Not thread-safe.
 */
#ifndef BASE_ARENA_H
#define BASE_ARENA_H

#include "base/error.h"

#define ARENA_ALIGNMENT 64

struct arena {
    uint8_t *base;
    size_t size;
    size_t used;
};

int MUST_USE arena_init(struct arena *a, size_t size_bytes); /* zeroed memory; ERR_RESOURCES */
void arena_release(struct arena *a);
void *arena_take(struct arena *a, size_t bytes); /* 64-byte aligned; asserts on exhaustion */

static inline void arena_reset(struct arena *a)
{
    a->used = 0;
}

/* Bytes that arena_take(bytes) consumes: for sizing. */
static inline size_t arena_cost(size_t bytes)
{
    return (bytes + ARENA_ALIGNMENT - 1) & ~(size_t)(ARENA_ALIGNMENT - 1);
}

#endif
