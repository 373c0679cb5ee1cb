/*
 * A site's whole training round on the CUDA backend: the same records, sampling and noise as on the CPU, smaller
 * micro-batches where the device's memory is short, and a step that is stopped half way.
 */
#include "crypto/random.h"
#include "node/train/adapter_config.h"
#include "node/train/trainer.h"
#include "tests/node/tiny_site.h"

#include <math.h>

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define SEED "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
#define EXAMPLE_TOKENS 64 /* the longest record has 52 */
#define TEXT "layers=0-1;targets=q,v,down;rank=4;alpha=16;scaling=rank;mode=ffa;seed=" SEED

#ifdef CUDA_SHIM
#define SHIM true
#else
#define SHIM false
#endif

static struct tiny_site tiny;
static struct dataset *data;

static struct backend *card(size_t limit)
{
    const struct backend_cuda_options options = {.precision = KERNEL_F32, .memory_limit_bytes = limit};
    struct backend *backend = NULL;
    struct error err = {0};
    const int rc = backend_cuda_new(&options, &backend, &err);
    if (rc == ERR_NOT_FOUND && !SHIM) {
        fprintf(stderr, "skipped: %s\n", err.message);
        exit(77);
    }
    if (rc < 0)
        fail_msg("%s", err.message);
    return backend;
}

static struct dataset *records(size_t count)
{
    struct dataset_options options = {
        .tokenizer = tiny.site.tokenizer, .chat = {.system = CHAT_SYSTEM_NONE}, .tokens_max = EXAMPLE_TOKENS};
    struct dataset *set;
    struct error err = {0};
    struct buffer text;
    buffer_init(&text, 1 << 20);
    for (size_t i = 0; i < count; i++)
        buffer_printf(&text,
                      "{\"messages\":[{\"role\":\"user\",\"content\":\"case %zu %s\"},"
                      "{\"role\":\"assistant\",\"content\":\"%s\"}]}\n",
                      i, i % 2 ? "with a longer description of what was seen" : "short", i % 3 ? "yes" : "rather not");
    if (dataset_parse(buffer_span(&text), "test", &options, &set, &err) < 0)
        fail_msg("%s", err.message);
    buffer_release(&text);
    return set;
}

static int set_up(void **state)
{
    (void)state;
    tiny_site_open(&tiny, NULL, NULL);
    data = records(12);
    backend_free(card(0)); /* says so and ends here where there is none */
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    dataset_free(data);
    tiny_site_release(&tiny);
    return 0;
}

static struct lora fresh_lora(void)
{
    struct adapter_config config;
    struct error err = {0};
    struct lora lora = {0};
    if (adapter_config_parse(span_str(TEXT), &config, &err) < 0 ||
        adapter_config_build(&config, &tiny.site.model.config, &lora, &err) < 0)
        fail_msg("%s", err.message);
    return lora;
}

static struct trainer_options private_options(struct backend *backend, const struct lora *lora, int32_t tokens_max)
{
    return (struct trainer_options){.backend = backend,
                                    .threads = 2,
                                    .tokens_max = tokens_max,
                                    .example_tokens_max = EXAMPLE_TOKENS,
                                    .optimizer = {.kind = OPTIMIZER_SGD, .lr = 1},
                                    .plan = {.mode = DP_RECORD,
                                             .neighbour = DP_ADD_REMOVE,
                                             .unit = "record",
                                             .q = 0.5,
                                             .z = 1,
                                             .clip = 0.5,
                                             .grid_clip = DP_GRID_CLIP,
                                             .steps_per_round = 2,
                                             .rounds = 2,
                                             .delta = 1e-5,
                                             .epsilon = 100,
                                             .units = dataset_count(data),
                                             .dimensions = lora->trained_count}};
}

static int round_of(struct trainer *t, struct lora *lora, const struct trainer_progress *progress, struct error *err)
{
    const uint8_t key[RANDOM_SEED_SIZE] = {9, 3};
    struct random_stream stream;
    random_stream_init(&stream, key, "tests/trainer");
    const struct rng rng = random_stream_rng(&stream);
    int rc = trainer_round(t, lora, 0, &rng, progress, err);
    random_stream_release(&stream);
    return rc;
}

/* 0, or what trainer_new said. */
static int train_on(struct backend *backend, int32_t tokens_max, struct lora *ret_lora, int32_t *ret_tokens,
                    struct error *err)
{
    struct lora lora = fresh_lora();
    const struct trainer_options options = private_options(backend, &lora, tokens_max);
    struct trainer *t = NULL;
    int rc = trainer_new(&options, &tiny.site.model, &lora, data, &t, err);
    if (rc < 0) {
        lora_release(&lora);
        return rc;
    }
    *ret_tokens = trainer_tokens_max(t);
    if (round_of(t, &lora, NULL, err) < 0)
        fail_msg("%s", err->message);
    trainer_free(t);
    *ret_lora = lora;
    return 0;
}

static double distance(const struct lora *a, const struct lora *b)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a->trained_count; i++) {
        const double d = (double)a->trained[i] - (double)b->trained[i];
        difference += d * d;
        norm += (double)b->trained[i] * (double)b->trained[i];
    }
    return sqrt(difference / norm);
}

/* Sampling and noise are the CPU's to the bit, so the two rounds differ by rounding alone; with other noise they would
 * differ by about their own size. */
static void a_private_round_is_the_cpus(void **state)
{
    struct error err = {0};
    struct lora want, got;
    int32_t tokens;
    struct backend *cpu, *cuda = card(0);
    (void)state;
    assert_int_equal(backend_cpu_new(tiny.site.ops, tiny.site.pool, KERNEL_F32, &cpu, &err), 0);
    assert_int_equal(train_on(cpu, 128, &want, &tokens, &err), 0);
    assert_int_equal(train_on(cuda, 128, &got, &tokens, &err), 0);
    assert_int_equal(tokens, 128);
    if (!(distance(&got, &want) < 1e-3))
        fail_msg("the rounds are %g apart", distance(&got, &want));
    lora_release(&want);
    lora_release(&got);
    backend_free(cuda);
    backend_free(cpu);
}

/* Three rounds, B, A, B, by one trainer: each as a fresh trainer of that factor makes it, from the same start. */
static void factors_take_turns(void **state)
{
    struct error err = {0};
    struct backend *cuda = card(0), *other = card(0);
    struct lora turns = fresh_lora();
    struct trainer_options options = private_options(cuda, &turns, EXAMPLE_TOKENS);
    struct trainer *t = NULL;
    (void)state;
    assert_true(turns.frozen_count != turns.trained_count);
    options.alternating = true;
    assert_int_equal(trainer_new(&options, &tiny.site.model, &turns, data, &t, &err), 0);
    for (int round = 1; round <= 3; round++) {
        struct lora alone = fresh_lora();
        struct trainer *fresh = NULL;
        if (round > 1)
            lora_exchange(&turns);
        if (alone.config.mode != turns.config.mode)
            lora_exchange(&alone);
        memcpy(alone.trained, turns.trained, turns.trained_count * sizeof *turns.trained);
        memcpy(alone.frozen, turns.frozen, turns.frozen_count * sizeof *turns.frozen);
        options = private_options(other, &alone, EXAMPLE_TOKENS);
        assert_int_equal(trainer_new(&options, &tiny.site.model, &alone, data, &fresh, &err), 0);
        assert_int_equal(round_of(fresh, &alone, NULL, &err), 0);
        assert_int_equal(round_of(t, &turns, NULL, &err), 0);
        assert_memory_equal(turns.trained, alone.trained, alone.trained_count * sizeof *alone.trained);
        assert_memory_equal(turns.frozen, alone.frozen, alone.frozen_count * sizeof *alone.frozen);
        trainer_free(fresh);
        lora_release(&alone);
    }
    trainer_free(t);
    lora_release(&turns);
    backend_free(other);
    backend_free(cuda);
}

static void short_memory_makes_micro_batches_smaller_and_then_an_error(void **state)
{
    struct error err = {0};
    struct lora want;
    int32_t tokens;
    int refused = 0, squeezed = 0, roomy = 0;
    struct backend *all = card(0);
    (void)state;
    assert_int_equal(train_on(all, 512, &want, &tokens, &err), 0);
    backend_free(all);
    for (size_t limit = (size_t)1 << 20; limit <= (size_t)96 << 20; limit *= 3) {
        struct backend *cuda = card(limit);
        struct lora got;
        int rc = train_on(cuda, 512, &got, &tokens, &err);
        if (rc < 0) {
            assert_int_equal(rc, ERR_RESOURCES);
            assert_non_null(strstr(err.message, "MB"));
            refused++;
        } else {
            squeezed += tokens < 512;
            roomy += tokens == 512;
            assert_memory_equal(got.trained, want.trained, want.trained_count * sizeof *want.trained);
            lora_release(&got);
        }
        backend_free(cuda);
    }
    if (refused == 0 || squeezed == 0 || roomy == 0)
        fail_msg("%d refused, %d with smaller micro-batches, %d as asked", refused, squeezed, roomy);
    lora_release(&want);
}

static bool stop_at_once(void *ctx, uint32_t step, uint32_t steps, uint32_t done, uint32_t sampled)
{
    (void)step;
    (void)steps;
    (void)done;
    (void)sampled;
    return ++*(int *)ctx == 1;
}

/* Its noise has begun and is never added to anything: the next round is as if it had not been. */
static void a_stopped_step_leaves_nothing(void **state)
{
    struct error err = {0};
    struct backend *cuda = card(0);
    struct lora want, lora = fresh_lora();
    const struct trainer_options options = private_options(cuda, &lora, 128);
    struct trainer *t = NULL;
    int calls = 0;
    int32_t tokens;
    const struct trainer_progress progress = {stop_at_once, &calls};
    (void)state;
    assert_int_equal(train_on(cuda, 128, &want, &tokens, &err), 0);
    assert_int_equal(trainer_new(&options, &tiny.site.model, &lora, data, &t, &err), 0);
    assert_int_equal(round_of(t, &lora, &progress, &err), ERR_AGAIN);
    assert_int_equal(calls, 1);
    struct lora again = fresh_lora();
    assert_int_equal(round_of(t, &again, NULL, &err), 0);
    assert_memory_equal(again.trained, want.trained, want.trained_count * sizeof *want.trained);
    trainer_free(t);
    lora_release(&lora);
    lora_release(&again);
    lora_release(&want);
    backend_free(cuda);
}

#ifdef CUDA_SHIM /* of kernels/cuda/shim/shim.h, which is C++ */
void shim_fail_next_sync(int code);
void shim_products_backwards(int rows);

/* A library that sums in another order where rows are many: the trainer notices, takes the records one by one, and
 * releases what it does on a device without that habit. */
static void records_are_kept_apart_where_batchmates_matter(void **state)
{
    struct error err = {0};
    struct backend *cuda = card(0);
    struct lora want;
    int32_t tokens;
    (void)state;
    assert_int_equal(train_on(cuda, 128, &want, &tokens, &err), 0);
    for (int apart = 0; apart < 2; apart++) {
        for (int alternating = 0; alternating <= apart; alternating++) {
            struct lora lora = fresh_lora();
            struct trainer_options options = private_options(cuda, &lora, 128);
            struct trainer *t = NULL;
            options.alternating = alternating;
            shim_products_backwards(apart ? 100 : 0);
            assert_int_equal(trainer_new(&options, &tiny.site.model, &lora, data, &t, &err), 0);
            assert_int_equal(trainer_tokens_max(t), apart ? EXAMPLE_TOKENS : 128);
            assert_int_equal(round_of(t, &lora, NULL, &err), 0);
            assert_memory_equal(lora.trained, want.trained, want.trained_count * sizeof *want.trained);
            trainer_free(t);
            lora_release(&lora);
        }
    }
    struct lora lora = fresh_lora(); /* without DP nothing depends on it */
    struct trainer_options options = private_options(cuda, &lora, 128);
    struct trainer *t = NULL;
    options.plan.mode = DP_NONE;
    assert_int_equal(trainer_new(&options, &tiny.site.model, &lora, data, &t, &err), 0);
    assert_int_equal(trainer_tokens_max(t), 128);
    trainer_free(t);
    lora_release(&lora);
    shim_products_backwards(0);
    lora_release(&want);
    backend_free(cuda);
}

static bool fail_in_step_two(void *ctx, uint32_t step, uint32_t steps, uint32_t done, uint32_t sampled)
{
    (void)steps;
    (void)done;
    (void)sampled;
    (void)ctx;
    if (step == 1)
        shim_fail_next_sync(ERR_FAILED);
    return false;
}

/* The round ends with the device's error, the caller's factors are what they were, and the next round is whole. */
static void a_failing_device_fails_the_round(void **state)
{
    struct error err = {0};
    struct backend *cuda = card(0);
    struct lora want, lora = fresh_lora(), untouched = fresh_lora();
    const struct trainer_options options = private_options(cuda, &lora, 128);
    const struct trainer_progress progress = {fail_in_step_two, NULL};
    const size_t bytes = lora.trained_count * sizeof *lora.trained;
    struct trainer *t = NULL;
    int32_t tokens;
    (void)state;
    assert_int_equal(train_on(cuda, 128, &want, &tokens, &err), 0);
    assert_int_equal(trainer_new(&options, &tiny.site.model, &lora, data, &t, &err), 0);
    assert_int_equal(round_of(t, &lora, &progress, &err), ERR_FAILED);
    assert_memory_equal(lora.trained, untouched.trained, bytes);
    assert_int_equal(round_of(t, &lora, NULL, &err), 0);
    assert_memory_equal(lora.trained, want.trained, bytes);
    trainer_free(t);
    lora_release(&want);
    lora_release(&lora);
    lora_release(&untouched);
    backend_free(cuda);
}
#endif

#ifdef CUDA_SHIM
void shim_fail_launches(int others, int times);

/* What is asked of the device before a job fails with it, and leaves nothing behind. */
static void a_failing_device_fails_the_trainer(void **state)
{
    struct error err = {0};
    struct backend *cuda = card(0);
    struct lora lora = fresh_lora();
    const struct trainer_options options = private_options(cuda, &lora, 128);
    struct trainer *t = NULL;
    (void)state;
    /* While noise is compared, and then the first two batches of gradients; the third is a recorded pass, in which a
     * failure is done anew. */
    for (int others = 0; others <= 140; others += 35) {
        shim_fail_launches(others, 1);
        assert_int_equal(trainer_new(&options, &tiny.site.model, &lora, data, &t, &err), ERR_FAILED);
        assert_null(t);
        shim_fail_launches(0, 0);
    }
    assert_int_equal(trainer_new(&options, &tiny.site.model, &lora, data, &t, &err), 0);
    trainer_free(t);
    lora_release(&lora);
    backend_free(cuda); /* asserts that nothing is left on it */
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_private_round_is_the_cpus),
        cmocka_unit_test(factors_take_turns),
        cmocka_unit_test(short_memory_makes_micro_batches_smaller_and_then_an_error),
        cmocka_unit_test(a_stopped_step_leaves_nothing),
#ifdef CUDA_SHIM
        cmocka_unit_test(records_are_kept_apart_where_batchmates_matter),
        cmocka_unit_test(a_failing_device_fails_the_round),
        cmocka_unit_test(a_failing_device_fails_the_trainer),
#endif
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
