/* M8: the proof that a quorum of survivors signed the same H3; only then is a mask opened. */
#include "protocol/attempt.h"

int quorum_close(struct secagg_server *s, struct error *err)
{
    struct buffer *b = &s->broadcast[8];

    message_begin(b, 8, s->a.h3);
    buffer_u32(b, secagg_server_answered(s));
    for (uint32_t i = 0; i < s->a.info.quorum.n; i++) {
        if (!s->members[i].answered)
            continue;
        buffer_string(b, s->a.members[i].id);
        buffer_append(b, s->members[i].signature_h3, SIGN_SIZE);
    }
    broadcast_end(b, s->identity);
    return buffer_ok(b) ? 0 : error_set(err, ERR_RESOURCES, "no memory for M8");
}

static int read_quorum(struct secagg_client *c, struct span m8, struct error *err)
{
    struct attempt *a = &c->a;
    struct reader in;
    const char *previous = "";
    int rc = broadcast_open(a, 8, a->h3, m8, &in, err);

    if (rc < 0)
        return rc;
    uint32_t count = reader_count(&in, a->info.quorum.n, 4 + 1 + SIGN_SIZE);
    for (uint32_t i = 0; i < count; i++) {
        struct member *m = attempt_read_member(a, &in, &previous, 3);
        uint8_t signature[SIGN_SIZE];
        reader_copy(&in, signature, sizeof signature);
        if (!m || in.failed)
            return error_set(err, ERR_INTEGRITY, "M8: malformed, repeated, or a signer who is no survivor");
        if ((rc = stage_verify(7, m, a->h3, span_of(NULL, 0), signature, err)) < 0)
            return error_prefix(err, "M8");
    }
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "M8: malformed");
    if (count < a->info.quorum.t)
        return error_set(err, ERR_POLICY, "M8: %u signatures on the survivors, the quorum is %u", count,
                         a->info.quorum.t);
    return 0;
}

int secagg_client_on_quorum(struct secagg_client *c, struct span m8, struct span *ret_m9, struct error *err)
{
    int rc = client_enter(c, 8, m8, err);

    if (rc < 0)
        return rc;
    if (rc == 0) {
        rc = read_quorum(c, m8, err);
        if (rc == 0)
            rc = unmask_answer(c, err);
        if ((rc = client_leave(c, 8, m8, 10, rc)) < 0)
            return rc;
    }
    *ret_m9 = buffer_span(&c->out[9]);
    return 0;
}
