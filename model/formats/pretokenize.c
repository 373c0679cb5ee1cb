#include "model/formats/pretokenize.h"

#include "model/formats/utf8.h"

#include <assert.h>
#include <utf8proc.h>

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

/* The length of 's 't 're 've 'm 'll 'd at `at`, or 0. Lower case only, as in the reference. */
static size_t contraction(struct span text, size_t at)
{
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    const struct span rest = span_of(text.ptr + at, text.len - at);
    if (rest.ptr[0] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++) {
        size_t len = strlen(endings[i]);
        if (rest.len > len && memcmp(rest.ptr + 1, endings[i], len) == 0)
            return 1 + len;
    }
    return 0;
}

/* A run of white space: whole before a number or the end; otherwise all but its last character, which is left for the
 * next piece (a plain space joins the word after it). */
static size_t space_end(struct span text, size_t start)
{
    size_t at = start, last = start, next;
    enum char_kind follower;
    while ((follower = look(text, at, &next)) == CHAR_SPACE) {
        last = at;
        at = next;
    }
    return follower == CHAR_NONE || follower == CHAR_NUMBER || last == start ? at : last;
}

size_t pretokenize_smollm(struct span text, size_t start)
{
    size_t next, after;
    assert(start < text.len);
    const enum char_kind kind = look(text, start, &next);
    if (kind == CHAR_NUMBER)
        return next;
    if (kind == CHAR_LETTER)
        return run_end(text, next, kind);
    if (kind == CHAR_SPACE) {
        const enum char_kind follower = look(text, next, &after);
        if (text.ptr[start] == ' ' && (follower == CHAR_LETTER || follower == CHAR_OTHER))
            return run_end(text, after, follower);
        return space_end(text, start);
    }
    after = contraction(text, start);
    return after ? start + after : run_end(text, next, CHAR_OTHER);
}
