#include "node/serve/completion.h"

/* The field being read, for messages. */
struct reader_state {
    const char *param;
    struct error *err;
};

#define REFUSE(s, field, ...) ((s)->param = (field), error_set((s)->err, ERR_CONFIG, __VA_ARGS__))

static struct span span_json(const json_t *text)
{
    return span_of(json_string_value(text), json_string_length(text));
}

static bool present(const json_t *value)
{
    return value && !json_is_null(value);
}

/* --- messages --------------------------------------------------------------------------------------------------- */

/* A list of {"type": "text", "text": ...} becomes one string in its place. */
static int join_parts(struct reader_state *s, json_t *message, const json_t *parts)
{
    struct buffer text;
    const json_t *part;
    size_t i;
    int rc = 0;

    buffer_init(&text, ANSWER_BYTES_MAX);
    json_array_foreach(parts, i, part)
    {
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *value = json_object_get(part, "text");
        if (!type || strcmp(type, "text") != 0 || !json_is_string(value)) {
            rc = REFUSE(s, "messages",
                        "content parts must be {\"type\": \"text\", \"text\": string}: only text is read");
            break;
        }
        buffer_append(&text, json_string_value(value), json_string_length(value));
    }
    if (rc == 0) {
        json_t *joined = buffer_ok(&text) ? json_stringn(text.len ? (const char *)text.data : "", text.len) : NULL;
        if (json_object_set_new(message, "content", joined) < 0)
            rc = error_set(s->err, ERR_RESOURCES, "out of memory for a request");
    }
    buffer_wipe_release(&text);
    return rc;
}

static int read_message(struct reader_state *s, json_t *message, size_t i, struct chat_message *ret)
{
    const json_t *role = json_object_get(message, "role"), *content = json_object_get(message, "content");
    int rc = 0;

    if (!json_is_string(role))
        return REFUSE(s, "messages", "messages[%zu]: expected an object with role and content", i);
    if (span_equal(span_json(role), span_str("developer")))
        ret->role = CHAT_SYSTEM;
    else if (!chat_role_parse(span_json(role), &ret->role))
        return REFUSE(s, "messages", "messages[%zu].role: expected system, user or assistant", i);
    if (ret->role == CHAT_SYSTEM && i > 0)
        return REFUSE(s, "messages", "messages[%zu]: only the first message may be a system message", i);
    if (json_is_array(content))
        rc = join_parts(s, message, content);
    if (rc < 0)
        return rc;
    content = json_object_get(message, "content");
    if (!json_is_string(content))
        return REFUSE(s, "messages", "messages[%zu].content: expected a string, or a list of text parts", i);
    ret->content = span_json(content);
    return 0;
}

static int read_messages(struct reader_state *s, struct completion *c)
{
    const json_t *list = json_object_get(c->json, "messages");
    const size_t count = json_array_size(list);
    int rc = 0;

    if (count < 1 || count > COMPLETION_MESSAGES_MAX)
        return REFUSE(s, "messages", "messages: expected a list of 1 to %d messages", COMPLETION_MESSAGES_MAX);
    c->messages = calloc(count, sizeof *c->messages);
    if (!c->messages)
        return error_set(s->err, ERR_RESOURCES, "out of memory for a request");
    for (size_t i = 0; rc == 0 && i < count; i++)
        rc = read_message(s, json_array_get(list, i), i, &c->messages[i]);
    c->request.messages = c->messages;
    c->request.message_count = count;
    return rc;
}

/* --- settings --------------------------------------------------------------------------------------------------- */

static int read_number(struct reader_state *s, const json_t *json, const char *field, double low, double high,
                       double *value)
{
    const json_t *given = json_object_get(json, field);
    if (!present(given))
        return 0;
    if (!json_is_number(given) || !(json_number_value(given) >= low && json_number_value(given) <= high))
        return REFUSE(s, field, "%s: expected a number from %g to %g", field, low, high);
    *value = json_number_value(given);
    return 0;
}

static int read_integer(struct reader_state *s, const json_t *json, const char *field, json_int_t low, json_int_t high,
                        json_int_t *value)
{
    const json_t *given = json_object_get(json, field);
    if (!present(given))
        return 0;
    if (!json_is_integer(given) || json_integer_value(given) < low || json_integer_value(given) > high)
        return REFUSE(s, field, "%s: expected a whole number from %lld to %lld", field, (long long)low,
                      (long long)high);
    *value = json_integer_value(given);
    return 0;
}

static int read_flag(struct reader_state *s, const json_t *json, const char *field, bool *value)
{
    const json_t *given = json_object_get(json, field);
    if (!present(given))
        return 0;
    if (!json_is_boolean(given))
        return REFUSE(s, field, "%s: expected true or false", field);
    *value = json_is_true(given);
    return 0;
}

static int read_stops(struct reader_state *s, struct completion *c)
{
    const json_t *given = json_object_get(c->json, "stop");
    const size_t count = json_is_array(given) ? json_array_size(given) : 1;

    if (!present(given))
        return 0;
    if (count > ANSWER_STOPS_MAX)
        return REFUSE(s, "stop", "stop: expected at most %d strings", ANSWER_STOPS_MAX);
    for (size_t i = 0; i < count; i++) {
        const json_t *text = json_is_array(given) ? json_array_get(given, i) : given;
        if (!json_is_string(text) || json_string_length(text) < 1 || json_string_length(text) > ANSWER_STOP_BYTES_MAX)
            return REFUSE(s, "stop", "stop: expected a string of 1 to %u bytes, or a list of them",
                          ANSWER_STOP_BYTES_MAX);
        c->request.stops[c->request.stop_count++] = span_json(text);
    }
    return 0;
}

static int read_settings(struct reader_state *s, struct completion *c)
{
    double temperature = 1, top_p = 1; /* OpenAI's defaults */
    json_int_t tokens = 0, choices = 1, seed = 0;
    int rc;

    /* The newer name wins where both are given. */
    if ((rc = read_integer(s, c->json, "max_tokens", 1, INT32_MAX, &tokens)) < 0 ||
        (rc = read_integer(s, c->json, "max_completion_tokens", 1, INT32_MAX, &tokens)) < 0 ||
        (rc = read_number(s, c->json, "temperature", 0, 2, &temperature)) < 0 ||
        (rc = read_number(s, c->json, "top_p", 0, 1, &top_p)) < 0 ||
        (rc = read_integer(s, c->json, "n", 1, 1, &choices)) < 0 ||
        (rc = read_integer(s, c->json, "seed", INT64_MIN, INT64_MAX, &seed)) < 0 ||
        (rc = read_flag(s, c->json, "stream", &c->stream)) < 0 ||
        (rc = read_flag(s, json_object_get(c->json, "stream_options"), "include_usage", &c->include_usage)) < 0 ||
        (rc = read_stops(s, c)) < 0)
        return rc;
    if (top_p <= 0) /* the likeliest token alone; 0 means off to the sampler */
        temperature = 0;
    c->request.tokens_max = (int32_t)tokens;
    c->request.sampling = (struct sampler_config){.temperature = (float)temperature, .top_p = (float)top_p};
    c->request.seeded = present(json_object_get(c->json, "seed"));
    c->request.seed = (uint64_t)seed;
    return 0;
}

int completion_parse(struct completion *ret_completion, json_t *json, const char **ret_param, struct error *err)
{
    struct completion c = {.json = json};
    struct reader_state state = {.err = err};
    int rc = read_messages(&state, &c);

    if (rc == 0)
        rc = read_settings(&state, &c);
    if (rc < 0) {
        *ret_param = state.param;
        completion_release(&c);
        return rc;
    }
    *ret_completion = c;
    return 0;
}

void completion_release(struct completion *c)
{
    if (!c)
        return;
    json_decref(c->json);
    free(c->messages);
    *c = (struct completion){0};
}

/* --- replies ---------------------------------------------------------------------------------------------------- */

json_t *completion_error(const char *message, const char *type, const char *param, const char *code)
{
    return json_pack("{s:{s:s, s:s, s:s?, s:s?}}", "error", "message", message, "type", type, "param", param, "code",
                     code);
}

json_t *completion_source(const struct answer_source *source)
{
    const bool adapter = source->version > 0;
    return json_pack("{s:s?, s:I, s:s?}", "job", adapter ? source->job : NULL, "adapter_version",
                     (json_int_t)source->version, "adapter_sha256", adapter ? source->sha256 : NULL);
}

/* "base-" and the file's hash, or the adapter's version and hash: it changes when answers may. */
static json_t *fingerprint(const struct completion_identity *identity, const struct answer_source *source)
{
    char text[64];
    if (source->version > 0)
        snprintf(text, sizeof text, "v%u-%.16s", source->version, source->sha256);
    else
        snprintf(text, sizeof text, "base-%.16s", identity->base_sha256);
    return json_string(text);
}

static json_t *usage(const struct answer *answer)
{
    return json_pack("{s:i, s:i, s:i, s:{s:i}}", "prompt_tokens", answer->prompt_tokens, "completion_tokens",
                     answer->answer_tokens, "total_tokens", answer->prompt_tokens + answer->answer_tokens,
                     "prompt_tokens_details", "cached_tokens", answer->reused_tokens);
}

static json_t *text_json(struct span text)
{
    return json_stringn(text.len ? (const char *)text.ptr : "", text.len);
}

static json_t *envelope(const struct completion *c, const struct completion_identity *identity,
                        const struct answer_source *source, const char *object, json_t *choices)
{
    return json_pack("{s:s, s:s, s:I, s:s, s:o, s:o}", "id", c->id, "object", object, "created",
                     (json_int_t)c->created_s, "model", identity->model, "system_fingerprint",
                     fingerprint(identity, source), "choices", choices);
}

json_t *completion_reply(const struct completion *c, const struct completion_identity *identity,
                         const struct answer *answer)
{
    json_t *choice = json_pack("[{s:i, s:{s:s, s:o}, s:s, s:n}]", "index", 0, "message", "role", "assistant", "content",
                               text_json(buffer_span(&answer->text)), "finish_reason",
                               answer_finish_name(answer->finish), "logprobs");
    json_t *reply = envelope(c, identity, &answer->source, "chat.completion", choice);
    json_object_set_new(reply, "usage", usage(answer));
    json_object_set_new(reply, "consilium", completion_source(&answer->source));
    return reply;
}

static json_t *chunk(const struct completion *c, const struct completion_identity *identity,
                     const struct answer_source *source, json_t *delta, const char *finish)
{
    json_t *choices =
        json_pack("[{s:i, s:o, s:s?, s:n}]", "index", 0, "delta", delta, "finish_reason", finish, "logprobs");
    return envelope(c, identity, source, "chat.completion.chunk", choices);
}

json_t *completion_chunk_role(const struct completion *c, const struct completion_identity *identity,
                              const struct answer_source *source)
{
    return chunk(c, identity, source, json_pack("{s:s, s:s}", "role", "assistant", "content", ""), NULL);
}

json_t *completion_chunk_text(const struct completion *c, const struct completion_identity *identity,
                              const struct answer_source *source, struct span text)
{
    return chunk(c, identity, source, json_pack("{s:o}", "content", text_json(text)), NULL);
}

json_t *completion_chunk_end(const struct completion *c, const struct completion_identity *identity,
                             const struct answer *answer)
{
    json_t *end = chunk(c, identity, &answer->source, json_object(), answer_finish_name(answer->finish));
    json_object_set_new(end, "usage", usage(answer));
    json_object_set_new(end, "consilium", completion_source(&answer->source));
    return end;
}

json_t *completion_chunk_usage(const struct completion *c, const struct completion_identity *identity,
                               const struct answer *answer)
{
    json_t *piece = envelope(c, identity, &answer->source, "chat.completion.chunk", json_array());
    json_object_set_new(piece, "usage", usage(answer));
    json_object_set_new(piece, "consilium", completion_source(&answer->source));
    return piece;
}
