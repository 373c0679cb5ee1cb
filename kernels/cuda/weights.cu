/* Frozen matrices on the device and the products with them, LoRA included. */
#include "kernels/cuda/backend.h"

#define LOGITS_BYTES ((size_t)512 << 20) /* most that the logits of a chunk of label rows take */

static struct cuda_group *placed_of(const struct linear_group *g)
{
    return static_cast<struct cuda_group *>(g->placed);
}

static size_t element_bytes(const struct cuda *c)
{
    return backend_element_bytes(&c->base);
}

static void *element_at(const struct cuda *c, const void *base, size_t index)
{
    return static_cast<uint8_t *>(const_cast<void *>(base)) + index * element_bytes(c);
}

static bool quantised(enum tensor_type type)
{
    return type != TENSOR_F32 && type != TENSOR_F16 && type != TENSOR_BF16;
}

/* --- placing ----------------------------------------------------------------------------------------------------- */

/* Dense copies of all weights, if they leave room for the work, or else the quantised blocks. */
int cuda_weights_fit(struct backend *be, size_t values, size_t given_bytes, struct error *err)
{
    struct cuda *c = cuda_of(be);
    const size_t room = be->ops->free_bytes(be), dense = values * element_bytes(c);
    c->decode_each_use = c->options.keep_quantised || dense > room / 10 * 7;
    if (!c->decode_each_use)
        return 0;
    if (given_bytes <= room)
        return 0;
    char want[MEGABYTES_SIZE], have[MEGABYTES_SIZE];
    return error_set(err, ERR_RESOURCES,
                     "the weights take %s, but %s has %s free for this process: raise device.memory_limit_mb if it is "
                     "set, or set device.kind: cpu",
                     megabytes(want, given_bytes), be->name, megabytes(have, room));
}

static int place_given(struct backend *be, const struct tensor *w, struct given_matrix *to, struct error *err)
{
    size_t row = 0;
    if (!tensor_type_row_bytes(w->type, (size_t)w->in, &row))
        return error_set(err, ERR_CONFIG, "a %s matrix cannot have rows of %d values", tensor_type_name(w->type),
                         w->in);
    to->type = w->type;
    to->row_bytes = row;
    int rc = cuda_alloc(be, row * (size_t)w->out, &to->at, err);
    if (rc == 0)
        be->ops->upload(be, to->at, w->data, row * (size_t)w->out);
    return rc;
}

static void decode_group(struct cuda *c, const struct linear_group *g, void *matrix)
{
    const struct cuda_group *p = placed_of(g);
    size_t row = 0;
    for (int32_t i = 0; i < g->count; i++) {
        struct rows to = {element_at(c, matrix, row * (size_t)p->stride), p->stride};
        dequantise_matrix(c->stream, c->base.element, g->out[i], g->in, p->given[i].type, p->given[i].at,
                          p->given[i].row_bytes, to);
        row += (size_t)g->out[i];
    }
}

int cuda_group_new(struct backend *be, int32_t count, const struct tensor *const w[], int32_t rank_max,
                   struct linear_group *ret, struct error *err)
{
    struct cuda *c = cuda_of(be);
    struct linear_group g = {};
    int rc = 0;
    struct cuda_group *p = static_cast<struct cuda_group *>(calloc(1, sizeof *p));
    if (!p)
        return error_set(err, ERR_RESOURCES, "no memory for a table of weights");
    g.count = count;
    g.in = w[0]->in;
    g.placed = p;
    bool blocks = false;
    for (int32_t i = 0; i < count; i++) {
        g.w[i] = *w[i];
        g.out[i] = w[i]->out;
        p->out_total += w[i]->out;
        blocks = blocks || quantised(w[i]->type);
        if (w[i]->in % 8 != 0 || (count > 1 && w[i]->out % 8 != 0))
            rc = error_set(err, ERR_CONFIG, "a matrix of %d by %d: CUDA takes widths that are multiples of 8",
                           w[i]->out, w[i]->in);
    }
    p->in = g.in;
    p->lora_rows = backend_lora_columns(rank_max);
    p->stride = g.in + p->lora_rows;
    for (int32_t i = 0; rc == 0 && i < count; i++)
        rc = place_given(be, w[i], &p->given[i], err);
    const bool keep = !(blocks && c->decode_each_use);
    const size_t bytes = ((size_t)p->out_total + (size_t)p->lora_rows) * (size_t)p->stride * element_bytes(c);
    if (rc == 0 && keep) {
        if ((rc = cuda_alloc(be, bytes, &p->matrix, err)) == 0)
            decode_group(c, &g, p->matrix);
    } else if (rc == 0) {
        rc = cuda_work(c, &c->matrix, bytes, err);
    }
    if (rc == 0 && keep) { /* one copy is enough, and the dense one is what is read */
        rc = be->ops->sync(be, err);
        for (int32_t i = 0; i < count; i++) {
            cuda_release(be, p->given[i].at);
            p->given[i].at = NULL;
        }
    }
    if (rc < 0) {
        cuda_group_free(be, &g);
        return rc;
    }
    *ret = g;
    return 0;
}

void cuda_group_free(struct backend *be, struct linear_group *group)
{
    struct cuda_group *p = placed_of(group);
    if (!p)
        return;
    for (int32_t i = 0; i < group->count; i++)
        cuda_release(be, p->given[i].at);
    cuda_release(be, p->matrix);
    free(p);
    group->placed = NULL;
}

/* --- LoRA's parts of the augmented matrix ------------------------------------------------------------------------ */

TEMPLATE_KERNEL zero_rectangle(int32_t rows, int32_t bytes, uint8_t *at, size_t stride_bytes)
{
    const int32_t i = (int32_t)(blockIdx.x * blockDim.x + threadIdx.x);
    const int32_t row = (int32_t)blockIdx.y;
    if (row < rows && i < bytes)
        at[(size_t)row * stride_bytes + (size_t)i] = 0;
}

/* Columns in..in+R and rows out..out+R of a matrix. */
static void clear_lora(struct cuda *c, const struct linear_group *g, void *matrix)
{
    const struct cuda_group *p = placed_of(g);
    const size_t e = element_bytes(c), stride = (size_t)p->stride * e;
    const int32_t bytes = p->lora_rows * (int32_t)e;
    for (int32_t row = 0; row < p->out_total; row += 32768) {
        const int32_t rows = p->out_total - row < 32768 ? p->out_total - row : 32768;
        uint8_t *at = static_cast<uint8_t *>(matrix) + (size_t)row * stride + (size_t)p->in * e;
        LAUNCH(zero_rectangle, dim3((unsigned)(bytes + 127) / 128, (unsigned)rows), 128, 0, c->stream, rows, bytes, at,
               stride);
    }
    device_zero(c->stream, element_at(c, matrix, (size_t)p->out_total * (size_t)p->stride),
                (size_t)p->lora_rows * stride);
}

/* Where the factors go: B's block-diagonal from b on, A's one under the other from a on. Returns how many parts. */
static int32_t list_parts(const struct cuda *c, const struct linear_group *g, const struct group_lora *lora,
                          struct rows a, struct rows b, struct lora_part parts[2 * BACKEND_GROUP_MAX])
{
    int32_t row = 0, column = 0, count = 0;
    for (int32_t i = 0; i < g->count; i++) {
        if (lora->rank > 0 && lora->a[i]) {
            struct lora_part *p = &parts[count];
            p[0].from = lora->b[i];
            p[0].to.at = element_at(c, b.at, (size_t)row * (size_t)b.stride + (size_t)column);
            p[0].to.stride = b.stride;
            p[0].rows = g->out[i];
            p[0].columns = lora->rank;
            p[0].scale = lora->scale;
            p[1].from = lora->a[i];
            p[1].to.at = element_at(c, a.at, (size_t)column * (size_t)a.stride);
            p[1].to.stride = a.stride;
            p[1].rows = lora->rank;
            p[1].columns = g->in;
            p[1].scale = 1;
            count += 2;
            column += lora->rank;
        }
        row += g->out[i];
    }
    return count;
}

/* The same for the group's augmented matrix. */
static int32_t list_augmented(const struct cuda *c, const struct linear_group *g, const struct group_lora *lora,
                              const void *matrix, struct lora_part parts[2 * BACKEND_GROUP_MAX])
{
    const struct cuda_group *p = placed_of(g);
    struct rows a = {element_at(c, matrix, (size_t)p->out_total * (size_t)p->stride), p->stride};
    struct rows b = {element_at(c, matrix, (size_t)g->in), p->stride};
    return list_parts(c, g, lora, a, b, parts);
}

static bool same_places(const struct linear_group *g, const struct group_lora *a, const struct group_lora *b)
{
    if (a->rank != b->rank)
        return false;
    for (int32_t i = 0; i < g->count; i++)
        if ((a->a[i] != NULL) != (b->a[i] != NULL))
            return false;
    return true;
}

void cuda_lora_load(struct backend *be, int32_t count, struct linear_group *const groups[],
                    const struct group_lora loras[])
{
    struct cuda *c = cuda_of(be);
    struct lora_part parts[LORA_PARTS_MAX];
    int32_t listed = 0;
    for (int32_t i = 0; i < count; i++) {
        struct cuda_group *p = placed_of(groups[i]);
        assert(group_stacked_rank(groups[i], &loras[i]) <= p->lora_rows);
        if (p->matrix && p->loaded_rank > 0 && !same_places(groups[i], &loras[i], &p->loaded))
            clear_lora(c, groups[i], p->matrix);
        p->loaded = loras[i];
        p->loaded_rank = group_stacked_rank(groups[i], &loras[i]);
        if (!p->matrix || p->loaded_rank == 0)
            continue;
        if (listed + 2 * BACKEND_GROUP_MAX > LORA_PARTS_MAX) {
            lora_place(c->stream, be->element, listed, parts);
            listed = 0;
        }
        listed += list_augmented(c, groups[i], &loras[i], p->matrix, parts + listed);
    }
    lora_place(c->stream, be->element, listed, parts);
}

const void *cuda_matrix(struct cuda *c, const struct linear_group *group, bool with_lora)
{
    const struct cuda_group *p = placed_of(group);
    if (p->matrix)
        return p->matrix;
    decode_group(c, group, c->matrix.at);
    if (with_lora && p->lora_rows > 0) {
        struct lora_part parts[2 * BACKEND_GROUP_MAX];
        clear_lora(c, group, c->matrix.at);
        lora_place(c->stream, c->base.element, list_augmented(c, group, &p->loaded, c->matrix.at, parts), parts);
    }
    return c->matrix.at;
}

/* --- products ---------------------------------------------------------------------------------------------------- */

/* c (m, n) = a (m, k) · b, b (k, n) or (n, k) transposed; accumulated where beta is 1. */
static void multiply(struct cuda *c, int32_t m, int32_t n, int32_t k, struct rows a, const void *b, int32_t ldb,
                     bool b_transposed, float beta, struct rows to)
{
    struct product x = {};
    if (m == 0)
        return;
    x.m = m;
    x.n = n;
    x.k = k;
    x.a = a.at;
    x.lda = a.stride;
    x.b = b;
    x.ldb = ldb;
    x.b_transposed = b_transposed;
    x.alpha = 1;
    x.beta = beta;
    x.c = to.at;
    x.ldc = to.stride;
    x.c_type = c->base.element;
    const int rc = product_run(c->products, c->stream, &x);
    if (rc < 0)
        cuda_latch(c, rc, products_failure(c->products));
}

static void lora_down_with(struct cuda *c, const struct linear_group *g, int32_t rank, int32_t m, struct rows x,
                           struct rows h, const void *matrix)
{
    const struct cuda_group *p = placed_of(g);
    assert(h.at == element_at(c, x.at, (size_t)g->in) && h.stride == x.stride);
    multiply(c, m, backend_lora_columns(rank), g->in, x,
             element_at(c, matrix, (size_t)p->out_total * (size_t)p->stride), p->stride, true, 0, h);
}

void cuda_lora_down(struct backend *be, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                    struct rows x, struct rows h)
{
    struct cuda *c = cuda_of(be);
    const int32_t rank = group_stacked_rank(g, lora);
    if (rank > 0)
        lora_down_with(c, g, rank, m, x, h, cuda_matrix(c, g, true));
}

/* Answering, many rows: the factors are brought into the element and multiplied by themselves. */
static void serve_lora(struct cuda *c, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                       struct rows x, struct rows y)
{
    const struct cuda_group *p = placed_of(g);
    const int32_t rank = group_stacked_rank(g, lora), columns = backend_lora_columns(rank);
    const size_t e = element_bytes(c);
    struct rows a = {c->lora.at, g->in}, b = {element_at(c, c->lora.at, (size_t)columns * (size_t)g->in), columns};
    struct rows h = {c->lora_hidden.at, columns};
    assert(((size_t)columns * (size_t)g->in + (size_t)p->out_total * (size_t)columns) * e <= c->lora.bytes);
    assert((size_t)m * (size_t)columns * e <= c->lora_hidden.bytes);
    device_zero(c->stream, c->lora.at, ((size_t)g->in + (size_t)p->out_total) * (size_t)columns * e);
    struct lora_part parts[2 * BACKEND_GROUP_MAX];
    lora_place(c->stream, c->base.element, list_parts(c, g, lora, a, b, parts), parts);
    multiply(c, m, columns, g->in, x, a.at, a.stride, true, 0, h);
    multiply(c, m, p->out_total, columns, h, b.at, b.stride, true, 1, y);
}

/* Answering, few rows: each matrix is read once. The dense copy is read faster than quantised blocks are decoded. */
static void serve_few(struct cuda *c, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                      struct rows x, const struct rows y[])
{
    const struct cuda_group *p = placed_of(g);
    const size_t stride_bytes = (size_t)p->stride * element_bytes(c);
    const int32_t rank = group_stacked_rank(g, lora);
    float *hidden = static_cast<float *>(c->hidden.at);
    if (!p->matrix) {
        for (int32_t i = 0; i < g->count; i++)
            decode_linear(c->stream, c->base.element, m, g->out[i], g->in, p->given[i].type, p->given[i].at,
                          p->given[i].row_bytes, x, y[i], NULL);
    } else { /* the members are one matrix */
        decode_linear(c->stream, c->base.element, m, p->out_total, g->in, c->base.element, p->matrix, stride_bytes, x,
                      y[0], NULL);
    }
    if (rank == 0)
        return;
    decode_lora_down(c->stream, c->base.element, m, rank, g->in, group_stacked_a(g, lora), x, hidden, rank);
    for (int32_t i = 0, column = 0; i < g->count; i++) {
        if (!lora->a[i])
            continue;
        decode_lora_up(c->stream, c->base.element, m, g->out[i], lora->rank, lora->scale, lora->b[i], hidden + column,
                       rank, y[i]);
        column += lora->rank;
    }
}

static void assert_fused(const struct cuda *c, const struct linear_group *g, const struct rows y[])
{
    size_t column = 0;
    for (int32_t i = 0; i < g->count; i++) {
        assert(y[i].stride == y[0].stride && y[i].at == element_at(c, y[0].at, column));
        column += (size_t)g->out[i];
    }
    (void)c;
    (void)y;
    (void)column;
}

static void products_forward(struct cuda *c, enum group_use use, const struct linear_group *g,
                             const struct group_lora *lora, int32_t m, struct rows x, const struct rows y[],
                             struct rows h)
{
    const struct cuda_group *p = placed_of(g);
    const int32_t rank = group_stacked_rank(g, lora);
    if (use == GROUP_SERVE && m <= KERNEL_DECODE_ROWS) {
        serve_few(c, g, lora, m, x, y);
        return;
    }
    const void *matrix = cuda_matrix(c, g, use == GROUP_TRAIN && rank > 0);
    if (use == GROUP_TRAIN && rank > 0)
        lora_down_with(c, g, rank, m, x, h, matrix);
    const int32_t columns = use == GROUP_TRAIN && rank > 0 ? backend_lora_columns(rank) : 0;
    multiply(c, m, p->out_total, g->in + columns, x, matrix, p->stride, true, 0, y[0]);
    if (use == GROUP_SERVE && rank > 0)
        serve_lora(c, g, lora, m, x, y[0]);
}

void cuda_group_forward(struct backend *be, enum group_use use, const struct linear_group *g,
                        const struct group_lora *lora, int32_t m, struct rows x, const struct rows y[], struct rows h)
{
    struct cuda *c = cuda_of(be);
    assert_fused(c, g, y);
    if (m == 0)
        return;
    products_forward(c, use, g, lora, m, x, y, h);
    for (int32_t i = 0; i < g->count; i++)
        if (g->bias[i])
            rows_add_bias(c->stream, be->element, m, g->out[i], g->bias[i], y[i]);
}

void cuda_group_backward(struct backend *be, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                         const struct rows dy[], struct rows dh, bool with_dh, struct rows dx)
{
    struct cuda *c = cuda_of(be);
    const struct cuda_group *p = placed_of(g);
    const int32_t rank = group_stacked_rank(g, lora), columns = backend_lora_columns(rank);
    assert_fused(c, g, dy);
    if (m == 0 || !(dx.at || (with_dh && rank > 0)))
        return;
    const void *matrix = cuda_matrix(c, g, rank > 0);
    if (rank > 0) {
        assert(dh.at == element_at(c, dy[0].at, (size_t)p->out_total) && dh.stride == dy[0].stride);
        multiply(c, m, columns, p->out_total, dy[0], element_at(c, matrix, (size_t)g->in), p->stride, false, 0, dh);
    }
    if (dx.at)
        multiply(c, m, g->in, p->out_total + columns, dy[0], matrix, p->stride, false, 0, dx);
}

/* --- embedding and head ------------------------------------------------------------------------------------------ */

void cuda_embed(struct backend *be, int32_t m, const struct linear_group *table, const int32_t *ids, float scale,
                struct rows y)
{
    struct cuda *c = cuda_of(be);
    const struct cuda_group *p = placed_of(table);
    const struct given_matrix *given = &p->given[0];
    if (given->at)
        rows_embed(c->stream, c->base.element, m, table->in, given->type, given->at, given->row_bytes, ids, scale, y);
    else
        rows_embed(c->stream, c->base.element, m, table->in, c->base.element, p->matrix,
                   (size_t)p->stride * element_bytes(c), ids, scale, y);
}

static int32_t logits_stride(int32_t vocabulary)
{
    return (vocabulary + 7) / 8 * 8;
}

/* Label rows in a chunk, whose logits exist at once. */
static int32_t logits_rows(const struct cuda *c, int32_t rows, int32_t vocabulary)
{
    const size_t row = (size_t)logits_stride(vocabulary) * element_bytes(c);
    const size_t most = LOGITS_BYTES / row < 128 ? 128 : LOGITS_BYTES / row / 128 * 128;
    return (size_t)rows < most ? rows : (int32_t)most;
}

size_t cuda_logits_bytes(const struct cuda *c, int32_t rows, int32_t vocabulary)
{
    return (size_t)logits_rows(c, rows, vocabulary) * (size_t)logits_stride(vocabulary) * element_bytes(c);
}

void cuda_cross_entropy(struct backend *be, const struct linear_group *head, const struct placed_labels *labels,
                        struct rows x, float *losses, struct rows dx)
{
    struct cuda *c = cuda_of(be);
    const struct cuda_group *p = placed_of(head);
    const int32_t vocabulary = head->out[0], chunk = logits_rows(c, labels->count, vocabulary);
    struct rows logits = {c->logits.at, logits_stride(vocabulary)};
    const void *matrix = cuda_matrix(c, head, false);
    assert((size_t)chunk * (size_t)logits.stride * element_bytes(c) <= c->logits.bytes);
    for (int32_t first = 0; first < labels->count; first += chunk) {
        const int32_t count = labels->count - first < chunk ? labels->count - first : chunk;
        struct rows from = {element_at(c, x.at, (size_t)first * (size_t)x.stride), x.stride};
        multiply(c, count, vocabulary, head->in, from, matrix, p->stride, true, 0, logits);
        head_softmax(c->stream, c->base.element, count, vocabulary, logits, labels->targets + first,
                     labels->weights ? labels->weights + first : NULL, losses + first, dx.at != NULL);
        if (!dx.at)
            continue;
        struct rows to = {element_at(c, dx.at, (size_t)first * (size_t)dx.stride), dx.stride};
        multiply(c, count, head->in, vocabulary, logits, matrix, p->stride, false, 0, to);
    }
}

/* Logits of a few rows, in the work memory. */
static float *few_logits(struct cuda *c, const struct linear_group *head, int32_t m, struct rows x)
{
    const struct cuda_group *p = placed_of(head);
    const struct given_matrix *given = &p->given[0];
    const struct rows none = {NULL, 0};
    float *to = static_cast<float *>(c->logits.at);
    assert(m <= KERNEL_DECODE_ROWS && (size_t)m * (size_t)head->out[0] * sizeof(float) <= c->logits.bytes);
    device_use(c->options.device);
    if (!p->matrix)
        decode_linear(c->stream, c->base.element, m, head->out[0], head->in, given->type, given->at, given->row_bytes,
                      x, none, to);
    else
        decode_linear(c->stream, c->base.element, m, head->out[0], head->in, c->base.element, p->matrix,
                      (size_t)p->stride * element_bytes(c), x, none, to);
    return to;
}

void cuda_logits(struct backend *be, const struct linear_group *head, int32_t m, struct rows x, float *logits)
{
    be->ops->download(be, logits, few_logits(cuda_of(be), head, m, x),
                      (size_t)m * (size_t)head->out[0] * sizeof(float));
}

void cuda_likeliest(struct backend *be, const struct linear_group *head, int32_t m, struct rows x, int32_t *ids)
{
    struct cuda *c = cuda_of(be);
    const float *logits = few_logits(c, head, m, x);
    uint8_t *work = static_cast<uint8_t *>(c->chosen.at); /* what head_likeliest needs, and behind it the ids */
    int32_t *chosen = reinterpret_cast<int32_t *>(work + head_likeliest_work(KERNEL_DECODE_ROWS));
    head_likeliest(c->stream, m, head->out[0], logits, chosen, work);
    be->ops->download(be, ids, chosen, (size_t)m * sizeof *ids);
}
