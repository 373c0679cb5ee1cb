#include "base/buffer.h"

#include "base/checked.h"

void buffer_init(struct buffer *b, size_t max)
{
    *b = (struct buffer){.max = max};
}

void buffer_release(struct buffer *b)
{
    if (!b)
        return;
    free(b->data);
    *b = (struct buffer){.max = b->max};
}

void buffer_wipe_release(struct buffer *b)
{
    if (b && b->data)
        explicit_bzero(b->data, b->capacity);
    buffer_release(b);
}

void buffer_clear(struct buffer *b)
{
    b->len = 0;
    b->failed = false;
}

static bool grow(struct buffer *b, size_t need)
{
    size_t capacity = b->capacity ? b->capacity : 256;
    uint8_t *data;

    if (need > b->max)
        return false;
    while (capacity < need)
        capacity = capacity > b->max / 2 ? b->max : capacity * 2;
    if (capacity > b->max)
        capacity = b->max;
    /* Not realloc: a wiped buffer must leave no copy of a secret behind. */
    data = malloc(capacity);
    if (!data)
        return false;
    if (b->data) {
        memcpy(data, b->data, b->len);
        explicit_bzero(b->data, b->capacity);
        free(b->data);
    }
    b->data = data;
    b->capacity = capacity;
    return true;
}

uint8_t *buffer_extend(struct buffer *b, size_t n)
{
    size_t need;
    uint8_t *at;

    if (b->failed || !checked_add(b->len, n, &need) || (need > b->capacity && !grow(b, need))) {
        b->failed = true;
        return NULL;
    }
    at = b->data + b->len;
    b->len = need;
    return at;
}

void buffer_append(struct buffer *b, const void *data, size_t len)
{
    uint8_t *at;

    if (len == 0)
        return;
    at = buffer_extend(b, len);
    if (at)
        memcpy(at, data, len);
}

void buffer_u8(struct buffer *b, uint8_t v)
{
    buffer_append(b, &v, 1);
}

void buffer_u16(struct buffer *b, uint16_t v)
{
    uint8_t bytes[2] = {(uint8_t)v, (uint8_t)(v >> 8)};
    buffer_append(b, bytes, 2);
}

void buffer_u32(struct buffer *b, uint32_t v)
{
    uint8_t bytes[4];
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(v >> (8 * i));
    buffer_append(b, bytes, 4);
}

void buffer_u64(struct buffer *b, uint64_t v)
{
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(v >> (8 * i));
    buffer_append(b, bytes, 8);
}

void buffer_f64(struct buffer *b, double v)
{
    uint64_t bits;
    memcpy(&bits, &v, 8);
    buffer_u64(b, bits);
}

void buffer_bytes(struct buffer *b, struct span s)
{
    if (s.len > UINT32_MAX) {
        b->failed = true;
        return;
    }
    buffer_u32(b, (uint32_t)s.len);
    buffer_append(b, s.ptr, s.len);
}

void buffer_string(struct buffer *b, const char *text)
{
    buffer_bytes(b, span_str(text));
}

void buffer_printf(struct buffer *b, const char *format, ...)
{
    va_list args;
    int len;
    uint8_t *at;

    va_start(args, format);
    len = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (len < 0) {
        b->failed = true;
        return;
    }
    at = buffer_extend(b, (size_t)len + 1);
    if (!at)
        return;
    va_start(args, format);
    vsnprintf((char *)at, (size_t)len + 1, format, args);
    va_end(args);
    b->len--; /* the NUL stays behind the end */
}
