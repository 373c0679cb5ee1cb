#include "node/jobs/account.h"

#include "base/file.h"
#include "crypto/hash.h"
#include "node/settings.h"

static struct ledger_options options_of(const struct config *config, const struct clock *clock)
{
    return (struct ledger_options){.site = config_string(config, "site"),
                                   .epsilon = config_float(config, "policy.max_epsilon"),
                                   .delta = config_float(config, "policy.delta"),
                                   .clock = clock};
}

/* The ledger's path, and whether this site had one before; ERR_INTEGRITY when that one is gone. */
static int find_ledger(const struct config *config, struct site_store *store, char path[NODE_PATH_SIZE], bool *ret_had,
                       struct error *err)
{
    int rc = site_store_has_ledger(store, ret_had, err);

    node_path(config, "ledger.sqlite", path);
    if (rc < 0 || !*ret_had || file_exists(path))
        return rc;
    return error_set(
        err, ERR_INTEGRITY,
        "%s is missing, but this site has spent from it: stop the daemon and put back the newest copy (see "
        "\"State folders and backup\" in docs/operations.md). An empty ledger would forget what is spent",
        path);
}

int account_open(struct ledger **ret_ledger, const struct config *config, struct site_store *store,
                 const struct dp_plan *expected, const struct clock *clock, struct error *err)
{
    struct ledger_options options = options_of(config, clock);
    struct ledger *ledger = NULL;
    char path[NODE_PATH_SIZE];
    int rc = find_ledger(config, store, path, &options.must_exist, err);

    options.expected = expected;
    if (rc < 0 || (rc = ledger_open(&ledger, path, &options, err)) < 0)
        return rc;
    if (!options.must_exist && (rc = site_store_set_has_ledger(store, err)) < 0) {
        ledger_close(ledger);
        return rc;
    }
    *ret_ledger = ledger;
    return 0;
}

int account_read(struct ledger **ret_ledger, const struct config *config, struct site_store *store,
                 const struct clock *clock, struct error *err)
{
    struct ledger_options options = options_of(config, clock);
    char path[NODE_PATH_SIZE];
    bool had = false;
    int rc = find_ledger(config, store, path, &had, err);

    options.read_only = true;
    if (rc == 0 && (rc = ledger_open(ret_ledger, path, &options, err)) == ERR_NOT_FOUND)
        error_set(err, rc, "%s: nothing was spent yet: no job with differential privacy has begun here", path);
    return rc;
}

int account_declared(const struct config *config, struct site_store *store, const struct dataset *data,
                     uint64_t *ret_records, struct error *err)
{
    uint64_t declared = 0;
    int rc;

    if (config_is_set(config, "data.declared_records")) {
        *ret_records = (uint64_t)config_int(config, "data.declared_records");
        return 0;
    }
    if ((rc = site_store_declared(store, &declared, err)) < 0)
        return rc;
    if (declared == 0) {
        declared = dataset_count(data);
        if ((rc = site_store_set_declared(store, declared, err)) < 0)
            return rc;
    }
    *ret_records = declared;
    return 0;
}

static void commit(const struct sign_key *key, const uint8_t content[HASH_SIZE], uint8_t out[HASH_SIZE])
{
    uint8_t derived[HASH_SIZE];

    hkdf_labelled(span_of(key->secret, SIGN_SECRET_SIZE), span_of(NULL, 0), "consilium/dataset-commitment", NULL, 0,
                  derived, sizeof derived);
    hmac_bytes(span_of(derived, sizeof derived), span_of(content, HASH_SIZE), out);
    explicit_bzero(derived, sizeof derived);
}

int account_load(const struct config *config, const struct site *site, const char *system_message, int32_t tokens_max,
                 const struct sign_key *key, struct dataset **ret_data, uint8_t ret_commitment[HASH_SIZE],
                 struct error *err)
{
    const char *path = config_path(config, "data.path");
    uint8_t before[HASH_SIZE], after[HASH_SIZE];
    struct dataset *data = NULL;
    int rc;

    if (!path)
        return error_set(err, ERR_POLICY, "this site has no training records (data.path is not set)");
    if ((rc = hash_file(path, before, NULL, err)) < 0 ||
        (rc = site_dataset(site, path, system_message, tokens_max, &data, err)) < 0)
        return rc;
    if ((rc = hash_file(path, after, NULL, err)) == 0 && memcmp(before, after, HASH_SIZE) != 0)
        rc = error_set(err, ERR_AGAIN, "%s changed while it was read: write a new file and rename it into place", path);
    if (rc < 0) {
        dataset_free(data);
        return rc;
    }
    memset(ret_commitment, 0, HASH_SIZE);
    if (key)
        commit(key, before, ret_commitment);
    *ret_data = data;
    return 0;
}

void account_binary_hash(uint8_t ret_hash[HASH_SIZE])
{
    if (hash_file("/proc/self/exe", ret_hash, NULL, NULL) < 0)
        memset(ret_hash, 0, HASH_SIZE);
}
