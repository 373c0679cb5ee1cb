#include "model/formats/pretokenize.h"

#include "model/formats/utf8.h"

#include <assert.h>
#include <utf8proc.h>

#define CL100K(numbers)                                                                                                \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers                                              \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

enum char_kind { CHAR_LETTER, CHAR_NUMBER, CHAR_SPACE, CHAR_OTHER, CHAR_NONE };

/* Unicode's White_Space property, which is what \s means to the reference. */
static bool white_space(uint32_t c)
{
    return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

static enum char_kind ascii_kind(uint32_t c)
{
    if ((c | 0x20) >= 'a' && (c | 0x20) <= 'z')
        return CHAR_LETTER;
    if (c >= '0' && c <= '9')
        return CHAR_NUMBER;
    return white_space(c) ? CHAR_SPACE : CHAR_OTHER;
}

static enum char_kind kind_of(uint32_t c)
{
    if (c < 0x80)
        return ascii_kind(c);
    if (white_space(c))
        return CHAR_SPACE;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return CHAR_LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return CHAR_NUMBER;
    default:
        return CHAR_OTHER;
    }
}

/* The kind of the character at `at`, and where the next one begins. */
static enum char_kind look(struct span text, size_t at, size_t *ret_next)
{
    uint32_t c;
    *ret_next = at;
    if (at >= text.len)
        return CHAR_NONE;
    int len = utf8_char(text.ptr + at, text.len - at, &c);
    *ret_next = at + (len > 0 ? (size_t)len : 1);
    return len > 0 ? kind_of(c) : CHAR_OTHER;
}

/* The end of the run of one kind that begins at `at`. */
static size_t run_end(struct span text, size_t at, enum char_kind kind)
{
    size_t next;
    while (look(text, at, &next) == kind)
        at = next;
    return at;
}

/* The length of 's 't 're 've 'm 'll 'd at `at`, or 0; in any case with `fold`. */
static size_t contraction(struct span text, size_t at, bool fold)
{
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    const struct span rest = span_of(text.ptr + at + 1, text.len - at - 1);
    if (text.ptr[at] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++) {
        const size_t len = strlen(endings[i]);
        size_t same = 0;
        while (same < len && same < rest.len && (rest.ptr[same] | (fold ? 0x20 : 0)) == endings[i][same])
            same++;
        if (same == len)
            return 1 + len;
    }
    return fold && rest.len >= 2 && memcmp(rest.ptr, "\xc5\xbf", 2) == 0 ? 3 : 0; /* U+017F */
}

/* A run of white space: whole before the end (and before a number, if numbers were cut out first); otherwise all but
 * its last character, which is left for the next word (a plain space joins what follows it). */
static size_t space_end(struct span text, size_t start, bool whole_before_number)
{
    size_t at = start, last = start, next;
    enum char_kind follower;
    while ((follower = look(text, at, &next)) == CHAR_SPACE) {
        last = at;
        at = next;
    }
    if (follower == CHAR_NONE || (follower == CHAR_NUMBER && whole_before_number))
        return at;
    return last == start ? at : last;
}

static size_t smollm(struct span text, size_t start)
{
    size_t next, after;
    const enum char_kind kind = look(text, start, &next);
    if (kind == CHAR_NUMBER)
        return next;
    if (kind == CHAR_LETTER)
        return run_end(text, next, kind);
    if (kind == CHAR_SPACE) {
        const enum char_kind follower = look(text, next, &after);
        if (text.ptr[start] == ' ' && (follower == CHAR_LETTER || follower == CHAR_OTHER))
            return run_end(text, after, follower);
        return space_end(text, start, true);
    }
    after = contraction(text, start, false);
    return after ? start + after : run_end(text, next, CHAR_OTHER);
}

static bool newline(struct span text, size_t at)
{
    return at < text.len && (text.ptr[at] == '\r' || text.ptr[at] == '\n');
}

/* A run of white space that may hold newlines: it ends behind the last of them. */
static size_t newlines_end(struct span text, size_t start)
{
    size_t end = start, next;
    for (size_t at = start; look(text, at, &next) == CHAR_SPACE; at = next)
        if (newline(text, at))
            end = next;
    return end > start ? end : space_end(text, start, false);
}

static size_t cl100k(struct span text, size_t start, int numbers)
{
    size_t next, after, end;
    enum char_kind kind = look(text, start, &next);
    if (kind == CHAR_LETTER)
        return run_end(text, next, kind);
    if (kind == CHAR_NUMBER) {
        for (int n = 1; n < numbers && look(text, next, &after) == CHAR_NUMBER; n++)
            next = after;
        return next;
    }
    if ((after = contraction(text, start, true)) > 0)
        return start + after;
    const enum char_kind follower = look(text, next, &after);
    if (follower == CHAR_LETTER && !newline(text, start))
        return run_end(text, after, follower);
    if (kind == CHAR_SPACE && (text.ptr[start] != ' ' || follower != CHAR_OTHER))
        return newlines_end(text, start);
    end = run_end(text, kind == CHAR_SPACE ? after : next, CHAR_OTHER);
    while (newline(text, end))
        end++;
    return end;
}

size_t pretokenize(enum pretokenizer p, struct span text, size_t start)
{
    assert(start < text.len);
    switch (p) {
    case PRETOKENIZE_SMOLLM:
        return smollm(text, start);
    case PRETOKENIZE_QWEN2:
        return cl100k(text, start, 1);
    case PRETOKENIZE_LLAMA3:
    case PRETOKENIZE_GLM4:
        return cl100k(text, start, 3);
    case PRETOKENIZE_NONE:
        break;
    }
    return text.len;
}

bool pretokenizer_of_name(struct span name, enum pretokenizer *ret_pretokenizer)
{
    static const struct {
        const char *name;
        enum pretokenizer pretokenizer;
    } known[] = {
        {"smollm", PRETOKENIZE_SMOLLM}, {"qwen2", PRETOKENIZE_QWEN2},      {"llama-bpe", PRETOKENIZE_LLAMA3},
        {"glm4", PRETOKENIZE_GLM4},     {"chatglm-bpe", PRETOKENIZE_GLM4},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (span_equal(name, span_str(known[i].name))) {
            *ret_pretokenizer = known[i].pretokenizer;
            return true;
        }
    }
    return false;
}

bool pretokenizer_of_pattern(struct span pattern, enum pretokenizer *ret_pretokenizer)
{
    const bool one = span_equal(pattern, span_str(CL100K("\\p{N}")));
    if (!one && !span_equal(pattern, span_str(CL100K("\\p{N}{1,3}"))))
        return false;
    *ret_pretokenizer = one ? PRETOKENIZE_QWEN2 : PRETOKENIZE_LLAMA3;
    return true;
}
