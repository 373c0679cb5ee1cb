/*
 * Logits of a model, with or without an adapter, and adapters written for other programs: what
 * bench/peers/adapter_peer.py compares with transformers, PEFT and llama.cpp.
 *
 *     bench_logits --model PATH --ids 1,2,3 [--adapter PATH | --random RANK[:sqrt]] [--peft FOLDER] [--gguf FILE]
 *
 * PATH: a GGUF file or a Hugging Face folder. Prints a line for each id: the logits that follow it. --random adapts all
 * linears of all layers with numbers that depend on their place only; --peft and --gguf write the adapter in that form.
 */
#include "bench/checked.h"
#include "model/formats/adapter.h"
#include "model/formats/model_file.h"
#include "model/infer.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IDS_MAX 4096

struct settings {
    const char *model, *adapter, *random, *peft, *gguf;
    int32_t ids[IDS_MAX], count;
};

static const struct option options[] = {
    {"model", required_argument, NULL, 'm'},
    {"adapter", required_argument, NULL, 'a'},
    {"random", required_argument, NULL, 'r'},
    {"peft", required_argument, NULL, 'p'},
    {"gguf", required_argument, NULL, 'g'},
    {"ids", required_argument, NULL, 'i'},
    {NULL, 0, NULL, 0},
};

static void stop(const char *what)
{
    fprintf(stderr, "bench_logits: %s\n", what);
    exit(2);
}

static void parse(int argc, char **argv, struct settings *s)
{
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'm':
            s->model = optarg;
            break;
        case 'a':
            s->adapter = optarg;
            break;
        case 'r':
            s->random = optarg;
            break;
        case 'p':
            s->peft = optarg;
            break;
        case 'g':
            s->gguf = optarg;
            break;
        case 'i':
            for (char *at = optarg; *at && s->count < IDS_MAX; at += *at == ',')
                s->ids[s->count++] = (int32_t)strtol(at, &at, 10);
            break;
        default:
            exit(2);
        }
    }
    if (!s->model || s->count == 0 || (s->adapter && s->random))
        stop("--model and --ids are needed, and one of --adapter and --random at most");
}

/* ±size/√columns, from a hash of the place. */
static void fill(float *values, size_t count, float size, uint32_t *place)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t x = ++*place * 0x9E3779B9u;
        x = (x ^ x >> 16) * 0x7FEB352Du;
        x = (x ^ x >> 15) * 0x846CA68Bu;
        values[i] = ((float)(x >> 8) / 8388608.0f - 1) * size;
    }
}

static void random_lora(const struct settings *s, const struct model *model, struct lora *lora)
{
    struct error err = {0};
    char *end;
    const int32_t rank = (int32_t)strtol(s->random, &end, 10);
    const struct lora_config config = {.mode = LORA_JOINT,
                                       .scaling = strcmp(end, ":sqrt") == 0 ? LORA_SCALE_SQRT_RANK : LORA_SCALE_RANK,
                                       .rank = rank,
                                       .alpha = 7,
                                       .targets = LORA_TARGETS_ALL};
    uint32_t place = 0;
    bench_check(lora_init(lora, &config, &model->config, &err), &err);
    for (int32_t i = 0; i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        fill(lora->trained + e->a_offset, (size_t)rank * (size_t)e->in, 1 / sqrtf((float)e->in), &place);
        fill(lora->trained + e->b_offset, (size_t)rank * (size_t)e->out, 0.1f, &place);
    }
}

static void print_logits(const struct settings *s, const struct model *model, const struct lora *lora)
{
    const int32_t vocabulary = model->config.vocabulary;
    struct error err = {0};
    struct pool *pool = NULL;
    struct backend *backend = NULL;
    struct infer *infer = NULL;
    struct kv_cache *cache = NULL;
    float *logits = malloc(sizeof *logits * (size_t)vocabulary);
    bench_check(pool_new(2, &pool, &err), &err);
    bench_check(backend_cpu_new(kernels_cpu(KERNEL_AVX512_BF16), pool, KERNEL_F32, &backend, &err), &err);
    const struct infer_options infer_options = {
        .backend = backend, .rows_max = 64, .context_max = s->count, .rank_max = lora ? lora->config.rank : 0};
    bench_check(infer_new(&infer_options, model, &infer, &err), &err);
    bench_check(kv_cache_new(backend, model, s->count, &cache, &err), &err);
    if (!logits)
        stop("no memory");
    for (int32_t i = 0; i < s->count; i++) {
        bench_check(infer_extend(infer, lora, &(struct infer_extend){cache, &s->ids[i], 1}, 1, &err), &err);
        bench_check(infer_logits(infer, cache, logits, &err), &err);
        for (int32_t v = 0; v < vocabulary; v++)
            printf("%.9g%c", (double)logits[v], v + 1 < vocabulary ? ' ' : '\n');
    }
    kv_cache_free(cache);
    infer_free(infer);
    backend_free(backend);
    pool_free(pool);
    free(logits);
}

int main(int argc, char **argv)
{
    static struct settings s;
    struct model_file *file = NULL;
    struct lora lora = {0};
    struct error err = {0};
    parse(argc, argv, &s);
    bench_check(model_file_open(s.model, &file, &err), &err);
    const struct model *model = model_file_model(file);
    if (s.adapter)
        bench_check(adapter_import(s.adapter, &model->config, LORA_JOINT, &lora, &err), &err);
    else if (s.random)
        random_lora(&s, model, &lora);
    const bool adapted = s.adapter || s.random;
    if (!adapted && (s.peft || s.gguf))
        stop("--peft and --gguf write the adapter of --adapter or --random");
    if (s.peft)
        bench_check(adapter_export_peft(&lora, &model->config, s.peft, "base", &err), &err);
    if (s.gguf)
        bench_check(adapter_export_gguf(&lora, &model->config, s.gguf, &err), &err);
    print_logits(&s, model, adapted ? &lora : NULL);
    lora_release(&lora);
    model_file_close(file);
    return 0;
}
