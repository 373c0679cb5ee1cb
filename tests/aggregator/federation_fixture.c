#include "tests/aggregator/federation_fixture.h"

#include "aggregator/settings.h"
#include "base/file.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "node/settings.h"

#include <ftw.h>
#include <jansson.h>
#include <unistd.h>

const char *fixture_path(const struct fixture_federation *f, const char *name)
{
    static char paths[8][256];
    static unsigned next;
    char *out = paths[next++ % 8];
    snprintf(out, sizeof paths[0], "%s/%s", f->folder, name);
    return out;
}

struct config *fixture_config(const struct fixture_federation *f, const struct config_schema *schema, const char *text)
{
    struct config *config;
    struct error err = {0};
    if (config_parse(&config, schema, span_str(text), schema->name, f->folder, &err) < 0 ||
        config_finish(config, &err) < 0)
        fail_msg("%s", err.message);
    return config;
}

struct config *fixture_site(const struct fixture_federation *f, const char *site)
{
    char text[512];
    snprintf(text, sizeof text,
             "version: 1\nsite: %s\nstate: %s\naggregator: {url: \"tcp://127.0.0.1:1\", federation: test}\n"
             "model: {path: none.gguf}\n",
             site, site);
    return fixture_config(f, &node_schema, text);
}

void fixture_federation_open(struct fixture_federation *f, const char *name)
{
    struct error err = {0};
    char text[256];
    *f = (struct fixture_federation){.folder = "/tmp/consilium-registry-XXXXXX"};
    assert_non_null(mkdtemp(f->folder));
    snprintf(text, sizeof text, "version: 1\nfederation: %s\nstate: aggregator\n", name);
    f->aggregator = fixture_config(f, &aggregator_schema, text);
    assert_int_equal(registry_create(f->aggregator, &clock_system, &random_system, f->ca_fingerprint, &err), 0);
    assert_int_equal(identity_key_create(&random_system, &f->governance, &err), 0);
    assert_int_equal(identity_public_store(identity_public(f->governance), fixture_path(f, "governance.pub"), &err), 0);
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *walk)
{
    (void)info;
    (void)kind;
    (void)walk;
    return remove(path);
}

void fixture_federation_release(struct fixture_federation *f)
{
    config_free(f->aggregator);
    identity_key_free(f->governance);
    nftw(f->folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

void fixture_write(const struct fixture_federation *f, const char *name, struct span bytes)
{
    struct error err = {0};
    assert_int_equal(file_write_atomic(fixture_path(f, name), bytes, 0644, &err), 0);
}

void fixture_certify(const struct fixture_federation *f, const struct config *site)
{
    uint8_t fingerprint[HASH_SIZE];
    struct error err = {0};
    struct buffer pem;
    char request[NODE_PATH_SIZE], name[80];
    buffer_init(&pem, IDENTITY_PEM_MAX);
    node_path(site, "site.csr", request);
    if (!file_exists(request))
        assert_int_equal(vault_create(site, &random_system, fingerprint, &err), 0);
    if (registry_approve(f->aggregator, request, SITE_TRAINER, &clock_system, &random_system, &pem, &err) < 0)
        fail_msg("%s", err.message);
    snprintf(name, sizeof name, "%s.crt", config_string(site, "site"));
    fixture_write(f, name, buffer_span(&pem));
    buffer_release(&pem);
}

static void take(const json_t *json, const char *key, uint8_t *out, size_t len)
{
    assert_int_equal(hex_decode(json_string_value(json_object_get(json, key)), out, len), 0);
}

void fixture_sign_roster(const struct fixture_federation *f, const struct identity_key *key, const char *name)
{
    struct roster r;
    struct buffer draft, out;
    struct error err = {0};
    json_t *json, *item;
    size_t i;
    roster_init(&r);
    buffer_init(&draft, ROSTER_BYTES_MAX);
    buffer_init(&out, ROSTER_BYTES_MAX);
    const char *author = fixture_path(f, "governance.pub");
    if (registry_draft(f->aggregator, &author, 1, &clock_system, &draft, &err) < 0)
        fail_msg("%s", err.message);
    json = json_loadb((const char *)draft.data, draft.len, 0, NULL);
    assert_non_null(json);
    snprintf(r.federation, sizeof r.federation, "%s", json_string_value(json_object_get(json, "federation")));
    r.serial = (uint64_t)json_integer_value(json_object_get(json, "serial"));
    r.not_before_s = json_integer_value(json_object_get(json, "not_before_s"));
    r.not_after_s = json_integer_value(json_object_get(json, "not_after_s"));
    take(json, "previous_hash", r.previous_hash, HASH_SIZE);
    take(json, "aggregator_key", r.aggregator_key, SIGN_PUBLIC_SIZE);
    take(json, "aggregator_certificate_sha256", r.aggregator_certificate_hash, HASH_SIZE);
    json_array_foreach(json_object_get(json, "sites"), i, item)
    {
        struct roster_site site = {.role = SITE_TRAINER};
        snprintf(site.id, sizeof site.id, "%s", json_string_value(json_object_get(item, "id")));
        take(item, "certificate_sha256", site.certificate_hash, HASH_SIZE);
        take(item, "key", site.public_key, SIGN_PUBLIC_SIZE);
        site.certificate_not_after_s = json_integer_value(json_object_get(item, "certificate_not_after_s"));
        assert_int_equal(roster_add_site(&r, &site, &err), 0);
    }
    assert_int_equal(roster_add_author(&r, identity_public(f->governance), &err), 0);
    if (roster_sign(&r, identity_sign_key(key), &out, &err) < 0)
        fail_msg("%s", err.message);
    fixture_write(f, name, buffer_span(&out));
    json_decref(json);
    buffer_release(&draft);
    buffer_release(&out);
    roster_release(&r);
}
