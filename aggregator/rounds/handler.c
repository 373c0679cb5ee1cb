#include "aggregator/rounds/engine.h"
#include "aggregator/settings.h"
#include "base/file.h"

static struct engine_site *find_site(struct engine *e, const char *id)
{
    for (size_t i = 0; i < e->site_count; i++)
        if (strcmp(e->sites[i].id, id) == 0)
            return &e->sites[i];
    return NULL;
}

bool engine_connected(const struct engine *e, const struct engine_site *site)
{
    if (site->seen_ms < 0)
        return false;
    /* A waiting NEXT is a sign of life for as long as it may be held. */
    return clock_monotonic_ms(e->clock) - site->seen_ms < config_duration_ms(e->config, "round.liveness");
}

static void encode_event(const struct engine_site *site, struct buffer *out)
{
    struct session_event event = {.cursor = site->cursor,
                                  .kind = site->kind,
                                  .round = site->round,
                                  .attempt = site->attempt,
                                  .payload = buffer_span(&site->payload)};

    snprintf(event.job, sizeof event.job, "%s", site->job[0] ? site->job : "-");
    session_event_encode(&event, out);
}

void engine_set_event(struct engine *e, struct engine_site *site, enum session_event_kind kind, struct span payload)
{
    struct buffer bytes;
    struct error err = {0};

    site->cursor = (struct session_cursor){e->epoch, ++e->sequence};
    site->kind = kind;
    snprintf(site->job, sizeof site->job, "%s", e->job.job);
    site->round = e->round;
    site->attempt = 1;
    buffer_clear(&site->payload);
    buffer_append(&site->payload, payload.ptr, payload.len);
    if (!site->held)
        return;
    buffer_init(&bytes, payload.len + 1024);
    encode_event(site, &bytes);
    if (buffer_ok(&bytes) && rpc_server_reply(e->server, site->held, SESSION_OK, buffer_span(&bytes), &err) < 0 &&
        err.code != ERR_NOT_FOUND)
        log_warn(&e->log, "%s: %s", site->id, err.message);
    site->held = 0;
    buffer_release(&bytes);
}

static int on_hello(struct engine *e, struct span body, struct rpc_reply *reply)
{
    struct reader r = reader_of(body);
    uint32_t version = reader_u32(&r);

    if (!reader_done(&r) || version != SESSION_VERSION)
        return error_set(&reply->error, ERR_INTEGRITY, "session version %u; this aggregator speaks %d", version,
                         SESSION_VERSION);
    buffer_u32(&reply->body, SESSION_VERSION);
    buffer_bytes(&reply->body, buffer_span(&e->registry->signed_roster));
    return 0;
}

static int on_next(struct engine_site *site, struct span body, struct rpc_reply *reply)
{
    struct reader r = reader_of(body);
    struct session_cursor cursor;

    cursor.epoch = reader_u64(&r);
    cursor.sequence = reader_u64(&r);
    if (!reader_done(&r))
        return error_set(&reply->error, ERR_INTEGRITY, "malformed request for the next event");
    if (cursor.epoch == site->cursor.epoch && cursor.sequence == site->cursor.sequence) {
        site->held = rpc_reply_hold(reply);
        return 0;
    }
    encode_event(site, &reply->body);
    return 0;
}

static void answer(struct rpc_reply *reply, uint16_t status, const char *text)
{
    reply->status = status;
    buffer_append(&reply->body, text, strlen(text));
}

/* A committed upload and its signed root: verified, then added to the one accumulator, then gone from the disk. */
static int take_vector(struct engine *e, struct engine_site *site, struct span m5, struct error *err)
{
    struct transfer_id id = {.round = e->round, .attempt = 1, .name = "masked"};
    struct span bytes;
    int rc;

    snprintf(id.job, sizeof id.job, "%s", e->job.job);
    if ((rc = spool_map(e->spool, site->id, &id, &bytes, err)) < 0)
        return rc;
    if ((rc = secagg_server_receive(e->attempt, site->id, m5, err)) == 0)
        rc = secagg_server_add_vector(e->attempt, site->id, bytes, err);
    file_unmap(bytes);
    return rc;
}

static enum secagg_stage stage_of(enum session_stage stage)
{
    switch (stage) {
    case SESSION_M1_ADVERTISE:
        return STAGE_ADVERTISE;
    case SESSION_M3_SHARES:
        return STAGE_SHARES;
    case SESSION_M5_MASKED:
        return STAGE_MASKED;
    case SESSION_M7_CONSISTENCY:
        return STAGE_CONSISTENCY;
    default:
        return STAGE_UNMASK;
    }
}

static int take_cosign(struct engine *e, struct engine_site *site, struct span payload, struct error *err)
{
    if (e->phase != PHASE_COSIGN || !e->cosign)
        return error_set(err, ERR_AGAIN, "co-signatures of this round are no longer collected");
    if (payload.len != SIGN_SIZE)
        return error_set(err, ERR_INTEGRITY, "a co-signature has %d bytes", SIGN_SIZE);
    return cosign_collect(e->cosign, site->id, payload.ptr, err);
}

static int on_send(struct engine *e, struct engine_site *site, struct span body, struct rpc_reply *reply)
{
    struct session_message message;
    struct error err = {0};
    int rc = session_message_decode(body, &message, &reply->error);

    if (rc < 0)
        return rc;
    if (message.stage == SESSION_WILLING) {
        if (strcmp(message.job, e->job.job) == 0)
            site->unwilling = false;
        return 0;
    }
    if (strcmp(message.job, e->job.job) != 0 || message.round != e->round || e->phase < PHASE_ATTEMPT) {
        answer(reply, SESSION_LATE, "this round is not under way");
        return 0;
    }
    if (message.stage == SESSION_DECLINE || message.stage == SESSION_UNWILLING) {
        site->declined = true;
        site->unwilling = message.stage == SESSION_UNWILLING;
        log_warn(&e->log, "%s does not take part: %.*s", site->id,
                 message.payload.len < 300 ? (int)message.payload.len : 300, (const char *)message.payload.ptr);
        journal_event(e->journal, "site_declined",
                      json_pack("{s:s,s:s,s:i,s:b,s:s%}", "job", e->job.job, "site", site->id, "round", (int)e->round,
                                "until_willing", site->unwilling, "reason", (const char *)message.payload.ptr,
                                message.payload.len < 300 ? message.payload.len : 300));
        return 0;
    }
    if (message.stage == SESSION_COSIGN)
        rc = take_cosign(e, site, message.payload, &err);
    else if (!e->attempt || stage_of(message.stage) != secagg_server_stage(e->attempt))
        rc = error_set(&err, ERR_AGAIN, "the stage is over");
    else if (message.stage == SESSION_M5_MASKED)
        rc = take_vector(e, site, message.payload, &err);
    else
        rc = secagg_server_receive(e->attempt, site->id, message.payload, &err);
    if (rc == ERR_AGAIN || rc == ERR_NOT_FOUND)
        answer(reply, rc == ERR_AGAIN ? SESSION_LATE : SESSION_NOT_FOUND, err.message);
    else if (rc < 0) {
        log_warn(&e->log, "%s: %s", site->id, err.message);
        journal_event(e->journal, "message_refused",
                      json_pack("{s:s,s:s,s:i,s:i,s:s}", "job", e->job.job, "site", site->id, "round", (int)e->round,
                                "stage", (int)message.stage, "reason", err.message));
        answer(reply, SESSION_REFUSED, err.message);
    }
    return 0;
}

static int on_proof(struct engine *e, struct span body, struct rpc_reply *reply)
{
    struct reader r = reader_of(body);
    char job[SESSION_JOB_SIZE];
    uint8_t hash[HASH_SIZE];
    struct buffer proof;
    uint64_t version;
    int rc;

    reader_string(&r, job, sizeof job);
    version = reader_u64(&r);
    if (!reader_done(&r) || version > UINT32_MAX)
        return error_set(&reply->error, ERR_INTEGRITY, "malformed request for a proof");
    buffer_init(&proof, COSIGN_PROOF_MAX);
    if ((rc = book_proof(e->book, job, (uint32_t)version, &proof, hash, &reply->error)) == 0) {
        buffer_bytes(&reply->body, buffer_span(&proof));
        buffer_append(&reply->body, hash, sizeof hash);
    }
    buffer_release(&proof);
    return rc;
}

static int on_get(struct engine *e, struct span body, struct rpc_reply *reply)
{
    char path[AGGREGATOR_PATH_SIZE];
    struct transfer_get get;
    int rc = transfer_get_decode(body, &get, &reply->error);

    if (rc < 0)
        return rc;
    if (strcmp(get.name, "sum") == 0 && e->sum && memcmp(get.sha256, e->sum_sha256, HASH_SIZE) == 0)
        return transfer_get_reply(&get, span_of(e->sum, e->sum_words * sizeof *e->sum), reply);
    if (strcmp(get.name, "state") == 0 && e->state && memcmp(get.sha256, e->state_sha256, HASH_SIZE) == 0)
        return transfer_get_reply(&get, span_of(e->state, (size_t)e->job.words * 2 * sizeof *e->state), reply);
    /* For a site that missed the end of a job; it checks the hash itself. */
    if (strcmp(get.name, "state") == 0 && book_find_state(e->book, get.sha256, path, &reply->error) == 0)
        return transfer_get_reply_file(&get, path, reply);
    return error_set(&reply->error, ERR_NOT_FOUND, "no object '%s' with this hash is offered now", get.name);
}

int engine_handle(void *ctx, const struct rpc_peer *peer, uint16_t method, struct span body, struct rpc_reply *reply)
{
    struct engine *e = ctx;
    struct engine_site *site = find_site(e, peer->site);
    const struct roster_site *entry = roster_find(&e->registry->roster, peer->site);

    /* TLS shows that the CA named this site; only the roster admits it. */
    if (!site || !entry || memcmp(entry->certificate_hash, peer->certificate_sha256, HASH_SIZE) != 0 ||
        roster_is_revoked(&e->registry->roster, peer->certificate_sha256))
        return error_set(&reply->error, ERR_POLICY, "this certificate is not in the federation's roster (serial %llu)",
                         (unsigned long long)e->registry->roster.serial);
    site->seen_ms = clock_monotonic_ms(e->clock);
    switch (method) {
    case SESSION_HELLO:
        site->unwilling = false; /* restarted, perhaps with another policy */
        return on_hello(e, body, reply);
    case SESSION_NEXT:
        return on_next(site, body, reply);
    case SESSION_SEND:
        return on_send(e, site, body, reply);
    case SESSION_BEAT:
        return 0;
    case SESSION_PROOF:
        return on_proof(e, body, reply);
    case TRANSFER_BEGIN:
    case TRANSFER_PUT:
    case TRANSFER_COMMIT:
        return spool_handle(e->spool, peer->site, method, body, reply);
    case TRANSFER_GET:
        return on_get(e, body, reply);
    default:
        return error_set(&reply->error, ERR_INTEGRITY, "unknown method %u", method);
    }
}
