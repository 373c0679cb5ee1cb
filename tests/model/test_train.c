/* The training step: finite differences, independence of batchmates, sums, no allocation, empty batches. */
#include "model/train.h"
#include "tests/allocations.h"
#include "tests/check.h"
#include "tests/model/tiny.h"

/* --- a small set-up ----------------------------------------------------------------------------------------------- */

#define TOKENS 96
#define EXAMPLES 6

struct setup {
    struct tiny tiny;
    struct lora lora;
    struct batch batch;
    struct train *train;
    struct backend *backend;
};

static const struct lora_config joint_all = {
    .mode = LORA_JOINT, .rank = 4, .alpha = 8, .layer_first = 0, .targets = LORA_TARGETS_ALL};
static const struct lora_config ffa_qv = {.mode = LORA_FFA,
                                          .rank = 8,
                                          .alpha = 16,
                                          .layer_first = 1,
                                          .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V)};

/* A model with every part that an architecture may have. */
static const struct model_config *everything(void)
{
    static struct model_config config;
    config = TINY_CONFIG;
    config.rotated = 8;
    config.window = 5;
    config.window_period = 2;
    config.rope_base_sliding = 1000;
    config.attention_scale = 0.2;
    config.embedding_scale = 2;
    config.gate = GATE_GELU_TANH;
    config.qkv_bias = config.qk_norm = config.post_norms = config.fused_gate_up = true;
    return &config;
}

static void setup_init_of(struct setup *s, const struct model_config *config, const struct lora_config *lora,
                          struct pool *pool, enum kernel_precision precision, struct train_options options)
{
    struct error err = {0};
    tiny_init(&s->tiny, config, true);
    tiny_lora(&s->lora, lora, &s->tiny.model);
    options.tokens_max = TOKENS;
    options.examples_max = EXAMPLES;
    options.example_tokens_max = 32;
    options.backend = s->backend = tiny_backend(KERNEL_AVX512_BF16, pool, precision);
    if (batch_init(&s->batch, TOKENS, EXAMPLES, &err) < 0 ||
        train_new(&options, &s->tiny.model, &s->lora, &s->train, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    batch_clear(&s->batch);
}

static void setup_init(struct setup *s, const struct lora_config *lora, struct pool *pool,
                       enum kernel_precision precision, struct train_options options)
{
    const struct model_config config = TINY_CONFIG;
    setup_init_of(s, &config, lora, pool, precision, options);
}

static void setup_release(struct setup *s)
{
    train_free(s->train);
    backend_free(s->backend);
    batch_release(&s->batch);
    lora_release(&s->lora);
    tiny_release(&s->tiny);
}

/* Example number `seed`: 5 to 16 tokens, the last `labels` of them learnt. */
static void add_example(struct batch *batch, uint32_t seed, int32_t labels)
{
    int32_t ids[32], length = 5 + (int32_t)(seed * 7 % 12);
    uint8_t learn[32] = {0};
    float values[32];
    tiny_values(5000 + seed, 32, 63.0f, 64.0f, values);
    for (int32_t i = 0; i < length; i++) {
        ids[i] = (int32_t)values[i];
        learn[i] = i >= length - labels;
    }
    CHECK(batch_add(batch, &(struct batch_example){ids, learn, length}));
}

/* --- tests -------------------------------------------------------------------------------------------------------- */

/* (loss(p + h·v) − loss(p − h·v))/2h against gradient·v for a few random directions v per factor. */
static void check_finite_differences(const struct model_config *model, const struct lora_config *config)
{
    struct setup s;
    setup_init_of(&s, model, config, NULL, KERNEL_F32, (struct train_options){.per_example = true});
    for (uint32_t e = 0; e < 3; e++)
        add_example(&s.batch, e, 3 + (int32_t)e);
    const size_t n = s.lora.trained_count;
    float *point = malloc(n * sizeof *point), *direction = malloc(n * sizeof *direction);
    float *gradient = malloc(n * sizeof *gradient);
    memcpy(point, s.lora.trained, n * sizeof *point);
    for (int32_t e = 0; e < 3; e++) {
        train_run(s.train, &s.lora, &s.batch);
        memcpy(gradient, train_gradient(s.train, e), n * sizeof *gradient);
        for (uint32_t trial = 0; trial < 4; trial++) {
            const double h =
                1.0 / 128; /* a third of the tolerance is the losses' rounding; it doubles with half of h */
            double slope = 0, losses[2], size = 0;
            tiny_values(7000 + trial, n, 0.125f, 0, direction);
            for (size_t i = 0; i < n; i++) {
                slope += (double)gradient[i] * direction[i];
                size += (double)gradient[i] * gradient[i];
            }
            for (int side = 0; side < 2; side++) {
                for (size_t i = 0; i < n; i++)
                    s.lora.trained[i] = point[i] + (float)(side ? -h : h) * direction[i];
                train_evaluate(s.train, &s.lora, &s.batch);
                losses[side] = train_loss(s.train, e);
            }
            memcpy(s.lora.trained, point, n * sizeof *point);
            CHECK(size > 0);
            CHECK_NEAR((losses[0] - losses[1]) / (2 * h) / sqrt(size), slope / sqrt(size), 2e-3);
        }
    }
    free(gradient);
    free(direction);
    free(point);
    setup_release(&s);
}

static void test_gradients_are_slopes(void)
{
    const struct model_config llama = TINY_CONFIG;
    check_finite_differences(&llama, &joint_all);
    check_finite_differences(&llama, &ffa_qv);
    check_finite_differences(everything(), &joint_all);
    for (int target = 0; target < LORA_TARGET_COUNT; target++) { /* each as the lowest adapted one */
        struct lora_config config = {
            .mode = LORA_JOINT, .rank = 3, .alpha = 3, .layer_first = 1, .layer_count = 1, .targets = 1u << target};
        check_finite_differences(&llama, &config);
        if (target != LORA_GATE) /* it is a part of up there */
            check_finite_differences(everything(), &config);
    }
}

/* Each factor's gradient alone has the bits that it has beside the other's, from one trainer that takes both in turn.
 */
static void check_halves(const struct model_config *model, const struct lora_config *config)
{
    struct setup joint, turns;
    struct lora_config half = *config;
    half.mode = LORA_FFA;
    setup_init_of(&joint, model, config, NULL, KERNEL_F32, (struct train_options){.per_example = true});
    setup_init_of(&turns, model, &half, NULL, KERNEL_F32,
                  (struct train_options){.per_example = true, .alternating = true});
    for (uint32_t e = 0; e < 3; e++) {
        add_example(&joint.batch, e, 3);
        add_example(&turns.batch, e, 3);
    }
    const size_t b_count = turns.lora.trained_count, a_count = turns.lora.frozen_count;
    CHECK(joint.lora.trained_count == a_count + b_count);
    train_run(joint.train, &joint.lora, &joint.batch);
    for (int turn = 0; turn < 4; turn++) {
        train_run(turns.train, &turns.lora, &turns.batch);
        for (int32_t e = 0; e < 3; e++) {
            const float *whole = train_gradient(joint.train, e), *part = train_gradient(turns.train, e);
            CHECK(train_loss(turns.train, e) == train_loss(joint.train, e));
            if (turns.lora.config.mode == LORA_FFA)
                CHECK(memcmp(part, whole + a_count, b_count * sizeof *part) == 0);
            else
                CHECK(memcmp(part, whole, a_count * sizeof *part) == 0);
        }
        lora_exchange(&turns.lora);
    }
    setup_release(&joint);
    setup_release(&turns);
}

static void test_factors_in_turn(void)
{
    const struct model_config llama = TINY_CONFIG;
    check_halves(&llama, &joint_all);
    check_halves(everything(), &joint_all);
    for (int target = 0; target < LORA_TARGET_COUNT; target++) {
        struct lora_config config = {
            .mode = LORA_JOINT, .rank = 3, .alpha = 3, .layer_first = 1, .layer_count = 1, .targets = 1u << target};
        check_halves(&llama, &config);
    }
}

/* Neither on the batchmates nor on what is kept for the backward pass. */
static void check_batchmates(const struct model_config *model, const struct lora_config *config,
                             enum kernel_precision precision, int level)
{
    struct setup alone, crowd;
    struct pool *pool = NULL;
    struct error err = {0};
    CHECK(pool_new(3, &pool, &err) == 0);
    setup_init_of(&alone, model, config, NULL, precision, (struct train_options){.per_example = true});
    setup_init_of(&crowd, model, config, pool, precision,
                  (struct train_options){.per_example = true, .checkpoint_level = level});
    const size_t bytes = alone.lora.trained_count * sizeof(float);
    for (int32_t place = 0; place < EXAMPLES; place++) {
        batch_clear(&alone.batch);
        add_example(&alone.batch, 3, 4);
        train_run(alone.train, &alone.lora, &alone.batch);
        batch_clear(&crowd.batch);
        for (int32_t e = 0; e < EXAMPLES; e++) { /* other mates and other label counts at each place */
            if (e == place)
                add_example(&crowd.batch, 3, 4);
            else
                add_example(&crowd.batch, (uint32_t)(10 + 17 * place + e), (e + place) % 4);
        }
        train_run(crowd.train, &crowd.lora, &crowd.batch);
        CHECK(train_loss(crowd.train, place) == train_loss(alone.train, 0));
        CHECK(memcmp(train_gradient(crowd.train, place), train_gradient(alone.train, 0), bytes) == 0);
    }
    setup_release(&alone);
    setup_release(&crowd);
    pool_free(pool);
}

static void test_bits_do_not_depend_on_batchmates(void)
{
    const struct model_config llama = TINY_CONFIG;
    for (int level = 0; level <= 2; level++) {
        check_batchmates(everything(), &joint_all, KERNEL_F32, level);
        check_batchmates(everything(), &ffa_qv, KERNEL_BF16, level);
        check_batchmates(&llama, &joint_all, KERNEL_F32, level);
        check_batchmates(&llama, &ffa_qv, KERNEL_F32, level);
        check_batchmates(&llama, &ffa_qv, KERNEL_BF16, level);
        check_batchmates(&llama, &joint_all, KERNEL_BF16, level);
    }
}

static void test_summed_gradient(void)
{
    struct setup each, sum;
    setup_init(&each, &joint_all, NULL, KERNEL_F32, (struct train_options){.per_example = true});
    setup_init(&sum, &joint_all, NULL, KERNEL_F32, (struct train_options){.per_example = false});
    for (uint32_t e = 0; e < 5; e++) {
        add_example(&each.batch, e, 1 + (int32_t)e % 3);
        add_example(&sum.batch, e, 1 + (int32_t)e % 3);
    }
    train_run(each.train, &each.lora, &each.batch);
    train_run(sum.train, &sum.lora, &sum.batch);
    for (size_t i = 0; i < each.lora.trained_count; i++) {
        double total = 0;
        for (int32_t e = 0; e < 5; e++)
            total += train_gradient(each.train, e)[i];
        CHECK_NEAR(train_gradient(sum.train, 0)[i], total, 1e-4);
    }
    setup_release(&each);
    setup_release(&sum);
}

static void test_a_step_allocates_nothing(void)
{
    struct setup s;
    struct pool *pool = NULL;
    struct error err = {0};
    CHECK(pool_new(2, &pool, &err) == 0);
    setup_init(&s, &joint_all, pool, KERNEL_BF16, (struct train_options){.per_example = true});
    const long before = atomic_load(&allocations);
    CHECK(before > 0); /* the counters are linked in */
    for (uint32_t step = 0; step < 3; step++) {
        batch_clear(&s.batch);
        for (uint32_t e = 0; e < EXAMPLES; e++)
            add_example(&s.batch, step * 10 + e, 2);
        train_run(s.train, &s.lora, &s.batch);
        train_evaluate(s.train, NULL, &s.batch);
    }
    CHECK(atomic_load(&allocations) == before);
    setup_release(&s);
    pool_free(pool);
}

static void test_empty_batches_and_examples_without_labels(void)
{
    struct setup s;
    setup_init(&s, &joint_all, NULL, KERNEL_F32, (struct train_options){.per_example = true});
    train_run(s.train, &s.lora, &s.batch); /* Poisson sampling may draw nobody */
    add_example(&s.batch, 1, 2);
    train_run(s.train, &s.lora, &s.batch);
    CHECK(train_loss(s.train, 0) > 0);
    batch_clear(&s.batch);
    add_example(&s.batch, 1, 0);
    train_run(s.train, &s.lora, &s.batch);
    CHECK(train_loss(s.train, 0) == 0);
    add_example(&s.batch, 2, 3);
    train_run(s.train, &s.lora, &s.batch);
    double first = 0, second = 0;
    for (size_t i = 0; i < s.lora.trained_count; i++) {
        first += fabs((double)train_gradient(s.train, 0)[i]);
        second += fabs((double)train_gradient(s.train, 1)[i]);
    }
    CHECK(first == 0 && second > 0 && train_loss(s.train, 0) == 0 && train_loss(s.train, 1) > 0);
    setup_release(&s);
}

static void test_impossible_limits(void)
{
    struct setup s;
    struct error err = {0};
    struct train *train = NULL;
    setup_init(&s, &joint_all, NULL, KERNEL_F32, (struct train_options){.per_example = true});
    struct train_options bad[] = {
        {.tokens_max = 0, .examples_max = 1, .example_tokens_max = 1},
        {.tokens_max = 8, .examples_max = 9, .example_tokens_max = 8},
        {.tokens_max = 8, .examples_max = 1, .example_tokens_max = 9},
        {.tokens_max = 128, .examples_max = 1, .example_tokens_max = 65}, /* beyond the context */
        {.tokens_max = 8, .examples_max = 1, .example_tokens_max = 8, .checkpoint_level = 3},
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        bad[i].backend = s.backend;
        CHECK(train_new(&bad[i], &s.tiny.model, &s.lora, &train, &err) == ERR_CONFIG && !train && err.message[0]);
    }
    setup_release(&s);
}

int main(void)
{
    RUN(test_gradients_are_slopes);
    RUN(test_factors_in_turn);
    RUN(test_bits_do_not_depend_on_batchmates);
    RUN(test_summed_gradient);
    RUN(test_a_step_allocates_nothing);
    RUN(test_empty_batches_and_examples_without_labels);
    RUN(test_impossible_limits);
    return check_report();
}
