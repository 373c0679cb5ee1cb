#include "model/formats/chat.h"

#include "base/checked.h"
#include "model/formats/chat_templates.h"
#include "model/formats/utf8.h"

#define EMPTY_THOUGHTS "<think>\n\n</think>\n\n"

static const char *const role_names[] = {"system", "user", "assistant"};

/* One conversation on its way into a list. */
struct encoding {
    const struct tokenizer *tokenizer;
    const struct chat_template *template;
    struct token_list *list;
    struct buffer text; /* reused for texts that are put together */
    struct error *err;
};

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
    if (chat_template_of(tokenizer))
        return 0;
    return error_set(err, ERR_CONFIG,
                     "the model's vocabulary has the control tokens of no known chat format (ChatML's <|im_start|> and "
                     "<|im_end|>, or those of Llama 3, Gemma 3 or GLM-4); use an instruction-tuned model");
}

const char *chat_template_name(const struct tokenizer *tokenizer)
{
    const struct chat_template *template = chat_template_of(tokenizer);
    return template ? template->name : NULL;
}

/* ---- texts ---- */

/* White space as Jinja's trim sees it, which is Python's str.isspace(). */
static bool is_blank(uint32_t c)
{
    return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

static struct span trimmed(struct span text)
{
    uint32_t c = 0;
    int len;
    while (text.len > 0 && (len = utf8_char(text.ptr, text.len, &c)) > 0 && is_blank(c))
        text = span_of(text.ptr + len, text.len - (size_t)len);
    while (text.len > 0) {
        size_t last = text.len - 1;
        while (last > 0 && text.len - last < 4 && (text.ptr[last] & 0xc0) == 0x80)
            last--;
        len = utf8_char(text.ptr + last, text.len - last, &c);
        if (len != (int)(text.len - last) || !is_blank(c))
            break;
        text.len = last;
    }
    return text;
}

static struct span without_newlines(struct span text, bool first, bool last)
{
    while (first && text.len > 0 && text.ptr[0] == '\n')
        text = span_of(text.ptr + 1, text.len - 1);
    while (last && text.len > 0 && text.ptr[text.len - 1] == '\n')
        text.len--;
    return text;
}

/* The places of part in text; NULL if it is not there. */
static const uint8_t *find_first(struct span text, const char *part)
{
    return text.len > 0 ? memmem(text.ptr, text.len, part, strlen(part)) : NULL;
}

static const uint8_t *find_last(struct span text, const char *part)
{
    const uint8_t *found = NULL, *next;
    while ((next = find_first(text, part))) {
        found = next;
        text = span_of(next + 1, text.len - (size_t)(next + 1 - text.ptr));
    }
    return found;
}

/* Qwen3's split of a content with </think> in it into thoughts and answer. */
static void split_thoughts(struct span content, struct span *ret_thoughts, struct span *ret_answer)
{
    const uint8_t *first = find_first(content, "</think>"), *last = find_last(content, "</think>");
    *ret_thoughts = (struct span){0};
    *ret_answer = content;
    if (!first)
        return;
    struct span thoughts = span_of(content.ptr, (size_t)(first - content.ptr));
    const uint8_t *begin = find_last(thoughts, "<think>");
    if (begin)
        thoughts = span_of(begin + 7, (size_t)(first - begin) - 7);
    *ret_thoughts = without_newlines(thoughts, true, true);
    *ret_answer = without_newlines(span_of(last + 8, content.len - (size_t)(last + 8 - content.ptr)), true, false);
}

/* ---- parts ---- */

static int put_text(struct encoding *e, struct span text, bool learn)
{
    const size_t before = e->list->count;
    int rc = tokenizer_encode(e->tokenizer, text, 0, e->list, e->err);
    for (size_t i = before; rc == 0 && learn && i < e->list->count; i++)
        e->list->learn[i] = 1;
    return rc;
}

/* name may be NULL: nothing. */
static int put_control(struct encoding *e, const char *name, bool learn)
{
    return name ? token_list_append(e->list, tokenizer_control(e->tokenizer, name), learn, e->err) : 0;
}

static int put_begin(struct encoding *e)
{
    int rc = put_control(e, e->template->begin[0], false);
    return rc < 0 ? rc : put_control(e, e->template->begin[1], false);
}

/* A message's head and `content` as one text, as the reference's pre-tokenizer sees them; between them `prefix` and an
 * empty line, unless NULL. */
static int put_head(struct encoding *e, enum chat_role role, const struct span *prefix, struct span content,
                    bool learn_open)
{
    const struct chat_template *c = e->template;
    int rc = put_control(e, c->role_tokens ? c->roles[role] : c->open, learn_open);
    buffer_clear(&e->text);
    if (!c->role_tokens)
        buffer_printf(&e->text, "%s", c->roles[role]);
    if (rc == 0 && c->close) {
        rc = put_text(e, buffer_span(&e->text), false);
        buffer_clear(&e->text);
        if (rc == 0)
            rc = put_control(e, c->close, false);
    }
    buffer_printf(&e->text, "%s", c->gap);
    if (prefix) {
        if (prefix->len > 0)
            buffer_append(&e->text, prefix->ptr, prefix->len);
        buffer_printf(&e->text, "\n\n");
    }
    if (content.len > 0)
        buffer_append(&e->text, content.ptr, content.len);
    if (rc == 0 && !buffer_ok(&e->text))
        rc = error_set(e->err, ERR_RESOURCES, "a message of %zu bytes is too long, at most %u are allowed", content.len,
                       TOKENIZER_TEXT_BYTES_MAX);
    return rc < 0 ? rc : put_text(e, buffer_span(&e->text), false);
}

/* What follows the last answer's head: thoughts, answer, end. ask: the part before it that is not learnt. */
static int put_thinking(struct encoding *e, struct span content, bool ask)
{
    struct span thoughts, answer;
    int rc = 0;
    split_thoughts(content, &thoughts, &answer);
    answer = without_newlines(answer, true, false);
    if (thoughts.len > 0) {
        buffer_clear(&e->text);
        buffer_printf(&e->text, "<think>\n");
        buffer_append(&e->text, thoughts.ptr, thoughts.len);
        buffer_printf(&e->text, "\n</think>\n\n");
        if (!buffer_ok(&e->text))
            return error_set(e->err, ERR_RESOURCES, "a message of %zu bytes is too long", content.len);
        rc = put_text(e, buffer_span(&e->text), true);
    } else if (ask) {
        rc = put_text(e, span_str(EMPTY_THOUGHTS), false);
    }
    return rc < 0 ? rc : put_text(e, answer, true);
}

/* The token that ends an answer, and `after`. follows: the next message brings that token. */
static int put_tail(struct encoding *e, bool learn, bool follows)
{
    const struct chat_template *c = e->template;
    int rc = put_control(e, c->end, learn);
    if (rc == 0 && learn && !c->end && !follows)
        rc = put_control(e, c->next, true);
    return rc < 0 ? rc : put_text(e, span_str(c->after), false);
}

/* ---- conversations ---- */

/* Where the last question stands, as Qwen3's template looks for it (answers of tools do not count); count if none. */
static size_t last_question(const struct chat_message *messages, size_t count)
{
    for (size_t i = count; i-- > 0;) {
        const struct span c = messages[i].content, open = span_str("<tool_response>"),
                          close = span_str("</tool_response>");
        const bool tool = c.len >= close.len && memcmp(c.ptr, open.ptr, open.len) == 0 &&
                          memcmp(c.ptr + c.len - close.len, close.ptr, close.len) == 0;
        if (messages[i].role == CHAT_USER && !tool)
            return i;
    }
    return count;
}

static int put_answer(struct encoding *e, const struct chat_message *messages, size_t count, size_t i)
{
    struct span content = messages[i].content, thoughts;
    int rc = put_head(e, CHAT_ASSISTANT, NULL, (struct span){0}, false);
    if (rc < 0)
        return rc;
    if (e->template->trims)
        content = trimmed(content);
    if (!e->template->thinks)
        return put_text(e, content, true);
    const size_t question = last_question(messages, count);
    split_thoughts(content, &thoughts, &content);
    if (question < i && (i + 1 == count || thoughts.len > 0))
        return put_thinking(e, messages[i].content, true);
    return put_text(e, content, true);
}

static int put_message(struct encoding *e, const struct chat_message *messages, size_t count, size_t i,
                       const struct span *prefix, bool asked)
{
    const struct chat_message *m = &messages[i];
    int rc;
    if (m->role == CHAT_ASSISTANT) {
        rc = put_answer(e, messages, count, i);
        return rc < 0 ? rc : put_tail(e, true, i + 1 < count || asked);
    }
    const bool ends_answer = !e->template->end && m->role == CHAT_USER && i > 0 && m[-1].role == CHAT_ASSISTANT;
    rc = put_head(e, m->role, prefix, e->template->trims ? trimmed(m->content) : m->content, ends_answer);
    return rc < 0 ? rc : put_tail(e, false, true);
}

static int check_order(const struct encoding *e, const struct chat_message *messages, size_t count)
{
    const size_t first = count > 0 && messages[0].role == CHAT_SYSTEM;
    for (size_t i = first; i < count; i++) {
        if (messages[i].role == CHAT_SYSTEM)
            return error_set(e->err, ERR_CONFIG, "message %zu is a system message; only the first may be one", i + 1);
        if (e->template->system_joins_user && (messages[i].role == CHAT_USER) != ((i - first) % 2 == 0))
            return error_set(e->err, ERR_CONFIG,
                             "message %zu is out of turn: this model's chat format needs questions and answers to "
                             "alternate, a question first",
                             i + 1);
    }
    return 0;
}

static int put_all(struct encoding *e, const struct chat_options *options, const struct chat_message *messages,
                   size_t count)
{
    const struct chat_template *c = e->template;
    const bool own = count > 0 && messages[0].role == CHAT_SYSTEM;
    struct chat_message system = {.role = CHAT_SYSTEM};
    bool has_system = own;
    const struct span *prefix = NULL;
    if (own) {
        system = messages[0];
    } else if (options->system == CHAT_SYSTEM_TEXT) {
        system.content = options->system_text;
        has_system = true;
    } else if (options->system == CHAT_SYSTEM_DEFAULT && c->default_system) {
        system.content = span_str(c->default_system);
        has_system = true;
    }
    int rc = check_order(e, messages, count);
    if (rc == 0)
        rc = put_begin(e);
    if (rc == 0 && has_system && !c->system_joins_user)
        rc = put_message(e, &system, 1, 0, NULL, true);
    else if (has_system)
        prefix = &system.content;
    for (size_t i = own; rc == 0 && i < count; i++) {
        rc = put_message(e, messages, count, i, prefix, options->generation_prompt);
        prefix = NULL;
    }
    if (rc == 0 && options->generation_prompt)
        rc = put_head(e, CHAT_ASSISTANT, NULL, (struct span){0}, false);
    if (rc == 0 && options->generation_prompt && c->thinks)
        rc = put_text(e, span_str(EMPTY_THOUGHTS), false);
    return rc;
}

static int begin(struct encoding *e, const struct tokenizer *tokenizer, struct token_list *list, struct error *err)
{
    *e = (struct encoding){tokenizer, chat_template_of(tokenizer), list, {0}, err};
    buffer_init(&e->text, TOKENIZER_TEXT_BYTES_MAX);
    return e->template ? 0 : chat_check(tokenizer, err);
}

int chat_encode(const struct tokenizer *tokenizer, const struct chat_options *options,
                const struct chat_message *messages, size_t count, struct token_list *list, struct error *err)
{
    struct encoding e;
    const size_t before = list->count;
    int rc = begin(&e, tokenizer, list, err);
    if (rc == 0)
        rc = put_all(&e, options, messages, count);
    if (rc < 0)
        list->count = before;
    buffer_release(&e.text);
    return rc;
}

int chat_encode_answer(const struct tokenizer *tokenizer, struct span content, struct token_list *list,
                       struct error *err)
{
    struct encoding e;
    const size_t before = list->count;
    int rc = begin(&e, tokenizer, list, err);
    if (rc == 0 && e.template->thinks)
        rc = put_thinking(&e, content, false);
    else if (rc == 0)
        rc = put_text(&e, e.template->trims ? trimmed(content) : content, true);
    if (rc == 0)
        rc = put_control(&e, e.template->end ? e.template->end : e.template->next, true);
    if (rc < 0)
        list->count = before;
    buffer_release(&e.text);
    return rc;
}
