/* M2: the aggregator hands everybody all adverts; from here H1 stands. */
#include "protocol/attempt.h"

static void number_u1(struct attempt *a)
{
    uint32_t index = 0;

    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        if (a->members[i].u1)
            a->members[i].index = ++index;
    }
}

/* Four distinct keys for any two sites; a repeated key would be a site in two places. */
static int check_distinct(const struct attempt *a, struct error *err)
{
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *x = &a->members[i];
        if (x->u1 && memcmp(x->channel_public, x->mask_public, AGREE_SIZE) == 0)
            return error_set(err, ERR_INTEGRITY, "M2: site %s uses one key twice", x->id);
        for (uint32_t j = 0; x->u1 && j < i; j++) {
            const struct member *y = &a->members[j];
            if (y->u1 && (memcmp(x->channel_public, y->channel_public, AGREE_SIZE) == 0 ||
                          memcmp(x->channel_public, y->mask_public, AGREE_SIZE) == 0 ||
                          memcmp(x->mask_public, y->channel_public, AGREE_SIZE) == 0 ||
                          memcmp(x->mask_public, y->mask_public, AGREE_SIZE) == 0))
                return error_set(err, ERR_INTEGRITY, "M2: sites %s and %s advertise the same key", y->id, x->id);
        }
    }
    return 0;
}

int keys_close(struct secagg_server *s, struct error *err)
{
    struct attempt *a = &s->a;
    struct buffer *b = &s->broadcast[2];
    uint32_t count = 0;

    for (uint32_t i = 0; i < a->info.quorum.n; i++)
        count += a->members[i].u1 = s->members[i].answered;
    int rc = check_distinct(a, err);
    if (rc < 0)
        return rc;
    number_u1(a);
    attempt_h1(a);
    message_begin(b, 2, a->info.h0);
    buffer_u32(b, count);
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        if (!a->members[i].u1)
            continue;
        buffer_string(b, a->members[i].id);
        buffer_bytes(b, buffer_span(&a->members[i].advert));
    }
    broadcast_end(b, s->identity);
    return buffer_ok(b) ? 0 : error_set(err, ERR_RESOURCES, "no memory for M2");
}

static int read_keys(struct secagg_client *c, struct span m2, struct error *err)
{
    struct attempt *a = &c->a;
    struct reader in;
    const char *previous = "";
    int rc = broadcast_open(a, 2, a->info.h0, m2, &in, err);

    if (rc < 0)
        return rc;
    uint32_t count = reader_count(&in, a->info.quorum.n, 4 + 1 + 4);
    for (uint32_t i = 0; i < count; i++) {
        struct member *m = attempt_read_member(a, &in, &previous, 0);
        struct span advert = reader_bytes(&in, 1024);
        if (!m || in.failed)
            return error_set(err, ERR_INTEGRITY, "M2: malformed, unsorted, or an advert of a site not invited");
        if ((rc = advert_read(a, m, advert, a->now_s, err)) < 0)
            return error_prefix(err, "M2");
        if (m == c->own && !span_equal(advert, buffer_span(&c->out[1])))
            return error_set(err, ERR_INTEGRITY, "M2: this site's own advert was altered");
        if (c->witness.check && m != c->own &&
            (rc = c->witness.check(c->witness.ctx, m->id, m->ledger_sequence, m->ledger_head, err)) < 0)
            return error_prefix(err, "M2: ledger of site %s", m->id);
        m->u1 = true;
    }
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "M2: malformed");
    if (!c->own->u1)
        return error_set(err, ERR_INTEGRITY, "M2: this site's own advert was left out");
    if (count < a->info.quorum.floor)
        return error_set(err, ERR_POLICY, "M2: %u sites, the floor is %u", count, a->info.quorum.floor);
    return check_distinct(a, err);
}

int secagg_client_on_keys(struct secagg_client *c, struct span m2, struct span *ret_m3, struct error *err)
{
    int rc = client_enter(c, 2, m2, err);

    if (rc < 0)
        return rc;
    if (rc == 0) {
        rc = read_keys(c, m2, err);
        if (rc == 0) {
            number_u1(&c->a);
            attempt_h1(&c->a);
            rc = shares_make(c, err);
        }
        if ((rc = client_leave(c, 2, m2, 4, rc)) < 0)
            return rc;
    }
    *ret_m3 = buffer_span(&c->out[3]);
    return 0;
}
