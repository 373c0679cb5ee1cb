/* M10: the sum and the model that follows from it, recomputed by every site before it co-signs. */
#include "protocol/attempt.h"

void sum_hash(const uint32_t *sum, uint64_t words, uint8_t out[HASH_SIZE])
{
    const struct span part = span_of(sum, words * 4);

    hash_labelled("consilium/sum", &part, 1, out);
}

static void make_statement(const struct attempt *a, const uint8_t sum[HASH_SIZE], const uint8_t next[HASH_SIZE],
                           struct cosign_statement *out)
{
    *out = (struct cosign_statement){
        .round = a->info.round, .attempt = a->info.attempt, .n = a->info.quorum.n, .c = a->info.quorum.c};
    memcpy(out->federation, a->roster->federation, SITE_ID_SIZE);
    memcpy(out->job, a->info.job, SITE_ID_SIZE);
    memcpy(out->previous_hash, a->info.model_hash, HASH_SIZE);
    memcpy(out->sum_hash, sum, HASH_SIZE);
    memcpy(out->h3, a->h3, HASH_SIZE);
    memcpy(out->next_hash, next, HASH_SIZE);
}

int secagg_server_result(struct secagg_server *s, const uint8_t next_hash[HASH_SIZE], struct span *ret_m10,
                         struct cosign_statement *ret_statement, struct error *err)
{
    struct buffer *b = &s->broadcast[10];
    uint8_t hash[HASH_SIZE];

    if (s->stage != STAGE_RESULT)
        return error_set(err, ERR_AGAIN, "the sum is not there yet");
    sum_hash(s->sum, s->a.info.words, hash);
    message_begin(b, 10, s->a.h3);
    buffer_append(b, hash, HASH_SIZE);
    buffer_append(b, next_hash, HASH_SIZE);
    broadcast_end(b, s->identity);
    if (!buffer_ok(b))
        return error_set(err, ERR_RESOURCES, "no memory for M10");
    make_statement(&s->a, hash, next_hash, ret_statement);
    *ret_m10 = buffer_span(b);
    return 0;
}

static int check_result(struct secagg_client *c, struct span m10, const struct secagg_result_in *in,
                        uint8_t ret_sum[HASH_SIZE], uint8_t ret_next[HASH_SIZE], struct error *err)
{
    struct attempt *a = &c->a;
    const struct plan_aggregation *plan = &a->info.plan.aggregation;
    struct model_basis basis = job_plan_basis(&a->info.plan, in->frozen_hash);
    struct model_state next = {in->next_params, in->next_momentum, in->previous.words};
    uint8_t hash[HASH_SIZE];
    struct reader body;
    int rc = broadcast_open(a, 10, a->h3, m10, &body, err);

    if (rc < 0)
        return rc;
    reader_copy(&body, ret_sum, HASH_SIZE);
    reader_copy(&body, ret_next, HASH_SIZE);
    if (!reader_done(&body))
        return error_set(err, ERR_INTEGRITY, "M10: malformed");
    sum_hash(in->sum, a->info.words, hash);
    if (memcmp(hash, ret_sum, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "M10: the sum that was fetched is not the announced one");
    if (in->previous.words != a->info.state_words)
        return error_set(err, ERR_BUG, "the previous model has another size");
    model_state_hash(&basis, in->previous, hash);
    if (memcmp(hash, a->info.model_hash, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "M10: the model held here is not the one this round started from");
    rc = next_model_from_sum(&plan->optimizer, in->previous, (struct model_segment){a->info.offset, a->info.words},
                             in->sum, a->info.survivors, plan->grid_bits, in->next_params, in->next_momentum, err);
    if (rc < 0)
        return rc;
    model_state_hash(&basis, next, hash);
    if (memcmp(hash, ret_next, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "M10: the announced model does not follow from the sum: refused");
    return 0;
}

int secagg_client_on_result(struct secagg_client *c, struct span m10, const struct secagg_result_in *in,
                            struct secagg_result_out *ret_out, struct error *err)
{
    uint8_t sum[HASH_SIZE], next[HASH_SIZE];
    int rc = client_enter(c, 10, m10, err);

    if (rc < 0)
        return rc;
    /* A replay recomputes: the caller's arrays need the result, and Ed25519 gives the same signature. */
    rc = check_result(c, m10, in, sum, next, err);
    if ((rc = client_leave(c, 10, m10, STAGES, rc)) < 0)
        return rc;
    make_statement(&c->a, sum, next, &ret_out->statement);
    cosign_sign(&ret_out->statement, c->own->id, c->identity, ret_out->signature);
    return 0;
}
