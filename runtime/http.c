#include "runtime/http.h"

#include "base/buffer.h"
#include "base/clock.h"
#include "base/file.h"
#include "runtime/http_listen.h"

#include <errno.h>
#include <microhttpd.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#define TOKEN_MIN 16
#define TOKEN_MAX 256
#define REQUESTS_KEEP 2 /* owners: libmicrohttpd and the application */

struct http_server {
    struct MHD_Daemon *daemon;
    struct http_options options;
    char address[160];
    char token[TOKEN_MAX];
    size_t token_len;
    pthread_mutex_t lock; /* the list; taken before a request's lock */
    pthread_cond_t idle;
    struct http_request *requests; /* dispatched and not completed */
};

struct http_request {
    struct http_server *server; /* only while libmicrohttpd owns it */
    struct http_request *next, **link;
    struct MHD_Connection *connection;
    const struct http_route *route;
    char *path;
    size_t rest; /* offset of what the star matched */
    struct buffer body;
    int fd;
    pthread_mutex_t lock;
    int owners;
    bool dispatched, suspended, replied, completed;
    unsigned status;
    unsigned retry_after_s; /* 0: no such header */
    struct MHD_Response *response;
    struct http_stream *stream; /* owned share; NULL: a plain reply */
};

struct http_stream {
    pthread_mutex_t lock;
    pthread_cond_t room;
    struct MHD_Connection *connection;
    int fd;
    int owners; /* producer, response, request */
    bool suspended, ended, gone;
    uint8_t *ring;
    size_t capacity, head, len;
};

/* Streams */

static void stream_unref(struct http_stream *s)
{
    pthread_mutex_lock(&s->lock);
    bool last = --s->owners == 0;
    pthread_mutex_unlock(&s->lock);
    if (!last)
        return;
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->room);
    free(s->ring);
    free(s);
}

static void stream_wake(struct http_stream *s) /* lock held */
{
    if (s->suspended) {
        s->suspended = false;
        MHD_resume_connection(s->connection);
    }
    pthread_cond_broadcast(&s->room);
}

static bool peer_closed(int fd)
{
    char byte;
    ssize_t n = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

static ssize_t stream_read(void *ctx, uint64_t position, char *out, size_t max)
{
    struct http_stream *s = ctx;
    (void)position;
    pthread_mutex_lock(&s->lock);
    ssize_t result = 0;
    size_t n = s->len < max ? s->len : max;
    if (s->gone) {
        result = MHD_CONTENT_READER_END_WITH_ERROR;
    } else if (n > 0) {
        size_t first = s->capacity - s->head < n ? s->capacity - s->head : n;
        memcpy(out, s->ring + s->head, first);
        memcpy(out + first, s->ring, n - first);
        s->head = (s->head + n) % s->capacity;
        s->len -= n;
        result = (ssize_t)n;
        pthread_cond_broadcast(&s->room);
    } else if (s->ended) {
        result = MHD_CONTENT_READER_END_OF_STREAM;
    } else {
        s->suspended = true;
        MHD_suspend_connection(s->connection);
    }
    pthread_mutex_unlock(&s->lock);
    return result;
}

static void stream_closed(void *ctx)
{
    struct http_stream *s = ctx;
    pthread_mutex_lock(&s->lock);
    s->gone = true;
    pthread_cond_broadcast(&s->room);
    pthread_mutex_unlock(&s->lock);
    stream_unref(s);
}

int http_stream_send(struct http_stream *s, struct span bytes, int64_t wait_ms)
{
    struct timespec until;
    int rc = 0;
    if (bytes.len > s->capacity)
        return ERR_RESOURCES;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += wait_ms / 1000;
    until.tv_nsec += wait_ms % 1000 * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&s->lock);
    assert(!s->ended);
    while (!s->gone && s->capacity - s->len < bytes.len && rc == 0)
        if (wait_ms <= 0 || pthread_cond_timedwait(&s->room, &s->lock, &until) == ETIMEDOUT)
            rc = ERR_AGAIN;
    if (s->capacity - s->len >= bytes.len)
        rc = 0;
    if (s->gone)
        rc = ERR_CONNECT;
    if (rc == 0) {
        size_t tail = (s->head + s->len) % s->capacity;
        size_t first = s->capacity - tail < bytes.len ? s->capacity - tail : bytes.len;
        if (bytes.len > 0) {
            memcpy(s->ring + tail, bytes.ptr, first);
            memcpy(s->ring, bytes.ptr + first, bytes.len - first);
        }
        s->len += bytes.len;
        stream_wake(s);
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

int http_stream_event(struct http_stream *s, const char *event, json_t *json, int64_t wait_ms)
{
    struct buffer line;
    char *text = json_dumps(json, JSON_COMPACT | JSON_ENCODE_ANY);
    json_decref(json);
    buffer_init(&line, s->capacity);
    if (event)
        buffer_printf(&line, "event: %s\n", event);
    buffer_printf(&line, "data: %s\n\n", text ? text : "null");
    free(text);
    int rc = buffer_ok(&line) ? http_stream_send(s, buffer_span(&line), wait_ms) : ERR_RESOURCES;
    buffer_release(&line);
    return rc;
}

bool http_stream_gone(struct http_stream *s)
{
    pthread_mutex_lock(&s->lock);
    /* While suspended the connection cannot be closed by the server's thread, so the descriptor is still its own. */
    bool gone = s->gone || (s->suspended && peer_closed(s->fd));
    pthread_mutex_unlock(&s->lock);
    return gone;
}

void http_stream_end(struct http_stream *s)
{
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    s->ended = true;
    stream_wake(s);
    pthread_mutex_unlock(&s->lock);
    stream_unref(s);
}

/* Requests */

static void request_unref(struct http_request *r)
{
    pthread_mutex_lock(&r->lock);
    bool last = --r->owners == 0;
    pthread_mutex_unlock(&r->lock);
    if (!last)
        return;
    if (r->response)
        MHD_destroy_response(r->response);
    if (r->stream)
        stream_unref(r->stream);
    buffer_release(&r->body);
    pthread_mutex_destroy(&r->lock);
    free(r->path);
    free(r);
}

/* Hands the response over and gives up the application's share. response consumed. */
static void request_answer(struct http_request *r, unsigned status, struct MHD_Response *response)
{
    pthread_mutex_lock(&r->lock);
    assert((!r->replied || r->completed) && "a request is replied once");
    if (r->replied || r->completed || !response) {
        if (response)
            MHD_destroy_response(response);
    } else {
        r->response = response;
        r->status = status;
    }
    r->replied = true;
    if (r->suspended) {
        r->suspended = false;
        MHD_resume_connection(r->connection);
    }
    pthread_mutex_unlock(&r->lock);
    request_unref(r);
}

static struct MHD_Response *make_response(const char *content_type, struct span body)
{
    static char empty[1];
    void *bytes = body.len ? (void *)(uintptr_t)body.ptr : empty; /* only read: MUST_COPY */
    struct MHD_Response *response = MHD_create_response_from_buffer(body.len, bytes, MHD_RESPMEM_MUST_COPY);
    if (response)
        MHD_add_response_header(response, "Content-Type", content_type);
    return response;
}

void http_reply(struct http_request *r, unsigned status, const char *content_type, struct span body)
{
    struct MHD_Response *response = make_response(content_type, body);
    char seconds[16];
    if (response && r->retry_after_s) {
        snprintf(seconds, sizeof seconds, "%u", r->retry_after_s);
        MHD_add_response_header(response, "Retry-After", seconds);
    }
    request_answer(r, status, response);
}

void http_retry_after(struct http_request *r, unsigned seconds)
{
    r->retry_after_s = seconds;
}

void http_reply_json(struct http_request *r, unsigned status, json_t *json)
{
    char *text = json_dumps(json, JSON_COMPACT | JSON_ENCODE_ANY);
    json_decref(json);
    http_reply(r, status, "application/json", span_str(text ? text : "null"));
    free(text);
}

static json_t *error_object(unsigned status, const char *type, const char *message)
{
    return json_pack("{s:{s:s, s:s, s:i}}", "error", "message", message, "type", type, "code", (int)status);
}

void http_reply_error(struct http_request *r, unsigned status, const char *type, const char *format, ...)
{
    char message[512];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    http_reply_json(r, status, error_object(status, type, message));
}

void http_defer(struct http_request *r)
{
    (void)r; /* nothing to do: a handler that returns without a reply keeps the request */
}

bool http_request_gone(const struct http_request *r)
{
    struct http_request *m = (struct http_request *)(uintptr_t)r;
    pthread_mutex_lock(&m->lock);
    bool gone = m->completed || m->replied || (m->suspended && peer_closed(m->fd));
    pthread_mutex_unlock(&m->lock);
    return gone;
}

struct span http_request_body(const struct http_request *r)
{
    return buffer_span(&r->body);
}

const char *http_request_path(const struct http_request *r)
{
    return r->path;
}

const char *http_request_rest(const struct http_request *r)
{
    return r->path + r->rest;
}

const char *http_request_query(const struct http_request *r, const char *name)
{
    return MHD_lookup_connection_value(r->connection, MHD_GET_ARGUMENT_KIND, name);
}

const char *http_request_header(const struct http_request *r, const char *name)
{
    return MHD_lookup_connection_value(r->connection, MHD_HEADER_KIND, name);
}

int http_request_json(struct http_request *r, json_t **ret_json)
{
    json_error_t problem;
    json_t *json = json_loadb((const char *)r->body.data, r->body.len, JSON_REJECT_DUPLICATES, &problem);
    if (!json_is_object(json)) {
        json_decref(json);
        http_reply_error(r, 400, "invalid_request_error", "the body is not a JSON object: line %d: %.200s",
                         json ? 1 : problem.line, json ? "another type" : problem.text);
        return ERR_FAILED;
    }
    *ret_json = json;
    return 0;
}

struct http_stream *http_stream_start(struct http_request *r, const char *content_type)
{
    struct http_stream *s = calloc(1, sizeof *s);
    size_t capacity = HTTP_STREAM_QUEUE_DEFAULT;
    pthread_mutex_lock(&r->lock);
    if (!r->completed && r->server && r->server->options.stream_bytes_max)
        capacity = r->server->options.stream_bytes_max;
    bool completed = r->completed;
    pthread_mutex_unlock(&r->lock);
    struct MHD_Response *response = NULL;
    if (s && (s->ring = malloc(capacity))) {
        pthread_condattr_t attributes;
        pthread_condattr_init(&attributes);
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        pthread_cond_init(&s->room, &attributes);
        pthread_condattr_destroy(&attributes);
        pthread_mutex_init(&s->lock, NULL);
        s->capacity = capacity;
        s->connection = r->connection;
        s->fd = r->fd;
        s->owners = 3;
        s->gone = completed;
        response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16384, stream_read, s, stream_closed);
    }
    if (!response) { /* out of memory: a plain failure, which this cannot hide */
        fprintf(stderr, "http: out of memory for a stream\n");
        abort();
    }
    MHD_add_response_header(response, "Content-Type", content_type);
    MHD_add_response_header(response, "Cache-Control", "no-store");
    pthread_mutex_lock(&r->lock);
    r->stream = s;
    pthread_mutex_unlock(&r->lock);
    request_answer(r, 200, response);
    return s;
}

/* The server's side */

static bool same_token(const struct http_server *s, const char *given)
{
    size_t len = strlen(given);
    volatile uint8_t different = len != s->token_len; /* the length is no secret; the bytes are compared in full */
    for (size_t i = 0; i < s->token_len; i++)
        different |= (uint8_t)(s->token[i] ^ given[i < len ? i : 0]);
    return different == 0;
}

static bool authorised(const struct http_server *s, struct MHD_Connection *connection)
{
    const char *header = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Authorization");
    return s->token_len == 0 || (header && strncasecmp(header, "Bearer ", 7) == 0 && same_token(s, header + 7));
}

/* The route, or NULL with the status to answer. */
static const struct http_route *find_route(const struct http_server *s, const char *method, const char *path,
                                           size_t *ret_rest, unsigned *ret_status)
{
    *ret_status = 404;
    for (size_t i = 0; i < s->options.routes_count; i++) {
        const struct http_route *route = &s->options.routes[i];
        size_t len = strlen(route->path);
        bool star = len > 0 && route->path[len - 1] == '*';
        if (star ? strncmp(route->path, path, len - 1) != 0 : strcmp(route->path, path) != 0)
            continue;
        bool head = strcmp(method, "HEAD") == 0 && strcmp(route->method, "GET") == 0;
        if (strcmp(route->method, method) == 0 || head) {
            *ret_rest = star ? len - 1 : strlen(path);
            return route;
        }
        *ret_status = 405;
    }
    return NULL;
}

static enum MHD_Result refuse(struct MHD_Connection *connection, unsigned status, const char *type, const char *message)
{
    json_t *json = error_object(status, type, message);
    char *text = json_dumps(json, JSON_COMPACT);
    json_decref(json);
    struct MHD_Response *response = make_response("application/json", span_str(text ? text : "{}"));
    free(text);
    if (!response)
        return MHD_NO;
    if (status == 401)
        MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
    enum MHD_Result result = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return result;
}

static struct http_request *request_new(struct http_server *s, struct MHD_Connection *connection, const char *path)
{
    struct http_request *r = calloc(1, sizeof *r);
    if (!r || !(r->path = strdup(path))) {
        free(r);
        return NULL;
    }
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    r->server = s;
    r->connection = connection;
    r->fd = info ? info->connect_fd : -1;
    r->owners = 1;
    pthread_mutex_init(&r->lock, NULL);
    return r;
}

static enum MHD_Result begin(struct http_server *s, struct MHD_Connection *connection, const char *path,
                             const char *method, void **request_slot)
{
    size_t rest = 0;
    unsigned status;
    const struct http_route *route = find_route(s, method, path, &rest, &status);
    if (!(route && route->open) && !authorised(s, connection))
        return refuse(connection, 401, "authentication_error",
                      "expected Authorization: Bearer with this server's token");
    if (!route)
        return refuse(connection, status, "invalid_request_error",
                      status == 405 ? "this path has no such method" : "no such path");
    size_t body_max = route->body_bytes_max ? route->body_bytes_max : HTTP_BODY_DEFAULT;
    const char *length = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Content-Length");
    if (length && strtoull(length, NULL, 10) > body_max)
        return refuse(connection, 413, "invalid_request_error", "the body is too large for this path");
    struct http_request *r = request_new(s, connection, path);
    if (!r)
        return MHD_NO;
    r->route = route;
    r->rest = rest;
    buffer_init(&r->body, body_max);
    *request_slot = r;
    return MHD_YES;
}

static void dispatch(struct http_request *r)
{
    struct http_server *s = r->server;
    r->dispatched = true;
    r->owners = REQUESTS_KEEP;
    pthread_mutex_lock(&s->lock);
    r->next = s->requests;
    r->link = &s->requests;
    if (r->next)
        r->next->link = &r->next;
    s->requests = r;
    pthread_mutex_unlock(&s->lock);
    r->route->handle(s->options.ctx, r);
}

/* Queues the reply when there is one, or sleeps until request_answer wakes the connection. */
static enum MHD_Result queue_or_wait(struct http_request *r)
{
    enum MHD_Result result = MHD_YES;
    pthread_mutex_lock(&r->lock);
    if (r->response) {
        result = MHD_queue_response(r->connection, r->status, r->response);
        MHD_destroy_response(r->response);
        r->response = NULL;
    } else if (r->replied) {
        result = MHD_NO; /* cancelled, or no memory for the reply: close */
    } else {
        r->suspended = true;
        MHD_suspend_connection(r->connection);
    }
    pthread_mutex_unlock(&r->lock);
    return result;
}

static enum MHD_Result on_request(void *ctx, struct MHD_Connection *connection, const char *path, const char *method,
                                  const char *version, const char *data, size_t *data_len, void **request_slot)
{
    struct http_request *r = *request_slot;
    (void)version;
    if (!r)
        return begin(ctx, connection, path, method, request_slot);
    if (*data_len > 0) {
        buffer_append(&r->body, data, *data_len);
        *data_len = 0;
        return buffer_ok(&r->body) ? MHD_YES : MHD_NO; /* a chunked body past its bound: close */
    }
    if (!r->dispatched)
        dispatch(r);
    return queue_or_wait(r);
}

static void on_completed(void *ctx, struct MHD_Connection *connection, void **request_slot,
                         enum MHD_RequestTerminationCode why)
{
    struct http_server *s = ctx;
    struct http_request *r = *request_slot;
    (void)connection;
    (void)why;
    if (!r)
        return;
    *request_slot = NULL;
    pthread_mutex_lock(&s->lock);
    if (r->link) {
        *r->link = r->next;
        if (r->next)
            r->next->link = r->link;
    }
    pthread_mutex_lock(&r->lock);
    r->completed = true;
    r->server = NULL;
    pthread_mutex_unlock(&r->lock);
    pthread_cond_broadcast(&s->idle);
    pthread_mutex_unlock(&s->lock);
    request_unref(r);
}

static int read_token(struct http_server *s, const char *path, struct error *err)
{
    struct buffer text;
    buffer_init(&text, 4096);
    int rc = file_read(path, &text, err);
    if (rc == 0) {
        size_t len = 0;
        while (len < text.len && text.data[len] > ' ')
            len++;
        if (len < TOKEN_MIN || len >= TOKEN_MAX)
            rc = error_set(err, ERR_CONFIG, "%s: expected a token of %d to %d printable characters on the first line",
                           path, TOKEN_MIN, TOKEN_MAX - 1);
        else
            memcpy(s->token, text.data, s->token_len = len);
    }
    buffer_wipe_release(&text);
    return rc;
}

static void server_free(struct http_server *s)
{
    explicit_bzero(s->token, sizeof s->token);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->idle);
    free(s);
}

int http_start(struct http_server **ret_server, const struct http_options *options, struct error *err)
{
    struct http_server *s = calloc(1, sizeof *s);
    int fd = -1, rc = 0;
    if (!s)
        return error_set(err, ERR_RESOURCES, "out of memory for the HTTP server");
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&s->idle, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&s->lock, NULL);
    s->options = *options;
    if (options->token_file)
        rc = read_token(s, options->token_file, err);
    if (rc == 0)
        rc = http_listen(options->listen, options->unix_mode, options->allow_any_address, &fd, s->address,
                         sizeof s->address, err);
    if (rc < 0) {
        server_free(s);
        return rc;
    }
    s->daemon =
        MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ITC, 0, NULL, NULL,
                         on_request, s, MHD_OPTION_LISTEN_SOCKET, fd, MHD_OPTION_NOTIFY_COMPLETED, on_completed, s,
                         MHD_OPTION_CONNECTION_LIMIT, options->connections_max ? options->connections_max : 256u,
                         MHD_OPTION_CONNECTION_TIMEOUT, options->timeout_s ? options->timeout_s : 60u,
                         MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)65536, MHD_OPTION_END);
    if (!s->daemon) {
        rc = error_set(err, ERR_RESOURCES, "%s: cannot start the HTTP server: %s", s->address, strerror(errno));
        close(fd);
        server_free(s);
        return rc;
    }
    *ret_server = s;
    return 0;
}

const char *http_address(const struct http_server *s)
{
    return s->address;
}

/* Wakes what still sleeps: streams end with an error, deferred requests are closed without a reply. */
static void cancel_all(struct http_server *s) /* lock held */
{
    for (struct http_request *r = s->requests; r; r = r->next) {
        pthread_mutex_lock(&r->lock);
        struct http_stream *stream = r->stream;
        if (stream) {
            pthread_mutex_lock(&stream->lock);
            stream->gone = true;
            stream_wake(stream);
            pthread_mutex_unlock(&stream->lock);
        }
        if (r->suspended) {
            r->replied = r->completed = true; /* the application's own reply is still due and only gives up its share */
            r->suspended = false;
            MHD_resume_connection(r->connection);
        }
        pthread_mutex_unlock(&r->lock);
    }
}

void http_stop(struct http_server *s, int64_t wait_ms)
{
    struct timespec until;
    if (!s)
        return;
    MHD_socket fd = MHD_quiesce_daemon(s->daemon);
    /* New connections are refused from here on. The descriptor stays open until the server's thread is gone: closed,
     * its number could come back as another file while that thread still takes it out of its epoll set. */
    if (fd != MHD_INVALID_SOCKET)
        shutdown(fd, SHUT_RDWR);
    if (strncmp(s->address, "unix:", 5) == 0)
        unlink(s->address + 5);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += wait_ms / 1000;
    until.tv_nsec += wait_ms % 1000 * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&s->lock);
    while (s->requests && wait_ms > 0 && pthread_cond_timedwait(&s->idle, &s->lock, &until) != ETIMEDOUT)
        ;
    cancel_all(s);
    pthread_mutex_unlock(&s->lock);
    MHD_stop_daemon(s->daemon);
    if (fd != MHD_INVALID_SOCKET)
        close(fd);
    server_free(s);
}
