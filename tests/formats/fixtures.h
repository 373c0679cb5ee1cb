/* What the tests of model/formats share: small vocabularies and models written as GGUF files in memory. */
#ifndef TESTS_FORMATS_FIXTURES_H
#define TESTS_FORMATS_FIXTURES_H

#include "model/formats/gguf_write.h"
#include "model/formats/tokenizer.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* tests/golden/tokens.json; the tests run in the source folder. Caller: json_decref. */
json_t *fixture_golden(void);

/* Adds the small vocabulary of the golden file to a writer. */
void fixture_vocabulary(struct gguf_writer *w, const json_t *golden);
/* The same as the text of a tokenizer.json. Caller: free. */
char *fixture_vocabulary_json(const json_t *golden);
/* A tokenizer of that vocabulary. Caller: tokenizer_free. */
struct tokenizer *fixture_tokenizer(const json_t *golden);

/* tests/golden/tokenizers.json. Caller: json_decref. */
json_t *fixture_tokenizers(void);
/* A string of the two golden files: those of tokens.json, then "extra" of tokenizers.json. len 0 and ptr NULL past
 * them. */
struct span fixture_string(const json_t *tokens, const json_t *tokenizers, size_t i);
/* The digest that tests/golden/make_tokenizers.py writes, and whether it stands in place i of digests. */
bool fixture_digest_matches(const json_t *digests, size_t i, const uint32_t *numbers, size_t count);
/* A tokenizer of tokenizers.json ("qwen2", "llama-bpe", "glm4", "gemma"), by way of tokenizer.json or of a GGUF file.
 * Caller: tokenizer_free. */
struct tokenizer *fixture_tokenizer_json(const json_t *tokenizers, const char *kind);
struct tokenizer *fixture_tokenizer_gguf(const json_t *tokenizers, const char *kind);
/* The metadata for the latter. */
void fixture_kind(struct gguf_writer *w, const json_t *tokenizers, const char *kind);

/* The real model's path: CONSILIUM_MODEL, or the cache folder; NULL and a message on stderr when it is not there. */
const char *fixture_model_path(char *out, size_t size);
/* The same of Gemma 3 270M: CONSILIUM_GEMMA. */
const char *fixture_gemma_path(char *out, size_t size);

/* Asserts that err's code is `code` and its message holds each of the texts (up to NULL). */
void fixture_refused(int rc, const struct error *err, int code, ...);

#endif
