/*
 * What a tokenizer is built from, whichever file described it, and what it is built into. Internal to the tokenizer:
 * tokenizer_gguf.c and tokenizer_json.c fill a struct tokenizer_source, tokenizer_build checks it and makes the
 * tables, tokenizer.c uses them.
 *
 *     struct tokenizer_source source = {.file = name, .pretokenizer = PRETOKENIZE_QWEN2, ...};
 *     return tokenizer_build(&source, ret_tokenizer, err);
 */
#ifndef FORMATS_TOKENIZER_BUILD_H
#define FORMATS_TOKENIZER_BUILD_H

#include "model/formats/bpe.h"
#include "model/formats/tokenizer.h"
#include "model/formats/vocabulary.h"

#define TOKENIZER_MERGES_MAX (1u << 20)
#define TOKENIZER_SCORED_BYTES_MAX 128u  /* of a token with a score: each of its cuts is looked up */
#define TOKENIZER_MARKERS_MAX (1u << 16) /* control and user-defined tokens */
#define TOKENIZER_ENDS_MAX 16

struct merge_text {
    struct span left, right; /* as the file writes them */
};

/* Of "left right"; both empty if text is not two words with one space between them. */
struct merge_text merge_text_of(struct span text);

/* Everything is borrowed for the length of the call. */
struct tokenizer_source {
    const char *file;                                      /* as messages call it */
    const char *tokens_field, *kinds_field, *merges_field; /* where they stand in it */
    struct vocabulary_text vocabulary;
    const struct merge_text *merges; /* (merge_count), most urgent first */
    size_t merge_count;
    const float *scores; /* (vocabulary.count), instead of merges; NULL: none */
    enum pretokenizer pretokenizer;
    bool nfc;                   /* bring text to NFC first */
    bool whole_words;           /* a word that is a token is taken at once, whatever its merges say */
    int32_t bos, eos, eot, pad; /* −1: none. Without an eot a known name is looked for */
    struct span chat_template;  /* empty: none */
};

struct tokenizer {
    struct vocabulary vocabulary;
    struct bpe bpe;
    enum pretokenizer pretokenizer;
    bool nfc, whole_words;
    uint8_t *whole;   /* (count) 1: BPE turns this token's own bytes into this token, so it may be looked up at once */
    bool joins[256];  /* characters only: some token holds this byte right before a space */
    int32_t *markers; /* control and user-defined tokens in the order of their bytes */
    uint32_t marker_first[257]; /* markers that begin with byte b: [marker_first[b], marker_first[b + 1]) */
    int32_t ends[TOKENIZER_ENDS_MAX];
    size_t end_count;
    int32_t bos, eos, eot, pad;
    struct buffer chat_template;
};

int MUST_USE tokenizer_build(const struct tokenizer_source *source, struct tokenizer **ret_tokenizer,
                             struct error *err);

/* Adds the merges that tokens and scores amount to: each token's cuts into two tokens, the best score first. */
int MUST_USE tokenizer_merges_of_scores(struct tokenizer *t, const struct tokenizer_source *source, struct error *err);

/* The symbols that merging of piece begins with: at most piece.len ids. Returns their count. */
size_t tokenizer_symbols(const struct tokenizer *t, struct span piece, int32_t *ret_ids);

/* The longest marker at the start of text, or −1. Control tokens count only with TOKENIZER_CONTROL. */
int32_t tokenizer_match_marker(const struct tokenizer *t, struct span text, unsigned flags);

#endif
