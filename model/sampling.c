#include "model/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int sampler_init(struct sampler *sampler, const struct sampler_config *config, int32_t vocabulary, struct error *err)
{
    if (!(config->temperature >= 0 && config->temperature <= 100))
        return error_set(err, ERR_CONFIG, "sampling: temperature %g is outside 0 to 100", (double)config->temperature);
    if (config->top_k < 0)
        return error_set(err, ERR_CONFIG, "sampling: top_k %d is negative", config->top_k);
    if (!(config->top_p >= 0 && config->top_p <= 1))
        return error_set(err, ERR_CONFIG, "sampling: top_p %g is outside 0 to 1", (double)config->top_p);
    assert(vocabulary >= 1);
    struct sampler s = {.config = *config, .vocabulary = vocabulary};
    s.order = calloc((size_t)vocabulary, sizeof *s.order);
    s.weights = calloc((size_t)vocabulary, sizeof *s.weights);
    if (!s.order || !s.weights) {
        sampler_release(&s);
        return error_set(err, ERR_RESOURCES, "sampling: no memory for a vocabulary of %d", vocabulary);
    }
    *sampler = s;
    return 0;
}

void sampler_release(struct sampler *sampler)
{
    if (!sampler)
        return;
    free(sampler->order);
    free(sampler->weights);
    memset(sampler, 0, sizeof *sampler);
}

/* Larger weight first, smaller id among equals: a total order, so results do not depend on the heap's moves. */
static bool before(const struct sampler *s, int32_t a, int32_t b)
{
    return s->weights[a] > s->weights[b] || (s->weights[a] == s->weights[b] && a < b);
}

static void sift_down(struct sampler *s, int32_t i, int32_t n)
{
    for (;;) {
        int32_t child = 2 * i + 1, top = i;
        if (child < n && before(s, s->order[child], s->order[top]))
            top = child;
        if (child + 1 < n && before(s, s->order[child + 1], s->order[top]))
            top = child + 1;
        if (top == i)
            return;
        int32_t swap = s->order[i];
        s->order[i] = s->order[top];
        s->order[top] = swap;
        i = top;
    }
}

int32_t likeliest_token(const float *logits, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* Moves the kept tokens, likeliest first, to the tail of order (the heap pops to its own end); returns how many, and
 * the sum of their weights. A heap instead of a full sort: few tokens carry the mass. */
static int32_t keep_likeliest(struct sampler *s, double total, double *ret_sum)
{
    const int32_t n = s->vocabulary;
    const int32_t k = s->config.top_k > 0 && s->config.top_k < n ? s->config.top_k : n;
    const double p = s->config.top_p > 0 && s->config.top_p < 1 ? s->config.top_p * total : INFINITY;
    double sum = 0;
    int32_t kept = 0;
    for (int32_t i = 0; i < n; i++)
        s->order[i] = i;
    for (int32_t i = n / 2 - 1; i >= 0; i--)
        sift_down(s, i, n);
    while (kept < k && sum < p) {
        int32_t likeliest = s->order[0];
        s->order[0] = s->order[n - 1 - kept];
        s->order[n - 1 - kept] = likeliest;
        kept++;
        sift_down(s, 0, n - kept);
        sum += s->weights[likeliest];
    }
    *ret_sum = sum;
    return kept;
}

int32_t sampler_next(struct sampler *sampler, const float *logits, const struct rng *rng)
{
    const int32_t n = sampler->vocabulary;
    const int32_t best = likeliest_token(logits, n);
    if (sampler->config.temperature == 0)
        return best;
    double total = 0;
    for (int32_t i = 0; i < n; i++) {
        sampler->weights[i] = expf((logits[i] - logits[best]) / sampler->config.temperature);
        total += sampler->weights[i];
    }
    const bool all = sampler->config.top_k == 0 && !(sampler->config.top_p > 0 && sampler->config.top_p < 1);
    int32_t kept = n;
    double sum = total;
    if (!all)
        kept = keep_likeliest(sampler, total, &sum);
    double left = rng_unit(rng) * sum;
    for (int32_t i = 0; i < kept; i++) {
        int32_t token = all ? i : sampler->order[n - 1 - i];
        left -= sampler->weights[token];
        if (left < 0)
            return token;
    }
    return best; /* rounding left a crumb */
}
