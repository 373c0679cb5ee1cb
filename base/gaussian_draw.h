/*
 * One exact discrete Gaussian draw from a source of uniform random words: Canonne, Kamath, Steinke, "The Discrete
 * Gaussian for Differential Privacy", 2020, algorithm 3, rejection from a discrete Laplace. Its exponentials come from
 * von Neumann's comparison of uniform reals, whose words are drawn only as far as a comparison needs them, so no
 * probability is rounded.
 *
 * C11 and CUDA C++, compiled into the file that includes it, once, after defining
 *
 *     GAUSSIAN_SOURCE           the type of a source; has members `uint32_t signs; unsigned signs_left;`, first 0
 *     GAUSSIAN_WORD(s)          the source's next 32 bits; a source that has failed may return anything
 *     GAUSSIAN_REQUIRE(s, ok)   yields ok; if not ok, the source must have failed: what it gives must not be used.
 *                               Every loop ends then, provided that words are not for ever the same pattern.
 *
 * Which words a draw takes, and in which order, is part of its meaning: the same words give the same numbers
 * everywhere.
 */
#ifndef BASE_GAUSSIAN_DRAW_H
#define BASE_GAUSSIAN_DRAW_H

#include "base/gaussian.h"

/*
 * A random real in [0, 1) is an endless sequence of words, of which only what a comparison needs is drawn. Words are 32
 * bits; tests of the tie paths compile this with 2-bit words, where ties happen all the time.
 */
#ifndef GAUSSIAN_WORD_BITS
#define GAUSSIAN_WORD_BITS 32
#endif
#define GAUSSIAN_REAL_WORDS (512 / GAUSSIAN_WORD_BITS) /* 2^-512: a comparison that needs more never happens */

/* On a device all is inlined, so that a source stays in registers; elsewhere what a tie takes is kept out of the way.
 */
#ifdef __CUDACC__
#define GAUSSIAN_FUNCTION static __device__ __forceinline__
#define GAUSSIAN_COLD static __device__ __forceinline__
#define GAUSSIAN_ROLLED _Pragma("unroll 1")
#else
#define GAUSSIAN_FUNCTION static inline
#define GAUSSIAN_COLD static __attribute__((noinline, cold))
#define GAUSSIAN_ROLLED
#endif

typedef unsigned __int128 gaussian_u128;

struct gaussian_real {
    uint32_t word[GAUSSIAN_REAL_WORDS];
    unsigned len;
};

GAUSSIAN_FUNCTION uint32_t gaussian_word(GAUSSIAN_SOURCE *s)
{
    return GAUSSIAN_WORD(s) >> (32 - GAUSSIAN_WORD_BITS);
}

GAUSSIAN_FUNCTION unsigned gaussian_sign(GAUSSIAN_SOURCE *s)
{
    if (s->signs_left == 0) {
        s->signs = gaussian_word(s);
        s->signs_left = GAUSSIAN_WORD_BITS;
    }
    unsigned bit = s->signs & 1;
    s->signs >>= 1;
    s->signs_left--;
    return bit;
}

GAUSSIAN_FUNCTION void gaussian_real_draw(GAUSSIAN_SOURCE *s, struct gaussian_real *a)
{
    a->word[0] = gaussian_word(s);
    a->len = 1;
}

/* Word i ≤ len of a, drawn now if no comparison has needed it yet. */
GAUSSIAN_FUNCTION uint32_t gaussian_real_word(GAUSSIAN_SOURCE *s, struct gaussian_real *a, unsigned i)
{
    if (i == a->len) {
        a->word[i] = gaussian_word(s);
        a->len++;
    }
    return a->word[i];
}

/* a < b, whose first words are the same; both are independent reals, so they differ. */
GAUSSIAN_COLD bool gaussian_less_tied(GAUSSIAN_SOURCE *s, struct gaussian_real *a, struct gaussian_real *b)
{
    GAUSSIAN_ROLLED
    for (unsigned i = 1; GAUSSIAN_REQUIRE(s, i < GAUSSIAN_REAL_WORDS); i++) {
        uint32_t x = gaussian_real_word(s, a, i), y = gaussian_real_word(s, b, i);
        if (x != y)
            return x < y;
    }
    return false;
}

GAUSSIAN_FUNCTION bool gaussian_less(GAUSSIAN_SOURCE *s, struct gaussian_real *a, struct gaussian_real *b)
{
    if (__builtin_expect(a->word[0] != b->word[0], 1))
        return a->word[0] < b->word[0];
    return gaussian_less_tied(s, a, b);
}

/* gaussian_descents from the comparison of `next` with `last` on, by whole reals; `count` descents came before. */
GAUSSIAN_COLD unsigned gaussian_descents_tied(GAUSSIAN_SOURCE *s, const struct gaussian_real *first, uint32_t next_word,
                                              unsigned count)
{
    struct gaussian_real pair[2];
    pair[count & 1].word[0] = next_word; /* the first word of both: they tie */
    pair[count & 1].len = 1;
    if (count == 0)
        pair[0] = *first; /* with the words that an earlier tie has drawn for it */
    pair[(count + 1) & 1].word[0] = next_word;
    pair[(count + 1) & 1].len = 1;
    GAUSSIAN_ROLLED
    while (gaussian_less(s, &pair[(count + 1) & 1], &pair[count & 1])) {
        count++;
        gaussian_real_draw(s, &pair[(count + 1) & 1]);
    }
    return count;
}

/*
 * Continues the descending sequence first > u2 > u3 … until it ascends; the number of further descents. For a first
 * real below γ and uniform, P(at least k descents, the first included) = γ^k / k! (von Neumann 1951).
 */
GAUSSIAN_FUNCTION unsigned gaussian_descents(GAUSSIAN_SOURCE *s, const struct gaussian_real *first)
{
    uint32_t last = first->word[0];
    GAUSSIAN_ROLLED
    for (unsigned count = 0;; count++) {
        uint32_t next = gaussian_word(s);
        if (__builtin_expect(next == last, 0))
            return gaussian_descents_tied(s, first, next, count);
        if (next > last)
            return count;
        last = next;
    }
}

/*
 * As gaussian_descents, for a first real that stays in use: words that a tie draws for it must not be forgotten. Its
 * first comparison is done in place, the rest without it.
 */
GAUSSIAN_FUNCTION unsigned gaussian_descents_keeping(GAUSSIAN_SOURCE *s, struct gaussian_real *first)
{
    struct gaussian_real second;
    gaussian_real_draw(s, &second);
    if (!gaussian_less(s, &second, first))
        return 0;
    return 1 + gaussian_descents(s, &second);
}

/* ⌊t·a⌋: words are drawn until the interval that a lies in, times t, holds no integer inside. */
GAUSSIAN_COLD uint64_t gaussian_scaled_by_words(GAUSSIAN_SOURCE *s, struct gaussian_real *a, uint64_t t)
{
    gaussian_u128 x = 0;
    unsigned bits = 0, i = 0;
    GAUSSIAN_ROLLED
    while (bits < 64 && (gaussian_u128)1 << bits < t) { /* at most 14 words, of 2 bits */
        x = x << GAUSSIAN_WORD_BITS | gaussian_real_word(s, a, i++);
        bits += GAUSSIAN_WORD_BITS;
    }
    gaussian_u128 product = x * t;
    uint64_t whole = (uint64_t)(product >> bits);
    gaussian_u128 left = ((gaussian_u128)1 << bits) - (product & (((gaussian_u128)1 << bits) - 1));
    GAUSSIAN_ROLLED
    while (left < t) { /* left: to the next integer, in 2^-bits; t·a may be on either side of it */
        if (!GAUSSIAN_REQUIRE(s, i < GAUSSIAN_REAL_WORDS))
            return whole;
        uint64_t w = gaussian_real_word(s, a, i++);
        left <<= GAUSSIAN_WORD_BITS;
        if ((gaussian_u128)w * t >= left)
            return whole + 1;
        left -= (gaussian_u128)w * t;
    }
    return whole;
}

GAUSSIAN_FUNCTION uint64_t gaussian_scaled(GAUSSIAN_SOURCE *s, struct gaussian_real *a, uint64_t t)
{
#if GAUSSIAN_WORD_BITS == 32 /* more than t has: one word says it all unless it is just below an integer */
    uint64_t product = a->word[0] * t;
    if (__builtin_expect(((uint64_t)1 << 32) - (uint32_t)product >= t, 1))
        return product >> 32;
#endif
    return gaussian_scaled_by_words(s, a, t);
}

/* a < numerator / denominator < 1, exactly, bit by bit of the quotient. */
GAUSSIAN_COLD bool gaussian_below_exactly(GAUSSIAN_SOURCE *s, struct gaussian_real *a, gaussian_u128 numerator,
                                          gaussian_u128 denominator)
{
    GAUSSIAN_ROLLED
    for (unsigned i = 0; GAUSSIAN_REQUIRE(s, i < GAUSSIAN_REAL_WORDS); i++) {
        uint32_t digits = 0;
        GAUSSIAN_ROLLED
        for (int b = 0; b < GAUSSIAN_WORD_BITS; b++) {
            numerator <<= 1;
            digits <<= 1;
            if (numerator >= denominator) {
                numerator -= denominator;
                digits |= 1;
            }
        }
        uint32_t w = gaussian_real_word(s, a, i);
        if (w != digits)
            return w < digits;
        if (numerator == 0)
            return false;
    }
    return false;
}

/* The same, decided by the leading bits whenever they leave no doubt. */
GAUSSIAN_FUNCTION bool gaussian_below(const struct gaussian *g, GAUSSIAN_SOURCE *s, struct gaussian_real *a,
                                      gaussian_u128 numerator)
{
    /* ≤ numerator·2^bits / 2^shift */
    gaussian_u128 scaled = (gaussian_u128)(uint64_t)(numerator >> g->shift) << GAUSSIAN_WORD_BITS;
    uint64_t w = a->word[0];
    if (((gaussian_u128)w + 1) * ((gaussian_u128)g->denominator_high + 1) <= scaled)
        return true;
    if ((gaussian_u128)w * g->denominator_high >= scaled + ((gaussian_u128)1 << GAUSSIAN_WORD_BITS))
        return false;
    return gaussian_below_exactly(s, a, numerator, g->denominator);
}

/* True with probability e^-γ, γ = numerator / denominator. */
GAUSSIAN_FUNCTION bool gaussian_bernoulli(const struct gaussian *g, GAUSSIAN_SOURCE *s, gaussian_u128 numerator)
{
    struct gaussian_real first;
    GAUSSIAN_ROLLED
    while (__builtin_expect(numerator >= g->denominator, 0)) { /* e^-γ = e^-1 · e^-(γ − 1) */
        numerator -= g->denominator;
        gaussian_real_draw(s, &first);
        if (!(gaussian_descents(s, &first) & 1)) /* the first is below 1 always: descents + 1 must be even */
            return false;
    }
    gaussian_real_draw(s, &first);
    if (!gaussian_below(g, s, &first, numerator))
        return true;
    return gaussian_descents(s, &first) & 1;
}

/*
 * One attempt at a draw: true and *ret, or false and try again. *rejected, first 0, is carried from one attempt to the
 * next. A draw takes 2.1 attempts and 7.7 words on average. Attempts, not draws, are the unit so that the threads of a
 * warp need not wait for each other's rejections.
 */
GAUSSIAN_FUNCTION bool gaussian_attempt(const struct gaussian *g, GAUSSIAN_SOURCE *s, uint32_t *rejected, int64_t *ret)
{
    /* |y| of a discrete Laplace of scale t: ⌊t·E⌋ for an exponential E, whose whole part counts the rejections of von
     * Neumann's method. */
    struct gaussian_real first;
    if (!GAUSSIAN_REQUIRE(s, *rejected < 1024))
        return false;
    gaussian_real_draw(s, &first);
    if (gaussian_descents_keeping(s, &first) & 1) {
        ++*rejected;
        return false;
    }
    uint64_t y = *rejected * g->scale + gaussian_scaled(s, &first, g->scale); /* < 1024·t */
    *rejected = 0;
    bool negative = gaussian_sign(s);
    if (negative && y == 0)
        return false;
    /* Accept with exp(−(|y| − σ²/t)² / (2σ²)) = exp(−(|y|·t − σ²)² / (2σ²t²)); |y|·t < 1024·t² < 2^63. */
    int64_t a = (int64_t)(y * g->scale) - (int64_t)g->variance;
    gaussian_u128 distance = (uint64_t)(a < 0 ? -a : a);
    if (!gaussian_bernoulli(g, s, distance * distance))
        return false;
    *ret = negative ? -(int64_t)y : (int64_t)y;
    return true;
}

#endif
