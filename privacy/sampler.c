#include "privacy/sampler.h"

#include <math.h>

/* In every build: noise from a source that repeats itself must never leave the process. */
static inline bool require(bool ok, const char *what)
{
    if (__builtin_expect(!ok, 0)) {
        fprintf(stderr, "noise sampler: %s\n", what);
        abort();
    }
    return true;
}

static inline uint32_t next_word(struct noise *n)
{
    if (n->next == NOISE_WORDS) {
        rng_fill(n->rng, n->words, sizeof n->words);
        n->next = 0;
    }
    uint32_t v = n->words[n->next];
    n->words[n->next++] = 0; /* spent randomness does not stay in memory */
    return v;
}

#define GAUSSIAN_SOURCE struct noise
#define GAUSSIAN_WORD(s) next_word(s)
#define GAUSSIAN_REQUIRE(s, ok) require(ok, "the random source repeats itself")
#include "base/gaussian_draw.h"

int noise_init(struct noise *n, uint64_t variance, const struct rng *rng, struct error *err)
{
    memset(n, 0, sizeof *n);
    if (!gaussian_init(&n->gaussian, variance))
        return error_set(err, ERR_CONFIG, "noise variance %llu: expected 1 to 2^52 in squared grid units",
                         (unsigned long long)variance);
    n->rng = rng;
    n->next = NOISE_WORDS;
    return 0;
}

void noise_restart(struct noise *n)
{
    explicit_bzero(n->words + n->next, (NOISE_WORDS - n->next) * sizeof *n->words);
    n->next = NOISE_WORDS;
    n->signs = 0;
    n->signs_left = 0;
}

void noise_release(struct noise *n)
{
    if (n)
        explicit_bzero(n, sizeof *n);
}

int64_t noise_draw(struct noise *n)
{
    uint32_t rejected = 0;
    int64_t x = 0;
    while (!gaussian_attempt(&n->gaussian, n, &rejected, &x)) {
    }
    return x;
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
