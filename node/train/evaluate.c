#include "node/train/evaluate.h"

#include "model/placed.h"

#define BATCH_PROMPTS 8 /* prompts computed and scored in one packed pass */
#define ROWS_MAX 512

struct evaluation {
    const struct evaluate_options *options;
    const struct model *model;
    const struct tokenizer *tokenizer;
    const struct lora *lora; /* on the backend; NULL: the base model */
    struct lora placed;
    const struct dataset *data;
    size_t records;
    struct infer *infer;
    struct kv_cache *caches[BATCH_PROMPTS];
    struct kv_cache *prefix; /* the tokens that every prompt begins with */
    struct infer_candidate *candidates;
};

/* The i-th evaluated record: evenly spaced over the file, which may be sorted. */
static size_t record_at(const struct evaluation *e, size_t i)
{
    return i * dataset_count(e->data) / e->records;
}

static void release(struct evaluation *e)
{
    for (size_t i = 0; i < BATCH_PROMPTS; i++)
        kv_cache_free(e->caches[i]);
    kv_cache_free(e->prefix);
    infer_free(e->infer);
    lora_unplace(&e->placed);
    free(e->candidates);
}

static int prepare(struct evaluation *e, struct error *err)
{
    const struct dataset_report *report = dataset_report(e->data);
    int32_t context = (int32_t)report->longest;
    struct infer_options options = {
        .backend = e->options->backend, .rows_max = ROWS_MAX, .rank_max = e->lora ? e->lora->config.rank : 0};
    int rc;

    for (size_t a = 0; a < dataset_answer_count(e->data); a++)
        context = context > (int32_t)report->longest + dataset_answer_at(e->data, a)->count
                      ? context
                      : (int32_t)report->longest + dataset_answer_at(e->data, a)->count;
    if (dataset_answer_count(e->data) == 0)
        context += e->options->answer_tokens_max;
    if (context > e->model->config.context_length)
        return error_set(err, ERR_CONFIG, "evaluation needs %d tokens of context, the model has %d", context,
                         e->model->config.context_length);
    options.context_max = context;
    if ((rc = infer_new(&options, e->model, &e->infer, err)) < 0)
        return rc;
    for (size_t i = 0; i < BATCH_PROMPTS; i++)
        if ((rc = kv_cache_new(e->options->backend, e->model, context, &e->caches[i], err)) < 0)
            return rc;
    if ((rc = kv_cache_new(e->options->backend, e->model, context, &e->prefix, err)) < 0)
        return rc;
    e->candidates = calloc((size_t)BATCH_PROMPTS * DATASET_ANSWERS_MAX, sizeof *e->candidates);
    return e->candidates ? 0 : error_set(err, ERR_RESOURCES, "out of memory for the evaluation");
}

/* Computes what all prompts share once. */
static int compute_prefix(struct evaluation *e, struct error *err)
{
    struct batch_example first, other;
    int32_t shared;
    struct infer_extend item;

    dataset_example(e->data, record_at(e, 0), &first);
    shared = dataset_prompt_length(e->data, record_at(e, 0)) - 1;
    for (size_t i = 1; i < e->records && shared > 0; i++) {
        int32_t limit = dataset_prompt_length(e->data, record_at(e, i)) - 1, n = 0;
        dataset_example(e->data, record_at(e, i), &other);
        while (n < limit && n < shared && other.ids[n] == first.ids[n])
            n++;
        shared = n;
    }
    if (shared < 1)
        return 0;
    item = (struct infer_extend){e->prefix, first.ids, shared};
    return infer_extend(e->infer, e->lora, &item, 1, err);
}

static int prefill(struct evaluation *e, size_t first, size_t count, struct error *err)
{
    struct infer_extend items[BATCH_PROMPTS];
    int32_t shared = kv_cache_length(e->prefix);

    for (size_t i = 0; i < count; i++) {
        struct batch_example example;
        dataset_example(e->data, record_at(e, first + i), &example);
        kv_cache_copy(e->caches[i], e->prefix, shared);
        items[i] = (struct infer_extend){e->caches[i], example.ids + shared,
                                         dataset_prompt_length(e->data, record_at(e, first + i)) - shared};
    }
    return infer_extend(e->infer, e->lora, items, (int32_t)count, err);
}

static int score_answers(struct evaluation *e, size_t first, size_t count, struct evaluate_result *result,
                         struct error *err)
{
    size_t answers = dataset_answer_count(e->data);
    int rc;

    for (size_t i = 0; i < count; i++) {
        for (size_t a = 0; a < answers; a++) {
            const struct dataset_answer *answer = dataset_answer_at(e->data, a);
            e->candidates[i * answers + a] =
                (struct infer_candidate){.cache = e->caches[i], .ids = answer->ids, .count = answer->count};
        }
    }
    if ((rc = infer_score(e->infer, e->lora, e->candidates, (int32_t)(count * answers), err)) < 0)
        return rc;
    for (size_t i = 0; i < count; i++) {
        const struct infer_candidate *row = e->candidates + i * answers;
        int32_t right = dataset_answer_of(e->data, record_at(e, first + i));
        size_t best = 0;
        for (size_t a = 1; a < answers; a++)
            if (row[a].log_likelihood / row[a].count > row[best].log_likelihood / row[best].count)
                best = a;
        result->correct += (int32_t)best == right;
        result->mean_nll -= row[right].log_likelihood / row[right].count;
    }
    return 0;
}

static struct span trimmed(struct span s)
{
    while (s.len > 0 && s.ptr[0] <= ' ') {
        s.ptr++;
        s.len--;
    }
    while (s.len > 0 && s.ptr[s.len - 1] <= ' ')
        s.len--;
    return s;
}

/* Can text still become want, outer blanks aside? Equality is what is asked, so decoding may stop once it cannot. */
static bool may_become(struct span text, struct span want)
{
    while (text.len > 0 && text.ptr[0] <= ' ') {
        text.ptr++;
        text.len--;
    }
    if (text.len <= want.len)
        return memcmp(text.ptr, want.ptr, text.len) == 0;
    return memcmp(text.ptr, want.ptr, want.len) == 0 && span_equal(trimmed(text), want);
}

struct greedy {
    struct buffer want, got;
    int32_t next; /* token to append */
    bool open;    /* still decoding */
};

/* Chooses the next token of one record; closes it at the end of the answer or when it cannot be right any more. */
static int choose(struct evaluation *e, struct greedy *g, struct kv_cache *cache, struct error *err)
{
    int rc = infer_likeliest(e->infer, cache, &g->next, err);
    if (rc < 0)
        return rc;
    if (tokenizer_is_end(e->tokenizer, g->next) || kv_cache_room(cache) == 0) {
        g->open = false;
        return 0;
    }
    tokenizer_decode(e->tokenizer, &g->next, 1, &g->got);
    g->open = may_become(buffer_span(&g->got), trimmed(buffer_span(&g->want)));
    return 0;
}

/* The greedy answers of one group of prompts, decoded side by side. */
static int greedy_answers(struct evaluation *e, size_t first, size_t count, struct evaluate_result *result,
                          struct error *err)
{
    struct greedy greedy[BATCH_PROMPTS] = {0};
    struct infer_extend items[BATCH_PROMPTS];
    int rc = 0;

    for (size_t i = 0; i < count; i++) {
        size_t record = record_at(e, first + i);
        int32_t prompt = dataset_prompt_length(e->data, record);
        struct batch_example example;
        dataset_example(e->data, record, &example);
        buffer_init(&greedy[i].want, 1 << 20);
        buffer_init(&greedy[i].got, 1 << 20);
        tokenizer_decode(e->tokenizer, example.ids + prompt, (size_t)(example.length - prompt), &greedy[i].want);
        greedy[i].open = true;
    }
    for (int32_t produced = 0; rc == 0 && produced < e->options->answer_tokens_max; produced++) {
        int32_t n = 0;
        for (size_t i = 0; rc == 0 && i < count; i++) {
            if (greedy[i].open)
                rc = choose(e, &greedy[i], e->caches[i], err);
            if (greedy[i].open)
                items[n++] = (struct infer_extend){e->caches[i], &greedy[i].next, 1};
        }
        if (rc < 0 || n == 0)
            break;
        rc = infer_extend(e->infer, e->lora, items, n, err);
    }
    for (size_t i = 0; i < count; i++) {
        result->correct +=
            rc == 0 && span_equal(trimmed(buffer_span(&greedy[i].want)), trimmed(buffer_span(&greedy[i].got)));
        buffer_release(&greedy[i].want);
        buffer_release(&greedy[i].got);
    }
    return rc;
}

/* How many of the records carry the commonest answer: compared by their ids, without the list's limit of answers. */
static size_t majority(const struct evaluation *e)
{
    size_t most = 0;

    for (size_t i = 0; i < e->records; i++) {
        struct batch_example a, b;
        int32_t start = dataset_prompt_length(e->data, record_at(e, i));
        size_t same = 0;
        dataset_example(e->data, record_at(e, i), &a);
        for (size_t j = 0; j < e->records; j++) {
            int32_t other = dataset_prompt_length(e->data, record_at(e, j));
            dataset_example(e->data, record_at(e, j), &b);
            same += a.length - start == b.length - other &&
                    memcmp(a.ids + start, b.ids + other, sizeof *a.ids * (size_t)(a.length - start)) == 0;
        }
        most = same > most ? same : most;
    }
    return most;
}

int evaluate(const struct evaluate_options *options, const struct model *model, const struct tokenizer *tokenizer,
             const struct lora *lora, const struct dataset *data, struct evaluate_result *ret_result, struct error *err)
{
    struct evaluation e = {.options = options, .model = model, .tokenizer = tokenizer, .data = data};
    struct evaluate_result result = {.answers = dataset_answer_count(data)};
    int rc;

    e.records = dataset_count(data);
    if (options->records_max && options->records_max < e.records)
        e.records = options->records_max;
    result.records = e.records;
    result.majority = majority(&e);
    if (lora && (rc = lora_place(&e.placed, lora, options->backend, err)) < 0)
        return rc;
    e.lora = lora ? &e.placed : NULL;
    if ((rc = prepare(&e, err)) == 0)
        rc = compute_prefix(&e, err);
    for (size_t first = 0; rc == 0 && first < e.records; first += BATCH_PROMPTS) {
        size_t count = e.records - first < BATCH_PROMPTS ? e.records - first : BATCH_PROMPTS;
        if ((rc = prefill(&e, first, count, err)) < 0)
            break;
        if (result.answers)
            rc = score_answers(&e, first, count, &result, err);
        else
            rc = greedy_answers(&e, first, count, &result, err);
        if (options->progress)
            options->progress(options->progress_ctx, first + count, e.records);
    }
    release(&e);
    if (rc < 0)
        return rc;
    if (result.answers)
        result.mean_nll /= (double)result.records;
    *ret_result = result;
    return 0;
}
