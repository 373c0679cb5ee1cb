/*
 * The federation's certificate authority: what consilium-aggregator's `init` and `ca` commands do.
 *
 * A self-signed Ed25519 CA (pathlen 0, keyCertSign and cRLSign) named after the federation. It signs end-entity
 * certificates with 159-bit random serials and keeps no state: the caller stores certificates and the revoked serials.
 * The CA's signature says who a key belongs to, not who may take part: that is the roster's, signed by the governance
 * key. Requests are untrusted: only the id and the key are taken from them. Thread-safe: no state.
 *
 *     authority_create(ca_key, "demo", now_s, 3650, &random_system, &ca, &err)
 *     authority_approve(ca_key, ca, request_pem, now_s, 365, &random_system, &certificate, &err)
 */
#ifndef CRYPTO_AUTHORITY_H
#define CRYPTO_AUTHORITY_H

#include "crypto/certificate.h"

/* The self-signed CA certificate. Validity starts an hour before now_s, for clocks that differ. */
int MUST_USE authority_create(const struct identity_key *key, const char *federation_id, int64_t now_s, unsigned days,
                              const struct rng *rng, struct certificate **ret_ca, struct error *err);

/* A site certificate (EKU clientAuth) for a request of kind IDENTITY_SITE. Ends no later than the CA. ERR_INTEGRITY for
 * a bad request, ERR_CONFIG when key is not ca's. */
int MUST_USE authority_approve(const struct identity_key *key, const struct certificate *ca, struct span request_pem,
                               int64_t now_s, unsigned days, const struct rng *rng,
                               struct certificate **ret_certificate, struct error *err);

/* The aggregator's certificate (EKU serverAuth) over its public key: URI consilium://aggregator/<federation id> and the
 * names that nodes dial, each a DNS name or an IP address in text. */
int MUST_USE authority_server(const struct identity_key *key, const struct certificate *ca,
                              const uint8_t server_public[SIGN_PUBLIC_SIZE], const char *const *names,
                              size_t name_count, int64_t now_s, unsigned days, const struct rng *rng,
                              struct certificate **ret_certificate, struct error *err);

/* A revocation list (PEM appended to ret_pem). number must exceed the last one's. serials: as certificate_serial gives.
 */
int MUST_USE authority_crl(const struct identity_key *key, const struct certificate *ca, const struct span *serials,
                           size_t count, int64_t number, int64_t now_s, unsigned days, struct buffer *ret_pem,
                           struct error *err);

#endif
