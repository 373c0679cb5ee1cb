/* What a site's records cost: the ledger that must not vanish, the declared number, the commitment to the records. */
#include "base/file.h"
#include "crypto/identity.h"
#include "crypto/random.h"
#include "node/jobs/account.h"
#include "node/settings.h"
#include "tests/node/tiny_site.h"

#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>
#include <cmocka.h>

static struct tiny_site tiny;
static struct config *config;
static struct site_store *store;
static struct identity_key *key;
static char data_path[128], ledger_path[NODE_PATH_SIZE];

static void write_records(unsigned count)
{
    static const char line[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, "
                               "{\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    struct buffer b;
    struct error err = {0};

    buffer_init(&b, 1 << 16);
    for (unsigned i = 0; i < count; i++)
        buffer_append(&b, line, sizeof line - 1);
    assert_int_equal(file_write_atomic(data_path, buffer_span(&b), 0600, &err), 0);
    buffer_release(&b);
}

static int set_up(void **state)
{
    struct error err = {0};

    (void)state;
    tiny_site_open(&tiny, NULL, NULL);
    config = tiny_site_config(&tiny, "  listen: \"unix:%s/socket\"\ndata:\n  path: %s/records.jsonl\n", NULL);
    snprintf(data_path, sizeof data_path, "%s/records.jsonl", tiny.folder);
    node_path(config, "ledger.sqlite", ledger_path);
    write_records(6);
    if (identity_key_create(&random_system, &key, &err) < 0)
        fail_msg("%s", err.message);
    return site_store_open(&store, config, &err);
}

static int tear_down(void **state)
{
    (void)state;
    site_store_close(store);
    identity_key_free(key);
    config_free(config);
    tiny_site_release(&tiny);
    return 0;
}

static void spend(void)
{
    const struct dp_plan plan = {.mode = DP_RECORD,
                                 .neighbour = DP_ADD_REMOVE,
                                 .unit = "record",
                                 .q = 0.1,
                                 .z = 2,
                                 .clip = 1,
                                 .grid_clip = DP_GRID_CLIP,
                                 .steps_per_round = 2,
                                 .rounds = 2,
                                 .delta = 1e-5,
                                 .epsilon = 4,
                                 .units = 100,
                                 .dimensions = 10};
    const struct ledger_request request = {.job = "j", .plan = &plan, .steps = 2};
    struct ledger *ledger = NULL;
    struct error err = {0};
    uint64_t sequence;

    if (account_open(&ledger, config, store, &plan, &clock_system, &err) < 0 ||
        ledger_reserve(ledger, &request, &sequence, &err) < 0)
        fail_msg("%s", err.message);
    ledger_close(ledger);
}

static void a_lost_ledger_is_not_replaced(void **state)
{
    char aside[NODE_PATH_SIZE + 8];
    struct ledger *ledger = NULL;
    struct ledger_spent spent;
    struct error err = {0};

    (void)state;
    assert_int_equal(account_read(&ledger, config, store, &clock_system, &err), ERR_NOT_FOUND);
    assert_non_null(strstr(err.message, "nothing was spent"));
    spend();
    snprintf(aside, sizeof aside, "%s.aside", ledger_path);
    assert_int_equal(rename(ledger_path, aside), 0);
    assert_int_equal(account_read(&ledger, config, store, &clock_system, &err), ERR_INTEGRITY);
    assert_int_equal(account_open(&ledger, config, store, NULL, &clock_system, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "put back the newest copy"));
    assert_false(file_exists(ledger_path));
    assert_int_equal(rename(aside, ledger_path), 0);
    assert_int_equal(account_open(&ledger, config, store, NULL, &clock_system, &err), 0);
    assert_int_equal(ledger_spent(ledger, NULL, &spent, &err), 0);
    assert_true(spent.epsilon > 0);
    ledger_close(ledger);
}

static struct dataset *load(const struct sign_key *with, uint8_t commitment[HASH_SIZE])
{
    struct dataset *data = NULL;
    struct error err = {0};

    if (account_load(config, &tiny.site, "none", 64, with, &data, commitment, &err) < 0)
        fail_msg("%s", err.message);
    return data;
}

static void the_commitment_is_to_the_records_in_memory(void **state)
{
    static const uint8_t zero[HASH_SIZE];
    const struct sign_key *own = identity_sign_key(key);
    uint8_t first[HASH_SIZE], second[HASH_SIZE], again[HASH_SIZE], without[HASH_SIZE], content[HASH_SIZE];
    struct error err = {0};
    uint64_t records = 0;

    (void)state;
    dataset_free(load(own, first));
    dataset_free(load(own, again));
    dataset_free(load(NULL, without));
    assert_int_equal(hash_file(data_path, content, NULL, &err), 0);
    assert_memory_equal(first, again, HASH_SIZE);
    assert_memory_equal(without, zero, HASH_SIZE);
    assert_memory_not_equal(first, zero, HASH_SIZE);
    assert_memory_not_equal(first, content, HASH_SIZE); /* whoever guesses the records cannot test the guess */

    struct dataset *data = load(own, second);
    assert_int_equal(account_declared(config, store, data, &records, &err), 0);
    assert_int_equal(records, 6);
    write_records(9); /* after it was loaded */
    assert_memory_equal(first, second, HASH_SIZE);
    dataset_free(data);
    data = load(own, second);
    assert_memory_not_equal(first, second, HASH_SIZE);
    assert_int_equal(account_declared(config, store, data, &records, &err), 0);
    assert_int_equal(records, 6); /* fixed at the first use */
    dataset_free(data);
}

static void one_process_a_state_folder(void **state)
{
    struct error err = {0};
    int first = -1, second = -1;

    (void)state;
    assert_int_equal(node_lock(config, &first, &err), 0);
    assert_int_equal(node_lock(config, &second, &err), ERR_RESOURCES);
    assert_non_null(strstr(err.message, "another consilium-node runs"));
    file_unlock(first);
    assert_int_equal(node_lock(config, &second, &err), 0);
    file_unlock(second);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_lost_ledger_is_not_replaced, set_up, tear_down),
        cmocka_unit_test_setup_teardown(the_commitment_is_to_the_records_in_memory, set_up, tear_down),
        cmocka_unit_test_setup_teardown(one_process_a_state_folder, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
