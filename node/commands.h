/* The subcommands of consilium-node; main.c holds the table. */
#ifndef NODE_COMMANDS_H
#define NODE_COMMANDS_H

#include "runtime/cli.h"

int command_init(struct cli *cli, struct error *err);
int command_csr(struct cli *cli, struct error *err);
int command_enroll(struct cli *cli, struct error *err);
int command_run(struct cli *cli, struct error *err);
int command_serve(struct cli *cli, struct error *err);
int command_preflight(struct cli *cli, struct error *err);
int command_train(struct cli *cli, struct error *err);
int command_eval(struct cli *cli, struct error *err);
int command_generate(struct cli *cli, struct error *err);
int command_model_describe(struct cli *cli, struct error *err);
int command_model_list(struct cli *cli, struct error *err);
int command_model_export(struct cli *cli, struct error *err);
int command_consent_list(struct cli *cli, struct error *err);
int command_consent_show(struct cli *cli, struct error *err);
int command_consent_approve(struct cli *cli, struct error *err);
int command_consent_deny(struct cli *cli, struct error *err);
int command_privacy_report(struct cli *cli, struct error *err);
int command_privacy_epsilon(struct cli *cli, struct error *err);

#endif
