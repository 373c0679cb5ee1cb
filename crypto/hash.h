/*
 * SHA-256 (FIPS 180-4, computed by OpenSSL), HMAC (RFC 2104) and HKDF (RFC 5869) over it, and the labelled hash.
 *
 * The labelled hash is the only way in which several values are hashed together here: SHA-256 over frame(label) ‖
 * frame(part 0) ‖ …, where frame(x) = u64 little-endian length of x ‖ x. Two different lists of parts,
 * or two labels, never give the same bytes. Labels look like "consilium/h1".
 *
 * In place, no allocation, no failure; a struct hash may be copied to fork it. One thread at a time per object.
 *
 *     struct hash h;
 *     hash_begin(&h, "consilium/h1");
 *     hash_part(&h, span_of(h0, HASH_SIZE));
 *     hash_part(&h, advert);
 *     hash_end(&h, h1);
 */
#ifndef CRYPTO_HASH_H
#define CRYPTO_HASH_H

#include "base/error.h"
#include "base/span.h"

enum { HASH_SIZE = 32, HASH_BLOCK = 64, HKDF_OUT_MAX = 255 * HASH_SIZE };

struct hash {
    _Alignas(8) uint8_t state[128]; /* OpenSSL's SHA256_CTX */
};

/* Plain SHA-256. */
void hash_init(struct hash *h);
void hash_update(struct hash *h, struct span data);
void hash_final(struct hash *h, uint8_t out[HASH_SIZE]); /* wipes h */
void hash_bytes(struct span data, uint8_t out[HASH_SIZE]);
/* Streams the file in 1 MiB pieces; ret_bytes (may be NULL) gets its size. ERR_NOT_FOUND, ERR_RESOURCES. */
int MUST_USE hash_file(const char *path, uint8_t ret_hash[HASH_SIZE], uint64_t *ret_bytes, struct error *err);

/* Labelled hash, in pieces or at once. */
void hash_begin(struct hash *h, const char *label);
void hash_part(struct hash *h, struct span part);
void hash_part_u64(struct hash *h, uint64_t value); /* a part of 8 bytes, little-endian */
void hash_end(struct hash *h, uint8_t out[HASH_SIZE]);
void hash_labelled(const char *label, const struct span *parts, size_t count, uint8_t out[HASH_SIZE]);

/* HMAC-SHA256. */
struct hmac {
    struct hash inner, outer;
};
void hmac_init(struct hmac *m, struct span key);
void hmac_update(struct hmac *m, struct span data);
void hmac_final(struct hmac *m, uint8_t out[HASH_SIZE]); /* wipes m */
void hmac_bytes(struct span key, struct span data, uint8_t out[HASH_SIZE]);

/* HKDF-SHA256: extract then expand. out_len ≤ HKDF_OUT_MAX (asserted). An empty salt means 32 zero bytes, as in the
 * RFC. */
void hkdf_sha256(struct span key, struct span salt, struct span info, uint8_t *out, size_t out_len);
/* The same with info = the frames of label and parts (see above), for keys bound to several values. */
void hkdf_labelled(struct span key, struct span salt, const char *label, const struct span *parts, size_t count,
                   uint8_t *out, size_t out_len);

#endif
