/* The same weights as a GGUF file and as a Hugging Face folder are the same model: ids, scores, answers, what training
 * makes of an adapter, and adapters exported from one and used with the other. */
#include "base/file.h"
#include "crypto/random.h"
#include "model/formats/adapter.h"
#include "model/formats/safetensors.h"
#include "node/serve/answer.h"
#include "node/train/adapter_config.h"
#include "node/train/evaluate.h"
#include "node/train/trainer.h"
#include "tests/formats/fixtures.h"
#include "tests/node/tiny_site.h"

#include <math.h>

#define RECORDS 24
#define LORA                                                                                                           \
    "layers=0-1;targets=q,k,v,o,gate,up,down;rank=4;alpha=16;scaling=rank;mode=joint;"                                 \
    "seed=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
/* Rows of q and k lie in another order, so that sums of a head are rounded in another order. */
#define ROUNDING 1e-5

enum { FILE_FORM, FOLDER_FORM, FORMS };

struct forms {
    char folder[64];
    struct tiny_site sites[FORMS];
};

static int set_up(void **state)
{
    struct forms *f = calloc(1, sizeof *f);
    const enum tensor_type type = *state ? TENSOR_BF16 : TENSOR_F32;
    char path[FORMS][96];

    snprintf(f->folder, sizeof f->folder, "/tmp/test_forms.XXXXXX");
    assert_non_null(mkdtemp(f->folder));
    snprintf(path[FILE_FORM], sizeof path[0], "%s/model.gguf", f->folder);
    snprintf(path[FOLDER_FORM], sizeof path[0], "%s/model", f->folder);
    tiny_site_write_model(path[FILE_FORM], type);
    tiny_site_write_folder(path[FOLDER_FORM], type);
    for (int i = 0; i < FORMS; i++)
        tiny_site_open(&f->sites[i], NULL, path[i]);
    assert_int_equal(f->sites[FOLDER_FORM].site.model.layers[0].q.type, type);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct forms *f = *state;
    for (int i = 0; i < FORMS; i++)
        tiny_site_release(&f->sites[i]);
    tiny_site_remove(f->folder);
    free(f);
    return 0;
}

static void expect_close(double a, double b, const char *what)
{
    if (!(fabs(a - b) <= ROUNDING * fabs(a)))
        fail_msg("%s: %.9g and %.9g", what, a, b);
}

/* --- the model and its ids -------------------------------------------------------------------------------------- */

static void test_shapes(void **state)
{
    struct forms *f = *state;
    struct model_config a = f->sites[FILE_FORM].site.model.config, b = f->sites[FOLDER_FORM].site.model.config;
    assert_int_equal(a.rope_order, ROPE_NORM);
    assert_int_equal(b.rope_order, ROPE_NEOX);
    assert_int_equal(a.layer_count, b.layer_count);
    assert_int_equal(a.d_model, b.d_model);
    assert_int_equal(a.d_ff, b.d_ff);
    assert_int_equal(a.head_count, b.head_count);
    assert_int_equal(a.kv_head_count, b.kv_head_count);
    assert_int_equal(a.head_size, b.head_size);
    assert_int_equal(a.vocabulary, b.vocabulary);
    assert_int_equal(a.context_length, b.context_length);
    assert_true(a.norm_eps == b.norm_eps && a.rope_base == b.rope_base);
    /* But jobs tell them apart. */
    assert_memory_not_equal(f->sites[FILE_FORM].site.base_hash, f->sites[FOLDER_FORM].site.base_hash, HASH_SIZE);
}

static void test_ids(void **state)
{
    struct forms *f = *state;
    const struct tokenizer *a = f->sites[FILE_FORM].site.tokenizer, *b = f->sites[FOLDER_FORM].site.tokenizer;
    struct token_list lists[FORMS] = {{.max = 65536}, {.max = 65536}};
    const struct chat_options options = {.system = CHAT_SYSTEM_DEFAULT, .generation_prompt = true};
    json_t *golden = fixture_golden();
    const json_t *rows = json_object_get(golden, "rows");
    struct error err = {0};

    assert_true(json_array_size(rows) > 1000);
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *text = json_array_get(json_array_get(rows, i), 0);
        const struct chat_message message = {CHAT_USER, span_of(json_string_value(text), json_string_length(text))};
        for (int k = 0; k < FORMS; k++) {
            token_list_clear(&lists[k]);
            assert_int_equal(chat_encode(k == FILE_FORM ? a : b, &options, &message, 1, &lists[k], &err), 0);
        }
        assert_int_equal(lists[0].count, lists[1].count);
        assert_memory_equal(lists[0].ids, lists[1].ids, lists[0].count * sizeof *lists[0].ids);
    }
    assert_int_equal(tokenizer_vocabulary(a), tokenizer_vocabulary(b));
    for (int32_t id = 0; id < tokenizer_vocabulary(a); id++) {
        assert_true(span_equal(tokenizer_piece(a, id), tokenizer_piece(b, id)));
        assert_int_equal(tokenizer_is_control(a, id), tokenizer_is_control(b, id));
        assert_int_equal(tokenizer_is_end(a, id), tokenizer_is_end(b, id));
    }
    assert_int_equal(tokenizer_bos(a), tokenizer_bos(b));
    assert_int_equal(tokenizer_eos(a), tokenizer_eos(b));
    assert_string_equal(chat_template_name(a), chat_template_name(b));
    for (int k = 0; k < FORMS; k++)
        token_list_release(&lists[k]);
    json_decref(golden);
}

/* --- what it computes ------------------------------------------------------------------------------------------- */

static struct dataset *records(const struct tiny_site *t)
{
    static const char *const labels[] = {"a", "beta and more", "gamma, a much longer answer"};
    struct dataset_options options = {
        .tokenizer = t->site.tokenizer, .chat = {.system = CHAT_SYSTEM_NONE}, .tokens_max = 128};
    struct dataset *data;
    struct error err = {0};
    struct buffer text;
    buffer_init(&text, 1 << 20);
    for (int i = 0; i < RECORDS; i++)
        buffer_printf(&text,
                      "{\"messages\":[{\"role\":\"user\",\"content\":\"case %d %s\"},"
                      "{\"role\":\"assistant\",\"content\":\"%s\"}]}\n",
                      i, i % 2 ? "with a longer description of what was seen" : "short", labels[i % 3]);
    if (dataset_parse(buffer_span(&text), "test", &options, &data, &err) < 0)
        fail_msg("%s", err.message);
    buffer_release(&text);
    return data;
}

static struct evaluate_result score(const struct tiny_site *t, const struct lora *lora)
{
    const struct evaluate_options options = {.backend = t->site.backend, .answer_tokens_max = 6};
    struct dataset *data = records(t);
    struct evaluate_result result;
    struct error err = {0};
    if (evaluate(&options, &t->site.model, t->site.tokenizer, lora, data, &result, &err) < 0)
        fail_msg("%s", err.message);
    dataset_free(data);
    return result;
}

static void test_scores(void **state)
{
    struct forms *f = *state;
    const struct evaluate_result a = score(&f->sites[FILE_FORM], NULL), b = score(&f->sites[FOLDER_FORM], NULL);
    assert_int_equal(a.records, RECORDS);
    assert_int_equal(a.correct, b.correct);
    expect_close(a.mean_nll, b.mean_nll, "loss of the right answers");
}

static struct buffer answer_of(const struct tiny_site *t, const char *question)
{
    const struct chat_message message = {CHAT_USER, span_str(question)};
    const struct answer_request request = {.messages = &message, .message_count = 1, .tokens_max = 80};
    struct answerer *answerer;
    struct answer answer;
    struct error err = {0};
    if (answerer_new(&answerer, &t->site, 512, &random_system, &clock_system, &err) < 0 ||
        answerer_run(answerer, NULL, &request, &answer, &err) < 0)
        fail_msg("%s", err.message);
    answerer_free(answerer);
    assert_int_equal(answer.answer_tokens, 80);
    return answer.text;
}

static void test_answers(void **state)
{
    static const char *const questions[] = {"a cough", "Where does it hurt, and since when?", "7 8 9"};
    struct forms *f = *state;
    for (size_t i = 0; i < ARRAY_LEN(questions); i++) {
        struct buffer a = answer_of(&f->sites[FILE_FORM], questions[i]);
        struct buffer b = answer_of(&f->sites[FOLDER_FORM], questions[i]);
        assert_true(a.len > 0);
        assert_true(span_equal(buffer_span(&a), buffer_span(&b)));
        buffer_release(&a);
        buffer_release(&b);
    }
}

/* --- adapters --------------------------------------------------------------------------------------------------- */

/* Plain steps of every record: no optimizer that would make a large step of a rounding difference. */
static struct lora trained(const struct tiny_site *t)
{
    struct dataset *data = records(t);
    const struct trainer_options options = {
        .backend = t->site.backend,
        .tokens_max = 512,
        .example_tokens_max = 128,
        .optimizer = {.kind = OPTIMIZER_SGD, .lr = 0.05f},
        .plan = {.mode = DP_NONE, .q = 1, .steps_per_round = 4, .rounds = 1, .units = RECORDS}};
    struct adapter_config config;
    struct lora lora = {0};
    struct trainer *trainer;
    struct error err = {0};
    if (adapter_config_parse(span_str(LORA), &config, &err) < 0 ||
        adapter_config_build(&config, &t->site.model.config, &lora, &err) < 0 ||
        trainer_new(&options, &t->site.model, &lora, data, &trainer, &err) < 0 ||
        trainer_round(trainer, &lora, 0, &random_system, NULL, &err) < 0)
        fail_msg("%s", err.message);
    trainer_free(trainer);
    dataset_free(data);
    return lora;
}

/* The distance of two exported adapters, over the length of the first. */
static double distance(const char *const folders[FORMS])
{
    struct safetensors *files[FORMS];
    double apart = 0, length = 0;
    for (int i = 0; i < FORMS; i++) {
        char path[256];
        struct error err = {0};
        file_join(path, sizeof path, folders[i], "adapter_model.safetensors");
        if (safetensors_open(path, &files[i], &err) < 0)
            fail_msg("%s", err.message);
    }
    assert_int_equal(safetensors_count(files[0]), 2 * 2 * LORA_TARGET_COUNT);
    assert_int_equal(safetensors_count(files[0]), safetensors_count(files[1]));
    for (size_t i = 0; i < safetensors_count(files[0]); i++) {
        const struct safetensors_tensor *a = safetensors_at(files[0], i), *b = safetensors_find(files[1], a->name);
        const size_t count = a->data.len / sizeof(float);
        float *values[FORMS] = {malloc(a->data.len), malloc(a->data.len)};
        assert_non_null(b);
        assert_int_equal(a->data.len, b->data.len);
        assert_true(safetensors_floats(a, values[0]) && safetensors_floats(b, values[1]));
        for (size_t v = 0; v < count; v++) {
            const double x = (double)values[0][v], y = (double)values[1][v];
            /* B starts at zero: all of it is what was learnt. */
            length += strstr(a->name, "lora_B") ? x * x : 0;
            apart += (x - y) * (x - y);
        }
        free(values[0]);
        free(values[1]);
    }
    for (int i = 0; i < FORMS; i++)
        safetensors_close(files[i]);
    assert_true(length > 0);
    return sqrt(apart / length);
}

static void test_adapters(void **state)
{
    struct forms *f = *state;
    char peft[FORMS][96], gguf[FORMS][96];
    struct evaluate_result base = score(&f->sites[FILE_FORM], NULL), own[FORMS];
    struct error err = {0};
    for (int i = 0; i < FORMS; i++) {
        const struct model_config *model = &f->sites[i].site.model.config;
        struct lora lora = trained(&f->sites[i]);
        snprintf(peft[i], sizeof peft[i], "%s/adapter-%d", f->folder, i);
        snprintf(gguf[i], sizeof gguf[i], "%s/adapter-%d.gguf", f->folder, i);
        if (adapter_export_peft(&lora, model, peft[i], "base", &err) < 0 ||
            adapter_export_gguf(&lora, model, gguf[i], &err) < 0)
            fail_msg("%s", err.message);
        own[i] = score(&f->sites[i], &lora);
        lora_release(&lora);
    }
    assert_true(base.mean_nll - own[FILE_FORM].mean_nll > 0.05); /* it learnt something */
    expect_close(own[FILE_FORM].mean_nll, own[FOLDER_FORM].mean_nll, "loss after training");
    const double apart = distance((const char *const[]){peft[FILE_FORM], peft[FOLDER_FORM]});
    printf("losses %.9g and %.9g; what was learnt differs by %.2g of its length\n", own[FILE_FORM].mean_nll,
           own[FOLDER_FORM].mean_nll, apart);
    if (!(apart <= ROUNDING))
        fail_msg("what was learnt differs by %g of its length", apart);
    for (int from = 0; from < FORMS; from++)
        for (int to = 0; to < FORMS; to++)
            for (int form = 0; form < 2; form++) {
                struct lora lora = {0};
                if (adapter_import(form ? gguf[from] : peft[from], &f->sites[to].site.model.config, LORA_JOINT, &lora,
                                   &err) < 0)
                    fail_msg("%s", err.message);
                const struct evaluate_result r = score(&f->sites[to], &lora);
                assert_int_equal(r.correct, own[from].correct);
                expect_close(r.mean_nll, own[from].mean_nll, "loss with an imported adapter");
                lora_release(&lora);
            }
}

int main(void)
{
#define BOTH(test)                                                                                                     \
    {#test " F32", test, set_up, tear_down, NULL},                                                                     \
    {                                                                                                                  \
#test " BF16", test, set_up, tear_down, (void *)"BF16"                                                         \
    }
    const struct CMUnitTest tests[] = {BOTH(test_shapes), BOTH(test_ids), BOTH(test_scores), BOTH(test_answers),
                                       BOTH(test_adapters)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
