/* The vocabulary of the real Gemma 3 270M: ids against the reference (tests/golden/make_tokenizers.py). Skipped when
 * the model is not there. */
#include "tests/formats/fixtures.h"

#include "model/formats/chat.h"

static struct tokenizer *tokenizer;

static void test_ids_equal_reference(void **state)
{
    json_t *tokens = fixture_golden(), *golden = fixture_tokenizers();
    const json_t *ids = json_object_get(golden, "gemma-3-270m"), *rows = json_object_get(ids, "rows");
    struct token_list list = {.max = 4096};
    struct error err = {0};
    struct span text;
    size_t i, row = 0;
    (void)state;
    for (i = 0; (text = fixture_string(tokens, golden, i)).ptr; i++) {
        const json_t *next = json_array_get(rows, row);
        token_list_clear(&list);
        assert_int_equal(tokenizer_encode(tokenizer, text, 0, &list, &err), 0);
        if (json_integer_value(json_array_get(next, 0)) == (json_int_t)i && row++ < json_array_size(rows))
            for (size_t j = 0; j < list.count; j++)
                if (list.ids[j] != json_integer_value(json_array_get(json_array_get(next, 1), j)))
                    fail_msg("string %zu: token %zu is %d", i, j, list.ids[j]);
        if (!fixture_digest_matches(json_object_get(ids, "digests"), i, (uint32_t *)list.ids, list.count))
            fail_msg("string %zu has other ids: \"%.*s\"", i, (int)text.len, text.ptr);
    }
    assert_true(i >= 1500 && row == json_array_size(rows));
    token_list_release(&list);
    json_decref(tokens);
    json_decref(golden);
}

static void test_chat(void **state)
{
    (void)state;
    assert_int_equal(tokenizer_vocabulary(tokenizer), 262144);
    assert_string_equal(chat_template_name(tokenizer), "Gemma 3");
    assert_int_equal(tokenizer_bos(tokenizer), 2);
    assert_int_equal(tokenizer_eot(tokenizer), 106);
    assert_true(tokenizer_is_end(tokenizer, 1) && tokenizer_is_end(tokenizer, 106));
}

int main(void)
{
    char path[4096];
    struct error err = {0};
    struct gguf *gguf = NULL;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ids_equal_reference), cmocka_unit_test(test_chat)};
    if (!fixture_gemma_path(path, sizeof path))
        return 77;
    if (gguf_open(path, &gguf, &err) < 0 || tokenizer_new(gguf, &tokenizer, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    gguf_close(gguf);
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    tokenizer_free(tokenizer);
    return rc;
}
