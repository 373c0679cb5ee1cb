/*
 * Byte pair encoding (Sennrich et al. 2016) built from a GGUF file's metadata or from a Hugging Face tokenizer.json, in
 * the two manners that the supported models use:
 *
 * - bytes: GPT-2's mapping of bytes to characters; a pre-tokenizer (pretokenize.h: smollm, qwen2, llama-bpe, glm4) cuts
 *   the text into words within which bytes merge.
 * - characters (Gemma): SentencePiece's BPE without a space before the text. Spaces are the character U+2581 of the
 *   vocabulary, what the vocabulary lacks falls back to its 256 byte tokens. A GGUF file gives scores instead of
 *   merges; they become the merges that tokenizer.json lists.
 *
 * Ids equal those of the `tokenizers` package (tests/golden/make_tokens.py) for either source, also where llama.cpp
 * differs from it: text of the qwen2 pre-tokenizer is brought to NFC first, as Qwen's tokenizer.json asks; llama-bpe
 * and glm4 (tiktoken vocabularies) take a word that is a token of the vocabulary at once, whatever its merges say; and
 * in Gemma's text a literal U+2581 counts as a space. Any bytes may be encoded: bytes that are not UTF-8 count as other
 * symbols, and the few bytes that a vocabulary lacks (they do not occur in UTF-8) are left out, as the reference does.
 *
 * Text from outside cannot forge structure: control tokens (<|im_start|> ...) are recognised only with
 * TOKENIZER_CONTROL, and a vocabulary in which merges could build a control token is refused. User-defined tokens
 * (Qwen's <think>, Gemma's runs of newlines) are recognised always, the longest at the leftmost place.
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
#include "model/formats/pretokenize.h"
#include "model/formats/token_list.h"

#define TOKENIZER_TEXT_BYTES_MAX (4u << 20)  /* of one encode call */
#define TOKENIZER_TOKEN_BYTES_MAX 1024u      /* of one vocabulary entry */
#define TOKENIZER_JSON_BYTES_MAX (64u << 20) /* of tokenizer.json (Gemma's has 33 million) */
#define TOKENIZER_JSON_VALUES_MAX (3u << 20) /* braces, brackets and commas in it, which bounds the parser's memory */
#define TOKENIZER_CONFIG_BYTES_MAX (4u << 20)

enum { TOKENIZER_CONTROL = 1 }; /* recognise control tokens in the text: for text written by this program only */

struct tokenizer;

/* Copies what it needs: the GGUF may be closed afterwards. ERR_INTEGRITY names the file and the field; ERR_CONFIG for a
 * tokenizer model or pre-tokenizer that is not supported. */
int MUST_USE tokenizer_new(const struct gguf *gguf, struct tokenizer **ret_tokenizer, struct error *err);

/* The texts of a Hugging Face folder's files; those that are not there have len 0. */
struct tokenizer_files {
    struct span tokenizer;     /* tokenizer.json */
    struct span config;        /* tokenizer_config.json: begin, end and padding tokens, and perhaps the chat template */
    struct span chat_template; /* chat_template.jinja, which goes before that one, as in transformers */
};

/* The same from these. name stands in messages, for the folder. A pre-tokenizer, normalizer or option that no scanner
 * here equals is refused with ERR_CONFIG, which shows it. tokenizer_vocabulary() is one more than the largest id that
 * stands for something; the embedding often has more rows. */
int MUST_USE tokenizer_from_json(const struct tokenizer_files *files, const char *name,
                                 struct tokenizer **ret_tokenizer, struct error *err);

void tokenizer_free(struct tokenizer *tokenizer); /* accepts NULL */

/* Appends the ids of text, learn = 0. No begin-of-text token is added. ERR_RESOURCES when the list's maximum or
 * TOKENIZER_TEXT_BYTES_MAX is passed (the list keeps what it had before the call). */
int MUST_USE tokenizer_encode(const struct tokenizer *tokenizer, struct span text, unsigned flags,
                              struct token_list *list, struct error *err);

int32_t tokenizer_vocabulary(const struct tokenizer *tokenizer); /* ids lie in [0, this) */
enum pretokenizer tokenizer_pretokenizer(const struct tokenizer *tokenizer);
/* −1 where the vocabulary has none. eot ends an assistant's message (<|im_end|>; GLM: <|user|>, which begins the next
 * one). */
int32_t tokenizer_bos(const struct tokenizer *tokenizer);
int32_t tokenizer_eos(const struct tokenizer *tokenizer);
int32_t tokenizer_eot(const struct tokenizer *tokenizer);
int32_t tokenizer_pad(const struct tokenizer *tokenizer);
/* Generation stops at eos, eot and every control token named like an end of text or turn. */
bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id);
bool tokenizer_is_control(const struct tokenizer *tokenizer, int32_t id);
/* The id of a control token by its text, or −1. */
int32_t tokenizer_control(const struct tokenizer *tokenizer, const char *text);
/* The same of a control or user-defined token. */
int32_t tokenizer_marker(const struct tokenizer *tokenizer, const char *text);
/* Whether the file brings a chat template, and whether that text holds `part`. It is looked at, never run. */
bool tokenizer_has_template(const struct tokenizer *tokenizer);
bool tokenizer_template_holds(const struct tokenizer *tokenizer, const char *part);
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
