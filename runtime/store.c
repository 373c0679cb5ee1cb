#include "runtime/store.h"

#include <errno.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <unistd.h>

#define STATEMENTS_MAX 64

struct store {
    sqlite3 *db;
    char *path;
    struct {
        char *sql; /* owned */
        sqlite3_stmt *statement;
    } cache[STATEMENTS_MAX];
    size_t cached;
};

/* What an SQLite code means to the caller; the message names the file. */
static int failed(struct store *s, int code, const char *what, struct error *err)
{
    const char *detail = s->db ? sqlite3_errmsg(s->db) : sqlite3_errstr(code);
    switch (code & 0xff) {
    case SQLITE_CONSTRAINT:
        return error_set(err, ERR_EXISTS, "%s: %s: %s", s->path, what, detail);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return error_set(err, ERR_TIMEOUT, "%s: %s: another process holds the database; waited %d s", s->path, what,
                         STORE_BUSY_MS / 1000);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_FORMAT:
        return error_set(err, ERR_INTEGRITY, "%s: %s: %s; restore it from a backup", s->path, what, detail);
    case SQLITE_FULL:
    case SQLITE_IOERR:
    case SQLITE_NOMEM:
    case SQLITE_READONLY:
    case SQLITE_CANTOPEN:
    case SQLITE_PERM:
        return error_set(err, ERR_RESOURCES, "%s: %s: %s (free disk space and permissions?)", s->path, what, detail);
    default:
        return error_set(err, ERR_BUG, "%s: %s: %s", s->path, what, detail);
    }
}

int store_exec(struct store *s, const char *sql, struct error *err)
{
    int code = sqlite3_exec(s->db, sql, NULL, NULL, NULL);
    return code == SQLITE_OK ? 0 : failed(s, code, "statement", err);
}

static int pragma_i64(struct store *s, const char *sql, int64_t *ret_value, struct error *err)
{
    struct store_query q = store_query(s, sql);
    int rc = store_row(&q, err);
    if (rc > 0)
        *ret_value = store_i64(&q, 0);
    store_end(&q);
    return rc < 0 ? rc : 0;
}

static int migrate(struct store *s, const char *const *migrations, size_t count, struct error *err)
{
    int64_t version = 0;
    int rc = store_begin(s, err);
    if (rc == 0)
        rc = pragma_i64(s, "PRAGMA user_version", &version, err);
    if (rc == 0 && (version < 0 || (size_t)version > count))
        rc = error_set(err, ERR_INTEGRITY, "%s: schema version %lld, but this program knows up to %zu: use a newer one",
                       s->path, (long long)version, count);
    for (size_t i = (size_t)version; rc == 0 && i < count; i++) {
        char sql[64];
        rc = store_exec(s, migrations[i], err);
        snprintf(sql, sizeof sql, "PRAGMA user_version = %zu", i + 1);
        if (rc == 0)
            rc = store_exec(s, sql, err);
    }
    if (rc == 0)
        return store_commit(s, err);
    store_rollback(s);
    return rc;
}

/* Creates the file itself, so that it is never readable by others, not even for a moment. */
static int make_private(const char *path, struct error *err)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return error_set(err, ERR_RESOURCES, "%s: cannot open the database: %s", path, strerror(errno));
    int rc = fchmod(fd, 0600);
    close(fd);
    return rc == 0 ? 0 : error_set(err, ERR_RESOURCES, "%s: cannot set mode 0600: %s", path, strerror(errno));
}

int store_open(struct store **ret_store, const char *path, const char *const *migrations, size_t count,
               struct error *err)
{
    int rc = make_private(path, err);
    if (rc < 0)
        return rc;
    struct store *s = calloc(1, sizeof *s);
    if (!s || !(s->path = strdup(path))) {
        free(s);
        return error_set(err, ERR_RESOURCES, "%s: out of memory", path);
    }
    int code = sqlite3_open_v2(path, &s->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL);
    if (code != SQLITE_OK) {
        rc = failed(s, code, "cannot open the database", err);
        store_close(s);
        return rc;
    }
    sqlite3_extended_result_codes(s->db, 1);
    sqlite3_busy_timeout(s->db, STORE_BUSY_MS);
    sqlite3_limit(s->db, SQLITE_LIMIT_ATTACHED, 0);
    rc = store_exec(s, "PRAGMA journal_mode = WAL", err);
    if (rc == 0)
        rc = store_exec(s, "PRAGMA synchronous = FULL", err);
    if (rc == 0)
        rc = store_exec(s, "PRAGMA foreign_keys = ON", err);
    if (rc == 0)
        rc = store_exec(s, "PRAGMA trusted_schema = OFF", err);
    if (rc == 0)
        rc = migrate(s, migrations, count, err);
    if (rc < 0) {
        store_close(s);
        return rc;
    }
    *ret_store = s;
    return 0;
}

void store_close(struct store *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->cached; i++) {
        sqlite3_finalize(s->cache[i].statement);
        free(s->cache[i].sql);
    }
    sqlite3_close(s->db); /* rolls an open transaction back */
    free(s->path);
    free(s);
}

const char *store_path(const struct store *s)
{
    return s->path;
}

int store_begin(struct store *s, struct error *err)
{
    assert(sqlite3_get_autocommit(s->db) && "a transaction is open already");
    int code = sqlite3_exec(s->db, "BEGIN IMMEDIATE", NULL, NULL, NULL);
    return code == SQLITE_OK ? 0 : failed(s, code, "begin", err);
}

int store_commit(struct store *s, struct error *err)
{
    int code = sqlite3_exec(s->db, "COMMIT", NULL, NULL, NULL);
    if (code == SQLITE_OK)
        return 0;
    int rc = failed(s, code, "commit", err);
    store_rollback(s);
    return rc;
}

void store_rollback(struct store *s)
{
    if (!sqlite3_get_autocommit(s->db))
        sqlite3_exec(s->db, "ROLLBACK", NULL, NULL, NULL);
}

int64_t store_last_id(const struct store *s)
{
    return sqlite3_last_insert_rowid(s->db);
}

int64_t store_changes(const struct store *s)
{
    return sqlite3_changes64(s->db);
}

struct store_query store_query(struct store *s, const char *sql)
{
    struct store_query q = {.store = s};
    for (size_t i = 0; i < s->cached; i++)
        if (strcmp(s->cache[i].sql, sql) == 0) {
            assert(!sqlite3_stmt_busy(s->cache[i].statement) && "the same query is open already: store_end it");
            q.statement = s->cache[i].statement;
            return q;
        }
    assert(s->cached < STATEMENTS_MAX && "more distinct SQL texts than the cache holds");
    q.failed = sqlite3_prepare_v3(s->db, sql, -1, SQLITE_PREPARE_PERSISTENT, &q.statement, NULL);
    char *copy = q.failed ? NULL : strdup(sql);
    if (!q.failed && !copy) {
        sqlite3_finalize(q.statement);
        q.statement = NULL;
        q.failed = SQLITE_NOMEM;
    }
    if (!q.failed) {
        s->cache[s->cached].sql = copy;
        s->cache[s->cached++].statement = q.statement;
    }
    return q;
}

static void bound(struct store_query *q, int code)
{
    assert(code != SQLITE_RANGE && "no such parameter");
    if (code != SQLITE_OK && !q->failed)
        q->failed = code;
}

void store_bind_i64(struct store_query *q, int index, int64_t v)
{
    if (!q->failed)
        bound(q, sqlite3_bind_int64(q->statement, index, v));
}

void store_bind_f64(struct store_query *q, int index, double v)
{
    if (!q->failed)
        bound(q, sqlite3_bind_double(q->statement, index, v));
}

void store_bind_text(struct store_query *q, int index, const char *text)
{
    if (!q->failed)
        bound(q, text ? sqlite3_bind_text(q->statement, index, text, -1, SQLITE_TRANSIENT)
                      : sqlite3_bind_null(q->statement, index));
}

void store_bind_blob(struct store_query *q, int index, struct span bytes)
{
    if (!q->failed)
        bound(q, sqlite3_bind_blob64(q->statement, index, bytes.len ? (const void *)bytes.ptr : "", bytes.len,
                                     SQLITE_TRANSIENT));
}

void store_bind_null(struct store_query *q, int index)
{
    if (!q->failed)
        bound(q, sqlite3_bind_null(q->statement, index));
}

int store_row(struct store_query *q, struct error *err)
{
    int code = q->failed;
    if (!code)
        code = sqlite3_step(q->statement);
    if (code == SQLITE_ROW)
        return 1;
    if (code == SQLITE_DONE)
        return 0;
    int rc = failed(q->store, code, q->statement ? sqlite3_sql(q->statement) : "prepare", err);
    store_end(q);
    return rc;
}

int store_run(struct store_query *q, struct error *err)
{
    int rc = store_row(q, err);
    assert(rc <= 0 && "a statement with rows: use store_row");
    store_end(q);
    return rc;
}

void store_end(struct store_query *q)
{
    if (q->statement) {
        sqlite3_reset(q->statement);
        sqlite3_clear_bindings(q->statement);
        q->statement = NULL;
        q->failed = SQLITE_MISUSE;
    }
}

int64_t store_i64(const struct store_query *q, int column)
{
    return sqlite3_column_int64(q->statement, column);
}

double store_f64(const struct store_query *q, int column)
{
    return sqlite3_column_double(q->statement, column);
}

const char *store_text(const struct store_query *q, int column)
{
    const char *text = (const char *)sqlite3_column_text(q->statement, column);
    return text ? text : "";
}

struct span store_blob(const struct store_query *q, int column)
{
    const void *bytes = sqlite3_column_blob(q->statement, column);
    return span_of(bytes, bytes ? (size_t)sqlite3_column_bytes(q->statement, column) : 0);
}

bool store_is_null(const struct store_query *q, int column)
{
    return sqlite3_column_type(q->statement, column) == SQLITE_NULL;
}

int store_check(struct store *s, struct error *err)
{
    struct store_query q = store_query(s, "PRAGMA quick_check(1)");
    int rc = store_row(&q, err);
    if (rc > 0)
        rc = strcmp(store_text(&q, 0), "ok") == 0 ? 0
                                                  : error_set(err, ERR_INTEGRITY, "%s: %s", s->path, store_text(&q, 0));
    store_end(&q);
    return rc;
}

int store_backup(struct store *s, const char *path, struct error *err)
{
    sqlite3 *target = NULL;
    if (access(path, F_OK) == 0)
        return error_set(err, ERR_EXISTS, "%s: exists already; name a new file for the backup", path);
    int rc = make_private(path, err);
    if (rc < 0)
        return rc;
    int code = sqlite3_open_v2(path, &target, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL);
    sqlite3_backup *copy = code == SQLITE_OK ? sqlite3_backup_init(target, "main", s->db, "main") : NULL;
    if (copy) {
        code = sqlite3_backup_step(copy, -1);
        int finished = sqlite3_backup_finish(copy);
        code = code == SQLITE_DONE ? finished : code;
    } else if (code == SQLITE_OK) {
        code = sqlite3_errcode(target);
    }
    if (code != SQLITE_OK)
        rc = error_set(err, ERR_RESOURCES, "%s: backup: %s", path, sqlite3_errstr(code));
    sqlite3_close(target);
    return rc;
}
