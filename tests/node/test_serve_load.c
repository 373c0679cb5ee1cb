/* The endpoint under load: the queue, clients that leave or do not read, adapters swapped meanwhile, a stuck worker. */
#include "tests/node/serve_fixture.h"

#include <unistd.h>

/* 3000 tokens that nobody reads: more than a stream's queue and a socket hold. */
#define ENDLESS                                                                                                        \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"on\"}],\"stream\":true,\"temperature\":0,\"max_tokens\":3900}"

/* --- the queue -------------------------------------------------------------------------------------------------- */

static json_t *health(struct serve_fixture *f, int *ret_status)
{
    struct http_answer a;
    client_ask(f->address, "GET", "/healthz", NULL, NULL, &a);
    *ret_status = a.status;
    json_t *json = json_loads(a.body, 0, NULL);
    http_answer_release(&a);
    assert_non_null(json);
    return json;
}

static void wait_for_waiting(struct serve_fixture *f, json_int_t n)
{
    for (int tries = 0; tries < 2000; tries++) {
        int status;
        json_t *json = health(f, &status);
        json_int_t waiting = json_integer_value(json_object_get(json, "waiting"));
        json_decref(json);
        if (waiting == n)
            return;
        usleep(5000);
    }
    fail_msg("the queue never held %d requests", (int)n);
}

/* A stream that its client does not read: the worker is busy with it until the client goes. */
static int open_blocker(struct serve_fixture *f)
{
    struct buffer seen;
    int fd = client_open(f->address, "POST", CHAT, NULL, ENDLESS);
    assert_true(fd >= 0);
    buffer_init(&seen, 1 << 20);
    assert_true(client_wait_for(fd, "assistant", &seen));
    buffer_release(&seen);
    return fd;
}

static void test_queue_full(void **state)
{
    struct serve_fixture *f = *state;
    struct http_answer a;
    int fds[3];
    serve_fixture_start(f, &(struct serve_options){.queue_max = 3});
    int blocker = open_blocker(f);
    for (int i = 0; i < 3; i++)
        fds[i] = client_open(f->address, "POST", CHAT, NULL, i == 1 ? SHORT_STREAM : SHORT);
    wait_for_waiting(f, 3);
    client_ask(f->address, "POST", CHAT, NULL, SHORT, &a);
    assert_int_equal(a.status, 429);
    assert_non_null(strcasestr(a.headers, "Retry-After: "));
    http_answer_release(&a);
    json_t *refused = ask_json(f, SHORT, 429), *error = json_object_get(refused, "error");
    assert_string_equal(json_string_value(json_object_get(error, "type")), "rate_limit_error");
    assert_true(json_integer_value(json_object_get(error, "retry_after_s")) >= 1);
    json_decref(refused);
    close(fds[2]); /* who hangs up makes room */
    int late = client_open(f->address, "POST", CHAT, NULL, SHORT);
    wait_for_waiting(f, 3);
    close(blocker);
    for (int i = 0; i < 2; i++) {
        client_finish(fds[i], &a);
        assert_int_equal(a.status, 200);
        http_answer_release(&a);
    }
    client_finish(late, &a);
    assert_int_equal(a.status, 200);
    http_answer_release(&a);
    wait_for_waiting(f, 0);
}

static int count_cancelled(void *ctx, json_t *event)
{
    const char *finish = json_string_value(json_object_get(event, "finish"));
    *(int *)ctx += finish && strcmp(finish, "cancelled") == 0;
    return 0;
}

static int cancelled_in(const char *path)
{
    struct error err = {0};
    int n = 0;
    if (journal_read(path, count_cancelled, &n, &err) < 0)
        fail_msg("%s", err.message);
    return n;
}

static void test_disconnect(void **state)
{
    struct serve_fixture *f = *state;
    struct error err = {0};
    struct journal *journal;
    char path[128];
    snprintf(path, sizeof path, "%s/journal.jsonl", f->tiny.folder);
    assert_int_equal(journal_open(&journal, path, &clock_system, false, &err), 0);
    serve_fixture_start(f, &(struct serve_options){.journal = journal, .client_wait_ms = 600000});
    /* a stream whose client goes away, before and after it has filled up */
    close(open_blocker(f));
    json_decref(ask_json(f, SHORT, 200));
    int blocker = open_blocker(f);
    int waiting = client_open(f->address, "POST", CHAT, NULL, SHORT);
    usleep(200000);
    close(blocker);
    struct http_answer a;
    client_finish(waiting, &a);
    assert_int_equal(a.status, 200);
    http_answer_release(&a);
    /* a plain request whose client goes away while it waits: not computed at all */
    blocker = open_blocker(f);
    waiting =
        client_open(f->address, "POST", CHAT, NULL,
                    "{\"messages\":[{\"role\":\"user\",\"content\":\"on\"}],\"temperature\":0,\"max_tokens\":3900}");
    wait_for_waiting(f, 1);
    close(waiting);
    close(blocker);
    json_decref(ask_json(f, SHORT, 200));
    serve_stop(f->serve);
    f->serve = NULL;
    journal_close(journal);
    assert_int_equal(cancelled_in(path), 4);
}

/* A client that keeps its connection but stops reading holds the worker for client_wait_ms and no longer. */
static void test_slow_reader(void **state)
{
    struct serve_fixture *f = *state;
    serve_fixture_start(f, &(struct serve_options){.client_wait_ms = 300});
    int blocker = open_blocker(f);
    json_decref(ask_json(f, SHORT, 200));
    close(blocker);
}

static void test_stop_under_load(void **state)
{
    struct serve_fixture *f = *state;
    struct http_answer a;
    int fds[4];
    serve_fixture_start(f, NULL);
    int blocker = open_blocker(f);
    for (int i = 0; i < 4; i++)
        fds[i] = client_open(f->address, "POST", CHAT, NULL, i % 2 ? SHORT_STREAM : SHORT);
    wait_for_waiting(f, 4);
    serve_stop(f->serve);
    f->serve = NULL;
    for (int i = 0; i < 4; i++) {
        client_finish(fds[i], &a);
        assert_int_equal(a.status, 503);
        http_answer_release(&a);
    }
    close(blocker);
}

/* --- adapters --------------------------------------------------------------------------------------------------- */

#define VERSIONS 4 /* 0 is the base model */
#define ASKERS 6
#define ASKS 12

struct asker {
    const char *address;
    char *const *expected; /* (VERSIONS) */
    bool stream;
    int answered[VERSIONS];
    char problem[256]; /* "" */
};

static void check_answer(struct asker *k, const struct http_answer *a)
{
    json_t *end;
    bool done = true;
    char *text = NULL;
    if (k->stream) {
        text = client_stream_text(a->body, &end, &done);
    } else {
        end = json_loads(a->body, 0, NULL);
        text = strdup(text_of(end) ? text_of(end) : "");
    }
    const json_int_t version = end ? number(end, "consilium", "adapter_version") : -1;
    if (a->status != 200 || !done || version < 0 || version >= VERSIONS)
        snprintf(k->problem, sizeof k->problem, "status %d, done %d, version %d", a->status, done, (int)version);
    else if (strcmp(text, k->expected[version]) != 0)
        snprintf(k->problem, sizeof k->problem, "the answer names version %d, which answers otherwise", (int)version);
    else
        k->answered[version]++;
    json_decref(end);
    free(text);
}

static void *ask_often(void *arg)
{
    struct asker *k = arg;
    for (int i = 0; i < ASKS && !k->problem[0]; i++) {
        struct http_answer a;
        client_ask(k->address, "POST", CHAT, NULL, k->stream ? SHORT_STREAM : SHORT, &a);
        check_answer(k, &a);
        http_answer_release(&a);
    }
    return NULL;
}

static void test_swap_under_load(void **state)
{
    struct serve_fixture *f = *state;
    struct asker askers[ASKERS] = {0};
    pthread_t threads[ASKERS];
    char *expected[VERSIONS];
    int total = 0;

    serve_fixture_start(f, NULL);
    for (uint32_t v = 0; v < VERSIONS; v++) {
        put_version(f, v);
        forget(f);
        expected[v] = greedy(f, SHORT);
        for (uint32_t before = 0; before < v; before++)
            assert_string_not_equal(expected[v], expected[before]);
    }
    for (int i = 0; i < ASKERS; i++) {
        askers[i] = (struct asker){.address = f->address, .expected = expected, .stream = i % 2};
        assert_int_equal(pthread_create(&threads[i], NULL, ask_often, &askers[i]), 0);
    }
    for (uint32_t swap = 0; swap < 400; swap++) {
        put_version(f, swap % VERSIONS);
        usleep(1000);
    }
    for (int i = 0; i < ASKERS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < ASKERS; i++) {
        if (askers[i].problem[0])
            fail_msg("asker %d: %s", i, askers[i].problem);
        for (int v = 0; v < VERSIONS; v++)
            total += askers[i].answered[v];
    }
    assert_int_equal(total, ASKERS * ASKS); /* none dropped */
    for (int v = 0; v < VERSIONS; v++)
        free(expected[v]);
}

/* The stream under way goes on with the adapter it began with; the next answer has the new one. */
static void test_swap_within_stream(void **state)
{
    struct serve_fixture *f = *state;
    const char *body = "{\"messages\":[{\"role\":\"user\",\"content\":\"on\"}],\"stream\":true,\"temperature\":0,"
                       "\"max_tokens\":2500}";
    struct buffer seen;
    struct http_answer a;
    json_t *end;
    bool done;

    serve_fixture_start(f, NULL);
    put_version(f, 1);
    client_ask(f->address, "POST", CHAT, NULL, body, &a);
    char *expected = client_stream_text(a.body, &end, &done);
    json_decref(end);
    http_answer_release(&a);

    buffer_init(&seen, 16 << 20);
    int fd = client_open(f->address, "POST", CHAT, NULL, body);
    assert_true(client_wait_for(fd, "assistant", &seen)); /* it has begun, and cannot end before it is read */
    put_version(f, 2);
    put_version(f, 0);
    put_version(f, 3);
    client_finish_after(fd, &seen, &a);
    char *text = client_stream_text(a.body, &end, &done);
    assert_true(done);
    assert_int_equal(number(end, "consilium", "adapter_version"), 1);
    assert_string_equal(text, expected);
    json_decref(end);
    http_answer_release(&a);
    json_t *next = ask_json(f, SHORT, 200);
    assert_int_equal(number(next, "consilium", "adapter_version"), 3);
    json_decref(next);
    free(text);
    free(expected);
}

/* --- health ----------------------------------------------------------------------------------------------------- */

/* A clock in which the answering thread can be held, as a hung computation would hold it. */
struct gate {
    pthread_mutex_t lock;
    pthread_cond_t open;
    bool closed;
    _Atomic int64_t ahead_ms;
};

static int64_t gate_monotonic_ms(void *ctx)
{
    struct gate *g = ctx;
    char name[16] = "";
    pthread_getname_np(pthread_self(), name, sizeof name);
    if (strcmp(name, "answer") == 0) {
        pthread_mutex_lock(&g->lock);
        while (g->closed)
            pthread_cond_wait(&g->open, &g->lock);
        pthread_mutex_unlock(&g->lock);
    }
    return clock_monotonic_ms(&clock_system) + g->ahead_ms;
}

static int64_t gate_wall_ms(void *ctx)
{
    (void)ctx;
    return clock_wall_ms(&clock_system);
}

static void test_health(void **state)
{
    struct serve_fixture *f = *state;
    struct gate gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .open = PTHREAD_COND_INITIALIZER};
    const struct clock clock = {.monotonic_ms = gate_monotonic_ms, .wall_ms = gate_wall_ms, .ctx = &gate};
    int status;
    serve_fixture_start(f, &(struct serve_options){.clock = &clock, .stall_ms = 30000});
    put_version(f, 2);
    json_t *json = health(f, &status);
    assert_int_equal(status, 200);
    assert_string_equal(json_string_value(json_object_get(json, "status")), "ok");
    assert_string_equal(json_string_value(json_object_get(json, "model")), "tiny");
    assert_int_equal(json_integer_value(json_object_get(json, "adapter_version")), 2);
    assert_int_equal(strlen(json_string_value(json_object_get(json, "adapter_sha256"))), 64);
    json_decref(json);

    pthread_mutex_lock(&gate.lock);
    gate.closed = true;
    pthread_mutex_unlock(&gate.lock);
    int fd = client_open(f->address, "POST", CHAT, NULL, SHORT);
    gate.ahead_ms = 31000;
    json = health(f, &status);
    pthread_mutex_lock(&gate.lock); /* before anything can fail, or the server could not be stopped */
    gate.closed = false;
    pthread_cond_broadcast(&gate.open);
    pthread_mutex_unlock(&gate.lock);
    assert_int_equal(status, 503);
    assert_string_equal(json_string_value(json_object_get(json, "status")), "stuck");
    json_decref(json);

    struct http_answer a;
    client_finish(fd, &a);
    assert_int_equal(a.status, 200);
    http_answer_release(&a);
    json_decref(health(f, &status));
    assert_int_equal(status, 200);
    serve_stop(f->serve); /* before its clock goes */
    f->serve = NULL;
}

int main(void)
{
#define SERVE_TEST(name) cmocka_unit_test_setup_teardown(name, serve_fixture_setup, serve_fixture_teardown)
    const struct CMUnitTest tests[] = {
        SERVE_TEST(test_queue_full),      SERVE_TEST(test_disconnect),      SERVE_TEST(test_slow_reader),
        SERVE_TEST(test_stop_under_load), SERVE_TEST(test_swap_under_load), SERVE_TEST(test_swap_within_stream),
        SERVE_TEST(test_health),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
