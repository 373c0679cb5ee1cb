/* A tokenizer's description from the metadata of a GGUF file. */
#include "model/formats/tokenizer_build.h"

#include "base/checked.h"

struct gguf_reading {
    const struct gguf *gguf;
    struct tokenizer_source source;
    struct span *texts; /* owned, as the rest */
    uint8_t *kinds;
    struct merge_text *merges;
    float *scores;
    struct error *err;
};

static int no_memory(const struct gguf_reading *r)
{
    return error_set(r->err, ERR_RESOURCES, "%s: no memory for the vocabulary", gguf_name(r->gguf));
}

/* The same as gguf_get_array for a key that must be there. */
static int need_array(const struct gguf_reading *r, const char *key, enum gguf_type type, struct gguf_array *ret_array)
{
    int rc = gguf_get_array(r->gguf, key, type, MODEL_VOCABULARY_MAX, ret_array, r->err);
    return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
}

/* An array with one element for each token. */
static int array_of_tokens(const struct gguf_reading *r, const char *key, enum gguf_type type,
                           struct gguf_array *ret_array)
{
    struct gguf_array array;
    int rc = need_array(r, key, type, &array);
    if (rc < 0)
        return rc;
    if (array.count != (uint64_t)r->source.vocabulary.count)
        return error_set(r->err, ERR_INTEGRITY, "%s: key %s has %llu elements, expected %d as in tokenizer.ggml.tokens",
                         gguf_name(r->gguf), key, (unsigned long long)array.count, r->source.vocabulary.count);
    *ret_array = array;
    return 0;
}

static int read_tokens(struct gguf_reading *r)
{
    struct gguf_array tokens, types;
    size_t cursor = 0;
    int rc = need_array(r, "tokenizer.ggml.tokens", GGUF_STRING, &tokens);
    if (rc < 0)
        return rc;
    r->source.vocabulary.count = (int32_t)tokens.count;
    if ((rc = array_of_tokens(r, "tokenizer.ggml.token_type", GGUF_I32, &types)) < 0)
        return rc;
    r->texts = calloc((size_t)tokens.count + 1, sizeof *r->texts);
    r->kinds = calloc((size_t)tokens.count + 1, 1);
    if (!r->texts || !r->kinds)
        return no_memory(r);
    for (uint64_t id = 0; id < tokens.count; id++) {
        const int32_t type = gguf_array_i32(&types, id);
        if (type < TOKEN_NORMAL || type > TOKEN_BYTE)
            return error_set(r->err, ERR_INTEGRITY,
                             "%s: key tokenizer.ggml.token_type: token %llu has type %d, expected 1 to 6",
                             gguf_name(r->gguf), (unsigned long long)id, type);
        r->texts[id] = gguf_array_string(&tokens, &cursor);
        r->kinds[id] = (uint8_t)type;
    }
    r->source.vocabulary.texts = r->texts;
    r->source.vocabulary.kinds = r->kinds;
    return 0;
}

static int read_merges(struct gguf_reading *r)
{
    struct gguf_array merges;
    size_t cursor = 0;
    int rc = need_array(r, "tokenizer.ggml.merges", GGUF_STRING, &merges);
    if (rc < 0)
        return rc;
    r->merges = calloc((size_t)merges.count + 1, sizeof *r->merges);
    if (!r->merges)
        return no_memory(r);
    for (uint64_t i = 0; i < merges.count; i++)
        r->merges[i] = merge_text_of(gguf_array_string(&merges, &cursor));
    r->source.merges = r->merges;
    r->source.merge_count = (size_t)merges.count;
    return 0;
}

static int read_scores(struct gguf_reading *r)
{
    struct gguf_array scores;
    int rc = array_of_tokens(r, "tokenizer.ggml.scores", GGUF_F32, &scores);
    if (rc < 0)
        return rc;
    r->scores = calloc((size_t)scores.count + 1, sizeof *r->scores);
    if (!r->scores)
        return no_memory(r);
    memcpy(r->scores, scores.bytes.ptr, (size_t)scores.count * sizeof *r->scores);
    r->source.scores = r->scores;
    return 0;
}

static int refuse_kind(const struct gguf_reading *r, const char *key, struct span value, const char *expected)
{
    return error_set(r->err, ERR_CONFIG, "%s: key %s names a tokenizer that is not supported, \"%.*s\"; expected %s",
                     gguf_name(r->gguf), key, (int)(value.len < 64 ? value.len : 64), (const char *)value.ptr,
                     expected);
}

static int need_string(const struct gguf_reading *r, const char *key, struct span *ret_text)
{
    int rc = gguf_get_string(r->gguf, key, ret_text, r->err);
    return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
}

/* "gpt2": bytes, with a named pre-tokenizer. */
static int read_bytes(struct gguf_reading *r)
{
    struct span name;
    int rc = need_string(r, "tokenizer.ggml.pre", &name);
    if (rc < 0)
        return rc;
    if (!pretokenizer_of_name(name, &r->source.pretokenizer))
        return refuse_kind(r, "tokenizer.ggml.pre", name, "\"smollm\", \"qwen2\", \"llama-bpe\" or \"glm4\"");
    r->source.nfc = r->source.pretokenizer == PRETOKENIZE_QWEN2;
    r->source.whole_words = r->source.pretokenizer == PRETOKENIZE_LLAMA3 || r->source.pretokenizer == PRETOKENIZE_GLM4;
    rc = read_tokens(r);
    return rc < 0 ? rc : read_merges(r);
}

/* A flag that must be off; absent it counts as `otherwise`. */
static int need_off(const struct gguf_reading *r, const char *key, bool otherwise)
{
    bool value = otherwise;
    int rc = gguf_has(r->gguf, key) ? gguf_get_bool(r->gguf, key, &value, r->err) : 0;
    if (rc < 0 || !value)
        return rc;
    return error_set(
        r->err, ERR_CONFIG,
        "%s: key %s is %s, which is not supported: of SentencePiece's tokenizers only those that leave the "
        "text's spaces as they are, as Gemma's does",
        gguf_name(r->gguf), key, gguf_has(r->gguf, key) ? "true" : "absent (which means true)");
}

/* "llama": SentencePiece's characters, with scores. */
static int read_characters(struct gguf_reading *r)
{
    int rc = need_off(r, "tokenizer.ggml.add_space_prefix", true);
    if (rc == 0)
        rc = need_off(r, "tokenizer.ggml.remove_extra_whitespaces", false);
    r->source.vocabulary.characters = true;
    r->source.pretokenizer = PRETOKENIZE_NONE;
    if (rc == 0)
        rc = read_tokens(r);
    return rc < 0 ? rc : read_scores(r);
}

static int read_id(const struct gguf_reading *r, const char *key, int32_t *ret)
{
    uint32_t id;
    *ret = -1;
    if (!gguf_has(r->gguf, key))
        return 0;
    int rc = gguf_get_u32(r->gguf, key, 0, (uint32_t)r->source.vocabulary.count - 1, &id, r->err);
    if (rc == 0)
        *ret = (int32_t)id;
    return rc;
}

static int read_ids(struct gguf_reading *r)
{
    int rc = 0;
    if (r->source.vocabulary.count == 0)
        return error_set(r->err, ERR_INTEGRITY, "%s: key tokenizer.ggml.tokens has no tokens", gguf_name(r->gguf));
    rc = read_id(r, "tokenizer.ggml.bos_token_id", &r->source.bos);
    if (rc == 0)
        rc = read_id(r, "tokenizer.ggml.eos_token_id", &r->source.eos);
    if (rc == 0)
        rc = read_id(r, "tokenizer.ggml.padding_token_id", &r->source.pad);
    if (rc == 0)
        rc = read_id(r, "tokenizer.ggml.eot_token_id", &r->source.eot);
    if (rc == 0 && gguf_has(r->gguf, "tokenizer.chat_template"))
        rc = gguf_get_string(r->gguf, "tokenizer.chat_template", &r->source.chat_template, r->err);
    return rc;
}

static int read_all(struct gguf_reading *r)
{
    struct span model;
    int rc = need_string(r, "tokenizer.ggml.model", &model);
    if (rc < 0)
        return rc;
    if (span_equal(model, span_str("gpt2")))
        rc = read_bytes(r);
    else if (span_equal(model, span_str("llama")))
        rc = read_characters(r);
    else
        rc = refuse_kind(r, "tokenizer.ggml.model", model, "\"gpt2\" or \"llama\"");
    return rc < 0 ? rc : read_ids(r);
}

int tokenizer_new(const struct gguf *gguf, struct tokenizer **ret_tokenizer, struct error *err)
{
    struct gguf_reading r = {.gguf = gguf, .err = err};
    r.source.file = gguf_name(gguf);
    r.source.tokens_field = "key tokenizer.ggml.tokens";
    r.source.kinds_field = "key tokenizer.ggml.token_type";
    r.source.merges_field = "key tokenizer.ggml.merges";
    int rc = read_all(&r);
    if (rc == 0)
        rc = tokenizer_build(&r.source, ret_tokenizer, err);
    free(r.texts);
    free(r.kinds);
    free(r.merges);
    free(r.scores);
    return rc;
}
