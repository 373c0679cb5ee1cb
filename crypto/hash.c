/* OpenSSL's SHA256_* functions work in place and cannot fail, and take the processor's SHA instructions; the EVP ones
 * would allocate for each of the thousands of small hashes of a round. They are marked deprecated, not removed. */
#define OPENSSL_SUPPRESS_DEPRECATED

#include "crypto/hash.h"

#include "crypto/fatal.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/sha.h>
#include <unistd.h>

static_assert(sizeof(SHA256_CTX) <= sizeof((struct hash *)0)->state, "struct hash holds OpenSSL's state");

static SHA256_CTX *state_of(struct hash *h)
{
    return (SHA256_CTX *)(void *)h->state;
}

void hash_init(struct hash *h)
{
    SHA256_Init(state_of(h));
}

void hash_update(struct hash *h, struct span data)
{
    if (data.len > 0)
        SHA256_Update(state_of(h), data.ptr, data.len);
}

void hash_final(struct hash *h, uint8_t out[HASH_SIZE])
{
    SHA256_Final(out, state_of(h));
    sodium_memzero(h, sizeof *h);
}

void hash_bytes(struct span data, uint8_t out[HASH_SIZE])
{
    struct hash h;

    hash_init(&h);
    hash_update(&h, data);
    hash_final(&h, out);
}

int hash_file(const char *path, uint8_t ret_hash[HASH_SIZE], uint64_t *ret_bytes, struct error *err)
{
    enum { PIECE = 1 << 20 };
    struct hash h;
    uint8_t *piece = NULL;
    uint64_t total = 0;
    int rc = 0, fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return error_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_RESOURCES, "%s: cannot open: %s", path,
                         strerror(errno));
    piece = malloc(PIECE);
    if (!piece) {
        rc = error_set(err, ERR_RESOURCES, "%s: out of memory", path);
        goto out;
    }
    hash_init(&h);
    for (;;) {
        ssize_t n = read(fd, piece, PIECE);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            rc = error_set(err, ERR_RESOURCES, "%s: cannot read: %s", path, strerror(errno));
            goto out;
        }
        if (n == 0)
            break;
        hash_update(&h, span_of(piece, (size_t)n));
        total += (uint64_t)n;
    }
    hash_final(&h, ret_hash);
    if (ret_bytes)
        *ret_bytes = total;
out:
    free(piece);
    close(fd);
    return rc;
}

static void encode_u64(uint8_t out[8], uint64_t v)
{
    for (int i = 0; i < 8; i++)
        out[i] = (uint8_t)(v >> (8 * i));
}

void hash_part(struct hash *h, struct span part)
{
    uint8_t length[8];

    encode_u64(length, part.len);
    hash_update(h, span_of(length, sizeof length));
    hash_update(h, part);
}

void hash_part_u64(struct hash *h, uint64_t value)
{
    uint8_t bytes[8];

    encode_u64(bytes, value);
    hash_part(h, span_of(bytes, sizeof bytes));
}

void hash_begin(struct hash *h, const char *label)
{
    hash_init(h);
    hash_part(h, span_str(label));
}

void hash_end(struct hash *h, uint8_t out[HASH_SIZE])
{
    hash_final(h, out);
}

void hash_labelled(const char *label, const struct span *parts, size_t count, uint8_t out[HASH_SIZE])
{
    struct hash h;

    hash_begin(&h, label);
    for (size_t i = 0; i < count; i++)
        hash_part(&h, parts[i]);
    hash_end(&h, out);
}

void hmac_init(struct hmac *m, struct span key)
{
    uint8_t pad[HASH_BLOCK] = {0};

    if (key.len > HASH_BLOCK)
        hash_bytes(key, pad);
    else if (key.len > 0)
        memcpy(pad, key.ptr, key.len);
    for (size_t i = 0; i < HASH_BLOCK; i++)
        pad[i] ^= 0x36;
    hash_init(&m->inner);
    hash_update(&m->inner, span_of(pad, sizeof pad));
    for (size_t i = 0; i < HASH_BLOCK; i++)
        pad[i] ^= 0x36 ^ 0x5c;
    hash_init(&m->outer);
    hash_update(&m->outer, span_of(pad, sizeof pad));
    sodium_memzero(pad, sizeof pad);
}

void hmac_update(struct hmac *m, struct span data)
{
    hash_update(&m->inner, data);
}

void hmac_final(struct hmac *m, uint8_t out[HASH_SIZE])
{
    uint8_t inner[HASH_SIZE];

    hash_final(&m->inner, inner);
    hash_update(&m->outer, span_of(inner, sizeof inner));
    hash_final(&m->outer, out);
    sodium_memzero(inner, sizeof inner);
}

void hmac_bytes(struct span key, struct span data, uint8_t out[HASH_SIZE])
{
    struct hmac m;

    hmac_init(&m, key);
    hmac_update(&m, data);
    hmac_final(&m, out);
}

static void part_into(struct hmac *m, struct span part)
{
    uint8_t length[8];

    encode_u64(length, part.len);
    hmac_update(m, span_of(length, sizeof length));
    hmac_update(m, part);
}

/* Expand with info = raw ‖ frame(label) ‖ frames of parts; label NULL for the plain RFC form. */
static void hkdf(struct span key, struct span salt, struct span raw, const char *label, const struct span *parts,
                 size_t count, uint8_t *out, size_t out_len)
{
    uint8_t extracted[HASH_SIZE], block[HASH_SIZE];
    uint8_t counter = 0;
    size_t done = 0;

    if (out_len > HKDF_OUT_MAX)
        fatal("HKDF-SHA256 gives at most 8160 bytes");
    hmac_bytes(salt, key, extracted);
    while (done < out_len) {
        struct hmac m;
        size_t n = out_len - done < HASH_SIZE ? out_len - done : HASH_SIZE;

        hmac_init(&m, span_of(extracted, sizeof extracted));
        if (counter > 0)
            hmac_update(&m, span_of(block, sizeof block));
        hmac_update(&m, raw);
        if (label)
            part_into(&m, span_str(label));
        for (size_t i = 0; i < count; i++)
            part_into(&m, parts[i]);
        counter++;
        hmac_update(&m, span_of(&counter, 1));
        hmac_final(&m, block);
        memcpy(out + done, block, n);
        done += n;
    }
    sodium_memzero(extracted, sizeof extracted);
    sodium_memzero(block, sizeof block);
}

void hkdf_sha256(struct span key, struct span salt, struct span info, uint8_t *out, size_t out_len)
{
    hkdf(key, salt, info, NULL, NULL, 0, out, out_len);
}

void hkdf_labelled(struct span key, struct span salt, const char *label, const struct span *parts, size_t count,
                   uint8_t *out, size_t out_len)
{
    hkdf(key, salt, span_of(NULL, 0), label, parts, count, out, out_len);
}
