/* Packed sequences on the device, and the operations that go by them: attention and the factors' gradients. */
#include "kernels/cuda/backend.h"

/* Rows that are summed by one block where no gradient is any one example's. */
#define SUM_ROWS 1024

/* Device and host copies of one block: count, offsets; the same of chunks of SUM_ROWS rows; tiles. */
struct cuda_segments {
    void *dev, *host;
    size_t bytes, chunks_at, tiles_at;
    int32_t tiles_max, chunks_max;
};

static struct cuda_segments *segments_of(const struct placed_segments *s)
{
    return static_cast<struct cuda_segments *>(s->placed);
}

void cuda_segments_free(struct backend *be, struct placed_segments *segments)
{
    struct cuda_segments *s = segments_of(segments);
    if (!s)
        return;
    cuda_release(be, s->dev);
    free(s->host);
    free(s);
    memset(segments, 0, sizeof *segments);
}

int cuda_segments_new(struct backend *be, int32_t rows_max, int32_t count_max, struct placed_segments *ret,
                      struct error *err)
{
    struct placed_segments p = {};
    const size_t tiles = (size_t)rows_max / ATTENTION_TILE + (size_t)count_max;
    if (tiles * ATTENTION_TILE_PARTS > GRID_YZ_MAX)
        return error_set(err, ERR_CONFIG, "a pass of %d rows in %d sequences is more than a card takes at once",
                         rows_max, count_max);
    struct cuda_segments *s = static_cast<struct cuda_segments *>(calloc(1, sizeof *s));
    if (!s)
        return error_set(err, ERR_RESOURCES, "no memory for a table of sequences");
    p.rows_max = rows_max;
    p.count_max = count_max;
    p.placed = s;
    s->tiles_max = (int32_t)tiles;
    s->chunks_max = (rows_max + SUM_ROWS - 1) / SUM_ROWS;
    s->chunks_at = sizeof(int32_t) * ((size_t)count_max + 2);
    s->tiles_at = (s->chunks_at + sizeof(int32_t) * ((size_t)s->chunks_max + 2) + 255) / 256 * 256;
    s->bytes = s->tiles_at + sizeof(struct attention_tile) * (size_t)s->tiles_max;
    int rc = cuda_alloc(be, s->bytes, &s->dev, err);
    if (rc == 0 && !(s->host = calloc(1, s->bytes)))
        rc = error_set(err, ERR_RESOURCES, "no memory for a table of sequences");
    if (rc < 0) {
        cuda_segments_free(be, &p);
        return rc;
    }
    *ret = p;
    return 0;
}

/* Tiles in descending order of the keys they see, so that the longest work starts first. */
static int32_t list_tiles(const struct placed_segments *p, struct attention_tile *tiles)
{
    int32_t longest = 0, n = 0;
    for (int32_t e = 0; e < p->count; e++)
        longest = p->offsets[e + 1] - p->offsets[e] > longest ? p->offsets[e + 1] - p->offsets[e] : longest;
    for (int32_t at = (longest - 1) / ATTENTION_TILE * ATTENTION_TILE; longest > 0 && at >= 0; at -= ATTENTION_TILE) {
        for (int32_t e = 0; e < p->count; e++) {
            const int32_t length = p->offsets[e + 1] - p->offsets[e];
            if (at >= length)
                continue;
            tiles[n].first = p->offsets[e];
            tiles[n].length = length;
            tiles[n].at = at;
            tiles[n++].segment = e;
        }
    }
    return n;
}

void cuda_segments_set(struct backend *be, struct placed_segments *segments, int32_t count, const int32_t *offsets)
{
    struct cuda_segments *s = segments_of(segments);
    int32_t *ints = static_cast<int32_t *>(s->host), *chunks = ints + s->chunks_at / sizeof *ints;
    assert(count <= segments->count_max && offsets[count] <= segments->rows_max);
    segments->count = count;
    segments->offsets = offsets;
    ints[0] = count;
    memcpy(ints + 1, offsets, sizeof *offsets * ((size_t)count + 1));
    chunks[0] = (offsets[count] + SUM_ROWS - 1) / SUM_ROWS;
    for (int32_t i = 0; i <= chunks[0]; i++)
        chunks[1 + i] = i < chunks[0] ? i * SUM_ROWS : offsets[count];
    struct attention_tile *tiles =
        reinterpret_cast<struct attention_tile *>(static_cast<uint8_t *>(s->host) + s->tiles_at);
    const int32_t used = list_tiles(segments, tiles);
    assert(used <= s->tiles_max);
    memset(tiles + used, 0, sizeof *tiles * (size_t)(s->tiles_max - used));
    be->ops->upload(be, s->dev, s->host, s->bytes);
}

static const struct attention_tile *tiles_of(const struct placed_segments *p)
{
    const struct cuda_segments *s = segments_of(p);
    return reinterpret_cast<const struct attention_tile *>(static_cast<uint8_t *>(s->dev) + s->tiles_at);
}

/* At most so many tiles lie in m rows. */
static int32_t tiles_bound(const struct placed_segments *p, int32_t m)
{
    const int32_t bound = m / ATTENTION_TILE + p->count_max, most = segments_of(p)->tiles_max;
    return bound < most ? bound : most;
}

/* --- gradients --------------------------------------------------------------------------------------------------- */

/* The factors' gradients of a group. All A's are neighbours in the gradient, as their dh are in dh: one job, which
 * reads x once. */
static int32_t list_gradients(struct backend *be, const struct linear_group *g, const struct group_lora *lora,
                              const struct rows dy[], struct rows h, struct rows dh, struct rows x,
                              const struct group_gradient *where, struct gradient_job jobs[GRADIENT_JOBS_MAX])
{
    int32_t count = 0, column = 0, a_job = -1;
    for (int32_t i = 0; i < g->count; i++) {
        if (!lora->a[i])
            continue;
        if (where->with_b) {
            struct gradient_job *b = &jobs[count++];
            b->left = dy[i];
            b->right = rows_from(be, h, column);
            b->left_width = g->out[i];
            b->right_width = lora->rank;
            b->scale = lora->scale;
            b->offset = where->b_offset[i];
        }
        const bool fits = a_job >= 0 && jobs[a_job].left_width + lora->rank <= 64;
        if (where->with_a && fits) {
            assert(where->a_offset[i] == jobs[a_job].offset + (size_t)jobs[a_job].left_width * (size_t)g->in);
            jobs[a_job].left_width += lora->rank;
        } else if (where->with_a) {
            a_job = count++;
            jobs[a_job].left = rows_from(be, dh, column);
            jobs[a_job].right = x;
            jobs[a_job].left_width = lora->rank;
            jobs[a_job].right_width = g->in;
            jobs[a_job].scale = 1;
            jobs[a_job].offset = where->a_offset[i];
        }
        column += lora->rank;
    }
    return count;
}

/* What sum_gradients needs at most: each job's values begin at a multiple of 64. */
size_t cuda_sums_bytes(int32_t rows, size_t values)
{
    const size_t chunks = ((size_t)rows + SUM_ROWS - 1) / SUM_ROWS;
    return values > 0 ? (values + (size_t)GRADIENT_JOBS_MAX * 64) * chunks * sizeof(float) : 0;
}

struct sum_part {
    size_t from, to, count; /* values; from: within a chunk's sums */
};

struct sum_parts {
    struct sum_part part[GRADIENT_JOBS_MAX];
    const float *sums;
    size_t stride; /* values between chunks */
    const int32_t *chunks;
    float *base;
};

/* base[to ...] = the chunks' sums, in order. grid: (blocks, parts). */
TEMPLATE_KERNEL add_chunks(const sum_parts parts)
{
    const sum_part part = parts.part[blockIdx.y];
    const int32_t chunks = *parts.chunks;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < part.count;
         i += (size_t)gridDim.x * blockDim.x) {
        float total = 0;
        for (int32_t c = 0; c < chunks; c++)
            total += parts.sums[(size_t)c * parts.stride + part.from + i];
        parts.base[part.to + i] = total;
    }
}

/* One gradient for all rows: chunks of rows are summed side by side, and then added. */
static void sum_gradients(struct cuda *c, const struct placed_segments *segments, int32_t count,
                          struct gradient_job *jobs, float *base)
{
    const struct cuda_segments *s = segments_of(segments);
    const int32_t *chunks = static_cast<const int32_t *>(s->dev) + s->chunks_at / sizeof(int32_t);
    struct sum_parts parts = {};
    size_t values = 0;
    for (int32_t i = 0; i < count; i++) {
        parts.part[i].from = values;
        parts.part[i].to = jobs[i].offset;
        parts.part[i].count = (size_t)jobs[i].left_width * (size_t)jobs[i].right_width;
        jobs[i].offset = values;
        values += (parts.part[i].count + 63) / 64 * 64;
    }
    struct error err = {};
    /* Reserved for training; else taken at the first step, never while a pass is recorded. */
    if (cuda_work(c, &c->sums, values * (size_t)s->chunks_max * sizeof(float), &err) < 0) {
        c->latched = c->latched.code ? c->latched : err;
        return;
    }
    parts.sums = static_cast<const float *>(c->sums.at);
    parts.stride = values;
    parts.chunks = chunks;
    parts.base = base;
    gradients_write(c->stream, c->base.element, count, jobs, chunks + 1, chunks, s->chunks_max,
                    static_cast<float *>(c->sums.at), values);
    LAUNCH(add_chunks, dim3(64, (unsigned)count), 256, 0, c->stream, parts);
}

void cuda_group_gradients(struct backend *be, const struct linear_group *g, const struct group_lora *lora,
                          const struct placed_segments *segments, const struct rows dy[], struct rows h, struct rows dh,
                          struct rows x, const struct group_gradient *where, float *base, size_t stride)
{
    struct cuda *c = cuda_of(be);
    struct gradient_job jobs[GRADIENT_JOBS_MAX];
    const int32_t count = list_gradients(be, g, lora, dy, h, dh, x, where, jobs);
    const int32_t *ints = static_cast<const int32_t *>(segments_of(segments)->dev);
    if (count == 0)
        return;
    if (stride == 0)
        sum_gradients(c, segments, count, jobs, base);
    else
        gradients_write(c->stream, be->element, count, jobs, ints + 1, ints, segments->count_max, base, stride);
}

/* --- attention --------------------------------------------------------------------------------------------------- */

void cuda_attention_forward(struct backend *be, const struct attention_shape *shape,
                            const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                            struct rows v, struct rows o, float *lse)
{
    attention_forward(cuda_of(be)->stream, be->element, shape, tiles_of(segments), tiles_bound(segments, m), q, k, v, o,
                      lse);
}

void cuda_attention_backward(struct backend *be, const struct attention_shape *shape,
                             const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                             struct rows v, struct rows o, const float *lse, struct rows do_, struct rows dq,
                             struct rows dk, struct rows dv)
{
    struct cuda *c = cuda_of(be);
    assert((size_t)m * (size_t)shape->heads * sizeof(float) <= c->delta.bytes);
    assert(attention_backward_work(be->element, shape, m) <= c->attention.bytes);
    attention_backward(c->stream, be->element, shape, tiles_of(segments), tiles_bound(segments, m), m, q, k, v, o, lse,
                       do_, dq, dk, dv, static_cast<float *>(c->delta.at), c->attention.at);
}
