/* Strict UTF-8 (RFC 3629): no surrogates, no overlong forms, nothing past U+10FFFF. Pure functions. */
#ifndef FORMATS_UTF8_H
#define FORMATS_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of the character at p (n ≥ 1 bytes there): 1 to 4 and *ret_char written; 0 if the bytes are a character's
 * beginning that the end cuts off; −1 if they cannot be one. */
static inline int utf8_char(const uint8_t *p, size_t n, uint32_t *ret_char)
{
    const uint8_t first = p[0];
    if (first < 0x80) {
        *ret_char = first;
        return 1;
    }
    const int len = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4)
        return -1;
    uint32_t c = first & (0x7fu >> len);
    for (int i = 1; i < len; i++) {
        if ((size_t)i >= n)
            return 0;
        /* The second byte's range excludes overlong forms, surrogates and what lies past U+10FFFF. */
        uint8_t low = 0x80, high = 0xbf;
        if (i == 1 && first == 0xe0)
            low = 0xa0;
        if (i == 1 && first == 0xed)
            high = 0x9f;
        if (i == 1 && first == 0xf0)
            low = 0x90;
        if (i == 1 && first == 0xf4)
            high = 0x8f;
        if (p[i] < low || p[i] > high)
            return -1;
        c = c << 6 | (p[i] & 0x3fu);
    }
    *ret_char = c;
    return len;
}

static inline bool utf8_valid(const uint8_t *p, size_t n)
{
    uint32_t c;
    while (n > 0) {
        int len = utf8_char(p, n, &c);
        if (len <= 0)
            return false;
        p += len;
        n -= (size_t)len;
    }
    return true;
}

#endif
