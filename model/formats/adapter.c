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

static const char *peft_module(const struct model_config *model, enum lora_target target)
{
    return target == LORA_UP && model->fused_gate_up ? "gate_up_proj" : peft_names[target];
}

void adapter_peft_name(const struct model_config *model, int32_t layer, enum lora_target target, char factor,
                       char out[ADAPTER_NAME_BYTES])
{
    snprintf(out, ADAPTER_NAME_BYTES, "base_model.model.model.layers.%d.%s.%s.lora_%c.weight", layer,
             peft_blocks[target], peft_module(model, target), factor == 'a' ? 'A' : 'B');
}

/* Within a head, row half·(d/2) + i of NEOX order is row 2·i + half of NORM order. */
void adapter_order_rows(const struct model_config *model, enum lora_target target, int32_t out, int32_t rank,
                        enum rope_order from, enum rope_order to, const float *from_rows, float *to_rows)
{
    const int32_t d = model->head_size;
    const bool same = model->architecture != MODEL_LLAMA || (target != LORA_Q && target != LORA_K) || from == to;
    for (int32_t norm = 0; norm < out; norm++) {
        const int32_t head = norm / d, at = norm % d;
        const int32_t neox = same ? norm : head * d + at % 2 * (d / 2) + at / 2;
        const int32_t source = from == ROPE_NORM ? norm : neox, sink = from == ROPE_NORM ? neox : norm;
        memcpy(to_rows + (size_t)sink * (size_t)rank, from_rows + (size_t)source * (size_t)rank,
               sizeof *to_rows * (size_t)rank);
    }
}

static json_t *target_modules(const struct model_config *model, uint32_t targets)
{
    json_t *list = json_array();
    for (int t = 0; t < LORA_TARGET_COUNT; t++)
        if (targets & LORA_TARGET_BIT(t))
            json_array_append_new(list, json_string(peft_module(model, (enum lora_target)t)));
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
                  "target_modules", target_modules(model, c->targets), "use_rslora", c->scaling == LORA_SCALE_SQRT_RANK,
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

/* The B factors in a form's order of rows, one after the other in canonical order. NULL without memory. */
static float *ordered_b(const struct lora *lora, const struct model_config *model, enum rope_order to)
{
    size_t total = 0;
    for (int32_t i = 0; i < lora->entry_count; i++)
        total += (size_t)lora->entries[i].out * (size_t)lora->config.rank;
    float *all = malloc(total * sizeof *all), *at = all;
    for (int32_t i = 0; all && i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        adapter_order_rows(model, e->target, e->out, lora->config.rank, model->rope_order, to,
                           lora_b(lora, e->layer, e->target), at);
        at += (size_t)e->out * (size_t)lora->config.rank;
    }
    return all;
}

static int encode_tensors(const struct lora *lora, const struct model_config *model, struct buffer *out,
                          struct error *err)
{
    const size_t n = (size_t)lora->entry_count, rank = (size_t)lora->config.rank;
    float *b = ordered_b(lora, model, ADAPTER_PEFT_ORDER), *at = b;
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
        adapter_peft_name(model, e->layer, e->target, 'a', names[2 * i]);
        adapter_peft_name(model, e->layer, e->target, 'b', names[2 * i + 1]);
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

static void put_tensors(const struct lora *lora, const float *b, struct gguf_writer *w)
{
    const uint64_t rank = (uint64_t)lora->config.rank;
    for (int32_t i = 0; i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        const uint64_t in = (uint64_t)e->in, rows = (uint64_t)e->out;
        char name[ADAPTER_NAME_BYTES];
        adapter_gguf_name(e->layer, e->target, 'a', name);
        gguf_writer_tensor(w, name, TENSOR_F32, 2, (uint64_t[]){in, rank},
                           span_of(lora_a(lora, e->layer, e->target), in * rank * sizeof(float)));
        adapter_gguf_name(e->layer, e->target, 'b', name);
        gguf_writer_tensor(w, name, TENSOR_F32, 2, (uint64_t[]){rank, rows}, span_of(b, rows * rank * sizeof(float)));
        b += rows * rank;
    }
}

int adapter_encode_gguf(const struct lora *lora, const struct model_config *model, struct buffer *out,
                        struct error *err)
{
    const struct lora_config *c = &lora->config;
    struct gguf_writer w;
    if (c->alpha == 0)
        return error_set(err, ERR_CONFIG, "adapter: alpha is 0, which readers of the GGUF form take for no scaling");
    float *b = ordered_b(lora, model, ADAPTER_GGUF_ORDER);
    if (!b)
        return error_set(err, ERR_RESOURCES, "adapter: no memory for %d factors", lora->entry_count);
    gguf_writer_init(&w, 16u << 20);
    gguf_writer_string(&w, "general.type", span_str("adapter"));
    gguf_writer_string(&w, "general.architecture", span_str(model_architecture_name(model->architecture)));
    gguf_writer_string(&w, "adapter.type", span_str("lora"));
    /* A reader of this form scales by alpha / rank, whatever the scaling was here: α/√r becomes (α·√r)/r. */
    gguf_writer_f32(&w, "adapter.lora.alpha",
                    c->scaling == LORA_SCALE_RANK ? (float)c->alpha : (float)(c->alpha * sqrt((double)c->rank)));
    put_tensors(lora, b, &w);
    int rc = gguf_writer_finish(&w, out, err);
    gguf_writer_release(&w);
    free(b);
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
