/* Shared by config.c (values and getters), config_yaml.c (the file) and config_example.c; for nobody else. */
#ifndef RUNTIME_CONFIG_INTERNAL_H
#define RUNTIME_CONFIG_INTERNAL_H

#include "runtime/config.h"

#define CONFIG_ORIGIN_SIZE 256
#define CONFIG_STRING_MAX 4096

enum config_layer { LAYER_NONE, LAYER_DEFAULT, LAYER_FILE, LAYER_ENVIRONMENT, LAYER_FLAG };

struct config_value {
    enum config_layer layer;
    char origin[CONFIG_ORIGIN_SIZE];
    char *text;   /* owned; strings, resolved paths, enums */
    char **items; /* owned; lists */
    size_t items_count;
    int64_t number; /* int, bool, enum index, milliseconds, bytes */
    double real;
};

struct config {
    const struct config_schema *schema;
    struct config_value *values; /* [schema->count] */
    char name[CONFIG_ORIGIN_SIZE];
    char *folder; /* owned; of relative paths in the file; NULL: none */
    bool finished;
};

/* The key's index, or SIZE_MAX. */
size_t config_find(const struct config_schema *schema, const char *key, size_t key_len);
/* One scalar (or, for lists, comma-separated text) for key i from a layer. A weaker layer never replaces a stronger
 * one. */
int config_set(struct config *c, size_t i, const char *text, enum config_layer layer, const char *origin,
               struct error *err);
/* A list's items; borrowed. */
int config_set_list(struct config *c, size_t i, const char *const *items, size_t count, enum config_layer layer,
                    const char *origin, struct error *err);
/* ERR_CONFIG "origin: unknown key k; did you mean ...?" */
int config_unknown(const struct config_schema *schema, const char *key, const char *origin, struct error *err);
/* "a whole number from 1 to 10 steps", for messages and the example. */
void config_describe(const struct config_key *k, char *out, size_t size);
/* Reads the YAML text into the LAYER_FILE of c. */
int config_read_yaml(struct config *c, struct span text, struct error *err);

#endif
