/* M9: for a survivor the share of its self mask, for a dropout the share of its mask key; never both. */
#include "protocol/attempt.h"

#include <stdlib.h>

enum { STREAMS_AT_ONCE = 32 };

int unmask_answer(struct secagg_client *c, struct error *err)
{
    struct attempt *a = &c->a;
    struct client_secrets *k = c->secret;
    struct buffer *b = &c->out[9];
    uint8_t signature[SIGN_SIZE], hash[HASH_SIZE];
    int rc = 0;

    message_begin(b, 9, a->h3);
    buffer_u32(b, attempt_count_u2(a));
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        if (a->members[i].u2)
            buffer_append(b, a->members[i].u3 ? k->held_b[i] : k->held_s[i], SHAMIR_SIZE);
    }
    stage_sign(9, c->own->id, a->h3, buffer_span(b), c->identity, signature);
    buffer_append(b, signature, SIGN_SIZE);
    if (!buffer_ok(b))
        return error_set(err, ERR_RESOURCES, "no memory for M9");
    hash_bytes(buffer_span(b), hash);
    if (a->info.plan.dp.mode == PLAN_DP_NONE)
        rc = c->log.record(c->log.ctx, RECORD_UNMASK_MODEL, a->info.job, a->info.round, a->info.attempt,
                           span_of(a->info.model_hash, HASH_SIZE), err);
    if (rc == 0)
        rc = c->log.record(c->log.ctx, RECORD_UNMASK, a->info.job, a->info.round, a->info.attempt,
                           span_of(hash, HASH_SIZE), err);
    secret_wipe(k->held_b, sizeof k->held_b);
    secret_wipe(k->held_s, sizeof k->held_s);
    return rc;
}

int unmask_receive(struct secagg_server *s, uint32_t at, struct span message, struct error *err)
{
    struct attempt *a = &s->a;
    const struct member *from = &a->members[at];
    struct server_member *m = &s->members[at];
    struct reader in;
    const uint8_t *signature = NULL;
    uint8_t hash[HASH_SIZE];
    int rc;

    if ((rc = message_open(9, a->h3, message, &in, &signature, err)) < 0 ||
        (rc = stage_verify(9, from, a->h3, span_of(message.ptr, message.len - SIGN_SIZE), signature, err)) < 0)
        return rc;
    if (!m->shares && !(m->shares = secret_new((size_t)a->info.quorum.n * SHAMIR_SIZE)))
        return error_set(err, ERR_RESOURCES, "no memory for shares");
    if (reader_u32(&in) != attempt_count_u2(a))
        return error_set(err, ERR_INTEGRITY, "M9 of site %s: wrong number of shares", from->id);
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *dealer = &a->members[i];
        if (!dealer->u2)
            continue;
        reader_copy(&in, m->shares[i], SHAMIR_SIZE);
        share_hash(dealer->u3 ? "b" : "s", dealer->id, from->id, m->shares[i], hash);
        if (in.failed || memcmp(hash, dealer->u3 ? s->members[i].hash_b[at] : s->members[i].hash_s[at], HASH_SIZE) != 0)
            return error_set(err, ERR_INTEGRITY, "M9: site %s answers with a share that %s did not deal to it",
                             from->id, dealer->id);
    }
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "M9 of site %s: bytes after its end", from->id);
    return 0;
}

/* The first t who answered. Any t shares of an honest dealer give the secret; a dishonest one is caught below. */
static int pick_holders(const struct secagg_server *s, uint32_t holders[SECAGG_SITES_MAX],
                        struct shamir_combiner *combiner, struct error *err)
{
    uint32_t indices[SECAGG_SITES_MAX], count = 0;

    for (uint32_t i = 0; i < s->a.info.quorum.n && count < s->a.info.quorum.t; i++) {
        if (!s->members[i].answered)
            continue;
        holders[count] = i;
        indices[count++] = s->a.members[i].index;
    }
    return shamir_combiner_init(combiner, indices, count, err);
}

struct unmasking {
    struct secagg_server *s;
    struct mask_stream streams[STREAMS_AT_ONCE];
    int signs[STREAMS_AT_ONCE];
    uint32_t count;
};

static void flush(struct unmasking *u)
{
    struct mask_stream *pointers[STREAMS_AT_ONCE];

    for (uint32_t i = 0; i < u->count; i++)
        pointers[i] = &u->streams[i];
    if (u->count)
        mask_apply(pointers, u->signs, u->count, u->s->sum, 0, u->s->a.info.words);
    for (uint32_t i = 0; i < u->count; i++)
        mask_stream_release(&u->streams[i]);
    u->count = 0;
}

static int remove_stream(struct unmasking *u, const uint8_t key[MASK_KEY_SIZE], int sign, struct error *err)
{
    if (u->count == STREAMS_AT_ONCE)
        flush(u);
    int rc = mask_stream_init(&u->streams[u->count], (enum mask_suite)u->s->a.suite, key, err);
    if (rc == 0)
        u->signs[u->count++] = sign;
    return rc;
}

static int remove_self(struct unmasking *u, const struct member *m, const uint8_t b[SHAMIR_SIZE], struct error *err)
{
    const struct attempt *a = &u->s->a;
    uint8_t key[MASK_KEY_SIZE];

    advert_commitment(a->info.h0, m->id, b, key);
    if (memcmp(key, m->commitment, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "site %s dealt inconsistent shares of its self mask: attempt aborted",
                         m->id);
    mask_self_key(b, a->h2, MASK_VECTOR, 32, m->id, key);
    int rc = remove_stream(u, key, -1, err);
    secret_wipe(key, sizeof key);
    return rc;
}

static int remove_pairs(struct unmasking *u, const struct member *gone, const uint8_t s[SHAMIR_SIZE], struct error *err)
{
    const struct attempt *a = &u->s->a;
    struct agree_key mask;
    uint8_t shared[AGREE_SIZE], key[MASK_KEY_SIZE];
    int rc = 0;

    advert_mask_key(&mask, a->info.h0, gone->id, s);
    if (memcmp(mask.public_key, gone->mask_public, AGREE_SIZE) != 0)
        rc = error_set(err, ERR_INTEGRITY, "site %s dealt inconsistent shares of its mask key: attempt aborted",
                       gone->id);
    for (uint32_t i = 0; i < a->info.quorum.n && rc == 0; i++) {
        const struct member *m = &a->members[i];
        if (!m->u3)
            continue;
        rc = agree_shared(mask.secret, m->mask_public, shared);
        if (rc < 0) {
            error_set(err, rc, "site %s advertises a low-order key", m->id);
            break;
        }
        mask_pair_key(shared, a->h2, MASK_VECTOR, 32, m->id, gone->id, key);
        rc = remove_stream(u, key, -mask_pair_sign(m->id, gone->id), err);
    }
    secret_wipe(&mask, sizeof mask);
    secret_wipe(shared, sizeof shared);
    secret_wipe(key, sizeof key);
    return rc;
}

static int remove_masks(struct secagg_server *s, const uint32_t *holders, const struct shamir_combiner *combiner,
                        uint8_t (*shares)[SHAMIR_SIZE], struct error *err)
{
    struct unmasking u = {.s = s};
    uint8_t *secret = shares[combiner->count]; /* one more slot */
    int rc = 0;

    for (uint32_t i = 0; i < s->a.info.quorum.n && rc == 0; i++) {
        const struct member *dealer = &s->a.members[i];
        if (!dealer->u2)
            continue;
        for (size_t j = 0; j < combiner->count; j++)
            memcpy(shares[j], s->members[holders[j]].shares[i], SHAMIR_SIZE);
        if (shamir_combine(combiner, (const uint8_t(*)[SHAMIR_SIZE])shares, secret) < 0)
            rc = error_set(err, ERR_INTEGRITY, "the shares of site %s are not canonical: attempt aborted", dealer->id);
        else
            rc = dealer->u3 ? remove_self(&u, dealer, secret, err) : remove_pairs(&u, dealer, secret, err);
    }
    flush(&u);
    return rc;
}

int unmask_close(struct secagg_server *s, struct error *err)
{
    uint32_t holders[SECAGG_SITES_MAX];
    struct shamir_combiner combiner = {0};
    int rc = pick_holders(s, holders, &combiner, err);

    if (rc == 0) {
        uint8_t(*shares)[SHAMIR_SIZE] = secret_new((combiner.count + 1) * SHAMIR_SIZE);
        rc = shares ? remove_masks(s, holders, &combiner, shares, err)
                    : error_set(err, ERR_RESOURCES, "no memory for shares");
        secret_free(shares);
    }
    shamir_combiner_release(&combiner);
    for (uint32_t i = 0; i < s->a.info.quorum.n; i++) {
        secret_free(s->members[i].shares);
        s->members[i].shares = NULL;
    }
    return rc;
}
