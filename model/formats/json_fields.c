#include "model/formats/json_fields.h"

#include <string.h>

int json_fields_load(struct span text, size_t bytes_max, const char *file, json_t **ret_root, struct error *err)
{
    json_error_t problem = {.line = 0};
    json_t *root;
    if (text.len > bytes_max)
        return error_set(err, ERR_INTEGRITY, "%s: %zu bytes, at most %zu are allowed", file, text.len, bytes_max);
    root = text.len > 0 ? json_loadb((const char *)text.ptr, text.len, JSON_REJECT_DUPLICATES, &problem) : NULL;
    if (!json_is_object(root)) {
        json_decref(root);
        return error_set(err, ERR_INTEGRITY, "%s: not a JSON object, or a key stands twice (line %d, column %d)", file,
                         problem.line, problem.column);
    }
    *ret_root = root;
    return 0;
}

bool json_fields_has(const struct json_fields *f, const char *name)
{
    const json_t *value = json_object_get(f->object, name);
    return value && !json_is_null(value);
}

int json_fields_fail(const struct json_fields *f, const char *name, const char *what)
{
    return error_set(f->err, ERR_INTEGRITY, "%s: %s%s %s", f->file, f->prefix, name, what);
}

int json_fields_require(const struct json_fields *f, const char *name)
{
    return json_fields_has(f, name) ? 0 : json_fields_fail(f, name, "is missing");
}

int json_fields_int(const struct json_fields *f, const char *name, int64_t low, int64_t high, int32_t *value)
{
    const json_t *field = json_object_get(f->object, name);
    assert(low >= INT32_MIN && high <= INT32_MAX);
    if (!json_fields_has(f, name))
        return 0;
    if (!json_is_integer(field) || json_integer_value(field) < low || json_integer_value(field) > high)
        return error_set(f->err, ERR_INTEGRITY, "%s: %s%s is no integer from %lld to %lld", f->file, f->prefix, name,
                         (long long)low, (long long)high);
    *value = (int32_t)json_integer_value(field);
    return 0;
}

int json_fields_number(const struct json_fields *f, const char *name, double low, double high, double *value)
{
    const json_t *field = json_object_get(f->object, name);
    if (!json_fields_has(f, name))
        return 0;
    if (!json_is_number(field) || !(json_number_value(field) >= low && json_number_value(field) <= high))
        return error_set(f->err, ERR_INTEGRITY, "%s: %s%s is no number from %g to %g", f->file, f->prefix, name, low,
                         high);
    *value = json_number_value(field);
    return 0;
}

int json_fields_bool(const struct json_fields *f, const char *name, bool *value)
{
    const json_t *field = json_object_get(f->object, name);
    if (!json_fields_has(f, name))
        return 0;
    if (!json_is_boolean(field))
        return json_fields_fail(f, name, "is neither true nor false");
    *value = json_is_true(field);
    return 0;
}

int json_fields_string(const struct json_fields *f, const char *name, const char **value)
{
    const json_t *field = json_object_get(f->object, name);
    if (!json_fields_has(f, name))
        return 0;
    if (!json_is_string(field))
        return json_fields_fail(f, name, "is no text");
    *value = json_string_value(field);
    return 0;
}

size_t json_fields_count(struct span text)
{
    size_t count = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.len; i++) {
        const uint8_t c = text.ptr[i];
        if (quoted && c == '\\')
            i++;
        else if (c == '"')
            quoted = !quoted;
        else if (!quoted)
            count += c == ',' || c == '[' || c == '{';
    }
    return count;
}
