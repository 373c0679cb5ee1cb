/* M0: the aggregator opens an attempt; the site decides whether it takes part at all. */
#include "protocol/attempt.h"

#include "protocol/quantise.h"

#include <assert.h>
#include <stdlib.h>

static void write_open(const struct secagg_server *s, struct span signed_plan, struct buffer *b)
{
    const struct attempt *a = &s->a;
    const struct secagg_info *info = &a->info;

    buffer_init(b, MESSAGE_MAX);
    buffer_u8(b, 0);
    buffer_string(b, a->roster->federation);
    buffer_string(b, info->job);
    buffer_u32(b, info->round);
    buffer_u32(b, info->attempt);
    buffer_append(b, a->nonce, HASH_SIZE);
    buffer_append(b, a->roster->hash, HASH_SIZE);
    buffer_append(b, info->model_hash, HASH_SIZE);
    buffer_bytes(b, signed_plan);
    buffer_u64(b, info->state_words);
    buffer_u32(b, info->plan.aggregation.ring_bits);
    buffer_u32(b, info->plan.aggregation.grid_bits);
    buffer_f64(b, info->plan.aggregation.update_clip);
    buffer_u32(b, info->clamp);
    buffer_u32(b, GRAPH_COMPLETE);
    buffer_u32(b, info->quorum.t);
    buffer_u32(b, info->quorum.c);
    buffer_u32(b, info->quorum.m);
    buffer_u32(b, info->quorum.n_min);
    buffer_u32(b, a->suite);
    buffer_u32(b, info->plan.train_deadline_s);
    buffer_u32(b, info->plan.stage_deadline_s);
    buffer_u32(b, info->chunk_bytes);
    buffer_u32(b, info->quorum.n);
    for (uint32_t i = 0; i < info->quorum.n; i++)
        buffer_string(b, a->members[i].id);
}

static int by_id(const void *a, const void *b)
{
    return strcmp(((const struct member *)a)->id, ((const struct member *)b)->id);
}

static int invite(struct secagg_server *s, const struct secagg_server_config *config, struct error *err)
{
    struct attempt *a = &s->a;
    uint32_t n = config->invited_len;

    a->members = calloc(n, sizeof *a->members);
    s->members = calloc(n, sizeof *s->members);
    if (!a->members || !s->members)
        return error_set(err, ERR_RESOURCES, "no memory for %u sites", n);
    for (uint32_t i = 0; i < n; i++) {
        int rc = roster_admit(a->roster, config->invited[i], a->now_s, &a->members[i].site, err);
        if (rc < 0)
            return rc;
        memcpy(a->members[i].id, a->members[i].site->id, SITE_ID_SIZE);
    }
    qsort(a->members, n, sizeof *a->members, by_id);
    for (uint32_t i = 1; i < n; i++) {
        if (strcmp(a->members[i - 1].id, a->members[i].id) == 0)
            return error_set(err, ERR_CONFIG, "site %s is invited twice", a->members[i].id);
    }
    return 0;
}

static int prepare(struct secagg_server *s, const struct secagg_server_config *config, struct error *err)
{
    struct attempt *a = &s->a;
    struct secagg_info *info = &a->info;
    struct job_plan *plan = &info->plan;
    struct model_segment segment;
    int rc;

    a->roster = config->roster;
    a->now_s = config->now_s;
    a->suite = config->suite ? config->suite : MASK_SUITE_AES_256_CTR;
    s->identity = config->identity;
    if ((rc = job_plan_open(plan, config->signed_plan, a->roster, err)) < 0 ||
        (rc = quorum_derive(&info->quorum, config->invited_len, plan->c, plan->m, plan->n_min, err)) < 0 ||
        (rc = job_plan_segment(plan, config->round, config->words, &segment, err)) < 0 ||
        (rc = invite(s, config, err)) < 0)
        return rc;
    if (!mask_suite_known(a->suite) || config->words > WORDS_MAX || config->chunk_bytes < 4 ||
        config->chunk_bytes % 4 || config->chunk_bytes > CHUNK_BYTES_MAX)
        return error_set(err, ERR_CONFIG, "secure aggregation: mask suite, vector length or chunk size out of range");
    memcpy(info->job, plan->job, sizeof info->job);
    info->round = config->round;
    info->attempt = config->attempt;
    info->state_words = config->words;
    info->offset = segment.offset;
    info->words = segment.count;
    info->chunk_bytes = config->chunk_bytes;
    info->clamp = ring_clamp(info->quorum.n, 0);
    memcpy(info->model_hash, config->model_hash, HASH_SIZE);
    rng_fill(config->rng, a->nonce, sizeof a->nonce);
    write_open(s, config->signed_plan, &s->broadcast[0]);
    broadcast_end(&s->broadcast[0], s->identity);
    s->sum = calloc(info->words, sizeof *s->sum);
    if (!s->sum || !buffer_ok(&s->broadcast[0]))
        return error_set(err, ERR_RESOURCES, "no memory for a sum of %llu words", (unsigned long long)info->words);
    struct span body = span_of(s->broadcast[0].data, s->broadcast[0].len - SIGN_SIZE);
    hash_labelled("consilium/h0", &body, 1, info->h0);
    s->stage = STAGE_ADVERTISE;
    return 0;
}

int secagg_server_new(struct secagg_server **ret_server, const struct secagg_server_config *config, struct error *err)
{
    struct secagg_server *s = calloc(1, sizeof *s);
    int rc;

    if (!s)
        return error_set(err, ERR_RESOURCES, "no memory for an attempt");
    rc = prepare(s, config, err);
    if (rc < 0) {
        secagg_server_free(s);
        return rc;
    }
    *ret_server = s;
    return 0;
}

/* What M0 repeats from the plan, so that a reader of M0 sees it, must be what the plan says. */
static int read_arithmetic(struct attempt *a, struct reader *in, struct quorum *claimed, struct error *err)
{
    struct secagg_info *info = &a->info;
    const struct plan_aggregation *plan = &info->plan.aggregation;
    uint32_t ring_bits, grid_bits, graph, train_s, stage_s;
    struct model_segment segment;
    double clip;

    info->state_words = reader_u64(in);
    ring_bits = reader_u32(in);
    grid_bits = reader_u32(in);
    clip = reader_f64(in);
    info->clamp = reader_u32(in);
    graph = reader_u32(in);
    claimed->t = reader_u32(in);
    claimed->c = reader_u32(in);
    claimed->m = reader_u32(in);
    claimed->n_min = reader_u32(in);
    a->suite = reader_u32(in);
    train_s = reader_u32(in);
    stage_s = reader_u32(in);
    info->chunk_bytes = reader_u32(in);
    if (in->failed || ring_bits != plan->ring_bits || grid_bits != plan->grid_bits || clip != plan->update_clip ||
        train_s != info->plan.train_deadline_s || stage_s != info->plan.stage_deadline_s)
        return error_set(err, ERR_INTEGRITY, "M0: the parameters are not those of the signed plan");
    if (graph != GRAPH_COMPLETE || !mask_suite_known(a->suite))
        return error_set(err, ERR_INTEGRITY, "M0: unknown graph %u or mask suite %u", graph, a->suite);
    if (info->state_words > WORDS_MAX || info->chunk_bytes < 4 || info->chunk_bytes % 4 ||
        info->chunk_bytes > CHUNK_BYTES_MAX)
        return error_set(err, ERR_INTEGRITY, "M0: vector length or chunk size out of range");
    if (job_plan_segment(&info->plan, info->round, info->state_words, &segment, err) < 0)
        return ERR_INTEGRITY; /* the message is job_plan_segment's */
    info->offset = segment.offset;
    info->words = segment.count;
    return 0;
}

static int read_members(struct attempt *a, struct reader *in, const struct quorum *claimed, struct error *err)
{
    struct secagg_info *info = &a->info;
    struct quorum q;
    uint32_t n = reader_count(in, SECAGG_SITES_MAX, 4 + 1);
    const char *previous = "";
    int rc = quorum_derive(&q, n, claimed->c, claimed->m, claimed->n_min, err);

    if (rc < 0)
        return ERR_POLICY; /* the message is quorum_derive's */
    struct quorum plan;
    if ((rc = quorum_derive(&plan, n, info->plan.c, info->plan.m, info->plan.n_min, err)) < 0)
        return ERR_POLICY;
    if (claimed->t != q.t || claimed->c != plan.c || claimed->m != plan.m || claimed->n_min != plan.n_min)
        return error_set(err, ERR_POLICY,
                         "M0: quorum %u, c %u, m %u, n_min %u; %u sites and the plan give %u, %u, %u, %u", claimed->t,
                         claimed->c, claimed->m, claimed->n_min, n, plan.t, plan.c, plan.m, plan.n_min);
    if (info->clamp == 0 || info->clamp != ring_clamp(n, 0))
        return error_set(err, ERR_POLICY, "M0: clamp %u, %u sites need %u", info->clamp, n, ring_clamp(n, 0));
    a->members = calloc(n, sizeof *a->members);
    if (!a->members)
        return error_set(err, ERR_RESOURCES, "no memory for %u sites", n);
    info->quorum = q;
    for (uint32_t i = 0; i < n; i++) {
        struct member *m = &a->members[i];
        reader_string(in, m->id, sizeof m->id);
        if (in->failed || strcmp(previous, m->id) >= 0)
            return error_set(err, ERR_INTEGRITY, "M0: the invited ids are malformed, unsorted or repeated");
        if (!(m->site = roster_find(a->roster, m->id)) || m->site->role != SITE_TRAINER)
            return error_set(err, ERR_POLICY, "M0: the invited site %s is no trainer of the roster", m->id);
        previous = m->id;
    }
    return 0;
}

static int read_body(struct attempt *a, struct reader *in, struct error *err)
{
    struct secagg_info *info = &a->info;
    struct quorum claimed = {0};
    char federation[SITE_ID_SIZE];
    uint8_t roster_hash[HASH_SIZE];
    int rc;

    (void)reader_u8(in);
    reader_string(in, federation, sizeof federation);
    reader_string(in, info->job, sizeof info->job);
    info->round = reader_u32(in);
    info->attempt = reader_u32(in);
    reader_copy(in, a->nonce, HASH_SIZE);
    reader_copy(in, roster_hash, HASH_SIZE);
    reader_copy(in, info->model_hash, HASH_SIZE);
    struct span plan = reader_bytes(in, PLAN_BYTES_MAX + SIGN_PUBLIC_SIZE + SIGN_SIZE);
    if (in->failed)
        return error_set(err, ERR_INTEGRITY, "M0: malformed");
    if (strcmp(federation, a->roster->federation) != 0 || memcmp(roster_hash, a->roster->hash, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "M0: the aggregator works with another roster than serial %llu held here",
                         (unsigned long long)a->roster->serial);
    if ((rc = job_plan_open(&info->plan, plan, a->roster, err)) < 0)
        return rc;
    if (strcmp(info->job, info->plan.job) != 0 || info->round < 1 || info->round > info->plan.rounds)
        return error_set(err, ERR_POLICY, "M0: round %u of job %s is outside the signed plan of %u rounds", info->round,
                         info->job, info->plan.rounds);
    if ((rc = read_arithmetic(a, in, &claimed, err)) < 0 || (rc = read_members(a, in, &claimed, err)) < 0)
        return rc;
    if (!reader_done(in))
        return error_set(err, ERR_INTEGRITY, "M0: bytes after its end");
    return 0;
}

int open_read(struct attempt *ret_a, const struct roster *roster, struct span m0, struct error *err)
{
    struct attempt a = {.roster = roster};
    int rc;

    if (m0.len < 1 + SIGN_SIZE || m0.len > MESSAGE_MAX || m0.ptr[0] != 0)
        return error_set(err, ERR_INTEGRITY, "M0 expected, got something else (%zu bytes)", m0.len);
    struct span body = span_of(m0.ptr, m0.len - SIGN_SIZE);
    if (sign_verify(roster->aggregator_key, "consilium/broadcast", &body, 1, body.ptr + body.len) < 0)
        return error_set(err, ERR_INTEGRITY, "M0 is not signed by the aggregator of the roster");
    struct reader in = reader_of(body);
    rc = read_body(&a, &in, err);
    if (rc < 0) {
        attempt_release(&a);
        return rc;
    }
    hash_labelled("consilium/h0", &body, 1, a.info.h0);
    *ret_a = a;
    return 0;
}

int secagg_peek(struct span m0, const struct roster *roster, struct secagg_info *ret_info, struct error *err)
{
    struct attempt a;
    int rc = open_read(&a, roster, m0, err);

    if (rc < 0)
        return rc;
    *ret_info = a.info;
    attempt_release(&a);
    return 0;
}

static uint32_t floor_of(uint32_t policy, uint32_t roster, uint32_t fallback)
{
    uint32_t most = policy > roster ? policy : roster;

    return most ? most : fallback;
}

/* The site's own rules: they are final. */
static int check_policy(const struct attempt *a, const struct secagg_client_config *config, struct error *err)
{
    const struct secagg_info *info = &a->info;
    const struct quorum *q = &info->quorum;
    const struct secagg_policy *p = &config->policy;
    uint32_t c = floor_of(p->colluders_min, a->roster->colluders_min, quorum_colluders_default(q->n));
    uint32_t m = floor_of(p->honest_min, a->roster->honest_min, quorum_honest_default(q->n));

    if (memcmp(config->plan_hash, info->plan.hash, HASH_SIZE) != 0)
        return error_set(err, ERR_POLICY, "this site has not consented to the plan of job %s as it is now", info->job);
    if (config->now_s > info->plan.not_after_s)
        return error_set(err, ERR_POLICY, "the plan of job %s has ended", info->job);
    if (info->plan.dp.mode == PLAN_DP_NONE && !p->allow_no_dp)
        return error_set(err, ERR_POLICY, "job %s trains without differential privacy: refused by this site",
                         info->job);
    if (q->c < c || q->m < m)
        return error_set(err, ERR_POLICY, "job %s assumes c = %u, m = %u; this site asks for at least %u and %u",
                         info->job, q->c, q->m, c, m);
    if (q->n < p->sites_min || q->floor < p->sites_min || q->n < info->plan.min_sites)
        return error_set(err, ERR_POLICY, "round of %u sites with a floor of %u; at least %u are asked for", q->n,
                         q->floor, p->sites_min > info->plan.min_sites ? p->sites_min : info->plan.min_sites);
    if (memcmp(config->model_hash, info->model_hash, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "round %u starts from another model than the one this site holds: refused",
                         info->round);
    if (config->words != info->state_words)
        return error_set(err, ERR_INTEGRITY, "the round's model has %llu words, the LoRA configuration gives %llu",
                         (unsigned long long)info->state_words, (unsigned long long)config->words);
    return 0;
}

static int join(struct secagg_client *c, const struct secagg_client_config *config, struct span m0, struct error *err)
{
    struct attempt *a = &c->a;
    const struct roster_site *site;
    int rc;

    if ((rc = roster_check_time(config->roster, config->now_s, err)) < 0 ||
        (rc = open_read(a, config->roster, m0, err)) < 0)
        return rc;
    a->now_s = config->now_s;
    c->own = attempt_find(a, config->site_id);
    if (!c->own)
        return error_set(err, ERR_POLICY, "M0 does not invite site %s", config->site_id);
    if ((rc = roster_admit(a->roster, config->site_id, a->now_s, &site, err)) < 0)
        return rc;
    if (memcmp(site->public_key, config->identity->public_key, SIGN_PUBLIC_SIZE) != 0)
        return error_set(err, ERR_CONFIG, "the roster lists another key for site %s", config->site_id);
    if ((rc = check_policy(a, config, err)) < 0)
        return rc;
    c->secret = secret_new(sizeof *c->secret);
    if (!c->secret)
        return error_set(err, ERR_RESOURCES, "no memory for the keys of an attempt");
    return config->log.record(config->log.ctx, RECORD_OPEN, a->info.job, a->info.round, a->info.attempt,
                              span_of(a->info.h0, HASH_SIZE), err);
}

int secagg_client_new(struct secagg_client **ret_client, const struct secagg_client_config *config, struct span m0,
                      struct error *err)
{
    struct secagg_client *c = calloc(1, sizeof *c);
    int rc;

    if (!c)
        return error_set(err, ERR_RESOURCES, "no memory for an attempt");
    c->identity = config->identity;
    c->log = config->log;
    c->witness = config->witness;
    c->rng = config->rng;
    rc = join(c, config, m0, err);
    if (rc < 0) {
        secagg_client_free(c);
        return rc;
    }
    c->next = 1;
    *ret_client = c;
    return 0;
}

void secagg_client_set_ledger(struct secagg_client *c, uint64_t sequence, const uint8_t head[HASH_SIZE])
{
    assert(c->next == 1 && c->out[1].len == 0); /* M1 carries it */
    c->ledger_sequence = sequence;
    memcpy(c->ledger_head, head, HASH_SIZE);
}
