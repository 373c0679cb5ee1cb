/* Sequences' keys and values on the device, in blocks of KV_BLOCK tokens, and attention over them. */
#include "kernels/cuda/backend.h"

struct kv {
    struct kv_layout layout;
    int32_t length_max, blocks;
    size_t block_bytes;
    void *memory;       /* (blocks, block_bytes) */
    void *const *table; /* dev (blocks): where each block is */
};

void cuda_kv_free(struct backend *be, struct kv *kv)
{
    if (!kv)
        return;
    cuda_release(be, kv->memory);
    cuda_release(be, const_cast<void **>(kv->table));
    free(kv);
}

int cuda_kv_new(struct backend *be, int32_t layers, int32_t kv_heads, int32_t head_size, int32_t length_max,
                struct kv **ret, struct error *err)
{
    struct cuda *c = cuda_of(be);
    struct kv *kv = static_cast<struct kv *>(calloc(1, sizeof *kv));
    void **host = NULL, *table = NULL;
    int rc = ERR_RESOURCES;
    if (kv) {
        kv->layout.type = be->element;
        kv->layout.quantised = c->options.quantise_kv;
        kv->layout.layers = layers;
        kv->layout.kv_heads = kv_heads;
        kv->layout.head_size = head_size;
        kv->length_max = length_max;
        kv->blocks = (length_max + KV_BLOCK - 1) / KV_BLOCK;
        kv->block_bytes = kv_block_bytes(&kv->layout);
        host = static_cast<void **>(malloc(sizeof *host * (size_t)kv->blocks));
    }
    if (!kv || !host) {
        free(kv);
        return error_set(err, ERR_RESOURCES, "no memory for a table of %d tokens", length_max);
    }
    if ((rc = cuda_alloc(be, kv->block_bytes * (size_t)kv->blocks, &kv->memory, err)) == 0 &&
        (rc = cuda_alloc(be, sizeof *host * (size_t)kv->blocks, &table, err)) == 0) {
        kv->table = static_cast<void *const *>(table);
        for (int32_t i = 0; i < kv->blocks; i++)
            host[i] = static_cast<uint8_t *>(kv->memory) + (size_t)i * kv->block_bytes;
        be->ops->upload(be, table, host, sizeof *host * (size_t)kv->blocks);
        rc = be->ops->sync(be, err);
    }
    free(host);
    if (rc < 0) {
        cuda_kv_free(be, kv);
        return error_prefix(err, "keys and values of %d tokens", length_max);
    }
    *ret = kv;
    return 0;
}

void cuda_kv_copy(struct backend *be, struct kv *to, const struct kv *from, int32_t length)
{
    const size_t blocks = ((size_t)length + KV_BLOCK - 1) / KV_BLOCK;
    assert(length <= to->length_max && length <= from->length_max && to->block_bytes == from->block_bytes);
    be->ops->copy(be, to->memory, from->memory, blocks * from->block_bytes);
}

/* Which round a piece belongs to: pieces of one sequence use the same places one after the other. */
static int32_t round_of(const struct kv_piece *pieces, int32_t i)
{
    int32_t round = 0;
    while (i > 0 && pieces[i - 1].kv == pieces[i].kv) {
        round++;
        i--;
    }
    return round;
}

uint64_t cuda_pieces_set(struct backend *be, const struct kv_piece *pieces, int32_t count)
{
    struct cuda *c = cuda_of(be);
    struct kv_row *rows = static_cast<struct kv_row *>(c->rows_host);
    int32_t longest = 1;
    c->rounds = 0;
    c->pass_rows = 0;
    for (int32_t i = 0; i < count; i++) {
        const struct kv_piece *p = &pieces[i];
        c->kv_layout = p->kv->layout;
        c->pass_rows = p->row + p->count > c->pass_rows ? p->row + p->count : c->pass_rows;
        longest = p->start + p->count > longest ? p->start + p->count : longest;
    }
    assert(c->pass_rows <= c->rows_max);
    for (int32_t i = 0; i < count; i++) {
        const struct kv_piece *p = &pieces[i];
        const int32_t round = round_of(pieces, i);
        for (; c->rounds <= round; c->rounds++) {
            struct kv_row *all = rows + (size_t)c->rounds * (size_t)c->pass_rows;
            assert((size_t)(c->rounds + 1) * (size_t)c->pass_rows * sizeof *all <= c->rows.bytes);
            for (int32_t r = 0; r < c->pass_rows; r++) {
                all[r].blocks = NULL;
                all[r].position = -1;
            }
        }
        struct kv_row *to = rows + (size_t)round * (size_t)c->pass_rows + (size_t)p->row;
        for (int32_t t = 0; t < p->count; t++) {
            to[t].blocks = p->kv->table;
            to[t].position = p->start + t;
        }
    }
    c->length_bucket = 256;
    while (c->length_bucket < longest)
        c->length_bucket *= 2;
    const size_t bytes = (size_t)c->rounds * (size_t)c->pass_rows * sizeof *rows;
    if (bytes > 0)
        be->ops->upload(be, c->rows.at, rows, bytes);
    return (uint64_t)c->rounds << 32 | (uint64_t)c->length_bucket;
}

void cuda_attend(struct backend *be, const struct attention_shape *shape, int32_t layer, struct rows q, struct rows k,
                 struct rows v, struct rows o)
{
    struct cuda *c = cuda_of(be);
    for (int32_t round = 0; round < c->rounds; round++) {
        const struct kv_row *rows =
            static_cast<const struct kv_row *>(c->rows.at) + (size_t)round * (size_t)c->pass_rows;
        decode_store(c->stream, &c->kv_layout, layer, c->pass_rows, rows, k, v);
        if (q.at)
            decode_attention(c->stream, &c->kv_layout, shape, layer, c->pass_rows, c->length_bucket, rows, q, o,
                             c->decode.at);
    }
}
