#include "model/formats/safetensors.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/reader.h"
#include "kernels/tensor.h"
#include "model/formats/json_fields.h"

#define NAME_BYTES_MAX 512u
#define VALUES_PER_TENSOR_MAX (8u + SAFETENSORS_DIMS_MAX) /* of the header's JSON: 7, the dimensions, one to spare */

struct safetensors {
    struct span bytes;
    bool mapped;
    char name[256];
    json_t *header; /* owns the tensors' names */
    size_t count;
    struct safetensors_tensor *tensors;        /* (count) by their place in the file */
    const struct safetensors_tensor **by_name; /* (count) */
};

/* The format's element types; those that nothing here converts are only measured. */
static bool parse_type(const char *name, enum safetensors_type *ret_type, size_t *ret_bytes)
{
    static const struct {
        const char *name;
        enum safetensors_type type;
        size_t bytes;
    } types[] = {
        {"F32", SAFETENSORS_F32, 4},    {"F16", SAFETENSORS_F16, 2},   {"BF16", SAFETENSORS_BF16, 2},
        {"F64", SAFETENSORS_OTHER, 8},  {"I64", SAFETENSORS_OTHER, 8}, {"I32", SAFETENSORS_OTHER, 4},
        {"I16", SAFETENSORS_OTHER, 2},  {"I8", SAFETENSORS_OTHER, 1},  {"U64", SAFETENSORS_OTHER, 8},
        {"U32", SAFETENSORS_OTHER, 4},  {"U16", SAFETENSORS_OTHER, 2}, {"U8", SAFETENSORS_OTHER, 1},
        {"BOOL", SAFETENSORS_OTHER, 1},
    };
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        if (strcmp(types[i].name, name) == 0) {
            *ret_type = types[i].type;
            *ret_bytes = types[i].bytes;
            return true;
        }
    }
    return false;
}

/* The shape; *bytes, the element's size before, becomes the tensor's. */
static bool parse_shape(const json_t *shape, struct safetensors_tensor *t, size_t *bytes)
{
    if (!json_is_array(shape) || json_array_size(shape) > SAFETENSORS_DIMS_MAX)
        return false;
    bool empty = false;
    t->dim_count = (uint32_t)json_array_size(shape);
    for (uint32_t i = 0; i < t->dim_count; i++) {
        const json_t *dim = json_array_get(shape, i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return false;
        t->dims[i] = (uint64_t)json_integer_value(dim);
        empty |= t->dims[i] == 0;
        /* Also of a tensor without values the other dimensions must have a product. */
        if (t->dims[i] > 0 && !checked_mul(*bytes, (size_t)t->dims[i], bytes))
            return false;
    }
    *bytes = empty ? 0 : *bytes;
    return true;
}

static int bad(const struct safetensors *f, const char *tensor, const char *what, struct error *err)
{
    char shown[64];
    size_t n = 0;
    for (; tensor[n] && n + 1 < sizeof shown; n++)
        shown[n] = tensor[n] >= 0x20 && tensor[n] < 0x7f ? tensor[n] : '?';
    shown[n] = '\0';
    return error_set(err, ERR_INTEGRITY, "%s: tensor %s: %s", f->name, shown, what);
}

static int parse_tensor(const struct safetensors *f, const char *name, const json_t *entry, struct span data,
                        struct safetensors_tensor *t, struct error *err)
{
    const char *type = json_string_value(json_object_get(entry, "dtype"));
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    size_t bytes = 0;
    if (strlen(name) > NAME_BYTES_MAX)
        return bad(f, name, "the name is too long", err);
    if (!type || !parse_type(type, &t->type, &bytes))
        return bad(f, name, "dtype is missing or unknown", err);
    if (!parse_shape(json_object_get(entry, "shape"), t, &bytes))
        return bad(f, name, "shape is missing, has more than 8 dimensions or is too large", err);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
        return bad(f, name, "data_offsets is missing or not two integers", err);
    const json_int_t first = json_integer_value(begin), last = json_integer_value(end);
    if (first < 0 || last < first || (uint64_t)last > data.len)
        return bad(f, name, "data_offsets lie outside the file's data; is the file cut short?", err);
    if ((uint64_t)(last - first) != bytes)
        return bad(f, name, "data_offsets do not hold exactly what shape and dtype ask for", err);
    t->name = name;
    t->data = span_of(data.ptr + first, bytes);
    return 0;
}

static int place_order(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    if (x->data.ptr != y->data.ptr)
        return x->data.ptr < y->data.ptr ? -1 : 1;
    return (x->data.len > y->data.len) - (x->data.len < y->data.len);
}

/* Neither holes nor overlaps: each tensor begins where the one before ended, and the last ends the file. */
static int check_tiling(const struct safetensors *f, struct span data, struct error *err)
{
    const uint8_t *at = data.ptr;
    if (f->count > 0)
        qsort(f->tensors, f->count, sizeof *f->tensors, place_order);
    for (size_t i = 0; i < f->count; i++) {
        if (f->tensors[i].data.ptr != at)
            return bad(f, f->tensors[i].name,
                       f->tensors[i].data.ptr < at ? "its data overlap another tensor's" : "there is a hole before it",
                       err);
        at += f->tensors[i].data.len;
    }
    if (at != data.ptr + data.len)
        return error_set(err, ERR_INTEGRITY, "%s: %zu bytes after the last tensor belong to none", f->name,
                         (size_t)(data.ptr + data.len - at));
    return 0;
}

static int name_order(const void *a, const void *b)
{
    const struct safetensors_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

static void index_names(struct safetensors *f)
{
    for (size_t i = 0; i < f->count; i++)
        f->by_name[i] = &f->tensors[i];
    if (f->count > 0)
        qsort(f->by_name, f->count, sizeof *f->by_name, name_order);
}

/* The format allows nothing but texts in it. */
static int check_metadata(const struct safetensors *f, json_t *metadata, struct error *err)
{
    const char *name;
    json_t *value;
    if (metadata && !json_is_object(metadata))
        return error_set(err, ERR_INTEGRITY, "%s: __metadata__ is not an object", f->name);
    json_object_foreach(metadata, name, value)
    {
        if (!json_is_string(value))
            return error_set(err, ERR_INTEGRITY, "%s: __metadata__ holds a value that is not a text", f->name);
    }
    return 0;
}

static int parse_tensors(struct safetensors *f, struct span data, struct error *err)
{
    const size_t count = json_object_size(f->header);
    const char *name;
    json_t *entry;
    if (count > SAFETENSORS_TENSORS_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: %zu tensors, at most %u are allowed", f->name, count,
                         SAFETENSORS_TENSORS_MAX);
    f->tensors = calloc(count + 1, sizeof *f->tensors);
    f->by_name = calloc(count + 1, sizeof *f->by_name);
    if (!f->tensors || !f->by_name)
        return error_set(err, ERR_RESOURCES, "%s: no memory", f->name);
    json_object_foreach(f->header, name, entry)
    {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        int rc = parse_tensor(f, name, entry, data, &f->tensors[f->count], err);
        if (rc < 0)
            return rc;
        f->count++;
    }
    int rc = check_metadata(f, json_object_get(f->header, "__metadata__"), err);
    if (rc == 0)
        rc = check_tiling(f, data, err);
    index_names(f);
    return rc;
}

static int parse_all(struct safetensors *f, struct error *err)
{
    struct reader r = reader_of(f->bytes);
    const uint64_t length = reader_u64(&r);
    json_error_t problem;
    if (r.failed)
        return error_set(err, ERR_INTEGRITY, "%s: the file has %zu bytes, which is too short for safetensors", f->name,
                         f->bytes.len);
    if (length > SAFETENSORS_HEADER_MAX || length > r.rest.len)
        return error_set(err, ERR_INTEGRITY,
                         "%s: the header claims %llu bytes; at most %u are allowed and %zu are left", f->name,
                         (unsigned long long)length, SAFETENSORS_HEADER_MAX, r.rest.len);
    const struct span header = reader_take(&r, (size_t)length);
    if (header.len == 0 || header.ptr[0] != '{')
        return error_set(err, ERR_INTEGRITY, "%s: the header is not a JSON object", f->name);
    if (json_fields_count(header) > (size_t)SAFETENSORS_TENSORS_MAX * VALUES_PER_TENSOR_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: the header holds more values than %u tensors have", f->name,
                         SAFETENSORS_TENSORS_MAX);
    f->header = json_loadb((const char *)header.ptr, header.len, JSON_REJECT_DUPLICATES, &problem);
    if (!f->header)
        return error_set(err, ERR_INTEGRITY, "%s: the header is not valid JSON, or a key stands twice (at byte %d)",
                         f->name, problem.position);
    return parse_tensors(f, r.rest, err);
}

int safetensors_parse(struct span bytes, const char *name, struct safetensors **ret_file, struct error *err)
{
    struct safetensors *f = calloc(1, sizeof *f);
    if (!f)
        return error_set(err, ERR_RESOURCES, "%s: no memory", name);
    f->bytes = bytes;
    snprintf(f->name, sizeof f->name, "%s", name);
    int rc = parse_all(f, err);
    if (rc < 0)
        safetensors_close(f);
    else
        *ret_file = f;
    return rc;
}

const char *safetensors_name(const struct safetensors *file)
{
    return file->name;
}

int safetensors_open(const char *path, struct safetensors **ret_file, struct error *err)
{
    const char *slash = strrchr(path, '/');
    struct span map;
    int rc = file_map(path, &map, err);
    if (rc < 0)
        return rc;
    rc = safetensors_parse(map, slash ? slash + 1 : path, ret_file, err);
    if (rc < 0)
        file_unmap(map);
    else
        (*ret_file)->mapped = true;
    return rc;
}

void safetensors_close(struct safetensors *file)
{
    if (!file)
        return;
    if (file->mapped)
        file_unmap(file->bytes);
    json_decref(file->header);
    free(file->tensors);
    free(file->by_name);
    free(file);
}

size_t safetensors_count(const struct safetensors *file)
{
    return file->count;
}

const struct safetensors_tensor *safetensors_at(const struct safetensors *file, size_t i)
{
    assert(i < file->count);
    return &file->tensors[i];
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name)
{
    const struct safetensors_tensor wanted = {.name = name}, *key = &wanted, **found = NULL;
    if (file->count > 0)
        found = bsearch(&key, file->by_name, file->count, sizeof *file->by_name, name_order);
    return found ? *found : NULL;
}

bool safetensors_floats(const struct safetensors_tensor *tensor, float *out)
{
    switch (tensor->type) {
    case SAFETENSORS_F32:
        memcpy(out, tensor->data.ptr, tensor->data.len);
        return true;
    case SAFETENSORS_F16:
    case SAFETENSORS_BF16:
        /* The data may lie at any address, so values are taken out one by one. */
        for (size_t i = 0; i < tensor->data.len / 2; i++) {
            uint16_t value;
            memcpy(&value, tensor->data.ptr + 2 * i, sizeof value);
            tensor_dequantise(tensor->type == SAFETENSORS_F16 ? TENSOR_F16 : TENSOR_BF16, &value, 1, &out[i]);
        }
        return true;
    default:
        return false;
    }
}

/* {"dtype": .., "shape": [..], "data_offsets": [begin, end]}; NULL without memory. */
static json_t *describe(const struct safetensors_tensor *t, size_t begin)
{
    static const char *const names[] = {"F32", "F16", "BF16"};
    json_t *shape = json_array();
    assert(t->type != SAFETENSORS_OTHER);
    for (uint32_t i = 0; i < t->dim_count; i++)
        json_array_append_new(shape, json_integer((json_int_t)t->dims[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", names[t->type], "shape", shape, "data_offsets", (json_int_t)begin,
                     (json_int_t)(begin + t->data.len));
}

int safetensors_write(const struct safetensors_tensor *tensors, size_t count, struct buffer *out, struct error *err)
{
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    size_t offset = 0, length;
    bool ok = header != NULL;
    for (size_t i = 0; ok && i < count; i++) {
        ok = json_object_set_new(header, tensors[i].name, describe(&tensors[i], offset)) == 0;
        offset += tensors[i].data.len;
    }
    char *text = ok ? json_dumps(header, JSON_COMPACT) : NULL;
    json_decref(header);
    if (!text)
        return error_set(err, ERR_RESOURCES, "writing safetensors: no memory for the header");
    /* Spaces bring the data to a multiple of 8, as other writers do. */
    length = (strlen(text) + 7) / 8 * 8;
    buffer_u64(out, length);
    buffer_append(out, text, strlen(text));
    for (size_t i = strlen(text); i < length; i++)
        buffer_u8(out, ' ');
    free(text);
    for (size_t i = 0; i < count; i++)
        buffer_append(out, tensors[i].data.ptr, tensors[i].data.len);
    return buffer_ok(out) ? 0 : error_set(err, ERR_RESOURCES, "writing safetensors: more than %zu bytes", out->max);
}
