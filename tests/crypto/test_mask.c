#include "helpers.h"

#include "crypto/mask.h"

static struct mask_stream stream_of(enum mask_suite suite, const uint8_t key[32])
{
    struct mask_stream s;
    assert_int_equal(mask_stream_init(&s, suite, key, NULL), 0);
    return s;
}

static void one(struct mask_stream *s, int sign, uint32_t *v, uint64_t first, size_t words)
{
    mask_apply((struct mask_stream *[]){s}, &sign, 1, v, first, words);
}

/* Keystreams as published. SP 800-38A F.5.5 uses a first counter f0f1…ff, out of our reach (ours is 0), so AES is
 * checked through its block function: AES-256 of the zero block under the FIPS-197 appendix C.3 key is not published,
 * but the block of NIST's AESAVS GFSbox/KeySbox files for 256-bit keys is: key below, plain text 0. ChaCha20: RFC 8439
 * appendix A.1, tests 1, 2. */
static void published_keystreams(void **state)
{
    uint8_t key[32] = {0};
    uint32_t words[32] = {0};
    struct mask_stream s;

    (void)state;
    from_hex("c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558", key); /* AESAVS appendix C.3 KeySbox */
    s = stream_of(MASK_SUITE_AES_256_CTR, key);
    one(&s, 1, words, 0, 4);
    assert_hex((uint8_t *)words, "46f2fb342d6f0ab477476fc501242c5f");
    mask_stream_release(&s);
    memset(words, 0, sizeof words);
    memset(key, 0, sizeof key);
    s = stream_of(MASK_SUITE_CHACHA20, key);
    one(&s, 1, words, 0, 32);
    assert_hex((uint8_t *)words, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
                                 "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586");
    assert_hex((uint8_t *)words + 64, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
                                      "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f");
    mask_stream_release(&s);
    mask_stream_release(NULL);
}

static void chunking_is_irrelevant(void **state)
{
    enum { WORDS = 50000, K = 5 };
    static uint32_t whole[WORDS], pieces[WORDS], direct[WORDS], raw[WORDS], plain[WORDS];
    static uint64_t whole64[1000], pieces64[1000];
    struct random_stream stream;
    struct rng rng = fixed_rng(&stream, 3);

    (void)state;
    for (enum mask_suite suite = MASK_SUITE_AES_256_CTR; suite <= MASK_SUITE_CHACHA20; suite++) {
        struct mask_stream s[K], *p[K];
        int signs[K] = {1, -1, -1, 1, 1};
        for (int j = 0; j < K; j++) {
            uint8_t key[32];
            rng_fill(&rng, key, sizeof key);
            s[j] = stream_of(suite, key);
            p[j] = &s[j];
        }
        rng_fill(&rng, whole, sizeof whole);
        memcpy(plain, whole, sizeof whole);
        memcpy(pieces, whole, sizeof whole);
        memcpy(direct, whole, sizeof whole);
        mask_apply(p, signs, K, whole, 0, WORDS);
        for (int j = 0; j < K; j++) { /* one stream at a time, added here */
            memset(raw, 0, sizeof raw);
            one(p[j], 1, raw, 0, WORDS);
            for (size_t i = 0; i < WORDS; i++)
                direct[i] += signs[j] > 0 ? raw[i] : 0u - raw[i];
        }
        assert_memory_equal(direct, whole, sizeof whole);
        for (size_t at = 0; at < WORDS;) { /* odd pieces, so every offset within a block occurs */
            size_t n = 1 + (size_t)rng_below(&rng, 9000);
            if (n > WORDS - at)
                n = WORDS - at;
            mask_apply(p, signs, K, pieces + at, at, n);
            at += n;
        }
        assert_memory_equal(pieces, whole, sizeof whole);
        /* the same masks with the opposite signs take it all away again: pairwise cancellation */
        for (int j = 0; j < K; j++)
            signs[j] = -signs[j];
        mask_apply(p, signs, K, pieces, 0, WORDS);
        assert_memory_equal(pieces, plain, sizeof plain);
        mask_apply64(p, signs, K, whole64, 0, 1000);
        for (size_t at = 0; at < 1000; at += 125)
            mask_apply64(p, signs, K, pieces64 + at, at, 125);
        assert_memory_equal(pieces64, whole64, sizeof whole64);
        assert_true(whole64[999] != 0);
        memset(whole64, 0, sizeof whole64);
        memset(pieces64, 0, sizeof pieces64);
        /* a 64-bit counter: beyond 2^32 blocks of 64 bytes the stream does not start over */
        memset(raw, 0, sizeof raw);
        one(p[0], 1, raw, 0, 64);
        one(p[0], 1, raw + 64, (uint64_t)1 << 36, 64);
        assert_memory_not_equal(raw, raw + 64, 64 * 4);
        for (int j = 0; j < K; j++)
            mask_stream_release(&s[j]);
    }
}

static void keys_are_separate(void **state)
{
    uint8_t shared[32] = {1}, h2[32] = {2}, other[32] = {3}, k[8][32];

    (void)state;
    mask_pair_key(shared, h2, "main", 32, "a", "b", k[0]);
    mask_pair_key(shared, h2, "main", 32, "b", "a", k[1]);
    assert_memory_equal(k[0], k[1], 32);
    mask_pair_key(shared, h2, "main", 64, "a", "b", k[1]);
    mask_pair_key(shared, h2, "stats", 32, "a", "b", k[2]);
    mask_pair_key(shared, h2, "main", 32, "a", "c", k[3]);
    mask_pair_key(shared, other, "main", 32, "a", "b", k[4]);
    mask_pair_key(other, h2, "main", 32, "a", "b", k[5]);
    mask_self_key(shared, h2, "main", 32, "a", k[6]);
    mask_self_key(shared, h2, "main", 32, "b", k[7]);
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++)
            assert_memory_not_equal(k[i], k[j], 32);
    assert_int_equal(mask_pair_sign("a", "b"), 1);
    assert_int_equal(mask_pair_sign("b", "a"), -1);
    assert_int_equal(mask_pair_sign("site-1", "site-10"), 1);
    assert_false(mask_suite_known(0));
    assert_false(mask_suite_known(3));
    {
        struct mask_stream s;
        struct error err;
        assert_int_equal(mask_stream_init(&s, (enum mask_suite)7, shared, &err), ERR_CONFIG);
    }
}

/* Length of the shortest linear feedback register that makes the bits (Berlekamp–Massey over GF(2)). */
static size_t linear_complexity(const uint8_t *bits, size_t n)
{
    static uint8_t c[4096], b[4096], keep[4096];
    size_t len = 0, m = 1;

    memset(c, 0, sizeof c);
    memset(b, 0, sizeof b);
    c[0] = b[0] = 1;
    for (size_t i = 0; i < n; i++, m++) {
        uint8_t d = bits[i];
        for (size_t j = 1; j <= len; j++)
            d ^= c[j] & bits[i - j];
        if (!d)
            continue;
        memcpy(keep, c, sizeof c);
        for (size_t j = 0; j + m < sizeof c; j++)
            c[j + m] ^= b[j];
        if (2 * len <= i) {
            len = i + 1 - len;
            memcpy(b, keep, sizeof b);
            m = 0;
        }
    }
    return len;
}

static void statistics(void **state)
{
    enum { BITS = 4000, WORDS = 1 << 18 };
    static uint32_t v[WORDS];
    static uint8_t bits[BITS];
    uint8_t key[32] = {42};

    (void)state;
    for (enum mask_suite suite = MASK_SUITE_AES_256_CTR; suite <= MASK_SUITE_CHACHA20; suite++) {
        struct mask_stream s = stream_of(suite, key);
        size_t counts[256] = {0}, complexity;
        double chi = 0;
        memset(v, 0, sizeof v);
        one(&s, 1, v, 0, WORDS);
        for (size_t i = 0; i < sizeof v; i++)
            counts[((const uint8_t *)v)[i]]++;
        for (int i = 0; i < 256; i++)
            chi += ((double)counts[i] - WORDS / 64.0) * ((double)counts[i] - WORDS / 64.0) / (WORDS / 64.0);
        assert_true(chi > 255 - 6 * 22.6 && chi < 255 + 6 * 22.6); /* mean 255, deviation √510 */
        for (size_t i = 0; i < BITS; i++)
            bits[i] = v[i] & 1;
        complexity = linear_complexity(bits, BITS);
        assert_true(complexity >= BITS / 2 - 20 && complexity <= BITS / 2 + 20);
        mask_stream_release(&s);
    }
    for (size_t i = 0; i < BITS; i++) /* the test sees a linear generator: x^31 + x^3 + 1 */
        bits[i] = i < 31 ? i == 0 : bits[i - 31] ^ bits[i - 28];
    assert_int_equal(linear_complexity(bits, BITS), 31);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_keystreams),
        cmocka_unit_test(chunking_is_irrelevant),
        cmocka_unit_test(keys_are_separate),
        cmocka_unit_test(statistics),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
