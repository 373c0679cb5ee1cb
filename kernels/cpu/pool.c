#include "kernels/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

struct worker {
    struct pool *pool;
    pthread_t thread;
    int index; /* 1.. */
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    /* A new generation is a new job, which stays as it is until working, the workers that have not finished it, is 0.
     */
    atomic_ullong generation;
    atomic_int working;
    int asleep; /* under lock, like stop: workers that wait for start */
    bool stop;
    void (*run)(void *ctx, int item, int thread);
    void *ctx;
    int items;
    atomic_int next;
    int workers;
    struct worker worker[];
};

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static bool new_job(struct pool *p, uint64_t seen)
{
    return atomic_load_explicit(&p->generation, memory_order_acquire) != seen;
}

static bool job_done(struct pool *p, uint64_t ignored)
{
    (void)ignored;
    return atomic_load_explicit(&p->working, memory_order_acquire) == 0;
}

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Whether it became true in time. */
static bool spin(struct pool *p, bool (*ready)(struct pool *p, uint64_t seen), uint64_t seen)
{
    const int64_t end = now_us() + POOL_SPIN_US;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready(p, seen))
                return true;
            relax();
        }
    } while (now_us() < end);
    return false;
}

static void take_items(struct pool *p, void (*run)(void *, int, int), void *ctx, int items, int thread)
{
    for (;;) {
        int item = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (item >= items)
            return;
        run(ctx, item, thread);
    }
}

/* Sleeps until there is a job that was not seen yet; false: the pool ends. */
static bool sleep_until_job(struct pool *p, uint64_t seen)
{
    pthread_mutex_lock(&p->lock);
    p->asleep++;
    while (!p->stop && !new_job(p, seen))
        pthread_cond_wait(&p->start, &p->lock);
    p->asleep--;
    const bool stop = p->stop;
    pthread_mutex_unlock(&p->lock);
    return !stop;
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    struct pool *p = w->pool;
    uint64_t seen = 0;
    while (spin(p, new_job, seen) || sleep_until_job(p, seen)) {
        seen = atomic_load_explicit(&p->generation, memory_order_acquire);
        take_items(p, p->run, p->ctx, p->items, w->index);
        if (atomic_fetch_sub_explicit(&p->working, 1, memory_order_acq_rel) == 1) {
            pthread_mutex_lock(&p->lock); /* or the caller could miss the signal */
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->lock);
        }
    }
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
    pool->run = run;
    pool->ctx = ctx;
    pool->items = items;
    atomic_store_explicit(&pool->working, pool->workers, memory_order_relaxed);
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_release);
    if (pool->asleep > 0)
        pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->lock);
    take_items(pool, run, ctx, items, 0);
    if (spin(pool, job_done, 0))
        return;
    pthread_mutex_lock(&pool->lock);
    while (!job_done(pool, 0))
        pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
