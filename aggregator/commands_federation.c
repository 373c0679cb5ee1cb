/* init, ca approve, roster draft, roster install, run. */
#include "aggregator/commands.h"
#include "aggregator/rounds/engine.h"
#include "aggregator/settings.h"
#include "base/file.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "crypto/secret.h"

#include <signal.h>

#define AUTHORS_MAX 16

int command_init(struct cli *cli, struct error *err)
{
    struct config *config = NULL;
    uint8_t fingerprint[HASH_SIZE];
    char text[2 * HASH_SIZE + 1], path[AGGREGATOR_PATH_SIZE];
    int rc = cli_config(cli, &config, err);

    if (rc == 0 && (rc = registry_create(config, &clock_system, &random_system, fingerprint, err)) == 0) {
        hex_encode(fingerprint, sizeof fingerprint, text);
        aggregator_path(config, "ca.crt", path);
        cli_print_object(cli, json_pack("{s:s,s:s,s:s}", "federation", config_string(config, "federation"),
                                        "ca_certificate", path, "ca_fingerprint", text));
    }
    config_free(config);
    return rc;
}

int command_ca_approve(struct cli *cli, struct error *err)
{
    const char *role_name = cli_value(cli, "role"), *out_path = cli_value(cli, "out");
    enum site_role role = role_name && strcmp(role_name, "evaluator") == 0 ? SITE_EVALUATOR : SITE_TRAINER;
    struct identity_request_info info;
    char fingerprint[2 * HASH_SIZE + 1];
    struct config *config = NULL;
    struct buffer pem;
    int rc;

    buffer_init(&pem, IDENTITY_PEM_MAX);
    if (role_name && role == SITE_TRAINER && strcmp(role_name, "trainer") != 0)
        return error_set(err, ERR_CONFIG, "--role is trainer or evaluator, not '%s'", role_name);
    if ((rc = cli_config(cli, &config, err)) < 0 || (rc = registry_read_request(cli->args[0], &info, err)) < 0)
        goto out;
    hex_encode(info.key_fingerprint, HASH_SIZE, fingerprint);
    if ((rc = cli_confirm(cli, err, "Approve site '%s' with key %s?", info.id, fingerprint)) < 0 ||
        (rc = registry_approve(config, cli->args[0], role, &clock_system, &random_system, &pem, err)) < 0)
        goto out;
    if (out_path && (rc = file_write_atomic(out_path, buffer_span(&pem), 0644, err)) < 0)
        goto out;
    cli_print_object(cli, json_pack("{s:s,s:s,s:s}", "site", info.id, "key_fingerprint", fingerprint, "role",
                                    role == SITE_TRAINER ? "trainer" : "evaluator"));
out:
    buffer_release(&pem);
    config_free(config);
    return rc;
}

int command_roster_draft(struct cli *cli, struct error *err)
{
    const char *authors = cli_value(cli, "authors"), *out_path = cli_value(cli, "out"), *files[AUTHORS_MAX];
    char copy[4096] = "", *save = NULL;
    struct config *config = NULL;
    struct buffer draft;
    size_t count = 0;
    int rc;

    buffer_init(&draft, ROSTER_BYTES_MAX);
    if (!authors || !out_path)
        return error_set(err, ERR_CONFIG, "roster draft needs --authors FILE[,FILE...] (public keys) and --out FILE");
    snprintf(copy, sizeof copy, "%s", authors);
    for (char *file = strtok_r(copy, ",", &save); file && count < AUTHORS_MAX; file = strtok_r(NULL, ",", &save))
        files[count++] = file;
    if ((rc = cli_config(cli, &config, err)) == 0 &&
        (rc = registry_draft(config, files, count, &clock_system, &draft, err)) == 0 &&
        (rc = file_write_atomic(out_path, buffer_span(&draft), 0644, err)) == 0)
        cli_print_line(cli, "%s: read it, then sign it where the governance key is: consilium-governance sign",
                       out_path);
    buffer_release(&draft);
    config_free(config);
    return rc;
}

int command_roster_install(struct cli *cli, struct error *err)
{
    const char *governance = cli_value(cli, "governance");
    struct config *config = NULL;
    int rc;

    if (!governance)
        return error_set(err, ERR_CONFIG, "roster install needs --governance FILE, the governance public key");
    if ((rc = cli_config(cli, &config, err)) == 0 &&
        (rc = registry_install(config, cli->args[0], governance, err)) == 0)
        cli_print_line(cli, "roster in force");
    config_free(config);
    return rc;
}

static volatile int stop_requested; /* set by the signal handler only; engine.stop points here */

static void on_signal(int signal_number)
{
    stop_requested = signal_number;
}

static int run_engine(const struct config *config, struct registry *registry, struct book *book,
                      struct journal *journal, struct error *err)
{
    struct engine *e = calloc(1, sizeof *e);
    int rc;

    if (!e)
        return error_set(err, ERR_RESOURCES, "out of memory");
    e->config = config;
    e->clock = &clock_system;
    e->rng = &random_system;
    e->registry = registry;
    e->book = book;
    e->journal = journal;
    e->stop = &stop_requested;
    e->log = (struct log_context){.component = "aggregator"};
    rc = engine_run(e, err);
    free(e);
    return rc;
}

int command_run(struct cli *cli, struct error *err)
{
    struct sigaction action = {.sa_handler = on_signal};
    char path[AGGREGATOR_PATH_SIZE];
    struct registry registry = {0};
    struct journal *journal = NULL;
    struct config *config = NULL;
    struct book *book = NULL;
    enum log_level level;
    int rc, lock = -1;

    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    if ((rc = secret_forbid_dumps(err)) < 0 || (rc = cli_config(cli, &config, err)) < 0)
        goto out;
    if (!cli->log_level && log_level_parse(config_string(config, "log.level"), &level) == 0)
        log_set_level(level);
    aggregator_path(config, "journal.jsonl", path);
    if ((rc = registry_open(&registry, config, err)) == 0 && (rc = aggregator_lock(config, &lock, err)) == 0 &&
        (rc = book_open(&book, config, err)) == 0 &&
        (rc = journal_open(&journal, path, &clock_system, false, err)) == 0)
        rc = run_engine(config, &registry, book, journal, err);
out:
    journal_close(journal);
    book_close(book);
    registry_release(&registry);
    config_free(config);
    file_unlock(lock);
    return rc;
}
