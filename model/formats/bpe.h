/*
 * Byte pair merging over token ids: of all neighbouring pairs the one of lowest rank is joined, leftmost first, until
 * none is left (Sennrich et al. 2016).
 *
 * The table is immutable after building; struct bpe_scratch belongs to one call at a time.
 */
#ifndef FORMATS_BPE_H
#define FORMATS_BPE_H

#include "base/error.h"

#define BPE_SHORT 48 /* symbols: up to here a plain search for the lowest rank is faster than a heap */

struct bpe_merge {
    uint64_t pair; /* left << 32 | right; BPE_EMPTY: a free slot */
    uint32_t rank; /* position in the list of merges */
    int32_t result;
};
#define BPE_EMPTY UINT64_MAX

struct bpe {
    struct bpe_merge *slots; /* (mask + 1) open addressing */
    size_t mask;
};

int MUST_USE bpe_init(struct bpe *bpe, size_t merges, struct error *err);
void bpe_release(struct bpe *bpe);
/* ERR_EXISTS for a pair that is in already; ERR_INTEGRITY if the pairs were chosen to collide. */
int MUST_USE bpe_add(struct bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t result);

struct bpe_scratch {
    struct bpe_symbol *symbols;
    struct bpe_candidate *heap;
    size_t symbol_capacity, heap_capacity;
};
void bpe_scratch_release(struct bpe_scratch *scratch); /* accepts zeroed */

/* Merges ids[0 .. count) in place; *ret_count ids are left. ERR_RESOURCES without memory. */
int MUST_USE bpe_merge_all(const struct bpe *bpe, struct bpe_scratch *scratch, int32_t *ids, size_t count,
                           size_t *ret_count);

#endif
