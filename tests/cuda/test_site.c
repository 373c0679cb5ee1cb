/*
 * What a site computes on where there is a card (the shim's): what device.kind names, why auto takes the CPU instead,
 * at the start and when memory is short later, and that the card's answers are the CPU's.
 */
#include "crypto/random.h"
#include "node/serve/answer.h"
#include "node/train/adapter_config.h"
#include "node/train/trainer.h"
#include "tests/formats/fixtures.h"
#include "tests/node/tiny_site.h"

#include <unistd.h>

#define SEED "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
#define LORA "layers=0-1;targets=q,v;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED
#define CONTEXT 2048
#define SENTENCE "a cough, and a question that goes on for longer than one piece of a prompt does; "
#define LONGER_THAN_A_PIECE SENTENCE SENTENCE SENTENCE /* on a card: 128 tokens */

size_t shim_live_bytes(void); /* kernels/cuda/shim/shim.h, which is C++ */

static struct tiny_site tiny; /* on the CPU, in bfloat16 */

/* A site over the same model with another device, and what it logged while it was opened. */
struct opened {
    struct config *config;
    struct site site;
    int rc;
    struct error err;
    char said[4096];
};

static int another_card(void **state)
{
    (void)state;
    unsetenv("CONSILIUM_SHIM_CAPABILITY");
    unsetenv("CONSILIUM_SHIM_MEMORY_BYTES");
    unsetenv("CONSILIUM_SHIM_DEVICES");
    assert_int_equal(shim_live_bytes(), 0);
    return 0;
}

static int set_up(void **state)
{
    assert_true(backend_cuda_built());
    tiny_site_open(&tiny, NULL, NULL);
    return another_card(state);
}

static int tear_down(void **state)
{
    (void)state;
    tiny_site_release(&tiny);
    return 0;
}

/* Standard error goes into a file between the two. */
static int listen_begin(FILE **ret_file)
{
    const int stderr_before = dup(STDERR_FILENO);
    *ret_file = tmpfile();
    assert_true(stderr_before >= 0 && *ret_file && dup2(fileno(*ret_file), STDERR_FILENO) >= 0);
    return stderr_before;
}

static void listen_end(FILE *file, int stderr_before, char *ret_said, size_t size)
{
    assert_true(dup2(stderr_before, STDERR_FILENO) >= 0);
    close(stderr_before);
    rewind(file);
    ret_said[fread(ret_said, 1, size - 1, file)] = '\0';
    fclose(file);
}

/* more: further lines under device:. */
static void open_with(struct opened *o, const char *kind, const char *more)
{
    char device[256];
    FILE *file;
    *o = (struct opened){0};
    snprintf(device, sizeof device, "  kind: %s\n  precision: f32\n%s", kind, more ? more : "");
    o->config = tiny_site_config(&tiny, NULL, device);
    const int before = listen_begin(&file);
    o->rc = site_open(&o->site, o->config, &o->err);
    listen_end(file, before, o->said, sizeof o->said);
}

static void close_opened(struct opened *o)
{
    site_release(&o->site);
    config_free(o->config);
}

static void expect_card(const struct opened *o)
{
    if (o->rc < 0)
        fail_msg("%s", o->err.message);
    assert_string_equal(o->site.backend->name, "cuda:0 shim");
    assert_true(o->site.cuda);
    assert_int_equal(o->site.why_cpu.code, 0);
    assert_non_null(strstr(o->said, "computing on cuda:0 shim"));
}

static void expect_cpu(const struct opened *o)
{
    if (o->rc < 0)
        fail_msg("%s", o->err.message);
    assert_string_equal(o->site.backend->name, tiny.site.backend->name);
    assert_false(o->site.cuda);
    assert_int_equal(site_batch_tokens(&o->site), 512);
}

static void kinds_name_devices(void **state)
{
    static const char *const card[] = {"auto", "cuda", "cuda:0"};
    struct opened o;
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(card); i++) {
        open_with(&o, card[i], NULL);
        expect_card(&o);
        assert_int_equal(site_batch_tokens(&o.site), 16384);
        close_opened(&o);
        open_with(&o, card[i], "  batch_tokens: 100\n");
        assert_int_equal(site_batch_tokens(&o.site), 100);
        close_opened(&o);
    }
    open_with(&o, "cpu", NULL);
    expect_cpu(&o);
    assert_int_equal(o.site.why_cpu.code, 0);
    assert_string_equal(o.said, "");
    close_opened(&o);
    open_with(&o, "cuda:1", NULL);
    fixture_refused(o.rc, &o.err, ERR_CONFIG, "device.kind", "no CUDA device 1", NULL);
    close_opened(&o);
    open_with(&o, "cuda:0x", NULL);
    fixture_refused(o.rc, &o.err, ERR_CONFIG, "device.kind", "cuda:0x", "cuda:N", NULL);
    close_opened(&o);
}

/* What a site finds out by opening the card: auto goes on with the CPU and says why, cuda refuses with the same. */
static void a_card_that_will_not_do(void **state)
{
    static const struct {
        const char *variable, *value, *more, *level, *reason;
    } cases[] = {
        {"CONSILIUM_SHIM_DEVICES", "0", NULL, "\"info\"", "no CUDA device 0"},
        {"CONSILIUM_SHIM_CAPABILITY", "75", NULL, "\"warn\"", "too old"},
        {"CONSILIUM_SHIM_MEMORY_BYTES", "1073741824", "  memory_limit_mb: 1025\n", "\"warn\"", "limit of 1025 MB"},
        {"CONSILIUM_SHIM_MEMORY_BYTES", "268700000", NULL, "\"warn\"", "the weights take 0.5 MB"},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct opened o;
        setenv(cases[i].variable, cases[i].value, 1);
        open_with(&o, "auto", cases[i].more);
        expect_cpu(&o);
        if (!strstr(o.site.why_cpu.message, cases[i].reason) || !strstr(o.said, o.site.why_cpu.message) ||
            !strstr(o.said, cases[i].level) || !strstr(o.said, "on the CPU"))
            fail_msg("case %zu: %s: %s", i, o.site.why_cpu.message, o.said);
        close_opened(&o);
        open_with(&o, "cuda", cases[i].more);
        fixture_refused(o.rc, &o.err, ERR_CONFIG, "device.kind", cases[i].reason, NULL);
        close_opened(&o);
        another_card(state);
    }
}

/* --- beyond the weights ------------------------------------------------------------------------------------------ */

static int answerer_of(const struct site *site, struct answerer **ret, struct error *err)
{
    return answerer_new(ret, site, CONTEXT, &random_system, &clock_system, err);
}

/* The greedy answer. Caller: free; NULL: err says why. */
static char *answer_of(struct answerer *a, struct slot *slot, struct error *err)
{
    const struct chat_message message = {CHAT_USER, span_str(LONGER_THAN_A_PIECE)};
    const struct answer_request request = {.messages = &message, .message_count = 1, .tokens_max = 12};
    struct answer answer;
    if (answerer_run(a, slot, &request, &answer, err) < 0)
        return NULL;
    char *text = malloc(answer.text.len + 1);
    assert_non_null(text);
    memcpy(text, answer.text.data, answer.text.len);
    text[answer.text.len] = '\0';
    assert_int_equal(answer.answer_tokens, 12);
    assert_true(answer.prompt_tokens > 128);
    answer_release(&answer);
    return text;
}

static bool answers_on_cpu(const struct answerer *a, const struct error **ret_why)
{
    return strcmp(answerer_device(a, ret_why), tiny.site.backend->name) == 0;
}

/* Base model and an adapter, from the same float32 weights. */
static void the_cards_answers_are_the_cpus(void **state)
{
    static const char *const kinds[] = {"cpu", "cuda"};
    char *said[2][2];
    (void)state;
    for (int k = 0; k < 2; k++) {
        const struct error *why;
        struct answerer *a;
        struct opened o;
        struct slot slot;
        open_with(&o, kinds[k], NULL);
        slot_init(&slot);
        if (answerer_of(&o.site, &a, &o.err) < 0)
            fail_msg("%s", o.err.message);
        assert_int_equal(answers_on_cpu(a, &why), k == 0);
        assert_int_equal(why->code, 0);
        for (uint32_t version = 0; version < 2; version++) {
            slot_put(&slot, version ? tiny_adapter(&tiny, version) : NULL);
            said[k][version] = answer_of(a, &slot, &o.err);
            assert_non_null(said[k][version]);
        }
        slot_release(&slot);
        answerer_free(a);
        close_opened(&o);
    }
    assert_string_equal(said[0][0], said[1][0]);
    assert_string_equal(said[0][1], said[1][1]);
    assert_string_not_equal(said[0][0], said[0][1]);
    for (int k = 0; k < 4; k++)
        free(said[k / 2][k % 2]);
}

/* The weights fit, and what an answer takes does not. The site's own backend stays where it is. */
static void answering_beyond_memory(void **state)
{
    const struct error *why;
    struct answerer *a = NULL;
    struct opened o;
    char said[4096];
    FILE *file;
    (void)state;
    open_with(&o, "auto", "  memory_limit_mb: 3\n");
    expect_card(&o);
    const size_t before_answering = shim_live_bytes();
    const int before = listen_begin(&file);
    const int rc = answerer_of(&o.site, &a, &o.err);
    listen_end(file, before, said, sizeof said);
    if (rc < 0)
        fail_msg("%s", o.err.message);
    assert_true(answers_on_cpu(a, &why));
    assert_int_equal(why->code, ERR_RESOURCES);
    assert_non_null(strstr(said, "answering on the CPU, not on the card: "));
    assert_non_null(strstr(said, why->message));
    assert_non_null(strstr(said, "\"warn\""));
    assert_int_equal(shim_live_bytes(), before_answering);
    char *text = answer_of(a, NULL, &o.err);
    assert_non_null(text);
    free(text);
    answerer_free(a);
    expect_card(&o);
    close_opened(&o);

    open_with(&o, "cuda", "  memory_limit_mb: 3\n");
    expect_card(&o);
    a = NULL;
    fixture_refused(answerer_of(&o.site, &a, &o.err), &o.err, ERR_RESOURCES, "do not fit the 3.0 MB",
                    "device.kind: cpu", NULL);
    assert_null(a);
    close_opened(&o);
}

/* Answering fits, and the adapter's factors do not: another program may have come to the card meanwhile. */
static void an_adapter_beyond_memory(void **state)
{
    static const char *const kinds[] = {"cpu", "auto", "cuda"};
    char *want = NULL;
    for (int k = 0; k < 3; k++) {
        const struct error *why;
        struct answerer *a;
        struct opened o;
        struct slot slot;
        open_with(&o, kinds[k], NULL);
        slot_init(&slot);
        assert_int_equal(answerer_of(&o.site, &a, &o.err), 0);
        char *base = answer_of(a, &slot, &o.err);
        assert_non_null(base);
        assert_int_equal(answers_on_cpu(a, &why), k == 0);
        slot_put(&slot, tiny_adapter(&tiny, 1));
        setenv("CONSILIUM_SHIM_MEMORY_BYTES", "1", 1);
        char *text = answer_of(a, &slot, &o.err);
        if (k == 0) {
            want = text;
        } else if (k == 1) {
            assert_true(answers_on_cpu(a, &why));
            assert_non_null(strstr(why->message, "MB"));
            assert_string_equal(text, want);
            free(text);
        } else {
            assert_null(text);
            fixture_refused(o.err.code, &o.err, ERR_RESOURCES, "short of memory", "0 MB are free", NULL);
            assert_false(answers_on_cpu(a, &why));
            slot_put(&slot, NULL); /* and what fitted before still does */
            text = answer_of(a, &slot, &o.err);
            assert_string_equal(text, base);
            free(text);
        }
        free(base);
        slot_release(&slot);
        answerer_free(a);
        close_opened(&o);
        another_card(state);
    }
    free(want);
}

/* As the commands do it. */
static int train_once(struct site *site, struct error *err)
{
    struct trainer_options options = {.threads = 1,
                                      .example_tokens_max = 64,
                                      .optimizer = {.kind = OPTIMIZER_SGD, .lr = 1},
                                      .plan = {.mode = DP_NONE, .q = 1, .steps_per_round = 1, .rounds = 1, .units = 1}};
    const struct dataset_options records = {
        .tokenizer = site->tokenizer, .chat = {.system = CHAT_SYSTEM_NONE}, .tokens_max = 64};
    struct adapter_config config;
    struct trainer *trainer = NULL;
    struct dataset *data;
    struct lora lora = {0};
    int rc;
    if (adapter_config_parse(span_str(LORA), &config, err) < 0 ||
        adapter_config_build(&config, &site->model.config, &lora, err) < 0 ||
        dataset_parse(span_str("{\"messages\":[{\"role\":\"user\",\"content\":\"a cough\"},"
                               "{\"role\":\"assistant\",\"content\":\"yes\"}]}\n"),
                      "test", &records, &data, err) < 0)
        fail_msg("%s", err->message);
    do {
        options.backend = site->backend;
        options.tokens_max = site_batch_tokens(site);
        rc = trainer_new(&options, &site->model, &lora, data, &trainer, err);
    } while (rc < 0 && site_turn_to_cpu(site, "training", err));
    if (rc == 0)
        rc = trainer_round(trainer, &lora, 0, &random_system, NULL, err);
    trainer_free(trainer);
    dataset_free(data);
    lora_release(&lora);
    return rc;
}

static void training_beyond_memory(void **state)
{
    struct opened o;
    char said[4096];
    FILE *file;
    (void)state;
    open_with(&o, "auto", "  memory_limit_mb: 1\n");
    expect_card(&o);
    const int before = listen_begin(&file);
    const int rc = train_once(&o.site, &o.err);
    listen_end(file, before, said, sizeof said);
    if (rc < 0)
        fail_msg("%s", o.err.message);
    assert_string_equal(o.site.backend->name, tiny.site.backend->name);
    assert_int_equal(o.site.why_cpu.code, ERR_RESOURCES);
    assert_non_null(strstr(said, "training on the CPU, not on the card: "));
    assert_int_equal(site_batch_tokens(&o.site), 512);
    assert_int_equal(shim_live_bytes(), 0);
    close_opened(&o);

    open_with(&o, "cuda", "  memory_limit_mb: 1\n");
    expect_card(&o);
    fixture_refused(train_once(&o.site, &o.err), &o.err, ERR_RESOURCES, "do not fit the 1.0 MB", NULL);
    expect_card(&o);
    close_opened(&o);
}

/* Only short memory is a reason, and only to leave a card. */
static void other_failures_stand(void **state)
{
    struct opened o;
    (void)state;
    open_with(&o, "auto", NULL);
    expect_card(&o);
    const int codes[] = {ERR_FAILED, ERR_CONFIG, ERR_BUG, ERR_AGAIN};
    for (size_t i = 0; i < ARRAY_LEN(codes); i++) {
        error_set(&o.err, codes[i], "something");
        assert_false(site_turn_to_cpu(&o.site, "training", &o.err));
    }
    expect_card(&o);
    error_set(&o.err, ERR_RESOURCES, "something");
    assert_false(site_falls_back(&o.site, tiny.site.backend, "training", &o.err));
    close_opened(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(kinds_name_devices, another_card),
        cmocka_unit_test_teardown(a_card_that_will_not_do, another_card),
        cmocka_unit_test_teardown(the_cards_answers_are_the_cpus, another_card),
        cmocka_unit_test_teardown(answering_beyond_memory, another_card),
        cmocka_unit_test_teardown(an_adapter_beyond_memory, another_card),
        cmocka_unit_test_teardown(training_beyond_memory, another_card),
        cmocka_unit_test_teardown(other_failures_stand, another_card),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
