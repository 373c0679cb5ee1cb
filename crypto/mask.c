#include <openssl/evp.h> /* first: it names a parameter "rand", which base/banned.h poisons */

#include "crypto/mask.h"

#include "crypto/fatal.h"
#include "crypto/hash.h"

/* Keystream and vector tile lie in the first-level cache together. Larger tiles fall out of it, smaller ones pay for
 * more calls; bench/bench_crypto.c measures it. */
enum { TILE_BYTES = 16 << 10, AES_BLOCK = 16, CHACHA_BLOCK = 64 };

bool mask_suite_known(uint32_t suite)
{
    return suite == MASK_SUITE_AES_256_CTR || suite == MASK_SUITE_CHACHA20;
}

const char *mask_suite_name(enum mask_suite suite)
{
    switch (suite) {
    case MASK_SUITE_AES_256_CTR:
        return "aes-256-ctr";
    case MASK_SUITE_CHACHA20:
        return "chacha20";
    }
    return "unknown";
}

static struct span ring_span(unsigned ring_bits, uint8_t out[4])
{
    if (ring_bits != 32 && ring_bits != 64)
        fatal("mask ring is neither 32 nor 64 bits");
    out[0] = (uint8_t)ring_bits;
    out[1] = out[2] = out[3] = 0;
    return span_of(out, 4);
}

void mask_pair_key(const uint8_t shared[32], const uint8_t h2[32], const char *vector, unsigned ring_bits,
                   const char *id_a, const char *id_b, uint8_t out[MASK_KEY_SIZE])
{
    int order = strcmp(id_a, id_b);
    const char *low = order < 0 ? id_a : id_b, *high = order < 0 ? id_b : id_a;
    uint8_t ring[4];
    const struct span parts[] = {span_str(vector), ring_span(ring_bits, ring), span_str(low), span_str(high)};

    if (order == 0)
        fatal("mask_pair_key: a site paired with itself");
    hkdf_labelled(span_of(shared, 32), span_of(h2, 32), "consilium/mask/pair", parts, ARRAY_LEN(parts), out,
                  MASK_KEY_SIZE);
}

void mask_self_key(const uint8_t b[32], const uint8_t h2[32], const char *vector, unsigned ring_bits, const char *id,
                   uint8_t out[MASK_KEY_SIZE])
{
    uint8_t ring[4];
    const struct span parts[] = {span_str(vector), ring_span(ring_bits, ring), span_str(id)};

    hkdf_labelled(span_of(b, 32), span_of(h2, 32), "consilium/mask/self", parts, ARRAY_LEN(parts), out, MASK_KEY_SIZE);
}

int mask_pair_sign(const char *own, const char *peer)
{
    int order = strcmp(own, peer);

    if (order == 0)
        fatal("mask_pair_sign: a site paired with itself");
    return order < 0 ? 1 : -1;
}

int mask_stream_init(struct mask_stream *s, enum mask_suite suite, const uint8_t key[MASK_KEY_SIZE], struct error *err)
{
    const uint8_t iv[16] = {0};
    EVP_CIPHER_CTX *cipher;

    if (!mask_suite_known((uint32_t)suite))
        return error_set(err, ERR_CONFIG, "mask suite %d is unknown; this build has 1 (aes-256-ctr) and 2 (chacha20)",
                         (int)suite);
    cipher = EVP_CIPHER_CTX_new();
    if (!cipher || EVP_EncryptInit_ex(cipher, suite == MASK_SUITE_CHACHA20 ? EVP_chacha20() : EVP_aes_256_ctr(), NULL,
                                      key, iv) != 1) {
        EVP_CIPHER_CTX_free(cipher);
        return error_set(err, ERR_RESOURCES, "OpenSSL cannot start %s", mask_suite_name(suite));
    }
    s->cipher = cipher;
    s->suite = suite;
    return 0;
}

void mask_stream_release(struct mask_stream *s)
{
    if (!s)
        return;
    EVP_CIPHER_CTX_free(s->cipher); /* cleanses the key schedule */
    *s = (struct mask_stream){0};
}

/* The next n (at most TILE_BYTES) bytes of keystream: zeros encrypted, from a place apart, since clearing out each time
 * costs more. */
static void keystream(struct mask_stream *s, uint8_t *out, size_t n)
{
    static const uint8_t zeros[TILE_BYTES];
    int written = 0;

    if (EVP_EncryptUpdate(s->cipher, out, &written, zeros, (int)n) != 1 || (size_t)written != n)
        fatal("the mask cipher failed");
}

/* Puts the stream at a byte offset: whole blocks by the counter, the rest by discarding. AES-CTR counts in a 128-bit
 * big-endian block number; OpenSSL's ChaCha20 takes 16 bytes whose first 8 act as a 64-bit little-endian one. */
static void seek(struct mask_stream *s, uint64_t byte_offset)
{
    unsigned block = s->suite == MASK_SUITE_CHACHA20 ? CHACHA_BLOCK : AES_BLOCK;
    uint64_t counter = byte_offset / block;
    size_t skip = (size_t)(byte_offset % block);
    uint8_t iv[16] = {0}, discarded[CHACHA_BLOCK];

    for (int i = 0; i < 8; i++)
        iv[s->suite == MASK_SUITE_CHACHA20 ? i : 15 - i] = (uint8_t)(counter >> (8 * i));
    if (EVP_EncryptInit_ex(s->cipher, NULL, NULL, NULL, iv) != 1)
        fatal("the mask cipher failed");
    if (skip > 0)
        keystream(s, discarded, skip);
    sodium_memzero(discarded, sizeof discarded);
}

/* v[i] ±= keystream word i. The loops are written once and compiled for each vector width; words are little-endian, as
 * the processors that this builds for are. */
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "mask words are read as little-endian");

#define DEFINE_ADD(suffix, attribute)                                                                                  \
    attribute static void add32_##suffix(uint32_t *restrict v, const uint32_t *restrict k, size_t n, int sign)         \
    {                                                                                                                  \
        if (sign > 0)                                                                                                  \
            for (size_t i = 0; i < n; i++)                                                                             \
                v[i] += k[i];                                                                                          \
        else                                                                                                           \
            for (size_t i = 0; i < n; i++)                                                                             \
                v[i] -= k[i];                                                                                          \
    }                                                                                                                  \
    attribute static void add64_##suffix(uint64_t *restrict v, const uint64_t *restrict k, size_t n, int sign)         \
    {                                                                                                                  \
        if (sign > 0)                                                                                                  \
            for (size_t i = 0; i < n; i++)                                                                             \
                v[i] += k[i];                                                                                          \
        else                                                                                                           \
            for (size_t i = 0; i < n; i++)                                                                             \
                v[i] -= k[i];                                                                                          \
    }

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
DEFINE_ADD(wide, __attribute__((target("avx512f,avx512vl"), optimize("O3"))))
DEFINE_ADD(avx2, __attribute__((target("avx2"), optimize("O3"))))
DEFINE_ADD(plain, __attribute__((optimize("O3"))))
#else
DEFINE_ADD(plain, )
#endif

enum vector_width { WIDTH_PLAIN, WIDTH_AVX2, WIDTH_AVX512 };

static enum vector_width vector_width(void)
{
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
        return WIDTH_AVX512;
    if (__builtin_cpu_supports("avx2"))
        return WIDTH_AVX2;
#endif
    return WIDTH_PLAIN;
}

static void add_tile(enum vector_width width, unsigned ring_bits, void *vector, const void *k, size_t words, int sign)
{
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (width == WIDTH_AVX512) {
        ring_bits == 32 ? add32_wide(vector, k, words, sign) : add64_wide(vector, k, words, sign);
        return;
    }
    if (width == WIDTH_AVX2) {
        ring_bits == 32 ? add32_avx2(vector, k, words, sign) : add64_avx2(vector, k, words, sign);
        return;
    }
#endif
    (void)width;
    ring_bits == 32 ? add32_plain(vector, k, words, sign) : add64_plain(vector, k, words, sign);
}

static void apply(struct mask_stream *const *streams, const int *signs, size_t k, unsigned ring_bits, uint8_t *vector,
                  uint64_t first_word, size_t words)
{
    _Alignas(64) uint8_t tile[TILE_BYTES];
    const enum vector_width width = vector_width();
    const size_t word_bytes = ring_bits / 8, tile_words = TILE_BYTES / word_bytes;

    if (first_word > UINT64_MAX / word_bytes - words)
        fatal("mask offset beyond the stream");
    for (size_t j = 0; j < k; j++) {
        if (signs[j] != 1 && signs[j] != -1)
            fatal("a mask's sign is neither +1 nor -1");
        seek(streams[j], first_word * word_bytes);
    }
    for (size_t done = 0; done < words; done += tile_words) {
        size_t n = words - done < tile_words ? words - done : tile_words;
        for (size_t j = 0; j < k; j++) {
            keystream(streams[j], tile, n * word_bytes);
            add_tile(width, ring_bits, vector + done * word_bytes, tile, n, signs[j]);
        }
    }
    sodium_memzero(tile, sizeof tile);
}

void mask_apply(struct mask_stream *const *streams, const int *signs, size_t k, uint32_t *vector, uint64_t first_word,
                size_t words)
{
    apply(streams, signs, k, 32, (uint8_t *)vector, first_word, words);
}

void mask_apply64(struct mask_stream *const *streams, const int *signs, size_t k, uint64_t *vector, uint64_t first_word,
                  size_t words)
{
    apply(streams, signs, k, 64, (uint8_t *)vector, first_word, words);
}
