/* What both ends of rpc.h share: the frame around the TLS records, the first message of a session, socket options. */
#ifndef PROTOCOL_TRANSPORT_RPC_WIRE_H
#define PROTOCOL_TRANSPORT_RPC_WIRE_H

#include "protocol/transport/rpc.h"

enum { WIRE_HANDSHAKE = 1, WIRE_DATA = 2, WIRE_UNKNOWN_SESSION = 3, WIRE_BUSY = 4 };

#define WIRE_VERSION 1
#define WIRE_ID_BYTES 16
#define WIRE_HEADER_BYTES (2 + WIRE_ID_BYTES)
#define WIRE_METHOD_HELLO 0xffff    /* first request of a session: u16 version, u32 chunk bytes -> u32 chunk bytes */
#define WIRE_BODY_SLACK (32u << 10) /* a body is at most chunk + this */
#define WIRE_MESSAGE_SLACK (64u << 10)
#define WIRE_HANDSHAKE_BYTES_MAX (64u << 10)
#define WIRE_CHUNK_BYTES_MAX (64u << 20)

struct wire_message {
    uint8_t kind;
    uint8_t id[WIRE_ID_BYTES];
    struct span records;
};

void wire_header(struct buffer *out, uint8_t kind, const uint8_t id[WIRE_ID_BYTES]);
bool wire_parse(struct span message, struct wire_message *ret);

/* Buffers, limits and TCP options of a socket. ERR_RESOURCES. */
int MUST_USE wire_socket_options(int socket, const char *url, size_t message_bytes_max, struct error *err);

#endif
