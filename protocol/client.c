/* The site's attempt: order, replays, end of life. The stages are in their own files. */
#include "protocol/attempt.h"

#include <stdlib.h>

static void forget(struct secagg_client *c)
{
    secret_free(c->secret);
    c->secret = NULL;
    buffer_wipe_release(&c->out[9]);
}

void secagg_client_free(struct secagg_client *c)
{
    if (!c)
        return;
    forget(c);
    for (int i = 0; i < STAGES; i++)
        buffer_release(&c->out[i]);
    attempt_release(&c->a);
    free(c);
}

const struct secagg_info *secagg_client_info(const struct secagg_client *c)
{
    return &c->a.info;
}

int client_enter(struct secagg_client *c, int stage, struct span input, struct error *err)
{
    uint8_t hash[HASH_SIZE];

    if (c->dead)
        return error_set(err, ERR_FAILED, "this attempt is dead: an earlier check failed");
    if (c->seen[stage]) {
        hash_bytes(input, hash);
        if (memcmp(hash, c->input_hash[stage], HASH_SIZE) == 0)
            return 1;
        c->dead = true;
        forget(c);
        return error_set(err, ERR_INTEGRITY,
                         "a second, different M%d in the same attempt: the aggregator equivocates, attempt abandoned",
                         stage);
    }
    if (c->next != stage)
        return error_set(err, ERR_FAILED, "M%d out of order, stage %d comes next", stage, c->next);
    return 0;
}

int client_leave(struct secagg_client *c, int stage, struct span input, int next, int rc)
{
    if (rc < 0) {
        c->dead = true;
        forget(c);
        return rc;
    }
    c->seen[stage] = true;
    hash_bytes(input, c->input_hash[stage]);
    c->next = next;
    return 0;
}
