#include <openssl/evp.h> /* first: it names a parameter "rand", which base/banned.h poisons */
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include "crypto/authority.h"

#include "crypto/fatal.h"
#include "crypto/x509.h"

enum { SERIAL_SIZE = 20, CLOCK_SLACK_S = 3600, DAY_S = 86400, DAYS_MAX = 36500 };

static int add_extension(X509 *x509, const X509 *issuer, int nid, const char *value)
{
    X509V3_CTX ctx;
    X509_EXTENSION *extension;
    int ok;

    X509V3_set_ctx_nodb(&ctx);
    X509V3_set_ctx(&ctx, (X509 *)(uintptr_t)issuer, x509, NULL, NULL, 0);
    extension = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
    ok = extension && X509_add_ext(x509, extension, -1) == 1;
    X509_EXTENSION_free(extension);
    return ok ? 0 : -1;
}

/* Positive, 159 random bits: RFC 5280 section 4.1.2.2 allows 20 octets. */
static int set_serial(X509 *x509, const struct rng *rng)
{
    uint8_t bytes[SERIAL_SIZE];
    ASN1_INTEGER *serial = ASN1_INTEGER_new();
    int ok;

    rng_fill(rng, bytes, sizeof bytes);
    bytes[0] = (uint8_t)((bytes[0] & 0x7f) | 0x40); /* never negative, never shorter */
    ok = serial && ASN1_STRING_set(serial, bytes, sizeof bytes) == 1 && X509_set_serialNumber(x509, serial) == 1;
    ASN1_INTEGER_free(serial);
    return ok ? 0 : -1;
}

static int set_validity(X509 *x509, int64_t from_s, int64_t until_s)
{
    return ASN1_TIME_set(X509_getm_notBefore(x509), (time_t)from_s) &&
                   ASN1_TIME_set(X509_getm_notAfter(x509), (time_t)until_s)
               ? 0
               : -1;
}

/* A fresh certificate with version, serial, validity and key; names and extensions follow. NULL on failure. */
static X509 *begin(const uint8_t public_key[SIGN_PUBLIC_SIZE], int64_t from_s, int64_t until_s, const struct rng *rng)
{
    EVP_PKEY *pkey = EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, public_key, SIGN_PUBLIC_SIZE);
    X509 *x509 = X509_new();

    if (!pkey || !x509 || X509_set_version(x509, X509_VERSION_3) != 1 || set_serial(x509, rng) < 0 ||
        set_validity(x509, from_s, until_s) < 0 || X509_set_pubkey(x509, pkey) != 1) {
        X509_free(x509);
        x509 = NULL;
    }
    EVP_PKEY_free(pkey);
    return x509;
}

static int check_days(unsigned days, struct error *err)
{
    if (days < 1 || days > DAYS_MAX)
        return error_set(err, ERR_CONFIG, "validity of %u days: expected 1 to %d", days, DAYS_MAX);
    return 0;
}

int authority_create(const struct identity_key *key, const char *federation_id, int64_t now_s, unsigned days,
                     const struct rng *rng, struct certificate **ret_ca, struct error *err)
{
    GENERAL_NAMES *names = NULL;
    X509_NAME *name;
    X509 *x509;
    char common_name[16 + IDENTITY_ID_SIZE];

    if (!identity_id_valid(federation_id))
        return error_set(err, ERR_CONFIG, "\"%.64s\" is no federation id: 1 to 63 of a-z, 0-9 and -", federation_id);
    if (check_days(days, err) < 0)
        return ERR_CONFIG;
    /* 64 characters is the limit of a common name (RFC 5280, ub-common-name). */
    snprintf(common_name, sizeof common_name, "%s", federation_id);
    names = x509_names(IDENTITY_AUTHORITY, federation_id);
    x509 = begin(identity_public(key), now_s - CLOCK_SLACK_S, now_s + (int64_t)days * DAY_S, rng);
    if (!names || !x509 || !(name = X509_get_subject_name(x509)) ||
        X509_NAME_add_entry_by_txt(name, "O", MBSTRING_ASC, (const uint8_t *)"consilium", -1, -1, 0) != 1 ||
        X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const uint8_t *)common_name, -1, -1, 0) != 1 ||
        X509_set_issuer_name(x509, name) != 1 ||
        add_extension(x509, x509, NID_basic_constraints, "critical,CA:TRUE,pathlen:0") < 0 ||
        add_extension(x509, x509, NID_key_usage, "critical,keyCertSign,cRLSign") < 0 ||
        add_extension(x509, x509, NID_subject_key_identifier, "hash") < 0 ||
        X509_add1_ext_i2d(x509, NID_subject_alt_name, names, 0, X509V3_ADD_DEFAULT) != 1 ||
        X509_sign(x509, identity_evp(key), NULL) <= 0) {
        GENERAL_NAMES_free(names);
        X509_free(x509);
        return x509_fail(err, ERR_RESOURCES, "cannot make the CA certificate");
    }
    GENERAL_NAMES_free(names);
    return certificate_adopt(x509, ret_ca, err);
}

static int check_authority(const struct identity_key *key, const struct certificate *ca, int64_t now_s,
                           struct error *err)
{
    if (certificate_kind(ca) != IDENTITY_AUTHORITY || X509_check_ca(certificate_x509(ca)) != 1 ||
        memcmp(certificate_public(ca), identity_public(key), SIGN_PUBLIC_SIZE) != 0)
        return error_set(err, ERR_CONFIG, "this key does not belong to the CA certificate of \"%s\"",
                         certificate_id(ca));
    if (now_s < certificate_not_before_s(ca) || now_s > certificate_not_after_s(ca))
        return error_set(err, ERR_CONFIG, "the CA certificate of \"%s\" is not valid now", certificate_id(ca));
    return 0;
}

/* An end-entity certificate under the CA. names is taken over. */
static int issue(const struct identity_key *key, const struct certificate *ca,
                 const uint8_t public_key[SIGN_PUBLIC_SIZE], GENERAL_NAMES *names, const char *usage, int64_t now_s,
                 unsigned days, const struct rng *rng, struct certificate **ret_certificate, struct error *err)
{
    int64_t until_s = now_s + (int64_t)days * DAY_S, from_s = now_s - CLOCK_SLACK_S;
    X509 *issuer = certificate_x509(ca), *x509;
    bool ok;

    if (until_s > certificate_not_after_s(ca))
        until_s = certificate_not_after_s(ca);
    if (from_s < certificate_not_before_s(ca))
        from_s = certificate_not_before_s(ca);
    x509 = begin(public_key, from_s, until_s, rng);
    /* The subject is empty: the only name is the alternative one, critical as RFC 5280 section 4.2.1.6 then wants. */
    ok = x509 && X509_set_issuer_name(x509, X509_get_subject_name(issuer)) == 1 &&
         add_extension(x509, issuer, NID_basic_constraints, "critical,CA:FALSE") == 0 &&
         add_extension(x509, issuer, NID_key_usage, "critical,digitalSignature") == 0 &&
         add_extension(x509, issuer, NID_ext_key_usage, usage) == 0 &&
         add_extension(x509, issuer, NID_subject_key_identifier, "hash") == 0 &&
         add_extension(x509, issuer, NID_authority_key_identifier, "keyid:always") == 0 &&
         X509_add1_ext_i2d(x509, NID_subject_alt_name, names, 1, X509V3_ADD_DEFAULT) == 1 &&
         X509_sign(x509, identity_evp(key), NULL) > 0;
    GENERAL_NAMES_free(names);
    if (!ok) {
        X509_free(x509);
        return x509_fail(err, ERR_RESOURCES, "cannot make the certificate");
    }
    return certificate_adopt(x509, ret_certificate, err);
}

int authority_approve(const struct identity_key *key, const struct certificate *ca, struct span request_pem,
                      int64_t now_s, unsigned days, const struct rng *rng, struct certificate **ret_certificate,
                      struct error *err)
{
    struct identity_request_info info;
    GENERAL_NAMES *names;
    int rc = check_authority(key, ca, now_s, err);

    if (rc < 0 || (rc = check_days(days, err)) < 0 || (rc = identity_request_read(request_pem, &info, err)) < 0)
        return rc;
    if (info.kind != IDENTITY_SITE)
        return error_set(err, ERR_INTEGRITY, "certificate request: \"%s\" does not ask for a site's certificate",
                         info.id);
    names = x509_names(IDENTITY_SITE, info.id);
    if (!names)
        return x509_fail(err, ERR_RESOURCES, "cannot name the certificate");
    return issue(key, ca, info.public_key, names, "clientAuth", now_s, days, rng, ret_certificate, err);
}

/* A DNS name of letters, digits, hyphens and dots, or an IP address in text. */
static int add_host(GENERAL_NAMES *names, const char *host)
{
    GENERAL_NAME *name = GENERAL_NAME_new();
    ASN1_OCTET_STRING *address = a2i_IPADDRESS(host);
    ASN1_IA5STRING *dns = NULL;
    size_t len = strlen(host);

    ERR_clear_error();
    if (!name)
        goto fail;
    if (address) {
        GENERAL_NAME_set0_value(name, GEN_IPADD, address);
        address = NULL;
    } else {
        if (len < 1 || len > 253 ||
            strspn(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.") != len)
            goto fail;
        dns = ASN1_IA5STRING_new();
        if (!dns || ASN1_STRING_set(dns, host, -1) != 1)
            goto fail;
        GENERAL_NAME_set0_value(name, GEN_DNS, dns);
        dns = NULL;
    }
    if (sk_GENERAL_NAME_push(names, name) <= 0)
        goto fail;
    return 0;
fail:
    ASN1_IA5STRING_free(dns);
    ASN1_OCTET_STRING_free(address);
    GENERAL_NAME_free(name);
    return -1;
}

int authority_server(const struct identity_key *key, const struct certificate *ca,
                     const uint8_t server_public[SIGN_PUBLIC_SIZE], const char *const *host_names, size_t name_count,
                     int64_t now_s, unsigned days, const struct rng *rng, struct certificate **ret_certificate,
                     struct error *err)
{
    GENERAL_NAMES *names;
    int rc = check_authority(key, ca, now_s, err);

    if (rc < 0 || (rc = check_days(days, err)) < 0)
        return rc;
    names = x509_names(IDENTITY_AGGREGATOR, certificate_id(ca));
    if (!names)
        return x509_fail(err, ERR_RESOURCES, "cannot name the certificate");
    for (size_t i = 0; i < name_count; i++)
        if (add_host(names, host_names[i]) < 0) {
            GENERAL_NAMES_free(names);
            return error_set(err, ERR_CONFIG, "\"%.253s\" is neither a DNS name nor an IP address", host_names[i]);
        }
    return issue(key, ca, server_public, names, "serverAuth", now_s, days, rng, ret_certificate, err);
}

static int add_revoked(X509_CRL *crl, struct span serial, const ASN1_TIME *when)
{
    X509_REVOKED *revoked = X509_REVOKED_new();
    ASN1_INTEGER *number = ASN1_INTEGER_new();
    int ok = revoked && number && serial.len >= 1 && serial.len <= SERIAL_SIZE &&
             ASN1_STRING_set(number, serial.ptr, (int)serial.len) == 1 &&
             X509_REVOKED_set_serialNumber(revoked, number) == 1 &&
             X509_REVOKED_set_revocationDate(revoked, (ASN1_TIME *)(uintptr_t)when) == 1 &&
             X509_CRL_add0_revoked(crl, revoked) == 1;

    if (!ok)
        X509_REVOKED_free(revoked);
    ASN1_INTEGER_free(number);
    return ok ? 0 : -1;
}

int authority_crl(const struct identity_key *key, const struct certificate *ca, const struct span *serials,
                  size_t count, int64_t number, int64_t now_s, unsigned days, struct buffer *ret_pem, struct error *err)
{
    X509_CRL *crl = NULL;
    ASN1_TIME *now = NULL, *next = NULL;
    ASN1_INTEGER *crl_number = NULL;
    bool ok;
    int rc = check_authority(key, ca, now_s, err);

    if (rc < 0 || (rc = check_days(days, err)) < 0)
        return rc;
    crl = X509_CRL_new();
    now = ASN1_TIME_set(NULL, (time_t)(now_s - CLOCK_SLACK_S));
    next = ASN1_TIME_set(NULL, (time_t)(now_s + (int64_t)days * DAY_S));
    crl_number = ASN1_INTEGER_new();
    ok = crl && now && next && crl_number && X509_CRL_set_version(crl, X509_CRL_VERSION_2) == 1 &&
         X509_CRL_set_issuer_name(crl, X509_get_subject_name(certificate_x509(ca))) == 1 &&
         X509_CRL_set1_lastUpdate(crl, now) == 1 && X509_CRL_set1_nextUpdate(crl, next) == 1 &&
         ASN1_INTEGER_set_int64(crl_number, number) == 1 &&
         X509_CRL_add1_ext_i2d(crl, NID_crl_number, crl_number, 0, X509V3_ADD_DEFAULT) == 1;
    for (size_t i = 0; ok && i < count; i++)
        ok = add_revoked(crl, serials[i], now) == 0;
    if (ok) {
        /* RFC 5280 section 5.2.1 wants the issuer's key identifier in every list. */
        X509V3_CTX ctx;
        X509_EXTENSION *extension;
        X509V3_set_ctx_nodb(&ctx);
        X509V3_set_ctx(&ctx, certificate_x509(ca), NULL, NULL, crl, 0);
        extension = X509V3_EXT_conf_nid(NULL, &ctx, NID_authority_key_identifier, "keyid:always");
        ok = extension && X509_CRL_add_ext(crl, extension, -1) == 1;
        X509_EXTENSION_free(extension);
    }
    ok = ok && X509_CRL_sort(crl) == 1 && X509_CRL_sign(crl, identity_evp(key), NULL) > 0;
    rc = ok ? x509_append_pem(ret_pem, (int (*)(BIO *, const void *))PEM_write_bio_X509_CRL, crl, err)
            : x509_fail(err, ERR_RESOURCES, "cannot make the revocation list");
    ASN1_INTEGER_free(crl_number);
    ASN1_TIME_free(now);
    ASN1_TIME_free(next);
    X509_CRL_free(crl);
    return rc;
}
