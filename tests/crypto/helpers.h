/* What the tests of crypto/ share: cmocka and hexadecimal vectors. */
#ifndef TESTS_CRYPTO_HELPERS_H
#define TESTS_CRYPTO_HELPERS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/hex.h"
#include "crypto/random.h"

/* Decodes text into out and returns the number of bytes. */
static inline size_t from_hex(const char *text, uint8_t *out)
{
    size_t len = strlen(text) / 2;
    assert_int_equal(hex_decode(text, out, len), 0);
    return len;
}

static inline void assert_hex(const uint8_t *data, const char *expected)
{
    uint8_t bytes[512];
    size_t len = from_hex(expected, bytes);
    assert_memory_equal(data, bytes, len);
}

/* A stream of fixed seed, so that a failure repeats. */
static inline struct rng fixed_rng(struct random_stream *s, uint8_t seed)
{
    uint8_t key[RANDOM_SEED_SIZE] = {0};
    key[0] = seed;
    random_stream_init(s, key, "test");
    return random_stream_rng(s);
}

#endif
