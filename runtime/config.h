/*
 * Configuration: YAML read against one schema table, which also writes the commented example in configs/.
 *
 * A value comes from, strongest first: a flag (config_override), the environment (CONSILIUM_ + key in capitals, dots as
 * underscores), the file, the default. Every message names file:line and key. Refused: unknown keys (the nearest known
 * one is named), wrong types, values out of range, nan and infinity, duplicate keys, anchors, aliases, tags, a second
 * document, more than CONFIG_BYTES_MAX bytes or CONFIG_DEPTH_MAX levels, and a file without `version: 1`.
 *
 * Reading a key that the schema does not have, or with another type's getter, is a programmer error and asserts.
 * Read-only after config_finish, and then safe for any thread.
 *
 *     static const struct config_key keys[] = {
 *         {"site", CONFIG_STRING, .required = true, .example = "clinic-a", .help = "Name in the roster."},
 *         {"policy.max_epsilon", CONFIG_FLOAT, .text = "3", .min = 0, .max = 50, .help = "Budget of this site."},
 *         {"serve.mode", CONFIG_ENUM, .text = "local", .choices = "off|local", .help = "..."},
 *     };
 *     static const struct config_schema schema = {"node.yaml", "The site daemon.", keys, ARRAY_LEN(keys)};
 *
 *     struct config *c;
 *     if ((rc = config_load(&c, &schema, path, &err)) < 0) ...                     file and environment
 *     if ((rc = config_override(c, "log.level", "debug", "--log-level", &err)) < 0) ...
 *     if ((rc = config_finish(c, &err)) < 0) ...                                   required keys
 *     epsilon = config_float(c, "policy.max_epsilon");
 *     config_free(c);
 */
#ifndef RUNTIME_CONFIG_H
#define RUNTIME_CONFIG_H

#include "base/buffer.h"

#define CONFIG_BYTES_MAX (256 << 10)
#define CONFIG_DEPTH_MAX 6
#define CONFIG_LIST_MAX 256

enum config_type {
    CONFIG_STRING,
    CONFIG_PATH, /* a relative one in a file is taken from the file's folder; elsewhere from the working folder */
    CONFIG_INT,
    CONFIG_FLOAT,
    CONFIG_BOOL,     /* true or false */
    CONFIG_ENUM,     /* one of .choices */
    CONFIG_LIST,     /* of strings: [a, b] or one "- a" a line; in flags and the environment "a,b" */
    CONFIG_DURATION, /* "250ms", "30s", "5m", "2h", "7d"; read in milliseconds */
    CONFIG_BYTES,    /* "4MiB", "2GB", "512"; read in bytes */
};

struct config_key {
    const char *key; /* dotted path: "policy.max_epsilon" */
    enum config_type type;
    bool required;
    const char *text;    /* the default as written in a file ("a,b" for lists); NULL: unset */
    const char *example; /* what the example file shows for a key without default; NULL: commented out */
    double min, max; /* of the number, milliseconds, bytes, string bytes or items; both 0: unbounded (strings ≤ 4096) */
    const char *unit;    /* for numbers: "steps", "epsilon" */
    const char *choices; /* CONFIG_ENUM: "off|local|any" */
    const char *help;    /* one or two sentences for the example file */
};

struct config_schema {
    const char *name;  /* "node.yaml" */
    const char *intro; /* the example's opening comment */
    const struct config_key *keys;
    size_t count;
};

struct config;

/* Parses path (and then the environment) against schema, whose tables must outlive the result. ERR_CONFIG. */
int MUST_USE config_load(struct config **ret_config, const struct config_schema *schema, const char *path,
                         struct error *err);
/* The same for text in memory, without the environment; name is what messages call it; folder resolves paths (or NULL).
 */
int MUST_USE config_parse(struct config **ret_config, const struct config_schema *schema, struct span text,
                          const char *name, const char *folder, struct error *err);
void config_free(struct config *c);

/* Sets key from a flag; origin ("--rounds") names it in messages. An unknown key here is the user's mistake.
 * ERR_CONFIG. */
int MUST_USE config_override(struct config *c, const char *key, const char *text, const char *origin,
                             struct error *err);
/* Checks required keys; no override after it. ERR_CONFIG. */
int MUST_USE config_finish(struct config *c, struct error *err);

bool config_is_set(const struct config *c, const char *key);        /* by anything, a default included */
const char *config_origin(const struct config *c, const char *key); /* "node.yaml:12", "--rounds", "default" */
const char *config_string(const struct config *c, const char *key); /* STRING, ENUM; NULL when unset */
const char *config_path(const struct config *c, const char *key);   /* resolved; NULL when unset */
int64_t config_int(const struct config *c, const char *key);        /* set keys only, as all below */
double config_float(const struct config *c, const char *key);
bool config_bool(const struct config *c, const char *key);
unsigned config_enum(const struct config *c, const char *key); /* index in .choices */
int64_t config_duration_ms(const struct config *c, const char *key);
int64_t config_bytes(const struct config *c, const char *key);
size_t config_list_count(const struct config *c, const char *key); /* 0 when unset */
const char *config_list_item(const struct config *c, const char *key, size_t i);

/* Error about key's value found by the caller (two keys that exclude each other): "origin: key k: message". */
int config_fail(const struct config *c, const char *key, struct error *err, const char *format, ...) PRINTF_LIKE(4, 5);

/* Appends the commented example file: every key, its help, type, unit, range and default. Parses with the schema. */
void config_write_example(const struct config_schema *schema, struct buffer *out);

#endif
