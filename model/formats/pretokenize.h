/*
 * Pre-tokenizer "smollm": splits a text into the pieces within which BPE merges.
 *
 * The reference is two steps of the `tokenizers` package: Digits(individual) isolates every character of category N,
 * then GPT-2's pattern cuts what is between them:
 *
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *
 * Both are one hand-written scan here. Bytes that are not UTF-8 count as characters of no category.
 */
#ifndef FORMATS_PRETOKENIZE_H
#define FORMATS_PRETOKENIZE_H

#include "base/span.h"

/* The end of the piece that begins at start < text.len; greater than start. Calling it from piece to piece is linear.
 */
size_t pretokenize_smollm(struct span text, size_t start);

#endif
