#include "tests/node/serve_fixture.h"

#include "crypto/random.h"

void serve_fixture_start(struct serve_fixture *f, const struct serve_options *extra)
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

int serve_fixture_setup(void **state)
{
    struct serve_fixture *f = calloc(1, sizeof *f);
    tiny_site_open(&f->tiny, UNIX_LISTEN, NULL);
    slot_init(&f->slot);
    *state = f;
    return 0;
}

int serve_fixture_teardown(void **state)
{
    struct serve_fixture *f = *state;
    serve_stop(f->serve);
    slot_release(&f->slot);
    tiny_site_release(&f->tiny);
    free(f);
    return 0;
}

json_t *ask_json(struct serve_fixture *f, const char *body, int status)
{
    struct http_answer a;
    client_ask(f->address, "POST", CHAT, NULL, body, &a);
    if (a.status != status)
        fail_msg("expected %d, got %d: %.300s", status, a.status, a.body);
    json_t *json = json_loads(a.body, JSON_ALLOW_NUL, NULL); /* a sampled token may be the byte 0 */
    assert_non_null(json);
    http_answer_release(&a);
    return json;
}

const char *text_of(const json_t *reply)
{
    const json_t *choice = json_array_get(json_object_get(reply, "choices"), 0);
    return json_string_value(json_object_get(json_object_get(choice, "message"), "content"));
}

const char *finish_of(const json_t *reply)
{
    return json_string_value(json_object_get(json_array_get(json_object_get(reply, "choices"), 0), "finish_reason"));
}

json_int_t number(const json_t *object, const char *outer, const char *key)
{
    return json_integer_value(json_object_get(json_object_get(object, outer), key));
}

char *greedy(struct serve_fixture *f, const char *body)
{
    json_t *reply = ask_json(f, body, 200);
    char *text = strdup(text_of(reply));
    json_decref(reply);
    return text;
}

void forget(struct serve_fixture *f)
{
    json_decref(ask_json(f,
                         "{\"messages\":[{\"role\":\"system\",\"content\":\"zzz\"},{\"role\":\"user\",\"content\":"
                         "\"z\"}],\"max_tokens\":1}",
                         200));
}

void put_version(struct serve_fixture *f, uint32_t version)
{
    slot_put(&f->slot, version ? tiny_adapter(&f->tiny, version) : NULL);
}
