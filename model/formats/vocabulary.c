#include "model/formats/vocabulary.h"

#include "model/formats/tokenizer.h"
#include "model/formats/utf8.h"

#define PROBES_MAX 512

/* Printable Latin-1 bytes stand for themselves; the other 68, in order, for U+0100 and up. */
static bool stands_for_itself(uint32_t byte)
{
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
}

static int unmap_char(uint32_t c)
{
    if (c < 0x100)
        return stands_for_itself(c) ? (int)c : -1;
    uint32_t left = c - 0x100;
    for (uint32_t byte = 0; byte < 0x100 && c < 0x144; byte++)
        if (!stands_for_itself(byte) && left-- == 0)
            return (int)byte;
    return -1;
}

bool vocabulary_unmap(struct span text, uint8_t *out, size_t *ret_len)
{
    size_t len = 0;
    for (size_t at = 0; at < text.len;) {
        uint32_t c;
        int step = utf8_char(text.ptr + at, text.len - at, &c);
        int byte = step > 0 ? unmap_char(c) : -1;
        if (byte < 0)
            return false;
        out[len++] = (uint8_t)byte;
        at += (size_t)step;
    }
    *ret_len = len;
    return true;
}

static uint64_t hash(struct span s)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < s.len; i++)
        h = (h ^ s.ptr[i]) * UINT64_C(0x100000001b3);
    return h ^ h >> 29;
}

int32_t vocabulary_find(const struct vocabulary *v, struct span bytes)
{
    for (size_t slot = (size_t)hash(bytes) & v->mask;; slot = (slot + 1) & v->mask) {
        int32_t id = v->slots[slot];
        if (id < 0 || span_equal(vocabulary_piece(v, id), bytes))
            return id;
    }
}

static int add_normal(struct vocabulary *v, int32_t id, const char *file, struct error *err)
{
    const struct span piece = vocabulary_piece(v, id);
    size_t slot = (size_t)hash(piece) & v->mask;
    for (int probe = 0; probe < PROBES_MAX; probe++, slot = (slot + 1) & v->mask) {
        if (v->slots[slot] >= 0 && span_equal(vocabulary_piece(v, v->slots[slot]), piece))
            return error_set(err, ERR_INTEGRITY, "%s: key tokenizer.ggml.tokens: tokens %d and %d are the same text",
                             file, v->slots[slot], id);
        if (v->slots[slot] < 0) {
            v->slots[slot] = id;
            if (piece.len == 1)
                v->by_byte[piece.ptr[0]] = id;
            return 0;
        }
    }
    return error_set(err, ERR_INTEGRITY, "%s: key tokenizer.ggml.tokens: the tokens were chosen to make look-ups slow",
                     file);
}

static int read_kinds(struct vocabulary *v, const struct gguf *gguf, struct error *err)
{
    struct gguf_array types;
    int rc = gguf_get_array(gguf, "tokenizer.ggml.token_type", GGUF_I32, MODEL_VOCABULARY_MAX, &types, err);
    if (rc < 0)
        return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
    if (types.count != (uint64_t)v->count)
        return error_set(err, ERR_INTEGRITY,
                         "%s: key tokenizer.ggml.token_type has %llu elements, expected %d as in "
                         "tokenizer.ggml.tokens",
                         gguf_name(gguf), (unsigned long long)types.count, v->count);
    for (int32_t id = 0; id < v->count; id++) {
        int32_t type = gguf_array_i32(&types, (uint64_t)id);
        if (type < TOKEN_NORMAL || type > TOKEN_BYTE)
            return error_set(err, ERR_INTEGRITY,
                             "%s: key tokenizer.ggml.token_type: token %d has type %d, expected 1 "
                             "to 6",
                             gguf_name(gguf), id, type);
        v->kinds[id] = (uint8_t)type;
    }
    return 0;
}

static int read_texts(struct vocabulary *v, const struct gguf_array *tokens, const char *file, struct error *err)
{
    size_t cursor = 0, used = 0;
    for (int32_t id = 0; id < v->count; id++) {
        const struct span text = gguf_array_string(tokens, &cursor);
        size_t len = text.len;
        if (text.len == 0 || text.len > TOKENIZER_TOKEN_BYTES_MAX)
            return error_set(err, ERR_INTEGRITY,
                             "%s: key tokenizer.ggml.tokens: token %d has %zu bytes, expected 1 to "
                             "%u",
                             file, id, text.len, TOKENIZER_TOKEN_BYTES_MAX);
        if (v->kinds[id] != TOKEN_NORMAL)
            memcpy(v->bytes + used, text.ptr, text.len);
        else if (!vocabulary_unmap(text, v->bytes + used, &len))
            return error_set(err, ERR_INTEGRITY,
                             "%s: key tokenizer.ggml.tokens: token %d holds a character that stands "
                             "for no byte",
                             file, id);
        used += len;
        v->offsets[id + 1] = (uint32_t)used;
    }
    return 0;
}

int vocabulary_init(struct vocabulary *v, const struct gguf *gguf, struct error *err)
{
    struct gguf_array tokens;
    size_t slots = 512;
    int rc = gguf_get_array(gguf, "tokenizer.ggml.tokens", GGUF_STRING, MODEL_VOCABULARY_MAX, &tokens, err);
    if (rc < 0)
        return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
    if (tokens.count == 0 || tokens.bytes.len > UINT32_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: key tokenizer.ggml.tokens has %llu tokens of %zu bytes",
                         gguf_name(gguf), (unsigned long long)tokens.count, tokens.bytes.len);
    while (slots / 2 < tokens.count)
        slots *= 2;
    *v = (struct vocabulary){.count = (int32_t)tokens.count, .mask = slots - 1};
    memset(v->by_byte, 0xff, sizeof v->by_byte); /* −1 */
    v->bytes = malloc(tokens.bytes.len);
    v->offsets = calloc((size_t)v->count + 1, sizeof *v->offsets);
    v->kinds = calloc((size_t)v->count, 1);
    v->slots = malloc(slots * sizeof *v->slots);
    if (!v->bytes || !v->offsets || !v->kinds || !v->slots) {
        rc = error_set(err, ERR_RESOURCES, "%s: no memory for the vocabulary", gguf_name(gguf));
        goto out;
    }
    memset(v->slots, 0xff, slots * sizeof *v->slots);
    rc = read_kinds(v, gguf, err);
    if (rc == 0)
        rc = read_texts(v, &tokens, gguf_name(gguf), err);
    for (int32_t id = 0; rc == 0 && id < v->count; id++)
        if (v->kinds[id] == TOKEN_NORMAL)
            rc = add_normal(v, id, gguf_name(gguf), err);
out:
    if (rc < 0)
        vocabulary_release(v);
    return rc;
}

void vocabulary_release(struct vocabulary *v)
{
    free(v->bytes);
    free(v->offsets);
    free(v->kinds);
    free(v->slots);
    memset(v, 0, sizeof *v);
}
