#include "base/clock.h"

#include <errno.h>
#include <stdio.h>
#include <time.h>

static int64_t system_ms(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int64_t system_monotonic_ms(void *ctx)
{
    (void)ctx;
    return system_ms(CLOCK_MONOTONIC);
}

static int64_t system_wall_ms(void *ctx)
{
    (void)ctx;
    return system_ms(CLOCK_REALTIME);
}

static void system_sleep_ms(void *ctx, int64_t ms)
{
    struct timespec t = {ms / 1000, (ms % 1000) * 1000000};
    (void)ctx;
    while (nanosleep(&t, &t) < 0 && errno == EINTR)
        ;
}

const struct clock clock_system = {system_monotonic_ms, system_wall_ms, system_sleep_ms, NULL};

void clock_format_rfc3339(int64_t wall_ms, char out[CLOCK_RFC3339_SIZE])
{
    time_t seconds = (time_t)(wall_ms / 1000);
    struct tm tm;
    char date[24];

    gmtime_r(&seconds, &tm);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out, CLOCK_RFC3339_SIZE, "%s.%03dZ", date, (int)(wall_ms % 1000));
}
