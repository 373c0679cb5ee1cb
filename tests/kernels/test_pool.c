/* Every item once, whatever the thread count; results visible to the caller; many short jobs. Also run under TSan. */
#include "kernels/pool.h"

#include "tests/check.h"

#include <time.h>

#define ITEMS 1000

struct job {
    int hits[ITEMS];
    int threads;
    long sums[POOL_THREADS_MAX];
};

static void hit(void *ctx, int item, int thread)
{
    struct job *j = ctx;
    j->hits[item]++;
    j->sums[thread] += item;
}

static void run_jobs(int threads)
{
    struct pool *pool = NULL;
    struct error err = {0};
    static struct job job;
    memset(&job, 0, sizeof(job));
    int rc = pool_new(threads, &pool, &err);
    CHECK(rc == 0);
    if (rc < 0)
        return;
    CHECK(pool_threads(pool) == threads);
    CHECK((threads == 1) == (pool == NULL));
    for (int round = 0; round < 200; round++)
        pool_run(pool, round % 3 == 0 ? ITEMS : round % 7, hit, &job);
    long sum = 0, want = 0;
    for (int t = 0; t < POOL_THREADS_MAX; t++) {
        CHECK(t < threads || job.sums[t] == 0);
        sum += job.sums[t];
    }
    for (int i = 0; i < ITEMS; i++) {
        int hits = 0;
        for (int round = 0; round < 200; round++)
            hits += i < (round % 3 == 0 ? ITEMS : round % 7);
        CHECK(job.hits[i] == hits);
        want += (long)i * hits;
    }
    CHECK(sum == want);
    pool_free(pool);
}

static void test_every_item_once(void)
{
    run_jobs(1);
    run_jobs(2);
    run_jobs(5);
}

/* Long enough apart for workers to fall asleep, and jobs long enough for the caller to. */
static void slow_hit(void *ctx, int item, int thread)
{
    if (thread > 0)
        nanosleep(&(struct timespec){.tv_nsec = 4000 * POOL_SPIN_US}, NULL);
    hit(ctx, item, thread);
}

static void test_jobs_after_a_rest(void)
{
    struct pool *pool = NULL;
    struct error err = {0};
    static struct job job;
    CHECK(pool_new(3, &pool, &err) == 0);
    for (int round = 0; round < 20; round++) {
        nanosleep(&(struct timespec){.tv_nsec = 4000 * POOL_SPIN_US}, NULL);
        pool_run(pool, 7, slow_hit, &job);
        for (int i = 0; i < 7; i++)
            CHECK(job.hits[i] == round + 1);
    }
    pool_free(pool);
}

static void test_bad_thread_counts(void)
{
    struct pool *pool = NULL;
    struct error err = {0};
    CHECK(pool_new(0, &pool, &err) == ERR_CONFIG && strstr(err.message, "1 to 256"));
    CHECK(pool_new(257, &pool, &err) == ERR_CONFIG);
    CHECK(pool == NULL);
    pool_free(NULL);
}

int main(void)
{
    RUN(test_every_item_once);
    RUN(test_jobs_after_a_rest);
    RUN(test_bad_thread_counts);
    return check_report();
}
