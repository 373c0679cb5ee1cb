/*
 * consilium-aggregator: the coordinator. It names the sites, opens rounds, adds masked updates without ever seeing one,
 * and signs the next adapter. Start reading at rounds/engine.h.
 */
#include "aggregator/commands.h"
#include "aggregator/settings.h"

int main(int argc, char **argv)
{
    static const struct cli_option approve_options[] = {
        {"role", 0, "ROLE", "trainer (default) or evaluator.", NULL},
        {"out", 'o', "FILE", "Also write the certificate here, to send it back.", NULL},
        {0}};
    static const struct cli_option draft_options[] = {
        {"authors", 0, "FILES", "Public keys of those who may sign jobs, separated by commas.", NULL},
        {"out", 'o', "FILE", "The draft.", NULL},
        {0}};
    static const struct cli_option install_options[] = {
        {"governance", 0, "FILE", "The governance public key; pinned at the first time.", NULL}, {0}};
    static const struct cli_option submit_options[] = {{"author-key", 'k', "FILE", "The plan author's key.", NULL},
                                                       {0}};
    static const struct cli_command commands[] = {
        {"init", NULL, 0, 0, "Make the CA and the server certificate. Prints the CA fingerprint for the sites.", NULL,
         command_init},
        {"ca approve", "REQUEST.csr", 1, 1, "Sign a site's certificate request.", approve_options, command_ca_approve},
        {"roster draft", NULL, 0, 0, "Write the next roster for the governance key to sign.", draft_options,
         command_roster_draft},
        {"roster install", "ROSTER", 1, 1, "Put a signed roster in force.", install_options, command_roster_install},
        {"run", NULL, 0, 0, "Serve the sites and run the jobs.", NULL, command_run},
        {"job validate", "JOB.yaml", 1, 1, "Check a job file and print its plan.", NULL, command_job_validate},
        {"job submit", "JOB.yaml", 1, 1, "Sign a job and put it in the queue.", submit_options, command_job_submit},
        {"job list", NULL, 0, 0, "List the jobs.", NULL, command_job_list},
        {"job watch", "JOB", 1, 1, "Follow a job until it ends.", NULL, command_job_watch},
        {"job abort", "JOB", 1, 1, "End a job.", NULL, command_job_abort},
        {"model list", "JOB", 1, 1, "List a job's adapter versions.", NULL, command_model_list},
        {0}};
    static const struct cli_program program = {
        "consilium-aggregator", "The coordinator of a consilium federation: secure sums, signed adapters.", commands,
        &aggregator_schema, "aggregator.yaml"};

    return cli_main(&program, NULL, argc, argv);
}
