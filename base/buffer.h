/*
 * A growable byte buffer with a maximum, and the canonical encoding's writer.
 *
 * Integers are little-endian. Appends after a failure do nothing: check b->failed (or buffer_ok) once at the end.
 *
 *     struct buffer b;
 *     buffer_init(&b, 64 << 10);
 *     buffer_u32(&b, round);
 *     buffer_bytes(&b, span_of(name, name_len));
 *     if (!buffer_ok(&b)) ...
 *     buffer_release(&b);
 */
#ifndef BASE_BUFFER_H
#define BASE_BUFFER_H

#include "base/error.h"
#include "base/span.h"

struct buffer {
    uint8_t *data; /* owned; NULL while empty */
    size_t len;
    size_t capacity;
    size_t max;  /* bytes; an append past it fails */
    bool failed; /* the maximum was reached or memory ran out; sticky */
};

void buffer_init(struct buffer *b, size_t max);
void buffer_release(struct buffer *b);              /* accepts NULL and zeroed */
void buffer_wipe_release(struct buffer *b);         /* the same for secrets: overwritten first */
void buffer_clear(struct buffer *b);                /* len = 0, failed = false, memory kept */
uint8_t *buffer_extend(struct buffer *b, size_t n); /* n more bytes, uninitialised; NULL when failed */

void buffer_append(struct buffer *b, const void *data, size_t len); /* raw */
void buffer_u8(struct buffer *b, uint8_t v);
void buffer_u16(struct buffer *b, uint16_t v);
void buffer_u32(struct buffer *b, uint32_t v);
void buffer_u64(struct buffer *b, uint64_t v);
void buffer_f64(struct buffer *b, double v);                                     /* IEEE bits as u64 */
void buffer_bytes(struct buffer *b, struct span s);                              /* u32 length, then the bytes */
void buffer_string(struct buffer *b, const char *text);                          /* as buffer_bytes, no NUL */
void buffer_printf(struct buffer *b, const char *format, ...) PRINTF_LIKE(2, 3); /* text, no NUL counted */

static inline bool buffer_ok(const struct buffer *b)
{
    return !b->failed;
}

static inline struct span buffer_span(const struct buffer *b)
{
    return span_of(b->data, b->len);
}

#endif
