/*
 * One conversation turned into an answer: prompt, sampling, stop strings, and the adapter that answered.
 *
 * An answer is computed with the adapter that stood in the slot when it began; a swap meanwhile neither disturbs it nor
 * waits for it. What the last conversation's prompt and this one have in common is not computed again, as long as the
 * adapter is the same one, and without changing a bit of the answer; so the last conversation's tokens stay in this
 * process's memory until the next one. Memory for keys and values is taken once. Nothing here logs.
 *
 * One struct answerer: one thread at a time. It has its own threads and buffers, so a training thread beside it shares
 * nothing but the frozen model.
 *
 *     struct answerer *answerer;
 *     struct chat_message question = {CHAT_USER, span_str("Acute bronchitis")};
 *     struct answer_request request = {.messages = &question, .message_count = 1, .tokens_max = 32};
 *     struct answer answer;
 *     if (answerer_new(&answerer, site, context, &random_system, &clock_system, err) < 0) ...
 *     if (answerer_run(answerer, slot, &request, &answer, err) < 0) ...
 *     fwrite(answer.text.data, 1, answer.text.len, stdout);
 *     answer_release(&answer);
 *     answerer_free(answerer);
 */
#ifndef NODE_SERVE_ANSWER_H
#define NODE_SERVE_ANSWER_H

#include "base/clock.h"
#include "model/sampling.h"
#include "node/serve/slot.h"
#include "node/site.h"

#define ANSWER_STOPS_MAX 4 /* stop strings of one request */
#define ANSWER_STOP_BYTES_MAX 256u
#define ANSWER_BYTES_MAX (4u << 20)

enum answer_finish {
    ANSWER_STOP,      /* the model ended its message, or a stop string came */
    ANSWER_LENGTH,    /* tokens_max or the context was reached */
    ANSWER_CANCELLED, /* request.proceed said no; the text so far is kept */
};

/* What computed an answer. */
struct answer_source {
    char job[SITE_ID_SIZE];         /* "" for the base model */
    uint32_t version;               /* 0 for the base model */
    char sha256[2 * HASH_SIZE + 1]; /* of the adapter version; "" for the base model */
};

struct answer {
    struct answer_source source;
    struct buffer text; /* owned; valid UTF-8 without the stop string */
    enum answer_finish finish;
    int32_t prompt_tokens, reused_tokens; /* reused: of the prompt, not computed again */
    int32_t answer_tokens;                /* sampled, an end token included */
    int64_t prompt_ms, answer_ms;         /* spent in each part */
};

struct answer_request {
    const struct chat_message *messages; /* borrowed until the run returns */
    size_t message_count;                /* ≥ 1 */
    int32_t tokens_max;                  /* of the answer; 0: as many as the context has room for */
    struct sampler_config sampling;      /* zero: greedy */
    bool seeded;                         /* the same seed, prompt and adapter give the same answer */
    uint64_t seed;
    struct span stops[ANSWER_STOPS_MAX]; /* UTF-8, 1 to ANSWER_STOP_BYTES_MAX bytes each */
    size_t stop_count;

    /* All may be NULL, and run on the caller's thread. started: the prompt is accepted, before anything is computed;
     * source and prompt_tokens are set. piece: more text, whole characters, never part of a stop string. proceed: asked
     * before each token and each stretch of the prompt; false cancels. */
    void (*started)(void *ctx, const struct answer *answer);
    void (*piece)(void *ctx, struct span text);
    bool (*proceed)(void *ctx);
    void *ctx;
};

struct answerer;

/* context_tokens: longest conversation, cut to the model's own context. site, rng and clock must outlive it; rng feeds
 * requests without a seed. ERR_CONFIG, ERR_RESOURCES. */
int MUST_USE answerer_new(struct answerer **ret_answerer, const struct site *site, int32_t context_tokens,
                          const struct rng *rng, const struct clock *clock, struct error *err);
void answerer_free(struct answerer *a); /* accepts NULL */

/* What it computes on, as backend.h names it. ret_why_cpu: why device.kind auto took the CPU after having begun on a
 * card; code 0: it did not. Both are the answerer's, until its next run. */
const char *answerer_device(const struct answerer *a, const struct error **ret_why_cpu);
int32_t answerer_context(const struct answerer *a); /* tokens, prompt and answer together */

/* slot NULL: the base model. ERR_CONFIG: the conversation or a setting cannot be used (too long for the context, a
 * second system message, temperature out of range); the message is for whoever asked and quotes nothing of theirs.
 * ERR_RESOURCES. ret_answer: release it. */
int MUST_USE answerer_run(struct answerer *a, struct slot *slot, const struct answer_request *request,
                          struct answer *ret_answer, struct error *err);
void answer_release(struct answer *answer); /* wipes the text; accepts NULL and zeroed */

/* What the slot holds now; slot NULL: the base model. */
struct answer_source answer_source_now(struct slot *slot);

const char *answer_finish_name(enum answer_finish finish); /* "stop", "length", "cancelled" */

#endif
