#include <openssl/evp.h> /* first: it names a parameter "rand", which base/banned.h poisons */
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include "crypto/identity.h"

#include "base/file.h"
#include "crypto/fatal.h"
#include "crypto/secret.h"
#include "crypto/x509.h"

#include <errno.h>
#include <sys/stat.h>

struct identity_key {
    struct sign_key sign;
    EVP_PKEY *pkey;
};

bool identity_id_valid(const char *id)
{
    size_t len = strlen(id);

    if (len < 1 || len >= IDENTITY_ID_SIZE)
        return false;
    return strspn(id, "abcdefghijklmnopqrstuvwxyz0123456789-") == len;
}

static int key_from_pkey(EVP_PKEY *pkey, const uint8_t seed[SIGN_SEED_SIZE], struct identity_key **ret_key,
                         struct error *err)
{
    struct identity_key *key = secret_new(sizeof *key);

    if (!key) {
        EVP_PKEY_free(pkey);
        return error_set(err, ERR_RESOURCES, "no protected memory for a key");
    }
    sign_key_from_seed(&key->sign, seed);
    key->pkey = pkey;
    *ret_key = key;
    return 0;
}

int identity_key_from_seed(const uint8_t seed[SIGN_SEED_SIZE], struct identity_key **ret_key, struct error *err)
{
    EVP_PKEY *pkey = EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, NULL, seed, SIGN_SEED_SIZE);

    if (!pkey)
        return x509_fail(err, ERR_RESOURCES, "cannot make an Ed25519 key");
    return key_from_pkey(pkey, seed, ret_key, err);
}

int identity_key_create(const struct rng *rng, struct identity_key **ret_key, struct error *err)
{
    uint8_t seed[SIGN_SEED_SIZE];
    int rc;

    rng_fill(rng, seed, sizeof seed);
    rc = identity_key_from_seed(seed, ret_key, err);
    secret_wipe(seed, sizeof seed);
    return rc;
}

void identity_key_free(struct identity_key *key)
{
    if (!key)
        return;
    EVP_PKEY_free(key->pkey);
    secret_free(key);
}

int identity_key_store(const struct identity_key *key, const char *path, struct error *err)
{
    BIO *bio = NULL;
    char *text = NULL;
    long len;
    int rc;

    if (file_exists(path))
        return error_set(err, ERR_EXISTS, "%s: exists; a key is never replaced: move the old one away first", path);
    bio = BIO_new(BIO_s_secmem());
    if (!bio || PEM_write_bio_PKCS8PrivateKey(bio, key->pkey, NULL, NULL, 0, NULL, NULL) != 1 ||
        (len = BIO_get_mem_data(bio, &text)) <= 0)
        rc = x509_fail(err, ERR_RESOURCES, "cannot encode the key");
    else
        rc = file_write_atomic(path, span_of(text, (size_t)len), 0600, err);
    BIO_free(bio);
    return rc;
}

static int no_passphrase(char *out, int size, int writing, void *ctx)
{
    (void)out;
    (void)size;
    (void)writing;
    (void)ctx;
    return -1; /* never ask on the terminal */
}

/* The file's text; private files must be the owner's alone. */
static int read_pem(const char *path, bool is_private, struct buffer *out, struct error *err)
{
    struct stat st;

    if (stat(path, &st) < 0)
        return error_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_RESOURCES, "%s: cannot open: %s", path,
                         strerror(errno));
    if (is_private && (st.st_mode & 077))
        return error_set(err, ERR_CONFIG, "%s: mode %04o lets others read the private key; run: chmod 600 %s", path,
                         (unsigned)(st.st_mode & 07777), path);
    return file_read(path, out, err);
}

int identity_key_load(const char *path, struct identity_key **ret_key, struct error *err)
{
    uint8_t seed[SIGN_SEED_SIZE];
    size_t seed_len = sizeof seed;
    struct buffer text;
    EVP_PKEY *pkey = NULL;
    BIO *bio = NULL;
    int rc;

    buffer_init(&text, IDENTITY_PEM_MAX);
    rc = read_pem(path, true, &text, err);
    if (rc < 0)
        goto out;
    bio = BIO_new_mem_buf(text.data, (int)text.len);
    if (bio)
        pkey = PEM_read_bio_PrivateKey(bio, NULL, no_passphrase, NULL);
    if (!pkey) {
        x509_clear_errors();
        rc = error_set(err, ERR_INTEGRITY, "%s: not an unencrypted private key in PEM", path);
        goto out;
    }
    if (EVP_PKEY_get_id(pkey) != EVP_PKEY_ED25519 || EVP_PKEY_get_raw_private_key(pkey, seed, &seed_len) != 1) {
        EVP_PKEY_free(pkey);
        rc = error_set(err, ERR_INTEGRITY, "%s: not an Ed25519 key", path);
        goto out;
    }
    rc = key_from_pkey(pkey, seed, ret_key, err);
    secret_wipe(seed, sizeof seed);
out:
    BIO_free(bio);
    buffer_wipe_release(&text);
    return rc;
}

const struct sign_key *identity_sign_key(const struct identity_key *key)
{
    return &key->sign;
}

const uint8_t *identity_public(const struct identity_key *key)
{
    return key->sign.public_key;
}

EVP_PKEY *identity_evp(const struct identity_key *key)
{
    return key->pkey;
}

/* SubjectPublicKeyInfo of an Ed25519 key (RFC 8410 section 4): twelve fixed bytes, then the key. */
static const uint8_t spki_prefix[12] = {0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00};

void identity_public_fingerprint(const uint8_t public_key[SIGN_PUBLIC_SIZE], uint8_t out[HASH_SIZE])
{
    struct hash h;

    hash_init(&h);
    hash_update(&h, span_of(spki_prefix, sizeof spki_prefix));
    hash_update(&h, span_of(public_key, SIGN_PUBLIC_SIZE));
    hash_final(&h, out);
}

int identity_public_store(const uint8_t public_key[SIGN_PUBLIC_SIZE], const char *path, struct error *err)
{
    EVP_PKEY *pkey = EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, public_key, SIGN_PUBLIC_SIZE);
    BIO *bio = BIO_new(BIO_s_mem());
    char *text = NULL;
    long len;
    int rc;

    if (!pkey || !bio || PEM_write_bio_PUBKEY(bio, pkey) != 1 || (len = BIO_get_mem_data(bio, &text)) <= 0)
        rc = x509_fail(err, ERR_RESOURCES, "cannot encode the public key");
    else
        rc = file_write_atomic(path, span_of(text, (size_t)len), 0644, err);
    BIO_free(bio);
    EVP_PKEY_free(pkey);
    return rc;
}

int identity_public_load(const char *path, uint8_t ret_public[SIGN_PUBLIC_SIZE], struct error *err)
{
    struct buffer text;
    EVP_PKEY *pkey = NULL;
    BIO *bio = NULL;
    int rc;

    buffer_init(&text, IDENTITY_PEM_MAX);
    rc = read_pem(path, false, &text, err);
    if (rc == 0) {
        bio = BIO_new_mem_buf(text.data, (int)text.len);
        if (bio)
            pkey = PEM_read_bio_PUBKEY(bio, NULL, no_passphrase, NULL);
        if (!pkey || x509_raw_public(pkey, ret_public) < 0)
            rc = error_set(err, ERR_INTEGRITY, "%s: not an Ed25519 public key in PEM", path);
        x509_clear_errors();
    }
    EVP_PKEY_free(pkey);
    BIO_free(bio);
    buffer_release(&text);
    return rc;
}

int identity_request(const struct identity_key *key, enum identity_kind kind, const char *id, struct buffer *ret_pem,
                     struct error *err)
{
    X509_REQ *request = NULL;
    GENERAL_NAMES *names = NULL;
    STACK_OF(X509_EXTENSION) *extensions = NULL;
    int rc = 0;

    if ((kind != IDENTITY_SITE && kind != IDENTITY_AGGREGATOR) || !identity_id_valid(id))
        return error_set(err, ERR_CONFIG, "\"%.64s\" is no site id: 1 to 63 of a-z, 0-9 and -", id);
    request = X509_REQ_new();
    names = x509_names(kind, id);
    if (!request || !names || X509_REQ_set_version(request, X509_REQ_VERSION_1) != 1 ||
        X509_REQ_set_pubkey(request, key->pkey) != 1 ||
        X509V3_add1_i2d(&extensions, NID_subject_alt_name, names, 1, X509V3_ADD_DEFAULT) != 1 ||
        X509_REQ_add_extensions(request, extensions) != 1 || X509_REQ_sign(request, key->pkey, NULL) <= 0)
        rc = x509_fail(err, ERR_RESOURCES, "cannot make a certificate request");
    if (rc == 0)
        rc = x509_append_pem(ret_pem, (int (*)(BIO *, const void *))PEM_write_bio_X509_REQ, request, err);
    sk_X509_EXTENSION_pop_free(extensions, X509_EXTENSION_free);
    GENERAL_NAMES_free(names);
    X509_REQ_free(request);
    return rc;
}

static int request_info(X509_REQ *request, struct identity_request_info *ret_info, struct error *err)
{
    struct identity_request_info info;
    STACK_OF(X509_EXTENSION) *extensions = NULL;
    GENERAL_NAMES *names = NULL;
    EVP_PKEY *pkey = X509_REQ_get0_pubkey(request);
    int rc = 0;

    memset(&info, 0, sizeof info);
    if (!pkey || x509_raw_public(pkey, info.public_key) < 0)
        return error_set(err, ERR_INTEGRITY, "certificate request: its key is not Ed25519");
    if (X509_REQ_verify(request, pkey) != 1)
        return error_set(err, ERR_INTEGRITY, "certificate request: it is not signed by its own key");
    extensions = X509_REQ_get_extensions(request);
    names = X509V3_get_d2i(extensions, NID_subject_alt_name, NULL, NULL);
    if (!names || x509_read_names(names, &info.kind, info.id) < 0 || info.kind == IDENTITY_AUTHORITY)
        rc = error_set(err, ERR_INTEGRITY,
                       "certificate request: expected one URI name consilium://site/<id>; was it made by consilium?");
    if (rc == 0) {
        identity_public_fingerprint(info.public_key, info.key_fingerprint);
        *ret_info = info;
    }
    GENERAL_NAMES_free(names);
    sk_X509_EXTENSION_pop_free(extensions, X509_EXTENSION_free);
    return rc;
}

int identity_request_read(struct span pem, struct identity_request_info *ret_info, struct error *err)
{
    X509_REQ *request = NULL;
    BIO *bio = NULL;
    int rc;

    if (pem.len > IDENTITY_PEM_MAX)
        return error_set(err, ERR_INTEGRITY, "certificate request: larger than %d bytes", IDENTITY_PEM_MAX);
    bio = BIO_new_mem_buf(pem.ptr, (int)pem.len);
    if (bio)
        request = PEM_read_bio_X509_REQ(bio, NULL, no_passphrase, NULL);
    rc = request ? request_info(request, ret_info, err)
                 : error_set(err, ERR_INTEGRITY, "certificate request: not a PEM certificate request");
    x509_clear_errors();
    X509_REQ_free(request);
    BIO_free(bio);
    return rc;
}
