/* The forward and backward passes against transformers and PEFT: tests/golden/make_models.py made the files. */
#include "model/infer.h"
#include "model/train.h"
#include "tests/check.h"
#include "tests/model/tiny.h"

/* ‖got − want‖ / ‖want‖ */
static double distance(const float *got, const float *want, size_t n)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += (double)want[i] * want[i];
    }
    return sqrt(difference / norm);
}

static void check_training(const struct golden *g, struct backend *backend, int level, double tolerance)
{
    struct tiny tiny;
    struct lora lora;
    struct batch batch;
    struct train *train;
    struct error err = {0};
    tiny_init(&tiny, &g->config, g->tied);
    tiny_lora(&lora, &g->lora, &tiny.model);
    golden_batch(g, &batch);
    struct train_options options = {.backend = backend,
                                    .checkpoint_level = level,
                                    .tokens_max = g->tokens,
                                    .examples_max = g->examples,
                                    .example_tokens_max = g->tokens,
                                    .per_example = true};
    if (train_new(&options, &tiny.model, &lora, &train, &err) < 0) {
        CHECK(!"train_new");
        return;
    }
    CHECK(lora.trained_count == g->trained);
    train_run(train, &lora, &batch);
    for (int32_t e = 0; e < g->examples; e++) {
        CHECK_NEAR(train_loss(train, e), g->losses[e], tolerance);
        /* each factor by itself: a large one must not hide a wrong small one */
        for (int32_t i = 0; i < lora.entry_count; i++) {
            const struct lora_entry *entry = &lora.entries[i];
            const float *got = train_gradient(train, e), *want = g->gradients + (size_t)e * g->trained;
            const size_t rank = (size_t)lora.config.rank;
            CHECK(distance(got + entry->b_offset, want + entry->b_offset, rank * (size_t)entry->out) < tolerance);
            if (lora.config.mode == LORA_JOINT)
                CHECK(distance(got + entry->a_offset, want + entry->a_offset, rank * (size_t)entry->in) < tolerance);
        }
    }
    train_evaluate(train, &lora, &batch);
    for (int32_t e = 0; e < g->examples; e++)
        CHECK_NEAR(train_loss(train, e), g->losses[e], tolerance);
    train_free(train);
    batch_release(&batch);
    lora_release(&lora);
    tiny_release(&tiny);
}

static void check_logits(const struct golden *g, struct backend *backend, double tolerance)
{
    struct tiny tiny;
    struct lora lora;
    struct infer *infer;
    struct kv_cache *cache;
    struct error err = {0};
    float logits[128];
    tiny_init(&tiny, &g->config, g->tied);
    tiny_lora(&lora, &g->lora, &tiny.model);
    struct infer_options options = {
        .backend = backend, .rows_max = 32, .context_max = 64, .rank_max = lora.config.rank};
    if (infer_new(&options, &tiny.model, &infer, &err) < 0 ||
        kv_cache_new(backend, &tiny.model, 64, &cache, &err) < 0) {
        CHECK(!"infer_new");
        return;
    }
    for (int32_t e = 0; e < g->examples; e++) {
        const int32_t first = g->offsets[e], last = g->offsets[e + 1] - 1;
        struct infer_extend prompt = {cache, g->ids + first, last - first}; /* in one pass, then one token after it */
        kv_cache_truncate(cache, 0);
        CHECK(infer_extend(infer, &lora, &prompt, 1, &err) == 0);
        CHECK(infer_logits(infer, cache, logits, &err) == 0);
        CHECK(distance(logits, g->logits + (last - 1) * 128, 128) < tolerance);
        prompt = (struct infer_extend){cache, g->ids + last, 1};
        CHECK(infer_extend(infer, &lora, &prompt, 1, &err) == 0);
        CHECK(infer_logits(infer, cache, logits, &err) == 0);
        CHECK(distance(logits, g->logits + last * 128, 128) < tolerance);
        kv_cache_truncate(cache, 0);
        for (int32_t t = g->offsets[e]; t < g->offsets[e + 1]; t++) {
            struct infer_extend item = {cache, g->ids + t, 1};
            CHECK(infer_extend(infer, &lora, &item, 1, &err) == 0);
            CHECK(infer_logits(infer, cache, logits, &err) == 0);
            CHECK(distance(logits, g->logits + t * 128, 128) < tolerance);
        }
    }
    kv_cache_free(cache);
    infer_free(infer);
    lora_release(&lora);
    tiny_release(&tiny);
}

static void check_all(struct backend *backend, double tolerance)
{
    for (size_t i = 0; golden_files[i]; i++) {
        struct golden golden;
        golden_read(&golden, golden_files[i]);
        for (int level = 0; level <= 2; level++)
            check_training(&golden, backend, level, tolerance);
        check_logits(&golden, backend, tolerance);
        golden_release(&golden);
    }
}

static void check_cpu(const struct kernel_ops *ops, enum kernel_precision precision, double tolerance)
{
    struct backend *backend = tiny_backend(ops->isa, NULL, precision);
    check_all(backend, tolerance);
    backend_free(backend);
}

static void test_float32_on_every_table(void)
{
    const struct kernel_ops *tables[4];
    int count = tiny_tables(tables);
    for (int i = 0; i < count; i++) {
        fprintf(stderr, "  %s\n", tables[i]->name);
        check_cpu(tables[i], KERNEL_F32, 1e-4);
    }
}

static void test_rounded(void)
{
    const struct kernel_ops *integers = kernels_cpu(KERNEL_AVX512_VNNI), *bfloat = kernels_cpu(KERNEL_AVX512_BF16);
    if (integers->isa == KERNEL_AVX512_VNNI)
        check_cpu(integers, KERNEL_BF16, 1e-2);
    else
        fprintf(stderr, "  skipped: no products of integers on this processor\n");
    if (bfloat->isa == KERNEL_AVX512_BF16)
        check_cpu(bfloat, KERNEL_BF16, 5e-2);
    else
        fprintf(stderr, "  skipped: no bfloat16 products on this processor\n");
}

int main(void)
{
    RUN(test_float32_on_every_table);
    RUN(test_rounded);
    return check_report();
}
