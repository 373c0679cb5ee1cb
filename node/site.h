/*
 * What a site has at hand to compute with: base model, tokenizer, kernels and threads, opened from node.yaml.
 *
 * Immutable after site_open but for the pool, which one thread uses at a time: the training thread's; answering has its
 * own. The base file's SHA-256 is computed at opening: jobs name their base model by it.
 */
#ifndef NODE_SITE_H
#define NODE_SITE_H

#include "crypto/hash.h"
#include "model/formats/dataset.h"
#include "model/formats/gguf.h"
#include "model/model.h"
#include "runtime/config.h"

struct site {
    const struct config *config; /* borrowed */
    struct gguf *gguf;
    struct model model;
    struct tokenizer *tokenizer;
    uint8_t base_hash[HASH_SIZE];
    const struct kernel_ops *ops;
    enum kernel_precision precision;
    int threads;
    struct pool *pool;
};

/* ERR_CONFIG, ERR_INTEGRITY (the file is malformed; names the field), ERR_RESOURCES. */
int MUST_USE site_open(struct site *ret_site, const struct config *config, struct error *err);
void site_release(struct site *site); /* accepts NULL and zeroed */

/* Reads a JSONL file with this site's tokenizer; says on stderr how many lines were not used, and why. system_message:
 * "default", "none", or the text itself (a job's train.system). */
int MUST_USE site_dataset(const struct site *site, const char *path, const char *system_message, int32_t tokens_max,
                          struct dataset **ret_dataset, struct error *err);

/* The chat options that a job's system_message stands for. text is borrowed. */
struct chat_options site_chat_options(const char *system_message);

#endif
