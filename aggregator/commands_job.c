/* job validate, submit, list, watch, abort; model list. */
#include "aggregator/commands.h"
#include "aggregator/registry/registry.h"
#include "aggregator/rounds/book.h"
#include "aggregator/rounds/job_file.h"
#include "aggregator/settings.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "runtime/journal.h"
#include "runtime/progress.h"

#define WATCH_EVERY_MS 200

static int load_plan(const char *path, struct job_plan *ret_plan, uint64_t *ret_words, struct error *err)
{
    struct config *job = NULL;
    int rc;

    if ((rc = config_load(&job, &job_schema, path, err)) == 0 && (rc = config_finish(job, err)) == 0)
        rc = job_file_plan(job, &random_system, clock_wall_ms(&clock_system) / 1000, ret_plan, ret_words, err);
    config_free(job);
    return rc;
}

static json_t *describe_plan(const struct job_plan *plan, uint64_t words)
{
    char base[2 * HASH_SIZE + 1];

    hex_encode(plan->base_hash, HASH_SIZE, base);
    return json_pack("{s:s,s:s,s:s,s:I,s:i,s:i,s:i,s:s,s:f,s:f}", "job", plan->job, "base_model_sha256", base, "lora",
                     (const char *)plan->lora, "parameters", (json_int_t)words, "rounds", (int)plan->rounds,
                     "steps_per_round", (int)plan->train.local_steps, "batch", (int)plan->train.batch, "dp",
                     plan->dp.mode == PLAN_DP_RECORD ? "record" : "none", "epsilon", plan->dp.target_epsilon, "delta",
                     plan->dp.delta);
}

int command_job_validate(struct cli *cli, struct error *err)
{
    struct job_plan plan;
    uint64_t words;
    int rc = load_plan(cli->args[0], &plan, &words, err);

    if (rc == 0)
        cli_print_object(cli, describe_plan(&plan, words));
    return rc;
}

static int sign_and_store(struct cli *cli, struct job_plan *plan, uint64_t words, const char *key_path,
                          struct error *err)
{
    struct identity_key *key = NULL;
    struct registry registry = {0};
    struct config *config = NULL;
    struct book *book = NULL;
    struct buffer signed_plan;
    int rc;

    buffer_init(&signed_plan, PLAN_BYTES_MAX);
    if ((rc = cli_config(cli, &config, err)) < 0 || (rc = registry_open(&registry, config, err)) < 0 ||
        (rc = identity_key_load(key_path, &key, err)) < 0)
        goto out;
    if (!roster_is_author(&registry.roster, identity_public(key))) {
        rc = error_set(err, ERR_POLICY,
                       "%s is not the key of a plan author in the roster: the sites would refuse the job", key_path);
        goto out;
    }
    if ((rc = job_plan_sign(plan, identity_sign_key(key), &signed_plan, err)) == 0 &&
        (rc = book_open(&book, config, err)) == 0)
        rc = book_add_job(book, plan->job, words, buffer_span(&signed_plan), err);
out:
    buffer_release(&signed_plan);
    identity_key_free(key);
    book_close(book);
    registry_release(&registry);
    config_free(config);
    return rc;
}

int command_job_submit(struct cli *cli, struct error *err)
{
    const char *key_path = cli_value(cli, "author-key");
    struct job_plan plan;
    uint64_t words;
    int rc;

    if (!key_path)
        return error_set(err, ERR_CONFIG, "job submit needs --author-key FILE, a plan author's key");
    if ((rc = load_plan(cli->args[0], &plan, &words, err)) == 0 &&
        (rc = sign_and_store(cli, &plan, words, key_path, err)) == 0)
        cli_print_object(cli, describe_plan(&plan, words));
    return rc;
}

static int with_book(struct cli *cli, struct config **ret_config, struct book **ret_book, struct error *err)
{
    int rc = cli_config(cli, ret_config, err);

    return rc < 0 ? rc : book_open(ret_book, *ret_config, err);
}

static int list_job(void *ctx, const struct book_job *job)
{
    json_array_append_new(ctx, json_pack("{s:s,s:s,s:i,s:i,s:s}", "job", job->job, "state", job_state_name(job->state),
                                         "rounds_opened", (int)job->rounds_opened, "version", (int)job->version,
                                         "reason", job->reason));
    return 0;
}

int command_job_list(struct cli *cli, struct error *err)
{
    static const char *const columns[] = {"job", "state", "rounds_opened:rounds", "version", "reason"};
    struct config *config = NULL;
    struct book *book = NULL;
    json_t *rows = json_array();
    int rc = with_book(cli, &config, &book, err);

    if (rc == 0 && (rc = book_each_job(book, list_job, rows, err)) == 0)
        cli_print_rows(cli, json_incref(rows), columns, ARRAY_LEN(columns));
    json_decref(rows);
    book_close(book);
    config_free(config);
    return rc;
}

int command_job_abort(struct cli *cli, struct error *err)
{
    struct config *config = NULL;
    struct book *book = NULL;
    struct book_job job;
    int rc = with_book(cli, &config, &book, err);

    if (rc == 0 && (rc = book_job(book, cli->args[0], &job, err)) == 0) {
        if (job.state != JOB_WAITING && job.state != JOB_RUNNING)
            rc = error_set(err, ERR_FAILED, "job %s is %s", job.job, job_state_name(job.state));
        else if ((rc = cli_confirm(cli, err, "Abort job %s?", job.job)) == 0)
            rc = book_set_state(book, job.job, JOB_ABORTED, "by the operator", err);
    }
    book_close(book);
    config_free(config);
    return rc;
}

/* --- watch ---------------------------------------------------------------------------------------------------- */

struct watch {
    const char *job;
    struct progress progress;
    int rounds, round, cohort, threshold, answered, seen, visited;
    char stage[16];
    char note[200]; /* who does not take part, and why */
    int64_t started_ms;
};

static int watch_event(void *ctx, json_t *event)
{
    struct watch *w = ctx;
    const char *name = json_string_value(json_object_get(event, "event"));
    const char *job = json_string_value(json_object_get(event, "job")), *stage;

    if (w->visited++ < w->seen || !name || !job || strcmp(job, w->job) != 0)
        return 0;
    if (strcmp(name, "job_begins") == 0)
        w->rounds = (int)json_integer_value(json_object_get(event, "rounds"));
    if (strcmp(name, "round_opened") == 0) {
        w->round = (int)json_integer_value(json_object_get(event, "round"));
        w->cohort = (int)json_integer_value(json_object_get(event, "cohort"));
        w->threshold = (int)json_integer_value(json_object_get(event, "threshold"));
        w->answered = 0;
        w->note[0] = 0;
        snprintf(w->stage, sizeof w->stage, "train");
    }
    if (strcmp(name, "stage_done") == 0) {
        stage = json_string_value(json_object_get(event, "stage"));
        w->answered = (int)json_integer_value(json_object_get(event, "answered"));
        snprintf(w->stage, sizeof w->stage, "%s ok", stage ? stage : "");
    }
    if (strcmp(name, "site_declined") == 0) {
        const char *site = json_string_value(json_object_get(event, "site"));
        const char *reason = json_string_value(json_object_get(event, "reason"));
        snprintf(w->note, sizeof w->note, " | %.63s: %.120s", site ? site : "", reason ? reason : "does not take part");
    }
    if (strcmp(name, "version_signed") == 0)
        snprintf(w->stage, sizeof w->stage, "signed");
    if (strcmp(name, "round_skipped") == 0)
        snprintf(w->stage, sizeof w->stage, "skipped");
    return 0;
}

static void show(struct watch *w)
{
    int64_t seconds = (clock_monotonic_ms(&clock_system) - w->started_ms) / 1000;

    if (w->round > 0)
        progress_update(&w->progress, (uint64_t)w->round * 16 + strlen(w->stage),
                        "round %d/%d | %s | up %d/%d (need %d) | %02d:%02d%s", w->round, w->rounds, w->stage,
                        w->answered, w->cohort, w->threshold, (int)(seconds / 60), (int)(seconds % 60), w->note);
}

int command_job_watch(struct cli *cli, struct error *err)
{
    struct watch w = {.job = cli->args[0], .started_ms = clock_monotonic_ms(&clock_system)};
    char path[AGGREGATOR_PATH_SIZE];
    struct config *config = NULL;
    struct book_job job = {0};
    struct book *book = NULL;
    int rc = with_book(cli, &config, &book, err);

    progress_init(&w.progress, &clock_system, 5000);
    if (rc == 0)
        aggregator_path(config, "journal.jsonl", path);
    while (rc == 0 && (rc = book_job(book, w.job, &job, err)) == 0) {
        struct error ignored;
        w.visited = 0;
        if (journal_read(path, watch_event, &w, &ignored) == 0)
            w.seen = w.visited;
        show(&w);
        if (job.state != JOB_WAITING && job.state != JOB_RUNNING)
            break;
        clock_sleep_ms(&clock_system, WATCH_EVERY_MS);
    }
    progress_end(&w.progress);
    if (rc == 0 && job.state != JOB_DONE)
        rc = error_set(err, ERR_FAILED, "job %s %s: %s", job.job, job_state_name(job.state), job.reason);
    if (rc == 0)
        cli_print_object(cli, json_pack("{s:s,s:s,s:i}", "job", job.job, "state", job_state_name(job.state), "version",
                                        (int)job.version));
    book_close(book);
    config_free(config);
    return rc;
}

static int list_version(void *ctx, const struct book_version *v)
{
    char adapter[2 * HASH_SIZE + 1], model[2 * HASH_SIZE + 1], when[CLOCK_RFC3339_SIZE];

    hex_encode(v->adapter_sha256, HASH_SIZE, adapter);
    hex_encode(v->model_hash, HASH_SIZE, model);
    clock_format_rfc3339(v->made_wall_ms, when);
    json_array_append_new(ctx, json_pack("{s:i,s:s,s:i,s:b,s:s,s:s}", "version", (int)v->round, "made", when,
                                         "survivors", (int)v->survivors, "cosigned", v->proven, "adapter_sha256",
                                         adapter, "model_hash", model));
    return 0;
}

int command_model_list(struct cli *cli, struct error *err)
{
    static const char *const columns[] = {"version", "made", "survivors:sites", "cosigned", "adapter_sha256"};
    struct config *config = NULL;
    struct book *book = NULL;
    json_t *rows = json_array();
    int rc = with_book(cli, &config, &book, err);

    if (rc == 0 && (rc = book_each_version(book, cli->args[0], list_version, rows, err)) == 0)
        cli_print_rows(cli, json_incref(rows), columns, ARRAY_LEN(columns));
    json_decref(rows);
    book_close(book);
    config_free(config);
    return rc;
}
