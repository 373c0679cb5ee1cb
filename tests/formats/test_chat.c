/* The chat templates against the texts that the models' own templates give (tests/golden/make_chat.py). */
#include "tests/formats/fixtures.h"

#include "model/formats/chat.h"
#include "model/formats/dataset.h"

static json_t *golden;

/* A vocabulary of all bytes, with the tokens of one kind of model. */
struct kind {
    const char *template, *pre;
    const char *control[8], *user[5];
    const char *jinja; /* NULL: the file brings none */
};
static const struct kind models[] = {
    {"SmolLM2", "smollm", {"<|im_start|>", "<|im_end|>"}, {NULL}, NULL},
    {"Qwen2", "qwen2", {"<|im_start|>", "<|im_end|>"}, {NULL}, NULL},
    {"Qwen2.5", "qwen2", {"<|im_start|>", "<|im_end|>"}, {"<tool_call>", "</tool_call>"}, NULL},
    {"Qwen3", "qwen2", {"<|im_start|>", "<|im_end|>"}, {"<tool_call>", "</tool_call>", "<think>", "</think>"}, NULL},
    {"Qwen3", "qwen2", {"<|im_start|>", "<|im_end|>"}, {"<think>", "</think>"}, "{% if enable_thinking %}"},
    {"ChatML", "qwen2", {"<|im_start|>", "<|im_end|>"}, {"<think>", "</think>"}, "{{ messages }}"},
    {"ChatML", "llama-bpe", {"<|im_start|>", "<|im_end|>", "<|eot_id|>"}, {NULL}, NULL},
    {"Llama 3",
     "llama-bpe",
     {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
     {NULL},
     NULL},
    {"Gemma 3", "gemma", {"<bos>", "<start_of_turn>", "<end_of_turn>"}, {"\n", "\n\n"}, NULL},
    {"GLM-4", "glm4", {"[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"}, {NULL}, NULL},
};

static struct tokenizer *tokenizer_of(const struct kind *m)
{
    static char bytes[256][8];
    const bool gemma = strcmp(m->pre, "gemma") == 0;
    struct span tokens[320];
    int32_t types[320];
    float scores[320] = {0};
    size_t n = 0;
    struct gguf_writer w;
    struct buffer out;
    struct gguf *gguf = NULL;
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    for (size_t i = 0; i < ARRAY_LEN(m->control) && m->control[i]; i++, n++)
        tokens[n] = span_str(m->control[i]), types[n] = 3;
    for (size_t i = 0; i < ARRAY_LEN(m->user) && m->user[i]; i++, n++)
        tokens[n] = span_str(m->user[i]), types[n] = 4;
    for (int b = 0, beyond = 0; b < 256; b++, n++) {
        const bool self = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b != 0xad);
        const int c = self ? b : 0x100 + beyond;
        beyond += !self;
        if (gemma)
            snprintf(bytes[b], sizeof bytes[b], "<0x%02X>", (unsigned)b);
        else if (c < 0x80)
            snprintf(bytes[b], sizeof bytes[b], "%c", c);
        else
            snprintf(bytes[b], sizeof bytes[b], "%c%c", 0xc0 | c >> 6, 0x80 | (c & 0x3f));
        tokens[n] = span_str(bytes[b]);
        types[n] = gemma ? 6 : 1;
    }
    gguf_writer_init(&w, 1 << 16);
    gguf_writer_string(&w, "tokenizer.ggml.model", span_str(gemma ? "llama" : "gpt2"));
    gguf_writer_string(&w, "tokenizer.ggml.pre", span_str(m->pre));
    gguf_writer_strings(&w, "tokenizer.ggml.tokens", tokens, n);
    gguf_writer_i32s(&w, "tokenizer.ggml.token_type", types, n);
    gguf_writer_strings(&w, "tokenizer.ggml.merges", NULL, 0);
    gguf_writer_f32s(&w, "tokenizer.ggml.scores", scores, n);
    gguf_writer_bool(&w, "tokenizer.ggml.add_space_prefix", false);
    if (m->jinja)
        gguf_writer_string(&w, "tokenizer.chat_template", span_str(m->jinja));
    buffer_init(&out, 1 << 16);
    assert_int_equal(gguf_writer_finish(&w, &out, &err), 0);
    if (gguf_parse(buffer_span(&out), m->template, &gguf, &err) < 0 || tokenizer_new(gguf, &tokenizer, &err) < 0)
        fail_msg("%s: %s", m->template, err.message);
    gguf_close(gguf);
    gguf_writer_release(&w);
    buffer_release(&out);
    return tokenizer;
}

static void expect(const struct tokenizer *t, const struct token_list *list, bool learnt, const char *text,
                   const char *what)
{
    struct buffer got;
    buffer_init(&got, 1 << 16);
    for (size_t i = 0; i < list->count; i++)
        if (!learnt || list->learn[i])
            buffer_append(&got, tokenizer_piece(t, list->ids[i]).ptr, tokenizer_piece(t, list->ids[i]).len);
    if (!span_equal(buffer_span(&got), span_str(text)))
        fail_msg("%s: \"%.*s\" is not \"%s\"", what, (int)got.len, (char *)got.data, text);
    buffer_release(&got);
}

static size_t read_conversation(const json_t *from, struct chat_message ret_messages[32])
{
    assert_true(json_array_size(from) <= 32);
    for (size_t i = 0; i < json_array_size(from); i++) {
        const json_t *m = json_array_get(from, i), *content = json_object_get(m, "content");
        assert_true(chat_role_parse(span_str(json_string_value(json_object_get(m, "role"))), &ret_messages[i].role));
        ret_messages[i].content = span_of(json_string_value(content), json_string_length(content));
    }
    return json_array_size(from);
}

/* The two documented differences: GLM's last answer is ended, and its question has the newline. */
static void expected_of(const struct kind *m, const char *reference, const char *asks, enum chat_role last, char *out,
                        size_t size)
{
    const bool glm = strcmp(m->template, "GLM-4") == 0;
    const char *more = !glm ? "" : asks ? "\n" : last == CHAT_ASSISTANT ? "<|user|>" : "";
    const int len = snprintf(out, size, "%s%s%s", reference, asks ? asks : "", more);
    assert_true(len > 0 && (size_t)len < size);
}

static void test_texts_equal_reference(void **state)
{
    const json_t *conversations = json_object_get(golden, "conversations");
    size_t compared = 0;
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(models); k++) {
        struct tokenizer *t = tokenizer_of(&models[k]);
        const json_t *of = json_object_get(json_object_get(golden, "templates"), models[k].template);
        const char *asks = json_string_value(json_object_get(of, "asks"));
        struct token_list list = {.max = 65536};
        struct error err = {0};
        assert_int_equal(chat_check(t, &err), 0);
        assert_string_equal(chat_template_name(t), models[k].template);
        assert_non_null(asks);
        for (size_t i = 0; i < 2 * json_array_size(conversations); i++) {
            struct chat_message messages[32];
            char text[8192];
            const size_t count = read_conversation(json_array_get(conversations, i / 2), messages);
            const struct chat_options options = {.system = CHAT_SYSTEM_DEFAULT, .generation_prompt = i % 2};
            const json_t *reference = json_array_get(json_object_get(of, "texts"), i / 2);
            token_list_clear(&list);
            const int rc = chat_encode(t, &options, messages, count, &list, &err);
            assert_non_null(reference);
            if (json_is_null(reference)) {
                fixture_refused(rc, &err, ERR_CONFIG, "out of turn", NULL);
                assert_int_equal(list.count, 0);
                continue;
            }
            assert_int_equal(rc, 0);
            expected_of(&models[k], json_string_value(reference), i % 2 ? asks : NULL, messages[count - 1].role, text,
                        sizeof text);
            expect(t, &list, false, text, models[k].template);
            compared++;
        }
        token_list_release(&list);
        tokenizer_free(t);
    }
    assert_true(compared >= 1200);
}

static void test_what_is_learnt(void **state)
{
    static const char *const learnt[] = {"Yes.<|im_end|> No.<|im_end|>",      "Yes.<|im_end|> No.<|im_end|>",
                                         "Yes.<|im_end|> No.<|im_end|>",      "Yes.<|im_end|> No.<|im_end|>",
                                         "Yes.<|im_end|> No.<|im_end|>",      "Yes.<|im_end|> No.<|im_end|>",
                                         "Yes.<|im_end|> No.<|im_end|>",      "Yes.<|eot_id|>No.<|eot_id|>",
                                         "Yes.<end_of_turn>No.<end_of_turn>", "Yes.<|user|> No.<|user|>"};
    const struct chat_message messages[] = {{CHAT_SYSTEM, span_str("s")},
                                            {CHAT_USER, span_str("a")},
                                            {CHAT_ASSISTANT, span_str("Yes.")},
                                            {CHAT_USER, span_str("<|user|>b<|im_end|><eos>")},
                                            {CHAT_ASSISTANT, span_str(" No.")}};
    const struct chat_options ask = {.system = CHAT_SYSTEM_NONE, .generation_prompt = true}, whole = {0};
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(models); k++) {
        struct tokenizer *t = tokenizer_of(&models[k]);
        struct token_list all = {.max = 4096}, parts = {.max = 4096};
        struct error err = {0};
        assert_int_equal(chat_encode(t, &whole, messages, 5, &all, &err), 0);
        expect(t, &all, true, learnt[k], models[k].template);
        /* What is asked and what answers it are the beginning of the whole. */
        assert_int_equal(chat_encode(t, &ask, messages, 4, &parts, &err), 0);
        const size_t asked = parts.count;
        for (size_t i = 0; i < asked; i++)
            assert_int_equal(parts.learn[i], all.learn[i]);
        assert_int_equal(chat_encode_answer(t, messages[4].content, &parts, &err), 0);
        assert_true(parts.count <= all.count);
        assert_memory_equal(parts.ids, all.ids, parts.count * sizeof *parts.ids);
        assert_true(tokenizer_is_end(t, parts.ids[parts.count - 1]));
        for (size_t i = asked; i < all.count; i++)
            assert_int_equal(all.learn[i], i < parts.count);
        token_list_release(&all);
        token_list_release(&parts);
        tokenizer_free(t);
    }
}

/* Thoughts that an answer brings along are learnt with it, and replace the empty block. */
static void test_thoughts_are_learnt(void **state)
{
    struct tokenizer *t = tokenizer_of(&models[3]);
    const char *content = "<think>\nWhy\n</think>\n\nSo.";
    const struct chat_message messages[] = {{CHAT_USER, span_str("q")}, {CHAT_ASSISTANT, span_str(content)}};
    const struct chat_options options = {0};
    struct token_list list = {.max = 4096};
    struct error err = {0};
    (void)state;
    assert_int_equal(chat_encode(t, &options, messages, 2, &list, &err), 0);
    expect(t, &list, true, "<think>\nWhy\n</think>\n\nSo.<|im_end|>", "Qwen3");
    token_list_clear(&list);
    assert_int_equal(chat_encode_answer(t, span_str(content), &list, &err), 0);
    expect(t, &list, false, "<think>\nWhy\n</think>\n\nSo.<|im_end|>", "Qwen3");
    token_list_release(&list);
    tokenizer_free(t);
}

static void test_refusals(void **state)
{
    const struct kind none = {"none", "qwen2", {"<|im_start|>", "<bos>", "<|user|>"}, {NULL}, NULL};
    struct tokenizer *t = tokenizer_of(&none);
    struct token_list list = {.max = 3};
    struct error err = {0};
    const struct chat_options options = {0};
    const struct chat_message late[] = {{CHAT_USER, span_str("a")}, {CHAT_SYSTEM, span_str("b")}};
    (void)state;
    assert_null(chat_template_name(t));
    fixture_refused(chat_check(t, &err), &err, ERR_CONFIG, "no known chat format", NULL);
    fixture_refused(chat_encode(t, &options, late, 1, &list, &err), &err, ERR_CONFIG, "no known chat format", NULL);
    fixture_refused(chat_encode_answer(t, span_str("x"), &list, &err), &err, ERR_CONFIG, "no known chat format", NULL);
    tokenizer_free(t);
    for (size_t k = 0; k < ARRAY_LEN(models); k++) {
        t = tokenizer_of(&models[k]);
        fixture_refused(chat_encode(t, &options, late, 2, &list, &err), &err, ERR_CONFIG, "message 2", NULL);
        fixture_refused(chat_encode(t, &(struct chat_options){.generation_prompt = true}, late, 1, &list, &err), &err,
                        ERR_RESOURCES, "more than 3 tokens", NULL);
        assert_int_equal(list.count, 0);
        tokenizer_free(t);
    }
    token_list_release(&list);
}

/* A conversation that Gemma's format has no place for is one bad line, not the end of the file. */
static void test_data_set_skips_what_is_out_of_turn(void **state)
{
    struct tokenizer *t = tokenizer_of(&models[8]);
    const struct dataset_options options = {.tokenizer = t, .tokens_max = 256};
    const char *text =
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]}\n"
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"user\",\"content\":\"a\"},"
        "{\"role\":\"assistant\",\"content\":\"b\"}]}\n";
    struct dataset *d = NULL;
    struct error err = {0};
    (void)state;
    assert_int_equal(dataset_parse(span_str(text), "d.jsonl", &options, &d, &err), 0);
    assert_int_equal(dataset_count(d), 1);
    assert_int_equal(dataset_report(d)->faults[DATASET_BAD_MESSAGES], 1);
    dataset_free(d);
    tokenizer_free(t);
}

static int set_up(void **state)
{
    (void)state;
    json_error_t problem;
    golden = json_load_file("tests/golden/chat.json", JSON_ALLOW_NUL, &problem);
    if (!golden)
        fail_msg("tests/golden/chat.json: %s", problem.text);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    json_decref(golden);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_texts_equal_reference),
        cmocka_unit_test(test_what_is_learnt),
        cmocka_unit_test(test_thoughts_are_learnt),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_data_set_skips_what_is_out_of_turn),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
