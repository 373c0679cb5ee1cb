#include "model/formats/tokenizer_nfc.h"

#include "base/checked.h"
#include "model/formats/utf8.h"

#include <utf8proc.h>

/* Below it every character begins anew: none has a combining class or combines with what is before it. */
#define FIRST_COMBINING 0x300
#define DECOMPOSED_MAX 8 /* code points of one character; canonical decompositions have 4 at most */
#define OPTIONS (UTF8PROC_STABLE | UTF8PROC_COMPOSE)

/* Code points of one stretch that may combine. */
struct stretch {
    utf8proc_int32_t *points, *spare; /* owned, (capacity) */
    size_t count, capacity;
};

bool tokenizer_is_nfc(struct span text)
{
    for (size_t i = 0; i < text.len; i++)
        if (text.ptr[i] >= 0xcc) /* the first byte of U+0300 and of all after it */
            return false;
    return true;
}

static int reserve(struct stretch *s, struct error *err)
{
    size_t bytes;
    if (s->count + DECOMPOSED_MAX <= s->capacity)
        return 0;
    const size_t capacity = s->capacity ? 2 * s->capacity : 256;
    utf8proc_int32_t *points = NULL, *spare = NULL;
    if (checked_mul(capacity, sizeof *points, &bytes)) {
        if ((points = realloc(s->points, bytes)))
            s->points = points;
        if ((spare = realloc(s->spare, bytes)))
            s->spare = spare;
    }
    if (!points || !spare)
        return error_set(err, ERR_RESOURCES, "no memory to normalise %zu characters", s->count);
    s->capacity = capacity;
    return 0;
}

static int add(struct stretch *s, uint32_t c, struct error *err)
{
    int boundary = 0;
    int rc = reserve(s, err);
    if (rc < 0)
        return rc;
    const utf8proc_ssize_t n =
        utf8proc_decompose_char((utf8proc_int32_t)c, s->points + s->count, DECOMPOSED_MAX, OPTIONS, &boundary);
    if (n > 0 && n <= DECOMPOSED_MAX)
        s->count += (size_t)n;
    else /* no valid character is refused */
        s->points[s->count++] = (utf8proc_int32_t)c;
    return 0;
}

static int class_of(utf8proc_int32_t c)
{
    return utf8proc_get_property(c)->combining_class & 0xff;
}

/* Puts the marks points[from .. to) in the order of their classes, those of one class as they were. */
static void order_marks(struct stretch *s, size_t from, size_t to)
{
    size_t first[257] = {0};
    for (size_t i = from; i < to; i++)
        first[class_of(s->points[i]) + 1]++;
    for (int class = 0; class < 256; class ++)
        first[class + 1] += first[class];
    for (size_t i = from; i < to; i++)
        s->spare[first[class_of(s->points[i])]++] = s->points[i];
    memcpy(s->points + from, s->spare, (to - from) * sizeof *s->points);
}

static void flush(struct stretch *s, struct buffer *out)
{
    uint8_t bytes[4];
    for (size_t i = 0, end; i < s->count; i = end + 1) {
        for (end = i; end < s->count && class_of(s->points[end]) != 0; end++)
            ;
        if (end > i + 1)
            order_marks(s, i, end);
    }
    const utf8proc_ssize_t left = utf8proc_normalize_utf32(s->points, (utf8proc_ssize_t)s->count, OPTIONS);
    for (utf8proc_ssize_t i = 0; i < left; i++)
        buffer_append(out, bytes, (size_t)utf8proc_encode_char(s->points[i], bytes));
    s->count = 0;
}

int tokenizer_compose(struct span text, struct buffer *out, struct error *err)
{
    struct stretch s = {0};
    int rc = 0;
    buffer_clear(out);
    for (size_t at = 0; rc == 0 && at < text.len;) {
        uint32_t c = 0;
        const int len = utf8_char(text.ptr + at, text.len - at, &c);
        if (len <= 0 || c < FIRST_COMBINING)
            flush(&s, out);
        if (len <= 0)
            buffer_u8(out, text.ptr[at]);
        else
            rc = add(&s, c, err);
        at += len > 0 ? (size_t)len : 1;
    }
    flush(&s, out);
    free(s.points);
    free(s.spare);
    if (rc == 0 && !buffer_ok(out))
        rc = error_set(err, ERR_RESOURCES, "no memory to normalise %zu bytes", text.len);
    return rc;
}
