#include "tests/formats/fixtures.h"

#include "base/file.h"

json_t *fixture_golden(void)
{
    json_error_t problem;
    json_t *golden = json_load_file("tests/golden/tokens.json", JSON_ALLOW_NUL, &problem);
    if (!golden)
        fail_msg("tests/golden/tokens.json: %s", problem.text);
    return golden;
}

static struct span *strings_of(const json_t *list, size_t *ret_count)
{
    const size_t count = json_array_size(list);
    struct span *texts = calloc(count + 1, sizeof *texts);
    for (size_t i = 0; i < count; i++)
        texts[i] = span_str(json_string_value(json_array_get(list, i)));
    *ret_count = count;
    return texts;
}

void fixture_vocabulary(struct gguf_writer *w, const json_t *golden)
{
    const json_t *small = json_object_get(golden, "small");
    const size_t control = (size_t)json_integer_value(json_object_get(small, "control"));
    size_t token_count, merge_count;
    struct span *tokens = strings_of(json_object_get(small, "tokens"), &token_count);
    struct span *merges = strings_of(json_object_get(small, "merges"), &merge_count);
    int32_t *types = calloc(token_count, sizeof *types);
    for (size_t i = 0; i < token_count; i++)
        types[i] = i < control ? 3 : 1;
    gguf_writer_string(w, "tokenizer.ggml.model", span_str("gpt2"));
    gguf_writer_string(w, "tokenizer.ggml.pre", span_str("smollm"));
    gguf_writer_strings(w, "tokenizer.ggml.tokens", tokens, token_count);
    gguf_writer_i32s(w, "tokenizer.ggml.token_type", types, token_count);
    gguf_writer_strings(w, "tokenizer.ggml.merges", merges, merge_count);
    gguf_writer_u32(w, "tokenizer.ggml.bos_token_id", 1);
    gguf_writer_u32(w, "tokenizer.ggml.eos_token_id", 2);
    free(tokens);
    free(merges);
    free(types);
}

char *fixture_vocabulary_json(const json_t *golden)
{
    json_t *small = json_object_get(golden, "small"), *tokens = json_object_get(small, "tokens");
    json_t *vocabulary = json_object(), *added = json_array();
    const size_t control = (size_t)json_integer_value(json_object_get(small, "control"));
    json_t *token;
    size_t i;
    json_array_foreach(tokens, i, token)
    {
        json_object_set_new(vocabulary, json_string_value(token), json_integer((json_int_t)i));
        if (i < control)
            json_array_append_new(added,
                                  json_pack("{s:I, s:O, s:b}", "id", (json_int_t)i, "content", token, "special", 1));
    }
    json_t *root =
        json_pack("{s:o, s:n, s:{s:s, s:[{s:s, s:b}, {s:s, s:b, s:b, s:b}]}, s:{s:s, s:o, s:O}}", "added_tokens", added,
                  "normalizer", "pre_tokenizer", "type", "Sequence", "pretokenizers", "type", "Digits",
                  "individual_digits", 1, "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 1,
                  "model", "type", "BPE", "vocab", vocabulary, "merges", json_object_get(small, "merges"));
    char *text = json_dumps(root, 0);
    assert_non_null(text);
    json_decref(root);
    return text;
}

struct tokenizer *fixture_tokenizer(const json_t *golden)
{
    struct gguf_writer w;
    struct buffer bytes;
    struct gguf *gguf = NULL;
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    gguf_writer_init(&w, 1 << 20);
    fixture_vocabulary(&w, golden);
    buffer_init(&bytes, 2 << 20);
    assert_int_equal(gguf_writer_finish(&w, &bytes, &err), 0);
    if (gguf_parse(buffer_span(&bytes), "small.gguf", &gguf, &err) < 0 || tokenizer_new(gguf, &tokenizer, &err) < 0)
        fail_msg("%s", err.message);
    gguf_close(gguf);
    gguf_writer_release(&w);
    buffer_release(&bytes);
    return tokenizer;
}

json_t *fixture_tokenizers(void)
{
    json_error_t problem;
    json_t *golden = json_load_file("tests/golden/tokenizers.json", JSON_ALLOW_NUL, &problem);
    if (!golden)
        fail_msg("tests/golden/tokenizers.json: %s", problem.text);
    return golden;
}

struct span fixture_string(const json_t *tokens, const json_t *tokenizers, size_t i)
{
    const json_t *rows = json_object_get(tokens, "rows"), *extra = json_object_get(tokenizers, "extra");
    const size_t count = json_array_size(rows);
    const json_t *text = i < count ? json_array_get(json_array_get(rows, i), 0) : json_array_get(extra, i - count);
    return text ? span_of(json_string_value(text), json_string_length(text)) : (struct span){0};
}

bool fixture_digest_matches(const json_t *digests, size_t i, const uint32_t *numbers, size_t count)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    char hex[9];
    for (size_t n = 0; n < count; n++)
        for (int byte = 0; byte < 4; byte++)
            h = (h ^ (numbers[n] >> 8 * byte & 0xff)) * UINT64_C(0x100000001b3);
    snprintf(hex, sizeof hex, "%08x", (unsigned)(uint32_t)(h ^ h >> 32));
    return json_string_length(digests) >= 8 * (i + 1) && memcmp(json_string_value(digests) + 8 * i, hex, 8) == 0;
}

static const json_t *kind_of(const json_t *tokenizers, const char *kind)
{
    return json_object_get(json_object_get(tokenizers, "kinds"), kind);
}

struct tokenizer *fixture_tokenizer_json(const json_t *tokenizers, const char *kind)
{
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    char *text = json_dumps(json_object_get(kind_of(tokenizers, kind), "tokenizer"), JSON_COMPACT);
    if (tokenizer_from_json(&(struct tokenizer_files){.tokenizer = span_str(text)}, kind, &tokenizer, &err) < 0)
        fail_msg("%s: %s", kind, err.message);
    free(text);
    return tokenizer;
}

/* Strings made for a GGUF file; freed with it. */
struct made {
    char *texts[2048];
    struct span spans[2048];
    int32_t types[2048];
    float scores[2048];
    size_t count;
};

static void set_token(struct made *m, size_t id, const char *text, int32_t type, bool spaces)
{
    char *copy = calloc(strlen(text) + 1, 1);
    assert_true(id < ARRAY_LEN(m->texts));
    for (char *to = copy; *text; to++) {
        const bool mark = spaces && strncmp(text, "\xe2\x96\x81", 3) == 0;
        *to = mark ? ' ' : *text;
        text += mark ? 3 : 1;
    }
    free(m->texts[id]);
    m->texts[id] = copy;
    m->spans[id] = span_str(copy);
    m->types[id] = type;
    m->count = id >= m->count ? id + 1 : m->count;
}

static void put_merges(struct gguf_writer *w, const json_t *merges)
{
    const size_t count = json_array_size(merges);
    struct span *spans = calloc(count + 1, sizeof *spans);
    char(*texts)[1024] = calloc(count + 1, sizeof *texts);
    for (size_t i = 0; i < count; i++) {
        const json_t *pair = json_array_get(merges, i);
        snprintf(texts[i], sizeof *texts, "%s %s", json_string_value(json_array_get(pair, 0)),
                 json_string_value(json_array_get(pair, 1)));
        spans[i] = span_str(texts[i]);
    }
    gguf_writer_strings(w, "tokenizer.ggml.merges", spans, count);
    free(spans);
    free(texts);
}

void fixture_kind(struct gguf_writer *w, const json_t *tokenizers, const char *kind)
{
    const json_t *of_kind = kind_of(tokenizers, kind), *file = json_object_get(of_kind, "tokenizer");
    const json_t *scores = json_object_get(of_kind, "scores"), *model = json_object_get(file, "model");
    const bool gemma = strcmp(kind, "gemma") == 0;
    struct made *m = calloc(1, sizeof *m);
    const char *key;
    json_t *value;
    size_t i;
    json_object_foreach(json_object_get(model, "vocab"), key, value)
        set_token(m, (size_t)json_integer_value(value), key, gemma && strncmp(key, "<0x", 3) == 0 ? 6 : 1, false);
    json_array_foreach(json_object_get(file, "added_tokens"), i, value)
    {
        const bool special = json_is_true(json_object_get(value, "special"));
        set_token(m, (size_t)json_integer_value(json_object_get(value, "id")),
                  json_string_value(json_object_get(value, "content")), special ? 3 : 4, !special);
    }
    gguf_writer_string(w, "tokenizer.ggml.model", span_str(gemma ? "llama" : "gpt2"));
    gguf_writer_string(w, "tokenizer.ggml.pre", span_str(gemma ? "default" : kind));
    gguf_writer_strings(w, "tokenizer.ggml.tokens", m->spans, m->count);
    gguf_writer_i32s(w, "tokenizer.ggml.token_type", m->types, m->count);
    if (gemma) {
        for (i = 0; i < m->count; i++)
            m->scores[i] = (float)json_number_value(json_array_get(scores, i));
        gguf_writer_f32s(w, "tokenizer.ggml.scores", m->scores, m->count);
        gguf_writer_bool(w, "tokenizer.ggml.add_space_prefix", false);
    } else {
        put_merges(w, json_object_get(model, "merges"));
    }
    for (i = 0; i < m->count; i++)
        free(m->texts[i]);
    free(m);
}

struct tokenizer *fixture_tokenizer_gguf(const json_t *tokenizers, const char *kind)
{
    struct gguf_writer w;
    struct buffer bytes;
    struct gguf *gguf = NULL;
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    gguf_writer_init(&w, 1 << 20);
    fixture_kind(&w, tokenizers, kind);
    buffer_init(&bytes, 2 << 20);
    assert_int_equal(gguf_writer_finish(&w, &bytes, &err), 0);
    if (gguf_parse(buffer_span(&bytes), kind, &gguf, &err) < 0 || tokenizer_new(gguf, &tokenizer, &err) < 0)
        fail_msg("%s: %s", kind, err.message);
    gguf_close(gguf);
    gguf_writer_release(&w);
    buffer_release(&bytes);
    return tokenizer;
}

static const char *cached_file(const char *variable, const char *file, const char *how, char *out, size_t size)
{
    const char *given = getenv(variable), *cache = getenv("CONSILIUM_CACHE"), *xdg = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    if (given)
        snprintf(out, size, "%s", given);
    else if (cache)
        snprintf(out, size, "%s/%s", cache, file);
    else if (xdg)
        snprintf(out, size, "%s/consilium/%s", xdg, file);
    else
        snprintf(out, size, "%s/.cache/consilium/%s", home ? home : "", file);
    if (file_exists(out))
        return out;
    fprintf(stderr, "skipped: the model %s is not there; %s fetches it, %s names it\n", out, how, variable);
    return NULL;
}

const char *fixture_model_path(char *out, size_t size)
{
    return cached_file("CONSILIUM_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf", "scripts/fetch-model.sh", out, size);
}

const char *fixture_gemma_path(char *out, size_t size)
{
    return cached_file("CONSILIUM_GEMMA", "gemma-3-270m-q4_k_m.gguf", "scripts/fetch-model.sh --gemma", out, size);
}

void fixture_refused(int rc, const struct error *err, int code, ...)
{
    va_list texts;
    const char *text;
    if (rc != code)
        fail_msg("expected code %d, got %d: %s", code, rc, err->message);
    va_start(texts, code);
    while ((text = va_arg(texts, const char *)))
        if (!strstr(err->message, text))
            fail_msg("the message \"%s\" does not hold \"%s\"", err->message, text);
    va_end(texts);
}
