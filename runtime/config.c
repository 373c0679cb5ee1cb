#include "runtime/config.h"

#include "base/file.h"
#include "runtime/config_internal.h"
#include "runtime/text.h"

#include <ctype.h>
#include <inttypes.h>
#include <unistd.h>

size_t config_find(const struct config_schema *schema, const char *key, size_t key_len)
{
    for (size_t i = 0; i < schema->count; i++)
        if (strlen(schema->keys[i].key) == key_len && memcmp(schema->keys[i].key, key, key_len) == 0)
            return i;
    return SIZE_MAX;
}

/* Index of a choice "a|b|c", or -1. */
static int choice_index(const char *choices, const char *text)
{
    size_t len = strlen(text);
    int index = 0;
    for (const char *at = choices;; at++, index++) {
        size_t n = strcspn(at, "|");
        if (n == len && memcmp(at, text, n) == 0)
            return index;
        at += n;
        if (!*at)
            return -1;
    }
}

static void format_bound(const struct config_key *k, double v, char *out, size_t size)
{
    if (k->type == CONFIG_DURATION)
        snprintf(out, size, "%" PRId64 "%s", (int64_t)v % 1000 ? (int64_t)v : (int64_t)v / 1000,
                 (int64_t)v % 1000 ? "ms" : "s");
    else if (k->type == CONFIG_BYTES && v >= 1024 && (int64_t)v % 1024 == 0)
        snprintf(out, size, (int64_t)v % (1 << 20) ? "%" PRId64 "KiB" : "%" PRId64 "MiB",
                 (int64_t)v % (1 << 20) ? (int64_t)v >> 10 : (int64_t)v >> 20);
    else
        snprintf(out, size, "%.15g", v);
}

void config_describe(const struct config_key *k, char *out, size_t size)
{
    static const char *const names[] = {"a string",
                                        "a path",
                                        "a whole number",
                                        "a number",
                                        "true or false",
                                        "one of ",
                                        "a list of strings",
                                        "a duration such as 30s, 5m or 2h",
                                        "a size such as 64KiB, 4MiB or 2GB"};
    char range[128] = "", low[40], high[40];
    if (k->min != 0 || k->max != 0) {
        format_bound(k, k->min, low, sizeof low);
        format_bound(k, k->max, high, sizeof high);
        snprintf(range, sizeof range, " from %s to %s%s", low, high,
                 k->type == CONFIG_STRING ? " bytes long"
                 : k->type == CONFIG_LIST ? " items"
                                          : "");
    }
    snprintf(out, size, "%s%s%s%s%s", names[k->type], k->type == CONFIG_ENUM ? k->choices : "", range,
             k->unit ? " " : "", k->unit ? k->unit : "");
}

static int wrong(const struct config_key *k, const char *text, const char *origin, struct error *err)
{
    char expected[256];
    config_describe(k, expected, sizeof expected);
    return error_set(err, ERR_CONFIG, "%s: key %s: expected %s, found \"%.60s\"", origin, k->key, expected, text);
}

static bool in_range(const struct config_key *k, double v)
{
    return (k->min == 0 && k->max == 0) || (v >= k->min && v <= k->max);
}

static void value_clear(struct config_value *v)
{
    free(v->text);
    for (size_t i = 0; i < v->items_count; i++)
        free(v->items[i]);
    free(v->items);
    *v = (struct config_value){0};
}

static bool plain_text(const char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            return false;
    return true;
}

/* A path of the file is relative to the file's folder. */
static char *resolve_path(const struct config *c, const char *text, enum config_layer layer)
{
    if (layer != LAYER_FILE || text[0] == '/' || !c->folder || !*c->folder)
        return strdup(text);
    char *out = NULL;
    return asprintf(&out, "%s/%s", c->folder, text) < 0 ? NULL : out;
}

static int out_of_memory(struct error *err)
{
    return error_set(err, ERR_RESOURCES, "out of memory while reading the configuration");
}

static int parse_scalar(const struct config *c, const struct config_key *k, const char *text, enum config_layer layer,
                        struct config_value *v, const char *origin, struct error *err)
{
    bool ok = false;
    double measure = 0;
    switch (k->type) {
    case CONFIG_STRING:
    case CONFIG_PATH:
        measure = (double)strlen(text);
        ok = *text && measure <= CONFIG_STRING_MAX && plain_text(text);
        if (ok && !(v->text = k->type == CONFIG_PATH ? resolve_path(c, text, layer) : strdup(text)))
            return out_of_memory(err);
        break;
    case CONFIG_ENUM:
        v->number = choice_index(k->choices, text);
        measure = k->min; /* choices have no range */
        ok = v->number >= 0 && !strchr(text, '|');
        if (ok && !(v->text = strdup(text)))
            return out_of_memory(err);
        break;
    case CONFIG_BOOL:
        measure = k->min;
        v->number = strcmp(text, "true") == 0;
        ok = v->number || strcmp(text, "false") == 0;
        break;
    case CONFIG_FLOAT:
        ok = text_parse_float(text, &v->real) == 0;
        measure = v->real;
        break;
    case CONFIG_INT:
        ok = text_parse_int(text, &v->number) == 0;
        measure = (double)v->number;
        break;
    case CONFIG_DURATION:
        ok = text_parse_duration_ms(text, &v->number) == 0;
        measure = (double)v->number;
        break;
    case CONFIG_BYTES:
        ok = text_parse_bytes(text, &v->number) == 0;
        measure = (double)v->number;
        break;
    case CONFIG_LIST:
        break;
    }
    return ok && in_range(k, measure) ? 0 : wrong(k, text, origin, err);
}

static int config_store(struct config *c, size_t i, struct config_value *v, enum config_layer layer, const char *origin)
{
    v->layer = layer;
    snprintf(v->origin, sizeof v->origin, "%s", origin);
    if (c->values[i].layer > layer) { /* parsed and checked all the same */
        value_clear(v);
        return 0;
    }
    value_clear(&c->values[i]);
    c->values[i] = *v;
    return 0;
}

int config_set_list(struct config *c, size_t i, const char *const *items, size_t count, enum config_layer layer,
                    const char *origin, struct error *err)
{
    const struct config_key *k = &c->schema->keys[i];
    struct config_value v = {0};
    if (count > CONFIG_LIST_MAX || !in_range(k, (double)count)) {
        char expected[256];
        config_describe(k, expected, sizeof expected);
        return error_set(err, ERR_CONFIG, "%s: key %s: expected %s (at most %d), found %zu items", origin, k->key,
                         expected, CONFIG_LIST_MAX, count);
    }
    v.items = calloc(count + 1, sizeof *v.items);
    if (!v.items)
        return out_of_memory(err);
    for (size_t n = 0; n < count; n++) {
        if (!*items[n] || strlen(items[n]) > CONFIG_STRING_MAX || !plain_text(items[n])) {
            value_clear(&v);
            return error_set(err, ERR_CONFIG, "%s: key %s: item %zu: expected printable text of 1 to %d bytes", origin,
                             k->key, n + 1, CONFIG_STRING_MAX);
        }
        if (!(v.items[n] = strdup(items[n]))) {
            value_clear(&v);
            return out_of_memory(err);
        }
        v.items_count = n + 1;
    }
    return config_store(c, i, &v, layer, origin);
}

/* "a, b" → items, for flags, the environment and defaults. */
static int set_list_text(struct config *c, size_t i, const char *text, enum config_layer layer, const char *origin,
                         struct error *err)
{
    const char *items[CONFIG_LIST_MAX];
    size_t count = 0;
    char *copy = strdup(text);
    if (!copy)
        return out_of_memory(err);
    for (char *at = copy; *at;) {
        at += strspn(at, " ");
        size_t len = strcspn(at, ",");
        char *next = at + len + (at[len] == ',');
        at[len] = 0;
        while (len && at[len - 1] == ' ')
            at[--len] = 0;
        if (count == CONFIG_LIST_MAX) {
            free(copy);
            return error_set(err, ERR_CONFIG, "%s: key %s: more than %d items", origin, c->schema->keys[i].key,
                             CONFIG_LIST_MAX);
        }
        items[count++] = at;
        at = next;
    }
    int rc = config_set_list(c, i, items, count, layer, origin, err);
    free(copy);
    return rc;
}

int config_set(struct config *c, size_t i, const char *text, enum config_layer layer, const char *origin,
               struct error *err)
{
    if (c->schema->keys[i].type == CONFIG_LIST)
        return set_list_text(c, i, text, layer, origin, err);
    struct config_value v = {0};
    int rc = parse_scalar(c, &c->schema->keys[i], text, layer, &v, origin, err);
    if (rc < 0) {
        value_clear(&v);
        return rc;
    }
    return config_store(c, i, &v, layer, origin);
}

/* The section nearest to key ("policy" of "policy.max_epsilon"), copied to out; false when none is near. */
static bool nearest_section(const struct config_schema *schema, const char *key, char *out, size_t size)
{
    bool found = false;
    for (size_t i = 0; i < schema->count; i++) {
        char section[80];
        const char *name = section, *dot = strchr(schema->keys[i].key, '.');
        if (!dot)
            continue;
        snprintf(section, sizeof section, "%.*s", (int)(dot - schema->keys[i].key), schema->keys[i].key);
        if (text_nearest(key, &name, 1) && (!found || text_distance(key, section) < text_distance(key, out))) {
            snprintf(out, size, "%s", section);
            found = true;
        }
    }
    return found;
}

int config_unknown(const struct config_schema *schema, const char *key, const char *origin, struct error *err)
{
    const char **names = calloc(schema->count ? schema->count : 1, sizeof *names);
    const char *nearest = NULL;
    char section[80] = "";
    if (names) {
        for (size_t i = 0; i < schema->count; i++)
            names[i] = schema->keys[i].key;
        nearest = text_nearest(key, names, schema->count);
    }
    free(names);
    if (!nearest && nearest_section(schema, key, section, sizeof section))
        nearest = section;
    if (nearest)
        return error_set(err, ERR_CONFIG, "%s: key %.80s: unknown; did you mean %s?", origin, key, nearest);
    return error_set(err, ERR_CONFIG, "%s: key %.80s: unknown; expected one of the keys of the example %s", origin, key,
                     schema->name);
}

/* Programmer errors, caught in every build: a wrong getter must never read another key's value. */
static void misuse(const char *key, const char *what)
{
    fprintf(stderr, "config: key %s: %s\n", key, what);
    abort();
}

static int apply_environment(struct config *c, struct error *err)
{
    for (size_t i = 0; i < c->schema->count; i++) {
        char name[160];
        snprintf(name, sizeof name, "CONSILIUM_%s", c->schema->keys[i].key);
        for (char *at = name; *at; at++)
            *at = *at == '.' ? '_' : (char)toupper((unsigned char)*at);
        const char *text = getenv(name);
        if (text) {
            int rc = config_set(c, i, text, LAYER_ENVIRONMENT, name, err);
            if (rc < 0)
                return rc;
        }
    }
    return 0;
}

int config_parse(struct config **ret_config, const struct config_schema *schema, struct span text, const char *name,
                 const char *folder, struct error *err)
{
    struct config *c = calloc(1, sizeof *c);
    int rc = 0;
    if (!c || !(c->values = calloc(schema->count ? schema->count : 1, sizeof *c->values))) {
        free(c);
        return out_of_memory(err);
    }
    c->schema = schema;
    snprintf(c->name, sizeof c->name, "%s", name);
    if (folder && !(c->folder = strdup(folder)))
        rc = out_of_memory(err);
    for (size_t i = 0; rc == 0 && i < schema->count; i++)
        if (schema->keys[i].text) {
            struct error bad = {0};
            rc = config_set(c, i, schema->keys[i].text, LAYER_DEFAULT, "default", &bad);
            if (rc < 0)
                misuse(schema->keys[i].key, bad.message);
        }
    if (rc == 0)
        rc = config_read_yaml(c, text, err);
    if (rc < 0) {
        config_free(c);
        return rc;
    }
    *ret_config = c;
    return 0;
}

int config_load(struct config **ret_config, const struct config_schema *schema, const char *path, struct error *err)
{
    struct buffer text;
    struct config *c = NULL;
    buffer_init(&text, CONFIG_BYTES_MAX);
    int rc = file_read(path, &text, err);
    if (rc < 0) {
        buffer_release(&text);
        if (err)
            err->code = ERR_CONFIG;
        return ERR_CONFIG;
    }
    char *folder = strdup(path);
    if (!folder) {
        buffer_release(&text);
        return out_of_memory(err);
    }
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = 0;
    rc = config_parse(&c, schema, buffer_span(&text), path, slash ? folder : NULL, err);
    free(folder);
    buffer_release(&text);
    if (rc == 0)
        rc = apply_environment(c, err);
    if (rc < 0) {
        config_free(c);
        return rc;
    }
    *ret_config = c;
    return 0;
}

void config_free(struct config *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->schema->count; i++)
        value_clear(&c->values[i]);
    free(c->values);
    free(c->folder);
    free(c);
}

int config_override(struct config *c, const char *key, const char *text, const char *origin, struct error *err)
{
    assert(!c->finished);
    size_t i = config_find(c->schema, key, strlen(key));
    if (i == SIZE_MAX)
        return config_unknown(c->schema, key, origin, err);
    return config_set(c, i, text, LAYER_FLAG, origin, err);
}

int config_finish(struct config *c, struct error *err)
{
    for (size_t i = 0; i < c->schema->count; i++) {
        const struct config_key *k = &c->schema->keys[i];
        if (k->required && c->values[i].layer == LAYER_NONE) {
            char expected[256];
            config_describe(k, expected, sizeof expected);
            return error_set(err, ERR_CONFIG, "%s:1: key %s: required but missing: expected %s", c->name, k->key,
                             expected);
        }
    }
    c->finished = true;
    return 0;
}

static const struct config_value *lookup(const struct config *c, const char *key, unsigned types)
{
    size_t i = config_find(c->schema, key, strlen(key));
    if (i == SIZE_MAX)
        misuse(key, "not in the schema");
    if (!(types >> c->schema->keys[i].type & 1))
        misuse(key, "read by a getter of another type");
    return &c->values[i];
}

static const struct config_value *lookup_set(const struct config *c, const char *key, unsigned types)
{
    const struct config_value *v = lookup(c, key, types);
    if (v->layer == LAYER_NONE)
        misuse(key, "read but unset: test config_is_set first or give it a default");
    return v;
}

bool config_is_set(const struct config *c, const char *key)
{
    return lookup(c, key, ~0u)->layer != LAYER_NONE;
}

const char *config_origin(const struct config *c, const char *key)
{
    const struct config_value *v = lookup(c, key, ~0u);
    return v->layer == LAYER_NONE ? "unset" : v->origin;
}

const char *config_string(const struct config *c, const char *key)
{
    return lookup(c, key, 1u << CONFIG_STRING | 1u << CONFIG_ENUM)->text;
}

const char *config_path(const struct config *c, const char *key)
{
    return lookup(c, key, 1u << CONFIG_PATH)->text;
}

int64_t config_int(const struct config *c, const char *key)
{
    return lookup_set(c, key, 1u << CONFIG_INT)->number;
}

double config_float(const struct config *c, const char *key)
{
    return lookup_set(c, key, 1u << CONFIG_FLOAT)->real;
}

bool config_bool(const struct config *c, const char *key)
{
    return lookup_set(c, key, 1u << CONFIG_BOOL)->number;
}

unsigned config_enum(const struct config *c, const char *key)
{
    return (unsigned)lookup_set(c, key, 1u << CONFIG_ENUM)->number;
}

int64_t config_duration_ms(const struct config *c, const char *key)
{
    return lookup_set(c, key, 1u << CONFIG_DURATION)->number;
}

int64_t config_bytes(const struct config *c, const char *key)
{
    return lookup_set(c, key, 1u << CONFIG_BYTES)->number;
}

size_t config_list_count(const struct config *c, const char *key)
{
    return lookup(c, key, 1u << CONFIG_LIST)->items_count;
}

const char *config_list_item(const struct config *c, const char *key, size_t i)
{
    const struct config_value *v = lookup(c, key, 1u << CONFIG_LIST);
    assert(i < v->items_count);
    return v->items[i];
}

int config_fail(const struct config *c, const char *key, struct error *err, const char *format, ...)
{
    char message[512];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    const struct config_value *v = lookup(c, key, ~0u);
    return error_set(err, ERR_CONFIG, "%s: key %s: %s", v->layer == LAYER_NONE ? c->name : v->origin, key, message);
}
