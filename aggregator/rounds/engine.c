#include "aggregator/rounds/engine.h"

#include "aggregator/settings.h"
#include "base/hex.h"

#define POLL_MS 100
#define BOOK_EVERY_MS 500
#define TELL_EVERY_MS 30000
#define ATTEMPT 1

static int64_t now_ms(const struct engine *e)
{
    return clock_monotonic_ms(e->clock);
}

static void enter(struct engine *e, enum engine_phase phase)
{
    e->phase = phase;
    e->phase_since_ms = now_ms(e);
    e->enough_since_ms = -1;
}

/* --- jobs ----------------------------------------------------------------------------------------------------- */

static void drop_uploads(struct engine *e)
{
    struct error err = {0};

    if (e->spool && e->job.job[0] && spool_remove_round(e->spool, e->job.job, e->round, ATTEMPT, &err) < 0)
        log_warn(&e->log, "%s", err.message);
}

static void leave_job(struct engine *e)
{
    drop_uploads(e);
    secagg_server_free(e->attempt);
    free(e->state);
    free(e->sum);
    free(e->cosign);
    buffer_release(&e->signed_plan);
    e->attempt = NULL;
    e->state = NULL;
    e->sum = NULL;
    e->cosign = NULL;
    e->job = (struct book_job){0};
    e->log.job = NULL;
    enter(e, PHASE_IDLE);
}

static void end_job(struct engine *e, enum job_state state, const char *reason)
{
    struct error err = {0};
    struct buffer payload;

    if (book_set_state(e->book, e->job.job, state, reason, &err) < 0)
        log_error(&e->log, "%s", err.message);
    log_info(&e->log, "job %s%s%s", job_state_name(state), reason[0] ? ": " : "", reason);
    journal_event(e->journal, "job_ended",
                  json_pack("{s:s,s:s,s:s,s:i}", "job", e->job.job, "state", job_state_name(state), "reason", reason,
                            "version", (int)e->job.version));
    buffer_init(&payload, 1024);
    buffer_u64(&payload, e->job.version);
    buffer_string(&payload, reason[0] ? reason : job_state_name(state));
    for (size_t i = 0; i < e->site_count; i++)
        engine_set_event(e, &e->sites[i], SESSION_DONE, buffer_span(&payload));
    buffer_release(&payload);
    leave_job(e);
}

/* The state of the newest version that a quorum vouched for; one that a restart or too few co-signatures left without
 * proof is taken back, since a site that missed it could not verify it and would stay away for good. */
static int load_state(struct engine *e, struct error *err)
{
    uint32_t newest = e->job.version;
    int rc = book_withdraw(e->book, &e->job, err);

    if (rc < 0 || (rc = book_state(e->book, e->job.job, e->job.version, e->state, e->job.words, err)) < 0)
        return rc;
    hash_bytes(span_of(e->state, (size_t)e->job.words * 2 * sizeof *e->state), e->state_sha256);
    if (e->job.version == newest)
        return 0;
    log_warn(&e->log, "version %u has no quorum of co-signatures and is withdrawn; version %u is the newest", newest,
             e->job.version);
    journal_event(e->journal, "version_withdrawn",
                  json_pack("{s:s,s:i,s:i}", "job", e->job.job, "version", (int)newest, "newest", (int)e->job.version));
    return 0;
}

static int load_job(struct engine *e, struct error *err)
{
    int rc;

    buffer_init(&e->signed_plan, PLAN_BYTES_MAX);
    if ((rc = book_plan(e->book, e->job.job, &e->signed_plan, err)) < 0 ||
        (rc = job_plan_open(&e->plan, buffer_span(&e->signed_plan), &e->registry->roster, err)) < 0)
        return rc;
    e->state = malloc((size_t)e->job.words * 2 * sizeof *e->state);
    e->sum = malloc((size_t)e->job.words * sizeof *e->sum);
    if (!e->state || !e->sum)
        return error_set(err, ERR_RESOURCES, "out of memory for %llu parameters", (unsigned long long)e->job.words);
    memset(e->sum_sha256, 0, HASH_SIZE);
    e->sum_words = 0;
    if ((rc = load_state(e, err)) < 0)
        return rc;
    return book_set_state(e->book, e->job.job, JOB_RUNNING, "", err);
}

static void look_for_job(struct engine *e)
{
    struct error err = {0};
    int rc;

    if (now_ms(e) - e->polled_ms < BOOK_EVERY_MS)
        return;
    e->polled_ms = now_ms(e);
    rc = book_next_job(e->book, &e->job, &err);
    if (rc == ERR_NOT_FOUND) {
        e->job = (struct book_job){0};
        return;
    }
    if (rc == 0) {
        e->log.job = e->job.job;
        rc = load_job(e, &err);
    }
    if (rc < 0) {
        log_error(&e->log, "%s", err.message);
        if (e->job.job[0])
            end_job(e, JOB_FAILED, err.message);
        return;
    }
    for (size_t i = 0; i < e->site_count; i++)
        e->sites[i].unwilling = false;
    log_info(&e->log, "job begins: %u of %u rounds done", e->job.rounds_opened, e->plan.rounds);
    journal_event(e->journal, "job_begins",
                  json_pack("{s:s,s:i,s:I}", "job", e->job.job, "rounds", (int)e->plan.rounds, "parameters",
                            (json_int_t)e->job.words));
    enter(e, PHASE_GATHER);
}

/* An operator's `job abort` is a state in the book. */
static bool was_aborted(struct engine *e)
{
    struct book_job row;
    struct error err;

    if (now_ms(e) - e->polled_ms < BOOK_EVERY_MS)
        return false;
    e->polled_ms = now_ms(e);
    return book_job(e->book, e->job.job, &row, &err) == 0 && row.state == JOB_ABORTED;
}

/* --- rounds --------------------------------------------------------------------------------------------------- */

static void finish_round(struct engine *e)
{
    secagg_server_free(e->attempt);
    e->attempt = NULL;
    free(e->cosign);
    e->cosign = NULL;
    drop_uploads(e);
    e->log.round = 0;
    enter(e, PHASE_GATHER);
}

static void abort_round(struct engine *e, const char *reason)
{
    log_warn(&e->log, "round %u is skipped: %s", e->round, reason);
    journal_event(e->journal, "round_skipped",
                  json_pack("{s:s,s:i,s:s}", "job", e->job.job, "round", (int)e->round, "reason", reason));
    for (size_t i = 0; i < e->site_count; i++)
        engine_set_event(e, &e->sites[i], SESSION_ABORT, span_str(reason));
    finish_round(e);
}

static void model_hash(const struct engine *e, const float *state, uint8_t out[HASH_SIZE])
{
    uint8_t frozen[HASH_SIZE];
    struct model_basis basis;

    session_frozen_hash(span_of(e->plan.lora, e->plan.lora_len), frozen);
    basis = job_plan_basis(&e->plan, frozen);
    model_state_hash(&basis, (struct model_state){state, state + e->job.words, (size_t)e->job.words}, out);
}

static size_t connected_sites(const struct engine *e, const char **ret_ids)
{
    size_t n = 0;

    for (size_t i = 0; i < e->site_count && n < SECAGG_SITES_MAX; i++)
        if (engine_connected(e, &e->sites[i]) && !e->sites[i].unwilling)
            ret_ids[n++] = e->sites[i].id;
    return n;
}

/* Names the sites and opens the round: the number is on disk before M0 leaves. */
static int open_round(struct engine *e, const char *const *ids, size_t n, struct error *err)
{
    uint8_t hash[HASH_SIZE];
    struct secagg_server_config config = {.roster = &e->registry->roster,
                                          .identity = identity_sign_key(e->registry->server_key),
                                          .signed_plan = buffer_span(&e->signed_plan),
                                          .attempt = ATTEMPT,
                                          .invited = ids,
                                          .invited_len = (uint32_t)n,
                                          .model_hash = hash,
                                          .words = e->job.words,
                                          .chunk_bytes = (uint32_t)config_bytes(e->config, "limits.chunk") & ~3u,
                                          .rng = e->rng,
                                          .now_s = clock_wall_ms(e->clock) / 1000};
    struct buffer payload;
    int rc;

    model_hash(e, e->state, hash);
    if ((rc = book_open_round(e->book, e->job.job, &e->round, err)) < 0)
        return rc;
    e->job.rounds_opened = config.round = e->round;
    e->log.round = e->round;
    if ((rc = secagg_server_new(&e->attempt, &config, err)) < 0)
        return rc;
    e->stage = STAGE_ADVERTISE;
    buffer_init(&payload, 1 << 20);
    for (size_t i = 0; i < e->site_count; i++) {
        struct engine_site *site = &e->sites[i];
        struct span m0 = secagg_server_broadcast(e->attempt, site->id);
        site->declined = false;
        site->before = rpc_server_site_counters(e->server, site->id);
        if (m0.len == 0)
            continue;
        buffer_clear(&payload);
        buffer_bytes(&payload, m0);
        buffer_u64(&payload, e->job.version);
        engine_set_event(e, site, SESSION_OPEN, buffer_span(&payload));
    }
    buffer_release(&payload);
    journal_event(e->journal, "round_opened",
                  json_pack("{s:s,s:i,s:i,s:i}", "job", e->job.job, "round", (int)e->round, "cohort", (int)n,
                            "threshold", (int)secagg_server_quorum(e->attempt)->t));
    log_info(&e->log, "round %u of %u opened with %zu sites, %u must stay", e->round, e->plan.rounds, n,
             secagg_server_quorum(e->attempt)->floor);
    enter(e, PHASE_ATTEMPT);
    return 0;
}

static size_t unwilling_sites(const struct engine *e)
{
    size_t n = 0;

    for (size_t i = 0; i < e->site_count; i++)
        n += e->sites[i].unwilling;
    return n;
}

static void gather(struct engine *e)
{
    const char *ids[SECAGG_SITES_MAX];
    size_t n = connected_sites(e, ids), missing = e->site_count - n - unwilling_sites(e);
    struct error err = {0};

    if (e->job.rounds_opened >= e->plan.rounds) {
        end_job(e, e->job.version > 0 ? JOB_DONE : JOB_FAILED, e->job.version > 0 ? "" : "no round gave a new version");
        return;
    }
    if (n < e->plan.min_sites) {
        e->enough_since_ms = -1;
        if (now_ms(e) - e->told_ms >= TELL_EVERY_MS) {
            log_info(&e->log, "waiting for sites: %zu of the %u that a round needs are connected and willing", n,
                     e->plan.min_sites);
            e->told_ms = now_ms(e);
        }
        return;
    }
    if (e->enough_since_ms < 0)
        e->enough_since_ms = now_ms(e);
    if (missing > 0 && now_ms(e) - e->enough_since_ms < config_duration_ms(e->config, "round.gather"))
        return;
    if (open_round(e, ids, n, &err) < 0) {
        if (e->attempt)
            abort_round(e, err.message);
        else
            end_job(e, JOB_FAILED, err.message);
    }
}

/* The event that carries a stage's broadcast. */
static enum session_event_kind event_of(enum secagg_stage stage)
{
    switch (stage) {
    case STAGE_SHARES:
        return SESSION_KEYS;
    case STAGE_MASKED:
        return SESSION_DELIVER;
    case STAGE_CONSISTENCY:
        return SESSION_SURVIVORS;
    default:
        return SESSION_QUORUM;
    }
}

static const char *stage_name(enum secagg_stage stage)
{
    switch (stage) {
    case STAGE_ADVERTISE:
        return "train";
    case STAGE_SHARES:
        return "shares";
    case STAGE_MASKED:
        return "masked";
    case STAGE_CONSISTENCY:
        return "consistency";
    case STAGE_UNMASK:
        return "unmask";
    default:
        return "result";
    }
}

static int publish_version(struct engine *e, float *next, struct error *err)
{
    struct book_version version = {
        .round = e->round, .survivors = secagg_server_survivors(e->attempt), .made_wall_ms = clock_wall_ms(e->clock)};
    size_t words = (size_t)e->job.words;
    char adapter[2 * HASH_SIZE + 1], model[2 * HASH_SIZE + 1];
    struct buffer payload;
    struct span m10;
    int rc;

    model_hash(e, next, version.model_hash);
    hash_bytes(span_of(next, words * sizeof *next), version.adapter_sha256);
    hash_bytes(span_of(next, words * 2 * sizeof *next), version.state_sha256);
    e->cosign = calloc(1, sizeof *e->cosign);
    if (!e->cosign)
        return error_set(err, ERR_RESOURCES, "out of memory");
    e->cosign->roster = &e->registry->roster;
    e->cosign->now_s = clock_wall_ms(e->clock) / 1000;
    if ((rc = secagg_server_result(e->attempt, version.model_hash, &m10, &e->cosign->statement, err)) < 0 ||
        (rc = book_add_version(e->book, e->job.job, &version, next, e->job.words, err)) < 0)
        return rc;
    memcpy(e->state, next, words * 2 * sizeof *next);
    memcpy(e->state_sha256, version.state_sha256, HASH_SIZE);
    e->job.version = e->round;
    e->sum_words = (size_t)secagg_server_segment(e->attempt).count;
    memcpy(e->sum, secagg_server_sum(e->attempt), e->sum_words * sizeof *e->sum);
    hash_bytes(span_of(e->sum, e->sum_words * sizeof *e->sum), e->sum_sha256);
    hex_encode(version.adapter_sha256, HASH_SIZE, adapter);
    hex_encode(version.model_hash, HASH_SIZE, model);
    journal_event(e->journal, "version_signed",
                  json_pack("{s:s,s:i,s:s,s:s,s:i,s:i}", "job", e->job.job, "version", (int)e->round, "adapter_sha256",
                            adapter, "model_hash", model, "survivors", (int)version.survivors, "dropouts_recovered",
                            (int)e->dropouts));
    buffer_init(&payload, m10.len + 1024);
    buffer_bytes(&payload, m10);
    buffer_append(&payload, e->sum_sha256, HASH_SIZE);
    for (size_t i = 0; i < e->site_count; i++)
        if (secagg_server_is_survivor(e->attempt, e->sites[i].id))
            engine_set_event(e, &e->sites[i], SESSION_RESULT, buffer_span(&payload));
    buffer_release(&payload);
    enter(e, PHASE_COSIGN);
    return 0;
}

static int make_version(struct engine *e, struct error *err)
{
    size_t words = (size_t)e->job.words;
    float *next = malloc(words * 2 * sizeof *next);
    int rc;

    if (!next)
        return error_set(err, ERR_RESOURCES, "out of memory for the next version");
    rc = next_model_from_sum(&e->plan.aggregation.optimizer, (struct model_state){e->state, e->state + words, words},
                             secagg_server_segment(e->attempt), secagg_server_sum(e->attempt),
                             secagg_server_survivors(e->attempt), e->plan.aggregation.grid_bits, next, next + words,
                             err);
    if (rc == 0)
        rc = publish_version(e, next, err);
    free(next);
    return rc;
}

static void next_stage(struct engine *e)
{
    struct error err = {0};
    enum secagg_stage closed = secagg_server_stage(e->attempt);
    double seconds = (double)(now_ms(e) - e->phase_since_ms) / 1000;
    uint32_t answered = secagg_server_answered(e->attempt);

    if (closed == STAGE_UNMASK)
        e->dropouts = secagg_server_dropouts_recovered(e->attempt) + secagg_server_survivors(e->attempt) - answered;
    if (secagg_server_close_stage(e->attempt, &err) < 0) {
        abort_round(e, err.message);
        return;
    }
    journal_event(e->journal, "stage_done",
                  json_pack("{s:s,s:i,s:s,s:i,s:f}", "job", e->job.job, "round", (int)e->round, "stage",
                            stage_name(closed), "answered", (int)answered, "seconds", seconds));
    e->stage = secagg_server_stage(e->attempt);
    if (e->stage == STAGE_RESULT) {
        if (make_version(e, &err) < 0)
            abort_round(e, err.message);
        return;
    }
    for (size_t i = 0; i < e->site_count; i++) {
        struct span broadcast = secagg_server_broadcast(e->attempt, e->sites[i].id);
        if (broadcast.len > 0)
            engine_set_event(e, &e->sites[i], event_of(e->stage), broadcast);
    }
    enter(e, PHASE_ATTEMPT);
}

/* Is any site still missing that can be expected to answer? */
static bool worth_waiting(const struct engine *e)
{
    for (size_t i = 0; i < e->site_count; i++)
        if (secagg_server_waits_for(e->attempt, e->sites[i].id) && !e->sites[i].declined &&
            engine_connected(e, &e->sites[i]))
            return true;
    return false;
}

static void collect(struct engine *e)
{
    bool training = e->stage == STAGE_ADVERTISE;
    int64_t deadline_ms = (int64_t)(training ? e->plan.train_deadline_s : e->plan.stage_deadline_s) * 1000;
    int64_t waited = now_ms(e) - e->phase_since_ms;
    bool enough = secagg_server_answered(e->attempt) >= secagg_server_needed(e->attempt);
    char reason[160];

    if (secagg_server_complete(e->attempt)) {
        next_stage(e);
        return;
    }
    if (enough && e->enough_since_ms < 0)
        e->enough_since_ms = now_ms(e);
    if (enough && (!worth_waiting(e) || waited >= deadline_ms ||
                   (!training && now_ms(e) - e->enough_since_ms >= config_duration_ms(e->config, "round.grace")))) {
        next_stage(e);
        return;
    }
    if (!enough && (waited >= deadline_ms || !worth_waiting(e))) {
        snprintf(reason, sizeof reason, "%u sites answered in stage %s, %u are needed",
                 secagg_server_answered(e->attempt), stage_name(e->stage), secagg_server_needed(e->attempt));
        abort_round(e, reason);
    }
}

static void journal_round(struct engine *e)
{
    for (size_t i = 0; i < e->site_count; i++) {
        struct rpc_counters now = rpc_server_site_counters(e->server, e->sites[i].id);
        journal_event(e->journal, "site_bytes",
                      json_pack("{s:s,s:i,s:s,s:b,s:I,s:I}", "job", e->job.job, "round", (int)e->round, "site",
                                e->sites[i].id, "survivor", secagg_server_is_survivor(e->attempt, e->sites[i].id),
                                "bytes_up", (json_int_t)(now.bytes_received - e->sites[i].before.bytes_received),
                                "bytes_down", (json_int_t)(now.bytes_sent - e->sites[i].before.bytes_sent)));
    }
    journal_event(e->journal, "round_done",
                  json_pack("{s:s,s:i,s:i,s:i}", "job", e->job.job, "round", (int)e->round, "survivors",
                            (int)secagg_server_survivors(e->attempt), "cosigned", (int)e->cosign->count));
    log_info(&e->log, "round %u of %u done: version %u from %u sites, co-signed by %u", e->round, e->plan.rounds,
             e->round, secagg_server_survivors(e->attempt), e->cosign->count);
}

static void collect_cosigns(struct engine *e)
{
    uint32_t survivors = secagg_server_survivors(e->attempt);
    struct error err = {0};
    struct buffer proof;
    int rc;

    if (e->cosign->count < survivors &&
        now_ms(e) - e->phase_since_ms < (cosign_enough(e->cosign) ? config_duration_ms(e->config, "round.grace")
                                                                  : (int64_t)e->plan.stage_deadline_s * 1000))
        return;
    buffer_init(&proof, COSIGN_PROOF_MAX);
    if ((rc = cosign_proof(e->cosign, &proof, &err)) == 0)
        rc = book_set_proof(e->book, e->job.job, e->round, buffer_span(&proof), &err);
    if (rc < 0)
        log_warn(&e->log, "version %u: %s", e->round, err.message);
    buffer_release(&proof);
    journal_round(e);
    finish_round(e);
    if (rc < 0 && (rc = load_state(e, &err)) < 0)
        end_job(e, JOB_FAILED, err.message);
}

static void tick(struct engine *e)
{
    if (e->phase != PHASE_IDLE && was_aborted(e)) {
        if (e->phase == PHASE_ATTEMPT)
            abort_round(e, "the job was aborted");
        end_job(e, JOB_ABORTED, "by the operator");
        return;
    }
    switch (e->phase) {
    case PHASE_IDLE:
        look_for_job(e);
        break;
    case PHASE_GATHER:
        gather(e);
        break;
    case PHASE_ATTEMPT:
        collect(e);
        break;
    case PHASE_COSIGN:
        collect_cosigns(e);
        break;
    }
}

/* --- start and stop ------------------------------------------------------------------------------------------- */

/* Only the round's own vectors, of the right size, while they are wanted. */
static int allow_upload(void *ctx, const char *site, const struct transfer_begin *begin, struct error *err)
{
    struct engine *e = ctx;
    uint64_t vector_bytes;

    if (e->phase != PHASE_ATTEMPT || !e->attempt || secagg_server_stage(e->attempt) != STAGE_MASKED ||
        strcmp(begin->id.job, e->job.job) != 0 || begin->id.round != e->round || begin->id.attempt != ATTEMPT ||
        strcmp(begin->id.name, "masked") != 0 || !secagg_server_waits_for(e->attempt, site))
        return error_set(err, ERR_AGAIN, "no upload is wanted from this site now");
    vector_bytes = secagg_server_segment(e->attempt).count * sizeof *e->sum;
    if (begin->size_bytes != vector_bytes)
        return error_set(err, ERR_INTEGRITY, "the masked vector has %llu bytes, expected %llu",
                         (unsigned long long)begin->size_bytes, (unsigned long long)vector_bytes);
    return 0;
}

static int list_sites(struct engine *e, struct error *err)
{
    const struct roster *roster = &e->registry->roster;

    e->sites = calloc(roster->sites_len ? roster->sites_len : 1, sizeof *e->sites);
    if (!e->sites)
        return error_set(err, ERR_RESOURCES, "out of memory");
    for (uint32_t i = 0; i < roster->sites_len; i++) {
        struct engine_site *site = &e->sites[e->site_count];
        if (roster->sites[i].role != SITE_TRAINER)
            continue;
        snprintf(site->id, sizeof site->id, "%s", roster->sites[i].id);
        site->seen_ms = -1;
        site->cursor = (struct session_cursor){e->epoch, e->sequence};
        buffer_init(&site->payload, (size_t)32 << 20);
        e->site_count++;
    }
    return 0;
}

static int start(struct engine *e, struct error *err)
{
    char certificate[AGGREGATOR_PATH_SIZE], key[AGGREGATOR_PATH_SIZE], ca[AGGREGATOR_PATH_SIZE],
        spool[AGGREGATOR_PATH_SIZE];
    struct spool_config spool_config = {.folder = spool,
                                        .quota_bytes = (uint64_t)config_bytes(e->config, "limits.spool"),
                                        .chunk_bytes_max = (uint32_t)config_bytes(e->config, "limits.chunk"),
                                        .allow = allow_upload,
                                        .ctx = e};
    struct rpc_server_config server_config = {
        .url = config_string(e->config, "listen.url"), .clock = e->clock, .handle = engine_handle, .handle_ctx = e};
    int rc;

    aggregator_path(e->config, "server.crt", certificate);
    aggregator_path(e->config, "server.key", key);
    aggregator_path(e->config, "ca.crt", ca);
    aggregator_path(e->config, "spool", spool);
    server_config.tls = (struct tls_config){.certificate_file = certificate,
                                            .key_file = key,
                                            .ca_file = ca,
                                            .federation = config_string(e->config, "federation"),
                                            .clock = e->clock};
    e->epoch = rng_u64(e->rng);
    e->sequence = 1;
    if ((rc = list_sites(e, err)) < 0 || (rc = spool_open(&e->spool, &spool_config, err)) < 0 ||
        (rc = spool_clear(e->spool, err)) < 0) /* an attempt does not survive a restart: nobody can use its uploads */
        return rc;
    return rpc_server_new(&e->server, &server_config, err);
}

int engine_run(struct engine *e, struct error *err)
{
    int rc = start(e, err);

    if (rc == 0) {
        log_info(&e->log, "listening on %s, roster serial %llu with %zu sites", config_string(e->config, "listen.url"),
                 (unsigned long long)e->registry->roster.serial, e->site_count);
        journal_event(e->journal, "started", json_pack("{s:i}", "sites", (int)e->site_count));
    }
    while (rc == 0 && !*e->stop) {
        if ((rc = rpc_server_poll(e->server, POLL_MS, err)) == 0)
            tick(e);
    }
    leave_job(e);
    rpc_server_free(e->server);
    spool_close(e->spool);
    for (size_t i = 0; i < e->site_count; i++)
        buffer_release(&e->sites[i].payload);
    free(e->sites);
    return rc;
}
