#include "tests/node/http_client.h"

#include "base/clock.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define REPLY_MAX (16u << 20)
#define WAIT_MS 60000

void http_answer_release(struct http_answer *a)
{
    free(a->body);
    a->body = NULL;
}

static int open_socket(const char *address)
{
    union {
        struct sockaddr base;
        struct sockaddr_un local;
        struct sockaddr_in v4;
    } a;
    socklen_t len;
    memset(&a, 0, sizeof a);
    if (strncmp(address, "unix:", 5) == 0) {
        a.local.sun_family = AF_UNIX;
        snprintf(a.local.sun_path, sizeof a.local.sun_path, "%s", address + 5);
        len = sizeof a.local;
    } else {
        a.v4.sin_family = AF_INET;
        a.v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.v4.sin_port = htons((uint16_t)strtoul(strrchr(address, ':') + 1, NULL, 10));
        len = sizeof a.v4;
    }
    int fd = socket(a.base.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, &a.base, len) < 0) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    return fd;
}

int client_open(const char *address, const char *method, const char *path, const char *token, const char *body)
{
    struct buffer out;
    int fd = open_socket(address);
    size_t sent = 0;

    if (fd < 0)
        return -1;
    buffer_init(&out, REPLY_MAX);
    buffer_printf(&out, "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n", method, path);
    if (token)
        buffer_printf(&out, "Authorization: Bearer %s\r\n", token);
    if (body)
        buffer_printf(&out, "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(body));
    buffer_append(&out, "\r\n", 2);
    if (body)
        buffer_append(&out, body, strlen(body));
    while (buffer_ok(&out) && sent < out.len) {
        ssize_t n = send(fd, out.data + sent, out.len - sent, MSG_NOSIGNAL);
        if (n <= 0)
            break; /* refused before the end: the reply says why */
        sent += (size_t)n;
    }
    buffer_release(&out);
    return fd;
}

/* More bytes into seen; 0 at the end, −1 on failure or timeout. */
static int read_more(int fd, struct buffer *seen, int wait_ms)
{
    char bytes[16384];
    struct pollfd p = {.fd = fd, .events = POLLIN};
    if (poll(&p, 1, wait_ms) <= 0)
        return -1;
    ssize_t n = recv(fd, bytes, sizeof bytes, 0);
    if (n > 0)
        buffer_append(seen, bytes, (size_t)n);
    return n > 0 ? 1 : (int)n;
}

bool client_wait_for(int fd, const char *text, struct buffer *seen)
{
    const int64_t until = clock_monotonic_ms(&clock_system) + 20000;
    for (;;) {
        if (seen->len && memmem(seen->data, seen->len, text, strlen(text)))
            return true;
        int64_t left = until - clock_monotonic_ms(&clock_system);
        if (left <= 0 || read_more(fd, seen, (int)left) <= 0)
            return false;
    }
}

/* Puts a chunked body together in place; false when the last chunk is missing. */
static bool unchunk(char *body, size_t *len)
{
    char *in = body, *end = body + *len, *out = body;
    for (;;) {
        char *line = memmem(in, (size_t)(end - in), "\r\n", 2);
        if (!line)
            return false;
        size_t n = strtoul(in, NULL, 16);
        in = line + 2;
        if (n == 0)
            break;
        if ((size_t)(end - in) < n + 2)
            return false;
        memmove(out, in, n);
        out += n;
        in += n + 2;
    }
    *len = (size_t)(out - body);
    return true;
}

void client_finish_after(int fd, struct buffer *seen, struct http_answer *ret)
{
    int rc;
    *ret = (struct http_answer){0};
    while ((rc = read_more(fd, seen, WAIT_MS)) > 0)
        ;
    close(fd);
    char *body = seen->len ? memmem(seen->data, seen->len, "\r\n\r\n", 4) : NULL;
    bool whole = rc == 0 && body && buffer_ok(seen);
    size_t head = body ? (size_t)(body - (char *)seen->data) : 0;
    snprintf(ret->headers, sizeof ret->headers, "%.*s", (int)head, body ? (char *)seen->data : "");
    ret->body_len = body ? seen->len - head - 4 : 0;
    ret->body = calloc(1, ret->body_len + 1);
    if (body && ret->body)
        memcpy(ret->body, body + 4, ret->body_len);
    if (whole && strcasestr(ret->headers, "transfer-encoding: chunked"))
        whole = unchunk(ret->body, &ret->body_len);
    ret->body[ret->body_len] = '\0';
    if (whole)
        ret->status = (int)strtol(ret->headers + strlen("HTTP/1.1 "), NULL, 10);
    buffer_release(seen);
}

void client_finish(int fd, struct http_answer *ret)
{
    struct buffer seen;
    buffer_init(&seen, REPLY_MAX);
    client_finish_after(fd, &seen, ret);
}

void client_ask(const char *address, const char *method, const char *path, const char *token, const char *body,
                struct http_answer *ret)
{
    int fd = client_open(address, method, path, token, body);
    if (fd < 0)
        *ret = (struct http_answer){.body = calloc(1, 1)};
    else
        client_finish(fd, ret);
}

char *client_stream_text(const char *body, json_t **ret_end, bool *ret_done)
{
    struct buffer text;
    *ret_end = NULL;
    *ret_done = false;
    buffer_init(&text, REPLY_MAX);
    for (const char *at = body; (at = strstr(at, "data: "));) {
        at += 6;
        const char *end = strstr(at, "\n\n");
        if (!end)
            break;
        *ret_done = strncmp(at, "[DONE]", 6) == 0;
        json_t *json = json_loadb(at, (size_t)(end - at), 0, NULL);
        json_t *delta = json_object_get(json_array_get(json_object_get(json, "choices"), 0), "delta");
        const char *piece = json_string_value(json_object_get(delta, "content"));
        if (piece)
            buffer_append(&text, piece, strlen(piece));
        if (json_object_get(json, "consilium")) {
            json_decref(*ret_end);
            *ret_end = json_incref(json);
        }
        json_decref(json);
        at = end;
    }
    buffer_u8(&text, 0);
    char *result = (char *)text.data;
    return result;
}
