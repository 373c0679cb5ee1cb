#include "model/formats/chat.h"

#include "base/checked.h"

#define DEFAULT_SYSTEM "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

static const char *const role_names[] = {"system", "user", "assistant"};

const char *chat_role_name(enum chat_role role)
{
    assert((unsigned)role < ARRAY_LEN(role_names));
    return role_names[role];
}

bool chat_role_parse(struct span name, enum chat_role *ret_role)
{
    for (size_t i = 0; i < ARRAY_LEN(role_names); i++) {
        if (span_equal(name, span_str(role_names[i]))) {
            *ret_role = (enum chat_role)i;
            return true;
        }
    }
    return false;
}

int chat_check(const struct tokenizer *tokenizer, struct error *err)
{
    static const char *const names[] = {"<|im_start|>", "<|im_end|>"};
    for (size_t i = 0; i < ARRAY_LEN(names); i++)
        if (tokenizer_control(tokenizer, names[i]) < 0)
            return error_set(err, ERR_CONFIG,
                             "the model's vocabulary has no control token %s, which its chat format "
                             "needs; use an instruction-tuned ChatML model",
                             names[i]);
    return 0;
}

/* Appends text's ids with a learn flag. */
static int put_text(const struct tokenizer *t, struct span text, bool learn, struct token_list *list, struct error *err)
{
    const size_t before = list->count;
    int rc = tokenizer_encode(t, text, 0, list, err);
    for (size_t i = before; rc == 0 && learn && i < list->count; i++)
        list->learn[i] = 1;
    return rc;
}

static int put_control(const struct tokenizer *t, const char *name, bool learn, struct token_list *list,
                       struct error *err)
{
    return token_list_append(list, tokenizer_control(t, name), learn, err);
}

/* role, newline and content as one text, as the reference's pre-tokenizer sees them. */
static int put_joined(const struct tokenizer *t, const struct chat_message *m, struct token_list *list,
                      struct error *err)
{
    struct buffer text;
    int rc;
    buffer_init(&text, TOKENIZER_TEXT_BYTES_MAX);
    buffer_printf(&text, "%s\n", role_names[m->role]);
    buffer_append(&text, m->content.ptr, m->content.len);
    if (buffer_ok(&text))
        rc = put_text(t, buffer_span(&text), false, list, err);
    else
        rc = error_set(err, ERR_RESOURCES, "a message of %zu bytes is too long, at most %u are allowed", m->content.len,
                       TOKENIZER_TEXT_BYTES_MAX);
    buffer_release(&text);
    return rc;
}

int chat_encode_answer(const struct tokenizer *tokenizer, struct span content, struct token_list *list,
                       struct error *err)
{
    const size_t before = list->count;
    int rc = put_text(tokenizer, content, true, list, err);
    if (rc == 0)
        rc = put_control(tokenizer, "<|im_end|>", true, list, err);
    if (rc < 0)
        list->count = before;
    return rc;
}

static int put_message(const struct tokenizer *t, const struct chat_message *m, struct token_list *list,
                       struct error *err)
{
    int rc = put_control(t, "<|im_start|>", false, list, err);
    if (rc == 0 && m->role == CHAT_ASSISTANT) {
        rc = put_text(t, span_str("assistant\n"), false, list, err);
        if (rc == 0)
            rc = chat_encode_answer(t, m->content, list, err);
    } else if (rc == 0) {
        rc = put_joined(t, m, list, err);
        if (rc == 0)
            rc = put_control(t, "<|im_end|>", false, list, err);
    }
    return rc < 0 ? rc : put_text(t, span_str("\n"), false, list, err);
}

static int put_all(const struct tokenizer *t, const struct chat_options *options, const struct chat_message *messages,
                   size_t count, struct token_list *list, struct error *err)
{
    const bool own = count > 0 && messages[0].role == CHAT_SYSTEM;
    struct chat_message system = {CHAT_SYSTEM, span_str(DEFAULT_SYSTEM)};
    int rc = 0;
    if (options->system == CHAT_SYSTEM_TEXT)
        system.content = options->system_text;
    if (!own && options->system != CHAT_SYSTEM_NONE)
        rc = put_message(t, &system, list, err);
    for (size_t i = 0; rc == 0 && i < count; i++) {
        if (i > 0 && messages[i].role == CHAT_SYSTEM)
            return error_set(err, ERR_CONFIG, "message %zu is a system message; only the first may be one", i + 1);
        rc = put_message(t, &messages[i], list, err);
    }
    if (rc == 0 && options->generation_prompt) {
        rc = put_control(t, "<|im_start|>", false, list, err);
        if (rc == 0)
            rc = put_text(t, span_str("assistant\n"), false, list, err);
    }
    return rc;
}

int chat_encode(const struct tokenizer *tokenizer, const struct chat_options *options,
                const struct chat_message *messages, size_t count, struct token_list *list, struct error *err)
{
    const size_t before = list->count;
    int rc = chat_check(tokenizer, err);
    if (rc == 0)
        rc = put_all(tokenizer, options, messages, count, list, err);
    if (rc < 0)
        list->count = before;
    return rc;
}
