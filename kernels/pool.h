/*
 * A persistent pool of worker threads for the operations of kernels.h.
 *
 * pool_run hands out items 0..items-1 to the workers and to the caller; which thread takes an item is not fixed, so an
 * item must write only its own outputs. Workers and caller look for work, or for its end, for POOL_SPIN_US and then
 * sleep on a condition variable: operations follow each other within microseconds, while several processes share the
 * cores. A NULL pool is valid everywhere and means "this thread only". One pool_run at a time per pool.
 *
 *     struct pool *pool = NULL;
 *     if (pool_new(2, &pool, err) < 0) return err->code;
 *     pool_run(pool, rows, one_row, &job);
 *     pool_free(pool);
 */
#ifndef KERNELS_POOL_H
#define KERNELS_POOL_H

#include "base/error.h"

#define POOL_THREADS_MAX 256
#define POOL_SPIN_US 50

struct pool;

/* threads counts the caller: 1 gives a NULL pool and success. ERR_CONFIG outside 1..POOL_THREADS_MAX, ERR_RESOURCES. */
int MUST_USE pool_new(int threads, struct pool **ret_pool, struct error *err);
void pool_free(struct pool *pool);

int pool_threads(const struct pool *pool); /* 1 for NULL */

/* Calls run(ctx, item, thread) once for each item; returns when all are done. thread is in 0..pool_threads()-1. */
void pool_run(struct pool *pool, int items, void (*run)(void *ctx, int item, int thread), void *ctx);

#endif
