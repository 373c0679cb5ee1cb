/*
 * A tokenizer's vocabulary: the bytes of each token, what kind each is, and finding a token by its bytes. Internal to
 * the tokenizer; immutable after vocabulary_init.
 *
 * The bytes are those that a text has: the file's way of writing them is undone. In a vocabulary of characters a space
 * stands for U+2581, the texts' spaces and theirs; a byte token has its byte.
 */
#ifndef FORMATS_VOCABULARY_H
#define FORMATS_VOCABULARY_H

#include "base/error.h"
#include "base/span.h"

/* Numbers of tokenizer.ggml.token_type. */
enum token_kind {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_USER_DEFINED = 4,
    TOKEN_UNUSED = 5, /* may be empty: an id that stands for nothing */
    TOKEN_BYTE = 6,
};

/* The tokens as a file writes them. */
struct vocabulary_text {
    const struct span *texts; /* (count) */
    const uint8_t *kinds;     /* (count) enum token_kind */
    int32_t count;            /* 1 to MODEL_VOCABULARY_MAX */
    bool characters;          /* U+2581 for a space and <0xXX> for a byte; else GPT-2's mapping of bytes */
};

struct vocabulary {
    int32_t count;
    bool characters;
    uint8_t *bytes;    /* of all tokens, one after the other */
    uint32_t *offsets; /* (count + 1) */
    uint8_t *kinds;    /* (count) enum token_kind */
    int32_t *slots;    /* (mask + 1) normal tokens by their bytes, open addressing; −1: free */
    size_t mask;
    int32_t by_byte[256]; /* the normal token of one byte, of characters the byte token; or −1 */
};

/* file and field name the tokens in messages. */
int MUST_USE vocabulary_init(struct vocabulary *v, const struct vocabulary_text *text, const char *file,
                             const char *field, struct error *err);
void vocabulary_release(struct vocabulary *v); /* accepts zeroed */

static inline struct span vocabulary_piece(const struct vocabulary *v, int32_t id)
{
    return span_of(v->bytes + v->offsets[id], v->offsets[id + 1] - v->offsets[id]);
}

/* The normal token with exactly these bytes, or −1. */
int32_t vocabulary_find(const struct vocabulary *v, struct span bytes);

/* Undoes the file's way of writing a normal token: writes at most text.len bytes to out; false if a character stands
 * for no byte (GPT-2's mapping: bytes_to_unicode of the gpt-2 repository). */
bool MUST_USE vocabulary_unmap(bool characters, struct span text, uint8_t *out, size_t *ret_len);

/* The byte that <0xXX> names, in upper case as the reference writes it; −1 if text is no such name. */
int vocabulary_byte(struct span text);

#endif
