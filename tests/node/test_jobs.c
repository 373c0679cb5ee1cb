/* What a site decides and remembers about jobs: plans, policy, hours, records, consent, versions on disk. */
#include "base/file.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "node/jobs/federation.h"
#include "node/jobs/local_plan.h"
#include "node/jobs/policy.h"
#include "node/jobs/site_store.h"
#include "node/jobs/version.h"
#include "node/settings.h"
#include "privacy/accountant.h"
#include "protocol/session.h"

#include <ftw.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

static char folder[64];

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *walk)
{
    (void)info;
    (void)kind;
    (void)walk;
    return remove(path);
}

static int set_up(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/consilium-jobs-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    return nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static struct config *config_of(const char *policy)
{
    struct config *config;
    struct error err = {0};
    char text[1024];
    snprintf(text, sizeof text,
             "version: 1\nsite: clinic-a\nstate: %s\naggregator: {url: \"tcp://127.0.0.1:1\", federation: test}\n"
             "model: {path: none.gguf}\npolicy: {%s}\n",
             folder, policy);
    if (config_parse(&config, &node_schema, span_str(text), "node.yaml", folder, &err) < 0 ||
        config_finish(config, &err) < 0)
        fail_msg("%s", err.message);
    return config;
}

static struct job_plan plan_of(void)
{
    struct job_plan p = {.job = "j",
                         .rounds = 5,
                         .min_sites = 3,
                         .train = {.optimizer = "sgd",
                                   .learning_rate = 0.5,
                                   .local_steps = 4,
                                   .batch = 16,
                                   .max_len = 64,
                                   .options = "momentum=0.25;decay=0.5;system=none"},
                         .dp = {.mode = PLAN_DP_RECORD, .clip = 1, .delta = 1e-5, .target_epsilon = 4, .grid = 0x1p20}};
    static const char lora[] = "layers=0-1;targets=q;rank=2";
    memcpy(p.lora, lora, sizeof lora - 1);
    p.lora_len = sizeof lora - 1;
    memset(p.base_hash, 7, HASH_SIZE);
    memset(p.hash, 9, HASH_SIZE);
    return p;
}

/* --- local_plan --------------------------------------------------------------------------------------------------- */

static void noise_is_the_least_that_keeps_the_target(void **state)
{
    struct job_plan plan = plan_of();
    struct local_plan local;
    struct error err = {0};
    double epsilon, order;
    (void)state;
    for (uint64_t n = 16; n <= 4000; n *= 5) {
        if (local_plan_make(&local, &plan, n, 1000, &err) < 0)
            fail_msg("%s", err.message);
        assert_true(local.dp.q == 16.0 / (double)n);
        assert_int_equal(local.dp.units, n);
        assert_int_equal(accountant_epsilon(local.dp.q, local.dp.z, 20, 1e-5, &epsilon, &order, &err), 0);
        assert_true(epsilon <= 4 && epsilon > 3.98);
    }
    assert_int_equal(local_plan_make(&local, &plan, 5, 1000, &err), 0); /* fewer records than the batch */
    assert_true(local.dp.q == 1);
    assert_int_equal(local_plan_make(&local, &plan, 0, 1000, &err), ERR_CONFIG);
    assert_true(local.optimizer.kind == OPTIMIZER_SGD && local.optimizer.momentum == 0.25f);
    assert_true(local.decay == 0.5);
    assert_string_equal(local.system_message, "none");
}

static void a_stated_plan_must_keep_its_own_target(void **state)
{
    struct job_plan plan = plan_of();
    struct local_plan local;
    struct error err = {0};
    (void)state;
    plan.dp.sampling_rate = 0.01;
    plan.dp.noise_multiplier = 2;
    assert_int_equal(local_plan_make(&local, &plan, 1000, 1000, &err), 0);
    assert_true(local.dp.q == 0.01 && local.dp.z == 2);
    plan.dp.noise_multiplier = 0.4; /* epsilon far above 4 */
    assert_int_equal(local_plan_make(&local, &plan, 1000, 1000, &err), ERR_CONFIG);
    plan.dp.noise_multiplier = 2;
    plan.dp.clip = 0.3;
    plan.dp.grid = 0x1p20 / 0.3; /* not a whole number, and neither is it times the clip */
    assert_int_equal(local_plan_make(&local, &plan, 1000, 1000, &err), 0);
    for (int exponent = 19; exponent <= 22; exponent += 3) { /* signed and consented, but not what would be done */
        plan.dp.grid = ldexp(1, exponent) / 0.3;
        assert_int_equal(local_plan_make(&local, &plan, 1000, 1000, &err), ERR_CONFIG);
        assert_non_null(strstr(err.message, "dp.grid"));
    }
    plan.dp = (struct plan_dp){.mode = PLAN_DP_NONE};
    assert_int_equal(local_plan_make(&local, &plan, 1000, 1000, &err), 0);
    assert_int_equal(local.dp.mode, DP_NONE);
}

static void unknown_training_options_are_refused(void **state)
{
    static const char *const bad[] = {"speed=3;system=none", "momentum=x;system=none", "momentum", "decay=1.5",
                                      "decay=nan",           "momentum=0.5;beta3=1"};
    struct job_plan plan = plan_of();
    struct local_plan local;
    struct error err = {0};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        snprintf(plan.train.options, sizeof plan.train.options, "%s", bad[i]);
        if (local_plan_make(&local, &plan, 100, 1000, &err) != ERR_CONFIG)
            fail_msg("accepted: %s", bad[i]);
    }
    snprintf(plan.train.options, sizeof plan.train.options, "decay=0;system=a=b;momentum=7;system=x");
    assert_int_equal(local_plan_make(&local, &plan, 100, 1000, &err), 0);
    assert_string_equal(local.system_message, "a=b;momentum=7;system=x"); /* the message is the rest of the text */
    plan.train.options[0] = 0;
    assert_int_equal(local_plan_make(&local, &plan, 100, 1000, &err), 0);
    assert_string_equal(local.system_message, "default");
    snprintf(plan.train.optimizer, sizeof plan.train.optimizer, "lion");
    assert_int_equal(local_plan_make(&local, &plan, 100, 1000, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "lion"));
}

/* --- policy ------------------------------------------------------------------------------------------------------- */

static void policy_is(const char *policy, const struct job_plan *plan, int code, const char *text)
{
    struct config *config = config_of(policy);
    uint8_t base[HASH_SIZE];
    struct error err = {0};
    memset(base, 7, sizeof base);
    const int rc = policy_check_plan(config, plan, base, &err);
    if (rc != code || (text && !strstr(err.message, text)))
        fail_msg("%s: code %d, expected %d: %s", policy, rc, code, err.message);
    config_free(config);
}

static void each_rule_of_the_policy(void **state)
{
    struct job_plan plan = plan_of(), none = plan_of(), other = plan_of();
    (void)state;
    none.dp = (struct plan_dp){.mode = PLAN_DP_NONE};
    other.base_hash[0] = 8;
    policy_is("max_epsilon: 4", &plan, 0, NULL);
    policy_is("max_epsilon: 3.99", &plan, ERR_POLICY, "max_epsilon");
    policy_is("max_epsilon: 8, delta: 0.000001", &plan, ERR_POLICY, "delta");
    policy_is("max_epsilon: 8, delta: 0.0000099", &plan, ERR_POLICY, "delta");
    policy_is("max_epsilon: 8, delta: 0.0001", &plan, 0, NULL);
    policy_is("max_epsilon: 8", &none, ERR_POLICY, "allow_without_dp");
    policy_is("max_epsilon: 8, allow_without_dp: true", &none, 0, NULL);
    policy_is("max_epsilon: 8", &other, ERR_CONFIG, "base model");
    struct config *config = config_of("min_sites: 5, min_colluders: 2, min_honest: 3, allow_without_dp: true");
    struct secagg_policy floors = policy_secagg(config);
    assert_int_equal(floors.sites_min, 5);
    assert_int_equal(floors.colluders_min, 2);
    assert_int_equal(floors.honest_min, 3);
    assert_true(floors.allow_no_dp);
    config_free(config);
    config = config_of("max_epsilon: 8"); /* unset: the protocol's defaults for the round's size, not lower ones */
    floors = policy_secagg(config);
    assert_true(floors.colluders_min == 0 && floors.honest_min == 0 && floors.sites_min == 3 && !floors.allow_no_dp);
    config_free(config);
}

static int64_t wall_ms(void *ctx)
{
    return *(int64_t *)ctx;
}

static int hours_at(const char *hours, int hour, int minute, struct error *err)
{
    char policy[128];
    struct tm local = {.tm_year = 126, .tm_mon = 4, .tm_mday = 12, .tm_hour = hour, .tm_min = minute, .tm_isdst = -1};
    int64_t now = (int64_t)mktime(&local) * 1000;
    const struct clock clock = {.wall_ms = wall_ms, .ctx = &now};
    snprintf(policy, sizeof policy, "hours: [%s]", hours);
    struct config *config = config_of(policy);
    const int rc = policy_check_hours(config, &clock, err);
    config_free(config);
    return rc;
}

static void hours_of_the_day(void **state)
{
    static const char *const bad[] = {"\"22:00\"",       "\"22:00-6:00\"", "\"22:00-24:00\"", "\"22:60-23:00\"",
                                      "\"22.00-23.00\"", "\"always\"",     "\"22:00 23:00\""};
    struct error err = {0};
    (void)state;
    assert_int_equal(hours_at("", 3, 0, &err), 0); /* none: always */
    assert_int_equal(hours_at("\"09:00-17:00\"", 9, 0, &err), 0);
    assert_int_equal(hours_at("\"09:00-17:00\"", 16, 59, &err), 0);
    assert_int_equal(hours_at("\"09:00-17:00\"", 17, 0, &err), ERR_POLICY);
    assert_int_equal(hours_at("\"09:00-17:00\"", 8, 59, &err), ERR_POLICY);
    assert_non_null(strstr(err.message, "08:59"));
    assert_int_equal(hours_at("\"22:00-06:00\"", 23, 0, &err), 0); /* across midnight */
    assert_int_equal(hours_at("\"22:00-06:00\"", 0, 0, &err), 0);
    assert_int_equal(hours_at("\"22:00-06:00\"", 5, 59, &err), 0);
    assert_int_equal(hours_at("\"22:00-06:00\"", 6, 0, &err), ERR_POLICY);
    assert_int_equal(hours_at("\"22:00-06:00\"", 21, 59, &err), ERR_POLICY);
    assert_int_equal(hours_at("\"01:00-02:00\", \"12:00-13:00\"", 12, 30, &err), 0);
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        if (hours_at(bad[i], 12, 0, &err) != ERR_CONFIG)
            fail_msg("accepted: %s", bad[i]);
}

/* --- site_store --------------------------------------------------------------------------------------------------- */

static struct site_store *store;
static struct config *store_config;

static void reopen(void)
{
    struct error err = {0};
    site_store_close(store);
    if (site_store_open(&store, store_config, &err) < 0)
        fail_msg("%s", err.message);
}

static int open_store(void **state)
{
    set_up(state);
    store_config = config_of("max_epsilon: 8");
    store = NULL;
    reopen();
    return 0;
}

static int close_store(void **state)
{
    site_store_close(store);
    config_free(store_config);
    return tear_down(state);
}

static int record(enum secagg_record kind, const char *job, uint32_t round, uint32_t attempt, const char *bytes)
{
    const struct secagg_log log = site_store_log(store);
    struct error err = {0};
    return log.record(log.ctx, kind, job, round, attempt, span_str(bytes), &err);
}

static void records_follow_their_rules_across_restarts(void **state)
{
    (void)state;
    for (int restart = 0; restart < 2; restart++) { /* the second time everything is a repetition */
        const int fresh = restart ? ERR_INTEGRITY : 0;
        /* An opening: strictly growing. */
        assert_int_equal(record(RECORD_OPEN, "j", 3, 1, "h0"), fresh);
        assert_int_equal(record(RECORD_OPEN, "j", 3, 1, "h0"), ERR_INTEGRITY);
        assert_int_equal(record(RECORD_OPEN, "j", 2, 9, "h0"), ERR_INTEGRITY);
        assert_int_equal(record(RECORD_OPEN, "j", 3, 2, "h0"), fresh);
        assert_int_equal(record(RECORD_OPEN, "other", 1, 1, "h0"), fresh);
        /* One survivor list an attempt. */
        assert_int_equal(record(RECORD_SURVIVORS, "j", 3, 1, "h3"), 0);
        assert_int_equal(record(RECORD_SURVIVORS, "j", 3, 1, "h3"), 0);
        assert_int_equal(record(RECORD_SURVIVORS, "j", 3, 1, "another"), ERR_INTEGRITY);
        assert_int_equal(record(RECORD_SURVIVORS, "j", 3, 2, "another"), 0);
        /* One unmasking a round, whatever the attempt. */
        assert_int_equal(record(RECORD_UNMASK, "j", 3, 1, "m9"), 0);
        assert_int_equal(record(RECORD_UNMASK, "j", 3, 1, "m9"), 0);
        assert_int_equal(record(RECORD_UNMASK, "j", 3, 2, "other m9"), ERR_INTEGRITY);
        assert_int_equal(record(RECORD_UNMASK, "j", 4, 1, "other m9"), 0);
        reopen();
    }
    assert_int_equal(record(RECORD_OPEN, "j", 4, 1, "h0"), 0);
}

/* Without differential privacy a model's updates are summed in one round only, whatever the job. */
static void a_model_is_unmasked_in_one_round(void **state)
{
    static const char model[] = "12345678901234567890123456789012", next[] = "22345678901234567890123456789012";
    struct error err = {0};
    bool unmasked;
    (void)state;
    for (int restart = 0; restart < 2; restart++) {
        assert_int_equal(record(RECORD_UNMASK_MODEL, "j", 3, 1, model), 0);
        assert_int_equal(record(RECORD_UNMASK_MODEL, "j", 3, 1, model), 0);
        assert_int_equal(record(RECORD_UNMASK_MODEL, "j", 3, 1, next), ERR_INTEGRITY);
        assert_int_equal(record(RECORD_UNMASK_MODEL, "j", 4, 1, model), ERR_INTEGRITY);
        assert_int_equal(record(RECORD_UNMASK_MODEL, "other", 3, 1, model), ERR_INTEGRITY);
        assert_int_equal(record(RECORD_UNMASK_MODEL, "j", 4, 1, next), 0);
        assert_int_equal(site_store_unmasked(store, (const uint8_t *)model, "j", 3, &unmasked, &err), 0);
        assert_false(unmasked);
        assert_int_equal(site_store_unmasked(store, (const uint8_t *)model, "other", 3, &unmasked, &err), 0);
        assert_true(unmasked);
        reopen();
    }
}

static int witness(const char *site, uint64_t sequence, uint8_t head)
{
    const struct secagg_witness w = site_store_witness(store);
    struct error err = {0};
    uint8_t bytes[32];
    memset(bytes, head, sizeof bytes);
    return w.check(w.ctx, site, sequence, bytes, &err);
}

static void peers_ledgers_only_grow(void **state)
{
    (void)state;
    assert_int_equal(witness("b", 0, 0), 0);
    assert_int_equal(witness("b", 5, 1), 0);
    assert_int_equal(witness("b", 5, 1), 0);
    assert_int_equal(witness("b", 5, 2), ERR_INTEGRITY); /* a fork */
    assert_int_equal(witness("c", 1, 2), 0);
    reopen();
    assert_int_equal(witness("b", 4, 1), ERR_INTEGRITY); /* a restored snapshot */
    assert_int_equal(witness("b", 5, 1), 0);
    assert_int_equal(witness("b", 6, 3), 0);
}

static enum consent consent_of(const char *job, uint8_t hash)
{
    uint8_t plan_hash[HASH_SIZE];
    struct error err = {0};
    enum consent consent;
    memset(plan_hash, hash, sizeof plan_hash);
    if (site_store_consent(store, job, plan_hash, span_str("opening"), &consent, &err) < 0)
        fail_msg("%s", err.message);
    return consent;
}

static void consent_is_for_one_plan(void **state)
{
    struct error err = {0};
    struct buffer opening;
    enum consent consent;
    (void)state;
    uint8_t first[HASH_SIZE], second[HASH_SIZE];
    memset(first, 1, sizeof first);
    memset(second, 2, sizeof second);
    assert_int_equal(site_store_decide(store, "j", first, CONSENT_APPROVED, &err), ERR_NOT_FOUND);
    assert_int_equal(consent_of("j", 1), CONSENT_PENDING);
    assert_int_equal(site_store_decide(store, "j", second, CONSENT_APPROVED, &err), ERR_POLICY);
    assert_int_equal(consent_of("j", 1), CONSENT_PENDING);
    assert_int_equal(site_store_decide(store, "j", first, CONSENT_APPROVED, &err), 0);
    reopen();
    assert_int_equal(consent_of("j", 1), CONSENT_APPROVED);
    assert_int_equal(consent_of("k", 1), CONSENT_PENDING);
    assert_int_equal(consent_of("j", 2), CONSENT_PENDING); /* another plan under the same name */
    assert_int_equal(consent_of("j", 2), CONSENT_PENDING); /* and so it is on disk */
    /* A person read the first plan, it was replaced, they approve what they read: nothing is approved. */
    assert_int_equal(site_store_decide(store, "j", first, CONSENT_APPROVED, &err), ERR_POLICY);
    assert_non_null(strstr(err.message, "another plan"));
    assert_int_equal(consent_of("j", 2), CONSENT_PENDING);
    assert_int_equal(site_store_decide(store, "j", NULL, CONSENT_DENIED, &err), 0);
    assert_int_equal(consent_of("j", 2), CONSENT_DENIED);
    /* Looking changes nothing, and does not find a plan that was replaced. */
    assert_int_equal(site_store_decision(store, "j", first, &consent, &err), ERR_NOT_FOUND);
    assert_int_equal(site_store_decision(store, "ghost", first, &consent, &err), ERR_NOT_FOUND);
    assert_int_equal(site_store_decision(store, "j", second, &consent, &err), 0);
    assert_int_equal(consent, CONSENT_DENIED);
    buffer_init(&opening, 100);
    assert_int_equal(site_store_plan(store, "j", &opening, &consent, &err), 0);
    assert_int_equal(opening.len, 7);
    assert_int_equal(consent, CONSENT_DENIED);
    assert_int_equal(site_store_plan(store, "none", &opening, &consent, &err), ERR_NOT_FOUND);
    buffer_release(&opening);
}

static void values_survive(void **state)
{
    struct error err = {0};
    char job[SITE_ID_SIZE];
    uint32_t round = 99;
    uint64_t declared = 99;
    (void)state;
    assert_int_equal(site_store_declared(store, &declared, &err), 0);
    assert_int_equal(declared, 0);
    assert_int_equal(site_store_served(store, job, &round, &err), ERR_NOT_FOUND);
    assert_int_equal(site_store_version(store, "j", &round, &err), 0);
    assert_int_equal(round, 0);
    (void)consent_of("j", 1);
    assert_int_equal(site_store_set_version(store, "j", 4, &err), 0);
    assert_int_equal(site_store_set_served(store, "j", 3, &err), 0);
    assert_int_equal(site_store_set_declared(store, 4000000000u, &err), 0);
    reopen();
    assert_int_equal(site_store_version(store, "j", &round, &err), 0);
    assert_int_equal(round, 4);
    assert_int_equal(site_store_served(store, job, &round, &err), 0);
    assert_string_equal(job, "j");
    assert_int_equal(round, 3);
    assert_int_equal(site_store_declared(store, &declared, &err), 0);
    assert_int_equal(declared, 4000000000u);
}

/* --- version ------------------------------------------------------------------------------------------------------ */

#define WORDS 6

/* Without the waiting for the disk of file_write_atomic: this is done for every byte. */
static void put(const char *path, struct span bytes)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes.ptr, 1, bytes.len, file), bytes.len);
    assert_int_equal(fclose(file), 0);
}

static void a_version_is_loaded_whole_or_not_at_all(void **state)
{
    const float values[2 * WORDS] = {1, -2, 3.5f, 0, -0.0f, 1e-20f, 7, 8, 9, 10, 11, 12};
    struct vault vault = {.config = config_of("max_epsilon: 8")};
    struct vault stranger = {.config = vault.config};
    struct job_plan plan = plan_of();
    struct cosign_statement statement = {.federation = "test", .job = "j", .round = 4, .attempt = 1, .n = 5, .c = 1};
    struct version v = {0}, loaded = {0};
    struct error err = {0};
    uint8_t frozen[HASH_SIZE], expected[HASH_SIZE];
    char path[NODE_PATH_SIZE], other[NODE_PATH_SIZE];
    struct buffer file;
    (void)state;
    assert_int_equal(identity_key_create(&random_system, &vault.key, &err), 0);
    assert_int_equal(identity_key_create(&random_system, &stranger.key, &err), 0);

    /* The statement must name these bytes. */
    assert_int_equal(version_from_state(&v, &plan, &statement, values, WORDS, &err), ERR_INTEGRITY);
    session_frozen_hash(span_of(plan.lora, plan.lora_len), frozen);
    const struct model_basis basis = job_plan_basis(&plan, frozen);
    model_state_hash(&basis, (struct model_state){values, values + WORDS, WORDS}, statement.next_hash);
    if (version_from_state(&v, &plan, &statement, values, WORDS, &err) < 0 ||
        version_store(&v, &vault, span_str("a proof"), &err) < 0 || version_load(&loaded, &vault, "j", 4, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(loaded.words, WORDS);
    assert_true(loaded.proven);
    assert_memory_equal(loaded.params, values, WORDS * sizeof *values);
    assert_memory_equal(loaded.momentum, values + WORDS, WORDS * sizeof *values);
    assert_memory_equal(loaded.model_hash, statement.next_hash, HASH_SIZE);
    hash_bytes(span_of(values, WORDS * sizeof *values), expected);
    assert_memory_equal(loaded.adapter_sha256, expected, HASH_SIZE);
    assert_string_equal(loaded.options, plan.train.options);
    version_release(&loaded);

    /* Every byte, every truncation, and something added. */
    version_path(vault.config, "j", 4, path);
    buffer_init(&file, 1 << 20);
    assert_int_equal(file_read(path, &file, &err), 0);
    for (size_t i = 0; i < file.len; i++) {
        file.data[i] ^= 0x20;
        put(path, buffer_span(&file));
        file.data[i] ^= 0x20;
        if (version_load(&loaded, &vault, "j", 4, &err) != ERR_INTEGRITY)
            fail_msg("a changed byte %zu of %zu was not noticed", i, file.len);
    }
    for (size_t n = 0; n < file.len; n += 7) {
        put(path, span_of(file.data, n));
        assert_int_equal(version_load(&loaded, &vault, "j", 4, &err), ERR_INTEGRITY);
    }
    buffer_append(&file, "x", 1);
    put(path, buffer_span(&file));
    assert_int_equal(version_load(&loaded, &vault, "j", 4, &err), ERR_INTEGRITY);
    file.len--;

    /* A whole file in another one's place; another site's file. */
    put(path, buffer_span(&file));
    version_path(vault.config, "j", 5, other);
    put(other, buffer_span(&file));
    assert_int_equal(version_load(&loaded, &vault, "j", 5, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "holds job j round 4"));
    assert_int_equal(version_load(&loaded, &stranger, "j", 4, &err), ERR_INTEGRITY);
    assert_int_equal(version_load(&loaded, &vault, "j", 6, &err), ERR_NOT_FOUND);
    assert_int_equal(version_load(&loaded, &vault, "j", 4, &err), 0);
    version_release(&loaded);
    version_release(&v);
    buffer_release(&file);
    identity_key_free(vault.key);
    identity_key_free(stranger.key);
    config_free((struct config *)(uintptr_t)vault.config);
}

static void the_first_version_is_zero_and_bound_to_its_base(void **state)
{
    struct job_plan plan = plan_of();
    struct version a = {0}, b = {0};
    struct error err = {0};
    (void)state;
    assert_int_equal(version_first(&a, &plan, WORDS, &err), 0);
    for (size_t i = 0; i < WORDS; i++)
        assert_true(a.params[i] == 0 && a.momentum[i] == 0);
    plan.base_hash[3] ^= 1;
    assert_int_equal(version_first(&b, &plan, WORDS, &err), 0);
    assert_true(memcmp(a.model_hash, b.model_hash, HASH_SIZE) != 0);
    version_release(&b);
    plan.base_hash[3] ^= 1;
    plan.lora[0] ^= 1;
    assert_int_equal(version_first(&b, &plan, WORDS, &err), 0);
    assert_true(memcmp(a.model_hash, b.model_hash, HASH_SIZE) != 0);
    version_release(&a);
    version_release(&b);
}

/* --- going back to an older version --------------------------------------------------------------------------- */

static struct cosign_statement statement_of(uint32_t round, uint8_t previous, uint8_t next)
{
    struct cosign_statement s = {.federation = "test", .job = "j", .round = round, .attempt = 1, .n = 5, .c = 1};
    memset(s.previous_hash, previous, HASH_SIZE);
    memset(s.next_hash, next, HASH_SIZE);
    return s;
}

static void a_version_is_replaced_only_by_what_may_follow(void **state)
{
    struct version held = {.statement = statement_of(4, 3, 4)};
    struct secagg_info round = {.job = "j", .round = 6};
    struct cosign_statement five = statement_of(5, 4, 5), three = statement_of(3, 2, 3), two = statement_of(2, 1, 2);
    struct error err = {0};
    (void)state;
    memset(round.model_hash, 5, HASH_SIZE);
    assert_int_equal(adopt_check(&held, &round, "j", 5, &five, &err), 0);
    assert_int_equal(adopt_check(&held, &round, "k", 5, &five, &err), ERR_INTEGRITY);
    assert_int_equal(adopt_check(&held, &round, "j", 4, &five, &err), ERR_INTEGRITY);
    round.round = 5; /* a version of the round itself, or of a later one */
    assert_int_equal(adopt_check(&held, &round, "j", 5, &five, &err), ERR_INTEGRITY);
    assert_int_equal(adopt_check(&held, NULL, "j", 5, &five, &err), 0);
    round.round = 6;
    memset(round.model_hash, 6, HASH_SIZE);
    assert_int_equal(adopt_check(&held, &round, "j", 5, &five, &err), ERR_INTEGRITY);
    /* One step back, from a version without a quorum; no further, and not from one that a quorum signed. */
    memset(round.model_hash, 3, HASH_SIZE);
    assert_int_equal(adopt_check(&held, &round, "j", 3, &three, &err), 0);
    assert_int_equal(adopt_check(&held, NULL, "j", 3, &three, &err), 0);
    assert_int_equal(adopt_check(&held, NULL, "j", 2, &two, &err), ERR_INTEGRITY);
    held.proven = true;
    assert_int_equal(adopt_check(&held, &round, "j", 3, &three, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "a quorum signed"));
    assert_int_equal(adopt_check(&held, NULL, "j", 3, &three, &err), ERR_INTEGRITY);
    memset(round.model_hash, 5, HASH_SIZE);
    assert_int_equal(adopt_check(&held, &round, "j", 5, &five, &err), 0);
}

static bool is_there(uint32_t round)
{
    char path[NODE_PATH_SIZE];
    version_path(store_config, "j", round, path);
    return file_exists(path);
}

/* A round that starts from the job's first state removes what is held only where that is one step back. */
static void an_aggregator_cannot_roll_a_site_back(void **state)
{
    static struct federation f; /* large */
    struct secagg_info *info = calloc(1, sizeof *info);
    struct version first = {0};
    struct error err = {0};
    char path[NODE_PATH_SIZE];
    (void)state;
    f = (struct federation){.config = store_config, .store = store};
    (void)consent_of("j", 1);
    snprintf(info->job, sizeof info->job, "j");
    info->plan = plan_of();
    info->round = 3;
    assert_int_equal(version_first(&first, &info->plan, WORDS, &err), 0);
    memcpy(info->model_hash, first.model_hash, HASH_SIZE);
    for (uint32_t round = 1; round <= 2; round++) {
        version_path(store_config, "j", round, path);
        *strrchr(path, '/') = 0;
        assert_int_equal(file_make_folder(path, 0700, &err), 0);
        version_path(store_config, "j", round, path);
        put(path, span_str("x"));
    }
    assert_int_equal(site_store_set_version(store, "j", 2, &err), 0);
    assert_int_equal(version_first(&f.job.version, &info->plan, WORDS, &err), 0);
    f.job.version.statement = statement_of(2, 1, 2); /* two steps from the first state */
    assert_int_equal(adopt_withdrawal(&f, info, 0, &err), ERR_INTEGRITY);
    assert_int_equal(adopt_withdrawal(&f, info, 1, &err), ERR_INTEGRITY);
    assert_true(is_there(1) && is_there(2));
    memcpy(f.job.version.statement.previous_hash, first.model_hash, HASH_SIZE);
    f.job.version.proven = true;
    assert_int_equal(adopt_withdrawal(&f, info, 0, &err), ERR_INTEGRITY);
    assert_true(is_there(2) && f.job.version.statement.round == 2);
    f.job.version.proven = false; /* recomputed here, and taken back for want of a quorum */
    assert_int_equal(adopt_withdrawal(&f, info, 0, &err), 0);
    assert_true(!is_there(1) && !is_there(2) && f.job.version.statement.round == 0);
    version_release(&f.job.version);
    version_release(&first);
    free(info);
}

/* --- messages of the session -------------------------------------------------------------------------------------- */

static void session_bytes_are_read_whole_or_refused(void **state)
{
    struct session_event event = {
        .cursor = {7, 9}, .kind = SESSION_OPEN, .job = "j", .round = 3, .attempt = 1, .payload = span_str("payload")};
    struct session_message message = {
        .stage = SESSION_UNWILLING, .job = "j", .round = 3, .attempt = 1, .payload = span_str("no")};
    struct session_event event_back;
    struct session_message message_back;
    struct error err = {0};
    struct buffer b;
    (void)state;
    buffer_init(&b, 1000);
    session_event_encode(&event, &b);
    for (size_t n = 0; n < b.len; n++)
        assert_int_equal(session_event_decode(span_of(b.data, n), &event_back, &err), ERR_INTEGRITY);
    assert_int_equal(session_event_decode(buffer_span(&b), &event_back, &err), 0);
    assert_int_equal(event_back.cursor.sequence, 9);
    assert_true(span_equal(event_back.payload, event.payload));
    buffer_append(&b, "x", 1);
    assert_int_equal(session_event_decode(buffer_span(&b), &event_back, &err), ERR_INTEGRITY);
    buffer_clear(&b);
    session_message_encode(&message, &b);
    for (size_t n = 0; n < b.len; n++)
        assert_int_equal(session_message_decode(span_of(b.data, n), &message_back, &err), ERR_INTEGRITY);
    assert_int_equal(session_message_decode(buffer_span(&b), &message_back, &err), 0);
    assert_int_equal(message_back.stage, SESSION_UNWILLING);
    message.stage = SESSION_WILLING + 1;
    buffer_clear(&b);
    session_message_encode(&message, &b);
    assert_int_equal(session_message_decode(buffer_span(&b), &message_back, &err), ERR_INTEGRITY);
    message.stage = SESSION_WILLING;
    snprintf(message.job, sizeof message.job, "../x");
    buffer_clear(&b);
    session_message_encode(&message, &b);
    assert_int_equal(session_message_decode(buffer_span(&b), &message_back, &err), ERR_INTEGRITY);
    buffer_release(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(noise_is_the_least_that_keeps_the_target),
        cmocka_unit_test(a_stated_plan_must_keep_its_own_target),
        cmocka_unit_test(unknown_training_options_are_refused),
        cmocka_unit_test_setup_teardown(each_rule_of_the_policy, set_up, tear_down),
        cmocka_unit_test_setup_teardown(hours_of_the_day, set_up, tear_down),
        cmocka_unit_test_setup_teardown(records_follow_their_rules_across_restarts, open_store, close_store),
        cmocka_unit_test_setup_teardown(a_model_is_unmasked_in_one_round, open_store, close_store),
        cmocka_unit_test_setup_teardown(peers_ledgers_only_grow, open_store, close_store),
        cmocka_unit_test_setup_teardown(consent_is_for_one_plan, open_store, close_store),
        cmocka_unit_test_setup_teardown(values_survive, open_store, close_store),
        cmocka_unit_test_setup_teardown(a_version_is_loaded_whole_or_not_at_all, set_up, tear_down),
        cmocka_unit_test(the_first_version_is_zero_and_bound_to_its_base),
        cmocka_unit_test(a_version_is_replaced_only_by_what_may_follow),
        cmocka_unit_test_setup_teardown(an_aggregator_cannot_roll_a_site_back, open_store, close_store),
        cmocka_unit_test(session_bytes_are_read_whole_or_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
