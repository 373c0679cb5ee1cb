#include "base/file.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "node/jobs/account.h"
#include "node/jobs/crash.h"
#include "node/jobs/federation.h"
#include "node/jobs/policy.h"
#include "node/settings.h"
#include "protocol/quantise.h"
#include "protocol/transport/transfer.h"

#define BEAT_EVERY_MS 4000

/* What a refusal is about; see reason_text. */
enum decline_reason {
    DECLINE_OPENING,
    DECLINE_POLICY,
    DECLINE_CONSENT,
    DECLINE_HOURS,
    DECLINE_BUDGET,
    DECLINE_DATA,
    DECLINE_MODEL,
    DECLINE_TRAINING,
    DECLINE_INTERNAL
};
#define M10_BYTES_MAX ((size_t)16 << 20)

void job_runtime_release(struct job_runtime *job)
{
    trainer_free(job->trainer);
    dataset_free(job->data);
    lora_release(&job->lora);
    version_release(&job->version);
    *job = (struct job_runtime){0};
}

void round_drop(struct federation *f, const char *reason)
{
    struct attempt *a = &f->attempt;
    struct error err = {0};

    if (a->reservation && !a->released && ledger_burn(f->ledger, a->reservation, reason, &err) < 0)
        log_error(&f->log, "privacy ledger: %s", err.message);
    secagg_client_free(a->client);
    if (a->ring) {
        explicit_bzero(a->ring, a->ring_words * sizeof *a->ring);
        free(a->ring);
    }
    *a = (struct attempt){0};
}

/* --- before training: may this site take part, and what would it cost? -------------------------------------------- */

static int check_consent(const struct federation *f, const struct job_plan *plan, enum consent consent,
                         struct error *err)
{
    if (consent == CONSENT_DENIED)
        return error_set(err, ERR_POLICY, "job %s was denied at this site", plan->job);
    if (consent == CONSENT_PENDING && strcmp(config_string(f->config, "policy.consent"), "ask") == 0)
        return error_set(err, ERR_POLICY,
                         "job %s waits for consent: `consilium-node consent show %s`, then approve or deny", plan->job,
                         plan->job);
    return 0;
}

static int make_trainer(struct federation *f, struct job_runtime *job, struct error *err)
{
    struct trainer_options options = {.threads = f->site->threads,
                                      .example_tokens_max = (int32_t)job->plan.train.max_len,
                                      .optimizer = job->local.optimizer,
                                      .decay = job->local.decay,
                                      .alternating = job->adapter.alternating,
                                      .plan = job->local.dp};
    int rc;

    do {
        options.backend = f->site->backend;
        options.tokens_max = site_batch_tokens(f->site);
        rc = trainer_new(&options, &f->site->model, &job->lora, job->data, &job->trainer, err);
    } while (rc < 0 && site_turn_to_cpu(f->site, "training", err));
    if (rc == 0)
        log_info(&f->log, "training on %s, %d tokens a micro-batch, checkpoint level %d", f->site->backend->name,
                 trainer_tokens_max(job->trainer), trainer_level(job->trainer));
    return rc;
}

static int load_version(struct federation *f, struct job_runtime *job, struct error *err)
{
    uint32_t round = 0;
    int rc = site_store_version(f->store, job->plan.job, &round, err);

    if (rc < 0)
        return rc;
    if (round > 0) {
        rc = version_load(&job->version, f->vault, job->plan.job, round, err);
        if (rc == 0)
            return 0;
        log_warn(&f->log, "%s; the version is fetched again", err ? err->message : "");
    }
    return version_first(&job->version, &job->plan, adapter_config_words(&job->adapter, &job->lora), err);
}

/* Everything of a job that lasts over its rounds. */
static int prepare_job(struct federation *f, const struct job_plan *plan, struct error *err)
{
    struct job_runtime job = {.plan = *plan};
    uint64_t declared = 0, vector;
    int rc;

    if (f->job.present && memcmp(f->job.plan.hash, plan->hash, HASH_SIZE) == 0)
        return 0;
    if (!f->site->backend->host_memory) /* a card may not have room for both jobs' weights */
        job_runtime_release(&f->job);
    if ((rc = adapter_config_parse(span_of(plan->lora, plan->lora_len), &job.adapter, err)) < 0)
        return rc;
    if ((rc = adapter_config_build(&job.adapter, &f->site->model.config, &job.lora, err)) < 0 ||
        (rc = adapter_config_check_plan(&job.adapter, &job.lora, plan->split_words, err)) < 0) {
        job_runtime_release(&job);
        return error_prefix(err, "job %s", plan->job);
    }
    /* One number for the whole job, since the ledger holds its plan to the letter: the longer factor's where they
     * alternate. It bounds the rounding loss of every round; clipping itself takes the round's own length, and neither
     * sensitivity nor noise depends on it. */
    vector = job_plan_vector_max(plan, adapter_config_words(&job.adapter, &job.lora));
    if ((rc = local_plan_make(&job.local, plan, 1, vector, err)) < 0 ||
        (rc = account_load(f->config, f->site, job.local.system_message, (int32_t)plan->train.max_len,
                           identity_sign_key(f->vault->key), &job.data, job.commitment, err)) < 0 ||
        (rc = account_declared(f->config, f->store, job.data, &declared, err)) < 0 ||
        (rc = local_plan_make(&job.local, plan, declared, vector, err)) < 0 || (rc = make_trainer(f, &job, err)) < 0 ||
        (rc = load_version(f, &job, err)) < 0) {
        job_runtime_release(&job);
        return rc;
    }
    job.present = true;
    job_runtime_release(&f->job);
    f->job = job;
    return 0;
}

static int open_ledger(struct federation *f, struct error *err)
{
    const struct dp_plan *expected = f->job.local.dp.mode == DP_NONE ? NULL : &f->job.local.dp;
    uint32_t burnt = 0;
    int rc;

    if (f->ledger)
        return 0;
    if ((rc = account_open(&f->ledger, f->config, f->store, expected, f->clock, err)) < 0)
        return rc;
    rc = ledger_burn_open(f->ledger, "the daemon was restarted", &burnt, err);
    if (rc == 0 && burnt > 0)
        log_warn(&f->log, "privacy ledger: %u unfinished reservations of before the restart count as spent", burnt);
    return rc;
}

static int reserve(struct federation *f, const struct secagg_info *info, struct error *err)
{
    struct ledger_request request = {.job = info->job,
                                     .plan = &f->job.local.dp,
                                     .first_step = (uint64_t)(info->round - 1) * info->plan.train.local_steps,
                                     .steps = info->plan.train.local_steps};
    int rc;

    if (f->job.local.dp.mode == DP_NONE)
        return 0;
    if ((rc = open_ledger(f, err)) < 0)
        return rc;
    memcpy(request.job_hash, info->plan.hash, HASH_SIZE);
    memcpy(request.dataset, f->job.commitment, HASH_SIZE);
    account_binary_hash(request.binary_hash);
    if ((rc = ledger_reserve(f->ledger, &request, &f->attempt.reservation, err)) < 0)
        return rc;
    crash_point("reserved", info->round);
    return 0;
}

/* --- M0 ------------------------------------------------------------------------------------------------------- */

/* A round whose sum this site would not help to open in the end is not begun. */
static int check_unmasked(struct federation *f, const struct secagg_info *info, struct error *err)
{
    bool unmasked = false;
    int rc;

    if (info->plan.dp.mode != PLAN_DP_NONE)
        return 0;
    if ((rc = site_store_unmasked(f->store, info->model_hash, info->job, info->round, &unmasked, err)) < 0)
        return rc;
    return unmasked ? error_set(err, ERR_INTEGRITY,
                                "job %s has no differential privacy, and a sum over updates of the model that round %u "
                                "starts from was opened before: this site waits for another model",
                                info->job, info->round)
                    : 0;
}

static int start_client(struct federation *f, const struct secagg_info *info, struct span m0, struct error *err)
{
    struct secagg_client_config config = {.site_id = config_string(f->config, "site"),
                                          .identity = identity_sign_key(f->vault->key),
                                          .roster = &f->vault->roster,
                                          .policy = policy_secagg(f->config),
                                          .plan_hash = f->job.plan.hash,
                                          .model_hash = f->job.version.model_hash,
                                          .words = adapter_config_words(&f->job.adapter, &f->job.lora),
                                          .log = site_store_log(f->store),
                                          .witness = site_store_witness(f->store),
                                          .rng = f->rng,
                                          .now_s = clock_wall_ms(f->clock) / 1000};
    int rc;

    if ((rc = check_unmasked(f, info, err)) < 0)
        return rc;
    return secagg_client_new(&f->attempt.client, &config, m0, err);
}

/* The peers remember the newest head that they saw: a job without DP shows it too, or they would take this site's
 * ledger for an older copy. */
static int show_ledger(struct federation *f, struct error *err)
{
    struct ledger_head head = {0};
    bool has = false;
    int rc = site_store_has_ledger(f->store, &has, err);

    if (rc < 0 || !has)
        return rc;
    if ((rc = open_ledger(f, err)) < 0 || (rc = ledger_head(f->ledger, &head, err)) < 0)
        return rc;
    secagg_client_set_ledger(f->attempt.client, head.sequence, head.hash);
    return 0;
}

static bool report_progress(void *ctx, uint32_t step, uint32_t steps, uint32_t done, uint32_t sampled)
{
    struct federation *f = ctx;
    int64_t now = clock_monotonic_ms(f->clock);
    struct buffer reply;
    uint16_t status;

    (void)done;
    (void)sampled; /* realised batch sizes stay here */
    if (now - f->beat_ms < BEAT_EVERY_MS)
        return *f->stop != 0;
    f->beat_ms = now;
    log_debug(&f->log, "training, step %u of %u", step + 1, steps);
    buffer_init(&reply, 4096);
    if (rpc_call(f->rpc, SESSION_BEAT, span_of(NULL, 0), &reply, &status, 2000, NULL) < 0)
        log_debug(&f->log, "the aggregator cannot be reached; training goes on");
    buffer_release(&reply);
    return *f->stop != 0;
}

/* Trains from the current version; the quantised difference goes to attempt.ring. */
static int train_and_quantise(struct federation *f, const struct secagg_info *info, struct error *err)
{
    struct trainer_progress progress = {report_progress, f};
    int64_t started = clock_monotonic_ms(f->clock);
    struct lora *lora = &f->job.lora;
    float *before;
    int rc;

    adapter_config_turn(&f->job.adapter, info->offset, lora);
    if (lora->trained_count != info->words)
        return error_set(err, ERR_BUG, "the round sends %llu values, %zu are trained", (unsigned long long)info->words,
                         lora->trained_count);
    if ((rc = adapter_config_apply(&f->job.adapter, f->job.version.params, f->job.version.words, lora, err)) < 0)
        return rc;
    before = malloc(lora->trained_count * sizeof *before);
    f->attempt.ring = malloc(lora->trained_count * sizeof *f->attempt.ring);
    f->attempt.ring_words = f->attempt.ring ? lora->trained_count : 0;
    if (!before || !f->attempt.ring) {
        free(before);
        return error_set(err, ERR_RESOURCES, "out of memory for the update");
    }
    memcpy(before, lora->trained, lora->trained_count * sizeof *before);
    if ((rc = trainer_round(f->job.trainer, lora, (uint64_t)(info->round - 1) * info->plan.train.local_steps, f->rng,
                            &progress, err)) == 0) {
        for (size_t i = 0; i < lora->trained_count; i++)
            lora->trained[i] -= before[i];
        rc = quantise_update(lora->trained, lora->trained_count, info->plan.aggregation.update_clip,
                             info->plan.aggregation.grid_bits, info->clamp, f->rng, f->attempt.ring, NULL, err);
    }
    explicit_bzero(lora->trained, lora->trained_count * sizeof *lora->trained);
    free(before);
    if (rc < 0)
        return rc;
    journal_event(f->journal, "trained",
                  json_pack("{s:s,s:i,s:f}", "job", info->job, "round", (int)info->round, "seconds",
                            (double)(clock_monotonic_ms(f->clock) - started) / 1000));
    return rc;
}

/* The job as a whole: the site's policy, its people, its hours. */
static int check_willing(struct federation *f, const struct job_plan *plan, enum consent consent,
                         enum decline_reason *ret_why, struct error *err)
{
    int rc;

    *ret_why = DECLINE_POLICY;
    if ((rc = policy_check_plan(f->config, plan, f->site->base_hash, err)) < 0)
        return rc;
    *ret_why = DECLINE_CONSENT;
    if ((rc = check_consent(f, plan, consent, err)) < 0)
        return rc;
    *ret_why = DECLINE_HOURS;
    return policy_check_hours(f->config, f->clock, err);
}

/* What is left of the job must fit what is left of the budget: better not begun than broken off. */
static int check_budget(struct federation *f, const struct secagg_info *info, struct error *err)
{
    uint64_t steps = info->plan.train.local_steps, first = (info->round - 1) * steps, next = 0;
    double epsilon;
    int rc;

    if (f->job.local.dp.mode == DP_NONE)
        return 0;
    if ((rc = open_ledger(f, err)) < 0 || (rc = ledger_next_step(f->ledger, info->job, &next, err)) < 0)
        return rc;
    next = next > first ? next : first;
    steps *= info->plan.rounds;
    return next < steps ? ledger_preview(f->ledger, &f->job.local.dp, steps - next, &epsilon, err) : 0;
}

/* The model that the round starts from: held, taken back to, or fetched. */
static int check_model(struct federation *f, const struct secagg_info *info, uint64_t version, struct error *err)
{
    int rc;

    if (memcmp(f->job.version.model_hash, info->model_hash, HASH_SIZE) == 0)
        return 0;
    if ((rc = adopt_withdrawal(f, info, version, err)) < 0 || version == 0)
        return rc;
    return adopt_missing(f, info, version, err);
}

/* Everything before training. A refusal of ERR_POLICY with *ret_job_wide is of the job, not of this round alone. The
 * budget is reserved last: a round that this site refuses costs nothing. */
static int begin_round(struct federation *f, const struct session_event *event, struct span m0, uint64_t version,
                       const struct secagg_info *info, enum decline_reason *ret_why, bool *ret_job_wide,
                       struct error *err)
{
    enum consent consent;
    int rc;

    *ret_job_wide = true;
    *ret_why = DECLINE_INTERNAL;
    /* Entered first, so that `consent show` can show even a job that this site refuses. */
    if ((rc = site_store_consent(f->store, info->job, info->plan.hash, m0, &consent, err)) < 0)
        return rc;
    if ((rc = check_willing(f, &info->plan, consent, ret_why, err)) < 0) {
        f->unwilling = *event; /* what may change while the daemon runs */
        f->unwilling.payload = span_of(NULL, 0);
        f->unwilling_plan = info->plan;
        return rc;
    }
    *ret_why = DECLINE_DATA;
    if ((rc = prepare_job(f, &info->plan, err)) < 0)
        return rc;
    *ret_why = DECLINE_BUDGET;
    if ((rc = check_budget(f, info, err)) < 0)
        return rc;
    *ret_job_wide = false;
    *ret_why = DECLINE_MODEL;
    if ((rc = check_model(f, info, version, err)) < 0)
        return rc;
    *ret_job_wide = true; /* its floors, mostly */
    *ret_why = DECLINE_POLICY;
    if ((rc = start_client(f, info, m0, err)) < 0)
        return rc;
    *ret_why = DECLINE_BUDGET;
    if ((rc = reserve(f, info, err)) < 0)
        return rc;
    *ret_why = DECLINE_INTERNAL;
    return show_ledger(f, err);
}

/* All that the aggregator hears: the whole message holds figures of this site (what it spent, how many records it has)
 * and stays in its own log and journal. */
static const char *reason_text(enum decline_reason why)
{
    switch (why) {
    case DECLINE_OPENING:
        return "the opening of the round is not acceptable";
    case DECLINE_POLICY:
        return "the site's policy";
    case DECLINE_CONSENT:
        return "no consent of the site";
    case DECLINE_HOURS:
        return "outside the site's hours";
    case DECLINE_BUDGET:
        return "the site's privacy budget";
    case DECLINE_DATA:
        return "the site's data or settings do not fit the job";
    case DECLINE_MODEL:
        return "the model that the round starts from was not accepted";
    case DECLINE_TRAINING:
        return "training failed at the site";
    default:
        return "an error at the site";
    }
}

static int decline(struct federation *f, const struct session_event *event, enum session_stage how,
                   enum decline_reason why, int code, struct error *err)
{
    struct error ignored = {0};

    journal_event(f->journal, "round_refused",
                  json_pack("{s:s,s:I,s:i,s:s}", "job", event->job, "round", (json_int_t)event->round, "code",
                            error_exit_code(code), "reason", err->message));
    log_warn(&f->log, "not taking part: %s", err->message);
    if (federation_send(f, how, event, span_str(reason_text(why)), &ignored) < 0)
        log_debug(&f->log, "the aggregator was not told: %s", ignored.message);
    round_drop(f, err->message);
    return 0;
}

void round_reconsider(struct federation *f)
{
    const struct job_plan *plan = &f->unwilling_plan;
    enum decline_reason why;
    enum consent consent;
    struct error err = {0};

    if (!f->unwilling.job[0] || site_store_decision(f->store, plan->job, plan->hash, &consent, &err) < 0 ||
        check_willing(f, plan, consent, &why, &err) < 0)
        return;
    log_info(&f->log, "job %s: nothing keeps this site from it any longer", f->unwilling.job);
    if (federation_send(f, SESSION_WILLING, &f->unwilling, span_of(NULL, 0), &err) == 0)
        f->unwilling.job[0] = 0;
}

static int on_open(struct federation *f, const struct session_event *event, struct error *err)
{
    struct reader r = reader_of(event->payload);
    struct span m0 = reader_bytes(&r, 1 << 20), m1;
    uint64_t version = reader_u64(&r);
    enum decline_reason why = DECLINE_OPENING;
    struct secagg_info *info;
    bool job_wide = false;
    int rc;

    round_drop(f, "another round was opened");
    f->unwilling.job[0] = 0;
    if (!reader_done(&r))
        return error_set(err, ERR_INTEGRITY, "malformed opening of a round");
    info = malloc(sizeof *info);
    if (!info)
        return error_set(err, ERR_RESOURCES, "out of memory");
    f->attempt.opened_ms = clock_monotonic_ms(f->clock);
    f->attempt.before = rpc_client_counters(f->rpc);
    if ((rc = secagg_peek(m0, &f->vault->roster, info, err)) == 0) /* info means nothing otherwise */
        rc = begin_round(f, event, m0, version, info, &why, &job_wide, err);
    if (rc < 0) {
        free(info);
        if (rc == ERR_CONNECT || rc == ERR_TIMEOUT)
            return rc;
        return decline(f, event, rc == ERR_POLICY && job_wide ? SESSION_UNWILLING : SESSION_DECLINE, why, rc, err);
    }
    journal_event(f->journal, "round_opened", json_pack("{s:s,s:i}", "job", info->job, "round", (int)info->round));
    log_info(&f->log, "training");
    rc = train_and_quantise(f, info, err);
    crash_point("trained", info->round);
    if (rc < 0 && !*f->stop) { /* or the others would wait for this site until the deadline */
        free(info);
        return decline(f, event, SESSION_DECLINE, DECLINE_TRAINING, rc, err);
    }
    if (rc == 0 && (rc = secagg_client_advertise(f->attempt.client, &m1, err)) == 0)
        rc = federation_send(f, SESSION_M1_ADVERTISE, event, m1, err);
    free(info);
    return rc;
}

/* --- M2 to M9 ------------------------------------------------------------------------------------------------- */

static int on_keys(struct federation *f, const struct session_event *event, struct error *err)
{
    struct span m3;
    int rc = secagg_client_on_keys(f->attempt.client, event->payload, &m3, err);

    if (rc == 0)
        rc = federation_send(f, SESSION_M3_SHARES, event, m3, err);
    crash_point("shares-sent", event->round);
    return rc;
}

static int release_reservation(struct federation *f, const uint8_t root[HASH_SIZE], struct error *err)
{
    int rc;

    if (!f->attempt.reservation || f->attempt.released)
        return 0;
    if ((rc = ledger_release(f->ledger, f->attempt.reservation, root, err)) == 0)
        f->attempt.released = true;
    return rc;
}

static void crash_in_upload(void *ctx, uint64_t done_bytes, uint64_t total_bytes)
{
    const struct session_event *event = ctx;

    if (done_bytes > 0 && done_bytes < total_bytes)
        crash_point("masked-sending", event->round);
}

static int on_deliver(struct federation *f, const struct session_event *event, struct error *err)
{
    const struct secagg_info *info = secagg_client_info(f->attempt.client);
    struct transfer_options options = {.chunk_bytes = info->chunk_bytes,
                                       .deadline_ms = (int64_t)info->plan.stage_deadline_s * 1000,
                                       .clock = f->clock,
                                       .rng = f->rng,
                                       .progress = crash_in_upload,
                                       .progress_ctx = (void *)(uintptr_t)event};
    struct transfer_id id = {.round = info->round, .attempt = info->attempt, .name = "masked"};
    struct rpc_channel channel = rpc_client_channel(f->rpc);
    uint8_t root[HASH_SIZE];
    struct span m5;
    int rc;

    snprintf(id.job, sizeof id.job, "%s", info->job);
    if ((rc = secagg_client_on_deliver(f->attempt.client, event->payload, err)) < 0 ||
        (rc = secagg_client_mask(f->attempt.client, f->attempt.ring, root, &m5, err)) < 0 ||
        (rc = release_reservation(f, root, err)) < 0 ||
        (rc = transfer_upload(&channel, &id, span_of(f->attempt.ring, (size_t)info->words * sizeof *f->attempt.ring),
                              &options, err)) < 0 ||
        (rc = federation_send(f, SESSION_M5_MASKED, event, m5, err)) < 0)
        return rc;
    f->attempt.masked = true;
    journal_event(f->journal, "masked_acknowledged",
                  json_pack("{s:s,s:i,s:I}", "job", info->job, "round", (int)info->round, "vector_bytes",
                            (json_int_t)(info->words * sizeof *f->attempt.ring)));
    crash_point("masked-acknowledged", info->round);
    return 0;
}

static int on_survivors(struct federation *f, const struct session_event *event, struct error *err)
{
    struct span m7;
    int rc = secagg_client_on_survivors(f->attempt.client, event->payload, &m7, err);

    if (rc < 0)
        return rc;
    crash_point("consistency-signed", event->round);
    return federation_send(f, SESSION_M7_CONSISTENCY, event, m7, err);
}

static int on_quorum(struct federation *f, const struct session_event *event, struct error *err)
{
    struct span m9;
    int rc = secagg_client_on_quorum(f->attempt.client, event->payload, &m9, err);

    if (rc == 0)
        rc = federation_send(f, SESSION_M9_UNMASK, event, m9, err);
    crash_point("unmask-sent", event->round);
    return rc;
}

/* --- M10 ------------------------------------------------------------------------------------------------------ */

static int recompute(struct federation *f, struct span m10, const uint32_t *sum, struct version *ret_version,
                     struct secagg_result_out *ret_out, struct error *err)
{
    const struct job_runtime *job = &f->job;
    size_t words = job->version.words;
    float *next = malloc(2 * words * sizeof *next);
    struct secagg_result_in in = {.sum = sum,
                                  .previous = {job->version.params, job->version.momentum, words},
                                  .next_params = next,
                                  .next_momentum = next ? next + words : NULL};
    int rc;

    if (!next)
        return error_set(err, ERR_RESOURCES, "out of memory for the next version");
    session_frozen_hash(span_of(job->plan.lora, job->plan.lora_len), in.frozen_hash);
    if ((rc = secagg_client_on_result(f->attempt.client, m10, &in, ret_out, err)) == 0)
        rc = version_from_state(ret_version, &job->plan, &ret_out->statement, next, words, err);
    free(next);
    return rc;
}

static void journal_round(struct federation *f, const struct secagg_info *info)
{
    struct rpc_counters now = rpc_client_counters(f->rpc);
    struct ledger_spent spent = {0};
    struct error ignored;

    if (f->ledger && ledger_spent(f->ledger, NULL, &spent, &ignored) < 0)
        spent.epsilon = -1;
    journal_event(f->journal, "round_done",
                  json_pack("{s:s,s:i,s:i,s:I,s:I,s:f,s:f,s:f}", "job", info->job, "round", (int)info->round,
                            "survivors", (int)info->survivors, "bytes_up",
                            (json_int_t)(now.bytes_sent - f->attempt.before.bytes_sent), "bytes_down",
                            (json_int_t)(now.bytes_received - f->attempt.before.bytes_received), "epsilon",
                            spent.epsilon, "delta", spent.delta, "seconds",
                            (double)(clock_monotonic_ms(f->clock) - f->attempt.opened_ms) / 1000));
}

static int on_result(struct federation *f, const struct session_event *event, struct error *err)
{
    const struct secagg_info *info = secagg_client_info(f->attempt.client);
    struct transfer_options options = {
        .deadline_ms = (int64_t)info->plan.stage_deadline_s * 1000, .clock = f->clock, .rng = f->rng};
    struct rpc_channel channel = rpc_client_channel(f->rpc);
    struct reader r = reader_of(event->payload);
    struct span m10 = reader_bytes(&r, M10_BYTES_MAX);
    struct secagg_result_out out;
    struct version version = {0};
    uint8_t sha256[HASH_SIZE];
    struct buffer sum;
    int rc;

    reader_copy(&r, sha256, sizeof sha256);
    buffer_init(&sum, (size_t)info->words * sizeof(uint32_t));
    if (!reader_done(&r))
        rc = error_set(err, ERR_INTEGRITY, "malformed result of a round");
    else
        rc = transfer_download(&channel, "sum", sha256, &sum, &options, err);
    if (rc == 0 && sum.len != (size_t)info->words * sizeof(uint32_t))
        rc = error_set(err, ERR_INTEGRITY, "the round's sum has %zu bytes, expected %zu", sum.len,
                       (size_t)info->words * sizeof(uint32_t));
    if (rc == 0 && (rc = recompute(f, m10, (const uint32_t *)(const void *)sum.data, &version, &out, err)) == 0 &&
        (rc = version_store(&version, f->vault, span_of(NULL, 0), err)) == 0) {
        crash_point("result", event->round);
        if ((rc = adopt_version(f, &version, err)) == 0)
            rc = federation_send(f, SESSION_COSIGN, event, span_of(out.signature, sizeof out.signature), err);
    }
    buffer_release(&sum);
    version_release(&version);
    if (rc == 0) {
        journal_round(f, info);
        round_drop(f, "done");
    }
    return rc;
}

/* The job's last version, if this site took part in the job but missed the end of it. */
static int catch_up(struct federation *f, const char *job, uint64_t version, struct error *err)
{
    struct secagg_info *info = malloc(sizeof *info);
    enum consent consent = CONSENT_PENDING;
    struct buffer opening;
    int rc;

    buffer_init(&opening, 1 << 20);
    if (!info)
        return error_set(err, ERR_RESOURCES, "out of memory");
    rc = site_store_plan(f->store, job, &opening, &consent, err);
    if (rc == ERR_NOT_FOUND) { /* the job was never offered here */
        rc = 0;
        goto out;
    }
    if (rc < 0 || (rc = secagg_peek(buffer_span(&opening), &f->vault->roster, info, err)) < 0)
        goto out;
    if (policy_check_plan(f->config, &info->plan, f->site->base_hash, err) == 0 &&
        check_consent(f, &info->plan, consent, err) == 0)
        rc = adopt_last(f, info, version, err); /* also back from one that found no quorum in the last round */
out:
    buffer_release(&opening);
    free(info);
    return rc;
}

static int on_done(struct federation *f, const struct session_event *event, struct error *err)
{
    struct reader r = reader_of(event->payload);
    uint64_t version = reader_u64(&r);

    f->unwilling.job[0] = 0;
    round_drop(f, "the job ended");
    journal_event(f->journal, "job_done", json_pack("{s:s}", "job", event->job));
    log_info(&f->log, "job done");
    return r.failed ? error_set(err, ERR_INTEGRITY, "malformed end of a job") : catch_up(f, event->job, version, err);
}

int round_on_event(struct federation *f, const struct session_event *event, struct error *err)
{
    const struct secagg_info *info = f->attempt.client ? secagg_client_info(f->attempt.client) : NULL;

    if (event->kind == SESSION_OPEN)
        return on_open(f, event, err);
    if (event->kind == SESSION_DONE)
        return on_done(f, event, err);
    if (!info || strcmp(info->job, event->job) != 0 || info->round != event->round || info->attempt != event->attempt)
        return 0; /* of an attempt that this process is not in: it joins the next one */
    switch (event->kind) {
    case SESSION_KEYS:
        return on_keys(f, event, err);
    case SESSION_DELIVER:
        return on_deliver(f, event, err);
    case SESSION_SURVIVORS:
        return on_survivors(f, event, err);
    case SESSION_QUORUM:
        return on_quorum(f, event, err);
    case SESSION_RESULT:
        return on_result(f, event, err);
    case SESSION_ABORT:
        return error_set(err, ERR_FAILED, "the round was ended: %.*s",
                         event->payload.len < 300 ? (int)event->payload.len : 300, (const char *)event->payload.ptr);
    default:
        return 0;
    }
}
