/* What the endpoint's tests share: a server on a Unix socket over a tiny site, and its questions. */
#ifndef TESTS_NODE_SERVE_FIXTURE_H
#define TESTS_NODE_SERVE_FIXTURE_H

#include "node/serve/server.h"
#include "tests/formats/fixtures.h"
#include "tests/node/http_client.h"
#include "tests/node/tiny_site.h"

#define CHAT "/v1/chat/completions"
#define UNIX_LISTEN "  listen: unix:%s/serve.sock\n  context_tokens: 4096\n"
#define SHORT "{\"messages\":[{\"role\":\"user\",\"content\":\"a cough\"}],\"temperature\":0,\"max_tokens\":12}"
#define SHORT_STREAM                                                                                                   \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"a cough\"}],\"temperature\":0,\"max_tokens\":12,\"stream\":true}"

struct serve_fixture {
    struct tiny_site tiny;
    struct slot slot;
    struct serve *serve;
    const char *address;
};

/* A site and a slot; the server is started by the test. For cmocka_unit_test_setup_teardown. */
int serve_fixture_setup(void **state);
int serve_fixture_teardown(void **state);
/* extra: what differs from the defaults, or NULL. */
void serve_fixture_start(struct serve_fixture *f, const struct serve_options *extra);

/* Asks and expects a status. Caller: json_decref. */
json_t *ask_json(struct serve_fixture *f, const char *body, int status);
/* The greedy answer of what is in the slot now. Caller: free. */
char *greedy(struct serve_fixture *f, const char *body);
/* Asks with another beginning: nothing of what was computed before can be reused after it. */
void forget(struct serve_fixture *f);
/* Puts tiny_adapter(version) into the slot; 0: the base model. */
void put_version(struct serve_fixture *f, uint32_t version);

/* Of a reply. Borrowed. */
const char *text_of(const json_t *reply);
const char *finish_of(const json_t *reply);
json_int_t number(const json_t *object, const char *outer, const char *key);

#endif
