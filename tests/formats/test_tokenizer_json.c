/* tokenizer.json files with one thing wrong, and what tokenizer_config.json says. */
#include "tests/formats/fixtures.h"

#define SMOLLM                                                                                                         \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":true},"                      \
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true}]}"
#define VOCAB "{\"<s>\":0,\"a\":1,\"b\":2,\"ab\":3}"
#define ADDED "[{\"id\":0,\"content\":\"<s>\",\"special\":true},{\"id\":4,\"content\":\"<think>\"}]"
#define MODEL(vocab, merges, more) "{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges more "}"
#define FILE_OF(added, normalizer, pre, model)                                                                         \
    "{\"added_tokens\":" added ",\"normalizer\":" normalizer ",\"pre_tokenizer\":" pre ",\"model\":" model "}"
#define WITH_MODEL(vocab, merges, more) FILE_OF(ADDED, "null", SMOLLM, MODEL(vocab, merges, more))
#define WITH_ADDED(added) FILE_OF(added, "null", SMOLLM, MODEL(VOCAB, "[\"a b\"]", ""))
#define WITH_PIPELINE(normalizer, pre) FILE_OF(ADDED, normalizer, pre, MODEL(VOCAB, "[\"a b\"]", ""))
#define GOOD WITH_MODEL(VOCAB, "[\"a b\"]", "")

static int load(struct span json, const char *config, struct tokenizer **ret_tokenizer, struct error *err)
{
    const struct tokenizer_files files = {.tokenizer = json, .config = config ? span_str(config) : (struct span){0}};
    return tokenizer_from_json(&files, "folder", ret_tokenizer, err);
}

static void test_both_forms_of_merges(void **state)
{
    static const char *const files[] = {GOOD, WITH_MODEL(VOCAB, "[[\"a\",\"b\"]]", ",\"ignore_merges\":false")};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(files); i++) {
        struct tokenizer *t = NULL;
        struct token_list list = {.max = 8};
        struct error err = {0};
        if (load(span_str(files[i]), NULL, &t, &err) < 0)
            fail_msg("%s", err.message);
        assert_int_equal(tokenizer_vocabulary(t), 5);
        assert_int_equal(tokenizer_encode(t, span_str("aab<s><think>"), 0, &list, &err), 0);
        assert_int_equal(list.count, 3); /* a ab <think>; the vocabulary has none of <, s, > */
        assert_int_equal(list.ids[1], 3);
        assert_int_equal(list.ids[2], 4);
        assert_true(tokenizer_is_control(t, 0) && !tokenizer_is_control(t, 4));
        assert_int_equal(tokenizer_bos(t), -1);
        assert_false(tokenizer_has_template(t));
        token_list_release(&list);
        tokenizer_free(t);
    }
}

static void test_config(void **state)
{
    struct tokenizer *t = NULL;
    struct error err = {0};
    (void)state;
    assert_int_equal(
        load(span_str(GOOD),
             "{\"model_max_length\":1000000000000000019884624838656,"
             "\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"<s>\",\"pad_token\":null,\"chat_template\":"
             "[{\"name\":\"tools\",\"template\":\"x\"},{\"name\":\"default\",\"template\":\"y enable_thinking\"}]}",
             &t, &err),
        0);
    assert_int_equal(tokenizer_bos(t), 0);
    assert_int_equal(tokenizer_eos(t), 0);
    assert_int_equal(tokenizer_pad(t), -1);
    assert_true(tokenizer_is_end(t, 0));
    assert_true(tokenizer_template_holds(t, "enable_thinking") && !tokenizer_template_holds(t, "x"));
    tokenizer_free(t);
    fixture_refused(load(span_str(GOOD), "{\"eos_token\":\"</s>\"}", &t, &err), &err, ERR_INTEGRITY,
                    "folder: tokenizer_config.json: eos_token", NULL);
    fixture_refused(load(span_str(GOOD), "{\"pad_token\":7}", &t, &err), &err, ERR_INTEGRITY, "pad_token", NULL);
    fixture_refused(load(span_str(GOOD), "[]", &t, &err), &err, ERR_INTEGRITY,
                    "tokenizer_config.json is no JSON object", NULL);
}

/* The file of its own, as transformers 5 writes it, goes before what tokenizer_config.json says. */
static void test_chat_template(void **state)
{
    const struct tokenizer_files both = {.tokenizer = span_str(GOOD),
                                         .config = span_str("{\"chat_template\":\"old\"}"),
                                         .chat_template = span_str("new")};
    const struct tokenizer_files alone = {.tokenizer = span_str(GOOD), .chat_template = span_str("new")};
    const struct tokenizer_files *const cases[] = {&both, &alone};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct tokenizer *t = NULL;
        assert_int_equal(tokenizer_from_json(cases[i], "folder", &t, NULL), 0);
        assert_true(tokenizer_template_holds(t, "new") && !tokenizer_template_holds(t, "old"));
        tokenizer_free(t);
    }
}

struct wrong {
    const char *json;
    int code;
    const char *expected;
};

static void test_hostile_files(void **state)
{
    static const struct wrong cases[] = {
        {"", ERR_INTEGRITY, "tokenizer.json is not valid JSON"},
        {"{\"model\":{}", ERR_INTEGRITY, "tokenizer.json is not valid JSON"},
        {"[]", ERR_INTEGRITY, "tokenizer.json is no JSON object"},
        {"{}", ERR_INTEGRITY, "model is not an object"},
        {"{\"model\":{},\"model\":{}}", ERR_INTEGRITY, "duplicate object key"},
        {"{\"model\":\"\xff\"}", ERR_INTEGRITY, "not valid JSON"},
        {"{\"model\":1e999}", ERR_INTEGRITY, "not valid JSON"},
        {WITH_MODEL("{\"a\":0,\"a\":1}", "[]", ""), ERR_INTEGRITY, "duplicate object key"},
        {WITH_MODEL("{\"a\":-1}", "[]", ""), ERR_INTEGRITY, "model.vocab has an id that is not 0 to 1048575"},
        {WITH_MODEL("{\"a\":1048576}", "[]", ""), ERR_INTEGRITY, "model.vocab has an id"},
        {WITH_MODEL("{\"a\":99999999999999999999999999}", "[]", ""), ERR_INTEGRITY, "not valid JSON"},
        {WITH_MODEL("{\"a\":1.0}", "[]", ""), ERR_INTEGRITY, "model.vocab has an id"},
        {WITH_MODEL("{\"a\":\"1\"}", "[]", ""), ERR_INTEGRITY, "model.vocab has an id"},
        {WITH_MODEL("{\"a\":1,\"b\":1}", "[]", ""), ERR_INTEGRITY, "id 1 stands for two tokens"},
        {WITH_MODEL("[\"a\"]", "[]", ""), ERR_INTEGRITY, "model.vocab is not an object"},
        {WITH_MODEL("{\"\":1}", "[]", ""), ERR_INTEGRITY, "token 1 has 0 bytes"},
        {WITH_MODEL("{\"a b\":1}", "[]", ""), ERR_INTEGRITY, "token 1 holds a character"},
        {FILE_OF("[]", "null", SMOLLM, MODEL("{}", "[]", "")), ERR_INTEGRITY, "it is empty"},
        {WITH_MODEL(VOCAB, "{}", ""), ERR_INTEGRITY, "model.merges is not a list"},
        {WITH_MODEL(VOCAB, "[\"ab\"]", ""), ERR_INTEGRITY, "merge 0 is not two tokens"},
        {WITH_MODEL(VOCAB, "[\"a b c\"]", ""), ERR_INTEGRITY, "merge 0 is not two tokens"},
        {WITH_MODEL(VOCAB, "[[\"a\"]]", ""), ERR_INTEGRITY, "merge 0 is not two tokens"},
        {WITH_MODEL(VOCAB, "[[\"a\",1]]", ""), ERR_INTEGRITY, "merge 0 is not two tokens"},
        {WITH_MODEL(VOCAB, "[7]", ""), ERR_INTEGRITY, "merge 0 is not two tokens"},
        {WITH_MODEL(VOCAB, "[\"b a\"]", ""), ERR_INTEGRITY, "the result of merge 0"},
        {WITH_MODEL(VOCAB, "[\"a b\",\"a b\"]", ""), ERR_INTEGRITY, "merge 1 stands twice"},
        {FILE_OF("[{\"id\":3,\"content\":\"ab\",\"special\":true}]", "null", SMOLLM,
                 MODEL("{\"a\":1,\"b\":2,\"ab\":3}", "[\"a b\"]", "")),
         ERR_INTEGRITY, "the result of merge 0"}, /* would forge a control token */
        {WITH_MODEL(VOCAB, "[\"a b\"]", ",\"dropout\":0.1"), ERR_CONFIG, "dropout is not supported: 0.1"},
        {WITH_MODEL(VOCAB, "[\"a b\"]", ",\"byte_fallback\":true"), ERR_CONFIG, "byte_fallback"},
        {WITH_MODEL(VOCAB, "[\"a b\"]", ",\"end_of_word_suffix\":\"</w>\""), ERR_CONFIG, "</w>"},
        {WITH_MODEL(VOCAB, "[\"a b\"]", ",\"ignore_merges\":3"), ERR_INTEGRITY, "model.ignore_merges"},
        {WITH_MODEL(VOCAB, "[\"a b\"]", ",\"unk_token\":\"<s>\""), ERR_CONFIG, "lacks bytes"},
        {FILE_OF(ADDED, "null", SMOLLM, "{\"type\":\"Unigram\",\"vocab\":[]}"), ERR_CONFIG, "Unigram"},
        {WITH_ADDED("7"), ERR_INTEGRITY, "added_tokens is not a list"},
        {WITH_ADDED("[7]"), ERR_INTEGRITY, "added_tokens has an id"},
        {WITH_ADDED("[{\"id\":1e3,\"content\":\"<s>\"}]"), ERR_INTEGRITY, "added_tokens has an id"},
        {WITH_ADDED("[{\"id\":5,\"content\":\"a\"}]"), ERR_INTEGRITY, "id 5 stands for two tokens"},
        {WITH_ADDED("[{\"id\":1,\"content\":\"z\"}]"), ERR_INTEGRITY, "id 1 stands for two tokens"},
        {WITH_ADDED("[{\"id\":5,\"content\":\"y\"},{\"id\":5,\"content\":\"z\"}]"), ERR_INTEGRITY,
         "id 5 stands for two"},
        {WITH_ADDED("[{\"id\":5,\"content\":\"\"}]"), ERR_INTEGRITY, "content is not a text"},
        {WITH_ADDED("[{\"id\":5,\"content\":\"y\",\"lstrip\":true}]"), ERR_CONFIG, "\"lstrip\":true"},
        {FILE_OF("[{\"id\":5,\"content\":\"y\",\"normalized\":true}]", "{\"type\":\"NFC\"}", SMOLLM,
                 MODEL(VOCAB, "[]", "")),
         ERR_CONFIG, "\"normalized\":true"},
        {WITH_PIPELINE("{\"type\":\"Lowercase\"}", SMOLLM), ERR_CONFIG,
         "normalizer is not supported: {\"type\":\"Lowercase\"}"},
        {WITH_PIPELINE("{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"_\"}", SMOLLM), ERR_CONFIG,
         "normalizer"},
        {WITH_PIPELINE("null", "{\"type\":\"Whitespace\"}"), ERR_CONFIG,
         "pre_tokenizer is not supported: {\"type\":\"Whitespace\"}"},
        {WITH_PIPELINE("null", "null"), ERR_CONFIG, "pre_tokenizer"},
        {WITH_PIPELINE(
             "null", "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\w+\"},"
                     "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
                     "\"use_regex\":false}]}"),
         ERR_CONFIG, "\\\\w+"},
        {WITH_PIPELINE("{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}", "null"),
         ERR_CONFIG, "byte_fallback"},
        {FILE_OF("[]", "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}", "null",
                 MODEL("{\"<0x00>\":0,\"a\":1}", "[]", ",\"byte_fallback\":true")),
         ERR_CONFIG, "no byte token <0x01>"},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct tokenizer *t = NULL;
        struct error err = {0};
        fixture_refused(load(span_str(cases[i].json), NULL, &t, &err), &err, cases[i].code,
                        "folder: ", cases[i].expected, NULL);
        assert_null(t);
    }
}

static void test_hostile_sizes(void **state)
{
    struct tokenizer *t = NULL;
    struct error err = {0};
    const size_t deep = 1000000, many = TOKENIZER_JSON_VALUES_MAX + 10;
    char *text = malloc(many + 64);
    (void)state;
    memset(text, '[', deep);
    fixture_refused(load(span_of(text, deep), NULL, &t, &err), &err, ERR_INTEGRITY, "not valid JSON", NULL);
    memset(text, ',', many);
    fixture_refused(load(span_of(text, many), NULL, &t, &err), &err, ERR_RESOURCES, "values, at most", NULL);
    fixture_refused(load(span_of(text, TOKENIZER_JSON_BYTES_MAX + (size_t)1), NULL, &t, &err), &err, ERR_RESOURCES,
                    "bytes, at most", NULL);
    free(text);
}

/* What GGUF files of SentencePiece vocabularies can have wrong. */
static void test_hostile_scores(void **state)
{
    static const struct {
        float score;
        bool prefix, prefix_absent, extra;
        int drop; /* the byte token that is missing */
        const char *long_token, *expected;
        int code;
    } cases[] = {
        {0, false, false, false, -1, NULL, NULL, 0},
        {0.0f / 0.0f, false, false, false, -1, NULL, "score of token 256 is not finite", ERR_INTEGRITY},
        {0, true, false, false, -1, NULL, "add_space_prefix is true", ERR_CONFIG},
        {0, false, true, false, -1, NULL, "add_space_prefix is absent", ERR_CONFIG},
        {0, false, false, true, -1, NULL, "remove_extra_whitespaces is true", ERR_CONFIG},
        {0, false, false, false, 0x20, NULL, "no byte token <0x20>", ERR_CONFIG},
        {0, false, false, false, -1, "\xff", "token 256 holds a character", ERR_INTEGRITY},
        {0, false, false, false, -1,
         "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
         "aaaaa"
         "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
         "with scores at most 128", ERR_INTEGRITY},
    };
    (void)state;
    for (size_t k = 0; k < ARRAY_LEN(cases); k++) {
        struct gguf_writer w;
        struct buffer out;
        struct gguf *gguf = NULL;
        struct tokenizer *t = NULL;
        struct error err = {0};
        struct span tokens[257];
        char names[256][8];
        int32_t types[257];
        float scores[257] = {0};
        for (int b = 0; b < 256; b++) {
            snprintf(names[b], sizeof names[b], b == cases[k].drop ? "x" : "<0x%02X>", (unsigned)b);
            tokens[b] = span_str(names[b]);
            types[b] = b == cases[k].drop ? 1 : 6;
        }
        tokens[256] = span_str(cases[k].long_token ? cases[k].long_token : "a");
        types[256] = 1;
        scores[256] = cases[k].score;
        gguf_writer_init(&w, 1 << 16);
        gguf_writer_string(&w, "tokenizer.ggml.model", span_str("llama"));
        gguf_writer_strings(&w, "tokenizer.ggml.tokens", tokens, 257);
        gguf_writer_i32s(&w, "tokenizer.ggml.token_type", types, 257);
        gguf_writer_f32s(&w, "tokenizer.ggml.scores", scores, 257);
        if (!cases[k].prefix_absent)
            gguf_writer_bool(&w, "tokenizer.ggml.add_space_prefix", cases[k].prefix);
        gguf_writer_bool(&w, "tokenizer.ggml.remove_extra_whitespaces", cases[k].extra);
        buffer_init(&out, 1 << 16);
        assert_int_equal(gguf_writer_finish(&w, &out, &err), 0);
        assert_int_equal(gguf_parse(buffer_span(&out), "bad.gguf", &gguf, &err), 0);
        if (cases[k].code)
            fixture_refused(tokenizer_new(gguf, &t, &err), &err, cases[k].code, "bad.gguf", cases[k].expected, NULL);
        else
            assert_int_equal(tokenizer_new(gguf, &t, &err), 0);
        tokenizer_free(t);
        gguf_close(gguf);
        gguf_writer_release(&w);
        buffer_release(&out);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_both_forms_of_merges), cmocka_unit_test(test_config),
        cmocka_unit_test(test_chat_template),        cmocka_unit_test(test_hostile_files),
        cmocka_unit_test(test_hostile_sizes),        cmocka_unit_test(test_hostile_scores),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
