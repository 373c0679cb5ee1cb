/* The database wrapper and the event journal. */
#include "tests/runtime/support.h"

#include "runtime/journal.h"
#include "runtime/store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *const migrations[] = {"CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT UNIQUE, raw BLOB) STRICT",
                                         "ALTER TABLE t ADD COLUMN score REAL"};

static int setup(void **state)
{
    char *folder = strdup("/tmp/test-store-XXXXXX");
    *state = folder;
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    static const char *const names[] = {"a.db", "a.db-wal", "a.db-shm", "b.db", "b.db-wal", "b.db-shm", "journal"};
    char path[96];
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        snprintf(path, sizeof path, "%s/%s", (char *)*state, names[i]);
        unlink(path);
    }
    rmdir(*state);
    free(*state);
    return 0;
}

static int insert(struct store *s, int64_t id, const char *name, struct error *err)
{
    struct store_query q = store_query(s, "INSERT INTO t(id, name, raw) VALUES(?, ?, ?)");
    store_bind_i64(&q, 1, id);
    store_bind_text(&q, 2, name);
    store_bind_blob(&q, 3, span_of("\0\1", 2));
    return store_run(&q, err);
}

static int64_t count(struct store *s)
{
    struct store_query q = store_query(s, "SELECT count(*) FROM t");
    assert_int_equal(store_row(&q, NULL), 1);
    int64_t n = store_i64(&q, 0);
    store_end(&q);
    return n;
}

static void test_store(void **state)
{
    char path[96], copy[96];
    struct store *s;
    struct error err = {0};
    struct stat st;
    snprintf(path, sizeof path, "%s/a.db", (char *)*state);
    snprintf(copy, sizeof copy, "%s/b.db", (char *)*state);
    assert_int_equal(store_open(&s, path, migrations, 1, &err), 0);
    assert_int_equal(insert(s, 1, "one", &err), 0);
    assert_int_equal(insert(s, 2, "one", &err), ERR_EXISTS);
    store_close(s);
    assert_int_equal(store_open(&s, path, migrations, 2, &err), 0); /* migrates */
    assert_int_equal(store_begin(s, &err), 0);
    assert_int_equal(insert(s, 2, "two", &err), 0);
    store_rollback(s);
    assert_int_equal(count(s), 1);
    assert_int_equal(store_begin(s, &err), 0);
    assert_int_equal(insert(s, 2, NULL, &err), 0);
    assert_int_equal(store_commit(s, &err), 0);
    struct store_query q = store_query(s, "SELECT name, raw, score FROM t WHERE id = 2");
    assert_int_equal(store_row(&q, &err), 1);
    assert_true(store_is_null(&q, 0) && store_is_null(&q, 2));
    assert_int_equal(store_blob(&q, 1).len, 2);
    assert_int_equal(store_row(&q, &err), 0);
    store_end(&q);
    assert_int_equal(store_check(s, &err), 0);
    assert_int_equal(store_backup(s, copy, &err), 0);
    assert_int_equal(store_backup(s, copy, &err), ERR_EXISTS);
    store_close(s);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(store_open(&s, copy, migrations, 2, &err), 0);
    assert_int_equal(count(s), 2);
    store_close(s);
    assert_int_equal(store_open(&s, path, migrations, 1, &err), ERR_INTEGRITY); /* newer than the program */
    int fd = open(path, O_WRONLY | O_TRUNC);
    assert_int_equal(write(fd, "this is not a database file at all, is it", 41), 41);
    close(fd);
    assert_int_equal(store_open(&s, path, migrations, 2, &err), ERR_INTEGRITY);
    assert_int_equal(store_open(&s, "/nonexistent/x.db", migrations, 2, &err), ERR_RESOURCES);
}

static void test_writers(void **state)
{
    char path[96];
    struct store *s;
    snprintf(path, sizeof path, "%s/a.db", (char *)*state);
    assert_int_equal(store_open(&s, path, migrations, 2, NULL), 0);
    store_close(s);
    for (int child = 0; child < 3; child++)
        if (fork() == 0) {
            int bad = store_open(&s, path, migrations, 2, NULL);
            for (int i = 0; i < 10 && !bad; i++)
                bad = store_begin(s, NULL) || insert(s, child * 100 + i, NULL, NULL) || store_commit(s, NULL);
            _exit(bad != 0);
        }
    for (int child = 0; child < 3; child++) {
        int status;
        wait(&status);
        assert_int_equal(status, 0);
    }
    assert_int_equal(store_open(&s, path, migrations, 2, NULL), 0);
    assert_int_equal(count(s), 30);
    store_close(s);
}

static int visit(void *ctx, json_t *event)
{
    int *seen = ctx;
    assert_true(json_is_string(json_object_get(event, "time")));
    if (strcmp(json_string_value(json_object_get(event, "event")), "round") == 0)
        seen[json_integer_value(json_object_get(event, "n"))]++;
    return 0;
}

static void test_journal(void **state)
{
    char path[96];
    struct journal *j;
    int seen[4] = {0};
    snprintf(path, sizeof path, "%s/journal", (char *)*state);
    assert_int_equal(journal_open(&j, path, &clock_system, true, NULL), 0);
    journal_event(j, "round", json_pack("{s:i,s:s}", "n", 1, "text", "a\nb"));
    journal_event(j, "plain", NULL);
    journal_event(NULL, "nobody", json_object());
    journal_close(j);
    int fd = open(path, O_WRONLY | O_APPEND);
    assert_int_equal(write(fd, "{\"event\": \"rou", 14), 14); /* a crash in the middle of a line */
    close(fd);
    assert_int_equal(journal_open(&j, path, &clock_system, false, NULL), 0);
    journal_event(j, "round", json_pack("{s:i}", "n", 2));
    assert_int_equal(journal_failures(j), 0);
    journal_close(j);
    assert_int_equal(journal_read(path, visit, seen, NULL), 0);
    assert_true(seen[1] == 1 && seen[2] == 1);
    assert_int_equal(journal_read("/nonexistent", visit, seen, NULL), ERR_NOT_FOUND);
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {CASE(test_store), CASE(test_writers), CASE(test_journal)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
