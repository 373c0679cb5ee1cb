/*
 * A tokenizer's vocabulary: the bytes of each token, what kind each is, and finding a token by its bytes. Internal to
 * the tokenizer; immutable after vocabulary_init.
 */
#ifndef FORMATS_VOCABULARY_H
#define FORMATS_VOCABULARY_H

#include "model/formats/gguf.h"

/* Numbers of tokenizer.ggml.token_type. */
enum token_kind {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_USER_DEFINED = 4,
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6,
};

struct vocabulary {
    int32_t count;
    uint8_t *bytes;    /* of all tokens, one after the other: raw bytes, GPT-2's byte mapping undone for normal ones */
    uint32_t *offsets; /* (count + 1) */
    uint8_t *kinds;    /* (count) enum token_kind */
    int32_t *slots;    /* (mask + 1) normal tokens by their bytes, open addressing; −1: free */
    size_t mask;
    int32_t by_byte[256]; /* the normal token of one byte, or −1 */
};

int MUST_USE vocabulary_init(struct vocabulary *v, const struct gguf *gguf, struct error *err);
void vocabulary_release(struct vocabulary *v); /* accepts zeroed */

static inline struct span vocabulary_piece(const struct vocabulary *v, int32_t id)
{
    return span_of(v->bytes + v->offsets[id], v->offsets[id + 1] - v->offsets[id]);
}

/* The normal token with exactly these bytes, or −1. */
int32_t vocabulary_find(const struct vocabulary *v, struct span bytes);

/* Undoes GPT-2's byte mapping (bytes_to_unicode of the gpt-2 repository): writes at most text.len bytes to out; false
 * if a character stands for no byte. */
bool MUST_USE vocabulary_unmap(struct span text, uint8_t *out, size_t *ret_len);

#endif
