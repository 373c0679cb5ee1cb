/* The rpc layer over loopback with real certificates: calls, held replies, refusals, restarts, hostile peers. */
#include "tests/transport/fixture.h"

#include <netinet/in.h>
#include <setjmp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "crypto/random.h"

enum { ECHO = 1, HOLD = 2, FAIL = 3, WHO = 4, BIG = 5, SILENT_HOLD = 6 };
#define CHUNK (256u << 10)
#define CLIENTS 20

struct aggregator {
    struct server_thread t;
    uint64_t tokens[64];
    char sites[64][TLS_ID_SIZE];
    unsigned held;
    unsigned release_at; /* that many holds are answered together, the last first */
    atomic_uint calls;
};

static struct federation federation;

static int handle(void *ctx, const struct rpc_peer *peer, uint16_t method, struct span body, struct rpc_reply *reply)
{
    struct aggregator *a = ctx;
    a->calls++;
    if (method == ECHO)
        buffer_append(&reply->body, body.ptr, body.len);
    else if (method == WHO)
        buffer_append(&reply->body, peer->site, strlen(peer->site));
    else if (method == FAIL)
        return error_set(&reply->error, ERR_POLICY, "the round is closed");
    else if (method == BIG)
        (void)!buffer_extend(&reply->body, CHUNK + (33u << 10));
    else if (method == HOLD) {
        snprintf(a->sites[a->held], TLS_ID_SIZE, "%s", peer->site);
        a->tokens[a->held++] = rpc_reply_hold(reply);
    } else if (method == SILENT_HOLD)
        rpc_reply_hold(reply);
    else
        reply->status = 404;
    return 0;
}

static void release_held(void *ctx, struct rpc_server *server)
{
    struct aggregator *a = ctx;
    struct error err = {0};
    if (a->held == 0 || a->held < a->release_at)
        return;
    while (a->held > 0) {
        a->held--;
        if (rpc_server_reply(server, a->tokens[a->held], 7, span_str(a->sites[a->held]), &err) < 0)
            abort();
    }
}

static void start(struct aggregator *a, bool crl)
{
    *a = (struct aggregator){.release_at = 1};
    a->t.tick = release_held;
    a->t.tick_ctx = a;
    server_start(&a->t, &federation, handle, a, CHUNK, crl);
}

static void echo(struct rpc_client *client, size_t len)
{
    struct error err = {0};
    struct buffer reply;
    uint8_t *data = malloc(len + 1);
    assert_non_null(data);
    random_system.fill(random_system.ctx, data, len);
    buffer_init(&reply, 4 << 20);
    if (rpc_call_ok(client, ECHO, span_of(data, len), &reply, 10000, &err) < 0)
        fail_msg("%s", err.message);
    assert_true(span_equal(buffer_span(&reply), span_of(data, len)));
    buffer_release(&reply);
    free(data);
}

static int call_code(const char *name, const char *what, int timeout_ms)
{
    struct error err = {0};
    struct buffer reply;
    struct rpc_client *client = federation_client(&federation, name, CHUNK);
    buffer_init(&reply, CHUNK);
    int rc = rpc_call_ok(client, ECHO, span_str("x"), &reply, timeout_ms, &err);
    if (rc < 0 && what != NULL && strstr(err.message, what) == NULL)
        fail_msg("expected '%s' in: %s", what, err.message);
    buffer_release(&reply);
    rpc_client_free(client);
    return rc;
}

static void calls_and_statuses(void **state)
{
    (void)state;
    struct aggregator a;
    struct error err = {0};
    struct buffer reply;
    uint16_t status = 0;
    start(&a, true);
    struct rpc_client *client = federation_client(&federation, "site-0", CHUNK);
    buffer_init(&reply, 4 << 20);
    echo(client, 0);
    echo(client, 1);
    echo(client, 16384);
    echo(client, CHUNK);
    echo(client, CHUNK + (32u << 10)); /* the largest body */
    assert_int_equal(rpc_call_ok(client, WHO, span_str(""), &reply, 5000, &err), 0);
    assert_true(span_equal(buffer_span(&reply), span_str("site-0")));
    assert_int_equal(rpc_call_ok(client, FAIL, span_str(""), &reply, 5000, &err), ERR_POLICY);
    assert_non_null(strstr(err.message, "the round is closed"));
    assert_int_equal(rpc_call(client, 99, span_str(""), &reply, &status, 5000, &err), 0);
    assert_int_equal(status, 404);
    assert_int_equal(rpc_call_ok(client, BIG, span_str(""), &reply, 5000, &err), ERR_RESOURCES);
    /* Too large a request is refused here, and the session goes on. */
    uint8_t *large = calloc(1, CHUNK + (33u << 10));
    assert_int_equal(rpc_call_ok(client, ECHO, span_of(large, CHUNK + (33u << 10)), &reply, 5000, &err), ERR_RESOURCES);
    free(large);
    unsigned calls = a.calls;
    rpc_client_reset(client); /* the next call handshakes again on the same connection */
    echo(client, 10);
    assert_int_equal(a.calls, calls + 1);
    uint8_t sha256[TLS_HASH_BYTES];
    assert_int_equal(rpc_client_server_certificate(client, sha256), 0);
    struct rpc_counters mine = rpc_client_counters(client);
    server_stop(&a.t);
    assert_true(mine.bytes_sent > 2 * CHUNK && mine.bytes_received > 2 * CHUNK);
    buffer_release(&reply);
    rpc_client_free(client);
}

static void *hold_main(void *arg)
{
    struct error err = {0};
    struct buffer reply;
    uint16_t status = 0;
    const char *name = arg;
    struct rpc_client *client = federation_client(&federation, name, CHUNK);
    buffer_init(&reply, 1024);
    bool ok = true;
    for (int i = 0; i < 3 && ok; i++)
        ok = rpc_call(client, HOLD, span_str("wait"), &reply, &status, 20000, &err) == 0 && status == 7 &&
             span_equal(buffer_span(&reply), span_str(name));
    if (!ok)
        fprintf(stderr, "%s: %s\n", name, err.message);
    buffer_release(&reply);
    rpc_client_free(client);
    return ok ? NULL : arg;
}

/* Nobody is answered until all wait, then the last first; a stalled peer that only sits there hinders nobody. */
static void held_replies_of_twenty(void **state)
{
    (void)state;
    static char names[CLIENTS][16];
    pthread_t threads[CLIENTS];
    struct aggregator a;
    start(&a, true);
    a.release_at = CLIENTS;
    for (unsigned i = 0; i < CLIENTS; i++) {
        snprintf(names[i], sizeof names[i], "site-%u", i);
        assert_int_equal(pthread_create(&threads[i], NULL, hold_main, names[i]), 0);
    }
    for (unsigned i = 0; i < CLIENTS; i++) {
        void *failed = NULL;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    server_stop(&a.t);
}

static void timeout_then_fresh_session(void **state)
{
    (void)state;
    struct aggregator a;
    struct error err = {0};
    struct buffer reply;
    start(&a, true);
    struct rpc_client *client = federation_client(&federation, "site-0", CHUNK);
    buffer_init(&reply, 1024);
    assert_int_equal(rpc_call_ok(client, SILENT_HOLD, span_str(""), &reply, 400, &err), ERR_TIMEOUT);
    echo(client, 100); /* the held request of the old connection gets in nobody's way */
    server_stop(&a.t);
    buffer_release(&reply);
    rpc_client_free(client);
}

static void strangers_are_refused(void **state)
{
    (void)state;
    struct aggregator a;
    struct error err = {0};
    start(&a, true);
    assert_int_equal(call_code("site-0", NULL, 5000), 0);
    assert_int_equal(call_code("stranger", "may not accept our certificate", 5000), ERR_CONNECT);
    assert_int_equal(call_code("expired", "may not accept our certificate", 5000), ERR_CONNECT);
    assert_int_equal(call_code("revoked", "may not accept our certificate", 5000), ERR_CONNECT);
    assert_int_equal(call_code("aggregator", "may not accept our certificate", 5000), ERR_CONNECT);
    assert_int_equal(a.calls, 1);

    struct rpc_client *client = NULL;
    struct buffer reply;
    struct rpc_client_config config = {
        .url = federation.url, .tls = federation_tls(&federation, "site-0", false), .clock = &clock_system};
    config.rng = &random_system;
    config.tls.federation = "other";
    buffer_init(&reply, 1024);
    assert_int_equal(rpc_client_new(&client, &config, &err), 0);
    assert_int_equal(rpc_call_ok(client, ECHO, span_str(""), &reply, 5000, &err), ERR_CONNECT);
    assert_non_null(strstr(err.message, "federation 'demo', expected 'other'"));
    rpc_client_free(client);
    buffer_release(&reply);
    config.tls.key_file = federation_tls(&federation, "site-1", false).key_file;
    assert_int_equal(rpc_client_new(&client, &config, &err), ERR_CONFIG);
    server_stop(&a.t);
}

static void a_reload_revokes(void **state)
{
    (void)state;
    struct aggregator a;
    struct error err = {0};
    struct buffer reply;
    start(&a, false);
    buffer_init(&reply, 1024);
    struct rpc_client *client = federation_client(&federation, "revoked", CHUNK);
    struct rpc_client *good = federation_client(&federation, "site-1", CHUNK);
    echo(client, 5);
    echo(good, 5);
    server_pause(&a.t);
    struct tls_config tls = federation_tls(&federation, "aggregator", true);
    assert_int_equal(rpc_server_reload(a.t.server, &tls, &err), 0);
    server_resume(&a.t);
    echo(good, 5); /* its session ended, which it mends by itself */
    assert_int_equal(rpc_call_ok(client, ECHO, span_str(""), &reply, 5000, &err), ERR_CONNECT);
    assert_non_null(strstr(err.message, "may not accept our certificate"));
    server_stop(&a.t);
    buffer_release(&reply);
    rpc_client_free(client);
    rpc_client_free(good);
}

static void absent_then_back(void **state)
{
    (void)state;
    struct aggregator a;
    struct error err = {0};
    struct buffer reply;
    buffer_init(&reply, 1024);
    struct rpc_client *client = federation_client(&federation, "site-0", CHUNK);
    assert_int_equal(rpc_call_ok(client, ECHO, span_str(""), &reply, 5000, &err), ERR_CONNECT);
    assert_non_null(strstr(err.message, "refused"));
    start(&a, true);
    echo(client, 1000);
    server_stop(&a.t);
    int64_t before = clock_monotonic_ms(&clock_system);
    assert_int_equal(rpc_call_ok(client, ECHO, span_str(""), &reply, 8000, &err), ERR_CONNECT);
    assert_true(clock_monotonic_ms(&clock_system) - before < 4000); /* a lost connection is noticed, not waited for */
    start(&a, true);
    echo(client, 1000);
    server_stop(&a.t);
    buffer_release(&reply);
    rpc_client_free(client);
}

static void port_taken(void **state)
{
    (void)state;
    struct aggregator a;
    struct error err = {0};
    struct rpc_server *second = NULL;
    start(&a, true);
    struct rpc_server_config config = {.url = federation.url,
                                       .tls = federation_tls(&federation, "aggregator", false),
                                       .clock = &clock_system,
                                       .handle = handle,
                                       .handle_ctx = &a};
    assert_int_equal(rpc_server_new(&second, &config, &err), ERR_CONNECT);
    assert_non_null(strstr(err.message, federation.url));
    server_stop(&a.t);
}

static int raw_connection(void)
{
    unsigned port = (unsigned)strtoul(strrchr(federation.url, ':') + 1, NULL, 10);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
    return fd;
}

static void send_raw(int fd, const uint8_t *data, uint64_t len)
{
    uint8_t head[8];
    for (int i = 0; i < 8; i++)
        head[i] = (uint8_t)(len >> (56 - 8 * i));
    (void)!send(fd, head, 8, MSG_NOSIGNAL);
    if (data != NULL)
        (void)!send(fd, data, len, MSG_NOSIGNAL);
}

/* SP messages of random bytes, half of them with a believable frame, a promise of 1 TiB, and one that never goes on. */
static void garbage_does_no_harm(void **state)
{
    (void)state;
    static const uint8_t greeting[8] = {0, 'S', 'P', 0, 0, 48, 0, 0};
    struct aggregator a;
    start(&a, true);
    int stalled = raw_connection();
    (void)!send(stalled, greeting, 3, MSG_NOSIGNAL);
    for (unsigned i = 0; i < 300; i++) {
        uint8_t data[400];
        int fd = raw_connection();
        (void)!send(fd, greeting, 8, MSG_NOSIGNAL);
        rng_fill(&random_system, data, sizeof data);
        data[0] = 0x80;
        if (i % 2 == 0) {
            data[4] = 1;
            data[5] = (uint8_t)(1 + i % 3);
            data[22] = 22; /* a TLS handshake record */
            data[23] = data[24] = 3;
        }
        send_raw(fd, data, 4 + i % 396);
        if (i == 0)
            send_raw(fd, NULL, 1ull << 40);
        close(fd);
    }
    struct rpc_client *client = federation_client(&federation, "site-3", CHUNK);
    echo(client, CHUNK);
    server_stop(&a.t);
    close(stalled);
    rpc_client_free(client);
}

static void backoff_bounds(void **state)
{
    (void)state;
    for (unsigned attempt = 1; attempt < 80; attempt++) {
        int64_t wait = rpc_backoff_ms(&random_system, attempt, 100, 5000);
        assert_true(wait >= 50 && wait <= 5000);
    }
}

static int setup(void **state)
{
    (void)state;
    federation_make(&federation, CLIENTS);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    federation_remove(&federation);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(backoff_bounds),         cmocka_unit_test(calls_and_statuses),
        cmocka_unit_test(held_replies_of_twenty), cmocka_unit_test(timeout_then_fresh_session),
        cmocka_unit_test(strangers_are_refused),  cmocka_unit_test(a_reload_revokes),
        cmocka_unit_test(absent_then_back),       cmocka_unit_test(port_taken),
        cmocka_unit_test(garbage_does_no_harm),
    };
    return cmocka_run_group_tests_name("rpc", tests, setup, teardown);
}
