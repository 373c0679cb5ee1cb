#include "aggregator/settings.h"

#include "base/file.h"

static const struct config_key keys[] = {
    {"federation", CONFIG_STRING, .required = true, .example = "rare-diseases", .max = 63,
     .help = "Name of the federation: a-z, 0-9 and -. It stands in every certificate."},
    {"state", CONFIG_PATH, .required = true, .example = "state",
     .help = "Folder for the CA, the roster, jobs, adapters, the upload spool and the journal. Only this user may read "
             "it."},

    {"listen.url", CONFIG_STRING, .text = "tcp://127.0.0.1:7400", .max = 300,
     .help = "Address and port that nodes connect to; tcp://*:7400 for all addresses."},
    {"listen.names", CONFIG_LIST, .text = "127.0.0.1", .max = 16,
     .help = "Host names and addresses by which nodes reach it; they go into the server certificate at `init`."},

    {"certificates.days", CONFIG_INT, .text = "365", .min = 1, .max = 3650, .unit = "days",
     .help = "Validity of the certificates that `ca approve` and `init` issue."},

    {"roster.days", CONFIG_INT, .text = "180", .min = 1, .max = 3650, .unit = "days",
     .help = "Validity of a roster draft."},
    {"roster.min_colluders", CONFIG_INT, .text = "0", .min = 0, .max = 100, .unit = "sites",
     .help = "Least number of colluding sites that a job may assume; 0 takes the default for the number of sites."},
    {"roster.min_honest", CONFIG_INT, .text = "0", .min = 0, .max = 100, .unit = "sites",
     .help = "Least number of honest sites in a sum; 0 takes the default for the number of sites."},

    {"round.gather", CONFIG_DURATION, .text = "15s", .min = 0, .max = 86400000,
     .help = "How long a round waits for the remaining sites once enough are connected."},
    {"round.liveness", CONFIG_DURATION, .text = "45s", .min = 1000, .max = 3600000,
     .help = "A site that was not heard of for so long is not waited for."},
    {"round.grace", CONFIG_DURATION, .text = "20s", .min = 0, .max = 3600000,
     .help = "After training: how long a stage waits for the remaining sites once enough have answered."},

    {"limits.chunk", CONFIG_BYTES, .text = "4MiB", .min = 4096, .max = 4194304,
     .help = "Largest piece of an upload or download; a multiple of 4."},
    {"limits.spool", CONFIG_BYTES, .text = "8GiB", .min = 1048576, .max = 1e15,
     .help = "Disk space for uploads that have not been added yet."},

    {"log.level", CONFIG_ENUM, .text = "info", .choices = "debug|info|warn|error", .help = "Least level on stderr."},
};

const struct config_schema aggregator_schema = {
    "aggregator.yaml",
    "Configuration of consilium-aggregator, the coordinator. Relative paths are taken from this file's folder.\n"
    "Every key may also come from the environment: round.grace is CONSILIUM_ROUND_GRACE.",
    keys, ARRAY_LEN(keys)};

void aggregator_path(const struct config *config, const char *name, char out[AGGREGATOR_PATH_SIZE])
{
    file_join(out, AGGREGATOR_PATH_SIZE, config_path(config, "state"), name);
}

int aggregator_lock(const struct config *config, int *ret_lock, struct error *err)
{
    char path[AGGREGATOR_PATH_SIZE];
    int rc;

    aggregator_path(config, "lock", path);
    if ((rc = file_lock(path, ret_lock, err)) == ERR_AGAIN)
        rc =
            error_set(err, ERR_RESOURCES,
                      "another consilium-aggregator runs with the state folder %s: stop it first, or give this one its "
                      "own",
                      config_path(config, "state"));
    return rc;
}
