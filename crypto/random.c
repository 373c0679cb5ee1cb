#include "crypto/random.h"

#include "crypto/fatal.h"
#include "crypto/hash.h"

#include <string.h>

static void system_fill(void *ctx, void *out, size_t len)
{
    (void)ctx;
    sodium_ready();
    randombytes_buf(out, len);
}

const struct rng random_system = {system_fill, NULL};

enum { STREAM_BLOCK = 64 };
_Static_assert(RANDOM_NONCE_SIZE == crypto_stream_chacha20_ietf_NONCEBYTES, "a nonce of RFC 8439");

void random_stream_key(uint8_t ret_key[RANDOM_SEED_SIZE], const uint8_t key[RANDOM_SEED_SIZE], const char *label)
{
    static const char purpose[] = "consilium/stream";
    char info[256];
    size_t label_len = strlen(label), prefix = sizeof purpose - 1;

    if (label_len > sizeof info - prefix)
        fatal("random_stream_key: the label is too long");
    sodium_ready();
    memcpy(info, purpose, prefix);
    memcpy(info + prefix, label, label_len);
    hkdf_sha256(span_of(key, RANDOM_SEED_SIZE), span_of(NULL, 0), span_of(info, prefix + label_len), ret_key,
                RANDOM_SEED_SIZE);
}

void random_stream_init(struct random_stream *s, const uint8_t key[RANDOM_SEED_SIZE], const char *label)
{
    random_stream_key(s->key, key, label);
    memset(s->nonce, 0, sizeof s->nonce);
    s->one_nonce = false;
    s->next_block = 0;
    s->used = sizeof s->buffer;
}

void random_stream_nonce(struct random_stream *s, const uint8_t key[RANDOM_SEED_SIZE],
                         const uint8_t nonce[RANDOM_NONCE_SIZE])
{
    sodium_ready();
    memcpy(s->key, key, sizeof s->key);
    memcpy(s->nonce, nonce, sizeof s->nonce);
    s->one_nonce = true;
    s->next_block = 0;
    s->used = sizeof s->buffer;
}

void random_stream_seeded(struct random_stream *s, const struct rng *source, const char *label)
{
    uint8_t seed[RANDOM_SEED_SIZE];

    rng_fill(source, seed, sizeof seed);
    random_stream_init(s, seed, label);
    sodium_memzero(seed, sizeof seed);
}

/* Whole blocks of keystream from next_block on. */
static void stream_blocks(struct random_stream *s, uint8_t *out, size_t blocks)
{
    while (blocks > 0) {
        uint32_t low = (uint32_t)s->next_block, high = (uint32_t)(s->next_block >> 32);
        uint64_t until_carry = ((uint64_t)1 << 32) - low;
        size_t n = blocks < until_carry ? blocks : (size_t)until_carry;

        if (s->one_nonce && high != 0)
            fatal("a stream with a nonce of its own came to its end");
        for (int i = 0; i < 4 && !s->one_nonce; i++)
            s->nonce[i] = (uint8_t)(high >> (8 * i));
        memset(out, 0, n * STREAM_BLOCK);
        if (crypto_stream_chacha20_ietf_xor_ic(out, out, n * STREAM_BLOCK, s->nonce, low, s->key) != 0)
            fatal("ChaCha20 failed");
        s->next_block += n;
        out += n * STREAM_BLOCK;
        blocks -= n;
    }
}

void random_stream_fill(struct random_stream *s, void *out, size_t len)
{
    uint8_t *at = out;

    while (len > 0) {
        if (s->used < sizeof s->buffer) {
            size_t n = sizeof s->buffer - s->used;
            if (n > len)
                n = len;
            memcpy(at, s->buffer + s->used, n);
            sodium_memzero(s->buffer + s->used, n); /* what was handed out cannot be read back from here */
            s->used += n;
            at += n;
            len -= n;
        } else if (len >= sizeof s->buffer) {
            size_t blocks = len / STREAM_BLOCK;
            stream_blocks(s, at, blocks);
            at += blocks * STREAM_BLOCK;
            len -= blocks * STREAM_BLOCK;
        } else {
            stream_blocks(s, s->buffer, sizeof s->buffer / STREAM_BLOCK);
            s->used = 0;
        }
    }
}

static void stream_fill(void *ctx, void *out, size_t len)
{
    random_stream_fill(ctx, out, len);
}

struct rng random_stream_rng(struct random_stream *s)
{
    return (struct rng){stream_fill, s};
}

void random_stream_release(struct random_stream *s)
{
    if (s)
        sodium_memzero(s, sizeof *s);
}
