/*
 * consilium-governance: the offline key that says who belongs to a federation. It runs where no network needs to be,
 * reads a roster draft (JSON, made by `consilium-aggregator roster draft`), shows it, and signs it. It also makes plan
 * authors' keys: both are plain Ed25519 keys that the roster or the sites name by fingerprint.
 */
#include "base/file.h"
#include "base/hex.h"
#include "crypto/identity.h"
#include "crypto/random.h"
#include "protocol/roster.h"
#include "runtime/cli.h"

#include <jansson.h>

static void print_fingerprint(const struct cli *cli, const char *what, const char *path, const char *label,
                              const uint8_t public_key[SIGN_PUBLIC_SIZE])
{
    uint8_t hash[HASH_SIZE];
    char text[2 * HASH_SIZE + 1];

    identity_public_fingerprint(public_key, hash);
    hex_encode(hash, sizeof hash, text);
    cli_print_object(cli, json_pack("{s:s,s:s}", what, path, label, text));
}

static int run_key(struct cli *cli, struct error *err)
{
    const char *path = cli->args[0];
    char public_path[4096];
    struct identity_key *key = NULL;
    int rc;

    snprintf(public_path, sizeof public_path, "%s.pub", path);
    if ((rc = identity_key_create(&random_system, &key, err)) == 0 && (rc = identity_key_store(key, path, err)) == 0 &&
        (rc = identity_public_store(identity_public(key), public_path, err)) == 0)
        print_fingerprint(cli, "key", public_path, "fingerprint", identity_public(key));
    identity_key_free(key);
    return rc;
}

static int run_fingerprint(struct cli *cli, struct error *err)
{
    uint8_t key[SIGN_PUBLIC_SIZE];
    int rc = identity_public_load(cli->args[0], key, err);

    if (rc == 0)
        print_fingerprint(cli, "key", cli->args[0], "fingerprint", key);
    return rc;
}

static bool take_hex(const json_t *json, uint8_t *out, size_t len)
{
    const char *text = json_string_value(json);

    return text && hex_decode(text, out, len) == 0;
}

static int draft_site(const json_t *json, struct roster *r, size_t index, struct error *err)
{
    struct roster_site site = {0};
    const char *id = json_string_value(json_object_get(json, "id"));
    const char *role = json_string_value(json_object_get(json, "role"));
    const json_t *not_after = json_object_get(json, "certificate_not_after_s");

    if (!id || !role || !site_id_valid(id) || !json_is_integer(not_after) ||
        !take_hex(json_object_get(json, "certificate_sha256"), site.certificate_hash, HASH_SIZE) ||
        !take_hex(json_object_get(json, "key"), site.public_key, SIGN_PUBLIC_SIZE) ||
        (strcmp(role, "trainer") != 0 && strcmp(role, "evaluator") != 0))
        return error_set(err, ERR_INTEGRITY, "roster draft: site %zu is malformed", index + 1);
    snprintf(site.id, sizeof site.id, "%s", id);
    site.role = strcmp(role, "trainer") == 0 ? SITE_TRAINER : SITE_EVALUATOR;
    site.certificate_not_after_s = json_integer_value(not_after);
    return roster_add_site(r, &site, err);
}

static int draft_read(const json_t *json, struct roster *r, struct error *err)
{
    const char *federation = json_string_value(json_object_get(json, "federation"));
    const json_t *item;
    size_t i;
    int rc;

    if (!federation || !site_id_valid(federation) || !json_is_integer(json_object_get(json, "serial")) ||
        !take_hex(json_object_get(json, "previous_hash"), r->previous_hash, HASH_SIZE) ||
        !take_hex(json_object_get(json, "aggregator_key"), r->aggregator_key, SIGN_PUBLIC_SIZE) ||
        !take_hex(json_object_get(json, "aggregator_certificate_sha256"), r->aggregator_certificate_hash, HASH_SIZE))
        return error_set(err, ERR_INTEGRITY,
                         "roster draft: federation, serial, previous_hash or an aggregator field is "
                         "missing or malformed");
    snprintf(r->federation, sizeof r->federation, "%s", federation);
    r->serial = (uint64_t)json_integer_value(json_object_get(json, "serial"));
    r->not_before_s = json_integer_value(json_object_get(json, "not_before_s"));
    r->not_after_s = json_integer_value(json_object_get(json, "not_after_s"));
    r->colluders_min = (uint32_t)json_integer_value(json_object_get(json, "min_colluders"));
    r->honest_min = (uint32_t)json_integer_value(json_object_get(json, "min_honest"));
    json_array_foreach(json_object_get(json, "sites"), i, item) if ((rc = draft_site(item, r, i, err)) < 0) return rc;
    json_array_foreach(json_object_get(json, "authors"), i, item)
    {
        uint8_t key[SIGN_PUBLIC_SIZE];
        if (!take_hex(item, key, sizeof key))
            return error_set(err, ERR_INTEGRITY, "roster draft: author %zu is malformed", i + 1);
        if ((rc = roster_add_author(r, key, err)) < 0)
            return rc;
    }
    json_array_foreach(json_object_get(json, "revoked"), i, item)
    {
        uint8_t hash[HASH_SIZE];
        if (!take_hex(item, hash, sizeof hash))
            return error_set(err, ERR_INTEGRITY, "roster draft: revocation %zu is malformed", i + 1);
        if ((rc = roster_revoke(r, hash, err)) < 0)
            return rc;
    }
    return 0;
}

static void show(const struct roster *r)
{
    char text[2 * HASH_SIZE + 1];

    fprintf(stderr, "federation %s, roster serial %llu, %u sites, %u plan authors, %u revocations\n", r->federation,
            (unsigned long long)r->serial, r->sites_len, r->authors_len, r->revoked_len);
    for (uint32_t i = 0; i < r->sites_len; i++) {
        hex_encode(r->sites[i].certificate_hash, HASH_SIZE, text);
        fprintf(stderr, "  %-24s %-9s certificate %s\n", r->sites[i].id,
                r->sites[i].role == SITE_TRAINER ? "trainer" : "evaluator", text);
    }
}

static int run_sign(struct cli *cli, struct error *err)
{
    const char *draft_path = cli->args[0], *key_path = cli_value(cli, "key"), *out_path = cli_value(cli, "out");
    struct identity_key *key = NULL;
    struct buffer text, out;
    json_t *json = NULL;
    json_error_t problem;
    struct roster r;
    int rc;

    if (!key_path || !out_path)
        return error_set(err, ERR_CONFIG, "sign needs --key FILE and --out FILE");
    roster_init(&r);
    buffer_init(&text, ROSTER_BYTES_MAX);
    buffer_init(&out, ROSTER_BYTES_MAX);
    if ((rc = identity_key_load(key_path, &key, err)) < 0 || (rc = file_read(draft_path, &text, err)) < 0)
        goto out;
    json = json_loadb((const char *)text.data, text.len, JSON_REJECT_DUPLICATES, &problem);
    if (!json) {
        rc = error_set(err, ERR_INTEGRITY, "%s:%d: not JSON: %s", draft_path, problem.line, problem.text);
        goto out;
    }
    if ((rc = draft_read(json, &r, err)) < 0)
        goto out;
    show(&r);
    if ((rc = cli_confirm(cli, err, "Sign this roster?")) == 0 &&
        (rc = roster_sign(&r, identity_sign_key(key), &out, err)) == 0 &&
        (rc = file_write_atomic(out_path, buffer_span(&out), 0644, err)) == 0)
        print_fingerprint(cli, "roster", out_path, "signed_by", identity_public(key));
out:
    json_decref(json);
    buffer_release(&text);
    buffer_release(&out);
    roster_release(&r);
    identity_key_free(key);
    return rc;
}

int main(int argc, char **argv)
{
    static const struct cli_option sign_options[] = {
        {"key", 'k', "FILE", "The governance key.", NULL}, {"out", 'o', "FILE", "The signed roster.", NULL}, {0}};
    static const struct cli_command commands[] = {
        {"key", "FILE", 1, 1, "Make a key pair. The private half goes to FILE, the public one to FILE.pub.", NULL,
         run_key},
        {"fingerprint", "FILE.pub", 1, 1, "Print the fingerprint of a public key.", NULL, run_fingerprint},
        {"sign", "DRAFT.json", 1, 1, "Show a roster draft and sign it.", sign_options, run_sign},
        {0}};
    static const struct cli_program program = {
        "consilium-governance", "Offline keys of a federation: makes them and signs its roster.", commands, NULL, NULL};

    return cli_main(&program, NULL, argc, argv);
}
