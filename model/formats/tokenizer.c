#include "model/formats/tokenizer.h"

#include "base/checked.h"
#include "model/formats/bpe.h"
#include "model/formats/pretokenize.h"
#include "model/formats/utf8.h"
#include "model/formats/vocabulary.h"

#define MARKERS_MAX 4096 /* control and user-defined tokens */

struct tokenizer {
    struct vocabulary vocabulary;
    struct bpe bpe;
    uint8_t *whole;   /* (count) 1: BPE turns this token's own bytes into this token, so it may be looked up at once */
    int32_t *markers; /* control and user-defined tokens by first byte, longest first */
    uint32_t marker_first[257]; /* markers that begin with byte b: [marker_first[b], marker_first[b + 1]) */
    int32_t bos, eos, eot, pad;
};

/* ---- token lists ---- */

void token_list_release(struct token_list *list)
{
    free(list->ids);
    free(list->learn);
    list->ids = NULL;
    list->learn = NULL;
    list->count = list->capacity = 0;
}

void token_list_clear(struct token_list *list)
{
    list->count = 0;
}

/* Makes room for n more. */
static int list_reserve(struct token_list *list, size_t n, struct error *err)
{
    size_t wanted, capacity = list->capacity ? list->capacity : 64, bytes;
    if (!checked_add(list->count, n, &wanted) || wanted > list->max)
        return error_set(err, ERR_RESOURCES, "the text has more than %zu tokens", list->max);
    if (wanted <= list->capacity)
        return 0;
    while (capacity < wanted)
        capacity *= 2;
    if (!checked_mul(capacity, sizeof *list->ids, &bytes))
        return error_set(err, ERR_RESOURCES, "no memory for %zu tokens", wanted);
    int32_t *ids = realloc(list->ids, bytes);
    if (ids)
        list->ids = ids;
    uint8_t *learn = realloc(list->learn, capacity);
    if (learn)
        list->learn = learn;
    if (!ids || !learn)
        return error_set(err, ERR_RESOURCES, "no memory for %zu tokens", wanted);
    list->capacity = capacity;
    return 0;
}

int token_list_append(struct token_list *list, int32_t id, bool learn, struct error *err)
{
    int rc = list_reserve(list, 1, err);
    if (rc < 0)
        return rc;
    list->ids[list->count] = id;
    list->learn[list->count++] = learn;
    return 0;
}

/* ---- building ---- */

/* One line "left right" of the merges. Sides and result must be normal tokens: a merge that gave a control token would
 * let any text forge it, and an empty side would merge for ever. */
static int read_merge(struct tokenizer *t, struct span text, uint32_t rank, const char *file, struct error *err)
{
    uint8_t bytes[TOKENIZER_TOKEN_BYTES_MAX];
    size_t left_len = 0, right_len = 0;
    const uint8_t *space = text.len > 0 ? memchr(text.ptr, ' ', text.len) : NULL;
    bool ok = space && text.len - 1 <= sizeof bytes;
    if (ok) {
        const size_t split = (size_t)(space - text.ptr);
        ok = vocabulary_unmap(span_of(text.ptr, split), bytes, &left_len) &&
             vocabulary_unmap(span_of(space + 1, text.len - split - 1), bytes + left_len, &right_len) && left_len > 0 &&
             right_len > 0;
    }
    if (!ok)
        return error_set(err, ERR_INTEGRITY,
                         "%s: key tokenizer.ggml.merges: merge %u is not two tokens with a space "
                         "between them",
                         file, rank);
    const int32_t left = vocabulary_find(&t->vocabulary, span_of(bytes, left_len));
    const int32_t right = vocabulary_find(&t->vocabulary, span_of(bytes + left_len, right_len));
    const int32_t result = vocabulary_find(&t->vocabulary, span_of(bytes, left_len + right_len));
    if (left < 0 || right < 0 || result < 0)
        return error_set(err, ERR_INTEGRITY, "%s: key tokenizer.ggml.merges: %s of merge %u is no ordinary token", file,
                         left < 0    ? "the left side"
                         : right < 0 ? "the right side"
                                     : "the result",
                         rank);
    int rc = bpe_add(&t->bpe, left, right, rank, result);
    if (rc == 0)
        return 0;
    return error_set(err, ERR_INTEGRITY, "%s: key tokenizer.ggml.merges: merge %u %s", file, rank,
                     rc == ERR_EXISTS ? "stands twice" : "collides with too many others");
}

static int read_merges(struct tokenizer *t, const struct gguf *gguf, struct error *err)
{
    struct gguf_array merges;
    size_t cursor = 0;
    int rc = gguf_get_array(gguf, "tokenizer.ggml.merges", GGUF_STRING, MODEL_VOCABULARY_MAX, &merges, err);
    if (rc < 0)
        return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
    rc = bpe_init(&t->bpe, (size_t)merges.count, err);
    for (uint64_t i = 0; rc == 0 && i < merges.count; i++)
        rc = read_merge(t, gguf_array_string(&merges, &cursor), (uint32_t)i, gguf_name(gguf), err);
    return rc;
}

static bool is_marker(const struct tokenizer *t, int32_t id)
{
    return t->vocabulary.kinds[id] == TOKEN_CONTROL || t->vocabulary.kinds[id] == TOKEN_USER_DEFINED;
}

/* By first byte, then the longest first (the reference takes the longest match at the leftmost place), then by id. */
static int marker_order(const void *a, const void *b, void *vocabulary)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    const struct span p = vocabulary_piece(vocabulary, x), q = vocabulary_piece(vocabulary, y);
    if (p.ptr[0] != q.ptr[0])
        return p.ptr[0] < q.ptr[0] ? -1 : 1;
    if (p.len != q.len)
        return p.len > q.len ? -1 : 1;
    return (x > y) - (x < y);
}

static int collect_markers(struct tokenizer *t, const char *file, struct error *err)
{
    size_t count = 0;
    for (int32_t id = 0; id < t->vocabulary.count; id++)
        count += is_marker(t, id);
    if (count > MARKERS_MAX)
        return error_set(err, ERR_INTEGRITY,
                         "%s: key tokenizer.ggml.token_type: %zu control and user-defined tokens, at "
                         "most %d are allowed",
                         file, count, MARKERS_MAX);
    t->markers = calloc(count + 1, sizeof *t->markers);
    if (!t->markers)
        return error_set(err, ERR_RESOURCES, "%s: no memory for the vocabulary", file);
    count = 0;
    for (int32_t id = 0; id < t->vocabulary.count; id++)
        if (is_marker(t, id))
            t->markers[count++] = id;
    if (count > 0)
        qsort_r(t->markers, count, sizeof *t->markers, marker_order, &t->vocabulary);
    for (size_t i = 0; i < count; i++)
        t->marker_first[vocabulary_piece(&t->vocabulary, t->markers[i]).ptr[0] + 1]++;
    for (size_t b = 0; b < 256; b++)
        t->marker_first[b + 1] += t->marker_first[b];
    return 0;
}

/* Which tokens BPE finds for their own bytes. Nearly all do; a look-up then replaces the merging of a common word. */
static int mark_whole(struct tokenizer *t, struct error *err)
{
    struct bpe_scratch scratch = {0};
    int32_t ids[TOKENIZER_TOKEN_BYTES_MAX];
    int rc = 0;
    t->whole = calloc((size_t)t->vocabulary.count, 1);
    if (!t->whole)
        return error_set(err, ERR_RESOURCES, "no memory for the vocabulary");
    for (int32_t id = 0; rc == 0 && id < t->vocabulary.count; id++) {
        const struct span piece = vocabulary_piece(&t->vocabulary, id);
        size_t count = 0;
        if (t->vocabulary.kinds[id] != TOKEN_NORMAL || piece.len > BPE_SHORT)
            continue;
        for (size_t i = 0; i < piece.len; i++)
            if (t->vocabulary.by_byte[piece.ptr[i]] >= 0)
                ids[count++] = t->vocabulary.by_byte[piece.ptr[i]];
        rc = bpe_merge_all(&t->bpe, &scratch, ids, count, &count);
        t->whole[id] = count == 1 && ids[0] == id;
    }
    bpe_scratch_release(&scratch);
    return rc;
}

static int read_id(const struct gguf *gguf, const char *key, int32_t vocabulary, int32_t *ret, struct error *err)
{
    uint32_t id;
    if (!gguf_has(gguf, key))
        return 0;
    int rc = gguf_get_u32(gguf, key, 0, (uint32_t)vocabulary - 1, &id, err);
    if (rc == 0)
        *ret = (int32_t)id;
    return rc;
}

static int read_ids(struct tokenizer *t, const struct gguf *gguf, struct error *err)
{
    const int32_t n = t->vocabulary.count;
    t->bos = t->eos = t->pad = t->eot = -1;
    int rc = read_id(gguf, "tokenizer.ggml.bos_token_id", n, &t->bos, err);
    if (rc == 0)
        rc = read_id(gguf, "tokenizer.ggml.eos_token_id", n, &t->eos, err);
    if (rc == 0)
        rc = read_id(gguf, "tokenizer.ggml.padding_token_id", n, &t->pad, err);
    if (rc == 0)
        rc = read_id(gguf, "tokenizer.ggml.eot_token_id", n, &t->eot, err);
    if (rc == 0 && t->eot < 0)
        t->eot = tokenizer_control(t, "<|im_end|>");
    return rc;
}

static int check_kind(const struct gguf *gguf, const char *key, const char *expected, struct error *err)
{
    struct span value;
    int rc = gguf_get_string(gguf, key, &value, err);
    if (rc < 0)
        return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
    if (!span_equal(value, span_str(expected)))
        return error_set(err, ERR_CONFIG, "%s: key %s names a tokenizer that is not supported, expected \"%s\"",
                         gguf_name(gguf), key, expected);
    return 0;
}

int tokenizer_new(const struct gguf *gguf, struct tokenizer **ret_tokenizer, struct error *err)
{
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t)
        return error_set(err, ERR_RESOURCES, "%s: no memory", gguf_name(gguf));
    int rc = check_kind(gguf, "tokenizer.ggml.model", "gpt2", err);
    if (rc == 0)
        rc = check_kind(gguf, "tokenizer.ggml.pre", "smollm", err);
    if (rc == 0)
        rc = vocabulary_init(&t->vocabulary, gguf, err);
    if (rc == 0)
        rc = read_merges(t, gguf, err);
    if (rc == 0)
        rc = collect_markers(t, gguf_name(gguf), err);
    if (rc == 0)
        rc = mark_whole(t, err);
    if (rc == 0)
        rc = read_ids(t, gguf, err);
    if (rc < 0)
        tokenizer_free(t);
    else
        *ret_tokenizer = t;
    return rc;
}

void tokenizer_free(struct tokenizer *tokenizer)
{
    if (!tokenizer)
        return;
    vocabulary_release(&tokenizer->vocabulary);
    bpe_release(&tokenizer->bpe);
    free(tokenizer->whole);
    free(tokenizer->markers);
    free(tokenizer);
}

/* ---- encoding ---- */

struct encoding {
    const struct tokenizer *tokenizer;
    struct token_list *list;
    struct bpe_scratch scratch;
    struct error *err;
};

static int encode_piece(struct encoding *e, struct span piece)
{
    const struct vocabulary *v = &e->tokenizer->vocabulary;
    size_t count = 0;
    const int32_t id = piece.len <= BPE_SHORT ? vocabulary_find(v, piece) : -1;
    /* In the worst case each byte is a token; the list's maximum is checked on what is left after merging. */
    const size_t max = e->list->max;
    if (id >= 0 && e->tokenizer->whole[id])
        return token_list_append(e->list, id, false, e->err);
    e->list->max = SIZE_MAX;
    int rc = list_reserve(e->list, piece.len, e->err);
    e->list->max = max;
    if (rc < 0)
        return rc;
    int32_t *ids = e->list->ids + e->list->count;
    for (size_t i = 0; i < piece.len; i++)
        if (v->by_byte[piece.ptr[i]] >= 0)
            ids[count++] = v->by_byte[piece.ptr[i]];
    rc = bpe_merge_all(&e->tokenizer->bpe, &e->scratch, ids, count, &count);
    if (rc < 0)
        return error_set(e->err, rc, "no memory to tokenise a word of %zu bytes", piece.len);
    if (count > max - e->list->count)
        return error_set(e->err, ERR_RESOURCES, "the text has more than %zu tokens", max);
    memset(e->list->learn + e->list->count, 0, count);
    e->list->count += count;
    return 0;
}

/* Text without markers. */
static int encode_plain(struct encoding *e, struct span text)
{
    for (size_t at = 0; at < text.len;) {
        const size_t end = pretokenize_smollm(text, at);
        int rc = encode_piece(e, span_of(text.ptr + at, end - at));
        if (rc < 0)
            return rc;
        at = end;
    }
    return 0;
}

/* The marker at the start of text, or −1. */
static int32_t match_marker(const struct tokenizer *t, struct span text, unsigned flags)
{
    const uint32_t first = t->marker_first[text.ptr[0]], end = t->marker_first[text.ptr[0] + 1];
    for (uint32_t i = first; i < end; i++) {
        const int32_t id = t->markers[i];
        const struct span piece = vocabulary_piece(&t->vocabulary, id);
        if (t->vocabulary.kinds[id] == TOKEN_CONTROL && !(flags & TOKENIZER_CONTROL))
            continue;
        if (piece.len <= text.len && memcmp(piece.ptr, text.ptr, piece.len) == 0)
            return id;
    }
    return -1;
}

static int encode_all(struct encoding *e, struct span text, unsigned flags)
{
    size_t plain = 0; /* where the text that is not yet encoded begins */
    for (size_t at = 0; at < text.len;) {
        const int32_t id = match_marker(e->tokenizer, span_of(text.ptr + at, text.len - at), flags);
        if (id < 0) {
            at++;
            continue;
        }
        int rc = encode_plain(e, span_of(text.ptr + plain, at - plain));
        if (rc == 0)
            rc = token_list_append(e->list, id, false, e->err);
        if (rc < 0)
            return rc;
        at += vocabulary_piece(&e->tokenizer->vocabulary, id).len;
        plain = at;
    }
    return encode_plain(e, span_of(text.ptr + plain, text.len - plain));
}

int tokenizer_encode(const struct tokenizer *tokenizer, struct span text, unsigned flags, struct token_list *list,
                     struct error *err)
{
    struct encoding e = {.tokenizer = tokenizer, .list = list, .err = err};
    const size_t before = list->count;
    if (text.len > TOKENIZER_TEXT_BYTES_MAX)
        return error_set(err, ERR_RESOURCES,
                         "a text of %zu bytes is too long to tokenise at once, at most %u are "
                         "allowed",
                         text.len, TOKENIZER_TEXT_BYTES_MAX);
    if (text.len == 0)
        return 0;
    int rc = encode_all(&e, text, flags);
    if (rc < 0)
        list->count = before;
    bpe_scratch_release(&e.scratch);
    return rc;
}

/* ---- questions ---- */

int32_t tokenizer_vocabulary(const struct tokenizer *tokenizer)
{
    return tokenizer->vocabulary.count;
}

int32_t tokenizer_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t tokenizer_eos(const struct tokenizer *tokenizer)
{
    return tokenizer->eos;
}

int32_t tokenizer_eot(const struct tokenizer *tokenizer)
{
    return tokenizer->eot;
}

int32_t tokenizer_pad(const struct tokenizer *tokenizer)
{
    return tokenizer->pad;
}

bool tokenizer_is_control(const struct tokenizer *tokenizer, int32_t id)
{
    return id >= 0 && id < tokenizer->vocabulary.count && tokenizer->vocabulary.kinds[id] == TOKEN_CONTROL;
}

bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id)
{
    static const char *const names[] = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>"};
    if (id >= 0 && (id == tokenizer->eos || id == tokenizer->eot))
        return true;
    for (size_t i = 0; tokenizer_is_control(tokenizer, id) && i < ARRAY_LEN(names); i++)
        if (span_equal(vocabulary_piece(&tokenizer->vocabulary, id), span_str(names[i])))
            return true;
    return false;
}

int32_t tokenizer_control(const struct tokenizer *tokenizer, const char *text)
{
    const struct span wanted = span_str(text);
    if (wanted.len == 0)
        return -1;
    for (uint32_t i = tokenizer->marker_first[wanted.ptr[0]]; i < tokenizer->marker_first[wanted.ptr[0] + 1]; i++) {
        const int32_t id = tokenizer->markers[i];
        if (tokenizer_is_control(tokenizer, id) && span_equal(vocabulary_piece(&tokenizer->vocabulary, id), wanted))
            return id;
    }
    return -1;
}

struct span tokenizer_piece(const struct tokenizer *tokenizer, int32_t id)
{
    if (id < 0 || id >= tokenizer->vocabulary.count)
        return (struct span){0};
    return vocabulary_piece(&tokenizer->vocabulary, id);
}

/* ---- decoding ---- */

void tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, size_t count, struct buffer *out)
{
    for (size_t i = 0; i < count; i++) {
        const struct span piece = tokenizer_piece(tokenizer, ids[i]);
        if (piece.len > 0 && !tokenizer_is_control(tokenizer, ids[i]))
            buffer_append(out, piece.ptr, piece.len);
    }
}

static void put_replacement(struct buffer *out)
{
    buffer_append(out, "\xef\xbf\xbd", 3);
}

static void push_byte(struct token_stream *s, uint8_t byte, struct buffer *out)
{
    uint32_t c;
    s->held[s->held_count++] = byte;
    int len = utf8_char(s->held, s->held_count, &c);
    if (len == 0)
        return;
    if (len > 0) {
        buffer_append(out, s->held, s->held_count);
        s->held_count = 0;
        return;
    }
    /* What was held cannot be continued by this byte, which may begin a character of its own. */
    const bool alone = s->held_count == 1;
    s->held_count = 0;
    put_replacement(out);
    if (!alone)
        push_byte(s, byte, out);
}

void token_stream_push(struct token_stream *stream, const struct tokenizer *tokenizer, int32_t id, struct buffer *out)
{
    const struct span piece = tokenizer_piece(tokenizer, id);
    if (tokenizer_is_control(tokenizer, id))
        return;
    for (size_t i = 0; i < piece.len; i++)
        push_byte(stream, piece.ptr[i], out);
}

void token_stream_end(struct token_stream *stream, struct buffer *out)
{
    if (stream->held_count > 0)
        put_replacement(out);
    stream->held_count = 0;
}
