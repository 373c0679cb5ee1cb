/* M7: one signature on one H3, recorded before it exists. */
#include "protocol/attempt.h"

int consistency_sign(struct secagg_client *c, struct error *err)
{
    const struct secagg_info *info = &c->a.info;
    struct buffer *b = &c->out[7];
    uint8_t signature[SIGN_SIZE];
    int rc = c->log.record(c->log.ctx, RECORD_SURVIVORS, info->job, info->round, info->attempt,
                           span_of(c->a.h3, HASH_SIZE), err);

    if (rc < 0)
        return rc;
    message_begin(b, 7, c->a.h3);
    stage_sign(7, c->own->id, c->a.h3, span_of(NULL, 0), c->identity, signature);
    buffer_append(b, signature, SIGN_SIZE);
    return buffer_ok(b) ? 0 : error_set(err, ERR_RESOURCES, "no memory for M7");
}

int consistency_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err)
{
    struct reader in;
    const uint8_t *signature = NULL;
    int rc = message_open(7, s->a.h3, message, &in, &signature, err);

    if (rc < 0)
        return rc;
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "M7 of site %s is malformed", s->a.members[i].id);
    if ((rc = stage_verify(7, &s->a.members[i], s->a.h3, span_of(NULL, 0), signature, err)) < 0)
        return rc;
    memcpy(s->members[i].signature_h3, signature, SIGN_SIZE);
    return 0;
}
