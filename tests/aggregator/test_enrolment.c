/* Registry and vault against each other: who is let in, and that nothing is stored of what does not fit. */
#include "aggregator/settings.h"
#include "base/file.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "node/settings.h"
#include "tests/aggregator/federation_fixture.h"

#include <unistd.h>

static struct fixture_federation f;
static struct config *sites[3];

static int set_up(void **state)
{
    static const char *const names[] = {"clinic-a", "clinic-b", "clinic-c"};
    (void)state;
    fixture_federation_open(&f, "test");
    for (size_t i = 0; i < ARRAY_LEN(sites); i++) {
        sites[i] = fixture_site(&f, names[i]);
        fixture_certify(&f, sites[i]);
    }
    fixture_sign_roster(&f, f.governance, "roster.bin");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(sites); i++)
        config_free(sites[i]);
    fixture_federation_release(&f);
    return 0;
}

static void hex_of(const uint8_t hash[HASH_SIZE], char out[2 * HASH_SIZE + 1])
{
    hex_encode(hash, HASH_SIZE, out);
}

static char ca_text[65], governance_text[65];

static struct enrolment right(void)
{
    static char certificate[256], ca[256], roster[256], governance[256];
    uint8_t fingerprint[HASH_SIZE];
    identity_public_fingerprint(identity_public(f.governance), fingerprint);
    hex_of(f.ca_fingerprint, ca_text);
    hex_of(fingerprint, governance_text);
    snprintf(certificate, sizeof certificate, "%s", fixture_path(&f, "clinic-a.crt"));
    snprintf(ca, sizeof ca, "%s", fixture_path(&f, "aggregator/ca.crt"));
    snprintf(roster, sizeof roster, "%s", fixture_path(&f, "roster.bin"));
    snprintf(governance, sizeof governance, "%s", fixture_path(&f, "governance.pub"));
    return (struct enrolment){certificate, ca, roster, governance, ca_text, governance_text};
}

static void refused(const struct enrolment *e, int code, const char *text)
{
    static const char *const written[] = {"ca.crt", "site.crt", "governance.pub", "roster.bin"};
    char path[NODE_PATH_SIZE];
    struct error err = {0};
    const int rc = vault_enroll(sites[0], e, &clock_system, &err);
    if (rc != code || !strstr(err.message, text))
        fail_msg("code %d, expected %d with \"%s\": %s", rc, code, text, err.message);
    for (size_t i = 0; i < ARRAY_LEN(written); i++) {
        node_path(sites[0], written[i], path);
        assert_false(file_exists(path));
    }
}

static void nothing_is_stored_of_what_does_not_fit(void **state)
{
    struct fixture_federation other;
    struct config *twin;
    struct enrolment e;
    struct vault v;
    struct error err = {0};
    char wrong[65], path[NODE_PATH_SIZE];
    (void)state;
    memset(wrong, 'a', 64);
    wrong[64] = 0;
    e = right();
    e.ca_fingerprint = wrong;
    refused(&e, ERR_INTEGRITY, "CA certificate");
    e = right();
    e.governance_fingerprint = wrong;
    refused(&e, ERR_INTEGRITY, "governance key");
    e = right();
    e.ca_fingerprint = "12";
    refused(&e, ERR_CONFIG, "64 hexadecimal");
    e = right();
    e.certificate = fixture_path(&f, "clinic-b.crt");
    refused(&e, ERR_INTEGRITY, "clinic-b");

    /* Another CA signs the same site's own request: the CA does not fit; with its CA, the roster does not list it. */
    fixture_federation_open(&other, "test");
    twin = fixture_config(&other, &node_schema,
                          "version: 1\nsite: clinic-a\nstate: clinic-a\naggregator: {url: \"tcp://127.0.0.1:1\", "
                          "federation: test}\nmodel: {path: none.gguf}\n");
    struct buffer request;
    buffer_init(&request, IDENTITY_PEM_MAX);
    node_path(sites[0], "site.csr", path);
    assert_int_equal(file_read(path, &request, &err), 0);
    assert_int_equal(file_make_folder(fixture_path(&other, "clinic-a"), 0700, &err), 0);
    fixture_write(&other, "clinic-a/site.csr", buffer_span(&request));
    fixture_certify(&other, twin);
    e = right();
    e.certificate = fixture_path(&other, "clinic-a.crt");
    refused(&e, ERR_INTEGRITY, "not one of this CA");
    hex_of(other.ca_fingerprint, ca_text);
    e.ca = fixture_path(&other, "aggregator/ca.crt");
    refused(&e, ERR_INTEGRITY, "does not list");
    buffer_release(&request);
    config_free(twin);
    fixture_federation_release(&other);

    /* A roster of another governance key. */
    struct identity_key *stranger;
    assert_int_equal(identity_key_create(&random_system, &stranger, &err), 0);
    fixture_sign_roster(&f, stranger, "forged.bin");
    identity_key_free(stranger);
    e = right();
    e.roster = fixture_path(&f, "forged.bin");
    refused(&e, ERR_INTEGRITY, "roster");

    assert_int_equal(vault_open(&v, sites[0], &clock_system, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "enroll"));
    e = right();
    assert_int_equal(vault_enroll(sites[0], &e, &clock_system, &err), 0);
    assert_int_equal(vault_open(&v, sites[0], &clock_system, &err), 0);
    assert_string_equal(certificate_id(v.own), "clinic-a");
    assert_int_equal(v.roster.sites_len, 3);
    vault_release(&v);
}

static void a_roster_of_another_federation(void **state)
{
    struct fixture_federation other;
    struct config *site;
    struct enrolment e;
    struct error err = {0};
    uint8_t fingerprint[HASH_SIZE];
    (void)state;
    fixture_federation_open(&other, "elsewhere");
    site = fixture_site(&other, "clinic-a"); /* its node.yaml says "test" */
    fixture_certify(&other, site);
    fixture_sign_roster(&other, other.governance, "roster.bin");
    identity_public_fingerprint(identity_public(other.governance), fingerprint);
    hex_of(fingerprint, governance_text);
    hex_of(other.ca_fingerprint, ca_text);
    e = (struct enrolment){fixture_path(&other, "clinic-a.crt"),
                           fixture_path(&other, "aggregator/ca.crt"),
                           fixture_path(&other, "roster.bin"),
                           fixture_path(&other, "governance.pub"),
                           ca_text,
                           governance_text};
    assert_int_equal(vault_enroll(site, &e, &clock_system, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "elsewhere"));
    assert_false(file_exists(fixture_path(&other, "clinic-a/roster.bin")));
    config_free(site);
    fixture_federation_release(&other);
}

static void read_all(const char *name, struct buffer *out)
{
    struct error err = {0};
    buffer_init(out, ROSTER_BYTES_MAX);
    assert_int_equal(file_read(fixture_path(&f, name), out, &err), 0);
}

static uint64_t warned_at_serial;

static void warned(void *ctx)
{
    const struct vault *v = ctx;
    assert_true(v->roster.sites_len > 0 && roster_find(&v->roster, v->roster.sites[0].id) == &v->roster.sites[0]);
    warned_at_serial = v->roster.serial;
}

static int take(struct vault *v, struct span roster, bool *ret_changed, struct error *err)
{
    return vault_take_roster(v, roster, warned, v, ret_changed, err);
}

static void rosters_only_move_forward(void **state)
{
    struct config *late = fixture_site(&f, "clinic-d");
    struct enrolment e = right();
    struct buffer first, second, fork;
    struct registry r = {0};
    struct error err = {0};
    struct identity_key *stranger;
    struct vault v;
    bool changed = true;
    (void)state;

    /* The aggregator: the right key is pinned at the first installation; nothing else is taken. */
    assert_int_equal(registry_open(&r, f.aggregator, &err), ERR_CONFIG);
    assert_int_equal(identity_key_create(&random_system, &stranger, &err), 0);
    assert_int_equal(identity_public_store(identity_public(stranger), fixture_path(&f, "stranger.pub"), &err), 0);
    assert_int_equal(
        registry_install(f.aggregator, fixture_path(&f, "roster.bin"), fixture_path(&f, "stranger.pub"), &err),
        ERR_INTEGRITY);
    assert_int_equal(
        registry_install(f.aggregator, fixture_path(&f, "roster.bin"), fixture_path(&f, "governance.pub"), &err), 0);
    fixture_sign_roster(&f, stranger, "forged.bin");
    assert_int_equal(
        registry_install(f.aggregator, fixture_path(&f, "forged.bin"), fixture_path(&f, "stranger.pub"), &err),
        ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "pinned"));
    assert_int_equal(registry_open(&r, f.aggregator, &err), 0);
    assert_int_equal(r.roster.serial, 1);
    registry_release(&r);
    identity_key_free(stranger);

    /* Serial 2 follows 1: two different ones are a fork. */
    fixture_sign_roster(&f, f.governance, "second.bin");
    fixture_certify(&f, late);
    fixture_sign_roster(&f, f.governance, "fork.bin");
    read_all("roster.bin", &first);
    read_all("second.bin", &second);
    read_all("fork.bin", &fork);

    if (vault_enroll(sites[0], &e, &clock_system, &err) < 0 || vault_open(&v, sites[0], &clock_system, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(take(&v, buffer_span(&first), &changed, &err), 0);
    assert_false(changed);
    assert_int_equal(warned_at_serial, 0);
    assert_int_equal(take(&v, buffer_span(&second), &changed, &err), 0);
    assert_true(changed);
    assert_int_equal(warned_at_serial, 1); /* while the old roster's entries could still be let go */
    assert_int_equal(v.roster.serial, 2);
    assert_int_equal(take(&v, buffer_span(&first), &changed, &err), ERR_INTEGRITY);
    assert_int_equal(take(&v, buffer_span(&fork), &changed, &err), ERR_INTEGRITY);
    warned_at_serial = 0;
    second.data[second.len / 2] ^= 1;
    assert_int_equal(take(&v, buffer_span(&second), &changed, &err), ERR_INTEGRITY);
    assert_int_equal(warned_at_serial, 0);
    assert_int_equal(v.roster.serial, 2);
    vault_release(&v);
    assert_int_equal(vault_open(&v, sites[0], &clock_system, &err), 0); /* it was stored */
    assert_int_equal(v.roster.serial, 2);
    vault_release(&v);

    assert_int_equal(
        registry_install(f.aggregator, fixture_path(&f, "fork.bin"), fixture_path(&f, "governance.pub"), &err), 0);
    second.data[second.len / 2] ^= 1;
    assert_int_equal(
        registry_install(f.aggregator, fixture_path(&f, "second.bin"), fixture_path(&f, "governance.pub"), &err),
        ERR_INTEGRITY);
    assert_int_equal(
        registry_install(f.aggregator, fixture_path(&f, "roster.bin"), fixture_path(&f, "governance.pub"), &err),
        ERR_INTEGRITY);
    buffer_release(&first);
    buffer_release(&second);
    buffer_release(&fork);
    config_free(late);
}

static void keys_are_made_once(void **state)
{
    uint8_t fingerprint[HASH_SIZE];
    struct error err = {0};
    (void)state;
    assert_int_equal(vault_create(sites[0], &random_system, fingerprint, &err), ERR_EXISTS);
    assert_int_equal(registry_create(f.aggregator, &clock_system, &random_system, fingerprint, &err), ERR_EXISTS);
    fixture_write(&f, "request.csr", span_str("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"));
    struct buffer pem;
    buffer_init(&pem, IDENTITY_PEM_MAX);
    assert_int_not_equal(registry_approve(f.aggregator, fixture_path(&f, "request.csr"), SITE_TRAINER, &clock_system,
                                          &random_system, &pem, &err),
                         0);
    assert_int_equal(pem.len, 0);
    buffer_release(&pem);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(nothing_is_stored_of_what_does_not_fit, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_roster_of_another_federation, set_up, tear_down),
        cmocka_unit_test_setup_teardown(rosters_only_move_forward, set_up, tear_down),
        cmocka_unit_test_setup_teardown(keys_are_made_once, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
