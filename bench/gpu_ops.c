/*
 * bench_gpu --ops: every operation against its floor.
 *
 * An operation is a row of the table `operations`: its name, what runs it and what must be there for it. Its cost is
 * op_cost's to say, from the sizes alone. Those of a step run over `m` rows of the first layer, those of answering over
 * one token, many layers in one recorded pass, as a token is answered: no layer's weights, keys or values then stay in
 * the card's cache until their turn comes again.
 */
#include "bench/gpu.h"
#include "bench/gpu_kernels.h"
#include "model/layer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    OP_NORM_F,
    OP_NORM_B,
    OP_HEADS_F,
    OP_HEADS_B,
    OP_BIAS,
    OP_ROPE,
    OP_ATTENTION_F,
    OP_ATTENTION_B,
    OP_GATE_F,
    OP_GATE_B,
    OP_QKV_F, /* forward, backward of each enum group, then the gradients of each */
    OP_QKV_B,
    OP_O_F,
    OP_O_B,
    OP_UP_F,
    OP_UP_B,
    OP_DOWN_F,
    OP_DOWN_B,
    OP_QKV_G,
    OP_O_G,
    OP_UP_G,
    OP_DOWN_G,
    OP_EMBED,
    OP_GATHER,
    OP_HEAD,
    OP_LORA_LOAD,
    OP_CLIP,
    OP_NOISE,
    OP_ADAMW,
    OP_DEQUANTISE,
    OP_DECODE_LINEAR,
    OP_DECODE_STORE,
    OP_DECODE_ATTENTION,
    OP_LIKELIEST,
    OP_COUNT
};

/* What an operation's cost depends on. */
struct sizes {
    const struct model_config *c;
    int32_t m, rank, examples, context;
    bool quantised;    /* the base is Q4_1, embedding and head Q8_0 */
    bool kept;         /* and decoded at each use */
    bool quantised_kv; /* keys and values are 8 bits, with a scale a head */
};

/* Rows that a group of linears goes over. h and dh: LoRA's columns behind x and the last dy. */
struct group_rows {
    struct rows x, y[BACKEND_GROUP_MAX], h, dy[BACKEND_GROUP_MAX], dh, dx;
};

/* The matrices of one layer, as a step has them, and what an operation's call needs. */
struct layer_bench {
    struct sizes sizes;
    struct backend *be;
    struct placed_model *placed;
    struct compute compute, serving;
    struct placed_segments segments;
    struct attention_shape shape;
    struct rows x, add, xn, dxn, q, k, v, o, do_, dq, dk, dv, gate, up, act, dact, hidden, dhidden;
    struct group_rows groups[GROUP_COUNT];
    float *rstd, *rstd_heads, *lse, *losses, *gradients, *weights;
    int32_t *positions, *targets, *label_rows;
    size_t stride;
    int64_t *sum;
    struct lora *lora;
    uint32_t vector;
    void *blocks[GROUP_COUNT][BACKEND_GROUP_MAX]; /* quantised */
    struct rows decoded;
    struct graph_cache *graphs;
    int32_t kv_layers;
    int op;
};

static int32_t q_width(const struct model_config *c)
{
    return c->head_count * c->head_size;
}

static int32_t kv_width(const struct model_config *c)
{
    return c->kv_head_count * c->head_size;
}

/* --- the calls --------------------------------------------------------------------------------------------------- */

static void call_rows(void *ctx)
{
    const struct layer_bench *b = ctx;
    struct backend *be = b->be;
    const struct model_config *c = b->sizes.c;
    const struct placed_layer *layer = &b->placed->layers[0];
    const struct linear_group *qkv = &layer->groups[GROUP_QKV];
    const int32_t m = b->sizes.m;
    switch (b->op) {
    case OP_NORM_F:
        be->ops->norm_forward(be, m, c->d_model, c->norm_eps, layer->attn_norm, b->x, b->add, b->xn, b->rstd);
        break;
    case OP_NORM_B:
        be->ops->norm_backward(be, m, c->d_model, layer->attn_norm, b->x, b->rstd, b->dxn, b->dhidden, true);
        break;
    case OP_HEADS_F:
        be->ops->head_norm_forward(be, m, c->head_count, c->head_size, c->norm_eps, layer->q_norm, b->q, b->o,
                                   b->rstd_heads);
        be->ops->head_norm_forward(be, m, c->kv_head_count, c->head_size, c->norm_eps, layer->k_norm, b->k, b->do_,
                                   b->rstd_heads);
        break;
    case OP_HEADS_B:
        be->ops->head_norm_backward(be, m, c->head_count, c->head_size, layer->q_norm, b->q, b->rstd_heads, b->o, b->o);
        be->ops->head_norm_backward(be, m, c->kv_head_count, c->head_size, layer->k_norm, b->k, b->rstd_heads, b->do_,
                                    b->do_);
        break;
    case OP_BIAS:
        for (int32_t i = 0; i < qkv->count; i++)
            gpu_add_bias(be, m, qkv->out[i], qkv->bias[i], b->groups[GROUP_QKV].y[i]);
        break;
    case OP_ROPE:
        layer_rope(&b->compute, 0, m, b->positions, false, b->q, b->k);
        break;
    case OP_ATTENTION_F:
        be->ops->attention_forward(be, &b->shape, &b->segments, m, b->q, b->k, b->v, b->o, b->lse);
        break;
    case OP_ATTENTION_B:
        be->ops->attention_backward(be, &b->shape, &b->segments, m, b->q, b->k, b->v, b->o, b->lse, b->do_, b->dq,
                                    b->dk, b->dv);
        break;
    case OP_GATE_F:
        be->ops->gated_forward(be, m, c->d_ff, c->gate, b->gate, b->up, b->act);
        break;
    case OP_GATE_B:
        be->ops->gated_backward(be, m, c->d_ff, c->gate, b->gate, b->up, b->dact);
        break;
    case OP_EMBED:
        be->ops->embed(be, m, &b->placed->embedding, b->positions, model_embedding_scale(c), b->x);
        break;
    case OP_GATHER:
        be->ops->gather(be, m, q_width(c), b->label_rows, b->o, b->do_);
        be->ops->gather(be, m, c->d_model, b->label_rows, b->x, b->dxn);
        break;
    default:
        break;
    }
}

static void call_group(void *ctx)
{
    const struct layer_bench *b = ctx;
    const bool gradients = b->op >= OP_QKV_G;
    const enum group group = (enum group)(gradients ? b->op - OP_QKV_G : (b->op - OP_QKV_F) / 2);
    const struct group_rows *r = &b->groups[group];
    if (gradients)
        group_gradients(&b->compute, 0, group, &b->segments, r->dy, r->h, r->dh, r->x, b->gradients, b->stride);
    else if ((b->op - OP_QKV_F) % 2 == 0)
        group_forward(&b->compute, 0, group, b->sizes.m, r->x, r->y, r->h);
    else
        group_backward(&b->compute, 0, group, b->sizes.m, r->dy, r->dh, true, r->dx);
}

static void dequantise_layer(const struct layer_bench *b)
{
    for (int g = 0; g < GROUP_COUNT; g++) {
        const struct linear_group *group = &b->placed->layers[0].groups[g];
        struct rows to = {b->decoded.at, group->in};
        for (int32_t i = 0; i < group->count; i++) {
            gpu_dequantise(b->be, &group->w[i], b->blocks[g][i], to);
            to = rows_from(b->be, to, group->out[i] * group->in);
        }
    }
}

static void call_whole(void *ctx)
{
    struct layer_bench *b = ctx;
    struct backend *be = b->be;
    static const uint8_t key[32] = {9};
    const size_t n = b->lora->trained_count;
    const struct placed_labels labels = {b->sizes.m, b->targets, b->weights};
    const struct clip_params clip = {1, 65536};
    const struct adamw_params adamw = {1e-9f, 0.9f, 0.99f, 1e-8f, 0, 5};
    struct gaussian gaussian;
    int32_t id;
    switch (b->op) {
    case OP_HEAD:
        be->ops->cross_entropy(be, &b->placed->head, &labels, b->hidden, b->losses, b->dxn);
        break;
    case OP_LORA_LOAD:
        load_lora(&b->compute);
        break;
    case OP_CLIP:
        be->ops->clip_accumulate(be, n, b->sizes.examples, b->gradients, b->stride, &clip, b->sum, NULL);
        break;
    case OP_NOISE:
        if (gaussian_init(&gaussian, (uint64_t)1 << 32)) {
            be->ops->noise_begin(be, key, b->vector++, &gaussian, n);
            be->ops->noise_add(be, n, b->sum);
        }
        break;
    case OP_ADAMW:
        be->ops->adamw(be, n, &adamw, b->gradients, b->gradients + b->stride, b->gradients + 2 * b->stride,
                       b->lora->trained);
        break;
    case OP_DEQUANTISE:
        dequantise_layer(b);
        break;
    case OP_LIKELIEST:
        be->ops->likeliest(be, &b->placed->head, 1, b->hidden, &id);
        break;
    default:
        break;
    }
}

/* Layers that one call of an operation goes through. */
static int32_t layers_a_call(const struct layer_bench *b, int op)
{
    if (op == OP_DECODE_LINEAR)
        return b->sizes.c->layer_count;
    return op == OP_DECODE_STORE || op == OP_DECODE_ATTENTION ? b->kv_layers : 1;
}

static void record_answering(void *ctx)
{
    const struct layer_bench *b = ctx;
    const struct rows none = {NULL, 0};
    for (int32_t layer = 0; layer < layers_a_call(b, b->op); layer++) {
        if (b->op != OP_DECODE_LINEAR)
            b->be->ops->attend(b->be, &b->shape, layer, b->op == OP_DECODE_STORE ? none : b->q, b->k, b->v, b->o);
        for (int g = 0; b->op == OP_DECODE_LINEAR && g < GROUP_COUNT; g++)
            group_forward(&b->serving, layer, (enum group)g, 1, b->groups[g].x, b->groups[g].y, none);
    }
}

static void call_answering(void *ctx)
{
    struct layer_bench *b = ctx;
    const uint64_t key[4] = {(uint64_t)b->op};
    b->be->ops->run_recorded(b->be, b->graphs, key, record_answering, b);
}

static bool has_head_norms(const struct sizes *z)
{
    return z->c->qk_norm;
}

static bool has_biases(const struct sizes *z)
{
    return z->c->qkv_bias;
}

static bool has_blocks(const struct sizes *z)
{
    return z->quantised;
}

static const struct operation {
    const char *name;
    void (*call)(void *ctx);
    bool (*is_there)(const struct sizes *z); /* NULL: always */
} operations[OP_COUNT] = {
    [OP_NORM_F] = {"norm", call_rows, NULL},
    [OP_NORM_B] = {"norm backward", call_rows, NULL},
    [OP_HEADS_F] = {"norms of heads", call_rows, has_head_norms},
    [OP_HEADS_B] = {"norms of heads backward", call_rows, has_head_norms},
    [OP_BIAS] = {"bias of q, k, v", call_rows, has_biases},
    [OP_ROPE] = {"rope", call_rows, NULL},
    [OP_ATTENTION_F] = {"attention", call_rows, NULL},
    [OP_ATTENTION_B] = {"attention backward", call_rows, NULL},
    [OP_GATE_F] = {"gate", call_rows, NULL},
    [OP_GATE_B] = {"gate backward", call_rows, NULL},
    [OP_QKV_F] = {"qkv", call_group, NULL},
    [OP_QKV_B] = {"qkv backward", call_group, NULL},
    [OP_O_F] = {"o", call_group, NULL},
    [OP_O_B] = {"o backward", call_group, NULL},
    [OP_UP_F] = {"gate, up", call_group, NULL},
    [OP_UP_B] = {"gate, up backward", call_group, NULL},
    [OP_DOWN_F] = {"down", call_group, NULL},
    [OP_DOWN_B] = {"down backward", call_group, NULL},
    [OP_QKV_G] = {"qkv gradients", call_group, NULL},
    [OP_O_G] = {"o gradients", call_group, NULL},
    [OP_UP_G] = {"gate, up gradients", call_group, NULL},
    [OP_DOWN_G] = {"down gradients", call_group, NULL},
    [OP_EMBED] = {"embed", call_rows, NULL},
    [OP_GATHER] = {"gather label rows", call_rows, NULL},
    [OP_HEAD] = {"head and loss", call_whole, NULL},
    [OP_LORA_LOAD] = {"load lora (all layers)", call_whole, NULL},
    [OP_CLIP] = {"clip (all parameters)", call_whole, NULL},
    [OP_NOISE] = {"noise (all parameters)", call_whole, NULL},
    [OP_ADAMW] = {"adamw (all parameters)", call_whole, NULL},
    [OP_DEQUANTISE] = {"dequantise (a layer)", call_whole, has_blocks},
    [OP_DECODE_LINEAR] = {"decode linear (a layer)", call_answering, NULL},
    [OP_DECODE_STORE] = {"decode store", call_answering, NULL},
    [OP_DECODE_ATTENTION] = {"decode store, attention", call_answering, NULL},
    [OP_LIKELIEST] = {"likeliest token", call_whole, NULL},
};

/* --- floors ------------------------------------------------------------------------------------------------------ */

static double value_bytes(enum tensor_type type)
{
    return type == TENSOR_BF16 ? 2 : (double)tensor_type_block_bytes(type) / 32;
}

/* LoRA of the rank on all linears of all layers, A and B. */
static double lora_parameters(const struct sizes *z)
{
    double a_layer = 0;
    for (int target = 0; target < LORA_TARGET_COUNT; target++) {
        int32_t in, out;
        lora_target_shape(z->c, (enum lora_target)target, &in, &out);
        if (target != LORA_GATE || !z->c->fused_gate_up)
            a_layer += in + out;
    }
    return a_layer * z->rank * z->c->layer_count;
}

static double layer_weights(const struct model_config *c)
{
    return (double)c->d_model * (2.0 * q_width(c) + 2.0 * kv_width(c) + 3.0 * c->d_ff);
}

static void group_cost(const struct sizes *z, int op, double *flops, double *bytes)
{
    const struct model_config *c = z->c;
    const bool gradients = op >= OP_QKV_G;
    const int g = gradients ? op - OP_QKV_G : (op - OP_QKV_F) / 2;
    const double m = z->m, d = c->d_model, ff = c->d_ff, heads = q_width(c), kv = kv_width(c), r = z->rank;
    const double ins[4] = {d, heads, d, ff}, outs[4] = {heads + 2 * kv, d, 2 * ff, d};
    const double ranks[4] = {3 * r, r, group_size(c, GROUP_GATE_UP) * r, r};
    if (gradients) {
        *flops = 2 * m * (outs[g] + ins[g]) * r;
        *bytes = 2 * m * (outs[g] + ins[g] + 2 * ranks[g]) + 8 * z->examples * r * (outs[g] + ranks[g] / r * ins[g]);
        return;
    }
    *flops = 2 * m * ins[g] * outs[g] + 2 * m * r * (outs[g] + ranks[g] / r * ins[g]);
    *bytes = 2 * (m * (ins[g] + outs[g]) + ins[g] * outs[g]);
}

/* Of one token; attend() stores its keys and values before it attends to all of them. */
static void answering_cost(const struct sizes *z, int op, double *flops, double *bytes)
{
    const struct model_config *c = z->c;
    const double d = c->d_model, ff = c->d_ff, heads = q_width(c), kv = kv_width(c), vocabulary = c->vocabulary;
    const double layer = layer_weights(c), length = z->context + 1.0;
    const double a_kv_value = z->quantised_kv ? 1 + 4.0 / c->head_size : 2;
    switch (op) {
    case OP_DECODE_LINEAR:
        *flops = 2 * layer;
        *bytes = layer * value_bytes(z->kept ? TENSOR_Q4_1 : TENSOR_BF16) + 2 * (4 * d + 2 * heads + 2 * kv + 3 * ff);
        break;
    case OP_DECODE_STORE:
        *bytes = 2 * kv * (2 + a_kv_value);
        break;
    case OP_DECODE_ATTENTION:
        *flops = 4 * length * heads;
        *bytes = 2 * kv * (2 + a_kv_value) + 2 * kv * length * a_kv_value + 2 * 2 * heads;
        break;
    default: /* logits out and read */
        *flops = 2 * d * vocabulary;
        *bytes = vocabulary * (d * value_bytes(z->kept ? TENSOR_Q8_0 : TENSOR_BF16) + 2 * 4) + 2 * d;
        break;
    }
}

/* Floating-point operations and bytes (each input read once, each output written once) of an operation. */
static void op_cost(const struct sizes *z, int op, double *flops, double *bytes)
{
    const struct model_config *c = z->c;
    const double m = z->m, d = c->d_model, ff = c->d_ff, heads = q_width(c), kv = kv_width(c),
                 vocabulary = c->vocabulary;
    const double tokens = m / z->examples, p = lora_parameters(z), e = z->examples;
    *flops = 0;
    *bytes = 0;
    if (op >= OP_QKV_F && op <= OP_DOWN_G) {
        group_cost(z, op, flops, bytes);
        return;
    }
    switch (op) {
    case OP_NORM_F:
    case OP_NORM_B:
        *bytes = 4 * 2 * m * d;
        break;
    case OP_HEADS_F:
    case OP_HEADS_B:
        *bytes = (op == OP_HEADS_F ? 2 : 3) * 2 * m * (heads + kv) + 4 * m * (heads + kv) / c->head_size;
        break;
    case OP_BIAS:
        *bytes = (2 * 2 * m + 4) * (heads + 2 * kv);
        break;
    case OP_ROPE:
        *bytes = 2 * 2 * m * (heads + kv) * model_rotated(c) / c->head_size;
        break;
    case OP_ATTENTION_F:
        *flops = 2 * tokens * heads * m;
        *bytes = 2 * m * (2 * heads + 2 * kv);
        break;
    case OP_ATTENTION_B:
        *flops = 2.5 * 2 * tokens * heads * m;
        *bytes = 2 * m * (4 * heads + 4 * kv);
        break;
    case OP_GATE_F:
        *bytes = 2 * m * 3 * ff;
        break;
    case OP_GATE_B:
        *bytes = 2 * m * 5 * ff;
        break;
    case OP_EMBED:
        *bytes = 2 * 2 * m * d;
        break;
    case OP_GATHER:
        *bytes = 2 * m * (2 * (heads + d) + 4);
        break;
    case OP_HEAD:
        *flops = 4 * m * d * vocabulary;
        *bytes = 2 * m * (2 * d + 4 * vocabulary) + 4 * d * vocabulary; /* logits out, read twice, gradient out */
        break;
    case OP_LORA_LOAD:
        *bytes = p * 6;
        break;
    case OP_CLIP:
        *bytes = e * p * 4 * 2 + 16 * p;
        break;
    case OP_NOISE:
        *bytes = 8 * p * 5;
        break;
    case OP_ADAMW:
        *bytes = 4 * p * 7;
        break;
    case OP_DEQUANTISE:
        *bytes = layer_weights(c) * (value_bytes(TENSOR_Q4_1) + 2);
        break;
    default:
        answering_cost(z, op, flops, bytes);
        break;
    }
}

/* --- setting up -------------------------------------------------------------------------------------------------- */

static struct sizes sizes_of(const struct gpu_settings *s)
{
    const bool quantised = strcmp(s->base, "q4_1") == 0;
    return (struct sizes){.c = &s->shape->config,
                          .m = s->batch * s->tokens,
                          .rank = s->rank,
                          .examples = s->batch,
                          .context = s->context,
                          .quantised = quantised,
                          .kept = quantised && s->keep_quantised,
                          .quantised_kv = s->quantise_kv};
}

static void reserve(const struct layer_bench *b)
{
    const struct sizes *z = &b->sizes;
    struct error err = {0};
    const struct backend_needs step = {.rows = z->m,
                                       .width = layer_width_max(z->c, 3 * z->rank),
                                       .shape = b->shape,
                                       .segment_rows = z->m / z->examples,
                                       .label_rows = z->m,
                                       .vocabulary = z->c->vocabulary,
                                       .d_model = z->c->d_model,
                                       .arena = b->lora->trained_count,
                                       .units = z->examples,
                                       .noise = true};
    const struct backend_needs answering = {.rows = 1,
                                            .width = layer_width_max(z->c, 0),
                                            .shape = b->shape,
                                            .decode_length = z->context + 1,
                                            .vocabulary = z->c->vocabulary,
                                            .d_model = z->c->d_model};
    gpu_check(b->be->ops->reserve(b->be, &step, &err), &err);
    gpu_check(b->be->ops->reserve(b->be, &answering, &err), &err);
}

static struct rows take_rows(struct backend *be, int32_t m, int32_t width, int32_t ranks)
{
    const int32_t stride = width + backend_lora_columns(ranks);
    struct rows r = {gpu_take(be, (size_t)m * (size_t)stride), stride};
    gpu_fill(be, r.at, (size_t)m * (size_t)stride);
    return r;
}

static void place_rows(struct layer_bench *b)
{
    struct backend *be = b->be;
    const struct model_config *c = b->sizes.c;
    const int32_t m = b->sizes.m, rank = b->sizes.rank, d = c->d_model, heads = q_width(c), kv = kv_width(c);
    b->x = take_rows(be, m, d, 0);
    b->add = take_rows(be, m, d, 0);
    b->xn = take_rows(be, m, d, 3 * rank);
    b->dxn = take_rows(be, m, d, 0);
    b->hidden = take_rows(be, m, d, 0);
    b->dhidden = take_rows(be, m, d, rank);
    b->q = take_rows(be, m, heads + 2 * kv, 0);
    b->k = rows_from(be, b->q, heads);
    b->v = rows_from(be, b->k, kv);
    b->dq = take_rows(be, m, heads + 2 * kv, 3 * rank);
    b->dk = rows_from(be, b->dq, heads);
    b->dv = rows_from(be, b->dk, kv);
    b->o = take_rows(be, m, heads, rank);
    b->do_ = take_rows(be, m, heads, 0);
    b->gate = take_rows(be, m, 2 * c->d_ff, 2 * rank);
    b->up = rows_from(be, b->gate, c->d_ff);
    b->act = take_rows(be, m, c->d_ff, rank);
    b->dact = take_rows(be, m, c->d_ff, 0);
    const struct rows xn_h = rows_from(be, b->xn, d), dhidden_h = rows_from(be, b->dhidden, d);
    b->groups[GROUP_QKV] =
        (struct group_rows){b->xn, {b->q, b->k, b->v}, xn_h, {b->dq, b->dk, b->dv}, rows_from(be, b->dv, kv), b->dxn};
    b->groups[GROUP_O] =
        (struct group_rows){b->o, {b->hidden}, rows_from(be, b->o, heads), {b->dhidden}, dhidden_h, b->do_};
    b->groups[GROUP_GATE_UP] =
        (struct group_rows){b->xn, {b->gate, b->up}, xn_h, {b->gate, b->up}, rows_from(be, b->up, c->d_ff), b->dxn};
    b->groups[GROUP_DOWN] =
        (struct group_rows){b->act, {b->hidden}, rows_from(be, b->act, c->d_ff), {b->dhidden}, dhidden_h, b->dact};
}

static float *take_floats(struct backend *be, size_t floats)
{
    return gpu_take(be, 2 * floats);
}

static void place_arrays(struct layer_bench *b)
{
    struct backend *be = b->be;
    const struct sizes *z = &b->sizes;
    const size_t m = (size_t)z->m, heads = (size_t)z->c->head_count;
    const int32_t tokens = z->m / z->examples;
    b->rstd = take_floats(be, m);
    b->rstd_heads = take_floats(be, m * heads);
    b->losses = take_floats(be, m);
    b->weights = take_floats(be, m);
    b->lse = take_floats(be, m * heads);
    b->stride = (b->lora->trained_count + 63) / 64 * 64;
    b->gradients = take_floats(be, b->stride * (size_t)(z->examples > 3 ? z->examples : 3));
    b->sum = gpu_take(be, 4 * b->lora->trained_count);
    int32_t *ints = malloc(3 * m * sizeof *ints);
    if (!ints)
        abort();
    b->positions = gpu_take(be, 2 * 3 * m);
    b->targets = b->positions + m;
    b->label_rows = b->targets + m;
    for (int32_t i = 0; i < z->m; i++) {
        ints[i] = i % tokens;
        ints[z->m + i] = i % z->c->vocabulary;
        ints[2 * z->m + i] = i;
    }
    be->ops->upload(be, b->positions, ints, 3 * m * sizeof *ints);
    free(ints);
}

/* Offsets: the segments', which stay with them. */
static void place_sequences(struct layer_bench *b, const struct model *model, int32_t *offsets)
{
    struct backend *be = b->be;
    struct error err = {0};
    const int32_t tokens = b->sizes.m / b->sizes.examples;
    gpu_check(
        place_rope_table(&b->compute, model, tokens, take_floats(be, rope_table_floats(b->sizes.c, tokens)), &err),
        &err);
    for (int32_t e = 0; e <= b->sizes.examples; e++)
        offsets[e] = e * tokens;
    gpu_check(be->ops->segments_new(be, b->sizes.m, b->sizes.examples, &b->segments, &err), &err);
    be->ops->segments_set(be, &b->segments, b->sizes.examples, offsets);
}

/* The first layer's matrices as the file has them: where dense copies are kept the backend gives these back. */
static void place_blocks(struct layer_bench *b)
{
    size_t widest = 0;
    for (int g = 0; g < GROUP_COUNT; g++) {
        const struct linear_group *group = &b->placed->layers[0].groups[g];
        size_t values = 0;
        for (int32_t i = 0; i < group->count; i++) {
            const struct tensor *w = &group->w[i];
            const size_t bytes = (size_t)w->out * (size_t)(w->in / 32) * tensor_type_block_bytes(w->type);
            b->blocks[g][i] = gpu_take(b->be, (bytes + 1) / 2);
            b->be->ops->upload(b->be, b->blocks[g][i], w->data, bytes);
            values += (size_t)w->out * (size_t)w->in;
        }
        widest = values > widest ? values : widest;
    }
    b->decoded.at = gpu_take(b->be, widest);
}

/* Keys and values of more layers than a card's cache holds. What they are costs nothing: they stay zero. */
#define KV_BYTES ((size_t)256 << 20)
#define KV_LAYERS_MAX 1024 /* kernels in a recorded pass */

static void place_answering(struct layer_bench *b, bool brief)
{
    struct backend *be = b->be;
    struct error err = {0};
    struct kv *kv = NULL;
    const struct model_config *c = b->sizes.c;
    const int32_t length = b->sizes.context + 1;
    const size_t layer = 2 * (size_t)length * (size_t)kv_width(c) * (b->sizes.quantised_kv ? 1 : 2);
    const size_t wanted = brief ? 1 : KV_BYTES / layer + 1;
    b->kv_layers = wanted > KV_LAYERS_MAX ? KV_LAYERS_MAX : (int32_t)wanted;
    b->serving = b->compute;
    b->serving.use = GROUP_SERVE;
    b->serving.lora = NULL;
    b->graphs = be->ops->graph_cache_new(be);
    gpu_check(be->ops->kv_new(be, b->kv_layers, c->kv_head_count, c->head_size, length, &kv, &err), &err);
    be->ops->pieces_set(be, &(struct kv_piece){kv, b->sizes.context, 1, 0}, 1);
}

/* --- measuring --------------------------------------------------------------------------------------------------- */

static bool is_there(const struct sizes *z, int op)
{
    return !operations[op].is_there || operations[op].is_there(z);
}

static void print_head(const struct gpu_settings *s, const char *kind, const struct gpu_ceilings *top)
{
    if (s->json)
        printf("{\"program\":\"bench_gpu\",\"kind\":\"%s\",\"shape\":\"%s\",\"batch\":%d,\"tokens\":%d,"
               "\"base\":\"%s%s\",\"context\":%d,\"ops\":[",
               kind, s->shape->name, s->batch, s->tokens, s->base, s->keep_quantised ? " kept" : "", s->context);
    else if (s->floors)
        printf("%-24s %12s   (ceilings %.0f TFLOP/s, %.2f TB/s)\n", s->shape->name, "floor us", top->flops / 1e12,
               top->bytes / 1e12);
    else
        printf("%-24s %10s %10s %8s %10s %10s   (ceilings %.0f TFLOP/s, %.2f TB/s)\n", s->shape->name, "floor us", "us",
               "of floor", "TFLOP/s", "GB/s", top->flops / 1e12, top->bytes / 1e12);
}

/* Seconds of 0: nothing was measured. */
static void print_operation(const struct gpu_settings *s, const struct sizes *z, const struct gpu_ceilings *top, int op,
                            double seconds)
{
    double flops, bytes;
    op_cost(z, op, &flops, &bytes);
    const double floor = flops / top->flops > bytes / top->bytes ? flops / top->flops : bytes / top->bytes;
    if (s->json) {
        printf("%s{\"name\":\"%s\",\"floor_us\":%.4f,\"flops\":%.4e,\"bytes\":%.4e", op ? "," : "", operations[op].name,
               1e6 * floor, flops, bytes);
        if (seconds > 0)
            printf(",\"measured_us\":%.3f", 1e6 * seconds);
        printf("}");
    } else if (seconds > 0) {
        printf("%-24s %10.2f %10.2f %8.2f %10.1f %10.1f\n", operations[op].name, 1e6 * floor, 1e6 * seconds,
               floor / seconds, flops / seconds / 1e12, bytes / seconds / 1e9);
    } else {
        printf("%-24s %12.4f\n", operations[op].name, 1e6 * floor);
    }
}

static void print_end(const struct gpu_settings *s)
{
    if (s->json)
        printf("]}\n");
}

void gpu_floors(const struct gpu_settings *s)
{
    const struct sizes z = sizes_of(s);
    print_head(s, "floors", &s->given);
    for (int op = 0; op < OP_COUNT; op++)
        if (is_there(&z, op))
            print_operation(s, &z, &s->given, op, 0);
    print_end(s);
}

void gpu_ops(const struct gpu_settings *s, struct backend *be, const struct model *model)
{
    struct lora host, lora;
    int32_t *offsets = malloc(((size_t)s->batch + 1) * sizeof *offsets);
    if (!offsets)
        abort();
    struct layer_bench b = {
        .sizes = sizes_of(s), .be = be, .shape = model_attention_shape(&model->config), .lora = &lora};
    gpu_place(s, be, model, &b.placed, &host, &lora);
    assert(lora_parameters(&b.sizes) == (double)lora.trained_count);
    b.compute =
        (struct compute){.be = be, .placed = b.placed, .config = &model->config, .lora = &lora, .use = GROUP_TRAIN};
    const struct gpu_ceilings top = {gpu_peak(s, be), gpu_copy_rate(s, be)};
    reserve(&b);
    place_rows(&b);
    place_arrays(&b);
    place_sequences(&b, model, offsets);
    if (b.sizes.quantised)
        place_blocks(&b);
    place_answering(&b, s->brief);
    load_lora(&b.compute);
    print_head(s, "ops", &top);
    for (b.op = 0; b.op < OP_COUNT; b.op++)
        if (is_there(&b.sizes, b.op))
            print_operation(s, &b.sizes, &top, b.op,
                            gpu_time(s, be, 5, operations[b.op].call, &b) / layers_a_call(&b, b.op));
    print_end(s);
    exit(0); /* the process's end releases the card's memory */
}
