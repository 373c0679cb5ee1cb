#include "crypto/shamir.h"

#include "base/checked.h"
#include "crypto/fatal.h"
#include "crypto/secret.h"

static_assert(SHAMIR_SIZE == crypto_core_ristretto255_SCALARBYTES, "a scalar is 32 bytes");

static void scalar_from_u64(uint8_t out[SHAMIR_SIZE], uint64_t v)
{
    memset(out, 0, SHAMIR_SIZE);
    for (int i = 0; i < 8; i++)
        out[i] = (uint8_t)(v >> (8 * i));
}

void shamir_random(uint8_t out[SHAMIR_SIZE], const struct rng *rng)
{
    uint8_t wide[crypto_core_ristretto255_NONREDUCEDSCALARBYTES];

    rng_fill(rng, wide, sizeof wide);
    crypto_core_ristretto255_scalar_reduce(out, wide);
    sodium_memzero(wide, sizeof wide);
}

bool shamir_is_canonical(const uint8_t scalar[SHAMIR_SIZE])
{
    uint8_t wide[crypto_core_ristretto255_NONREDUCEDSCALARBYTES] = {0}, reduced[SHAMIR_SIZE];
    bool same;

    memcpy(wide, scalar, SHAMIR_SIZE);
    crypto_core_ristretto255_scalar_reduce(reduced, wide);
    same = sodium_memcmp(reduced, scalar, SHAMIR_SIZE) == 0;
    sodium_memzero(wide, sizeof wide);
    sodium_memzero(reduced, sizeof reduced);
    return same;
}

int shamir_split(const uint8_t secret[SHAMIR_SIZE], uint32_t threshold, uint32_t n, const struct rng *rng,
                 uint8_t (*ret_shares)[SHAMIR_SIZE], struct error *err)
{
    uint8_t(*coefficients)[SHAMIR_SIZE]; /* (threshold, 32), the secret first */

    if (threshold < 1 || threshold > n || n > SHAMIR_SHARES_MAX)
        return error_set(err, ERR_CONFIG, "cannot share a secret as %u of %u: expected 1 to %u, of at most %d",
                         (unsigned)threshold, (unsigned)n, (unsigned)n, SHAMIR_SHARES_MAX);
    if (!shamir_is_canonical(secret))
        return error_set(err, ERR_INTEGRITY, "the secret to share is not a scalar below the group order");
    coefficients = secret_new((size_t)threshold * SHAMIR_SIZE);
    if (!coefficients)
        return error_set(err, ERR_RESOURCES, "no protected memory for a polynomial of %u coefficients",
                         (unsigned)threshold);
    memcpy(coefficients[0], secret, SHAMIR_SIZE);
    for (uint32_t i = 1; i < threshold; i++)
        shamir_random(coefficients[i], rng);
    for (uint32_t index = 1; index <= n; index++) {
        uint8_t *value = ret_shares[index - 1], x[SHAMIR_SIZE];

        scalar_from_u64(x, index);
        memcpy(value, coefficients[threshold - 1], SHAMIR_SIZE); /* Horner's rule from the highest coefficient */
        for (uint32_t i = threshold - 1; i > 0; i--) {
            crypto_core_ristretto255_scalar_mul(value, value, x);
            crypto_core_ristretto255_scalar_add(value, value, coefficients[i - 1]);
        }
    }
    secret_free(coefficients);
    return 0;
}

static int check_indices(const uint32_t *indices, size_t count, struct error *err)
{
    uint8_t *seen;
    int rc = 0;

    if (count == 0 || count > SHAMIR_SHARES_MAX)
        return error_set(err, ERR_INTEGRITY, "%zu shares given, expected 1 to %d", count, SHAMIR_SHARES_MAX);
    seen = calloc(SHAMIR_SHARES_MAX + 1, 1);
    if (!seen)
        return error_set(err, ERR_RESOURCES, "out of memory while combining shares");
    for (size_t i = 0; i < count && rc == 0; i++) {
        if (indices[i] == 0 || indices[i] > SHAMIR_SHARES_MAX)
            rc = error_set(err, ERR_INTEGRITY, "share index %u is outside 1..%d", (unsigned)indices[i],
                           SHAMIR_SHARES_MAX);
        else if (seen[indices[i]])
            rc = error_set(err, ERR_INTEGRITY, "share index %u is given twice", (unsigned)indices[i]);
        else
            seen[indices[i]] = 1;
    }
    free(seen);
    return rc;
}

/* out = x_i · Π_{j≠i} (x_j − x_i). The differences are small, so they are gathered in 64 bits before each scalar
 * product. */
static void denominator(const uint32_t *indices, size_t count, size_t i, uint8_t out[SHAMIR_SIZE])
{
    uint64_t gathered = indices[i];
    uint8_t factor[SHAMIR_SIZE];
    bool negative = false;

    scalar_from_u64(out, 1);
    for (size_t j = 0; j < count; j++) {
        uint64_t difference;
        if (j == i)
            continue;
        negative ^= indices[j] < indices[i];
        difference = indices[j] < indices[i] ? indices[i] - indices[j] : indices[j] - indices[i];
        if (gathered > UINT64_MAX / SHAMIR_SHARES_MAX) {
            scalar_from_u64(factor, gathered);
            crypto_core_ristretto255_scalar_mul(out, out, factor);
            gathered = 1;
        }
        gathered *= difference;
    }
    scalar_from_u64(factor, gathered);
    crypto_core_ristretto255_scalar_mul(out, out, factor);
    if (negative)
        crypto_core_ristretto255_scalar_negate(out, out);
}

int shamir_combiner_init(struct shamir_combiner *c, const uint32_t *indices, size_t count, struct error *err)
{
    uint8_t product[SHAMIR_SIZE], factor[SHAMIR_SIZE];
    uint8_t(*coefficients)[SHAMIR_SIZE];
    size_t bytes;
    int rc = check_indices(indices, count, err);

    if (rc < 0)
        return rc;
    if (!checked_mul(count, SHAMIR_SIZE, &bytes) || !(coefficients = malloc(bytes)))
        return error_set(err, ERR_RESOURCES, "out of memory while combining %zu shares", count);
    /* Lagrange at 0: λ_i = Π_j x_j / (x_i · Π_{j≠i} (x_j − x_i)). */
    scalar_from_u64(product, 1);
    for (size_t i = 0; i < count; i++) {
        scalar_from_u64(factor, indices[i]);
        crypto_core_ristretto255_scalar_mul(product, product, factor);
    }
    for (size_t i = 0; i < count; i++) {
        denominator(indices, count, i, factor);
        if (crypto_core_ristretto255_scalar_invert(factor, factor) != 0)
            fatal("a product of non-zero scalars was zero");
        crypto_core_ristretto255_scalar_mul(coefficients[i], product, factor);
    }
    c->count = count;
    c->coefficients = coefficients;
    return 0;
}

void shamir_combiner_release(struct shamir_combiner *c)
{
    if (!c)
        return;
    free(c->coefficients);
    *c = (struct shamir_combiner){0};
}

int shamir_combine(const struct shamir_combiner *c, const uint8_t (*shares)[SHAMIR_SIZE],
                   uint8_t ret_secret[SHAMIR_SIZE])
{
    uint8_t sum[SHAMIR_SIZE] = {0}, term[SHAMIR_SIZE];
    int rc = 0;

    for (size_t i = 0; i < c->count && rc == 0; i++) {
        if (!shamir_is_canonical(shares[i])) {
            rc = ERR_INTEGRITY;
            break;
        }
        crypto_core_ristretto255_scalar_mul(term, shares[i], c->coefficients[i]);
        crypto_core_ristretto255_scalar_add(sum, sum, term);
    }
    if (rc == 0)
        memcpy(ret_secret, sum, SHAMIR_SIZE);
    sodium_memzero(sum, sizeof sum);
    sodium_memzero(term, sizeof term);
    return rc;
}
