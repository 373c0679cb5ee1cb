/* The file's reader: libyaml events walked with an explicit stack of mappings; one scalar is one schema key. */
#include "runtime/config_internal.h"
#include "runtime/text.h"

#include <yaml.h>

#define KEY_SIZE 160

struct walker {
    struct config *c;
    yaml_parser_t *parser;
    char path[KEY_SIZE];           /* dotted path of the mapping that is open */
    size_t lens[CONFIG_DEPTH_MAX]; /* path length at each open mapping */
    char (*seen)[KEY_SIZE];        /* full paths of mapping keys so far, to refuse duplicates */
    size_t seen_count, seen_max;
    int depth; /* open mappings */
    struct error *err;
};

static void origin_of(const struct walker *w, yaml_mark_t mark, char out[CONFIG_ORIGIN_SIZE])
{
    snprintf(out, CONFIG_ORIGIN_SIZE, "%.200s:%zu", w->c->name, mark.line + 1);
}

static int refuse(const struct walker *w, yaml_mark_t mark, const char *key, const char *message)
{
    char origin[CONFIG_ORIGIN_SIZE];
    origin_of(w, mark, origin);
    if (key && *key)
        return error_set(w->err, ERR_CONFIG, "%s: key %s: %s", origin, key, message);
    return error_set(w->err, ERR_CONFIG, "%s: %s", origin, message);
}

/* The next event, with anchors, aliases and tags refused. */
static int next_event(struct walker *w, yaml_event_t *ret_event, const char *key)
{
    if (!yaml_parser_parse(w->parser, ret_event)) {
        const char *problem = w->parser->problem ? w->parser->problem : "not YAML";
        return refuse(w, w->parser->problem_mark, NULL, problem);
    }
    const char *message = NULL;
    switch (ret_event->type) {
    case YAML_ALIAS_EVENT:
        message = "expected a value, found an alias (aliases are not allowed)";
        break;
    case YAML_SCALAR_EVENT:
        if (ret_event->data.scalar.anchor || ret_event->data.scalar.tag)
            message = "expected a plain value without anchor or tag";
        break;
    case YAML_SEQUENCE_START_EVENT:
        if (ret_event->data.sequence_start.anchor || ret_event->data.sequence_start.tag)
            message = "expected a list without anchor or tag";
        break;
    case YAML_MAPPING_START_EVENT:
        if (ret_event->data.mapping_start.anchor || ret_event->data.mapping_start.tag)
            message = "expected a mapping without anchor or tag";
        break;
    default:
        break;
    }
    if (!message)
        return 0;
    int rc = refuse(w, ret_event->start_mark, key, message);
    yaml_event_delete(ret_event);
    return rc;
}

/* Does any schema key begin with path + "."? */
static bool is_group(const struct config_schema *schema, const char *path)
{
    size_t len = strlen(path);
    for (size_t i = 0; i < schema->count; i++)
        if (strncmp(schema->keys[i].key, path, len) == 0 && schema->keys[i].key[len] == '.')
            return true;
    return false;
}

static int note_key(struct walker *w, const char *key, yaml_mark_t mark)
{
    for (size_t i = 0; i < w->seen_count; i++)
        if (strcmp(w->seen[i], key) == 0)
            return refuse(w, mark, key, "written twice; keep one");
    if (w->seen_count == w->seen_max)
        return refuse(w, mark, key, "more keys than the schema has");
    snprintf(w->seen[w->seen_count++], KEY_SIZE, "%s", key);
    return 0;
}

static int read_list(struct walker *w, size_t index, const char *origin, const char *key)
{
    char *items[CONFIG_LIST_MAX];
    size_t count = 0;
    yaml_event_t event;
    int rc;
    for (;;) {
        if ((rc = next_event(w, &event, key)) < 0)
            break;
        yaml_event_type_t type = event.type;
        if (type == YAML_SEQUENCE_END_EVENT) {
            yaml_event_delete(&event);
            rc = config_set_list(w->c, index, (const char *const *)items, count, LAYER_FILE, origin, w->err);
            break;
        }
        if (type != YAML_SCALAR_EVENT || strlen((char *)event.data.scalar.value) != event.data.scalar.length)
            rc = refuse(w, event.start_mark, key, "expected a list of plain strings");
        else if (count == CONFIG_LIST_MAX)
            rc = refuse(w, event.start_mark, key, "more items than a list may have (256)");
        else if (!(items[count] = strdup((char *)event.data.scalar.value)))
            rc = error_set(w->err, ERR_RESOURCES, "out of memory while reading the configuration");
        else
            count++;
        yaml_event_delete(&event);
        if (rc < 0)
            break;
    }
    for (size_t i = 0; i < count; i++)
        free(items[i]);
    return rc;
}

static int read_version(struct walker *w, const yaml_event_t *value)
{
    if (value->type != YAML_SCALAR_EVENT || strcmp((char *)value->data.scalar.value, "1") != 0)
        return refuse(w, value->start_mark, "version", "expected 1, the only version this program reads");
    return 0;
}

/* A quoted text is never a number, a size or a truth value. */
static bool quoted_wrong(const struct config_key *k, const yaml_event_t *event)
{
    bool textual = k->type == CONFIG_STRING || k->type == CONFIG_PATH || k->type == CONFIG_ENUM ||
                   k->type == CONFIG_DURATION || k->type == CONFIG_BYTES;
    return !textual && event->data.scalar.style != YAML_PLAIN_SCALAR_STYLE;
}

static int open_mapping(struct walker *w, const char *key, size_t parent_len, yaml_mark_t mark)
{
    if (w->depth == CONFIG_DEPTH_MAX)
        return refuse(w, mark, key, "nested too deep");
    w->lens[w->depth++] = parent_len;
    snprintf(w->path, sizeof w->path, "%s", key);
    return 0;
}

/* The value that follows a key: a scalar, a list, or the start of a nested mapping. */
static int read_value(struct walker *w, const char *key, yaml_mark_t key_mark)
{
    yaml_event_t event;
    char origin[CONFIG_ORIGIN_SIZE], expected[256], message[400];
    int rc = next_event(w, &event, key);
    if (rc < 0)
        return rc;
    size_t index = config_find(w->c->schema, key, strlen(key));
    origin_of(w, key_mark, origin);
    if (strcmp(key, "version") == 0 && w->depth == 1) {
        rc = read_version(w, &event);
    } else if (index == SIZE_MAX && event.type == YAML_MAPPING_START_EVENT && is_group(w->c->schema, key)) {
        rc = open_mapping(w, key, strlen(w->path), event.start_mark);
    } else if (index == SIZE_MAX && event.type == YAML_SCALAR_EVENT && event.data.scalar.length == 0 &&
               is_group(w->c->schema, key)) {
        rc = 0; /* a group whose keys are all commented out */
    } else if (index == SIZE_MAX) {
        rc = is_group(w->c->schema, key) ? refuse(w, event.start_mark, key, "expected a mapping of further keys")
                                         : config_unknown(w->c->schema, key, origin, w->err);
    } else if (event.type == YAML_SEQUENCE_START_EVENT && w->c->schema->keys[index].type == CONFIG_LIST) {
        rc = read_list(w, index, origin, key);
    } else if (event.type != YAML_SCALAR_EVENT || w->c->schema->keys[index].type == CONFIG_LIST ||
               strlen((char *)event.data.scalar.value) != event.data.scalar.length ||
               quoted_wrong(&w->c->schema->keys[index], &event)) {
        config_describe(&w->c->schema->keys[index], expected, sizeof expected);
        snprintf(message, sizeof message, "expected %s, found %s", expected,
                 event.type == YAML_MAPPING_START_EVENT          ? "a mapping"
                 : event.type == YAML_SEQUENCE_START_EVENT       ? "a list"
                 : w->c->schema->keys[index].type == CONFIG_LIST ? "a single value"
                                                                 : "quoted text");
        rc = refuse(w, event.start_mark, key, message);
    } else {
        origin_of(w, event.start_mark, origin);
        rc = config_set(w->c, index, (char *)event.data.scalar.value, LAYER_FILE, origin, w->err);
    }
    yaml_event_delete(&event);
    return rc;
}

static int read_key(struct walker *w, const yaml_event_t *event)
{
    const char *name = (const char *)event->data.scalar.value;
    char key[KEY_SIZE];
    size_t len = event->data.scalar.length;
    if (event->type != YAML_SCALAR_EVENT || len == 0 || len > 64 || strlen(name) != len ||
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") != len)
        return refuse(w, event->start_mark, w->path, "expected a key of letters, digits and underscores");
    int n = snprintf(key, sizeof key, "%s%s%s", w->path, *w->path ? "." : "", name);
    if (n < 0 || (size_t)n >= sizeof key)
        return refuse(w, event->start_mark, NULL, "a key path that is too long");
    int rc = note_key(w, key, event->start_mark);
    return rc < 0 ? rc : read_value(w, key, event->start_mark);
}

static int walk(struct walker *w)
{
    yaml_event_t event;
    bool document = false;
    for (;;) {
        int rc = next_event(w, &event, NULL);
        if (rc < 0)
            return rc;
        yaml_event_type_t type = event.type;
        if (type == YAML_DOCUMENT_START_EVENT && document) {
            rc = refuse(w, event.start_mark, NULL, "a second document; expected one");
        } else if (type == YAML_DOCUMENT_START_EVENT) {
            document = true;
        } else if (w->depth == 0 && type == YAML_MAPPING_START_EVENT) {
            rc = open_mapping(w, "", 0, event.start_mark);
        } else if (w->depth == 0 && (type == YAML_SCALAR_EVENT || type == YAML_SEQUENCE_START_EVENT)) {
            rc = refuse(w, event.start_mark, NULL, "expected a mapping of keys, beginning with version: 1");
        } else if (type == YAML_MAPPING_END_EVENT) {
            w->path[w->lens[--w->depth]] = 0;
        } else if (w->depth > 0) {
            rc = read_key(w, &event);
        }
        yaml_event_delete(&event);
        if (rc < 0 || type == YAML_STREAM_END_EVENT)
            return rc;
    }
}

int config_read_yaml(struct config *c, struct span text, struct error *err)
{
    yaml_parser_t parser;
    if (text.len > CONFIG_BYTES_MAX)
        return error_set(err, ERR_CONFIG, "%s: %zu bytes; expected at most %d", c->name, text.len, CONFIG_BYTES_MAX);
    struct walker w = {.c = c, .parser = &parser, .seen_max = 2 * c->schema->count + 16, .err = err};
    w.seen = calloc(w.seen_max, sizeof *w.seen);
    if (!w.seen || !yaml_parser_initialize(&parser)) {
        free(w.seen);
        return error_set(err, ERR_RESOURCES, "out of memory while reading the configuration");
    }
    yaml_parser_set_encoding(&parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&parser, text.ptr ? text.ptr : (const unsigned char *)"", text.len);
    int rc = walk(&w);
    bool version = false;
    for (size_t i = 0; i < w.seen_count; i++)
        version = version || strcmp(w.seen[i], "version") == 0;
    if (rc == 0 && !version)
        rc = error_set(err, ERR_CONFIG, "%s:1: key version: required but missing: expected version: 1", c->name);
    yaml_parser_delete(&parser);
    free(w.seen);
    return rc;
}
