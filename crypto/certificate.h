/*
 * X.509 certificates with Ed25519 keys (RFC 5280, RFC 8410) and revocation lists, read and verified through OpenSSL.
 *
 * A certificate made by crypto/authority.h has one URI subject alternative name (the id), key usage and extended key
 * usage as its kind wants, and a random serial. Parsing refuses other keys and other shapes. Being signed by the CA
 * never admits a site: the caller also looks up the fingerprint in the roster. Time is passed in, seconds since 1970
 * UTC. Immutable; shareable.
 *
 *     struct certificate *peer = NULL;
 *     if (certificate_parse(pem, &peer, &err) < 0 ||
 *         certificate_verify(peer, ca, crl, IDENTITY_SITE, now_s, &err) < 0) ...refuse
 *     strcmp(certificate_id(peer), …), certificate_public(peer), certificate_fingerprint(peer)
 *     certificate_free(peer);
 */
#ifndef CRYPTO_CERTIFICATE_H
#define CRYPTO_CERTIFICATE_H

#include "crypto/identity.h"

struct x509_st;     /* OpenSSL's X509 */
struct X509_crl_st; /* and X509_CRL */
struct certificate; /* opaque */

/* PEM (one certificate) or DER, told apart by the first byte. ERR_INTEGRITY. */
int MUST_USE certificate_parse(struct span data, struct certificate **ret_certificate, struct error *err);
int MUST_USE certificate_load(const char *path, struct certificate **ret_certificate, struct error *err);
int MUST_USE certificate_store(const struct certificate *c, const char *path, struct error *err); /* PEM, mode 0644 */
/* Takes its own reference: for the peer certificate of a TLS session (X509 *). */
int MUST_USE certificate_from_x509(struct x509_st *x509, struct certificate **ret_certificate, struct error *err);
void certificate_free(struct certificate *c);

enum identity_kind certificate_kind(const struct certificate *c);
const char *certificate_id(const struct certificate *c);        /* site id, federation id; the CA's: federation id */
const uint8_t *certificate_public(const struct certificate *c); /* 32 bytes, Ed25519 */
const uint8_t *certificate_fingerprint(const struct certificate *c); /* SHA-256 of the DER, 32 bytes */
struct span certificate_der(const struct certificate *c);            /* borrowed */
struct span certificate_serial(const struct certificate *c);         /* borrowed, big-endian bytes */
int64_t certificate_not_before_s(const struct certificate *c);
int64_t certificate_not_after_s(const struct certificate *c);
struct x509_st *certificate_x509(const struct certificate *c); /* borrowed X509, for SSL_CTX */
int MUST_USE certificate_pem(const struct certificate *c, struct buffer *ret_pem);

/* A revocation list; its signature is checked in certificate_verify against the CA given there. */
struct certificate_crl; /* opaque */
int MUST_USE certificate_crl_parse(struct span data, struct certificate_crl **ret_crl, struct error *err);
int MUST_USE certificate_crl_load(const char *path, struct certificate_crl **ret_crl, struct error *err);
void certificate_crl_free(struct certificate_crl *crl);
int64_t certificate_crl_number(const struct certificate_crl *crl); /* grows with every issue: refuse an older one */
struct X509_crl_st *certificate_crl_x509(const struct certificate_crl *crl);

/* Chain of length one from the pinned CA, signature, validity at now_s, kind (site: EKU clientAuth; aggregator:
 * serverAuth), and, when crl is not NULL, that crl is the CA's, current and does not list c. ERR_CONNECT with the
 * reason. */
int MUST_USE certificate_verify(const struct certificate *c, const struct certificate *ca,
                                const struct certificate_crl *crl, enum identity_kind want, int64_t now_s,
                                struct error *err);

#endif
