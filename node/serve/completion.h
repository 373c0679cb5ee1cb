/*
 * The JSON of OpenAI's chat completions: a request read into a struct completion, and the replies built from answers.
 *
 * Read: messages (content a string or a list of text parts), max_completion_tokens or max_tokens, temperature, top_p,
 * stop, stream, stream_options.include_usage, seed, n (1 only). Other fields are ignored; so is model: the endpoint
 * serves one model with its newest adapter, and each reply says which.
 *
 *     struct completion c;
 *     if (completion_parse(&c, json, &param, err) < 0) ... 400 with err.message and param ...
 *     ... answerer_run(answerer, slot, &c.request, ...) ...
 *     completion_release(&c);
 */
#ifndef NODE_SERVE_COMPLETION_H
#define NODE_SERVE_COMPLETION_H

#include "node/serve/answer.h"

#include <jansson.h>

#define COMPLETION_MESSAGES_MAX 4096
#define COMPLETION_ID_SIZE 48

struct completion {
    json_t *json;                  /* owned; the texts below are borrowed from it */
    struct chat_message *messages; /* owned */
    struct answer_request request; /* without the callbacks */
    bool stream, include_usage;
    char id[COMPLETION_ID_SIZE]; /* "chatcmpl-..." */
    int64_t created_s;           /* UTC, since 1970 */
};

/* json is consumed in every case. ERR_CONFIG with a message for whoever asked, ret_param then names the field (a
 * literal); ERR_RESOURCES. id and created_s are the caller's to set. */
int MUST_USE completion_parse(struct completion *ret_completion, json_t *json, const char **ret_param,
                              struct error *err);
void completion_release(struct completion *c); /* accepts NULL and zeroed */

/* {"message", "type", "param", "code"} under "error"; param and code may be NULL. */
json_t *completion_error(const char *message, const char *type, const char *param, const char *code);

/* What replies say about their source. */
struct completion_identity {
    const char *model;       /* the base model's name */
    const char *base_sha256; /* hex */
};

/* {"job", "adapter_version", "adapter_sha256"}: job and sha256 null for the base model. */
json_t *completion_source(const struct answer_source *source);
/* The whole reply ("chat.completion"). */
json_t *completion_reply(const struct completion *c, const struct completion_identity *identity,
                         const struct answer *answer);
/* The pieces of a stream ("chat.completion.chunk"): the role; text; the end, with finish_reason, usage and source; and
 * the piece without choices that stream_options.include_usage asks for. */
json_t *completion_chunk_role(const struct completion *c, const struct completion_identity *identity,
                              const struct answer_source *source);
json_t *completion_chunk_text(const struct completion *c, const struct completion_identity *identity,
                              const struct answer_source *source, struct span text);
json_t *completion_chunk_end(const struct completion *c, const struct completion_identity *identity,
                             const struct answer *answer);
json_t *completion_chunk_usage(const struct completion *c, const struct completion_identity *identity,
                               const struct answer *answer);

#endif
