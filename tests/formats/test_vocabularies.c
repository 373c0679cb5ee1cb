/* Real vocabularies: ids against the reference (tests/golden/make_tokenizers.py). Gemma 3's from the model file; Qwen's
 * and Llama 3's from the tokenizer.json files that the maker writes (CONSILIUM_VOCABULARIES names their folder). What
 * is not there is skipped. */
#include "tests/formats/fixtures.h"

#include "model/formats/chat.h"

#include "base/file.h"

static void compare(const struct tokenizer *t, const char *kind)
{
    json_error_t problem;
    json_t *tokens = fixture_golden(), *golden = fixture_tokenizers();
    json_t *real = json_load_file("tests/golden/vocabularies.json", 0, &problem);
    const json_t *ids = json_object_get(real, kind), *rows = json_object_get(ids, "rows");
    struct token_list list = {.max = 4096};
    struct error err = {0};
    struct span text;
    size_t i, row = 0;
    for (i = 0; (text = fixture_string(tokens, golden, i)).ptr; i++) {
        const json_t *next = json_array_get(rows, row);
        token_list_clear(&list);
        assert_int_equal(tokenizer_encode(t, text, 0, &list, &err), 0);
        if (json_integer_value(json_array_get(next, 0)) == (json_int_t)i && row++ < json_array_size(rows))
            for (size_t j = 0; j < list.count; j++)
                if (list.ids[j] != json_integer_value(json_array_get(json_array_get(next, 1), j)))
                    fail_msg("%s: string %zu: token %zu is %d", kind, i, j, list.ids[j]);
        if (!fixture_digest_matches(json_object_get(ids, "digests"), i, (uint32_t *)list.ids, list.count))
            fail_msg("%s: string %zu has other ids: \"%.*s\"", kind, i, (int)text.len, text.ptr);
    }
    assert_true(i >= 1500 && row == json_array_size(rows));
    token_list_release(&list);
    json_decref(tokens);
    json_decref(golden);
    json_decref(real);
}

static void test_gemma(void **state)
{
    char path[4096];
    struct gguf *gguf = NULL;
    struct tokenizer *t = NULL;
    struct error err = {0};
    (void)state;
    if (!fixture_gemma_path(path, sizeof path))
        skip();
    if (gguf_open(path, &gguf, &err) < 0 || tokenizer_new(gguf, &t, &err) < 0)
        fail_msg("%s", err.message);
    gguf_close(gguf);
    compare(t, "gemma");
    assert_int_equal(tokenizer_vocabulary(t), 262144);
    assert_string_equal(chat_template_name(t), "Gemma 3");
    assert_int_equal(tokenizer_bos(t), 2);
    assert_int_equal(tokenizer_eot(t), 106);
    assert_true(tokenizer_is_end(t, 1) && tokenizer_is_end(t, 106));
    tokenizer_free(t);
}

static void json_vocabulary(const char *kind, const char *template)
{
    char path[4096];
    const char *folder = getenv("CONSILIUM_VOCABULARIES");
    struct buffer text;
    struct tokenizer *t = NULL;
    struct error err = {0};
    snprintf(path, sizeof path, "%s/%s.json", folder ? folder : "", kind);
    if (!folder || !file_exists(path)) {
        fprintf(stderr, "skipped: no %s.json; CONSILIUM_VOCABULARIES names the folder that make_tokenizers.py wrote\n",
                kind);
        skip();
    }
    buffer_init(&text, TOKENIZER_JSON_BYTES_MAX);
    if (file_read(path, &text, &err) < 0 ||
        tokenizer_from_json(&(struct tokenizer_files){.tokenizer = buffer_span(&text)}, kind, &t, &err) < 0)
        fail_msg("%s", err.message);
    buffer_release(&text);
    compare(t, kind);
    assert_string_equal(chat_template_name(t), template);
    tokenizer_free(t);
}

static void test_qwen(void **state)
{
    (void)state;
    json_vocabulary("qwen2", "Qwen2");
}

static void test_llama3(void **state)
{
    (void)state;
    json_vocabulary("llama-bpe", "Llama 3");
}

int main(void)
{
    char path[4096];
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_gemma), cmocka_unit_test(test_qwen),
                                       cmocka_unit_test(test_llama3)};
    if (!fixture_gemma_path(path, sizeof path) && !getenv("CONSILIUM_VOCABULARIES"))
        return 77;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
