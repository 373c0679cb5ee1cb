/*
 * Requests and replies between nodes (clients) and the aggregator (server): TLS 1.3 inside nanomsg messages.
 *
 * A request is {u16 method, body}, a reply {u16 status, body}. The node's socket is a REQ, the aggregator's one raw
 * REP, so the server may hold a reply (long poll) and answer others meanwhile. One request of a client is outstanding
 * at a time. Nodes only make outbound connections to one port.
 *
 * Retry rule: a call that failed with ERR_TIMEOUT or ERR_CONNECT may have been executed. The client never sends it
 * again by itself, except when the server said that it did not know the session and the connection had not broken, so
 * that nothing can have run. The caller repeats it, with rpc_backoff_ms between attempts: methods must be idempotent.
 *
 * Bounds: a message holds chunk_bytes + 64 KiB, a body chunk_bytes + 32 KiB; more is refused before sending. Both sides
 * exchange their limit in the session's first message and the smaller one holds.
 *
 * Thread rule: a client belongs to one thread, and so does a server; make one client a thread. Sockets do not survive
 * fork(): create them after it.
 *
 * Wire (inside one nanomsg message): u8 version = 1, u8 kind, u8[16] session id, TLS records. Kinds: 1 handshake,
 * 2 data, 3 (reply only) the session is unknown, handshake again, 4 (reply only) refused: server full. A session is
 * bound to the connection it began on.
 *
 * A node:
 *
 *     struct rpc_client_config config = {.url = "tcp://agg.example.org:7443", .tls = {...}, .clock = &clock_system,
 *                                        .rng = rng};
 *     struct rpc_client *client;
 *     if (rpc_client_new(&client, &config, &err) < 0) ...
 *     struct buffer reply;
 *     buffer_init(&reply, rpc_client_body_bytes_max(client));
 *     if (rpc_call_ok(client, METHOD_STATUS, buffer_span(&request), &reply, 30000, &err) < 0) ...
 *
 * The aggregator:
 *
 *     static int handle(void *ctx, const struct rpc_peer *peer, uint16_t method, struct span body,
 *                       struct rpc_reply *reply)
 *     {
 *         if (method == METHOD_WAIT && !ready)
 *             return remember(ctx, peer, rpc_reply_hold(reply)); // later: rpc_server_reply(server, token, 0, span)
 *         buffer_u32(&reply->body, 7);
 *         return 0;
 *     }
 *     ...
 *     while (!stop)
 *         if (rpc_server_poll(server, 200, &err) < 0) ...
 */
#ifndef PROTOCOL_TRANSPORT_RPC_H
#define PROTOCOL_TRANSPORT_RPC_H

#include "base/rng.h"
#include "protocol/transport/tls.h"

#define RPC_CHUNK_BYTES_DEFAULT (4u << 20)
#define RPC_HOLD_MS_MAX 25000

/* Statuses. 0 to 0xfeff belong to the daemons; the transport and its helpers use these. */
enum {
    RPC_STATUS_OK = 0,
    RPC_STATUS_ERROR = 0xff00,       /* body: i32 ERR_ code as u32, then the message as a string */
    RPC_STATUS_NOTHING_YET = 0xff01, /* a held reply reached RPC_HOLD_MS_MAX: poll again */
};

/* ---- client ---- */

struct rpc_client_config {
    const char *url;       /* "tcp://host:port"; IPv4 and names with an IPv4 address, or "tcp://[IPv6 literal]:port" */
    struct tls_config tls; /* strings borrowed for the duration of rpc_client_new only */
    uint32_t chunk_bytes;  /* 0: RPC_CHUNK_BYTES_DEFAULT */
    const struct clock *clock;
    const struct rng *rng;
    bool (*cancelled)(void *ctx); /* asked about every 200 ms while waiting; NULL: never. A cancelled call: ERR_AGAIN */
    void *cancelled_ctx;
};

struct rpc_counters {
    uint64_t bytes_sent; /* payload of nanomsg messages, TLS included */
    uint64_t bytes_received;
};

struct rpc_client;

/* Opens no connection yet. ERR_CONFIG: url or TLS files. The clock and rng must outlive the client. */
int MUST_USE rpc_client_new(struct rpc_client **ret, const struct rpc_client_config *config, struct error *err);
void rpc_client_free(struct rpc_client *client);

/*
 * One request and its reply, whose body is appended to the cleared `reply`. Connects and handshakes when there is no
 * session. timeout_ms covers all of it; for a long poll give RPC_HOLD_MS_MAX + 10000.
 * ERR_CONNECT: refused, unreachable, connection lost, a certificate not accepted (whose, and why). ERR_TIMEOUT.
 * ERR_RESOURCES: request or reply larger than the bound. ERR_AGAIN: cancelled. After each of them but ERR_RESOURCES the
 * connection is thrown away and the next call starts afresh.
 */
int MUST_USE rpc_call(struct rpc_client *client, uint16_t method, struct span request, struct buffer *reply,
                      uint16_t *ret_status, int timeout_ms, struct error *err);

/* As rpc_call, but a status other than OK is an error as well (see rpc_status_error). */
int MUST_USE rpc_call_ok(struct rpc_client *client, uint16_t method, struct span request, struct buffer *reply,
                         int timeout_ms, struct error *err);

/* 0 for OK; ERR_AGAIN for NOTHING_YET; the server's code and message for ERROR; ERR_FAILED for any other status. */
int MUST_USE rpc_status_error(uint16_t status, struct span body, struct error *err);

/* Ends the session, so that the next call handshakes again (once a round; or after the own certificate changed). */
void rpc_client_reset(struct rpc_client *client);

size_t rpc_client_body_bytes_max(const struct rpc_client *client);
struct rpc_counters rpc_client_counters(const struct rpc_client *client);
/* SHA-256 of the aggregator's certificate in the current session; ERR_AGAIN without one. */
int MUST_USE rpc_client_server_certificate(const struct rpc_client *client, uint8_t ret_sha256[TLS_HASH_BYTES]);

/* Milliseconds to wait before attempt 1, 2, ...: base·2^(attempt−1) up to max, of which a random half is kept. */
int64_t rpc_backoff_ms(const struct rng *rng, unsigned attempt, int64_t base_ms, int64_t max_ms);

/* What transfer.h needs of a transport: so another one can be put in its place, or none in a test. */
struct rpc_channel {
    int (*call)(void *ctx, uint16_t method, struct span request, struct buffer *reply, uint16_t *ret_status,
                int timeout_ms, struct error *err);
    void *ctx;
    size_t body_bytes_max;
};
struct rpc_channel rpc_client_channel(struct rpc_client *client);

/* ---- server ---- */

struct rpc_server;

struct rpc_peer {
    const char *site; /* from the certificate; valid during the handler only */
    uint8_t certificate_sha256[TLS_HASH_BYTES];
    uint64_t connection; /* changes with each session, never reused */
};

struct rpc_reply {
    uint16_t status;     /* RPC_STATUS_OK on entry */
    struct buffer body;  /* empty on entry, bounded; owned by the server */
    struct error error;  /* a handler that returns negative fills this in: it is sent to the peer */
    uint64_t hold_token; /* 0: answered on return; set by rpc_reply_hold only */
    struct rpc_server *server;
};

/*
 * Called within rpc_server_poll. `body` is valid during the call. 0: reply->status and body are sent, unless held.
 * Negative: RPC_STATUS_ERROR with that code and reply->error.message. It may call rpc_server_reply for held requests.
 */
typedef int rpc_handler(void *ctx, const struct rpc_peer *peer, uint16_t method, struct span body,
                        struct rpc_reply *reply);

struct rpc_server_config {
    const char *url;                /* "tcp://0.0.0.0:7443" or "tcp://127.0.0.1:7443"; port 0 is not possible */
    struct tls_config tls;          /* strings borrowed for the duration of rpc_server_new only */
    uint32_t chunk_bytes;           /* 0: RPC_CHUNK_BYTES_DEFAULT */
    uint32_t sessions_max;          /* 0: 4096, authenticated ones */
    uint32_t sessions_per_site_max; /* 0: 4; a fifth session ends the site's oldest */
    uint32_t unauthenticated_max;   /* 0: 256 handshakes under way; the oldest gives way */
    int64_t idle_ms;                /* 0: 10 minutes; a session without a request for so long ends */
    const struct clock *clock;
    rpc_handler *handle;
    void *handle_ctx;
};

struct rpc_server_stats {
    uint32_t sessions;
    uint32_t unauthenticated;
    uint32_t held;
    uint64_t requests;
    uint64_t refused_handshakes;
    uint64_t bad_messages;
};

/* ERR_CONNECT when the address cannot be bound (names it); ERR_CONFIG for the files. */
int MUST_USE rpc_server_new(struct rpc_server **ret, const struct rpc_server_config *config, struct error *err);
void rpc_server_free(struct rpc_server *server); /* held replies are dropped; clients see a lost connection */

/*
 * Waits up to timeout_ms for messages, serves those that are there (at most 256, so that a loop around it stays live),
 * expires holds and idle sessions. A signal ends the wait early. Misbehaving peers are no error of the server.
 */
int MUST_USE rpc_server_poll(struct rpc_server *server, int timeout_ms, struct error *err);
/* Readable when rpc_server_poll(server, 0) has work: to wait for several things in one poll(2). */
int rpc_server_fd(const struct rpc_server *server);

/* From a handler: keep this request open. The token is never 0 and never reused. */
uint64_t rpc_reply_hold(struct rpc_reply *reply);
/* Answers a held request. ERR_NOT_FOUND when it has expired or its session is gone: nothing to do then. */
int MUST_USE rpc_server_reply(struct rpc_server *server, uint64_t token, uint16_t status, struct span body,
                              struct error *err);

/* Reads the TLS files anew (a new revocation list) and ends every session, so that all peers are judged again. */
int MUST_USE rpc_server_reload(struct rpc_server *server, const struct tls_config *tls, struct error *err);
/* Ends the sessions of a site, e.g. when it was removed from the roster. */
void rpc_server_drop_site(struct rpc_server *server, const char *site);

struct rpc_server_stats rpc_server_stats(const struct rpc_server *server);
/* Bytes received from and sent to a site since the server began; zeros for one never seen. */
struct rpc_counters rpc_server_site_counters(const struct rpc_server *server, const char *site);
size_t rpc_server_body_bytes_max(const struct rpc_server *server);

#endif
