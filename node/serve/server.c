#include "node/serve/server.h"

#include "base/hex.h"
#include "base/log.h"
#include "node/serve/completion.h"
#include "node/serve/queue.h"

#include <stdatomic.h>

#define BODY_BYTES_MAX (1u << 20)
#define STREAM_BYTES_MAX (64u << 10) /* unread by one client */
#define IDLE_BEAT_MS 1000
#define SEND_SLICE_MS 250
#define STOP_WAIT_MS 2000 /* for clients to read the last bytes */
#define SOCKET_MODE 0660

static const struct log_context log_serve = {.component = "serve"};

struct serve {
    struct serve_options options;
    char model[256]; /* the base file's name without .gguf, or the folder's */
    char base_sha256[2 * HASH_SIZE + 1];
    struct completion_identity identity;
    struct answerer *answerer; /* the worker's */
    struct question_queue queue;
    struct http_server *http;
    pthread_t worker;
    bool worker_started;
    _Atomic bool stopping;
    _Atomic int64_t progress_ms; /* monotonic, when the worker last came by */
    _Atomic int64_t last_ms;     /* what the last answer took */
};

/* One question being answered. */
struct exchange {
    struct serve *serve;
    struct question *question;
    struct answer_source source;
    struct http_stream *stream; /* NULL: answered as a whole, or not started */
    bool lost;                  /* nobody reads the stream any more */
};

static void beat(struct serve *s)
{
    s->progress_ms = clock_monotonic_ms(s->options.clock);
}

/* --- the worker ------------------------------------------------------------------------------------------------- */

/* Sends one server-sent event; waits for a client that is slow to read, but not for ever. */
static void send_text(struct exchange *e, const char *json)
{
    struct serve *s = e->serve;
    struct buffer line;
    int rc = ERR_AGAIN;

    if (e->lost)
        return;
    buffer_init(&line, STREAM_BYTES_MAX);
    buffer_printf(&line, "data: %s\n\n", json);
    for (int64_t waited = 0; rc == ERR_AGAIN && waited < s->options.client_wait_ms && !s->stopping;
         waited += SEND_SLICE_MS) {
        rc = buffer_ok(&line) ? http_stream_send(e->stream, buffer_span(&line), SEND_SLICE_MS) : ERR_RESOURCES;
        beat(s);
    }
    e->lost = rc < 0;
    buffer_wipe_release(&line);
}

static void send_json(struct exchange *e, json_t *json)
{
    char *text = json_dumps(json, JSON_COMPACT);
    json_decref(json);
    if (text)
        send_text(e, text);
    else
        e->lost = true;
    free(text);
}

static void on_started(void *ctx, const struct answer *answer)
{
    struct exchange *e = ctx;
    const struct completion *c = &e->question->completion;

    e->source = answer->source;
    if (!c->stream)
        return;
    e->stream = http_stream_start(e->question->http, "text/event-stream");
    send_json(e, completion_chunk_role(c, &e->serve->identity, &e->source));
}

static void on_piece(void *ctx, struct span text)
{
    struct exchange *e = ctx;
    if (e->stream)
        send_json(e, completion_chunk_text(&e->question->completion, &e->serve->identity, &e->source, text));
}

static bool on_proceed(void *ctx)
{
    struct exchange *e = ctx;
    beat(e->serve);
    if (e->serve->stopping || e->lost)
        return false;
    return e->stream ? !http_stream_gone(e->stream) : !http_request_gone(e->question->http);
}

static void reply_error(struct http_request *http, unsigned status, const char *type, const char *param,
                        const char *message)
{
    http_reply_json(http, status, completion_error(message, type, param, NULL));
}

/* For a question that gets no answer: as a plain reply, or as the last event of its stream. */
static void finish_without(struct exchange *e, int rc, const char *message)
{
    const bool theirs = rc == ERR_CONFIG;

    if (e->stream)
        send_json(e, completion_error(message, "server_error", NULL, NULL));
    else
        reply_error(e->question->http, theirs ? 400 : 503, theirs ? "invalid_request_error" : "server_error", NULL,
                    message);
    if (!theirs)
        log_warn(&log_serve, "a request got no answer: %s", message);
}

static void finish_with(struct exchange *e, const struct answer *answer)
{
    const struct completion *c = &e->question->completion;
    const struct completion_identity *identity = &e->serve->identity;

    if (!e->stream) {
        http_reply_json(e->question->http, 200, completion_reply(c, identity, answer));
        return;
    }
    send_json(e, completion_chunk_end(c, identity, answer));
    if (c->include_usage)
        send_json(e, completion_chunk_usage(c, identity, answer));
    send_text(e, "[DONE]");
}

static void note_answer(struct exchange *e, const struct answer *answer, int64_t began_ms)
{
    struct serve *s = e->serve;
    json_t *fields = completion_source(&answer->source);

    s->last_ms = answer->prompt_ms + answer->answer_ms;
    json_object_update_new(
        fields, json_pack("{s:s, s:b, s:i, s:i, s:i, s:I, s:I, s:I}", "finish", answer_finish_name(answer->finish),
                          "stream", e->question->completion.stream, "prompt_tokens", answer->prompt_tokens,
                          "reused_tokens", answer->reused_tokens, "answer_tokens", answer->answer_tokens, "queue_ms",
                          (json_int_t)(began_ms - e->question->queued_ms), "prompt_ms", (json_int_t)answer->prompt_ms,
                          "answer_ms", (json_int_t)answer->answer_ms));
    journal_event(s->options.journal, "answer", fields);
}

static void set_id(struct serve *s, struct completion *c)
{
    uint8_t bytes[12];
    char hex[2 * sizeof bytes + 1];

    rng_fill(s->options.rng, bytes, sizeof bytes);
    hex_encode(bytes, sizeof bytes, hex);
    snprintf(c->id, sizeof c->id, "chatcmpl-%s", hex);
    c->created_s = clock_wall_ms(s->options.clock) / 1000;
}

static void answer_question(struct serve *s, struct question *q)
{
    struct exchange e = {.serve = s, .question = q};
    struct answer_request request = q->completion.request;
    struct answer answer = {0};
    struct error err = {0};
    const int64_t began_ms = clock_monotonic_ms(s->options.clock);
    int rc;

    if (s->stopping) {
        reply_error(q->http, 503, "server_error", NULL, "the server is stopping");
        return;
    }
    set_id(s, &q->completion);
    request.started = on_started;
    request.piece = on_piece;
    request.proceed = on_proceed;
    request.ctx = &e;
    rc = answerer_run(s->answerer, s->options.slot, &request, &answer, &err);
    if (rc == 0) {
        note_answer(&e, &answer, began_ms);
        if (answer.finish != ANSWER_CANCELLED)
            finish_with(&e, &answer);
        else if (s->stopping)
            finish_without(&e, ERR_AGAIN, "the server is stopping");
        else if (!e.stream) /* nobody is there to read it, but a reply is due */
            reply_error(q->http, 503, "server_error", NULL, "cancelled");
    } else {
        finish_without(&e, rc, err.message);
    }
    http_stream_end(e.stream);
    answer_release(&answer);
}

static void *work(void *arg)
{
    struct serve *s = arg;
    struct question *q;

    pthread_setname_np(pthread_self(), "answer");
    for (;;) {
        beat(s);
        if (question_queue_pop(&s->queue, IDLE_BEAT_MS, &q) == ERR_NOT_FOUND)
            return NULL;
        if (!q)
            continue;
        answer_question(s, q);
        question_free(q);
    }
}

/* --- routes ----------------------------------------------------------------------------------------------------- */

/* Seconds after which a place in the queue is likely. */
static int64_t retry_after_s(const struct serve *s)
{
    int64_t seconds = (s->last_ms + 999) / 1000;
    return seconds < 1 ? 1 : seconds > 60 ? 60 : seconds;
}

static void refuse_full(struct serve *s, struct http_request *r)
{
    char message[160];
    json_t *error;

    snprintf(message, sizeof message, "%u requests wait already; try again in %lld s", s->options.queue_max,
             (long long)retry_after_s(s));
    error = completion_error(message, "rate_limit_error", NULL, "queue_full");
    json_object_set_new(json_object_get(error, "error"), "retry_after_s", json_integer(retry_after_s(s)));
    http_retry_after(r, (unsigned)retry_after_s(s));
    http_reply_json(r, 429, error);
}

static void route_chat(void *ctx, struct http_request *r)
{
    struct serve *s = ctx;
    struct error err = {0};
    const char *param = NULL;
    struct question *q;
    json_t *json;
    int rc;

    if (http_request_json(r, &json) < 0)
        return;
    q = calloc(1, sizeof *q);
    if (!q) {
        json_decref(json);
        reply_error(r, 503, "server_error", NULL, "out of memory");
        return;
    }
    if ((rc = completion_parse(&q->completion, json, &param, &err)) < 0) {
        free(q);
        reply_error(r, rc == ERR_CONFIG ? 400 : 503, rc == ERR_CONFIG ? "invalid_request_error" : "server_error", param,
                    err.message);
        return;
    }
    q->http = r;
    q->queued_ms = clock_monotonic_ms(s->options.clock);
    http_defer(r);
    rc = question_queue_push(&s->queue, q);
    if (rc == 0)
        return;
    question_free(q);
    if (rc == ERR_AGAIN)
        refuse_full(s, r);
    else
        reply_error(r, 503, "server_error", NULL, "the server is stopping");
}

static json_t *model_entry(const char *id, const char *parent, const struct answer_source *source)
{
    return json_pack("{s:s, s:s, s:i, s:s, s:s?, s:o}", "id", id, "object", "model", "created", 0, "owned_by",
                     "consilium", "parent", parent, "consilium", completion_source(source));
}

static void route_models(void *ctx, struct http_request *r)
{
    struct serve *s = ctx;
    const struct answer_source base = {0}, now = answer_source_now(s->options.slot);
    json_t *list = json_array();

    json_array_append_new(list, model_entry(s->model, NULL, &base));
    if (now.version > 0) {
        char id[SITE_ID_SIZE + 16];
        snprintf(id, sizeof id, "%s:%u", now.job, now.version);
        json_array_append_new(list, model_entry(id, s->model, &now));
    }
    http_reply_json(r, 200, json_pack("{s:s, s:o}", "object", "list", "data", list));
}

static void route_health(void *ctx, struct http_request *r)
{
    struct serve *s = ctx;
    const struct answer_source now = answer_source_now(s->options.slot);
    const int64_t age_ms = clock_monotonic_ms(s->options.clock) - s->progress_ms;
    const bool stuck = age_ms > s->options.stall_ms;
    json_t *health = completion_source(&now);

    json_object_update_new(health, json_pack("{s:s, s:s, s:s, s:I, s:I}", "status", stuck ? "stuck" : "ok", "model",
                                             s->model, "model_sha256", s->base_sha256, "waiting",
                                             (json_int_t)question_queue_length(&s->queue), "progress_age_ms",
                                             (json_int_t)(age_ms > 0 ? age_ms : 0)));
    http_reply_json(r, stuck ? 503 : 200, health);
}

static const struct http_route routes[] = {
    {"POST", "/v1/chat/completions", route_chat, .body_bytes_max = BODY_BYTES_MAX},
    {"GET", "/v1/models", route_models, .open = false},
    {"GET", "/healthz", route_health, .open = true},
};

/* --- life ------------------------------------------------------------------------------------------------------- */

static int check_listen(const struct config *config, struct error *err)
{
    const char *listen = config_string(config, "serve.listen");

    if (!listen)
        return error_set(err, ERR_CONFIG, "key serve.listen is not set: expected unix:/path or a loopback host:port");
    if (strncmp(listen, "unix:", 5) != 0 && !config_path(config, "serve.token_file"))
        return config_fail(config, "serve.listen", err,
                           "%s can be reached by every user of this machine: name a file with a token in "
                           "serve.token_file, or listen on unix:/path",
                           listen);
    return 0;
}

static int start_http(struct serve *s, struct error *err)
{
    const struct config *config = s->options.config;
    struct http_options options = {.listen = config_string(config, "serve.listen"),
                                   .unix_mode = SOCKET_MODE,
                                   .token_file = config_path(config, "serve.token_file"),
                                   .routes = routes,
                                   .routes_count = ARRAY_LEN(routes),
                                   .ctx = s,
                                   .stream_bytes_max = STREAM_BYTES_MAX,
                                   .server_name = "consilium"};
    return http_start(&s->http, &options, err);
}

static void set_identity(struct serve *s)
{
    const char *name = model_file_name(s->options.site->file);
    size_t len = strlen(name);

    if (len > 5 && strcmp(name + len - 5, ".gguf") == 0)
        len -= 5;
    snprintf(s->model, sizeof s->model, "%.*s", (int)len, name);
    hex_encode(s->options.site->base_hash, HASH_SIZE, s->base_sha256);
    s->identity = (struct completion_identity){s->model, s->base_sha256};
}

int serve_start(struct serve **ret_serve, const struct serve_options *options, struct error *err)
{
    const struct error *why_cpu;
    char device[BACKEND_NAME_SIZE]; /* once the thread runs, the answerer is its own */
    struct serve *s;
    int rc = check_listen(options->config, err);

    if (rc < 0)
        return rc;
    s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_RESOURCES, "out of memory for the endpoint");
    s->options = *options;
    s->options.queue_max = options->queue_max ? options->queue_max : SERVE_QUEUE_DEFAULT;
    s->options.stall_ms = options->stall_ms ? options->stall_ms : SERVE_STALL_MS_DEFAULT;
    s->options.client_wait_ms = options->client_wait_ms ? options->client_wait_ms : SERVE_CLIENT_WAIT_MS_DEFAULT;
    set_identity(s);
    question_queue_init(&s->queue, s->options.queue_max);
    beat(s);
    rc = answerer_new(&s->answerer, options->site, (int32_t)config_int(options->config, "serve.context_tokens"),
                      options->rng, options->clock, err);
    if (rc == 0) {
        snprintf(device, sizeof device, "%s", answerer_device(s->answerer, &why_cpu));
        rc = start_http(s, err);
    }
    if (rc == 0 && pthread_create(&s->worker, NULL, work, s) != 0)
        rc = error_set(err, ERR_RESOURCES, "cannot start the answering thread");
    s->worker_started = rc == 0;
    if (rc < 0) {
        serve_stop(s);
        return rc;
    }
    log_info(&log_serve, "answering at %s, on %s", http_address(s->http), device);
    journal_event(options->journal, "serve_started",
                  json_pack("{s:s, s:s, s:s}", "address", http_address(s->http), "model", s->model, "kernels", device));
    *ret_serve = s;
    return 0;
}

const char *serve_address(const struct serve *serve)
{
    return http_address(serve->http);
}

void serve_stop(struct serve *s)
{
    if (!s)
        return;
    s->stopping = true;
    question_queue_close(&s->queue);
    if (s->worker_started)
        pthread_join(s->worker, NULL);
    else
        question_queue_refuse(&s->queue); /* what came between the listening and the failure */
    http_stop(s->http, STOP_WAIT_MS);     /* every request has been replied: nothing sleeps in it */
    answerer_free(s->answerer);
    question_queue_release(&s->queue);
    free(s);
}
