/*
 * What a site has at hand to compute with: base model, tokenizer, kernels and threads, opened from node.yaml.
 *
 * Immutable after site_open but for the pool and the backend, which are the training thread's; answering has its own.
 * The base model's hash (base_hash.h) is computed at opening: jobs name their base model by it.
 */
#ifndef NODE_SITE_H
#define NODE_SITE_H

#include "crypto/hash.h"
#include "kernels/backend.h"
#include "model/formats/dataset.h"
#include "model/formats/model_file.h"
#include "model/model.h"
#include "runtime/config.h"

struct site {
    const struct config *config; /* borrowed */
    struct model_file *file;
    struct model model; /* borrows from file */
    struct tokenizer *tokenizer;
    uint8_t base_hash[HASH_SIZE];
    const struct kernel_ops *ops; /* of the CPU */
    enum kernel_precision precision;
    int threads;
    struct pool *pool;
    bool cuda; /* device.kind was resolved to a card: */
    int cuda_ordinal;
    bool automatic;          /* device.kind is auto: what does not fit the card is computed on the CPU */
    struct backend *backend; /* the training thread's */
    struct error why_cpu;    /* why auto took the CPU for it in a build with CUDA; code 0: it did not */
};

/* device.kind auto takes the first card if there is one that this model can be used on, and otherwise the CPU, with the
 * reason in why_cpu and in the log: a warning; where there is no driver or no card at all, for information; in a build
 * without CUDA, at level debug alone. cuda:N must be there (ERR_CONFIG with the reason otherwise). ERR_CONFIG,
 * ERR_INTEGRITY (a file is malformed; names the field), ERR_RESOURCES. */
int MUST_USE site_open(struct site *ret_site, const struct config *config, struct error *err);
void site_release(struct site *site); /* accepts NULL and zeroed */

/* Another backend on the same device, or on the CPU, for another thread; pool: its CPU threads, borrowed. Free before
 * the site. */
int MUST_USE site_backend_new(const struct site *site, struct pool *pool, struct backend **ret_backend,
                              struct error *err);
int MUST_USE site_cpu_backend_new(const struct site *site, struct pool *pool, struct backend **ret_backend,
                                  struct error *err);

/*
 * The weights are held against the card when the site is opened; what answering, a job or an evaluation take beyond
 * them is known when they take it. Each of them asks this about the failure of taking it from `backend` (NULL: of
 * opening it): true, with `what` ("training") and the reason in the log, if it is to be taken from the CPU instead,
 * because device.kind is auto and the card's memory did not do. why: of the failure, not NULL.
 */
bool site_falls_back(const struct site *site, const struct backend *backend, const char *what, const struct error *why);
/* The same for the site's own backend, which becomes one on the CPU and stays that. All that was taken from it must
 * have been released. False: the failure stands, and *err says it or why the CPU will not do either.
 *
 *     do {
 *         options.backend = site->backend;
 *         options.tokens_max = site_batch_tokens(site);
 *         rc = trainer_new(&options, ...);
 *     } while (rc < 0 && site_turn_to_cpu(site, "training", err));
 */
bool site_turn_to_cpu(struct site *site, const char *what, struct error *err);

/* Rows of a micro-batch on the site's own backend: device.batch_tokens, or what suits the device. */
int32_t site_batch_tokens(const struct site *site);

/* Reads a JSONL file with this site's tokenizer; says on stderr how many lines were not used, and why. system_message:
 * "default", "none", or the text itself (a job's train.system). */
int MUST_USE site_dataset(const struct site *site, const char *path, const char *system_message, int32_t tokens_max,
                          struct dataset **ret_dataset, struct error *err);

/* The chat options that a job's system_message stands for. text is borrowed. */
struct chat_options site_chat_options(const char *system_message);

#endif
