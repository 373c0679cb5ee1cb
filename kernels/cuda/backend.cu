/* A CUDA device as a backend: memory, recorded passes, and the table of kernels/backend.h. */
#include "kernels/cuda/backend.h"

#define GRAPHS_MAX 24
#define RECORD_TRIES 16     /* a pass that could not be recorded so often is run as it is */
#define LEAST_CAPABILITY 80 /* bfloat16 products and asynchronous copies */
#define SHORT_OF_MEMORY                                                                                                \
    "raise device.memory_limit_mb if it is set, lower device.batch_tokens (training) or serve.context_tokens "         \
    "(answering), or set device.kind: cpu"

/* --- memory and errors ------------------------------------------------------------------------------------------- */

void cuda_latch(struct cuda *c, int code, const char *what)
{
    if (c->latched.code == 0)
        error_set(&c->latched, code, "%s failed on %s", what, c->base.name);
}

static struct allocation *find_allocation(struct cuda *c, const void *at)
{
    for (int32_t i = c->allocation_count - 1; i >= 0; i--)
        if (c->allocations[i].at == at)
            return &c->allocations[i];
    return NULL;
}

static size_t cuda_free_bytes(struct backend *be)
{
    const struct cuda *c = cuda_of(be);
    device_use(c->options.device);
    const size_t card = device_free_bytes(), margin = (size_t)256 << 20;
    const size_t left = c->limit_bytes > c->used_bytes ? c->limit_bytes - c->used_bytes : 0;
    const size_t free_now = card > margin ? card - margin : 0; /* the driver and cuBLAS take some later */
    return left < free_now ? left : free_now;
}

int cuda_alloc(struct backend *be, size_t bytes, void **ret, struct error *err)
{
    struct cuda *c = cuda_of(be);
    void *at = NULL;
    device_use(c->options.device);
    if (c->allocation_count == c->allocation_room) {
        const int32_t room = c->allocation_room ? 2 * c->allocation_room : 64;
        struct allocation *more =
            static_cast<struct allocation *>(realloc(c->allocations, sizeof *more * (size_t)room));
        if (!more)
            return error_set(err, ERR_RESOURCES, "no memory for a table");
        c->allocations = more;
        c->allocation_room = room;
    }
    char want[MEGABYTES_SIZE], have[MEGABYTES_SIZE], used[MEGABYTES_SIZE];
    if (bytes > c->limit_bytes - c->used_bytes)
        return error_set(err, ERR_RESOURCES,
                         "%s more do not fit the %s that this process may take on %s (%s are in use): " SHORT_OF_MEMORY,
                         megabytes(want, bytes), megabytes(have, c->limit_bytes), be->name,
                         megabytes(used, c->used_bytes));
    if (device_alloc(bytes, &at) < 0)
        return error_set(err, ERR_RESOURCES, "%s is short of memory: %s are needed, %s are free: " SHORT_OF_MEMORY,
                         be->name, megabytes(want, bytes), megabytes(have, device_free_bytes()));
    c->allocations[c->allocation_count].at = at;
    c->allocations[c->allocation_count++].bytes = bytes;
    c->used_bytes += bytes;
    *ret = at;
    return 0;
}

void cuda_release(struct backend *be, void *at)
{
    struct cuda *c = cuda_of(be);
    if (!at)
        return;
    struct allocation *a = find_allocation(c, at);
    assert(a);
    c->used_bytes -= a->bytes;
    *a = c->allocations[--c->allocation_count];
    device_use(c->options.device);
    device_release(at);
}

int cuda_work(struct cuda *c, struct work *work, size_t bytes, struct error *err)
{
    if (bytes <= work->bytes)
        return 0;
    void *at = NULL;
    int rc = device_sync(c->stream, err); /* the old memory may be in use */
    if (rc == 0) {
        if (work == &c->noise && work->at) {
            device_zero(c->stream, work->at, work->bytes);
            rc = device_sync(c->stream, err);
        }
        cuda_release(&c->base, work->at);
        work->at = NULL;
        work->bytes = 0;
        c->epoch++; /* what was recorded over it is void */
        rc = cuda_alloc(&c->base, bytes, &at, err);
    }
    if (rc < 0)
        return rc;
    work->at = at;
    work->bytes = bytes;
    return 0;
}

static void cuda_upload(struct backend *be, void *to, const void *from, size_t bytes)
{
    struct cuda *c = cuda_of(be);
    device_use(c->options.device);
    if (bytes == 0)
        return;
    if (bytes > UPLOAD_SLOT_BYTES) { /* from memory that is not pinned: it returns when that may be changed */
        device_upload(c->stream, to, from, bytes);
        return;
    }
    const int slot = c->upload_next;
    uint8_t *host = c->upload_slots + (size_t)slot * UPLOAD_SLOT_BYTES;
    c->upload_next = (slot + 1) % UPLOAD_SLOTS;
    device_mark_wait(c->upload_marks[slot]);
    memcpy(host, from, bytes);
    device_upload(c->stream, to, host, bytes);
    device_mark_set(c->upload_marks[slot], c->stream);
}

static int cuda_sync(struct backend *be, struct error *err)
{
    struct cuda *c = cuda_of(be);
    device_use(c->options.device);
    device_download(c->stream, c->failed_host, c->failed, sizeof *c->failed);
    int rc = device_sync(c->stream, err);
    if (rc == 0 && *c->failed_host != 0) /* it stays set: nothing of this backend may be released any more */
        rc =
            error_set(err, ERR_BUG, "noise could not be drawn or added on %s: nothing of it may be released", be->name);
    if (rc == 0 && c->latched.code != 0)
        rc = error_set(err, c->latched.code, "%s", c->latched.message);
    c->latched.code = 0;
    return rc;
}

static void cuda_download(struct backend *be, void *to, const void *from, size_t bytes)
{
    struct cuda *c = cuda_of(be);
    struct error err = {};
    device_use(c->options.device);
    if (bytes > 0)
        device_download(c->stream, to, from, bytes);
    const int rc = device_sync(c->stream, &err);
    if (rc < 0 && c->latched.code == 0)
        c->latched = err;
}

static void cuda_copy(struct backend *be, void *to, const void *from, size_t bytes)
{
    struct cuda *c = cuda_of(be);
    device_use(c->options.device);
    if (bytes > 0)
        device_copy(c->stream, to, from, bytes);
}

static void cuda_zero(struct backend *be, void *at, size_t bytes)
{
    struct cuda *c = cuda_of(be);
    device_use(c->options.device);
    if (bytes > 0)
        device_zero(c->stream, at, bytes);
}

/* --- work memory ------------------------------------------------------------------------------------------------- */

static int reserve_serving(struct cuda *c, const struct backend_needs *n, struct error *err)
{
    const size_t rounds = (size_t)(n->rows < BACKEND_ALTERNATIVES_MAX ? n->rows : BACKEND_ALTERNATIVES_MAX);
    const size_t bytes = sizeof(struct kv_row) * (size_t)n->rows * rounds;
    const size_t ranks = (size_t)BACKEND_GROUP_MAX * (size_t)n->rank_max;
    int rc = 0;
    if (n->rows > GRID_YZ_MAX)
        return error_set(err, ERR_CONFIG, "a pass of %d rows is more than a card takes at once", n->rows);
    rc = cuda_work(c, &c->decode, decode_attention_work(&n->shape, n->rows), err);
    if (rc == 0 && (bytes > c->rows.bytes || !c->rows_host)) {
        free(c->rows_host);
        c->rows_host = NULL;
        if ((rc = cuda_work(c, &c->rows, bytes, err)) == 0 && !(c->rows_host = malloc(bytes)))
            rc = error_set(err, ERR_RESOURCES, "no memory for the rows of a pass");
    }
    if (rc == 0)
        rc = cuda_work(c, &c->chosen, KERNEL_DECODE_ROWS * sizeof(int32_t) + head_likeliest_work(KERNEL_DECODE_ROWS),
                       err);
    if (rc == 0 && n->rows > c->rows_max)
        c->rows_max = n->rows;
    if (rc == 0 && ranks > 0)
        rc = cuda_work(c, &c->hidden, ranks * KERNEL_DECODE_ROWS * sizeof(float), err);
    if (rc == 0 && ranks > 0)
        rc = cuda_work(c, &c->lora,
                       (size_t)4 * (size_t)n->width * (size_t)backend_lora_columns((int32_t)ranks) *
                           backend_element_bytes(&c->base),
                       err);
    if (rc == 0 && ranks > 0)
        rc = cuda_work(c, &c->lora_hidden,
                       (size_t)n->rows * (size_t)backend_lora_columns((int32_t)ranks) * backend_element_bytes(&c->base),
                       err);
    return rc;
}

static int cuda_reserve(struct backend *be, const struct backend_needs *n, struct error *err)
{
    struct cuda *c = cuda_of(be);
    size_t logits = cuda_logits_bytes(c, n->label_rows, n->vocabulary);
    const size_t few = (size_t)KERNEL_DECODE_ROWS * (size_t)n->vocabulary * sizeof(float);
    if (n->decode_length > 0 && few > logits)
        logits = few;
    int rc = cuda_work(c, &c->logits, logits, err);
    if (rc == 0 && n->decode_length == 0) { /* training */
        rc = cuda_work(c, &c->delta, (size_t)n->rows * (size_t)n->shape.heads * sizeof(float), err);
        if (rc == 0)
            rc = cuda_work(c, &c->attention, attention_backward_work(be->element, &n->shape, n->rows), err);
    }
    if (rc == 0 && n->decode_length > 0)
        rc = reserve_serving(c, n, err);
    if (rc == 0 && n->summed > 0)
        rc = cuda_work(c, &c->sums, cuda_sums_bytes(n->rows, n->summed), err);
    if (rc == 0 && n->noise)
        rc = cuda_work(c, &c->noise, n->arena * sizeof(int64_t), err);
    if (rc == 0 && n->arena > 0)
        rc = cuda_work(c, &c->clip, arena_clip_work(n->arena, n->units), err);
    if (rc == 0 && n->arena > 0)
        rc = cuda_work(c, &c->clip_results, (size_t)n->units * sizeof(struct clip_result), err);
    return rc;
}

/* All but the matrix that quantised weights are decoded into: it belongs to the weights. */
static void release_work(struct cuda *c)
{
    struct work *const all[] = {&c->delta, &c->attention,   &c->logits, &c->clip,   &c->clip_results,
                                &c->lora,  &c->lora_hidden, &c->hidden, &c->decode, &c->rows,
                                &c->noise, &c->sums,        &c->chosen};
    for (size_t i = 0; i < ARRAY_LEN(all); i++) {
        cuda_release(&c->base, all[i]->at);
        all[i]->at = NULL;
        all[i]->bytes = 0;
    }
    c->epoch++;
}

static void cuda_trim(struct backend *be)
{
    struct cuda *c = cuda_of(be);
    struct error err;
    device_use(c->options.device);
    if (device_sync(c->stream, &err) < 0 || device_sync(c->side, &err) < 0)
        cuda_latch(c, err.code, "work");
    if (c->noise.at) {
        device_zero(c->stream, c->noise.at, c->noise.bytes);
        if (device_sync(c->stream, &err) < 0)
            cuda_latch(c, err.code, "work");
    }
    release_work(c);
}

/* --- recorded passes --------------------------------------------------------------------------------------------- */

struct graph_entry {
    uint64_t key[4];
    uint64_t used;  /* when last */
    uint64_t epoch; /* the backend's when it was recorded */
    int32_t times;  /* run or tried to be recorded */
    struct recording *recording;
};

struct graph_cache {
    uint64_t clock;
    int32_t count;
    struct graph_entry entries[GRAPHS_MAX];
};

static struct graph_cache *cuda_graph_cache_new(struct backend *be)
{
    return cuda_of(be)->options.eager ? NULL : static_cast<struct graph_cache *>(calloc(1, sizeof(struct graph_cache)));
}

static void cuda_graph_cache_free(struct backend *be, struct graph_cache *cache)
{
    struct error err;
    if (!cache)
        return;
    if (device_sync(cuda_of(be)->stream, &err) < 0)
        cuda_latch(cuda_of(be), err.code, "a recorded pass");
    for (int32_t i = 0; i < cache->count; i++)
        device_recording_free(cache->entries[i].recording);
    free(cache);
}

static void forget_recording(struct cuda *c, struct graph_entry *e)
{
    struct error err;
    if (!e->recording)
        return;
    if (device_sync(c->stream, &err) < 0) /* it may be running */
        cuda_latch(c, err.code, "a recorded pass");
    device_recording_free(e->recording);
    e->recording = NULL;
}

/* The key's entry; a new one takes the place of the one unused for longest. */
static struct graph_entry *entry_of(struct cuda *c, struct graph_cache *cache, const uint64_t key[4])
{
    struct graph_entry *oldest = &cache->entries[0];
    for (int32_t i = 0; i < cache->count; i++) {
        if (memcmp(cache->entries[i].key, key, sizeof cache->entries[i].key) == 0)
            return &cache->entries[i];
        if (cache->entries[i].used < oldest->used)
            oldest = &cache->entries[i];
    }
    if (cache->count < GRAPHS_MAX)
        oldest = &cache->entries[cache->count++];
    forget_recording(c, oldest);
    memset(oldest, 0, sizeof *oldest);
    memcpy(oldest->key, key, sizeof oldest->key);
    return oldest;
}

/* Records the pass, or returns NULL if it cannot be. What failed meanwhile is part of no recording: its replays would
 * leave it out and say nothing. */
static struct recording *record_pass(struct cuda *c, void (*record)(void *ctx), void *ctx)
{
    const struct error before = c->latched;
    if (device_failed() || before.code != 0 || !device_record_begin(c->stream))
        return NULL;
    record(ctx);
    struct recording *recording = device_record_end(c->stream);
    if (c->latched.code != 0) {
        device_recording_free(recording);
        recording = NULL;
        c->latched = before; /* the work is done anew, and fails by itself if it must */
    }
    return recording;
}

/* The first time a pass is only run: algorithms are chosen and kernels loaded then. The second time it is recorded. */
static void cuda_run_recorded(struct backend *be, struct graph_cache *cache, const uint64_t key[4],
                              void (*record)(void *ctx), void *ctx)
{
    struct cuda *c = cuda_of(be);
    device_use(c->options.device);
    struct graph_entry *e = cache ? entry_of(c, cache, key) : NULL;
    if (!e) {
        record(ctx);
        return;
    }
    e->used = ++cache->clock;
    if (e->epoch != c->epoch)
        forget_recording(c, e);
    if (!e->recording && e->times++ > 0 && e->times < RECORD_TRIES) {
        e->recording = record_pass(c, record, ctx);
        e->epoch = c->epoch;
    }
    if (e->recording)
        device_replay(c->stream, e->recording);
    else
        record(ctx);
}

/* --- the table --------------------------------------------------------------------------------------------------- */

static void cuda_norm_forward(struct backend *be, int32_t m, int32_t n, float eps, const float *gain, struct rows x,
                              struct rows add, struct rows y, float *rstd)
{
    rows_norm_forward(cuda_of(be)->stream, be->element, m, n, eps, gain, x, add, y, rstd);
}

static void cuda_norm_backward(struct backend *be, int32_t m, int32_t n, const float *gain, struct rows x,
                               const float *rstd, struct rows dy, struct rows dx, bool accumulate)
{
    rows_norm_backward(cuda_of(be)->stream, be->element, m, n, gain, x, rstd, dy, dx, accumulate);
}

static void cuda_head_norm_forward(struct backend *be, int32_t m, int32_t heads, int32_t head_size, float eps,
                                   const float *gain, struct rows x, struct rows y, float *rstd)
{
    rows_head_norm_forward(cuda_of(be)->stream, be->element, m, heads, head_size, eps, gain, x, y, rstd);
}

static void cuda_head_norm_backward(struct backend *be, int32_t m, int32_t heads, int32_t head_size, const float *gain,
                                    struct rows x, const float *rstd, struct rows dy, struct rows dx)
{
    rows_head_norm_backward(cuda_of(be)->stream, be->element, m, heads, head_size, gain, x, rstd, dy, dx);
}

static void cuda_rope(struct backend *be, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
                      enum rope_order order, bool inverse, const float *table, const int32_t *positions, struct rows x)
{
    rows_rope(cuda_of(be)->stream, be->element, m, heads, head_size, rotated, order, inverse, table, positions, x);
}

static void cuda_gated_forward(struct backend *be, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                               struct rows up, struct rows out)
{
    rows_gated_forward(cuda_of(be)->stream, be->element, m, n, kind, gate, up, out);
}

static void cuda_gated_backward(struct backend *be, int32_t m, int32_t n, enum gate_kind kind, struct rows gate,
                                struct rows up, struct rows dout)
{
    rows_gated_backward(cuda_of(be)->stream, be->element, m, n, kind, gate, up, dout);
}

static void cuda_gather(struct backend *be, int32_t m, int32_t width, const int32_t *index, struct rows from,
                        struct rows to)
{
    rows_gather(cuda_of(be)->stream, be->element, m, width, index, from, to);
}

static void cuda_clip_accumulate(struct backend *be, size_t n, int32_t count, const float *g, size_t stride,
                                 const struct clip_params *params, int64_t *sum, struct clip_result *results)
{
    struct cuda *c = cuda_of(be);
    assert((size_t)count * sizeof *results <= c->clip_results.bytes);
    assert(arena_clip_work(n, count) <= c->clip.bytes);
    device_use(c->options.device);
    arena_clip_accumulate(c->stream, n, count, g, stride, params, sum,
                          static_cast<struct clip_result *>(c->clip_results.at), c->clip.at);
    if (results)
        be->ops->download(be, results, c->clip_results.at, (size_t)count * sizeof *results);
}

static void cuda_clip_add(struct backend *be, size_t n, int32_t count, const float *g, size_t stride, double clip,
                          float *sum)
{
    struct cuda *c = cuda_of(be);
    assert(arena_clip_work(n, count) <= c->clip.bytes);
    device_use(c->options.device);
    arena_clip_add(c->stream, n, count, g, stride, clip, sum, c->clip.at);
}

static void cuda_add(struct backend *be, size_t n, const float *b, float *a)
{
    device_use(cuda_of(be)->options.device);
    arena_add(cuda_of(be)->stream, n, b, a);
}

static void cuda_scale_sum(struct backend *be, size_t n, const int64_t *sum, double scale, float *out)
{
    device_use(cuda_of(be)->options.device);
    arena_scale_sum(cuda_of(be)->stream, n, sum, scale, out);
}

static void cuda_divide(struct backend *be, size_t n, double denominator, float *a)
{
    device_use(cuda_of(be)->options.device);
    arena_divide(cuda_of(be)->stream, n, denominator, a);
}

static void cuda_adamw(struct backend *be, size_t n, const struct adamw_params *params, const float *g, float *m,
                       float *v, float *p)
{
    device_use(cuda_of(be)->options.device);
    arena_adamw(cuda_of(be)->stream, n, params, g, m, v, p);
}

static void cuda_sgd_momentum(struct backend *be, size_t n, float lr, float momentum, const float *g, float *m,
                              float *p)
{
    device_use(cuda_of(be)->options.device);
    arena_sgd_momentum(cuda_of(be)->stream, n, lr, momentum, g, m, p);
}

/* What the noise buffer holds where nothing is drawn: adding it is a failure, so that no lost launch can release a sum
 * without its noise. */
#define NOT_DRAWN INT64_MIN

TEMPLATE_KERNEL unset_noise(size_t n, int64_t *noise)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        noise[i] = NOT_DRAWN;
}

/* --- noise ------------------------------------------------------------------------------------------------------- */

static void cuda_noise_begin(struct backend *be, const uint8_t key[32], uint32_t number,
                             const struct gaussian *gaussian, size_t n)
{
    struct cuda *c = cuda_of(be);
    assert(c->noise.at && n * sizeof(int64_t) <= c->noise.bytes);
    device_use(c->options.device);
    device_after(c->side, c->stream); /* the last vector has been added and wiped */
    LAUNCH(unset_noise, dim3((unsigned)((n + 255) / 256)), 256, 0, c->side, n, static_cast<int64_t *>(c->noise.at));
    noise_fill(c->side, key, number, gaussian, n, static_cast<int64_t *>(c->noise.at), c->failed);
    c->noise_count = n;
}

TEMPLATE_KERNEL add_noise(size_t n, int64_t *RESTRICT noise, int64_t *RESTRICT sum, int32_t *RESTRICT failed)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    const int64_t a = sum[i], b = noise[i];
    const int64_t total = (int64_t)((uint64_t)a + (uint64_t)b);
    noise[i] = NOT_DRAWN;
    if (b == NOT_DRAWN || ((a ^ total) & (b ^ total)) < 0)
        *failed = 1;
    sum[i] = total;
}

static void cuda_noise_add(struct backend *be, size_t n, int64_t *sum)
{
    struct cuda *c = cuda_of(be);
    assert(n == c->noise_count);
    c->noise_count = 0;
    device_use(c->options.device);
    device_after(c->stream, c->side);
    LAUNCH(add_noise, dim3((unsigned)((n + 255) / 256)), 256, 0, c->stream, n, static_cast<int64_t *>(c->noise.at), sum,
           c->failed);
}

static void cuda_free(struct backend *be)
{
    struct cuda *c = cuda_of(be);
    struct error err;
    device_use(c->options.device);
    if ((c->stream && device_sync(c->stream, &err) < 0) || (c->side && device_sync(c->side, &err) < 0))
        fprintf(stderr, "closing %s: %s\n", be->name, err.message);
    if (c->noise.at) /* a step that was given up leaves its noise */
        device_zero(c->stream, c->noise.at, c->noise.bytes);
    if (c->stream && device_sync(c->stream, &err) < 0)
        fprintf(stderr, "closing %s: %s\n", be->name, err.message);
    release_work(c);
    cuda_release(be, c->matrix.at);
    assert(c->allocation_count == 0); /* everything placed on it was released before */
    device_release(c->failed);
    device_pinned_release(c->failed_host);
    device_pinned_release(c->upload_slots);
    for (int i = 0; i < UPLOAD_SLOTS; i++)
        device_mark_free(c->upload_marks[i]);
    free(c->rows_host);
    device_stream_free(c->side);
    products_free(c->products);
    device_stream_free(c->stream);
    free(c->allocations);
    free(c);
}

static struct backend_ops make_table(void)
{
    struct backend_ops t = {};
    t.free = cuda_free;
    t.alloc = cuda_alloc;
    t.release = cuda_release;
    t.upload = cuda_upload;
    t.download = cuda_download;
    t.copy = cuda_copy;
    t.zero = cuda_zero;
    t.sync = cuda_sync;
    t.free_bytes = cuda_free_bytes;
    t.reserve = cuda_reserve;
    t.trim = cuda_trim;
    t.run_recorded = cuda_run_recorded;
    t.graph_cache_new = cuda_graph_cache_new;
    t.graph_cache_free = cuda_graph_cache_free;
    t.weights_fit = cuda_weights_fit;
    t.group_new = cuda_group_new;
    t.group_free = cuda_group_free;
    t.lora_load = cuda_lora_load;
    t.group_forward = cuda_group_forward;
    t.lora_down = cuda_lora_down;
    t.group_backward = cuda_group_backward;
    t.group_gradients = cuda_group_gradients;
    t.norm_forward = cuda_norm_forward;
    t.norm_backward = cuda_norm_backward;
    t.head_norm_forward = cuda_head_norm_forward;
    t.head_norm_backward = cuda_head_norm_backward;
    t.rope = cuda_rope;
    t.gated_forward = cuda_gated_forward;
    t.gated_backward = cuda_gated_backward;
    t.embed = cuda_embed;
    t.gather = cuda_gather;
    t.segments_new = cuda_segments_new;
    t.segments_free = cuda_segments_free;
    t.segments_set = cuda_segments_set;
    t.attention_forward = cuda_attention_forward;
    t.attention_backward = cuda_attention_backward;
    t.kv_new = cuda_kv_new;
    t.kv_free = cuda_kv_free;
    t.kv_copy = cuda_kv_copy;
    t.pieces_set = cuda_pieces_set;
    t.attend = cuda_attend;
    t.cross_entropy = cuda_cross_entropy;
    t.logits = cuda_logits;
    t.likeliest = cuda_likeliest;
    t.clip_accumulate = cuda_clip_accumulate;
    t.clip_add = cuda_clip_add;
    t.add = cuda_add;
    t.scale_sum = cuda_scale_sum;
    t.divide = cuda_divide;
    t.noise_begin = cuda_noise_begin;
    t.noise_add = cuda_noise_add;
    t.adamw = cuda_adamw;
    t.sgd_momentum = cuda_sgd_momentum;
    return t;
}

static const struct backend_ops cuda_ops = make_table();

/* --- opening ----------------------------------------------------------------------------------------------------- */

static int check_card(const struct device_info *info, const struct backend_cuda_options *options, struct error *err)
{
    if (info->major * 10 + info->minor < LEAST_CAPABILITY)
        return error_set(err, ERR_CONFIG,
                         "%s is too old: it has compute capability %d.%d, and 8.0 (Ampere, 2020) is the least",
                         info->name, info->major, info->minor);
    if (options->memory_limit_bytes > 0 && options->memory_limit_bytes > info->memory_bytes)
        return error_set(err, ERR_CONFIG, "a memory limit of %zu MB, but %s has %zu MB",
                         options->memory_limit_bytes >> 20, info->name, info->memory_bytes >> 20);
    return 0;
}

/* Does this build hold code for the card? */
TEMPLATE_KERNEL probe(int32_t *failed)
{
    if (*failed < 0)
        *failed = 0;
}

static int check_code(struct cuda *c, struct error *err)
{
    struct error why = {};
    LAUNCH(probe, dim3(1), 32, 0, c->stream, c->failed);
    if (device_sync(c->stream, &why) == 0)
        return 0;
    return error_set(err, ERR_CONFIG,
                     "this build cannot compute on %s, compute capability %d.%d (%s): build with "
                     "-DCMAKE_CUDA_ARCHITECTURES=%d%d%s-real",
                     c->info.name, c->info.major, c->info.minor, why.message, c->info.major, c->info.minor,
                     c->info.major == 9 && c->info.minor == 0 ? "a" : ""); /* with Hopper's own instructions */
}

/* Streams, small memory and products. What is there already is released by cuda_free. */
static int open_parts(struct cuda *c, struct error *err)
{
    void *failed = NULL, *failed_host = NULL, *slots = NULL;
    int rc = device_stream_new(&c->stream);
    if (rc == 0)
        rc = device_stream_new(&c->side);
    if (rc == 0 && (rc = device_alloc(sizeof *c->failed, &failed)) == 0)
        c->failed = static_cast<int32_t *>(failed);
    if (rc == 0 && (rc = device_pinned_alloc(sizeof *c->failed_host, &failed_host)) == 0)
        c->failed_host = static_cast<int32_t *>(failed_host);
    if (rc == 0 && (rc = device_pinned_alloc(UPLOAD_SLOTS * UPLOAD_SLOT_BYTES, &slots)) == 0)
        c->upload_slots = static_cast<uint8_t *>(slots);
    for (int i = 0; rc == 0 && i < UPLOAD_SLOTS; i++)
        if (!(c->upload_marks[i] = device_mark_new()))
            rc = ERR_RESOURCES;
    if (rc < 0)
        return error_set(err, ERR_RESOURCES, "%s has no memory left for a process that opens it", c->base.name);
    if ((rc = check_code(c, err)) < 0)
        return rc;
    c->products = products_new(c->base.element, c->options.tune, err);
    return c->products ? 0 : ERR_RESOURCES;
}

bool backend_cuda_built(void)
{
    return true;
}

int backend_cuda_new(const struct backend_cuda_options *options, struct backend **ret_backend, struct error *err)
{
    struct device_info info;
    int rc = device_open(options->device, &info, err);
    if (rc == 0)
        rc = check_card(&info, options, err);
    if (rc < 0)
        return rc;
    struct cuda *c = static_cast<struct cuda *>(calloc(1, sizeof *c));
    if (!c)
        return error_set(err, ERR_RESOURCES, "no memory for the compute backend");
    c->options = *options;
    c->info = info;
    c->limit_bytes = options->memory_limit_bytes ? options->memory_limit_bytes : info.free_bytes;
    c->base.ops = &cuda_ops;
    c->base.element = options->precision == KERNEL_BF16 ? TENSOR_BF16 : TENSOR_F32;
    c->base.tuned = options->tune;
    c->base.fused = true;
    c->base.width_multiple = 8;
    c->base.row_multiple = 64;
    c->base.threads = 1;
    snprintf(c->base.name, sizeof c->base.name, "cuda:%d %s", options->device, info.name);
    if ((rc = open_parts(c, err)) < 0) {
        cuda_free(&c->base);
        return rc;
    }
    *ret_backend = &c->base;
    return 0;
}
