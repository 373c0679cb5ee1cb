#include "crypto/seal.h"

#include "base/file.h"
#include "crypto/fatal.h"

#include <errno.h>
#include <sys/stat.h>

static const uint8_t magic[8] = {'C', 'S', 'E', 'A', 'L', 0, 0, 1};

static void encrypt(const uint8_t key[SEAL_KEY_SIZE], const uint8_t nonce[SEAL_NONCE_SIZE], struct span aad,
                    struct span plain, uint8_t *out)
{
    sodium_ready();
    if (crypto_aead_xchacha20poly1305_ietf_encrypt(out, NULL, plain.ptr, plain.len, aad.ptr, aad.len, NULL, nonce,
                                                   key) != 0)
        fatal("XChaCha20-Poly1305 failed");
}

static int decrypt(const uint8_t key[SEAL_KEY_SIZE], const uint8_t nonce[SEAL_NONCE_SIZE], struct span aad,
                   struct span sealed, uint8_t *ret_plain)
{
    sodium_ready();
    if (sealed.len < SEAL_TAG_SIZE)
        return ERR_INTEGRITY;
    /* libsodium checks the tag before it writes a byte of plain text. */
    return crypto_aead_xchacha20poly1305_ietf_decrypt(ret_plain, NULL, NULL, sealed.ptr, sealed.len, aad.ptr, aad.len,
                                                      nonce, key) == 0
               ? 0
               : ERR_INTEGRITY;
}

void seal_once(const uint8_t key[SEAL_KEY_SIZE], struct span aad, struct span plain, uint8_t *out)
{
    const uint8_t nonce[SEAL_NONCE_SIZE] = {0};

    encrypt(key, nonce, aad, plain, out);
}

int open_once(const uint8_t key[SEAL_KEY_SIZE], struct span aad, struct span sealed, uint8_t *ret_plain)
{
    const uint8_t nonce[SEAL_NONCE_SIZE] = {0};

    return decrypt(key, nonce, aad, sealed, ret_plain);
}

void seal_random(const uint8_t key[SEAL_KEY_SIZE], const struct rng *rng, struct span aad, struct span plain,
                 uint8_t *out)
{
    rng_fill(rng, out, SEAL_NONCE_SIZE);
    encrypt(key, out, aad, plain, out + SEAL_NONCE_SIZE);
}

int open_random(const uint8_t key[SEAL_KEY_SIZE], struct span aad, struct span sealed, uint8_t *ret_plain)
{
    if (sealed.len < SEAL_OVERHEAD)
        return ERR_INTEGRITY;
    return decrypt(key, sealed.ptr, aad, span_of(sealed.ptr + SEAL_NONCE_SIZE, sealed.len - SEAL_NONCE_SIZE),
                   ret_plain);
}

static void context_aad(const char *context, struct buffer *aad)
{
    buffer_init(aad, 4096);
    buffer_append(aad, magic, sizeof magic);
    buffer_u64(aad, strlen(context));
    buffer_append(aad, context, strlen(context));
}

int seal_file_write(const char *path, const uint8_t key[SEAL_KEY_SIZE], const struct rng *rng, const char *context,
                    struct span plain, struct error *err)
{
    struct buffer aad, file;
    uint8_t *sealed;
    int rc;

    context_aad(context, &aad);
    if (plain.len > SIZE_MAX - sizeof magic - SEAL_OVERHEAD)
        fatal("seal_file_write: impossible size");
    buffer_init(&file, sizeof magic + plain.len + SEAL_OVERHEAD);
    buffer_append(&file, magic, sizeof magic);
    sealed = buffer_extend(&file, plain.len + SEAL_OVERHEAD);
    if (!sealed || !buffer_ok(&aad)) {
        rc = error_set(err, ERR_RESOURCES, "%s: out of memory while sealing %zu bytes", path, plain.len);
        goto out;
    }
    seal_random(key, rng, buffer_span(&aad), plain, sealed);
    rc = file_write_atomic(path, buffer_span(&file), 0600, err);
out:
    buffer_release(&file);
    buffer_release(&aad);
    return rc;
}

int seal_file_read(const char *path, const uint8_t key[SEAL_KEY_SIZE], const char *context, struct buffer *out,
                   struct error *err)
{
    struct span map, sealed;
    struct buffer aad;
    uint8_t *plain;
    size_t before = out->len;
    int rc = file_map(path, &map, err);

    if (rc < 0)
        return rc;
    context_aad(context, &aad);
    if (map.len < sizeof magic + SEAL_OVERHEAD || memcmp(map.ptr, magic, sizeof magic) != 0) {
        rc = error_set(err, ERR_INTEGRITY, "%s: not a sealed file, or truncated", path);
        goto out;
    }
    sealed = span_of(map.ptr + sizeof magic, map.len - sizeof magic);
    plain = buffer_extend(out, sealed.len - SEAL_OVERHEAD);
    if ((!plain && sealed.len > SEAL_OVERHEAD) || !buffer_ok(&aad)) {
        rc = error_set(err, ERR_RESOURCES, "%s: larger than the limit of %zu bytes, or out of memory", path, out->max);
        goto out;
    }
    if (open_random(key, buffer_span(&aad), sealed, plain) < 0) {
        out->len = before;
        rc = error_set(err, ERR_INTEGRITY,
                       "%s: cannot be opened: changed, of another purpose than \"%s\", or sealed under another key",
                       path, context);
    }
out:
    buffer_release(&aad);
    file_unmap(map);
    return rc;
}

int seal_key_create(const char *path, const struct rng *rng, struct error *err)
{
    uint8_t key[SEAL_KEY_SIZE];
    int rc;

    if (file_exists(path))
        return error_set(err, ERR_EXISTS, "%s: exists; what it sealed would be lost if it were replaced", path);
    rng_fill(rng, key, sizeof key);
    rc = file_write_atomic(path, span_of(key, sizeof key), 0600, err);
    sodium_memzero(key, sizeof key);
    return rc;
}

int seal_key_load(const char *path, uint8_t ret_key[SEAL_KEY_SIZE], struct error *err)
{
    struct buffer file;
    struct stat st;
    int rc;

    if (stat(path, &st) < 0)
        return error_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_RESOURCES, "%s: cannot open: %s", path,
                         strerror(errno));
    if (st.st_mode & 077)
        return error_set(err, ERR_CONFIG, "%s: mode %04o lets others read the key; run: chmod 600", path,
                         (unsigned)(st.st_mode & 07777));
    buffer_init(&file, SEAL_KEY_SIZE);
    rc = file_read(path, &file, err);
    if (rc == 0 && file.len != SEAL_KEY_SIZE)
        rc = error_set(err, ERR_INTEGRITY, "%s: %zu bytes where a key has %d", path, file.len, SEAL_KEY_SIZE);
    if (rc == 0)
        memcpy(ret_key, file.data, SEAL_KEY_SIZE);
    buffer_wipe_release(&file);
    return rc;
}
