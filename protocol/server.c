/* The aggregator's attempt: which stage, who answered, what comes next. The stages are in their own files. */
#include "protocol/attempt.h"

#include <stdlib.h>

void secagg_server_free(struct secagg_server *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; s->members && i < s->a.info.quorum.n; i++) {
        struct server_member *m = &s->members[i];
        buffer_release(&m->sealed);
        buffer_release(&m->deliver);
        free(m->hash_b);
        free(m->hash_s);
        free(m->leaves);
        secret_free(m->shares);
    }
    free(s->members);
    for (int i = 0; i < STAGES; i++)
        buffer_release(&s->broadcast[i]);
    free(s->sum);
    attempt_release(&s->a);
    free(s);
}

struct model_segment secagg_server_segment(const struct secagg_server *s)
{
    return (struct model_segment){s->a.info.offset, s->a.info.words};
}

enum secagg_stage secagg_server_stage(const struct secagg_server *s)
{
    return s->stage;
}

const struct quorum *secagg_server_quorum(const struct secagg_server *s)
{
    return &s->a.info.quorum;
}

/* Whose answer does the stage being collected take? */
static bool takes(const struct secagg_server *s, const struct member *m)
{
    switch (s->stage) {
    case STAGE_ADVERTISE:
        return true;
    case STAGE_SHARES:
        return m->u1;
    case STAGE_MASKED:
        return m->u2;
    case STAGE_CONSISTENCY:
    case STAGE_UNMASK:
    case STAGE_RESULT:
        return m->u3;
    default:
        return false;
    }
}

static const struct member *find(const struct secagg_server *s, const char *site)
{
    return attempt_find((struct attempt *)&s->a, site);
}

struct span secagg_server_broadcast(const struct secagg_server *s, const char *site)
{
    const struct member *m = find(s, site);

    if (!m || s->stage == STAGE_DEAD || !takes(s, m))
        return span_of(NULL, 0);
    if (s->stage == STAGE_MASKED)
        return buffer_span(&s->members[m - s->a.members].deliver);
    return buffer_span(&s->broadcast[s->stage == STAGE_RESULT ? 10 : (int)s->stage - 1]);
}

bool secagg_server_waits_for(const struct secagg_server *s, const char *site)
{
    const struct member *m = find(s, site);

    return m && s->stage < STAGE_RESULT && takes(s, m) && !s->members[m - s->a.members].answered;
}

int secagg_server_receive(struct secagg_server *s, const char *site, struct span message, struct error *err)
{
    struct member *m = attempt_find(&s->a, site);
    int stage = message.len ? message.ptr[0] : 0, rc;
    uint8_t hash[HASH_SIZE];

    if (!m)
        return error_set(err, ERR_POLICY, "site %s is not in this attempt", site);
    uint32_t i = (uint32_t)(m - s->a.members);
    if (stage >= STAGES || stage % 2 == 0)
        return error_set(err, ERR_INTEGRITY, "site %s sent no message of a stage", site);
    hash_bytes(message, hash);
    if (s->members[i].answer_seen[stage])
        return memcmp(hash, s->members[i].answer_hash[stage], HASH_SIZE) == 0
                   ? 0
                   : error_set(err, ERR_INTEGRITY, "site %s sent a second, different M%d", site, stage);
    if ((int)s->stage != stage || !takes(s, m))
        return error_set(err, ERR_AGAIN, "M%d of site %s came out of its time and is discarded", stage, site);
    switch (s->stage) {
    case STAGE_ADVERTISE:
        rc = advertise_receive(s, i, message, err);
        break;
    case STAGE_SHARES:
        rc = shares_receive(s, i, message, err);
        break;
    case STAGE_MASKED:
        rc = masked_receive(s, i, message, err);
        break;
    case STAGE_CONSISTENCY:
        rc = consistency_receive(s, i, message, err);
        break;
    default:
        rc = unmask_receive(s, i, message, err);
        break;
    }
    if (rc < 0)
        return rc;
    s->members[i].answer_seen[stage] = true;
    memcpy(s->members[i].answer_hash[stage], hash, HASH_SIZE);
    if (s->stage != STAGE_MASKED) /* there the vector itself counts */
        s->members[i].answered = true;
    return 0;
}

uint32_t secagg_server_needed(const struct secagg_server *s)
{
    const struct quorum *q = &s->a.info.quorum;

    return s->stage == STAGE_CONSISTENCY || s->stage == STAGE_UNMASK ? q->t : q->floor;
}

uint32_t secagg_server_answered(const struct secagg_server *s)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < s->a.info.quorum.n; i++)
        count += s->members[i].answered;
    return count;
}

bool secagg_server_complete(const struct secagg_server *s)
{
    for (uint32_t i = 0; i < s->a.info.quorum.n; i++) {
        if (takes(s, &s->a.members[i]) && !s->members[i].answered)
            return false;
    }
    return s->stage < STAGE_RESULT;
}

int secagg_server_close_stage(struct secagg_server *s, struct error *err)
{
    enum secagg_stage next;
    int rc;

    if (s->stage >= STAGE_RESULT)
        return error_set(err, ERR_FAILED, "the attempt has no stage to close");
    if (secagg_server_answered(s) < secagg_server_needed(s))
        return error_set(err, ERR_AGAIN, "M%d: %u sites answered, %u are needed", (int)s->stage,
                         secagg_server_answered(s), secagg_server_needed(s));
    switch (s->stage) {
    case STAGE_ADVERTISE:
        rc = keys_close(s, err);
        next = STAGE_SHARES;
        break;
    case STAGE_SHARES:
        rc = deliver_close(s, err);
        next = STAGE_MASKED;
        break;
    case STAGE_MASKED:
        rc = survivors_close(s, err);
        next = STAGE_CONSISTENCY;
        break;
    case STAGE_CONSISTENCY:
        rc = quorum_close(s, err);
        next = STAGE_UNMASK;
        break;
    default:
        rc = unmask_close(s, err);
        next = STAGE_RESULT;
        break;
    }
    s->stage = rc < 0 ? STAGE_DEAD : next;
    for (uint32_t i = 0; i < s->a.info.quorum.n; i++)
        s->members[i].answered = false;
    return rc;
}

const uint32_t *secagg_server_sum(const struct secagg_server *s)
{
    return s->stage == STAGE_RESULT ? s->sum : NULL;
}

uint32_t secagg_server_survivors(const struct secagg_server *s)
{
    return s->a.info.survivors;
}

bool secagg_server_is_survivor(const struct secagg_server *s, const char *site)
{
    const struct member *m = find(s, site);

    return m && m->u3;
}

uint32_t secagg_server_dropouts_recovered(const struct secagg_server *s)
{
    return s->a.info.survivors ? attempt_count_u2(&s->a) - s->a.info.survivors : 0;
}
