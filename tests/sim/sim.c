#include "sim.h"

#include <stdio.h>
#include <stdlib.h>

#define ALIVE(mask, i) (((mask) >> (i)) & 1)

uint64_t sim_seed(void)
{
    const char *text = getenv("CONSILIUM_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 10) : 1;

    printf("seed %llu (CONSILIUM_SEED)\n", (unsigned long long)seed);
    return seed;
}

static void *need(void *p)
{
    if (!p)
        abort();
    return p;
}

static void check(int rc, const struct error *err)
{
    if (rc < 0) {
        fprintf(stderr, "sim: %s\n", err->message);
        abort();
    }
}

static void make_plan(struct sim *s)
{
    struct job_plan *p = &s->plan;

    snprintf(p->job, sizeof p->job, "icd-demo");
    memset(p->base_hash, 7, HASH_SIZE);
    memcpy(p->lora, "ffa r=8", 7);
    p->lora_len = 7;
    p->rounds = 20;
    p->min_sites = 3;
    snprintf(p->train.optimizer, sizeof p->train.optimizer, "sgd");
    p->train.learning_rate = 0.1;
    p->train.local_steps = 4;
    p->train.batch = 8;
    p->train.max_len = 64;
    p->dp = (struct plan_dp){PLAN_DP_RECORD, 1.0, 0.9, 0.04, 1e-5, 8.0, 1 << 20, 80};
    p->aggregation = (struct plan_aggregation){4.0, 32, 20, {SERVER_FEDAVGM, 1.0f, 0.9f}};
    p->train_deadline_s = 600;
    p->stage_deadline_s = 60;
    p->not_after_s = s->now_s + 86400;
}

static void make_roster(struct sim *s)
{
    struct roster *r = &s->roster;

    roster_init(r);
    snprintf(r->federation, sizeof r->federation, "demo");
    r->serial = 1;
    r->not_before_s = s->now_s - 10;
    r->not_after_s = s->now_s + 86400;
    memcpy(r->aggregator_key, s->aggregator.public_key, SIGN_PUBLIC_SIZE);
    for (uint32_t i = 0; i < s->n; i++) {
        struct roster_site site = {.role = SITE_TRAINER, .certificate_not_after_s = s->now_s + 3600};
        snprintf(s->sites[i].id, SITE_ID_SIZE, "clinic-%02u", i);
        memcpy(site.id, s->sites[i].id, SITE_ID_SIZE);
        sign_key_random(&s->sites[i].key, &s->rng);
        memcpy(site.public_key, s->sites[i].key.public_key, SIGN_PUBLIC_SIZE);
        rng_fill(&s->rng, site.certificate_hash, HASH_SIZE);
        check(roster_add_site(r, &site, &s->err), &s->err);
    }
    check(roster_add_author(r, s->author.public_key, &s->err), &s->err);
    buffer_init(&s->signed_roster, 1 << 20);
    check(roster_sign(r, &s->governance, &s->signed_roster, &s->err), &s->err);
}

void sim_init(struct sim *s, uint32_t n, size_t words, uint64_t seed)
{
    sim_init_split(s, n, words, 0, seed);
}

struct model_segment sim_segment(const struct sim *s)
{
    struct model_segment segment;
    struct error err;

    check(job_plan_segment(&s->plan, s->round, s->words, &segment, &err), &err);
    return segment;
}

void sim_init_split(struct sim *s, uint32_t n, size_t words, size_t split, uint64_t seed)
{
    uint8_t key[RANDOM_SEED_SIZE] = {0};

    memset(s, 0, sizeof *s);
    memcpy(key, &seed, sizeof seed);
    random_stream_init(&s->stream, key, "sim");
    s->rng = random_stream_rng(&s->stream);
    s->n = n;
    s->words = words;
    s->round = s->attempt = 1;
    s->now_s = 1800000000;
    sign_key_random(&s->governance, &s->rng);
    sign_key_random(&s->author, &s->rng);
    sign_key_random(&s->aggregator, &s->rng);
    make_plan(s);
    s->plan.split_words = split;
    make_roster(s);
    buffer_init(&s->signed_plan, 1 << 20);
    check(job_plan_sign(&s->plan, &s->author, &s->signed_plan, &s->err), &s->err);
    s->params = need(calloc(words, sizeof(float)));
    s->momentum = need(calloc(words, sizeof(float)));
    for (uint32_t i = 0; i < n; i++) {
        s->sites[i].plain = need(calloc(words, 4));
        s->sites[i].masked = need(calloc(words, 4));
        int64_t m = ring_clamp(n, 0);
        for (size_t j = 0; j < words; j++)
            s->sites[i].plain[j] = (uint32_t)((int64_t)rng_below(&s->rng, (uint64_t)(2 * m + 1)) - m);
    }
    struct model_basis basis = job_plan_basis(&s->plan, s->frozen_hash);
    model_state_hash(&basis, (struct model_state){s->params, s->momentum, words}, s->model_hash);
}

void sim_drop_clients(struct sim *s)
{
    for (uint32_t i = 0; i < s->n; i++) {
        secagg_client_free(s->sites[i].client);
        s->sites[i].client = NULL;
    }
    secagg_server_free(s->server);
    s->server = NULL;
}

void sim_release(struct sim *s)
{
    sim_drop_clients(s);
    for (uint32_t i = 0; i < s->n; i++) {
        free(s->sites[i].plain);
        free(s->sites[i].masked);
    }
    free(s->params);
    free(s->momentum);
    buffer_release(&s->signed_plan);
    buffer_release(&s->signed_roster);
    roster_release(&s->roster);
    random_stream_release(&s->stream);
}

static int record(void *ctx, enum secagg_record kind, const char *job, uint32_t round, uint32_t attempt,
                  struct span bytes, struct error *err)
{
    struct sim_site *site = ctx;

    (void)job;
    if (kind == RECORD_OPEN) {
        if (round < site->open_round || (round == site->open_round && attempt <= site->open_attempt))
            return error_set(err, ERR_INTEGRITY, "round %u attempt %u was already opened", round, attempt);
        if (round != site->open_round)
            site->has_m9 = false;
        site->open_round = round;
        site->open_attempt = attempt;
        site->has_h3 = false;
        return 0;
    }
    if (kind == RECORD_UNMASK_MODEL) {
        if (site->unmasked_round && site->unmasked_round != round &&
            memcmp(site->unmasked_model, bytes.ptr, HASH_SIZE) == 0)
            return error_set(err, ERR_INTEGRITY, "this model's updates were unmasked in another round");
        site->unmasked_round = round;
        memcpy(site->unmasked_model, bytes.ptr, HASH_SIZE);
        return 0;
    }
    uint8_t *stored = kind == RECORD_SURVIVORS ? site->h3 : site->m9;
    bool *has = kind == RECORD_SURVIVORS ? &site->has_h3 : &site->has_m9;
    if (*has && memcmp(stored, bytes.ptr, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "a different one is on record");
    memcpy(stored, bytes.ptr, HASH_SIZE);
    *has = true;
    return 0;
}

static int witness(void *ctx, const char *site, uint64_t sequence, const uint8_t head[32], struct error *err)
{
    struct sim_site *self = ctx;

    (void)head;
    if (sequence < self->witness_sequence)
        return error_set(err, ERR_INTEGRITY, "the ledger of %s went back", site);
    return 0;
}

int sim_open_server(struct sim *s)
{
    const char *ids[SIM_SITES];
    struct secagg_server_config config = {.roster = &s->roster,
                                          .identity = &s->aggregator,
                                          .signed_plan = buffer_span(&s->signed_plan),
                                          .round = s->round,
                                          .attempt = s->attempt,
                                          .invited = ids,
                                          .invited_len = s->n,
                                          .model_hash = s->model_hash,
                                          .words = s->words,
                                          .chunk_bytes = 4096,
                                          .suite = s->suite,
                                          .rng = &s->rng,
                                          .now_s = s->now_s};

    for (uint32_t i = 0; i < s->n; i++)
        ids[i] = s->sites[s->n - 1 - i].id;
    return secagg_server_new(&s->server, &config, &s->err);
}

int sim_join(struct sim *s, uint32_t i, struct span m0)
{
    static const uint8_t head[HASH_SIZE];
    struct sim_site *site = &s->sites[i];
    struct secagg_client_config config = {.site_id = site->id,
                                          .identity = &site->key,
                                          .roster = &s->roster,
                                          .policy = s->policy,
                                          .plan_hash = s->plan.hash,
                                          .model_hash = s->model_hash,
                                          .words = s->words,
                                          .log = {record, site},
                                          .witness = {witness, site},
                                          .rng = &s->rng,
                                          .now_s = s->now_s};

    int rc = secagg_client_new(&site->client, &config, m0, &s->err);

    if (rc == 0)
        secagg_client_set_ledger(site->client, site->ledger_sequence, head);
    return rc;
}

int sim_sites_join(struct sim *s)
{
    int rc = sim_open_server(s);

    for (uint32_t i = 0; i < s->n && rc == 0; i++)
        rc = sim_join(s, i, secagg_server_broadcast(s->server, s->sites[i].id));
    return rc;
}

int sim_answer(struct sim *s, uint32_t i, struct span broadcast, struct span *ret_answer)
{
    struct sim_site *site = &s->sites[i];
    uint8_t root[HASH_SIZE];
    int rc;

    switch (secagg_server_stage(s->server)) {
    case STAGE_ADVERTISE:
        return secagg_client_advertise(site->client, ret_answer, &s->err);
    case STAGE_SHARES:
        return secagg_client_on_keys(site->client, broadcast, ret_answer, &s->err);
    case STAGE_MASKED:
        if ((rc = secagg_client_on_deliver(site->client, broadcast, &s->err)) < 0)
            return rc;
        memcpy(site->masked, site->plain, sim_segment(s).count * 4);
        return secagg_client_mask(site->client, site->masked, root, ret_answer, &s->err);
    case STAGE_CONSISTENCY:
        return secagg_client_on_survivors(site->client, broadcast, ret_answer, &s->err);
    case STAGE_UNMASK:
        return secagg_client_on_quorum(site->client, broadcast, ret_answer, &s->err);
    default:
        abort();
    }
}

int sim_stage(struct sim *s, uint64_t alive)
{
    for (uint32_t i = 0; i < s->n; i++) {
        const char *id = s->sites[i].id;
        struct span answer;
        int rc;
        if (!ALIVE(alive, i) || !secagg_server_waits_for(s->server, id))
            continue;
        if ((rc = sim_answer(s, i, secagg_server_broadcast(s->server, id), &answer)) < 0 ||
            (rc = secagg_server_receive(s->server, id, answer, &s->err)) < 0)
            return rc;
        if (secagg_server_stage(s->server) == STAGE_MASKED &&
            (rc = secagg_server_add_vector(s->server, id, span_of(s->sites[i].masked, sim_segment(s).count * 4),
                                           &s->err)) < 0)
            return rc;
    }
    return secagg_server_close_stage(s->server, &s->err);
}

void sim_copy_body(struct buffer *out, struct span broadcast)
{
    buffer_init(out, MESSAGE_MAX);
    buffer_append(out, broadcast.ptr, broadcast.len - SIGN_SIZE);
}

void sim_resign(struct sim *s, struct buffer *b)
{
    broadcast_end(b, &s->aggregator);
}
