/*
 * A party's long-lived Ed25519 key: made, stored, loaded, used for signing, and carried to the CA as a request (PKCS
 * #10).
 *
 * Sites, the aggregator, the CA, plan authors and the governance authority all have one; for the last two there is no
 * certificate, the roster names the key's fingerprint. Key files are PKCS #8 PEM (RFC 8410) of mode 0600; loading
 * refuses a file that group or others can read. Ids are 1 to 63 of [a-z0-9-]. Requests and certificates carry the id
 * only in a subject alternative name, "consilium://site/<id>" or "consilium://aggregator/<federation id>".
 *
 * The private key lies in secret memory (crypto/secret.h), and in OpenSSL's objects while TLS needs it. Immutable after
 * creation; any thread may sign with it.
 *
 *     struct identity_key *key = NULL;
 *     if (identity_key_create(&random_system, &key, &err) < 0 || identity_key_store(key, "site.key", &err) < 0) ...
 *     identity_request(key, IDENTITY_SITE, "clinic-a", &csr_pem, &err)
 *     sign_parts(identity_sign_key(key), "consilium/m1", parts, n, signature);
 */
#ifndef CRYPTO_IDENTITY_H
#define CRYPTO_IDENTITY_H

#include "base/buffer.h"
#include "base/rng.h"
#include "crypto/hash.h"
#include "crypto/sign.h"

enum { IDENTITY_ID_SIZE = 64, IDENTITY_PEM_MAX = 64 << 10 };

enum identity_kind { IDENTITY_SITE = 1, IDENTITY_AGGREGATOR = 2, IDENTITY_AUTHORITY = 3 /* the CA itself */ };

bool identity_id_valid(const char *id);

struct evp_pkey_st;  /* OpenSSL's EVP_PKEY */
struct identity_key; /* opaque */

int MUST_USE identity_key_create(const struct rng *rng, struct identity_key **ret_key, struct error *err);
int MUST_USE identity_key_from_seed(const uint8_t seed[SIGN_SEED_SIZE], struct identity_key **ret_key,
                                    struct error *err);
/* ERR_EXISTS when the file exists: a key is never replaced silently. */
int MUST_USE identity_key_store(const struct identity_key *key, const char *path, struct error *err);
int MUST_USE identity_key_load(const char *path, struct identity_key **ret_key, struct error *err);
void identity_key_free(struct identity_key *key);

const struct sign_key *identity_sign_key(const struct identity_key *key);
const uint8_t *identity_public(const struct identity_key *key); /* 32 bytes */
/* SHA-256 of the DER SubjectPublicKeyInfo: the fingerprint that people compare for governance and author keys. */
void identity_public_fingerprint(const uint8_t public_key[SIGN_PUBLIC_SIZE], uint8_t out[HASH_SIZE]);
/* For SSL_CTX_use_PrivateKey: an EVP_PKEY, borrowed. */
struct evp_pkey_st *identity_evp(const struct identity_key *key);

/* A public key alone, as PEM SubjectPublicKeyInfo: how a governance key's public half travels. */
int MUST_USE identity_public_store(const uint8_t public_key[SIGN_PUBLIC_SIZE], const char *path, struct error *err);
int MUST_USE identity_public_load(const char *path, uint8_t ret_public[SIGN_PUBLIC_SIZE], struct error *err);

/* Appends a PEM certificate request. kind is IDENTITY_SITE or IDENTITY_AGGREGATOR. */
int MUST_USE identity_request(const struct identity_key *key, enum identity_kind kind, const char *id,
                              struct buffer *ret_pem, struct error *err);

struct identity_request_info {
    enum identity_kind kind;
    char id[IDENTITY_ID_SIZE];
    uint8_t public_key[SIGN_PUBLIC_SIZE];
    uint8_t key_fingerprint[HASH_SIZE]; /* identity_public_fingerprint; read out over the telephone before approval */
};
/* Parses an untrusted request (PEM) and checks its own signature. ERR_INTEGRITY. */
int MUST_USE identity_request_read(struct span pem, struct identity_request_info *ret_info, struct error *err);

#endif
