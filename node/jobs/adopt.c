#include "base/file.h"
#include "base/hex.h"
#include "node/jobs/federation.h"
#include "node/settings.h"
#include "protocol/transport/transfer.h"

static int64_t now_s(const struct federation *f)
{
    return clock_wall_ms(f->clock) / 1000;
}

/* An adapter fit for answering, built from a verified version. */
static int build_served(struct federation *f, const struct version *v, struct served_adapter **ret_served,
                        struct error *err)
{
    struct served_adapter *served = calloc(1, sizeof *served);
    int rc;

    if (!served)
        return error_set(err, ERR_RESOURCES, "out of memory");
    if ((rc = version_adapter(v, f->site->base_hash, &f->site->model.config, &served->lora, err)) < 0) {
        free(served);
        return rc;
    }
    served->references = 1;
    memcpy(served->job, v->statement.job, sizeof served->job);
    served->version = v->statement.round;
    hex_encode(v->adapter_sha256, HASH_SIZE, served->sha256);
    local_plan_system_message(v->options, served->system_message, sizeof served->system_message);
    *ret_served = served;
    return 0;
}

/* Removes the files of versions first to last: stored, but never adopted or taken back. */
static void forget(struct federation *f, const char *job, uint32_t first, uint32_t last)
{
    char path[NODE_PATH_SIZE];

    for (uint32_t round = first; round <= last; round++) {
        version_path(f->config, job, round, path);
        if (file_exists(path) && remove(path) < 0)
            log_warn(&f->log, "%s cannot be removed", path);
    }
}

int adopt_version(struct federation *f, struct version *v, struct error *err)
{
    bool at_work = f->job.present && strcmp(f->job.plan.job, v->statement.job) == 0;
    struct served_adapter *served;
    uint32_t held = 0;
    int rc = build_served(f, v, &served, err);

    if (rc < 0)
        return rc;
    if ((rc = site_store_version(f->store, v->statement.job, &held, err)) < 0 ||
        (rc = site_store_set_version(f->store, v->statement.job, v->statement.round, err)) < 0 ||
        (rc = site_store_set_served(f->store, v->statement.job, v->statement.round, err)) < 0) {
        served_adapter_drop(served);
        return rc;
    }
    journal_event(f->journal, "adapter_swapped",
                  json_pack("{s:s,s:i,s:s}", "job", served->job, "version", (int)served->version, "adapter_sha256",
                            served->sha256));
    log_info(&f->log, "adapter %s version %u is in use (%.12s...)", served->job, served->version, served->sha256);
    slot_put(f->slot, served);
    if (held > v->statement.round) /* taken back */
        forget(f, v->statement.job, v->statement.round + 1, held);
    else if (v->statement.round > 0)
        forget(f, v->statement.job, held + 1, v->statement.round - 1);
    if (at_work) {
        version_release(&f->job.version);
        f->job.version = *v;
        *v = (struct version){0};
    } else {
        version_release(v);
    }
    return 0;
}

/* Loads one version from disk into the slot. */
static int serve_from_disk(struct federation *f, const char *job, uint32_t round, struct error *err)
{
    struct served_adapter *served;
    struct version v = {0};
    int rc = version_load(&v, f->vault, job, round, err);

    if (rc == 0 && (rc = build_served(f, &v, &served, err)) == 0)
        slot_put(f->slot, served);
    version_release(&v);
    return rc;
}

void adopt_at_start(struct federation *f)
{
    char job[SITE_ID_SIZE], path[NODE_PATH_SIZE];
    uint32_t newest, round;
    struct error err = {0};
    int rc = site_store_served(f->store, job, &newest, &err);

    if (rc == ERR_NOT_FOUND)
        return;
    if (rc < 0) {
        log_error(&f->log, "%s", err.message);
        return;
    }
    for (round = newest; round >= 1; round--) {
        version_path(f->config, job, round, path);
        if (round < newest && !file_exists(path))
            continue;
        if (serve_from_disk(f, job, round, &err) == 0)
            break;
        log_error(&f->log, "adapter %s version %u is not used: %s", job, round, err.message);
        journal_event(f->journal, "adapter_refused",
                      json_pack("{s:s,s:i,s:s}", "job", job, "version", (int)round, "reason", err.message));
    }
    if (round == 0)
        log_error(&f->log, "no version of %s could be loaded: answering with the base model", job);
    else if (round < newest)
        log_warn(&f->log, "answering with adapter %s version %u, the newest intact one", job, round);
}

int adopt_withdrawal(struct federation *f, const struct secagg_info *info, uint64_t version, struct error *err)
{
    struct version *held = &f->job.version;
    uint32_t round = held->statement.round;
    struct version first = {0};
    int rc = 0;

    if (round > version) {
        if (held->proven || memcmp(held->statement.previous_hash, info->model_hash, HASH_SIZE) != 0)
            return error_set(err, ERR_INTEGRITY,
                             "job %s round %u starts from version %llu, but this site holds version %u, which %s: "
                             "refused",
                             info->job, info->round, (unsigned long long)version, round,
                             held->proven ? "a quorum signed" : "was not made from that one");
        log_warn(&f->log, "version %u of job %s was withdrawn by the federation", round, info->job);
    }
    if (version > 0)
        return 0;
    if ((rc = version_first(&first, &info->plan, held->words, err)) < 0)
        return rc;
    if (memcmp(first.model_hash, info->model_hash, HASH_SIZE) != 0)
        rc = error_set(err, ERR_INTEGRITY, "job %s starts from a model state that is not its first one", info->job);
    if (rc < 0 || (rc = site_store_set_version(f->store, info->job, 0, err)) < 0) {
        version_release(&first);
        return rc;
    }
    forget(f, info->job, 1, round);
    version_release(held);
    *held = first;
    return 0;
}

/* SESSION_PROOF → the co-signatures and the hash of the state's bytes. */
static int fetch_proof(struct federation *f, const char *job, uint64_t version, struct buffer *reply,
                       struct span *ret_proof, uint8_t ret_state_sha256[HASH_SIZE], struct error *err)
{
    struct buffer request;
    struct reader r;
    int rc;

    buffer_init(&request, 256);
    buffer_string(&request, job);
    buffer_u64(&request, version);
    rc = federation_call(f, SESSION_PROOF, buffer_span(&request), reply, 60000, err);
    buffer_release(&request);
    if (rc < 0)
        return rc;
    r = reader_of(buffer_span(reply));
    *ret_proof = reader_bytes(&r, COSIGN_PROOF_MAX);
    reader_copy(&r, ret_state_sha256, HASH_SIZE);
    return reader_done(&r) ? 0
                           : error_set(err, ERR_INTEGRITY, "malformed proof of version %llu of job %s",
                                       (unsigned long long)version, job);
}

int adopt_check(const struct version *held, const struct secagg_info *of_round, const char *job, uint64_t version,
                const struct cosign_statement *statement, struct error *err)
{
    if (strcmp(statement->job, job) != 0 || statement->round != version)
        return error_set(err, ERR_INTEGRITY, "job %s: the aggregator names version %llu but sends version %u of %s",
                         job, (unsigned long long)version, statement->round, statement->job);
    if (of_round &&
        (statement->round >= of_round->round || memcmp(statement->next_hash, of_round->model_hash, HASH_SIZE) != 0))
        return error_set(err, ERR_INTEGRITY,
                         "job %s round %u: the model that the round starts from is not the one that the sites "
                         "co-signed",
                         job, of_round->round);
    if (strcmp(held->statement.job, job) == 0 && statement->round < held->statement.round &&
        (held->proven || memcmp(held->statement.previous_hash, statement->next_hash, HASH_SIZE) != 0))
        return error_set(err, ERR_INTEGRITY, "job %s: version %u is older than version %u, which %s: refused", job,
                         statement->round, held->statement.round,
                         held->proven ? "a quorum signed" : "was not made from that one");
    return 0;
}

/* held: the newest version of the job that this site can show. */
static int fetch_version(struct federation *f, const struct secagg_info *info, const struct version *held,
                         uint64_t version, bool of_this_round, struct error *err)
{
    struct cosign_statement statement;
    struct transfer_options options = {.deadline_ms = 600000, .clock = f->clock, .rng = f->rng};
    struct rpc_channel channel = rpc_client_channel(f->rpc);
    struct buffer reply, state;
    struct version v = {0};
    struct span proof;
    uint8_t sha256[HASH_SIZE];
    int rc;

    buffer_init(&reply, COSIGN_PROOF_MAX + 256);
    buffer_init(&state, (size_t)info->state_words * 2 * sizeof(float));
    if ((rc = fetch_proof(f, info->job, version, &reply, &proof, sha256, err)) < 0 ||
        (rc = cosign_verify(proof, &f->vault->roster, now_s(f), (uint32_t)config_int(f->config, "policy.min_colluders"),
                            &statement, err)) < 0 ||
        (rc = adopt_check(held, of_this_round ? info : NULL, info->job, version, &statement, err)) < 0)
        goto out;
    if ((rc = transfer_download(&channel, "state", sha256, &state, &options, err)) < 0)
        goto out;
    if (state.len != (size_t)info->state_words * 2 * sizeof(float)) {
        rc = error_set(err, ERR_INTEGRITY, "job %s: the model state has %zu bytes, expected %zu", info->job, state.len,
                       (size_t)info->state_words * 2 * sizeof(float));
        goto out;
    }
    if ((rc = version_from_state(&v, &info->plan, &statement, (const float *)(const void *)state.data,
                                 (size_t)info->state_words, err)) == 0 &&
        (rc = version_store(&v, f->vault, proof, err)) == 0) {
        journal_event(f->journal, "caught_up",
                      json_pack("{s:s,s:i}", "job", info->job, "version", (int)statement.round));
        v.proven = true;
        rc = adopt_version(f, &v, err);
    }
out:
    version_release(&v);
    buffer_release(&reply);
    buffer_release(&state);
    return rc;
}

int adopt_missing(struct federation *f, const struct secagg_info *info, uint64_t version, struct error *err)
{
    return fetch_version(f, info, &f->job.version, version, true, err);
}

/* The job ended without any version that a quorum signed; held was made in its first state, or stays. */
static int to_base_model(struct federation *f, const struct secagg_info *info, const struct version *held,
                         struct error *err)
{
    uint32_t round = held->statement.round;
    char served[SITE_ID_SIZE];
    struct version first = {0};
    int rc;

    if (round == 0)
        return 0;
    if ((rc = version_first(&first, &info->plan, held->words, err)) < 0)
        return rc;
    if (held->proven || memcmp(held->statement.previous_hash, first.model_hash, HASH_SIZE) != 0)
        rc = error_set(err, ERR_INTEGRITY,
                       "job %s: version %u is not given up: it does not follow from the first state", info->job, round);
    version_release(&first);
    if (rc < 0 || (rc = site_store_set_version(f->store, info->job, 0, err)) < 0)
        return rc;
    log_warn(&f->log, "version %u of job %s was withdrawn by the federation", round, info->job);
    forget(f, info->job, 1, round);
    if ((rc = site_store_served(f->store, served, &round, err)) < 0 || strcmp(served, info->job) != 0)
        return rc == ERR_NOT_FOUND ? 0 : rc;
    slot_put(f->slot, NULL);
    return site_store_set_served(f->store, info->job, 0, err);
}

int adopt_last(struct federation *f, const struct secagg_info *info, uint64_t version, struct error *err)
{
    struct version held = {0};
    uint32_t round = 0;
    struct error ignored = {0};
    int rc = site_store_version(f->store, info->job, &round, err);

    if (rc < 0)
        return rc;
    if (round > 0 && version_load(&held, f->vault, info->job, round, &ignored) < 0)
        log_warn(&f->log, "%s; the version is fetched again", ignored.message);
    if (round != version)
        rc = version > 0 ? fetch_version(f, info, &held, version, false, err) : to_base_model(f, info, &held, err);
    version_release(&held);
    if (rc == 0) /* stored before a crash, never in use */
        forget(f, info->job, (uint32_t)version + 1, info->plan.rounds);
    return rc;
}
