#include "model/formats/tokenizer_build.h"

#include "model/formats/utf8.h"

/* What ends a message, by name: the first that is there is eot unless the file names one. */
static const char *const turn_ends[] = {"<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|user|>"};
/* What else ends a text. */
static const char *const text_ends[] = {"<|endoftext|>",   "<|end_of_text|>", "<|eom_id|>",
                                        "<|observation|>", "<eos>",           "</s>"};

/* ---- markers ---- */

static bool is_marker(const struct tokenizer *t, int32_t id)
{
    return t->vocabulary.kinds[id] == TOKEN_CONTROL || t->vocabulary.kinds[id] == TOKEN_USER_DEFINED;
}

/* In the order of their bytes, a beginning before what continues it, then by id. */
static int marker_order(const void *a, const void *b, void *vocabulary)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    const struct span p = vocabulary_piece(vocabulary, x), q = vocabulary_piece(vocabulary, y);
    const int order = memcmp(p.ptr, q.ptr, p.len < q.len ? p.len : q.len);
    if (order != 0)
        return order;
    if (p.len != q.len)
        return p.len < q.len ? -1 : 1;
    return (x > y) - (x < y);
}

static int collect_markers(struct tokenizer *t, const struct tokenizer_source *s, struct error *err)
{
    size_t count = 0;
    for (int32_t id = 0; id < t->vocabulary.count; id++)
        count += is_marker(t, id);
    if (count > TOKENIZER_MARKERS_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: %s: %zu control and user-defined tokens, at most %u are allowed",
                         s->file, s->kinds_field, count, TOKENIZER_MARKERS_MAX);
    t->markers = calloc(count + 1, sizeof *t->markers);
    if (!t->markers)
        return error_set(err, ERR_RESOURCES, "%s: no memory for the vocabulary", s->file);
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

/* The first of markers[low .. high) whose byte number `depth` is at least `byte`; one that is too short comes first. */
static uint32_t lower_bound(const struct tokenizer *t, uint32_t low, uint32_t high, size_t depth, unsigned byte)
{
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        const struct span piece = vocabulary_piece(&t->vocabulary, t->markers[middle]);
        if (piece.len <= depth || piece.ptr[depth] < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Narrows the markers byte by byte to those that begin as the text does. */
int32_t tokenizer_match_marker(const struct tokenizer *t, struct span text, unsigned flags)
{
    uint32_t low = t->marker_first[text.ptr[0]], high = t->marker_first[text.ptr[0] + 1];
    int32_t found = -1;
    for (size_t depth = 1; low < high; depth++) {
        bool here = false;
        for (; low < high && vocabulary_piece(&t->vocabulary, t->markers[low]).len == depth; low++) {
            const int32_t id = t->markers[low];
            const bool counts = t->vocabulary.kinds[id] != TOKEN_CONTROL || (flags & TOKENIZER_CONTROL);
            if (counts && !here)
                found = id;
            here |= counts;
        }
        if (depth == text.len)
            break;
        low = lower_bound(t, low, high, depth, text.ptr[depth]);
        high = lower_bound(t, low, high, depth, text.ptr[depth] + 1u);
    }
    return found;
}

static int32_t marker_of(const struct tokenizer *t, struct span text, unsigned flags)
{
    const int32_t id = text.len > 0 ? tokenizer_match_marker(t, text, flags) : -1;
    return id >= 0 && vocabulary_piece(&t->vocabulary, id).len == text.len ? id : -1;
}

/* ---- merges ---- */

struct merge_text merge_text_of(struct span text)
{
    const uint8_t *space = text.len > 0 ? memchr(text.ptr, ' ', text.len) : NULL;
    const size_t left = space ? (size_t)(space - text.ptr) : 0;
    if (!space || memchr(space + 1, ' ', text.len - left - 1))
        return (struct merge_text){0};
    return (struct merge_text){span_of(text.ptr, left), span_of(space + 1, text.len - left - 1)};
}

/* Sides and result must be normal tokens: a merge that gave a control token would let any text forge it, and an empty
 * side would merge for ever. A user-defined token never comes up in merging, as it was cut out of the text before:
 * merges with one (Gemma's tokenizer.json has some) are left out. */
static int add_merge(struct tokenizer *t, const struct tokenizer_source *s, uint32_t rank, struct error *err)
{
    static const char *const parts[] = {"the left side", "the right side", "the result"};
    const struct merge_text *m = &s->merges[rank];
    uint8_t bytes[2 * TOKENIZER_TOKEN_BYTES_MAX];
    size_t left = 0, right = 0;
    int32_t ids[3];
    bool dead = false;
    if (m->left.len == 0 || m->right.len == 0 || m->left.len > TOKENIZER_TOKEN_BYTES_MAX ||
        m->right.len > TOKENIZER_TOKEN_BYTES_MAX ||
        !vocabulary_unmap(t->vocabulary.characters, m->left, bytes, &left) ||
        !vocabulary_unmap(t->vocabulary.characters, m->right, bytes + left, &right))
        return error_set(err, ERR_INTEGRITY, "%s: %s: merge %u is not two tokens with a space between them", s->file,
                         s->merges_field, rank);
    const struct span texts[] = {span_of(bytes, left), span_of(bytes + left, right), span_of(bytes, left + right)};
    for (int i = 0; i < 3; i++) {
        ids[i] = vocabulary_find(&t->vocabulary, texts[i]);
        if (ids[i] < 0 && marker_of(t, texts[i], 0) < 0)
            return error_set(err, ERR_INTEGRITY, "%s: %s: %s of merge %u is no ordinary token", s->file,
                             s->merges_field, parts[i], rank);
        dead |= ids[i] < 0;
    }
    int rc = dead ? 0 : bpe_add(&t->bpe, ids[0], ids[1], rank, ids[2]);
    if (rc == 0)
        return 0;
    return error_set(err, ERR_INTEGRITY, "%s: %s: merge %u %s", s->file, s->merges_field, rank,
                     rc == ERR_EXISTS ? "stands twice" : "collides with too many others");
}

static int add_merges(struct tokenizer *t, const struct tokenizer_source *s, struct error *err)
{
    if (s->scores)
        return tokenizer_merges_of_scores(t, s, err);
    if (s->merge_count > TOKENIZER_MERGES_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: %s: %zu merges, at most %u are allowed", s->file, s->merges_field,
                         s->merge_count, TOKENIZER_MERGES_MAX);
    int rc = bpe_init(&t->bpe, s->merge_count, err);
    for (size_t i = 0; rc == 0 && i < s->merge_count; i++)
        rc = add_merge(t, s, (uint32_t)i, err);
    return rc;
}

size_t tokenizer_symbols(const struct tokenizer *t, struct span piece, int32_t *ret_ids)
{
    const struct vocabulary *v = &t->vocabulary;
    size_t count = 0;
    for (size_t at = 0, step; at < piece.len; at += step) {
        int32_t id = -1;
        uint32_t c;
        step = 1;
        if (v->characters) {
            const int len = utf8_char(piece.ptr + at, piece.len - at, &c);
            step = len > 0 ? (size_t)len : 1;
            if (len > 0)
                id = vocabulary_find(v, span_of(piece.ptr + at, step));
        }
        for (size_t i = at; id < 0 && i < at + step; i++)
            if (v->by_byte[piece.ptr[i]] >= 0)
                ret_ids[count++] = v->by_byte[piece.ptr[i]];
        if (id >= 0)
            ret_ids[count++] = id;
    }
    return count;
}

/* Which tokens BPE finds for their own bytes. Nearly all do; a look-up then replaces the merging of a common word. */
static int mark_whole(struct tokenizer *t, struct error *err)
{
    struct bpe_scratch scratch = {0};
    int32_t ids[BPE_SHORT];
    int rc = 0;
    t->whole = calloc((size_t)t->vocabulary.count, 1);
    if (!t->whole)
        return error_set(err, ERR_RESOURCES, "no memory for the vocabulary");
    for (int32_t id = 0; rc == 0 && id < t->vocabulary.count; id++) {
        const struct span piece = vocabulary_piece(&t->vocabulary, id);
        size_t count;
        if (t->vocabulary.kinds[id] != TOKEN_NORMAL)
            continue;
        if (t->whole_words || piece.len > BPE_SHORT) {
            t->whole[id] = t->whole_words;
            continue;
        }
        count = tokenizer_symbols(t, piece, ids);
        rc = bpe_merge_all(&t->bpe, &scratch, ids, count, &count);
        t->whole[id] = count == 1 && ids[0] == id;
    }
    bpe_scratch_release(&scratch);
    return rc;
}

/* Merging never joins a space to the byte before it unless some token holds the two. */
static void find_joins(struct tokenizer *t)
{
    for (int32_t id = 0; id < t->vocabulary.count; id++) {
        const struct span piece = vocabulary_piece(&t->vocabulary, id);
        if (t->vocabulary.kinds[id] != TOKEN_NORMAL)
            continue;
        for (size_t i = 1; i < piece.len; i++)
            if (piece.ptr[i] == ' ')
                t->joins[piece.ptr[i - 1]] = true;
    }
}

/* ---- the rest ---- */

static void add_end(struct tokenizer *t, int32_t id)
{
    for (size_t i = 0; i < t->end_count; i++)
        if (t->ends[i] == id)
            return;
    if (id >= 0 && t->end_count < TOKENIZER_ENDS_MAX)
        t->ends[t->end_count++] = id;
}

static void find_ends(struct tokenizer *t)
{
    for (size_t i = 0; t->eot < 0 && i < ARRAY_LEN(turn_ends); i++)
        t->eot = tokenizer_control(t, turn_ends[i]);
    add_end(t, t->eos);
    add_end(t, t->eot);
    for (size_t i = 0; i < ARRAY_LEN(turn_ends); i++)
        add_end(t, tokenizer_control(t, turn_ends[i]));
    for (size_t i = 0; i < ARRAY_LEN(text_ends); i++)
        add_end(t, tokenizer_control(t, text_ends[i]));
}

int tokenizer_build(const struct tokenizer_source *source, struct tokenizer **ret_tokenizer, struct error *err)
{
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t)
        return error_set(err, ERR_RESOURCES, "%s: no memory", source->file);
    t->pretokenizer = source->pretokenizer;
    t->nfc = source->nfc;
    t->whole_words = source->whole_words;
    t->bos = source->bos;
    t->eos = source->eos;
    t->eot = source->eot;
    t->pad = source->pad;
    buffer_init(&t->chat_template, source->chat_template.len);
    if (source->chat_template.len > 0)
        buffer_append(&t->chat_template, source->chat_template.ptr, source->chat_template.len);
    int rc = buffer_ok(&t->chat_template) ? 0 : error_set(err, ERR_RESOURCES, "%s: no memory", source->file);
    if (rc == 0)
        rc = vocabulary_init(&t->vocabulary, &source->vocabulary, source->file, source->tokens_field, err);
    if (rc == 0)
        rc = collect_markers(t, source, err);
    if (rc == 0)
        rc = add_merges(t, source, err);
    if (rc == 0)
        rc = mark_whole(t, err);
    if (rc < 0) {
        tokenizer_free(t);
        return rc;
    }
    find_joins(t);
    find_ends(t);
    *ret_tokenizer = t;
    return 0;
}

void tokenizer_free(struct tokenizer *tokenizer)
{
    if (!tokenizer)
        return;
    vocabulary_release(&tokenizer->vocabulary);
    bpe_release(&tokenizer->bpe);
    buffer_release(&tokenizer->chat_template);
    free(tokenizer->whole);
    free(tokenizer->markers);
    free(tokenizer);
}

static bool holds(struct span text, struct span part)
{
    return memmem(text.ptr, text.len, part.ptr, part.len) != NULL;
}

bool tokenizer_has_template(const struct tokenizer *tokenizer)
{
    return tokenizer->chat_template.len > 0;
}

bool tokenizer_template_holds(const struct tokenizer *tokenizer, const char *part)
{
    return tokenizer_has_template(tokenizer) && holds(buffer_span(&tokenizer->chat_template), span_str(part));
}

int32_t tokenizer_marker(const struct tokenizer *tokenizer, const char *text)
{
    return marker_of(tokenizer, span_str(text), TOKENIZER_CONTROL);
}

int32_t tokenizer_control(const struct tokenizer *tokenizer, const char *text)
{
    const int32_t id = tokenizer_marker(tokenizer, text);
    return tokenizer_is_control(tokenizer, id) ? id : -1;
}
