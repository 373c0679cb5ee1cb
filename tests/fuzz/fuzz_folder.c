/* A Hugging Face folder: config.json, the index of shards, and the shards. The first four bytes are the lengths of
 * config.json and of the index (0: there is none, and the rest is one file of weights); what follows them is cut into
 * as many equal parts as the index names files. */
#include "kernels/tensor.h"
#include "model/formats/hf_model.h"
#include "tests/fuzz/fuzz.h"

#include <math.h>

static void read_all(const struct tensor *t)
{
    size_t bytes = 0;
    if (!t->data)
        return;
    FUZZ_NEED((uintptr_t)t->data % tensor_type_alignment(t->type) == 0);
    FUZZ_NEED(tensor_type_row_bytes(t->type, (size_t)t->in, &bytes));
    float *row = malloc((size_t)t->in * sizeof *row);
    FUZZ_NEED(row);
    for (int32_t r = 0; r < t->out; r++) {
        tensor_dequantise(t->type, (const uint8_t *)t->data + (size_t)r * bytes, (size_t)t->in, row);
        for (int32_t i = 0; i < t->in; i++)
            FUZZ_NEED(isfinite(row[i]));
    }
    free(row);
}

static void check(const struct model *m)
{
    FUZZ_NEED(model_validate(m, NULL) == 0);
    read_all(&m->token_embd);
    read_all(&m->output_norm);
    read_all(&m->output);
    read_all(&m->rope_freqs);
    for (int32_t i = 0; i < m->config.layer_count; i++) {
        const struct model_layer *l = &m->layers[i];
        const struct tensor *all[] = {&l->attn_norm,    &l->q,      &l->k,      &l->v,      &l->o,
                                      &l->q_bias,       &l->k_bias, &l->v_bias, &l->q_norm, &l->k_norm,
                                      &l->ffn_norm,     &l->gate,   &l->up,     &l->down,   &l->attn_post_norm,
                                      &l->ffn_post_norm};
        for (size_t t = 0; t < sizeof all / sizeof *all; t++)
            read_all(all[t]);
    }
}

static int parse(struct span config, struct span index_json, struct span rest, struct hf_model **ret, struct error *err)
{
    struct hf_index *index = NULL;
    int rc = index_json.len > 0 ? hf_index_parse(index_json, "index", &index, err) : 0;
    if (rc < 0)
        return rc;
    const size_t count = index ? hf_index_shard_count(index) : 1, each = rest.len / count;
    struct hf_file *files = calloc(count, sizeof *files);
    FUZZ_NEED(files);
    for (size_t i = 0; i < count; i++) {
        const char *name = index ? hf_index_shard(index, i) : "model.safetensors";
        FUZZ_NEED(name[0] != '.');
        for (const char *c = name; *c; c++)
            FUZZ_NEED(*c != '/' && *c > 0x20 && *c < 0x7f);
        files[i] = (struct hf_file){name, span_of(rest.ptr + i * each, each)};
    }
    rc = hf_model_parse("fuzz", config, index, files, ret, err);
    free(files);
    hf_index_free(index);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct hf_model *hf = NULL;
    struct error err = {0};
    if (size < 4)
        return 0;
    size_t config = (size_t)data[0] << 8 | data[1], index = (size_t)data[2] << 8 | data[3];
    data += 4;
    size -= 4;
    config = config < size ? config : size;
    index = index < size - config ? index : size - config;
    int rc = parse(span_of(data, config), span_of(data + config, index),
                   span_of(data + config + index, size - config - index), &hf, &err);
    if (rc < 0)
        FUZZ_NEED(err.message[0]);
    else
        check(hf_model_get(hf));
    hf_model_free(hf);
    return 0;
}
