/*
 * The append-only event journal of a daemon: one JSON object a line, from which reports are assembled.
 *
 * Each line is {"time": RFC 3339, "mono_ms": n, "event": name, ...fields}. One write(2) a line with O_APPEND, so
 * several threads may write, and a line is whole or, after a crash, a torn last one which readers skip. Never put
 * secrets, record contents, losses or local counts into it.
 *
 *     journal_event(j, "round_done", json_pack("{s:i,s:I}", "round", 3, "bytes_up", (json_int_t)bytes));
 */
#ifndef RUNTIME_JOURNAL_H
#define RUNTIME_JOURNAL_H

#include "base/clock.h"
#include "base/error.h"

#include <jansson.h>

struct journal;

/* sync: fdatasync after every event. Mode 0600. clock must outlive it. ERR_RESOURCES. */
int MUST_USE journal_open(struct journal **ret_journal, const char *path, const struct clock *clock, bool sync,
                          struct error *err);
void journal_close(struct journal *j);

/*
 * Appends one event; fields (an object or NULL) is consumed in every case. A journal that cannot be written must not
 * stop a round: the first failure is logged and counted, not returned. j may be NULL (nothing happens).
 */
void journal_event(struct journal *j, const char *name, json_t *fields);
uint64_t journal_failures(const struct journal *j);

/* Calls visit for every whole line in order; a visit that returns non-zero ends it with that value. */
int MUST_USE journal_read(const char *path, int (*visit)(void *ctx, json_t *event), void *ctx, struct error *err);

#endif
