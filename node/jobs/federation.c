#include "node/jobs/federation.h"

#include "node/settings.h"

#define CALL_TIMEOUT_MS 20000
#define EVENT_BYTES_MAX ((size_t)40 << 20)

static bool stopping(const struct federation *f)
{
    return *f->stop != 0;
}

static bool cancelled(void *ctx)
{
    return stopping(ctx);
}

static int open_client(struct federation *f, struct error *err)
{
    char certificate[NODE_PATH_SIZE], key[NODE_PATH_SIZE], ca[NODE_PATH_SIZE];
    struct rpc_client_config config = {.url = config_string(f->config, "aggregator.url"),
                                       .clock = f->clock,
                                       .rng = f->rng,
                                       .cancelled = cancelled,
                                       .cancelled_ctx = f};

    node_path(f->config, "site.crt", certificate);
    node_path(f->config, "site.key", key);
    node_path(f->config, "ca.crt", ca);
    config.tls = (struct tls_config){.certificate_file = certificate,
                                     .key_file = key,
                                     .ca_file = ca,
                                     .federation = config_string(f->config, "aggregator.federation"),
                                     .clock = f->clock};
    return rpc_client_new(&f->rpc, &config, err);
}

/* Sleeps in short pieces, so that a signal ends it. */
static void rest(struct federation *f, int64_t ms)
{
    while (ms > 0 && !stopping(f)) {
        int64_t piece = ms < 200 ? ms : 200;
        clock_sleep_ms(f->clock, piece);
        ms -= piece;
    }
}

static int refused(uint16_t status, const struct buffer *reply, struct error *err)
{
    int code = status == SESSION_LATE ? ERR_AGAIN : status == SESSION_NOT_FOUND ? ERR_NOT_FOUND : ERR_FAILED;

    return error_set(err, code, "the aggregator answered: %.*s", reply->len < 500 ? (int)reply->len : 500,
                     reply->len ? (const char *)reply->data : "");
}

int federation_call(struct federation *f, uint16_t method, struct span request, struct buffer *reply,
                    int64_t deadline_ms, struct error *err)
{
    int64_t until = clock_monotonic_ms(f->clock) + deadline_ms;

    for (unsigned attempt = 1;; attempt++) {
        uint16_t status = 0;
        int rc = rpc_call(f->rpc, method, request, reply, &status, CALL_TIMEOUT_MS, err);
        if (rc == 0)
            return status <= SESSION_LATE ? status == SESSION_OK ? 0 : refused(status, reply, err)
                                          : rpc_status_error(status, buffer_span(reply), err);
        if ((rc != ERR_CONNECT && rc != ERR_TIMEOUT) || stopping(f) || clock_monotonic_ms(f->clock) >= until)
            return rc;
        rest(f, rpc_backoff_ms(f->rng, attempt, 200, 5000));
    }
}

int federation_send(struct federation *f, enum session_stage stage, const struct session_event *event,
                    struct span payload, struct error *err)
{
    struct session_message message = {
        .stage = stage, .round = event->round, .attempt = event->attempt, .payload = payload};
    struct buffer request, reply;
    int rc;

    memcpy(message.job, event->job, sizeof message.job);
    buffer_init(&request, payload.len + 1024);
    buffer_init(&reply, 4096);
    session_message_encode(&message, &request);
    rc = buffer_ok(&request) ? federation_call(f, SESSION_SEND, buffer_span(&request), &reply,
                                               (int64_t)f->job.plan.stage_deadline_s * 1000, err)
                             : error_set(err, ERR_RESOURCES, "out of memory for a message");
    buffer_release(&request);
    buffer_release(&reply);
    return rc;
}

/* An attempt was begun among the sites of one roster, and points to its entries. */
static void drop_attempt(void *ctx)
{
    round_drop(ctx, "the federation's roster changed");
}

/* HELLO: versions, and the aggregator's roster if it is newer. */
static int greet(struct federation *f, struct error *err)
{
    struct buffer request, reply;
    struct reader r;
    struct span roster;
    uint32_t version;
    bool changed;
    int rc;

    buffer_init(&request, 16);
    buffer_init(&reply, ROSTER_BYTES_MAX + 64);
    buffer_u32(&request, SESSION_VERSION);
    if ((rc = rpc_call_ok(f->rpc, SESSION_HELLO, buffer_span(&request), &reply, CALL_TIMEOUT_MS, err)) < 0)
        goto out;
    r = reader_of(buffer_span(&reply));
    version = reader_u32(&r);
    roster = reader_bytes(&r, ROSTER_BYTES_MAX);
    if (!reader_done(&r) || version != SESSION_VERSION) {
        rc = error_set(err, ERR_INTEGRITY, "the aggregator speaks version %u of the session, this node %d", version,
                       SESSION_VERSION);
        goto out;
    }
    if ((rc = vault_take_roster(f->vault, roster, drop_attempt, f, &changed, err)) == 0 && changed)
        log_info(&f->log, "roster serial %llu taken over", (unsigned long long)f->vault->roster.serial);
out:
    buffer_release(&request);
    buffer_release(&reply);
    return rc;
}

static int next_event(struct federation *f, struct buffer *reply, struct session_event *ret_event, struct error *err)
{
    struct buffer request;
    uint16_t status = 0;
    int rc;

    buffer_init(&request, 16);
    buffer_u64(&request, f->cursor.epoch);
    buffer_u64(&request, f->cursor.sequence);
    rc = rpc_call(f->rpc, SESSION_NEXT, buffer_span(&request), reply, &status, RPC_HOLD_MS_MAX + 10000, err);
    buffer_release(&request);
    if (rc < 0)
        return rc;
    if (status == RPC_STATUS_NOTHING_YET) {
        *ret_event = (struct session_event){.cursor = f->cursor, .kind = SESSION_IDLE};
        return 0;
    }
    if ((rc = rpc_status_error(status, buffer_span(reply), err)) < 0)
        return rc;
    return session_event_decode(buffer_span(reply), ret_event, err);
}

static void handle(struct federation *f, const struct session_event *event)
{
    struct error err = {0};
    int rc;

    f->cursor = event->cursor;
    if (event->kind == SESSION_IDLE) {
        round_reconsider(f);
        return;
    }
    f->log.job = event->job;
    f->log.round = (uint32_t)event->round;
    rc = round_on_event(f, event, &err);
    if (rc < 0 && !stopping(f)) {
        log_warn(&f->log, "%s", err.message);
        journal_event(f->journal, "round_left",
                      json_pack("{s:s,s:I,s:i,s:s}", "job", event->job, "round", (json_int_t)event->round, "code",
                                error_exit_code(rc), "reason", err.message));
        round_drop(f, err.message);
    }
    f->log.job = NULL;
    f->log.round = 0;
}

static void loop(struct federation *f)
{
    struct error err = {0};
    struct buffer reply;
    unsigned failures = 0;
    bool greeted = false;

    buffer_init(&reply, EVENT_BYTES_MAX);
    while (!stopping(f)) {
        struct session_event event = {0};
        int rc = greeted ? 0 : greet(f, &err);
        if (rc == 0 && !greeted) {
            greeted = true;
            log_info(&f->log, "connected to %s", config_string(f->config, "aggregator.url"));
            journal_event(f->journal, "connected", NULL);
        }
        if (rc == 0)
            rc = next_event(f, &reply, &event, &err);
        if (rc < 0 && !stopping(f)) {
            if (failures++ % 8 == 0)
                log_warn(&f->log, "%s; trying again", err.message);
            greeted = false;
            rest(f, rpc_backoff_ms(f->rng, failures, 200, 5000));
            continue;
        }
        if (stopping(f))
            break;
        failures = 0;
        handle(f, &event);
    }
    buffer_release(&reply);
}

int federation_run(struct federation *f, struct error *err)
{
    int rc = open_client(f, err);

    if (rc < 0)
        return rc;
    adopt_at_start(f);
    loop(f);
    round_drop(f, "the daemon was stopped");
    job_runtime_release(&f->job);
    ledger_close(f->ledger);
    f->ledger = NULL;
    rpc_client_free(f->rpc);
    f->rpc = NULL;
    return 0;
}
