#include "protocol/transport/rpc.h"

#include <errno.h>
#include <limits.h>
#include <nanomsg/nn.h>
#include <nanomsg/reqrep.h>

#include "protocol/transport/rpc_wire.h"
#include "base/reader.h"

#define SLICE_MS 200         /* how often a wait looks at cancellation and at the connection */
#define CONNECT_MS_MAX 10000 /* of a call's time, for the TCP connection */
#define HANDSHAKE_STEPS_MAX 6

struct rpc_client {
    char *url;
    struct tls_context *context;
    struct tls_session *session; /* NULL: none */
    uint8_t id[WIRE_ID_BYTES];
    bool greeted; /* the server's first decrypted message has arrived: it has accepted us */
    int socket;
    int endpoint;           /* of nn_connect; −1: not connected */
    uint64_t broken_before; /* connections lost up to the start of this connection */
    uint32_t chunk_bytes;   /* own limit */
    uint32_t agreed_bytes;  /* the smaller of both limits, once greeted */
    struct buffer out;
    struct buffer plain;
    struct rpc_counters counters;
    const struct clock *clock;
    const struct rng *rng;
    bool (*cancelled)(void *ctx);
    void *cancelled_ctx;
};

static int socket_open(struct rpc_client *c, struct error *err)
{
    c->socket = nn_socket(AF_SP, NN_REQ);
    if (c->socket < 0)
        return error_set(err, ERR_RESOURCES, "no nanomsg socket: %s", nn_strerror(nn_errno()));
    /* A repeated request would repeat TLS records and kill the session: never resend by itself. */
    int never = INT_MAX;
    if (nn_setsockopt(c->socket, NN_REQ, NN_REQ_RESEND_IVL, &never, sizeof never) < 0)
        return error_set(err, ERR_RESOURCES, "nanomsg resend interval: %s", nn_strerror(nn_errno()));
    return wire_socket_options(c->socket, c->url, (size_t)c->chunk_bytes + WIRE_MESSAGE_SLACK, err);
}

int rpc_client_new(struct rpc_client **ret, const struct rpc_client_config *config, struct error *err)
{
    assert(config->clock != NULL && config->rng != NULL);
    if (config->url == NULL || strncmp(config->url, "tcp://", 6) != 0 || strlen(config->url) > 120)
        return error_set(err, ERR_CONFIG, "aggregator address '%.120s': expected tcp://host:port",
                         config->url != NULL ? config->url : "");
    if (config->chunk_bytes > WIRE_CHUNK_BYTES_MAX)
        return error_set(err, ERR_CONFIG, "chunks of %u bytes: at most %u", config->chunk_bytes, WIRE_CHUNK_BYTES_MAX);
    struct rpc_client *c = calloc(1, sizeof *c);
    if (c == NULL)
        return error_set(err, ERR_RESOURCES, "no memory for a client");
    c->socket = c->endpoint = -1;
    c->chunk_bytes = config->chunk_bytes != 0 ? config->chunk_bytes : RPC_CHUNK_BYTES_DEFAULT;
    c->clock = config->clock;
    c->rng = config->rng;
    c->cancelled = config->cancelled;
    c->cancelled_ctx = config->cancelled_ctx;
    buffer_init(&c->out, (size_t)c->chunk_bytes + WIRE_MESSAGE_SLACK);
    buffer_init(&c->plain, (size_t)c->chunk_bytes + WIRE_MESSAGE_SLACK);
    c->url = strdup(config->url);
    struct tls_config tls = config->tls;
    if (tls.clock == NULL)
        tls.clock = config->clock;
    int rc = c->url != NULL ? tls_context_new(&c->context, &tls, TLS_CLIENT, err)
                            : error_set(err, ERR_RESOURCES, "no memory for a client");
    if (rc == 0)
        rc = socket_open(c, err);
    if (rc < 0) {
        rpc_client_free(c);
        return rc;
    }
    *ret = c;
    return 0;
}

static void session_end(struct rpc_client *c)
{
    tls_session_free(c->session);
    c->session = NULL;
    c->greeted = false;
}

/* Throws the connection away: an answer that comes late can then never be taken for another request's. */
static void connection_end(struct rpc_client *c)
{
    session_end(c);
    if (c->endpoint >= 0)
        nn_shutdown(c->socket, c->endpoint);
    c->endpoint = -1;
}

void rpc_client_free(struct rpc_client *c)
{
    if (c == NULL)
        return;
    connection_end(c);
    if (c->socket >= 0)
        nn_close(c->socket);
    tls_context_free(c->context);
    buffer_release(&c->out);
    buffer_wipe_release(&c->plain);
    free(c->url);
    free(c);
}

void rpc_client_reset(struct rpc_client *c)
{
    session_end(c);
}

static uint64_t lost_connections(const struct rpc_client *c)
{
    return nn_get_statistic(c->socket, NN_STAT_BROKEN_CONNECTIONS) +
           nn_get_statistic(c->socket, NN_STAT_DROPPED_CONNECTIONS);
}

static bool connected(const struct rpc_client *c)
{
    return nn_get_statistic(c->socket, NN_STAT_CURRENT_CONNECTIONS) > 0;
}

static int check_cancelled(struct rpc_client *c, struct error *err)
{
    if (c->cancelled != NULL && c->cancelled(c->cancelled_ctx))
        return error_set(err, ERR_AGAIN, "the call to %s was cancelled", c->url);
    return 0;
}

/* nanomsg connects in the background and tells only its counters how that went. */
static int connection_begin(struct rpc_client *c, int64_t deadline, struct error *err)
{
    if (c->endpoint >= 0)
        return 0;
    uint64_t failures = nn_get_statistic(c->socket, NN_STAT_CONNECT_ERRORS);
    c->endpoint = nn_connect(c->socket, c->url);
    if (c->endpoint < 0)
        return error_set(err, ERR_CONNECT, "cannot connect to %s: %s", c->url, nn_strerror(nn_errno()));
    int64_t start = clock_monotonic_ms(c->clock);
    int64_t give_up = start + CONNECT_MS_MAX < deadline ? start + CONNECT_MS_MAX : deadline;
    for (int64_t wait = 1; !connected(c); wait = wait < 20 ? wait + 1 : 20) {
        if (nn_get_statistic(c->socket, NN_STAT_CONNECT_ERRORS) > failures)
            return error_set(err, ERR_CONNECT,
                             "cannot connect to %s: refused, unreachable or unknown host; is the aggregator running "
                             "and the port open?",
                             c->url);
        if (clock_monotonic_ms(c->clock) >= give_up)
            return error_set(err, ERR_CONNECT,
                             "cannot connect to %s: no answer after %lld ms; a firewall may drop the packets", c->url,
                             (long long)(give_up - start));
        int rc = check_cancelled(c, err);
        if (rc < 0)
            return rc;
        clock_sleep_ms(c->clock, wait);
    }
    c->broken_before = lost_connections(c);
    return 0;
}

static bool connection_broke(const struct rpc_client *c)
{
    return lost_connections(c) != c->broken_before || !connected(c);
}

static int wait_for_reply(struct rpc_client *c, int64_t deadline, void **ret_message, size_t *ret_len,
                          struct error *err)
{
    for (;;) {
        int64_t left = deadline - clock_monotonic_ms(c->clock);
        int slice = left < 1 ? 1 : left < SLICE_MS ? (int)left : SLICE_MS;
        if (nn_setsockopt(c->socket, NN_SOL_SOCKET, NN_RCVTIMEO, &slice, sizeof slice) < 0)
            return error_set(err, ERR_BUG, "nanomsg timeout: %s", nn_strerror(nn_errno()));
        void *message = NULL;
        int len = nn_recv(c->socket, &message, NN_MSG, 0);
        if (len >= 0) {
            *ret_message = message;
            *ret_len = (size_t)len;
            return 0;
        }
        int why = nn_errno();
        if (why != ETIMEDOUT && why != EAGAIN && why != EINTR)
            return error_set(err, ERR_CONNECT, "receiving from %s: %s", c->url, nn_strerror(why));
        int rc = check_cancelled(c, err);
        if (rc < 0)
            return rc;
        if (connection_broke(c))
            return error_set(err, ERR_CONNECT, "the connection to %s was lost while waiting for an answer", c->url);
        if (left <= 0)
            return error_set(err, ERR_TIMEOUT, "no answer from %s in time", c->url);
    }
}

/* Sends c->out, waits for the answer, and feeds it to the session: c->plain holds what it said. */
static int exchange(struct rpc_client *c, int64_t deadline, uint8_t *ret_kind, struct error *err)
{
    void *message = NULL;
    size_t len = 0;
    int timeout = 1000;
    (void)nn_setsockopt(c->socket, NN_SOL_SOCKET, NN_SNDTIMEO, &timeout, sizeof timeout);
    int sent;
    do
        sent = nn_send(c->socket, c->out.data, c->out.len, 0);
    while (sent < 0 && nn_errno() == EINTR);
    if (sent < 0)
        return error_set(err, ERR_CONNECT, "sending to %s: %s", c->url, nn_strerror(nn_errno()));
    c->counters.bytes_sent += c->out.len;
    int rc = wait_for_reply(c, deadline, &message, &len, err);
    if (rc < 0)
        return rc;
    c->counters.bytes_received += len;
    struct wire_message wire = {0};
    bool mine = wire_parse(span_of(message, len), &wire) && memcmp(wire.id, c->id, WIRE_ID_BYTES) == 0;
    if (!mine) {
        rc = error_set(err, ERR_CONNECT, "%s does not speak this protocol", c->url);
    } else if (wire.kind == WIRE_BUSY) {
        rc = error_set(err, ERR_CONNECT, "%s has too many sessions at the moment: try again later", c->url);
    } else if (wire.kind == WIRE_HANDSHAKE || wire.kind == WIRE_DATA) {
        buffer_clear(&c->plain);
        buffer_clear(&c->out);
        rc = tls_session_feed(c->session, wire.records, &c->plain, &c->out, err);
        if (rc < 0)
            error_prefix(err, "%s", c->url);
    }
    *ret_kind = wire.kind;
    nn_freemsg(message);
    return rc;
}

static int hello(struct rpc_client *c, struct buffer *records, struct error *err)
{
    uint8_t bytes[8];
    struct buffer b;
    buffer_init(&b, sizeof bytes);
    buffer_u16(&b, WIRE_METHOD_HELLO);
    buffer_u16(&b, WIRE_VERSION);
    buffer_u32(&b, c->chunk_bytes);
    struct span part = buffer_span(&b);
    int rc = buffer_ok(&b) ? tls_session_seal(c->session, &part, 1, records, err)
                           : error_set(err, ERR_RESOURCES, "no memory for a greeting");
    buffer_release(&b);
    return rc;
}

static int read_greeting(struct rpc_client *c, struct error *err)
{
    struct reader r = reader_of(buffer_span(&c->plain));
    uint16_t status = reader_u16(&r);
    uint32_t theirs = reader_u32(&r);
    if (!reader_done(&r) || status != RPC_STATUS_OK || theirs < 1024)
        return error_set(err, ERR_CONNECT, "%s does not speak version %d of this protocol", c->url, WIRE_VERSION);
    c->agreed_bytes = theirs < c->chunk_bytes ? theirs : c->chunk_bytes;
    c->greeted = true;
    return 0;
}

static int session_begin(struct rpc_client *c, int64_t deadline, struct error *err)
{
    struct buffer records;
    uint8_t kind = 0;
    session_end(c);
    rng_fill(c->rng, c->id, sizeof c->id);
    buffer_init(&records, WIRE_HANDSHAKE_BYTES_MAX);
    int rc = tls_session_new(&c->session, c->context, err);
    if (rc == 0) {
        buffer_clear(&c->plain);
        rc = tls_session_feed(c->session, span_of(NULL, 0), &c->plain, &records, err);
    }
    bool asked = false;
    for (int step = 0; rc == 0 && !c->greeted && step < HANDSHAKE_STEPS_MAX; step++) {
        wire_header(&c->out, WIRE_HANDSHAKE, c->id);
        buffer_append(&c->out, records.data, records.len);
        rc = exchange(c, deadline, &kind, err);
        if (rc < 0)
            break;
        if (kind != WIRE_HANDSHAKE) {
            rc = error_set(err, ERR_CONNECT, "%s broke the handshake off", c->url);
            break;
        }
        buffer_clear(&records);
        buffer_append(&records, c->out.data, c->out.len);
        if (asked && c->plain.len > 0) {
            rc = read_greeting(c, err);
        } else if (!asked && tls_session_established(c->session)) {
            rc = hello(c, &records, err);
            asked = true;
        }
    }
    if (rc == 0 && !c->greeted)
        rc = error_set(err, ERR_CONNECT, "%s never finished the handshake", c->url);
    buffer_release(&records);
    return rc;
}

/* One try. *ret_unknown: the server refused the session before reading the request, and nothing can have run. */
static int call_once(struct rpc_client *c, uint16_t method, struct span request, struct buffer *reply,
                     uint16_t *ret_status, int64_t deadline, bool *ret_unknown, struct error *err)
{
    *ret_unknown = false;
    int rc = connection_begin(c, deadline, err);
    if (rc == 0 && connection_broke(c)) {
        /* Lost since the last call: nanomsg reconnects by itself, but the session is bound to the old connection. */
        connection_end(c);
        rc = connection_begin(c, deadline, err);
    }
    if (rc == 0 && !c->greeted)
        rc = session_begin(c, deadline, err);
    if (rc < 0)
        return rc;
    if (request.len > (size_t)c->agreed_bytes + WIRE_BODY_SLACK)
        return error_set(err, ERR_RESOURCES, "a request of %zu bytes to %s, which takes at most %zu", request.len,
                         c->url, (size_t)c->agreed_bytes + WIRE_BODY_SLACK);
    const uint8_t head[2] = {(uint8_t)method, (uint8_t)(method >> 8)};
    const struct span parts[] = {span_of(head, sizeof head), request};
    wire_header(&c->out, WIRE_DATA, c->id);
    rc = tls_session_seal(c->session, parts, ARRAY_LEN(parts), &c->out, err);
    uint8_t kind = 0;
    if (rc == 0)
        rc = exchange(c, deadline, &kind, err);
    if (rc < 0)
        return rc;
    if (kind == WIRE_UNKNOWN_SESSION) {
        *ret_unknown = !connection_broke(c);
        return error_set(err, ERR_CONNECT, "%s has ended the session; the request may or may not have run", c->url);
    }
    if (kind != WIRE_DATA || c->plain.len < 2)
        return error_set(err, ERR_CONNECT, "%s sent a malformed answer", c->url);
    buffer_clear(reply);
    buffer_append(reply, c->plain.data + 2, c->plain.len - 2);
    if (!buffer_ok(reply)) {
        buffer_clear(reply);
        return error_set(err, ERR_RESOURCES, "%s answered with %zu bytes, more than the %zu allowed here", c->url,
                         c->plain.len - 2, reply->max);
    }
    *ret_status = (uint16_t)(c->plain.data[0] | c->plain.data[1] << 8);
    return 0;
}

int rpc_call(struct rpc_client *c, uint16_t method, struct span request, struct buffer *reply, uint16_t *ret_status,
             int timeout_ms, struct error *err)
{
    assert(method != WIRE_METHOD_HELLO);
    int64_t deadline = clock_monotonic_ms(c->clock) + timeout_ms;
    int rc = 0;
    for (int attempt = 0; attempt < 2; attempt++) {
        bool unknown = false;
        rc = call_once(c, method, request, reply, ret_status, deadline, &unknown, err);
        if (rc < 0 && rc != ERR_RESOURCES)
            connection_end(c);
        if (rc == 0 || !unknown)
            break;
    }
    return rc;
}

int rpc_call_ok(struct rpc_client *c, uint16_t method, struct span request, struct buffer *reply, int timeout_ms,
                struct error *err)
{
    uint16_t status = 0;
    int rc = rpc_call(c, method, request, reply, &status, timeout_ms, err);
    return rc < 0 ? rc : rpc_status_error(status, buffer_span(reply), err);
}

size_t rpc_client_body_bytes_max(const struct rpc_client *c)
{
    return (size_t)c->chunk_bytes + WIRE_BODY_SLACK;
}

struct rpc_counters rpc_client_counters(const struct rpc_client *c)
{
    return c->counters;
}

int rpc_client_server_certificate(const struct rpc_client *c, uint8_t ret_sha256[TLS_HASH_BYTES])
{
    if (!c->greeted)
        return ERR_AGAIN;
    memcpy(ret_sha256, tls_session_peer(c->session)->certificate_sha256, TLS_HASH_BYTES);
    return 0;
}

static int channel_call(void *ctx, uint16_t method, struct span request, struct buffer *reply, uint16_t *ret_status,
                        int timeout_ms, struct error *err)
{
    return rpc_call(ctx, method, request, reply, ret_status, timeout_ms, err);
}

struct rpc_channel rpc_client_channel(struct rpc_client *c)
{
    return (struct rpc_channel){channel_call, c, rpc_client_body_bytes_max(c)};
}
