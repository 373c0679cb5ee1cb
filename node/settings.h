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

#endif
