#include <openssl/evp.h> /* first: it names a parameter "rand", which base/banned.h poisons */
#include <openssl/x509v3.h>

#include "helpers.h"

#include "base/file.h"
#include "crypto/authority.h"

#include <sys/stat.h>

enum { NOW = 1800000000, DAY = 86400 };

struct world {
    struct identity_key *ca_key, *site_key, *server_key;
    struct certificate *ca, *site, *server;
    struct buffer request;
    char folder[64];
};

static void make_request(const struct identity_key *key, enum identity_kind kind, const char *id, struct buffer *out)
{
    buffer_init(out, IDENTITY_PEM_MAX);
    assert_int_equal(identity_request(key, kind, id, out, NULL), 0);
}

static int set_up(void **state)
{
    static const char *const names[] = {"localhost", "127.0.0.1", "::1"};
    struct world *w = calloc(1, sizeof *w);

    assert_non_null(w);
    snprintf(w->folder, sizeof w->folder, "/tmp/consilium-identity-XXXXXX");
    assert_non_null(mkdtemp(w->folder));
    assert_int_equal(identity_key_create(&random_system, &w->ca_key, NULL), 0);
    assert_int_equal(identity_key_create(&random_system, &w->site_key, NULL), 0);
    assert_int_equal(identity_key_create(&random_system, &w->server_key, NULL), 0);
    assert_int_equal(authority_create(w->ca_key, "demo", NOW, 3650, &random_system, &w->ca, NULL), 0);
    make_request(w->site_key, IDENTITY_SITE, "clinic-a", &w->request);
    assert_int_equal(
        authority_approve(w->ca_key, w->ca, buffer_span(&w->request), NOW, 365, &random_system, &w->site, NULL), 0);
    assert_int_equal(authority_server(w->ca_key, w->ca, identity_public(w->server_key), names, ARRAY_LEN(names), NOW,
                                      365, &random_system, &w->server, NULL),
                     0);
    *state = w;
    return 0;
}

static int tear_down(void **state)
{
    struct world *w = *state;

    certificate_free(w->ca);
    certificate_free(w->site);
    certificate_free(w->server);
    identity_key_free(w->ca_key);
    identity_key_free(w->site_key);
    identity_key_free(w->server_key);
    buffer_release(&w->request);
    rmdir(w->folder);
    free(w);
    return 0;
}

static void issued_certificates_verify(void **state)
{
    struct world *w = *state;
    struct error err = {0};
    uint8_t hash[HASH_SIZE];

    assert_int_equal(certificate_verify(w->site, w->ca, NULL, IDENTITY_SITE, NOW, &err), 0);
    assert_int_equal(certificate_verify(w->server, w->ca, NULL, IDENTITY_AGGREGATOR, NOW, &err), 0);
    assert_string_equal(certificate_id(w->site), "clinic-a");
    assert_string_equal(certificate_id(w->server), "demo");
    assert_string_equal(certificate_id(w->ca), "demo");
    assert_int_equal(certificate_kind(w->ca), IDENTITY_AUTHORITY);
    assert_memory_equal(certificate_public(w->site), identity_public(w->site_key), 32);
    hash_bytes(certificate_der(w->site), hash);
    assert_memory_equal(certificate_fingerprint(w->site), hash, HASH_SIZE);
    assert_int_equal(certificate_not_after_s(w->site), NOW + 365 * DAY);
    assert_int_equal(certificate_serial(w->site).len, 20);
    assert_false(span_equal(certificate_serial(w->site), certificate_serial(w->server)));
}

static void wrong_time_role_or_issuer_is_refused(void **state)
{
    struct world *w = *state;
    struct identity_key *other_key = NULL;
    struct certificate *other_ca = NULL, *stranger = NULL;
    struct error err = {0};

    assert_int_equal(certificate_verify(w->site, w->ca, NULL, IDENTITY_SITE, NOW + 366 * DAY, &err), ERR_CONNECT);
    assert_non_null(strstr(err.message, "expired"));
    assert_int_equal(certificate_verify(w->site, w->ca, NULL, IDENTITY_SITE, NOW - 2 * 3600, &err), ERR_CONNECT);
    assert_int_equal(certificate_verify(w->site, w->ca, NULL, IDENTITY_AGGREGATOR, NOW, &err), ERR_CONNECT);
    assert_int_equal(certificate_verify(w->server, w->ca, NULL, IDENTITY_SITE, NOW, &err), ERR_CONNECT);
    assert_int_equal(certificate_verify(w->ca, w->ca, NULL, IDENTITY_SITE, NOW, &err), ERR_CONNECT);
    /* a CA of the same name with another key */
    assert_int_equal(identity_key_create(&random_system, &other_key, NULL), 0);
    assert_int_equal(authority_create(other_key, "demo", NOW, 3650, &random_system, &other_ca, NULL), 0);
    assert_int_equal(
        authority_approve(other_key, other_ca, buffer_span(&w->request), NOW, 365, &random_system, &stranger, NULL), 0);
    assert_int_equal(certificate_verify(stranger, w->ca, NULL, IDENTITY_SITE, NOW, &err), ERR_CONNECT);
    assert_int_equal(certificate_verify(stranger, other_ca, NULL, IDENTITY_SITE, NOW, &err), 0);
    certificate_free(stranger);
    stranger = NULL;
    /* signing with a key that is not the CA's, and with a certificate that is no CA */
    assert_int_equal(
        authority_approve(other_key, w->ca, buffer_span(&w->request), NOW, 365, &random_system, &stranger, &err),
        ERR_CONFIG);
    assert_int_equal(
        authority_approve(w->site_key, w->site, buffer_span(&w->request), NOW, 365, &random_system, &stranger, &err),
        ERR_CONFIG);
    assert_null(stranger);
    certificate_free(other_ca);
    identity_key_free(other_key);
}

/* The authority never issues it, so it is made here: a site's certificate, signed anew by the CA with another extended
 * key usage. The URI says site and the signature is good; only the usage is wrong. */
static void wrong_extended_key_usage_is_refused(void **state)
{
    struct world *w = *state;
    static const struct {
        const char *usage;
        int expected;
    } cases[] = {{"serverAuth", ERR_CONNECT}, {"clientAuth", 0}};

    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct certificate *c = NULL;
        X509 *x509 = X509_dup(certificate_x509(w->site));
        X509_EXTENSION *usage = X509V3_EXT_conf_nid(NULL, NULL, NID_ext_key_usage, cases[i].usage);
        int at = X509_get_ext_by_NID(x509, NID_ext_key_usage, -1);

        assert_true(at >= 0);
        X509_EXTENSION_free(X509_delete_ext(x509, at));
        assert_int_equal(X509_add_ext(x509, usage, at), 1);
        assert_true(X509_sign(x509, identity_evp(w->ca_key), NULL) > 0);
        assert_int_equal(certificate_from_x509(x509, &c, NULL), 0);
        assert_int_equal(certificate_verify(c, w->ca, NULL, IDENTITY_SITE, NOW, NULL), cases[i].expected);
        X509_EXTENSION_free(usage);
        X509_free(x509);
        certificate_free(c);
    }
}

/* Truncated, a NUL inside the name, and an object identifier changed under the signature. */
static void changed_bytes_are_refused(void **state)
{
    struct world *w = *state;
    static const uint8_t client_auth[] = {0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02};
    struct span der = certificate_der(w->site);
    uint8_t *copy = malloc(der.len), *at;
    struct certificate *c = NULL;
    struct error err = {0};

    assert_non_null(copy);
    memcpy(copy, der.ptr, der.len);
    assert_int_equal(certificate_parse(span_of(copy, der.len), &c, &err), 0);
    assert_int_equal(certificate_verify(c, w->ca, NULL, IDENTITY_SITE, NOW, &err), 0);
    certificate_free(c);
    at = memmem(copy, der.len, client_auth, sizeof client_auth);
    assert_non_null(at);
    at[7] = 1;
    assert_int_equal(certificate_parse(span_of(copy, der.len), &c, &err), 0);
    assert_int_equal(certificate_verify(c, w->ca, NULL, IDENTITY_SITE, NOW, &err), ERR_CONNECT);
    certificate_free(c);
    c = NULL;
    memcpy(copy, der.ptr, der.len);
    at = memmem(copy, der.len, "clinic-a", 8);
    assert_non_null(at);
    at[2] = 0; /* a NUL inside the name */
    assert_int_equal(certificate_parse(span_of(copy, der.len), &c, &err), ERR_INTEGRITY);
    for (size_t len = 0; len < der.len; len += 7)
        assert_int_equal(certificate_parse(span_of(der.ptr, len), &c, &err), ERR_INTEGRITY);
    assert_int_equal(certificate_parse(span_str("-----BEGIN CERTIFICATE-----\nAAAA\n"), &c, &err), ERR_INTEGRITY);
    assert_null(c);
    free(copy);
}

static void revocation(void **state)
{
    struct world *w = *state;
    struct span serial = certificate_serial(w->site);
    struct buffer pem;
    struct certificate_crl *crl = NULL;
    struct identity_key *other_key = NULL;
    struct certificate *other_ca = NULL;
    struct error err = {0};

    buffer_init(&pem, 1 << 20);
    assert_int_equal(authority_crl(w->ca_key, w->ca, &serial, 1, 7, NOW, 30, &pem, NULL), 0);
    assert_int_equal(certificate_crl_parse(buffer_span(&pem), &crl, NULL), 0);
    assert_int_equal(certificate_crl_number(crl), 7);
    assert_int_equal(certificate_verify(w->site, w->ca, crl, IDENTITY_SITE, NOW, &err), ERR_CONNECT);
    assert_non_null(strstr(err.message, "revoked"));
    assert_int_equal(certificate_verify(w->server, w->ca, crl, IDENTITY_AGGREGATOR, NOW, &err), 0);
    assert_int_equal(certificate_verify(w->server, w->ca, crl, IDENTITY_AGGREGATOR, NOW + 31 * DAY, &err), ERR_CONNECT);
    certificate_crl_free(crl);
    /* a list by another authority of the same name says nothing */
    assert_int_equal(identity_key_create(&random_system, &other_key, NULL), 0);
    assert_int_equal(authority_create(other_key, "demo", NOW, 3650, &random_system, &other_ca, NULL), 0);
    buffer_clear(&pem);
    assert_int_equal(authority_crl(other_key, other_ca, NULL, 0, 8, NOW, 30, &pem, NULL), 0);
    assert_int_equal(certificate_crl_parse(buffer_span(&pem), &crl, NULL), 0);
    assert_int_equal(certificate_verify(w->site, w->ca, crl, IDENTITY_SITE, NOW, &err), ERR_CONNECT);
    certificate_crl_free(crl);
    certificate_free(other_ca);
    identity_key_free(other_key);
    assert_int_equal(certificate_crl_parse(span_str("x"), &crl, &err), ERR_INTEGRITY);
    buffer_release(&pem);
}

static void requests(void **state)
{
    struct world *w = *state;
    struct identity_request_info info;
    struct certificate *c = NULL;
    struct buffer pem;
    struct error err = {0};
    uint8_t hash[HASH_SIZE];
    char *at;

    assert_int_equal(identity_request_read(buffer_span(&w->request), &info, &err), 0);
    assert_string_equal(info.id, "clinic-a");
    assert_int_equal(info.kind, IDENTITY_SITE);
    identity_public_fingerprint(identity_public(w->site_key), hash);
    assert_memory_equal(info.key_fingerprint, hash, HASH_SIZE);
    make_request(w->server_key, IDENTITY_AGGREGATOR, "demo", &pem);
    assert_int_equal(authority_approve(w->ca_key, w->ca, buffer_span(&pem), NOW, 1, &random_system, &c, &err),
                     ERR_INTEGRITY);
    /* a changed character breaks the request's own signature */
    at = memmem(pem.data, pem.len, "\n-----END", 9);
    assert_non_null(at);
    at -= 10; /* within the signature: the structure still parses */
    *at = *at == 'A' ? 'B' : 'A';
    assert_int_equal(identity_request_read(buffer_span(&pem), &info, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "signed by its own key"));
    buffer_release(&pem);
    assert_int_equal(identity_request_read(span_str("hello"), &info, &err), ERR_INTEGRITY);
    buffer_init(&pem, 100);
    assert_int_equal(identity_request(w->site_key, IDENTITY_SITE, "Clinic A", &pem, &err), ERR_CONFIG);
    assert_int_equal(identity_request(w->site_key, IDENTITY_SITE, "clinic-b", &pem, &err), ERR_RESOURCES);
    buffer_release(&pem);
    assert_true(identity_id_valid("a-1"));
    assert_false(identity_id_valid(""));
    assert_false(identity_id_valid("a/b"));
    assert_false(identity_id_valid("a123456789012345678901234567890123456789012345678901234567890123"));
    assert_int_equal(authority_server(w->ca_key, w->ca, identity_public(w->server_key), (const char *[]){"bad name"}, 1,
                                      NOW, 1, &random_system, &c, &err),
                     ERR_CONFIG);
    assert_null(c);
}

static void key_files(void **state)
{
    struct world *w = *state;
    struct identity_key *again = NULL;
    struct certificate *c = NULL;
    char key_path[128], public_path[128], certificate_path[128];
    uint8_t public_key[32], signature[SIGN_SIZE];
    struct error err = {0};
    struct stat st;

    file_join(key_path, sizeof key_path, w->folder, "site.key");
    file_join(public_path, sizeof public_path, w->folder, "governance.pub");
    file_join(certificate_path, sizeof certificate_path, w->folder, "site.crt");
    assert_int_equal(identity_key_load(key_path, &again, &err), ERR_NOT_FOUND);
    assert_int_equal(identity_key_store(w->site_key, key_path, &err), 0);
    assert_int_equal(identity_key_store(w->site_key, key_path, &err), ERR_EXISTS);
    assert_int_equal(stat(key_path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(identity_key_load(key_path, &again, &err), 0);
    sign_parts(identity_sign_key(again), "x", NULL, 0, signature);
    assert_int_equal(sign_verify(identity_public(w->site_key), "x", NULL, 0, signature), 0);
    identity_key_free(again);
    again = NULL;
    assert_int_equal(chmod(key_path, 0644), 0);
    assert_int_equal(identity_key_load(key_path, &again, &err), ERR_CONFIG);
    assert_int_equal(identity_public_store(identity_public(w->ca_key), public_path, &err), 0);
    assert_int_equal(identity_public_load(public_path, public_key, &err), 0);
    assert_memory_equal(public_key, identity_public(w->ca_key), 32);
    assert_int_equal(certificate_store(w->site, certificate_path, &err), 0);
    assert_int_equal(certificate_load(certificate_path, &c, &err), 0);
    assert_memory_equal(certificate_fingerprint(c), certificate_fingerprint(w->site), HASH_SIZE);
    certificate_free(c);
    assert_int_equal(chmod(public_path, 0600), 0);
    assert_int_equal(identity_key_load(public_path, &again, &err), ERR_INTEGRITY);
    assert_int_equal(identity_public_load(certificate_path, public_key, &err), ERR_INTEGRITY);
    assert_null(again);
    unlink(key_path);
    unlink(public_path);
    unlink(certificate_path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(issued_certificates_verify),
        cmocka_unit_test(wrong_time_role_or_issuer_is_refused),
        cmocka_unit_test(wrong_extended_key_usage_is_refused),
        cmocka_unit_test(changed_bytes_are_refused),
        cmocka_unit_test(revocation),
        cmocka_unit_test(requests),
        cmocka_unit_test(key_files),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
