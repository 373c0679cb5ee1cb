/*
 * One live progress line on stderr when it is a terminal; otherwise the line at most every `every_ms`, and on change of
 * key.
 *
 * Not thread-safe: one thread owns it.
 *
 *     struct progress p;
 *     progress_init(&p, &clock_system, 10000);
 *     progress_update(&p, round, "round %u/%u | up %u/%u", ...);
 *     progress_end(&p);
 */
#ifndef RUNTIME_PROGRESS_H
#define RUNTIME_PROGRESS_H

#include "base/clock.h"
#include "base/error.h"

struct progress {
    const struct clock *clock;
    int fd;
    bool tty;
    bool open;          /* a live line is on the screen */
    int64_t every_ms;   /* between lines when not a terminal */
    int64_t printed_ms; /* monotonic; -1: never */
    uint64_t key;
};

void progress_init(struct progress *p, const struct clock *clock, int64_t every_ms);
void progress_update(struct progress *p, uint64_t key, const char *format, ...) PRINTF_LIKE(3, 4);
void progress_break(struct progress *p); /* before another line goes to stderr: ends the live line */
void progress_end(struct progress *p);

#endif
