/* The HTTP server against a plain socket client: routes, token, bounds, deferred replies, streams, a graceful stop. */
#include "tests/runtime/support.h"

#include "runtime/http.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static const char token[] = "0123456789abcdef-token";

static void hello(void *ctx, struct http_request *r)
{
    (void)ctx;
    const char *name = http_request_query(r, "name");
    http_reply_json(r, 200, json_pack("{s:s, s:s}", "hello", name ? name : "", "rest", http_request_rest(r)));
}

static void echo(void *ctx, struct http_request *r)
{
    json_t *json;
    (void)ctx;
    if (http_request_json(r, &json) < 0)
        return;
    http_reply_json(r, 201, json);
}

static void *reply_later(void *arg)
{
    usleep(50000);
    http_reply_error(arg, 503, "busy", "later %d", 7);
    return NULL;
}

static _Atomic int later_seen; /* requests that reached the handler below */

static void later(void *ctx, struct http_request *r)
{
    later_seen++;
    pthread_t thread;
    (void)ctx;
    http_defer(r);
    pthread_create(&thread, NULL, reply_later, r);
    pthread_detach(thread);
}

static void *feed(void *arg)
{
    struct http_stream *s = arg;
    for (int i = 0; i < 200; i++) {
        if (i % 50 == 0)
            usleep(5000);
        if (http_stream_event(s, NULL, json_pack("{s:i}", "i", i), 2000) < 0)
            break;
    }
    http_stream_end(s);
    return NULL;
}

static void stream(void *ctx, struct http_request *r)
{
    pthread_t thread;
    (void)ctx;
    pthread_create(&thread, NULL, feed, http_stream_start(r, "text/event-stream"));
    pthread_detach(thread);
}

static volatile int endless_result;

static void *feed_for_ever(void *arg)
{
    while (http_stream_send(arg, span_str("data: x\n\n"), 100) != ERR_CONNECT)
        usleep(1000);
    endless_result = 1;
    http_stream_end(arg);
    return NULL;
}

static void endless(void *ctx, struct http_request *r)
{
    pthread_create(ctx, NULL, feed_for_ever, http_stream_start(r, "text/event-stream"));
}

static const struct http_route routes[] = {{"GET", "/health", .handle = hello, .open = true},
                                           {"GET", "/v1/jobs/*", .handle = hello},
                                           {"POST", "/echo", .handle = echo, .body_bytes_max = 100},
                                           {"GET", "/later", .handle = later},
                                           {"GET", "/stream", .handle = stream},
                                           {"GET", "/endless", .handle = endless}};

static int connect_to(const char *address)
{
    int fd, rc;
    if (strncmp(address, "unix:", 5) == 0) {
        struct sockaddr_un un = {.sun_family = AF_UNIX};
        snprintf(un.sun_path, sizeof un.sun_path, "%s", address + 5);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        rc = connect(fd, (struct sockaddr *)&un, sizeof un);
    } else {
        struct sockaddr_in in = {.sin_family = AF_INET,
                                 .sin_port = htons((uint16_t)strtoul(strrchr(address, ':') + 1, NULL, 10))};
        in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        fd = socket(AF_INET, SOCK_STREAM, 0);
        rc = connect(fd, (struct sockaddr *)&in, sizeof in);
    }
    assert_int_equal(rc, 0);
    return fd;
}

/* One request on its own connection; the whole answer as text. */
static char *ask(const char *address, const char *method, const char *path, const char *bearer, const char *body)
{
    static char answer[65536];
    char request[1024];
    size_t got = 0;
    ssize_t n;
    int fd = connect_to(address);
    int len = snprintf(request, sizeof request,
                       "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s%s%sContent-Length: %zu\r\n\r\n%s", method,
                       path, bearer ? "Authorization: Bearer " : "", bearer ? bearer : "", bearer ? "\r\n" : "",
                       strlen(body), body);
    assert_int_equal(send(fd, request, (size_t)len, MSG_NOSIGNAL), len);
    while ((n = recv(fd, answer + got, sizeof answer - 1 - got, 0)) > 0)
        got += (size_t)n;
    answer[got] = 0;
    close(fd);
    return answer;
}

static void expect(char *answer, const char *status, const char *text)
{
    if (!strstr(answer, status) || !strstr(answer, text))
        fail_msg("expected %s and %s in: %.600s", status, text, answer);
}

static struct http_server *start(const char *listen_text, const char *token_file, pthread_t *thread)
{
    struct http_options o = {.listen = listen_text,
                             .routes = routes,
                             .routes_count = ARRAY_LEN(routes),
                             .ctx = thread,
                             .token_file = token_file,
                             .stream_bytes_max = 256};
    struct http_server *s = NULL;
    struct error err = {0};
    if (http_start(&s, &o, &err) < 0)
        fail_msg("%s", err.message);
    return s;
}

static void test_requests(void **state)
{
    char path[] = "/tmp/test-http-XXXXXX";
    pthread_t thread;
    struct error err = {0};
    (void)state;
    int fd = mkstemp(path);
    assert_int_equal(write(fd, token, sizeof token - 1), sizeof token - 1);
    close(fd);
    struct http_server *s = start("127.0.0.1:0", path, &thread), *other = NULL;
    const char *a = http_address(s);
    expect(ask(a, "GET", "/health?name=ada", NULL, ""), "200", "\"hello\":\"ada\"");
    expect(ask(a, "GET", "/v1/jobs/17", NULL, ""), "401", "WWW-Authenticate");
    expect(ask(a, "GET", "/v1/jobs/17", "0123456789abcdef-tokeN", ""), "401", "error");
    expect(ask(a, "GET", "/v1/jobs/17", "0123456789abcdef-token2", ""), "401", "error");
    expect(ask(a, "GET", "/v1/jobs/17", token, ""), "200", "\"rest\":\"17\"");
    expect(ask(a, "GET", "/nothing", token, ""), "404", "no such path");
    expect(ask(a, "DELETE", "/echo", token, ""), "405", "method");
    expect(ask(a, "POST", "/echo", token, "{\"a\":1}"), "201", "{\"a\":1}");
    expect(ask(a, "POST", "/echo", token, "{\"a\":1,\"a\":2}"), "400", "not a JSON object");
    expect(ask(a, "POST", "/echo", token, "[1]"), "400", "another type");
    char big[200];
    memset(big, 'x', sizeof big - 1);
    big[sizeof big - 1] = 0;
    expect(ask(a, "POST", "/echo", token, big), "413", "too large");
    expect(ask(a, "GET", "/later", token, ""), "503", "later 7");
    char *events = ask(a, "GET", "/stream", token, "");
    expect(events, "200", "data: {\"i\":0}");
    expect(events, "text/event-stream", "data: {\"i\":199}");
    struct http_options o = {.listen = a + 7, .routes = routes, .routes_count = 1};
    assert_int_equal(http_start(&other, &o, &err), ERR_CONNECT);
    assert_non_null(strstr(err.message, a + 7));
    o.listen = "0.0.0.0:0";
    assert_int_equal(http_start(&other, &o, &err), ERR_CONFIG);
    o.listen = "nonsense";
    assert_int_equal(http_start(&other, &o, &err), ERR_CONFIG);
    http_stop(s, 1000);
    unlink(path);
}

static void test_unix_and_stop(void **state)
{
    char folder[] = "/tmp/test-http-XXXXXX", listen_text[64];
    pthread_t thread;
    struct stat st;
    (void)state;
    assert_non_null(mkdtemp(folder));
    snprintf(listen_text, sizeof listen_text, "unix:%s/api.sock", folder);
    struct http_server *s = start(listen_text, NULL, &thread), *other = NULL;
    assert_int_equal(stat(listen_text + 5, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    struct http_options o = {.listen = listen_text, .routes = routes, .routes_count = 1};
    assert_int_equal(http_start(&other, &o, NULL), ERR_CONNECT);
    expect(ask(listen_text, "GET", "/v1/jobs/1", NULL, ""), "200", "rest");
    int fd = connect_to(listen_text);
    static const char request[] = "GET /endless HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_int_equal(send(fd, request, sizeof request - 1, MSG_NOSIGNAL), sizeof request - 1);
    char byte;
    assert_int_equal(recv(fd, &byte, 1, 0), 1); /* it runs */
    http_stop(s, 50);                           /* and is cancelled */
    pthread_join(thread, NULL);
    assert_int_equal(endless_result, 1);
    close(fd);
    assert_int_not_equal(stat(listen_text + 5, &st), 0);
    rmdir(folder);
}

/* A request under way when the stop begins still gets its reply. */
static void *ask_later(void *address)
{
    return strdup(ask(address, "GET", "/later", NULL, ""));
}

static void test_graceful(void **state)
{
    pthread_t thread, unused;
    char address[64];
    void *answer;
    (void)state;
    struct http_server *s = start("127.0.0.1:0", NULL, &unused);
    snprintf(address, sizeof address, "%s", http_address(s));
    int seen = later_seen;
    pthread_create(&thread, NULL, ask_later, address);
    for (int i = 0; i < 20000 && later_seen == seen; i++)
        usleep(1000);
    http_stop(s, 2000);
    pthread_join(thread, &answer);
    expect(answer, "503", "later 7");
    free(answer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_requests), cmocka_unit_test(test_unix_and_stop),
                                       cmocka_unit_test(test_graceful)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
