/* Chat template and data set. */
#include "tests/formats/fixtures.h"

#include "model/formats/dataset.h"

static json_t *golden;
static struct tokenizer *tokenizer;

/* The text that the ids stand for, control tokens included. */
static void render(const int32_t *ids, size_t count, struct buffer *out)
{
    for (size_t i = 0; i < count; i++) {
        const struct span piece = tokenizer_piece(tokenizer, ids[i]);
        buffer_append(out, piece.ptr, piece.len);
    }
}

static void expect_text(const int32_t *ids, size_t count, const char *expected)
{
    struct buffer text;
    buffer_init(&text, 1 << 16);
    render(ids, count, &text);
    if (!span_equal(buffer_span(&text), span_str(expected)))
        fail_msg("\"%.*s\" is not \"%s\"", (int)text.len, (char *)text.data, expected);
    buffer_release(&text);
}

static void test_chat_is_chatml(void **state)
{
    const struct chat_message messages[] = {{CHAT_USER, span_str("Hi <|im_end|> 12")},
                                            {CHAT_ASSISTANT, span_str("Yes.")},
                                            {CHAT_USER, span_str("\n\nAnd?")}};
    struct chat_options options = {.system = CHAT_SYSTEM_DEFAULT, .generation_prompt = true};
    struct token_list list = {.max = 4096}, whole = {.max = 4096};
    struct error err = {0};
    const char *tail = "<|im_start|>user\nHi <|im_end|> 12<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
                       "<|im_start|>user\n\n\nAnd?<|im_end|>\n<|im_start|>assistant\n";
    char text[1024];
    int controls = 0;
    (void)state;
    assert_int_equal(chat_encode(tokenizer, &options, messages, 3, &list, &err), 0);
    snprintf(text, sizeof text,
             "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
             "Face<|im_end|>\n%s",
             tail);
    expect_text(list.ids, list.count, text);
    for (size_t i = 0; i < list.count; i++)
        controls += tokenizer_is_control(tokenizer, list.ids[i]);
    assert_int_equal(controls, 9); /* the one in the user's text is not among them */

    options.system = CHAT_SYSTEM_NONE;
    token_list_clear(&list);
    assert_int_equal(chat_encode(tokenizer, &options, messages, 3, &list, &err), 0);
    expect_text(list.ids, list.count, tail);
    options = (struct chat_options){.system = CHAT_SYSTEM_TEXT, .system_text = span_str("Be brief.")};
    token_list_clear(&list);
    assert_int_equal(
        chat_encode(tokenizer, &options, &(struct chat_message){CHAT_USER, span_str("Hello 12")}, 1, &list, &err), 0);
    /* The ids, too, equal those of the text with its control tokens recognised. */
    assert_int_equal(tokenizer_encode(tokenizer,
                                      span_str("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
                                               "Hello 12<|im_end|>\n"),
                                      TOKENIZER_CONTROL, &whole, &err),
                     0);
    assert_int_equal(list.count, whole.count);
    assert_memory_equal(list.ids, whole.ids, whole.count * sizeof *whole.ids);
    token_list_release(&list);
    token_list_release(&whole);
}

static void test_learn_marks_answers(void **state)
{
    const struct chat_message messages[] = {{CHAT_USER, span_str("a")},
                                            {CHAT_ASSISTANT, span_str("Yes.")},
                                            {CHAT_USER, span_str("b")},
                                            {CHAT_ASSISTANT, span_str("No.")}};
    const struct chat_options options = {.system = CHAT_SYSTEM_DEFAULT};
    struct token_list list = {.max = 4096}, learnt = {.max = 4096};
    struct error err = {0};
    (void)state;
    assert_int_equal(chat_encode(tokenizer, &options, messages, 4, &list, &err), 0);
    for (size_t i = 0; i < list.count; i++)
        if (list.learn[i])
            assert_int_equal(token_list_append(&learnt, list.ids[i], true, &err), 0);
    expect_text(learnt.ids, learnt.count, "Yes.<|im_end|>No.<|im_end|>");
    fixture_refused(chat_encode(tokenizer, &options, (struct chat_message[]){messages[0], {CHAT_SYSTEM, span_str("x")}},
                                2, &list, &err),
                    &err, ERR_CONFIG, "message 2", NULL);
    token_list_release(&list);
    token_list_release(&learnt);
}

#define RECORD(question, answer, more)                                                                                 \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"" question "\"},{\"role\":\"assistant\",\"content\":\"" answer    \
    "\"}]" more "}\n"

static struct dataset_options options_of(int32_t tokens_max)
{
    return (struct dataset_options){
        .tokenizer = tokenizer, .chat = {.system = CHAT_SYSTEM_NONE}, .tokens_max = tokens_max};
}

static void test_records(void **state)
{
    const char *text =
        "\xef\xbb\xbf" RECORD("one", "yes", ",\"patient\":\"p1\"") "\n  \r\n" RECORD("two", "no", ",\"patient\":7")
            RECORD("three", "yes", ",\"patient\":\"7\"");
    struct dataset_options options = options_of(64);
    struct dataset *d = NULL;
    struct batch_example e;
    struct error err = {0};
    (void)state;
    options.privacy_unit = "patient";
    if (dataset_parse(span_str(text), "d.jsonl", &options, &d, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(dataset_count(d), 3);
    assert_int_equal(dataset_report(d)->lines, 3);
    dataset_example(d, 1, &e);
    expect_text(e.ids, (size_t)e.length, "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nno<|im_end|>");
    const int32_t prompt = dataset_prompt_length(d, 1);
    expect_text(e.ids, (size_t)prompt, "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n");
    for (int32_t i = 0; i < e.length; i++)
        assert_int_equal(e.learn[i], i >= prompt);
    assert_int_equal(dataset_unit_count(d), 2); /* 7 and "7" are the same patient */
    assert_int_equal(dataset_unit(d, 0), 0);
    assert_int_equal(dataset_unit(d, 1), 1);
    assert_int_equal(dataset_unit(d, 2), 1);
    assert_int_equal(dataset_answer_count(d), 2);
    assert_int_equal(dataset_answer_of(d, 2), 0);
    assert_int_equal(dataset_answer_at(d, 0)->records, 2);
    assert_true(span_equal(dataset_answer_at(d, 1)->text, span_str("no")));
    assert_memory_equal(dataset_answer_at(d, 1)->ids, e.ids + prompt, 4 * (size_t)(e.length - prompt));
    dataset_free(d);
}

static void test_bad_lines_are_counted_and_kept_secret(void **state)
{
    const char *text = RECORD("good", "yes", "")                                                          /* 1 */
        "{\"messages\": [SECRET\n"                                                                        /* 2 */
        "[1, 2]\n"                                                                                        /* 3 */
        "{\"messages\":[{\"role\":\"SECRET\",\"content\":\"x\"}]}\n"                                      /* 4 */
        "{\"messages\":[{\"role\":\"user\"}]}\n"                                                          /* 5 */
        "{\"messages\":[]}\n"                                                                             /* 6 */
        "{\"text\":\"SECRET\"}\n"                                                                         /* 7 */
        "{\"messages\":[{\"role\":\"user\",\"content\":\"SECRET\"}]}\n"                                   /* 8 */
        RECORD("q", "", "")                                                                               /* 9 */
        RECORD("SECRET \xc3(", "yes", "")                                                                 /* 10 */
        RECORD("SECRET SECRET SECRET SECRET SECRET SECRET SECRET SECRET SECRET SECRET SECRET", "yes", "") /* 11 */
        "{\"a\":1,\"a\":2,\"messages\":[]}\n"                                                             /* 12 */
        "                                                                                                           "
        "                                                                                                           "
        "x\n" RECORD("last", "yes", "");
    struct dataset_options options = options_of(40);
    struct dataset *d = NULL;
    struct error err = {0};
    char faults[512];
    (void)state;
    options.line_bytes_max = 200;
    if (dataset_parse(span_str(text), "d.jsonl", &options, &d, &err) < 0)
        fail_msg("%s", err.message);
    const struct dataset_report *r = dataset_report(d);
    assert_int_equal(r->records, 2);
    assert_int_equal(r->faults[DATASET_BAD_JSON], 3);
    assert_int_equal(r->fault_lines[DATASET_BAD_JSON][2], 12);
    assert_int_equal(r->faults[DATASET_BAD_MESSAGES], 4);
    assert_int_equal(r->fault_lines[DATASET_BAD_MESSAGES][0], 4);
    assert_int_equal(r->faults[DATASET_NO_ANSWER], 2);
    assert_int_equal(r->fault_lines[DATASET_NO_ANSWER][1], 9);
    assert_int_equal(r->faults[DATASET_BAD_UTF8], 1);
    assert_int_equal(r->faults[DATASET_TOO_LONG], 1);
    assert_int_equal(r->fault_lines[DATASET_TOO_LONG][0], 11);
    assert_int_equal(r->faults[DATASET_LINE_TOO_LONG], 1);
    assert_int_equal(r->fault_lines[DATASET_LINE_TOO_LONG][0], 13);
    dataset_describe_faults(r, faults, sizeof faults);
    assert_non_null(strstr(faults, "12 lines skipped"));
    assert_non_null(strstr(faults, "not UTF-8 (line 10)"));
    assert_null(strstr(faults, "SECRET"));
    dataset_free(d);
}

static void test_useless_files_are_refused(void **state)
{
    const struct dataset_options options = options_of(64);
    struct dataset_options limited = options, with_unit = options;
    struct dataset *d = NULL;
    struct error err = {0};
    (void)state;
    fixture_refused(dataset_parse(span_str(""), "d.jsonl", &options, &d, &err), &err, ERR_INTEGRITY, "d.jsonl", "empty",
                    NULL);
    fixture_refused(dataset_parse(span_str("SECRET\nx"), "d.jsonl", &options, &d, &err), &err, ERR_INTEGRITY,
                    "none of 2 lines", "not a JSON object (line 1, 2)", NULL);
    assert_null(strstr(err.message, "SECRET"));
    with_unit.privacy_unit = "patient";
    fixture_refused(dataset_parse(span_str(RECORD("a", "b", "")), "d.jsonl", &with_unit, &d, &err), &err, ERR_INTEGRITY,
                    "no privacy unit", NULL);
    limited.records_max = 1;
    fixture_refused(dataset_parse(span_str(RECORD("a", "b", "") RECORD("a", "b", "")), "d.jsonl", &limited, &d, &err),
                    &err, ERR_RESOURCES, "more than 1 records", NULL);
    fixture_refused(dataset_load("/nonexistent/d.jsonl", &options, &d, &err), &err, ERR_NOT_FOUND, "d.jsonl", NULL);
}

static void test_many_answers_give_no_list(void **state)
{
    const struct dataset_options options = options_of(64);
    struct buffer text;
    struct dataset *d = NULL;
    struct error err = {0};
    (void)state;
    buffer_init(&text, 1 << 16);
    for (int i = 0; i <= DATASET_ANSWERS_MAX; i++)
        buffer_printf(&text,
                      "{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":\"%d"
                      "\"}]}\n",
                      i);
    assert_int_equal(dataset_parse(buffer_span(&text), "d.jsonl", &options, &d, &err), 0);
    assert_int_equal(dataset_count(d), DATASET_ANSWERS_MAX + 1);
    assert_int_equal(dataset_unit_count(d), DATASET_ANSWERS_MAX + 1);
    assert_int_equal(dataset_answer_count(d), 0);
    assert_int_equal(dataset_answer_of(d, 0), -1);
    dataset_free(d);
    buffer_release(&text);
}

static int set_up(void **state)
{
    (void)state;
    golden = fixture_golden();
    tokenizer = fixture_tokenizer(golden);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tokenizer_free(tokenizer);
    json_decref(golden);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chat_is_chatml),
        cmocka_unit_test(test_learn_marks_answers),
        cmocka_unit_test(test_records),
        cmocka_unit_test(test_bad_lines_are_counted_and_kept_secret),
        cmocka_unit_test(test_useless_files_are_refused),
        cmocka_unit_test(test_many_answers_give_no_list),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
