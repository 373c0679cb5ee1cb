/*
 * SQLite as the daemons use it: WAL, synchronous=FULL, foreign keys, mode 0600, one schema version a file.
 *
 * A commit is durable when store_commit returned. One struct store belongs to one thread; several processes may open
 * one file: writers take the lock in store_begin and wait for it up to STORE_BUSY_MS. Statements are prepared once per
 * SQL text and kept. Do not carry a store across fork().
 *
 *     static const char *const migrations[] = {"CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT"};
 *     rc = store_open(&s, path, migrations, 1, &err);
 *
 *     struct store_query q = store_query(s, "SELECT name FROM t WHERE id > ?");
 *     store_bind_i64(&q, 1, 10);
 *     while ((rc = store_row(&q, &err)) > 0)
 *         use(store_text(&q, 0));
 *     store_end(&q);
 */
#ifndef RUNTIME_STORE_H
#define RUNTIME_STORE_H

#include "base/error.h"
#include "base/span.h"

#define STORE_BUSY_MS 10000

struct store;
struct sqlite3_stmt;

struct store_query { /* borrowed from the store; end it before the same SQL is queried again */
    struct store *store;
    struct sqlite3_stmt *statement;
    int failed; /* sqlite code of a prepare or bind that failed; reported by the next row or run */
};

/*
 * Opens or creates path and applies migrations[user_version..count), each in its own transaction.
 * ERR_RESOURCES (disk, permissions), ERR_INTEGRITY (not a database, malformed, made by a newer version), ERR_TIMEOUT.
 */
int MUST_USE store_open(struct store **ret_store, const char *path, const char *const *migrations, size_t count,
                        struct error *err);
void store_close(struct store *s); /* accepts NULL; an open transaction is rolled back */
const char *store_path(const struct store *s);

/* Write lock at once (BEGIN IMMEDIATE), so that reads inside it are current. ERR_TIMEOUT when another holds it. */
int MUST_USE store_begin(struct store *s, struct error *err);
int MUST_USE store_commit(struct store *s, struct error *err); /* durable on return; rolled back when it fails */
void store_rollback(struct store *s);                          /* does nothing outside a transaction */

int MUST_USE store_exec(struct store *s, const char *sql, struct error *err); /* constant SQL without parameters */
int64_t store_last_id(const struct store *s);
int64_t store_changes(const struct store *s); /* rows that the last statement changed */

struct store_query store_query(struct store *s, const char *sql);
/* Parameters count from 1, columns from 0. Text and bytes are copied. */
void store_bind_i64(struct store_query *q, int index, int64_t v);
void store_bind_f64(struct store_query *q, int index, double v);
void store_bind_text(struct store_query *q, int index, const char *text); /* NULL binds NULL */
void store_bind_blob(struct store_query *q, int index, struct span bytes);
void store_bind_null(struct store_query *q, int index);
/* 1: a row is there, 0: no more, negative: ERR_EXISTS (a constraint), ERR_TIMEOUT, ERR_RESOURCES, ERR_INTEGRITY. */
int MUST_USE store_row(struct store_query *q, struct error *err);
/* Runs a statement without rows and ends it. */
int MUST_USE store_run(struct store_query *q, struct error *err);
void store_end(struct store_query *q); /* required after store_row; harmless twice */

int64_t store_i64(const struct store_query *q, int column);
double store_f64(const struct store_query *q, int column);
const char *store_text(const struct store_query *q, int column); /* "" for NULL; until the next row or end */
struct span store_blob(const struct store_query *q, int column); /* until the next row or end */
bool store_is_null(const struct store_query *q, int column);

/* PRAGMA quick_check: ERR_INTEGRITY with its first line. */
int MUST_USE store_check(struct store *s, struct error *err);
/* A consistent copy of an open database into a new file (mode 0600). */
int MUST_USE store_backup(struct store *s, const char *path, struct error *err);

#endif
