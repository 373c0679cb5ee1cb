#include <openssl/evp.h> /* first: it names a parameter "rand", which base/banned.h poisons */
#include <openssl/pem.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>

#include "crypto/certificate.h"

#include "base/file.h"
#include "crypto/fatal.h"
#include "crypto/x509.h"

#include <time.h>

struct certificate {
    X509 *x509;
    enum identity_kind kind;
    char id[IDENTITY_ID_SIZE];
    uint8_t public_key[SIGN_PUBLIC_SIZE];
    uint8_t fingerprint[HASH_SIZE];
    uint8_t *der; /* OpenSSL's allocation */
    size_t der_len;
    uint8_t serial[20];
    size_t serial_len;
    int64_t not_before_s, not_after_s;
};

struct certificate_crl {
    X509_CRL *crl;
    int64_t number;
};

static const struct {
    enum identity_kind kind;
    const char *prefix;
} kinds[] = {
    {IDENTITY_SITE, "consilium://site/"},
    {IDENTITY_AGGREGATOR, "consilium://aggregator/"},
    {IDENTITY_AUTHORITY, "consilium://authority/"},
};

void x509_clear_errors(void)
{
    ERR_clear_error();
}

int x509_fail(struct error *err, int code, const char *what)
{
    char reason[256];
    unsigned long e = ERR_peek_last_error();

    ERR_error_string_n(e, reason, sizeof reason);
    ERR_clear_error();
    return error_set(err, code, "%s: %s", what, e ? reason : "out of memory");
}

GENERAL_NAMES *x509_names(enum identity_kind kind, const char *id)
{
    char uri[128] = "";
    GENERAL_NAMES *names = GENERAL_NAMES_new();
    GENERAL_NAME *name = GENERAL_NAME_new();
    ASN1_IA5STRING *text = ASN1_IA5STRING_new();

    for (size_t i = 0; i < ARRAY_LEN(kinds); i++)
        if (kinds[i].kind == kind)
            snprintf(uri, sizeof uri, "%s%s", kinds[i].prefix, id);
    if (!names || !name || !text || ASN1_STRING_set(text, uri, -1) != 1)
        goto fail;
    GENERAL_NAME_set0_value(name, GEN_URI, text);
    text = NULL;
    if (sk_GENERAL_NAME_push(names, name) <= 0)
        goto fail;
    return names;
fail:
    ASN1_IA5STRING_free(text);
    GENERAL_NAME_free(name);
    GENERAL_NAMES_free(names);
    return NULL;
}

static int read_uri(const ASN1_IA5STRING *text, enum identity_kind *ret_kind, char ret_id[IDENTITY_ID_SIZE])
{
    const char *data = (const char *)ASN1_STRING_get0_data(text);
    size_t len = (size_t)ASN1_STRING_length(text);

    for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
        size_t prefix = strlen(kinds[i].prefix);
        char id[IDENTITY_ID_SIZE];

        if (len <= prefix || len - prefix >= sizeof id || memcmp(data, kinds[i].prefix, prefix) != 0)
            continue;
        memcpy(id, data + prefix, len - prefix);
        id[len - prefix] = 0;
        if (strlen(id) != len - prefix || !identity_id_valid(id)) /* a NUL inside hides what follows */
            return ERR_INTEGRITY;
        memcpy(ret_id, id, sizeof id);
        *ret_kind = kinds[i].kind;
        return 0;
    }
    return ERR_INTEGRITY;
}

int x509_read_names(const GENERAL_NAMES *names, enum identity_kind *ret_kind, char ret_id[IDENTITY_ID_SIZE])
{
    int uris = 0;

    for (int i = 0; i < sk_GENERAL_NAME_num(names); i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
        int type;
        const void *value = GENERAL_NAME_get0_value(name, &type);

        if (type == GEN_URI) {
            if (++uris > 1 || read_uri(value, ret_kind, ret_id) < 0)
                return ERR_INTEGRITY;
        } else if (type != GEN_DNS && type != GEN_IPADD) {
            return ERR_INTEGRITY;
        }
    }
    return uris == 1 ? 0 : ERR_INTEGRITY;
}

int x509_raw_public(EVP_PKEY *pkey, uint8_t ret_public[SIGN_PUBLIC_SIZE])
{
    size_t len = SIGN_PUBLIC_SIZE;

    if (EVP_PKEY_get_id(pkey) != EVP_PKEY_ED25519 || EVP_PKEY_get_raw_public_key(pkey, ret_public, &len) != 1 ||
        len != SIGN_PUBLIC_SIZE)
        return ERR_INTEGRITY;
    return 0;
}

int x509_append_pem(struct buffer *out, int (*write)(BIO *, const void *), const void *object, struct error *err)
{
    BIO *bio = BIO_new(BIO_s_mem());
    char *text = NULL;
    long len;
    int rc = 0;

    if (!bio || write(bio, object) != 1 || (len = BIO_get_mem_data(bio, &text)) <= 0) {
        rc = x509_fail(err, ERR_RESOURCES, "cannot encode as PEM");
    } else {
        buffer_append(out, text, (size_t)len);
        if (!buffer_ok(out))
            rc = error_set(err, ERR_RESOURCES, "no room for %ld bytes of PEM", len);
    }
    BIO_free(bio);
    return rc;
}

static int time_of(const ASN1_TIME *t, int64_t *ret_s)
{
    struct tm tm;

    if (ASN1_TIME_to_tm(t, &tm) != 1)
        return -1;
    *ret_s = (int64_t)timegm(&tm);
    return 0;
}

static int read_fields(struct certificate *c, struct error *err)
{
    const ASN1_INTEGER *serial = X509_get0_serialNumber(c->x509);
    GENERAL_NAMES *names = NULL;
    EVP_PKEY *pkey = X509_get0_pubkey(c->x509);
    int der_len, rc;

    if (!pkey || x509_raw_public(pkey, c->public_key) < 0)
        return error_set(err, ERR_INTEGRITY, "certificate: its key is not Ed25519");
    names = X509_get_ext_d2i(c->x509, NID_subject_alt_name, NULL, NULL);
    rc = names ? x509_read_names(names, &c->kind, c->id) : ERR_INTEGRITY;
    GENERAL_NAMES_free(names);
    if (rc < 0)
        return error_set(err, ERR_INTEGRITY, "certificate: expected one URI name such as consilium://site/<id>");
    if (ASN1_STRING_length(serial) < 1 || (size_t)ASN1_STRING_length(serial) > sizeof c->serial ||
        ASN1_STRING_type(serial) == V_ASN1_NEG_INTEGER)
        return error_set(err, ERR_INTEGRITY, "certificate: its serial number is not 1 to 20 bytes");
    c->serial_len = (size_t)ASN1_STRING_length(serial);
    memcpy(c->serial, ASN1_STRING_get0_data(serial), c->serial_len);
    if (time_of(X509_get0_notBefore(c->x509), &c->not_before_s) < 0 ||
        time_of(X509_get0_notAfter(c->x509), &c->not_after_s) < 0)
        return error_set(err, ERR_INTEGRITY, "certificate: unreadable validity");
    der_len = i2d_X509(c->x509, &c->der);
    if (der_len <= 0)
        return x509_fail(err, ERR_RESOURCES, "cannot encode the certificate");
    c->der_len = (size_t)der_len;
    hash_bytes(span_of(c->der, c->der_len), c->fingerprint);
    return 0;
}

int certificate_adopt(X509 *x509, struct certificate **ret_certificate, struct error *err)
{
    struct certificate *c = calloc(1, sizeof *c);
    int rc;

    if (!c) {
        X509_free(x509);
        return error_set(err, ERR_RESOURCES, "out of memory while reading a certificate");
    }
    c->x509 = x509;
    rc = read_fields(c, err);
    ERR_clear_error();
    if (rc < 0)
        certificate_free(c);
    else
        *ret_certificate = c;
    return rc;
}

void certificate_free(struct certificate *c)
{
    if (!c)
        return;
    X509_free(c->x509);
    OPENSSL_free(c->der);
    free(c);
}

int certificate_from_x509(X509 *x509, struct certificate **ret_certificate, struct error *err)
{
    if (X509_up_ref(x509) != 1)
        return x509_fail(err, ERR_RESOURCES, "cannot hold a certificate");
    return certificate_adopt(x509, ret_certificate, err);
}

int certificate_parse(struct span data, struct certificate **ret_certificate, struct error *err)
{
    X509 *x509 = NULL;
    const uint8_t *at = data.ptr;
    bool whole = true;

    if (data.len == 0 || data.len > IDENTITY_PEM_MAX)
        return error_set(err, ERR_INTEGRITY, "certificate: %zu bytes, expected 1 to %d", data.len, IDENTITY_PEM_MAX);
    if (data.ptr[0] == 0x30) {
        x509 = d2i_X509(NULL, &at, (long)data.len);
        whole = at == data.ptr + data.len;
    } else {
        BIO *bio = BIO_new_mem_buf(data.ptr, (int)data.len);
        if (bio)
            x509 = PEM_read_bio_X509(bio, NULL, NULL, (void *)"");
        BIO_free(bio);
    }
    ERR_clear_error();
    if (!x509 || !whole) {
        X509_free(x509);
        return error_set(err, ERR_INTEGRITY, "certificate: neither PEM nor DER of an X.509 certificate");
    }
    return certificate_adopt(x509, ret_certificate, err);
}

int certificate_load(const char *path, struct certificate **ret_certificate, struct error *err)
{
    struct buffer text;
    int rc;

    buffer_init(&text, IDENTITY_PEM_MAX);
    rc = file_read(path, &text, err);
    if (rc == 0 && (rc = certificate_parse(buffer_span(&text), ret_certificate, err)) < 0)
        error_prefix(err, "%s", path);
    buffer_release(&text);
    return rc;
}

int certificate_pem(const struct certificate *c, struct buffer *ret_pem)
{
    return x509_append_pem(ret_pem, (int (*)(BIO *, const void *))PEM_write_bio_X509, c->x509, NULL);
}

int certificate_store(const struct certificate *c, const char *path, struct error *err)
{
    struct buffer text;
    int rc;

    buffer_init(&text, IDENTITY_PEM_MAX);
    rc = certificate_pem(c, &text);
    if (rc < 0)
        rc = error_set(err, rc, "%s: cannot encode the certificate", path);
    else
        rc = file_write_atomic(path, buffer_span(&text), 0644, err);
    buffer_release(&text);
    return rc;
}

enum identity_kind certificate_kind(const struct certificate *c)
{
    return c->kind;
}

const char *certificate_id(const struct certificate *c)
{
    return c->id;
}

const uint8_t *certificate_public(const struct certificate *c)
{
    return c->public_key;
}

const uint8_t *certificate_fingerprint(const struct certificate *c)
{
    return c->fingerprint;
}

struct span certificate_der(const struct certificate *c)
{
    return span_of(c->der, c->der_len);
}

struct span certificate_serial(const struct certificate *c)
{
    return span_of(c->serial, c->serial_len);
}

int64_t certificate_not_before_s(const struct certificate *c)
{
    return c->not_before_s;
}

int64_t certificate_not_after_s(const struct certificate *c)
{
    return c->not_after_s;
}

X509 *certificate_x509(const struct certificate *c)
{
    return c->x509;
}

int certificate_crl_parse(struct span data, struct certificate_crl **ret_crl, struct error *err)
{
    struct certificate_crl *c = NULL;
    X509_CRL *crl = NULL;
    ASN1_INTEGER *number = NULL;
    BIO *bio;
    int rc = 0;

    if (data.len == 0 || data.len > 16 << 20)
        return error_set(err, ERR_INTEGRITY, "revocation list: %zu bytes, expected 1 to %d", data.len, 16 << 20);
    bio = BIO_new_mem_buf(data.ptr, (int)data.len);
    if (bio)
        crl = PEM_read_bio_X509_CRL(bio, NULL, NULL, (void *)"");
    BIO_free(bio);
    if (crl)
        number = X509_CRL_get_ext_d2i(crl, NID_crl_number, NULL, NULL);
    c = calloc(1, sizeof *c);
    if (!c)
        rc = error_set(err, ERR_RESOURCES, "out of memory while reading a revocation list");
    else if (!crl || !number || ASN1_INTEGER_get_int64(&c->number, number) != 1)
        rc = error_set(err, ERR_INTEGRITY, "revocation list: not a PEM list with a number");
    ASN1_INTEGER_free(number);
    ERR_clear_error();
    if (rc < 0) {
        X509_CRL_free(crl);
        free(c);
        return rc;
    }
    c->crl = crl;
    *ret_crl = c;
    return 0;
}

int certificate_crl_load(const char *path, struct certificate_crl **ret_crl, struct error *err)
{
    struct buffer text;
    int rc;

    buffer_init(&text, 16 << 20);
    rc = file_read(path, &text, err);
    if (rc == 0 && (rc = certificate_crl_parse(buffer_span(&text), ret_crl, err)) < 0)
        error_prefix(err, "%s", path);
    buffer_release(&text);
    return rc;
}

void certificate_crl_free(struct certificate_crl *crl)
{
    if (!crl)
        return;
    X509_CRL_free(crl->crl);
    free(crl);
}

int64_t certificate_crl_number(const struct certificate_crl *crl)
{
    return crl->number;
}

X509_CRL *certificate_crl_x509(const struct certificate_crl *crl)
{
    return crl->crl;
}

int certificate_verify(const struct certificate *c, const struct certificate *ca, const struct certificate_crl *crl,
                       enum identity_kind want, int64_t now_s, struct error *err)
{
    X509_STORE *store = NULL;
    X509_STORE_CTX *ctx = NULL;
    int rc = 0;

    if (c->kind != want || (want != IDENTITY_SITE && want != IDENTITY_AGGREGATOR))
        return error_set(err, ERR_CONNECT, "the certificate of \"%s\" is for another role (%d, expected %d)", c->id,
                         (int)c->kind, (int)want);
    store = X509_STORE_new();
    ctx = X509_STORE_CTX_new();
    if (!store || !ctx || X509_STORE_add_cert(store, ca->x509) != 1 ||
        (crl && X509_STORE_add_crl(store, crl->crl) != 1) || X509_STORE_CTX_init(ctx, store, c->x509, NULL) != 1) {
        rc = x509_fail(err, ERR_RESOURCES, "cannot check a certificate");
        goto out;
    }
    X509_STORE_CTX_set_time(ctx, 0, (time_t)now_s);
    X509_STORE_CTX_set_flags(ctx, X509_V_FLAG_X509_STRICT | (crl ? X509_V_FLAG_CRL_CHECK : 0));
    if (X509_STORE_CTX_set_purpose(ctx, want == IDENTITY_SITE ? X509_PURPOSE_SSL_CLIENT : X509_PURPOSE_SSL_SERVER) !=
            1 ||
        X509_verify_cert(ctx) != 1)
        rc = error_set(err, ERR_CONNECT, "the certificate of \"%s\" is refused: %s", c->id,
                       X509_verify_cert_error_string(X509_STORE_CTX_get_error(ctx)));
    ERR_clear_error();
out:
    X509_STORE_CTX_free(ctx);
    X509_STORE_free(store);
    return rc;
}
