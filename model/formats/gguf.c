#include "model/formats/gguf.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/reader.h"

#include <math.h>

struct gguf_pair {
    struct span key;
    enum gguf_type type;
    struct span value;       /* the bytes of a scalar or a string */
    struct gguf_array array; /* of GGUF_ARRAY */
};

struct gguf {
    struct span bytes;
    bool mapped;
    char name[256];
    size_t pair_count, tensor_count;
    struct gguf_pair *pairs;     /* sorted by key */
    struct gguf_tensor *tensors; /* in file order */
    uint32_t *by_name;           /* tensor indices sorted by name */
};

/* What a parser function needs to read on and to complain. */
struct parse {
    struct gguf *gguf;
    struct reader r;
    struct error *err;
};

static size_t position(const struct parse *p)
{
    return p->gguf->bytes.len - p->r.rest.len;
}

static int truncated(const struct parse *p, const char *field)
{
    return error_set(p->err, ERR_INTEGRITY, "%s: the file ends inside %s (at byte %zu of %zu)", p->gguf->name, field,
                     position(p), p->gguf->bytes.len);
}

/* Names go into messages, so they are made printable first. */
static const char *printable(struct span s, char out[64])
{
    size_t n = s.len < 60 ? s.len : 60;
    for (size_t i = 0; i < n; i++)
        out[i] = s.ptr[i] >= 0x20 && s.ptr[i] < 0x7f ? (char)s.ptr[i] : '?';
    memcpy(out + n, s.len > n ? "..." : "", s.len > n ? 4 : 1);
    return out;
}

static int read_string(struct parse *p, const char *field, size_t max, struct span *ret)
{
    size_t at = position(p);
    uint64_t len = reader_u64(&p->r);
    if (p->r.failed)
        return truncated(p, field);
    if (len > max)
        return error_set(p->err, ERR_INTEGRITY, "%s: %s at byte %zu has %llu bytes, at most %zu are allowed",
                         p->gguf->name, field, at, (unsigned long long)len, max);
    *ret = reader_take(&p->r, (size_t)len);
    return p->r.failed ? truncated(p, field) : 0;
}

/* Bytes of a scalar; 0 for the types of variable size and for unknown numbers. */
static size_t scalar_bytes(uint32_t type)
{
    static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < ARRAY_LEN(bytes) ? bytes[type] : 0;
}

static const char *type_name(uint32_t type)
{
    static const char *const names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                        "bool", "string", "array", "u64", "i64", "f64"};
    return type < ARRAY_LEN(names) ? names[type] : "unknown";
}

static int read_array(struct parse *p, const char *key, struct gguf_array *ret)
{
    uint32_t type = reader_u32(&p->r);
    uint64_t count = reader_u64(&p->r);
    size_t element = scalar_bytes(type), least = type == GGUF_STRING ? 8 : element;
    if (p->r.failed)
        return truncated(p, key);
    if (least == 0)
        return error_set(p->err, ERR_INTEGRITY, "%s: key %s is an array of type %u (%s), which is not supported",
                         p->gguf->name, key, type, type_name(type));
    if (count > GGUF_ARRAY_MAX || count > p->r.rest.len / least)
        return error_set(p->err, ERR_INTEGRITY,
                         "%s: key %s claims %llu elements; at most %u are allowed and %zu bytes are left",
                         p->gguf->name, key, (unsigned long long)count, GGUF_ARRAY_MAX, p->r.rest.len);
    const uint8_t *start = p->r.rest.ptr;
    if (type == GGUF_STRING) {
        for (uint64_t i = 0; i < count; i++) {
            struct span text;
            int rc = read_string(p, key, GGUF_STRING_BYTES_MAX, &text);
            if (rc < 0)
                return rc;
        }
    } else {
        reader_take(&p->r, (size_t)count * element);
    }
    assert(!p->r.failed);
    *ret = (struct gguf_array){(enum gguf_type)type, count, span_of(start, (size_t)(p->r.rest.ptr - start))};
    return 0;
}

static int read_pair(struct parse *p, struct gguf_pair *pair)
{
    char key[64];
    int rc = read_string(p, "a metadata key", GGUF_NAME_BYTES_MAX, &pair->key);
    if (rc < 0)
        return rc;
    printable(pair->key, key);
    if (pair->key.len == 0 || memchr(pair->key.ptr, 0, pair->key.len))
        return error_set(p->err, ERR_INTEGRITY, "%s: a metadata key is empty or holds a NUL byte", p->gguf->name);
    uint32_t type = reader_u32(&p->r);
    if (p->r.failed)
        return truncated(p, key);
    pair->type = (enum gguf_type)type;
    if (type == GGUF_STRING)
        return read_string(p, key, GGUF_STRING_BYTES_MAX, &pair->value);
    if (type == GGUF_ARRAY)
        return read_array(p, key, &pair->array);
    if (scalar_bytes(type) == 0)
        return error_set(p->err, ERR_INTEGRITY, "%s: key %s has the unknown type %u", p->gguf->name, key, type);
    pair->value = reader_take(&p->r, scalar_bytes(type));
    if (p->r.failed)
        return truncated(p, key);
    if (type == GGUF_BOOL && pair->value.ptr[0] > 1)
        return error_set(p->err, ERR_INTEGRITY, "%s: key %s is a bool of value %u, expected 0 or 1", p->gguf->name, key,
                         pair->value.ptr[0]);
    return 0;
}

static int span_order(struct span a, struct span b)
{
    int order = memcmp(a.ptr, b.ptr, a.len < b.len ? a.len : b.len);
    return order != 0 ? order : (a.len > b.len) - (a.len < b.len);
}

static int pair_order(const void *a, const void *b)
{
    return span_order(((const struct gguf_pair *)a)->key, ((const struct gguf_pair *)b)->key);
}

static int read_pairs(struct parse *p)
{
    struct gguf *g = p->gguf;
    char key[64];
    for (size_t i = 0; i < g->pair_count; i++) {
        int rc = read_pair(p, &g->pairs[i]);
        if (rc < 0)
            return rc;
    }
    if (g->pair_count > 0)
        qsort(g->pairs, g->pair_count, sizeof *g->pairs, pair_order);
    for (size_t i = 1; i < g->pair_count; i++)
        if (pair_order(&g->pairs[i - 1], &g->pairs[i]) == 0)
            return error_set(p->err, ERR_INTEGRITY, "%s: the key %s stands twice", g->name,
                             printable(g->pairs[i].key, key));
    return 0;
}

/* Type and shape of one table row; the offset is from the data section: place_tensor makes it a pointer. */
static int read_tensor(struct parse *p, struct gguf_tensor *t, uint64_t *ret_offset)
{
    char name[64];
    int rc = read_string(p, "a tensor's name", GGUF_NAME_BYTES_MAX, &t->name);
    if (rc < 0)
        return rc;
    printable(t->name, name);
    if (t->name.len == 0 || memchr(t->name.ptr, 0, t->name.len))
        return error_set(p->err, ERR_INTEGRITY, "%s: a tensor's name is empty or holds a NUL byte", p->gguf->name);
    t->dim_count = reader_u32(&p->r);
    if (!p->r.failed && (t->dim_count < 1 || t->dim_count > GGUF_DIMS_MAX))
        return error_set(p->err, ERR_INTEGRITY, "%s: tensor %s has %u dimensions, expected 1 to %u", p->gguf->name,
                         name, t->dim_count, GGUF_DIMS_MAX);
    for (uint32_t i = 0; i < GGUF_DIMS_MAX; i++)
        t->dims[i] = i < t->dim_count && !p->r.failed ? reader_u64(&p->r) : 1;
    uint32_t type = reader_u32(&p->r);
    *ret_offset = reader_u64(&p->r);
    if (p->r.failed)
        return truncated(p, name);
    if (!tensor_type_known(type))
        return error_set(p->err, ERR_INTEGRITY,
                         "%s: tensor %s has element type %u, which is not supported (F32, F16, BF16, Q4_0, Q4_1, Q5_0, "
                         "Q5_1, Q8_0, Q2_K, Q4_K, Q5_K, Q6_K are)",
                         p->gguf->name, name, type);
    t->type = (enum tensor_type)type;
    bool fits = t->dims[0] > 0 && t->dims[0] % tensor_type_block(t->type) == 0 &&
                tensor_type_row_bytes(t->type, (size_t)t->dims[0], &t->bytes);
    if (!fits)
        return error_set(p->err, ERR_INTEGRITY, "%s: tensor %s: dimension 0 is %llu, expected a multiple of %zu (%s)",
                         p->gguf->name, name, (unsigned long long)t->dims[0], tensor_type_block(t->type),
                         tensor_type_name(t->type));
    for (uint32_t i = 1; i < GGUF_DIMS_MAX; i++)
        if (t->dims[i] == 0 || !checked_mul(t->bytes, (size_t)t->dims[i], &t->bytes))
            return error_set(p->err, ERR_INTEGRITY, "%s: tensor %s: dimension %u is %llu, which cannot be",
                             p->gguf->name, name, i, (unsigned long long)t->dims[i]);
    return 0;
}

/* Where a tensor's bytes lie, for the overlap check. */
struct extent {
    uint64_t offset;
    uint64_t end;
    uint32_t tensor;
};

static int extent_order(const void *a, const void *b)
{
    uint64_t x = ((const struct extent *)a)->offset, y = ((const struct extent *)b)->offset;
    return (x > y) - (x < y);
}

static int check_extents(struct parse *p, struct extent *extents)
{
    const struct gguf *g = p->gguf;
    char first[64], second[64];
    if (g->tensor_count > 0)
        qsort(extents, g->tensor_count, sizeof *extents, extent_order);
    for (size_t i = 1; i < g->tensor_count; i++)
        if (extents[i].offset < extents[i - 1].end)
            return error_set(p->err, ERR_INTEGRITY, "%s: the data of tensors %s and %s overlap", g->name,
                             printable(g->tensors[extents[i - 1].tensor].name, first),
                             printable(g->tensors[extents[i].tensor].name, second));
    return 0;
}

static int name_order(const void *a, const void *b, void *tensors)
{
    const struct gguf_tensor *t = tensors;
    return span_order(t[*(const uint32_t *)a].name, t[*(const uint32_t *)b].name);
}

static int check_names(struct parse *p)
{
    struct gguf *g = p->gguf;
    char name[64];
    for (uint32_t i = 0; i < g->tensor_count; i++)
        g->by_name[i] = i;
    if (g->tensor_count > 0)
        qsort_r(g->by_name, g->tensor_count, sizeof *g->by_name, name_order, g->tensors);
    for (size_t i = 1; i < g->tensor_count; i++)
        if (name_order(&g->by_name[i - 1], &g->by_name[i], g->tensors) == 0)
            return error_set(p->err, ERR_INTEGRITY, "%s: the tensor %s stands twice", g->name,
                             printable(g->tensors[g->by_name[i]].name, name));
    return 0;
}

static int read_alignment(struct parse *p, uint32_t *ret_alignment)
{
    uint32_t alignment = GGUF_ALIGNMENT_DEFAULT;
    if (gguf_has(p->gguf, "general.alignment")) {
        int rc = gguf_get_u32(p->gguf, "general.alignment", 1, GGUF_ALIGNMENT_MAX, &alignment, p->err);
        if (rc < 0)
            return rc;
        if ((alignment & (alignment - 1)) != 0)
            return error_set(p->err, ERR_INTEGRITY, "%s: general.alignment is %u, expected a power of two",
                             p->gguf->name, alignment);
    }
    *ret_alignment = alignment;
    return 0;
}

static int read_tensors(struct parse *p, struct extent *extents)
{
    struct gguf *g = p->gguf;
    uint32_t alignment = GGUF_ALIGNMENT_DEFAULT;
    size_t data;
    char name[64];
    int rc = read_alignment(p, &alignment);
    for (uint32_t i = 0; rc == 0 && i < g->tensor_count; i++) {
        extents[i].tensor = i;
        rc = read_tensor(p, &g->tensors[i], &extents[i].offset);
    }
    if (rc < 0)
        return rc;
    if (!checked_align(position(p), alignment, &data))
        return truncated(p, "the tensor table");
    if (data > g->bytes.len) /* a file without tensors may end before the padding */
        data = g->bytes.len;
    for (uint32_t i = 0; i < g->tensor_count; i++) {
        struct gguf_tensor *t = &g->tensors[i];
        uint64_t offset = extents[i].offset, room = g->bytes.len - data;
        if (offset % alignment != 0)
            return error_set(p->err, ERR_INTEGRITY, "%s: tensor %s: offset %llu is no multiple of the alignment %u",
                             g->name, printable(t->name, name), (unsigned long long)offset, alignment);
        if (offset > room || t->bytes > room - offset)
            return error_set(p->err, ERR_INTEGRITY,
                             "%s: tensor %s: offset %llu and %zu bytes pass the end of the file's %llu bytes of data; "
                             "is the file cut short?",
                             g->name, printable(t->name, name), (unsigned long long)offset, t->bytes,
                             (unsigned long long)room);
        t->data = g->bytes.ptr + data + offset;
        extents[i].end = offset + t->bytes;
    }
    rc = check_extents(p, extents);
    return rc < 0 ? rc : check_names(p);
}

static int read_header(struct parse *p)
{
    struct gguf *g = p->gguf;
    struct span magic = reader_take(&p->r, 4);
    if (p->r.failed || memcmp(magic.ptr, "GGUF", 4) != 0)
        return error_set(p->err, ERR_INTEGRITY, "%s: this is not a GGUF file (its first bytes are not \"GGUF\")",
                         g->name);
    uint32_t version = reader_u32(&p->r);
    uint64_t tensors = reader_u64(&p->r), pairs = reader_u64(&p->r);
    if (p->r.failed)
        return truncated(p, "the header");
    if (version != GGUF_VERSION)
        return error_set(p->err, ERR_INTEGRITY, "%s: GGUF version %u, expected %u (little-endian)", g->name, version,
                         GGUF_VERSION);
    /* The shortest pair is a key of one byte, a type and a value of one; the shortest table row has one dimension. */
    if (pairs > GGUF_PAIRS_MAX || pairs > p->r.rest.len / 14)
        return error_set(p->err, ERR_INTEGRITY,
                         "%s: %llu metadata pairs; at most %u are allowed and %zu bytes are left", g->name,
                         (unsigned long long)pairs, GGUF_PAIRS_MAX, p->r.rest.len);
    if (tensors > GGUF_TENSORS_MAX || tensors > p->r.rest.len / 33)
        return error_set(p->err, ERR_INTEGRITY, "%s: %llu tensors; at most %u are allowed and %zu bytes are left",
                         g->name, (unsigned long long)tensors, GGUF_TENSORS_MAX, p->r.rest.len);
    g->pair_count = (size_t)pairs;
    g->tensor_count = (size_t)tensors;
    return 0;
}

static int parse_all(struct gguf *g, struct error *err)
{
    struct parse p = {.gguf = g, .r = reader_of(g->bytes), .err = err};
    struct extent *extents = NULL;
    int rc = read_header(&p);
    if (rc < 0)
        return rc;
    g->pairs = calloc(g->pair_count + 1, sizeof *g->pairs);
    g->tensors = calloc(g->tensor_count + 1, sizeof *g->tensors);
    g->by_name = calloc(g->tensor_count + 1, sizeof *g->by_name);
    extents = calloc(g->tensor_count + 1, sizeof *extents);
    if (!g->pairs || !g->tensors || !g->by_name || !extents)
        rc = error_set(err, ERR_RESOURCES, "%s: no memory for the tables", g->name);
    else
        rc = read_pairs(&p);
    if (rc == 0)
        rc = read_tensors(&p, extents);
    free(extents);
    return rc;
}

int gguf_parse(struct span bytes, const char *name, struct gguf **ret_gguf, struct error *err)
{
    struct gguf *g = calloc(1, sizeof *g);
    if (!g)
        return error_set(err, ERR_RESOURCES, "%s: no memory", name);
    g->bytes = bytes;
    snprintf(g->name, sizeof g->name, "%s", name);
    int rc = parse_all(g, err);
    if (rc < 0) {
        gguf_close(g);
        return rc;
    }
    *ret_gguf = g;
    return 0;
}

int gguf_open(const char *path, struct gguf **ret_gguf, struct error *err)
{
    const char *slash = strrchr(path, '/');
    struct span map;
    int rc = file_map(path, &map, err);
    if (rc < 0)
        return rc;
    rc = gguf_parse(map, slash ? slash + 1 : path, ret_gguf, err);
    if (rc < 0)
        file_unmap(map);
    else
        (*ret_gguf)->mapped = true;
    return rc;
}

void gguf_close(struct gguf *gguf)
{
    if (!gguf)
        return;
    if (gguf->mapped)
        file_unmap(gguf->bytes);
    free(gguf->pairs);
    free(gguf->tensors);
    free(gguf->by_name);
    free(gguf);
}

const char *gguf_name(const struct gguf *gguf)
{
    return gguf->name;
}

struct span gguf_bytes(const struct gguf *gguf)
{
    return gguf->bytes;
}

struct span gguf_map(const struct gguf *gguf)
{
    return gguf->mapped ? gguf->bytes : span_of(NULL, 0);
}

static const struct gguf_pair *find(const struct gguf *g, const char *key)
{
    struct gguf_pair wanted = {.key = span_str(key)};
    return g->pair_count > 0 ? bsearch(&wanted, g->pairs, g->pair_count, sizeof *g->pairs, pair_order) : NULL;
}

bool gguf_has(const struct gguf *gguf, const char *key)
{
    return find(gguf, key) != NULL;
}

/* The pair of this key and type. */
static int find_typed(const struct gguf *g, const char *key, enum gguf_type type, const struct gguf_pair **ret,
                      struct error *err)
{
    const struct gguf_pair *pair = find(g, key);
    if (!pair)
        return error_set(err, ERR_NOT_FOUND, "%s: the key %s is missing", g->name, key);
    if (pair->type != type)
        return error_set(err, ERR_INTEGRITY, "%s: key %s has type %s, expected %s", g->name, key, type_name(pair->type),
                         type_name(type));
    *ret = pair;
    return 0;
}

int gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t low, uint32_t high, uint32_t *ret_value,
                 struct error *err)
{
    const struct gguf_pair *pair = NULL;
    uint32_t value;
    int rc = find_typed(gguf, key, GGUF_U32, &pair, err);
    if (rc < 0)
        return rc;
    memcpy(&value, pair->value.ptr, sizeof value);
    if (value < low || value > high)
        return error_set(err, ERR_INTEGRITY, "%s: key %s is %u, expected %u to %u", gguf->name, key, value, low, high);
    *ret_value = value;
    return 0;
}

int gguf_get_f32(const struct gguf *gguf, const char *key, float *ret_value, struct error *err)
{
    const struct gguf_pair *pair = NULL;
    float value;
    int rc = find_typed(gguf, key, GGUF_F32, &pair, err);
    if (rc < 0)
        return rc;
    memcpy(&value, pair->value.ptr, sizeof value);
    if (!isfinite(value))
        return error_set(err, ERR_INTEGRITY, "%s: key %s is not a finite number", gguf->name, key);
    *ret_value = value;
    return 0;
}

int gguf_get_bool(const struct gguf *gguf, const char *key, bool *ret_value, struct error *err)
{
    const struct gguf_pair *pair = NULL;
    int rc = find_typed(gguf, key, GGUF_BOOL, &pair, err);
    if (rc == 0)
        *ret_value = pair->value.ptr[0] != 0;
    return rc;
}

int gguf_get_string(const struct gguf *gguf, const char *key, struct span *ret_text, struct error *err)
{
    const struct gguf_pair *pair = NULL;
    int rc = find_typed(gguf, key, GGUF_STRING, &pair, err);
    if (rc == 0)
        *ret_text = pair->value;
    return rc;
}

int gguf_get_array(const struct gguf *gguf, const char *key, enum gguf_type type, uint64_t count_max,
                   struct gguf_array *ret_array, struct error *err)
{
    const struct gguf_pair *pair = NULL;
    int rc = find_typed(gguf, key, GGUF_ARRAY, &pair, err);
    if (rc < 0)
        return rc;
    if (pair->array.type != type)
        return error_set(err, ERR_INTEGRITY, "%s: key %s is an array of %s, expected %s", gguf->name, key,
                         type_name(pair->array.type), type_name(type));
    if (pair->array.count > count_max)
        return error_set(err, ERR_INTEGRITY, "%s: key %s has %llu elements, at most %llu are allowed", gguf->name, key,
                         (unsigned long long)pair->array.count, (unsigned long long)count_max);
    *ret_array = pair->array;
    return 0;
}

struct span gguf_array_string(const struct gguf_array *array, size_t *cursor)
{
    uint64_t len;
    assert(array->type == GGUF_STRING && *cursor + sizeof len <= array->bytes.len);
    memcpy(&len, array->bytes.ptr + *cursor, sizeof len);
    struct span text = span_of(array->bytes.ptr + *cursor + sizeof len, (size_t)len);
    *cursor += sizeof len + (size_t)len;
    return text;
}

int32_t gguf_array_i32(const struct gguf_array *array, uint64_t i)
{
    int32_t value;
    assert(array->type == GGUF_I32 && i < array->count);
    memcpy(&value, array->bytes.ptr + i * sizeof value, sizeof value);
    return value;
}

size_t gguf_tensor_count(const struct gguf *gguf)
{
    return gguf->tensor_count;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t i)
{
    assert(i < gguf->tensor_count);
    return &gguf->tensors[i];
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name)
{
    struct span wanted = span_str(name);
    size_t low = 0, high = gguf->tensor_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct gguf_tensor *t = &gguf->tensors[gguf->by_name[middle]];
        int order = span_order(wanted, t->name);
        if (order == 0)
            return t;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}
