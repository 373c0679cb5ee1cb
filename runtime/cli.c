#include "runtime/cli.h"

#include "base/log.h"
#include "runtime/text.h"

#include <ctype.h>
#include <unistd.h>

#define COMMANDS_MAX 128

static size_t count_words(const char *name)
{
    size_t n = 1;
    for (; *name; name++)
        n += *name == ' ';
    return n;
}

/* How many of the words of the command's name argv begins with: all of them, or 0. */
static size_t match_command(const char *name, char **argv, int argc)
{
    size_t words = count_words(name);
    if ((size_t)argc < words)
        return 0;
    for (size_t i = 0; i < words; i++) {
        size_t len = strcspn(name, " ");
        if (strlen(argv[i]) != len || memcmp(argv[i], name, len) != 0)
            return 0;
        name += len + (name[len] == ' ');
    }
    return words;
}

static void print_option(FILE *out, const struct cli_option *o)
{
    char left[64], letter[4] = "  ";
    if (o->letter)
        snprintf(letter, sizeof letter, "-%c", o->letter);
    snprintf(left, sizeof left, "%s%s --%s%s%s", letter, o->letter ? "," : " ", o->name, o->value ? " " : "",
             o->value ? o->value : "");
    fprintf(out, "  %-30s %s\n", left, o->help ? o->help : "");
}

static const struct cli_option global_options[] = {
    {.name = "config", .letter = 'c', .value = "FILE", .help = "Configuration file."},
    {.name = "set", .value = "KEY=VALUE", .help = "Override one key of the configuration; may be repeated."},
    {.name = "log-level", .value = "LEVEL", .help = "debug, info, warn or error."},
    {.name = "format", .value = "table|json", .help = "Form of the output on stdout."},
    {.name = "yes", .letter = 'y', .help = "Do not ask before destructive commands."},
    {.name = "help", .letter = 'h', .help = "Print this help."},
    {.name = "version", .help = "Print the version."},
    {0},
};

enum { OPTION_CONFIG, OPTION_SET, OPTION_LOG_LEVEL, OPTION_FORMAT, OPTION_YES, OPTION_HELP, OPTION_VERSION };

static void print_command_help(FILE *out, const struct cli_program *p, const struct cli_command *c)
{
    fprintf(out, "Usage: %s %s [options]%s%s\n\n%s\n", p->name, c->name, c->args ? " " : "", c->args ? c->args : "",
            c->help);
    if (c->options && c->options[0].name) {
        fprintf(out, "\nOptions:\n");
        for (const struct cli_option *o = c->options; o->name; o++)
            print_option(out, o);
    }
    fprintf(out, "\nGlobal options:\n");
    for (const struct cli_option *o = global_options; o->name; o++)
        print_option(out, o);
}

static void print_program_help(FILE *out, const struct cli_program *p)
{
    fprintf(out, "Usage: %s [options] COMMAND [arguments]\n\n%s\n\nCommands:\n", p->name, p->intro);
    for (const struct cli_command *c = p->commands; c->name; c++) {
        const char *stop = strchr(c->help, '.');
        fprintf(out, "  %-24s %.*s\n", c->name, stop ? (int)(stop - c->help) : (int)strlen(c->help), c->help);
    }
    fprintf(out, "\nGlobal options:\n");
    for (const struct cli_option *o = global_options; o->name; o++)
        print_option(out, o);
    fprintf(out, "\n%s COMMAND --help describes one command.\n", p->name);
}

static const struct cli_option *find_long(const struct cli_option *options, const char *name, size_t len)
{
    for (const struct cli_option *o = options; o && o->name; o++)
        if (strlen(o->name) == len && memcmp(o->name, name, len) == 0)
            return o;
    return NULL;
}

static const struct cli_option *find_letter(const struct cli_option *options, char letter)
{
    for (const struct cli_option *o = options; o && o->name; o++)
        if (o->letter == letter)
            return o;
    return NULL;
}

static int unknown_option(const struct cli *cli, const char *name, struct error *err)
{
    const char *names[CLI_OPTIONS_MAX + ARRAY_LEN(global_options)];
    size_t n = 0;
    for (const struct cli_option *o = global_options; o->name; o++)
        names[n++] = o->name;
    for (const struct cli_option *o = cli->command ? cli->command->options : NULL; o && o->name; o++)
        names[n++] = o->name;
    const char *nearest = text_nearest(name, names, n);
    if (nearest)
        return error_set(err, ERR_CONFIG, "unknown option --%.40s; did you mean --%s?", name, nearest);
    return error_set(err, ERR_CONFIG, "unknown option --%.40s; see %s --help", name, cli->program->name);
}

struct parse {
    struct cli *cli;
    bool help, version;
    int positional_count;
};

static int apply_global(struct parse *p, size_t index, const char *value, struct error *err)
{
    struct cli *cli = p->cli;
    enum log_level level;
    switch (index) {
    case OPTION_CONFIG:
        cli->config_file = value;
        break;
    case OPTION_SET:
        if (!strchr(value, '='))
            return error_set(err, ERR_CONFIG, "--set %.80s: expected KEY=VALUE", value);
        cli->settings[cli->settings_count++] = value;
        break;
    case OPTION_LOG_LEVEL:
        if (log_level_parse(value, &level) < 0)
            return error_set(err, ERR_CONFIG, "--log-level %.40s: expected debug, info, warn or error", value);
        cli->log_level = value;
        log_set_level(level);
        break;
    case OPTION_FORMAT:
        if (strcmp(value, "table") != 0 && strcmp(value, "json") != 0)
            return error_set(err, ERR_CONFIG, "--format %.40s: expected table or json", value);
        cli->format = strcmp(value, "json") == 0 ? CLI_JSON : CLI_TABLE;
        break;
    case OPTION_YES:
        cli->yes = true;
        break;
    case OPTION_HELP:
        p->help = true;
        break;
    default:
        p->version = true;
    }
    return 0;
}

/* One option at argv[*i]; *i moves past a separate value. */
static int parse_option(struct parse *p, char **argv, int argc, int *i, struct error *err)
{
    struct cli *cli = p->cli;
    const char *text = argv[*i], *value = NULL;
    const struct cli_option *own = cli->command ? cli->command->options : NULL, *o;
    char name[64];
    if (text[1] == '-') {
        size_t len = strcspn(text + 2, "=");
        snprintf(name, sizeof name, "%.*s", (int)len, text + 2);
        o = find_long(own, text + 2, len);
        o = o ? o : find_long(global_options, text + 2, len);
        value = text[2 + len] == '=' ? text + 3 + len : NULL;
    } else {
        snprintf(name, sizeof name, "%c", text[1]);
        o = find_letter(own, text[1]);
        o = o ? o : find_letter(global_options, text[1]);
        value = text[2] ? text + 2 : NULL;
    }
    if (!o)
        return unknown_option(cli, name, err);
    if (!o->value && value)
        return error_set(err, ERR_CONFIG, "option --%s takes no value", o->name);
    if (o->value && !value && *i + 1 < argc)
        value = argv[++*i];
    if (o->value && !value)
        return error_set(err, ERR_CONFIG, "option --%s needs a value: --%s %s", o->name, o->name, o->value);
    if (o >= global_options && o < global_options + ARRAY_LEN(global_options))
        return apply_global(p, (size_t)(o - global_options), value, err);
    assert(o - own < CLI_OPTIONS_MAX);
    cli->values[o - own] = value ? value : "";
    return 0;
}

/* Finds the command: the longest name that the positional words begin with. Options may stand before it. */
static int find_command(struct cli *cli, char **words, int count, int *ret_used, struct error *err)
{
    size_t best = 0;
    for (const struct cli_command *c = cli->program->commands; c->name; c++) {
        size_t n = match_command(c->name, words, count);
        if (n > best) {
            best = n;
            cli->command = c;
        }
    }
    *ret_used = (int)best;
    if (best > 0)
        return 0;
    const char *names[COMMANDS_MAX];
    size_t n = 0;
    char given[128];
    for (const struct cli_command *c = cli->program->commands; c->name && n < COMMANDS_MAX; c++)
        names[n++] = c->name;
    snprintf(given, sizeof given, "%.60s%s%.60s", words[0], count > 1 ? " " : "", count > 1 ? words[1] : "");
    const char *nearest = text_nearest(given, names, n);
    nearest = nearest ? nearest : text_nearest(words[0], names, n);
    if (nearest)
        return error_set(err, ERR_CONFIG, "unknown command %s; did you mean %s?", given, nearest);
    return error_set(err, ERR_CONFIG, "unknown command %s; see %s --help", given, cli->program->name);
}

/* The words that belong to no global option: what may be a command name. */
static int command_words(char **argv, int argc, char **words)
{
    int n = 0;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-' || !argv[i][1]) {
            words[n++] = argv[i];
            continue;
        }
        size_t len = strcspn(argv[i], "=");
        const struct cli_option *o = argv[i][1] == '-' ? find_long(global_options, argv[i] + 2, len - 2)
                                                       : find_letter(global_options, argv[i][1]);
        bool separate = argv[i][1] == '-' ? argv[i][len] != '=' : !argv[i][2];
        if (!o && n == 0) /* an option of the command before its name: nothing is known about its value */
            return 0;
        if (!o)
            return n;
        i += o->value && separate;
    }
    return n;
}

static int parse_all(struct parse *p, char **argv, int argc, char **words, struct error *err)
{
    int used = 0, rc = 0, count = command_words(argv, argc, words);
    if (count > 0 && (rc = find_command(p->cli, words, count, &used, err)) < 0)
        return rc;
    bool only_words = false;
    p->positional_count = 0;
    for (int i = 1; rc == 0 && i < argc; i++) {
        if (!only_words && strcmp(argv[i], "--") == 0)
            only_words = true;
        else if (!only_words && argv[i][0] == '-' && argv[i][1])
            rc = parse_option(p, argv, argc, &i, err);
        else
            words[p->positional_count++] = argv[i];
    }
    p->cli->args = words + used;
    p->cli->args_count = p->positional_count - used;
    return rc;
}

static int run(struct parse *p, char **argv, int argc, char **words, struct error *err)
{
    struct cli *cli = p->cli;
    int rc = parse_all(p, argv, argc, words, err);
    if (p->version) {
        printf("%s %s\n", cli->program->name, CONSILIUM_VERSION);
        return 0;
    }
    if (p->help) {
        if (cli->command)
            print_command_help(stdout, cli->program, cli->command);
        else
            print_program_help(stdout, cli->program);
        return 0;
    }
    if (rc < 0)
        return rc;
    if (!cli->command) {
        print_program_help(stderr, cli->program);
        return error_set(err, ERR_CONFIG, "expected a command");
    }
    if (cli->args_count < cli->command->args_min || cli->args_count > cli->command->args_max)
        return error_set(err, ERR_CONFIG, "usage: %s %s [options] %s", cli->program->name, cli->command->name,
                         cli->command->args ? cli->command->args : "(no further arguments)");
    return cli->command->run(cli, err);
}

int cli_main(const struct cli_program *program, void *ctx, int argc, char **argv)
{
    struct cli cli = {.program = program, .ctx = ctx};
    struct parse p = {.cli = &cli};
    struct error err = {0};
    char **words = calloc((size_t)argc + 1, sizeof *words);
    cli.settings = calloc((size_t)argc + 1, sizeof *cli.settings);
    int rc = words && cli.settings ? run(&p, argv, argc, words, &err) : error_set(&err, ERR_RESOURCES, "out of memory");
    if (rc < 0)
        fprintf(stderr, "%s: %s\n", program->name, err.message[0] ? err.message : "failed");
    if (fflush(stdout) != 0 && rc == 0) {
        fprintf(stderr, "%s: cannot write to standard output\n", program->name);
        rc = ERR_RESOURCES;
    }
    free(words);
    free(cli.settings);
    return error_exit_code(rc);
}

const char *cli_value(const struct cli *cli, const char *option)
{
    const struct cli_option *o = find_long(cli->command->options, option, strlen(option));
    assert(o && "an option that the command does not have");
    return cli->values[o - cli->command->options];
}

bool cli_switch(const struct cli *cli, const char *option)
{
    return cli_value(cli, option) != NULL;
}

int cli_int(const struct cli *cli, const char *option, int64_t otherwise, int64_t min, int64_t max, int64_t *ret_value,
            struct error *err)
{
    const char *text = cli_value(cli, option);
    int64_t v = otherwise;
    if (text && (text_parse_int(text, &v) < 0 || v < min || v > max))
        return error_set(err, ERR_CONFIG, "--%s %.40s: expected a whole number from %lld to %lld", option, text,
                         (long long)min, (long long)max);
    *ret_value = v;
    return 0;
}

int cli_float(const struct cli *cli, const char *option, double otherwise, double min, double max, double *ret_value,
              struct error *err)
{
    const char *text = cli_value(cli, option);
    double v = otherwise;
    if (text && (text_parse_float(text, &v) < 0 || v < min || v > max))
        return error_set(err, ERR_CONFIG, "--%s %.40s: expected a number from %g to %g", option, text, min, max);
    *ret_value = v;
    return 0;
}

int cli_config(const struct cli *cli, struct config **ret_config, struct error *err)
{
    const char *path = cli->config_file ? cli->config_file : cli->program->config_default;
    struct config *c = NULL;
    assert(cli->program->schema);
    if (!path)
        return error_set(err, ERR_CONFIG, "expected -c FILE: the configuration (%s)", cli->program->schema->name);
    int rc = config_load(&c, cli->program->schema, path, err);
    for (const struct cli_option *o = cli->command->options; rc == 0 && o && o->name; o++) {
        const char *text = cli->values[o - cli->command->options];
        char origin[80];
        snprintf(origin, sizeof origin, "--%s", o->name);
        if (o->config_key && text)
            rc = config_override(c, o->config_key, o->value ? text : "true", origin, err);
    }
    for (size_t i = 0; rc == 0 && i < cli->settings_count; i++) {
        char key[160];
        size_t len = strcspn(cli->settings[i], "=");
        snprintf(key, sizeof key, "%.*s", (int)len, cli->settings[i]);
        rc = config_override(c, key, cli->settings[i] + len + 1, "--set", err);
    }
    if (rc == 0)
        rc = config_finish(c, err);
    if (rc < 0) {
        config_free(c);
        return rc;
    }
    *ret_config = c;
    return 0;
}

int cli_confirm(const struct cli *cli, struct error *err, const char *format, ...)
{
    char question[512], answer[16] = "";
    va_list args;
    if (cli->yes)
        return 0;
    va_start(args, format);
    vsnprintf(question, sizeof question, format, args);
    va_end(args);
    if (!isatty(STDIN_FILENO))
        return error_set(err, ERR_CONFIG, "%s: not asked without a terminal; repeat with --yes to confirm", question);
    fprintf(stderr, "%s [y/N] ", question);
    if (fgets(answer, sizeof answer, stdin) && (strcasecmp(answer, "y\n") == 0 || strcasecmp(answer, "yes\n") == 0))
        return 0;
    return error_set(err, ERR_POLICY, "not confirmed; nothing was changed");
}
