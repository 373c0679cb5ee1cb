#include "tests/privacy/support.h"

#include "privacy/accountant.h"
#include "privacy/ledger.h"

#include <signal.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

struct fixture {
    char folder[64], path[96];
    struct dp_plan plan;
    struct ledger_options options;
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    snprintf(f->folder, sizeof f->folder, "/tmp/test-ledger-XXXXXX");
    if (!mkdtemp(f->folder))
        return -1;
    snprintf(f->path, sizeof f->path, "%s/ledger.db", f->folder);
    f->plan = (struct dp_plan){.mode = DP_RECORD,
                               .neighbour = DP_ADD_REMOVE,
                               .unit = "record",
                               .q = 0.04,
                               .clip = 1,
                               .grid_clip = DP_GRID_CLIP,
                               .steps_per_round = 5,
                               .rounds = 8,
                               .delta = 1e-5,
                               .epsilon = 3,
                               .units = 2000,
                               .dimensions = 460800};
    if (accountant_calibrate(3, 1e-5, 0.04, 40, &f->plan.z, NULL) < 0)
        return -1;
    f->options = (struct ledger_options){
        .site = "clinic-a", .epsilon = 3, .delta = 1e-5, .expected = &f->plan, .clock = &clock_system};
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    char path[128];
    static const char *const names[] = {"ledger.db", "ledger.db-wal", "ledger.db-shm", "old.db"};
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        snprintf(path, sizeof path, "%s/%s", f->folder, names[i]);
        unlink(path);
    }
    rmdir(f->folder);
    free(f);
    return 0;
}

static struct ledger *must_open(struct fixture *f)
{
    struct ledger *l = NULL;
    struct error err = {0};
    if (ledger_open(&l, f->path, &f->options, &err) < 0)
        fail_msg("%s", err.message);
    return l;
}

static int reserve(struct fixture *f, struct ledger *l, const char *job, uint64_t round, uint64_t *sequence,
                   struct error *err)
{
    struct ledger_request q = {
        .job = job, .plan = &f->plan, .first_step = round * f->plan.steps_per_round, .steps = f->plan.steps_per_round};
    return ledger_reserve(l, &q, sequence, err);
}

static double spent(struct ledger *l, const char *job)
{
    struct ledger_spent s;
    assert_int_equal(ledger_spent(l, job, &s, NULL), 0);
    return s.epsilon;
}

/* The whole planned job fits, its last round reaches the budget, and nothing more fits, also after reopening. */
static void test_budget(void **state)
{
    struct fixture *f = *state;
    struct ledger *l = must_open(f);
    struct error err = {0};
    struct ledger_spent s;
    uint64_t sequence, step;
    assert_near(spent(l, NULL), 0, 0);
    for (unsigned round = 0; round < 8; round++) {
        assert_int_equal(reserve(f, l, "job-1", round, &sequence, &err), 0);
        assert_int_equal(ledger_release(l, sequence, (const uint8_t[DP_HASH_SIZE]){(uint8_t)round}, &err), 0);
    }
    assert_near(spent(l, NULL), 3, 1e-3); /* not wasteful: what the accountant says for the whole job */
    assert_true(spent(l, NULL) <= 3);
    assert_int_equal(ledger_next_step(l, "job-1", &step, NULL), 0);
    assert_int_equal(step, 40);
    for (int again = 0; again < 2; again++) {
        assert_int_equal(reserve(f, l, "job-2", 0, &sequence, &err), ERR_POLICY);
        assert_non_null(strstr(err.message, "budget is 3.0000"));
        ledger_close(l);
        l = must_open(f);
    }
    assert_int_equal(ledger_spent(l, "job-1", &s, NULL), 0);
    assert_true(s.released == 8 && s.steps == 40 && s.reserved == 0);
    assert_near(spent(l, "job-2"), 0, 0);
    assert_int_equal(ledger_verify(l, &err), 0);
    struct stat st;
    assert_int_equal(stat(f->path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    ledger_close(l);
}

static void test_refusals(void **state)
{
    struct fixture *f = *state;
    struct ledger *l = must_open(f);
    struct error err = {0};
    uint64_t sequence = 77;
    double epsilon;
    assert_int_equal(reserve(f, l, "job", 2, &sequence, &err), 0);
    uint64_t first = sequence;
    assert_int_equal(reserve(f, l, "job", 2, &sequence, &err), ERR_POLICY); /* replayed step */
    assert_int_equal(reserve(f, l, "job", 1, &sequence, &err), ERR_POLICY);
    assert_int_equal(reserve(f, l, "job", 8, &sequence, &err), ERR_CONFIG); /* not in the plan */
    double z = f->plan.z;
    f->plan.z = NAN;
    assert_int_equal(reserve(f, l, "job-x", 0, &sequence, &err), ERR_CONFIG);
    f->plan.z = z * 2;
    assert_int_equal(reserve(f, l, "job", 3, &sequence, &err), ERR_CONFIG); /* another plan under the same job */
    f->plan.z = z;
    f->plan.mode = DP_NONE;
    assert_int_equal(reserve(f, l, "job-y", 0, &sequence, &err), ERR_POLICY);
    f->plan.mode = DP_RECORD;
    assert_int_equal(ledger_preview(l, &f->plan, 40, &epsilon, &err), ERR_POLICY);
    assert_true(epsilon > 3);
    assert_int_equal(ledger_preview(l, &f->plan, 5, &epsilon, &err), 0);
    assert_int_equal(sequence, first); /* outputs untouched by every refusal */
    ledger_close(l);
    f->options.delta = 1e-6;
    assert_int_equal(ledger_open(&l, f->path, &f->options, &err), ERR_CONFIG);
    f->options.delta = 1e-5;
    f->options.site = "clinic-b";
    assert_int_equal(ledger_open(&l, f->path, &f->options, &err), ERR_CONFIG);
    f->options.site = "clinic-a";
    f->options.must_exist = true;
    assert_int_equal(ledger_open(&l, "/nonexistent/ledger.db", &f->options, &err), ERR_NOT_FOUND);
}

static void test_ends(void **state)
{
    struct fixture *f = *state;
    struct ledger *l = must_open(f);
    uint64_t a, b, c;
    uint32_t count;
    static const uint8_t hash[DP_HASH_SIZE] = {1}, other[DP_HASH_SIZE] = {2};
    assert_int_equal(reserve(f, l, "job", 0, &a, NULL), 0);
    assert_int_equal(reserve(f, l, "job", 1, &b, NULL), 0);
    assert_int_equal(reserve(f, l, "job", 2, &c, NULL), 0);
    double before = spent(l, NULL);
    assert_int_equal(ledger_release(l, a, hash, NULL), 0);
    assert_int_equal(ledger_release(l, a, hash, NULL), 0); /* resent */
    assert_int_equal(ledger_release(l, a, other, NULL), ERR_POLICY);
    assert_int_equal(ledger_burn(l, b, "round aborted", NULL), 0);
    assert_int_equal(ledger_release(l, b, hash, NULL), ERR_POLICY);
    assert_int_equal(ledger_burn(l, 99, "no such", NULL), ERR_POLICY);
    assert_int_equal(ledger_burn_open(l, "restart", &count, NULL), 0);
    assert_int_equal(count, 1);
    assert_near(spent(l, NULL), before, 0); /* no refunds */
    assert_int_equal(ledger_verify(l, NULL), 0);
    ledger_close(l);
}

static void tamper(const char *path, const char *sql)
{
    sqlite3 *db;
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, "DROP TRIGGER ledger_no_update; DROP TRIGGER ledger_no_delete", NULL, NULL, NULL),
                     SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_close(db), SQLITE_OK);
}

static void check_tampered(struct fixture *f, const char *sql, const char *names_row)
{
    struct ledger *l = must_open(f);
    struct error err = {0};
    uint64_t sequence;
    for (unsigned round = 0; round < 3; round++)
        assert_int_equal(reserve(f, l, "job", round, &sequence, NULL), 0);
    assert_int_equal(ledger_verify(l, &err), 0);
    tamper(f->path, sql);
    assert_int_equal(ledger_verify(l, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, names_row));
    ledger_close(l);
    l = NULL;
    assert_int_equal(ledger_open(&l, f->path, &f->options, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, names_row));
    assert_null(l);
}

static void test_tampered_body(void **state)
{
    check_tampered(*state, "UPDATE ledger SET body = (SELECT body FROM ledger WHERE sequence = 1) WHERE sequence = 2",
                   "row 2");
}

static void test_removed_row(void **state)
{
    check_tampered(*state, "DELETE FROM ledger WHERE sequence = 1", "row 1");
}

/* A row with a well-formed hash of its own is still not the row that the next one was chained to. */
static void test_swapped_hash(void **state)
{
    check_tampered(*state, "UPDATE ledger SET hash = zeroblob(32) WHERE sequence = 1", "row 1");
}

static int update_refused(const char *path)
{
    sqlite3 *db;
    sqlite3_open(path, &db);
    int code = sqlite3_exec(db, "UPDATE ledger SET hash = zeroblob(32)", NULL, NULL, NULL);
    sqlite3_close(db);
    return code;
}

/* The last rows cut off are invisible to the chain alone; a head that a peer witnessed shows it. */
static void test_old_copy(void **state)
{
    struct fixture *f = *state;
    struct ledger *l = must_open(f);
    struct ledger_head head, old;
    struct error err = {0};
    uint64_t sequence;
    assert_int_equal(reserve(f, l, "job", 0, &sequence, NULL), 0);
    assert_int_equal(ledger_head(l, &old, NULL), 0);
    assert_int_equal(reserve(f, l, "job", 1, &sequence, NULL), 0);
    assert_int_equal(ledger_head(l, &head, NULL), 0);
    assert_int_equal(head.sequence, 2);
    assert_int_equal(ledger_expect(l, &head, NULL), 0);
    assert_int_equal(ledger_expect(l, &old, NULL), 0);
    assert_int_not_equal(update_refused(f->path), SQLITE_OK);
    ledger_close(l);
    tamper(f->path, "DELETE FROM ledger WHERE sequence = 2");
    l = must_open(f);
    assert_int_equal(ledger_expect(l, &head, &err), ERR_INTEGRITY);
    assert_int_equal(reserve(f, l, "job", 2, &sequence, NULL), 0); /* a fork of the same length */
    assert_int_equal(ledger_expect(l, &head, &err), ERR_INTEGRITY);
    ledger_close(l);
}

static void test_budget_change(void **state)
{
    struct fixture *f = *state;
    struct ledger *l = must_open(f);
    uint64_t sequence;
    for (unsigned round = 0; round < 8; round++)
        assert_int_equal(reserve(f, l, "job", round, &sequence, NULL), 0);
    ledger_close(l);
    f->options.epsilon = 4;
    l = must_open(f);
    assert_int_equal(reserve(f, l, "job-2", 0, &sequence, NULL), 0);
    assert_int_equal(sequence, 10); /* genesis, eight reservations, the budget row */
    ledger_close(l);
    f->options.epsilon = 2; /* lowered below what is spent: nothing more, and nothing is forgotten */
    l = must_open(f);
    assert_int_equal(reserve(f, l, "job-2", 1, &sequence, NULL), ERR_POLICY);
    assert_true(spent(l, NULL) > 3);
    assert_int_equal(ledger_verify(l, NULL), 0);
    ledger_close(l);
}

/* Another process that opens the ledger with a larger budget must not raise the one that the daemon enforces. */
static void test_budget_of_others(void **state)
{
    struct fixture *f = *state;
    struct ledger *daemon = must_open(f), *other;
    struct error err = {0};
    struct ledger_head before, after;
    struct ledger_spent s;
    uint64_t sequence;
    double epsilon;
    for (unsigned round = 0; round < 8; round++)
        assert_int_equal(reserve(f, daemon, "job", round, &sequence, NULL), 0);
    assert_int_equal(ledger_head(daemon, &before, NULL), 0);
    f->options.epsilon = 50;
    f->options.read_only = true; /* a report: not one row */
    other = must_open(f);
    assert_int_equal(ledger_spent(other, NULL, &s, NULL), 0);
    assert_near(s.budget, 3, 0); /* what is in force, not what the reader wishes */
    assert_int_equal(ledger_preview(other, &f->plan, 5, &epsilon, &err), ERR_POLICY);
    ledger_close(other);
    assert_int_equal(ledger_head(daemon, &after, NULL), 0);
    assert_int_equal(after.sequence, before.sequence);
    f->options.read_only = false; /* a program that writes books its budget; the daemon keeps to its own */
    other = must_open(f);
    assert_int_equal(ledger_spent(other, NULL, &s, NULL), 0);
    assert_near(s.budget, 50, 0);
    assert_int_equal(reserve(f, daemon, "job-2", 0, &sequence, &err), ERR_POLICY);
    assert_non_null(strstr(err.message, "budget is 3.0000"));
    ledger_close(other);
    f->options.epsilon = 2;
    ledger_close(must_open(f));
    assert_int_equal(ledger_spent(daemon, NULL, &s, NULL), 0);
    assert_near(s.budget, 2, 0); /* less always counts */
    ledger_close(daemon);
    snprintf(f->path, sizeof f->path, "%s/none.db", f->folder);
    f->options.read_only = true;
    assert_int_equal(ledger_open(&other, f->path, &f->options, &err), ERR_NOT_FOUND);
    assert_int_not_equal(access(f->path, F_OK), 0);
}

static void test_tiny_budget(void **state)
{
    struct fixture *f = *state;
    struct ledger *l = NULL;
    struct error err = {0};
    f->options.epsilon = 1e-6;
    f->options.delta = 1e-12;
    assert_int_equal(ledger_open(&l, f->path, &f->options, &err), ERR_POLICY);
}

/* Six processes race for eight rounds of budget with four wanted by each: exactly eight are granted. */
static void test_race(void **state)
{
    struct fixture *f = *state;
    pid_t children[6];
    int granted = 0;
    ledger_close(must_open(f));
    for (int i = 0; i < 6; i++) {
        children[i] = fork();
        if (children[i] == 0) {
            struct ledger *l = NULL;
            char job[16];
            int got = 0;
            uint64_t sequence;
            snprintf(job, sizeof job, "job-%d", i);
            if (ledger_open(&l, f->path, &f->options, NULL) < 0)
                _exit(100);
            for (unsigned round = 0; round < 4; round++) {
                int rc = reserve(f, l, job, round, &sequence, NULL);
                if (rc != 0 && rc != ERR_POLICY)
                    _exit(101);
                got += rc == 0;
            }
            _exit(got);
        }
        assert_true(children[i] > 0);
    }
    for (int i = 0; i < 6; i++) {
        int status;
        assert_int_equal(waitpid(children[i], &status, 0), children[i]);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) < 100);
        granted += WEXITSTATUS(status);
    }
    assert_int_equal(granted, 8);
    struct ledger *l = must_open(f);
    assert_true(spent(l, NULL) <= 3);
    assert_int_equal(ledger_verify(l, NULL), 0);
    ledger_close(l);
}

/* A process killed at any moment: every reservation that it saw granted is in the ledger, and the chain is whole. */
static void test_kill(void **state)
{
    struct fixture *f = *state;
    f->options.epsilon = 900; /* room for all */
    f->plan.rounds = 100000;
    f->plan.steps_per_round = 1;
    ledger_close(must_open(f));
    for (int turn = 0; turn < 6; turn++) {
        int pipes[2];
        assert_int_equal(pipe(pipes), 0);
        pid_t child = fork();
        if (child == 0) {
            struct ledger *l = NULL;
            uint64_t sequence, step;
            static const uint8_t hash[DP_HASH_SIZE];
            if (ledger_open(&l, f->path, &f->options, NULL) < 0 || ledger_next_step(l, "job", &step, NULL) < 0)
                _exit(1);
            for (;; step++) {
                if (reserve(f, l, "job", step, &sequence, NULL) < 0 || write(pipes[1], &sequence, sizeof sequence) < 0)
                    _exit(2);
                if (step % 2 && ledger_release(l, sequence, hash, NULL) < 0)
                    _exit(3);
            }
        }
        close(pipes[1]);
        uint64_t last = 0, sequence;
        for (int i = 0; i < 5 + turn; i++)
            if (read(pipes[0], &sequence, sizeof sequence) == sizeof sequence)
                last = sequence;
        usleep((useconds_t)(turn * 700));
        kill(child, SIGKILL);
        while (read(pipes[0], &sequence, sizeof sequence) == sizeof sequence)
            last = sequence;
        close(pipes[0]);
        int status;
        waitpid(child, &status, 0);
        assert_true(WIFSIGNALED(status));
        struct ledger *l = must_open(f);
        struct ledger_head head;
        struct ledger_spent s;
        assert_int_equal(ledger_head(l, &head, NULL), 0);
        assert_true(last > 0 && head.sequence >= last);
        assert_int_equal(ledger_spent(l, NULL, &s, NULL), 0);
        assert_true(s.steps == s.reserved + s.released && s.epsilon > 0); /* without an end: spent */
        assert_int_equal(ledger_verify(l, NULL), 0);
        ledger_close(l);
    }
}

static int count_row(void *ctx, const struct ledger_row *row)
{
    int *kinds = ctx;
    kinds[row->kind]++;
    return 0;
}

static void test_each_and_time(void **state)
{
    struct fixture *f = *state;
    struct ledger *l = must_open(f);
    int kinds[6] = {0};
    uint64_t sequence;
    int64_t start = clock_monotonic_ms(&clock_system);
    for (unsigned round = 0; round < 8; round++)
        assert_int_equal(reserve(f, l, "job", round, &sequence, NULL), 0);
    print_message("%.2f ms a reservation\n", (double)(clock_monotonic_ms(&clock_system) - start) / 8);
    assert_int_equal(ledger_burn(l, sequence, "x", NULL), 0);
    assert_int_equal(ledger_each(l, 0, count_row, kinds, NULL), 0);
    assert_true(kinds[LEDGER_GENESIS] == 1 && kinds[LEDGER_RESERVED] == 8 && kinds[LEDGER_BURNT] == 1);
    ledger_close(l);
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_budget),          CASE(test_refusals),     CASE(test_ends),     CASE(test_tampered_body),
        CASE(test_removed_row),     CASE(test_swapped_hash), CASE(test_old_copy), CASE(test_budget_change),
        CASE(test_tiny_budget),     CASE(test_race),         CASE(test_kill),     CASE(test_each_and_time),
        CASE(test_budget_of_others)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
