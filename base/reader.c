#include "base/reader.h"

struct span reader_take(struct reader *r, size_t n)
{
    struct span s;

    if (r->failed || n > r->rest.len) {
        r->failed = true;
        return span_of(NULL, 0);
    }
    s = span_of(r->rest.ptr, n);
    r->rest.ptr += n;
    r->rest.len -= n;
    return s;
}

void reader_copy(struct reader *r, void *out, size_t n)
{
    struct span s = reader_take(r, n);

    if (s.len == n && n > 0)
        memcpy(out, s.ptr, n);
    else
        memset(out, 0, n);
}

static uint64_t little_endian(struct reader *r, size_t n)
{
    struct span s = reader_take(r, n);
    uint64_t v = 0;

    for (size_t i = 0; i < s.len; i++)
        v |= (uint64_t)s.ptr[i] << (8 * i);
    return v;
}

uint8_t reader_u8(struct reader *r)
{
    return (uint8_t)little_endian(r, 1);
}

uint16_t reader_u16(struct reader *r)
{
    return (uint16_t)little_endian(r, 2);
}

uint32_t reader_u32(struct reader *r)
{
    return (uint32_t)little_endian(r, 4);
}

uint64_t reader_u64(struct reader *r)
{
    return little_endian(r, 8);
}

double reader_f64(struct reader *r)
{
    uint64_t bits = reader_u64(r);
    double v;

    memcpy(&v, &bits, 8);
    return v;
}

struct span reader_bytes(struct reader *r, size_t max)
{
    uint32_t len = reader_u32(r);

    if (len > max) {
        r->failed = true;
        return span_of(NULL, 0);
    }
    return reader_take(r, len);
}

void reader_string(struct reader *r, char *out, size_t size)
{
    struct span s = reader_bytes(r, size - 1);

    out[0] = 0;
    if (r->failed || s.len == 0) {
        r->failed = true;
        return;
    }
    for (size_t i = 0; i < s.len; i++) {
        if (s.ptr[i] < 0x20 || s.ptr[i] == 0x7f) {
            r->failed = true;
            return;
        }
    }
    memcpy(out, s.ptr, s.len);
    out[s.len] = 0;
}

uint32_t reader_count(struct reader *r, uint32_t max, size_t element_bytes_min)
{
    uint32_t n = reader_u32(r);

    if (r->failed || n > max || (element_bytes_min > 0 && n > r->rest.len / element_bytes_min)) {
        r->failed = true;
        return 0;
    }
    return n;
}
