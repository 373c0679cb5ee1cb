/*
 * Chat templates, built in: ChatML as SmolLM2 uses it. A file's own (Jinja) template is never run.
 *
 *     <|im_start|>system\n...<|im_end|>\n<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n
 *
 * Contents are encoded without control tokens: a message cannot open another one. The learn flags mark what the model
 * is to predict: each assistant's content and the <|im_end|> after it. An assistant's content is encoded apart from its
 * prefix, so that training sees exactly the boundary that generation starts from; all other ids equal the reference
 * template's (they can differ only where an assistant's content begins with two or more blanks).
 *
 *     struct chat_message messages[] = {{CHAT_USER, span_str("Which chapter?")}};
 *     struct chat_options options = {.system = CHAT_SYSTEM_NONE, .generation_prompt = true};
 *     if (chat_encode(tokenizer, &options, messages, 1, &list, err) < 0) ...
 */
#ifndef FORMATS_CHAT_H
#define FORMATS_CHAT_H

#include "model/formats/tokenizer.h"

enum chat_role { CHAT_SYSTEM, CHAT_USER, CHAT_ASSISTANT };

/* What stands first when the messages bring no system message of their own. */
enum chat_system {
    CHAT_SYSTEM_DEFAULT, /* SmolLM2's: "You are a helpful AI assistant named SmolLM, trained by Hugging Face" */
    CHAT_SYSTEM_NONE,    /* nothing: fewer tokens a record */
    CHAT_SYSTEM_TEXT,    /* options.system_text */
};

struct chat_message {
    enum chat_role role;
    struct span content; /* UTF-8, borrowed */
};

struct chat_options {
    enum chat_system system;
    struct span system_text;
    bool generation_prompt; /* end with <|im_start|>assistant\n */
};

bool MUST_USE chat_role_parse(struct span name, enum chat_role *ret_role); /* "system", "user", "assistant" */
const char *chat_role_name(enum chat_role role);

/* ERR_CONFIG if the vocabulary lacks ChatML's tokens. */
int MUST_USE chat_check(const struct tokenizer *tokenizer, struct error *err);

/* Appends the ids and learn flags. A system message is accepted in first place only (ERR_CONFIG). ERR_RESOURCES past
 * list->max. On failure the list keeps what it had. */
int MUST_USE chat_encode(const struct tokenizer *tokenizer, const struct chat_options *options,
                         const struct chat_message *messages, size_t count, struct token_list *list, struct error *err);

/* Appends the ids of an assistant's answer as chat_encode has them after the generation prompt: content, <|im_end|>. */
int MUST_USE chat_encode_answer(const struct tokenizer *tokenizer, struct span content, struct token_list *list,
                                struct error *err);

#endif
