#include "model/formats/vocabulary.h"

#include "model/formats/tokenizer_build.h"
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

static bool unmap_bytes(struct span text, uint8_t *out, size_t *ret_len)
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

static bool unmap_characters(struct span text, uint8_t *out, size_t *ret_len)
{
    size_t len = 0;
    for (size_t at = 0; at < text.len;) {
        uint32_t c;
        int step = utf8_char(text.ptr + at, text.len - at, &c);
        if (step <= 0)
            return false;
        if (c == 0x2581)
            out[len++] = ' ';
        else
            for (int i = 0; i < step; i++)
                out[len++] = text.ptr[at + (size_t)i];
        at += (size_t)step;
    }
    *ret_len = len;
    return true;
}

bool vocabulary_unmap(bool characters, struct span text, uint8_t *out, size_t *ret_len)
{
    return characters ? unmap_characters(text, out, ret_len) : unmap_bytes(text, out, ret_len);
}

int vocabulary_byte(struct span text)
{
    static const char digits[] = "0123456789ABCDEF";
    if (text.len != 6 || memcmp(text.ptr, "<0x", 3) != 0 || text.ptr[5] != '>')
        return -1;
    const char *high = memchr(digits, text.ptr[3], 16), *low = memchr(digits, text.ptr[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : -1;
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

static int add_normal(struct vocabulary *v, int32_t id, const char *file, const char *field, struct error *err)
{
    const struct span piece = vocabulary_piece(v, id);
    size_t slot = (size_t)hash(piece) & v->mask;
    for (int probe = 0; probe < PROBES_MAX; probe++, slot = (slot + 1) & v->mask) {
        if (v->slots[slot] >= 0 && span_equal(vocabulary_piece(v, v->slots[slot]), piece))
            return error_set(err, ERR_INTEGRITY, "%s: %s: tokens %d and %d are the same text", file, field,
                             v->slots[slot], id);
        if (v->slots[slot] < 0) {
            v->slots[slot] = id;
            if (piece.len == 1 && !v->characters)
                v->by_byte[piece.ptr[0]] = id;
            return 0;
        }
    }
    return error_set(err, ERR_INTEGRITY, "%s: %s: the tokens were chosen to make look-ups slow", file, field);
}

static int add_byte(struct vocabulary *v, int32_t id, const char *file, const char *field, struct error *err)
{
    const uint8_t byte = vocabulary_piece(v, id).ptr[0];
    if (v->by_byte[byte] >= 0)
        return error_set(err, ERR_INTEGRITY, "%s: %s: tokens %d and %d are the same byte", file, field,
                         v->by_byte[byte], id);
    v->by_byte[byte] = id;
    return 0;
}

/* Writes the bytes of one token to out; false if its text is not of its kind. */
static bool read_text(const struct vocabulary *v, enum token_kind kind, struct span text, uint8_t *out, size_t *ret_len)
{
    const bool written = kind == TOKEN_NORMAL || (v->characters && kind == TOKEN_USER_DEFINED);
    if (written)
        return vocabulary_unmap(v->characters, text, out, ret_len);
    if (v->characters && kind == TOKEN_BYTE) {
        const int byte = vocabulary_byte(text);
        *out = (uint8_t)byte;
        *ret_len = 1;
        return byte >= 0;
    }
    if (text.len > 0)
        memcpy(out, text.ptr, text.len);
    *ret_len = text.len;
    return true;
}

static int read_texts(struct vocabulary *v, const struct vocabulary_text *from, const char *file, const char *field,
                      struct error *err)
{
    size_t used = 0;
    for (int32_t id = 0; id < v->count; id++) {
        const struct span text = from->texts[id];
        size_t len;
        if ((text.len == 0 && v->kinds[id] != TOKEN_UNUSED) || text.len > TOKENIZER_TOKEN_BYTES_MAX)
            return error_set(err, ERR_INTEGRITY, "%s: %s: token %d has %zu bytes, expected 1 to %u", file, field, id,
                             text.len, TOKENIZER_TOKEN_BYTES_MAX);
        if (!read_text(v, v->kinds[id], text, v->bytes + used, &len))
            return error_set(err, ERR_INTEGRITY, "%s: %s: token %d holds a character that stands for no byte", file,
                             field, id);
        used += len;
        v->offsets[id + 1] = (uint32_t)used;
    }
    return 0;
}

/* What the vocabulary can fall back to must be all there, or some text could not be encoded. */
static int check_bytes(const struct vocabulary *v, const char *file, const char *field, struct error *err)
{
    for (int byte = 0; byte < 256; byte++)
        if (v->characters && v->by_byte[byte] < 0)
            return error_set(err, ERR_CONFIG, "%s: %s: there is no byte token <0x%02X>; all 256 are needed", file,
                             field, (unsigned)byte);
    return 0;
}

static int fill(struct vocabulary *v, const struct vocabulary_text *text, const char *file, const char *field,
                struct error *err)
{
    memcpy(v->kinds, text->kinds, (size_t)v->count);
    int rc = read_texts(v, text, file, field, err);
    for (int32_t id = 0; rc == 0 && id < v->count; id++) {
        if (v->kinds[id] == TOKEN_NORMAL)
            rc = add_normal(v, id, file, field, err);
        else if (v->kinds[id] == TOKEN_BYTE && v->characters)
            rc = add_byte(v, id, file, field, err);
    }
    return rc < 0 ? rc : check_bytes(v, file, field, err);
}

int vocabulary_init(struct vocabulary *v, const struct vocabulary_text *text, const char *file, const char *field,
                    struct error *err)
{
    size_t slots = 512, bytes = 1;
    int rc;
    for (int32_t id = 0; id < text->count; id++)
        bytes += text->texts[id].len; /* spans of one file: no overflow */
    if (text->count < 1 || text->count > MODEL_VOCABULARY_MAX || bytes > UINT32_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: %s has %d tokens of %zu bytes", file, field, text->count, bytes - 1);
    while (slots / 2 < (size_t)text->count)
        slots *= 2;
    *v = (struct vocabulary){.count = text->count, .characters = text->characters, .mask = slots - 1};
    memset(v->by_byte, 0xff, sizeof v->by_byte); /* −1 */
    v->bytes = malloc(bytes);
    v->offsets = calloc((size_t)v->count + 1, sizeof *v->offsets);
    v->kinds = calloc((size_t)v->count, 1);
    v->slots = malloc(slots * sizeof *v->slots);
    if (v->bytes && v->offsets && v->kinds && v->slots) {
        memset(v->slots, 0xff, slots * sizeof *v->slots);
        rc = fill(v, text, file, field, err);
    } else {
        rc = error_set(err, ERR_RESOURCES, "%s: no memory for the vocabulary", file);
    }
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
