/*
 * Pre-tokenizers: they cut a text into the words within which byte pairs merge. Hand-written scanners over utf8proc's
 * categories; the references are patterns of the `tokenizers` package. Bytes that are not UTF-8 count as characters of
 * no category.
 *
 * smollm: Digits(individual) isolates every character of category N, then GPT-2's pattern cuts what is between them:
 *
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *
 * qwen2, llama-bpe, glm4: one pattern, of the kind of OpenAI's cl100k. qwen2 has \p{N} for \p{N}{1,3}:
 *
 *     (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
 * ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 *
 * Ignoring case is the reference engine's (Oniguruma): of all characters beyond ASCII only U+017F, the long s, folds to
 * a letter in the list.
 *
 * none: the text is one word (Gemma).
 */
#ifndef FORMATS_PRETOKENIZE_H
#define FORMATS_PRETOKENIZE_H

#include "base/span.h"

enum pretokenizer {
    PRETOKENIZE_NONE,
    PRETOKENIZE_SMOLLM,
    PRETOKENIZE_QWEN2,
    PRETOKENIZE_LLAMA3,
    PRETOKENIZE_GLM4,
};

/* The end of the word that begins at start < text.len; greater than start. Calling it from word to word is linear. */
size_t pretokenize(enum pretokenizer p, struct span text, size_t start);

/* By the name of tokenizer.ggml.pre; "chatglm-bpe" (the older GLM-4's name) has glm4's pattern. */
bool pretokenizer_of_name(struct span name, enum pretokenizer *ret_pretokenizer);
/* By the pattern of a tokenizer.json's Split. */
bool pretokenizer_of_pattern(struct span pattern, enum pretokenizer *ret_pretokenizer);

#endif
