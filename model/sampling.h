/*
 * Choosing the next token from logits: greedy, or temperature with top-k and top-p, with injected randomness.
 *
 *     struct sampler sampler;
 *     if (sampler_init(&sampler, &(struct sampler_config){.temperature = 0.7f, .top_p = 0.9f}, vocabulary, err) < 0)
 * ... int32_t token = sampler_next(&sampler, logits, &rng);
 */
#ifndef MODEL_SAMPLING_H
#define MODEL_SAMPLING_H

#include "base/error.h"
#include "base/rng.h"

struct sampler_config {
    float temperature; /* 0: greedy (the largest logit, the smallest id among equals) */
    int32_t top_k;     /* 0: off; keep the k likeliest */
    float top_p;       /* 0 or 1: off; keep the likeliest whose probabilities first reach p (Holtzman et al. 2019) */
};

struct sampler {
    struct sampler_config config;
    int32_t vocabulary;
    int32_t *order; /* (vocabulary) owned work memory */
    float *weights; /* (vocabulary) */
};

/* The id of the largest logit, the smallest among equals. */
int32_t likeliest_token(const float *logits, int32_t vocabulary);

/* ERR_CONFIG names a setting out of range; ERR_RESOURCES. */
int MUST_USE sampler_init(struct sampler *sampler, const struct sampler_config *config, int32_t vocabulary,
                          struct error *err);
void sampler_release(struct sampler *sampler); /* accepts NULL and zeroed */

/* A token id. logits (vocabulary) are only read; rng may be NULL when greedy. Allocates nothing. */
int32_t sampler_next(struct sampler *sampler, const float *logits, const struct rng *rng);

#endif
