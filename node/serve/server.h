/*
 * The local endpoint of a site, in OpenAI's form: applications on this machine ask, the newest adapter answers.
 *
 *     POST /v1/chat/completions   whole or as server-sent events ("stream": true)
 *     GET  /v1/models             the base model, and the adapter in use
 *     GET  /healthz               open; 503 when the answering thread has made no progress for stall_ms
 *
 * Every answer says what computed it: {"consilium": {"job", "adapter_version", "adapter_sha256"}}, version 0 and null
 * for the base model. A new adapter is put into the slot at any time; no request is dropped for it, and each is
 * answered by one adapter from its first to its last token.
 *
 * Requests wait in a bounded queue (429 beyond it) for one answering thread with its own compute threads; whoever hangs
 * up is not computed for any more, nor is a client that stops reading its stream for client_wait_ms. Neither questions
 * nor answers are logged or journaled: only their sizes, times and the adapter.
 *
 * Listens on serve.listen: a Unix socket (mode 0660: this user and its group), or loopback TCP, which needs
 * serve.token_file. serve_start and serve_stop: one thread.
 *
 *     struct serve_options o = {.site = &site, .slot = &slot, .config = config, .journal = journal,
 *                               .rng = &random_system, .clock = &clock_system};
 *     if (serve_start(&serve, &o, err) < 0) ...
 *     slot_put(&slot, adapter);
 *     serve_stop(serve);
 */
#ifndef NODE_SERVE_SERVER_H
#define NODE_SERVE_SERVER_H

#include "node/serve/answer.h"
#include "runtime/journal.h"

#define SERVE_QUEUE_DEFAULT 32
#define SERVE_STALL_MS_DEFAULT 60000
#define SERVE_CLIENT_WAIT_MS_DEFAULT 20000

struct serve_options {
    const struct site *site;
    struct slot *slot;
    const struct config *config; /* serve.* */
    struct journal *journal;     /* may be NULL */
    const struct rng *rng;
    const struct clock *clock;
    unsigned queue_max;     /* requests that wait; 0: SERVE_QUEUE_DEFAULT */
    int64_t stall_ms;       /* 0: SERVE_STALL_MS_DEFAULT */
    int64_t client_wait_ms; /* for a client to read on; 0: SERVE_CLIENT_WAIT_MS_DEFAULT */
};

struct serve;

/* What the options point to must outlive it; options itself need not. ERR_CONFIG: serve.listen unset or malformed, TCP
 * without a token file; ERR_CONNECT: the address is taken; ERR_RESOURCES. */
int MUST_USE serve_start(struct serve **ret_serve, const struct serve_options *options, struct error *err);
/* "unix:/path" or "http://127.0.0.1:41234", with the real port. */
const char *serve_address(const struct serve *serve);
/* Takes no more requests; the answer under way ends at its next token, those that wait get 503. Accepts NULL. */
void serve_stop(struct serve *serve);

#endif
