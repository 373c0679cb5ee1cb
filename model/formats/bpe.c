#include "model/formats/bpe.h"

#include "base/checked.h"

#define PROBES_MAX 512 /* at a load of at most one half, honest tables stay far below */
#define NO_RANK UINT32_MAX

/* A doubly linked list in text order; a symbol that was merged away has id −1. */
struct bpe_symbol {
    int32_t id;
    int32_t previous, next; /* −1: none */
};

/* A pair that may be merged once it is the best; stale if either side has changed since. */
struct bpe_candidate {
    uint32_t rank;
    int32_t left, right; /* symbols */
    int32_t left_id, right_id;
    int32_t result;
};

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static uint64_t pair_key(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

int bpe_init(struct bpe *bpe, size_t merges, struct error *err)
{
    size_t slots = 16;
    while (slots / 2 < merges)
        slots *= 2;
    bpe->slots = calloc(slots, sizeof *bpe->slots);
    if (!bpe->slots)
        return error_set(err, ERR_RESOURCES, "no memory for %zu merges", merges);
    for (size_t i = 0; i < slots; i++)
        bpe->slots[i].pair = BPE_EMPTY;
    bpe->mask = slots - 1;
    return 0;
}

void bpe_release(struct bpe *bpe)
{
    free(bpe->slots);
    memset(bpe, 0, sizeof *bpe);
}

int bpe_add(struct bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t result)
{
    const uint64_t key = pair_key(left, right);
    size_t slot = (size_t)mix(key) & bpe->mask;
    for (int probe = 0; probe < PROBES_MAX; probe++, slot = (slot + 1) & bpe->mask) {
        if (bpe->slots[slot].pair == key)
            return ERR_EXISTS;
        if (bpe->slots[slot].pair == BPE_EMPTY) {
            bpe->slots[slot] = (struct bpe_merge){key, rank, result};
            return 0;
        }
    }
    return ERR_INTEGRITY;
}

static const struct bpe_merge *find(const struct bpe *bpe, int32_t left, int32_t right)
{
    const uint64_t key = pair_key(left, right);
    for (size_t slot = (size_t)mix(key) & bpe->mask;; slot = (slot + 1) & bpe->mask) {
        if (bpe->slots[slot].pair == key)
            return &bpe->slots[slot];
        if (bpe->slots[slot].pair == BPE_EMPTY)
            return NULL;
    }
}

static uint32_t find_rank(const struct bpe *bpe, int32_t left, int32_t right, int32_t *result)
{
    const struct bpe_merge *merge = find(bpe, left, right);
    *result = merge ? merge->result : -1;
    return merge ? merge->rank : NO_RANK;
}

static size_t merge_short(const struct bpe *bpe, int32_t *ids, size_t count)
{
    uint32_t ranks[BPE_SHORT];
    int32_t results[BPE_SHORT];
    for (size_t i = 0; i + 1 < count; i++)
        ranks[i] = find_rank(bpe, ids[i], ids[i + 1], &results[i]);
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; i++)
            if (ranks[i] < ranks[best])
                best = i;
        if (ranks[best] == NO_RANK)
            break;
        ids[best] = results[best];
        count--;
        for (size_t i = best + 1; i < count; i++)
            ids[i] = ids[i + 1];
        for (size_t i = best + 1; i + 1 < count; i++) {
            ranks[i] = ranks[i + 1];
            results[i] = results[i + 1];
        }
        if (best > 0)
            ranks[best - 1] = find_rank(bpe, ids[best - 1], ids[best], &results[best - 1]);
        if (best + 1 < count)
            ranks[best] = find_rank(bpe, ids[best], ids[best + 1], &results[best]);
    }
    return count;
}

static bool before(const struct bpe_candidate *a, const struct bpe_candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static void heap_push(struct bpe_candidate *heap, size_t *count, struct bpe_candidate c)
{
    size_t at = (*count)++;
    while (at > 0 && before(&c, &heap[(at - 1) / 2])) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = c;
}

static struct bpe_candidate heap_pop(struct bpe_candidate *heap, size_t *count)
{
    const struct bpe_candidate top = heap[0], last = heap[--*count];
    size_t at = 0;
    for (size_t child = 1; child < *count; child = 2 * at + 1) {
        if (child + 1 < *count && before(&heap[child + 1], &heap[child]))
            child++;
        if (!before(&heap[child], &last))
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = last;
    return top;
}

static void offer(const struct bpe *bpe, struct bpe_scratch *s, size_t *count, int32_t left, int32_t right)
{
    if (left < 0 || right < 0)
        return;
    const int32_t a = s->symbols[left].id, b = s->symbols[right].id;
    int32_t result;
    const uint32_t rank = find_rank(bpe, a, b, &result);
    if (rank != NO_RANK)
        heap_push(s->heap, count, (struct bpe_candidate){rank, left, right, a, b, result});
}

/* Room for count symbols and for the heap: the pairs of the beginning, and two at each of at most (count - 1) merges,
 * of which one was taken out before. */
static int reserve(struct bpe_scratch *s, size_t count)
{
    size_t symbol_bytes, heap_bytes;
    if (count <= s->symbol_capacity)
        return 0;
    if (count > INT32_MAX / 2 || !checked_mul(count, sizeof *s->symbols, &symbol_bytes) ||
        !checked_mul(2 * count, sizeof *s->heap, &heap_bytes))
        return ERR_RESOURCES;
    bpe_scratch_release(s);
    s->symbols = malloc(symbol_bytes);
    s->heap = malloc(heap_bytes);
    if (!s->symbols || !s->heap) {
        bpe_scratch_release(s);
        return ERR_RESOURCES;
    }
    s->symbol_capacity = count;
    s->heap_capacity = 2 * count;
    return 0;
}

static size_t merge_long(const struct bpe *bpe, struct bpe_scratch *s, int32_t *ids, size_t count)
{
    size_t queued = 0, left_over = 0;
    for (size_t i = 0; i < count; i++)
        s->symbols[i] = (struct bpe_symbol){ids[i], (int32_t)i - 1, i + 1 < count ? (int32_t)i + 1 : -1};
    for (size_t i = 0; i + 1 < count; i++)
        offer(bpe, s, &queued, (int32_t)i, (int32_t)i + 1);
    while (queued > 0) {
        const struct bpe_candidate c = heap_pop(s->heap, &queued);
        struct bpe_symbol *left = &s->symbols[c.left], *right = &s->symbols[c.right];
        if (left->id != c.left_id || right->id != c.right_id || left->next != c.right)
            continue;
        left->id = c.result;
        left->next = right->next;
        right->id = -1;
        if (right->next >= 0)
            s->symbols[right->next].previous = c.left;
        assert(queued + 2 <= s->heap_capacity);
        offer(bpe, s, &queued, left->previous, c.left);
        offer(bpe, s, &queued, c.left, left->next);
    }
    for (int32_t i = 0; i >= 0; i = s->symbols[i].next)
        ids[left_over++] = s->symbols[i].id;
    return left_over;
}

void bpe_scratch_release(struct bpe_scratch *scratch)
{
    free(scratch->symbols);
    free(scratch->heap);
    memset(scratch, 0, sizeof *scratch);
}

int bpe_merge_all(const struct bpe *bpe, struct bpe_scratch *scratch, int32_t *ids, size_t count, size_t *ret_count)
{
    if (count <= BPE_SHORT) {
        *ret_count = merge_short(bpe, ids, count);
        return 0;
    }
    int rc = reserve(scratch, count);
    if (rc == 0)
        *ret_count = merge_long(bpe, scratch, ids, count);
    return rc;
}
