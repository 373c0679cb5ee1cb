/*
 * What the masks cost: k streams fused into one vector (crypto/mask.h) against the bare cipher, EVP over one 16 KiB
 * block as `openssl speed -evp` does, on the same core in the same run; then the other operations of a round.
 *
 *     bench_crypto [--json] [--quick]
 *
 * Times are CPU seconds of this process, the best of several repetitions, so another load on the machine disturbs them
 * little.
 */
#include <openssl/evp.h> /* first: it names a parameter "rand", which base/banned.h poisons */

#include "crypto/agree.h"
#include "crypto/hash.h"
#include "crypto/mask.h"
#include "crypto/random.h"
#include "crypto/seal.h"
#include "crypto/shamir.h"
#include "crypto/sign.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { STREAMS = 16, REPEATS = 5 };

struct result {
    const char *name, *unit;
    double value;
};

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double cipher_gb_s(const EVP_CIPHER *cipher)
{
    static uint8_t block[16384];
    const uint8_t key[32] = {1}, iv[16] = {0};
    const int rounds = 8000;
    EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();
    double best = 1e9;
    int n;

    if (!ctx || EVP_EncryptInit_ex(ctx, cipher, NULL, key, iv) != 1)
        exit(1);
    for (int r = 0; r < REPEATS; r++) {
        double start = cpu_s(), t;
        for (int i = 0; i < rounds; i++)
            if (EVP_EncryptUpdate(ctx, block, &n, block, sizeof block) != 1)
                exit(1);
        t = cpu_s() - start;
        best = t < best ? t : best;
    }
    EVP_CIPHER_CTX_free(ctx);
    return (double)rounds * sizeof block / best * 1e-9;
}

static double mask_gb_s(enum mask_suite suite, uint32_t *vector, size_t words)
{
    struct mask_stream streams[STREAMS], *pointers[STREAMS];
    int signs[STREAMS];
    double best = 1e9;

    for (int j = 0; j < STREAMS; j++) {
        uint8_t key[MASK_KEY_SIZE];
        rng_fill(&random_system, key, sizeof key);
        if (mask_stream_init(&streams[j], suite, key, NULL) < 0)
            exit(1);
        pointers[j] = &streams[j];
        signs[j] = j % 2 ? 1 : -1;
    }
    for (int r = 0; r < REPEATS; r++) {
        double start = cpu_s(), t;
        mask_apply(pointers, signs, STREAMS, vector, 0, words);
        t = cpu_s() - start;
        best = t < best ? t : best;
    }
    for (int j = 0; j < STREAMS; j++)
        mask_stream_release(&streams[j]);
    return (double)words * 4 * STREAMS / best * 1e-9;
}

static double hash_gb_s(const uint8_t *data, size_t len)
{
    uint8_t out[HASH_SIZE];
    double start = cpu_s();

    hash_bytes(span_of(data, len), out);
    return (double)len / (cpu_s() - start) * 1e-9;
}

static void public_key_us(double *ret_agree, double *ret_sign, double *ret_verify)
{
    enum { N = 300 };
    struct agree_key a, b;
    struct sign_key key;
    uint8_t shared[32], signature[SIGN_SIZE];
    const struct span part = span_str("a part of a message");
    double start = cpu_s();
    int failures = 0;

    agree_random(&a, &random_system);
    agree_random(&b, &random_system);
    sign_key_random(&key, &random_system);
    start = cpu_s();
    for (int i = 0; i < N; i++)
        failures += agree_shared(a.secret, b.public_key, shared) < 0;
    *ret_agree = (cpu_s() - start) / N * 1e6;
    start = cpu_s();
    for (int i = 0; i < N; i++)
        sign_parts(&key, "bench", &part, 1, signature);
    *ret_sign = (cpu_s() - start) / N * 1e6;
    start = cpu_s();
    for (int i = 0; i < N; i++)
        failures += sign_verify(key.public_key, "bench", &part, 1, signature) < 0;
    *ret_verify = (cpu_s() - start) / N * 1e6;
    if (failures)
        exit(1);
}

static void shamir_ms(double *ret_split, double *ret_prepare, double *ret_combine)
{
    enum { N = 200, T = 134, SECRETS = 50 };
    static uint8_t shares[N][SHAMIR_SIZE];
    uint8_t secret[SHAMIR_SIZE], out[SHAMIR_SIZE];
    uint32_t indices[T];
    struct shamir_combiner c;
    double start;

    shamir_random(secret, &random_system);
    start = cpu_s();
    if (shamir_split(secret, T, N, &random_system, shares, NULL) < 0)
        exit(1);
    *ret_split = (cpu_s() - start) * 1e3;
    for (uint32_t i = 0; i < T; i++)
        indices[i] = i + 1;
    start = cpu_s();
    if (shamir_combiner_init(&c, indices, T, NULL) < 0)
        exit(1);
    *ret_prepare = (cpu_s() - start) * 1e3;
    start = cpu_s();
    for (int i = 0; i < SECRETS; i++)
        if (shamir_combine(&c, (const uint8_t(*)[SHAMIR_SIZE])shares, out) < 0 || memcmp(out, secret, sizeof out) != 0)
            exit(1);
    *ret_combine = (cpu_s() - start) * 1e3 / SECRETS;
    shamir_combiner_release(&c);
}

int main(int argc, char **argv)
{
    bool json = false, quick = false;
    struct result results[16];
    size_t count = 0, words;
    uint32_t *vector;
    double a, b, c;

    for (int i = 1; i < argc; i++) {
        json = json || strcmp(argv[i], "--json") == 0;
        quick = quick || strcmp(argv[i], "--quick") == 0;
    }
    words = (quick ? (size_t)1 : (size_t)10) << 20;
    vector = calloc(words, sizeof *vector);
    if (!vector)
        return 1;
    memset(vector, 1, words * sizeof *vector);
    a = cipher_gb_s(EVP_aes_256_ctr());
    b = mask_gb_s(MASK_SUITE_AES_256_CTR, vector, words);
    results[count++] = (struct result){"evp_aes_256_ctr", "GB/s", a};
    results[count++] = (struct result){"mask_aes_256_ctr", "GB/s", b};
    results[count++] = (struct result){"mask_aes_256_ctr_ratio", "", b / a};
    a = cipher_gb_s(EVP_chacha20());
    b = mask_gb_s(MASK_SUITE_CHACHA20, vector, words);
    results[count++] = (struct result){"evp_chacha20", "GB/s", a};
    results[count++] = (struct result){"mask_chacha20", "GB/s", b};
    results[count++] = (struct result){"mask_chacha20_ratio", "", b / a};
    results[count++] = (struct result){"sha256", "GB/s", hash_gb_s((const uint8_t *)vector, words * sizeof *vector)};
    public_key_us(&a, &b, &c);
    results[count++] = (struct result){"x25519", "us", a};
    results[count++] = (struct result){"sign", "us", b};
    results[count++] = (struct result){"verify", "us", c};
    shamir_ms(&a, &b, &c);
    results[count++] = (struct result){"shamir_split_200_134", "ms", a};
    results[count++] = (struct result){"shamir_prepare_134", "ms", b};
    results[count++] = (struct result){"shamir_combine_134", "ms", c};
    free(vector);

    if (json)
        printf("{\"streams\": %d, \"words\": %zu", STREAMS, words);
    for (size_t i = 0; i < count; i++) {
        if (json)
            printf(", \"%s\": %.4g", results[i].name, results[i].value);
        else
            printf("%-24s %9.3f %s\n", results[i].name, results[i].value, results[i].unit);
    }
    if (json)
        printf("}\n");
    return 0;
}
