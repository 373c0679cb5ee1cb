#include "model/formats/tokenizer_build.h"

#include "model/formats/tokenizer_nfc.h"
#include "model/formats/utf8.h"

/* ---- encoding ---- */

struct encoding {
    const struct tokenizer *tokenizer;
    struct token_list *list;
    struct bpe_scratch scratch;
    struct buffer spaced, composed; /* the text with U+2581 as spaces; a part of it in NFC */
    struct error *err;
};

static int encode_word(struct encoding *e, struct span word)
{
    const struct tokenizer *t = e->tokenizer;
    const size_t max = e->list->max, known_max = t->whole_words ? TOKENIZER_TOKEN_BYTES_MAX : BPE_SHORT;
    const int32_t id = word.len <= known_max ? vocabulary_find(&t->vocabulary, word) : -1;
    size_t count;
    if (id >= 0 && t->whole[id])
        return token_list_append(e->list, id, false, e->err);
    /* In the worst case each byte is a token; the list's maximum is checked on what is left after merging. */
    e->list->max = SIZE_MAX;
    int rc = token_list_reserve(e->list, word.len, e->err);
    e->list->max = max;
    if (rc < 0)
        return rc;
    int32_t *ids = e->list->ids + e->list->count;
    count = tokenizer_symbols(t, word, ids);
    rc = bpe_merge_all(&t->bpe, &e->scratch, ids, count, &count);
    if (rc < 0)
        return error_set(e->err, rc, "no memory to tokenise a word of %zu bytes", word.len);
    if (count > max - e->list->count)
        return error_set(e->err, ERR_RESOURCES, "the text has more than %zu tokens", max);
    memset(e->list->learn + e->list->count, 0, count);
    e->list->count += count;
    return 0;
}

/* The end of the word at start. Where there is no pre-tokenizer it is cut before a space that nothing before it can
 * merge with: the ids are the same, and the words short and often known. */
static size_t word_end(const struct tokenizer *t, struct span text, size_t start)
{
    if (t->pretokenizer != PRETOKENIZE_NONE)
        return pretokenize(t->pretokenizer, text, start);
    for (size_t at = start + 1; at < text.len; at++)
        if (text.ptr[at] == ' ' && !t->joins[text.ptr[at - 1]])
            return at;
    return text.len;
}

/* Text without markers. */
static int encode_plain(struct encoding *e, struct span text)
{
    if (e->tokenizer->nfc && !tokenizer_is_nfc(text)) {
        int rc = tokenizer_compose(text, &e->composed, e->err);
        if (rc < 0)
            return rc;
        text = buffer_span(&e->composed);
    }
    for (size_t at = 0; at < text.len;) {
        const size_t end = word_end(e->tokenizer, text, at);
        int rc = encode_word(e, span_of(text.ptr + at, end - at));
        if (rc < 0)
            return rc;
        at = end;
    }
    return 0;
}

static int encode_all(struct encoding *e, struct span text, unsigned flags)
{
    size_t plain = 0; /* where the text that is not yet encoded begins */
    for (size_t at = 0; at < text.len;) {
        const int32_t id = tokenizer_match_marker(e->tokenizer, span_of(text.ptr + at, text.len - at), flags);
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

/* In a vocabulary of characters U+2581 is the space. */
static struct span with_spaces(struct encoding *e, struct span text)
{
    const struct span mark = span_str("\xe2\x96\x81");
    const uint8_t *next;
    while ((next = memmem(text.ptr, text.len, mark.ptr, mark.len))) {
        const size_t len = (size_t)(next - text.ptr);
        buffer_append(&e->spaced, text.ptr, len);
        buffer_u8(&e->spaced, ' ');
        text = span_of(next + mark.len, text.len - len - mark.len);
    }
    buffer_append(&e->spaced, text.ptr, text.len);
    return buffer_span(&e->spaced);
}

int tokenizer_encode(const struct tokenizer *tokenizer, struct span text, unsigned flags, struct token_list *list,
                     struct error *err)
{
    struct encoding e = {.tokenizer = tokenizer, .list = list, .err = err};
    int rc = 0;
    const size_t before = list->count;
    if (text.len > TOKENIZER_TEXT_BYTES_MAX)
        return error_set(err, ERR_RESOURCES,
                         "a text of %zu bytes is too long to tokenise at once, at most %u are "
                         "allowed",
                         text.len, TOKENIZER_TEXT_BYTES_MAX);
    if (text.len == 0)
        return 0;
    buffer_init(&e.spaced, TOKENIZER_TEXT_BYTES_MAX);
    buffer_init(&e.composed, TOKENIZER_NFC_GROWTH * TOKENIZER_TEXT_BYTES_MAX);
    if (tokenizer->vocabulary.characters && memmem(text.ptr, text.len, "\xe2\x96\x81", 3))
        text = with_spaces(&e, text);
    if (!buffer_ok(&e.spaced))
        rc = error_set(err, ERR_RESOURCES, "no memory to tokenise %zu bytes", text.len);
    if (rc == 0)
        rc = encode_all(&e, text, flags);
    if (rc < 0)
        list->count = before;
    buffer_release(&e.spaced);
    buffer_release(&e.composed);
    bpe_scratch_release(&e.scratch);
    return rc;
}

/* ---- questions ---- */

int32_t tokenizer_vocabulary(const struct tokenizer *tokenizer)
{
    return tokenizer->vocabulary.count;
}

enum pretokenizer tokenizer_pretokenizer(const struct tokenizer *tokenizer)
{
    return tokenizer->pretokenizer;
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
    for (size_t i = 0; i < tokenizer->end_count; i++)
        if (tokenizer->ends[i] == id)
            return true;
    return false;
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
