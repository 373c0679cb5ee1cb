/*
 * Inference speed on a model of SmolLM2-135M's shape with a Q4_1 base: prefill, decoding, and scoring label texts.
 *
 *     bench_infer [--threads N] [--prompts P] [--tokens T] [--candidates C] [--length L] [--precision bf16|f32]
 *                 [--shadow] [--json]
 *
 * P prompts of T tokens are prefilled in one packed call, then each is scored against C candidates of L tokens.
 */
#include "bench/synthetic.h"
#include "model/infer.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct settings {
    int threads, prompts, tokens, candidates, length;
    enum kernel_precision precision;
    bool shadow, json;
};

static const struct option options[] = {
    {"threads", required_argument, NULL, 't'},
    {"prompts", required_argument, NULL, 'P'},
    {"tokens", required_argument, NULL, 'T'},
    {"candidates", required_argument, NULL, 'C'},
    {"length", required_argument, NULL, 'L'},
    {"precision", required_argument, NULL, 'p'},
    {"shadow", no_argument, NULL, 's'},
    {"json", no_argument, NULL, 'j'},
    {NULL, 0, NULL, 0},
};

static void parse(int argc, char **argv, struct settings *s)
{
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        int number = optarg ? (int)strtol(optarg, NULL, 10) : 0;
        switch (c) {
        case 't':
            s->threads = number;
            break;
        case 'P':
            s->prompts = number;
            break;
        case 'T':
            s->tokens = number;
            break;
        case 'C':
            s->candidates = number;
            break;
        case 'L':
            s->length = number;
            break;
        case 'p':
            s->precision = strcmp(optarg, "f32") == 0 ? KERNEL_F32 : KERNEL_BF16;
            break;
        case 's':
            s->shadow = true;
            break;
        case 'j':
            s->json = true;
            break;
        default:
            exit(2);
        }
    }
    if (s->prompts < 1 || s->prompts > 64 || s->tokens < 1 || s->tokens > 1024 || s->candidates < 1 || s->length < 1 ||
        s->length > 128) {
        fprintf(stderr, "bench_infer: numbers out of range\n");
        exit(2);
    }
}

static void check(int rc, const struct error *err)
{
    if (rc < 0) {
        fprintf(stderr, "%s\n", err->message);
        exit(1);
    }
}

struct times {
    double prefill, score, decode; /* seconds, the best of a few */
};

static void measure(const struct settings *s, struct infer *infer, const struct lora *lora, struct kv_cache **caches,
                    const int32_t *ids, struct times *best)
{
    struct error err = {0};
    struct infer_extend prompts[64];
    struct infer_candidate *candidates = calloc((size_t)s->prompts * (size_t)s->candidates, sizeof *candidates);
    float *logits = calloc(49152, sizeof *logits);
    if (!candidates || !logits)
        abort();
    *best = (struct times){1e30, 1e30, 1e30};
    for (int repeat = 0; repeat < 4; repeat++) {
        for (int i = 0; i < s->prompts; i++) {
            kv_cache_truncate(caches[i], 0);
            prompts[i] = (struct infer_extend){caches[i], ids + i * 7, s->tokens};
            for (int k = 0; k < s->candidates; k++)
                candidates[i * s->candidates + k] = (struct infer_candidate){caches[i], ids + 31 * k, s->length, 0};
        }
        double t0 = now_seconds();
        check(infer_extend(infer, lora, prompts, s->prompts, &err), &err);
        double t1 = now_seconds();
        check(infer_score(infer, lora, candidates, s->prompts * s->candidates, &err), &err);
        double t2 = now_seconds();
        for (int i = 0; i < 32; i++) {
            struct infer_extend one = {caches[0], ids + i, 1};
            check(infer_extend(infer, lora, &one, 1, &err), &err);
            check(infer_logits(infer, caches[0], logits, &err), &err);
        }
        double t3 = now_seconds();
        best->prefill = t1 - t0 < best->prefill ? t1 - t0 : best->prefill;
        best->score = t2 - t1 < best->score ? t2 - t1 : best->score;
        best->decode = t3 - t2 < best->decode ? t3 - t2 : best->decode;
    }
    free(logits);
    free(candidates);
}

int main(int argc, char **argv)
{
    struct settings s = {
        .threads = 1, .prompts = 8, .tokens = 35, .candidates = 10, .length = 5, .precision = KERNEL_BF16};
    struct synthetic synthetic;
    struct lora lora;
    struct infer *infer;
    struct kv_cache *caches[64];
    struct pool *pool = NULL;
    struct backend *backend = NULL;
    struct error err = {0};
    struct times t;
    int32_t ids[4096];
    uint64_t state = 5;
    parse(argc, argv, &s);
    synthetic_init(&synthetic, s.shadow);
    const struct model *model = synthetic_model(&synthetic);
    const struct lora_config config = {.mode = LORA_FFA,
                                       .rank = 8,
                                       .alpha = 16,
                                       .layer_first = 20,
                                       .targets = LORA_TARGET_BIT(LORA_Q) | LORA_TARGET_BIT(LORA_V)};
    synthetic_lora(&lora, &config, model);
    for (size_t i = 0; i < ARRAY_LEN(ids); i++)
        ids[i] = (int32_t)(next_random(&state) % 49152);
    check(pool_new(s.threads, &pool, &err), &err);
    check(backend_cpu_new(kernels_cpu(KERNEL_AVX512_BF16), pool, s.precision, &backend, &err), &err);
    struct infer_options infer_options = {.backend = backend, .rows_max = 384, .context_max = 2048, .rank_max = 8};
    check(infer_new(&infer_options, model, &infer, &err), &err);
    for (int i = 0; i < s.prompts; i++)
        check(kv_cache_new(backend, model, s.tokens + s.length + 64, &caches[i], &err), &err);
    measure(&s, infer, &lora, caches, ids, &t);
    const double prompt_rows = s.prompts * s.tokens, inner = s.prompts * s.candidates * (s.length - 1);
    if (s.json)
        printf("{\"backend\":\"%s\",\"threads\":%d,\"prefill_tokens_per_s\":%.1f,\"score_tokens_per_s\":%.1f,"
               "\"records_per_s\":%.2f,\"decode_tokens_per_s\":%.1f}\n",
               backend->name, s.threads, prompt_rows / t.prefill, inner / t.score, s.prompts / (t.prefill + t.score),
               32 / t.decode);
    else
        printf("%-12s threads %d  prefill %8.1f tokens/s  score %8.1f tokens/s  = %6.2f records/s  decode %6.1f "
               "tokens/s\n",
               backend->name, s.threads, prompt_rows / t.prefill, inner / t.score, s.prompts / (t.prefill + t.score),
               32 / t.decode);
    for (int i = 0; i < s.prompts; i++)
        kv_cache_free(caches[i]);
    infer_free(infer);
    backend_free(backend);
    pool_free(pool);
    lora_release(&lora);
    synthetic_release(&synthetic);
    return 0;
}
