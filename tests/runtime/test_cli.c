#include "tests/runtime/support.h"

#include "runtime/cli.h"

struct seen {
    char command[32], arg[32], days[16];
    bool force;
    enum cli_format format;
    double rate;
};

static int approve(struct cli *cli, struct error *err)
{
    struct seen *seen = cli->ctx;
    snprintf(seen->command, sizeof seen->command, "%s", cli->command->name);
    snprintf(seen->arg, sizeof seen->arg, "%s", cli->args[0]);
    snprintf(seen->days, sizeof seen->days, "%s", cli_value(cli, "days") ? cli_value(cli, "days") : "");
    seen->force = cli_switch(cli, "force");
    seen->format = cli->format;
    return cli_float(cli, "rate", 0.5, 0, 1, &seen->rate, err);
}

static int refuse(struct cli *cli, struct error *err)
{
    (void)cli;
    return error_set(err, ERR_POLICY, "refused");
}

static int destroy(struct cli *cli, struct error *err)
{
    return cli_confirm(cli, err, "Destroy everything?");
}

static const struct cli_option options[] = {
    {"days", 'd', "N", "Validity.", NULL}, {"force", 0, NULL, "Do it.", NULL}, {"rate", 0, "Q", "A rate.", NULL}, {0}};
static const struct cli_command commands[] = {{"ca approve", "SITE", 1, 1, "Approve a site. Slowly.", options, approve},
                                              {"ca", NULL, 0, 0, "Show the CA.", NULL, refuse},
                                              {"destroy", NULL, 0, 0, "Destroy.", NULL, destroy},
                                              {0}};
static const struct cli_program program = {"prog", "A test.", commands, NULL, NULL};

static int run_line(struct seen *seen, const char *line)
{
    char copy[256], *argv[32];
    int argc = 0;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *at = copy; *at;) {
        argv[argc++] = at;
        at += strcspn(at, " ");
        if (*at)
            *at++ = 0;
    }
    memset(seen, 0, sizeof *seen);
    return cli_main(&program, seen, argc, argv);
}

static void test_commands(void **state)
{
    struct seen seen;
    (void)state;
    assert_int_equal(run_line(&seen, "prog ca approve clinic-a --days 30 --force --format=json"), 0);
    assert_string_equal(seen.command, "ca approve");
    assert_string_equal(seen.arg, "clinic-a");
    assert_string_equal(seen.days, "30");
    assert_true(seen.force && seen.format == CLI_JSON && seen.rate == 0.5);
    assert_int_equal(run_line(&seen, "prog --log-level error ca approve -d7 --rate 0.25 x"), 0);
    assert_string_equal(seen.arg, "x");
    assert_string_equal(seen.days, "7");
    assert_true(seen.rate == 0.25 && !seen.force);
    assert_int_equal(run_line(&seen, "prog ca approve -- --days"), 0);
    assert_string_equal(seen.arg, "--days");
    assert_int_equal(run_line(&seen, "prog ca"), 5);
    assert_int_equal(run_line(&seen, "prog ca approve a --rate 2"), 2);
    assert_int_equal(run_line(&seen, "prog ca approve"), 2);
    assert_int_equal(run_line(&seen, "prog ca approve a b"), 2);
    assert_int_equal(run_line(&seen, "prog ca approve a --day 3"), 2);
    assert_int_equal(run_line(&seen, "prog ca approve a --days"), 2);
    assert_int_equal(run_line(&seen, "prog aprove"), 2);
    assert_int_equal(run_line(&seen, "prog"), 2);
    assert_int_equal(run_line(&seen, "prog --help"), 0);
    assert_int_equal(run_line(&seen, "prog ca approve --help"), 0);
    assert_int_equal(run_line(&seen, "prog --version"), 0);
    assert_int_equal(run_line(&seen, "prog destroy --yes"), 0);
    assert_int_equal(run_line(&seen, "prog -y destroy"), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_commands)};
    if (!freopen("/dev/null", "r", stdin)) /* no terminal: destroy must insist on --yes */
        return 1;
    struct seen seen;
    if (run_line(&seen, "prog destroy") != 2)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
