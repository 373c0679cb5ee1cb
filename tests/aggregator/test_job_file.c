/* job.yaml → the plan that is signed, and d, the number of parameters, without any model code. */
#include "aggregator/rounds/job_file.h"
#include "crypto/random.h"
#include "model/lora.h"
#include "node/train/adapter_config.h"
#include "tests/aggregator/federation_fixture.h"

static struct fixture_federation f;
static const char card[] =
    "{\"name\": \"t\", \"sha256\": \"0101010101010101010101010101010101010101010101010101010101010101\","
    "\"architecture\": \"llama\", \"layers\": 5, \"width\": 48, \"heads\": 6, \"kv_heads\": 2,"
    "\"head_size\": 8, \"ff\": 80, \"vocabulary\": 100, \"context\": 64}";

static int set_up(void **state)
{
    (void)state;
    fixture_federation_open(&f, "test");
    fixture_write(&f, "card.json", span_str(card));
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    fixture_federation_release(&f);
    return 0;
}

static int plan_of(const char *lines, struct job_plan *plan, uint64_t *words, struct error *err)
{
    struct config *job = NULL;
    char text[2048];
    int rc;
    snprintf(text, sizeof text, "version: 1\njob: j\nmodel: {card: card.json}\n%s", lines);
    if ((rc = config_parse(&job, &job_schema, span_str(text), "job.yaml", f.folder, err)) == 0 &&
        (rc = config_finish(job, err)) == 0)
        rc = job_file_plan(job, &random_system, 1000000, plan, words, err);
    config_free(job);
    return rc;
}

/* Once as a model with gate and up apart, once as one that has them in one matrix. */
static void check_counts(bool fused)
{
    static const char *const loras[] = {
        "lora: {targets: [q, v]}\n",
        "lora: {targets: [v, q], rank: 3}\n",
        "lora: {targets: [q, k, v, o, gate, up, down], rank: 7, scaling: sqrt-rank}\n",
        "lora: {targets: [down, o], rank: 1, layer_first: 2}\n",
        "lora: {targets: [k], layer_first: 4, layer_last: 4, alpha: 0.5}\n",
        "lora: {targets: [up, gate], layer_first: 1, layer_last: 3, rank: 16}\n",
        "lora: {targets: [q, v], mode: alternating}\n",
        "lora: {targets: [q, k, v, o, gate, up, down], rank: 7, mode: alternating}\n",
        "lora: {targets: [down, o], layer_first: 2, mode: alternating}\n",
        "lora: {targets: [up, gate, down], layer_last: 3, rank: 5, mode: alternating}\n",
    };
    /* The same shapes as the card's. */
    const struct model_config model = {.vocabulary = 100,
                                       .d_model = 48,
                                       .layer_count = 5,
                                       .head_count = 6,
                                       .kv_head_count = 2,
                                       .head_size = 8,
                                       .d_ff = 80,
                                       .context_length = 64,
                                       .fused_gate_up = fused};
    for (size_t i = 0; i < ARRAY_LEN(loras); i++) {
        struct job_plan plan;
        struct adapter_config adapter;
        struct error err = {0};
        struct lora lora = {0};
        uint64_t words = 0;
        if (plan_of(loras[i], &plan, &words, &err) < 0 ||
            adapter_config_parse(span_of(plan.lora, plan.lora_len), &adapter, &err) < 0 ||
            adapter_config_build(&adapter, &model, &lora, &err) < 0)
            fail_msg("%s: %s", loras[i], err.message);
        assert_int_equal(words, adapter_config_words(&adapter, &lora));
        assert_int_equal(plan.split_words, adapter_config_split(&adapter, &lora));
        assert_int_equal(plan.split_words > 0, strstr(loras[i], "alternating") != NULL);
        assert_true(words > plan.split_words);
        lora_release(&lora);
    }
}

static void parameters_are_counted_as_the_model_does(void **state)
{
    char fused[sizeof card + 32];
    struct job_plan plan;
    struct error err = {0};
    uint64_t words = 0;
    (void)state;
    check_counts(false);
    snprintf(fused, sizeof fused, "%.*s, \"fused_gate_up\": true}", (int)strlen(card) - 1, card);
    fixture_write(&f, "card.json", span_str(fused));
    check_counts(true);
    assert_int_equal(plan_of("lora: {targets: [gate]}\n", &plan, &words, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "gate and up as one matrix"));
}

static void values_arrive_in_the_plan(void **state)
{
    struct job_plan p;
    struct error err = {0};
    uint64_t words;
    (void)state;
    if (plan_of("rounds: {count: 7, min_sites: 4, train_deadline: 90s, stage_deadline: 11s, valid: 1h}\n"
                "train: {steps: 3, batch: 5, learning_rate: 0.25, optimizer: sgd, momentum: 0.5, decay: 0.75, "
                "max_tokens: 99, system: \"a;b=c\"}\n"
                "aggregation: {optimizer: fedavgm, learning_rate: 0.5, momentum: 0.25, update_clip: 3, grid_bits: 12}\n"
                "dp: {clip: 2, epsilon: 4, delta: 0.0001}\nsecagg: {colluders: 1, honest: 2}\n",
                &p, &words, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(p.rounds, 7);
    assert_int_equal(p.min_sites, 4);
    assert_int_equal(p.train_deadline_s, 90);
    assert_int_equal(p.stage_deadline_s, 11);
    assert_int_equal(p.not_after_s, 1003600);
    assert_int_equal(p.train.local_steps, 3);
    assert_int_equal(p.train.batch, 5);
    assert_int_equal(p.train.max_len, 99);
    assert_string_equal(p.train.options, "momentum=0.5;decay=0.75;system=a;b=c");
    assert_int_equal(p.aggregation.optimizer.kind, SERVER_FEDAVGM);
    assert_true(p.aggregation.optimizer.lr == 0.5f && p.aggregation.optimizer.momentum == 0.25f);
    assert_int_equal(p.aggregation.grid_bits, 12);
    assert_int_equal(p.dp.mode, PLAN_DP_RECORD);
    assert_true(p.dp.clip == 2 && p.dp.target_epsilon == 4 && p.dp.delta == 1e-4);
    assert_int_equal(p.dp.steps, 21);
    assert_int_equal(p.c, 1);
    assert_int_equal(p.m, 2);
    assert_int_equal(p.base_hash[0], 1);
}

static void the_public_seed(void **state)
{
    struct job_plan a, b;
    struct error err = {0};
    uint64_t words;
    (void)state;
    assert_int_equal(plan_of("", &a, &words, &err), 0);
    assert_int_equal(plan_of("", &b, &words, &err), 0);
    assert_true(memcmp(a.lora, b.lora, a.lora_len) != 0); /* drawn anew for each job */
    const char *given = "lora: {seed: 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f}\n";
    assert_int_equal(plan_of(given, &a, &words, &err), 0);
    assert_int_equal(plan_of(given, &b, &words, &err), 0);
    assert_memory_equal(a.lora, b.lora, a.lora_len);
    assert_non_null(strstr((const char *)a.lora, "seed=000102"));
}

static void mistakes_name_the_line_and_the_key(void **state)
{
    static const struct {
        const char *lines, *expected;
    } cases[] = {
        {"lora: {rnak: 8}\n", "lora.rank"},
        {"lora: {targets: [q, w]}\n", "job.yaml:4"},
        {"lora: {targets: [q, v, q]}\n", "twice"},
        {"lora: {layer_first: 5}\n", "layers 5"},
        {"lora: {layer_first: 3, layer_last: 2}\n", "layers 3"},
        {"lora: {layer_last: 5}\n", "layers 0 to 5"},
        {"lora: {rank: 0}\n", "lora.rank"},
        {"lora: {alpha: nan}\n", "lora.alpha"},
        {"lora: {seed: zz}\n", "lora.seed"},
        {"lora: {seed: zz02030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20}\n", "hexadecimal"},
        {"rounds: {min_sites: 2}\n", "rounds.min_sites"},
        {"train: {optimizer: adam}\n", "train.optimizer"},
        {"lora: {mode: joint}\n", "lora.mode"},
        {"dp: {mode: \"off\"}\n", "dp.mode"},
        {"dp: {delta: 0.5}\n", "dp.delta"},
        {"aggregation: {grid_bits: 31}\n", "aggregation.grid_bits"},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct job_plan plan = {.rounds = 77};
        struct error err = {0};
        uint64_t words = 5;
        assert_int_equal(plan_of(cases[i].lines, &plan, &words, &err), ERR_CONFIG);
        if (!strstr(err.message, cases[i].expected))
            fail_msg("%s: the message does not hold \"%s\": %s", cases[i].lines, cases[i].expected, err.message);
        assert_int_equal(plan.rounds, 77); /* outputs are untouched */
        assert_int_equal(words, 5);
    }
}

static void cards_that_are_none(void **state)
{
    static const char *const texts[] = {
        "", "[]", "{}", "{\"sha256\": 5}",
        ("{\"sha256\": \"01\", \"architecture\": \"llama\", \"layers\": 5, \"width\": 48,"
         "\"heads\": 6, \"kv_heads\": 2, \"head_size\": 8, \"ff\": 80}")};
    struct job_plan plan;
    uint64_t words;
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(texts); i++) {
        struct error err = {0};
        fixture_write(&f, "card.json", span_str(texts[i]));
        assert_int_equal(plan_of("", &plan, &words, &err), ERR_CONFIG);
        assert_non_null(strstr(err.message, "model describe"));
    }
    char huge[1024];
    snprintf(huge, sizeof huge, "%s", card);
    memcpy(strstr(huge, "\"layers\": 5"), "\"layers\":-5", 11);
    fixture_write(&f, "card.json", span_str(huge));
    struct error err = {0};
    assert_int_equal(plan_of("", &plan, &words, &err), ERR_CONFIG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(parameters_are_counted_as_the_model_does, set_up, tear_down),
        cmocka_unit_test_setup_teardown(values_arrive_in_the_plan, set_up, tear_down),
        cmocka_unit_test_setup_teardown(the_public_seed, set_up, tear_down),
        cmocka_unit_test_setup_teardown(mistakes_name_the_line_and_the_key, set_up, tear_down),
        cmocka_unit_test_setup_teardown(cards_that_are_none, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
