/* A small HTTP/1.1 client for tests: one request a connection, whole replies or pieces of them. Thread-safe. */
#ifndef TESTS_NODE_HTTP_CLIENT_H
#define TESTS_NODE_HTTP_CLIENT_H

#include "base/buffer.h"

#include <jansson.h>

struct http_answer {
    int status; /* 0: no reply came, or not a whole one */
    char headers[4096];
    char *body; /* NUL-terminated, chunks put together; never NULL */
    size_t body_len;
};
void http_answer_release(struct http_answer *a);

/* Sends a request to serve_address's address; token and body may be NULL. Returns the socket, or −1. */
int client_open(const char *address, const char *method, const char *path, const char *token, const char *body);
/* Reads to the end and closes. */
void client_finish(int fd, struct http_answer *ret);
/* Waits until the bytes so far hold text, without taking them from the socket's reader: keeps them in *seen, which
 * client_finish_after takes over. False after 20 s or at the end. */
bool client_wait_for(int fd, const char *text, struct buffer *seen);
void client_finish_after(int fd, struct buffer *seen, struct http_answer *ret);

void client_ask(const char *address, const char *method, const char *path, const char *token, const char *body,
                struct http_answer *ret);

/* The texts of a stream's chunks put together; the last object with "consilium" (borrowed reference given to the
 * caller: json_decref) or NULL; whether "[DONE]" came last. */
char *client_stream_text(const char *body, json_t **ret_end, bool *ret_done);

#endif
