#include "crypto/sign.h"

#include "crypto/fatal.h"
#include "crypto/hash.h"

static const char prefix[] = "consilium signature v1"; /* its NUL is signed too */

enum { MESSAGE_SIZE = sizeof prefix + HASH_SIZE };

static void message_of(const uint8_t labelled_hash[HASH_SIZE], uint8_t out[MESSAGE_SIZE])
{
    memcpy(out, prefix, sizeof prefix);
    memcpy(out + sizeof prefix, labelled_hash, HASH_SIZE);
}

void sign_key_from_seed(struct sign_key *key, const uint8_t seed[SIGN_SEED_SIZE])
{
    sodium_ready();
    if (crypto_sign_ed25519_seed_keypair(key->public_key, key->secret, seed) != 0)
        fatal("Ed25519 failed");
}

void sign_key_random(struct sign_key *key, const struct rng *rng)
{
    uint8_t seed[SIGN_SEED_SIZE];

    rng_fill(rng, seed, sizeof seed);
    sign_key_from_seed(key, seed);
    sodium_memzero(seed, sizeof seed);
}

void sign_hash(const struct sign_key *key, const uint8_t labelled_hash[HASH_SIZE], uint8_t out[SIGN_SIZE])
{
    uint8_t message[MESSAGE_SIZE];

    sodium_ready();
    message_of(labelled_hash, message);
    if (crypto_sign_ed25519_detached(out, NULL, message, sizeof message, key->secret) != 0)
        fatal("Ed25519 failed");
}

int sign_verify_hash(const uint8_t public_key[SIGN_PUBLIC_SIZE], const uint8_t labelled_hash[HASH_SIZE],
                     const uint8_t signature[SIGN_SIZE])
{
    uint8_t message[MESSAGE_SIZE];

    sodium_ready();
    message_of(labelled_hash, message);
    return crypto_sign_ed25519_verify_detached(signature, message, sizeof message, public_key) == 0 ? 0 : ERR_INTEGRITY;
}

void sign_parts(const struct sign_key *key, const char *label, const struct span *parts, size_t count,
                uint8_t out[SIGN_SIZE])
{
    uint8_t hash[HASH_SIZE];

    hash_labelled(label, parts, count, hash);
    sign_hash(key, hash, out);
}

int sign_verify(const uint8_t public_key[SIGN_PUBLIC_SIZE], const char *label, const struct span *parts, size_t count,
                const uint8_t signature[SIGN_SIZE])
{
    uint8_t hash[HASH_SIZE];

    hash_labelled(label, parts, count, hash);
    return sign_verify_hash(public_key, hash, signature);
}
