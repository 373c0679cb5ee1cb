/* M3: each site deals shares of its two secrets to every holder, sealed, under one signed Merkle root. */
#include "protocol/attempt.h"

#include <stdlib.h>

void share_hash(const char *kind, const char *from, const char *to, const uint8_t share[SHAMIR_SIZE],
                uint8_t out[HASH_SIZE])
{
    const struct span parts[] = {span_str(kind), span_str(from), span_str(to), span_of(share, SHAMIR_SIZE)};

    hash_labelled("consilium/share", parts, ARRAY_LEN(parts), out);
}

void share_leaf(const char *to, struct span sealed, const uint8_t hash_b[HASH_SIZE], const uint8_t hash_s[HASH_SIZE],
                uint8_t out[HASH_SIZE])
{
    uint8_t claim[HASH_SIZE];
    const struct span parts[] = {span_str(to), sealed, span_of(hash_b, HASH_SIZE), span_of(hash_s, HASH_SIZE)};

    hash_labelled("consilium/share-leaf", parts, ARRAY_LEN(parts), claim);
    merkle_leaf(span_of(claim, HASH_SIZE), out);
}

void share_channel_key(const struct attempt *a, const uint8_t shared[AGREE_SIZE], const char *from, const char *to,
                       uint8_t out[SEAL_KEY_SIZE])
{
    const struct span parts[] = {span_str(from), span_str(to)};

    hkdf_labelled(span_of(shared, AGREE_SIZE), span_of(a->h1, HASH_SIZE), "consilium/share-channel", parts,
                  ARRAY_LEN(parts), out, SEAL_KEY_SIZE);
}

static void put_id(uint8_t out[SITE_ID_SIZE], const char *id)
{
    memset(out, 0, SITE_ID_SIZE);
    memcpy(out, id, strlen(id));
}

void share_aad(const struct attempt *a, const char *from, const char *to, uint8_t out[HASH_SIZE + 2 * SITE_ID_SIZE])
{
    memcpy(out, a->h1, HASH_SIZE);
    put_id(out + HASH_SIZE, from);
    put_id(out + HASH_SIZE + SITE_ID_SIZE, to);
}

static int seal_share(struct secagg_client *c, uint32_t slot, const struct member *to, uint8_t sealed[],
                      struct error *err)
{
    struct client_secrets *k = c->secret;
    uint8_t aad[HASH_SIZE + 2 * SITE_ID_SIZE];
    uint32_t index = to->index;

    if (agree_shared(k->channel.secret, to->channel_public, k->shared) < 0)
        return error_set(err, ERR_INTEGRITY, "site %s advertises a low-order key", to->id);
    share_channel_key(&c->a, k->shared, c->own->id, to->id, k->key);
    put_id(k->scratch, c->own->id);
    put_id(k->scratch + SITE_ID_SIZE, to->id);
    memcpy(k->scratch + 2 * SITE_ID_SIZE, &index, sizeof index);
    memcpy(k->scratch + 2 * SITE_ID_SIZE + 4, k->dealt_b[slot], SHAMIR_SIZE);
    memcpy(k->scratch + 2 * SITE_ID_SIZE + 4 + SHAMIR_SIZE, k->dealt_s[slot], SHAMIR_SIZE);
    share_aad(&c->a, c->own->id, to->id, aad);
    seal_once(k->key, span_of(aad, sizeof aad), span_of(k->scratch, sizeof k->scratch), sealed);
    return 0;
}

int shares_make(struct secagg_client *c, struct error *err)
{
    struct attempt *a = &c->a;
    struct client_secrets *k = c->secret;
    uint32_t holders = attempt_count_u1(a), slot = 0;
    struct buffer *b = &c->out[3];
    struct merkle tree;
    uint8_t signature[SIGN_SIZE];
    int rc;

    if ((rc = shamir_split(k->b, a->info.quorum.t, holders, c->rng, k->dealt_b, err)) < 0 ||
        (rc = shamir_split(k->s, a->info.quorum.t, holders, c->rng, k->dealt_s, err)) < 0)
        return rc;
    merkle_init(&tree);
    message_begin(b, 3, a->h1);
    buffer_u32(b, holders);
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *to = &a->members[i];
        uint8_t sealed[SHARE_SEALED_BYTES], hash_b[HASH_SIZE], hash_s[HASH_SIZE], leaf[HASH_SIZE];
        struct span box = span_of(sealed, to == c->own ? 0 : sizeof sealed);
        if (!to->u1)
            continue;
        if (to == c->own) { /* one's own share is held, not sent */
            memcpy(k->held_b[i], k->dealt_b[slot], SHAMIR_SIZE);
            memcpy(k->held_s[i], k->dealt_s[slot], SHAMIR_SIZE);
        } else if ((rc = seal_share(c, slot, to, sealed, err)) < 0) {
            return rc;
        }
        share_hash("b", c->own->id, to->id, k->dealt_b[slot], hash_b);
        share_hash("s", c->own->id, to->id, k->dealt_s[slot], hash_s);
        share_leaf(to->id, box, hash_b, hash_s, leaf);
        merkle_add_leaf(&tree, leaf);
        buffer_bytes(b, box);
        buffer_append(b, hash_b, HASH_SIZE);
        buffer_append(b, hash_s, HASH_SIZE);
        slot++;
    }
    secret_wipe(k->dealt_b, sizeof k->dealt_b);
    secret_wipe(k->dealt_s, sizeof k->dealt_s);
    secret_wipe(k->scratch, sizeof k->scratch);
    merkle_root(&tree, c->own->share_root);
    stage_sign(3, c->own->id, a->h1, span_of(c->own->share_root, HASH_SIZE), c->identity, signature);
    buffer_append(b, signature, SIGN_SIZE);
    return buffer_ok(b) ? 0 : error_set(err, ERR_RESOURCES, "no memory for M3");
}

static int room_for_shares(struct server_member *m, uint32_t n, struct error *err)
{
    if (m->hash_b)
        return 0;
    buffer_init(&m->sealed, (size_t)n * SHARE_SEALED_BYTES);
    m->hash_b = calloc(n, sizeof *m->hash_b);
    m->hash_s = calloc(n, sizeof *m->hash_s);
    m->leaves = calloc(n, sizeof *m->leaves);
    uint8_t *boxes = buffer_extend(&m->sealed, (size_t)n * SHARE_SEALED_BYTES);
    if (!m->hash_b || !m->hash_s || !m->leaves || !boxes)
        return error_set(err, ERR_RESOURCES, "no memory for shares");
    memset(boxes, 0, (size_t)n * SHARE_SEALED_BYTES);
    return 0;
}

int shares_receive(struct secagg_server *s, uint32_t at, struct span message, struct error *err)
{
    struct attempt *a = &s->a;
    struct member *from = &a->members[at];
    struct server_member *m = &s->members[at];
    struct reader in;
    const uint8_t *signature = NULL;
    struct merkle tree;
    uint8_t root[HASH_SIZE];
    uint32_t holders = attempt_count_u1(a), slot = 0;
    int rc;

    if ((rc = message_open(3, a->h1, message, &in, &signature, err)) < 0 ||
        (rc = room_for_shares(m, a->info.quorum.n, err)) < 0)
        return rc;
    if (reader_u32(&in) != holders)
        return error_set(err, ERR_INTEGRITY, "M3 of site %s: shares for another number of holders", from->id);
    merkle_init(&tree);
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *to = &a->members[i];
        if (!to->u1)
            continue;
        struct span box = reader_bytes(&in, SHARE_SEALED_BYTES);
        reader_copy(&in, m->hash_b[i], HASH_SIZE);
        reader_copy(&in, m->hash_s[i], HASH_SIZE);
        if (in.failed || box.len != (i == at ? 0 : SHARE_SEALED_BYTES))
            return error_set(err, ERR_INTEGRITY, "M3 of site %s is malformed", from->id);
        if (box.len)
            memcpy(m->sealed.data + (size_t)i * SHARE_SEALED_BYTES, box.ptr, box.len);
        share_leaf(to->id, box, m->hash_b[i], m->hash_s[i], m->leaves[slot]);
        merkle_add_leaf(&tree, m->leaves[slot++]);
    }
    merkle_root(&tree, root);
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "M3 of site %s: bytes after its end", from->id);
    if ((rc = stage_verify(3, from, a->h1, span_of(root, HASH_SIZE), signature, err)) < 0)
        return rc;
    memcpy(from->share_root, root, HASH_SIZE);
    memcpy(from->share_signature, signature, SIGN_SIZE);
    return 0;
}
