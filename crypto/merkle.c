#include "crypto/merkle.h"

#include "crypto/fatal.h"

void merkle_leaf(struct span leaf_data, uint8_t out[HASH_SIZE])
{
    const uint8_t prefix = 0;
    struct hash h;

    hash_init(&h);
    hash_update(&h, span_of(&prefix, 1));
    hash_update(&h, leaf_data);
    hash_final(&h, out);
}

/* out may be left or right. */
static void node(const uint8_t left[HASH_SIZE], const uint8_t right[HASH_SIZE], uint8_t out[HASH_SIZE])
{
    const uint8_t prefix = 1;
    struct hash h;

    hash_init(&h);
    hash_update(&h, span_of(&prefix, 1));
    hash_update(&h, span_of(left, HASH_SIZE));
    hash_update(&h, span_of(right, HASH_SIZE));
    hash_final(&h, out);
}

void merkle_init(struct merkle *m)
{
    m->leaves = 0;
}

void merkle_add(struct merkle *m, struct span leaf_data)
{
    uint8_t leaf[HASH_SIZE];

    merkle_leaf(leaf_data, leaf);
    merkle_add_leaf(m, leaf);
}

void merkle_add_leaf(struct merkle *m, const uint8_t leaf[HASH_SIZE])
{
    uint8_t carry[HASH_SIZE];
    unsigned level = 0;

    memcpy(carry, leaf, HASH_SIZE);
    for (; m->leaves >> level & 1; level++)
        node(m->peaks[level], carry, carry);
    memcpy(m->peaks[level], carry, HASH_SIZE);
    m->leaves++;
}

void merkle_root(const struct merkle *m, uint8_t out[HASH_SIZE])
{
    uint8_t root[HASH_SIZE];
    bool any = false;

    if (m->leaves == 0) {
        hash_bytes(span_of(NULL, 0), out);
        return;
    }
    for (unsigned level = 0; level < MERKLE_DEPTH_MAX; level++) {
        if (!(m->leaves >> level & 1))
            continue;
        if (any)
            node(m->peaks[level], root, root);
        else
            memcpy(root, m->peaks[level], HASH_SIZE);
        any = true;
    }
    memcpy(out, root, HASH_SIZE);
}

/* The largest power of two below n, n ≥ 2: where RFC 6962 splits. */
static size_t split_of(size_t n)
{
    size_t k = 1;

    while (k < n - k)
        k <<= 1;
    return k;
}

static void subtree_root(const uint8_t (*leaves)[HASH_SIZE], size_t count, uint8_t out[HASH_SIZE])
{
    struct merkle m;

    merkle_init(&m);
    for (size_t i = 0; i < count; i++)
        merkle_add_leaf(&m, leaves[i]);
    merkle_root(&m, out);
}

size_t merkle_path(const uint8_t (*leaves)[HASH_SIZE], size_t count, size_t index,
                   uint8_t ret_path[MERKLE_DEPTH_MAX][HASH_SIZE])
{
    uint8_t down[MERKLE_DEPTH_MAX][HASH_SIZE]; /* siblings from the root downwards */
    size_t len = 0;

    if (index >= count)
        fatal("merkle_path: index beyond the tree");
    while (count > 1) {
        size_t k = split_of(count);
        if (index < k) {
            subtree_root(leaves + k, count - k, down[len++]);
            count = k;
        } else {
            subtree_root(leaves, k, down[len++]);
            leaves += k;
            count -= k;
            index -= k;
        }
    }
    for (size_t i = 0; i < len; i++)
        memcpy(ret_path[i], down[len - 1 - i], HASH_SIZE);
    return len;
}

bool merkle_verify(const uint8_t leaf[HASH_SIZE], uint64_t index, uint64_t count, const uint8_t (*path)[HASH_SIZE],
                   size_t path_len, const uint8_t root[HASH_SIZE])
{
    uint8_t hash[HASH_SIZE];
    uint64_t position = index, last = count - 1;
    size_t used = 0;

    if (index >= count)
        return false;
    memcpy(hash, leaf, HASH_SIZE);
    /* RFC 9162 section 2.1.3.2: position and last move up together; a node without a right sibling moves up unchanged.
     */
    for (; last > 0; position >>= 1, last >>= 1) {
        if (!(position & 1) && position == last)
            continue;
        if (used == path_len)
            return false;
        if (position & 1)
            node(path[used++], hash, hash);
        else
            node(hash, path[used++], hash);
    }
    return used == path_len && sodium_memcmp(hash, root, HASH_SIZE) == 0;
}
