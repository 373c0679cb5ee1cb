/* Exporting LoRA adapters; adapter_import.c reads them back. */
#include "model/formats/adapter.h"

#include "base/file.h"
#include "model/formats/adapter_names.h"
#include "model/formats/gguf_write.h"
#include "model/formats/safetensors.h"

#include <jansson.h>
#include <math.h>

static const char *const gguf_names[LORA_TARGET_COUNT] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                                          "ffn_gate", "ffn_up", "ffn_down"};
static const char *const peft_blocks[LORA_TARGET_COUNT] = {"self_attn", "self_attn", "self_attn", "self_attn",
                                                           "mlp",       "mlp",       "mlp"};
static const char *const peft_names[LORA_TARGET_COUNT] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                          "gate_proj", "up_proj", "down_proj"};

void adapter_gguf_name(int32_t layer, enum lora_target target, char factor, char out[ADAPTER_NAME_BYTES])
{
    snprintf(out, ADAPTER_NAME_BYTES, "blk.%d.%s.weight.lora_%c", layer, gguf_names[target], factor);
}

void adapter_peft_name(int32_t layer, enum lora_target target, char factor, char out[ADAPTER_NAME_BYTES])
{
    snprintf(out, ADAPTER_NAME_BYTES, "base_model.model.model.layers.%d.%s.%s.lora_%c.weight", layer,
             peft_blocks[target], peft_names[target], factor == 'a' ? 'A' : 'B');
}

/* Within a head, Hugging Face's row half·(d/2) + i is row 2·i + half of the GGUF file. */
void adapter_permute_rows(const struct model_config *model, enum lora_target target, int32_t out, int32_t rank,
                          bool to_peft, const float *from, float *to)
{
    const int32_t d = model->head_size;
    const bool permuted = (target == LORA_Q || target == LORA_K) && model->rope_order == ROPE_NORM;
    for (int32_t row = 0; row < out; row++) {
        int32_t other = row;
        if (permuted) {
            const int32_t head = row / d, at = row % d; /* at: a row as the GGUF file has it */
            other = head * d + at % 2 * (d / 2) + at / 2;
        }
        const int32_t source = to_peft ? row : other, sink = to_peft ? other : row;
        memcpy(to + (size_t)sink * (size_t)rank, from + (size_t)source * (size_t)rank, sizeof *to * (size_t)rank);
    }
}

static json_t *target_modules(uint32_t targets)
{
    json_t *list = json_array();
    for (int t = 0; t < LORA_TARGET_COUNT; t++)
        if (targets & LORA_TARGET_BIT(t))
            json_array_append_new(list, json_string(peft_names[t]));
    return list;
}

static int encode_config(const struct lora *lora, const struct model_config *model, const char *base_name,
                         struct buffer *out, struct error *err)
{
    const struct lora_config *c = &lora->config;
    const bool whole = c->alpha == floor(c->alpha);
    json_t *config =
        json_pack("{s:s, s:s, s:s, s:i, s:o, s:f, s:o, s:b, s:s, s:b, s:b, s:b}", "peft_type", "LORA", "task_type",
                  "CAUSAL_LM", "base_model_name_or_path", base_name, "r", (int)c->rank, "lora_alpha",
                  whole ? json_integer((json_int_t)c->alpha) : json_real(c->alpha), "lora_dropout", 0.0,
                  "target_modules", target_modules(c->targets), "use_rslora", c->scaling == LORA_SCALE_SQRT_RANK,
                  "bias", "none", "fan_in_fan_out", 0, "inference_mode", 1, "init_lora_weights", 1);
    if (config && (c->layer_first > 0 || c->layer_count < model->layer_count)) {
        json_t *layers = json_array();
        for (int32_t i = 0; i < c->layer_count; i++)
            json_array_append_new(layers, json_integer(c->layer_first + i));
        json_object_set_new(config, "layers_to_transform", layers);
        json_object_set_new(config, "layers_pattern", json_string("layers"));
    }
    char *text = config ? json_dumps(config, JSON_INDENT(2)) : NULL;
    json_decref(config);
    if (!text)
        return error_set(err, ERR_RESOURCES, "adapter: no memory, or the base model's name is not UTF-8");
    buffer_printf(out, "%s\n", text);
    free(text);
    return buffer_ok(out) ? 0 : error_set(err, ERR_RESOURCES, "adapter: the configuration is too long");
}

/* The B factors as PEFT has them, one after the other in canonical order. NULL without memory. */
static float *peft_b(const struct lora *lora, const struct model_config *model)
{
    size_t total = 0;
    for (int32_t i = 0; i < lora->entry_count; i++)
        total += (size_t)lora->entries[i].out * (size_t)lora->config.rank;
    float *all = malloc(total * sizeof *all), *at = all;
    for (int32_t i = 0; all && i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        adapter_permute_rows(model, e->target, e->out, lora->config.rank, true, lora_b(lora, e->layer, e->target), at);
        at += (size_t)e->out * (size_t)lora->config.rank;
    }
    return all;
}

static int encode_tensors(const struct lora *lora, const struct model_config *model, struct buffer *out,
                          struct error *err)
{
    const size_t n = (size_t)lora->entry_count, rank = (size_t)lora->config.rank;
    float *b = peft_b(lora, model), *at = b;
    struct safetensors_tensor *tensors = calloc(2 * n, sizeof *tensors);
    char(*names)[ADAPTER_NAME_BYTES] = calloc(2 * n, sizeof *names);
    int rc = ERR_RESOURCES;
    if (!b || !tensors || !names) {
        error_set(err, rc, "adapter: no memory for %zu factors", 2 * n);
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        const struct lora_entry *e = &lora->entries[i];
        const size_t a_bytes = rank * (size_t)e->in * sizeof(float), b_bytes = rank * (size_t)e->out * sizeof(float);
        adapter_peft_name(e->layer, e->target, 'a', names[2 * i]);
        adapter_peft_name(e->layer, e->target, 'b', names[2 * i + 1]);
        tensors[2 * i] = (struct safetensors_tensor){names[2 * i],
                                                     SAFETENSORS_F32,
                                                     2,
                                                     {rank, (uint64_t)e->in},
                                                     span_of(lora_a(lora, e->layer, e->target), a_bytes)};
        tensors[2 * i + 1] = (struct safetensors_tensor){
            names[2 * i + 1], SAFETENSORS_F32, 2, {(uint64_t)e->out, rank}, span_of(at, b_bytes)};
        at += rank * (size_t)e->out;
    }
    rc = safetensors_write(tensors, 2 * n, out, err);
out:
    free(b);
    free(tensors);
    free(names);
    return rc;
}

int adapter_encode_peft(const struct lora *lora, const struct model_config *model, const char *base_name,
                        struct buffer *config_json, struct buffer *tensors, struct error *err)
{
    int rc = encode_config(lora, model, base_name, config_json, err);
    return rc < 0 ? rc : encode_tensors(lora, model, tensors, err);
}

int adapter_encode_gguf(const struct lora *lora, const struct model_config *model, struct buffer *out,
                        struct error *err)
{
    const struct lora_config *c = &lora->config;
    const uint64_t rank = (uint64_t)c->rank;
    struct gguf_writer w;
    (void)model;
    gguf_writer_init(&w, 16u << 20);
    gguf_writer_string(&w, "general.type", span_str("adapter"));
    gguf_writer_string(&w, "general.architecture", span_str("llama"));
    gguf_writer_string(&w, "adapter.type", span_str("lora"));
    /* A reader of this form scales by alpha / rank, whatever the scaling was here. */
    gguf_writer_f32(&w, "adapter.lora.alpha",
                    c->scaling == LORA_SCALE_RANK ? (float)c->alpha : lora->scale * (float)c->rank);
    for (int32_t i = 0; i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        const uint64_t in = (uint64_t)e->in, rows = (uint64_t)e->out;
        char name[ADAPTER_NAME_BYTES];
        adapter_gguf_name(e->layer, e->target, 'a', name);
        gguf_writer_tensor(&w, name, TENSOR_F32, 2, (uint64_t[]){in, rank},
                           span_of(lora_a(lora, e->layer, e->target), in * rank * sizeof(float)));
        adapter_gguf_name(e->layer, e->target, 'b', name);
        gguf_writer_tensor(&w, name, TENSOR_F32, 2, (uint64_t[]){rank, rows},
                           span_of(lora_b(lora, e->layer, e->target), rows * rank * sizeof(float)));
    }
    int rc = gguf_writer_finish(&w, out, err);
    gguf_writer_release(&w);
    return rc;
}

int adapter_export_peft(const struct lora *lora, const struct model_config *model, const char *folder,
                        const char *base_name, struct error *err)
{
    struct buffer config, tensors;
    char path[4096];
    int rc;
    buffer_init(&config, 1 << 20);
    buffer_init(&tensors, ADAPTER_BYTES_MAX);
    if (strlen(folder) + 32 > sizeof path) {
        rc = error_set(err, ERR_CONFIG, "adapter: the folder's path is too long");
        goto out;
    }
    rc = adapter_encode_peft(lora, model, base_name, &config, &tensors, err);
    if (rc == 0)
        rc = file_make_folder(folder, 0755, err);
    file_join(path, sizeof path, folder, "adapter_model.safetensors");
    if (rc == 0)
        rc = file_write_atomic(path, buffer_span(&tensors), 0644, err);
    file_join(path, sizeof path, folder, "adapter_config.json");
    if (rc == 0)
        rc = file_write_atomic(path, buffer_span(&config), 0644, err);
out:
    buffer_release(&config);
    buffer_release(&tensors);
    return rc;
}

int adapter_export_gguf(const struct lora *lora, const struct model_config *model, const char *path, struct error *err)
{
    struct buffer bytes;
    buffer_init(&bytes, ADAPTER_BYTES_MAX);
    int rc = adapter_encode_gguf(lora, model, &bytes, err);
    if (rc == 0)
        rc = file_write_atomic(path, buffer_span(&bytes), 0644, err);
    buffer_release(&bytes);
    return rc;
}
