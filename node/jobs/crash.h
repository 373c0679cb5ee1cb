/*
 * Crash points: named places where a test or the demo may have the process killed as by a power cut.
 *
 * CONSILIUM_CRASH_AT="NAME" or "NAME:ROUND" makes crash_point(NAME, ROUND) send SIGKILL to its own process. A crash
 * point changes nothing else, so the worst that setting it can do is what a power cut does anyway. Thread-safe.
 *
 * Names: reserved, trained, shares-sent, masked-sending, masked-acknowledged, consistency-signed, unmask-sent, result.
 */
#ifndef NODE_JOBS_CRASH_H
#define NODE_JOBS_CRASH_H

#include <stdint.h>

void crash_point(const char *name, uint64_t round);

#endif
