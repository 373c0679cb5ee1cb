/*
 * Chat templates, built in. A file's own (Jinja) template is never run; which of these is used follows from the control
 * tokens of the vocabulary (chat_templates.c):
 *
 * - ChatML:  <|im_start|>system\n...<|im_end|>\n<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n
 *   SmolLM2, Qwen2 and Qwen2.5 bring a default system message each. Qwen3 brings none, and the last answer is preceded
 *   by an empty block of thinking, <think>\n\n</think>\n\n, as its template has it; so is the answer that is asked for
 *   (enable_thinking=False of the reference): what was learnt from plain answers is then asked for with the very same
 *   tokens. An answer with thoughts of its own (<think>...</think> in it) is learnt with them. Where the file's
 *   template has no switch for thinking (Qwen3-Instruct-2507) there is no block.
 * - Llama 3: <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n...<|eot_id|>  without the dates that the
 *   templates of 3.1 and later put in front.
 * - Gemma 3: <bos><start_of_turn>user\n...<end_of_turn>\n<start_of_turn>model\n...<end_of_turn>\n  A system message
 * stands before the first question; questions and answers must alternate.
 * - GLM-4 (0414): [gMASK]<sop><|system|>\n...<|user|>\n...<|assistant|>\n...  Nothing ends an answer but the next
 * question's
 *   <|user|>, so that is learnt, too, and stands behind the last answer. The newline after the <|assistant|> that asks
 *   for an answer is the reference's model's to say; here it belongs to the question.
 *
 * Contents are encoded without control tokens: a message cannot open another one. The learn flags mark what the model
 * is to predict: each assistant's content and the token that ends it. An assistant's content is encoded apart from its
 * prefix, so that training sees exactly the boundary that generation starts from; all other ids equal the reference
 * template's (they can differ only where an assistant's content begins with blanks). Llama 3's and Gemma's templates
 * trim contents.
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
    CHAT_SYSTEM_DEFAULT, /* the template's own, as SmolLM2's "You are a helpful AI assistant named SmolLM, ..." */
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
    bool generation_prompt; /* end with what asks the assistant for an answer */
};

bool MUST_USE chat_role_parse(struct span name, enum chat_role *ret_role); /* "system", "user", "assistant" */
const char *chat_role_name(enum chat_role role);

/* ERR_CONFIG if the vocabulary has the tokens of none of the templates. */
int MUST_USE chat_check(const struct tokenizer *tokenizer, struct error *err);
/* The template that will be used: "SmolLM2", "Qwen2", "Qwen2.5", "Qwen3", "ChatML", "Llama 3", "Gemma 3" or "GLM-4";
 * NULL if none. */
const char *chat_template_name(const struct tokenizer *tokenizer);

/* Appends the ids and learn flags. A system message is accepted in first place only, and Gemma's turns must alternate
 * (ERR_CONFIG). ERR_RESOURCES past list->max. On failure the list keeps what it had. */
int MUST_USE chat_encode(const struct tokenizer *tokenizer, const struct chat_options *options,
                         const struct chat_message *messages, size_t count, struct token_list *list, struct error *err);

/* Appends the ids of an assistant's answer as chat_encode has them after the generation prompt: content and what ends
 * it. */
int MUST_USE chat_encode_answer(const struct tokenizer *tokenizer, struct span content, struct token_list *list,
                                struct error *err);

#endif
