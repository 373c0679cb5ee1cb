/* aggregator.yaml: the schema of the coordinator's configuration, and the paths under its state folder. */
#ifndef AGGREGATOR_SETTINGS_H
#define AGGREGATOR_SETTINGS_H

#include "runtime/config.h"

extern const struct config_schema aggregator_schema;

#define AGGREGATOR_PATH_SIZE 4096

/* state folder + "/" + name; makes nothing. */
void aggregator_path(const struct config *config, const char *name, char out[AGGREGATOR_PATH_SIZE]);

/* One aggregator at a time on a state folder. Held until file_unlock (base/file.h) or the process's end. ERR_RESOURCES
 * when another one has it. */
int MUST_USE aggregator_lock(const struct config *config, int *ret_lock, struct error *err);

#endif
