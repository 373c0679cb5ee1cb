#include "kernels/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

struct worker {
    struct pool *pool;
    pthread_t thread;
    int index; /* 1.. */
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    /* Under lock: a new generation is a new job; working counts the workers that have not finished it. */
    uint64_t generation;
    int working;
    bool stop;
    void (*run)(void *ctx, int item, int thread);
    void *ctx;
    int items;
    atomic_int next;
    int workers;
    struct worker worker[];
};

static void take_items(struct pool *p, void (*run)(void *, int, int), void *ctx, int items, int thread)
{
    for (;;) {
        int item = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (item >= items)
            return;
        run(ctx, item, thread);
    }
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    struct pool *p = w->pool;
    uint64_t seen = 0;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->stop && p->generation == seen)
            pthread_cond_wait(&p->start, &p->lock);
        if (p->stop)
            break;
        seen = p->generation;
        void (*run)(void *, int, int) = p->run;
        void *ctx = p->ctx;
        int items = p->items;
        pthread_mutex_unlock(&p->lock);
        take_items(p, run, ctx, items, w->index);
        pthread_mutex_lock(&p->lock);
        if (--p->working == 0)
            pthread_cond_signal(&p->done);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

int pool_new(int threads, struct pool **ret_pool, struct error *err)
{
    if (threads < 1 || threads > POOL_THREADS_MAX)
        return error_set(err, ERR_CONFIG, "threads is %d, expected 1 to %d", threads, POOL_THREADS_MAX);
    if (threads == 1) {
        *ret_pool = NULL;
        return 0;
    }
    struct pool *p = calloc(1, sizeof(*p) + (size_t)(threads - 1) * sizeof(p->worker[0]));
    if (!p)
        return error_set(err, ERR_RESOURCES, "out of memory for a pool of %d threads", threads);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->start, NULL);
    pthread_cond_init(&p->done, NULL);
    for (int i = 0; i < threads - 1; i++) {
        p->worker[i].pool = p;
        p->worker[i].index = i + 1;
        if (pthread_create(&p->worker[i].thread, NULL, worker_main, &p->worker[i]) != 0) {
            pool_free(p);
            return error_set(err, ERR_RESOURCES, "could not start thread %d of %d; lower the thread count", i + 2,
                             threads);
        }
        p->workers++;
    }
    *ret_pool = p;
    return 0;
}

void pool_free(struct pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->workers; i++)
        pthread_join(pool->worker[i].thread, NULL);
    pthread_cond_destroy(&pool->start);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

int pool_threads(const struct pool *pool)
{
    return pool ? pool->workers + 1 : 1;
}

void pool_run(struct pool *pool, int items, void (*run)(void *ctx, int item, int thread), void *ctx)
{
    if (!pool || items <= 1) {
        for (int i = 0; i < items; i++)
            run(ctx, i, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->run = run;
    pool->ctx = ctx;
    pool->items = items;
    pool->working = pool->workers;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pool->generation++;
    pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->lock);
    take_items(pool, run, ctx, items, 0);
    pthread_mutex_lock(&pool->lock);
    while (pool->working > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
