#include "node/serve/slot.h"

void slot_init(struct slot *slot)
{
    pthread_mutex_init(&slot->lock, NULL);
    slot->current = NULL;
}

void slot_release(struct slot *slot)
{
    slot_put(slot, NULL);
    pthread_mutex_destroy(&slot->lock);
}

struct served_adapter *slot_take(struct slot *slot)
{
    struct served_adapter *a;

    pthread_mutex_lock(&slot->lock);
    a = slot->current;
    if (a)
        a->references++;
    pthread_mutex_unlock(&slot->lock);
    return a;
}

void slot_put(struct slot *slot, struct served_adapter *a)
{
    struct served_adapter *old;

    pthread_mutex_lock(&slot->lock);
    old = slot->current;
    slot->current = a;
    pthread_mutex_unlock(&slot->lock);
    served_adapter_drop(old);
}

void served_adapter_drop(struct served_adapter *a)
{
    if (a && atomic_fetch_sub(&a->references, 1) == 1) {
        lora_release(&a->lora);
        free(a);
    }
}
