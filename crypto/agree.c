#include "crypto/agree.h"

#include "crypto/fatal.h"

static void shared_or_zero(const uint8_t secret[AGREE_SIZE], const uint8_t peer[AGREE_SIZE], uint8_t out[AGREE_SIZE])
{
    sodium_ready();
    if (crypto_scalarmult_curve25519(out, secret, peer) != 0)
        sodium_memzero(out, AGREE_SIZE);
}

void agree_from_secret(struct agree_key *key, const uint8_t secret[AGREE_SIZE])
{
    sodium_ready();
    if (secret != key->secret)
        memcpy(key->secret, secret, AGREE_SIZE);
    if (crypto_scalarmult_curve25519_base(key->public_key, key->secret) != 0)
        fatal("X25519 failed");
}

void agree_random(struct agree_key *key, const struct rng *rng)
{
    rng_fill(rng, key->secret, AGREE_SIZE);
    agree_from_secret(key, key->secret);
}

/* True for 32 little-endian bytes below 2^255 − 19. Public data: no constant time needed. */
static bool canonical(const uint8_t u[AGREE_SIZE])
{
    if (u[31] != 0x7f)
        return u[31] < 0x7f;
    for (int i = 30; i > 0; i--)
        if (u[i] != 0xff)
            return true;
    return u[0] < 0xed;
}

int agree_check_public(const uint8_t public_key[AGREE_SIZE])
{
    /* Clamping makes any scalar a multiple of 8, so a point of low order gives zero with every secret, this one too. */
    static const uint8_t any_secret[AGREE_SIZE] = {1};
    uint8_t product[AGREE_SIZE];

    if (!canonical(public_key))
        return ERR_INTEGRITY;
    shared_or_zero(any_secret, public_key, product);
    return sodium_is_zero(product, sizeof product) ? ERR_INTEGRITY : 0;
}

int agree_shared(const uint8_t secret[AGREE_SIZE], const uint8_t peer_public[AGREE_SIZE],
                 uint8_t ret_shared[AGREE_SIZE])
{
    uint8_t product[AGREE_SIZE];
    int rc = 0;

    if (!canonical(peer_public))
        return ERR_INTEGRITY;
    shared_or_zero(secret, peer_public, product);
    if (sodium_is_zero(product, sizeof product))
        rc = ERR_INTEGRITY;
    else
        memcpy(ret_shared, product, AGREE_SIZE);
    sodium_memzero(product, sizeof product);
    return rc;
}
