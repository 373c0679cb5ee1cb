/* Inference: caches, packing, splitting and scoring give what one plain pass gives. */
#include "model/infer.h"
#include "model/placed.h"
#include "model/sampling.h"
#include "model/train.h"
#include "tests/check.h"
#include "tests/model/tiny.h"

#define VOCABULARY 128

struct setup {
    struct tiny tiny;
    struct lora lora;
    struct pool *pool;
    struct backend *backend;
    struct infer *infer;
    struct kv_cache *caches[3];
};

static const struct lora_config all = {
    .mode = LORA_JOINT, .rank = 4, .alpha = 8, .layer_first = 0, .targets = LORA_TARGETS_ALL};

static void setup_init(struct setup *s, int threads, int32_t rows_max)
{
    struct error err = {0};
    const struct model_config config = TINY_CONFIG;
    tiny_init(&s->tiny, &config, false);
    tiny_lora(&s->lora, &all, &s->tiny.model);
    s->pool = NULL;
    CHECK(pool_new(threads, &s->pool, &err) == 0);
    s->backend = tiny_backend(KERNEL_AVX512_BF16, s->pool, KERNEL_F32);
    struct infer_options options = {.backend = s->backend, .rows_max = rows_max, .context_max = 64, .rank_max = 4};
    CHECK(infer_new(&options, &s->tiny.model, &s->infer, &err) == 0);
    for (size_t i = 0; i < ARRAY_LEN(s->caches); i++)
        CHECK(kv_cache_new(s->backend, &s->tiny.model, 40, &s->caches[i], &err) == 0);
}

static void setup_release(struct setup *s)
{
    for (size_t i = 0; i < ARRAY_LEN(s->caches); i++)
        kv_cache_free(s->caches[i]);
    infer_free(s->infer);
    backend_free(s->backend);
    pool_free(s->pool);
    lora_release(&s->lora);
    tiny_release(&s->tiny);
}

static void make_ids(uint32_t seed, int32_t count, int32_t *ids)
{
    float values[64];
    tiny_values(6000 + seed, (size_t)count, 63.0f, 64.0f, values);
    for (int32_t i = 0; i < count; i++)
        ids[i] = (int32_t)values[i];
}

static void extend(struct setup *s, struct kv_cache *cache, const int32_t *ids, int32_t count)
{
    struct error err = {0};
    struct infer_extend item = {cache, ids, count};
    CHECK(infer_extend(s->infer, &s->lora, &item, 1, &err) == 0);
}

/* The last row's logits after one whole pass in a fresh cache. */
static void reference_logits(struct setup *s, const int32_t *ids, int32_t count, float *logits)
{
    kv_cache_truncate(s->caches[2], 0);
    struct error err = {0};
    extend(s, s->caches[2], ids, count);
    CHECK(infer_logits(s->infer, s->caches[2], logits, &err) == 0);
}

static void check_same(struct setup *s, struct kv_cache *cache, const int32_t *ids, int32_t count)
{
    float got[VOCABULARY], want[VOCABULARY];
    struct error err = {0};
    reference_logits(s, ids, count, want);
    int32_t likeliest = -1;
    CHECK(infer_logits(s->infer, cache, got, &err) == 0);
    CHECK(infer_likeliest(s->infer, cache, &likeliest, &err) == 0 && likeliest == likeliest_token(got, VOCABULARY));
    CHECK(kv_cache_length(cache) == count && memcmp(kv_cache_ids(cache), ids, (size_t)count * 4) == 0);
    for (int i = 0; i < VOCABULARY; i++)
        CHECK_NEAR(got[i], want[i], 2e-5);
}

static void test_decoding_equals_one_pass(void)
{
    struct setup s;
    int32_t ids[30];
    setup_init(&s, 2, 32);
    make_ids(1, 30, ids);
    extend(&s, s.caches[0], ids, 5);
    for (int32_t n = 5; n < 30; n++) {
        extend(&s, s.caches[0], ids + n, 1);
        check_same(&s, s.caches[0], ids, n + 1);
    }
    setup_release(&s);
}

static void test_long_input_is_split(void)
{
    struct setup s;
    int32_t ids[40];
    for (int32_t rows = 1; rows <= 41; rows += 8) {
        setup_init(&s, 1, rows);
        make_ids(2, 40, ids);
        extend(&s, s.caches[0], ids, 40);
        float got[VOCABULARY], want[VOCABULARY];
        struct error err = {0};
        CHECK(infer_logits(s.infer, s.caches[0], got, &err) == 0);
        setup_release(&s);
        setup_init(&s, 1, 64);
        reference_logits(&s, ids, 40, want);
        for (int i = 0; i < VOCABULARY; i++)
            CHECK_NEAR(got[i], want[i], 2e-5);
        setup_release(&s);
    }
}

static void test_packed_equals_single(void)
{
    struct setup s;
    int32_t ids[2][30];
    struct error err = {0};
    for (int threads = 1; threads <= 3; threads += 2) {
        setup_init(&s, threads, 64);
        make_ids(3, 30, ids[0]);
        make_ids(4, 30, ids[1]);
        struct infer_extend items[2] = {{s.caches[0], ids[0], 17}, {s.caches[1], ids[1], 9}};
        CHECK(infer_extend(s.infer, &s.lora, items, 2, &err) == 0);
        check_same(&s, s.caches[0], ids[0], 17);
        check_same(&s, s.caches[1], ids[1], 9);
        /* the second time neither starts at zero; and a fresh one mixed with a begun one */
        struct infer_extend more[2] = {{s.caches[0], ids[0] + 17, 8}, {s.caches[1], ids[1] + 9, 12}};
        CHECK(infer_extend(s.infer, &s.lora, more, 2, &err) == 0);
        check_same(&s, s.caches[0], ids[0], 25);
        check_same(&s, s.caches[1], ids[1], 21);
        kv_cache_truncate(s.caches[0], 0);
        struct infer_extend mixed[2] = {{s.caches[0], ids[1], 6}, {s.caches[1], ids[1] + 21, 3}};
        CHECK(infer_extend(s.infer, &s.lora, mixed, 2, &err) == 0);
        check_same(&s, s.caches[0], ids[1], 6);
        check_same(&s, s.caches[1], ids[1], 24);
        setup_release(&s);
    }
}

static void test_shared_beginnings(void)
{
    struct setup s;
    int32_t ids[30], other[30];
    setup_init(&s, 1, 32);
    make_ids(5, 30, ids);
    memcpy(other, ids, sizeof ids);
    other[12] = (ids[12] + 1) % VOCABULARY;
    extend(&s, s.caches[0], ids, 20);
    CHECK(kv_cache_common(s.caches[0], other, 20) == 12);
    CHECK(kv_cache_common(s.caches[0], ids, 20) == 19); /* the last token is always computed anew */
    CHECK(kv_cache_common(s.caches[0], ids, 25) == 20);
    CHECK(kv_cache_common(s.caches[1], ids, 20) == 0);
    kv_cache_copy(s.caches[1], s.caches[0], 12);
    extend(&s, s.caches[1], other + 12, 8);
    check_same(&s, s.caches[1], other, 20);
    check_same(&s, s.caches[0], ids, 20); /* the source is untouched */
    kv_cache_truncate(s.caches[0], 12);
    extend(&s, s.caches[0], other + 12, 5);
    check_same(&s, s.caches[0], other, 17);
    kv_cache_copy(s.caches[1], s.caches[0], 17); /* whole: its last row comes along */
    check_same(&s, s.caches[1], other, 17);
    setup_release(&s);
}

/* Σ log p of the continuation by the training path's loss: another route through the code. */
static double reference_score(struct setup *s, const int32_t *prompt, int32_t prompt_count, const int32_t *tail,
                              int32_t tail_count)
{
    struct batch batch;
    struct train *train;
    struct error err = {0};
    int32_t ids[64];
    uint8_t learn[64] = {0};
    memcpy(ids, prompt, (size_t)prompt_count * 4);
    memcpy(ids + prompt_count, tail, (size_t)tail_count * 4);
    memset(learn + prompt_count, 1, (size_t)tail_count);
    struct backend *scalar = tiny_backend(KERNEL_SCALAR, NULL, KERNEL_F32);
    struct train_options options = {
        .backend = scalar, .tokens_max = 64, .examples_max = 1, .example_tokens_max = 64, .per_example = true};
    CHECK(batch_init(&batch, 64, 1, &err) == 0);
    CHECK(train_new(&options, &s->tiny.model, &s->lora, &train, &err) == 0);
    batch_clear(&batch);
    CHECK(batch_add(&batch, &(struct batch_example){ids, learn, prompt_count + tail_count}));
    train_evaluate(train, &s->lora, &batch);
    double score = -train_loss(train, 0) * tail_count;
    train_free(train);
    backend_free(scalar);
    batch_release(&batch);
    return score;
}

static void check_scoring(int threads, int32_t rows_max)
{
    struct setup s;
    int32_t prompts[2][20], tails[7][8];
    struct infer_candidate candidates[14];
    struct error err = {0};
    setup_init(&s, threads, rows_max);
    for (uint32_t i = 0; i < 2; i++) {
        make_ids(20 + i, 20, prompts[i]);
        extend(&s, s.caches[i], prompts[i], 12 + (int32_t)i);
    }
    for (uint32_t i = 0; i < 7; i++)
        make_ids(30 + i, 8, tails[i]);
    for (int32_t i = 0; i < 14; i++)
        candidates[i] = (struct infer_candidate){s.caches[i / 7], tails[i % 7], 1 + i % 7, 0};
    for (int repeat = 0; repeat < 2; repeat++) { /* the caches are unchanged: a second time gives the same */
        CHECK(infer_score(s.infer, &s.lora, candidates, 14, &err) == 0);
        for (int32_t i = 0; i < 14; i++) {
            double want = reference_score(&s, prompts[i / 7], 12 + i / 7, tails[i % 7], 1 + i % 7);
            CHECK_NEAR(candidates[i].log_likelihood, want, 2e-5);
        }
        CHECK(kv_cache_length(s.caches[0]) == 12 && kv_cache_length(s.caches[1]) == 13);
    }
    check_same(&s, s.caches[0], prompts[0], 12);
    extend(&s, s.caches[0], prompts[0] + 12, 3);
    check_same(&s, s.caches[0], prompts[0], 15);
    setup_release(&s);
}

static void test_scoring_equals_training_loss(void)
{
    check_scoring(1, 64);
    check_scoring(3, 64);
    check_scoring(2, 9); /* several passes */
}

static void test_refusals(void)
{
    struct setup s;
    struct error err = {0};
    int32_t ids[41];
    setup_init(&s, 1, 32);
    make_ids(7, 41, ids);
    struct infer_extend too_long = {s.caches[0], ids, 41};
    CHECK(infer_extend(s.infer, NULL, &too_long, 1, &err) == ERR_CONFIG && kv_cache_length(s.caches[0]) == 0);
    int32_t bad_ids[2] = {1, VOCABULARY};
    struct infer_extend unknown = {s.caches[0], bad_ids, 2};
    CHECK(infer_extend(s.infer, NULL, &unknown, 1, &err) == ERR_CONFIG && kv_cache_length(s.caches[0]) == 0);
    bad_ids[1] = -1;
    CHECK(infer_extend(s.infer, NULL, &unknown, 1, &err) == ERR_CONFIG);
    extend(&s, s.caches[0], ids, 38);
    struct infer_candidate candidate = {s.caches[0], ids, 3, 0};
    CHECK(infer_score(s.infer, NULL, &candidate, 1, &err) == 0); /* exactly full: the last token needs no slot */
    candidate.count = 4;
    CHECK(infer_score(s.infer, NULL, &candidate, 1, &err) == ERR_CONFIG);
    struct infer *infer = NULL;
    struct infer_options options = {.backend = s.backend, .rows_max = 8, .context_max = 65};
    CHECK(infer_new(&options, &s.tiny.model, &infer, &err) == ERR_CONFIG);
    options = (struct infer_options){.backend = s.backend, .rows_max = 0, .context_max = 64};
    CHECK(infer_new(&options, &s.tiny.model, &infer, &err) == ERR_CONFIG);
    struct kv_cache *cache = NULL;
    CHECK(kv_cache_new(s.backend, &s.tiny.model, 65, &cache, &err) == ERR_CONFIG && !cache);
    setup_release(&s);
}

/* The same matrix in Q8_0, about; its floats' memory takes it. */
static void quantise(struct tensor *w)
{
    float *values = (float *)(uintptr_t)w->data;
    uint8_t *to = (uint8_t *)values;
    for (int32_t i = 0; i < w->out * w->in; i += 32, to += 34) {
        const uint8_t half[2] = {0, 0x14}; /* 2^−10: 127 of it are the largest weight */
        int8_t q[32];
        for (int k = 0; k < 32; k++)
            q[k] = (int8_t)lrintf(values[i + k] * 1016.0f);
        memcpy(to, half, 2);
        memcpy(to + 2, q, 32);
    }
    w->type = TENSOR_Q8_0;
}

/* Answering with the copy of the weights gives what the weights themselves give; only who asks for it has it. */
static void test_serving_copy(void)
{
    struct setup s;
    struct error err = {0};
    struct placed_model *placed = NULL;
    int32_t ids[30];
    float want[VOCABULARY], got[VOCABULARY];
    setup_init(&s, 2, 64);
    struct tensor *const ends[] = {&s.tiny.model.token_embd, &s.tiny.model.output};
    for (int i = 0; i < 2; i++)
        quantise(ends[i]);
    for (int32_t i = 0; i < s.tiny.model.config.layer_count; i++) {
        struct model_layer *l = &s.tiny.model.layers[i];
        struct tensor *const all_of_it[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (size_t t = 0; t < ARRAY_LEN(all_of_it); t++)
            quantise(all_of_it[t]);
    }
    infer_free(s.infer); /* it placed the floats */
    struct infer_options options = {.backend = s.backend, .rows_max = 64, .context_max = 64, .rank_max = 4};
    CHECK(placed_model_new(s.backend, &s.tiny.model, 0, &placed, &err) == 0);
    CHECK(!placed->serving && !placed->head.w[0].interleaved && !placed->layers[0].groups[GROUP_QKV].w[2].interleaved);
    options.placed = placed;
    CHECK(infer_new(&options, &s.tiny.model, &s.infer, &err) == 0);
    make_ids(11, 30, ids);
    extend(&s, s.caches[0], ids, 12);
    for (int i = 12; i < 30; i++)
        extend(&s, s.caches[0], ids + i, 1);
    CHECK(infer_logits(s.infer, s.caches[0], want, &err) == 0);
    infer_free(s.infer);
    options.placed = NULL;
    options.answering = true;
    CHECK(infer_new(&options, &s.tiny.model, &s.infer, &err) == 0);
    extend(&s, s.caches[1], ids, 12);
    for (int i = 12; i < 30; i++)
        extend(&s, s.caches[1], ids + i, 1);
    CHECK(infer_logits(s.infer, s.caches[1], got, &err) == 0);
    for (int i = 0; i < VOCABULARY; i++)
        CHECK_NEAR(got[i], want[i], 1e-5);
    placed_model_serve(placed);
    const bool copied = kernels_cpu(KERNEL_AVX512_BF16)->interleaved_bytes(&placed->head.w[0]) > 0;
    CHECK(copied == (placed->serving != NULL) && copied == (placed->head.w[0].interleaved != NULL));
    CHECK(copied == (placed->layers[2].groups[GROUP_DOWN].w[0].interleaved != NULL));
    placed_model_free(placed);
    setup_release(&s);
}

int main(void)
{
    RUN(test_decoding_equals_one_pass);
    RUN(test_long_input_is_split);
    RUN(test_packed_equals_single);
    RUN(test_shared_beginnings);
    RUN(test_scoring_equals_training_loss);
    RUN(test_serving_copy);
    RUN(test_refusals);
    return check_report();
}
