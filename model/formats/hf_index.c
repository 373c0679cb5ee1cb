#include "model/formats/hf_index.h"

#include "model/formats/json_fields.h"
#include "model/formats/model_parts.h"

#include <stdlib.h>
#include <string.h>

struct hf_index {
    char name[256];
    json_t *root; /* owns the strings */
    const json_t *map;
    size_t count;
    const char *shards[HF_SHARDS_MAX]; /* (count) sorted */
};

static bool plain_name(const char *name)
{
    static const char ending[] = ".safetensors";
    const size_t len = strlen(name), tail = sizeof ending - 1;
    if (len <= tail || len > 255 || name[0] == '.' || strcmp(name + len - tail, ending) != 0)
        return false;
    for (size_t i = 0; i < len; i++)
        if (!((name[i] >= 'a' && name[i] <= 'z') || (name[i] >= 'A' && name[i] <= 'Z') ||
              (name[i] >= '0' && name[i] <= '9') || name[i] == '-' || name[i] == '_' || name[i] == '.'))
            return false;
    return true;
}

/* Where name stands among the shards, or would. */
static size_t position(const struct hf_index *x, const char *name)
{
    size_t low = 0, high = x->count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (strcmp(x->shards[middle], name) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int add_shard(struct hf_index *x, const char *name, struct error *err)
{
    char shown[64];
    if (!name)
        return error_set(err, ERR_INTEGRITY, "%s: weight_map holds something else than names of files", x->name);
    const size_t at = position(x, name);
    if (at < x->count && strcmp(x->shards[at], name) == 0)
        return 0;
    if (!plain_name(name))
        return error_set(err, ERR_INTEGRITY,
                         "%s: weight_map names the file %s, expected a plain name that ends with .safetensors", x->name,
                         model_parts_printable(name, strlen(name), shown));
    if (x->count == HF_SHARDS_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: weight_map names more than %u files", x->name, HF_SHARDS_MAX);
    memmove(&x->shards[at + 1], &x->shards[at], (x->count - at) * sizeof *x->shards);
    x->shards[at] = name;
    x->count++;
    return 0;
}

static int read_map(struct hf_index *x, struct error *err)
{
    const char *tensor;
    json_t *shard;
    x->map = json_object_get(x->root, "weight_map");
    if (!json_is_object(x->map) || json_object_size(x->map) == 0 || json_object_size(x->map) > SAFETENSORS_TENSORS_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: weight_map is missing, or is no object of 1 to %u tensors", x->name,
                         SAFETENSORS_TENSORS_MAX);
    json_object_foreach((json_t *)(uintptr_t)x->map, tensor, shard)
    {
        int rc = add_shard(x, json_string_value(shard), err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int hf_index_parse(struct span json, const char *file, struct hf_index **ret_index, struct error *err)
{
    struct hf_index *x = calloc(1, sizeof *x);
    if (!x)
        return error_set(err, ERR_RESOURCES, "%s: no memory", file);
    snprintf(x->name, sizeof x->name, "%s", file);
    int rc = json_fields_load(json, HF_INDEX_BYTES_MAX, file, &x->root, err);
    if (rc == 0)
        rc = read_map(x, err);
    if (rc < 0)
        hf_index_free(x);
    else
        *ret_index = x;
    return rc;
}

void hf_index_free(struct hf_index *index)
{
    if (!index)
        return;
    json_decref(index->root);
    free(index);
}

size_t hf_index_shard_count(const struct hf_index *index)
{
    return index->count;
}

const char *hf_index_shard(const struct hf_index *index, size_t i)
{
    assert(i < index->count);
    return index->shards[i];
}

int32_t hf_index_find(const struct hf_index *index, const char *tensor)
{
    const char *shard = json_string_value(json_object_get(index->map, tensor));
    return shard ? (int32_t)position(index, shard) : -1;
}

int hf_index_check(const struct hf_index *index, const struct safetensors *const *shards, struct error *err)
{
    size_t total = 0;
    const char *tensor;
    json_t *shard;
    char shown[64];
    json_object_foreach((json_t *)(uintptr_t)index->map, tensor, shard)
    {
        const size_t at = position(index, json_string_value(shard));
        if (!safetensors_find(shards[at], tensor))
            return error_set(err, ERR_INTEGRITY, "%s: the tensor %s is not in the file %s", index->name,
                             model_parts_printable(tensor, strlen(tensor), shown), index->shards[at]);
    }
    for (size_t i = 0; i < index->count; i++)
        total += safetensors_count(shards[i]);
    if (total != json_object_size(index->map))
        return error_set(err, ERR_INTEGRITY, "%s: its files hold %zu tensors, but weight_map names %zu", index->name,
                         total, json_object_size(index->map));
    return 0;
}
