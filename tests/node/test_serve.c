/* The local endpoint: OpenAI's form whole and streamed, what it refuses, where it listens, and that it keeps silent. */
#include "base/file.h"
#include "crypto/random.h"
#include "tests/node/serve_fixture.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- answers ---------------------------------------------------------------------------------------------------- */

static void test_plain(void **state)
{
    struct serve_fixture *f = *state;
    serve_fixture_start(f, NULL);
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
    struct serve_fixture *f = *state;
    struct http_answer a;
    json_t *end;
    bool done;
    serve_fixture_start(f, NULL);
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
    struct serve_fixture *f = *state;
    struct http_answer a;
    char body[512], expected[256];
    json_t *end;
    bool done;
    serve_fixture_start(f, NULL);
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
    struct serve_fixture *f = *state;
    serve_fixture_start(f, NULL);
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
    struct serve_fixture *f = *state;
    const char *form = "{\"messages\":[{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\",\"content\":"
                       "[{\"type\":\"text\",\"text\":\"a \"},{\"type\":\"text\",\"text\":\"cough\"}]}],"
                       "\"max_completion_tokens\":40,\"temperature\":1.5,\"top_p\":0.99,\"seed\":%d}";
    char body[512], *texts[3];
    serve_fixture_start(f, NULL);
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
    struct serve_fixture *f = *state;
    serve_fixture_start(f, NULL);
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
    struct serve_fixture *f = *state;
    serve_fixture_start(f, NULL);
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
    struct serve_fixture *f = *state;
    struct buffer body;
    struct http_answer a;
    serve_fixture_start(f, NULL);
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

static int try_start(struct serve_fixture *f, const char *serve, struct error *err)
{
    struct config *config = tiny_site_config(&f->tiny, serve, NULL);
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
    struct serve_fixture *f = *state;
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

    struct config *config = tiny_site_config(&f->tiny, "  listen: 127.0.0.1:0\n  token_file: %s/token\n", NULL);
    serve_fixture_start(f, &(struct serve_options){.config = config});
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

    serve_fixture_start(f, NULL);
    fixture_refused(try_start(f, UNIX_LISTEN, &err), &err, ERR_CONNECT, "another process listens", NULL);
    assert_int_equal(stat(f->address + strlen("unix:"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0660);
}

static void test_models(void **state)
{
    struct serve_fixture *f = *state;
    struct http_answer a;
    serve_fixture_start(f, NULL);
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

/* --- silence ---------------------------------------------------------------------------------------------------- */

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
    struct serve_fixture *f = *state;
    struct error err = {0};
    struct journal *journal;
    char path[128], log[128];
    snprintf(path, sizeof path, "%s/journal.jsonl", f->tiny.folder);
    snprintf(log, sizeof log, "%s/log", f->tiny.folder);
    assert_int_equal(journal_open(&journal, path, &clock_system, false, &err), 0);
    fflush(stderr);
    int saved = dup(2), file = open(log, O_CREAT | O_WRONLY | O_APPEND, 0600);
    dup2(file, 2);
    serve_fixture_start(f, &(struct serve_options){.journal = journal});
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
#define SERVE_TEST(name) cmocka_unit_test_setup_teardown(name, serve_fixture_setup, serve_fixture_teardown)
    const struct CMUnitTest tests[] = {
        SERVE_TEST(test_plain),        SERVE_TEST(test_stream),   SERVE_TEST(test_stop_strings),
        SERVE_TEST(test_reuse),        SERVE_TEST(test_seed),     SERVE_TEST(test_system_message),
        SERVE_TEST(test_bad_requests), SERVE_TEST(test_too_long), SERVE_TEST(test_listening),
        SERVE_TEST(test_models),       SERVE_TEST(test_silence),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
