#include "tests/runtime/support.h"

#include "runtime/config.h"
#include "runtime/text.h"

#include <unistd.h>

static const struct config_key keys[] = {
    {"site", CONFIG_STRING, .required = true, .example = "clinic-a", .help = "Name of this site in the roster."},
    {"state", CONFIG_PATH, .text = "/var/lib/consilium", .help = "State directory."},
    {"policy.max_epsilon", CONFIG_FLOAT, .text = "3", .min = 0.1, .max = 50, .unit = "epsilon", .help = "Budget."},
    {"policy.min_cohort", CONFIG_INT, .text = "5", .min = 3, .max = 1000, .unit = "sites"},
    {"policy.require_secagg", CONFIG_BOOL, .text = "true"},
    {"policy.windows", CONFIG_LIST, .text = "mon-fri 20:00-06:00,sat"},
    {"policy.grace", CONFIG_DURATION, .text = "30s", .min = 1000, .max = 3600000},
    {"data.path", CONFIG_PATH, .help = "The examples."},
    {"data.chunk", CONFIG_BYTES, .text = "4MiB", .min = 1024, .max = 16777216},
    {"serve.mode", CONFIG_ENUM, .text = "local", .choices = "off|local|any"},
};
static const struct config_schema schema = {"node.yaml", "A test: the site daemon.", keys, ARRAY_LEN(keys)};

static int parse(const char *text, struct config **c, struct error *err)
{
    return config_parse(c, &schema, span_str(text), "node.yaml", "/etc/consilium", err);
}

static void test_values(void **state)
{
    struct config *c = NULL;
    struct error err = {0};
    (void)state;
    int rc = parse(
        "version: 1\nsite: clinic-b\npolicy:\n  max_epsilon: 1.5\n  min_cohort: 7\n  require_secagg: false\n"
        "  windows: [a, \"b, c\"]\n  grace: 2m\ndata:\n  path: train.jsonl\n  chunk: 64KiB\nserve:\n  mode: any\n",
        &c, &err);
    if (rc < 0)
        fail_msg("%s", err.message);
    assert_int_equal(config_finish(c, &err), 0);
    assert_string_equal(config_string(c, "site"), "clinic-b");
    assert_string_equal(config_path(c, "state"), "/var/lib/consilium");
    assert_string_equal(config_path(c, "data.path"), "/etc/consilium/train.jsonl");
    assert_true(config_float(c, "policy.max_epsilon") == 1.5);
    assert_int_equal(config_int(c, "policy.min_cohort"), 7);
    assert_false(config_bool(c, "policy.require_secagg"));
    assert_int_equal(config_list_count(c, "policy.windows"), 2);
    assert_string_equal(config_list_item(c, "policy.windows", 1), "b, c");
    assert_int_equal(config_duration_ms(c, "policy.grace"), 120000);
    assert_int_equal(config_bytes(c, "data.chunk"), 65536);
    assert_int_equal(config_enum(c, "serve.mode"), 2);
    assert_string_equal(config_origin(c, "policy.min_cohort"), "node.yaml:5");
    assert_string_equal(config_origin(c, "state"), "default");
    config_fail(c, "policy.grace", &err, "too short for %d", 3);
    assert_string_equal(err.message, "node.yaml:8: key policy.grace: too short for 3");
    config_free(c);
}

static void refused(const char *text, const char *first, const char *second)
{
    struct config *c = NULL;
    struct error err = {0};
    int rc = parse(text, &c, &err);
    if (rc == 0) {
        rc = config_finish(c, &err);
        config_free(c);
    }
    if (rc != ERR_CONFIG || !strstr(err.message, first) || !strstr(err.message, second))
        fail_msg("for <%s> got %d: %s", text, rc, err.message);
}

#define HEAD "version: 1\nsite: a\n"

static void test_refusals(void **state)
{
    (void)state;
    refused("site: a\n", "version", "expected version: 1");
    refused("version: 2\nsite: a\n", "node.yaml:1", "expected 1");
    refused("version: 1\n", "key site", "required");
    refused(HEAD "polcy:\n  max_epsilon: 1\n", "node.yaml:3: key polcy", "did you mean policy?");
    refused(HEAD "policy:\n  max_epsilom: 1\n", "node.yaml:4: key policy.max_epsilom",
            "did you mean policy.max_epsilon?");
    refused(HEAD "policy:\n  max_epsilon: nan\n", "node.yaml:4: key policy.max_epsilon",
            "a number from 0.1 to 50 epsilon");
    refused(HEAD "policy:\n  max_epsilon: .inf\n", "node.yaml:4", "a number");
    refused(HEAD "policy:\n  max_epsilon: 0x10\n", "node.yaml:4", "a number");
    refused(HEAD "policy:\n  max_epsilon: 51\n", "node.yaml:4", "from 0.1 to 50");
    refused(HEAD "policy:\n  max_epsilon: \"3\"\n", "node.yaml:4", "quoted text");
    refused(HEAD "policy:\n  min_cohort: 2\n", "node.yaml:4", "from 3 to 1000");
    refused(HEAD "policy:\n  min_cohort: 5.0\n", "node.yaml:4", "a whole number");
    refused(HEAD "policy:\n  min_cohort: 99999999999999999999\n", "node.yaml:4", "a whole number");
    refused(HEAD "policy:\n  min_cohort:\n", "node.yaml:4", "a whole number");
    refused(HEAD "policy:\n  require_secagg: yes\n", "node.yaml:4", "true or false");
    refused(HEAD "policy:\n  windows: all\n", "node.yaml:4", "a list of strings");
    refused(HEAD "policy:\n  windows: [[a]]\n", "node.yaml:4", "plain strings");
    refused(HEAD "policy:\n  grace: 30\n", "node.yaml:4", "a duration such as 30s");
    refused(HEAD "policy:\n  grace: 2h\n", "node.yaml:4", "from 1s to 3600s");
    refused(HEAD "policy: 3\n", "node.yaml:3", "mapping");
    refused(HEAD "serve:\n  mode: lokal\n", "node.yaml:4", "one of off|local|any");
    refused(HEAD "serve:\n  mode: off|local\n", "node.yaml:4", "one of");
    refused(HEAD "site: b\n", "node.yaml:3: key site", "twice");
    refused(HEAD "serve: {mode: any}\nserve: {mode: off}\n", "node.yaml:4: key serve", "twice");
    refused("version: 1\nsite: &x a\n", "node.yaml:2", "anchor");
    refused("version: 1\nsite: !!str a\n", "node.yaml:2", "tag");
    refused(HEAD "state: *x\n", "node.yaml:3", "alias");
    refused(HEAD "---\nsite: b\n", "node.yaml:3", "second document");
    refused("- a\n", "node.yaml:1", "mapping");
    refused("hello", "node.yaml:1", "mapping");
    refused("", "node.yaml:1", "version");
    refused(HEAD "data: {path: \"a\\0b\"}\n", "node.yaml:3", "expected a path");
    refused(HEAD "data: [\n", "node.yaml:", "node.yaml");
    refused(HEAD "data:\n  path:\n    deep: 1\n", "node.yaml:5", "expected a path");
}

static void test_size_cap(void **state)
{
    (void)state;
    char *big = malloc(CONFIG_BYTES_MAX + 2);
    memset(big, '#', CONFIG_BYTES_MAX + 1);
    big[CONFIG_BYTES_MAX + 1] = 0;
    refused(big, "node.yaml", "at most");
    free(big);
}

static void test_override_order(void **state)
{
    char folder[] = "/tmp/test-config-XXXXXX", path[64];
    struct config *c = NULL;
    struct error err = {0};
    (void)state;
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/node.yaml", folder);
    FILE *file = fopen(path, "w");
    fputs("version: 1\nsite: file\npolicy:\n  min_cohort: 6\n  max_epsilon: 2\n", file);
    fclose(file);
    setenv("CONSILIUM_POLICY_MIN_COHORT", "7", 1);
    setenv("CONSILIUM_POLICY_MAX_EPSILON", "4", 1);
    assert_int_equal(config_load(&c, &schema, path, &err), 0);
    assert_int_equal(config_override(c, "policy.max_epsilon", "8", "--epsilon", &err), 0);
    assert_int_equal(config_override(c, "policy.windows", "x, y", "--windows", &err), 0);
    assert_int_equal(config_override(c, "policy.min_cohort", "1", "--cohort", &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "--cohort: key policy.min_cohort"));
    assert_int_equal(config_override(c, "polici.min_cohort", "9", "--set", &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "did you mean policy.min_cohort?"));
    assert_int_equal(config_finish(c, &err), 0);
    assert_int_equal(config_int(c, "policy.min_cohort"), 7);
    assert_string_equal(config_origin(c, "policy.min_cohort"), "CONSILIUM_POLICY_MIN_COHORT");
    assert_true(config_float(c, "policy.max_epsilon") == 8);
    assert_string_equal(config_list_item(c, "policy.windows", 1), "y");
    config_free(c);
    setenv("CONSILIUM_POLICY_MIN_COHORT", "many", 1);
    assert_int_equal(config_load(&c, &schema, path, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "CONSILIUM_POLICY_MIN_COHORT: key policy.min_cohort"));
    unsetenv("CONSILIUM_POLICY_MIN_COHORT");
    unsetenv("CONSILIUM_POLICY_MAX_EPSILON");
    unlink(path);
    assert_int_equal(config_load(&c, &schema, path, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, path));
    rmdir(folder);
}

static void test_example(void **state)
{
    struct buffer out;
    struct config *c = NULL;
    struct error err = {0};
    (void)state;
    buffer_init(&out, 1 << 20);
    config_write_example(&schema, &out);
    assert_true(buffer_ok(&out));
    if (config_parse(&c, &schema, buffer_span(&out), "example", NULL, &err) < 0 || config_finish(c, &err) < 0)
        fail_msg("%s\n%.*s", err.message, (int)out.len, (const char *)out.data);
    assert_string_equal(config_string(c, "site"), "clinic-a");
    assert_int_equal(config_list_count(c, "policy.windows"), 2);
    assert_string_equal(config_list_item(c, "policy.windows", 0), "mon-fri 20:00-06:00");
    assert_false(config_is_set(c, "data.path"));
    assert_string_equal(config_origin(c, "data.chunk") + 0, config_origin(c, "data.chunk"));
    config_free(c);
    buffer_release(&out);
}

static void test_text(void **state)
{
    int64_t v;
    char out[TEXT_SIZE];
    static const char *const names[] = {"status", "start", "stop"};
    (void)state;
    assert_int_equal(text_parse_duration_ms("250ms", &v), 0);
    assert_int_equal(v, 250);
    assert_int_equal(text_parse_duration_ms("-1s", &v), ERR_CONFIG);
    assert_int_equal(text_parse_duration_ms("999999999999999999d", &v), ERR_CONFIG);
    assert_int_equal(text_parse_bytes("2GB", &v), 0);
    assert_int_equal(v, 2000000000);
    text_format_bytes(12400000, out);
    assert_string_equal(out, "12.4 MB");
    text_format_duration(192000, out);
    assert_string_equal(out, "03:12");
    assert_int_equal(text_distance("kitten", "sitting"), 3);
    assert_int_equal(text_distance("abcd", "abdc"), 1);
    assert_string_equal(text_nearest("statsu", names, 3), "status");
    assert_null(text_nearest("zzz", names, 3));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_values),   cmocka_unit_test(test_refusals),
                                       cmocka_unit_test(test_size_cap), cmocka_unit_test(test_override_order),
                                       cmocka_unit_test(test_example),  cmocka_unit_test(test_text)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
