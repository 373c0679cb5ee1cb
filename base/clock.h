/* Injected time. Monotonic for intervals and deadlines, wall (UTC, since 1970) for schedules, certificates and logs. */
#ifndef BASE_CLOCK_H
#define BASE_CLOCK_H

#include <stddef.h>
#include <stdint.h>

struct clock {
    int64_t (*monotonic_ms)(void *ctx);
    int64_t (*wall_ms)(void *ctx);
    void (*sleep_ms)(void *ctx, int64_t ms);
    void *ctx;
};

extern const struct clock clock_system;

static inline int64_t clock_monotonic_ms(const struct clock *c)
{
    return c->monotonic_ms(c->ctx);
}

static inline int64_t clock_wall_ms(const struct clock *c)
{
    return c->wall_ms(c->ctx);
}

static inline void clock_sleep_ms(const struct clock *c, int64_t ms)
{
    c->sleep_ms(c->ctx, ms);
}

#define CLOCK_RFC3339_SIZE 32
/* "2026-03-01T12:34:56.789Z" */
void clock_format_rfc3339(int64_t wall_ms, char out[CLOCK_RFC3339_SIZE]);

#endif
