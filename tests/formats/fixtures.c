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

const char *fixture_model_path(char *out, size_t size)
{
    const char *given = getenv("CONSILIUM_MODEL"), *cache = getenv("CONSILIUM_CACHE"), *xdg = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME"), *file = "SmolLM2-135M-Instruct.Q4_1.gguf";
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
    fprintf(stderr, "skipped: the model %s is not there; scripts/fetch-model.sh fetches it, CONSILIUM_MODEL names it\n",
            out);
    return NULL;
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
