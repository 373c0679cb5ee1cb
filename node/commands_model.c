/* train --local, eval, generate, model describe, list, export. */
#include "base/file.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "crypto/secret.h"
#include "model/formats/adapter.h"
#include "node/base_hash.h"
#include "node/commands.h"
#include "node/jobs/account.h"
#include "node/jobs/local_plan.h"
#include "node/jobs/site_store.h"
#include "node/jobs/version.h"
#include "node/serve/answer.h"
#include "node/settings.h"
#include "node/train/adapter_config.h"
#include "node/train/evaluate.h"
#include "node/train/trainer.h"
#include "privacy/ledger.h"
#include "runtime/progress.h"
#include "runtime/text.h"

#define BASE_MODEL_NAME "base" /* what a PEFT export names as its base model */

/* The version in use as a struct lora; ERR_NOT_FOUND while there is none. */
static int load_in_use(const struct config *config, const struct site *site, struct lora *ret_lora,
                       struct version *ret_version, struct error *err)
{
    struct site_store *store = NULL;
    struct vault vault = {0};
    char job[SITE_ID_SIZE];
    uint32_t round;
    int rc;

    if ((rc = vault_open(&vault, config, &clock_system, err)) == 0 &&
        (rc = site_store_open(&store, config, err)) == 0 && (rc = site_store_served(store, job, &round, err)) == 0 &&
        (rc = version_load(ret_version, &vault, job, round, err)) == 0)
        rc = version_adapter(ret_version, site->base_hash, &site->model.config, ret_lora, err);
    vault_release(&vault);
    site_store_close(store);
    return rc;
}

/* --- eval ----------------------------------------------------------------------------------------------------- */

static void eval_progress(void *ctx, size_t done, size_t total)
{
    progress_update(ctx, done == total, "evaluated %zu/%zu", done, total);
}

static json_t *describe_result(const struct evaluate_result *r, const char *what, const struct version *v,
                               double seconds)
{
    char sha256[2 * HASH_SIZE + 1] = "";

    if (v)
        hex_encode(v->adapter_sha256, HASH_SIZE, sha256);
    return json_pack("{s:s,s:I,s:I,s:f,s:f,s:f,s:s,s:i,s:s,s:f}", "model", what, "records", (json_int_t)r->records,
                     "answers", (json_int_t)r->answers, "accuracy", (double)r->correct / (double)r->records, "majority",
                     (double)r->majority / (double)r->records, "mean_nll", r->mean_nll, "scorer",
                     r->answers ? "length-normalised log-likelihood" : "greedy exact match", "adapter_version",
                     v ? (int)v->statement.round : 0, "adapter_sha256", sha256, "seconds", seconds);
}

int command_eval(struct cli *cli, struct error *err)
{
    const char *path = cli_value(cli, "data"), *adapter = cli_value(cli, "adapter");
    const char *system_message = cli_value(cli, "system");
    bool base = cli_switch(cli, "base");
    struct progress progress;
    struct evaluate_options options = {.answer_tokens_max = 64, .progress = eval_progress, .progress_ctx = &progress};
    struct evaluate_result result;
    struct config *config = NULL;
    struct dataset *data = NULL;
    struct version version = {0};
    struct lora lora = {0};
    struct site site = {0};
    int64_t records, tokens, started = clock_monotonic_ms(&clock_system);
    int rc;

    if (!path)
        return error_set(err, ERR_CONFIG, "eval needs --data FILE");
    if (base && adapter)
        return error_set(err, ERR_CONFIG, "--base and --adapter exclude each other");
    progress_init(&progress, &clock_system, 10000);
    if ((rc = cli_int(cli, "records", 300, 1, 1000000, &records, err)) < 0 ||
        (rc = cli_int(cli, "max-tokens", 1024, 8, 65536, &tokens, err)) < 0 ||
        (rc = cli_config(cli, &config, err)) < 0 || (rc = site_open(&site, config, err)) < 0 ||
        (rc = site_dataset(&site, path, system_message ? system_message : "none", (int32_t)tokens, &data, err)) < 0)
        goto out;
    if (adapter)
        rc = adapter_import(adapter, &site.model.config, LORA_JOINT, &lora, err);
    else if (!base)
        rc = load_in_use(config, &site, &lora, &version, err);
    options.records_max = (size_t)records;
    if (rc < 0)
        goto out;
    do {
        options.backend = site.backend;
        rc = evaluate(&options, &site.model, site.tokenizer, base ? NULL : &lora, data, &result, err);
    } while (rc < 0 && site_turn_to_cpu(&site, "evaluating", err));
    if (rc == 0) {
        progress_end(&progress);
        cli_print_object(cli, describe_result(&result,
                                              base      ? "base"
                                              : adapter ? adapter
                                                        : version.statement.job,
                                              version.words ? &version : NULL,
                                              (double)(clock_monotonic_ms(&clock_system) - started) / 1000));
    }
out:
    lora_release(&lora);
    version_release(&version);
    dataset_free(data);
    site_release(&site);
    config_free(config);
    return rc;
}

/* --- train --local -------------------------------------------------------------------------------------------- */

struct local_run {
    struct progress progress;
    int64_t round, rounds;
};

static bool train_progress(void *ctx, uint32_t step, uint32_t steps, uint32_t done, uint32_t sampled)
{
    struct local_run *run = ctx;

    progress_update(&run->progress, (uint64_t)run->round, "round %lld/%lld | step %u/%u | %u/%u records",
                    (long long)run->round, (long long)run->rounds, step + 1, steps, done, sampled);
    return false;
}

/* The command's options as the plan of a job that is never sent. */
static int local_options(struct cli *cli, const struct config *config, struct job_plan *plan, struct error *err)
{
    const char *lora = cli_value(cli, "lora"), *optimizer = cli_value(cli, "optimizer"), *dp = cli_value(cli, "dp");
    const char *options = cli_value(cli, "options");
    int64_t rounds, steps, batch, tokens;
    int rc;

    if (!lora)
        return error_set(
            err, ERR_CONFIG,
            "train --local needs --lora TEXT, for example \"layers=20-29;targets=q,v;rank=8;"
            "alpha=16;scaling=rank;mode=ffa;seed=<64 hexadecimal digits>\"; mode is ffa, alternating or joint");
    if (dp && strcmp(dp, "record") != 0 && strcmp(dp, "none") != 0)
        return error_set(err, ERR_CONFIG, "--dp is record or none, not '%s'", dp);
    if ((rc = cli_int(cli, "rounds", 1, 1, 100000, &rounds, err)) < 0 ||
        (rc = cli_int(cli, "steps", 4, 1, 100000, &steps, err)) < 0 ||
        (rc = cli_int(cli, "batch", 16, 1, 1000000, &batch, err)) < 0 ||
        (rc = cli_int(cli, "max-tokens", 256, 8, 65536, &tokens, err)) < 0 ||
        (rc = cli_float(cli, "learning-rate", 0.005, 1e-8, 100, &plan->train.learning_rate, err)) < 0 ||
        (rc = cli_float(cli, "clip", 1, 1e-6, 1e6, &plan->dp.clip, err)) < 0 ||
        (rc = cli_float(cli, "epsilon", config_float(config, "policy.max_epsilon"), 0.01, 1000,
                        &plan->dp.target_epsilon, err)) < 0)
        return rc;
    plan->rounds = (uint32_t)rounds;
    plan->train.local_steps = (uint32_t)steps;
    plan->train.batch = (uint32_t)batch;
    plan->train.max_len = (uint32_t)tokens;
    plan->dp.delta = config_float(config, "policy.delta");
    plan->dp.grid = DP_GRID_CLIP / plan->dp.clip;
    plan->dp.mode = dp && strcmp(dp, "none") == 0 ? PLAN_DP_NONE : PLAN_DP_RECORD;
    /* A job of its own in the ledger: each run has its own plan. */
    snprintf(plan->job, sizeof plan->job, "local-%lld", (long long)clock_wall_ms(&clock_system));
    snprintf(plan->train.optimizer, sizeof plan->train.optimizer, "%s", optimizer ? optimizer : "adamw");
    snprintf(plan->train.options, sizeof plan->train.options, "%s", options ? options : "system=none");
    plan->lora_len = (uint32_t)snprintf((char *)plan->lora, sizeof plan->lora, "%s", lora);
    return 0;
}

/* What `train --local` holds open. */
struct local_parts {
    struct config *config;
    struct site site;
    struct site_store *store;
    struct identity_key *key; /* NULL: the site has none yet */
    struct ledger *ledger;    /* NULL without differential privacy */
    int lock;
    struct dataset *data;
    uint8_t commitment[HASH_SIZE], binary_hash[HASH_SIZE];
    struct local_plan local;
    struct adapter_config adapter;
    struct lora lora;
};

static void local_release(struct local_parts *p)
{
    ledger_close(p->ledger);
    dataset_free(p->data);
    lora_release(&p->lora);
    identity_key_free(p->key);
    site_store_close(p->store);
    site_release(&p->site);
    config_free(p->config);
    file_unlock(p->lock);
}

static uint64_t local_vector_max(const struct local_parts *p, const struct job_plan *plan)
{
    return job_plan_vector_max(plan, adapter_config_words(&p->adapter, &p->lora));
}

static int local_open(struct local_parts *p, struct job_plan *plan, struct error *err)
{
    char path[NODE_PATH_SIZE];
    uint64_t declared;
    int rc;

    node_path(p->config, "site.key", path);
    if ((file_exists(path) && (rc = identity_key_load(path, &p->key, err)) < 0) ||
        (rc = site_open(&p->site, p->config, err)) < 0 || (rc = site_store_open(&p->store, p->config, err)) < 0 ||
        (rc = adapter_config_parse(span_of(plan->lora, plan->lora_len), &p->adapter, err)) < 0 ||
        (rc = adapter_config_build(&p->adapter, &p->site.model.config, &p->lora, err)) < 0)
        return rc;
    plan->split_words = adapter_config_split(&p->adapter, &p->lora);
    local_plan_system_message(plan->train.options, p->local.system_message, sizeof p->local.system_message);
    if ((rc = account_load(p->config, &p->site, p->local.system_message, (int32_t)plan->train.max_len,
                           p->key ? identity_sign_key(p->key) : NULL, &p->data, p->commitment, err)) < 0 ||
        (rc = account_declared(p->config, p->store, p->data, &declared, err)) < 0 ||
        (rc = local_plan_make(&p->local, plan, declared, local_vector_max(p, plan), err)) < 0 ||
        p->local.dp.mode == DP_NONE)
        return rc;
    account_binary_hash(p->binary_hash);
    return account_open(&p->ledger, p->config, p->store, &p->local.dp, &clock_system, err);
}

static int reserve_local(struct local_parts *p, const struct job_plan *plan, uint32_t first_step,
                         uint64_t *ret_sequence, struct error *err)
{
    struct ledger_request request = {
        .job = plan->job, .plan = &p->local.dp, .first_step = first_step, .steps = plan->train.local_steps};

    memcpy(request.dataset, p->commitment, HASH_SIZE);
    memcpy(request.binary_hash, p->binary_hash, HASH_SIZE);
    return ledger_reserve(p->ledger, &request, ret_sequence, err);
}

static int train_rounds(struct local_parts *p, const struct job_plan *plan, struct error *err)
{
    struct local_run run = {.rounds = plan->rounds};
    struct trainer_progress progress = {train_progress, &run};
    struct trainer_options options = {.threads = p->site.threads,
                                      .example_tokens_max = (int32_t)plan->train.max_len,
                                      .optimizer = p->local.optimizer,
                                      .decay = p->local.decay,
                                      .alternating = p->adapter.alternating,
                                      .plan = p->local.dp};
    struct model_segment segment;
    struct trainer *trainer = NULL;
    int rc;

    progress_init(&run.progress, &clock_system, 10000);
    do {
        options.backend = p->site.backend;
        options.tokens_max = site_batch_tokens(&p->site);
        rc = trainer_new(&options, &p->site.model, &p->lora, p->data, &trainer, err);
    } while (rc < 0 && site_turn_to_cpu(&p->site, "training", err));
    for (run.round = 1; rc == 0 && run.round <= run.rounds; run.round++) {
        uint32_t first_step = (uint32_t)(run.round - 1) * plan->train.local_steps;
        uint8_t released[HASH_SIZE];
        uint64_t sequence = 0;
        if ((rc = job_plan_segment(plan, (uint32_t)run.round, adapter_config_words(&p->adapter, &p->lora), &segment,
                                   err)) < 0)
            break;
        adapter_config_turn(&p->adapter, segment.offset, &p->lora);
        if ((p->ledger && (rc = reserve_local(p, plan, first_step, &sequence, err)) < 0) ||
            (rc = trainer_round(trainer, &p->lora, first_step, &random_system, &progress, err)) < 0)
            break;
        hash_bytes(span_of(p->lora.trained, p->lora.trained_count * sizeof *p->lora.trained), released);
        if (p->ledger)
            rc = ledger_release(p->ledger, sequence, released, err);
    }
    progress_end(&run.progress);
    trainer_free(trainer);
    return rc;
}

int command_train(struct cli *cli, struct error *err)
{
    struct job_plan *plan = calloc(1, sizeof *plan);
    const char *out_path = cli_value(cli, "out");
    int64_t started = clock_monotonic_ms(&clock_system);
    struct local_parts p = {.lock = -1};
    int rc;

    if (!plan)
        return error_set(err, ERR_RESOURCES, "out of memory");
    if (!cli_switch(cli, "local") || !out_path) {
        free(plan);
        return error_set(err, ERR_CONFIG, "train needs --local and --out FOLDER; federated training is `run`");
    }
    if ((rc = secret_forbid_dumps(err)) < 0 || (rc = cli_config(cli, &p.config, err)) < 0 ||
        (rc = local_options(cli, p.config, plan, err)) < 0)
        goto out;
    if (!config_path(p.config, "data.path")) {
        rc = config_fail(p.config, "data.path", err, "must name the training records");
        goto out;
    }
    if ((rc = file_make_folder(config_path(p.config, "state"), 0700, err)) < 0 ||
        (plan->dp.mode != PLAN_DP_NONE && (rc = node_lock(p.config, &p.lock, err)) < 0) ||
        (rc = local_open(&p, plan, err)) < 0 || (rc = train_rounds(&p, plan, err)) < 0 ||
        (rc = adapter_export_peft(&p.lora, &p.site.model.config, out_path, BASE_MODEL_NAME, err)) < 0)
        goto out;
    cli_print_object(cli, json_pack("{s:s,s:I,s:s,s:f,s:f,s:f}", "adapter", out_path, "parameters",
                                    (json_int_t)adapter_config_words(&p.adapter, &p.lora), "dp",
                                    p.local.dp.mode == DP_NONE ? "none" : "record", "noise_multiplier", p.local.dp.z,
                                    "sampling_rate", p.local.dp.q, "seconds",
                                    (double)(clock_monotonic_ms(&clock_system) - started) / 1000));
out:
    local_release(&p);
    free(plan);
    return rc;
}

/* --- generate ------------------------------------------------------------------------------------------------- */

static int put_in_slot(struct slot *slot, const struct config *config, const struct site *site, struct error *err)
{
    struct served_adapter *served = calloc(1, sizeof *served);
    struct version version = {0};
    int rc;

    if (!served)
        return error_set(err, ERR_RESOURCES, "out of memory");
    served->references = 1;
    if ((rc = load_in_use(config, site, &served->lora, &version, err)) < 0) {
        served_adapter_drop(served);
    } else {
        memcpy(served->job, version.statement.job, sizeof served->job);
        served->version = version.statement.round;
        hex_encode(version.adapter_sha256, HASH_SIZE, served->sha256);
        local_plan_system_message(version.options, served->system_message, sizeof served->system_message);
        slot_put(slot, served);
    }
    version_release(&version);
    return rc;
}

static void print_piece(void *ctx, struct span text)
{
    (void)ctx;
    fwrite(text.ptr, 1, text.len, stdout);
    fflush(stdout);
}

int command_generate(struct cli *cli, struct error *err)
{
    const char *system_message = cli_value(cli, "system");
    /* Without --system: the message that the adapter was trained with. */
    struct chat_message messages[2] = {{CHAT_SYSTEM, span_str(system_message ? system_message : "")},
                                       {CHAT_USER, span_str(cli->args[0])}};
    struct answer_request request = {.messages = system_message ? messages : messages + 1,
                                     .message_count = system_message ? 2 : 1};
    struct answerer *answerer = NULL;
    struct config *config = NULL;
    struct site site = {0};
    struct answer answer = {0};
    struct slot slot;
    int64_t tokens;
    int rc;

    slot_init(&slot);
    if ((rc = cli_int(cli, "max-tokens", 64, 1, 100000, &tokens, err)) < 0 ||
        (rc = cli_config(cli, &config, err)) < 0 || (rc = site_open(&site, config, err)) < 0 ||
        (!cli_switch(cli, "base") && (rc = put_in_slot(&slot, config, &site, err)) < 0) ||
        (rc = answerer_new(&answerer, &site, (int32_t)config_int(config, "serve.context_tokens"), &random_system,
                           &clock_system, err)) < 0)
        goto out;
    request.tokens_max = (int32_t)tokens;
    if (cli->format == CLI_TABLE)
        request.piece = print_piece;
    if ((rc = answerer_run(answerer, &slot, &request, &answer, err)) < 0)
        goto out;
    if (cli->format == CLI_TABLE)
        fputc('\n', stdout);
    else
        cli_print_object(cli, json_pack("{s:s%,s:s,s:i,s:s}", "text", (const char *)answer.text.data, answer.text.len,
                                        "job", answer.source.job, "adapter_version", (int)answer.source.version,
                                        "adapter_sha256", answer.source.sha256));
out:
    answer_release(&answer);
    answerer_free(answerer);
    slot_release(&slot);
    site_release(&site);
    config_free(config);
    return rc;
}

/* --- model ---------------------------------------------------------------------------------------------------- */

int command_model_describe(struct cli *cli, struct error *err)
{
    struct model_file *file = NULL;
    struct cli as_json = *cli;
    uint8_t hash[HASH_SIZE];
    char text[2 * HASH_SIZE + 1];
    int rc = model_file_open(cli->args[0], &file, err);

    if (rc < 0)
        return rc;
    const struct model_config *c = &model_file_model(file)->config;
    base_hash(file, hash);
    hex_encode(hash, sizeof hash, text);
    as_json.format = CLI_JSON;
    cli_print_object(&as_json,
                     json_pack("{s:s,s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:b}", "name", model_file_name(file),
                               "sha256", text, "architecture", model_architecture_name(c->architecture), "layers",
                               (int)c->layer_count, "width", (int)c->d_model, "heads", (int)c->head_count, "kv_heads",
                               (int)c->kv_head_count, "head_size", (int)c->head_size, "ff", (int)c->d_ff, "vocabulary",
                               (int)c->vocabulary, "context", (int)c->context_length, "fused_gate_up",
                               (int)c->fused_gate_up));
    model_file_close(file);
    return 0;
}

struct version_list {
    struct site_store *store;
    struct vault *vault;
    json_t *rows;
    struct error *err;
};

static int list_versions(void *ctx, const char *job, enum consent consent)
{
    struct version_list *list = ctx;
    char path[NODE_PATH_SIZE], sha256[2 * HASH_SIZE + 1];
    uint32_t newest = 0;
    int rc = site_store_version(list->store, job, &newest, list->err);

    (void)consent;
    for (uint32_t round = 1; rc == 0 && round <= newest; round++) {
        struct version v = {0};
        struct error problem = {0};
        version_path(list->vault->config, job, round, path);
        if (!file_exists(path))
            continue;
        if (version_load(&v, list->vault, job, round, &problem) == 0)
            hex_encode(v.adapter_sha256, HASH_SIZE, sha256);
        else
            snprintf(sha256, sizeof sha256, "damaged");
        json_array_append_new(list->rows,
                              json_pack("{s:s,s:i,s:s}", "job", job, "version", (int)round, "adapter_sha256", sha256));
        version_release(&v);
    }
    return rc;
}

int command_model_list(struct cli *cli, struct error *err)
{
    static const char *const columns[] = {"job", "version", "adapter_sha256"};
    struct config *config = NULL;
    struct vault vault = {0};
    struct version_list list = {.vault = &vault, .rows = json_array(), .err = err};
    int rc;

    if ((rc = cli_config(cli, &config, err)) == 0 && (rc = vault_open(&vault, config, &clock_system, err)) == 0 &&
        (rc = site_store_open(&list.store, config, err)) == 0 &&
        (rc = site_store_each_job(list.store, list_versions, &list, err)) == 0)
        cli_print_rows(cli, json_incref(list.rows), columns, ARRAY_LEN(columns));
    json_decref(list.rows);
    site_store_close(list.store);
    vault_release(&vault);
    config_free(config);
    return rc;
}

int command_model_export(struct cli *cli, struct error *err)
{
    const char *job = cli->args[0], *path = cli->args[2];
    struct config *config = NULL;
    struct version version = {0};
    struct vault vault = {0};
    struct lora lora = {0};
    struct site site = {0};
    int64_t round;
    int rc;

    if (text_parse_int(cli->args[1], &round) < 0 || round < 1 || round > UINT32_MAX)
        return error_set(err, ERR_CONFIG, "'%s' is not a version number", cli->args[1]);
    if ((rc = cli_config(cli, &config, err)) == 0 && (rc = vault_open(&vault, config, &clock_system, err)) == 0 &&
        (rc = site_open(&site, config, err)) == 0 &&
        (rc = version_load(&version, &vault, job, (uint32_t)round, err)) == 0)
        rc = version_adapter(&version, site.base_hash, &site.model.config, &lora, err);
    if (rc == 0)
        rc = cli_switch(cli, "gguf") ? adapter_export_gguf(&lora, &site.model.config, path, err)
                                     : adapter_export_peft(&lora, &site.model.config, path, BASE_MODEL_NAME, err);
    lora_release(&lora);
    version_release(&version);
    site_release(&site);
    vault_release(&vault);
    config_free(config);
    return rc;
}
