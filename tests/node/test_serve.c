/* The local endpoint: OpenAI's form, streams, refusals, the queue, and adapters swapped under load. */
#include "node/serve/server.h"

#include "base/file.h"
#include "crypto/random.h"
#include "tests/formats/fixtures.h"
#include "tests/node/http_client.h"
#include "tests/node/tiny_site.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHAT "/v1/chat/completions"
#define UNIX_LISTEN "  listen: unix:%s/serve.sock\n  context_tokens: 4096\n"
/* 3000 tokens that nobody reads: more than a stream's queue and a socket hold. */
#define ENDLESS                                                                                                        \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"on\"}],\"stream\":true,\"temperature\":0,\"max_tokens\":3900}"
#define SHORT "{\"messages\":[{\"role\":\"user\",\"content\":\"a cough\"}],\"temperature\":0,\"max_tokens\":12}"
#define SHORT_STREAM                                                                                                   \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"a cough\"}],\"temperature\":0,\"max_tokens\":12,\"stream\":true}"

struct fixture {
    struct tiny_site tiny;
    struct slot slot;
    struct serve *serve;
    const char *address;
};

static void start(struct fixture *f, const struct serve_options *extra)
{
    struct serve_options options = extra ? *extra : (struct serve_options){0};
    struct error err = {0};
    options.site = &f->tiny.site;
    options.slot = &f->slot;
    if (!options.config)
        options.config = f->tiny.config;
    options.rng = &random_system;
    if (!options.clock)
        options.clock = &clock_system;
    if (serve_start(&f->serve, &options, &err) < 0)
        fail_msg("%s", err.message);
    f->address = serve_address(f->serve);
}

/* A site that every test opens anew, so that nothing is left over from the one before. */
static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    tiny_site_open(&f->tiny, UNIX_LISTEN, NULL);
    slot_init(&f->slot);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    serve_stop(f->serve);
    slot_release(&f->slot);
    tiny_site_release(&f->tiny);
    free(f);
    return 0;
}

static json_t *ask_json(struct fixture *f, const char *body, int status)
{
    struct http_answer a;
    client_ask(f->address, "POST", CHAT, NULL, body, &a);
    if (a.status != status)
        fail_msg("expected %d, got %d: %.300s", status, a.status, a.body);
    json_t *json = json_loads(a.body, 0, NULL);
    assert_non_null(json);
    http_answer_release(&a);
    return json;
}

static const char *text_of(const json_t *reply)
{
    const json_t *choice = json_array_get(json_object_get(reply, "choices"), 0);
    return json_string_value(json_object_get(json_object_get(choice, "message"), "content"));
}

static const char *finish_of(const json_t *reply)
{
    return json_string_value(json_object_get(json_array_get(json_object_get(reply, "choices"), 0), "finish_reason"));
}

static json_int_t number(const json_t *object, const char *outer, const char *key)
{
    return json_integer_value(json_object_get(json_object_get(object, outer), key));
}

/* The greedy answer of what is in the slot now. Caller: free. */
static char *greedy(struct fixture *f, const char *body)
{
    json_t *reply = ask_json(f, body, 200);
    char *text = strdup(text_of(reply));
    json_decref(reply);
    return text;
}

/* Another beginning: nothing of what was computed before can be reused after it. */
static void forget(struct fixture *f)
{
    json_decref(ask_json(f,
                         "{\"messages\":[{\"role\":\"system\",\"content\":\"zzz\"},{\"role\":\"user\",\"content\":"
                         "\"z\"}],\"max_tokens\":1}",
                         200));
}

/* --- answers ---------------------------------------------------------------------------------------------------- */

static void test_plain(void **state)
{
    struct fixture *f = *state;
    start(f, NULL);
    json_t *first = ask_json(f, SHORT, 200), *second = ask_json(f, SHORT, 200);
    assert_string_equal(json_string_value(json_object_get(first, "object")), "chat.completion");
    assert_string_equal(json_string_value(json_object_get(first, "model")), "tiny");
    assert_string_equal(finish_of(first), "length");
    assert_int_equal(number(first, "usage", "completion_tokens"), 12);
    assert_true(number(first, "usage", "prompt_tokens") > 20); /* the default system message is in it */
    assert_int_equal(number(first, "usage", "total_tokens"), number(first, "usage", "prompt_tokens") + 12);
    assert_int_equal(number(first, "consilium", "adapter_version"), 0);
    assert_true(json_is_null(json_object_get(json_object_get(first, "consilium"), "adapter_sha256")));
    assert_true(strlen(text_of(first)) > 0);
    assert_string_equal(text_of(first), text_of(second)); /* the second from the cached prompt */
    const json_t *usage = json_object_get(second, "usage");
    assert_int_equal(number(usage, "prompt_tokens_details", "cached_tokens"),
                     (number(first, "usage", "prompt_tokens") - 1) / 32 * 32);
    assert_string_not_equal(json_string_value(json_object_get(first, "id")),
                            json_string_value(json_object_get(second, "id")));
    json_decref(first);
    json_decref(second);
}

static void test_stream(void **state)
{
    struct fixture *f = *state;
    struct http_answer a;
    json_t *end;
    bool done;
    start(f, NULL);
    slot_put(&f->slot, tiny_adapter(&f->tiny, 3));
    char *whole = greedy(f, SHORT);
    client_ask(f->address, "POST", CHAT, NULL, SHORT_STREAM, &a);
    assert_int_equal(a.status, 200);
    assert_non_null(strcasestr(a.headers, "content-type: text/event-stream"));
    char *text = client_stream_text(a.body, &end, &done);
    assert_true(done);
    assert_string_equal(text, whole);
    assert_int_equal(number(end, "consilium", "adapter_version"), 3);
    assert_string_equal(json_string_value(json_object_get(json_object_get(end, "consilium"), "job")), "triage");
    assert_string_equal(json_string_value(json_object_get(json_object_get(end, "consilium"), "adapter_sha256")),
                        "3333333333333333333333333333333333333333333333333333333333333333");
    assert_string_equal(finish_of(end), "length");
    assert_string_equal(json_string_value(json_object_get(end, "system_fingerprint")), "v3-3333333333333333");
    assert_int_equal(number(end, "usage", "completion_tokens"), 12);
    json_decref(end);
    free(text);
    free(whole);
    http_answer_release(&a);

    client_ask(f->address, "POST", CHAT, NULL,
               "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":2,\"stream\":true,"
               "\"stream_options\":{\"include_usage\":true}}",
               &a);
    free(client_stream_text(a.body, &end, &done));
    assert_true(done);
    assert_int_equal(json_array_size(json_object_get(end, "choices")), 0);
    assert_int_equal(number(end, "usage", "completion_tokens"), 2);
    json_decref(end);
    http_answer_release(&a);
}

/* Printable and without what JSON escapes. */
static bool plain_ascii(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (text[i] < ' ' || text[i] > '~' || text[i] == '"' || text[i] == '\\')
            return false;
    return true;
}

static void test_stop_strings(void **state)
{
    struct fixture *f = *state;
    struct http_answer a;
    char body[512], expected[256];
    json_t *end;
    bool done;
    start(f, NULL);
    /* 200 tokens, and of them the first stretch of 5 plain characters that is not at the very beginning */
    char *whole = greedy(f, "{\"messages\":[{\"role\":\"user\",\"content\":\"a cough\"}],\"temperature\":0,"
                            "\"max_tokens\":200}");
    size_t at = 3, len = strlen(whole);
    while (at + 5 < len && !plain_ascii(whole + at, 5))
        at++;
    assert_true(at + 5 < len);
    const char *found =
        strstr(whole, (char[6]){whole[at], whole[at + 1], whole[at + 2], whole[at + 3], whole[at + 4], 0});
    snprintf(expected, sizeof expected, "%.*s", (int)(found - whole), whole);
    for (int stream = 0; stream < 2; stream++) {
        snprintf(body, sizeof body,
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"a cough\"}],\"temperature\":0,\"max_tokens\":200,"
                 "\"stop\":[\"%.5s\",\"never in it\"],\"stream\":%s}",
                 whole + at, stream ? "true" : "false");
        client_ask(f->address, "POST", CHAT, NULL, body, &a);
        assert_int_equal(a.status, 200);
        if (stream) {
            char *text = client_stream_text(a.body, &end, &done);
            assert_string_equal(text, expected);
            free(text);
        } else {
            end = json_loads(a.body, 0, NULL);
            assert_string_equal(text_of(end), expected);
        }
        assert_string_equal(finish_of(end), "stop");
        json_decref(end);
        http_answer_release(&a);
    }
    free(whole);
}

/* What was computed for one conversation is reused in the next, whole pieces only, and the answer is the same as
 * without it: the second conversation goes on from the first, or parts from it within a piece. */
static void test_reuse(void **state)
{
#define TURN(role, content) "{\"role\":\"" role "\",\"content\":\"" content "\"}"
#define GREEDY(messages) "{\"messages\":[" messages "],\"temperature\":0,\"max_tokens\":60}"
    static const struct {
        const char *before, *body;
        int reused;
    } rows[] = {
        {SHORT, GREEDY(TURN("user", "a cough") "," TURN("assistant", "and what else") "," TURN("user", "fever")), 32},
        {GREEDY(TURN("user", "0123456789012345678901234567890123456789012345678901234567890123456789")),
         GREEDY(TURN("user", "012345678901234567890123456789and then others")), 32},
        {GREEDY(TURN("user", "0123456789012345678901234567890123456789012345678901234567890123456789")),
         GREEDY(TURN("user", "0123456789012345678901234567890123456789012345678901234567890 and then")), 64},
    };
    struct fixture *f = *state;
    start(f, NULL);
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        forget(f);
        json_decref(ask_json(f, rows[i].before, 200));
        json_t *reused = ask_json(f, rows[i].body, 200);
        forget(f);
        json_t *fresh = ask_json(f, rows[i].body, 200);
        const json_int_t cached = number(json_object_get(reused, "usage"), "prompt_tokens_details", "cached_tokens");
        if (cached < rows[i].reused || cached % 32 != 0)
            fail_msg("row %zu: %d tokens were reused, expected %d or a few pieces more", i, (int)cached,
                     rows[i].reused);
        assert_int_equal(number(json_object_get(fresh, "usage"), "prompt_tokens_details", "cached_tokens"), 0);
        assert_string_equal(text_of(reused), text_of(fresh));
        json_decref(reused);
        json_decref(fresh);
    }
}

static void test_seed(void **state)
{
    struct fixture *f = *state;
    const char *form = "{\"messages\":[{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\",\"content\":"
                       "[{\"type\":\"text\",\"text\":\"a \"},{\"type\":\"text\",\"text\":\"cough\"}]}],"
                       "\"max_completion_tokens\":40,\"temperature\":1.5,\"top_p\":0.99,\"seed\":%d}";
    char body[512], *texts[3];
    start(f, NULL);
    for (int i = 0; i < 3; i++) {
        snprintf(body, sizeof body, form, i / 2);
        texts[i] = greedy(f, body);
    }
    assert_string_equal(texts[0], texts[1]);
    assert_string_not_equal(texts[0], texts[2]);
    for (int i = 0; i < 3; i++)
        free(texts[i]);
}

/* The conversation begins as the adapter's training did, unless it brings its own system message. */
static void test_system_message(void **state)
{
    struct fixture *f = *state;
    start(f, NULL);
    struct served_adapter *none = tiny_adapter(&f->tiny, 1), *text = tiny_adapter(&f->tiny, 2);
    snprintf(none->system_message, sizeof none->system_message, "none");
    snprintf(text->system_message, sizeof text->system_message, "Name the chapter.");
    json_t *base = ask_json(f, SHORT, 200);
    slot_put(&f->slot, none);
    json_t *without = ask_json(f, SHORT, 200);
    slot_put(&f->slot, text);
    json_t *own = ask_json(f, SHORT, 200);
    json_t *given =
        ask_json(f,
                 "{\"messages\":[{\"role\":\"system\",\"content\":\"Name the chapter.\"},{\"role\":\"user\","
                 "\"content\":\"a cough\"}],\"temperature\":0,\"max_tokens\":12}",
                 200);
    assert_true(number(without, "usage", "prompt_tokens") < number(own, "usage", "prompt_tokens"));
    assert_true(number(own, "usage", "prompt_tokens") < number(base, "usage", "prompt_tokens"));
    assert_int_equal(number(own, "usage", "prompt_tokens"), number(given, "usage", "prompt_tokens"));
    assert_string_equal(text_of(own), text_of(given));
    json_decref(base);
    json_decref(without);
    json_decref(own);
    json_decref(given);
}

/* --- refusals --------------------------------------------------------------------------------------------------- */

static void test_bad_requests(void **state)
{
    static const struct {
        const char *body, *param, *says;
    } rows[] = {
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"secret-word\"}", NULL, "not a JSON object"},
        {"[1]", NULL, "not a JSON object"},
        {"{\"messages\":[],\"messages\":[]}", NULL, "duplicate"},
        {"{}", "messages", "1 to"},
        {"{\"messages\":[]}", "messages", "1 to"},
        {"{\"messages\":\"hello\"}", "messages", "1 to"},
        {"{\"messages\":[7]}", "messages", "messages[0]"},
        {"{\"messages\":[{\"role\":\"tool\",\"content\":\"x\"}]}", "messages", "messages[0].role"},
        {"{\"messages\":[{\"role\":\"user\"}]}", "messages", "messages[0].content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", "messages", "only text"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"system\",\"content\":\"y\"}]}", "messages",
         "messages[1]"},
#define WITH(setting) "{\"messages\":[{\"role\":\"user\",\"content\":\"secret-word\"}]," setting "}"
        {WITH("\"n\":2"), "n", "1 to 1"},
        {WITH("\"max_tokens\":0"), "max_tokens", "whole number"},
        {WITH("\"max_tokens\":\"12\""), "max_tokens", "whole number"},
        {WITH("\"max_completion_tokens\":1.5"), "max_completion_tokens", "whole number"},
        {WITH("\"temperature\":3"), "temperature", "0 to 2"},
        {WITH("\"temperature\":-0.1"), "temperature", "0 to 2"},
        {WITH("\"top_p\":1.1"), "top_p", "0 to 1"},
        {WITH("\"stream\":1"), "stream", "true or false"},
        {WITH("\"seed\":\"x\""), "seed", "whole number"},
        {WITH("\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\"]"), "stop", "at most 4"},
        {WITH("\"stop\":\"\""), "stop", "1 to"},
        {WITH("\"stop\":[1]"), "stop", "1 to"},
    };
    struct fixture *f = *state;
    start(f, NULL);
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        json_t *reply = ask_json(f, rows[i].body, 400), *error = json_object_get(reply, "error");
        const char *message = json_string_value(json_object_get(error, "message"));
        const char *param = json_string_value(json_object_get(error, "param"));
        if (!message || !strstr(message, rows[i].says) || strstr(message, "secret-word"))
            fail_msg("row %zu: \"%s\" does not say \"%s\"", i, message, rows[i].says);
        if (rows[i].param && (!param || strcmp(param, rows[i].param) != 0))
            fail_msg("row %zu: param is %s, expected %s", i, param, rows[i].param);
        assert_string_equal(json_string_value(json_object_get(error, "type")), "invalid_request_error");
        json_decref(reply);
    }
    json_decref(ask_json(f, WITH("\"max_tokens\":1,\"unknown\":{\"a\":[1]},\"model\":\"gpt\",\"stop\":null"), 200));
}

static void test_too_long(void **state)
{
    struct fixture *f = *state;
    struct buffer body;
    struct http_answer a;
    start(f, NULL);
    buffer_init(&body, 4 << 20);
    buffer_printf(&body, "{\"messages\":[{\"role\":\"user\",\"content\":\"");
    for (int i = 0; i < 5000; i++)
        buffer_printf(&body, "%d", i % 10);
    buffer_printf(&body, "\"}],\"stream\":true}");
    buffer_u8(&body, 0);
    json_t *reply = ask_json(f, (char *)body.data, 400);
    assert_non_null(strstr(json_string_value(json_object_get(json_object_get(reply, "error"), "message")), "4096"));
    json_decref(reply);

    buffer_clear(&body);
    buffer_printf(&body, "{\"messages\":[{\"role\":\"user\",\"content\":\"");
    memset(buffer_extend(&body, 3 << 19), 'x', 3 << 19);
    buffer_printf(&body, "\"}]}");
    buffer_u8(&body, 0);
    client_ask(f->address, "POST", CHAT, NULL, (char *)body.data, &a);
    assert_int_equal(a.status, 413);
    http_answer_release(&a);
    buffer_release(&body);

    client_ask(f->address, "GET", "/v1/nothing", NULL, NULL, &a);
    assert_int_equal(a.status, 404);
    http_answer_release(&a);
    client_ask(f->address, "GET", CHAT, NULL, NULL, &a);
    assert_int_equal(a.status, 405);
    http_answer_release(&a);
}

static int try_start(struct fixture *f, const char *serve, struct error *err)
{
    struct config *config = tiny_site_config(&f->tiny, serve);
    struct serve_options options = {
        .site = &f->tiny.site, .slot = &f->slot, .config = config, .rng = &random_system, .clock = &clock_system};
    struct serve *serve_too = NULL;
    int rc = serve_start(&serve_too, &options, err);
    serve_stop(serve_too);
    config_free(config);
    return rc;
}

static void test_listening(void **state)
{
    struct fixture *f = *state;
    struct error err = {0};
    struct http_answer a;
    struct stat st;
    char path[128], again[256];

    fixture_refused(try_start(f, NULL, &err), &err, ERR_CONFIG, "serve.listen", "not set", NULL);
    fixture_refused(try_start(f, "  listen: 127.0.0.1:0\n", &err), &err, ERR_CONFIG, "serve.token_file", NULL);
    snprintf(path, sizeof path, "%s/token", f->tiny.folder);
    assert_int_equal(file_write_atomic(path, span_str("0123456789abcdef0123\n"), 0600, &err), 0);
    fixture_refused(try_start(f, "  listen: 0.0.0.0:0\n  token_file: %s/token\n", &err), &err, ERR_CONFIG, "loopback",
                    NULL);

    struct config *config = tiny_site_config(&f->tiny, "  listen: 127.0.0.1:0\n  token_file: %s/token\n");
    start(f, &(struct serve_options){.config = config});
    snprintf(again, sizeof again, "  listen: %s\n  token_file: %s/token\n", f->address + strlen("http://"),
             f->tiny.folder);
    fixture_refused(try_start(f, again, &err), &err, ERR_CONNECT, "taken", NULL);
    client_ask(f->address, "POST", CHAT, NULL, SHORT, &a);
    assert_int_equal(a.status, 401);
    assert_non_null(strstr(a.body, "authentication_error"));
    http_answer_release(&a);
    client_ask(f->address, "GET", "/v1/models", "0123456789abcdef0124", NULL, &a);
    assert_int_equal(a.status, 401);
    http_answer_release(&a);
    client_ask(f->address, "GET", "/healthz", NULL, NULL, &a);
    assert_int_equal(a.status, 200);
    http_answer_release(&a);
    client_ask(f->address, "POST", CHAT, "0123456789abcdef0123", SHORT, &a);
    assert_int_equal(a.status, 200);
    http_answer_release(&a);
    serve_stop(f->serve);
    config_free(config);

    start(f, NULL);
    fixture_refused(try_start(f, UNIX_LISTEN, &err), &err, ERR_CONNECT, "another process listens", NULL);
    assert_int_equal(stat(f->address + strlen("unix:"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0660);
}

/* --- the queue -------------------------------------------------------------------------------------------------- */

static json_t *health(struct fixture *f, int *ret_status)
{
    struct http_answer a;
    client_ask(f->address, "GET", "/healthz", NULL, NULL, &a);
    *ret_status = a.status;
    json_t *json = json_loads(a.body, 0, NULL);
    http_answer_release(&a);
    assert_non_null(json);
    return json;
}

static void wait_for_waiting(struct fixture *f, json_int_t n)
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
static int open_blocker(struct fixture *f)
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
    struct fixture *f = *state;
    struct http_answer a;
    int fds[3];
    start(f, &(struct serve_options){.queue_max = 3});
    int blocker = open_blocker(f);
    for (int i = 0; i < 3; i++)
        fds[i] = client_open(f->address, "POST", CHAT, NULL, i == 1 ? SHORT_STREAM : SHORT);
    wait_for_waiting(f, 3);
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
    struct fixture *f = *state;
    struct error err = {0};
    struct journal *journal;
    char path[128];
    snprintf(path, sizeof path, "%s/journal.jsonl", f->tiny.folder);
    assert_int_equal(journal_open(&journal, path, &clock_system, false, &err), 0);
    start(f, &(struct serve_options){.journal = journal, .client_wait_ms = 600000});
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
    struct fixture *f = *state;
    start(f, &(struct serve_options){.client_wait_ms = 300});
    int blocker = open_blocker(f);
    json_decref(ask_json(f, SHORT, 200));
    close(blocker);
}

static void test_stop_under_load(void **state)
{
    struct fixture *f = *state;
    struct http_answer a;
    int fds[4];
    start(f, NULL);
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

static void put_version(struct fixture *f, uint32_t version)
{
    slot_put(&f->slot, version ? tiny_adapter(&f->tiny, version) : NULL);
}

static void test_swap_under_load(void **state)
{
    struct fixture *f = *state;
    struct asker askers[ASKERS] = {0};
    pthread_t threads[ASKERS];
    char *expected[VERSIONS];
    int total = 0;

    start(f, NULL);
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
    struct fixture *f = *state;
    const char *body = "{\"messages\":[{\"role\":\"user\",\"content\":\"on\"}],\"stream\":true,\"temperature\":0,"
                       "\"max_tokens\":2500}";
    struct buffer seen;
    struct http_answer a;
    json_t *end;
    bool done;

    start(f, NULL);
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

static void test_models(void **state)
{
    struct fixture *f = *state;
    struct http_answer a;
    start(f, NULL);
    for (uint32_t v = 0; v < 2; v++) {
        put_version(f, v);
        client_ask(f->address, "GET", "/v1/models", NULL, NULL, &a);
        assert_int_equal(a.status, 200);
        json_t *json = json_loads(a.body, 0, NULL), *data = json_object_get(json, "data");
        assert_int_equal(json_array_size(data), v + 1);
        assert_string_equal(json_string_value(json_object_get(json_array_get(data, 0), "id")), "tiny");
        if (v) {
            assert_string_equal(json_string_value(json_object_get(json_array_get(data, 1), "id")), "triage:1");
            assert_string_equal(json_string_value(json_object_get(json_array_get(data, 1), "parent")), "tiny");
        }
        json_decref(json);
        http_answer_release(&a);
    }
}

/* --- health and silence ----------------------------------------------------------------------------------------- */

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
    struct fixture *f = *state;
    struct gate gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .open = PTHREAD_COND_INITIALIZER};
    const struct clock clock = {.monotonic_ms = gate_monotonic_ms, .wall_ms = gate_wall_ms, .ctx = &gate};
    int status;
    start(f, &(struct serve_options){.clock = &clock, .stall_ms = 30000});
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

static void assert_holds_none(const char *path, const char *const *words)
{
    struct error err = {0};
    struct buffer text;
    buffer_init(&text, 1 << 20);
    assert_int_equal(file_read(path, &text, &err), 0);
    assert_true(text.len > 0);
    for (; *words; words++)
        if (memmem(text.data, text.len, *words, strlen(*words)))
            fail_msg("%s holds text of a conversation", path);
    buffer_release(&text);
}

/* What is asked and answered stands neither in the journal nor in the log. */
static void test_silence(void **state)
{
    struct fixture *f = *state;
    struct error err = {0};
    struct journal *journal;
    char path[128], log[128];
    snprintf(path, sizeof path, "%s/journal.jsonl", f->tiny.folder);
    snprintf(log, sizeof log, "%s/log", f->tiny.folder);
    assert_int_equal(journal_open(&journal, path, &clock_system, false, &err), 0);
    fflush(stderr);
    int saved = dup(2), file = open(log, O_CREAT | O_WRONLY | O_APPEND, 0600);
    dup2(file, 2);
    start(f, &(struct serve_options){.journal = journal});
    char *text = greedy(f, "{\"messages\":[{\"role\":\"user\",\"content\":\"quarantine zebra\"}],\"max_tokens\":60,"
                           "\"temperature\":0}");
    json_decref(ask_json(f, "{\"messages\":[{\"role\":\"quarantine zebra\",\"content\":\"zebra\"}]}", 400));
    json_decref(ask_json(f, "{\"messages\":[zebra quarantine]}", 400));
    serve_stop(f->serve);
    f->serve = NULL;
    journal_close(journal);
    dup2(saved, 2);
    close(saved);
    close(file);
    assert_true(strlen(text) > 20);
    text[20] = '\0';
    const char *const words[] = {"zebra", "quarantine", text, NULL};
    assert_holds_none(path, words);
    assert_holds_none(log, words);
    free(text);
}

int main(void)
{
#define SERVE_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        SERVE_TEST(test_plain),
        SERVE_TEST(test_stream),
        SERVE_TEST(test_stop_strings),
        SERVE_TEST(test_reuse),
        SERVE_TEST(test_seed),
        SERVE_TEST(test_bad_requests),
        SERVE_TEST(test_system_message),
        SERVE_TEST(test_too_long),
        SERVE_TEST(test_listening),
        SERVE_TEST(test_queue_full),
        SERVE_TEST(test_disconnect),
        SERVE_TEST(test_slow_reader),
        SERVE_TEST(test_stop_under_load),
        SERVE_TEST(test_swap_under_load),
        SERVE_TEST(test_swap_within_stream),
        SERVE_TEST(test_models),
        SERVE_TEST(test_health),
        SERVE_TEST(test_silence),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
