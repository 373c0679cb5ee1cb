/*
 * The Merkle tree of RFC 6962 section 2.1 (and RFC 9162): leaf = SHA-256(0 ‖ data), node = SHA-256(1 ‖ left ‖
 * right), the left subtree of n leaves being the largest power of two below n; the empty tree is SHA-256("").
 *
 * struct merkle keeps only the roots of the complete subtrees so far, so a vector of any length is hashed chunk by
 * chunk in constant memory. Paths are made from the stored leaf hashes. One thread at a time per object.
 *
 *     struct merkle tree;
 *     merkle_init(&tree);
 *     for (each chunk) merkle_add(&tree, chunk);
 *     merkle_root(&tree, root);
 */
#ifndef CRYPTO_MERKLE_H
#define CRYPTO_MERKLE_H

#include "crypto/hash.h"

enum { MERKLE_DEPTH_MAX = 64 };

struct merkle {
    uint64_t leaves;
    uint8_t peaks[MERKLE_DEPTH_MAX]
                 [HASH_SIZE]; /* root of the complete subtree of 2^i leaves where bit i of leaves is set */
};

void merkle_init(struct merkle *m);
void merkle_add(struct merkle *m, struct span leaf_data);
void merkle_add_leaf(struct merkle *m, const uint8_t leaf[HASH_SIZE]); /* an already hashed leaf */
/* Leaves m usable: more leaves may follow. */
void merkle_root(const struct merkle *m, uint8_t out[HASH_SIZE]);

void merkle_leaf(struct span leaf_data, uint8_t out[HASH_SIZE]);

/* Inclusion path of leaf `index` among `count` leaf hashes, from the leaf upwards; index < count is asserted. Returns
 * the number of hashes, at most MERKLE_DEPTH_MAX. */
size_t merkle_path(const uint8_t (*leaves)[HASH_SIZE], size_t count, size_t index,
                   uint8_t ret_path[MERKLE_DEPTH_MAX][HASH_SIZE]);
/* The tree size is part of the claim and must be signed. Wrong lengths and index ≥ count are false. */
bool MUST_USE merkle_verify(const uint8_t leaf[HASH_SIZE], uint64_t index, uint64_t count,
                            const uint8_t (*path)[HASH_SIZE], size_t path_len, const uint8_t root[HASH_SIZE]);

#endif
