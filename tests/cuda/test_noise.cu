/*
 * The card's noise against tests/privacy/noise_reference.c, with which tests/privacy/test_noise_vector.c compares the
 * CPU's. Built twice: as it is, and with GAUSSIAN_WORD_BITS 2 for both sides, where comparisons tie all the time.
 */
#include "kernels/cuda/noise.cu"

#include "tests/cuda/support.h"
#include "tests/privacy/noise_reference.h"

#define COUNT_MAX 4097

static uint32_t key_words[8];
static uint8_t key_bytes[32];

KERNEL chacha20_for_test(const uint32_t *key, uint32_t counter, uint32_t n0, uint32_t n1, uint32_t n2, uint32_t *out,
                         int stride)
{
    if (threadIdx.x == 0)
        chacha20_block(key, counter, n0, n1, n2, out, stride);
}

/* RFC 8439, 2.3.2, and the reference at other counters and nonces, whatever the stride. */
static void test_block(void)
{
    static const uint32_t rfc8439[16] = {0xe4e7f110, 0x15593bd1, 0x1fdd0f50, 0xc47120a3, 0xc7f4d1c7, 0x0368c033,
                                         0x9aaa2204, 0x4e6cd4c3, 0x466482d2, 0x09aa9f07, 0x05d7c214, 0xa2028bd9,
                                         0xd19c12b5, 0xb94e16de, 0xe883d0cb, 0x4e3c50a2};
    device_array<uint32_t> key(8), out(16 * 3);
    memcpy(key.host, key_words, sizeof key_words);
    key.put();
    for (uint32_t i = 0; i < 20; i++) {
        uint32_t counter = i == 0 ? 1 : i * 0x0d0f0e11u, nonce[3] = {0x09000000u + i, 0x4a000000u - i, i << 31},
                 want[16];
        int stride = (int)(i % 3) + 1;
        reference_chacha20_block(key_words, counter, nonce, want);
        out.poison();
        LAUNCH(chacha20_for_test, dim3(1), dim3(32), 0, (stream_t)0, key.dev, counter, nonce[0], nonce[1], nonce[2],
               out.dev, stride);
        out.get();
        for (int w = 0; w < 16; w++) {
            CHECK(out[(size_t)(w * stride)] == want[w]);
            CHECK(i > 0 || want[w] == rfc8439[w]);
        }
    }
}

static void fill_and_compare(uint64_t variance, uint32_t number, size_t count)
{
    static int64_t want[64 * 64 * 2 + 200];
    struct gaussian g;
    device_array<int64_t> out(count);
    device_array<int32_t> failed(1);
    CHECK(gaussian_init(&g, variance) && count <= sizeof want / sizeof *want);
    out.poison(); /* −1 everywhere, and get() checks what is behind it */
    reference_noise(key_words, number, variance, count, want);
    noise_fill((stream_t)0, key_bytes, number, &g, count, out.dev, failed.dev);
    out.get();
    failed.get();
    CHECK(failed[0] == 0);
    CHECK_SAME(out.host, want, count);
}

static void test_reference(void)
{
    for (uint64_t variance : noise_variances)
        for (size_t count : noise_counts)
            fill_and_compare(variance, (uint32_t)count * 0x01000193u, count);
    /* more than one block of threads, the last one ragged */
    fill_and_compare((uint64_t)1 << 40, 0xffffffffu, 64 * 64 * 2 + 131);
    fill_and_compare(3, 7, 64 * 64 + 1);
}

/* What a vector's number and a key change: everything. */
static void test_differ(void)
{
    device_array<int64_t> a(200), b(200), c(200);
    device_array<int32_t> failed(1);
    uint8_t other[32];
    struct gaussian g;
    size_t same = 0;
    memcpy(other, key_bytes, sizeof other);
    other[31] ^= 0x80;
    gaussian_init(&g, GAUSSIAN_VARIANCE_MAX);
    noise_fill((stream_t)0, key_bytes, 1, &g, 200, a.dev, failed.dev);
    noise_fill((stream_t)0, key_bytes, 2, &g, 200, b.dev, failed.dev);
    noise_fill((stream_t)0, other, 1, &g, 200, c.dev, failed.dev);
    a.get();
    b.get();
    c.get();
    for (size_t i = 0; i < 200; i++)
        same += (size_t)(a[i] == b[i]) + (a[i] == c[i]) + (b[i] == c[i]);
    CHECK(same <= 2); /* σ = 2^26 */
}

/* A source of the same word for ever: what no comparison can decide must come out as a failure, and come to an end. */
KERNEL failing_for_test(struct gaussian g, uint32_t word, int32_t *failed)
{
    DYNAMIC_SHARED(noise_memory, memory);
    for (int i = 0; i < RING; i++)
        memory->ring[i][threadIdx.x] = word;
    chunk_source s = {memory->key, &memory->ring[0][threadIdx.x], 0, 0, 0, 0, 0, 1 << 30, 0, 0, false};
    uint32_t rejected = 0;
    int64_t x = 0;
    for (int i = 0; i < 3000 && !s.failed; i++)
        gaussian_attempt(&g, &s, &rejected, &x);
    if (s.failed)
        *failed = 1;
}

static void test_failure(void)
{
    device_array<int32_t> failed(1);
    struct gaussian g;
    gaussian_init(&g, (uint64_t)1 << 40);
    static const uint32_t words[] = {0, 0x12345678, 0xffffffff};
    for (uint32_t word : words) {
        failed[0] = 0;
        failed.put();
        LAUNCH(failing_for_test, dim3(1), dim3(NOISE_BLOCK), sizeof(noise_memory), (stream_t)0, g, word, failed.dev);
        failed.get();
        CHECK(failed[0] == 1);
    }
}

int main(void)
{
    for (uint32_t i = 0; i < 32; i++) {
        key_bytes[i] = (uint8_t)i;
        key_words[i / 4] |= i << 8 * (i % 4);
    }
    RUN(test_block);
    RUN(test_reference);
    RUN(test_differ);
    RUN(test_failure);
    return check_report();
}
