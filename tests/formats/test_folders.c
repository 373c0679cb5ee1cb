/* Folders that transformers and PEFT wrote (tests/golden/make_folders.py): opened, and computed with, they give the
 * same logits; the adapter imported from PEFT likewise, and after a way through the GGUF form. */
#include "tests/formats/fixtures.h"

#include "base/file.h"
#include "kernels/backend.h"
#include "model/formats/adapter.h"
#include "model/formats/model_file.h"
#include "model/infer.h"

#include <math.h>

#define TOLERANCE 1e-4 /* of the largest logit */

static struct pool *pool;
static struct backend *backend;

/* The logits after each of the ids, against a table of the golden file. */
static void compare(const struct model *model, const struct lora *lora, const json_t *ids, const json_t *table,
                    const char *what)
{
    const struct infer_options options = {
        .backend = backend, .rows_max = 8, .context_max = (int32_t)json_array_size(ids), .rank_max = 3};
    const int32_t count = (int32_t)json_array_size(ids), vocabulary = model->config.vocabulary;
    float *logits = malloc(sizeof *logits * (size_t)vocabulary);
    double worst = 0, largest = 0;
    struct infer *infer = NULL;
    struct kv_cache *cache = NULL;
    struct error err = {0};
    if (infer_new(&options, model, &infer, &err) < 0 || kv_cache_new(backend, model, count, &cache, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(json_array_size(table), count);
    for (int32_t i = 0; i < count; i++) {
        const int32_t id = (int32_t)json_integer_value(json_array_get(ids, (size_t)i));
        const json_t *row = json_array_get(table, (size_t)i);
        if (infer_extend(infer, lora, &(struct infer_extend){cache, &id, 1}, 1, &err) < 0 ||
            infer_logits(infer, cache, logits, &err) < 0)
            fail_msg("%s", err.message);
        assert_int_equal(json_array_size(row), vocabulary);
        for (int32_t v = 0; v < vocabulary; v++) {
            const double expected = json_number_value(json_array_get(row, (size_t)v));
            const double distance = fabs((double)logits[v] - expected);
            worst = distance > worst || isnan(distance) ? distance : worst;
            largest = fabs(expected) > largest ? fabs(expected) : largest;
        }
    }
    if (!(worst <= TOLERANCE * largest))
        fail_msg("%s: logits differ by up to %g (the largest is %g)", what, worst, largest);
    printf("%s: %.2g of the largest logit\n", what, worst / largest);
    kv_cache_free(cache);
    infer_free(infer);
    free(logits);
}

/* The adapter written as GGUF and read back. */
static void through_gguf(struct lora *lora, const struct model_config *config)
{
    struct buffer bytes;
    struct error err = {0};
    buffer_init(&bytes, 1 << 20);
    if (adapter_encode_gguf(lora, config, &bytes, &err) < 0)
        fail_msg("%s", err.message);
    lora_release(lora);
    if (adapter_decode_gguf(buffer_span(&bytes), "a.gguf", config, LORA_JOINT, lora, &err) < 0)
        fail_msg("%s", err.message);
    buffer_release(&bytes);
}

static void check_folder(const char *name)
{
    char path[64], what[80];
    struct model_file *file = NULL;
    struct lora lora = {0};
    struct error err = {0};
    json_error_t problem;
    snprintf(path, sizeof path, "tests/golden/folders/%s/expected.json", name);
    json_t *expected = json_load_file(path, 0, &problem);
    if (!expected)
        fail_msg("%s: %s", path, problem.text);
    snprintf(path, sizeof path, "tests/golden/folders/%s", name);
    if (model_file_open(path, &file, &err) < 0)
        fail_msg("%s", err.message);
    const struct model *model = model_file_model(file);
    const json_t *ids = json_object_get(expected, "ids");
    assert_string_equal(model_architecture_name(model->config.architecture), name);
    compare(model, NULL, ids, json_object_get(expected, "base"), name);
    snprintf(path, sizeof path, "tests/golden/folders/%s/adapter", name);
    if (adapter_import(path, &model->config, LORA_JOINT, &lora, &err) < 0)
        fail_msg("%s", err.message);
    snprintf(what, sizeof what, "%s with the adapter", name);
    compare(model, &lora, ids, json_object_get(expected, "adapted"), what);
    through_gguf(&lora, &model->config);
    snprintf(what, sizeof what, "%s with the adapter as GGUF", name);
    compare(model, &lora, ids, json_object_get(expected, "adapted"), what);
    lora_release(&lora);
    model_file_close(file);
    json_decref(expected);
}

static void test_folders(void **state)
{
    (void)state;
    for (int a = MODEL_LLAMA; a <= MODEL_GLM4; a++)
        check_folder(model_architecture_name((enum model_architecture)a));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_folders)};
    struct error err = {0};
    if (pool_new(1, &pool, &err) < 0 ||
        backend_cpu_new(kernels_cpu(KERNEL_AVX512_BF16), pool, KERNEL_F32, &backend, &err) < 0) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    backend_free(backend);
    pool_free(pool);
    return rc;
}
