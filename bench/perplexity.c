/*
 * Perplexity of a model on a text, the way that bench/peers/perplexity_peer.py measures llama.cpp's.
 *
 *     perplexity --model FILE_OR_FOLDER --text FILE [--context N] [--chunks N] [--threads N] [--precision bf16|f32]
 *                [--one-by-one] [--ids FILE] [--json]
 *
 * The text's tokens, without control tokens, are cut into chunks of N − 1 behind the vocabulary's begin-of-text token,
 * or of N where it has none; each chunk starts a sequence. The mean is over all tokens but a sequence's first, in nats.
 * --one-by-one feeds them as decoding does, from the copy of the weights for answering.
 * --ids writes the chunks' ids as little-endian i32, so that a peer scores the very same tokens.
 */
#include "base/file.h"
#include "bench/checked.h"
#include "kernels/backend.h"
#include "model/formats/model_file.h"
#include "model/infer.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define TEXT_BYTES_MAX ((size_t)4 << 20)

struct settings {
    const char *model, *text, *ids;
    int context, chunks, threads;
    enum kernel_precision precision;
    bool one_by_one, json;
};

static const struct option options[] = {
    {"model", required_argument, NULL, 'm'},
    {"text", required_argument, NULL, 't'},
    {"ids", required_argument, NULL, 'i'},
    {"context", required_argument, NULL, 'c'},
    {"chunks", required_argument, NULL, 'n'},
    {"threads", required_argument, NULL, 'T'},
    {"precision", required_argument, NULL, 'p'},
    {"one-by-one", no_argument, NULL, 'o'},
    {"json", no_argument, NULL, 'j'},
    {NULL, 0, NULL, 0},
};

static void parse(int argc, char **argv, struct settings *s)
{
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'm':
            s->model = optarg;
            break;
        case 't':
            s->text = optarg;
            break;
        case 'i':
            s->ids = optarg;
            break;
        case 'c':
            s->context = bench_number(optarg, 2, 65536);
            break;
        case 'n':
            s->chunks = bench_number(optarg, 1, 1 << 20);
            break;
        case 'T':
            s->threads = bench_number(optarg, 1, 256);
            break;
        case 'p':
            s->precision = strcmp(optarg, "bf16") == 0 ? KERNEL_BF16 : KERNEL_F32;
            break;
        case 'o':
            s->one_by_one = true;
            break;
        case 'j':
            s->json = true;
            break;
        default:
            exit(2);
        }
    }
    if (!s->model || !s->text) {
        fprintf(stderr, "perplexity: --model and --text are needed\n");
        exit(2);
    }
}

/* All chunks' ids, whole chunks only. */
static int32_t *make_chunks(const struct settings *s, const struct tokenizer *tokenizer, int *ret_chunks)
{
    struct token_list list = {.max = TEXT_BYTES_MAX};
    struct buffer text;
    struct error err = {0};
    const int32_t bos = tokenizer_bos(tokenizer);
    const size_t plain = (size_t)s->context - (bos >= 0);
    buffer_init(&text, TEXT_BYTES_MAX);
    bench_check(file_read(s->text, &text, &err), &err);
    bench_check(tokenizer_encode(tokenizer, buffer_span(&text), 0, &list, &err), &err);
    size_t chunks = list.count / plain;
    chunks = chunks < (size_t)s->chunks ? chunks : (size_t)s->chunks;
    int32_t *ids = calloc(chunks + 1, (size_t)s->context * sizeof *ids);
    if (!ids || chunks == 0) {
        fprintf(stderr, "perplexity: %s has %zu tokens, expected at least %zu\n", s->text, list.count, plain);
        exit(1);
    }
    for (size_t i = 0; i < chunks; i++) {
        int32_t *chunk = ids + i * (size_t)s->context;
        if (bos >= 0)
            *chunk++ = bos;
        memcpy(chunk, list.ids + i * plain, plain * sizeof *ids);
    }
    token_list_release(&list);
    buffer_release(&text);
    *ret_chunks = (int)chunks;
    return ids;
}

/* −log softmax(logits)[id] */
static double loss_of(const float *logits, int32_t n, int32_t id)
{
    double top = logits[0], sum = 0;
    for (int32_t i = 1; i < n; i++)
        top = logits[i] > top ? logits[i] : top;
    for (int32_t i = 0; i < n; i++)
        sum += exp(logits[i] - top);
    return top + log(sum) - logits[id];
}

static double chunk_one_by_one(struct infer *infer, struct kv_cache *cache, const int32_t *chunk, int32_t context,
                               float *logits, int32_t vocabulary)
{
    struct error err = {0};
    double sum = 0;
    for (int32_t t = 0; t + 1 < context; t++) {
        struct infer_extend one = {cache, chunk + t, 1};
        bench_check(infer_extend(infer, NULL, &one, 1, &err), &err);
        bench_check(infer_logits(infer, cache, logits, &err), &err);
        sum += loss_of(logits, vocabulary, chunk[t + 1]);
    }
    return sum;
}

static double score(const struct settings *s, struct backend *backend, const struct model *model, const int32_t *ids,
                    int chunks)
{
    struct infer *infer;
    struct kv_cache *cache;
    struct error err = {0};
    double sum = 0;
    float *logits = malloc((size_t)model->config.vocabulary * sizeof *logits);
    if (!logits)
        exit(1);
    const struct infer_options options_ = {.backend = backend,
                                           .rows_max = s->context,
                                           .context_max = s->context,
                                           .rank_max = 0,
                                           .answering = s->one_by_one};
    bench_check(infer_new(&options_, model, &infer, &err), &err);
    bench_check(kv_cache_new(backend, model, s->context, &cache, &err), &err);
    for (int i = 0; i < chunks; i++) {
        const int32_t *chunk = ids + (size_t)i * (size_t)s->context;
        struct infer_extend first = {cache, chunk, 1};
        struct infer_candidate rest = {cache, chunk + 1, s->context - 1, 0};
        kv_cache_truncate(cache, 0);
        if (s->one_by_one) {
            sum += chunk_one_by_one(infer, cache, chunk, s->context, logits, model->config.vocabulary);
            continue;
        }
        bench_check(infer_extend(infer, NULL, &first, 1, &err), &err);
        bench_check(infer_score(infer, NULL, &rest, 1, &err), &err);
        sum -= rest.log_likelihood;
    }
    free(logits);
    kv_cache_free(cache);
    infer_free(infer);
    return sum / ((double)chunks * (s->context - 1));
}

int main(int argc, char **argv)
{
    struct settings s = {.context = 512, .chunks = 1 << 20, .threads = 2, .precision = KERNEL_F32};
    struct model_file *file;
    struct tokenizer *tokenizer;
    struct pool *pool;
    struct backend *backend;
    struct error err = {0};
    int chunks;
    parse(argc, argv, &s);
    bench_check(model_file_open(s.model, &file, &err), &err);
    bench_check(model_file_tokenizer(file, &tokenizer, &err), &err);
    bench_check(pool_new(s.threads, &pool, &err), &err);
    bench_check(backend_cpu_new(kernels_cpu(KERNEL_AVX512_BF16), pool, s.precision, &backend, &err), &err);
    int32_t *ids = make_chunks(&s, tokenizer, &chunks);
    if (s.ids)
        bench_check(
            file_write_atomic(s.ids, span_of(ids, (size_t)chunks * (size_t)s.context * sizeof *ids), 0644, &err), &err);
    const double mean = score(&s, backend, model_file_model(file), ids, chunks);
    if (s.json)
        printf("{\"model\":\"%s\",\"backend\":\"%s\",\"context\":%d,\"chunks\":%d,\"mean_nats\":%.6f,\"perplexity\":%."
               "5f}\n",
               model_file_name(file), backend->name, s.context, chunks, mean, exp(mean));
    else
        printf("%s  %s  %d chunks of %d tokens  %.6f nats a token  perplexity %.5f\n", model_file_name(file),
               backend->name, chunks, s.context, mean, exp(mean));
    free(ids);
    backend_free(backend);
    pool_free(pool);
    tokenizer_free(tokenizer);
    model_file_close(file);
    return 0;
}
