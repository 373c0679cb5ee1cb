/*
 * Inference with unmerged LoRA: prefill, decoding, and scoring of given continuations over bounded KV caches.
 *
 * A struct kv_cache is one sequence: its tokens' keys and values, and the last token's final hidden row. It may be cut
 * back, copied (a prompt's shared beginning), extended, and scored any number of times without changing it, which is
 * how ten label texts are compared after one prompt for the price of one prefill. Several caches are extended or scored
 * in one packed pass: a row then costs a fraction of what it costs alone.
 *
 * The LoRA factors are an argument of each call (NULL: the base model), so swapping an adapter is the caller's pointer.
 * Keys and values computed under one adapter are stale under another: clear the cache.
 *
 * Nothing is allocated after infer_new and kv_cache_new. One struct infer and its caches: one thread at a time.
 *
 *     struct infer_extend prompt = {.cache = cache, .ids = ids, .count = n};
 *     if (infer_extend(infer, lora, &prompt, 1, err) < 0) return err->code;
 *     while (token != end && kv_cache_room(cache) > 0) {
 *         if (infer_logits(infer, cache, logits, err) < 0) return err->code;
 *         token = sampler_next(&sampler, logits, &rng);
 *         prompt = (struct infer_extend){cache, &token, 1};
 *         ...
 *     }
 */
#ifndef MODEL_INFER_H
#define MODEL_INFER_H

#include "kernels/backend.h"
#include "model/lora.h"
#include "model/model.h"

struct placed_model;

struct infer_options {
    struct backend *backend;     /* borrowed */
    struct placed_model *placed; /* the model on it; NULL: infer_new places it for itself */
    int32_t rows_max;    /* token rows of one packed pass (longer input is cut into several): 256 is a good value */
    int32_t context_max; /* longest sequence of any cache, ≤ the model's context_length */
    int32_t rank_max;    /* largest LoRA rank of later calls; 0: no LoRA */
    bool answering;      /* tokens will be computed one by one: placed_model_serve, unless `placed` is given */
};

struct infer;
struct kv_cache;

/* The model must outlive it. ERR_CONFIG, ERR_RESOURCES. */
int MUST_USE infer_new(const struct infer_options *options, const struct model *model, struct infer **ret_infer,
                       struct error *err);
void infer_free(struct infer *infer); /* accepts NULL */

/* A sequence for use with infer objects of the same backend. On the CPU 8·layer_count·kv_heads·head_size bytes per
 * token. ERR_RESOURCES. */
int MUST_USE kv_cache_new(struct backend *backend, const struct model *model, int32_t length_max,
                          struct kv_cache **ret_cache, struct error *err);
void kv_cache_free(struct kv_cache *cache); /* accepts NULL */
int32_t kv_cache_length(const struct kv_cache *cache);
int32_t kv_cache_room(const struct kv_cache *cache);
const int32_t *kv_cache_ids(const struct kv_cache *cache); /* (length) */
/* Keeps the first `length` tokens. A cut cache must be extended before infer_logits and infer_score. */
void kv_cache_truncate(struct kv_cache *cache, int32_t length);
/* How many of ids' first tokens the cache begins with, at most count − 1: the token after which a prompt is continued
 * is always computed anew. */
int32_t kv_cache_common(const struct kv_cache *cache, const int32_t *ids, int32_t count);
/* to becomes the first `length` tokens of from; asserts that they fit. */
void kv_cache_copy(struct kv_cache *to, const struct kv_cache *from, int32_t length);

/* Tokens to append to a cache. */
struct infer_extend {
    struct kv_cache *cache; /* each cache at most once in a call */
    const int32_t *ids;     /* (count) */
    int32_t count;          /* ≥ 1 */
};

/* lora: factors of the backend's memory (model/placed.h), or NULL. A device's failure is ERR_RESOURCES or ERR_FAILED.
 *
 * Computes and appends the tokens of all items, packed. ERR_CONFIG if an id is outside the vocabulary or an item does
 * not fit its cache (nothing was changed then). One item of one token is a decoding step. */
int MUST_USE infer_extend(struct infer *infer, const struct lora *lora, const struct infer_extend *items, int32_t count,
                          struct error *err);

/* logits (vocabulary) of the token after the cache's last. A device's failure: ERR_RESOURCES or ERR_FAILED. */
int MUST_USE infer_logits(struct infer *infer, const struct kv_cache *cache, float *logits, struct error *err);

/* The id of its largest logit, the smallest among equals: what greedy sampling chooses. On a card the logits stay
 * there. */
int MUST_USE infer_likeliest(struct infer *infer, const struct kv_cache *cache, int32_t *ret_id, struct error *err);

/* One continuation to score. Items of one cache must stand together (asserted). */
struct infer_candidate {
    struct kv_cache *cache; /* unchanged by the call; must have room for count − 1 tokens */
    const int32_t *ids;     /* (count) */
    int32_t count;          /* ≥ 1, count − 1 ≤ rows_max */
    double log_likelihood;  /* result: Σ log p(id_i | cache, id_0 .. id_{i−1}), natural log */
};

/* Scores every continuation. ERR_CONFIG as above. */
int MUST_USE infer_score(struct infer *infer, const struct lora *lora, struct infer_candidate *candidates,
                         int32_t count, struct error *err);

#endif
