#include "node/vault/vault.h"

#include "base/file.h"
#include "base/hex.h"
#include "node/settings.h"

int vault_create(const struct config *config, const struct rng *rng, uint8_t ret_fingerprint[HASH_SIZE],
                 struct error *err)
{
    char path[NODE_PATH_SIZE];
    struct identity_key *key = NULL;
    struct buffer request;
    int rc;

    buffer_init(&request, IDENTITY_PEM_MAX);
    node_path(config, "site.key", path);
    if (!identity_id_valid(config_string(config, "site"))) {
        rc = config_fail(config, "site", err, "'%s' is not a site name: 1 to 63 of a-z, 0-9 and -",
                         config_string(config, "site"));
        goto out;
    }
    if ((rc = file_make_folder(config_path(config, "state"), 0700, err)) < 0 ||
        (rc = identity_key_create(rng, &key, err)) < 0 || (rc = identity_key_store(key, path, err)) < 0 ||
        (rc = identity_request(key, IDENTITY_SITE, config_string(config, "site"), &request, err)) < 0)
        goto out;
    node_path(config, "site.csr", path);
    if ((rc = file_write_atomic(path, buffer_span(&request), 0644, err)) < 0)
        goto out;
    identity_public_fingerprint(identity_public(key), ret_fingerprint);
out:
    buffer_release(&request);
    identity_key_free(key);
    return rc;
}

static int compare_fingerprint(const char *what, const char *given, const uint8_t have[HASH_SIZE], struct error *err)
{
    uint8_t want[HASH_SIZE];
    char text[2 * HASH_SIZE + 1];

    if (hex_decode(given, want, sizeof want) < 0)
        return error_set(err, ERR_CONFIG, "the %s fingerprint must be 64 hexadecimal digits", what);
    hex_encode(have, HASH_SIZE, text);
    if (memcmp(want, have, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY,
                         "the %s's fingerprint is %s, not the one given. Nothing was stored. Ask the coordinating team "
                         "for the right one by telephone or on paper",
                         what, text);
    return 0;
}

/* The site's certificate: signed by this CA, for this site and this key, and listed in the roster. */
static int check_own(const struct config *config, const struct identity_key *key, const struct certificate *own,
                     const struct certificate *ca, const struct roster *roster, int64_t now, struct error *err)
{
    const char *site = config_string(config, "site");
    const struct roster_site *entry;
    int rc = certificate_verify(own, ca, NULL, IDENTITY_SITE, now, err);

    if (rc < 0)
        return error_set(err, ERR_INTEGRITY, "the site's certificate is not one of this CA: %.600s",
                         err ? err->message : "");
    if (strcmp(certificate_id(own), site) != 0)
        return error_set(err, ERR_INTEGRITY, "the certificate is for '%s', this site is '%s'", certificate_id(own),
                         site);
    if (memcmp(certificate_public(own), identity_public(key), SIGN_PUBLIC_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "the certificate is for another key than this site's site.key");
    entry = roster_find(roster, site);
    if (!entry || memcmp(entry->certificate_hash, certificate_fingerprint(own), HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "the roster (serial %llu) does not list site '%s' with this certificate",
                         (unsigned long long)roster->serial, site);
    return 0;
}

static int read_file(const char *path, struct buffer *out, size_t max, struct error *err)
{
    buffer_init(out, max);
    return file_read(path, out, err);
}

int vault_enroll(const struct config *config, const struct enrolment *e, const struct clock *clock, struct error *err)
{
    struct vault v = {.config = config};
    struct buffer roster_bytes = {0};
    uint8_t fingerprint[HASH_SIZE];
    char path[NODE_PATH_SIZE];
    int64_t now = clock_wall_ms(clock) / 1000;
    int rc;

    node_path(config, "site.key", path);
    roster_init(&v.roster);
    if ((rc = identity_key_load(path, &v.key, err)) < 0 || (rc = certificate_load(e->ca, &v.ca, err)) < 0 ||
        (rc = compare_fingerprint("CA certificate", e->ca_fingerprint, certificate_fingerprint(v.ca), err)) < 0 ||
        (rc = identity_public_load(e->governance, v.governance, err)) < 0)
        goto out;
    identity_public_fingerprint(v.governance, fingerprint);
    if ((rc = compare_fingerprint("governance key", e->governance_fingerprint, fingerprint, err)) < 0 ||
        (rc = read_file(e->roster, &roster_bytes, ROSTER_BYTES_MAX, err)) < 0 ||
        (rc = roster_open(&v.roster, buffer_span(&roster_bytes), v.governance, err)) < 0 ||
        (rc = roster_check_time(&v.roster, now, err)) < 0 || (rc = certificate_load(e->certificate, &v.own, err)) < 0 ||
        (rc = check_own(config, v.key, v.own, v.ca, &v.roster, now, err)) < 0)
        goto out;
    if (strcmp(v.roster.federation, config_string(config, "aggregator.federation")) != 0) {
        rc = error_set(err, ERR_INTEGRITY, "the roster is of federation '%s', %s says '%s'", v.roster.federation,
                       config_origin(config, "aggregator.federation"), config_string(config, "aggregator.federation"));
        goto out;
    }
    /* The roster goes last: a site counts as enrolled only once it is there. */
    node_path(config, "ca.crt", path);
    if ((rc = certificate_store(v.ca, path, err)) < 0)
        goto out;
    node_path(config, "site.crt", path);
    if ((rc = certificate_store(v.own, path, err)) < 0)
        goto out;
    node_path(config, "governance.pub", path);
    if ((rc = identity_public_store(v.governance, path, err)) < 0)
        goto out;
    node_path(config, "roster.bin", path);
    rc = file_write_atomic(path, buffer_span(&roster_bytes), 0644, err);
out:
    buffer_release(&roster_bytes);
    vault_release(&v);
    return rc;
}

int vault_open(struct vault *ret_vault, const struct config *config, const struct clock *clock, struct error *err)
{
    struct vault v = {.config = config};
    struct buffer roster_bytes = {0};
    char path[NODE_PATH_SIZE];
    int64_t now = clock_wall_ms(clock) / 1000;
    int rc;

    roster_init(&v.roster);
    node_path(config, "site.key", path);
    if (!file_exists(path))
        return error_set(err, ERR_CONFIG, "%s is missing: run `consilium-node init` first", path);
    node_path(config, "roster.bin", path);
    if (!file_exists(path))
        return error_set(err, ERR_CONFIG,
                         "%s is missing: run `consilium-node enroll` with what the coordinating team "
                         "sent back",
                         path);
    if ((rc = read_file(path, &roster_bytes, ROSTER_BYTES_MAX, err)) < 0)
        goto out;
    node_path(config, "governance.pub", path);
    if ((rc = identity_public_load(path, v.governance, err)) < 0 ||
        (rc = roster_open(&v.roster, buffer_span(&roster_bytes), v.governance, err)) < 0)
        goto out;
    node_path(config, "site.key", path);
    if ((rc = identity_key_load(path, &v.key, err)) < 0)
        goto out;
    node_path(config, "site.crt", path);
    if ((rc = certificate_load(path, &v.own, err)) < 0)
        goto out;
    node_path(config, "ca.crt", path);
    if ((rc = certificate_load(path, &v.ca, err)) < 0)
        goto out;
    rc = check_own(config, v.key, v.own, v.ca, &v.roster, now, err);
out:
    buffer_release(&roster_bytes);
    if (rc < 0) {
        vault_release(&v);
        return rc;
    }
    *ret_vault = v;
    return 0;
}

void vault_release(struct vault *vault)
{
    if (!vault)
        return;
    identity_key_free(vault->key);
    certificate_free(vault->own);
    certificate_free(vault->ca);
    roster_release(&vault->roster);
    *vault = (struct vault){0};
}

int vault_take_roster(struct vault *vault, struct span signed_roster, void (*before_change)(void *ctx), void *ctx,
                      bool *ret_changed, struct error *err)
{
    struct roster next;
    char path[NODE_PATH_SIZE];
    int rc;

    roster_init(&next);
    if ((rc = roster_open(&next, signed_roster, vault->governance, err)) < 0 ||
        (rc = roster_may_follow(&vault->roster, &next, err)) < 0)
        goto out;
    if (next.serial == vault->roster.serial) {
        *ret_changed = false;
        goto out;
    }
    node_path(vault->config, "roster.bin", path);
    if ((rc = file_write_atomic(path, signed_roster, 0644, err)) < 0)
        goto out;
    if (before_change)
        before_change(ctx);
    roster_release(&vault->roster);
    vault->roster = next;
    *ret_changed = true;
    return 0;
out:
    roster_release(&next);
    return rc;
}
