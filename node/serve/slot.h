/*
 * The adapter in use, swapped without disturbing who is answering with the old one: a counted reference behind a lock.
 *
 * Thread-safe. An adapter is immutable once in the slot.
 *
 *     struct served_adapter *a = slot_take(slot);   // NULL: the base model
 *     ... answer with a ? &a->lora : NULL ...
 *     served_adapter_drop(a);
 */
#ifndef NODE_SERVE_SLOT_H
#define NODE_SERVE_SLOT_H

#include "crypto/hash.h"
#include "model/lora.h"
#include "protocol/roster.h"

#include <pthread.h>
#include <stdatomic.h>

#define SLOT_SYSTEM_SIZE 2048 /* as long as a plan's text may be */

struct served_adapter {
    _Atomic int references;
    struct lora lora;
    char job[SITE_ID_SIZE];
    uint32_t version; /* the round that made it */
    char sha256[2 * HASH_SIZE + 1];
    char system_message[SLOT_SYSTEM_SIZE]; /* what the job trained with: "default", "none" or the text; "" is "default"
                                            */
};

struct slot {
    pthread_mutex_t lock;
    struct served_adapter *current; /* NULL: the base model */
};

void slot_init(struct slot *slot);
void slot_release(struct slot *slot);
/* A reference to the current one, or NULL; drop it after use. */
struct served_adapter *slot_take(struct slot *slot);
/* Takes over one reference of a (NULL: back to the base model); the old one goes when its last user drops it. */
void slot_put(struct slot *slot, struct served_adapter *a);
void served_adapter_drop(struct served_adapter *a); /* accepts NULL */

#endif
