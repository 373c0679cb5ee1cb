#include "helpers.h"

#include "crypto/agree.h"
#include "crypto/hash.h"
#include "crypto/merkle.h"
#include "crypto/seal.h"
#include "crypto/secret.h"
#include "crypto/sign.h"

#include <sodium.h>
#include <sys/stat.h>

/* FIPS 180-4 examples (csrc.nist.gov, SHA256.pdf) */
static void sha256_vectors(void **state)
{
    uint8_t out[HASH_SIZE];
    char path[] = "/tmp/consilium-hash-XXXXXX";
    static uint8_t million[1000000];
    uint64_t bytes = 0;
    struct hash h, fork;
    int fd;

    (void)state;
    hash_bytes(span_str("abc"), out);
    assert_hex(out, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    hash_bytes(span_str("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"), out);
    assert_hex(out, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    memset(million, 'a', sizeof million);
    hash_init(&h);
    for (size_t at = 0; at < sizeof million; at += 1000) {
        hash_update(&h, span_of(million + at, 1000));
        if (at == 500000)
            fork = h;
    }
    hash_final(&h, out);
    assert_hex(out, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    hash_update(&fork, span_of(million + 501000, sizeof million - 501000));
    hash_final(&fork, out);
    assert_hex(out, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, million, sizeof million), sizeof million);
    close(fd);
    memset(out, 0, sizeof out);
    assert_int_equal(hash_file(path, out, &bytes, NULL), 0);
    assert_int_equal(bytes, sizeof million);
    assert_hex(out, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    unlink(path);
    assert_int_equal(hash_file(path, out, NULL, NULL), ERR_NOT_FOUND);
}

/* RFC 4231, cases 1, 2 and 6 */
static void hmac_vectors(void **state)
{
    uint8_t key[131], out[HASH_SIZE];

    (void)state;
    memset(key, 0x0b, 20);
    hmac_bytes(span_of(key, 20), span_str("Hi There"), out);
    assert_hex(out, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    hmac_bytes(span_str("Jefe"), span_str("what do ya want for nothing?"), out);
    assert_hex(out, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    memset(key, 0xaa, sizeof key);
    hmac_bytes(span_of(key, sizeof key), span_str("Test Using Larger Than Block-Size Key - Hash Key First"), out);
    assert_hex(out, "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

/* RFC 5869 appendix A, cases 1 and 3 */
static void hkdf_vectors(void **state)
{
    uint8_t ikm[22], salt[13], info[10], out[42];

    (void)state;
    memset(ikm, 0x0b, sizeof ikm);
    from_hex("000102030405060708090a0b0c", salt);
    from_hex("f0f1f2f3f4f5f6f7f8f9", info);
    hkdf_sha256(span_of(ikm, 22), span_of(salt, 13), span_of(info, 10), out, sizeof out);
    assert_hex(out, "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865");
    hkdf_sha256(span_of(ikm, 22), span_of(NULL, 0), span_of(NULL, 0), out, sizeof out);
    assert_hex(out, "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8");
}

static void labelled_hash_is_unambiguous(void **state)
{
    const struct span ab_c[] = {span_str("ab"), span_str("c")}, a_bc[] = {span_str("a"), span_str("bc")};
    const struct span abc[] = {span_str("abc")}, abc_empty[] = {span_str("abc"), span_str("")};
    uint8_t out[6][HASH_SIZE], one[32], two[32];
    struct hash h;

    (void)state;
    hash_labelled("l", ab_c, 2, out[0]);
    hash_labelled("l", a_bc, 2, out[1]);
    hash_labelled("l", abc, 1, out[2]);
    hash_labelled("l", abc_empty, 2, out[3]);
    hash_labelled("la", abc, 1, out[4]);
    hash_labelled("l", NULL, 0, out[5]);
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < i; j++)
            assert_memory_not_equal(out[i], out[j], HASH_SIZE);
    /* the bytes written out by hand: three frames */
    hash_bytes(span_of("\x01\0\0\0\0\0\0\0l\x02\0\0\0\0\0\0\0ab\x01\0\0\0\0\0\0\0c", 28), one);
    assert_memory_equal(one, out[0], HASH_SIZE);
    hash_begin(&h, "l");
    hash_part(&h, ab_c[0]);
    hash_part(&h, ab_c[1]);
    hash_end(&h, one);
    assert_memory_equal(one, out[0], HASH_SIZE);
    hkdf_labelled(span_str("key"), span_str("salt"), "l", ab_c, 2, one, 32);
    hkdf_labelled(span_str("key"), span_str("salt"), "l", a_bc, 2, two, 32);
    assert_memory_not_equal(one, two, 32);
}

/* The tree of the Certificate Transparency reference tests (RFC 6962): roots of its first 0 to 8 leaves. */
static const struct {
    const char *leaf, *root;
} tree[] = {
    {"", "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"},
    {"00", "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"},
    {"10", "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"},
    {"2021", "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"},
    {"3031", "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4"},
    {"40414243", "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"},
    {"5051525354555657", "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c"},
    {"606162636465666768696a6b6c6d6e6f", "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"},
};

static void merkle_vectors(void **state)
{
    struct merkle m;
    uint8_t root[HASH_SIZE], data[16];

    (void)state;
    merkle_init(&m);
    merkle_root(&m, root);
    assert_hex(root, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    for (size_t i = 0; i < ARRAY_LEN(tree); i++) {
        merkle_add(&m, span_of(data, from_hex(tree[i].leaf, data)));
        merkle_root(&m, root);
        assert_hex(root, tree[i].root);
    }
}

static void merkle_paths_verify(void **state)
{
    enum { MAX = 33 };
    uint8_t leaves[MAX][HASH_SIZE], path[MERKLE_DEPTH_MAX][HASH_SIZE], root[HASH_SIZE];

    (void)state;
    for (uint8_t i = 0; i < MAX; i++)
        merkle_leaf(span_of(&i, 1), leaves[i]);
    for (size_t n = 1; n <= MAX; n++) {
        struct merkle m;
        merkle_init(&m);
        for (size_t i = 0; i < n; i++)
            merkle_add_leaf(&m, leaves[i]);
        merkle_root(&m, root);
        for (size_t i = 0; i < n; i++) {
            size_t len = merkle_path((const uint8_t(*)[HASH_SIZE])leaves, n, i, path);
            const uint8_t(*p)[HASH_SIZE] = (const uint8_t(*)[HASH_SIZE])path;
            assert_true(merkle_verify(leaves[i], i, n, p, len, root));
            assert_false(merkle_verify(leaves[i], i + 1, n, p, len, root));
            assert_false(merkle_verify(leaves[i], n, n, p, len, root));
            assert_false(merkle_verify(leaves[(i + 1) % MAX], i, n, p, len, root));
            assert_false(merkle_verify(leaves[i], i, n, p, len + 1, root));
            if (len > 0) {
                assert_false(merkle_verify(leaves[i], i, n, p, len - 1, root));
                path[len / 2][3] ^= 4;
                assert_false(merkle_verify(leaves[i], i, n, p, len, root));
            }
        }
    }
    assert_false(merkle_verify(leaves[0], 0, 0, (const uint8_t(*)[HASH_SIZE])path, 0, root));
}

static void secret_memory(void **state)
{
    uint8_t *p = secret_new(100);

    (void)state;
    assert_non_null(p);
    assert_int_equal((uintptr_t)p % 16, 0);
    assert_true(secret_is_zero(p, 100));
    p[99] = 1;
    assert_false(secret_is_zero(p, 100));
    assert_false(secret_equal(p, "\0", 1) && p[0]);
    assert_true(secret_equal(p, "\0\0", 2));
    secret_wipe(p, 100);
    assert_true(secret_is_zero(p, 100));
    secret_free(p);
    secret_free(NULL);
    assert_false(secret_lockable((size_t)1 << 50));
}

/* RFC 7748 sections 5.2 and 6.1 */
static void x25519_vectors(void **state)
{
    struct agree_key alice, bob;
    uint8_t secret[32], shared[32], out[32];

    (void)state;
    from_hex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4", secret);
    from_hex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c", out);
    assert_int_equal(agree_shared(secret, out, shared), 0);
    assert_hex(shared, "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552");
    agree_random(&alice, &random_system);
    agree_random(&bob, &random_system);
    assert_int_equal(agree_check_public(alice.public_key), 0);
    assert_int_equal(agree_shared(alice.secret, bob.public_key, shared), 0);
    assert_int_equal(agree_shared(bob.secret, alice.public_key, out), 0);
    assert_memory_equal(shared, out, 32);
}

/* Points of order 1, 2, 4 and 8 (cr.yp.to/ecdh.html) and encodings at or above 2^255 − 19. */
static void bad_points_are_refused(void **state)
{
    static const char *const bad[] = {
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "f6ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0900000000000000000000000000000000000000000000000000000000000080",
    };
    struct agree_key key;

    (void)state;
    agree_random(&key, &random_system);
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        uint8_t point[32], shared[32] = {7};
        from_hex(bad[i], point);
        assert_int_equal(agree_check_public(point), ERR_INTEGRITY);
        assert_int_equal(agree_shared(key.secret, point, shared), ERR_INTEGRITY);
        assert_int_equal(shared[0], 7);
    }
}

static void ed25519_signatures(void **state)
{
    const struct span parts[] = {span_str("site-a"), span_str("hash")},
                      other[] = {span_str("site-b"), span_str("hash")};
    uint8_t seed[32], signature[64], message[23 + 32], raw[64];
    struct sign_key key, stranger;

    (void)state;
    /* RFC 8032 section 7.1, tests 1 and 2: public key from seed, and the raw signature of libsodium below us */
    from_hex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb", seed);
    sign_key_from_seed(&key, seed);
    assert_hex(key.public_key, "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
    assert_int_equal(crypto_sign_ed25519_detached(raw, NULL, (const uint8_t *)"\x72", 1, key.secret), 0);
    assert_hex(raw, "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
                    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00");
    from_hex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60", seed);
    sign_key_from_seed(&key, seed);
    assert_hex(key.public_key, "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a");

    sign_parts(&key, "label", parts, 2, signature);
    assert_int_equal(sign_verify(key.public_key, "label", parts, 2, signature), 0);
    assert_int_equal(sign_verify(key.public_key, "label2", parts, 2, signature), ERR_INTEGRITY);
    assert_int_equal(sign_verify(key.public_key, "label", other, 2, signature), ERR_INTEGRITY);
    assert_int_equal(sign_verify(key.public_key, "label", parts, 1, signature), ERR_INTEGRITY);
    sign_key_random(&stranger, &random_system);
    assert_int_equal(sign_verify(stranger.public_key, "label", parts, 2, signature), ERR_INTEGRITY);
    /* the construction of the header, written out */
    memcpy(message, "consilium signature v1", 23);
    hash_labelled("label", parts, 2, message + 23);
    assert_int_equal(crypto_sign_ed25519_verify_detached(signature, message, sizeof message, key.public_key), 0);
    for (int bit = 0; bit < 512; bit += 37) {
        signature[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_int_equal(sign_verify(key.public_key, "label", parts, 2, signature), ERR_INTEGRITY);
        signature[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
}

static void sealing(void **state)
{
    /* draft-irtf-cfrg-xchacha-03 appendix A.3.1 */
    static const char plain_text[] =
        "Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        "future, sunscreen would be it.";
    uint8_t key[32], aad[12], sealed[24 + 114 + 16], plain[114];
    struct span text = span_of(plain_text, 114);

    (void)state;
    from_hex("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f", key);
    from_hex("50515253c0c1c2c3c4c5c6c7", aad);
    from_hex("404142434445464748494a4b4c4d4e4f5051525354555657", sealed);
    from_hex("bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb731c7f1b0b4aa6440bf3a82f4eda7e39"
             "ae64c6708c54c216cb96b72e1213b4522f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff9"
             "21f9664c97637da9768812f615c68b13b52e",
             sealed + 24);
    from_hex("c0875924c1c7987947deafd8780acf49", sealed + 24 + 114);
    assert_int_equal(open_random(key, span_of(aad, 12), span_of(sealed, sizeof sealed), plain), 0);
    assert_memory_equal(plain, plain_text, 114);

    seal_random(key, &random_system, span_of(aad, 12), text, sealed);
    for (size_t bit = 0; bit < sizeof sealed * 8; bit += 11) {
        sealed[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_int_equal(open_random(key, span_of(aad, 12), span_of(sealed, sizeof sealed), plain), ERR_INTEGRITY);
        sealed[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    assert_int_equal(open_random(key, span_of(aad, 11), span_of(sealed, sizeof sealed), plain), ERR_INTEGRITY);
    assert_int_equal(open_random(key, span_of(aad, 12), span_of(sealed, 39), plain), ERR_INTEGRITY);
    seal_once(key, span_of(aad, 12), text, sealed);
    assert_int_equal(open_once(key, span_of(aad, 12), span_of(sealed, 130), plain), 0);
    assert_memory_equal(plain, plain_text, 114);
    key[5] ^= 1;
    assert_int_equal(open_once(key, span_of(aad, 12), span_of(sealed, 130), plain), ERR_INTEGRITY);
    assert_int_equal(open_once(key, span_of(aad, 12), span_of(sealed, 15), plain), ERR_INTEGRITY);
}

static void sealed_files(void **state)
{
    char folder[] = "/tmp/consilium-seal-XXXXXX", path[64], key_path[64];
    uint8_t key[32], again[32];
    struct buffer out;
    struct error err;
    struct stat st;

    (void)state;
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/state", folder);
    snprintf(key_path, sizeof key_path, "%s/key", folder);
    assert_int_equal(seal_key_load(key_path, key, &err), ERR_NOT_FOUND);
    assert_int_equal(seal_key_create(key_path, &random_system, &err), 0);
    assert_int_equal(seal_key_create(key_path, &random_system, &err), ERR_EXISTS);
    assert_int_equal(seal_key_load(key_path, key, &err), 0);
    assert_int_equal(chmod(key_path, 0640), 0);
    assert_int_equal(seal_key_load(key_path, again, &err), ERR_CONFIG);

    assert_int_equal(seal_file_write(path, key, &random_system, "job 1", span_str("secret"), &err), 0);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    buffer_init(&out, 6);
    assert_int_equal(seal_file_read(path, key, "job 1", &out, &err), 0);
    assert_int_equal(out.len, 6);
    assert_memory_equal(out.data, "secret", 6);
    buffer_clear(&out);
    assert_int_equal(seal_file_read(path, key, "job 2", &out, &err), ERR_INTEGRITY);
    assert_int_equal(out.len, 0);
    key[0] ^= 1;
    assert_int_equal(seal_file_read(path, key, "job 1", &out, &err), ERR_INTEGRITY);
    key[0] ^= 1;
    buffer_release(&out);
    buffer_init(&out, 5);
    assert_int_equal(seal_file_read(path, key, "job 1", &out, &err), ERR_RESOURCES);
    buffer_release(&out);
    assert_int_equal(truncate(path, 20), 0);
    buffer_init(&out, 64);
    assert_int_equal(seal_file_read(path, key, "job 1", &out, &err), ERR_INTEGRITY);
    buffer_release(&out);
    unlink(path);
    unlink(key_path);
    rmdir(folder);
}

/* The stream against libsodium's keystream under the derived key, whatever the sizes of the draws. */
static void random_streams(void **state)
{
    enum { TOTAL = 10000 };
    static uint8_t expected[TOTAL], drawn[TOTAL];
    uint8_t seed[32] = {9}, key[32], nonce[12] = {0};
    struct random_stream a, b;
    size_t at = 0;

    (void)state;
    hkdf_sha256(span_of(seed, 32), span_of(NULL, 0), span_str("consilium/streamlora"), key, 32);
    crypto_stream_chacha20_ietf(expected, TOTAL, nonce, key);
    random_stream_init(&a, seed, "lora");
    for (size_t n = 1; at < TOTAL; n = n * 7 % 2503 + 1) {
        if (n > TOTAL - at)
            n = TOTAL - at;
        random_stream_fill(&a, drawn + at, n);
        at += n;
    }
    assert_memory_equal(drawn, expected, TOTAL);
    /* the 32-bit counter carries into the nonce instead of wrapping onto its first block */
    a.next_block = ((uint64_t)1 << 32) - 1;
    a.used = sizeof a.buffer;
    random_stream_fill(&a, drawn, 128);
    nonce[0] = 1;
    crypto_stream_chacha20_ietf(expected, 64, nonce, key);
    assert_memory_equal(drawn + 64, expected, 64);
    random_stream_init(&b, seed, "lorb");
    random_stream_fill(&b, drawn, 64);
    random_stream_init(&a, seed, "lora");
    random_stream_fill(&a, expected, 64);
    assert_memory_not_equal(drawn, expected, 64);
    random_stream_seeded(&a, &random_system, "x");
    random_stream_seeded(&b, &random_system, "x");
    assert_memory_not_equal(a.key, b.key, 32);
    random_stream_release(&a);
    random_stream_release(&b);
    assert_true(secret_is_zero(&a, sizeof a));
}

/* A stream with a nonce of its own: RFC 8439, 2.3.2 (its block 1), and the key that random_stream_init derives. */
static void random_stream_nonces(void **state)
{
    static const uint8_t expected[64] = {0x10, 0xf1, 0xe7, 0xe4, 0xd1, 0x3b, 0x59, 0x15, 0x50, 0x0f, 0xdd, 0x1f, 0xa3,
                                         0x20, 0x71, 0xc4, 0xc7, 0xd1, 0xf4, 0xc7, 0x33, 0xc0, 0x68, 0x03, 0x04, 0x22,
                                         0xaa, 0x9a, 0xc3, 0xd4, 0x6c, 0x4e, 0xd2, 0x82, 0x64, 0x46, 0x07, 0x9f, 0xaa,
                                         0x09, 0x14, 0xc2, 0xd7, 0x05, 0xd9, 0x8b, 0x02, 0xa2, 0xb5, 0x12, 0x9c, 0xd1,
                                         0xde, 0x16, 0x4e, 0xb9, 0xcb, 0xd0, 0x83, 0xe8, 0xa2, 0x50, 0x3c, 0x4e};
    static const uint8_t nonce[RANDOM_NONCE_SIZE] = {0, 0, 0, 9, 0, 0, 0, 0x4a};
    static const uint8_t zeros[RANDOM_NONCE_SIZE];
    uint8_t key[RANDOM_SEED_SIZE], drawn[128], plain[3000], same[3000];
    struct random_stream a, b;

    (void)state;
    for (uint8_t i = 0; i < sizeof key; i++)
        key[i] = i;
    random_stream_nonce(&a, key, nonce);
    random_stream_fill(&a, drawn, sizeof drawn);
    assert_memory_equal(drawn + 64, expected, 64);
    random_stream_init(&a, key, "label");
    random_stream_fill(&a, plain, sizeof plain);
    random_stream_key(key, key, "label");
    random_stream_nonce(&b, key, zeros);
    for (size_t at = 0; at < sizeof same; at += 100)
        random_stream_fill(&b, same + at, 100);
    assert_memory_equal(plain, same, sizeof plain);
    /* its last block may be drawn (the one after it would end the process) */
    b.next_block = ((uint64_t)1 << 32) - RANDOM_STREAM_BUFFER / 64;
    b.used = sizeof b.buffer;
    random_stream_fill(&b, drawn, sizeof drawn);
    assert_true(b.next_block == (uint64_t)1 << 32);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sha256_vectors),
        cmocka_unit_test(hmac_vectors),
        cmocka_unit_test(hkdf_vectors),
        cmocka_unit_test(labelled_hash_is_unambiguous),
        cmocka_unit_test(merkle_vectors),
        cmocka_unit_test(merkle_paths_verify),
        cmocka_unit_test(secret_memory),
        cmocka_unit_test(x25519_vectors),
        cmocka_unit_test(bad_points_are_refused),
        cmocka_unit_test(ed25519_signatures),
        cmocka_unit_test(sealing),
        cmocka_unit_test(sealed_files),
        cmocka_unit_test(random_streams),
        cmocka_unit_test(random_stream_nonces),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
