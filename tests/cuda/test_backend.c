/*
 * The CUDA backend under the loops of model/: the golden files, the CPU as a second opinion, batchmates, checkpoint
 * levels, answering over blocks of keys and values, quantised weights, recorded passes, memory limits. Linked with the
 * shim it runs everywhere; in a build with CUDA it wants a card.
 */
#include "model/infer.h"
#include "model/layer.h"
#include "model/placed.h"
#include "model/sampling.h"
#include "model/train.h"
#include "tests/check.h"
#include "tests/model/tiny.h"

#define VOCABULARY 128

/* Under sanitizers the shim is twenty times slower: each way through the code once, instead of each combination. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define THOROUGH false
#else
#define THOROUGH true
#endif

#ifdef CUDA_SHIM
#define SHIM true
#else
#define SHIM false
#endif

static struct backend *open_cuda(struct backend_cuda_options options)
{
    struct backend *backend = NULL;
    struct error err = {0};
    int rc = backend_cuda_new(&options, &backend, &err);
    if (rc == ERR_NOT_FOUND && !SHIM) {
        fprintf(stderr, "skipped: %s\n", err.message);
        exit(77);
    }
    if (rc < 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    return backend;
}

static double distance(const float *got, const float *want, size_t n)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += (double)want[i] * want[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

static void must(int rc, const struct error *err)
{
    if (rc < 0)
        fprintf(stderr, "%s\n", err->message);
    CHECK(rc == 0);
}

/* --- golden files ------------------------------------------------------------------------------------------------ */

static void check_training(const struct golden *g, struct backend *be, int level, double tolerance)
{
    struct tiny tiny;
    struct lora host, lora;
    struct batch batch;
    struct train *train = NULL;
    struct error err = {0};
    tiny_init(&tiny, &g->config, g->tied);
    tiny_lora(&host, &g->lora, &tiny.model);
    golden_batch(g, &batch);
    must(lora_place(&lora, &host, be, &err), &err);
    struct train_options options = {.backend = be,
                                    .checkpoint_level = level,
                                    .tokens_max = g->tokens,
                                    .examples_max = g->examples,
                                    .example_tokens_max = g->tokens,
                                    .per_example = true};
    int rc = train_new(&options, &tiny.model, &host, &train, &err);
    must(rc, &err);
    float *got = malloc(host.trained_count * sizeof *got), *first = malloc(host.trained_count * sizeof *first);
    /* Run, recorded and replayed, replayed; as host code in one way only, to save time. */
    const int repeats = strstr(be->name, "shim") && (level != 1 || be->element == TENSOR_BF16) ? 1 : 3;
    for (int repeat = 0; rc == 0 && repeat < repeats; repeat++) {
        train_run(train, &lora, &batch);
        for (int32_t e = 0; e < g->examples; e++) {
            CHECK_NEAR(train_loss(train, e), g->losses[e], tolerance);
            be->ops->download(be, got, train_gradient(train, e), host.trained_count * sizeof *got);
            for (int32_t i = 0; i < host.entry_count; i++) {
                const struct lora_entry *entry = &host.entries[i];
                const float *want = g->gradients + (size_t)e * g->trained;
                const size_t rank = (size_t)host.config.rank;
                CHECK(distance(got + entry->b_offset, want + entry->b_offset, rank * (size_t)entry->out) < tolerance);
                if (host.config.mode == LORA_JOINT)
                    CHECK(distance(got + entry->a_offset, want + entry->a_offset, rank * (size_t)entry->in) <
                          tolerance);
            }
        }
        if (repeat == 0)
            memcpy(first, got, host.trained_count * sizeof *got);
        CHECK(memcmp(first, got, host.trained_count * sizeof *got) == 0);
    }
    train_evaluate(train, &lora, &batch);
    for (int32_t e = 0; e < g->examples; e++)
        CHECK_NEAR(train_loss(train, e), g->losses[e], tolerance);
    must(be->ops->sync(be, &err), &err);
    free(got);
    free(first);
    train_free(train);
    batch_release(&batch);
    lora_unplace(&lora);
    lora_release(&host);
    tiny_release(&tiny);
}

static void check_logits(const struct golden *g, struct backend *be, double tolerance)
{
    struct tiny tiny;
    struct lora host, lora;
    struct infer *infer = NULL;
    struct kv_cache *cache = NULL;
    struct error err = {0};
    float logits[VOCABULARY];
    tiny_init(&tiny, &g->config, g->tied);
    tiny_lora(&host, &g->lora, &tiny.model);
    must(lora_place(&lora, &host, be, &err), &err);
    struct infer_options options = {.backend = be, .rows_max = 32, .context_max = 64, .rank_max = host.config.rank};
    must(infer_new(&options, &tiny.model, &infer, &err), &err);
    must(kv_cache_new(be, &tiny.model, 64, &cache, &err), &err);
    for (int32_t e = 0; e < g->examples; e++) {
        kv_cache_truncate(cache, 0);
        for (int32_t t = g->offsets[e]; t < g->offsets[e + 1]; t++) {
            struct infer_extend item = {cache, g->ids + t, 1};
            must(infer_extend(infer, &lora, &item, 1, &err), &err);
            CHECK(infer_logits(infer, cache, logits, &err) == 0);
            CHECK(distance(logits, g->logits + t * VOCABULARY, VOCABULARY) < tolerance);
        }
        /* and in one pass of many rows, whose products are other ones */
        kv_cache_truncate(cache, 0);
        struct infer_extend all = {cache, g->ids + g->offsets[e], g->offsets[e + 1] - g->offsets[e]};
        must(infer_extend(infer, &lora, &all, 1, &err), &err);
        CHECK(infer_logits(infer, cache, logits, &err) == 0);
        CHECK(distance(logits, g->logits + (g->offsets[e + 1] - 1) * VOCABULARY, VOCABULARY) < tolerance);
    }
    kv_cache_free(cache);
    infer_free(infer);
    lora_unplace(&lora);
    lora_release(&host);
    tiny_release(&tiny);
}

static void check_golden(enum kernel_precision precision, double tolerance)
{
    struct backend *be = open_cuda((struct backend_cuda_options){.precision = precision});
    for (size_t i = 0; golden_files[i]; i++) {
        struct golden golden;
        if (!THOROUGH && precision == KERNEL_BF16 && i % 3 > 0)
            continue; /* the same code as in float32, but for the products: minutes under sanitizers */
        golden_read(&golden, golden_files[i]);
        const int first = THOROUGH ? 0 : (int)(i % 3), last = THOROUGH ? 2 : first;
        for (int level = first; level <= last; level++)
            check_training(&golden, be, level, tolerance);
        check_logits(&golden, be, tolerance);
        golden_release(&golden);
    }
    backend_free(be);
}

static void test_golden_float32(void)
{
    check_golden(KERNEL_F32, 1e-4);
}

static void test_golden_bfloat16(void)
{
    check_golden(KERNEL_BF16, 8e-2); /* glm4, layer 1, A of v: 0.064; else below 0.045 */
}

/* --- batchmates -------------------------------------------------------------------------------------------------- */

#define TOKENS 320
#define EXAMPLES 6

static const struct lora_config joint_all = {
    .mode = LORA_JOINT, .rank = 4, .alpha = 8, .layer_first = 0, .targets = LORA_TARGETS_ALL};
static const struct lora_config ffa_qv = {.mode = LORA_FFA,
                                          .rank = 8,
                                          .alpha = 16,
                                          .layer_first = 1,
                                          .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V)};

/* Example number `seed`: 5 to 64 tokens, the last `labels` of them learnt. */
static void add_example(struct batch *batch, uint32_t seed, int32_t labels)
{
    int32_t ids[64], length = 5 + (int32_t)(seed * 17 % 60);
    uint8_t learn[64] = {0};
    float values[64];
    tiny_values(5000 + seed, 64, 63.0f, 64.0f, values);
    for (int32_t i = 0; i < length; i++) {
        ids[i] = (int32_t)values[i];
        learn[i] = i >= length - labels;
    }
    CHECK(batch_add(batch, &(struct batch_example){ids, learn, length}));
}

struct setup {
    struct tiny tiny;
    struct lora host, lora;
    struct batch batch;
    struct train *train;
    struct backend *be;
};

static void setup_init_of(struct setup *s, const struct model_config *model, const struct lora_config *config,
                          struct backend_cuda_options cuda, struct train_options options)
{
    struct error err = {0};
    tiny_init(&s->tiny, model, true);
    tiny_lora(&s->host, config, &s->tiny.model);
    s->be = options.backend = open_cuda(cuda);
    options.tokens_max = TOKENS;
    options.examples_max = EXAMPLES;
    options.example_tokens_max = 64;
    must(lora_place(&s->lora, &s->host, s->be, &err), &err);
    must(batch_init(&s->batch, TOKENS, EXAMPLES, &err), &err);
    must(train_new(&options, &s->tiny.model, &s->host, &s->train, &err), &err);
    batch_clear(&s->batch);
}

static void setup_init(struct setup *s, const struct lora_config *config, struct backend_cuda_options cuda,
                       struct train_options options)
{
    const struct model_config model = TINY_CONFIG;
    setup_init_of(s, &model, config, cuda, options);
}

static void setup_release(struct setup *s)
{
    train_free(s->train);
    lora_unplace(&s->lora);
    backend_free(s->be);
    batch_release(&s->batch);
    lora_release(&s->host);
    tiny_release(&s->tiny);
}

static void gradient_of(struct setup *s, int32_t example, float *out)
{
    s->be->ops->download(s->be, out, train_gradient(s->train, example), s->host.trained_count * sizeof *out);
}

static void check_batchmates(const struct model_config *model, const struct lora_config *config,
                             enum kernel_precision precision, int level)
{
    struct setup s;
    double loss = 0;
    setup_init_of(&s, model, config, (struct backend_cuda_options){.precision = precision, .tune = level == 1},
                  (struct train_options){.per_example = true, .checkpoint_level = level});
    const size_t bytes = s.host.trained_count * sizeof(float);
    float *alone = malloc(bytes), *crowd = malloc(bytes);
    add_example(&s.batch, 3, 4);
    train_run(s.train, &s.lora, &s.batch);
    loss = train_loss(s.train, 0);
    gradient_of(&s, 0, alone);
    const size_t room = s.be->ops->free_bytes(s.be);
    for (int32_t place = 0; place < EXAMPLES; place += EXAMPLES / 2 - 1) {
        batch_clear(&s.batch);
        for (int32_t e = 0; e < EXAMPLES; e++) { /* other mates and other label counts at each place */
            if (e == place)
                add_example(&s.batch, 3, 4);
            else
                add_example(&s.batch, (uint32_t)(10 + 17 * place + e), (e + place) % 4);
        }
        train_run(s.train, &s.lora, &s.batch);
        CHECK(train_loss(s.train, place) == loss);
        gradient_of(&s, place, crowd);
        CHECK(memcmp(crowd, alone, bytes) == 0);
    }
    if (strstr(s.be->name, "shim"))                 /* on a card others may allocate meanwhile, the driver among them */
        CHECK(s.be->ops->free_bytes(s.be) == room); /* a step allocates nothing */
    free(alone);
    free(crowd);
    setup_release(&s);
}

static void test_bits_do_not_depend_on_batchmates(void)
{
    const struct model_config llama = TINY_CONFIG;
    struct model_config everything = TINY_CONFIG;
    everything.rotated = 8;
    everything.window = 5;
    everything.window_period = 2;
    everything.rope_base_sliding = 1000;
    everything.gate = GATE_GELU_TANH;
    everything.qkv_bias = everything.qk_norm = everything.post_norms = everything.fused_gate_up = true;
    check_batchmates(&llama, &ffa_qv, KERNEL_BF16, 1);
    check_batchmates(&everything, &joint_all, KERNEL_BF16, 1);
    for (int level = 0; level <= 2 && THOROUGH; level++)
        check_batchmates(&llama, &joint_all, KERNEL_BF16, level);
    if (THOROUGH)
        check_batchmates(&llama, &joint_all, KERNEL_F32, 0);
}

/* One trainer takes A and B in turn: each factor's gradient is what it is beside the other's. Not to the bit: the A's
 * of a group may be summed in another product. */
static void test_factors_in_turn(void)
{
    struct setup joint, turns;
    struct lora_config half = joint_all;
    struct backend_cuda_options cuda = {.precision = KERNEL_F32};
    half.mode = LORA_FFA;
    setup_init(&joint, &joint_all, cuda, (struct train_options){.per_example = true});
    setup_init(&turns, &half, cuda, (struct train_options){.per_example = true, .alternating = true});
    add_example(&joint.batch, 3, 4);
    add_example(&turns.batch, 3, 4);
    const size_t b_count = turns.lora.trained_count, a_count = turns.lora.frozen_count;
    float *whole = malloc((a_count + b_count) * sizeof *whole), *part = malloc((a_count + b_count) * sizeof *part);
    train_run(joint.train, &joint.lora, &joint.batch);
    gradient_of(&joint, 0, whole);
    for (int turn = 0; turn < 3; turn++) {
        const bool b = turns.lora.config.mode == LORA_FFA;
        train_run(turns.train, &turns.lora, &turns.batch);
        turns.be->ops->download(turns.be, part, train_gradient(turns.train, 0), (b ? b_count : a_count) * sizeof *part);
        CHECK(distance(part, whole + (b ? a_count : 0), b ? b_count : a_count) < 1e-6);
        lora_exchange(&turns.lora);
    }
    free(whole);
    free(part);
    setup_release(&joint);
    setup_release(&turns);
}

/* The same on matrices as large as real ones, where a library has many ways to compute a product. For a card only: as
 * host code it would take minutes. */
static void test_bits_on_real_shapes(void)
{
    static const int32_t widths[][4] = {/* d, heads, kv heads, ff */ {576, 9, 3, 1536}, {2048, 32, 8, 8192}};
    for (size_t w = 0; w < ARRAY_LEN(widths); w++) {
        struct backend *be = open_cuda((struct backend_cuda_options){.precision = KERNEL_BF16, .tune = true});
        if (strstr(be->name, "shim")) {
            fprintf(stderr, "  skipped: this is no card\n");
            backend_free(be);
            return;
        }
        struct model_config config = TINY_CONFIG;
        struct tiny tiny;
        struct lora host, lora;
        struct batch batch;
        struct train *train = NULL;
        struct error err = {0};
        config.layer_count = 2;
        config.d_model = widths[w][0];
        config.head_count = widths[w][1];
        config.kv_head_count = widths[w][2];
        config.head_size = 64;
        config.d_ff = widths[w][3];
        config.vocabulary = 4096;
        config.context_length = 512;
        tiny_init(&tiny, &config, true);
        tiny_lora(&host, &joint_all, &tiny.model);
        must(lora_place(&lora, &host, be, &err), &err);
        const struct train_options options = {
            .backend = be, .tokens_max = 4096, .examples_max = 16, .example_tokens_max = 512, .per_example = true};
        must(batch_init(&batch, 4096, 16, &err), &err);
        must(train_new(&options, &tiny.model, &host, &train, &err), &err);
        const size_t bytes = host.trained_count * sizeof(float);
        float *alone = malloc(bytes), *crowd = malloc(bytes);
        double loss = 0;
        for (int32_t crowding = 0; crowding < 6; crowding++) {
            int32_t place = 0;
            uint64_t state = 99 + (uint64_t)crowding;
            batch_clear(&batch);
            for (int32_t e = 0; e <= 2 * crowding; e++) { /* the example itself in the middle */
                int32_t ids[512];
                uint8_t learn[512];
                const bool own = e == crowding;
                uint64_t x = own ? 7 : state;
                const int32_t length = own ? 301 : 5 + (int32_t)(state >> 33) % 300;
                for (int32_t i = 0; i < length; i++) {
                    x = x * 6364136223846793005u + 1442695040888963407u;
                    ids[i] = (int32_t)(x >> 52);
                    learn[i] = x >> 40 & 1;
                }
                state = x + (uint64_t)e;
                place = own ? e : place;
                CHECK(batch_add(&batch, &(struct batch_example){ids, learn, length}));
            }
            train_run(train, &lora, &batch);
            be->ops->download(be, crowd, train_gradient(train, place), bytes);
            if (crowding == 0) {
                loss = train_loss(train, place);
                memcpy(alone, crowd, bytes);
            }
            CHECK(loss > 0 && train_loss(train, place) == loss && memcmp(alone, crowd, bytes) == 0);
        }
        must(be->ops->sync(be, &err), &err);
        free(alone);
        free(crowd);
        train_free(train);
        batch_release(&batch);
        lora_unplace(&lora);
        backend_free(be);
        lora_release(&host);
        tiny_release(&tiny);
    }
}

static void test_summed_gradient(void)
{
    struct setup each, sum;
    setup_init(&each, &joint_all, (struct backend_cuda_options){.precision = KERNEL_F32},
               (struct train_options){.per_example = true});
    setup_init(&sum, &joint_all, (struct backend_cuda_options){.precision = KERNEL_F32}, (struct train_options){0});
    const size_t n = each.host.trained_count;
    float *total = calloc(n, sizeof *total), *one = malloc(n * sizeof *one);
    for (uint32_t e = 0; e < 5; e++) {
        add_example(&each.batch, e, 1 + (int32_t)e % 3);
        add_example(&sum.batch, e, 1 + (int32_t)e % 3);
    }
    const size_t room = sum.be->ops->free_bytes(sum.be);
    train_run(each.train, &each.lora, &each.batch);
    train_run(sum.train, &sum.lora, &sum.batch);
    if (strstr(sum.be->name, "shim"))
        CHECK(sum.be->ops->free_bytes(sum.be) == room); /* all of it was reserved */
    for (int32_t e = 0; e < 5; e++) {
        gradient_of(&each, e, one);
        for (size_t i = 0; i < n; i++)
            total[i] += one[i];
    }
    gradient_of(&sum, 0, one);
    CHECK(distance(one, total, n) < 1e-5);
    free(total);
    free(one);
    setup_release(&each);
    setup_release(&sum);
}

static void test_empty_batches(void)
{
    struct setup s;
    struct error err = {0};
    setup_init(&s, &joint_all, (struct backend_cuda_options){.precision = KERNEL_BF16},
               (struct train_options){.per_example = true});
    train_run(s.train, &s.lora, &s.batch); /* Poisson sampling may draw nobody */
    add_example(&s.batch, 1, 0);
    train_run(s.train, &s.lora, &s.batch);
    CHECK(train_loss(s.train, 0) == 0);
    add_example(&s.batch, 2, 3);
    train_run(s.train, &s.lora, &s.batch);
    float *g = malloc(s.host.trained_count * sizeof *g);
    double sums[2] = {0};
    for (int32_t e = 0; e < 2; e++) {
        gradient_of(&s, e, g);
        for (size_t i = 0; i < s.host.trained_count; i++)
            sums[e] += fabs((double)g[i]);
    }
    CHECK(sums[0] == 0 && sums[1] > 0 && train_loss(s.train, 1) > 0);
    must(s.be->ops->sync(s.be, &err), &err);
    free(g);
    setup_release(&s);
}

/* --- clipping and noise through the table ------------------------------------------------------------------------ */

static void test_clipping_as_on_the_cpu(void)
{
    enum { UNITS = 5 };
    struct setup s;
    struct clip_params params = {.clip = 0.05, .grid = 65536 / 0.05};
    struct clip_result got[UNITS], want[UNITS];
    setup_init(&s, &joint_all, (struct backend_cuda_options){.precision = KERNEL_F32},
               (struct train_options){.per_example = true});
    struct backend *cpu = tiny_backend(KERNEL_AVX512_BF16, NULL, KERNEL_F32);
    for (uint32_t e = 0; e < UNITS; e++)
        add_example(&s.batch, e, 3);
    train_run(s.train, &s.lora, &s.batch);
    const size_t n = s.host.trained_count, stride = train_gradient_stride(s.train);
    float *g = malloc(UNITS * stride * sizeof *g);
    int64_t *sum = calloc(n, sizeof *sum), *want_sum = calloc(n, sizeof *sum);
    void *device_sum = NULL;
    struct error err = {0};
    must(s.be->ops->alloc(s.be, n * sizeof *sum, &device_sum, &err), &err);
    s.be->ops->download(s.be, g, train_gradient(s.train, 0), UNITS * stride * sizeof *g);
    s.be->ops->clip_accumulate(s.be, n, UNITS, train_gradient(s.train, 0), stride, &params, device_sum, got);
    s.be->ops->download(s.be, sum, device_sum, n * sizeof *sum);
    cpu->ops->clip_accumulate(cpu, n, UNITS, g, stride, &params, want_sum, want);
    size_t different = 0;
    for (int e = 0; e < UNITS; e++) {
        CHECK_NEAR(got[e].norm, want[e].norm, 1e-12);
        CHECK(got[e].clipped == want[e].clipped && got[e].finite && got[e].shrinks == want[e].shrinks);
    }
    for (size_t i = 0; i < n; i++) {
        CHECK(llabs((long long)(sum[i] - want_sum[i])) <= UNITS); /* a factor's last bit may tip a rounding */
        different += sum[i] != want_sum[i];
    }
    CHECK(different < n / 100);
    s.be->ops->release(s.be, device_sum);
    backend_free(cpu);
    free(g);
    free(sum);
    free(want_sum);
    setup_release(&s);
}

/* --- recorded passes --------------------------------------------------------------------------------------------- */

/* The gradients of three batches of one size, one after the other, and then of the first again. */
#define BATCHES 4

static void set_batch(struct setup *s, uint32_t number)
{
    static const uint32_t short_ones[] = {0, 53, 46}; /* 5, 6 and 7 tokens, as each 60th from there */
    batch_clear(&s->batch);
    for (size_t e = 0; e < ARRAY_LEN(short_ones); e++)
        add_example(&s->batch, short_ones[e] + 60 * number, 4);
}

static void run_batches(struct setup *s, float *gradients)
{
    for (uint32_t i = 0; i < BATCHES; i++) {
        set_batch(s, i % 3);
        train_run(s->train, &s->lora, &s->batch);
        gradient_of(s, 1, gradients + i * s->host.trained_count);
    }
}

/* A replay sees the batch, the factors and the memory of its own time. */
static void test_replays(void)
{
    struct setup eager, recorded;
    struct error err = {0};
    setup_init(&eager, &joint_all, (struct backend_cuda_options){.precision = KERNEL_BF16, .eager = true},
               (struct train_options){.per_example = true});
    setup_init(&recorded, &joint_all, (struct backend_cuda_options){.precision = KERNEL_BF16},
               (struct train_options){.per_example = true});
    const size_t n = BATCHES * eager.host.trained_count;
    float *want = malloc(n * sizeof *want), *got = malloc(n * sizeof *got);
    for (int turn = 0; turn < 3; turn++) {
        run_batches(&eager, want);
        run_batches(&recorded, got);
        CHECK(memcmp(want, got, n * sizeof *got) == 0);
        if (turn == 0) { /* other factors at the same place */
            for (size_t i = 0; i < eager.host.trained_count; i++)
                eager.host.trained[i] *= 0.5f;
            lora_upload(&eager.lora, &eager.host);
            lora_upload(&recorded.lora, &eager.host);
        } else { /* the work memory goes and comes back */
            recorded.be->ops->trim(recorded.be);
            const struct model_config config = TINY_CONFIG;
            const struct backend_needs needs = {.rows = TOKENS,
                                                .width = layer_width_max(&config, 3 * joint_all.rank),
                                                .shape = model_attention_shape(&config),
                                                .segment_rows = 64,
                                                .label_rows = TOKENS,
                                                .vocabulary = config.vocabulary,
                                                .d_model = config.d_model,
                                                .arena = eager.host.trained_count,
                                                .units = EXAMPLES};
            must(recorded.be->ops->reserve(recorded.be, &needs, &err), &err);
        }
    }
    must(recorded.be->ops->sync(recorded.be, &err), &err);
    free(want);
    free(got);
    setup_release(&eager);
    setup_release(&recorded);
}

#ifdef CUDA_SHIM /* of kernels/cuda/shim/shim.h, which is C++ */
void shim_fail_launches(int others, int times);
size_t shim_replays(void);
size_t shim_product_kinds(void);

/* A launch that fails while a pass is recorded must be in no replay as a hole: the pass is done anew. One that goes on
 * failing is an error, and what is recorded after it is whole again. */
static void test_launches_fail_in_a_recording(void)
{
    struct setup s;
    struct error err = {0};
    setup_init(&s, &ffa_qv, (struct backend_cuda_options){.precision = KERNEL_BF16, .eager = true},
               (struct train_options){.per_example = true});
    const size_t n = BATCHES * s.host.trained_count;
    float *want = malloc(n * sizeof *want), *got = malloc(n * sizeof *got);
    run_batches(&s, want);
    setup_release(&s);
    static const int others[] = {20, 45};
    for (size_t i = 0; i < (THOROUGH ? ARRAY_LEN(others) : 1); i++) {
        setup_init(&s, &ffa_qv, (struct backend_cuda_options){.precision = KERNEL_BF16},
                   (struct train_options){.per_example = true});
        set_batch(&s, 0);
        train_run(s.train, &s.lora, &s.batch);
        const size_t before = shim_replays();
        shim_fail_launches(others[i], 1);
        train_run(s.train, &s.lora, &s.batch);
        CHECK(shim_replays() == before); /* the recording was dropped */
        gradient_of(&s, 1, got);
        CHECK(memcmp(got, want, s.host.trained_count * sizeof *got) == 0);
        must(s.be->ops->sync(s.be, &err), &err);
        run_batches(&s, got);
        CHECK(shim_replays() == before + BATCHES);
        CHECK(memcmp(got, want, n * sizeof *got) == 0);
        must(s.be->ops->sync(s.be, &err), &err);
        setup_release(&s);

        setup_init(&s, &ffa_qv, (struct backend_cuda_options){.precision = KERNEL_BF16},
                   (struct train_options){.per_example = true});
        set_batch(&s, 0);
        train_run(s.train, &s.lora, &s.batch);
        shim_fail_launches(others[i], 1000); /* recorded, and then run */
        train_run(s.train, &s.lora, &s.batch);
        CHECK(s.be->ops->sync(s.be, &err) == ERR_FAILED);
        shim_fail_launches(0, 0);
        run_batches(&s, got);
        CHECK(memcmp(got, want, n * sizeof *got) == 0);
        must(s.be->ops->sync(s.be, &err), &err);
        setup_release(&s);
    }
    free(want);
    free(got);
}

/* The warm-up, which is on no record, meets every kind of product that a round does: an algorithm that was chosen by
 * timing a batch would depend on who was drawn. */
static void test_warm_up_meets_every_product(void)
{
    const struct lora_config configs[] = {
        joint_all,
        ffa_qv,
        {.mode = LORA_FFA, .rank = 4, .alpha = 8, .layer_first = 2, .targets = LORA_TARGETS_ALL},
        {.mode = LORA_FFA, .rank = 4, .alpha = 8, .layer_first = 2, .targets = LORA_TARGET_BIT(LORA_DOWN)},
        {.mode = LORA_FFA, .rank = 4, .alpha = 8, .layer_first = 0, .targets = LORA_TARGET_BIT(LORA_UP)},
    };
    for (size_t i = 0; i < ARRAY_LEN(configs); i++) {
        struct setup s;
        const bool turns = configs[i].mode != LORA_JOINT;
        setup_init(&s, &configs[i], (struct backend_cuda_options){.precision = KERNEL_BF16, .tune = true},
                   (struct train_options){.per_example = true, .alternating = turns});
        const size_t kinds = shim_product_kinds();
        CHECK(kinds > 0);
        for (int turn = 0; turn < (turns ? 2 : 1); turn++) {
            batch_clear(&s.batch);
            add_example(&s.batch, 3, 4);
            train_run(s.train, &s.lora, &s.batch);
            CHECK(shim_product_kinds() == kinds);
            if (turns)
                lora_exchange(&s.lora);
        }
        setup_release(&s);
    }
}
#endif

/* --- answering --------------------------------------------------------------------------------------------------- */

struct answers {
    struct tiny tiny;
    struct lora host, lora;
    struct infer *infer;
    struct kv_cache *caches[3];
    struct backend *be;
};

static void answers_init(struct answers *a, struct backend *be, int32_t rows_max)
{
    struct error err = {0};
    const struct model_config config = TINY_CONFIG;
    memset(a, 0, sizeof *a);
    a->be = be;
    tiny_init(&a->tiny, &config, false);
    tiny_lora(&a->host, &joint_all, &a->tiny.model);
    must(lora_place(&a->lora, &a->host, be, &err), &err);
    struct infer_options options = {.backend = be, .rows_max = rows_max, .context_max = 64, .rank_max = 4};
    must(infer_new(&options, &a->tiny.model, &a->infer, &err), &err);
    for (size_t i = 0; i < ARRAY_LEN(a->caches); i++)
        must(kv_cache_new(be, &a->tiny.model, 60, &a->caches[i], &err), &err);
}

static void answers_release(struct answers *a)
{
    for (size_t i = 0; i < ARRAY_LEN(a->caches); i++)
        kv_cache_free(a->caches[i]);
    infer_free(a->infer);
    lora_unplace(&a->lora);
    lora_release(&a->host);
    tiny_release(&a->tiny);
}

static void make_ids(uint32_t seed, int32_t count, int32_t *ids)
{
    float values[64];
    tiny_values(6000 + seed, (size_t)count, 63.0f, 64.0f, values);
    for (int32_t i = 0; i < count; i++)
        ids[i] = (int32_t)values[i];
}

/* The same conversation on two backends: two prompts, alternatives scored, a cache copied and continued token by token
 * past a block's end, an adapter taken away. */
static void converse(struct answers *a, float *logits, double *scores)
{
    struct error err = {0};
    int32_t prompts[2][40], tails[7][8], next[12];
    struct infer_candidate candidates[14];
    for (uint32_t i = 0; i < 2; i++)
        make_ids(20 + i, 40, prompts[i]);
    for (uint32_t i = 0; i < 7; i++)
        make_ids(30 + i, 8, tails[i]);
    make_ids(40, 12, next);
    const struct infer_extend items[2] = {{a->caches[0], prompts[0], 30}, {a->caches[1], prompts[1], 23}};
    must(infer_extend(a->infer, &a->lora, items, 2, &err), &err);
    for (int32_t i = 0; i < 14; i++)
        candidates[i] = (struct infer_candidate){a->caches[i / 7], tails[i % 7], 1 + i % 7, 0};
    must(infer_score(a->infer, &a->lora, candidates, 14, &err), &err);
    for (int32_t i = 0; i < 14; i++)
        scores[i] = candidates[i].log_likelihood;
    kv_cache_truncate(a->caches[2], 0);
    kv_cache_copy(a->caches[2], a->caches[0], 30);
    for (int32_t i = 0; i < 12; i++) {
        const struct infer_extend one = {a->caches[2], next + i, 1};
        must(infer_extend(a->infer, &a->lora, &one, 1, &err), &err);
        CHECK(infer_logits(a->infer, a->caches[2], logits + i * VOCABULARY, &err) == 0);
        int32_t likeliest = -1;
        must(infer_likeliest(a->infer, a->caches[2], &likeliest, &err), &err);
        CHECK(likeliest == likeliest_token(logits + i * VOCABULARY, VOCABULARY));
    }
    kv_cache_truncate(a->caches[2], 0);
    const struct infer_extend base = {a->caches[2], prompts[0], 40};
    must(infer_extend(a->infer, NULL, &base, 1, &err), &err);
    CHECK(infer_logits(a->infer, a->caches[2], logits + 12 * VOCABULARY, &err) == 0);
}

static void check_answers(struct backend_cuda_options options, int32_t rows_max, double tolerance)
{
    static float want[13 * VOCABULARY], got[13 * VOCABULARY];
    double want_scores[14], got_scores[14];
    struct answers a;
    struct backend *cpu = tiny_backend(KERNEL_AVX512_BF16, NULL, KERNEL_F32), *be = open_cuda(options);
    answers_init(&a, cpu, 64);
    converse(&a, want, want_scores);
    answers_release(&a);
    answers_init(&a, be, rows_max);
    for (int repeat = 0; repeat < 2; repeat++) { /* recorded passes the second time */
        for (size_t i = 0; i < 2; i++)
            kv_cache_truncate(a.caches[i], 0);
        memset(got, 0, sizeof got);
        converse(&a, got, got_scores);
        for (int i = 0; i < 13; i++)
            CHECK(distance(got + i * VOCABULARY, want + i * VOCABULARY, VOCABULARY) < tolerance);
        for (int i = 0; i < 14; i++)
            CHECK_NEAR(got_scores[i], want_scores[i], tolerance);
    }
    answers_release(&a);
    backend_free(be);
    backend_free(cpu);
}

static void test_answers(void)
{
    check_answers((struct backend_cuda_options){.precision = KERNEL_F32}, 64, 1e-4);
    check_answers((struct backend_cuda_options){.precision = KERNEL_F32, .eager = true}, 9, 1e-4); /* several passes */
    if (THOROUGH)
        check_answers((struct backend_cuda_options){.precision = KERNEL_F32, .quantise_kv = true}, 64, 3e-2);
    check_answers((struct backend_cuda_options){.precision = KERNEL_BF16, .quantise_kv = true}, 64, 7e-2);
}

/* --- quantised weights and memory -------------------------------------------------------------------------------- */

/* Q8_0 blocks of a float matrix, and the floats that they stand for. */
static void quantise(struct tensor *w, uint8_t *blocks, float *decoded)
{
    const float *from = w->data;
    for (int32_t b = 0; b < w->out * w->in / 32; b++) {
        uint8_t *block = blocks + b * 34;
        const uint16_t scale = 0x1400; /* 2^-10 */
        memcpy(block, &scale, 2);
        for (int i = 0; i < 32; i++) {
            int q = (int)lrintf(from[b * 32 + i] * 1024);
            q = q > 127 ? 127 : q < -127 ? -127 : q;
            block[2 + i] = (uint8_t)(int8_t)q;
            decoded[b * 32 + i] = (float)q / 1024;
        }
    }
    w->data = blocks;
    w->type = TENSOR_Q8_0;
}

/* The gradients of one example with the tiny model's layer matrices as Q8_0 blocks or as the floats they decode to. */
static void quantised_gradient(bool blocks, bool keep, enum kernel_precision precision, float **ret, size_t *ret_count)
{
    struct setup s;
    struct error err = {0};
    const struct model_config config = TINY_CONFIG;
    tiny_init(&s.tiny, &config, true);
    const size_t matrix = 96 * 64;
    uint8_t *bytes = malloc(3 * 7 * matrix / 32 * 34);
    float *floats = malloc(3 * 7 * matrix * sizeof *floats);
    for (int32_t layer = 0; layer < config.layer_count; layer++) {
        struct model_layer *l = &s.tiny.model.layers[layer];
        struct tensor *const all[7] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (int i = 0; i < 7; i++) {
            float *decoded = floats + (size_t)(layer * 7 + i) * matrix;
            struct tensor w = *all[i];
            quantise(&w, bytes + (size_t)(layer * 7 + i) * matrix / 32 * 34, decoded);
            if (blocks)
                *all[i] = w;
            else
                all[i]->data = decoded;
        }
    }
    tiny_lora(&s.host, &joint_all, &s.tiny.model);
    s.be = open_cuda((struct backend_cuda_options){.precision = precision, .keep_quantised = keep});
    struct train_options options = {
        .backend = s.be, .tokens_max = TOKENS, .examples_max = EXAMPLES, .example_tokens_max = 64, .per_example = true};
    must(lora_place(&s.lora, &s.host, s.be, &err), &err);
    must(batch_init(&s.batch, TOKENS, EXAMPLES, &err), &err);
    must(train_new(&options, &s.tiny.model, &s.host, &s.train, &err), &err);
    batch_clear(&s.batch);
    add_example(&s.batch, 7, 5);
    train_run(s.train, &s.lora, &s.batch);
    *ret_count = s.host.trained_count;
    *ret = malloc(*ret_count * sizeof **ret);
    gradient_of(&s, 0, *ret);
    setup_release(&s);
    free(bytes);
    free(floats);
}

static void test_quantised_weights(void)
{
    float *dense, *copied, *kept;
    size_t n;
    for (int precision = KERNEL_F32; precision <= KERNEL_BF16; precision++) {
        quantised_gradient(false, false, (enum kernel_precision)precision, &dense, &n);
        quantised_gradient(true, false, (enum kernel_precision)precision, &copied, &n);
        quantised_gradient(true, true, (enum kernel_precision)precision, &kept, &n);
        CHECK(distance(dense, dense, n) == 0 && dense[n - 1] != 0);
        CHECK(memcmp(dense, copied, n * sizeof *dense) == 0); /* 8-bit steps of 2^-10 are exact in bfloat16 */
        CHECK(memcmp(dense, kept, n * sizeof *dense) == 0);
        free(dense);
        free(copied);
        free(kept);
    }
}

/* A limit too small for all activations: first a higher level, then a plain refusal; nothing crashes, nothing leaks. */
static void test_memory_limit(void)
{
    struct tiny tiny;
    struct lora lora;
    struct error err = {0};
    const struct model_config config = TINY_CONFIG;
    bool refused = false, squeezed = false, roomy = false;
    tiny_init(&tiny, &config, true);
    tiny_lora(&lora, &joint_all, &tiny.model);
    for (size_t limit = (size_t)256 << 10; limit <= (size_t)40 << 20; limit += (size_t)512 << 10) {
        struct backend *be = open_cuda((struct backend_cuda_options){.memory_limit_bytes = limit});
        struct train_options options = {.backend = be,
                                        .tokens_max = 1024,
                                        .examples_max = EXAMPLES,
                                        .example_tokens_max = 64,
                                        .per_example = true,
                                        .checkpoint_level = TRAIN_LEVEL_AUTO};
        struct train *train = NULL;
        int rc = train_new(&options, &tiny.model, &lora, &train, &err);
        CHECK(rc == 0 || (rc == ERR_RESOURCES && strstr(err.message, "MB") && !strstr(err.message, " 0 MB")));
        refused = refused || rc < 0;
        squeezed = squeezed || (rc == 0 && train_level(train) > 0);
        roomy = roomy || (rc == 0 && train_level(train) == 0);
        train_free(train);
        backend_free(be);
    }
    CHECK(refused && squeezed && roomy);
    lora_release(&lora);
    tiny_release(&tiny);
}

/* Passes whose grids no card launches are refused when they are planned. */
static void check_pass_too_large(void)
{
    struct tiny tiny;
    struct error err = {0};
    struct backend *be = open_cuda((struct backend_cuda_options){.precision = KERNEL_BF16});
    const struct model_config config = TINY_CONFIG;
    tiny_init(&tiny, &config, true);
    for (int32_t rows = 8192; rows <= 65536; rows += 65536 - 8192) {
        struct infer *infer = NULL;
        const struct infer_options options = {.backend = be, .rows_max = rows, .context_max = 64};
        CHECK(infer_new(&options, &tiny.model, &infer, &err) == ERR_CONFIG && !infer);
        CHECK(strstr(err.message, rows == 8192 ? "8192 rows" : "65536 rows"));
    }
    backend_free(be);
    tiny_release(&tiny);
}

static void test_refusals(void)
{
    struct backend *be = NULL;
    struct error err = {0};
    struct tiny tiny;
    const struct backend_cuda_options absent = {.device = 200};
    CHECK(backend_cuda_new(&absent, &be, &err) == ERR_NOT_FOUND && !be && strstr(err.message, "200"));
    const struct backend_cuda_options greedy = {.memory_limit_bytes = (size_t)1 << 60};
    CHECK(backend_cuda_new(&greedy, &be, &err) == ERR_CONFIG && !be && strstr(err.message, "MB"));
    /* widths that are no multiple of 8 */
    struct model_config config = TINY_CONFIG;
    struct placed_model *placed = NULL;
    config.d_ff = 100;
    tiny_init(&tiny, &config, true);
    be = open_cuda((struct backend_cuda_options){.precision = KERNEL_BF16});
    CHECK(placed_model_new(be, &tiny.model, 4, &placed, &err) == ERR_CONFIG && !placed && strstr(err.message, "100"));
    backend_free(be);
    tiny_release(&tiny);
    check_pass_too_large();
}

int main(void)
{
    RUN(test_golden_float32);
    RUN(test_golden_bfloat16);
    RUN(test_bits_do_not_depend_on_batchmates);
    RUN(test_factors_in_turn);
    RUN(test_bits_on_real_shapes);
    RUN(test_summed_gradient);
    RUN(test_empty_batches);
    RUN(test_clipping_as_on_the_cpu);
    RUN(test_replays);
#ifdef CUDA_SHIM
    RUN(test_launches_fail_in_a_recording);
    RUN(test_warm_up_meets_every_product);
#endif
    RUN(test_answers);
    RUN(test_quantised_weights);
    RUN(test_memory_limit);
    RUN(test_refusals);
    return check_report();
}
