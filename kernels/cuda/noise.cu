/*
 * Exact discrete Gaussian noise: one thread a chunk of GAUSSIAN_CHUNK coordinates, by base/gaussian_draw.h from its own
 * ChaCha20 keystream, as privacy/noise_vector.h defines it.
 *
 * A thread's keystream waits in a ring of RING words in shared memory (word-major: a warp's reads of any words do not
 * conflict). A warp makes new blocks when one of its lanes runs low, for all lanes that have room, so that most lanes
 * take part; a lane that runs dry in the middle of an attempt makes one alone. Lanes go through attempts, not draws,
 * together: nobody waits for a neighbour's rejections. When words are made has no influence on which word is which.
 *
 * Numbers for 32 × 64 draws (a warp): 165 attempts of about 500 instructions and 41 blocks of about 1000; at 2 integer
 * instructions a cycle and multiprocessor 0.7 ms for 4.9 M draws on an H100, if latencies are hidden. Bytes: 8 a draw.
 */
#include "kernels/cuda/internal.h"

#include <assert.h>
#include <string.h>

#define NOISE_BLOCK 64 /* threads */
#define BLOCK_WORDS 16 /* of ChaCha20 */
#define RING 48
#define RING_LOW 12 /* then a lane runs dry in one attempt of 60,000 */

struct noise_key {
    uint32_t word[8];
};

struct noise_memory {
    uint32_t key[8];
    uint32_t ring[RING][NOISE_BLOCK];
};

DEVICE uint32_t rotate_left(uint32_t x, int n)
{
    return x << n | x >> (32 - n);
}

DEVICE void quarter_round(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d)
{
    a += b, d = rotate_left(d ^ a, 16);
    c += d, b = rotate_left(b ^ c, 12);
    a += b, d = rotate_left(d ^ a, 8);
    c += d, b = rotate_left(b ^ c, 7);
}

/* RFC 8439, 2.3, into out[0], out[stride], … */
DEVICE void chacha20_block(const uint32_t *key, uint32_t counter, uint32_t n0, uint32_t n1, uint32_t n2, uint32_t *out,
                           int stride)
{
    uint32_t x[BLOCK_WORDS] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, key[0],  key[1], key[2], key[3],
                               key[4],     key[5],     key[6],     key[7],     counter, n0,     n1,     n2};
#pragma unroll 1
    for (int i = 0; i < 10; i++) {
        quarter_round(x[0], x[4], x[8], x[12]);
        quarter_round(x[1], x[5], x[9], x[13]);
        quarter_round(x[2], x[6], x[10], x[14]);
        quarter_round(x[3], x[7], x[11], x[15]);
        quarter_round(x[0], x[5], x[10], x[15]);
        quarter_round(x[1], x[6], x[11], x[12]);
        quarter_round(x[2], x[7], x[8], x[13]);
        quarter_round(x[3], x[4], x[9], x[14]);
    }
    out[0 * stride] = x[0] + 0x61707865;
    out[1 * stride] = x[1] + 0x3320646e;
    out[2 * stride] = x[2] + 0x79622d32;
    out[3 * stride] = x[3] + 0x6b206574;
#pragma unroll
    for (int i = 0; i < 8; i++)
        out[(4 + i) * stride] = x[4 + i] + key[i];
    out[12 * stride] = x[12] + counter;
    out[13 * stride] = x[13] + n0;
    out[14 * stride] = x[14] + n1;
    out[15 * stride] = x[15] + n2;
}

DEVICE_CALL void chacha20_block_called(const uint32_t *key, uint32_t counter, uint32_t n0, uint32_t n1, uint32_t n2,
                                       uint32_t *out)
{
    chacha20_block(key, counter, n0, n1, n2, out, NOISE_BLOCK);
}

/* One chunk's words. */
struct chunk_source {
    const uint32_t *key;
    uint32_t *ring;   /* this thread's column: word i at ring[i·NOISE_BLOCK] */
    uint32_t number;  /* of the vector */
    uint64_t chunk;   /* both are the nonce */
    uint32_t counter; /* of the next block */
    int made;         /* where in the ring it goes */
    int next;         /* where the next unused word is */
    int left;         /* unused words */
    uint32_t signs;
    unsigned signs_left;
    bool failed;
};

DEVICE void chunk_block_made(chunk_source *s)
{
    s->counter++;
    s->failed |= s->counter == 0; /* after 2^32 blocks the first would come again */
    s->made = s->made == RING - BLOCK_WORDS ? 0 : s->made + BLOCK_WORDS;
    s->left += BLOCK_WORDS;
}

DEVICE uint32_t chunk_word(chunk_source *s)
{
    if (s->left == 0) {
        chacha20_block_called(s->key, s->counter, s->number, (uint32_t)s->chunk, (uint32_t)(s->chunk >> 32),
                              s->ring + s->made * NOISE_BLOCK);
        chunk_block_made(s);
    }
    uint32_t v = s->ring[s->next * NOISE_BLOCK];
    s->next = s->next == RING - 1 ? 0 : s->next + 1;
    s->left--;
    return v;
}

DEVICE bool chunk_require(chunk_source *s, bool ok)
{
    s->failed |= !ok;
    return ok;
}

#define GAUSSIAN_SOURCE struct chunk_source
#define GAUSSIAN_WORD(s) chunk_word(s)
#define GAUSSIAN_REQUIRE(s, ok) chunk_require(s, ok)
#include "base/gaussian_draw.h"

KERNEL LAUNCH_BOUNDS(NOISE_BLOCK, 12) noise_chunks(noise_key key, uint32_t number, struct gaussian gaussian,
                                                   uint64_t count, int64_t *out, int32_t *failed)
{
    DYNAMIC_SHARED(noise_memory, memory);
    uint64_t chunk = (uint64_t)blockIdx.x * NOISE_BLOCK + threadIdx.x, first = chunk * GAUSSIAN_CHUNK;
    int draws = first >= count ? 0 : count - first < GAUSSIAN_CHUNK ? (int)(count - first) : GAUSSIAN_CHUNK;
    chunk_source s = {memory->key, &memory->ring[0][threadIdx.x], number, chunk, 0, 0, 0, 0, 0, 0, false};
    uint32_t rejected = 0;

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            memory->key[i] = key.word[i];
    }
    block_sync();
    int64_t *to = out + first, *end = to + draws;
    while (warp_any(to < end)) {
        if (warp_any(to < end && s.left < RING_LOW)) {
            if (to < end && s.left <= RING - BLOCK_WORDS) {
                chacha20_block(s.key, s.counter, number, (uint32_t)chunk, (uint32_t)(chunk >> 32),
                               s.ring + s.made * NOISE_BLOCK, NOISE_BLOCK);
                chunk_block_made(&s);
            }
        }
        if (to < end) {
            int64_t x = 0;
            if (gaussian_attempt(&gaussian, &s, &rejected, &x))
                *to++ = x;
            if (s.failed)
                to = end;
        }
    }
    if (s.failed)
        *failed = 1;
    block_sync();
    /* nothing secret stays for the next kernel to find; volatile, so that it is really done */
    volatile uint32_t *spent = reinterpret_cast<volatile uint32_t *>(memory);
    for (unsigned i = threadIdx.x; i < sizeof *memory / sizeof *spent; i += NOISE_BLOCK)
        spent[i] = 0;
}

void noise_fill(stream_t s, const uint8_t key[32], uint32_t number, const struct gaussian *gaussian, size_t count,
                int64_t *out, int32_t *failed)
{
    const uint64_t per_block = (uint64_t)GAUSSIAN_CHUNK * NOISE_BLOCK;
    uint64_t blocks = (count + per_block - 1) / per_block;
    noise_key words;

    assert(blocks < (uint64_t)1 << 31);
    if (blocks == 0)
        return;
    for (int i = 0; i < 8; i++)
        words.word[i] = (uint32_t)key[4 * i] | (uint32_t)key[4 * i + 1] << 8 | (uint32_t)key[4 * i + 2] << 16 |
                        (uint32_t)key[4 * i + 3] << 24;
    LAUNCH(noise_chunks, dim3((unsigned)blocks), dim3(NOISE_BLOCK), sizeof(noise_memory), s, words, number, *gaussian,
           (uint64_t)count, out, failed);
    explicit_bzero(&words, sizeof words);
}
