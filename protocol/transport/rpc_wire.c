#include "protocol/transport/rpc_wire.h"

#include <nanomsg/nn.h>
#include <nanomsg/tcp.h>

#include "base/reader.h"

void wire_header(struct buffer *out, uint8_t kind, const uint8_t id[WIRE_ID_BYTES])
{
    buffer_clear(out);
    buffer_u8(out, WIRE_VERSION);
    buffer_u8(out, kind);
    buffer_append(out, id, WIRE_ID_BYTES);
}

bool wire_parse(struct span message, struct wire_message *ret)
{
    if (message.len < WIRE_HEADER_BYTES || message.ptr[0] != WIRE_VERSION)
        return false;
    ret->kind = message.ptr[1];
    memcpy(ret->id, message.ptr + 2, WIRE_ID_BYTES);
    ret->records = span_of(message.ptr + WIRE_HEADER_BYTES, message.len - WIRE_HEADER_BYTES);
    return true;
}

int wire_socket_options(int socket_fd, const char *url, size_t message_bytes_max, struct error *err)
{
    /* The kernel's net.core limits may lower the buffers; NN_RCVMAXSIZE must hold, or one peer could end the process.
     */
    static const struct {
        int level, option, value;
    } options[] = {
        {NN_SOL_SOCKET, NN_SNDBUF, 4 << 20},
        {NN_SOL_SOCKET, NN_RCVBUF, 4 << 20},
        {NN_SOL_SOCKET, NN_MAXTTL, 1},
        {NN_SOL_SOCKET, NN_RECONNECT_IVL, 100},
        {NN_SOL_SOCKET, NN_RECONNECT_IVL_MAX, 5000},
        {NN_TCP, NN_TCP_NODELAY, 1},
    };
    for (size_t i = 0; i < ARRAY_LEN(options); i++) {
        if (nn_setsockopt(socket_fd, options[i].level, options[i].option, &options[i].value, sizeof(int)) < 0)
            return error_set(err, ERR_RESOURCES, "nanomsg option %d: %s", options[i].option, nn_strerror(nn_errno()));
    }
    /* With IPv6 allowed, nanomsg 1.1.5 aborts the process on connecting to an IPv4 address (it binds "::" to an IPv4
     * socket, fails, and starts the socket a second time): allow it for a literal IPv6 address only. */
    int ipv4_only = strchr(url, '[') == NULL;
    if (nn_setsockopt(socket_fd, NN_SOL_SOCKET, NN_IPV4ONLY, &ipv4_only, sizeof ipv4_only) < 0)
        return error_set(err, ERR_RESOURCES, "nanomsg IPv6: %s", nn_strerror(nn_errno()));
    int max = (int)message_bytes_max;
    if (nn_setsockopt(socket_fd, NN_SOL_SOCKET, NN_RCVMAXSIZE, &max, sizeof max) < 0)
        return error_set(err, ERR_RESOURCES, "nanomsg message limit: %s", nn_strerror(nn_errno()));
    return 0;
}

int64_t rpc_backoff_ms(const struct rng *rng, unsigned attempt, int64_t base_ms, int64_t max_ms)
{
    int64_t wait = base_ms;
    for (unsigned i = 1; i < attempt && wait < max_ms; i++)
        wait *= 2;
    if (wait > max_ms)
        wait = max_ms;
    int64_t half = wait / 2;
    return half + (int64_t)rng_below(rng, (uint64_t)(wait - half) + 1);
}

int rpc_status_error(uint16_t status, struct span body, struct error *err)
{
    if (status == RPC_STATUS_OK)
        return 0;
    if (status == RPC_STATUS_NOTHING_YET)
        return error_set(err, ERR_AGAIN, "the aggregator has nothing yet");
    if (status != RPC_STATUS_ERROR)
        return error_set(err, ERR_FAILED, "the aggregator answered with status %u", status);
    struct reader r = reader_of(body);
    int32_t code = (int32_t)reader_u32(&r);
    struct span text = reader_bytes(&r, sizeof err->message);
    if (!reader_done(&r) || code >= 0)
        return error_set(err, ERR_INTEGRITY, "the aggregator sent a malformed error");
    char printable[512];
    size_t n = text.len < sizeof printable - 1 ? text.len : sizeof printable - 1;
    for (size_t i = 0; i < n; i++)
        printable[i] = (char)(text.ptr[i] >= 0x20 && text.ptr[i] != 0x7f ? text.ptr[i] : '?');
    printable[n] = '\0';
    return error_set(err, code, "the aggregator says: %s", printable);
}
