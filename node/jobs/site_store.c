#include "node/jobs/site_store.h"

#include "node/settings.h"
#include "runtime/store.h"

static const char *const migrations[] = {
    "CREATE TABLE record(job TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, kind INTEGER NOT NULL,"
    " bytes BLOB NOT NULL, PRIMARY KEY(job, round, attempt, kind)) STRICT;"
    "CREATE TABLE witness(site TEXT PRIMARY KEY, sequence INTEGER NOT NULL, head BLOB NOT NULL) STRICT;"
    "CREATE TABLE job(job TEXT PRIMARY KEY, plan_hash BLOB NOT NULL, plan BLOB NOT NULL, consent INTEGER NOT NULL,"
    " version INTEGER NOT NULL DEFAULT 0) STRICT;"
    "CREATE TABLE value(name TEXT PRIMARY KEY, text TEXT, number INTEGER) STRICT;",
};

struct site_store {
    struct store *db;
};

int site_store_open(struct site_store **ret_store, const struct config *config, struct error *err)
{
    char path[NODE_PATH_SIZE];
    struct site_store *s = calloc(1, sizeof *s);
    int rc;

    if (!s)
        return error_set(err, ERR_RESOURCES, "out of memory");
    node_path(config, "node.sqlite", path);
    if ((rc = store_open(&s->db, path, migrations, ARRAY_LEN(migrations), err)) < 0) {
        free(s);
        return rc;
    }
    *ret_store = s;
    return 0;
}

void site_store_close(struct site_store *s)
{
    if (!s)
        return;
    store_close(s->db);
    free(s);
}

/* Ends a transaction with rc: commits on 0. */
static int finish(struct site_store *s, int rc, struct error *err)
{
    if (rc == 0)
        return store_commit(s->db, err);
    store_rollback(s->db);
    return rc;
}

/* One row expected at most: 1, 0 or negative, and *ret its first column. */
static int one_number(struct store_query *q, int64_t *ret, struct error *err)
{
    int rc = store_row(q, err);

    if (rc > 0)
        *ret = store_i64(q, 0);
    store_end(q);
    return rc;
}

static int insert_record(struct site_store *s, enum secagg_record kind, const char *job, uint32_t round,
                         uint32_t attempt, struct span bytes, struct error *err)
{
    struct store_query q = store_query(s->db, "INSERT INTO record(job, round, attempt, kind, bytes) VALUES(?,?,?,?,?)");

    store_bind_text(&q, 1, job);
    store_bind_i64(&q, 2, round);
    store_bind_i64(&q, 3, attempt);
    store_bind_i64(&q, 4, kind);
    store_bind_blob(&q, 5, bytes);
    return store_run(&q, err);
}

static int record_open(struct site_store *s, const char *job, uint32_t round, uint32_t attempt, struct span bytes,
                       struct error *err)
{
    struct store_query q = store_query(
        s->db,
        "SELECT COUNT(*) FROM record WHERE job = ?1 AND kind = 1 AND (round > ?2 OR (round = ?2 AND attempt >= ?3))");
    int64_t later = 0;
    int rc;

    store_bind_text(&q, 1, job);
    store_bind_i64(&q, 2, round);
    store_bind_i64(&q, 3, attempt);
    if ((rc = one_number(&q, &later, err)) < 0)
        return rc;
    if (later > 0)
        return error_set(err, ERR_INTEGRITY,
                         "job %s round %u attempt %u was opened here before: a round is never redone", job, round,
                         attempt);
    return insert_record(s, RECORD_OPEN, job, round, attempt, bytes, err);
}

/* Stores bytes for the key of `sql` (job, round, attempt in ?1..?3, kind ?4) unless equal ones are there. */
static int record_once(struct site_store *s, const char *sql, enum secagg_record kind, const char *job, uint32_t round,
                       uint32_t attempt, struct span bytes, struct error *err)
{
    struct store_query q = store_query(s->db, sql);
    bool equal = false;
    int rc;

    store_bind_text(&q, 1, job);
    store_bind_i64(&q, 2, round);
    store_bind_i64(&q, 3, attempt);
    store_bind_i64(&q, 4, kind);
    rc = store_row(&q, err);
    if (rc > 0)
        equal = span_equal(store_blob(&q, 0), bytes);
    store_end(&q);
    if (rc < 0)
        return rc;
    if (rc > 0)
        return equal ? 0
                     : error_set(err, ERR_INTEGRITY,
                                 "the aggregator asked for a second, different %s in job %s round %u: refused",
                                 kind == RECORD_SURVIVORS ? "survivor list" : "unmasking", job, round);
    return insert_record(s, kind, job, round, attempt, bytes, err);
}

int site_store_unmasked(struct site_store *s, const uint8_t model_hash[HASH_SIZE], const char *job, uint32_t round,
                        bool *ret_unmasked, struct error *err)
{
    struct store_query q =
        store_query(s->db, "SELECT COUNT(*) FROM record WHERE kind = ? AND bytes = ? AND NOT (job = ? AND round = ?)");
    int64_t elsewhere = 0;
    int rc;

    store_bind_i64(&q, 1, RECORD_UNMASK_MODEL);
    store_bind_blob(&q, 2, span_of(model_hash, HASH_SIZE));
    store_bind_text(&q, 3, job);
    store_bind_i64(&q, 4, round);
    if ((rc = one_number(&q, &elsewhere, err)) < 0)
        return rc;
    *ret_unmasked = elsewhere > 0;
    return 0;
}

static int record_unmask_model(struct site_store *s, const char *job, uint32_t round, uint32_t attempt,
                               struct span bytes, struct error *err)
{
    bool elsewhere = false;
    int rc;

    assert(bytes.len == HASH_SIZE);
    if ((rc = site_store_unmasked(s, bytes.ptr, job, round, &elsewhere, err)) < 0)
        return rc;
    if (elsewhere)
        return error_set(
            err, ERR_INTEGRITY,
            "job %s round %u: a sum over updates of the same model was opened before; without differential "
            "privacy two of them show a single site's update",
            job, round);
    return record_once(s, "SELECT bytes FROM record WHERE job = ?1 AND round = ?2 AND attempt = ?3 AND kind = ?4",
                       RECORD_UNMASK_MODEL, job, round, attempt, bytes, err);
}

static int record(void *ctx, enum secagg_record kind, const char *job, uint32_t round, uint32_t attempt,
                  struct span bytes, struct error *err)
{
    struct site_store *s = ctx;
    int rc = store_begin(s->db, err);

    if (rc < 0)
        return rc;
    if (kind == RECORD_OPEN)
        rc = record_open(s, job, round, attempt, bytes, err);
    else if (kind == RECORD_SURVIVORS)
        rc = record_once(s, "SELECT bytes FROM record WHERE job = ?1 AND round = ?2 AND attempt = ?3 AND kind = ?4",
                         kind, job, round, attempt, bytes, err);
    else if (kind == RECORD_UNMASK_MODEL)
        rc = record_unmask_model(s, job, round, attempt, bytes, err);
    else /* whatever the attempt */
        rc = record_once(s, "SELECT bytes FROM record WHERE job = ?1 AND round = ?2 AND ?3 >= 0 AND kind = ?4", kind,
                         job, round, attempt, bytes, err);
    return finish(s, rc, err);
}

struct secagg_log site_store_log(struct site_store *s)
{
    return (struct secagg_log){record, s};
}

static int witness(void *ctx, const char *site, uint64_t sequence, const uint8_t head[32], struct error *err)
{
    struct site_store *s = ctx;
    struct store_query q;
    int64_t held = -1;
    bool same = false;
    int rc = store_begin(s->db, err);

    if (rc < 0)
        return rc;
    q = store_query(s->db, "SELECT sequence, head FROM witness WHERE site = ?");
    store_bind_text(&q, 1, site);
    if ((rc = store_row(&q, err)) > 0) {
        held = store_i64(&q, 0);
        same = span_equal(store_blob(&q, 1), span_of(head, 32));
    }
    store_end(&q);
    if (rc < 0)
        return finish(s, rc, err);
    if ((int64_t)sequence < held || ((int64_t)sequence == held && !same))
        return finish(
            s,
            error_set(err, ERR_INTEGRITY,
                      "site %s shows a privacy ledger older than the one it showed before (a restored snapshot "
                      "or a second machine?)",
                      site),
            err);
    q = store_query(s->db, "INSERT OR REPLACE INTO witness(site, sequence, head) VALUES(?,?,?)");
    store_bind_text(&q, 1, site);
    store_bind_i64(&q, 2, (int64_t)sequence);
    store_bind_blob(&q, 3, span_of(head, 32));
    return finish(s, store_run(&q, err), err);
}

struct secagg_witness site_store_witness(struct site_store *s)
{
    return (struct secagg_witness){witness, s};
}

const char *consent_name(enum consent consent)
{
    static const char *const names[] = {"pending", "approved", "denied"};
    return names[consent];
}

int site_store_consent(struct site_store *s, const char *job, const uint8_t plan_hash[HASH_SIZE], struct span opening,
                       enum consent *ret_consent, struct error *err)
{
    struct store_query q;
    int64_t consent = -1;
    int rc = store_begin(s->db, err);

    if (rc < 0)
        return rc;
    q = store_query(s->db, "SELECT consent FROM job WHERE job = ? AND plan_hash = ?");
    store_bind_text(&q, 1, job);
    store_bind_blob(&q, 2, span_of(plan_hash, HASH_SIZE));
    if ((rc = one_number(&q, &consent, err)) < 0)
        return finish(s, rc, err);
    if (rc == 0) {
        q = store_query(s->db,
                        "INSERT INTO job(job, plan_hash, plan, consent) VALUES(?,?,?,0) ON CONFLICT(job) DO UPDATE "
                        "SET plan_hash = excluded.plan_hash, plan = excluded.plan, consent = 0");
        store_bind_text(&q, 1, job);
        store_bind_blob(&q, 2, span_of(plan_hash, HASH_SIZE));
        store_bind_blob(&q, 3, opening);
        if ((rc = store_run(&q, err)) < 0)
            return finish(s, rc, err);
        consent = CONSENT_PENDING;
    }
    if ((rc = finish(s, 0, err)) == 0)
        *ret_consent = (enum consent)consent;
    return rc;
}

int site_store_decision(struct site_store *s, const char *job, const uint8_t plan_hash[HASH_SIZE],
                        enum consent *ret_consent, struct error *err)
{
    struct store_query q = store_query(s->db, "SELECT consent FROM job WHERE job = ? AND plan_hash = ?");
    int64_t consent = 0;
    int rc;

    store_bind_text(&q, 1, job);
    store_bind_blob(&q, 2, span_of(plan_hash, HASH_SIZE));
    if ((rc = one_number(&q, &consent, err)) < 0)
        return rc;
    if (rc == 0)
        return error_set(err, ERR_NOT_FOUND, "job %s has another plan by now", job);
    *ret_consent = (enum consent)consent;
    return 0;
}

static int count_job(struct site_store *s, const char *job, int64_t *ret_count, struct error *err)
{
    struct store_query q = store_query(s->db, "SELECT COUNT(*) FROM job WHERE job = ?");
    int rc;

    store_bind_text(&q, 1, job);
    rc = one_number(&q, ret_count, err);
    return rc < 0 ? rc : 0;
}

int site_store_decide(struct site_store *s, const char *job, const uint8_t plan_hash[HASH_SIZE], enum consent consent,
                      struct error *err)
{
    struct store_query q =
        store_query(s->db, "UPDATE job SET consent = ?1 WHERE job = ?2 AND (?3 IS NULL OR plan_hash = ?3)");
    int64_t known = 0;
    int rc;

    store_bind_i64(&q, 1, consent);
    store_bind_text(&q, 2, job);
    if (plan_hash)
        store_bind_blob(&q, 3, span_of(plan_hash, HASH_SIZE));
    else
        store_bind_null(&q, 3);
    if ((rc = store_run(&q, err)) < 0)
        return rc;
    if (store_changes(s->db) > 0)
        return 0;
    if ((rc = count_job(s, job, &known, err)) < 0)
        return rc;
    if (known > 0)
        return error_set(err, ERR_POLICY,
                         "job %s has another plan now than the one that was read: `consilium-node consent show %s`",
                         job, job);
    return error_set(err, ERR_NOT_FOUND, "no job '%s' was offered to this site; see `consilium-node consent list`",
                     job);
}

int site_store_plan(struct site_store *s, const char *job, struct buffer *out, enum consent *ret_consent,
                    struct error *err)
{
    struct store_query q = store_query(s->db, "SELECT consent, plan FROM job WHERE job = ?");
    int rc;

    store_bind_text(&q, 1, job);
    if ((rc = store_row(&q, err)) > 0) {
        struct span plan = store_blob(&q, 1);
        *ret_consent = (enum consent)store_i64(&q, 0);
        buffer_append(out, plan.ptr, plan.len);
    }
    store_end(&q);
    if (rc < 0)
        return rc;
    return rc > 0 ? 0 : error_set(err, ERR_NOT_FOUND, "no job '%s' was offered to this site", job);
}

int site_store_each_job(struct site_store *s, int (*visit)(void *ctx, const char *job, enum consent consent), void *ctx,
                        struct error *err)
{
    struct store_query q = store_query(s->db, "SELECT job, consent FROM job ORDER BY job");
    int rc;

    while ((rc = store_row(&q, err)) > 0) {
        int stop = visit(ctx, store_text(&q, 0), (enum consent)store_i64(&q, 1));
        if (stop) {
            rc = stop;
            break;
        }
    }
    store_end(&q);
    return rc;
}

int site_store_version(struct site_store *s, const char *job, uint32_t *ret_round, struct error *err)
{
    struct store_query q = store_query(s->db, "SELECT version FROM job WHERE job = ?");
    int64_t version = 0;
    int rc;

    store_bind_text(&q, 1, job);
    if ((rc = one_number(&q, &version, err)) < 0)
        return rc;
    *ret_round = (uint32_t)version;
    return 0;
}

int site_store_set_version(struct site_store *s, const char *job, uint32_t round, struct error *err)
{
    struct store_query q = store_query(s->db, "UPDATE job SET version = ? WHERE job = ?");

    store_bind_i64(&q, 1, round);
    store_bind_text(&q, 2, job);
    return store_run(&q, err);
}

int site_store_served(struct site_store *s, char *ret_job, uint32_t *ret_round, struct error *err)
{
    struct store_query q = store_query(s->db, "SELECT text, number FROM value WHERE name = 'served'");
    int rc = store_row(&q, err);

    if (rc > 0) {
        snprintf(ret_job, SITE_ID_SIZE, "%s", store_text(&q, 0));
        *ret_round = (uint32_t)store_i64(&q, 1);
    }
    store_end(&q);
    if (rc < 0)
        return rc;
    return rc > 0 ? 0 : error_set(err, ERR_NOT_FOUND, "no adapter is in use yet");
}

static int set_value(struct site_store *s, const char *name, const char *text, int64_t number, struct error *err)
{
    struct store_query q = store_query(s->db, "INSERT OR REPLACE INTO value(name, text, number) VALUES(?,?,?)");

    store_bind_text(&q, 1, name);
    store_bind_text(&q, 2, text);
    store_bind_i64(&q, 3, number);
    return store_run(&q, err);
}

int site_store_set_served(struct site_store *s, const char *job, uint32_t round, struct error *err)
{
    return set_value(s, "served", job, round, err);
}

static int get_value(struct site_store *s, const char *name, int64_t *ret_number, struct error *err)
{
    struct store_query q = store_query(s->db, "SELECT number FROM value WHERE name = ?");
    int rc;

    *ret_number = 0;
    store_bind_text(&q, 1, name);
    rc = one_number(&q, ret_number, err);
    return rc < 0 ? rc : 0;
}

int site_store_declared(struct site_store *s, uint64_t *ret_records, struct error *err)
{
    int64_t records;
    int rc = get_value(s, "declared", &records, err);

    if (rc == 0)
        *ret_records = (uint64_t)records;
    return rc;
}

int site_store_set_declared(struct site_store *s, uint64_t records, struct error *err)
{
    return set_value(s, "declared", NULL, (int64_t)records, err);
}

int site_store_has_ledger(struct site_store *s, bool *ret_has, struct error *err)
{
    int64_t number;
    int rc = get_value(s, "ledger", &number, err);

    if (rc == 0)
        *ret_has = number != 0;
    return rc;
}

int site_store_set_has_ledger(struct site_store *s, struct error *err)
{
    return set_value(s, "ledger", NULL, 1, err);
}
