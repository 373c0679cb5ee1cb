/*
 * node.yaml: the schema of a site's configuration (its comments are configs/node.yaml), and the paths under its state
 * folder.
 */
#ifndef NODE_SETTINGS_H
#define NODE_SETTINGS_H

#include "runtime/config.h"

extern const struct config_schema node_schema;

#define NODE_PATH_SIZE 4096

/* state folder + "/" + name; makes nothing. */
void node_path(const struct config *config, const char *name, char out[NODE_PATH_SIZE]);

/* One process at a time may spend, train and write in a state folder. Held until file_unlock (base/file.h) or the
 * process's end. ERR_RESOURCES when another one has it. */
int MUST_USE node_lock(const struct config *config, int *ret_lock, struct error *err);

#endif
