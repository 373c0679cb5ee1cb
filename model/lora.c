#include "model/lora.h"

#include "base/checked.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const target_names[LORA_TARGET_COUNT] = {"q", "k", "v", "o", "gate", "up", "down"};

const char *lora_target_name(enum lora_target target)
{
    assert((unsigned)target < LORA_TARGET_COUNT);
    return target_names[target];
}

bool lora_target_parse(const char *name, enum lora_target *ret_target)
{
    for (int i = 0; i < LORA_TARGET_COUNT; i++) {
        if (strcmp(name, target_names[i]) == 0) {
            *ret_target = (enum lora_target)i;
            return true;
        }
    }
    return false;
}

void lora_target_shape(const struct model_config *model, enum lora_target target, int32_t *ret_in, int32_t *ret_out)
{
    const int32_t heads = model->head_count * model->head_size, kv = model->kv_head_count * model->head_size;
    assert((unsigned)target < LORA_TARGET_COUNT);
    *ret_in = target == LORA_O ? heads : target == LORA_DOWN ? model->d_ff : model->d_model;
    switch (target) {
    case LORA_Q:
        *ret_out = heads;
        break;
    case LORA_K:
    case LORA_V:
        *ret_out = kv;
        break;
    case LORA_GATE:
        *ret_out = model->d_ff;
        break;
    case LORA_UP:
        *ret_out = model->fused_gate_up ? 2 * model->d_ff : model->d_ff;
        break;
    default:
        *ret_out = model->d_model;
    }
}

/* floor(√n) by Newton's iteration on integers. */
static uint64_t isqrt(uint64_t n)
{
    if (n < 2)
        return n;
    uint64_t x = UINT64_C(1) << ((64 - (unsigned)__builtin_clzll(n) + 1) / 2); /* ≥ √n */
    for (;;) {
        uint64_t next = (x + n / x) / 2;
        if (next >= x)
            return x;
        x = next;
    }
}

/* √n for n < 2^22 to about 2^-21, the same bits everywhere: an integer root and one exact division by a power of two.
 */
static double exact_sqrt(uint32_t n)
{
    assert(n < 1u << 22);
    return (double)isqrt((uint64_t)n << 42) * 0x1p-21;
}

static int check_config(struct lora_config *c, const struct model_config *model, struct error *err)
{
    if (c->scaling == 0)
        c->scaling = LORA_SCALE_RANK;
    if (c->mode != LORA_JOINT && c->mode != LORA_FFA && c->mode != LORA_FFB)
        return error_set(err, ERR_CONFIG, "lora: unknown mode %d", (int)c->mode);
    if (c->scaling != LORA_SCALE_RANK && c->scaling != LORA_SCALE_SQRT_RANK)
        return error_set(err, ERR_CONFIG, "lora: unknown scaling %d", (int)c->scaling);
    if (c->rank < 1 || c->rank > LORA_RANK_MAX)
        return error_set(err, ERR_CONFIG, "lora: rank %d is outside 1 to %d", c->rank, LORA_RANK_MAX);
    if (!(c->alpha > 0 && c->alpha <= 1e6))
        return error_set(err, ERR_CONFIG, "lora: alpha %g is outside 0 to 1e6", c->alpha);
    if (c->targets == 0 || c->targets & ~LORA_TARGETS_ALL)
        return error_set(err, ERR_CONFIG, "lora: targets must name at least one of q, k, v, o, gate, up, down");
    if (model->fused_gate_up && (c->targets & LORA_TARGET_BIT(LORA_GATE))) {
        if (!(c->targets & LORA_TARGET_BIT(LORA_UP)))
            return error_set(err, ERR_CONFIG,
                             "lora: this model holds gate and up as one matrix: name both as targets, or neither");
        c->targets &= ~LORA_TARGET_BIT(LORA_GATE);
    }
    if (c->layer_first < 0 || c->layer_first >= model->layer_count)
        return error_set(err, ERR_CONFIG, "lora: first layer %d is outside the model's 0 to %d", c->layer_first,
                         model->layer_count - 1);
    if (c->layer_count == 0)
        c->layer_count = model->layer_count - c->layer_first;
    if (c->layer_count < 1 || c->layer_count > model->layer_count - c->layer_first)
        return error_set(err, ERR_CONFIG, "lora: %d layers from layer %d, but the model has %d in all", c->layer_count,
                         c->layer_first, model->layer_count);
    return 0;
}

/* Fills entries and index; the sections' lengths in floats come back. */
static void lay_out(struct lora *lora, const struct model_config *model, size_t *ret_a_count, size_t *ret_b_count)
{
    const struct lora_config *c = &lora->config;
    size_t a_count = 0, b_count = 0;
    for (int32_t layer = c->layer_first; layer < c->layer_first + c->layer_count; layer++) {
        for (int target = 0; target < LORA_TARGET_COUNT; target++) {
            if (!(c->targets & LORA_TARGET_BIT(target)))
                continue;
            struct lora_entry *e = &lora->entries[lora->entry_count];
            *e = (struct lora_entry){.layer = layer, .target = (enum lora_target)target};
            lora_target_shape(model, e->target, &e->in, &e->out);
            e->a_offset = a_count;
            e->b_offset = b_count;
            a_count += (size_t)c->rank * (size_t)e->in; /* bounded: 2^8 · 2^16 · 7 · 2^7 */
            b_count += (size_t)c->rank * (size_t)e->out;
            lora->index[layer][target] = lora->entry_count++;
        }
    }
    *ret_a_count = a_count;
    *ret_b_count = b_count;
}

int lora_init(struct lora *lora, const struct lora_config *config, const struct model_config *model, struct error *err)
{
    struct lora l = {.config = *config};
    size_t a_count, b_count;
    int rc = check_config(&l.config, model, err);
    if (rc < 0)
        return rc;
    memset(l.index, 0xff, sizeof l.index); /* −1 */
    l.entries = calloc((size_t)l.config.layer_count * LORA_TARGET_COUNT, sizeof *l.entries);
    if (!l.entries)
        return error_set(err, ERR_RESOURCES, "lora: no memory for the table of factors");
    lay_out(&l, model, &a_count, &b_count);
    const bool joint = l.config.mode == LORA_JOINT, train_b = l.config.mode == LORA_FFA;
    l.trained_count = joint ? a_count + b_count : train_b ? b_count : a_count;
    l.frozen_count = joint ? 0 : train_b ? a_count : b_count;
    l.trained = calloc(l.trained_count, sizeof *l.trained);
    l.frozen = joint ? NULL : calloc(l.frozen_count, sizeof *l.frozen);
    if (!l.trained || (!joint && !l.frozen)) {
        lora_release(&l);
        return error_set(err, ERR_RESOURCES, "lora: no memory for %zu factors", a_count + b_count);
    }
    for (int32_t i = 0; joint && i < l.entry_count; i++)
        l.entries[i].b_offset += a_count;
    double root = l.config.scaling == LORA_SCALE_RANK ? l.config.rank : exact_sqrt((uint32_t)l.config.rank);
    l.scale = (float)(l.config.alpha / root);
    *lora = l;
    return 0;
}

void lora_release(struct lora *lora)
{
    if (!lora)
        return;
    assert(!lora->backend); /* lora_unplace's */
    free(lora->trained);
    free(lora->frozen);
    free(lora->entries);
    memset(lora, 0, sizeof *lora);
}

static const struct lora_entry *find(const struct lora *lora, int32_t layer, enum lora_target target)
{
    assert(layer >= 0 && layer < MODEL_LAYERS_MAX && (unsigned)target < LORA_TARGET_COUNT);
    int32_t i = lora->index[layer][target];
    return i < 0 ? NULL : &lora->entries[i];
}

void lora_exchange(struct lora *lora)
{
    float *trained = lora->trained;
    const size_t count = lora->trained_count;
    assert(lora->config.mode != LORA_JOINT);
    lora->trained = lora->frozen;
    lora->trained_count = lora->frozen_count;
    lora->frozen = trained;
    lora->frozen_count = count;
    lora->config.mode = lora->config.mode == LORA_FFA ? LORA_FFB : LORA_FFA;
}

const float *lora_a(const struct lora *lora, int32_t layer, enum lora_target target)
{
    const struct lora_entry *e = find(lora, layer, target);
    if (!e)
        return NULL;
    return (lora->config.mode == LORA_FFA ? lora->frozen : lora->trained) + e->a_offset;
}

const float *lora_b(const struct lora *lora, int32_t layer, enum lora_target target)
{
    const struct lora_entry *e = find(lora, layer, target);
    if (!e)
        return NULL;
    return (lora->config.mode == LORA_FFB ? lora->frozen : lora->trained) + e->b_offset;
}

/* The next value of a stream of little-endian u32, read in blocks. */
struct u32_stream {
    struct rng rng;
    uint8_t bytes[1024];
    size_t used;
};

static uint32_t stream_next(struct u32_stream *s)
{
    if (s->used == sizeof s->bytes) {
        rng_fill(&s->rng, s->bytes, sizeof s->bytes);
        s->used = 0;
    }
    const uint8_t *p = s->bytes + s->used;
    s->used += 4;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void lora_fill_a(struct lora *lora, struct rng (*stream)(void *ctx, uint32_t layer, enum lora_target target), void *ctx)
{
    float *section = lora->config.mode == LORA_FFA ? lora->frozen : lora->trained;
    for (int32_t i = 0; i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        struct u32_stream s = {.rng = stream(ctx, (uint32_t)e->layer, e->target), .used = sizeof s.bytes};
        const double step = 0x1p-24 / exact_sqrt((uint32_t)e->in);
        float *a = section + e->a_offset;
        for (size_t k = 0; k < (size_t)lora->config.rank * (size_t)e->in; k++) {
            int64_t n = 2 * (int64_t)(stream_next(&s) & 0xffffffu) + 1 - (INT64_C(1) << 24);
            a[k] = (float)((double)n * step);
        }
    }
}

void lora_encode(const struct lora *lora, struct buffer *out)
{
    const struct lora_config *c = &lora->config;
    buffer_u32(out, 1);
    buffer_u32(out, (uint32_t)c->mode);
    buffer_u32(out, (uint32_t)c->scaling);
    buffer_u32(out, (uint32_t)c->rank);
    buffer_f64(out, c->alpha);
    buffer_u32(out, (uint32_t)c->layer_first);
    buffer_u32(out, (uint32_t)c->layer_count);
    buffer_u32(out, c->targets);
    buffer_u32(out, (uint32_t)lora->entry_count);
    for (int32_t i = 0; i < lora->entry_count; i++) {
        const struct lora_entry *e = &lora->entries[i];
        buffer_u32(out, (uint32_t)e->layer);
        buffer_u32(out, (uint32_t)e->target);
        buffer_u32(out, (uint32_t)e->in);
        buffer_u32(out, (uint32_t)e->out);
    }
}
