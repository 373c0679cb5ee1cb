#include "protocol/transport/rpc.h"

#include <errno.h>
#include <nanomsg/nn.h>
#include <nanomsg/reqrep.h>
#include <poll.h>

#include "protocol/transport/rpc_sessions.h"
#include "protocol/transport/rpc_wire.h"
#include "base/log.h"
#include "base/reader.h"

#define MESSAGES_PER_POLL 256
#define HOUSEKEEPING_MS 100

struct rpc_server {
    char *url;
    int socket;
    int fd;
    struct tls_context *context;
    struct sessions sessions;
    uint32_t chunk_bytes;
    int64_t idle_ms;
    int64_t next_housekeeping;
    int64_t next_log;
    uint64_t next_token;
    struct session *current; /* whose request the handler is working on; NULL outside, or when it was ended meanwhile */
    const struct clock *clock;
    rpc_handler *handle;
    void *handle_ctx;
    struct buffer plain;
    struct buffer out;
    struct buffer records;
    struct buffer body;
    struct rpc_server_stats stats;
};

static const struct log_context log_transport = {.component = "transport"};

static int bind_socket(struct rpc_server *s, struct error *err)
{
    s->socket = nn_socket(AF_SP_RAW, NN_REP);
    if (s->socket < 0)
        return error_set(err, ERR_RESOURCES, "no nanomsg socket: %s", nn_strerror(nn_errno()));
    int rc = wire_socket_options(s->socket, s->url, (size_t)s->chunk_bytes + WIRE_MESSAGE_SLACK, err);
    if (rc < 0)
        return rc;
    if (nn_bind(s->socket, s->url) < 0)
        return error_set(err, ERR_CONNECT, "cannot listen on %s: %s%s", s->url, nn_strerror(nn_errno()),
                         nn_errno() == EADDRINUSE ? "; another program (or another aggregator) holds the port" : "");
    size_t size = sizeof s->fd;
    if (nn_getsockopt(s->socket, NN_SOL_SOCKET, NN_RCVFD, &s->fd, &size) < 0)
        return error_set(err, ERR_RESOURCES, "nanomsg descriptor: %s", nn_strerror(nn_errno()));
    return 0;
}

int rpc_server_new(struct rpc_server **ret, const struct rpc_server_config *config, struct error *err)
{
    assert(config->clock != NULL && config->handle != NULL);
    if (config->url == NULL || strncmp(config->url, "tcp://", 6) != 0 || strlen(config->url) > 120)
        return error_set(err, ERR_CONFIG, "listen address '%.120s': expected tcp://address:port",
                         config->url != NULL ? config->url : "");
    if (config->chunk_bytes > WIRE_CHUNK_BYTES_MAX)
        return error_set(err, ERR_CONFIG, "chunks of %u bytes: at most %u", config->chunk_bytes, WIRE_CHUNK_BYTES_MAX);
    struct rpc_server *s = calloc(1, sizeof *s);
    if (s == NULL)
        return error_set(err, ERR_RESOURCES, "no memory for a server");
    s->socket = -1;
    s->chunk_bytes = config->chunk_bytes != 0 ? config->chunk_bytes : RPC_CHUNK_BYTES_DEFAULT;
    s->idle_ms = config->idle_ms != 0 ? config->idle_ms : 600000;
    s->clock = config->clock;
    s->handle = config->handle;
    s->handle_ctx = config->handle_ctx;
    s->sessions.authenticated_max = config->sessions_max != 0 ? config->sessions_max : 4096;
    s->sessions.per_site_max = config->sessions_per_site_max != 0 ? config->sessions_per_site_max : 4;
    s->sessions.unauthenticated_max = config->unauthenticated_max != 0 ? config->unauthenticated_max : 256;
    size_t message_max = (size_t)s->chunk_bytes + WIRE_MESSAGE_SLACK;
    buffer_init(&s->plain, message_max);
    buffer_init(&s->out, message_max);
    buffer_init(&s->records, message_max);
    buffer_init(&s->body, (size_t)s->chunk_bytes + WIRE_BODY_SLACK);
    s->url = strdup(config->url);
    struct tls_config tls = config->tls;
    if (tls.clock == NULL)
        tls.clock = config->clock;
    int rc = s->url != NULL ? tls_context_new(&s->context, &tls, TLS_SERVER, err)
                            : error_set(err, ERR_RESOURCES, "no memory for a server");
    if (rc == 0)
        rc = bind_socket(s, err);
    if (rc < 0) {
        rpc_server_free(s);
        return rc;
    }
    *ret = s;
    return 0;
}

void rpc_server_free(struct rpc_server *s)
{
    if (s == NULL)
        return;
    sessions_release(&s->sessions);
    if (s->socket >= 0)
        nn_close(s->socket);
    tls_context_free(s->context);
    buffer_wipe_release(&s->plain);
    buffer_release(&s->out);
    buffer_release(&s->records);
    buffer_wipe_release(&s->body);
    free(s->url);
    free(s);
}

static void session_end(struct rpc_server *s, struct session *session)
{
    if (s->current == session)
        s->current = NULL;
    sessions_remove(&s->sessions, session);
}

/* Sends one message to where a request came from. A peer that has gone is dropped silently by nanomsg. */
static void send_to(struct rpc_server *s, const struct route *route, uint8_t kind, const uint8_t id[WIRE_ID_BYTES],
                    struct span records, struct rpc_counters *counters)
{
    _Alignas(struct nn_cmsghdr) uint8_t control[NN_CMSG_SPACE(ROUTE_BYTES_MAX + sizeof(size_t))] = {0};
    size_t header_len = route->len;
    struct nn_cmsghdr *head = (struct nn_cmsghdr *)control;
    head->cmsg_level = PROTO_SP;
    head->cmsg_type = SP_HDR;
    head->cmsg_len = NN_CMSG_LEN(header_len + sizeof(size_t));
    memcpy(NN_CMSG_DATA(head), &header_len, sizeof header_len);
    memcpy(NN_CMSG_DATA(head) + sizeof header_len, route->bytes, header_len);

    wire_header(&s->out, kind, id);
    buffer_append(&s->out, records.ptr, records.len);
    if (!buffer_ok(&s->out))
        return;
    struct nn_iovec iov = {s->out.data, s->out.len};
    struct nn_msghdr message = {.msg_iov = &iov,
                                .msg_iovlen = 1,
                                .msg_control = control,
                                .msg_controllen = NN_CMSG_SPACE(header_len + sizeof(size_t))};
    int sent;
    do
        sent = nn_sendmsg(s->socket, &message, NN_DONTWAIT);
    while (sent < 0 && nn_errno() == EINTR);
    if (sent >= 0 && counters != NULL)
        counters->bytes_sent += s->out.len;
}

static int send_status(struct rpc_server *s, struct session *session, uint16_t status, struct span body,
                       struct error *err)
{
    const uint8_t head[2] = {(uint8_t)status, (uint8_t)(status >> 8)};
    const struct span parts[] = {span_of(head, sizeof head), body};
    buffer_clear(&s->records);
    int rc = tls_session_seal(session->tls, parts, ARRAY_LEN(parts), &s->records, err);
    if (rc < 0)
        return rc;
    send_to(s, &session->route, session->greeted ? WIRE_DATA : WIRE_HANDSHAKE, session->id, buffer_span(&s->records),
            session->counters);
    return 0;
}

/* An operator needs to see why a site is refused; a flood of strangers must not fill the disk. */
static void note_refusal(struct rpc_server *s, const struct error *why)
{
    int64_t now = clock_monotonic_ms(s->clock);
    s->stats.refused_handshakes++;
    if (now < s->next_log)
        return;
    s->next_log = now + 1000;
    log_warn(&log_transport, "handshake refused: %s", why->message);
}

static bool read_hello(struct rpc_server *s, struct session *session, struct span plain)
{
    struct reader r = reader_of(plain);
    uint16_t method = reader_u16(&r);
    uint16_t version = reader_u16(&r);
    uint32_t chunk = reader_u32(&r);
    if (!reader_done(&r) || method != WIRE_METHOD_HELLO || version != WIRE_VERSION || chunk < 1024)
        return false;
    session->agreed_bytes = chunk < s->chunk_bytes ? chunk : s->chunk_bytes;
    return true;
}

static void on_handshake(struct rpc_server *s, struct session *session, const struct wire_message *wire,
                         const struct route *route)
{
    struct error err = {0};
    struct error why = {0};
    if (wire->records.len > WIRE_HANDSHAKE_BYTES_MAX) {
        s->stats.bad_messages++;
        return;
    }
    if (session == NULL) {
        session = sessions_add(&s->sessions, wire->id, route, clock_monotonic_ms(s->clock));
        if (session == NULL || tls_session_new(&session->tls, s->context, &err) < 0) {
            if (session != NULL)
                session_end(s, session);
            send_to(s, route, WIRE_BUSY, wire->id, span_of(NULL, 0), NULL);
            return;
        }
    }
    session->route = *route;
    buffer_clear(&s->plain);
    buffer_clear(&s->records);
    int rc = ++session->steps > 4 ? error_set(&why, ERR_CONNECT, "a handshake in too many steps")
                                  : tls_session_feed(session->tls, wire->records, &s->plain, &s->records, &why);
    if (rc == 0 && tls_session_established(session->tls) && s->plain.len > 0) {
        if (!read_hello(s, session, buffer_span(&s->plain)))
            rc = error_set(&why, ERR_CONNECT, "a peer of another protocol version");
        else if (!sessions_authenticate(&s->sessions, session, tls_session_peer(session->tls)))
            rc = error_set(&why, ERR_RESOURCES, "more than %u sessions", s->sessions.authenticated_max);
    }
    if (rc < 0) {
        note_refusal(s, &why);
        send_to(s, route, rc == ERR_RESOURCES ? WIRE_BUSY : WIRE_HANDSHAKE, wire->id, buffer_span(&s->records), NULL);
        session_end(s, session);
        return;
    }
    if (session->counters == NULL) {
        send_to(s, route, WIRE_HANDSHAKE, wire->id, buffer_span(&s->records), NULL);
        return;
    }
    struct buffer greeting;
    buffer_init(&greeting, 4);
    buffer_u32(&greeting, s->chunk_bytes);
    rc = send_status(s, session, RPC_STATUS_OK, buffer_span(&greeting), &err);
    buffer_release(&greeting);
    session->greeted = true;
    if (rc < 0)
        session_end(s, session);
}

static void finish_request(struct rpc_server *s, struct rpc_reply *reply, int rc)
{
    struct session *session = s->current;
    struct error err = {0};
    if (session == NULL || (rc == 0 && reply->hold_token != 0))
        return;
    if (rc == 0 && !buffer_ok(&reply->body))
        rc = error_set(&reply->error, ERR_RESOURCES, "the answer is larger than %zu bytes", reply->body.max);
    if (rc == 0 && reply->body.len > (size_t)session->agreed_bytes + WIRE_BODY_SLACK)
        rc = error_set(&reply->error, ERR_RESOURCES, "the answer is larger than the site takes");
    if (rc < 0) {
        session->hold_token = 0;
        reply->error.message[sizeof reply->error.message - 1] = '\0';
        buffer_clear(&reply->body);
        buffer_u32(&reply->body, (uint32_t)rc);
        buffer_string(&reply->body, reply->error.message);
        reply->status = RPC_STATUS_ERROR;
    }
    session->busy = false;
    if (send_status(s, session, reply->status, buffer_span(&reply->body), &err) < 0)
        session_end(s, session);
}

static void on_data(struct rpc_server *s, struct session *session, const struct wire_message *wire,
                    const struct route *route)
{
    struct error why = {0};
    buffer_clear(&s->plain);
    buffer_clear(&s->records);
    /* A second request while one is held: the client gave up on the first, which ended its session by our rules. */
    if (session->busy || tls_session_feed(session->tls, wire->records, &s->plain, &s->records, &why) < 0 ||
        s->plain.len < 2) {
        s->stats.bad_messages++;
        session_end(s, session);
        send_to(s, route, WIRE_UNKNOWN_SESSION, wire->id, span_of(NULL, 0), NULL);
        return;
    }
    session->route = *route;
    session->busy = true;
    session->last_ms = clock_monotonic_ms(s->clock);
    s->stats.requests++;
    struct rpc_peer peer = {.site = session->site, .connection = session->connection};
    memcpy(peer.certificate_sha256, tls_session_peer(session->tls)->certificate_sha256, TLS_HASH_BYTES);
    char site[TLS_ID_SIZE]; /* a copy: the handler may end this very session */
    snprintf(site, sizeof site, "%s", session->site);
    peer.site = site;
    uint16_t method = (uint16_t)(s->plain.data[0] | s->plain.data[1] << 8);
    struct rpc_reply reply = {.status = RPC_STATUS_OK, .body = s->body, .server = s};
    buffer_clear(&reply.body);
    s->current = session;
    int rc = s->handle(s->handle_ctx, &peer, method, span_of(s->plain.data + 2, s->plain.len - 2), &reply);
    finish_request(s, &reply, rc);
    s->current = NULL;
    s->body = reply.body;
}

static void on_message(struct rpc_server *s, struct span message, const struct route *route)
{
    struct wire_message wire;
    if (!wire_parse(message, &wire) || (wire.kind != WIRE_HANDSHAKE && wire.kind != WIRE_DATA)) {
        s->stats.bad_messages++;
        return;
    }
    struct session *session = sessions_find(&s->sessions, wire.id);
    bool other_pipe = session != NULL && memcmp(session->route.bytes, route->bytes, ROUTE_PIPE_BYTES) != 0;
    bool wrong_phase = session != NULL ? session->greeted != (wire.kind == WIRE_DATA) : wire.kind == WIRE_DATA;
    if (other_pipe || wrong_phase) {
        send_to(s, route, WIRE_UNKNOWN_SESSION, wire.id, span_of(NULL, 0), NULL);
        return;
    }
    if (session != NULL && session->counters != NULL)
        session->counters->bytes_received += message.len;
    if (wire.kind == WIRE_HANDSHAKE)
        on_handshake(s, session, &wire, route);
    else
        on_data(s, session, &wire, route);
}

static bool read_route(struct nn_msghdr *message, struct route *ret)
{
    struct nn_cmsghdr *head = NN_CMSG_FIRSTHDR(message);
    while (head != NULL && (head->cmsg_level != PROTO_SP || head->cmsg_type != SP_HDR))
        head = NN_CMSG_NXTHDR(message, head);
    if (head == NULL)
        return false;
    size_t len;
    memcpy(&len, NN_CMSG_DATA(head), sizeof len);
    if (len < ROUTE_PIPE_BYTES || len > ROUTE_BYTES_MAX)
        return false;
    ret->len = len;
    memcpy(ret->bytes, NN_CMSG_DATA(head) + sizeof len, len);
    return true;
}

/* true: a message was taken from the socket. */
static bool receive_one(struct rpc_server *s)
{
    void *payload = NULL;
    void *control = NULL;
    struct nn_iovec iov = {&payload, NN_MSG};
    struct nn_msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = NN_MSG};
    int len = nn_recvmsg(s->socket, &message, NN_DONTWAIT);
    if (len < 0)
        return nn_errno() == EINTR;
    struct route route;
    if (read_route(&message, &route))
        on_message(s, span_of(payload, (size_t)len), &route);
    else
        s->stats.bad_messages++;
    nn_freemsg(payload);
    nn_freemsg(control);
    return true;
}

static void housekeeping(struct rpc_server *s)
{
    int64_t now = clock_monotonic_ms(s->clock);
    struct error err;
    if (now < s->next_housekeeping)
        return;
    s->next_housekeeping = now + HOUSEKEEPING_MS;
    for (struct session *next, *session = s->sessions.newest; session != NULL; session = next) {
        next = session->older;
        if (session->hold_token != 0) {
            if (now >= session->hold_until)
                (void)!rpc_server_reply(s, session->hold_token, RPC_STATUS_NOTHING_YET, span_of(NULL, 0), &err);
        } else if (now - session->last_ms > (session->greeted ? s->idle_ms : UNAUTHENTICATED_MS_MAX)) {
            session_end(s, session);
        }
    }
}

int rpc_server_poll(struct rpc_server *s, int timeout_ms, struct error *err)
{
    struct pollfd fd = {.fd = s->fd, .events = POLLIN};
    int wait = timeout_ms < HOUSEKEEPING_MS || s->sessions.newest == NULL ? timeout_ms : HOUSEKEEPING_MS;
    int64_t until = clock_monotonic_ms(s->clock) + timeout_ms;
    for (;;) {
        int ready = poll(&fd, 1, wait);
        if (ready < 0 && errno != EINTR)
            return error_set(err, ERR_RESOURCES, "waiting on %s: %s", s->url, strerror(errno));
        for (int i = 0; ready > 0 && i < MESSAGES_PER_POLL && receive_one(s); i++)
            ;
        housekeeping(s);
        int64_t left = until - clock_monotonic_ms(s->clock);
        if (ready != 0 || left <= 0)
            return 0;
        wait = left < wait ? (int)left : wait;
    }
}

int rpc_server_fd(const struct rpc_server *s)
{
    return s->fd;
}

uint64_t rpc_reply_hold(struct rpc_reply *reply)
{
    struct rpc_server *s = reply->server;
    assert(reply->hold_token == 0);
    reply->hold_token = ++s->next_token;
    if (s->current != NULL) {
        s->current->hold_token = reply->hold_token;
        s->current->hold_until = clock_monotonic_ms(s->clock) + RPC_HOLD_MS_MAX;
    }
    return reply->hold_token;
}

int rpc_server_reply(struct rpc_server *s, uint64_t token, uint16_t status, struct span body, struct error *err)
{
    struct session *session = s->sessions.newest;
    while (session != NULL && session->hold_token != token)
        session = session->older;
    if (token == 0 || session == NULL)
        return error_set(err, ERR_NOT_FOUND, "the held request has expired or its site has gone");
    if (body.len > (size_t)session->agreed_bytes + WIRE_BODY_SLACK)
        return error_set(err, ERR_RESOURCES, "an answer of %zu bytes, the site takes at most %zu", body.len,
                         (size_t)session->agreed_bytes + WIRE_BODY_SLACK);
    session->hold_token = 0;
    session->busy = false;
    session->last_ms = clock_monotonic_ms(s->clock);
    int rc = send_status(s, session, status, body, err);
    if (rc < 0)
        session_end(s, session);
    return rc;
}

int rpc_server_reload(struct rpc_server *s, const struct tls_config *config, struct error *err)
{
    struct tls_config tls = *config;
    struct tls_context *fresh = NULL;
    if (tls.clock == NULL)
        tls.clock = s->clock;
    int rc = tls_context_new(&fresh, &tls, TLS_SERVER, err);
    if (rc < 0)
        return rc;
    while (s->sessions.newest != NULL)
        session_end(s, s->sessions.newest);
    tls_context_free(s->context);
    s->context = fresh;
    return 0;
}

void rpc_server_drop_site(struct rpc_server *s, const char *site)
{
    for (struct session *next, *session = s->sessions.newest; session != NULL; session = next) {
        next = session->older;
        if (strcmp(session->site, site) == 0)
            session_end(s, session);
    }
}

struct rpc_server_stats rpc_server_stats(const struct rpc_server *s)
{
    struct rpc_server_stats stats = s->stats;
    stats.sessions = s->sessions.authenticated;
    stats.unauthenticated = s->sessions.unauthenticated;
    for (const struct session *session = s->sessions.newest; session != NULL; session = session->older)
        stats.held += session->hold_token != 0;
    return stats;
}

struct rpc_counters rpc_server_site_counters(const struct rpc_server *s, const char *site)
{
    return sessions_site_counters(&s->sessions, site);
}

size_t rpc_server_body_bytes_max(const struct rpc_server *s)
{
    return (size_t)s->chunk_bytes + WIRE_BODY_SLACK;
}
