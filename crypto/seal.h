/*
 * Authenticated encryption: XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03, computed by libsodium) with associated
 * data.
 *
 * Two ways. seal_once uses nonce 0 and is for a key that seals one message ever (share channel keys). seal_random puts
 * a random 24-byte nonce in front and is for a key used many times (a site's state key). A sealed file is "CSEAL\0\0\1"
 * ‖ seal_random(associated data = magic ‖ frame(context)); the context names what the file is (job, round, attempt), so
 * a file put in another's place does not open. The key is secret memory. Thread-safe: no state.
 *
 *     seal_once(key, aad, span_of(plain, n), sealed);             sealed: n + SEAL_TAG_SIZE bytes
 *     if (open_once(key, aad, span_of(sealed, m), plain) < 0) ... plain: m − SEAL_TAG_SIZE bytes
 */
#ifndef CRYPTO_SEAL_H
#define CRYPTO_SEAL_H

#include "base/buffer.h"
#include "base/rng.h"

enum { SEAL_KEY_SIZE = 32, SEAL_NONCE_SIZE = 24, SEAL_TAG_SIZE = 16, SEAL_OVERHEAD = SEAL_NONCE_SIZE + SEAL_TAG_SIZE };

/* out: plain.len + SEAL_TAG_SIZE bytes. */
void seal_once(const uint8_t key[SEAL_KEY_SIZE], struct span aad, struct span plain, uint8_t *out);
/* ret_plain: sealed.len − SEAL_TAG_SIZE bytes. ERR_INTEGRITY for a wrong key, associated data or any changed bit. */
int MUST_USE open_once(const uint8_t key[SEAL_KEY_SIZE], struct span aad, struct span sealed, uint8_t *ret_plain);

/* out: plain.len + SEAL_OVERHEAD bytes: nonce ‖ ciphertext ‖ tag. */
void seal_random(const uint8_t key[SEAL_KEY_SIZE], const struct rng *rng, struct span aad, struct span plain,
                 uint8_t *out);
/* ret_plain: sealed.len − SEAL_OVERHEAD bytes. */
int MUST_USE open_random(const uint8_t key[SEAL_KEY_SIZE], struct span aad, struct span sealed, uint8_t *ret_plain);

/* Atomic and durable, mode 0600. */
int MUST_USE seal_file_write(const char *path, const uint8_t key[SEAL_KEY_SIZE], const struct rng *rng,
                             const char *context, struct span plain, struct error *err);
/* Appends the plain bytes to out (release it with buffer_wipe_release). ERR_NOT_FOUND, ERR_INTEGRITY, ERR_RESOURCES
 * when larger than out's maximum. */
int MUST_USE seal_file_read(const char *path, const uint8_t key[SEAL_KEY_SIZE], const char *context, struct buffer *out,
                            struct error *err);

/* A state key file: 32 random bytes, mode 0600. Create refuses to replace one (ERR_EXISTS): what it sealed would be
 * lost. Load refuses files that group or others can read. */
int MUST_USE seal_key_create(const char *path, const struct rng *rng, struct error *err);
int MUST_USE seal_key_load(const char *path, uint8_t ret_key[SEAL_KEY_SIZE], struct error *err);

#endif
