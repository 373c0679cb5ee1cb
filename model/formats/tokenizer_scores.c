/*
 * Merges from the scores of a SentencePiece vocabulary.
 *
 * SentencePiece joins the two neighbours whose concatenation is the token of the best score. That is byte pair merging
 * with a merge for each cut of a token into two tokens, ranked by the token's score; at equal scores, as of the cuts of
 * one token, the longer left side comes first, as in the conversion that made Gemma's tokenizer.json (generate_merges
 * of transformers/convert_slow_tokenizer.py). SentencePiece itself takes the leftmost of them, which can differ where a
 * token's cuts overlap, as in a run of one letter.
 */
#include "model/formats/tokenizer_build.h"

#include <math.h>

struct cut {
    float score;
    uint32_t left_characters, right_characters;
    int32_t left, right, result;
};

struct cuts {
    struct cut *cuts;
    size_t count, capacity;
};

static int cut_order(const void *a, const void *b)
{
    const struct cut *x = a, *y = b;
    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    if (x->left_characters != y->left_characters)
        return x->left_characters > y->left_characters ? -1 : 1;
    if (x->right_characters != y->right_characters)
        return x->right_characters > y->right_characters ? -1 : 1;
    return (x->result > y->result) - (x->result < y->result);
}

static int add_cut(struct cuts *cuts, struct cut cut, const struct tokenizer_source *s, struct error *err)
{
    if (cuts->count == TOKENIZER_MERGES_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: %s: the tokens amount to more than %u merges", s->file,
                         s->tokens_field, TOKENIZER_MERGES_MAX);
    if (cuts->count == cuts->capacity) {
        const size_t capacity = cuts->capacity ? 2 * cuts->capacity : 4096;
        struct cut *grown = realloc(cuts->cuts, capacity * sizeof *grown);
        if (!grown)
            return error_set(err, ERR_RESOURCES, "%s: no memory for %zu merges", s->file, capacity);
        cuts->cuts = grown;
        cuts->capacity = capacity;
    }
    cuts->cuts[cuts->count++] = cut;
    return 0;
}

static bool begins_character(uint8_t byte)
{
    return (byte & 0xc0) != 0x80;
}

static int cut_token(const struct tokenizer *t, const struct tokenizer_source *s, int32_t id, struct cuts *cuts,
                     struct error *err)
{
    const struct vocabulary *v = &t->vocabulary;
    const struct span piece = vocabulary_piece(v, id);
    uint32_t all = 0, before = 0;
    int rc = 0;
    if (!isfinite(s->scores[id]))
        return error_set(err, ERR_INTEGRITY, "%s: key tokenizer.ggml.scores: the score of token %d is not finite",
                         s->file, id);
    if (piece.len > TOKENIZER_SCORED_BYTES_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: %s: token %d has %zu bytes; with scores at most %u are allowed",
                         s->file, s->tokens_field, id, piece.len, TOKENIZER_SCORED_BYTES_MAX);
    for (size_t at = 0; at < piece.len; at++)
        all += begins_character(piece.ptr[at]);
    for (size_t at = 1; rc == 0 && at < piece.len; at++) {
        if (!begins_character(piece.ptr[at]))
            continue;
        before++;
        const int32_t left = vocabulary_find(v, span_of(piece.ptr, at));
        const int32_t right = left < 0 ? -1 : vocabulary_find(v, span_of(piece.ptr + at, piece.len - at));
        if (right >= 0)
            rc = add_cut(cuts, (struct cut){s->scores[id], before, all - before, left, right, id}, s, err);
    }
    return rc;
}

int tokenizer_merges_of_scores(struct tokenizer *t, const struct tokenizer_source *source, struct error *err)
{
    struct cuts cuts = {0};
    int rc = 0;
    for (int32_t id = 0; rc == 0 && id < t->vocabulary.count; id++)
        if (t->vocabulary.kinds[id] == TOKEN_NORMAL)
            rc = cut_token(t, source, id, &cuts, err);
    if (rc == 0)
        rc = bpe_init(&t->bpe, cuts.count, err);
    if (rc == 0 && cuts.count > 0)
        qsort(cuts.cuts, cuts.count, sizeof *cuts.cuts, cut_order);
    for (size_t i = 0; rc == 0 && i < cuts.count; i++) {
        const struct cut *c = &cuts.cuts[i];
        /* A pair has one concatenation, so none comes twice. */
        if (bpe_add(&t->bpe, c->left, c->right, (uint32_t)i, c->result) < 0)
            rc = error_set(err, ERR_INTEGRITY, "%s: %s: the tokens were chosen to make look-ups slow", source->file,
                           source->tokens_field);
    }
    free(cuts.cuts);
    return rc;
}
