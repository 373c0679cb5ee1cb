/* From a LoRA text to trained bits, and how answers are scored, each checked against a second, direct computation. */
#include "base/hex.h"
#include "crypto/hash.h"
#include "crypto/random.h"
#include "node/train/adapter_config.h"
#include "node/train/evaluate.h"
#include "node/train/trainer.h"
#include "tests/allocations.h"
#include "tests/formats/fixtures.h"
#include "tests/node/tiny_site.h"

#include <math.h>

#define SEED "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
#define TURNS "layers=0-1;targets=q,v;rank=4;alpha=16;scaling=rank;mode=alternating;seed=" SEED
#define JOINT "layers=0-1;targets=q,v;rank=4;alpha=16;scaling=rank;mode=joint;seed=" SEED
#define TEXT "layers=0-1;targets=q,v;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED

static struct tiny_site tiny;
static struct backend *backend; /* float32, whatever the site's is */

static int set_up(void **state)
{
    (void)state;
    struct error err = {0};
    tiny_site_open(&tiny, NULL, NULL);
    return backend_cpu_new(tiny.site.ops, tiny.site.pool, KERNEL_F32, &backend, &err);
}

static int tear_down(void **state)
{
    (void)state;
    backend_free(backend);
    tiny_site_release(&tiny);
    return 0;
}

/* --- adapter_config ----------------------------------------------------------------------------------------------- */

static void malformed_texts_are_refused(void **state)
{
    static const struct {
        const char *text, *field;
    } cases[] = {
        {"", "layers"},
        {"layers=0-1", "targets"},
        {"layers=0;targets=q;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "layers"},
        {"layers=1-0;targets=q;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "layers"},
        {"layers=-1-1;targets=q;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "layers"},
        {"layers=0-128;targets=q;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "layers"},
        {"layers=0-1;targets=;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "targets"},
        {"layers=0-1;targets=w;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "targets"},
        {"layers=0-1;targets=q,q;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "targets"},
        {"layers=0-1;rank=4;targets=q;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "targets"},
        {"layers=0-1;targets=q;rank=;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "rank"},
        {"layers=0-1;targets=q;rank=+4;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "rank"},
        {"layers=0-1;targets=q;rank=4x;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "rank"},
        {"layers=0-1;targets=q;rank=99999999999999999999;alpha=16;scaling=rank;mode=ffa;seed=" SEED, "rank"},
        {"layers=0-1;targets=q;rank=4;alpha=0;scaling=rank;mode=ffa;seed=" SEED, "alpha"},
        {"layers=0-1;targets=q;rank=4;alpha=nan;scaling=rank;mode=ffa;seed=" SEED, "alpha"},
        {"layers=0-1;targets=q;rank=4;alpha=inf;scaling=rank;mode=ffa;seed=" SEED, "alpha"},
        {"layers=0-1;targets=q;rank=4;alpha=16;scaling=half;mode=ffa;seed=" SEED, "scaling"},
        {"layers=0-1;targets=q;rank=4;alpha=16;scaling=rank;mode=both;seed=" SEED, "mode"},
        {"layers=0-1;targets=q;rank=4;alpha=16;scaling=rank;mode=ffa;seed=00", "seed"},
        {"layers=0-1;targets=q;rank=4;alpha=16;scaling=rank;mode=ffa;seed=zz", "seed"},
        {"layers=0-1;targets=q;rank=4;alpha=16;scaling=rank;mode=ffa", "seed"},
        {TEXT ";more=1", "after its last"},
        {TEXT " ", "seed"},
    };
    struct adapter_config config = {.lora = {.rank = 77}};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct error err = {0};
        if (adapter_config_parse(span_str(cases[i].text), &config, &err) != ERR_CONFIG)
            fail_msg("accepted: %s", cases[i].text);
        if (!strstr(err.message, cases[i].field))
            fail_msg("%s: no \"%s\" in: %s", cases[i].text, cases[i].field, err.message);
        assert_int_equal(config.lora.rank, 77); /* untouched */
    }
    struct error err = {0};
    char zero[] = TEXT, huge[2000];
    zero[20] = 0;
    assert_int_equal(adapter_config_parse(span_of(zero, sizeof zero - 1), &config, &err), ERR_CONFIG);
    memset(huge, 'q', sizeof huge);
    assert_int_equal(adapter_config_parse(span_of(huge, sizeof huge), &config, &err), ERR_CONFIG);
    for (size_t n = 0; n < strlen(TEXT); n++) /* every truncation */
        assert_int_equal(adapter_config_parse(span_of(TEXT, n), &config, &err), ERR_CONFIG);
    assert_int_equal(adapter_config_parse(span_str(TEXT), &config, &err), 0);
    assert_int_equal(config.lora.layer_first, 0);
    assert_int_equal(config.lora.layer_count, 2);
    assert_int_equal(config.lora.targets, LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V));
    assert_int_equal(config.lora.rank, 4);
    assert_true(config.lora.alpha == 16);
    assert_int_equal(config.seed[31], 0x1f);
    assert_true(!config.alternating && config.lora.mode == LORA_FFA);
    assert_int_equal(adapter_config_parse(span_str(TURNS), &config, &err), 0);
    assert_true(config.alternating && config.lora.mode == LORA_FFA);
    assert_int_equal(adapter_config_parse(span_str(JOINT), &config, &err), 0);
    assert_true(!config.alternating && config.lora.mode == LORA_JOINT);
}

static struct lora lora_of(const char *text)
{
    struct adapter_config config;
    struct error err = {0};
    struct lora lora = {0};
    if (adapter_config_parse(span_str(text), &config, &err) < 0 ||
        adapter_config_build(&config, &tiny.site.model.config, &lora, &err) < 0)
        fail_msg("%s", err.message);
    return lora;
}

static void hash_frozen(const struct lora *lora, char out[65])
{
    uint8_t hash[HASH_SIZE];
    hash_bytes(span_of(lora->frozen, lora->frozen_count * sizeof *lora->frozen), hash);
    hex_encode(hash, sizeof hash, out);
}

/* A state is A − A0 and B; in mode ffa B alone. */
static void a_state_becomes_an_adapter(void **state)
{
    const struct model_config *model = &tiny.site.model.config;
    struct adapter_config config;
    struct lora first = lora_of(TEXT), turns = lora_of(TURNS), loaded = {0};
    struct error err = {0};
    const size_t a = first.frozen_count, b = first.trained_count;
    float *values = calloc(a + b, sizeof *values);
    (void)state;
    assert_non_null(values);
    assert_int_equal(adapter_config_parse(span_str(TURNS), &config, &err), 0);
    assert_int_equal(a, 2 * 4 * (64 + 64));
    assert_int_equal(adapter_config_split(&config, &turns), a);
    assert_int_equal(adapter_config_words(&config, &turns), a + b);
    assert_memory_equal(turns.frozen, first.frozen, a * sizeof *values);

    /* Zeros: no change yet. Then something, whichever factor is trained. */
    assert_int_equal(adapter_config_apply(&config, values, a + b, &turns, &err), 0);
    assert_memory_equal(turns.frozen, first.frozen, a * sizeof *values);
    for (size_t i = 0; i < a + b; i++)
        values[i] = (float)i / 512 - 1;
    for (int round = 1; round <= 3; round++) {
        adapter_config_turn(&config, round % 2 ? a : 0, &turns);
        assert_int_equal(turns.config.mode, round % 2 ? LORA_FFA : LORA_FFB);
        assert_int_equal(adapter_config_split(&config, &turns), a);
        assert_int_equal(adapter_config_words(&config, &turns), a + b);
        memset(turns.trained, 0xff, turns.trained_count * sizeof *values);
        memset(turns.frozen, 0xff, turns.frozen_count * sizeof *values);
        assert_int_equal(adapter_config_apply(&config, values, a + b, &turns, &err), 0);
        const float *have_a = lora_a(&turns, 0, LORA_Q), *have_b = lora_b(&turns, 0, LORA_Q);
        for (size_t i = 0; i < a; i++)
            assert_true(have_a[i] == first.frozen[i] + values[i]);
        assert_memory_equal(have_b, values + a, b * sizeof *values);
    }
    assert_int_equal(adapter_config_load(&config, model, values, a + b, &loaded, &err), 0);
    assert_memory_equal(lora_a(&loaded, 0, LORA_Q), lora_a(&turns, 0, LORA_Q), a * sizeof *values);
    assert_memory_equal(lora_b(&loaded, 0, LORA_Q), values + a, b * sizeof *values);
    lora_release(&loaded);

    /* A state of another size, or of no federation. */
    assert_int_equal(adapter_config_load(&config, model, values, b, &loaded, &err), ERR_INTEGRITY);
    assert_int_equal(adapter_config_apply(&config, values, a + b + 1, &turns, &err), ERR_INTEGRITY);
    assert_int_equal(adapter_config_parse(span_str(TEXT), &config, &err), 0);
    assert_int_equal(adapter_config_load(&config, model, values, a + b, &loaded, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "parameters"));
    assert_int_equal(adapter_config_load(&config, model, values, b, &loaded, &err), 0);
    assert_memory_equal(loaded.frozen, first.frozen, a * sizeof *values);
    assert_memory_equal(loaded.trained, values, b * sizeof *values);
    adapter_config_turn(&config, 0, &loaded); /* there are no turns in mode ffa */
    assert_int_equal(loaded.config.mode, LORA_FFA);
    lora_release(&loaded);
    assert_int_equal(adapter_config_parse(span_str(JOINT), &config, &err), 0);
    assert_int_equal(adapter_config_load(&config, model, values, a + b, &loaded, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "together"));

    /* What a federation's plan may ask for. */
    loaded = lora_of(JOINT);
    assert_int_equal(adapter_config_check_plan(&config, &loaded, 0, &err), ERR_POLICY);
    assert_non_null(strstr(err.message, "together"));
    lora_release(&loaded);
    assert_int_equal(adapter_config_parse(span_str(TURNS), &config, &err), 0);
    assert_int_equal(adapter_config_check_plan(&config, &turns, a, &err), 0);
    const uint64_t wrong[] = {0, a - 1, a + 1, b};
    for (size_t i = 0; i < ARRAY_LEN(wrong); i++)
        assert_int_equal(adapter_config_check_plan(&config, &turns, wrong[i], &err), ERR_POLICY);
    assert_non_null(strstr(err.message, "cuts"));
    assert_int_equal(adapter_config_parse(span_str(TEXT), &config, &err), 0);
    assert_int_equal(adapter_config_check_plan(&config, &first, 0, &err), 0);
    assert_int_equal(adapter_config_check_plan(&config, &first, a, &err), ERR_POLICY);
    free(values);
    lora_release(&turns);
    lora_release(&first);
}

/* --- trainer ------------------------------------------------------------------------------------------------------ */

static struct dataset *records(size_t count, bool many_answers)
{
    static const char *const labels[] = {"a", "beta and more", "gamma, a much longer answer"};
    struct dataset_options options = {
        .tokenizer = tiny.site.tokenizer, .chat = {.system = CHAT_SYSTEM_NONE}, .tokens_max = 128};
    struct dataset *data;
    struct error err = {0};
    struct buffer text;
    buffer_init(&text, 1 << 20);
    for (size_t i = 0; i < count; i++) {
        char answer[32];
        snprintf(answer, sizeof answer, "%s", many_answers ? "item " : labels[i % 3]);
        if (many_answers)
            snprintf(answer, sizeof answer, "item %zu", i);
        buffer_printf(&text,
                      "{\"messages\":[{\"role\":\"user\",\"content\":\"case %zu %s\"},"
                      "{\"role\":\"assistant\",\"content\":\"%s\"}]}\n",
                      i, i % 2 ? "with a longer description of what was seen" : "short", answer);
    }
    if (dataset_parse(buffer_span(&text), "test", &options, &data, &err) < 0)
        fail_msg("%s", err.message);
    buffer_release(&text);
    return data;
}

static struct trainer_options plain(const struct dataset *data)
{
    return (struct trainer_options){
        .backend = backend,
        .tokens_max = 512,
        .example_tokens_max = 128,
        .optimizer = {.kind = OPTIMIZER_SGD, .lr = 1},
        .plan = {.mode = DP_NONE, .q = 1, .clip = 0, .steps_per_round = 1, .rounds = 1, .units = dataset_count(data)}};
}

static struct trainer_options private_options(const struct dataset *data, const struct lora *lora)
{
    struct trainer_options o = plain(data);
    o.plan = (struct dp_plan){.mode = DP_RECORD,
                              .neighbour = DP_ADD_REMOVE,
                              .unit = "record",
                              .q = 0.5,
                              .z = 1,
                              .clip = 0.5,
                              .grid_clip = DP_GRID_CLIP,
                              .steps_per_round = 3,
                              .rounds = 2,
                              .delta = 1e-5,
                              .epsilon = 100,
                              .units = dataset_count(data),
                              .dimensions = lora->trained_count};
    return o;
}

/* Trains a fresh adapter; the caller frees the result's trained values with lora_release. */
static struct lora train_with(const struct trainer_options *o, const struct dataset *data, uint8_t seed,
                              uint64_t first_step)
{
    const uint8_t key[RANDOM_SEED_SIZE] = {seed, 3};
    struct lora lora = lora_of(TEXT);
    struct random_stream stream;
    struct trainer *t;
    struct error err = {0};
    random_stream_init(&stream, key, "tests/trainer");
    const struct rng rng = random_stream_rng(&stream);
    if (trainer_new(o, &tiny.site.model, &lora, data, &t, &err) < 0 ||
        trainer_round(t, &lora, first_step, &rng, NULL, &err) < 0)
        fail_msg("%s", err.message);
    trainer_free(t);
    random_stream_release(&stream);
    return lora;
}

static double norm_of(const struct lora *lora)
{
    double sum = 0;
    for (size_t i = 0; i < lora->trained_count; i++)
        sum += (double)lora->trained[i] * lora->trained[i];
    return sqrt(sum);
}

static void frozen_factors_are_known(void **state)
{
    struct lora a = lora_of(TEXT);
    struct lora again = lora_of(TEXT);
    struct lora other = lora_of("layers=0-1;targets=q,v;rank=4;alpha=16;scaling=rank;mode=ffa;seed="
                                "010102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f");
    char text[65], second[65];
    (void)state;
    assert_int_equal(a.trained_count, 2 * 4 * (64 + 32));
    for (size_t i = 0; i < a.trained_count; i++)
        assert_true(a.trained[i] == 0);
    hash_frozen(&a, text);
    hash_frozen(&again, second);
    assert_string_equal(text, second);
    /* Known answer: every machine must draw these bits, the model hash stands for them. */
    assert_string_equal(text, "c22e944b9ecbf0bae1d5521c1a715e86457ac06282c724854f34bd08edfba078");
    hash_frozen(&other, second);
    assert_string_not_equal(text, second);
    lora_release(&a);
    lora_release(&again);
    lora_release(&other);
}

static void same_streams_give_same_bits_whatever_the_micro_batches(void **state)
{
    struct dataset *data = records(20, false);
    struct lora shape = lora_of(TEXT);
    struct trainer_options o = private_options(data, &shape);
    struct lora first = train_with(&o, data, 1, 0), second = train_with(&o, data, 1, 0),
                other = train_with(&o, data, 2, 0);
    const size_t bytes = first.trained_count * sizeof *first.trained;
    (void)state;
    assert_true(norm_of(&first) > 0);
    assert_memory_equal(first.trained, second.trained, bytes);
    assert_true(memcmp(first.trained, other.trained, bytes) != 0);
    static const int32_t sizes[] = {128, 200, 333, 2048};
    for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
        o.tokens_max = sizes[i];
        struct lora l = train_with(&o, data, 1, 0);
        assert_memory_equal(first.trained, l.trained, bytes);
        lora_release(&l);
    }
    lora_release(&first);
    lora_release(&second);
    lora_release(&other);
    lora_release(&shape);
    dataset_free(data);
}

static void an_empty_sample_is_noise_of_the_planned_variance(void **state)
{
    struct dataset *data = records(6, false);
    struct lora shape = lora_of(TEXT);
    struct trainer_options o = private_options(data, &shape);
    double sum = 0, squares = 0;
    size_t n = 0;
    (void)state;
    o.plan.q = 1e-12; /* nobody is ever drawn */
    o.plan.z = 3;
    o.plan.steps_per_round = 1;
    for (uint8_t seed = 1; seed <= 10; seed++) {
        struct lora l = train_with(&o, data, seed, 0);
        for (size_t i = 0; i < l.trained_count; i++, n++) {
            /* In units of σ: lr 1, and the gradient is noise / (g·q·N). */
            const double noise = (double)l.trained[i] * dp_plan_grid(&o.plan) * dp_plan_denominator(&o.plan) /
                                 sqrt((double)dp_plan_variance(&o.plan));
            sum += noise;
            squares += noise * noise;
        }
        lora_release(&l);
    }
    assert_int_equal(n, 10 * shape.trained_count);
    /* 7680 draws: the mean's deviation is 0.0114, the variance's 0.0161; five of them. */
    assert_true(fabs(sum / (double)n) < 0.057);
    assert_true(fabs(squares / (double)n - 1) < 0.081);
    lora_release(&shape);
    dataset_free(data);
}

/* One round with a fixed stream; trainers that did other rounds before must not differ from a fresh one. */
static void one_round(struct trainer *t, struct lora *lora, uint8_t seed)
{
    const uint8_t key[RANDOM_SEED_SIZE] = {seed, 9};
    struct random_stream stream;
    struct error err = {0};
    random_stream_init(&stream, key, "tests/turns");
    const struct rng rng = random_stream_rng(&stream);
    if (trainer_round(t, lora, 0, &rng, NULL, &err) < 0)
        fail_msg("%s", err.message);
    random_stream_release(&stream);
}

static void copy_factors(struct lora *to, const struct lora *from)
{
    assert_int_equal(to->config.mode, from->config.mode);
    memcpy(to->trained, from->trained, from->trained_count * sizeof *from->trained);
    memcpy(to->frozen, from->frozen, from->frozen_count * sizeof *from->frozen);
}

/* Four rounds, B, A, B, A, by one trainer, each compared with a fresh trainer of that one factor. Both lengths occur as
 * the longer one: A of q, v is longer than B, and B of up is longer than A. */
static void turns_are_rounds_of_one_factor(const char *text, bool with_noise, enum optimizer_kind kind)
{
    struct dataset *data = records(16, false);
    struct lora turns = lora_of(text);
    const size_t longer = turns.trained_count > turns.frozen_count ? turns.trained_count : turns.frozen_count;
    struct trainer_options o = with_noise ? private_options(data, &turns) : plain(data);
    struct trainer *t;
    struct error err = {0};
    if (kind == OPTIMIZER_ADAMW)
        o.optimizer = (struct optimizer_config){
            .kind = OPTIMIZER_ADAMW, .lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.99f, .eps = 1e-8f};
    else
        o.optimizer.momentum = 0.5f;
    o.plan.steps_per_round = 2;
    o.plan.dimensions = longer;
    o.alternating = true;
    if (trainer_new(&o, &tiny.site.model, &turns, data, &t, &err) < 0)
        fail_msg("%s", err.message);
    o.alternating = false;
    for (uint8_t round = 1; round <= 4; round++) {
        struct lora alone = lora_of(text);
        struct trainer *fresh;
        float *before = malloc(longer * sizeof *before);
        assert_non_null(before);
        if (round > 1)
            lora_exchange(&turns);
        if (turns.config.mode == LORA_FFB)
            lora_exchange(&alone);
        assert_int_equal(turns.config.mode, round % 2 ? LORA_FFA : LORA_FFB);
        copy_factors(&alone, &turns);
        memcpy(before, turns.trained, turns.trained_count * sizeof *before);
        if (trainer_new(&o, &tiny.site.model, &alone, data, &fresh, &err) < 0)
            fail_msg("%s", err.message);
        one_round(fresh, &alone, round);
        const long allocated = atomic_load(&allocations);
        one_round(t, &turns, round);
        assert_int_equal(atomic_load(&allocations), allocated);
        assert_memory_equal(turns.trained, alone.trained, alone.trained_count * sizeof(float));
        assert_memory_equal(turns.frozen, alone.frozen, alone.frozen_count * sizeof(float));
        assert_true(memcmp(turns.trained, before, turns.trained_count * sizeof *before) != 0);
        free(before);
        trainer_free(fresh);
        lora_release(&alone);
    }
    trainer_free(t);
    lora_release(&turns);
    dataset_free(data);
}

static void factors_are_trained_in_turn(void **state)
{
    static const char *const texts[] = {TURNS, "layers=0-1;targets=up;rank=4;alpha=16;scaling=rank;mode=alternating;"
                                               "seed=" SEED};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(texts); i++)
        for (int noise = 0; noise < 2; noise++) {
            turns_are_rounds_of_one_factor(texts[i], noise, OPTIMIZER_ADAMW);
            turns_are_rounds_of_one_factor(texts[i], noise, OPTIMIZER_SGD);
        }
}

/* Of plain SGD with rate 1 a step's change is the gradient: A's turn must move A as training both together would, and
 * leave B. */
static void the_turn_of_a_follows_its_gradient(void **state)
{
    struct dataset *data = records(12, false);
    struct trainer_options o = plain(data);
    struct lora joint = lora_of(JOINT), turns = lora_of(TURNS);
    const size_t a = turns.frozen_count, b = turns.trained_count;
    struct trainer *t;
    struct error err = {0};
    (void)state;
    assert_int_equal(joint.trained_count, a + b);
    for (size_t i = 0; i < b; i++)
        turns.trained[i] = joint.trained[a + i] = (float)((int)(i % 13) - 6) / 64;
    assert_memory_equal(joint.trained, turns.frozen, a * sizeof(float));
    assert_int_equal(trainer_new(&o, &tiny.site.model, &joint, data, &t, &err), 0);
    one_round(t, &joint, 1);
    trainer_free(t);
    o.alternating = true;
    assert_int_equal(trainer_new(&o, &tiny.site.model, &turns, data, &t, &err), 0);
    lora_exchange(&turns);
    one_round(t, &turns, 1);
    trainer_free(t);
    assert_memory_equal(turns.trained, joint.trained, a * sizeof(float));
    for (size_t i = 0; i < b; i++)
        assert_true(turns.frozen[i] == (float)((int)(i % 13) - 6) / 64);
    lora_release(&joint);
    lora_release(&turns);
    dataset_free(data);
}

static void the_denominator_is_the_declared_one(void **state)
{
    struct dataset *data = records(8, false);
    struct trainer_options o = plain(data);
    struct lora once = train_with(&o, data, 1, 0), half;
    (void)state;
    o.plan.units *= 2; /* the site declared twice as many records as the file has */
    half = train_with(&o, data, 1, 0);
    assert_true(norm_of(&once) > 0);
    for (size_t i = 0; i < once.trained_count; i++)
        assert_true(once.trained[i] == 2 * half.trained[i]);
    lora_release(&half);
    /* The learning rate falls over the job's steps: step 1 of 2 with decay 1 has half of it. */
    o = plain(data);
    o.decay = 1;
    o.plan.rounds = 2;
    half = train_with(&o, data, 1, 1);
    for (size_t i = 0; i < once.trained_count; i++)
        assert_true(once.trained[i] == 2 * half.trained[i]);
    lora_release(&half);
    lora_release(&once);
    dataset_free(data);
}

static void clipping_bounds_what_a_record_can_do(void **state)
{
    struct dataset *one = records(1, false), *data = records(9, false);
    struct trainer_options o = plain(one);
    struct lora free_ = train_with(&o, one, 1, 0), clipped, noised;
    const double natural = norm_of(&free_), bound = natural / 4;
    (void)state;
    o.plan.clip = bound;
    clipped = train_with(&o, one, 1, 0);
    assert_true(fabs(norm_of(&clipped) - bound) < 1e-5 * bound);
    for (size_t i = 0; i < free_.trained_count; i++) /* the direction stays */
        assert_true(fabs((double)clipped.trained[i] - (double)free_.trained[i] / 4) < 1e-6 * natural);
    lora_release(&clipped);
    o.plan.clip = natural * 2; /* not reached: nothing changes */
    clipped = train_with(&o, one, 1, 0);
    assert_memory_equal(clipped.trained, free_.trained, free_.trained_count * sizeof(float));
    lora_release(&clipped);

    /* On the integer grid with hardly any noise the private path must agree with the plain one. */
    o = plain(data);
    o.plan.clip = bound;
    clipped = train_with(&o, data, 1, 0);
    o = private_options(data, &free_);
    o.plan.q = 1;
    o.plan.z = 1e-6;
    o.plan.clip = bound;
    o.plan.steps_per_round = 1;
    noised = train_with(&o, data, 1, 0);
    for (size_t i = 0; i < clipped.trained_count; i++)
        if (fabs((double)clipped.trained[i] - (double)noised.trained[i]) > 1e-4 * bound)
            fail_msg("%zu: %g and %g, bound %g", i, (double)clipped.trained[i], (double)noised.trained[i], bound);
    lora_release(&clipped);
    lora_release(&noised);
    lora_release(&free_);
    dataset_free(one);
    dataset_free(data);
}

static bool stop_in_second_step(void *ctx, uint32_t step, uint32_t steps, uint32_t done, uint32_t sampled)
{
    uint32_t *seen = ctx;
    assert_true(step < steps && done <= sampled);
    (*seen)++;
    return step == 1;
}

static void training_can_be_stopped(void **state)
{
    struct dataset *data = records(20, false);
    struct lora lora = lora_of(TEXT);
    struct trainer_options o = private_options(data, &lora);
    uint32_t seen = 0;
    struct trainer_progress progress = {stop_in_second_step, &seen};
    struct trainer *t;
    struct error err = {0};
    (void)state;
    o.plan.q = 1;
    assert_int_equal(trainer_new(&o, &tiny.site.model, &lora, data, &t, &err), 0);
    assert_int_equal(trainer_round(t, &lora, 0, &random_system, &progress, &err), ERR_AGAIN);
    assert_true(seen >= 2);
    trainer_free(t);
    lora_release(&lora);
    dataset_free(data);
}

/* --- evaluate ----------------------------------------------------------------------------------------------------- */

/* log p of an answer, one token at a time from an empty cache. */
static double slow_score(struct infer *infer, const struct lora *lora, const struct dataset *data, size_t record,
                         const struct dataset_answer *answer)
{
    const int32_t vocabulary = tiny.site.model.config.vocabulary;
    float *logits = malloc(sizeof *logits * (size_t)vocabulary);
    struct batch_example example;
    struct kv_cache *cache;
    struct error err = {0};
    double total = 0;
    assert_non_null(logits);
    dataset_example(data, record, &example);
    assert_int_equal(kv_cache_new(backend, &tiny.site.model, 256, &cache, &err), 0);
    struct infer_extend item = {cache, example.ids, dataset_prompt_length(data, record)};
    assert_int_equal(infer_extend(infer, lora, &item, 1, &err), 0);
    for (int32_t i = 0; i < answer->count; i++) {
        double most = -INFINITY, sum = 0;
        assert_int_equal(infer_logits(infer, cache, logits, &err), 0);
        for (int32_t v = 0; v < vocabulary; v++)
            most = logits[v] > most ? logits[v] : most;
        for (int32_t v = 0; v < vocabulary; v++)
            sum += exp((double)logits[v] - most);
        total += (double)logits[answer->ids[i]] - most - log(sum);
        item = (struct infer_extend){cache, answer->ids + i, 1};
        assert_int_equal(infer_extend(infer, lora, &item, 1, &err), 0);
    }
    kv_cache_free(cache);
    free(logits);
    return total / answer->count;
}

static struct evaluate_options evaluation(void)
{
    return (struct evaluate_options){.backend = backend, .answer_tokens_max = 6};
}

static void scores_are_the_direct_ones(const struct lora *lora)
{
    struct dataset *data = records(21, false);
    struct evaluate_options o = evaluation();
    struct infer_options infer_options = {
        .backend = backend, .rows_max = 256, .context_max = 256, .rank_max = lora ? lora->config.rank : 0};
    struct evaluate_result r;
    struct infer *infer;
    struct error err = {0};
    size_t correct = 0;
    double nll = 0;
    if (evaluate(&o, &tiny.site.model, tiny.site.tokenizer, lora, data, &r, &err) < 0 ||
        infer_new(&infer_options, &tiny.site.model, &infer, &err) < 0)
        fail_msg("%s", err.message);
    for (size_t i = 0; i < dataset_count(data); i++) {
        double best = -INFINITY;
        int32_t chosen = -1;
        for (size_t a = 0; a < dataset_answer_count(data); a++) {
            const double score = slow_score(infer, lora, data, i, dataset_answer_at(data, a));
            if (score > best) {
                best = score;
                chosen = (int32_t)a;
            }
            if ((int32_t)a == dataset_answer_of(data, i))
                nll -= score;
        }
        correct += chosen == dataset_answer_of(data, i);
    }
    assert_int_equal(r.records, 21);
    assert_int_equal(r.answers, 3);
    assert_int_equal(r.majority, 7);
    assert_int_equal(r.correct, correct);
    assert_true(fabs(r.mean_nll - nll / 21) < 1e-4);
    infer_free(infer);
    dataset_free(data);
}

static void evaluation_scores_the_base_model(void **state)
{
    (void)state;
    scores_are_the_direct_ones(NULL);
}

static void evaluation_scores_an_adapter(void **state)
{
    struct served_adapter *adapter = tiny_adapter(&tiny, 1);
    (void)state;
    scores_are_the_direct_ones(&adapter->lora);
    served_adapter_drop(adapter);
}

static void a_subset_is_spread_over_the_file(void **state)
{
    struct dataset *data = records(21, false); /* answers go round: alpha, beta, gamma */
    struct evaluate_options o = evaluation();
    struct evaluate_result r;
    struct error err = {0};
    (void)state;
    o.records_max = 7; /* every third record: alpha only */
    assert_int_equal(evaluate(&o, &tiny.site.model, tiny.site.tokenizer, NULL, data, &r, &err), 0);
    assert_int_equal(r.records, 7);
    assert_int_equal(r.majority, 7);
    assert_int_equal(r.answers, 3);
    o.records_max = 500;
    assert_int_equal(evaluate(&o, &tiny.site.model, tiny.site.tokenizer, NULL, data, &r, &err), 0);
    assert_int_equal(r.records, 21);
    dataset_free(data);
}

static void with_many_answers_the_greedy_one_is_compared(void **state)
{
    struct dataset *data = records(40, true); /* 40 distinct answers are too many to list */
    struct evaluate_options o = evaluation();
    struct evaluate_result r;
    struct error err = {0};
    (void)state;
    o.records_max = 6;
    assert_int_equal(evaluate(&o, &tiny.site.model, tiny.site.tokenizer, NULL, data, &r, &err), 0);
    assert_int_equal(r.answers, 0);
    assert_int_equal(r.majority, 1);
    assert_int_equal(r.correct, 0); /* a random model does not say "item 7" */
    assert_true(r.mean_nll == 0);
    dataset_free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(malformed_texts_are_refused),
        cmocka_unit_test(frozen_factors_are_known),
        cmocka_unit_test(a_state_becomes_an_adapter),
        cmocka_unit_test(same_streams_give_same_bits_whatever_the_micro_batches),
        cmocka_unit_test(an_empty_sample_is_noise_of_the_planned_variance),
        cmocka_unit_test(factors_are_trained_in_turn),
        cmocka_unit_test(the_turn_of_a_follows_its_gradient),
        cmocka_unit_test(the_denominator_is_the_declared_one),
        cmocka_unit_test(clipping_bounds_what_a_record_can_do),
        cmocka_unit_test(training_can_be_stopped),
        cmocka_unit_test(evaluation_scores_the_base_model),
        cmocka_unit_test(evaluation_scores_an_adapter),
        cmocka_unit_test(a_subset_is_spread_over_the_file),
        cmocka_unit_test(with_many_answers_the_greedy_one_is_compared),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
