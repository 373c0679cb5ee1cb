#include "privacy/sampler.h"

#include <math.h>

/*
 * A random real in [0, 1) is an endless sequence of words, of which only what a comparison needs is drawn. Words are 32
 * bits; the test of the tie paths compiles this file with 2-bit words, where ties happen all the time.
 */
#ifndef NOISE_WORD_BITS
#define NOISE_WORD_BITS 32
#endif
#define REAL_WORDS (512 / NOISE_WORD_BITS) /* 2^-512: a comparison that needs more never happens */

typedef unsigned __int128 u128;

/* In every build: noise from a source that repeats itself must never leave the process. */
static inline void require(bool ok, const char *what)
{
    if (__builtin_expect(!ok, 0)) {
        fprintf(stderr, "noise sampler: %s\n", what);
        abort();
    }
}

struct real {
    uint32_t word[REAL_WORDS];
    unsigned len;
};

static inline uint32_t next_word(struct noise *n)
{
    if (n->next == NOISE_WORDS) {
        rng_fill(n->rng, n->words, sizeof n->words);
        n->next = 0;
    }
    uint32_t v = n->words[n->next];
    n->words[n->next++] = 0; /* spent randomness does not stay in memory */
    return v >> (32 - NOISE_WORD_BITS);
}

static inline unsigned next_sign(struct noise *n)
{
    if (n->signs_left == 0) {
        n->signs = next_word(n);
        n->signs_left = NOISE_WORD_BITS;
    }
    unsigned bit = n->signs & 1;
    n->signs >>= 1;
    n->signs_left--;
    return bit;
}

static inline void real_draw(struct noise *n, struct real *a)
{
    a->word[0] = next_word(n);
    a->len = 1;
}

/* Word i of a, drawn now if no comparison has needed it yet. */
static uint32_t real_word(struct noise *n, struct real *a, unsigned i)
{
    require(i < REAL_WORDS, "the random source repeats itself");
    if (i == a->len) {
        a->word[i] = next_word(n);
        a->len++;
    }
    return a->word[i];
}

/* a < b; both are independent reals, so they differ. */
static inline bool real_less(struct noise *n, struct real *a, struct real *b)
{
    if (__builtin_expect(a->word[0] != b->word[0], 1))
        return a->word[0] < b->word[0];
    for (unsigned i = 1;; i++) {
        uint32_t x = real_word(n, a, i), y = real_word(n, b, i);
        if (x != y)
            return x < y;
    }
}

/*
 * Continues the descending sequence last > u2 > u3 … until it ascends; the number of further descents. For a first real
 * below γ and uniform, P(at least k descents, the first included) = γ^k / k! (von Neumann 1951).
 */
static inline unsigned descents(struct noise *n, const struct real *first)
{
    struct real pair[2];
    unsigned count = 0;
    uint32_t top = first->word[0];
    uint32_t w = next_word(n);
    if (__builtin_expect(w > top, 1))
        return 0;
    pair[0] = *first;
    pair[1].word[0] = w;
    pair[1].len = 1;
    while (real_less(n, &pair[(count + 1) & 1], &pair[count & 1])) {
        count++;
        real_draw(n, &pair[(count + 1) & 1]);
    }
    return count;
}

/*
 * As descents, for a first real that stays in use: words that a tie draws for it must not be forgotten. Its first
 * comparison is done in place, the rest on a copy, which is no longer compared with it.
 */
static inline unsigned descents_keeping(struct noise *n, struct real *first)
{
    struct real second;
    real_draw(n, &second);
    if (!real_less(n, &second, first))
        return 0;
    return 1 + descents(n, &second);
}

/* ⌊t·a⌋: words are drawn until the interval that a lies in, times t, holds no integer inside. */
static uint64_t real_scaled(struct noise *n, struct real *a, uint64_t t)
{
    u128 x = 0;
    unsigned bits = 0, i = 0;
    while (bits < 64 && (u128)1 << bits < t) {
        x = x << NOISE_WORD_BITS | real_word(n, a, i++);
        bits += NOISE_WORD_BITS;
    }
    u128 product = x * t;
    uint64_t whole = (uint64_t)(product >> bits);
    u128 left = ((u128)1 << bits) - (product & (((u128)1 << bits) - 1)); /* to the next integer, in 2^-bits */
    while (left < t) {                                                   /* t·a may be on either side of whole + 1 */
        uint64_t w = real_word(n, a, i++);
        left <<= NOISE_WORD_BITS;
        if ((u128)w * t >= left)
            return whole + 1;
        left -= (u128)w * t;
    }
    return whole;
}

/* a < numerator / denominator < 1, exactly, bit by bit of the quotient. */
static bool real_below_fraction_exact(struct noise *n, struct real *a, u128 numerator, u128 denominator)
{
    for (unsigned i = 0;; i++) {
        uint32_t digits = 0;
        for (int b = 0; b < NOISE_WORD_BITS; b++) {
            numerator <<= 1;
            digits <<= 1;
            if (numerator >= denominator) {
                numerator -= denominator;
                digits |= 1;
            }
        }
        uint32_t w = real_word(n, a, i);
        if (w != digits)
            return w < digits;
        if (numerator == 0)
            return false;
    }
}

/* The same, decided by the leading bits whenever they leave no doubt. */
static inline bool real_below_fraction(struct noise *n, struct real *a, u128 numerator)
{
    u128 scaled = (u128)(uint64_t)(numerator >> n->shift) << NOISE_WORD_BITS; /* ≤ numerator·2^bits / 2^shift */
    uint64_t w = a->word[0];
    if (((u128)w + 1) * ((u128)n->denominator_high + 1) <= scaled)
        return true;
    if ((u128)w * n->denominator_high >= scaled + ((u128)1 << NOISE_WORD_BITS))
        return false;
    return real_below_fraction_exact(n, a, numerator, n->denominator);
}

/* True with probability e^-γ, γ = numerator / denominator. */
static inline bool bernoulli_exp(struct noise *n, u128 numerator)
{
    struct real first;
    while (__builtin_expect(numerator >= n->denominator, 0)) { /* e^-γ = e^-1 · e^-(γ − 1) */
        numerator -= n->denominator;
        real_draw(n, &first);
        if (!(descents(n, &first) & 1)) /* the first is below 1 always: descents + 1 must be even */
            return false;
    }
    real_draw(n, &first);
    if (!real_below_fraction(n, &first, numerator))
        return true;
    return descents(n, &first) & 1;
}

/* |y| of a discrete Laplace of scale t: ⌊t·E⌋ for an exponential E by von Neumann's method. */
static inline uint64_t draw_geometric(struct noise *n)
{
    struct real first;
    for (uint64_t rejected = 0;; rejected++) {
        require(rejected < 1024, "the random source repeats itself");
        real_draw(n, &first);
        if (!(descents_keeping(n, &first) & 1))
            return rejected * n->scale + real_scaled(n, &first, n->scale);
    }
}

int noise_init(struct noise *n, uint64_t variance, const struct rng *rng, struct error *err)
{
    if (variance == 0 || variance > NOISE_VARIANCE_MAX)
        return error_set(err, ERR_CONFIG, "noise variance %llu: expected 1 to 2^52 in squared grid units",
                         (unsigned long long)variance);
    uint64_t root = (uint64_t)sqrt((double)variance);
    while (root * root > variance)
        root--;
    while ((root + 1) * (root + 1) <= variance)
        root++;
    memset(n, 0, sizeof *n);
    n->rng = rng;
    n->variance = variance;
    n->scale = root + 1;
    n->denominator = (u128)2 * variance * n->scale * n->scale;
    while (n->denominator >> n->shift >> 62)
        n->shift++;
    n->denominator_high = (uint64_t)(n->denominator >> n->shift);
    n->next = NOISE_WORDS;
    return 0;
}

void noise_release(struct noise *n)
{
    if (n)
        explicit_bzero(n, sizeof *n);
}

int64_t noise_draw(struct noise *n)
{
    for (;;) {
        uint64_t y = draw_geometric(n);
        bool negative = next_sign(n);
        if (negative && y == 0)
            continue;
        /* Accept with exp(−(|y| − σ²/t)² / (2σ²)) = exp(−(|y|·t − σ²)² / (2σ²t²)). */
        __int128 a = (__int128)y * n->scale - n->variance;
        u128 distance = (u128)(a < 0 ? -a : a);
        require(distance >> 63 == 0, "a draw out of range");
        if (bernoulli_exp(n, distance * distance))
            return negative ? -(int64_t)y : (int64_t)y;
    }
}

void noise_fill(struct noise *n, int64_t *out, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = noise_draw(n);
}

void noise_add(struct noise *n, int64_t *vector, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        bool wrapped = __builtin_add_overflow(vector[i], noise_draw(n), &vector[i]);
        require(!wrapped, "a sum left 64 bits");
    }
}

int poisson_threshold(double q, uint64_t *ret_threshold, bool *ret_all, struct error *err)
{
    if (!(q > 0 && q <= 1))
        return error_set(err, ERR_CONFIG, "sampling rate %g: expected a number above 0 and at most 1", q);
    *ret_all = q == 1;
    *ret_threshold = q == 1 ? 0 : (uint64_t)ldexp(q, 64); /* exact: 53 bits scaled by a power of two, then truncated */
    return 0;
}

int poisson_sample(double q, uint32_t units, const struct rng *rng, uint32_t *indices, uint32_t *ret_count,
                   struct error *err)
{
    uint64_t threshold = 0, words[256];
    bool all = false;
    uint32_t count = 0;
    int rc = poisson_threshold(q, &threshold, &all, err);
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < units; i++) {
        if (i % ARRAY_LEN(words) == 0)
            rng_fill(rng, words, sizeof words);
        if (all || words[i % ARRAY_LEN(words)] < threshold)
            indices[count++] = i;
    }
    explicit_bzero(words, sizeof words);
    *ret_count = count;
    return 0;
}

/* A fixed sequence for the known answer: Weyl steps through a multiply-xorshift (splitmix64), not for secrets. */
static void fixed_fill(void *ctx, void *out, size_t len)
{
    uint64_t *state = ctx;
    for (uint8_t *at = out; len > 0;) {
        uint64_t v = *state += 0x9e3779b97f4a7c15u;
        v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9u;
        v = (v ^ v >> 27) * 0x94d049bb133111ebu;
        v ^= v >> 31;
        size_t n = len < 8 ? len : 8;
        for (size_t i = 0; i < n; i++)
            at[i] = (uint8_t)(v >> 8 * i);
        at += n;
        len -= n;
    }
}

int noise_self_test(const struct rng *rng, struct error *err)
{
    static const int64_t expected[4] = {-561190, -1514422, -881508, -593274};
    uint64_t state = 1;
    struct rng fixed = {fixed_fill, &state};
    struct noise n;
    int rc = noise_init(&n, (uint64_t)1 << 40, &fixed, err);
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(expected); i++)
        if (noise_draw(&n) != expected[i])
            rc = error_set(err, ERR_BUG,
                           "the noise sampler's known answer differs: this build must not release anything");
    noise_release(&n);
    if (rc < 0)
        return rc;
    /* 4096 draws of σ = 1024: mean within 6 and second moment within 8 standard errors. */
    double sum = 0, squares = 0;
    rc = noise_init(&n, (uint64_t)1 << 20, rng, err);
    for (int i = 0; rc == 0 && i < 4096; i++) {
        double x = (double)noise_draw(&n) / 1024;
        sum += x;
        squares += x * x;
    }
    noise_release(&n);
    if (rc == 0 && (fabs(sum) > 6 * 64 || fabs(squares - 4096) > 8 * 64 * M_SQRT2))
        rc = error_set(err, ERR_BUG, "noise drawn from the random source is not Gaussian: nothing may be released");
    return rc;
}
