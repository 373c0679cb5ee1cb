/* OpenSSL first: base/banned.h poisons a word that its headers use as a parameter name. */
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>

#include "protocol/transport/tls.h"

#include "crypto/certificate.h"

#define RECORD_PLAIN_BYTES_MAX 16384

struct tls_context {
    SSL_CTX *ssl;
    enum tls_role role;
    char federation[TLS_ID_SIZE];
    const struct clock *clock;
};

struct tls_session {
    struct tls_context *context;
    SSL *ssl;
    bool established;
    struct tls_peer peer;
    struct error refusal; /* why the own verification said no; code 0: it did not */
};

bool tls_id_valid(const char *id)
{
    size_t len = strnlen(id, TLS_ID_SIZE);
    if (len == 0 || len >= TLS_ID_SIZE)
        return false;
    for (size_t i = 0; i < len; i++) {
        char c = id[i];
        bool alphanumeric = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
        if (!alphanumeric && (i == 0 || (c != '.' && c != '_' && c != '-')))
            return false;
    }
    return true;
}

static const char *peer_noun(const struct tls_context *context)
{
    return context->role == TLS_CLIENT ? "the aggregator" : "a site";
}

/* Called by OpenSSL for each certificate of the peer's chain, the leaf (depth 0) last. Doing the name check here lets
 * the refused peer get an alert instead of silence. */
static int on_verify(int preverified, X509_STORE_CTX *store)
{
    SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
    struct tls_session *session = SSL_get_app_data(ssl);
    if (!preverified) {
        error_set(&session->refusal, ERR_CONNECT, "the certificate of %s was not accepted: %s",
                  peer_noun(session->context), X509_verify_cert_error_string(X509_STORE_CTX_get_error(store)));
        return 0;
    }
    if (X509_STORE_CTX_get_error_depth(store) > 0)
        return 1;

    struct tls_context *context = session->context;
    struct certificate *certificate = NULL;
    struct error why = {0};
    bool ok = false;
    if (certificate_from_x509(X509_STORE_CTX_get_current_cert(store), &certificate, &why) < 0) {
        error_set(&session->refusal, ERR_CONNECT, "the certificate of %s was not accepted: %s", peer_noun(context),
                  why.message);
    } else if (certificate_kind(certificate) != (context->role == TLS_CLIENT ? IDENTITY_AGGREGATOR : IDENTITY_SITE)) {
        error_set(&session->refusal, ERR_CONNECT, "the certificate presented as that of %s belongs to something else",
                  peer_noun(context));
    } else if (context->role == TLS_CLIENT && strcmp(certificate_id(certificate), context->federation) != 0) {
        error_set(&session->refusal, ERR_CONNECT,
                  "the aggregator belongs to federation '%s', expected '%s': check the address and the federation id",
                  certificate_id(certificate), context->federation);
    } else if (!tls_id_valid(certificate_id(certificate))) {
        error_set(&session->refusal, ERR_CONNECT, "the certificate of %s carries no valid id", peer_noun(context));
    } else {
        snprintf(session->peer.id, sizeof session->peer.id, "%s", certificate_id(certificate));
        memcpy(session->peer.certificate_sha256, certificate_fingerprint(certificate), TLS_HASH_BYTES);
        ok = true;
    }
    certificate_free(certificate);
    if (!ok)
        X509_STORE_CTX_set_error(store, X509_V_ERR_APPLICATION_VERIFICATION);
    return ok;
}

static int load_identity(struct tls_context *context, const struct tls_config *config, struct error *err)
{
    struct identity_key *key = NULL;
    int rc = ERR_CONFIG;
    if (SSL_CTX_use_certificate_chain_file(context->ssl, config->certificate_file) != 1) {
        error_set(err, ERR_CONFIG, "%s: not a readable PEM certificate", config->certificate_file);
        goto out;
    }
    rc = identity_key_load(config->key_file, &key, err);
    if (rc < 0)
        goto out;
    if (SSL_CTX_use_PrivateKey(context->ssl, identity_evp(key)) != 1 || SSL_CTX_check_private_key(context->ssl) != 1) {
        rc = error_set(err, ERR_CONFIG, "%s: the key does not belong to the certificate %s", config->key_file,
                       config->certificate_file);
        goto out;
    }
    rc = 0;
out:
    identity_key_free(key);
    ERR_clear_error();
    return rc;
}

static int load_trust(struct tls_context *context, const struct tls_config *config, struct error *err)
{
    struct certificate *ca = NULL;
    struct certificate_crl *crl = NULL;
    X509_STORE *store = SSL_CTX_get_cert_store(context->ssl);
    int rc = certificate_load(config->ca_file, &ca, err);
    if (rc < 0)
        goto out;
    if (X509_STORE_add_cert(store, certificate_x509(ca)) != 1) {
        rc = error_set(err, ERR_CONFIG, "%s: not usable as the federation's CA", config->ca_file);
        goto out;
    }
    if (config->crl_file != NULL) {
        rc = certificate_crl_load(config->crl_file, &crl, err);
        if (rc < 0)
            goto out;
        if (X509_STORE_add_crl(store, certificate_crl_x509(crl)) != 1 ||
            X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK) != 1) {
            rc = error_set(err, ERR_CONFIG, "%s: not usable as a revocation list", config->crl_file);
            goto out;
        }
    }
    rc = 0;
out:
    certificate_free(ca);
    certificate_crl_free(crl);
    ERR_clear_error();
    return rc;
}

static bool set_policy(struct tls_context *context)
{
    SSL_CTX *ssl = context->ssl;
    static const unsigned char session_context[] = "consilium";
    SSL_CTX_set_options(ssl, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, on_verify);
    SSL_CTX_set_verify_depth(ssl, 1);
    SSL_CTX_set_mode(ssl, SSL_MODE_RELEASE_BUFFERS);
    return SSL_CTX_set_min_proto_version(ssl, TLS1_3_VERSION) == 1 && SSL_CTX_set_num_tickets(ssl, 0) == 1 &&
           SSL_CTX_set_max_early_data(ssl, 0) == 1 && SSL_CTX_set1_groups_list(ssl, "X25519:P-256") == 1 &&
           SSL_CTX_set_session_id_context(ssl, session_context, sizeof session_context - 1) == 1;
}

int tls_context_new(struct tls_context **ret, const struct tls_config *config, enum tls_role role, struct error *err)
{
    if (config->certificate_file == NULL || config->key_file == NULL || config->ca_file == NULL)
        return error_set(err, ERR_CONFIG, "TLS needs a certificate file, a key file and a CA file");
    if (config->federation == NULL || !tls_id_valid(config->federation))
        return error_set(err, ERR_CONFIG, "TLS needs the federation id: 1 to 64 of a-z 0-9 . _ -");
    struct tls_context *context = calloc(1, sizeof *context);
    if (context == NULL)
        return error_set(err, ERR_RESOURCES, "no memory for a TLS context");
    context->role = role;
    context->clock = config->clock;
    snprintf(context->federation, sizeof context->federation, "%s", config->federation);
    context->ssl = SSL_CTX_new(role == TLS_CLIENT ? TLS_client_method() : TLS_server_method());
    int rc;
    if (context->ssl == NULL || !set_policy(context))
        rc = error_set(err, ERR_RESOURCES, "OpenSSL could not set up TLS 1.3");
    else if ((rc = load_identity(context, config, err)) == 0)
        rc = load_trust(context, config, err);
    if (rc < 0) {
        tls_context_free(context);
        return rc;
    }
    *ret = context;
    return 0;
}

void tls_context_free(struct tls_context *context)
{
    if (context == NULL)
        return;
    SSL_CTX_free(context->ssl);
    free(context);
}

int tls_session_new(struct tls_session **ret, struct tls_context *context, struct error *err)
{
    struct tls_session *session = calloc(1, sizeof *session);
    if (session != NULL)
        session->ssl = SSL_new(context->ssl);
    if (session == NULL || session->ssl == NULL) {
        tls_session_free(session);
        return error_set(err, ERR_RESOURCES, "no memory for a TLS session");
    }
    session->context = context;
    SSL_set_app_data(session->ssl, session);
    X509_VERIFY_PARAM_set_time(SSL_get0_param(session->ssl), (time_t)(clock_wall_ms(context->clock) / 1000));
    if (context->role == TLS_CLIENT)
        SSL_set_connect_state(session->ssl);
    else
        SSL_set_accept_state(session->ssl);
    *ret = session;
    return 0;
}

void tls_session_free(struct tls_session *session)
{
    if (session == NULL)
        return;
    SSL_free(session->ssl);
    free(session);
}

/* Fresh memory BIOs for one message each way: no session keeps a chunk's worth of memory while it is idle. */
static int attach(struct tls_session *session, struct span in, struct error *err)
{
    static const uint8_t nothing[1];
    BIO *reading = BIO_new_mem_buf(in.len > 0 ? in.ptr : nothing, (int)in.len);
    BIO *writing = BIO_new(BIO_s_mem());
    if (reading == NULL || writing == NULL) {
        BIO_free(reading);
        BIO_free(writing);
        return error_set(err, ERR_RESOURCES, "no memory for TLS records");
    }
    BIO_set_mem_eof_return(reading, -1);
    SSL_set0_rbio(session->ssl, reading);
    SSL_set0_wbio(session->ssl, writing);
    return 0;
}

static int detach(struct tls_session *session, struct buffer *out, struct error *err)
{
    char *data = NULL;
    long len = BIO_get_mem_data(SSL_get_wbio(session->ssl), &data);
    if (len > 0)
        buffer_append(out, data, (size_t)len);
    SSL_set0_rbio(session->ssl, NULL);
    SSL_set0_wbio(session->ssl, NULL);
    if (!buffer_ok(out))
        return error_set(err, ERR_RESOURCES, "a message of more than %zu bytes", out->max);
    return 0;
}

static int explain(struct tls_session *session, struct error *err)
{
    unsigned long code = ERR_peek_error();
    ERR_clear_error();
    if (session->refusal.code != 0)
        return error_set(err, ERR_CONNECT, "%s", session->refusal.message);
    if (code == 0)
        return error_set(err, ERR_CONNECT, "the TLS session was closed by the peer");
    const char *reason = ERR_reason_error_string(code);
    /* OpenSSL numbers the reason of a received alert 1000 + the alert. */
    if (ERR_GET_REASON(code) >= SSL_AD_REASON_OFFSET)
        return error_set(err, ERR_CONNECT,
                         "the peer ended TLS with '%s': it may not accept our certificate (dates, "
                         "revocation, CA)",
                         reason != NULL ? reason : "an unknown alert");
    return error_set(err, ERR_CONNECT, "TLS failed: %s", reason != NULL ? reason : "unknown reason");
}

/* Handshake as far as the records allow, then decrypts all of them. */
static int consume(struct tls_session *session, struct buffer *plain, struct error *err)
{
    uint8_t piece[RECORD_PLAIN_BYTES_MAX];
    if (!SSL_is_init_finished(session->ssl)) {
        int rc = SSL_do_handshake(session->ssl);
        if (rc != 1)
            return SSL_get_error(session->ssl, rc) == SSL_ERROR_WANT_READ ? 0 : explain(session, err);
    }
    if (!session->established) {
        if (SSL_get_verify_result(session->ssl) != X509_V_OK || session->peer.id[0] == '\0')
            return error_set(err, ERR_CONNECT, "the peer showed no acceptable certificate");
        session->established = true;
    }
    for (;;) {
        size_t got = 0;
        int rc = SSL_read_ex(session->ssl, piece, sizeof piece, &got);
        if (rc != 1)
            return SSL_get_error(session->ssl, rc) == SSL_ERROR_WANT_READ ? 0 : explain(session, err);
        buffer_append(plain, piece, got);
        if (!buffer_ok(plain))
            return error_set(err, ERR_RESOURCES, "a decrypted message of more than %zu bytes", plain->max);
    }
}

int tls_session_feed(struct tls_session *session, struct span records, struct buffer *plain, struct buffer *out,
                     struct error *err)
{
    if (records.len > INT32_MAX)
        return error_set(err, ERR_RESOURCES, "a message of %zu bytes", records.len);
    ERR_clear_error();
    int rc = attach(session, records, err);
    if (rc < 0)
        return rc;
    rc = consume(session, plain, err);
    int sent = detach(session, out, rc < 0 ? NULL : err);
    ERR_clear_error();
    return rc < 0 ? rc : sent;
}

int tls_session_seal(struct tls_session *session, const struct span *parts, size_t n, struct buffer *out,
                     struct error *err)
{
    assert(session->established);
    ERR_clear_error();
    int rc = attach(session, span_of(NULL, 0), err);
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < n && rc == 0; i++) {
        size_t written = 0;
        if (parts[i].len > 0 && SSL_write_ex(session->ssl, parts[i].ptr, parts[i].len, &written) != 1)
            rc = explain(session, err);
    }
    int sent = detach(session, out, rc < 0 ? NULL : err);
    ERR_clear_error();
    return rc < 0 ? rc : sent;
}

bool tls_session_established(const struct tls_session *session)
{
    return session->established;
}

const struct tls_peer *tls_session_peer(const struct tls_session *session)
{
    assert(session->established);
    return &session->peer;
}
