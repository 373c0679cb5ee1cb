#include "node/jobs/version.h"

#include "base/checked.h"
#include "base/file.h"
#include "node/settings.h"
#include "node/train/adapter_config.h"
#include "protocol/session.h"

static const char magic[] = "consilium adapter 1\n";
enum { MAGIC_BYTES = sizeof magic - 1 };
#define FILE_LABEL "consilium/adapter-file/v1"
#define WORDS_MAX ((uint64_t)1 << 28)

void version_release(struct version *v)
{
    if (!v)
        return;
    free(v->params);
    free(v->momentum);
    *v = (struct version){0};
}

static void compute_hashes(struct version *v)
{
    struct model_basis basis = {.lora_config = span_of(v->lora_text, v->lora_text_len)};

    memcpy(basis.base_hash, v->base_hash, HASH_SIZE);
    session_frozen_hash(basis.lora_config, basis.frozen_hash);
    model_state_hash(&basis, (struct model_state){v->params, v->momentum, v->words}, v->model_hash);
    hash_bytes(span_of(v->params, v->words * sizeof *v->params), v->adapter_sha256);
}

static int take_memory(struct version *v, size_t words, struct error *err)
{
    v->params = calloc(words ? words : 1, sizeof *v->params);
    v->momentum = calloc(words ? words : 1, sizeof *v->momentum);
    v->words = words;
    if (!v->params || !v->momentum) {
        version_release(v);
        return error_set(err, ERR_RESOURCES, "out of memory for an adapter of %zu parameters", words);
    }
    return 0;
}

static int begin(struct version *v, const struct job_plan *plan, size_t words, struct error *err)
{
    *v = (struct version){0};
    memcpy(v->base_hash, plan->base_hash, HASH_SIZE);
    memcpy(v->lora_text, plan->lora, plan->lora_len);
    v->lora_text_len = plan->lora_len;
    memcpy(v->options, plan->train.options, sizeof v->options);
    return take_memory(v, words, err);
}

int version_first(struct version *ret_v, const struct job_plan *plan, size_t words, struct error *err)
{
    struct version v;
    int rc = begin(&v, plan, words, err);

    if (rc < 0)
        return rc;
    snprintf(v.statement.job, sizeof v.statement.job, "%s", plan->job);
    compute_hashes(&v);
    *ret_v = v;
    return 0;
}

int version_from_state(struct version *ret_v, const struct job_plan *plan, const struct cosign_statement *statement,
                       const float *state, size_t words, struct error *err)
{
    struct version v;
    int rc = begin(&v, plan, words, err);

    if (rc < 0)
        return rc;
    v.statement = *statement;
    memcpy(v.params, state, words * sizeof *state);
    memcpy(v.momentum, state + words, words * sizeof *state);
    compute_hashes(&v);
    if (memcmp(v.model_hash, statement->next_hash, HASH_SIZE) != 0) {
        version_release(&v);
        return error_set(err, ERR_INTEGRITY,
                         "job %s round %u: the adapter's bytes do not have the hash that was signed", statement->job,
                         statement->round);
    }
    *ret_v = v;
    return 0;
}

void version_path(const struct config *config, const char *job, uint32_t round, char *out)
{
    char name[SITE_ID_SIZE + 64];

    snprintf(name, sizeof name, "adapters/%s/%06u.adapter", job, round);
    node_path(config, name, out);
}

int version_store(const struct version *v, const struct vault *vault, struct span proof, struct error *err)
{
    char path[NODE_PATH_SIZE], folder[NODE_PATH_SIZE];
    uint8_t signature[SIGN_SIZE];
    struct span content;
    struct buffer b;
    int rc;

    buffer_init(&b, 2 * v->words * sizeof(float) + COSIGN_PROOF_MAX + (64 << 10));
    buffer_append(&b, magic, MAGIC_BYTES);
    buffer_bytes(&b, span_of(v->lora_text, v->lora_text_len));
    buffer_string(&b, v->options);
    buffer_append(&b, v->base_hash, HASH_SIZE);
    cosign_statement_encode(&v->statement, &b);
    buffer_bytes(&b, proof);
    buffer_u64(&b, v->words);
    buffer_append(&b, v->params, v->words * sizeof(float));
    buffer_append(&b, v->momentum, v->words * sizeof(float));
    content = buffer_span(&b);
    sign_parts(identity_sign_key(vault->key), FILE_LABEL, &content, 1, signature);
    buffer_append(&b, signature, sizeof signature);
    version_path(vault->config, v->statement.job, v->statement.round, path);
    snprintf(folder, sizeof folder, "%s", path);
    *strrchr(folder, '/') = 0;
    if (!buffer_ok(&b))
        rc = error_set(err, ERR_RESOURCES, "out of memory for %s", path);
    else if ((rc = file_make_folder(folder, 0700, err)) == 0)
        rc = file_write_atomic(path, buffer_span(&b), 0600, err);
    buffer_release(&b);
    return rc;
}

static int decode(struct version *v, struct span bytes, const struct vault *vault, const char *path, struct error *err)
{
    struct span content = span_of(bytes.ptr, bytes.len > SIGN_SIZE ? bytes.len - SIGN_SIZE : 0);
    struct reader r = reader_of(content);
    struct span lora, options, params, momentum;
    uint64_t words;
    int rc;

    if (!span_equal(reader_take(&r, MAGIC_BYTES), span_of(magic, MAGIC_BYTES)))
        return error_set(err, ERR_INTEGRITY, "%s: not an adapter version of consilium", path);
    if (sign_verify(identity_public(vault->key), FILE_LABEL, &content, 1, bytes.ptr + content.len) < 0)
        return error_set(err, ERR_INTEGRITY, "%s: the signature does not fit: the file was changed", path);
    lora = reader_bytes(&r, PLAN_LORA_MAX);
    options = reader_bytes(&r, PLAN_TEXT_MAX - 1);
    reader_copy(&r, v->base_hash, HASH_SIZE);
    cosign_statement_decode(&r, &v->statement);
    v->proven = reader_bytes(&r, COSIGN_PROOF_MAX).len > 0;
    words = reader_u64(&r);
    if (r.failed || words > WORDS_MAX)
        return error_set(err, ERR_INTEGRITY, "%s: malformed header", path);
    params = reader_take(&r, (size_t)words * sizeof(float));
    momentum = reader_take(&r, (size_t)words * sizeof(float));
    if (!reader_done(&r))
        return error_set(err, ERR_INTEGRITY, "%s: %zu bytes do not hold %llu parameters", path, bytes.len,
                         (unsigned long long)words);
    if ((rc = take_memory(v, (size_t)words, err)) < 0)
        return rc;
    memcpy(v->lora_text, lora.ptr, lora.len);
    v->lora_text_len = lora.len;
    memcpy(v->options, options.ptr, options.len);
    memcpy(v->params, params.ptr, params.len);
    memcpy(v->momentum, momentum.ptr, momentum.len);
    compute_hashes(v);
    if (memcmp(v->model_hash, v->statement.next_hash, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "%s: the content does not have the hash that was signed", path);
    return 0;
}

int version_load(struct version *ret_v, const struct vault *vault, const char *job, uint32_t round, struct error *err)
{
    struct version v = {0};
    char path[NODE_PATH_SIZE];
    struct span map;
    int rc;

    version_path(vault->config, job, round, path);
    if ((rc = file_map(path, &map, err)) < 0)
        return rc;
    rc = decode(&v, map, vault, path, err);
    file_unmap(map);
    if (rc == 0 && (strcmp(v.statement.job, job) != 0 || v.statement.round != round))
        rc = error_set(err, ERR_INTEGRITY, "%s: holds job %s round %u instead", path, v.statement.job,
                       v.statement.round);
    if (rc < 0) {
        version_release(&v);
        return rc;
    }
    *ret_v = v;
    return 0;
}

int version_adapter(const struct version *v, const uint8_t base_hash[HASH_SIZE], const struct model_config *model,
                    struct lora *ret_lora, struct error *err)
{
    struct adapter_config config;
    int rc;

    if (memcmp(v->base_hash, base_hash, HASH_SIZE) != 0)
        return error_set(err, ERR_CONFIG, "adapter %s version %u is for another base model than model.path",
                         v->statement.job, v->statement.round);
    if ((rc = adapter_config_parse(span_of(v->lora_text, v->lora_text_len), &config, err)) == 0)
        rc = adapter_config_load(&config, model, v->params, v->words, ret_lora, err);
    return rc < 0 ? error_prefix(err, "job %s version %u", v->statement.job, v->statement.round) : 0;
}
