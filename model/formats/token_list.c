#include "model/formats/token_list.h"

#include "base/checked.h"

void token_list_release(struct token_list *list)
{
    free(list->ids);
    free(list->learn);
    list->ids = NULL;
    list->learn = NULL;
    list->count = list->capacity = 0;
}

void token_list_clear(struct token_list *list)
{
    list->count = 0;
}

int token_list_reserve(struct token_list *list, size_t n, struct error *err)
{
    size_t wanted, capacity = list->capacity ? list->capacity : 64, bytes;
    if (!checked_add(list->count, n, &wanted) || wanted > list->max)
        return error_set(err, ERR_RESOURCES, "the text has more than %zu tokens", list->max);
    if (wanted <= list->capacity)
        return 0;
    while (capacity < wanted)
        capacity *= 2;
    if (!checked_mul(capacity, sizeof *list->ids, &bytes))
        return error_set(err, ERR_RESOURCES, "no memory for %zu tokens", wanted);
    int32_t *ids = realloc(list->ids, bytes);
    if (ids)
        list->ids = ids;
    uint8_t *learn = realloc(list->learn, capacity);
    if (learn)
        list->learn = learn;
    if (!ids || !learn)
        return error_set(err, ERR_RESOURCES, "no memory for %zu tokens", wanted);
    list->capacity = capacity;
    return 0;
}

int token_list_append(struct token_list *list, int32_t id, bool learn, struct error *err)
{
    int rc = token_list_reserve(list, 1, err);
    if (rc < 0)
        return rc;
    list->ids[list->count] = id;
    list->learn[list->count++] = learn;
    return 0;
}
