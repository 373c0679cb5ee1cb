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
/* A tokenizer of that vocabulary. Caller: tokenizer_free. */
struct tokenizer *fixture_tokenizer(const json_t *golden);

/* The real model's path: CONSILIUM_MODEL, or the cache folder; NULL and a message on stderr when it is not there. */
const char *fixture_model_path(char *out, size_t size);

/* Asserts that err's code is `code` and its message holds each of the texts (up to NULL). */
void fixture_refused(int rc, const struct error *err, int code, ...);

#endif
