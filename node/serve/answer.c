#include "node/serve/answer.h"

#include "crypto/random.h"
#include "model/infer.h"
#include "model/placed.h"

/*
 * A prompt is computed in pieces that begin at multiples of this, and only whole pieces of an earlier prompt are
 * reused. So each piece's products have the same shape and inputs whether or not something was reused, and come out
 * with the same bits; passes of other sizes round otherwise, and a seeded answer would depend on what was asked before
 * it.
 */
#ifndef PROMPT_PIECE
#define PROMPT_PIECE 32
#endif
#define PROMPT_PIECES_OF_CARD 4

struct answerer {
    const struct site *site;
    const struct rng *rng;
    const struct clock *clock;
    struct pool *pool;
    struct backend *backend; /* its own: answering and training are two threads; infer and cache are on it */
    struct lora lora;        /* the factors of computed_with on the backend */
    struct infer *infer;
    struct kv_cache *cache;
    struct served_adapter *computed_with; /* a reference: the adapter of the cache's keys and values; NULL: none */
    int32_t reusable;                     /* of the cache's tokens: whole pieces of a prompt */
    struct token_list prompt;
    float *logits; /* (vocabulary) */
    int32_t context;
    struct error why_cpu; /* of answer_on_cpu; code 0: it was not needed */
};

/* One run. */
struct run {
    struct answerer *a;
    const struct answer_request *request;
    struct answer *answer;
    const struct lora *lora; /* the answerer's, of the reference that the run holds; NULL: the base model */
    struct sampler sampler;
    struct random_stream random;
    struct token_stream stream;
    size_t emitted; /* bytes of answer->text given to request->piece */
};

/* A card reads the weights for a piece in the time that it takes to compute with them for some hundred rows. */
static int32_t piece_of(const struct answerer *a)
{
    return a->backend->host_memory ? PROMPT_PIECE : PROMPT_PIECES_OF_CARD * PROMPT_PIECE;
}

/* On the backend. What is there after a failure is released by close_parts. */
static int open_parts(struct answerer *a, struct error *err)
{
    const struct infer_options options = {.backend = a->backend,
                                          .rows_max = piece_of(a),
                                          .context_max = a->context,
                                          .rank_max = LORA_RANK_MAX,
                                          .answering = true};
    int rc = infer_new(&options, &a->site->model, &a->infer, err);

    return rc < 0 ? rc : kv_cache_new(a->backend, &a->site->model, a->context, &a->cache, err);
}

static void close_parts(struct answerer *a)
{
    kv_cache_free(a->cache);
    infer_free(a->infer);
    backend_free(a->backend);
    a->cache = NULL;
    a->infer = NULL;
    a->backend = NULL;
}

/* After rc, a failure to take memory from the backend: 0, and everything is on the CPU, with nothing in the cache; or
 * the failure, if it stands, and nothing has changed. The adapter's factors are not on the backend. */
static int answer_on_cpu(struct answerer *a, int rc, struct error *err)
{
    struct answerer before = *a;

    if (!site_falls_back(a->site, a->backend, "answering", err))
        return rc;
    a->why_cpu = *err;
    a->cache = NULL;
    a->infer = NULL;
    a->backend = NULL;
    if ((rc = site_cpu_backend_new(a->site, a->pool, &a->backend, err)) == 0 && (rc = open_parts(a, err)) == 0) {
        close_parts(&before);
        return 0;
    }
    close_parts(a);
    *a = before;
    return rc;
}

int answerer_new(struct answerer **ret_answerer, const struct site *site, int32_t context_tokens, const struct rng *rng,
                 const struct clock *clock, struct error *err)
{
    const struct model_config *m = &site->model.config;
    struct answerer *a = calloc(1, sizeof *a);
    int rc;

    if (!a)
        return error_set(err, ERR_RESOURCES, "out of memory for answering");
    a->site = site;
    a->rng = rng;
    a->clock = clock;
    a->context = context_tokens < m->context_length ? context_tokens : m->context_length;
    a->prompt.max = (size_t)a->context - 1; /* room for one token of an answer */
    if ((rc = pool_new(site->threads, &a->pool, err)) < 0)
        goto out;
    if ((rc = site_backend_new(site, a->pool, &a->backend, err)) == 0)
        rc = open_parts(a, err);
    if (rc < 0 && (rc = answer_on_cpu(a, rc, err)) < 0)
        goto out;
    a->logits = calloc((size_t)m->vocabulary, sizeof *a->logits);
    if (!a->logits) {
        rc = error_set(err, ERR_RESOURCES, "out of memory for answering");
        goto out;
    }
    *ret_answerer = a;
    return 0;
out:
    answerer_free(a);
    return rc;
}

void answerer_free(struct answerer *a)
{
    if (!a)
        return;
    lora_unplace(&a->lora);
    close_parts(a);
    pool_free(a->pool);
    served_adapter_drop(a->computed_with);
    token_list_release(&a->prompt);
    free(a->logits);
    free(a);
}

const char *answerer_device(const struct answerer *a, const struct error **ret_why_cpu)
{
    *ret_why_cpu = &a->why_cpu;
    return a->backend->name;
}

int32_t answerer_context(const struct answerer *a)
{
    return a->context;
}

const char *answer_finish_name(enum answer_finish finish)
{
    static const char *const names[] = {"stop", "length", "cancelled"};
    assert((unsigned)finish < ARRAY_LEN(names));
    return names[finish];
}

void answer_release(struct answer *answer)
{
    if (!answer)
        return;
    buffer_wipe_release(&answer->text);
    *answer = (struct answer){0};
}

static struct answer_source source_of(const struct served_adapter *adapter)
{
    struct answer_source source = {.version = adapter ? adapter->version : 0};
    if (adapter) {
        memcpy(source.job, adapter->job, sizeof source.job);
        memcpy(source.sha256, adapter->sha256, sizeof source.sha256);
    }
    return source;
}

struct answer_source answer_source_now(struct slot *slot)
{
    struct served_adapter *adapter = slot ? slot_take(slot) : NULL;
    struct answer_source source = source_of(adapter);
    served_adapter_drop(adapter);
    return source;
}

/* --- prompt ----------------------------------------------------------------------------------------------------- */

/* Without a system message of its own, a conversation begins as the adapter's training examples did. */
static int encode_prompt(struct answerer *a, const struct answer_request *request, const struct served_adapter *adapter,
                         struct error *err)
{
    const char *system = adapter && adapter->system_message[0] ? adapter->system_message : "default";
    struct chat_options options = site_chat_options(system);
    int rc;

    options.generation_prompt = true;
    token_list_clear(&a->prompt);
    rc = chat_encode(a->site->tokenizer, &options, request->messages, request->message_count, &a->prompt, err);
    if (rc == ERR_RESOURCES)
        return error_set(err, ERR_CONFIG,
                         "the conversation is longer than this server's context of %d tokens, prompt and answer "
                         "together; shorten it",
                         a->context);
    return rc;
}

static bool proceed(const struct run *r)
{
    return !r->request->proceed || r->request->proceed(r->request->ctx);
}

/* Brings an adapter's factors to where they are multiplied; what was computed with another one is stale. */
static int change_adapter(struct answerer *a, struct served_adapter *adapter, struct error *err)
{
    if (a->computed_with == adapter)
        return 0;
    lora_unplace(&a->lora);
    served_adapter_drop(a->computed_with);
    a->computed_with = NULL;
    a->reusable = 0;
    if (!adapter)
        return 0;
    int rc = lora_place(&a->lora, &adapter->lora, a->backend, err);
    if (rc < 0 && (rc = answer_on_cpu(a, rc, err)) == 0)
        rc = lora_place(&a->lora, &adapter->lora, a->backend, err);
    if (rc < 0)
        return rc;
    a->computed_with = adapter;
    adapter->references++;
    return 0;
}

/* Cuts the cache back to what this prompt shares with it; returns how many tokens that are. */
static int32_t reuse(struct answerer *a)
{
    int32_t shared = kv_cache_common(a->cache, a->prompt.ids, (int32_t)a->prompt.count);

    shared = shared < a->reusable ? shared : a->reusable;
    shared -= shared % piece_of(a);
    kv_cache_truncate(a->cache, shared);
    a->reusable = shared;
    return shared;
}

/* Computes what the cache does not hold already. False in *ret_done: cancelled in between. */
static int compute_prompt(struct run *r, struct served_adapter *adapter, bool *ret_done, struct error *err)
{
    struct answerer *a = r->a;
    const int32_t count = (int32_t)a->prompt.count;
    int rc = change_adapter(a, adapter, err);
    bool going;

    if (rc < 0)
        return rc;
    r->lora = adapter ? &a->lora : NULL;
    const int32_t piece = piece_of(a);
    int32_t next = reuse(a);
    r->answer->reused_tokens = next;
    while ((going = proceed(r)) && next < count) {
        int32_t n = count - next < piece ? count - next : piece;
        struct infer_extend item = {a->cache, a->prompt.ids + next, n};
        rc = infer_extend(a->infer, r->lora, &item, 1, err);
        if (rc < 0)
            return rc;
        next += n;
        a->reusable = next - next % piece;
    }
    *ret_done = going;
    return 0;
}

/* --- text ------------------------------------------------------------------------------------------------------- */

/* The first place in text, not before `from`, where a stop string stands; text.len when there is none. */
static size_t find_stop(const struct answer_request *request, struct span text, size_t from)
{
    size_t first = text.len;
    for (size_t i = 0; i < request->stop_count; i++) {
        const struct span stop = request->stops[i];
        const uint8_t *at = text.len > from ? memmem(text.ptr + from, text.len - from, stop.ptr, stop.len) : NULL;
        if (at && (size_t)(at - text.ptr) < first)
            first = (size_t)(at - text.ptr);
    }
    return first;
}

/* Bytes at the text's end, after `from`, that may be the beginning of a stop string. */
static size_t held_back(const struct answer_request *request, struct span text, size_t from)
{
    size_t held = 0;
    for (size_t i = 0; i < request->stop_count; i++) {
        const struct span stop = request->stops[i];
        size_t n = stop.len - 1 < text.len - from ? stop.len - 1 : text.len - from;
        while (n > held && memcmp(text.ptr + text.len - n, stop.ptr, n) != 0)
            n--;
        held = n > held ? n : held;
    }
    return held;
}

/* Hands out the text up to `end`. */
static void emit(struct run *r, size_t end)
{
    if (r->request->piece && end > r->emitted)
        r->request->piece(r->request->ctx, span_of(r->answer->text.data + r->emitted, end - r->emitted));
    r->emitted = end > r->emitted ? end : r->emitted;
}

/* Looks at the text that came in; true when a stop string stands in it, and the text then ends before it. What was
 * emitted can hold no part of one, so the search begins there. */
static bool stopped(struct run *r)
{
    struct span text = buffer_span(&r->answer->text);
    size_t at = find_stop(r->request, text, r->emitted);

    if (at < text.len) {
        r->answer->text.len = at;
        emit(r, at);
        return true;
    }
    emit(r, text.len - held_back(r->request, text, r->emitted));
    return false;
}

/* --- answering -------------------------------------------------------------------------------------------------- */

static int decode(struct run *r, int32_t tokens_max, struct error *err)
{
    struct answerer *a = r->a;
    struct answer *answer = r->answer;
    const struct tokenizer *tokenizer = a->site->tokenizer;
    const struct rng rng = random_stream_rng(&r->random);

    answer->finish = ANSWER_LENGTH;
    while (answer->answer_tokens < tokens_max) {
        int32_t token = 0;
        int rc = 0;
        if (r->sampler.config.temperature == 0)
            rc = infer_likeliest(a->infer, a->cache, &token, err);
        else if ((rc = infer_logits(a->infer, a->cache, a->logits, err)) == 0)
            token = sampler_next(&r->sampler, a->logits, &rng);
        if (rc < 0)
            return rc;
        answer->answer_tokens++;
        if (tokenizer_is_end(tokenizer, token)) {
            answer->finish = ANSWER_STOP;
            break;
        }
        token_stream_push(&r->stream, tokenizer, token, &answer->text);
        if (stopped(r)) {
            answer->finish = ANSWER_STOP;
            return 0;
        }
        if (answer->answer_tokens == tokens_max)
            break;
        if (!proceed(r)) {
            answer->finish = ANSWER_CANCELLED;
            break;
        }
        struct infer_extend item = {a->cache, &token, 1};
        if ((rc = infer_extend(a->infer, r->lora, &item, 1, err)) < 0)
            return rc;
    }
    token_stream_end(&r->stream, &answer->text);
    if (stopped(r))
        answer->finish = ANSWER_STOP;
    emit(r, answer->text.len);
    return 0;
}

/* Between the accepted prompt and the end. */
static int compute(struct run *r, struct served_adapter *adapter, struct error *err)
{
    struct answerer *a = r->a;
    const int32_t room = a->context - (int32_t)a->prompt.count;
    const int32_t asked = r->request->tokens_max;
    const int64_t began = clock_monotonic_ms(a->clock);
    bool done = false;
    int rc = compute_prompt(r, adapter, &done, err);

    r->answer->prompt_ms = clock_monotonic_ms(a->clock) - began;
    if (rc < 0)
        return rc;
    if (!done) {
        r->answer->finish = ANSWER_CANCELLED;
        return 0;
    }
    rc = decode(r, asked > 0 && asked < room ? asked : room, err);
    r->answer->answer_ms = clock_monotonic_ms(a->clock) - began - r->answer->prompt_ms;
    if (rc == 0 && !buffer_ok(&r->answer->text))
        rc = error_set(err, ERR_RESOURCES, "out of memory for an answer");
    return rc;
}

static void start_random(struct run *r)
{
    uint8_t key[RANDOM_SEED_SIZE] = {0};

    if (!r->request->seeded) {
        random_stream_seeded(&r->random, r->a->rng, "serve/sampling");
        return;
    }
    for (int i = 0; i < 8; i++)
        key[i] = (uint8_t)(r->request->seed >> 8 * i);
    random_stream_init(&r->random, key, "serve/seeded-sampling");
}

int answerer_run(struct answerer *a, struct slot *slot, const struct answer_request *request, struct answer *ret_answer,
                 struct error *err)
{
    struct served_adapter *adapter = slot ? slot_take(slot) : NULL;
    struct answer answer = {.source = source_of(adapter)};
    struct run r = {.a = a, .request = request, .answer = &answer};
    int rc;

    assert(request->message_count > 0 && request->stop_count <= ANSWER_STOPS_MAX);
    for (size_t i = 0; i < request->stop_count; i++)
        assert(request->stops[i].len > 0 && request->stops[i].len <= ANSWER_STOP_BYTES_MAX);
    buffer_init(&answer.text, ANSWER_BYTES_MAX);
    if ((rc = encode_prompt(a, request, adapter, err)) == 0)
        rc = sampler_init(&r.sampler, &request->sampling, a->site->model.config.vocabulary, err);
    if (rc == 0) {
        answer.prompt_tokens = (int32_t)a->prompt.count;
        if (request->started)
            request->started(request->ctx, &answer);
        start_random(&r);
        rc = compute(&r, adapter, err);
        random_stream_release(&r.random);
    }
    sampler_release(&r.sampler);
    served_adapter_drop(adapter);
    if (rc < 0)
        answer_release(&answer);
    else
        *ret_answer = answer;
    return rc;
}
