/* The end of the process where going on would release something unprotected: no randomness, a cipher that failed. Used
 * instead of assert because release builds keep it. */
#ifndef CRYPTO_FATAL_H
#define CRYPTO_FATAL_H

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>

static inline _Noreturn void fatal(const char *what)
{
    fprintf(stderr, "fatal: %s\n", what);
    abort();
}

/* libsodium's own once: it picks the fastest code for this processor and opens its random source. Any thread. */
static inline void sodium_ready(void)
{
    if (sodium_init() < 0)
        fatal("libsodium cannot be initialised (no source of randomness?)");
}

#endif
