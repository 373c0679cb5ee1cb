/* Size arithmetic that cannot wrap: true and *ret written, or false on overflow and *ret untouched. */
#ifndef BASE_CHECKED_H
#define BASE_CHECKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline bool checked_add(size_t a, size_t b, size_t *ret)
{
    size_t sum;
    if (__builtin_add_overflow(a, b, &sum))
        return false;
    *ret = sum;
    return true;
}

static inline bool checked_mul(size_t a, size_t b, size_t *ret)
{
    size_t product;
    if (__builtin_mul_overflow(a, b, &product))
        return false;
    *ret = product;
    return true;
}

/* Rounds n up to a multiple of alignment, a power of two. */
static inline bool checked_align(size_t n, size_t alignment, size_t *ret)
{
    size_t sum;
    if (!checked_add(n, alignment - 1, &sum))
        return false;
    *ret = sum & ~(alignment - 1);
    return true;
}

#endif
