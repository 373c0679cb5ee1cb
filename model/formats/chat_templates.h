/*
 * The table of chat templates, and the choice among them. Internal to chat.c.
 *
 * A conversation is: begin, then of each message head, content and tail. The head is the control token `open`, the
 * role's name, the control token `close` and the text `gap`; with role_tokens the role's name is the control token
 * itself. A NULL is left out.
 */
#ifndef FORMATS_CHAT_TEMPLATES_H
#define FORMATS_CHAT_TEMPLATES_H

#include "model/formats/chat.h"

struct chat_template {
    const char *name;
    const char *begin[2]; /* control tokens */
    const char *open, *close;
    const char *roles[3]; /* by enum chat_role */
    const char *gap;
    const char *end;   /* control token that ends a message; NULL: the next one's first token does */
    const char *after; /* text after it */
    const char *next;  /* what ends an answer where `end` is NULL */
    const char *default_system;
    bool role_tokens;
    bool trims;             /* white space around contents is cut off */
    bool system_joins_user; /* the system text and an empty line stand before the first question */
    bool thinks;            /* a block of thinking before the last answer */
};

/* NULL if the vocabulary has the tokens of none. */
const struct chat_template *chat_template_of(const struct tokenizer *tokenizer);

#endif
