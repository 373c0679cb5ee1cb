/* consent list, show, approve, deny; privacy report, epsilon. */
#include "base/hex.h"
#include "node/base_hash.h"
#include "node/commands.h"
#include "node/jobs/account.h"
#include "node/jobs/local_plan.h"
#include "node/jobs/policy.h"
#include "node/jobs/site_store.h"
#include "node/settings.h"
#include "node/site.h"
#include "node/vault/vault.h"
#include "privacy/accountant.h"
#include "privacy/ledger.h"
#include "protocol/client.h"

#include <time.h>
#include <unistd.h>

static int with_store(struct cli *cli, struct config **ret_config, struct site_store **ret_store, struct error *err)
{
    int rc = cli_config(cli, ret_config, err);

    return rc < 0 ? rc : site_store_open(ret_store, *ret_config, err);
}

static int list_job(void *ctx, const char *job, enum consent consent)
{
    json_array_append_new(ctx, json_pack("{s:s,s:s}", "job", job, "consent", consent_name(consent)));
    return 0;
}

int command_consent_list(struct cli *cli, struct error *err)
{
    static const char *const columns[] = {"job", "consent"};
    struct config *config = NULL;
    struct site_store *store = NULL;
    json_t *rows = json_array();
    int rc = with_store(cli, &config, &store, err);

    if (rc == 0 && (rc = site_store_each_job(store, list_job, rows, err)) == 0)
        cli_print_rows(cli, json_incref(rows), columns, ARRAY_LEN(columns));
    json_decref(rows);
    site_store_close(store);
    config_free(config);
    return rc;
}

/* Text of a plan's author. */
static json_t *author_text(const char *text, size_t len)
{
    json_t *string = json_stringn(text, len);

    return string ? string : json_string("(not UTF-8)");
}

static json_t *describe(const struct secagg_info *info, enum consent consent)
{
    const struct job_plan *p = &info->plan;
    char plan[2 * HASH_SIZE + 1], base[2 * HASH_SIZE + 1], author[2 * SIGN_PUBLIC_SIZE + 1];
    char system_message[PLAN_TEXT_MAX], valid_until[32] = "";
    time_t end = (time_t)p->not_after_s;
    struct tm utc;

    hex_encode(p->hash, HASH_SIZE, plan);
    hex_encode(p->base_hash, HASH_SIZE, base);
    hex_encode(p->author, SIGN_PUBLIC_SIZE, author);
    local_plan_system_message(p->train.options, system_message, sizeof system_message);
    if (gmtime_r(&end, &utc))
        strftime(valid_until, sizeof valid_until, "%Y-%m-%dT%H:%M:%SZ", &utc);
    json_t *train = json_pack("{s:s,s:f,s:i,s:i,s:i,s:i,s:o,s:o}", "optimizer", p->train.optimizer, "learning_rate",
                              p->train.learning_rate, "rounds", (int)p->rounds, "steps_per_round",
                              (int)p->train.local_steps, "batch", (int)p->train.batch, "max_tokens",
                              (int)p->train.max_len, "options", author_text(p->train.options, strlen(p->train.options)),
                              "system_message", author_text(system_message, strlen(system_message)));
    json_t *out = json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:o,s:I}", "job", p->job, "consent", consent_name(consent),
                            "plan", plan, "valid_until", valid_until, "author_key", author, "base_model_sha256", base,
                            "lora", author_text((const char *)p->lora, p->lora_len), "parameters_sent",
                            (json_int_t)job_plan_vector_max(p, info->state_words));
    json_t *privacy =
        json_pack("{s:s,s:f,s:f,s:f,s:i,s:i,s:i,s:i}", "dp", p->dp.mode == PLAN_DP_RECORD ? "record" : "none",
                  "epsilon", p->dp.target_epsilon, "delta", p->dp.delta, "clip", p->dp.clip, "sites_invited",
                  (int)info->quorum.n, "threshold", (int)info->quorum.t, "colluders_assumed", (int)info->quorum.c,
                  "honest_in_every_sum", (int)info->quorum.m);
    json_object_update(out, train);
    json_object_update(out, privacy);
    json_decref(train);
    json_decref(privacy);
    return out;
}

int command_consent_show(struct cli *cli, struct error *err)
{
    struct secagg_info *info = malloc(sizeof *info);
    struct config *config = NULL;
    struct site_store *store = NULL;
    struct vault vault = {0};
    struct buffer opening;
    enum consent consent;
    int rc;

    buffer_init(&opening, 1 << 20);
    if (!info)
        return error_set(err, ERR_RESOURCES, "out of memory");
    if ((rc = with_store(cli, &config, &store, err)) == 0 &&
        (rc = vault_open(&vault, config, &clock_system, err)) == 0 &&
        (rc = site_store_plan(store, cli->args[0], &opening, &consent, err)) == 0 &&
        (rc = secagg_peek(buffer_span(&opening), &vault.roster, info, err)) == 0)
        cli_print_object(cli, describe(info, consent));
    buffer_release(&opening);
    vault_release(&vault);
    site_store_close(store);
    config_free(config);
    free(info);
    return rc;
}

/* The records that this site declared, or would declare at its first training. */
static int declared_records(const struct config *config, struct site_store *store, const struct local_plan *local,
                            uint32_t tokens_max, uint64_t *ret_records, struct error *err)
{
    const char *path = config_path(config, "data.path");
    struct dataset *data = NULL;
    struct site site = {0};
    int rc;

    if (config_is_set(config, "data.declared_records")) {
        *ret_records = (uint64_t)config_int(config, "data.declared_records");
        return 0;
    }
    if ((rc = site_store_declared(store, ret_records, err)) < 0 || *ret_records > 0)
        return rc;
    if (!path)
        return error_set(err, ERR_POLICY, "this site has no training records (data.path is not set)");
    if ((rc = site_open(&site, config, err)) == 0 &&
        (rc = site_dataset(&site, path, local->system_message, (int32_t)tokens_max, &data, err)) == 0)
        *ret_records = dataset_count(data);
    dataset_free(data);
    site_release(&site);
    return rc;
}

/* What the rest of the job would cost, against what is left of the budget. Writes nothing. */
static int check_budget(const struct config *config, struct site_store *store, const struct secagg_info *info,
                        struct error *err)
{
    const struct job_plan *plan = &info->plan;
    uint64_t declared = 0, next = 0, steps = (uint64_t)plan->rounds * plan->train.local_steps;
    struct ledger *ledger = NULL;
    struct local_plan local;
    double epsilon;
    int rc;

    local_plan_system_message(plan->train.options, local.system_message, sizeof local.system_message);
    if ((rc = declared_records(config, store, &local, plan->train.max_len, &declared, err)) < 0 ||
        (rc = local_plan_make(&local, plan, declared, job_plan_vector_max(plan, info->state_words), err)) < 0 ||
        local.dp.mode == DP_NONE)
        return rc;
    if ((rc = account_read(&ledger, config, store, &clock_system, err)) < 0)
        return rc == ERR_NOT_FOUND ? 0 : rc; /* nothing was spent yet: policy_check_plan has compared the target */
    if ((rc = ledger_next_step(ledger, plan->job, &next, err)) == 0 && next < steps)
        rc = ledger_preview(ledger, &local.dp, steps - next, &epsilon, err);
    ledger_close(ledger);
    return rc;
}

/* A person cannot approve what node.yaml forbids: the policy has to be changed first, knowingly. ret_plan_hash: of the
 * plan that was checked. */
static int check_approval(const struct config *config, struct site_store *store, const char *job,
                          uint8_t ret_plan_hash[HASH_SIZE], struct error *err)
{
    struct secagg_info *info = malloc(sizeof *info);
    struct vault vault = {0};
    struct buffer opening;
    uint8_t base[HASH_SIZE];
    enum consent consent;
    int rc;

    buffer_init(&opening, 1 << 20);
    if (!info)
        return error_set(err, ERR_RESOURCES, "out of memory");
    if ((rc = vault_open(&vault, config, &clock_system, err)) == 0 &&
        (rc = site_store_plan(store, job, &opening, &consent, err)) == 0 &&
        (rc = secagg_peek(buffer_span(&opening), &vault.roster, info, err)) == 0 &&
        (rc = base_hash_path(config_path(config, "model.path"), base, err)) == 0 &&
        (rc = policy_check_plan(config, &info->plan, base, err)) == 0 &&
        (rc = check_budget(config, store, info, err)) == 0)
        memcpy(ret_plan_hash, info->plan.hash, HASH_SIZE);
    buffer_release(&opening);
    vault_release(&vault);
    free(info);
    return rc;
}

/* Consent is to a plan, which may have been replaced since a person read it: they name it, or see its hash and agree.
 */
static int confirm_plan(struct cli *cli, const uint8_t plan_hash[HASH_SIZE], struct error *err)
{
    const char *given = cli_value(cli, "plan"), *job = cli->args[0];
    char text[2 * HASH_SIZE + 1];
    uint8_t read[HASH_SIZE];

    hex_encode(plan_hash, HASH_SIZE, text);
    if (given) {
        if (hex_decode(given, read, sizeof read) < 0)
            return error_set(err, ERR_CONFIG, "--plan must be the 64 hexadecimal digits that `consent show %s` prints",
                             job);
        if (memcmp(read, plan_hash, HASH_SIZE) != 0)
            return error_set(err, ERR_POLICY,
                             "the plan of job %s is %s, not the one given: read it again with "
                             "`consilium-node consent show %s`",
                             job, text, job);
        return 0;
    }
    if (!isatty(STDIN_FILENO))
        return error_set(err, ERR_CONFIG,
                         "without a terminal, name the plan that was read: consent approve %s --plan "
                         "HASH, with the hash that `consent show %s` prints",
                         job, job);
    return cli_confirm(cli, err, "Let job %s train here by plan %s, as `consent show` prints it?", job, text);
}

static int decide(struct cli *cli, enum consent consent, struct error *err)
{
    bool approve = consent == CONSENT_APPROVED;
    uint8_t plan_hash[HASH_SIZE];
    struct config *config = NULL;
    struct site_store *store = NULL;
    int rc = with_store(cli, &config, &store, err);

    if (rc == 0 && approve && (rc = check_approval(config, store, cli->args[0], plan_hash, err)) == 0)
        rc = confirm_plan(cli, plan_hash, err);
    if (rc == 0 && (rc = site_store_decide(store, cli->args[0], approve ? plan_hash : NULL, consent, err)) == 0)
        cli_print_line(cli, "job %s: %s", cli->args[0], consent_name(consent));
    site_store_close(store);
    config_free(config);
    return rc;
}

int command_consent_approve(struct cli *cli, struct error *err)
{
    return decide(cli, CONSENT_APPROVED, err);
}

int command_consent_deny(struct cli *cli, struct error *err)
{
    return decide(cli, CONSENT_DENIED, err);
}

/* N of this site: what node.yaml says, else what was fixed at the first use. */
static int reported_records(const struct config *config, struct site_store *store, uint64_t *ret, struct error *err)
{
    if (!config_is_set(config, "data.declared_records"))
        return site_store_declared(store, ret, err);
    *ret = (uint64_t)config_int(config, "data.declared_records");
    return 0;
}

int command_privacy_report(struct cli *cli, struct error *err)
{
    struct config *config = NULL;
    struct ledger *ledger = NULL;
    struct site_store *store = NULL;
    uint64_t declared = 0;
    struct ledger_spent spent;
    int rc = with_store(cli, &config, &store, err);

    if (rc == 0 && (rc = account_read(&ledger, config, store, &clock_system, err)) == 0 &&
        (rc = ledger_verify(ledger, err)) == 0 && (rc = ledger_spent(ledger, NULL, &spent, err)) == 0)
        rc = reported_records(config, store, &declared, err);
    if (rc == 0)
        cli_print_object(cli,
                         json_pack("{s:s,s:I,s:f,s:f,s:f,s:f,s:I,s:I,s:I,s:I}", "site", config_string(config, "site"),
                                   "declared_records", (json_int_t)declared, "epsilon_spent", spent.epsilon,
                                   "epsilon_budget", spent.budget, "delta", spent.delta, "order", spent.order, "steps",
                                   (json_int_t)spent.steps, "released", (json_int_t)spent.released, "burnt",
                                   (json_int_t)spent.burnt, "unfinished", (json_int_t)spent.reserved));
    ledger_close(ledger);
    site_store_close(store);
    config_free(config);
    return rc;
}

int command_privacy_epsilon(struct cli *cli, struct error *err)
{
    double epsilon, delta, q, z, order = 0;
    int64_t steps;
    int rc;

    if ((rc = cli_float(cli, "epsilon", 0, 0, 1000, &epsilon, err)) < 0 ||
        (rc = cli_float(cli, "noise-multiplier", 0, 0, 10000, &z, err)) < 0 ||
        (rc = cli_float(cli, "delta", 1e-5, 1e-15, 0.5, &delta, err)) < 0 ||
        (rc = cli_float(cli, "sampling-rate", 0, 0, 1, &q, err)) < 0 ||
        (rc = cli_int(cli, "steps", 0, 0, 1000000000, &steps, err)) < 0)
        return rc;
    if (!(q > 0) || steps < 1 || (epsilon > 0) == (z > 0))
        return error_set(err, ERR_CONFIG,
                         "privacy epsilon needs --sampling-rate, --steps and one of --epsilon and "
                         "--noise-multiplier");
    if (epsilon > 0 && (rc = accountant_calibrate(epsilon, delta, q, (uint64_t)steps, &z, err)) < 0)
        return rc;
    if ((rc = accountant_epsilon(q, z, (uint64_t)steps, delta, &epsilon, &order, err)) < 0)
        return rc;
    cli_print_object(cli, json_pack("{s:f,s:f,s:f,s:f,s:I,s:f}", "epsilon", epsilon, "delta", delta, "noise_multiplier",
                                    z, "sampling_rate", q, "steps", (json_int_t)steps, "order", order));
    return 0;
}
