/*
 * Byte-level BPE (Sennrich et al. 2016; GPT-2's byte mapping) built from a GGUF file's metadata.
 *
 * Pre-tokenizer "smollm": every digit stands alone, then GPT-2's pattern. It is a hand-written scanner over utf8proc's
 * categories; ids equal those of the `tokenizers` package (tests/golden/make_tokens.py). Any bytes may be encoded:
 * bytes that are not UTF-8 count as other symbols, and the few bytes that the vocabulary lacks (they do not occur in
 * UTF-8) are left out, as the reference does.
 *
 * Text from outside cannot forge structure: control tokens (<|im_start|> ...) are recognised only with
 * TOKENIZER_CONTROL, and a vocabulary in which merges could build a control token is refused.
 *
 * Cost: O(n log n) for a text of n bytes, whatever it holds. Immutable: any number of threads may share one.
 *
 *     struct tokenizer *tokenizer;
 *     struct token_list list = {.max = 4096};
 *     if (tokenizer_new(gguf, &tokenizer, err) < 0) ...
 *     if (tokenizer_encode(tokenizer, span_str("Acute bronchitis"), 0, &list, err) < 0) ...
 *     token_list_release(&list);
 *     tokenizer_free(tokenizer);
 */
#ifndef FORMATS_TOKENIZER_H
#define FORMATS_TOKENIZER_H

#include "base/buffer.h"
#include "model/formats/gguf.h"

#define TOKENIZER_TEXT_BYTES_MAX (4u << 20) /* of one encode call */
#define TOKENIZER_TOKEN_BYTES_MAX 1024u     /* of one vocabulary entry */

enum { TOKENIZER_CONTROL = 1 }; /* recognise control tokens in the text: for text written by this program only */

/* Growing lists of ids and of learn flags (struct batch_example's). Zero it but for max. */
struct token_list {
    int32_t *ids;   /* owned */
    uint8_t *learn; /* owned: 1 where the token is to be predicted, 0 elsewhere */
    size_t count, capacity;
    size_t max; /* tokens; more is refused */
};
void token_list_release(struct token_list *list); /* accepts zeroed */
void token_list_clear(struct token_list *list);   /* count = 0, memory kept */
int MUST_USE token_list_append(struct token_list *list, int32_t id, bool learn, struct error *err);

struct tokenizer;

/* Copies what it needs: the GGUF may be closed afterwards. ERR_INTEGRITY names the file and the field; ERR_CONFIG for a
 * tokenizer model or pre-tokenizer that is not supported. */
int MUST_USE tokenizer_new(const struct gguf *gguf, struct tokenizer **ret_tokenizer, struct error *err);
void tokenizer_free(struct tokenizer *tokenizer); /* accepts NULL */

/* Appends the ids of text, learn = 0. No begin-of-text token is added. ERR_RESOURCES when the list's maximum or
 * TOKENIZER_TEXT_BYTES_MAX is passed (the list keeps what it had before the call). */
int MUST_USE tokenizer_encode(const struct tokenizer *tokenizer, struct span text, unsigned flags,
                              struct token_list *list, struct error *err);

int32_t tokenizer_vocabulary(const struct tokenizer *tokenizer);
/* −1 where the vocabulary has none. eot ends an assistant's message (<|im_end|>). */
int32_t tokenizer_bos(const struct tokenizer *tokenizer);
int32_t tokenizer_eos(const struct tokenizer *tokenizer);
int32_t tokenizer_eot(const struct tokenizer *tokenizer);
int32_t tokenizer_pad(const struct tokenizer *tokenizer);
/* Generation stops at eos, eot and every control token named like an end of text. */
bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id);
bool tokenizer_is_control(const struct tokenizer *tokenizer, int32_t id);
/* The id of a control token by its text, or −1. */
int32_t tokenizer_control(const struct tokenizer *tokenizer, const char *text);
/* The bytes that a token stands for (a control token: its text); empty for ids outside the vocabulary. Borrowed. */
struct span tokenizer_piece(const struct tokenizer *tokenizer, int32_t id);

/* Appends the bytes of the ids, control tokens left out; they may end inside a character. */
void tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, size_t count, struct buffer *out);

/* Decoding token by token for a stream of valid UTF-8: a character's bytes are held back until all are there, and bytes
 * that cannot become one give U+FFFD. Zero it first. */
struct token_stream {
    uint8_t held[4];
    uint32_t held_count;
};
void token_stream_push(struct token_stream *stream, const struct tokenizer *tokenizer, int32_t id, struct buffer *out);
void token_stream_end(struct token_stream *stream, struct buffer *out); /* an unfinished character gives U+FFFD */

#endif
