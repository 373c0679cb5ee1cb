/* M1: a site's keys for this attempt, bound to H0 and signed. */
#include "protocol/attempt.h"

void advert_commitment(const uint8_t h0[HASH_SIZE], const char *id, const uint8_t b[SHAMIR_SIZE],
                       uint8_t out[HASH_SIZE])
{
    const struct span parts[] = {span_of(h0, HASH_SIZE), span_str(id), span_of(b, SHAMIR_SIZE)};

    hash_labelled("consilium/self-mask-commitment", parts, ARRAY_LEN(parts), out);
}

void advert_mask_key(struct agree_key *key, const uint8_t h0[HASH_SIZE], const char *id, const uint8_t s[SHAMIR_SIZE])
{
    const struct span parts[] = {span_of(h0, HASH_SIZE), span_str(id)};
    uint8_t secret[AGREE_SIZE];

    hkdf_labelled(span_of(s, SHAMIR_SIZE), span_of(NULL, 0), "consilium/mask-secret", parts, ARRAY_LEN(parts), secret,
                  sizeof secret);
    agree_from_secret(key, secret);
    secret_wipe(secret, sizeof secret);
}

int secagg_client_advertise(struct secagg_client *c, struct span *ret_m1, struct error *err)
{
    const struct span no_input = {0};
    int rc = client_enter(c, 1, no_input, err);

    if (rc < 0)
        return rc;
    if (rc == 0) {
        const uint8_t *h0 = c->a.info.h0;
        struct client_secrets *k = c->secret;
        struct buffer *b = &c->out[1];
        uint8_t commitment[HASH_SIZE], signature[SIGN_SIZE];

        shamir_random(k->s, c->rng);
        shamir_random(k->b, c->rng);
        agree_random(&k->channel, c->rng);
        advert_mask_key(&k->mask, h0, c->own->id, k->s);
        advert_commitment(h0, c->own->id, k->b, commitment);
        message_begin(b, 1, h0);
        buffer_string(b, c->own->id);
        buffer_append(b, k->channel.public_key, AGREE_SIZE);
        buffer_append(b, k->mask.public_key, AGREE_SIZE);
        buffer_append(b, commitment, HASH_SIZE);
        buffer_u64(b, c->ledger_sequence);
        buffer_append(b, c->ledger_head, HASH_SIZE);
        stage_sign(1, c->own->id, h0, buffer_span(b), c->identity, signature);
        buffer_append(b, signature, SIGN_SIZE);
        rc = buffer_ok(b) ? 0 : error_set(err, ERR_RESOURCES, "no memory for M1");
        if ((rc = client_leave(c, 1, no_input, 2, rc)) < 0)
            return rc;
    }
    *ret_m1 = buffer_span(&c->out[1]);
    return 0;
}

int advert_read(const struct attempt *a, struct member *m, struct span m1, int64_t now_s, struct error *err)
{
    struct reader in;
    const uint8_t *signature = NULL;
    const struct roster_site *site;
    char id[SITE_ID_SIZE];
    int rc;

    if ((rc = message_open(1, a->info.h0, m1, &in, &signature, err)) < 0 ||
        (rc = roster_admit(a->roster, m->id, now_s, &site, err)) < 0 ||
        (rc = stage_verify(1, m, a->info.h0, span_of(m1.ptr, m1.len - SIGN_SIZE), signature, err)) < 0)
        return rc;
    reader_string(&in, id, sizeof id);
    reader_copy(&in, m->channel_public, AGREE_SIZE);
    reader_copy(&in, m->mask_public, AGREE_SIZE);
    reader_copy(&in, m->commitment, HASH_SIZE);
    m->ledger_sequence = reader_u64(&in);
    reader_copy(&in, m->ledger_head, HASH_SIZE);
    if (!reader_done(&in) || strcmp(id, m->id) != 0)
        return error_set(err, ERR_INTEGRITY, "M1 of site %s is malformed or names another site", m->id);
    if (agree_check_public(m->channel_public) < 0 || agree_check_public(m->mask_public) < 0)
        return error_set(err, ERR_INTEGRITY, "site %s advertises a low-order or non-canonical key", m->id);
    buffer_release(&m->advert);
    buffer_init(&m->advert, 1024);
    buffer_append(&m->advert, m1.ptr, m1.len);
    return buffer_ok(&m->advert) ? 0 : error_set(err, ERR_RESOURCES, "no memory for an advert");
}

int advertise_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err)
{
    return advert_read(&s->a, &s->a.members[i], message, s->a.now_s, err);
}
