/* Every kind of tokenizer against the reference's ids (tests/golden/make_tokenizers.py), from either file. */
#include "tests/formats/fixtures.h"

#include "model/formats/tokenizer_nfc.h"

#include <time.h>

#define STRINGS_MIN 1500

static json_t *tokens, *golden;

static void test_cuts_equal_reference(void **state)
{
    static const struct {
        const char *name;
        enum pretokenizer pretokenizer;
    } cases[] = {{"smollm", PRETOKENIZE_SMOLLM},
                 {"qwen2", PRETOKENIZE_QWEN2},
                 {"llama-bpe", PRETOKENIZE_LLAMA3},
                 {"llama-bpe", PRETOKENIZE_GLM4}};
    uint32_t ends[1024];
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(cases); k++) {
        const json_t *digests = json_object_get(json_object_get(golden, "cuts"), cases[k].name);
        struct span text;
        size_t i;
        for (i = 0; (text = fixture_string(tokens, golden, i)).ptr; i++) {
            size_t count = 0;
            for (size_t at = 0; at < text.len && count < ARRAY_LEN(ends); count++)
                ends[count] = (uint32_t)(at = pretokenize(cases[k].pretokenizer, text, at));
            if (!fixture_digest_matches(digests, i, ends, count))
                fail_msg("%s cuts string %zu otherwise: \"%.*s\"", cases[k].name, i, (int)text.len, text.ptr);
        }
        assert_true(i >= STRINGS_MIN);
        assert_int_equal(json_string_length(digests), 8 * i);
    }
}

static void expect_ids(const struct token_list *list, const json_t *ids, const char *kind, size_t row)
{
    if (list->count != json_array_size(ids))
        fail_msg("%s: string %zu: %zu tokens, expected %zu", kind, row, list->count, json_array_size(ids));
    for (size_t j = 0; j < list->count; j++)
        if (list->ids[j] != json_integer_value(json_array_get(ids, j)))
            fail_msg("%s: string %zu: token %zu is %d", kind, row, j, list->ids[j]);
}

/* What the ids decode to: the text in NFC, or with spaces for U+2581, and a byte 0xff for nothing. */
static void expect_back(const struct tokenizer *t, const struct token_list *list, struct span text, bool gemma)
{
    struct buffer back, want;
    struct error err = {0};
    buffer_init(&back, 1 << 16);
    buffer_init(&want, 1 << 16);
    tokenizer_decode(t, list->ids, list->count, &back);
    if (tokenizer_pretokenizer(t) == PRETOKENIZE_QWEN2) {
        assert_int_equal(tokenizer_compose(text, &want, &err), 0);
    } else {
        for (size_t i = 0; i < text.len; i++) {
            const bool mark = gemma && text.len - i >= 3 && memcmp(text.ptr + i, "\xe2\x96\x81", 3) == 0;
            buffer_u8(&want, mark ? ' ' : text.ptr[i]);
            i += mark ? 2 : 0;
        }
    }
    if (!span_equal(buffer_span(&back), buffer_span(&want)))
        fail_msg("\"%.*s\" came back as \"%.*s\"", (int)text.len, text.ptr, (int)back.len, (char *)back.data);
    buffer_release(&back);
    buffer_release(&want);
}

static void compare(const struct tokenizer *t, const char *kind, const char *source)
{
    const json_t *of_kind = json_object_get(json_object_get(golden, "kinds"), kind);
    const json_t *ids = json_object_get(of_kind, "ids"), *rows = json_object_get(ids, "rows");
    const json_t *marked = json_object_get(of_kind, "marked");
    struct token_list list = {.max = 4096};
    struct error err = {0};
    struct span text;
    size_t i, row = 0;
    for (i = 0; (text = fixture_string(tokens, golden, i)).ptr; i++) {
        token_list_clear(&list);
        assert_int_equal(tokenizer_encode(t, text, 0, &list, &err), 0);
        const json_t *next = json_array_get(rows, row);
        if (json_integer_value(json_array_get(next, 0)) == (json_int_t)i && row < json_array_size(rows)) {
            expect_ids(&list, json_array_get(next, 1), kind, i);
            row++;
        }
        if (!fixture_digest_matches(json_object_get(ids, "digests"), i, (uint32_t *)list.ids, list.count))
            fail_msg("%s from %s: string %zu has other ids: \"%.*s\"", kind, source, i, (int)text.len, text.ptr);
        expect_back(t, &list, text, strcmp(kind, "gemma") == 0);
    }
    assert_true(i >= STRINGS_MIN && row == json_array_size(rows) && row >= 30);
    for (i = 0; i < json_array_size(marked); i++) {
        const json_t *with = json_array_get(json_array_get(marked, i), 0);
        token_list_clear(&list);
        text = span_of(json_string_value(with), json_string_length(with));
        assert_int_equal(tokenizer_encode(t, text, TOKENIZER_CONTROL, &list, &err), 0);
        expect_ids(&list, json_array_get(json_array_get(marked, i), 1), kind, i);
    }
    assert_true(i >= 3);
    token_list_release(&list);
}

static void test_ids_equal_reference(void **state)
{
    static const char *const kinds[] = {"qwen2", "llama-bpe", "glm4", "gemma"};
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(kinds); k++) {
        struct tokenizer *t = fixture_tokenizer_json(golden, kinds[k]);
        compare(t, kinds[k], "tokenizer.json");
        tokenizer_free(t);
        t = fixture_tokenizer_gguf(golden, kinds[k]);
        compare(t, kinds[k], "GGUF");
        tokenizer_free(t);
    }
}

static void test_ends(void **state)
{
    static const struct {
        const char *kind, *eot, *more, *no;
    } cases[] = {{"qwen2", "<|im_end|>", "<|endoftext|>", "<|im_start|>"},
                 {"llama-bpe", "<|eot_id|>", "<|end_of_text|>", "<|end_header_id|>"},
                 {"glm4", "<|user|>", "<|observation|>", "<|assistant|>"},
                 {"gemma", "<end_of_turn>", "<eos>", "<start_of_turn>"}};
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(cases); k++) {
        struct tokenizer *t = fixture_tokenizer_gguf(golden, cases[k].kind);
        const int32_t eot = tokenizer_control(t, cases[k].eot);
        assert_true(eot >= 0 && tokenizer_eot(t) == eot && tokenizer_is_end(t, eot));
        assert_true(tokenizer_is_end(t, tokenizer_control(t, cases[k].more)));
        assert_true(tokenizer_control(t, cases[k].no) >= 0);
        assert_false(tokenizer_is_end(t, tokenizer_control(t, cases[k].no)));
        assert_int_equal(tokenizer_control(t, "<think>"), -1); /* user-defined at most */
        tokenizer_free(t);
    }
}

/* The vocabulary has " hydraulic" as a token that no merges lead to. */
static void test_whole_words_go_before_merges(void **state)
{
    struct tokenizer *t = fixture_tokenizer_gguf(golden, "llama-bpe");
    struct token_list list = {.max = 64};
    struct error err = {0};
    (void)state;
    assert_int_equal(tokenizer_encode(t, span_str(" hydraulic"), 0, &list, &err), 0);
    assert_int_equal(list.count, 1);
    token_list_clear(&list);
    assert_int_equal(tokenizer_encode(t, span_str(" hydraulics"), 0, &list, &err), 0);
    assert_true(list.count > 2);
    token_list_release(&list);
    tokenizer_free(t);
}

/* Any bytes: what is not UTF-8 has its own byte tokens, and breaks what would combine. */
static void test_any_bytes_round_trip(void **state)
{
    static const char *const kinds[] = {"qwen2", "llama-bpe", "glm4", "gemma"};
    const char *text = "\xff\xfe e\xcc\x81\xcc \xe2\x96 \x80 \xf0\x9f\x91 e\xc3";
    const char *composed = "\xff\xfe \xc3\xa9\xcc \xe2\x96 \x80 \xf0\x9f\x91 e\xc3";
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(kinds); k++) {
        struct tokenizer *t = fixture_tokenizer_json(golden, kinds[k]);
        struct token_list list = {.max = 4096};
        struct buffer back;
        struct error err = {0};
        buffer_init(&back, 4096);
        assert_int_equal(tokenizer_encode(t, span_str(text), 0, &list, &err), 0);
        tokenizer_decode(t, list.ids, list.count, &back);
        assert_true(span_equal(buffer_span(&back), span_str(k == 0 ? composed : text)));
        token_list_release(&list);
        buffer_release(&back);
        tokenizer_free(t);
    }
}

/* A million bytes of one pattern; a quadratic way would take hours. */
static void encode_hostile(const struct tokenizer *t, const char *pattern)
{
    const size_t size = 1 << 20, step = strlen(pattern);
    char *text = malloc(size);
    struct token_list list = {.max = size};
    struct error err = {0};
    const clock_t start = clock();
    for (size_t i = 0; i < size; i++)
        text[i] = pattern[i % step];
    assert_int_equal(tokenizer_encode(t, span_of(text, size), TOKENIZER_CONTROL, &list, &err), 0);
    assert_true((double)(clock() - start) / CLOCKS_PER_SEC < 20);
    token_list_release(&list);
    free(text);
}

static void test_hostile_texts_are_not_quadratic(void **state)
{
    static const char *const patterns[] = {
        "a", " ", "\n", "'", "<", "\xcc\x81\xcc\xa3", "\xe2\x96\x81", "\xf0\x9f\x91\x8d", "<unus"};
    static const char *const kinds[] = {"qwen2", "llama-bpe", "gemma"};
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(kinds); k++) {
        struct tokenizer *t = fixture_tokenizer_json(golden, kinds[k]);
        for (size_t i = 0; i < ARRAY_LEN(patterns); i++)
            encode_hostile(t, patterns[i]);
        tokenizer_free(t);
    }
}

static int set_up(void **state)
{
    (void)state;
    tokens = fixture_golden();
    golden = fixture_tokenizers();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    json_decref(tokens);
    json_decref(golden);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cuts_equal_reference),
        cmocka_unit_test(test_ids_equal_reference),
        cmocka_unit_test(test_ends),
        cmocka_unit_test(test_whole_words_go_before_merges),
        cmocka_unit_test(test_any_bytes_round_trip),
        cmocka_unit_test(test_hostile_texts_are_not_quadratic),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
