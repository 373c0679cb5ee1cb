/* The subcommands of consilium-aggregator; main.c holds the table. */
#ifndef AGGREGATOR_COMMANDS_H
#define AGGREGATOR_COMMANDS_H

#include "runtime/cli.h"

int command_init(struct cli *cli, struct error *err);
int command_ca_approve(struct cli *cli, struct error *err);
int command_roster_draft(struct cli *cli, struct error *err);
int command_roster_install(struct cli *cli, struct error *err);
int command_run(struct cli *cli, struct error *err);
int command_job_validate(struct cli *cli, struct error *err);
int command_job_submit(struct cli *cli, struct error *err);
int command_job_list(struct cli *cli, struct error *err);
int command_job_watch(struct cli *cli, struct error *err);
int command_job_abort(struct cli *cli, struct error *err);
int command_model_list(struct cli *cli, struct error *err);

#endif
