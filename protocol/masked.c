/* M5: the vector under its masks, and the signed root of its chunks. */
#include "protocol/attempt.h"

#include <stdlib.h>

void vector_merkle_root(const struct attempt *a, const uint8_t *bytes, uint8_t out[HASH_SIZE])
{
    uint64_t size = a->info.words * 4;
    struct merkle tree;

    merkle_init(&tree);
    for (uint64_t at = 0; at < size; at += a->info.chunk_bytes) {
        uint64_t left = size - at;
        merkle_add(&tree, span_of(bytes + at, left < a->info.chunk_bytes ? left : a->info.chunk_bytes));
    }
    merkle_root(&tree, out);
}

static int start_streams(struct secagg_client *c, struct mask_stream *streams, int *signs, uint32_t *ret_count,
                         struct error *err)
{
    struct attempt *a = &c->a;
    struct client_secrets *k = c->secret;
    uint32_t count = 0;

    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *peer = &a->members[i];
        if (!peer->u2)
            continue;
        if (peer == c->own) {
            mask_self_key(k->b, a->h2, MASK_VECTOR, 32, peer->id, k->key);
            signs[count] = 1;
        } else {
            if (agree_shared(k->mask.secret, peer->mask_public, k->shared) < 0)
                return error_set(err, ERR_INTEGRITY, "site %s advertises a low-order key", peer->id);
            mask_pair_key(k->shared, a->h2, MASK_VECTOR, 32, c->own->id, peer->id, k->key);
            signs[count] = mask_pair_sign(c->own->id, peer->id);
        }
        int rc = mask_stream_init(&streams[count], (enum mask_suite)a->suite, k->key, err);
        if (rc < 0)
            return rc;
        *ret_count = ++count;
    }
    return 0;
}

static int mask_vector(struct secagg_client *c, uint32_t *ring, struct error *err)
{
    struct mask_stream streams[SECAGG_SITES_MAX] = {0}, *pointers[SECAGG_SITES_MAX];
    int signs[SECAGG_SITES_MAX];
    uint32_t count = 0;
    int rc = 0;

    for (uint64_t i = 0; i < c->a.info.words && rc == 0; i++) {
        int64_t v = (int32_t)ring[i];
        if (v > c->a.info.clamp || v < -(int64_t)c->a.info.clamp)
            rc = error_set(err, ERR_BUG, "the vector was not clamped to M: it could wrap the sum");
    }
    if (rc == 0)
        rc = start_streams(c, streams, signs, &count, err);
    for (uint32_t i = 0; i < count; i++)
        pointers[i] = &streams[i];
    if (rc == 0)
        mask_apply(pointers, signs, count, ring, 0, c->a.info.words);
    for (uint32_t i = 0; i < count; i++)
        mask_stream_release(&streams[i]);
    return rc;
}

/* Pairwise and self mask secrets have done their work; the held shares stay for M9. */
static void forget_masks(struct client_secrets *k)
{
    secret_wipe(k->s, sizeof k->s);
    secret_wipe(k->b, sizeof k->b);
    secret_wipe(&k->mask, sizeof k->mask);
    secret_wipe(&k->channel, sizeof k->channel);
    secret_wipe(k->shared, sizeof k->shared);
    secret_wipe(k->key, sizeof k->key);
}

int secagg_client_mask(struct secagg_client *c, uint32_t *ring, uint8_t ret_root[HASH_SIZE], struct span *ret_m5,
                       struct error *err)
{
    const struct span no_input = {0};
    int rc = client_enter(c, 5, no_input, err);

    if (rc < 0)
        return rc;
    if (rc == 0) {
        struct buffer *b = &c->out[5];
        uint8_t signature[SIGN_SIZE];
        rc = mask_vector(c, ring, err);
        forget_masks(c->secret);
        if (rc == 0) {
            vector_merkle_root(&c->a, (const uint8_t *)ring, c->own->vector_root);
            message_begin(b, 5, c->a.h2);
            buffer_append(b, c->own->vector_root, HASH_SIZE);
            stage_sign(5, c->own->id, c->a.h2, span_of(c->own->vector_root, HASH_SIZE), c->identity, signature);
            buffer_append(b, signature, SIGN_SIZE);
            rc = buffer_ok(b) ? 0 : error_set(err, ERR_RESOURCES, "no memory for M5");
        }
        if ((rc = client_leave(c, 5, no_input, 6, rc)) < 0)
            return rc;
    }
    memcpy(ret_root, c->own->vector_root, HASH_SIZE);
    *ret_m5 = buffer_span(&c->out[5]);
    return 0;
}

int masked_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err)
{
    struct member *m = &s->a.members[i];
    struct reader in;
    const uint8_t *signature = NULL;
    uint8_t root[HASH_SIZE];
    int rc = message_open(5, s->a.h2, message, &in, &signature, err);

    if (rc < 0)
        return rc;
    reader_copy(&in, root, sizeof root);
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "M5 of site %s is malformed", m->id);
    if ((rc = stage_verify(5, m, s->a.h2, span_of(root, HASH_SIZE), signature, err)) < 0)
        return rc;
    memcpy(m->vector_root, root, HASH_SIZE);
    memcpy(m->vector_signature, signature, SIGN_SIZE);
    s->members[i].masked = true;
    return 0;
}

int secagg_server_add_vector(struct secagg_server *s, const char *site, struct span bytes, struct error *err)
{
    struct member *m = attempt_find(&s->a, site);
    struct server_member *state = m ? &s->members[m - s->a.members] : NULL;
    uint8_t root[HASH_SIZE];

    if (!m || !m->u2)
        return error_set(err, ERR_POLICY, "site %s is not in this attempt", site);
    if (state->added)
        return 0;
    if (s->stage != STAGE_MASKED || !state->masked)
        return error_set(err, ERR_AGAIN, "the vector of site %s came %s", site,
                         s->stage == STAGE_MASKED ? "before its M5" : "too late: discarded");
    if (bytes.len != s->a.info.words * 4)
        return error_set(err, ERR_INTEGRITY, "the vector of site %s has %zu bytes, expected %llu", site, bytes.len,
                         (unsigned long long)s->a.info.words * 4);
    vector_merkle_root(&s->a, bytes.ptr, root);
    if (memcmp(root, m->vector_root, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "the vector of site %s is not the one it signed", site);
    for (uint64_t i = 0; i < s->a.info.words; i++) {
        uint32_t word;
        memcpy(&word, bytes.ptr + 4 * i, sizeof word);
        s->sum[i] += word;
    }
    state->added = true;
    state->answered = true;
    return 0;
}
