/* Validation, LoRA's layout and initial values, batches, optimizers, sampling, the bfloat16 copy. */
#include "model/batch.h"
#include "model/lora.h"
#include "model/model.h"
#include "model/optimizer.h"
#include "model/sampling.h"
#include "tests/check.h"
#include "tests/model/tiny.h"

static void test_validation_names_what_is_wrong(void)
{
    struct tiny tiny;
    struct error err = {0};
    const struct model_config config = TINY_CONFIG;
    tiny_init(&tiny, &config, true);
    struct model good = tiny.model, m;
    float bad_gain[64] = {[7] = NAN};

#define REFUSED(change, words)                                                                                         \
    do {                                                                                                               \
        m = good;                                                                                                      \
        change;                                                                                                        \
        CHECK(model_validate(&m, &err) == ERR_INTEGRITY);                                                              \
        if (!strstr(err.message, words))                                                                               \
            fprintf(stderr, "%s\n", err.message);                                                                      \
        CHECK(strstr(err.message, words) != NULL);                                                                     \
    } while (0)

    CHECK(model_validate(&good, &err) == 0);
    REFUSED(m.config.architecture = 0, "architecture");
    REFUSED(m.config.layer_count = 0, "layers");
    REFUSED(m.config.layer_count = MODEL_LAYERS_MAX + 1, "layers");
    REFUSED(m.config.layer_count = 4, "missing");
    REFUSED(m.config.kv_head_count = 3, "share");
    REFUSED(m.config.head_size = 24, "multiple of 16");
    REFUSED(m.config.rope_base = NAN, "rotary");
    REFUSED(m.config.norm_eps = 0, "epsilon");
    REFUSED(m.config.vocabulary = 127, "token_embd");
    REFUSED(m.layers[1].k.out = 64, "blk.1.attn_k");
    REFUSED(m.layers[2].down.data = NULL, "blk.2.ffn_down");
    REFUSED(m.layers[2].down.type = 99, "element type");
    REFUSED(m.layers[2].down.type = TENSOR_Q4_K, "blocks");
    REFUSED(m.layers[0].q.data = (const char *)m.layers[0].q.data + 2, "aligned");
    REFUSED(m.layers[0].ffn_norm.data = bad_gain, "finite");
    REFUSED(m.layers[0].ffn_norm.type = TENSOR_F16, "F32");
    REFUSED(m.output = m.layers[0].q, "output");
    REFUSED(m.config.architecture = (enum model_architecture)6, "qwen3");
    REFUSED(m.config.rotated = 18, "rotated");
    REFUSED(m.config.rotated = 7, "even");
    REFUSED(m.config.gate = (enum gate_kind)2, "activation");
    REFUSED(m.config.window = -1, "window");
    REFUSED(m.config.window = 8, "period"); /* which layers slide is not said */
    REFUSED(m.config.rope_base_sliding = INFINITY, "sliding");
    REFUSED(m.config.attention_scale = NAN, "attention scale");
    REFUSED(m.config.embedding_scale = -1, "embedding scale");
    REFUSED(m.config.qkv_bias = true, "blk.0.attn_q.bias");
    REFUSED(m.config.qk_norm = true, "blk.0.attn_q_norm");
    REFUSED(m.config.post_norms = true, "blk.0.post_attention_norm");
    REFUSED(m.layers[1].k_bias = m.layers[1].attn_norm, "blk.1.attn_k.bias is not part");
    REFUSED(m.layers[1].ffn_post_norm = m.layers[1].attn_norm, "blk.1.post_ffw_norm is not part");
    REFUSED(m.config.fused_gate_up = true, "ffn_gate");
    REFUSED(m.config.fused_gate_up = true; m.layers[0].gate = (struct tensor){0}, "ffn_up");
    REFUSED(m.rope_freqs = m.layers[0].attn_norm, "rope_freqs");
    tiny_release(&tiny);
}

static void test_layers_that_slide(void)
{
    struct model_config config = TINY_CONFIG;
    CHECK(!model_layer_slides(&config, 0) && model_embedding_scale(&config) == 1 && model_rotated(&config) == 16);
    CHECK_NEAR(model_attention_scale(&config), 0.25, 1e-15);
    config.window = 8;
    config.window_period = 6;
    for (int32_t layer = 0; layer < 12; layer++)
        CHECK(model_layer_slides(&config, layer) == (layer != 5 && layer != 11));
    enum model_architecture architecture;
    for (int i = 1; i <= MODEL_ARCHITECTURE_COUNT; i++)
        CHECK(model_architecture_parse(model_architecture_name((enum model_architecture)i), &architecture) &&
              (int)architecture == i);
    CHECK(!model_architecture_parse("llama4", &architecture));
}

static void test_lora_layout(void)
{
    struct lora lora;
    struct error err = {0};
    const struct model_config model = TINY_CONFIG;
    struct lora_config config = {.mode = LORA_JOINT,
                                 .rank = 4,
                                 .alpha = 8,
                                 .layer_first = 1,
                                 .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_DOWN)};
    CHECK(lora_init(&lora, &config, &model, &err) == 0);
    CHECK(lora.entry_count == 4 && lora.config.layer_count == 2 && lora.scale == 2);
    CHECK(lora.trained_count == 2 * 4 * (64 + 96) + 2 * 4 * (64 + 64) && lora.frozen_count == 0);
    CHECK(lora_a(&lora, 1, LORA_Q) == lora.trained && lora_a(&lora, 1, LORA_DOWN) == lora.trained + 4 * 64);
    CHECK(lora_a(&lora, 2, LORA_Q) == lora.trained + 4 * 160 && lora_b(&lora, 1, LORA_Q) == lora.trained + 8 * 160);
    CHECK(!lora_a(&lora, 0, LORA_Q) && !lora_b(&lora, 1, LORA_K) && !lora_adapts(&lora, 2, LORA_UP));
    lora_release(&lora);
    config.mode = LORA_FFA;
    config.scaling = LORA_SCALE_SQRT_RANK;
    CHECK(lora_init(&lora, &config, &model, &err) == 0);
    CHECK(lora.trained_count == 8 * 128 && lora.frozen_count == 8 * 160 && lora.scale == 4);
    CHECK(lora_a(&lora, 1, LORA_Q) == lora.frozen && lora_b(&lora, 1, LORA_DOWN) == lora.trained + 4 * 64);
    struct buffer b;
    buffer_init(&b, 4096);
    lora_encode(&lora, &b);
    CHECK(buffer_ok(&b) && b.len == 4 * 4 + 8 + 4 * 4 + 4 * 16 && b.data[0] == 1 && b.data[4] == LORA_FFA);
    buffer_release(&b);
    lora_release(&lora);
    enum lora_target target;
    for (int i = 0; i < LORA_TARGET_COUNT; i++)
        CHECK(lora_target_parse(lora_target_name((enum lora_target)i), &target) && (int)target == i);
    CHECK(!lora_target_parse("query", &target));
}

/* One matrix of gate and up is one target, whatever a job's targets say. */
static void test_lora_on_fused_gate_up(void)
{
    struct lora lora;
    struct error err = {0};
    struct model_config model = TINY_CONFIG;
    struct lora_config config = {.mode = LORA_FFA, .rank = 4, .alpha = 8, .targets = LORA_TARGETS_ALL};
    model.fused_gate_up = true;
    CHECK(lora_init(&lora, &config, &model, &err) == 0);
    CHECK(lora.entry_count == 3 * 6 && !lora_adapts(&lora, 0, LORA_GATE) && lora_adapts(&lora, 0, LORA_UP));
    CHECK(lora.entries[lora.index[1][LORA_UP]].out == 2 * 96 && lora.entries[lora.index[1][LORA_UP]].in == 64);
    lora_release(&lora);
    config.targets = LORA_TARGET_BIT(LORA_GATE);
    CHECK(lora_init(&lora, &config, &model, &err) == ERR_CONFIG && strstr(err.message, "one matrix"));
    config.targets = LORA_TARGET_BIT(LORA_UP);
    CHECK(lora_init(&lora, &config, &model, &err) == 0 && lora.entry_count == 3);
    lora_release(&lora);
}

static void test_factors_change_places(void)
{
    struct lora lora;
    struct error err = {0};
    const struct model_config model = TINY_CONFIG;
    const struct lora_config config = {.mode = LORA_FFA, .rank = 2, .alpha = 8, .layer_first = 2, .targets = 0x09};
    CHECK(lora_init(&lora, &config, &model, &err) == 0);
    const float *a = lora_a(&lora, 2, LORA_O), *b = lora_b(&lora, 2, LORA_O);
    lora_exchange(&lora);
    CHECK(lora.config.mode == LORA_FFB && lora.trained_count == 2 * 128 && lora.frozen_count == 2 * 128);
    CHECK(lora_a(&lora, 2, LORA_O) == a && lora_b(&lora, 2, LORA_O) == b && a == lora.trained + 2 * 64);
    lora_exchange(&lora);
    CHECK(lora.config.mode == LORA_FFA && b == lora.trained + 2 * 64 && lora_b(&lora, 2, LORA_O) == b);
    lora_release(&lora);
    struct lora_config other = config;
    other.mode = LORA_FFB;
    CHECK(lora_init(&lora, &other, &model, &err) == 0);
    CHECK(lora_a(&lora, 2, LORA_Q) == lora.trained && lora_b(&lora, 2, LORA_Q) == lora.frozen);
    lora_release(&lora);
}

static void test_lora_refusals(void)
{
    struct lora lora;
    struct error err = {0};
    const struct model_config model = TINY_CONFIG;
    const struct lora_config good = {.mode = LORA_FFA, .rank = 4, .alpha = 8, .targets = 1};
    struct lora_config bad[8];
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        bad[i] = good;
    bad[0].mode = 0;
    bad[1].rank = 0;
    bad[2].rank = LORA_RANK_MAX + 1;
    bad[3].alpha = NAN;
    bad[4].targets = 0;
    bad[5].targets = 1u << LORA_TARGET_COUNT;
    bad[6].layer_first = 3;
    bad[7].layer_count = 4;
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        CHECK(lora_init(&lora, &bad[i], &model, &err) == ERR_CONFIG);
}

/* A stream of little-endian u32 that count up in steps. */
static void counting_fill(void *ctx, void *out, size_t len)
{
    uint32_t *next = ctx;
    uint8_t *bytes = out;
    for (size_t i = 0; i + 4 <= len; i += 4, *next += 0x01000193u)
        for (int k = 0; k < 4; k++)
            bytes[i + (size_t)k] = (uint8_t)(*next >> 8 * k);
}

struct streams {
    uint32_t counters[16];
    int used;
    uint32_t last_layer;
    enum lora_target last_target;
};

static struct rng counting_stream(void *ctx, uint32_t layer, enum lora_target target)
{
    struct streams *s = ctx;
    s->last_layer = layer;
    s->last_target = target;
    s->counters[s->used] = layer * 100 + target;
    return (struct rng){counting_fill, &s->counters[s->used++]};
}

static void test_frozen_factors_have_known_bits(void)
{
    struct lora lora;
    struct error err = {0};
    struct streams streams = {0};
    const struct model_config model = TINY_CONFIG;
    const struct lora_config config = {.mode = LORA_FFA,
                                       .rank = 2,
                                       .alpha = 2,
                                       .layer_first = 1,
                                       .targets = LORA_TARGET_BIT(LORA_V) | LORA_TARGET_BIT(LORA_DOWN)};
    CHECK(lora_init(&lora, &config, &model, &err) == 0);
    lora_fill_a(&lora, counting_stream, &streams);
    CHECK(streams.used == 4 && streams.last_layer == 2 && streams.last_target == LORA_DOWN);
    /* √64 is exact: value k is (2n + 1 − 2^24)/2^27 */
    const float *v = lora_a(&lora, 1, LORA_V), *down = lora_a(&lora, 1, LORA_DOWN);
    for (uint32_t k = 0; k < 128; k++) {
        int32_t n = (int32_t)((102u + k * 0x01000193u) & 0xffffffu);
        CHECK(v[k] == (float)(2 * n + 1 - 16777216) / 134217728.0f);
    }
    double low = 0, high = 0;
    for (uint32_t k = 0; k < 2 * 96; k++) {
        int32_t n = (int32_t)((106u + k * 0x01000193u) & 0xffffffu);
        CHECK_NEAR(down[k] * sqrt(96), (2.0 * n + 1 - 16777216) / 16777216, 1e-6);
        low = fmin(low, down[k]);
        high = fmax(high, down[k]);
    }
    CHECK(low < 0 || high > 0);
    /* All 192 values by FNV-1a; the constant is from Python's math.isqrt and exactly rounded floats. */
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t k = 0; k < 2 * 96 * sizeof(float); k++)
        hash = (hash ^ ((const uint8_t *)down)[k]) * 0x100000001b3u;
    CHECK(hash == 0x7d8eb48327ee0745u);
    lora_release(&lora);
}

static void test_batch_packing(void)
{
    struct batch b;
    struct error err = {0};
    const int32_t ids[6] = {10, 11, 12, 13, 14, 15};
    const uint8_t learn[6] = {1, 0, 0, 1, 1, 0};
    CHECK(batch_init(&b, 10, 2, &err) == 0);
    batch_clear(&b);
    CHECK(batch_add(&b, &(struct batch_example){ids, learn, 6}));
    CHECK(!batch_add(&b, &(struct batch_example){ids, learn, 5}) && b.tokens == 6 && b.examples == 1);
    CHECK(batch_add(&b, &(struct batch_example){ids, learn, 4}));
    CHECK(!batch_add(&b, &(struct batch_example){ids, learn, 1}) && b.examples == 2); /* tokens and examples full */
    CHECK(b.labels == 3 && b.label_rows[0] == 2 && b.label_rows[1] == 3 && b.label_rows[2] == 8);
    CHECK(b.label_targets[0] == 13 && b.label_targets[1] == 14 && b.label_targets[2] == 13);
    CHECK(b.label_weights[0] == 0.5f && b.label_weights[2] == 1.0f);
    CHECK(b.label_offsets[1] == 2 && b.label_offsets[2] == 3 && b.offsets[1] == 6 && b.offsets[2] == 10);
    CHECK(b.positions[5] == 5 && b.positions[6] == 0 && b.positions[9] == 3);
    batch_release(&b);
    CHECK(batch_init(&b, 0, 1, &err) == ERR_CONFIG && batch_init(&b, 4, 5, &err) == ERR_CONFIG);
}

/* Two steps by hand on f(p) = p²/2. */
static void test_optimizers(void)
{
    struct optimizer o;
    struct error err = {0};
    struct backend *backend = tiny_backend(KERNEL_AVX512_BF16, NULL, KERNEL_F32);
    float p[20], g[20];
    struct optimizer_config sgd = {.kind = OPTIMIZER_SGD, .lr = 0.1f, .momentum = 0.5f};
    CHECK(optimizer_init(&o, &sgd, backend, 20, &err) == 0);
    for (int i = 0; i < 20; i++)
        p[i] = (float)i;
    for (int step = 0; step < 2; step++) {
        memcpy(g, p, sizeof p);
        optimizer_step(&o, g, p);
    }
    for (int i = 0; i < 20; i++) /* m: p, then p/2 + 0.9p = 1.4p: p → 0.9p → 0.9p − 0.14p */
        CHECK_NEAR(p[i], 0.76 * i, 1e-6);
    optimizer_reset(&o, 20);
    CHECK(o.steps == 0 && o.m[5] == 0);
    optimizer_release(&o);
    struct optimizer_config adamw = {
        .kind = OPTIMIZER_ADAMW, .lr = 0.1f, .beta1 = 0.9f, .beta2 = 0.99f, .eps = 1e-8f, .weight_decay = 0.5f};
    CHECK(optimizer_init(&o, &adamw, backend, 20, &err) == 0);
    for (int i = 0; i < 20; i++)
        p[i] = g[i] = (float)(i + 1);
    optimizer_step(&o, g, p);
    for (int i = 0; i < 20; i++) /* the first step is lr·sign(g), after a decay by lr·wd */
        CHECK_NEAR(p[i], 0.95 * (i + 1) - 0.1, 1e-5);
    /* A shorter arena's turn, and the longer one's again: both start with clean moments. */
    for (size_t count = 6; count <= 20; count += 14) {
        optimizer_reset(&o, count);
        for (size_t i = 0; i < 20; i++)
            CHECK(o.m[i] == 0 && o.v[i] == 0);
        for (int i = 0; i < 20; i++)
            p[i] = g[i] = (float)(i + 1);
        optimizer_step(&o, g, p);
        for (int i = 0; i < 20; i++)
            CHECK_NEAR(p[i], (size_t)i < count ? 0.95 * (i + 1) - 0.1 : i + 1, 1e-5);
    }
    optimizer_release(&o);
    struct optimizer_config bad[] = {sgd, sgd, sgd, adamw, adamw, adamw};
    bad[0].lr = -1;
    bad[1].momentum = 1;
    bad[2].weight_decay = 0.1f;
    bad[3].beta2 = 1;
    bad[4].eps = 0;
    bad[5].kind = 7;
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        CHECK(optimizer_init(&o, &bad[i], backend, 20, &err) == ERR_CONFIG);
    backend_free(backend);
}

struct uniform {
    uint64_t state;
};

static void uniform_fill(void *ctx, void *out, size_t len)
{
    struct uniform *u = ctx;
    uint8_t *bytes = out;
    for (size_t i = 0; i < len; i++) {
        u->state = u->state * 6364136223846793005u + 1442695040888963407u;
        bytes[i] = (uint8_t)(u->state >> 56);
    }
}

/* How often each of six tokens comes in 20,000 draws, against what the settings should give. */
static void check_frequencies(struct sampler_config config, const double *want)
{
    struct sampler s;
    struct error err = {0};
    struct uniform u = {42};
    const struct rng rng = {uniform_fill, &u};
    const float logits[6] = {0.0f, 2.0f, 1.0f, -1.0f, 1.5f, -20.0f};
    int counts[6] = {0}, draws = 20000;
    CHECK(sampler_init(&s, &config, 6, &err) == 0);
    for (int i = 0; i < draws; i++)
        counts[sampler_next(&s, logits, &rng)]++;
    for (int i = 0; i < 6; i++)
        CHECK(fabs((double)counts[i] / draws - want[i]) < 0.015 && (want[i] > 0 || counts[i] == 0));
    sampler_release(&s);
}

static void test_sampling(void)
{
    const double e[5] = {1, exp(2), exp(1), exp(-1), exp(1.5)}, total = e[0] + e[1] + e[2] + e[3] + e[4];
    check_frequencies((struct sampler_config){.temperature = 0}, (const double[]){0, 1, 0, 0, 0, 0});
    check_frequencies((struct sampler_config){.temperature = 1, .top_p = 1},
                      (const double[]){e[0] / total, e[1] / total, e[2] / total, e[3] / total, e[4] / total, 1e-9});
    double two = e[1] + e[4];
    check_frequencies((struct sampler_config){.temperature = 1, .top_k = 2},
                      (const double[]){0, e[1] / two, 0, 0, e[4] / two, 0});
    /* 0.48 and 0.29 of the mass: 0.7 needs both, 0.4 the first alone */
    check_frequencies((struct sampler_config){.temperature = 1, .top_p = 0.7f},
                      (const double[]){0, e[1] / two, 0, 0, e[4] / two, 0});
    check_frequencies((struct sampler_config){.temperature = 1, .top_p = 0.4f}, (const double[]){0, 1, 0, 0, 0, 0});
    double hot = exp(1) + exp(0.75);
    check_frequencies((struct sampler_config){.temperature = 2, .top_k = 2},
                      (const double[]){0, exp(1) / hot, 0, 0, exp(0.75) / hot, 0});
    struct sampler s;
    struct error err = {0};
    CHECK(sampler_init(&s, &(struct sampler_config){.temperature = -1}, 6, &err) == ERR_CONFIG);
    CHECK(sampler_init(&s, &(struct sampler_config){.top_k = -1}, 6, &err) == ERR_CONFIG);
    CHECK(sampler_init(&s, &(struct sampler_config){.top_p = 1.5f}, 6, &err) == ERR_CONFIG);
}

static void test_bfloat16_copy(void)
{
    struct tiny tiny;
    struct model_shadow shadow;
    struct error err = {0};
    const struct model_config config = TINY_CONFIG;
    tiny_init(&tiny, &config, false);
    CHECK(model_shadow_init(&shadow, &tiny.model, &err) == 0);
    CHECK(model_validate(&shadow.model, &err) == 0);
    CHECK(model_weight_count(&shadow.model) == 128 * 64 + 3 * 64 * (2 * 64 + 2 * 32 + 3 * 96));
    const struct tensor *was = &tiny.model.layers[2].down, *is = &shadow.model.layers[2].down;
    float row[96];
    CHECK(is->type == TENSOR_BF16 && shadow.model.layers[2].ffn_norm.data == tiny.model.layers[2].ffn_norm.data);
    for (int32_t r = 0; r < is->out; r++) {
        tensor_dequantise(TENSOR_BF16, (const uint16_t *)is->data + (size_t)r * 96, 96, row);
        for (int32_t i = 0; i < 96; i++)
            CHECK(fabsf(row[i] - ((const float *)was->data)[r * 96 + i]) <= fabsf(row[i]) / 256);
    }
    model_shadow_release(&shadow);
    tiny_release(&tiny);
}

int main(void)
{
    RUN(test_validation_names_what_is_wrong);
    RUN(test_lora_layout);
    RUN(test_layers_that_slide);
    RUN(test_lora_on_fused_gate_up);
    RUN(test_factors_change_places);
    RUN(test_lora_refusals);
    RUN(test_frozen_factors_have_known_bits);
    RUN(test_batch_packing);
    RUN(test_optimizers);
    RUN(test_sampling);
    RUN(test_bfloat16_copy);
    return check_report();
}
