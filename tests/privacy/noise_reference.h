/*
 * The noise of privacy/noise_vector.h once more, by base/gaussian_draw.h over a plain ChaCha20: it needs base/ alone,
 * so the CPU's vectors (libsodium) and a card's are both compared with it.
 */
#ifndef TESTS_PRIVACY_NOISE_REFERENCE_H
#define TESTS_PRIVACY_NOISE_REFERENCE_H

#include <stddef.h>
#include <stdint.h>

/* What the comparisons run over; every count with every variance. */
static const uint64_t noise_variances[] = {1, 1000, 1 << 20, (uint64_t)1 << 40, (uint64_t)1 << 52};
static const size_t noise_counts[] = {0, 1, 63, 64, 65, 1000, 4097};

#ifdef __cplusplus
extern "C" {
#endif
/* RFC 8439, 2.3: counter at 12, nonce at 13 to 15. */
void reference_chacha20_block(const uint32_t key[8], uint32_t counter, const uint32_t nonce[3], uint32_t out[16]);
/* Vector `number` under key (8 little-endian words): count coordinates. */
void reference_noise(const uint32_t key[8], uint32_t number, uint64_t variance, size_t count, int64_t *out);
#ifdef __cplusplus
}
#endif

#endif
