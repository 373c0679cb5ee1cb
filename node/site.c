#include "node/site.h"

#include "base/file.h"
#include "base/log.h"

static const struct log_context log_site = {.component = "site"};

static int choose_kernels(struct site *site, const struct config *config, struct error *err)
{
    const char *name = config_string(config, "device.instructions");
    enum kernel_isa isa = KERNEL_AVX512_BF16;

    if (strcmp(name, "auto") != 0 && !kernel_isa_parse(name, &isa))
        return config_fail(config, "device.instructions", err, "unknown instruction set %s", name);
    site->ops = kernels_cpu(isa);
    if (strcmp(name, "auto") != 0 && site->ops->isa != isa)
        return config_fail(config, "device.instructions", err, "this CPU has %s at best, not %s", site->ops->name,
                           name);
    site->precision = strcmp(config_string(config, "device.precision"), "bf16") == 0 ? KERNEL_BF16 : KERNEL_F32;
    site->threads = (int)config_int(config, "device.threads");
    return pool_new(site->threads, &site->pool, err);
}

int site_open(struct site *ret_site, const struct config *config, struct error *err)
{
    struct site site = {.config = config};
    const char *path = config_path(config, "model.path");
    int rc;

    if (!file_exists(path))
        return config_fail(config, "model.path", err, "%s does not exist", path);
    if ((rc = gguf_open(path, &site.gguf, err)) == 0 && (rc = gguf_load_model(site.gguf, &site.model, err)) == 0 &&
        (rc = tokenizer_new(site.gguf, &site.tokenizer, err)) == 0 && (rc = chat_check(site.tokenizer, err)) == 0)
        rc = choose_kernels(&site, config, err);
    if (rc < 0) {
        site_release(&site);
        return rc;
    }
    hash_bytes(gguf_bytes(site.gguf), site.base_hash);
    *ret_site = site;
    return 0;
}

void site_release(struct site *site)
{
    if (!site)
        return;
    pool_free(site->pool);
    tokenizer_free(site->tokenizer);
    gguf_close(site->gguf);
    *site = (struct site){0};
}

struct chat_options site_chat_options(const char *system_message)
{
    if (strcmp(system_message, "none") == 0)
        return (struct chat_options){.system = CHAT_SYSTEM_NONE};
    if (strcmp(system_message, "default") == 0)
        return (struct chat_options){.system = CHAT_SYSTEM_DEFAULT};
    return (struct chat_options){.system = CHAT_SYSTEM_TEXT, .system_text = span_str(system_message)};
}

int site_dataset(const struct site *site, const char *path, const char *system_message, int32_t tokens_max,
                 struct dataset **ret_dataset, struct error *err)
{
    struct dataset_options options = {
        .tokenizer = site->tokenizer, .chat = site_chat_options(system_message), .tokens_max = tokens_max};
    char faults[400];
    int rc = dataset_load(path, &options, ret_dataset, err);

    if (rc < 0)
        return rc;
    dataset_describe_faults(dataset_report(*ret_dataset), faults, sizeof faults);
    if (faults[0])
        log_warn(&log_site, "%s: %s", path, faults);
    return 0;
}
