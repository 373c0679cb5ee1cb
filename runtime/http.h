/*
 * A small HTTP/1.1 server over libmicrohttpd: Unix socket or loopback TCP, bearer token, JSON, server-sent events.
 *
 * One internal epoll thread calls the handlers, which must not block. A handler replies at once, or keeps the request
 * (http_defer) and lets another thread reply, or starts a stream that another thread feeds through a bounded queue.
 * Every struct http_request is valid until it was replied; every stream until http_stream_end. All functions on
 * requests and streams may be called from any thread, from one at a time for one object.
 *
 *     static void health(void *ctx, struct http_request *r) { http_reply_json(r, 200, json_pack("{s:s}", "status",
 * "ok")); } static const struct http_route routes[] = {
 *         {"GET", "/health", .handle = health, .open = true},
 *         {"POST", "/v1/chat/completions", .handle = chat, .body_bytes_max = 1 << 20},
 *         {"GET", "/v1/jobs/" "*", .handle = job},        a trailing star matches the rest: http_request_rest
 *     };
 *     struct http_options o = {.listen = "127.0.0.1:8080", .routes = routes, .routes_count = 3, .ctx = daemon,
 *                              .token_file = path};
 *     rc = http_start(&server, &o, &err);
 */
#ifndef RUNTIME_HTTP_H
#define RUNTIME_HTTP_H

#include "base/error.h"
#include "base/span.h"

#include <jansson.h>

#define HTTP_BODY_DEFAULT (64 << 10)
#define HTTP_STREAM_QUEUE_DEFAULT (256 << 10)

struct http_server;
struct http_request;
struct http_stream;

struct http_route {
    const char *method; /* "GET", "POST", "DELETE" */
    const char *path;   /* exact, or a prefix ending in "/" and a star */
    void (*handle)(void *ctx, struct http_request *r);
    bool open;             /* answered without the token */
    size_t body_bytes_max; /* 0: HTTP_BODY_DEFAULT; more is answered 413 */
};

struct http_options {
    const char *listen;     /* "unix:/path", "127.0.0.1:8080", "[::1]:0"; port 0 takes a free one */
    unsigned unix_mode;     /* of the socket file; 0: 0600 */
    bool allow_any_address; /* without it only loopback addresses are accepted */
    const char *token_file; /* first line is the bearer token (≥ 16 characters); NULL: no token asked */
    const struct http_route *routes;
    size_t routes_count;
    void *ctx;
    unsigned connections_max; /* 0: 256 */
    unsigned timeout_s;       /* idle connections; 0: 60 */
    size_t stream_bytes_max;  /* queue of one stream; 0: HTTP_STREAM_QUEUE_DEFAULT */
    const char *server_name;  /* Server: header; NULL: none */
};

/*
 * ERR_CONNECT (address taken or not available, named in the message), ERR_CONFIG (bad address or token file). A stale
 * Unix socket file is replaced; one that still answers is not.
 */
int MUST_USE http_start(struct http_server **ret_server, const struct http_options *options, struct error *err);
/* "http://127.0.0.1:41234" or "unix:/path", with the real port. */
const char *http_address(const struct http_server *s);
/* Takes no new connections, waits up to wait_ms for replies and streams under way, cancels the rest, frees. */
void http_stop(struct http_server *s, int64_t wait_ms);

struct span http_request_body(const struct http_request *r);
const char *http_request_path(const struct http_request *r);
const char *http_request_rest(const struct http_request *r);                     /* what a star matched; "" */
const char *http_request_query(const struct http_request *r, const char *name);  /* NULL when absent */
const char *http_request_header(const struct http_request *r, const char *name); /* NULL; only inside the handler */
/* The body as a JSON object; on failure replies 400 itself, and the handler returns. */
int MUST_USE http_request_json(struct http_request *r, json_t **ret_json);

/* Keep the request beyond the handler; exactly one reply must follow, from any thread. */
void http_defer(struct http_request *r);
bool http_request_gone(const struct http_request *r); /* deferred: the client went away (a reply is still due) */
void http_reply(struct http_request *r, unsigned status, const char *content_type, struct span body);
/* Before a plain reply: adds "Retry-After: seconds" to it. */
void http_retry_after(struct http_request *r, unsigned seconds);
void http_reply_json(struct http_request *r, unsigned status, json_t *json); /* json consumed */
/* {"error": {"message": ..., "type": type, "code": status}} */
void http_reply_error(struct http_request *r, unsigned status, const char *type, const char *format, ...)
    PRINTF_LIKE(4, 5);

/* Replies 200 with a stream and ends the request; the caller owns the stream until http_stream_end. */
struct http_stream *http_stream_start(struct http_request *r, const char *content_type);
/* Queues bytes; waits up to wait_ms for room. ERR_AGAIN: still full; ERR_CONNECT: the client has gone or the server
 * stops; ERR_RESOURCES: more than a queue holds.
 */
int MUST_USE http_stream_send(struct http_stream *s, struct span bytes, int64_t wait_ms);
/* "data: JSON\n\n" (json consumed), as server-sent events want it; event may be NULL. */
int MUST_USE http_stream_event(struct http_stream *s, const char *event, json_t *json, int64_t wait_ms);
bool http_stream_gone(struct http_stream *s);
void http_stream_end(struct http_stream *s); /* what is queued is still delivered; NULL is accepted */

#endif
