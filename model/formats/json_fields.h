/*
 * Typed fields of a JSON object from outside: each getter checks type and range, and its message names file and field.
 * A field that is null counts as absent. Internal to model/formats.
 *
 *     json_t *root;
 *     if (json_fields_load(bytes, 1 << 20, "config.json", &root, err) < 0) ...
 *     struct json_fields f = {root, "config.json", "", err};
 *     int64_t width = 0;
 *     if (json_fields_require(&f, "hidden_size") < 0 || json_fields_int(&f, "hidden_size", 1, 65536, &width) < 0) ...
 *     json_decref(root);
 */
#ifndef FORMATS_JSON_FIELDS_H
#define FORMATS_JSON_FIELDS_H

#include "base/error.h"
#include "base/span.h"

#include <jansson.h>

struct json_fields {
    const json_t *object; /* borrowed */
    const char *file;     /* for messages */
    const char *prefix;   /* of the field's name in messages: "" or "rope_scaling." */
    struct error *err;
};

/* Parses an object of at most `bytes_max` bytes; duplicate keys, NUL characters and nesting beyond jansson's limit
 * (2048) are refused. Caller: json_decref. */
int MUST_USE json_fields_load(struct span text, size_t bytes_max, const char *file, json_t **ret_root,
                              struct error *err);

bool json_fields_has(const struct json_fields *f, const char *name); /* there, and not null */
int MUST_USE json_fields_require(const struct json_fields *f, const char *name);

/* Absent: *value stays. */
int MUST_USE json_fields_int(const struct json_fields *f, const char *name, int64_t low, int64_t high, int32_t *value);
int MUST_USE json_fields_number(const struct json_fields *f, const char *name, double low, double high, double *value);
int MUST_USE json_fields_bool(const struct json_fields *f, const char *name, bool *value);
int MUST_USE json_fields_string(const struct json_fields *f, const char *name, const char **value); /* borrowed */

/* ERR_INTEGRITY: "<file>: <field> <what>". */
int json_fields_fail(const struct json_fields *f, const char *name, const char *what);

/* About how many values a JSON text holds, without parsing it: each takes about a hundred bytes once parsed, so a text
 * of permitted length could still fill the memory. */
size_t json_fields_count(struct span text);

#endif
