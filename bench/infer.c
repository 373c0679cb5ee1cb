/*
 * Inference speed of one sequence: a prompt in one call, then tokens one by one, each with its logits, against what
 * reading the weights and the cache would take at the memory's speed, measured after each round.
 *
 *     infer [--shape smollm2-135m | --model FILE] [--quant q4_1] [--threads 2] [--seq 512] [--tokens 64]
 *           [--precision bf16] [--json]      --help lists the rest
 */
#include "bench/ceiling.h"
#include "bench/common.h"
#include "model/infer.h"

#include <stdio.h>
#include <stdlib.h>

static void check(int rc, const struct error *err)
{
    if (rc < 0)
        bench_fail(err->message);
}

struct bench {
    struct bench_options o;
    struct bench_model m;
    struct pool *pool;
    struct backend *be;
    struct infer *infer;
    struct kv_cache *cache;
    int32_t *ids;
    float *logits;
    double prompt[100], decode[100]; /* seconds of each round */
    double bandwidth[100];           /* bytes/s that threads read, after each round */
    long allocations;
    size_t rss;
};

static void init(struct bench *b)
{
    struct error err = {0};
    const struct bench_options *o = &b->o;
    uint64_t state = 5;
    bench_model_open(&b->m, o);
    const struct model_config *c = &b->m.model->config;
    check(pool_new(o->threads, &b->pool, &err), &err);
    check(backend_cpu_new(kernels_cpu(o->isa), b->pool, o->precision, &b->be, &err), &err);
    const struct infer_options options = {.backend = b->be,
                                          .rows_max = o->seq < 512 ? o->seq : 512,
                                          .context_max = o->seq + o->tokens,
                                          .answering = true};
    check(infer_new(&options, b->m.model, &b->infer, &err), &err);
    check(kv_cache_new(b->be, b->m.model, o->seq + o->tokens, &b->cache, &err), &err);
    b->ids = calloc((size_t)o->seq, sizeof *b->ids);
    b->logits = calloc((size_t)c->vocabulary, sizeof *b->logits);
    if (!b->ids || !b->logits)
        bench_fail("out of memory");
    for (int i = 0; i < o->seq; i++)
        b->ids[i] = (int32_t)(next_random(&state) % (uint32_t)c->vocabulary);
}

static void measure(struct bench *b)
{
    struct error err = {0};
    const struct bench_options *o = &b->o;
    for (int round = -1; round < o->rounds; round++) { /* one to warm up */
        bench_turn(o);
        const long before = bench_allocations();
        struct infer_extend prompt = {b->cache, b->ids, o->seq};
        kv_cache_truncate(b->cache, 0);
        const double t0 = now_seconds();
        check(infer_extend(b->infer, NULL, &prompt, 1, &err), &err);
        check(infer_logits(b->infer, b->cache, b->logits, &err), &err);
        const double t1 = now_seconds();
        for (int i = 0; i < o->tokens; i++) {
            struct infer_extend one = {b->cache, b->ids + i % o->seq, 1};
            check(infer_extend(b->infer, NULL, &one, 1, &err), &err);
            check(infer_logits(b->infer, b->cache, b->logits, &err), &err);
        }
        const double t2 = now_seconds();
        if (round < 0)
            continue;
        b->allocations += bench_allocations() - before;
        b->prompt[round] = t1 - t0;
        b->decode[round] = t2 - t1;
        if (round == 0)
            b->rss = bench_peak_rss_bytes(); /* before the memory that measures the bandwidth */
        if (o->ceiling)
            b->bandwidth[round] = ceiling_read_bandwidth(b->pool);
    }
}

int main(int argc, char **argv)
{
    static struct bench b = {.o = BENCH_DEFAULTS};
    bench_parse(argc, argv, &b.o);
    init(&b);
    measure(&b);
    const struct model_config *c = &b.m.model->config;
    const double kv = 8.0 * c->layer_count * c->kv_head_count * c->head_size * (b.o.seq + b.o.tokens / 2.0);
    const double bytes = (double)bench_weight_bytes(b.m.model) + kv;
    const double prompt = b.o.seq / bench_median(b.prompt, b.o.rounds);
    const double decode = b.o.tokens / bench_median(b.decode, b.o.rounds);
    const double bandwidth = b.o.ceiling ? bench_median(b.bandwidth, b.o.rounds) : 0;
    const double fraction = b.o.ceiling ? decode * bytes / bandwidth : 0;
    const char *precision = b.o.precision == KERNEL_BF16 ? "bf16" : "f32";
    if (b.o.json)
        printf("{\"program\":\"infer\",\"model\":\"%s\",\"isa\":\"%s\",\"precision\":\"%s\",\"threads\":%d,\"seq\":%d,"
               "\"tokens\":%d,\"prompt_tokens_per_second\":%.2f,\"decode_tokens_per_second\":%.2f,"
               "\"bandwidth_fraction\":%.4f,\"bandwidth_bytes_per_second\":%.0f,\"bytes_per_token\":%.0f,"
               "\"peak_rss_bytes\":%zu,\"allocations\":%ld}\n",
               b.m.name, b.be->name, precision, b.o.threads, b.o.seq, b.o.tokens, prompt, decode, fraction, bandwidth,
               bytes, b.rss, b.allocations);
    else
        printf("%s, %s, %s, %d threads: prompt of %d %.1f tokens/s, decoding %.1f tokens/s = %.2f of %.1f GB/s; %.0f "
               "MB, %ld allocations\n",
               b.m.name, b.be->name, precision, b.o.threads, b.o.seq, prompt, decode, fraction, bandwidth * 1e-9,
               (double)b.rss * 1e-6, b.allocations);
    kv_cache_free(b.cache);
    infer_free(b.infer);
    backend_free(b.be);
    pool_free(b.pool);
    bench_model_close(&b.m);
    free(b.ids);
    free(b.logits);
    return 0;
}
