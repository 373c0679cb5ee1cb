/*
 * Growing lists of token ids and of learn flags (struct batch_example's). Zero one but for max. A list belongs to one
 * thread at a time.
 *
 *     struct token_list list = {.max = 4096};
 *     if (token_list_append(&list, id, false, err) < 0) ...
 *     token_list_release(&list);
 */
#ifndef FORMATS_TOKEN_LIST_H
#define FORMATS_TOKEN_LIST_H

#include "base/error.h"

struct token_list {
    int32_t *ids;   /* owned */
    uint8_t *learn; /* owned: 1 where the token is to be predicted, 0 elsewhere */
    size_t count, capacity;
    size_t max; /* tokens; more is refused */
};
void token_list_release(struct token_list *list); /* accepts zeroed */
void token_list_clear(struct token_list *list);   /* count = 0, memory kept */
int MUST_USE token_list_append(struct token_list *list, int32_t id, bool learn, struct error *err);
/* Makes room for n more, which the caller then writes. ERR_RESOURCES past max. */
int MUST_USE token_list_reserve(struct token_list *list, size_t n, struct error *err);

#endif
