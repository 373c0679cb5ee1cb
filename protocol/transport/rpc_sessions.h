/*
 * The server's table of TLS sessions: found by id, bounded in three ways (authenticated, per site, handshakes under
 * way), with the byte counters of each site, which outlive its sessions. Private to rpc_server.c; not thread-safe.
 */
#ifndef PROTOCOL_TRANSPORT_RPC_SESSIONS_H
#define PROTOCOL_TRANSPORT_RPC_SESSIONS_H

#include "protocol/transport/rpc_wire.h"

#define ROUTE_BYTES_MAX 64
#define ROUTE_PIPE_BYTES 4 /* the key of the connection, put first by nanomsg's raw REP */
#define SESSION_BUCKETS 1024
#define UNAUTHENTICATED_MS_MAX 30000

/* nanomsg's header of a request: where the answer has to go. */
struct route {
    uint8_t bytes[ROUTE_BYTES_MAX];
    size_t len;
};

struct session {
    uint8_t id[WIRE_ID_BYTES];
    struct route route; /* of the latest request */
    struct tls_session *tls;
    char site[TLS_ID_SIZE];        /* "" until authenticated */
    struct rpc_counters *counters; /* of the site; NULL until authenticated */
    uint64_t connection;
    uint32_t agreed_bytes;
    unsigned steps; /* handshake messages seen */
    bool greeted;
    bool busy; /* a request is being worked on or held */
    uint64_t hold_token;
    int64_t hold_until;
    int64_t last_ms;
    struct session *newer, *older; /* all sessions, by the time they began */
    struct session *bucket_next;
};

struct site_counters {
    char site[TLS_ID_SIZE];
    struct rpc_counters counters;
    struct site_counters *next;
};

/* Zeroed, then the limits set, is an empty table. */
struct sessions {
    struct session *buckets[SESSION_BUCKETS];
    struct session *newest, *oldest;
    struct site_counters *sites;
    uint32_t authenticated, authenticated_max;
    uint32_t unauthenticated, unauthenticated_max;
    uint32_t per_site_max;
    uint64_t next_connection;
};

void sessions_release(struct sessions *t);
struct session *sessions_find(struct sessions *t, const uint8_t id[WIRE_ID_BYTES]);
/* An unauthenticated one without TLS; the oldest of that kind gives way when there are too many. NULL: no memory. */
struct session *sessions_add(struct sessions *t, const uint8_t id[WIRE_ID_BYTES], const struct route *route,
                             int64_t now);
void sessions_remove(struct sessions *t, struct session *session);
/* Names the session; ends the site's oldest one when it has too many. false: the table is full, or no memory. */
bool sessions_authenticate(struct sessions *t, struct session *session, const struct tls_peer *peer);
struct rpc_counters sessions_site_counters(const struct sessions *t, const char *site);

#endif
