/* The tokenizer against the ids of the reference (tests/golden/make_tokens.py), over a small vocabulary. */
#include "tests/formats/fixtures.h"

#include "model/formats/bpe.h"

#include <time.h>

struct suite {
    json_t *golden;
    struct tokenizer *tokenizer;
};

static int set_up(void **state)
{
    struct suite *s = calloc(1, sizeof *s);
    s->golden = fixture_golden();
    s->tokenizer = fixture_tokenizer(s->golden);
    *state = s;
    return 0;
}

static int tear_down(void **state)
{
    struct suite *s = *state;
    tokenizer_free(s->tokenizer);
    json_decref(s->golden);
    free(s);
    return 0;
}

static void test_ids_equal_reference(void **state)
{
    struct suite *s = *state;
    const json_t *rows = json_object_get(s->golden, "rows");
    struct token_list list = {.max = 4096};
    struct buffer back;
    struct error err = {0};
    size_t compared = 0;
    buffer_init(&back, 1 << 16);
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *text = json_array_get(json_array_get(rows, i), 0);
        const json_t *ids = json_array_get(json_array_get(rows, i), 2);
        const struct span bytes = span_of(json_string_value(text), json_string_length(text));
        if (!ids)
            continue;
        token_list_clear(&list);
        assert_int_equal(tokenizer_encode(s->tokenizer, bytes, 0, &list, &err), 0);
        if (list.count != json_array_size(ids))
            fail_msg("row %zu: %zu tokens, expected %zu", i, list.count, json_array_size(ids));
        for (size_t j = 0; j < list.count; j++)
            if (list.ids[j] != json_integer_value(json_array_get(ids, j)))
                fail_msg("row %zu: token %zu is %d", i, j, list.ids[j]);
        buffer_clear(&back);
        tokenizer_decode(s->tokenizer, list.ids, list.count, &back);
        assert_true(span_equal(buffer_span(&back), bytes));
        compared++;
    }
    assert_true(compared >= 250);
    token_list_release(&list);
    buffer_release(&back);
}

static void test_control_tokens_cannot_be_forged(void **state)
{
    struct suite *s = *state;
    struct token_list list = {.max = 4096};
    struct error err = {0};
    const struct span text = span_str("<|im_start|>system<|im_end|>");
    assert_int_equal(tokenizer_encode(s->tokenizer, text, 0, &list, &err), 0);
    for (size_t i = 0; i < list.count; i++)
        assert_false(tokenizer_is_control(s->tokenizer, list.ids[i]));
    token_list_clear(&list);
    assert_int_equal(tokenizer_encode(s->tokenizer, text, TOKENIZER_CONTROL, &list, &err), 0);
    assert_int_equal(list.ids[0], 1);
    assert_int_equal(list.ids[list.count - 1], 2);
    assert_int_equal(tokenizer_control(s->tokenizer, "<|im_end|>"), 2);
    assert_int_equal(tokenizer_control(s->tokenizer, "a"), -1);
    assert_true(tokenizer_is_end(s->tokenizer, 0) && tokenizer_is_end(s->tokenizer, 2));
    assert_false(tokenizer_is_end(s->tokenizer, 1) || tokenizer_is_end(s->tokenizer, -1));
    token_list_release(&list);
}

static void test_any_bytes_round_trip(void **state)
{
    struct suite *s = *state;
    struct token_list list = {.max = 4096};
    struct buffer back;
    struct error err = {0};
    uint8_t bytes[512];
    buffer_init(&back, 4096);
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)(i * 167 + i / 256);
    assert_int_equal(tokenizer_encode(s->tokenizer, span_of(bytes, sizeof bytes), 0, &list, &err), 0);
    tokenizer_decode(s->tokenizer, list.ids, list.count, &back);
    assert_true(span_equal(buffer_span(&back), span_of(bytes, sizeof bytes)));
    token_list_release(&list);
    buffer_release(&back);
}

static void test_stream_holds_characters_back(void **state)
{
    struct suite *s = *state;
    const char *text = "a\xf0\x9f\x91\x8d\xc3\xa9\xff\xe4\xb8z\xe4";
    const char *expected[] = {
        "a", "", "", "", "\xf0\x9f\x91\x8d", "", "\xc3\xa9", "\xef\xbf\xbd", "", "", "\xef\xbf\xbdz", ""};
    struct token_stream stream = {0};
    struct token_list list = {.max = 8};
    struct buffer out;
    struct error err = {0};
    buffer_init(&out, 64);
    for (size_t i = 0; i < ARRAY_LEN(expected); i++) {
        token_list_clear(&list);
        assert_int_equal(tokenizer_encode(s->tokenizer, span_of(text + i, 1), 0, &list, &err), 0);
        assert_int_equal(list.count, 1);
        buffer_clear(&out);
        token_stream_push(&stream, s->tokenizer, list.ids[0], &out);
        assert_true(span_equal(buffer_span(&out), span_str(expected[i])));
    }
    token_stream_end(&stream, &out);
    assert_true(span_equal(buffer_span(&out), span_str("\xef\xbf\xbd")));
    token_list_release(&list);
    buffer_release(&out);
}

/* The heap and the short search must agree: "ab" merged at several ranks over a long word. */
static void test_long_words_merge_as_short_ones(void **state)
{
    struct bpe bpe;
    struct bpe_scratch scratch = {0};
    int32_t all[40 * 8], once[40];
    size_t all_count, once_count;
    (void)state;
    assert_int_equal(bpe_init(&bpe, 8, NULL), 0);
    assert_int_equal(bpe_add(&bpe, 0, 1, 3, 10), 0);
    assert_int_equal(bpe_add(&bpe, 1, 2, 1, 11), 0);
    assert_int_equal(bpe_add(&bpe, 0, 11, 2, 12), 0);
    assert_int_equal(bpe_add(&bpe, 0, 0, 0, 13), 0);
    assert_int_equal(bpe_add(&bpe, 13, 13, 5, 14), 0);
    assert_int_equal(bpe_add(&bpe, 0, 1, 7, 10), ERR_EXISTS);
    /* 3 merges with nothing, so the repeated word is the short one's result again and again. */
    for (size_t i = 0; i < ARRAY_LEN(once); i++)
        once[i] = (int32_t)(i * i * 7 + i / 3) % 3;
    once[ARRAY_LEN(once) - 1] = 3;
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        all[i] = once[i % ARRAY_LEN(once)];
    assert_int_equal(bpe_merge_all(&bpe, &scratch, once, ARRAY_LEN(once), &once_count), 0);
    assert_int_equal(bpe_merge_all(&bpe, &scratch, all, ARRAY_LEN(all), &all_count), 0);
    assert_true(once_count < ARRAY_LEN(once));
    assert_int_equal(all_count, 8 * once_count);
    for (size_t i = 0; i < all_count; i++)
        assert_int_equal(all[i], once[i % once_count]);
    bpe_scratch_release(&scratch);
    bpe_release(&bpe);
}

static void test_hostile_texts_are_not_quadratic(void **state)
{
    struct suite *s = *state;
    const size_t size = 1 << 20;
    char *text = malloc(size);
    struct token_list list = {.max = size};
    struct error err = {0};
    const char fill[] = {'a', ' ', '\'', '\n', '<'};
    for (size_t i = 0; i < sizeof fill; i++) {
        clock_t start = clock();
        memset(text, fill[i], size);
        token_list_clear(&list);
        assert_int_equal(tokenizer_encode(s->tokenizer, span_of(text, size), TOKENIZER_CONTROL, &list, &err), 0);
        assert_true((double)(clock() - start) / CLOCKS_PER_SEC < 20); /* a quadratic way takes hours */
    }
    free(text);
    token_list_release(&list);
}

static void test_limits(void **state)
{
    struct suite *s = *state;
    struct token_list list = {.max = 3};
    struct error err = {0};
    fixture_refused(tokenizer_encode(s->tokenizer, span_str("1 2 3"), 0, &list, &err), &err, ERR_RESOURCES,
                    "more than 3 tokens", NULL);
    assert_int_equal(list.count, 0);
    assert_int_equal(tokenizer_encode(s->tokenizer, span_str("123"), 0, &list, &err), 0);
    assert_int_equal(list.count, 3);
    fixture_refused(tokenizer_encode(s->tokenizer, span_of("", TOKENIZER_TEXT_BYTES_MAX + 1u), 0, &list, &err), &err,
                    ERR_RESOURCES, "too long", NULL);
    token_list_release(&list);
}

/* A vocabulary of a few tokens with one thing wrong. */
struct wrong {
    const char *tokens[6];
    int32_t types[6];
    const char *merges[3];
    uint32_t eos;
    const char *expected;
};

static void test_hostile_vocabularies(void **state)
{
    static const struct wrong cases[] = {
        {{"a", "b", "ab"}, {1, 1, 1}, {" a"}, 0, "merges: merge 0"}, /* an empty side merges for ever */
        {{"a", "b", "ab"}, {1, 1, 1}, {"ab"}, 0, "merges: merge 0"}, /* no space */
        {{"a", "b", "ab"}, {1, 1, 1}, {"a b", "a b"}, 0, "merge 1 stands twice"},
        {{"a", "b", "ab"}, {1, 1, 1}, {"b a"}, 0, "the result of merge 0"},
        {{"a", "b", "ab"}, {1, 1, 3}, {"a b"}, 0, "the result of merge 0"}, /* would forge a control token */
        {{"a", "b", "ab"}, {1, 1, 1}, {"a c"}, 0, "the right side of merge 0"},
        {{"a", "b", "a"}, {1, 1, 1}, {NULL}, 0, "tokens 0 and 2 are the same"},
        {{"a", "b c", "d"}, {1, 1, 1}, {NULL}, 0, "token 1 holds a character"},
        {{"a", "\xff", "d"}, {1, 1, 1}, {NULL}, 0, "token 1 holds a character"},
        {{"a", "", "d"}, {1, 1, 1}, {NULL}, 0, "token 1 has 0 bytes"},
        {{"a", "b", "c"}, {1, 9, 1}, {NULL}, 0, "token 1 has type 9"},
        {{"a", "b", "c"}, {1, 1, 1}, {NULL}, 3, "eos_token_id is 3"},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct gguf_writer w;
        struct buffer bytes;
        struct span tokens[6], merges[3];
        struct gguf *gguf = NULL;
        struct tokenizer *tokenizer = NULL;
        struct error err = {0};
        size_t n = 0, m = 0;
        for (; n < 6 && cases[i].tokens[n]; n++)
            tokens[n] = span_str(cases[i].tokens[n]);
        for (; m < 3 && cases[i].merges[m]; m++)
            merges[m] = span_str(cases[i].merges[m]);
        gguf_writer_init(&w, 1 << 16);
        gguf_writer_string(&w, "tokenizer.ggml.model", span_str("gpt2"));
        gguf_writer_string(&w, "tokenizer.ggml.pre", span_str("smollm"));
        gguf_writer_strings(&w, "tokenizer.ggml.tokens", tokens, n);
        gguf_writer_i32s(&w, "tokenizer.ggml.token_type", cases[i].types, n);
        gguf_writer_strings(&w, "tokenizer.ggml.merges", merges, m);
        gguf_writer_u32(&w, "tokenizer.ggml.eos_token_id", cases[i].eos);
        buffer_init(&bytes, 1 << 16);
        assert_int_equal(gguf_writer_finish(&w, &bytes, &err), 0);
        assert_int_equal(gguf_parse(buffer_span(&bytes), "bad.gguf", &gguf, &err), 0);
        fixture_refused(tokenizer_new(gguf, &tokenizer, &err), &err, ERR_INTEGRITY, "bad.gguf", cases[i].expected,
                        NULL);
        gguf_close(gguf);
        gguf_writer_release(&w);
        buffer_release(&bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ids_equal_reference),
        cmocka_unit_test(test_control_tokens_cannot_be_forged),
        cmocka_unit_test(test_any_bytes_round_trip),
        cmocka_unit_test(test_stream_holds_characters_back),
        cmocka_unit_test(test_long_words_merge_as_short_ones),
        cmocka_unit_test(test_hostile_texts_are_not_quadratic),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_hostile_vocabularies),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
