/* M6: whose vectors are in the sum, with every signed root; from here H3 stands. */
#include "protocol/attempt.h"

int survivors_close(struct secagg_server *s, struct error *err)
{
    struct attempt *a = &s->a;
    struct buffer *b = &s->broadcast[6];
    uint32_t count = 0;

    for (uint32_t i = 0; i < a->info.quorum.n; i++)
        count += a->members[i].u3 = s->members[i].added;
    a->info.survivors = count;
    attempt_h3(a);
    message_begin(b, 6, a->h2);
    buffer_u32(b, count);
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *m = &a->members[i];
        if (!m->u3)
            continue;
        buffer_string(b, m->id);
        buffer_append(b, m->vector_root, HASH_SIZE);
        buffer_append(b, m->vector_signature, SIGN_SIZE);
    }
    broadcast_end(b, s->identity);
    return buffer_ok(b) ? 0 : error_set(err, ERR_RESOURCES, "no memory for M6");
}

static int read_survivors(struct secagg_client *c, struct span m6, struct error *err)
{
    struct attempt *a = &c->a;
    struct reader in;
    const char *previous = "";
    int rc = broadcast_open(a, 6, a->h2, m6, &in, err);

    if (rc < 0)
        return rc;
    uint32_t count = reader_count(&in, a->info.quorum.n, 4 + 1 + HASH_SIZE + SIGN_SIZE);
    for (uint32_t i = 0; i < count; i++) {
        struct member *m = attempt_read_member(a, &in, &previous, 2);
        uint8_t root[HASH_SIZE], signature[SIGN_SIZE];
        reader_copy(&in, root, sizeof root);
        reader_copy(&in, signature, sizeof signature);
        if (!m || in.failed)
            return error_set(err, ERR_INTEGRITY,
                             "M6: malformed, unsorted, repeated, or a survivor that dealt no shares");
        if ((rc = stage_verify(5, m, a->h2, span_of(root, HASH_SIZE), signature, err)) < 0)
            return error_prefix(err, "M6: fabricated survivor");
        if (m == c->own && memcmp(root, m->vector_root, HASH_SIZE) != 0)
            return error_set(err, ERR_INTEGRITY, "M6: this site's own root was altered");
        memcpy(m->vector_root, root, HASH_SIZE);
        m->u3 = true;
    }
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "M6: malformed");
    if (!c->own->u3)
        return error_set(err, ERR_INTEGRITY, "M6: this site is not among the survivors");
    if (count < a->info.quorum.floor)
        return error_set(err, ERR_POLICY, "M6: %u survivors, the floor is %u", count, a->info.quorum.floor);
    a->info.survivors = count;
    return 0;
}

int secagg_client_on_survivors(struct secagg_client *c, struct span m6, struct span *ret_m7, struct error *err)
{
    int rc = client_enter(c, 6, m6, err);

    if (rc < 0)
        return rc;
    if (rc == 0) {
        rc = read_survivors(c, m6, err);
        if (rc == 0)
            attempt_h3(&c->a);
        if (rc == 0)
            rc = consistency_sign(c, err);
        if ((rc = client_leave(c, 6, m6, 8, rc)) < 0)
            return rc;
    }
    *ret_m7 = buffer_span(&c->out[7]);
    return 0;
}
