/*
 * TLS 1.3 with mutual authentication over memory, so that any message transport can carry it.
 *
 * A session eats the records of one message and gives back the records to send; it never touches a socket. There are no
 * tickets, no cache and no early data: every session checks the peer's certificate, its usage, its dates and the
 * revocation list anew. A peer's name is the URI in its certificate's subject alternative name and nothing else:
 * "consilium://site/<id>" for a node, "consilium://aggregator/<federation>" for the aggregator.
 *
 * A TLS 1.3 client finishes its handshake before the server has judged its certificate, so "established" on the client
 * side means nothing until a first decrypted message of the server has arrived; rpc_client waits for it.
 *
 * Thread rule: a context may be shared by threads once made; a session belongs to one thread at a time.
 *
 *     struct tls_config config = {.certificate_file = "site.crt", .key_file = "site.key", .ca_file = "ca.crt",
 *                                 .federation = "rare-diseases", .clock = &clock_system};
 *     struct tls_context *context;
 *     if (tls_context_new(&context, &config, TLS_CLIENT, &err) < 0) ...
 */
#ifndef PROTOCOL_TRANSPORT_TLS_H
#define PROTOCOL_TRANSPORT_TLS_H

#include "base/buffer.h"
#include "base/clock.h"

#define TLS_ID_SIZE 65 /* a site's or a federation's id: 1 to 64 of a-z 0-9 . _ -, beginning with a letter or digit */
#define TLS_HASH_BYTES 32

enum tls_role { TLS_CLIENT, TLS_SERVER };

struct tls_config {
    const char *certificate_file; /* PEM, the own certificate, then intermediates if any */
    const char *key_file;         /* PEM, mode 0600 or stricter is the caller's matter */
    const char *ca_file;          /* PEM, the federation's CA: the only trust anchor */
    const char *crl_file;         /* PEM revocation list of that CA; NULL: revocation is not checked */
    const char *federation;       /* the aggregator's expected name; a server's own */
    const struct clock *clock;    /* wall time for certificate dates */
};

struct tls_peer {
    char id[TLS_ID_SIZE];                       /* the site, or the federation of the aggregator */
    uint8_t certificate_sha256[TLS_HASH_BYTES]; /* of the DER encoding */
};

struct tls_context;
struct tls_session;

/* Reads the files at once. ERR_CONFIG names the file and what is wrong with it (absent, expired, key does not match).
 */
int MUST_USE tls_context_new(struct tls_context **ret, const struct tls_config *config, enum tls_role role,
                             struct error *err);
void tls_context_free(struct tls_context *context);

/* The context must outlive the session. A client session's first records come out of tls_session_feed with no input. */
int MUST_USE tls_session_new(struct tls_session **ret, struct tls_context *context, struct error *err);
void tls_session_free(struct tls_session *session);

/*
 * Takes whole TLS records, appends what they decrypt to `plain` (bounded by its maximum) and what has to be sent to the
 * peer (handshake, or the alert that explains a failure) to `out`. On ERR_CONNECT the session is dead, but `out` may
 * hold an alert worth sending. The message says whose certificate failed and why, or what the peer objected to.
 */
int MUST_USE tls_session_feed(struct tls_session *session, struct span records, struct buffer *plain,
                              struct buffer *out, struct error *err);

/* Appends the records of the parts, one after the other, to `out`. The handshake must be complete. */
int MUST_USE tls_session_seal(struct tls_session *session, const struct span *parts, size_t n, struct buffer *out,
                              struct error *err);

/* The handshake is complete on this side and the peer's certificate and name were accepted by this side. */
bool tls_session_established(const struct tls_session *session);
/* Valid once established; borrowed from the session. */
const struct tls_peer *tls_session_peer(const struct tls_session *session);

/* 1 to 64 of a-z 0-9 . _ -, beginning with a letter or a digit: safe as one path component. */
bool tls_id_valid(const char *id);

#endif
