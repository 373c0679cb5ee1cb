/*
 * The commented examples in configs/ are what the schemas say, and they parse. After a change of a schema:
 *     build/dev/tests/test_aggregator_configs --update
 */
#include "aggregator/rounds/job_file.h"
#include "aggregator/settings.h"
#include "base/file.h"
#include "node/settings.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static const struct config_schema *const schemas[] = {&node_schema, &aggregator_schema, &job_schema};

static void path_of(const struct config_schema *schema, char out[256])
{
    snprintf(out, 256, "configs/%s", schema->name);
}

static int update(void)
{
    for (size_t i = 0; i < ARRAY_LEN(schemas); i++) {
        struct error err = {0};
        struct buffer text;
        char path[256];
        path_of(schemas[i], path);
        buffer_init(&text, CONFIG_BYTES_MAX);
        config_write_example(schemas[i], &text);
        if (file_write_atomic(path, buffer_span(&text), 0644, &err) < 0) {
            fprintf(stderr, "%s\n", err.message);
            return 1;
        }
        buffer_release(&text);
    }
    return 0;
}

static void examples_are_what_the_schemas_say(void **state)
{
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(schemas); i++) {
        struct error err = {0};
        struct buffer expected, found;
        char path[256];
        path_of(schemas[i], path);
        buffer_init(&expected, CONFIG_BYTES_MAX);
        buffer_init(&found, CONFIG_BYTES_MAX);
        config_write_example(schemas[i], &expected);
        if (file_read(path, &found, &err) < 0)
            fail_msg("%s", err.message);
        if (!span_equal(buffer_span(&expected), buffer_span(&found)))
            fail_msg("%s is not what its schema says: run this test with --update", path);
        buffer_release(&expected);
        buffer_release(&found);
    }
}

static void examples_parse(void **state)
{
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(schemas); i++) {
        struct error err = {0};
        struct config *config;
        char path[256];
        path_of(schemas[i], path);
        if (config_load(&config, schemas[i], path, &err) < 0 || config_finish(config, &err) < 0)
            fail_msg("%s", err.message);
        config_free(config);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(examples_are_what_the_schemas_say),
                                       cmocka_unit_test(examples_parse)};
    if (argc == 2 && strcmp(argv[1], "--update") == 0)
        return update();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
