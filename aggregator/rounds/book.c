#include "aggregator/rounds/book.h"

#include "aggregator/settings.h"
#include "base/clock.h"
#include "base/file.h"
#include "runtime/store.h"

static const char *const migrations[] = {
    "CREATE TABLE job(id INTEGER PRIMARY KEY, job TEXT NOT NULL UNIQUE, state INTEGER NOT NULL, words INTEGER NOT NULL,"
    " rounds_opened INTEGER NOT NULL DEFAULT 0, version INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',"
    " plan BLOB NOT NULL) STRICT;"
    "CREATE TABLE version(job TEXT NOT NULL, round INTEGER NOT NULL, survivors INTEGER NOT NULL, model_hash BLOB NOT "
    "NULL,"
    " adapter_sha256 BLOB NOT NULL, state_sha256 BLOB NOT NULL, made INTEGER NOT NULL, proof BLOB,"
    " PRIMARY KEY(job, round)) STRICT;",
};

struct book {
    struct store *db;
    const struct config *config;
};

const char *job_state_name(enum job_state state)
{
    static const char *const names[] = {"waiting", "running", "done", "failed", "aborted"};
    return names[state];
}

int book_open(struct book **ret_book, const struct config *config, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE];
    struct book *b = calloc(1, sizeof *b);
    int rc;

    if (!b)
        return error_set(err, ERR_RESOURCES, "out of memory");
    b->config = config;
    aggregator_path(config, "aggregator.sqlite", path);
    if ((rc = store_open(&b->db, path, migrations, ARRAY_LEN(migrations), err)) < 0) {
        free(b);
        return rc;
    }
    *ret_book = b;
    return 0;
}

void book_close(struct book *b)
{
    if (!b)
        return;
    store_close(b->db);
    free(b);
}

#define JOB_COLUMNS "job, state, words, rounds_opened, version, reason"

static void read_job(struct store_query *q, struct book_job *job)
{
    *job = (struct book_job){.state = (enum job_state)store_i64(q, 1),
                             .words = (uint64_t)store_i64(q, 2),
                             .rounds_opened = (uint32_t)store_i64(q, 3),
                             .version = (uint32_t)store_i64(q, 4)};
    snprintf(job->job, sizeof job->job, "%s", store_text(q, 0));
    snprintf(job->reason, sizeof job->reason, "%s", store_text(q, 5));
}

static int one_job(struct store_query *q, struct book_job *ret_job, struct error *err)
{
    int rc = store_row(q, err);

    if (rc > 0)
        read_job(q, ret_job);
    store_end(q);
    if (rc < 0)
        return rc;
    return rc > 0 ? 0 : error_set(err, ERR_NOT_FOUND, "no such job");
}

int book_add_job(struct book *b, const char *job, uint64_t words, struct span signed_plan, struct error *err)
{
    struct store_query q = store_query(b->db, "INSERT INTO job(job, state, words, plan) VALUES(?, 0, ?, ?)");
    int rc;

    store_bind_text(&q, 1, job);
    store_bind_i64(&q, 2, (int64_t)words);
    store_bind_blob(&q, 3, signed_plan);
    rc = store_run(&q, err);
    if (rc == ERR_EXISTS)
        return error_set(err, ERR_EXISTS, "a job named '%s' exists; a name is used once", job);
    return rc;
}

int book_job(struct book *b, const char *job, struct book_job *ret_job, struct error *err)
{
    struct store_query q = store_query(b->db, "SELECT " JOB_COLUMNS " FROM job WHERE job = ?");

    store_bind_text(&q, 1, job);
    return one_job(&q, ret_job, err);
}

int book_plan(struct book *b, const char *job, struct buffer *out, struct error *err)
{
    struct store_query q = store_query(b->db, "SELECT plan FROM job WHERE job = ?");
    int rc;

    store_bind_text(&q, 1, job);
    if ((rc = store_row(&q, err)) > 0) {
        struct span plan = store_blob(&q, 0);
        buffer_append(out, plan.ptr, plan.len);
    }
    store_end(&q);
    if (rc < 0)
        return rc;
    return rc > 0 ? 0 : error_set(err, ERR_NOT_FOUND, "no job '%s'", job);
}

int book_next_job(struct book *b, struct book_job *ret_job, struct error *err)
{
    struct store_query q =
        store_query(b->db, "SELECT " JOB_COLUMNS " FROM job WHERE state IN (0, 1) ORDER BY state DESC, id LIMIT 1");

    return one_job(&q, ret_job, err);
}

int book_set_state(struct book *b, const char *job, enum job_state state, const char *reason, struct error *err)
{
    struct store_query q = store_query(b->db, "UPDATE job SET state = ?, reason = ? WHERE job = ?");

    store_bind_i64(&q, 1, state);
    store_bind_text(&q, 2, reason);
    store_bind_text(&q, 3, job);
    return store_run(&q, err);
}

int book_each_job(struct book *b, int (*visit)(void *ctx, const struct book_job *job), void *ctx, struct error *err)
{
    struct store_query q = store_query(b->db, "SELECT " JOB_COLUMNS " FROM job ORDER BY id");
    int rc;

    while ((rc = store_row(&q, err)) > 0) {
        struct book_job job;
        int stop;
        read_job(&q, &job);
        if ((stop = visit(ctx, &job)) != 0) {
            rc = stop;
            break;
        }
    }
    store_end(&q);
    return rc;
}

int book_open_round(struct book *b, const char *job, uint32_t *ret_round, struct error *err)
{
    struct store_query q;
    struct book_job row = {0};
    int rc = store_begin(b->db, err);

    if (rc < 0)
        return rc;
    if ((rc = book_job(b, job, &row, err)) == 0) {
        q = store_query(b->db, "UPDATE job SET rounds_opened = rounds_opened + 1 WHERE job = ?");
        store_bind_text(&q, 1, job);
        rc = store_run(&q, err);
    }
    if (rc < 0) {
        store_rollback(b->db);
        return rc;
    }
    if ((rc = store_commit(b->db, err)) == 0)
        *ret_round = row.rounds_opened + 1;
    return rc;
}

static void state_path(const struct book *b, const char *job, uint32_t round, char out[AGGREGATOR_PATH_SIZE])
{
    char name[SITE_ID_SIZE + 64];

    snprintf(name, sizeof name, "models/%s/%06u.state", job, round);
    aggregator_path(b->config, name, out);
}

static int insert_version(struct book *b, const char *job, const struct book_version *v, struct error *err)
{
    struct store_query q = store_query(b->db, "INSERT INTO version(job, round, survivors, model_hash, adapter_sha256,"
                                              " state_sha256, made) VALUES(?,?,?,?,?,?,?)");
    int rc;

    store_bind_text(&q, 1, job);
    store_bind_i64(&q, 2, v->round);
    store_bind_i64(&q, 3, v->survivors);
    store_bind_blob(&q, 4, span_of(v->model_hash, HASH_SIZE));
    store_bind_blob(&q, 5, span_of(v->adapter_sha256, HASH_SIZE));
    store_bind_blob(&q, 6, span_of(v->state_sha256, HASH_SIZE));
    store_bind_i64(&q, 7, v->made_wall_ms);
    if ((rc = store_run(&q, err)) < 0)
        return rc;
    q = store_query(b->db, "UPDATE job SET version = ? WHERE job = ?");
    store_bind_i64(&q, 1, v->round);
    store_bind_text(&q, 2, job);
    return store_run(&q, err);
}

int book_add_version(struct book *b, const char *job, const struct book_version *version, const float *state,
                     uint64_t words, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE], folder[AGGREGATOR_PATH_SIZE];
    int rc;

    state_path(b, job, version->round, path);
    snprintf(folder, sizeof folder, "%s", path);
    *strrchr(folder, '/') = 0;
    if ((rc = file_make_folder(folder, 0700, err)) < 0 ||
        (rc = file_write_atomic(path, span_of(state, (size_t)words * 2 * sizeof *state), 0600, err)) < 0 ||
        (rc = store_begin(b->db, err)) < 0)
        return rc;
    if ((rc = insert_version(b, job, version, err)) < 0) {
        store_rollback(b->db);
        return rc;
    }
    return store_commit(b->db, err);
}

int book_set_proof(struct book *b, const char *job, uint32_t round, struct span proof, struct error *err)
{
    struct store_query q = store_query(b->db, "UPDATE version SET proof = ? WHERE job = ? AND round = ?");

    store_bind_blob(&q, 1, proof);
    store_bind_text(&q, 2, job);
    store_bind_i64(&q, 3, round);
    return store_run(&q, err);
}

int book_withdraw(struct book *b, struct book_job *job, struct error *err)
{
    struct store_query q;
    struct book_job row;
    int rc = store_begin(b->db, err);

    if (rc < 0)
        return rc;
    q = store_query(b->db, "DELETE FROM version WHERE job = ? AND proof IS NULL");
    store_bind_text(&q, 1, job->job);
    if ((rc = store_run(&q, err)) == 0) {
        q = store_query(b->db, "UPDATE job SET version = (SELECT COALESCE(MAX(round), 0) FROM version WHERE job = ?1)"
                               " WHERE job = ?1");
        store_bind_text(&q, 1, job->job);
        rc = store_run(&q, err);
    }
    if (rc < 0 || (rc = book_job(b, job->job, &row, err)) < 0) {
        store_rollback(b->db);
        return rc;
    }
    if ((rc = store_commit(b->db, err)) == 0)
        job->version = row.version;
    return rc;
}

int book_proof(struct book *b, const char *job, uint32_t round, struct buffer *out, uint8_t ret_state_sha256[HASH_SIZE],
               struct error *err)
{
    struct store_query q =
        store_query(b->db, "SELECT proof, state_sha256 FROM version WHERE job = ? AND round = ? AND proof IS NOT NULL");
    int rc;

    store_bind_text(&q, 1, job);
    store_bind_i64(&q, 2, round);
    if ((rc = store_row(&q, err)) > 0) {
        struct span proof = store_blob(&q, 0), hash = store_blob(&q, 1);
        buffer_append(out, proof.ptr, proof.len);
        if (hash.len == HASH_SIZE)
            memcpy(ret_state_sha256, hash.ptr, HASH_SIZE);
    }
    store_end(&q);
    if (rc < 0)
        return rc;
    return rc > 0
               ? 0
               : error_set(err, ERR_NOT_FOUND, "version %u of job %s does not exist or is not co-signed", round, job);
}

int book_state(struct book *b, const char *job, uint32_t round, float *state, uint64_t words, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE];
    uint8_t want[HASH_SIZE], have[HASH_SIZE];
    size_t bytes = (size_t)words * 2 * sizeof *state;
    struct store_query q;
    struct span map;
    int rc;

    if (round == 0) {
        memset(state, 0, bytes);
        return 0;
    }
    q = store_query(b->db, "SELECT state_sha256 FROM version WHERE job = ? AND round = ?");
    store_bind_text(&q, 1, job);
    store_bind_i64(&q, 2, round);
    rc = store_row(&q, err);
    if (rc > 0 && store_blob(&q, 0).len == HASH_SIZE)
        memcpy(want, store_blob(&q, 0).ptr, HASH_SIZE);
    store_end(&q);
    if (rc <= 0)
        return rc < 0 ? rc : error_set(err, ERR_NOT_FOUND, "job %s has no version %u", job, round);
    state_path(b, job, round, path);
    if ((rc = file_map(path, &map, err)) < 0)
        return rc;
    hash_bytes(map, have);
    if (map.len != bytes || memcmp(want, have, HASH_SIZE) != 0)
        rc = error_set(err, ERR_INTEGRITY, "%s: does not have the hash that was recorded: the file was changed", path);
    else
        memcpy(state, map.ptr, bytes);
    file_unmap(map);
    return rc;
}

int book_find_state(struct book *b, const uint8_t state_sha256[HASH_SIZE], char *path, struct error *err)
{
    struct store_query q =
        store_query(b->db, "SELECT job, round FROM version WHERE state_sha256 = ? AND proof IS NOT NULL LIMIT 1");
    int rc;

    store_bind_blob(&q, 1, span_of(state_sha256, HASH_SIZE));
    if ((rc = store_row(&q, err)) > 0)
        state_path(b, store_text(&q, 0), (uint32_t)store_i64(&q, 1), path);
    store_end(&q);
    if (rc < 0)
        return rc;
    return rc > 0 ? 0 : error_set(err, ERR_NOT_FOUND, "no such state");
}

int book_each_version(struct book *b, const char *job, int (*visit)(void *ctx, const struct book_version *version),
                      void *ctx, struct error *err)
{
    struct store_query q =
        store_query(b->db, "SELECT round, survivors, model_hash, adapter_sha256, state_sha256, made, proof IS NOT NULL"
                           " FROM version WHERE job = ? ORDER BY round");
    int rc;

    store_bind_text(&q, 1, job);
    while ((rc = store_row(&q, err)) > 0) {
        struct book_version v = {.round = (uint32_t)store_i64(&q, 0),
                                 .survivors = (uint32_t)store_i64(&q, 1),
                                 .made_wall_ms = store_i64(&q, 5),
                                 .proven = store_i64(&q, 6) != 0};
        int stop;
        memcpy(v.model_hash, store_blob(&q, 2).ptr, HASH_SIZE);
        memcpy(v.adapter_sha256, store_blob(&q, 3).ptr, HASH_SIZE);
        memcpy(v.state_sha256, store_blob(&q, 4).ptr, HASH_SIZE);
        if ((stop = visit(ctx, &v)) != 0) {
            rc = stop;
            break;
        }
    }
    store_end(&q);
    return rc;
}
