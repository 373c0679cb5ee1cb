#include "node/site.h"

#include "base/file.h"
#include "base/log.h"
#include "model/placed.h"
#include "node/base_hash.h"

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

static int cuda_backend(const struct site *site, int ordinal, struct backend **ret_backend, struct error *err)
{
    const struct backend_cuda_options options = {
        .device = ordinal,
        .precision = site->precision,
        .memory_limit_bytes = (size_t)config_int(site->config, "device.memory_limit_mb") << 20,
        .quantise_kv = config_bool(site->config, "device.quantise_kv"),
        .tune = true,
    };
    return backend_cuda_new(&options, ret_backend, err);
}

/* auto, cpu, cuda or cuda:N. */
static int parse_kind(const struct config *config, bool *ret_cuda, bool *ret_required, int *ret_ordinal,
                      struct error *err)
{
    const char *kind = config_string(config, "device.kind");
    char *end = NULL;

    *ret_ordinal = 0;
    *ret_cuda = strcmp(kind, "cpu") != 0;
    *ret_required = *ret_cuda && strcmp(kind, "auto") != 0;
    if (!*ret_required || strcmp(kind, "cuda") == 0)
        return 0;
    long ordinal = strncmp(kind, "cuda:", 5) == 0 && kind[5] >= '0' && kind[5] <= '9' ? strtol(kind + 5, &end, 10) : -1;
    if (ordinal < 0 || ordinal > 255 || *end)
        return config_fail(config, "device.kind", err, "%s: expected auto, cpu, cuda or cuda:N (N a device number)",
                           kind);
    *ret_ordinal = (int)ordinal;
    return 0;
}

/* The card, with the model's shapes and size checked against it. */
static int try_card(struct site *site, struct error *err)
{
    int rc = cuda_backend(site, site->cuda_ordinal, &site->backend, err);
    if (rc == 0 && (rc = placed_model_check(site->backend, &site->model, err)) < 0) {
        backend_free(site->backend);
        site->backend = NULL;
    }
    return rc;
}

static void warn_of_cpu(const char *what, const struct error *why)
{
    log_warn(&log_site, "%s on the CPU, not on the card: %s", what, why->message);
}

static int open_device(struct site *site, const struct config *config, struct error *err)
{
    bool cuda, required;
    struct error why = {0};
    int rc = parse_kind(config, &cuda, &required, &site->cuda_ordinal, err);

    if (rc < 0)
        return rc;
    site->automatic = cuda && !required;
    if (cuda && try_card(site, &why) == 0) {
        site->cuda = true;
        log_info(&log_site, "computing on %s", site->backend->name);
        return 0;
    }
    if (required)
        return config_fail(config, "device.kind", err, "%s", why.message);
    if (cuda && !backend_cuda_built()) {
        log_debug(&log_site, "computing on the CPU: %s", why.message);
    } else if (cuda) {
        site->why_cpu = why;
        if (why.code == ERR_NOT_FOUND) /* whoever built with CUDA expects a card, but need not have one */
            log_info(&log_site, "computing on the CPU: %s", why.message);
        else
            warn_of_cpu("computing", &why);
    }
    return site_cpu_backend_new(site, site->pool, &site->backend, err);
}

int site_backend_new(const struct site *site, struct pool *pool, struct backend **ret_backend, struct error *err)
{
    if (site->cuda)
        return cuda_backend(site, site->cuda_ordinal, ret_backend, err);
    return site_cpu_backend_new(site, pool, ret_backend, err);
}

int site_cpu_backend_new(const struct site *site, struct pool *pool, struct backend **ret_backend, struct error *err)
{
    return backend_cpu_new(site->ops, pool, site->precision, ret_backend, err);
}

/* Whoever takes memory is asked, rather than guessed at when the site is opened: how much a job takes is in its plan,
 * the rest depends on the work memory of each kernel and on who else is on the card, and placing everything once only
 * to try would double the time of every start. */
bool site_falls_back(const struct site *site, const struct backend *backend, const char *what, const struct error *why)
{
    if (!site->automatic || !site->cuda || (backend && backend->host_memory) || why->code != ERR_RESOURCES)
        return false;
    warn_of_cpu(what, why);
    return true;
}

bool site_turn_to_cpu(struct site *site, const char *what, struct error *err)
{
    struct backend *cpu = NULL;

    if (!site_falls_back(site, site->backend, what, err) || site_cpu_backend_new(site, site->pool, &cpu, err) < 0)
        return false;
    backend_free(site->backend);
    site->backend = cpu;
    site->why_cpu = *err;
    return true;
}

int32_t site_batch_tokens(const struct site *site)
{
    const int64_t tokens = config_int(site->config, "device.batch_tokens");
    return tokens > 0 ? (int32_t)tokens : site->backend->host_memory ? 512 : 16384;
}

int site_open(struct site *ret_site, const struct config *config, struct error *err)
{
    struct site site = {.config = config};
    const char *path = config_path(config, "model.path");
    int rc;

    if (!file_exists(path))
        return config_fail(config, "model.path", err, "%s does not exist", path);
    if ((rc = model_file_open(path, &site.file, err)) == 0 &&
        (rc = model_file_tokenizer(site.file, &site.tokenizer, err)) == 0 &&
        (rc = chat_check(site.tokenizer, err)) == 0) {
        site.model = *model_file_model(site.file);
        rc = choose_kernels(&site, config, err);
    }
    if (rc == 0)
        rc = open_device(&site, config, err);
    if (rc < 0) {
        site_release(&site);
        return rc;
    }
    base_hash(site.file, site.base_hash);
    *ret_site = site;
    return 0;
}

void site_release(struct site *site)
{
    if (!site)
        return;
    backend_free(site->backend);
    pool_free(site->pool);
    tokenizer_free(site->tokenizer);
    model_file_close(site->file);
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
