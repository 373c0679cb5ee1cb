/* What identity.c, certificate.c and authority.c share about OpenSSL's X.509 objects. Internal to crypto/; include
 * after OpenSSL's headers. */
#ifndef CRYPTO_X509_H
#define CRYPTO_X509_H

#include "crypto/certificate.h"

#include <openssl/err.h>

/* Sets err with OpenSSL's reason appended, empties its queue, returns code. */
int x509_fail(struct error *err, int code, const char *what);
void x509_clear_errors(void);

/* The one URI name of a kind and id; owned by the caller. NULL when memory runs out. */
GENERAL_NAMES *x509_names(enum identity_kind kind, const char *id);
/* Exactly one URI of ours among the names, besides DNS and IP ones. */
int MUST_USE x509_read_names(const GENERAL_NAMES *names, enum identity_kind *ret_kind, char ret_id[IDENTITY_ID_SIZE]);
int MUST_USE x509_raw_public(EVP_PKEY *pkey, uint8_t ret_public[SIGN_PUBLIC_SIZE]);

int MUST_USE x509_append_pem(struct buffer *out, int (*write)(BIO *, const void *), const void *object,
                             struct error *err);

/* Takes over the reference. */
int MUST_USE certificate_adopt(X509 *x509, struct certificate **ret_certificate, struct error *err);

#endif
