/* The real SmolLM2: loading, and all ids of the golden file over its vocabulary. Skipped when the model is not there.
 */
#include "tests/formats/fixtures.h"

static struct gguf *gguf;
static struct tokenizer *tokenizer;

static void compare(const json_t *rows, unsigned flags, size_t at_least)
{
    struct token_list list = {.max = 65536};
    struct error err = {0};
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *text = json_array_get(json_array_get(rows, i), 0);
        const json_t *ids = json_array_get(json_array_get(rows, i), 1);
        token_list_clear(&list);
        if (tokenizer_encode(tokenizer, span_of(json_string_value(text), json_string_length(text)), flags, &list,
                             &err) < 0)
            fail_msg("%s", err.message);
        if (list.count != json_array_size(ids))
            fail_msg("row %zu: %zu tokens, expected %zu", i, list.count, json_array_size(ids));
        for (size_t j = 0; j < list.count; j++)
            if (list.ids[j] != json_integer_value(json_array_get(ids, j)))
                fail_msg("row %zu: token %zu is %d", i, j, list.ids[j]);
    }
    assert_true(json_array_size(rows) >= at_least);
    token_list_release(&list);
}

static void test_ids_equal_reference(void **state)
{
    json_t *golden = fixture_golden();
    (void)state;
    compare(json_object_get(golden, "rows"), 0, 1000);
    compare(json_object_get(golden, "marked"), TOKENIZER_CONTROL, 4);
    json_decref(golden);
}

static void test_model_loads(void **state)
{
    struct model *model = calloc(1, sizeof *model);
    struct error err = {0};
    (void)state;
    if (gguf_load_model(gguf, model, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(model->config.layer_count, 30);
    assert_int_equal(model->config.d_model, 576);
    assert_int_equal(model->config.head_count, 9);
    assert_int_equal(model->config.kv_head_count, 3);
    assert_int_equal(model->config.head_size, 64);
    assert_int_equal(model->config.d_ff, 1536);
    assert_int_equal(model->config.vocabulary, 49152);
    assert_true(model->config.rope_base == 1e5 && model->config.rope_order == ROPE_NORM);
    assert_int_equal(model->layers[29].down.in, 1536);
    assert_int_equal(model->layers[29].k.out, 192);
    assert_null(model->output.data);
    free(model);
}

int main(void)
{
    char path[4096];
    struct error err = {0};
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ids_equal_reference), cmocka_unit_test(test_model_loads)};
    if (!fixture_model_path(path, sizeof path))
        return 77;
    if (gguf_open(path, &gguf, &err) < 0 || tokenizer_new(gguf, &tokenizer, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    tokenizer_free(tokenizer);
    gguf_close(gguf);
    return rc;
}
