/*
 * The command line of both programs: a table of subcommands, options, help, tables and JSON on stdout, errors on
 * stderr.
 *
 * Global flags, before or after the subcommand: -c/--config FILE, --set KEY=VALUE (repeatable), --log-level LEVEL,
 * --format table|json, -y/--yes, -h/--help, --version. Stdout carries data only. Secrets never come by argument:
 * options name files. One struct cli per process, on the main thread.
 *
 *     static const struct cli_option approve_options[] = {{"days", 'd', "N", "Validity in days."}, {0}};
 *     static const struct cli_command commands[] = {
 *         {"ca approve", "SITE", 1, 1, "Sign a site's request.", approve_options, ca_approve},
 *         {0},
 *     };
 *     int main(int argc, char **argv)
 *     {
 *         static const struct cli_program program = {"consilium-aggregator", "The coordinator.", commands, &schema,
 * "aggregator.yaml"}; return cli_main(&program, NULL, argc, argv);
 *     }
 *
 *     static int ca_approve(struct cli *cli, struct error *err)
 *     {
 *         const char *site = cli->args[0], *days = cli_value(cli, "days");
 *         if ((rc = cli_confirm(cli, err, "Approve %s?", site)) < 0) return rc;
 */
#ifndef RUNTIME_CLI_H
#define RUNTIME_CLI_H

#include "base/error.h"
#include "runtime/config.h"

#include <jansson.h>

#define CLI_OPTIONS_MAX 64

enum cli_format { CLI_TABLE, CLI_JSON };

struct cli;

struct cli_option {    /* ends with {0} */
    const char *name;  /* long name without dashes */
    char letter;       /* 0: none */
    const char *value; /* metavariable; NULL: a switch */
    const char *help;
    const char *config_key; /* not NULL: overrides this key of the configuration when given */
};

struct cli_command {  /* ends with {0} */
    const char *name; /* "ca approve" */
    const char *args; /* for the usage line: "SITE [FILE]"; NULL: none */
    int args_min, args_max;
    const char *help;                               /* its first sentence is shown in the list */
    const struct cli_option *options;               /* NULL: none */
    int (*run)(struct cli *cli, struct error *err); /* 0 or a negative ERR_ code */
};

struct cli_program {
    const char *name;
    const char *intro;
    const struct cli_command *commands;
    const struct config_schema *schema; /* of -c; NULL when the program has none */
    const char *config_default;         /* path used without -c; NULL: -c is required where the configuration is read */
};

struct cli {
    const struct cli_program *program;
    const struct cli_command *command;
    void *ctx; /* of cli_main */
    const char *config_file;
    const char *log_level; /* NULL: not given */
    enum cli_format format;
    bool yes;
    int args_count;
    char **args;           /* positional, borrowed from argv */
    const char **settings; /* --set KEY=VALUE, borrowed */
    size_t settings_count;
    const char *values[CLI_OPTIONS_MAX]; /* by index in command->options; "" for a switch that was given */
};

/* Parses, runs one command, prints its error; the process's exit code (architecture: exit codes). */
int MUST_USE cli_main(const struct cli_program *program, void *ctx, int argc, char **argv);

const char *cli_value(const struct cli *cli, const char *option); /* NULL when not given; asserts a known option */
bool cli_switch(const struct cli *cli, const char *option);
/* An option's integer or number in [min, max], or otherwise when it was not given. ERR_CONFIG names the option. */
int MUST_USE cli_int(const struct cli *cli, const char *option, int64_t otherwise, int64_t min, int64_t max,
                     int64_t *ret_value, struct error *err);
int MUST_USE cli_float(const struct cli *cli, const char *option, double otherwise, double min, double max,
                       double *ret_value, struct error *err);

/* Reads the configuration of program->schema: file, environment, options with config_key, --set. Free it. */
int MUST_USE cli_config(const struct cli *cli, struct config **ret_config, struct error *err);

/* Asks on the terminal; 0 on yes or --yes, ERR_POLICY on no, ERR_CONFIG when stdin is no terminal and --yes is missing.
 */
int MUST_USE cli_confirm(const struct cli *cli, struct error *err, const char *format, ...) PRINTF_LIKE(3, 4);

/* rows: an array of objects (consumed). Table: the named columns ("key" or "key:Heading"); JSON: the array as it is. */
void cli_print_rows(const struct cli *cli, json_t *rows, const char *const *columns, size_t columns_count);
/* object (consumed): "key  value" lines in its order, nested objects indented; or JSON. */
void cli_print_object(const struct cli *cli, json_t *object);
/* One plain line in table format, {"message": ...} in JSON. */
void cli_print_line(const struct cli *cli, const char *format, ...) PRINTF_LIKE(2, 3);

#endif
