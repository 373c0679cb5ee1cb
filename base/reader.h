/*
 * Reads the canonical encoding (base/buffer.h) from untrusted bytes.
 *
 * Sticky: after a short read every further read gives zero or an empty span and r->failed stays true, so a parser reads
 * all its fields and checks once. reader_done also refuses trailing bytes: an encoding has one form only.
 *
 *     struct reader r = reader_of(message);
 *     round = reader_u32(&r);
 *     name = reader_bytes(&r, 255);
 *     if (!reader_done(&r)) return error_set(err, ERR_INTEGRITY, ...);
 */
#ifndef BASE_READER_H
#define BASE_READER_H

#include "base/span.h"

struct reader {
    struct span rest;
    bool failed;
};

static inline struct reader reader_of(struct span s)
{
    return (struct reader){s, false};
}

uint8_t reader_u8(struct reader *r);
uint16_t reader_u16(struct reader *r);
uint32_t reader_u32(struct reader *r);
uint64_t reader_u64(struct reader *r);
double reader_f64(struct reader *r);
struct span reader_take(struct reader *r, size_t n);     /* exactly n raw bytes, borrowed */
void reader_copy(struct reader *r, void *out, size_t n); /* exactly n raw bytes; zeroes on failure */
struct span reader_bytes(struct reader *r, size_t max);  /* u32 length ≤ max, then bytes */
/* A string of 1 to size−1 bytes without NUL or control bytes, copied with a NUL; "" and failed otherwise. */
void reader_string(struct reader *r, char *out, size_t size);
/* A u32 count ≤ max whose elements of at least element_bytes_min fit in what is left; 0 and failed otherwise. */
uint32_t reader_count(struct reader *r, uint32_t max, size_t element_bytes_min);

static inline bool reader_done(const struct reader *r)
{
    return !r->failed && r->rest.len == 0;
}

#endif
