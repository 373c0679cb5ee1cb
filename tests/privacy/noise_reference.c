#include "tests/privacy/noise_reference.h"

#include <stdlib.h>
#include <string.h>

static void quarter(uint32_t x[16], int a, int b, int c, int d)
{
    static const int turns[4] = {16, 12, 8, 7};
    for (int i = 0; i < 4; i++) {
        int to = i % 2 ? c : a, from = i % 2 ? d : b, turned = i % 2 ? b : d;
        x[to] += x[from];
        x[turned] ^= x[to];
        x[turned] = x[turned] << turns[i] | x[turned] >> (32 - turns[i]);
    }
}

void reference_chacha20_block(const uint32_t key[8], uint32_t counter, const uint32_t nonce[3], uint32_t out[16])
{
    uint32_t start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    memcpy(start + 4, key, 32);
    start[12] = counter;
    memcpy(start + 13, nonce, 12);
    memcpy(out, start, 64);
    for (int round = 0; round < 20; round++)
        for (int i = 0; i < 4; i++) {
            int odd = round % 2;
            quarter(out, i, 4 + (i + odd) % 4, 8 + (i + 2 * odd) % 4, 12 + (i + 3 * odd) % 4);
        }
    for (int i = 0; i < 16; i++)
        out[i] += start[i];
}

struct reference_source {
    const uint32_t *key;
    uint32_t nonce[3], counter, words[16];
    unsigned used;
    uint32_t signs;
    unsigned signs_left;
};

static uint32_t reference_word(struct reference_source *s)
{
    if (s->used == 16) {
        reference_chacha20_block(s->key, s->counter++, s->nonce, s->words);
        s->used = 0;
    }
    return s->words[s->used++];
}

#define GAUSSIAN_SOURCE struct reference_source
#define GAUSSIAN_WORD(s) reference_word(s)
#define GAUSSIAN_REQUIRE(s, ok) ((ok) || (abort(), 0))
#include "base/gaussian_draw.h"

void reference_noise(const uint32_t key[8], uint32_t number, uint64_t variance, size_t count, int64_t *out)
{
    struct gaussian g;
    if (!gaussian_init(&g, variance))
        abort();
    for (size_t at = 0; at < count; at += GAUSSIAN_CHUNK) {
        uint64_t chunk = at / GAUSSIAN_CHUNK;
        struct reference_source s = {.key = key, .nonce = {number, (uint32_t)chunk, (uint32_t)(chunk >> 32)}};
        s.used = 16;
        for (size_t i = at; i < count && i < at + GAUSSIAN_CHUNK; i++) {
            uint32_t rejected = 0;
            while (!gaussian_attempt(&g, &s, &rejected, &out[i])) {
            }
        }
    }
}
