/* Ends a bench program with a reason: what the small ones, which take their own options, share. */
#ifndef BENCH_CHECKED_H
#define BENCH_CHECKED_H

#include "base/error.h"

#include <stdio.h>
#include <stdlib.h>

static inline void bench_check(int rc, const struct error *err)
{
    if (rc < 0) {
        fprintf(stderr, "%s\n", err->message);
        exit(1);
    }
}

/* A whole number in these bounds; status 2 for anything else. */
static inline int bench_number(const char *text, int low, int high)
{
    char *end;
    const long value = strtol(text, &end, 10);
    if (end == text || *end || value < low || value > high) {
        fprintf(stderr, "%s is no number from %d to %d\n", text, low, high);
        exit(2);
    }
    return (int)value;
}

#endif
