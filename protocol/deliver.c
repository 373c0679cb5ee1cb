/* M4: each site gets the shares dealt to it and the signed digests of all dealers; from here H2 stands. */
#include "protocol/attempt.h"

static void write_delivery(struct secagg_server *s, uint32_t to, uint32_t dealers)
{
    struct attempt *a = &s->a;
    struct buffer *b = &s->members[to].deliver;
    uint32_t holders = attempt_count_u1(a);
    uint8_t path[MERKLE_DEPTH_MAX][HASH_SIZE];

    message_begin(b, 4, a->h1);
    buffer_u32(b, dealers);
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *from = &a->members[i];
        const struct server_member *m = &s->members[i];
        if (!from->u2)
            continue;
        size_t len = merkle_path((const uint8_t(*)[HASH_SIZE])m->leaves, holders, a->members[to].index - 1, path);
        buffer_string(b, from->id);
        buffer_append(b, from->share_root, HASH_SIZE);
        buffer_append(b, from->share_signature, SIGN_SIZE);
        buffer_bytes(b, span_of(m->sealed.data + (size_t)to * SHARE_SEALED_BYTES, i == to ? 0 : SHARE_SEALED_BYTES));
        buffer_append(b, m->hash_b[to], HASH_SIZE);
        buffer_append(b, m->hash_s[to], HASH_SIZE);
        buffer_bytes(b, span_of(path, len * HASH_SIZE));
    }
    broadcast_end(b, s->identity);
}

int deliver_close(struct secagg_server *s, struct error *err)
{
    struct attempt *a = &s->a;
    uint32_t dealers = 0;

    for (uint32_t i = 0; i < a->info.quorum.n; i++)
        dealers += a->members[i].u2 = s->members[i].answered;
    attempt_h2(a);
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        if (!a->members[i].u2)
            continue;
        write_delivery(s, i, dealers);
        if (!buffer_ok(&s->members[i].deliver))
            return error_set(err, ERR_RESOURCES, "no memory for M4");
    }
    return 0;
}

static int open_share(struct secagg_client *c, const struct member *from, struct span box, const uint8_t *hash_b,
                      const uint8_t *hash_s, struct error *err)
{
    struct client_secrets *k = c->secret;
    uint8_t aad[HASH_SIZE + 2 * SITE_ID_SIZE], got[HASH_SIZE];
    uint32_t at = (uint32_t)(from - c->a.members), index;
    const uint8_t *b = k->scratch + 2 * SITE_ID_SIZE + 4, *s = b + SHAMIR_SIZE;

    if (box.len != SHARE_SEALED_BYTES)
        return error_set(err, ERR_INTEGRITY, "M4: the share of site %s is malformed", from->id);
    if (agree_shared(k->channel.secret, from->channel_public, k->shared) < 0)
        return error_set(err, ERR_INTEGRITY, "site %s advertises a low-order key", from->id);
    share_channel_key(&c->a, k->shared, from->id, c->own->id, k->key);
    share_aad(&c->a, from->id, c->own->id, aad);
    if (open_once(k->key, span_of(aad, sizeof aad), box, k->scratch) < 0)
        return error_set(err, ERR_INTEGRITY, "M4: the share of site %s does not open: altered or redirected", from->id);
    memcpy(&index, k->scratch + 2 * SITE_ID_SIZE, sizeof index);
    if (memcmp(k->scratch, aad + HASH_SIZE, 2 * (size_t)SITE_ID_SIZE) != 0 || index != c->own->index)
        return error_set(err, ERR_INTEGRITY, "M4: site %s dealt a share with wrong ids or index", from->id);
    share_hash("b", from->id, c->own->id, b, got);
    bool bad = memcmp(got, hash_b, HASH_SIZE) != 0;
    share_hash("s", from->id, c->own->id, s, got);
    bad = bad || memcmp(got, hash_s, HASH_SIZE) != 0 || !shamir_is_canonical(b) || !shamir_is_canonical(s);
    if (bad)
        return error_set(err, ERR_INTEGRITY, "M4: site %s dealt a share that is not the one it signed", from->id);
    memcpy(k->held_b[at], b, SHAMIR_SIZE);
    memcpy(k->held_s[at], s, SHAMIR_SIZE);
    return 0;
}

static int read_dealer(struct secagg_client *c, struct reader *in, const char **previous, uint32_t holders,
                       struct error *err)
{
    struct attempt *a = &c->a;
    struct member *from = attempt_read_member(a, in, previous, 1);
    uint8_t root[HASH_SIZE], signature[SIGN_SIZE], hash_b[HASH_SIZE], hash_s[HASH_SIZE], leaf[HASH_SIZE];
    int rc;

    reader_copy(in, root, sizeof root);
    reader_copy(in, signature, sizeof signature);
    struct span box = reader_bytes(in, SHARE_SEALED_BYTES);
    reader_copy(in, hash_b, sizeof hash_b);
    reader_copy(in, hash_s, sizeof hash_s);
    struct span path = reader_bytes(in, MERKLE_DEPTH_MAX * HASH_SIZE);
    if (!from || in->failed || path.len % HASH_SIZE)
        return error_set(err, ERR_INTEGRITY, "M4: malformed, unsorted, or a dealer that did not advertise");
    if ((rc = stage_verify(3, from, a->h1, span_of(root, HASH_SIZE), signature, err)) < 0)
        return error_prefix(err, "M4");
    if (from == c->own && memcmp(root, from->share_root, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "M4: this site's own digest was altered");
    share_leaf(c->own->id, box, hash_b, hash_s, leaf);
    if (!merkle_verify(leaf, c->own->index - 1, holders, (const uint8_t(*)[HASH_SIZE])path.ptr, path.len / HASH_SIZE,
                       root))
        return error_set(err, ERR_INTEGRITY, "M4: the share of site %s is not under its signed digest", from->id);
    if (from != c->own && (rc = open_share(c, from, box, hash_b, hash_s, err)) < 0)
        return rc;
    memcpy(from->share_root, root, HASH_SIZE);
    from->u2 = true;
    return 0;
}

static int read_delivery(struct secagg_client *c, struct span m4, struct error *err)
{
    struct attempt *a = &c->a;
    struct reader in;
    const char *previous = "";
    uint32_t holders = attempt_count_u1(a);
    int rc = broadcast_open(a, 4, a->h1, m4, &in, err);

    if (rc < 0)
        return rc;
    uint32_t count = reader_count(&in, holders, 4 + 1 + HASH_SIZE * 3 + SIGN_SIZE + 8);
    for (uint32_t i = 0; i < count; i++) {
        if ((rc = read_dealer(c, &in, &previous, holders, err)) < 0)
            return rc;
    }
    if (!reader_done(&in) || !c->own->u2)
        return error_set(err, ERR_INTEGRITY, "M4: malformed, or this site was left out");
    if (count < a->info.quorum.floor)
        return error_set(err, ERR_POLICY, "M4: %u sites, the floor is %u", count, a->info.quorum.floor);
    return 0;
}

int secagg_client_on_deliver(struct secagg_client *c, struct span m4, struct error *err)
{
    int rc = client_enter(c, 4, m4, err);

    if (rc != 0)
        return rc < 0 ? rc : 0;
    rc = read_delivery(c, m4, err);
    if (rc == 0)
        attempt_h2(&c->a);
    secret_wipe(c->secret->scratch, sizeof c->secret->scratch);
    return client_leave(c, 4, m4, 5, rc);
}
