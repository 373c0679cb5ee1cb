/* init, csr, enroll, preflight, run, serve. */
#include "base/file.h"
#include "base/hex.h"
#include "crypto/random.h"
#include "crypto/secret.h"
#include "node/commands.h"
#include "node/jobs/federation.h"
#include "node/serve/server.h"
#include "node/settings.h"

#include <signal.h>

int command_init(struct cli *cli, struct error *err)
{
    struct config *config = NULL;
    uint8_t fingerprint[HASH_SIZE];
    char text[2 * HASH_SIZE + 1], path[NODE_PATH_SIZE];
    int rc = cli_config(cli, &config, err);

    if (rc == 0 && (rc = vault_create(config, &random_system, fingerprint, err)) == 0) {
        hex_encode(fingerprint, sizeof fingerprint, text);
        node_path(config, "site.csr", path);
        cli_print_object(cli, json_pack("{s:s,s:s,s:s}", "site", config_string(config, "site"), "request", path,
                                        "key_fingerprint", text));
    }
    config_free(config);
    return rc;
}

int command_csr(struct cli *cli, struct error *err)
{
    char path[NODE_PATH_SIZE];
    struct config *config = NULL;
    struct buffer request;
    int rc = cli_config(cli, &config, err);

    buffer_init(&request, IDENTITY_PEM_MAX);
    if (rc == 0) {
        node_path(config, "site.csr", path);
        rc = file_read(path, &request, err);
    }
    if (rc == 0 && fwrite(request.data, 1, request.len, stdout) != request.len)
        rc = error_set(err, ERR_RESOURCES, "cannot write to standard output");
    buffer_release(&request);
    config_free(config);
    return rc;
}

int command_enroll(struct cli *cli, struct error *err)
{
    struct enrolment e = {.certificate = cli_value(cli, "certificate"),
                          .ca = cli_value(cli, "ca"),
                          .roster = cli_value(cli, "roster"),
                          .governance = cli_value(cli, "governance"),
                          .ca_fingerprint = cli_value(cli, "ca-fingerprint"),
                          .governance_fingerprint = cli_value(cli, "governance-fingerprint")};
    struct config *config = NULL;
    int rc;

    if (!e.certificate || !e.ca || !e.roster || !e.governance || !e.ca_fingerprint || !e.governance_fingerprint)
        return error_set(err, ERR_CONFIG,
                         "enroll needs --certificate, --ca, --roster, --governance, --ca-fingerprint and "
                         "--governance-fingerprint");
    if ((rc = cli_config(cli, &config, err)) == 0 && (rc = vault_enroll(config, &e, &clock_system, err)) == 0)
        cli_print_line(cli, "site %s is enrolled", config_string(config, "site"));
    config_free(config);
    return rc;
}

static volatile int stop_requested; /* set by the signal handler only */

static void on_signal(int signal_number)
{
    stop_requested = signal_number;
}

static void take_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal};

    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* Everything that both `run` and `serve` hold open. */
struct daemon_parts {
    int lock;
    struct config *config;
    struct site site;
    struct vault vault;
    struct site_store *store;
    struct journal *journal;
    struct slot slot;
    struct serve *serve;
};

static void close_parts(struct daemon_parts *d)
{
    serve_stop(d->serve);
    slot_release(&d->slot);
    journal_close(d->journal);
    site_store_close(d->store);
    vault_release(&d->vault);
    site_release(&d->site);
    config_free(d->config);
    file_unlock(d->lock);
}

static int open_parts(struct daemon_parts *d, struct cli *cli, struct error *err)
{
    char path[NODE_PATH_SIZE];
    enum log_level level;
    int rc;

    d->lock = -1;
    slot_init(&d->slot);
    take_signals();
    if ((rc = secret_forbid_dumps(err)) < 0 || (rc = cli_config(cli, &d->config, err)) < 0)
        return rc;
    if (!cli->log_level && log_level_parse(config_string(d->config, "log.level"), &level) == 0)
        log_set_level(level);
    node_path(d->config, "journal.jsonl", path);
    if ((rc = vault_open(&d->vault, d->config, &clock_system, err)) < 0 ||
        (rc = node_lock(d->config, &d->lock, err)) < 0 || (rc = site_open(&d->site, d->config, err)) < 0 ||
        (rc = site_store_open(&d->store, d->config, err)) < 0 ||
        (rc = journal_open(&d->journal, path, &clock_system, false, err)) < 0)
        return rc;
    journal_event(d->journal, "started",
                  json_pack("{s:s,s:s}", "site", config_string(d->config, "site"), "kernels", d->site.backend->name));
    if (config_is_set(d->config, "serve.listen")) {
        struct serve_options serve = {.site = &d->site,
                                      .slot = &d->slot,
                                      .config = d->config,
                                      .journal = d->journal,
                                      .rng = &random_system,
                                      .clock = &clock_system};
        rc = serve_start(&d->serve, &serve, err);
    }
    return rc;
}

static void fill_federation(struct federation *f, struct daemon_parts *d)
{
    f->config = d->config;
    f->clock = &clock_system;
    f->rng = &random_system;
    f->site = &d->site;
    f->vault = &d->vault;
    f->store = d->store;
    f->journal = d->journal;
    f->slot = &d->slot;
    f->stop = &stop_requested;
    f->log = (struct log_context){.component = "node", .site = config_string(d->config, "site")};
}

int command_run(struct cli *cli, struct error *err)
{
    struct federation *f = calloc(1, sizeof *f);
    struct daemon_parts d = {0};
    int rc;

    if (!f)
        return error_set(err, ERR_RESOURCES, "out of memory");
    if ((rc = open_parts(&d, cli, err)) == 0) {
        fill_federation(f, &d);
        rc = federation_run(f, err);
    }
    close_parts(&d);
    free(f);
    return rc;
}

int command_serve(struct cli *cli, struct error *err)
{
    struct federation *f = calloc(1, sizeof *f);
    struct daemon_parts d = {0};
    int rc;

    if (!f)
        return error_set(err, ERR_RESOURCES, "out of memory");
    if ((rc = open_parts(&d, cli, err)) == 0 && !d.serve)
        rc = config_fail(d.config, "serve.listen", err, "must be set to serve");
    if (rc == 0) {
        fill_federation(f, &d);
        adopt_at_start(f);
        while (!stop_requested)
            clock_sleep_ms(&clock_system, 200);
    }
    job_runtime_release(&f->job);
    close_parts(&d);
    free(f);
    return rc;
}

/* --- preflight ------------------------------------------------------------------------------------------------ */

static void add_check(json_t *rows, const char *what, int rc, const struct error *err, const char *good)
{
    json_array_append_new(rows, json_pack("{s:s,s:s,s:s}", "check", what, "result", rc == 0 ? "ok" : "FAILED", "detail",
                                          rc == 0 ? good : err->message));
}

/* A row with the device that something is computed on, and why that is not the card that auto looked for. */
static void add_device(json_t *rows, const char *what, const char *name, const struct error *why_cpu)
{
    char detail[BACKEND_NAME_SIZE + sizeof why_cpu->message + 32];

    snprintf(detail, sizeof detail, "%s%s%s", name, why_cpu->code ? ", not the card: " : "",
             why_cpu->code ? why_cpu->message : "");
    add_check(rows, what, 0, why_cpu, detail);
}

/* Where a card is to answer: whether its memory does for that is known when it has been taken once. */
static int check_answering(const struct site *site, const struct config *config, json_t *rows, struct error *err)
{
    struct answerer *answerer = NULL;
    const struct error *why_cpu;
    int rc = answerer_new(&answerer, site, (int32_t)config_int(config, "serve.context_tokens"), &random_system,
                          &clock_system, err);

    if (rc < 0) {
        add_check(rows, "answering", rc, err, "");
        return rc;
    }
    const char *name = answerer_device(answerer, &why_cpu);
    add_device(rows, "answering", name, why_cpu);
    answerer_free(answerer);
    return 0;
}

static int check_data(const struct site *site, const struct config *config, char *detail, size_t size,
                      struct error *err)
{
    const char *path = config_path(config, "data.path");
    struct dataset *data = NULL;
    int rc;

    if (!path) {
        snprintf(detail, size, "no data.path: this site evaluates and serves only");
        return 0;
    }
    if ((rc = site_dataset(site, path, "none", 1024, &data, err)) == 0)
        snprintf(detail, size, "%zu records of %zu lines, the longest has %zu tokens", dataset_report(data)->records,
                 dataset_report(data)->lines, dataset_report(data)->longest);
    dataset_free(data);
    return rc;
}

static int check_connection(const struct config *config, struct error *err)
{
    char certificate[NODE_PATH_SIZE], key[NODE_PATH_SIZE], ca[NODE_PATH_SIZE];
    struct rpc_client_config rpc = {
        .url = config_string(config, "aggregator.url"), .clock = &clock_system, .rng = &random_system};
    struct rpc_client *client = NULL;
    struct buffer request, reply;
    int rc;

    node_path(config, "site.crt", certificate);
    node_path(config, "site.key", key);
    node_path(config, "ca.crt", ca);
    rpc.tls = (struct tls_config){.certificate_file = certificate,
                                  .key_file = key,
                                  .ca_file = ca,
                                  .federation = config_string(config, "aggregator.federation"),
                                  .clock = &clock_system};
    buffer_init(&request, 16);
    buffer_init(&reply, ROSTER_BYTES_MAX + 64);
    buffer_u32(&request, SESSION_VERSION);
    if ((rc = rpc_client_new(&client, &rpc, err)) == 0)
        rc = rpc_call_ok(client, SESSION_HELLO, buffer_span(&request), &reply, 10000, err);
    rpc_client_free(client);
    buffer_release(&request);
    buffer_release(&reply);
    return rc;
}

int command_preflight(struct cli *cli, struct error *err)
{
    static const char *const columns[] = {"check", "result", "detail"};
    struct config *config = NULL;
    struct vault vault = {0};
    struct site site = {0};
    struct error e = {0};
    json_t *rows = json_array();
    char detail[256] = "";
    int rc, worst = 0;

    if ((rc = cli_config(cli, &config, err)) < 0)
        goto out;
    rc = vault_open(&vault, config, &clock_system, &e);
    add_check(rows, "identity and roster", rc, &e, config_string(config, "site"));
    worst = worst ? worst : rc;
    rc = site_open(&site, config, &e);
    if (rc == 0)
        add_device(rows, "model", site.backend->name, &site.why_cpu);
    else
        add_check(rows, "model", rc, &e, "");
    worst = worst ? worst : rc;
    if (site.cuda && config_is_set(config, "serve.listen")) {
        const int answering = check_answering(&site, config, rows, &e);
        worst = worst ? worst : answering;
    }
    if (rc == 0) {
        rc = check_data(&site, config, detail, sizeof detail, &e);
        add_check(rows, "data", rc, &e, detail);
        worst = worst ? worst : rc;
    }
    if (vault.key) {
        rc = check_connection(config, &e);
        add_check(rows, "aggregator", rc, &e, config_string(config, "aggregator.url"));
        worst = worst ? worst : rc;
    }
    cli_print_rows(cli, json_incref(rows), columns, ARRAY_LEN(columns));
    rc = worst < 0 ? error_set(err, worst, "preflight found a problem; see above") : 0;
out:
    json_decref(rows);
    site_release(&site);
    vault_release(&vault);
    config_free(config);
    return rc;
}
