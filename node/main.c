/*
 * consilium-node: the daemon and command line of one site. It trains on the site's own records, masks what it sends,
 * checks every adapter that comes back, and serves it to local applications. Start reading at jobs/federation.h.
 */
#include "node/commands.h"
#include "node/settings.h"

int main(int argc, char **argv)
{
    static const struct cli_option enroll_options[] = {
        {"certificate", 0, "FILE", "The site's certificate, as the coordinating team sent it.", NULL},
        {"ca", 0, "FILE", "The federation's CA certificate.", NULL},
        {"roster", 0, "FILE", "The signed roster.", NULL},
        {"governance", 0, "FILE", "The governance public key.", NULL},
        {"ca-fingerprint", 0, "HEX", "Fingerprint of the CA certificate, received another way.", NULL},
        {"governance-fingerprint", 0, "HEX", "Fingerprint of the governance key, received another way.", NULL},
        {0}};
    static const struct cli_option train_options[] = {
        {"local", 0, NULL, "Train on this site's records alone, without any federation.", NULL},
        {"rounds", 0, "N", "Rounds of train.steps each (default: 1).", NULL},
        {"steps", 0, "N", "Steps of a round (default: 4).", NULL},
        {"batch", 0, "N", "Expected records of a step (default: 16).", NULL},
        {"lora", 0, "TEXT", "LoRA configuration, as in a job's plan.", NULL},
        {"optimizer", 0, "NAME", "adamw (default) or sgd.", NULL},
        {"learning-rate", 0, "X", "Of the optimizer (default: 0.005).", NULL},
        {"options", 0, "TEXT", "Further training options, as in a job's plan (default: system=none).", NULL},
        {"max-tokens", 0, "N", "Longer records are left out (default: 256).", NULL},
        {"dp", 0, "MODE", "record (default) or none.", NULL},
        {"clip", 0, "C", "L2 bound of one record's gradient (default: 1).", NULL},
        {"epsilon", 0, "E", "Target over all rounds (default: policy.max_epsilon).", NULL},
        {"out", 'o', "FOLDER", "Where the adapter goes, in PEFT form.", NULL},
        {0}};
    static const struct cli_option eval_options[] = {
        {"data", 'd', "FILE", "Evaluation records, JSON lines.", NULL},
        {"base", 0, NULL, "The base model, without any adapter.", NULL},
        {"adapter", 0, "PATH", "A PEFT folder or GGUF adapter instead of the one in use.", NULL},
        {"records", 0, "N", "At most so many records, evenly spaced (default: 300).", NULL},
        {"max-tokens", 0, "N", "Longer records are left out (default: 1024).", NULL},
        {"system", 0, "TEXT", "System message: default, none or the text (default: none).", NULL},
        {0}};
    static const struct cli_option generate_options[] = {
        {"base", 0, NULL, "The base model, without any adapter.", NULL},
        {"max-tokens", 0, "N", "Longest answer (default: 64).", NULL},
        {"system", 0, "TEXT", "System message (default: the one that the adapter was trained with).", NULL},
        {0}};
    static const struct cli_option export_options[] = {
        {"gguf", 0, NULL, "A GGUF adapter instead of a PEFT folder.", NULL}, {0}};
    static const struct cli_option approve_options[] = {
        {"plan", 0, "HASH", "The plan that was read, as `consent show` prints it (default: asks).", NULL}, {0}};
    static const struct cli_option epsilon_options[] = {
        {"epsilon", 0, "E", "Find the noise multiplier for this epsilon.", NULL},
        {"noise-multiplier", 0, "Z", "Find the epsilon of this noise multiplier.", NULL},
        {"delta", 0, "D", "Delta (default: 1e-5).", NULL},
        {"sampling-rate", 0, "Q", "Probability of a record to be in a step.", NULL},
        {"steps", 0, "N", "Steps over all rounds.", NULL},
        {0}};
    static const struct cli_command commands[] = {
        {"init", NULL, 0, 0, "Make this site's key and certificate request.", NULL, command_init},
        {"csr", NULL, 0, 0, "Print the certificate request.", NULL, command_csr},
        {"enroll", NULL, 0, 0, "Store what the coordinating team sent back, after comparing fingerprints.",
         enroll_options, command_enroll},
        {"preflight", NULL, 0, 0, "Check model, data, identity, ledger and connection without training.", NULL,
         command_preflight},
        {"run", NULL, 0, 0, "Take part in the federation and serve the adapter.", NULL, command_run},
        {"serve", NULL, 0, 0, "Only serve the adapter in use.", NULL, command_serve},
        {"train", NULL, 0, 0, "Train on this site's records alone: train --local.", train_options, command_train},
        {"eval", NULL, 0, 0, "Accuracy of the base model or an adapter on a file.", eval_options, command_eval},
        {"generate", "PROMPT", 1, 1, "Answer one prompt.", generate_options, command_generate},
        {"model describe", "PATH", 1, 1, "Print the model card that jobs refer to, as JSON.", NULL,
         command_model_describe},
        {"model list", NULL, 0, 0, "List the adapter versions held here.", NULL, command_model_list},
        {"model export", "JOB VERSION PATH", 3, 3, "Write an adapter version in PEFT or GGUF form.", export_options,
         command_model_export},
        {"consent list", NULL, 0, 0, "List the jobs that were offered.", NULL, command_consent_list},
        {"consent show", "JOB", 1, 1, "Show what a job asks for.", NULL, command_consent_show},
        {"consent approve", "JOB", 1, 1, "Let a job train on this site's records.", approve_options,
         command_consent_approve},
        {"consent deny", "JOB", 1, 1, "Refuse a job.", NULL, command_consent_deny},
        {"privacy report", NULL, 0, 0, "What this site's records have spent.", NULL, command_privacy_report},
        {"privacy epsilon", NULL, 0, 0, "Account for a plan.", epsilon_options, command_privacy_epsilon},
        {0}};
    static const struct cli_program program = {
        "consilium-node", "One site of a consilium federation: trains on its own records, privately.", commands,
        &node_schema, "node.yaml"};

    return cli_main(&program, NULL, argc, argv);
}
