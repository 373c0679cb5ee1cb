/* Importing LoRA adapters: both forms become a table of factors, which is then checked and copied in one way. */
#include "model/formats/adapter.h"

#include "base/checked.h"
#include "base/file.h"
#include "model/formats/adapter_names.h"
#include "model/formats/gguf.h"
#include "model/formats/json_fields.h"
#include "model/formats/safetensors.h"

#include <math.h>
#include <sys/stat.h>

#define ADAPTER_CONFIG_BYTES_MAX ((size_t)1 << 20)

/* One factor as the file has it: rows × columns, row-major; absent: data.ptr NULL. */
struct factor {
    uint64_t rows, columns;
    enum tensor_type type;
    struct span data;
};

struct source {
    const char *name; /* of the file, for messages */
    const struct model_config *model;
    struct lora_config config;         /* rank, alpha, scaling and mode are given by the form's reader */
    const struct gguf *gguf;           /* either this one */
    const struct safetensors *tensors; /* or this one */
};

/* False if the file lacks it. An unusable type leaves data.ptr NULL but says true. */
static bool find_factor(const struct source *s, int32_t layer, enum lora_target target, char which, struct factor *ret)
{
    char name[ADAPTER_NAME_BYTES];
    *ret = (struct factor){0};
    if (s->gguf) {
        adapter_gguf_name(layer, target, which, name);
        const struct gguf_tensor *t = gguf_tensor_find(s->gguf, name);
        if (!t)
            return false;
        const bool usable = t->dim_count == 2 && tensor_type_block(t->type) == 1;
        *ret = (struct factor){t->dims[1], t->dims[0], t->type, span_of(usable ? t->data : NULL, t->bytes)};
        return true;
    }
    adapter_peft_name(s->model, layer, target, which, name);
    const struct safetensors_tensor *t = safetensors_find(s->tensors, name);
    if (!t)
        return false;
    static const enum tensor_type types[] = {TENSOR_F32, TENSOR_F16, TENSOR_BF16};
    const bool usable = t->dim_count == 2 && t->type != SAFETENSORS_OTHER;
    *ret = (struct factor){t->dims[0], t->dims[1], usable ? types[t->type] : TENSOR_F32,
                           span_of(usable ? t->data.ptr : NULL, t->data.len)};
    return true;
}

static size_t tensor_count(const struct source *s)
{
    return s->gguf ? gguf_tensor_count(s->gguf) : safetensors_count(s->tensors);
}

/* Finds the range of layers and the targets; every layer of the range must have the same, and nothing may be left. */
static int find_grid(struct source *s, struct error *err)
{
    int32_t first = -1, last = -1;
    size_t pairs = 0;
    s->config.targets = 0;
    for (int32_t layer = 0; layer < s->model->layer_count; layer++) {
        uint32_t targets = 0;
        for (int t = 0; t < LORA_TARGET_COUNT; t++) {
            struct factor f;
            const bool a = find_factor(s, layer, (enum lora_target)t, 'a', &f);
            const bool b = find_factor(s, layer, (enum lora_target)t, 'b', &f);
            if (a != b)
                return error_set(err, ERR_INTEGRITY, "%s: layer %d, %s: lora_%c is missing", s->name, layer,
                                 lora_target_name((enum lora_target)t), a ? 'B' : 'A');
            targets |= a ? LORA_TARGET_BIT(t) : 0;
            pairs += a;
        }
        if (targets == 0)
            continue;
        if (first >= 0 && (last != layer - 1 || targets != s->config.targets))
            return error_set(err, ERR_INTEGRITY,
                             "%s: layer %d adapts other linears than layer %d, or layers between "
                             "them are left out; one range with the same targets is supported",
                             s->name, layer, last);
        s->config.targets = targets;
        first = first < 0 ? layer : first;
        last = layer;
    }
    if (pairs == 0)
        return error_set(err, ERR_INTEGRITY, "%s: no LoRA tensor of this model's layers was found", s->name);
    if (tensor_count(s) != 2 * pairs)
        return error_set(err, ERR_INTEGRITY, "%s: %zu tensors are no LoRA factors of a %s model of %d layers", s->name,
                         tensor_count(s) - 2 * pairs, model_architecture_name(s->model->architecture),
                         s->model->layer_count);
    s->config.layer_first = first;
    s->config.layer_count = last - first + 1;
    return 0;
}

/* Decodes one factor of rows × columns into out, all values finite. */
static int copy_factor(const struct source *s, const struct lora_entry *e, char which, uint64_t rows, uint64_t columns,
                       float *out, struct error *err)
{
    struct factor f;
    const size_t count = (size_t)rows * (size_t)columns, bytes = tensor_type_block_bytes(TENSOR_F32);
    const bool found = find_factor(s, e->layer, e->target, which, &f);
    if (!found || !f.data.ptr)
        return error_set(err, ERR_INTEGRITY, "%s: layer %d, %s, lora_%c is no matrix of F32, F16 or BF16", s->name,
                         e->layer, lora_target_name(e->target), which - 'a' + 'A');
    if (f.rows != rows || f.columns != columns)
        return error_set(err, ERR_INTEGRITY, "%s: layer %d, %s, lora_%c is %llu x %llu, expected %llu x %llu", s->name,
                         e->layer, lora_target_name(e->target), which - 'a' + 'A', (unsigned long long)f.rows,
                         (unsigned long long)f.columns, (unsigned long long)rows, (unsigned long long)columns);
    const size_t step = tensor_type_block_bytes(f.type);
    for (size_t i = 0; i < count; i++) {
        uint8_t value[sizeof(float)] __attribute__((aligned(4)));
        assert(step <= bytes);
        memcpy(value, f.data.ptr + i * step, step <= bytes ? step : bytes);
        tensor_dequantise(f.type, value, 1, &out[i]);
        if (!isfinite(out[i]))
            return error_set(err, ERR_INTEGRITY, "%s: layer %d, %s, lora_%c holds a value that is not finite", s->name,
                             e->layer, lora_target_name(e->target), which - 'a' + 'A');
    }
    return 0;
}

/* Where lora_a and lora_b point is the caller's to write. */
static float *writable(const float *factor)
{
    return (float *)(uintptr_t)factor;
}

static int copy_entry(const struct source *s, struct lora *lora, const struct lora_entry *e, float *rows,
                      struct error *err)
{
    const uint64_t rank = (uint64_t)lora->config.rank;
    float *a = writable(lora_a(lora, e->layer, e->target)), *b = writable(lora_b(lora, e->layer, e->target));
    int rc = copy_factor(s, e, 'a', rank, (uint64_t)e->in, a, err);
    if (rc == 0)
        rc = copy_factor(s, e, 'b', (uint64_t)e->out, rank, rows, err);
    if (rc == 0)
        adapter_order_rows(s->model, e->target, e->out, lora->config.rank,
                           s->gguf ? ADAPTER_GGUF_ORDER : ADAPTER_PEFT_ORDER, s->model->rope_order, rows, b);
    return rc;
}

static int import(struct source *s, struct lora *ret_lora, struct error *err)
{
    struct lora lora = {0};
    float *rows = NULL; /* the largest B */
    size_t out = 0;
    int rc = find_grid(s, err);
    if (rc == 0 && (rc = lora_init(&lora, &s->config, s->model, err)) < 0)
        error_prefix(err, "%s", s->name);
    for (int32_t i = 0; i < lora.entry_count; i++)
        out = (size_t)lora.entries[i].out > out ? (size_t)lora.entries[i].out : out;
    if (rc == 0 && !(rows = malloc(out * (size_t)lora.config.rank * sizeof *rows)))
        rc = error_set(err, ERR_RESOURCES, "%s: no memory", s->name);
    for (int32_t i = 0; rc == 0 && i < lora.entry_count; i++)
        rc = copy_entry(s, &lora, &lora.entries[i], rows, err);
    free(rows);
    if (rc < 0)
        lora_release(&lora);
    else
        *ret_lora = lora;
    return rc == ERR_CONFIG ? ERR_INTEGRITY : rc;
}

/* Some ways of starting LoRA change the base model's weights as well; what they trained does not fit this base. */
static int check_start(const struct json_fields *f)
{
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    const json_t *start = json_object_get(f->object, "init_lora_weights");
    if (!json_fields_has(f, "init_lora_weights") || json_is_boolean(start))
        return 0;
    for (size_t i = 0; json_is_string(start) && i < ARRAY_LEN(harmless); i++)
        if (strcmp(json_string_value(start), harmless[i]) == 0)
            return 0;
    return json_fields_fail(f, "init_lora_weights",
                            "names a start that changes the base model, which is not supported");
}

/* Refuses what would make the adapter mean something that is not computed here. */
static int check_peft(const struct json_fields *f)
{
    static const char *const off[] = {"use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"};
    static const char *const empty[] = {
        "rank_pattern",      "alpha_pattern",           "modules_to_save", "target_parameters", "layer_replication",
        "megatron_config",   "trainable_token_indices", "arrow_config",    "use_bdlora",        "velora_config",
        "monteclora_config", "alora_invocation_tokens", "kasa_config",
    };
    const char *type = "", *bias = "none";
    int rc = json_fields_string(f, "peft_type", &type);
    if (rc == 0)
        rc = json_fields_string(f, "bias", &bias);
    if (rc == 0 && strcmp(type, "LORA") != 0)
        rc = json_fields_fail(f, "peft_type", "is not LORA");
    if (rc == 0 && strcmp(bias, "none") != 0)
        rc = json_fields_fail(f, "bias", "is not none");
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(off); i++) {
        bool set = false;
        if ((rc = json_fields_bool(f, off[i], &set)) == 0 && set)
            rc = json_fields_fail(f, off[i], "is set, which is not supported");
    }
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(empty); i++) {
        const json_t *value = json_object_get(f->object, empty[i]);
        const bool none = !value || json_is_null(value) || json_is_false(value) ||
                          (json_is_object(value) && json_object_size(value) == 0) ||
                          (json_is_array(value) && json_array_size(value) == 0);
        if (!none)
            rc = json_fields_fail(f, empty[i], "is set, which is not supported");
    }
    return rc < 0 ? rc : check_start(f);
}

static int read_peft_config(struct span text, const char *name, struct lora_config *c, struct error *err)
{
    struct json_fields f = {NULL, name, "adapter_config.json: ", err};
    json_t *root = NULL;
    bool root_scaling = false;
    int rc = json_fields_load(text, ADAPTER_CONFIG_BYTES_MAX, name, &root, err);
    if (rc < 0)
        return error_prefix(err, "adapter_config.json");
    f.object = root;
    rc = check_peft(&f);
    if (rc == 0 && (rc = json_fields_require(&f, "r")) == 0)
        rc = json_fields_int(&f, "r", 1, LORA_RANK_MAX, &c->rank);
    if (rc == 0 && (rc = json_fields_require(&f, "lora_alpha")) == 0)
        rc = json_fields_number(&f, "lora_alpha", 0, 1e6, &c->alpha);
    if (rc == 0)
        rc = json_fields_bool(&f, "use_rslora", &root_scaling);
    c->scaling = root_scaling ? LORA_SCALE_SQRT_RANK : LORA_SCALE_RANK;
    json_decref(root);
    return rc;
}

int adapter_decode_peft(struct span config_json, struct span tensors, const char *name,
                        const struct model_config *model, enum lora_mode mode, struct lora *ret_lora, struct error *err)
{
    struct source s = {.name = name, .model = model, .config = {.mode = mode}};
    struct safetensors *file = NULL;
    int rc = read_peft_config(config_json, name, &s.config, err);
    if (rc == 0)
        rc = safetensors_parse(tensors, name, &file, err);
    s.tensors = file;
    if (rc == 0)
        rc = import(&s, ret_lora, err);
    safetensors_close(file);
    return rc;
}

static int expect(const struct gguf *g, const char *key, const char *value, struct error *err)
{
    struct span found;
    int rc = gguf_get_string(g, key, &found, err);
    if (rc == 0 && !span_equal(found, span_str(value)))
        return error_set(err, ERR_INTEGRITY, "%s: key %s is not \"%s\"", gguf_name(g), key, value);
    return rc;
}

/* The rank stands in the shapes only. */
static int32_t find_rank(const struct gguf *g)
{
    for (size_t i = 0; i < gguf_tensor_count(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        if (t->name.len > 7 && memcmp(t->name.ptr + t->name.len - 7, ".lora_a", 7) == 0)
            return t->dims[1] <= LORA_RANK_MAX ? (int32_t)t->dims[1] : LORA_RANK_MAX + 1;
    }
    return 0;
}

int adapter_decode_gguf(struct span bytes, const char *name, const struct model_config *model, enum lora_mode mode,
                        struct lora *ret_lora, struct error *err)
{
    struct source s = {.name = name, .model = model, .config = {.mode = mode, .scaling = LORA_SCALE_RANK}};
    struct gguf *gguf = NULL;
    float alpha = 0;
    int rc = gguf_parse(bytes, name, &gguf, err);
    if (rc < 0)
        return rc;
    rc = expect(gguf, "general.type", "adapter", err);
    if (rc == 0)
        rc = expect(gguf, "general.architecture", model_architecture_name(model->architecture), err);
    if (rc == 0)
        rc = expect(gguf, "adapter.type", "lora", err);
    if (rc == 0)
        rc = gguf_get_f32(gguf, "adapter.lora.alpha", &alpha, err);
    if (rc == 0 && gguf_has(gguf, "adapter.alora.invocation_tokens"))
        rc = error_set(err, ERR_INTEGRITY, "%s: key adapter.alora.invocation_tokens is set, which is not supported",
                       name);
    s.gguf = gguf;
    s.config.rank = find_rank(gguf);
    s.config.alpha = alpha != 0 ? (double)alpha : s.config.rank; /* 0: no scaling, as llama.cpp reads it */
    if (rc == 0)
        rc = import(&s, ret_lora, err);
    gguf_close(gguf);
    return rc == ERR_NOT_FOUND ? ERR_INTEGRITY : rc;
}

static int import_folder(const char *folder, const struct model_config *model, enum lora_mode mode,
                         struct lora *ret_lora, struct error *err)
{
    struct buffer config, tensors;
    char path[4096];
    int rc = 0;
    buffer_init(&config, ADAPTER_CONFIG_BYTES_MAX);
    buffer_init(&tensors, ADAPTER_BYTES_MAX);
    if (strlen(folder) + 32 > sizeof path)
        rc = error_set(err, ERR_CONFIG, "adapter: the folder's path is too long");
    if (rc == 0) {
        file_join(path, sizeof path, folder, "adapter_config.json");
        rc = file_read(path, &config, err);
    }
    if (rc == 0) {
        file_join(path, sizeof path, folder, "adapter_model.safetensors");
        rc = file_read(path, &tensors, err);
    }
    if (rc == 0)
        rc = adapter_decode_peft(buffer_span(&config), buffer_span(&tensors), path, model, mode, ret_lora, err);
    buffer_release(&config);
    buffer_release(&tensors);
    return rc;
}

int adapter_import(const char *path, const struct model_config *model, enum lora_mode mode, struct lora *ret_lora,
                   struct error *err)
{
    struct buffer bytes;
    struct stat info;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode))
        return import_folder(path, model, mode, ret_lora, err);
    buffer_init(&bytes, ADAPTER_BYTES_MAX);
    int rc = file_read(path, &bytes, err);
    if (rc == 0)
        rc = adapter_decode_gguf(buffer_span(&bytes), path, model, mode, ret_lora, err);
    buffer_release(&bytes);
    return rc;
}
