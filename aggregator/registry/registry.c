#include "aggregator/registry/registry.h"

#include "aggregator/settings.h"
#include "base/file.h"
#include "base/hex.h"
#include "crypto/authority.h"

#include <dirent.h>
#include <jansson.h>

#define CA_DAYS 3650

static int store_new(const struct config *config, const char *key_name, const char *certificate_name,
                     const struct identity_key *key, const struct certificate *certificate, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE];
    int rc;

    aggregator_path(config, key_name, path);
    if ((rc = identity_key_store(key, path, err)) < 0)
        return rc;
    aggregator_path(config, certificate_name, path);
    return certificate_store(certificate, path, err);
}

int registry_create(const struct config *config, const struct clock *clock, const struct rng *rng,
                    uint8_t ret_fingerprint[HASH_SIZE], struct error *err)
{
    const char *federation = config_string(config, "federation"), *names[16];
    size_t name_count = config_list_count(config, "listen.names");
    int64_t now_s = clock_wall_ms(clock) / 1000;
    struct identity_key *ca_key = NULL, *server_key = NULL;
    struct certificate *ca = NULL, *server = NULL;
    char path[AGGREGATOR_PATH_SIZE];
    int rc;

    if (!identity_id_valid(federation))
        return config_fail(config, "federation", err, "'%s' is not a name: 1 to 63 of a-z, 0-9 and -", federation);
    for (size_t i = 0; i < name_count; i++)
        names[i] = config_list_item(config, "listen.names", i);
    aggregator_path(config, "sites", path);
    if ((rc = file_make_folder(path, 0700, err)) < 0)
        return rc;
    aggregator_path(config, "ca.key", path);
    if (file_exists(path))
        return error_set(err, ERR_EXISTS, "%s exists: this aggregator was initialised before", path);
    if ((rc = identity_key_create(rng, &ca_key, err)) == 0 && (rc = identity_key_create(rng, &server_key, err)) == 0 &&
        (rc = authority_create(ca_key, federation, now_s, CA_DAYS, rng, &ca, err)) == 0 &&
        (rc = authority_server(ca_key, ca, identity_public(server_key), names, name_count, now_s,
                               (unsigned)config_int(config, "certificates.days"), rng, &server, err)) == 0 &&
        (rc = store_new(config, "server.key", "server.crt", server_key, server, err)) == 0 &&
        (rc = store_new(config, "ca.key", "ca.crt", ca_key, ca, err)) == 0)
        memcpy(ret_fingerprint, certificate_fingerprint(ca), HASH_SIZE);
    certificate_free(ca);
    certificate_free(server);
    identity_key_free(ca_key);
    identity_key_free(server_key);
    return rc;
}

int registry_read_request(const char *request_path, struct identity_request_info *ret_info, struct error *err)
{
    struct buffer pem;
    int rc;

    buffer_init(&pem, IDENTITY_PEM_MAX);
    if ((rc = file_read(request_path, &pem, err)) == 0 &&
        (rc = identity_request_read(buffer_span(&pem), ret_info, err)) < 0)
        rc = error_prefix(err, "%s", request_path);
    buffer_release(&pem);
    return rc;
}

static int store_site(const struct config *config, const struct certificate *certificate, enum site_role role,
                      struct error *err)
{
    char name[SITE_ID_SIZE + 16], path[AGGREGATOR_PATH_SIZE];
    int rc;

    snprintf(name, sizeof name, "sites/%s.role", certificate_id(certificate));
    aggregator_path(config, name, path);
    if ((rc = file_write_atomic(path, span_str(role == SITE_TRAINER ? "trainer\n" : "evaluator\n"), 0644, err)) < 0)
        return rc;
    snprintf(name, sizeof name, "sites/%s.crt", certificate_id(certificate));
    aggregator_path(config, name, path);
    return certificate_store(certificate, path, err);
}

int registry_approve(const struct config *config, const char *request_path, enum site_role role,
                     const struct clock *clock, const struct rng *rng, struct buffer *out, struct error *err)
{
    struct identity_key *ca_key = NULL;
    struct certificate *ca = NULL, *certificate = NULL;
    char path[AGGREGATOR_PATH_SIZE];
    struct buffer pem;
    int rc;

    buffer_init(&pem, IDENTITY_PEM_MAX);
    aggregator_path(config, "ca.key", path);
    if ((rc = identity_key_load(path, &ca_key, err)) < 0)
        goto out;
    aggregator_path(config, "ca.crt", path);
    if ((rc = certificate_load(path, &ca, err)) == 0 && (rc = file_read(request_path, &pem, err)) == 0 &&
        (rc = authority_approve(ca_key, ca, buffer_span(&pem), clock_wall_ms(clock) / 1000,
                                (unsigned)config_int(config, "certificates.days"), rng, &certificate, err)) == 0 &&
        (rc = store_site(config, certificate, role, err)) == 0)
        rc = certificate_pem(certificate, out);
out:
    buffer_release(&pem);
    certificate_free(ca);
    certificate_free(certificate);
    identity_key_free(ca_key);
    return rc;
}

static json_t *json_hex(const uint8_t *data, size_t len)
{
    char text[2 * 64 + 1];

    assert(len <= 64);
    hex_encode(data, len, text);
    return json_string(text);
}

static int compare_names(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int is_certificate(const struct dirent *entry)
{
    size_t n = strlen(entry->d_name);

    return n > 4 && strcmp(entry->d_name + n - 4, ".crt") == 0;
}

static int add_site(const struct config *config, const char *file, json_t *sites, struct error *err)
{
    char name[300], path[AGGREGATOR_PATH_SIZE];
    struct certificate *c = NULL;
    struct buffer role;
    int rc;

    buffer_init(&role, 64);
    snprintf(name, sizeof name, "sites/%.255s", file);
    aggregator_path(config, name, path);
    if ((rc = certificate_load(path, &c, err)) < 0)
        goto out;
    snprintf(name, sizeof name, "sites/%s.role", certificate_id(c));
    aggregator_path(config, name, path);
    if ((rc = file_read(path, &role, err)) < 0)
        goto out;
    json_array_append_new(sites, json_pack("{s:s,s:s#,s:o,s:o,s:I}", "id", certificate_id(c), "role",
                                           (const char *)role.data, (int)role.len - 1, "certificate_sha256",
                                           json_hex(certificate_fingerprint(c), HASH_SIZE), "key",
                                           json_hex(certificate_public(c), SIGN_PUBLIC_SIZE), "certificate_not_after_s",
                                           (json_int_t)certificate_not_after_s(c)));
out:
    buffer_release(&role);
    certificate_free(c);
    return rc;
}

static int draft_sites(const struct config *config, json_t *sites, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE];
    struct dirent **entries = NULL;
    int n, rc = 0;

    aggregator_path(config, "sites", path);
    n = scandir(path, &entries, is_certificate, compare_names);
    if (n < 0)
        return error_set(err, ERR_CONFIG, "%s: cannot list: run `consilium-aggregator init` first", path);
    for (int i = 0; i < n; i++) {
        if (rc == 0)
            rc = add_site(config, entries[i]->d_name, sites, err);
        free(entries[i]);
    }
    free(entries);
    return rc;
}

static int draft_authors(const char *const *files, size_t count, json_t *authors, struct error *err)
{
    for (size_t i = 0; i < count; i++) {
        uint8_t key[SIGN_PUBLIC_SIZE];
        int rc = identity_public_load(files[i], key, err);
        if (rc < 0)
            return rc;
        json_array_append_new(authors, json_hex(key, sizeof key));
    }
    return 0;
}

/* Serial and previous hash: after the roster in force, or the first one. */
static int draft_chain(const struct config *config, json_t *draft, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE];
    struct registry r = {0};
    uint8_t zero[HASH_SIZE] = {0};
    int rc = 0;

    aggregator_path(config, "roster.bin", path);
    if (file_exists(path) && (rc = registry_open(&r, config, err)) < 0)
        return rc;
    json_object_set_new(draft, "serial", json_integer((json_int_t)r.roster.serial + 1));
    json_object_set_new(draft, "previous_hash", json_hex(r.roster.serial ? r.roster.hash : zero, HASH_SIZE));
    registry_release(&r);
    return 0;
}

int registry_draft(const struct config *config, const char *const *author_files, size_t author_count,
                   const struct clock *clock, struct buffer *out, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE], *text = NULL;
    int64_t now_s = clock_wall_ms(clock) / 1000;
    struct certificate *server = NULL;
    json_t *draft = json_object(), *sites = json_array(), *authors = json_array();
    int rc;

    aggregator_path(config, "server.crt", path);
    json_object_set_new(draft, "federation", json_string(config_string(config, "federation")));
    if ((rc = draft_chain(config, draft, err)) < 0 || (rc = certificate_load(path, &server, err)) < 0 ||
        (rc = draft_sites(config, sites, err)) < 0 ||
        (rc = draft_authors(author_files, author_count, authors, err)) < 0)
        goto out;
    json_object_set_new(draft, "not_before_s", json_integer(now_s - 3600));
    json_object_set_new(draft, "not_after_s", json_integer(now_s + config_int(config, "roster.days") * 86400));
    json_object_set_new(draft, "aggregator_key", json_hex(certificate_public(server), SIGN_PUBLIC_SIZE));
    json_object_set_new(draft, "aggregator_certificate_sha256", json_hex(certificate_fingerprint(server), HASH_SIZE));
    json_object_set_new(draft, "min_colluders", json_integer(config_int(config, "roster.min_colluders")));
    json_object_set_new(draft, "min_honest", json_integer(config_int(config, "roster.min_honest")));
    json_object_set(draft, "sites", sites);
    json_object_set(draft, "authors", authors);
    text = json_dumps(draft, JSON_INDENT(2));
    if (!text)
        rc = error_set(err, ERR_RESOURCES, "out of memory for the roster draft");
    else
        buffer_printf(out, "%s\n", text);
out:
    free(text);
    json_decref(draft);
    json_decref(sites);
    json_decref(authors);
    certificate_free(server);
    return rc;
}

int registry_install(const struct config *config, const char *roster_path, const char *governance_file,
                     struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE];
    uint8_t governance[SIGN_PUBLIC_SIZE], pinned[SIGN_PUBLIC_SIZE];
    struct registry current = {0};
    struct buffer bytes;
    struct roster next;
    int rc;

    buffer_init(&bytes, ROSTER_BYTES_MAX);
    roster_init(&next);
    aggregator_path(config, "governance.pub", path);
    if ((rc = identity_public_load(governance_file, governance, err)) < 0)
        goto out;
    if (file_exists(path) && ((rc = identity_public_load(path, pinned, err)) < 0 ||
                              (memcmp(pinned, governance, sizeof pinned) != 0 &&
                               (rc = error_set(err, ERR_INTEGRITY, "%s is not the governance key that %s pinned",
                                               governance_file, path)) < 0)))
        goto out;
    if ((rc = file_read(roster_path, &bytes, err)) < 0 ||
        (rc = roster_open(&next, buffer_span(&bytes), governance, err)) < 0)
        goto out;
    if (!file_exists(path) && (rc = identity_public_store(governance, path, err)) < 0)
        goto out;
    aggregator_path(config, "roster.bin", path);
    if (file_exists(path) &&
        ((rc = registry_open(&current, config, err)) < 0 || (rc = roster_may_follow(&current.roster, &next, err)) < 0))
        goto out;
    rc = file_write_atomic(path, buffer_span(&bytes), 0644, err);
out:
    registry_release(&current);
    roster_release(&next);
    buffer_release(&bytes);
    return rc;
}

int registry_open(struct registry *ret_registry, const struct config *config, struct error *err)
{
    struct registry r = {0};
    uint8_t governance[SIGN_PUBLIC_SIZE];
    char path[AGGREGATOR_PATH_SIZE];
    int rc;

    roster_init(&r.roster);
    buffer_init(&r.signed_roster, ROSTER_BYTES_MAX);
    aggregator_path(config, "server.key", path);
    if (!file_exists(path))
        return error_set(err, ERR_CONFIG, "%s is missing: run `consilium-aggregator init` first", path);
    if ((rc = identity_key_load(path, &r.server_key, err)) < 0)
        goto out;
    aggregator_path(config, "roster.bin", path);
    if (!file_exists(path)) {
        rc = error_set(err, ERR_CONFIG,
                       "%s is missing: `roster draft`, sign it with consilium-governance, then `roster install`", path);
        goto out;
    }
    if ((rc = file_read(path, &r.signed_roster, err)) < 0)
        goto out;
    aggregator_path(config, "governance.pub", path);
    if ((rc = identity_public_load(path, governance, err)) == 0)
        rc = roster_open(&r.roster, buffer_span(&r.signed_roster), governance, err);
out:
    if (rc < 0) {
        registry_release(&r);
        return rc;
    }
    *ret_registry = r;
    return 0;
}

void registry_release(struct registry *r)
{
    if (!r)
        return;
    identity_key_free(r->server_key);
    roster_release(&r->roster);
    buffer_release(&r->signed_roster);
    *r = (struct registry){0};
}
