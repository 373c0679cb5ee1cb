/* The base model of a site: a Hugging Face folder opens as a GGUF file does; what jobs name it by. */
#include "tests/formats/models.h"
#include "tests/node/tiny_site.h"

#include "base/file.h"
#include "node/base_hash.h"
#include "tests/formats/fixtures.h"

#include <unistd.h>

static char folder[32];

static void put(const char *name, const void *bytes, size_t len)
{
    char path[128];
    struct error err = {0};
    file_join(path, sizeof path, folder, name);
    if (file_write_atomic(path, span_of(bytes, len), 0600, &err) < 0)
        fail_msg("%s", err.message);
}

/* The small vocabulary; returns how many tokens it has. */
static int put_tokenizer(void)
{
    json_t *golden = fixture_golden();
    const int count = (int)json_array_size(json_object_get(json_object_get(golden, "small"), "tokens"));
    char *text = fixture_vocabulary_json(golden);
    put("tokenizer.json", text, strlen(text));
    free(text);
    json_decref(golden);
    return count;
}

/* A qwen3 with as many rows in its embedding. */
static void put_model(int rows)
{
    static uint16_t embedding[1024 * MODELS_D];
    struct safetensors_tensor tensors[256];
    struct safetensors *file = NULL;
    struct buffer config, weights, enlarged;
    char edit[64];
    assert_true(rows <= 1024);
    snprintf(edit, sizeof edit, "{\"vocab_size\": %d}", rows);
    models_config(MODEL_QWEN3, &(struct models_flaw){.edit = edit}, &config);
    models_weights(MODEL_QWEN3, &(struct models_flaw){0}, -1, MODELS_LAYERS, &weights);
    assert_int_equal(safetensors_parse(buffer_span(&weights), "w", &file, NULL), 0);
    const size_t count = safetensors_count(file);
    assert_true(count <= ARRAY_LEN(tensors));
    for (size_t i = 0; i < count; i++) {
        tensors[i] = *safetensors_at(file, i);
        if (strcmp(tensors[i].name, "model.embed_tokens.weight") == 0) {
            tensors[i].dims[0] = (uint64_t)rows;
            tensors[i].data = span_of(embedding, (size_t)rows * MODELS_D * sizeof *embedding);
        }
    }
    buffer_init(&enlarged, 1 << 20);
    assert_int_equal(safetensors_write(tensors, count, &enlarged, NULL), 0);
    put("config.json", config.data, config.len);
    put("model.safetensors", enlarged.data, enlarged.len);
    safetensors_close(file);
    buffer_release(&config);
    buffer_release(&weights);
    buffer_release(&enlarged);
}

static int set_up(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/test_base.XXXXXX");
    assert_non_null(mkdtemp(folder));
    put_model(put_tokenizer());
    return 0;
}

static int tear_down(void **state)
{
    static const char *const names[] = {
        "config.json",       "tokenizer.json", "tokenizer_config.json",       "chat_template.jinja",
        "model.safetensors", "README.md",      "model.safetensors.index.json"};
    char path[128];
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        file_join(path, sizeof path, folder, names[i]);
        unlink(path);
    }
    return rmdir(folder);
}

static void hash_of(const char *path, uint8_t out[HASH_SIZE])
{
    struct model_file *file = NULL;
    struct error err = {0};
    if (model_file_open(path, &file, &err) < 0)
        fail_msg("%s", err.message);
    base_hash(file, out);
    model_file_close(file);
}

static void frame(struct hash *h, const void *bytes, uint64_t len)
{
    hash_update(h, span_of(&len, sizeof len));
    hash_update(h, span_of(bytes, len));
}

/* The definition, spelled out with plain SHA-256 only. */
static void expected_hash(const char *const *names, size_t count, uint8_t out[HASH_SIZE])
{
    struct hash h;
    hash_init(&h);
    frame(&h, "consilium/base-folder/v1", 24);
    for (size_t i = 0; i < count; i++) {
        char path[128];
        uint8_t sha256[HASH_SIZE];
        uint64_t size = 0;
        file_join(path, sizeof path, folder, names[i]);
        assert_int_equal(hash_file(path, sha256, &size, NULL), 0);
        frame(&h, names[i], strlen(names[i]));
        frame(&h, &size, sizeof size);
        frame(&h, sha256, sizeof sha256);
    }
    hash_final(&h, out);
}

static void test_hash_of_a_folder(void **state)
{
    static const char *const names[] = {"config.json", "tokenizer.json", "model.safetensors"};
    static const char *const more[] = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"};
    static const char *const all[] = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                      "model.safetensors"};
    uint8_t first[HASH_SIZE], second[HASH_SIZE];
    (void)state;
    hash_of(folder, first);
    expected_hash(names, 3, second);
    assert_memory_equal(first, second, HASH_SIZE);
    put("README.md", "hello", 5);
    put("model.safetensors.index.json", "{", 1);
    hash_of(folder, second);
    assert_memory_equal(first, second, HASH_SIZE);
    put("tokenizer_config.json", "{}", 2);
    hash_of(folder, second);
    assert_memory_not_equal(first, second, HASH_SIZE);
    expected_hash(more, 4, first);
    assert_memory_equal(first, second, HASH_SIZE);
    put("chat_template.jinja", "x", 1);
    hash_of(folder, second);
    expected_hash(all, 5, first);
    assert_memory_equal(first, second, HASH_SIZE);
    put_model(561);
    hash_of(folder, second);
    assert_memory_not_equal(first, second, HASH_SIZE);
}

static void test_hash_of_a_file(void **state)
{
    char path[128];
    uint8_t hash[HASH_SIZE], expected[HASH_SIZE];
    (void)state;
    file_join(path, sizeof path, folder, "README.md"); /* its name does not matter */
    tiny_site_write_model(path, TENSOR_F32);
    hash_of(path, hash);
    assert_int_equal(hash_file(path, expected, NULL, NULL), 0);
    assert_memory_equal(hash, expected, HASH_SIZE);
}

static void test_a_site_opens_a_folder(void **state)
{
    struct tiny_site t;
    struct token_list list = {.max = 64};
    uint8_t hash[HASH_SIZE];
    (void)state;
    tiny_site_open(&t, NULL, folder);
    assert_int_equal(t.site.model.config.architecture, MODEL_QWEN3);
    assert_int_equal(t.site.model.config.vocabulary, tokenizer_vocabulary(t.site.tokenizer));
    hash_of(folder, hash);
    assert_memory_equal(t.site.base_hash, hash, HASH_SIZE);
    assert_int_equal(tokenizer_encode(t.site.tokenizer, span_str("a b"), 0, &list, NULL), 0);
    assert_true(list.count > 0);
    token_list_release(&list);
    tiny_site_release(&t);
}

static void test_ids_lie_within_the_embedding(void **state)
{
    struct model_file *file = NULL;
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    (void)state;
    put_model(559);
    assert_int_equal(model_file_open(folder, &file, &err), 0);
    fixture_refused(model_file_tokenizer(file, &tokenizer, &err), &err, ERR_INTEGRITY,
                    "tokenizer.json has ids up to 559", "the embedding has 559 rows", NULL);
    model_file_close(file);
    put_model(600); /* rows to spare are usual */
    assert_int_equal(model_file_open(folder, &file, &err), 0);
    assert_int_equal(model_file_tokenizer(file, &tokenizer, &err), 0);
    tokenizer_free(tokenizer);
    model_file_close(file);
    put("tokenizer.json", "{}", 2);
    assert_int_equal(model_file_open(folder, &file, &err), 0);
    fixture_refused(model_file_tokenizer(file, &tokenizer, &err), &err, ERR_INTEGRITY, folder + strlen("/tmp/"), NULL);
    model_file_close(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_hash_of_a_folder, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_hash_of_a_file, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_site_opens_a_folder, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_ids_lie_within_the_embedding, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
