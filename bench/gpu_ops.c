/* bench_gpu --ops: every operation against its floor. */
#include "bench/gpu.h"
#include "model/layer.h"

#include <stdio.h>
#include <stdlib.h>

/* The matrices of one layer, as a step has them, and what an operation's call needs. */
struct layer_bench {
    struct backend *be;
    const struct model_config *c;
    struct placed_model *placed;
    struct compute compute;
    struct placed_segments segments;
    struct attention_shape shape;
    int32_t m, rank, examples;
    struct rows x, add, xn, dxn, q, k, v, dq, dk, dv, o, do_, gate, up, act, dact, hidden, dhidden;
    float *rstd, *rstd_heads, *lse, *losses, *gradients, *weights;
    int32_t *ints; /* positions, then targets */
    size_t stride;
    int64_t *sum;
    struct lora *lora;
    uint32_t vector;
    int op;
};

enum {
    OP_NORM_F,
    OP_NORM_B,
    OP_HEADS_F,
    OP_HEADS_B,
    OP_ROPE,
    OP_ATTENTION_F,
    OP_ATTENTION_B,
    OP_GATE_F,
    OP_GATE_B,
    OP_QKV_F,
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
    OP_HEAD,
    OP_LORA_LOAD,
    OP_CLIP,
    OP_NOISE,
    OP_ADAMW,
    OP_COUNT
};

static const char *const op_names[OP_COUNT] = {"norm",
                                               "norm backward",
                                               "norms of heads",
                                               "norms of heads backward",
                                               "rope",
                                               "attention",
                                               "attention backward",
                                               "gate",
                                               "gate backward",
                                               "qkv",
                                               "qkv backward",
                                               "o",
                                               "o backward",
                                               "gate, up",
                                               "gate, up backward",
                                               "down",
                                               "down backward",
                                               "qkv gradients",
                                               "o gradients",
                                               "gate, up gradients",
                                               "down gradients",
                                               "embed",
                                               "head and loss",
                                               "load lora (all layers)",
                                               "clip (all parameters)",
                                               "noise (all parameters)",
                                               "adamw (all parameters)"};

static void call_op(void *ctx)
{
    struct layer_bench *b = ctx;
    struct backend *be = b->be;
    const struct model_config *c = b->c;
    static const uint8_t key[32] = {9};
    const struct placed_layer *layer = &b->placed->layers[0];
    const struct rows qkv[3] = {b->q, b->k, b->v}, dqkv[3] = {b->dq, b->dk, b->dv}, up[2] = {b->gate, b->up};
    const int32_t heads = c->head_count * c->head_size, kv = c->kv_head_count * c->head_size;
    const struct placed_labels labels = {b->m, b->ints + b->m, b->weights};
    const struct clip_params clip = {1, 65536};
    const struct adamw_params adamw = {1e-9f, 0.9f, 0.99f, 1e-8f, 0, 5};
    struct gaussian gaussian;
    switch (b->op) {
    case OP_NORM_F:
        be->ops->norm_forward(be, b->m, c->d_model, c->norm_eps, layer->attn_norm, b->x, b->add, b->xn, b->rstd);
        break;
    case OP_NORM_B:
        be->ops->norm_backward(be, b->m, c->d_model, layer->attn_norm, b->x, b->rstd, b->dxn, b->dhidden, true);
        break;
    case OP_HEADS_F:
        be->ops->head_norm_forward(be, b->m, c->head_count, c->head_size, c->norm_eps, layer->q_norm, b->q, b->o,
                                   b->rstd_heads);
        be->ops->head_norm_forward(be, b->m, c->kv_head_count, c->head_size, c->norm_eps, layer->k_norm, b->k, b->do_,
                                   b->rstd_heads);
        break;
    case OP_HEADS_B:
        be->ops->head_norm_backward(be, b->m, c->head_count, c->head_size, layer->q_norm, b->q, b->rstd_heads, b->o,
                                    b->o);
        be->ops->head_norm_backward(be, b->m, c->kv_head_count, c->head_size, layer->k_norm, b->k, b->rstd_heads,
                                    b->do_, b->do_);
        break;
    case OP_ROPE:
        layer_rope(&b->compute, 0, b->m, b->ints, false, b->q, b->k);
        break;
    case OP_ATTENTION_F:
        be->ops->attention_forward(be, &b->shape, &b->segments, b->m, b->q, b->k, b->v, b->o, b->lse);
        break;
    case OP_ATTENTION_B:
        be->ops->attention_backward(be, &b->shape, &b->segments, b->m, b->q, b->k, b->v, b->o, b->lse, b->do_, b->dq,
                                    b->dk, b->dv);
        break;
    case OP_GATE_F:
        be->ops->gated_forward(be, b->m, c->d_ff, c->gate, b->gate, b->up, b->act);
        break;
    case OP_GATE_B:
        be->ops->gated_backward(be, b->m, c->d_ff, c->gate, b->gate, b->up, b->dact);
        break;
    case OP_QKV_F:
        group_forward(&b->compute, 0, GROUP_QKV, b->m, b->xn, qkv, rows_from(be, b->xn, c->d_model));
        break;
    case OP_QKV_B:
        group_backward(&b->compute, 0, GROUP_QKV, b->m, dqkv, rows_from(be, b->dv, kv), true, b->dxn);
        break;
    case OP_O_F:
        group_forward(&b->compute, 0, GROUP_O, b->m, b->o, &b->hidden, rows_from(be, b->o, heads));
        break;
    case OP_O_B:
        group_backward(&b->compute, 0, GROUP_O, b->m, &b->dhidden, rows_from(be, b->dhidden, c->d_model), true, b->do_);
        break;
    case OP_UP_F:
        group_forward(&b->compute, 0, GROUP_GATE_UP, b->m, b->xn, up, rows_from(be, b->xn, c->d_model));
        break;
    case OP_UP_B:
        group_backward(&b->compute, 0, GROUP_GATE_UP, b->m, up, rows_from(be, b->up, c->d_ff), true, b->dxn);
        break;
    case OP_DOWN_F:
        group_forward(&b->compute, 0, GROUP_DOWN, b->m, b->act, &b->hidden, rows_from(be, b->act, c->d_ff));
        break;
    case OP_DOWN_B:
        group_backward(&b->compute, 0, GROUP_DOWN, b->m, &b->dhidden, rows_from(be, b->dhidden, c->d_model), true,
                       b->dact);
        break;
    case OP_QKV_G:
        group_gradients(&b->compute, 0, GROUP_QKV, &b->segments, dqkv, rows_from(be, b->xn, c->d_model),
                        rows_from(be, b->dv, kv), b->xn, b->gradients, b->stride);
        break;
    case OP_O_G:
        group_gradients(&b->compute, 0, GROUP_O, &b->segments, &b->dhidden, rows_from(be, b->o, heads),
                        rows_from(be, b->dhidden, c->d_model), b->o, b->gradients, b->stride);
        break;
    case OP_UP_G:
        group_gradients(&b->compute, 0, GROUP_GATE_UP, &b->segments, up, rows_from(be, b->xn, c->d_model),
                        rows_from(be, b->up, c->d_ff), b->xn, b->gradients, b->stride);
        break;
    case OP_DOWN_G:
        group_gradients(&b->compute, 0, GROUP_DOWN, &b->segments, &b->dhidden, rows_from(be, b->act, c->d_ff),
                        rows_from(be, b->dhidden, c->d_model), b->act, b->gradients, b->stride);
        break;
    case OP_EMBED:
        be->ops->embed(be, b->m, &b->placed->embedding, b->ints, model_embedding_scale(c), b->x);
        break;
    case OP_HEAD:
        be->ops->cross_entropy(be, &b->placed->head, &labels, b->hidden, b->losses, b->dxn);
        break;
    case OP_LORA_LOAD:
        load_lora(&b->compute);
        break;
    case OP_CLIP:
        be->ops->clip_accumulate(be, b->lora->trained_count, b->examples, b->gradients, b->stride, &clip, b->sum, NULL);
        break;
    case OP_NOISE:
        if (gaussian_init(&gaussian, (uint64_t)1 << 32)) {
            be->ops->noise_begin(be, key, b->vector++, &gaussian, b->lora->trained_count);
            be->ops->noise_add(be, b->lora->trained_count, b->sum);
        }
        break;
    case OP_ADAMW:
        be->ops->adamw(be, b->lora->trained_count, &adamw, b->gradients, b->gradients + b->stride,
                       b->gradients + 2 * b->stride, b->lora->trained);
        break;
    default:
        break;
    }
}

/* Floating-point operations and bytes (each input read once, each output written once) of an operation. */
static void op_cost(const struct layer_bench *b, int op, double *flops, double *bytes)
{
    const struct model_config *c = b->c;
    const double m = b->m, d = c->d_model, ff = c->d_ff, heads = c->head_count * c->head_size,
                 kv = c->kv_head_count * c->head_size, r = b->rank, vocabulary = c->vocabulary;
    const double tokens = m / b->examples, p = (double)b->lora->trained_count, e = b->examples;
    const double ins[4] = {d, heads, d, ff}, outs[4] = {heads + 2 * kv, d, 2 * ff, d};
    const double ranks[4] = {3 * r, r, group_size(c, GROUP_GATE_UP) * r, r};
    *flops = 0;
    *bytes = 0;
    switch (op) {
    case OP_NORM_F:
    case OP_NORM_B:
        *bytes = 4 * 2 * m * d;
        return;
    case OP_HEADS_F:
    case OP_HEADS_B:
        *bytes = (op == OP_HEADS_F ? 2 : 3) * 2 * m * (heads + kv) + 4 * m * (heads + kv) / c->head_size;
        return;
    case OP_ROPE:
        *bytes = 2 * 2 * m * (heads + kv) * model_rotated(c) / c->head_size;
        return;
    case OP_ATTENTION_F:
        *flops = 2 * tokens * heads * m;
        *bytes = 2 * m * (2 * heads + 2 * kv);
        return;
    case OP_ATTENTION_B:
        *flops = 2.5 * 2 * tokens * heads * m;
        *bytes = 2 * m * (4 * heads + 4 * kv);
        return;
    case OP_GATE_F:
        *bytes = 2 * m * 3 * ff;
        return;
    case OP_GATE_B:
        *bytes = 2 * m * 5 * ff;
        return;
    case OP_EMBED:
        *bytes = 2 * 2 * m * d;
        return;
    case OP_HEAD:
        *flops = 4 * m * d * vocabulary;
        *bytes = 2 * m * (2 * d + 4 * vocabulary) + 4 * d * vocabulary; /* logits out, read twice, gradient out */
        return;
    case OP_LORA_LOAD:
        *bytes = p * 6;
        return;
    case OP_CLIP:
        *bytes = e * p * 4 * 2 + 16 * p;
        return;
    case OP_NOISE:
        *bytes = 8 * p * 5;
        return;
    case OP_ADAMW:
        *bytes = 4 * p * 7;
        return;
    default:
        break;
    }
    if (op >= OP_QKV_G) {
        const int g = op - OP_QKV_G;
        *flops = 2 * m * (outs[g] + ins[g]) * r;
        *bytes = 2 * m * (outs[g] + ins[g] + 2 * ranks[g]) + 8 * e * r * (outs[g] + ranks[g] / r * ins[g]);
        return;
    }
    const int g = (op - OP_QKV_F) / 2;
    *flops = 2 * m * ins[g] * outs[g] + 2 * m * r * (outs[g] + ranks[g] / r * ins[g]);
    *bytes = 2 * (m * (ins[g] + outs[g]) + ins[g] * outs[g]);
}

static struct rows take_rows(struct backend *be, int32_t m, int32_t width, int32_t ranks)
{
    const int32_t stride = width + backend_lora_columns(ranks);
    struct rows r = {gpu_take(be, (size_t)m * (size_t)stride), stride};
    gpu_fill(be, r.at, (size_t)m * (size_t)stride);
    return r;
}

void gpu_ops(const struct gpu_settings *s, struct backend *be, const struct model *model)
{
    struct lora host, lora;
    struct error err = {0};
    const struct model_config *c = &model->config;
    const int32_t m = s->batch * s->tokens, heads = c->head_count * c->head_size, kv = c->kv_head_count * c->head_size;
    struct placed_model *placed = NULL;
    gpu_place(s, be, model, &placed, &host, &lora);
    const double peak = gpu_peak(s, be), copy = gpu_copy_rate(s, be);
    struct layer_bench b = {.be = be,
                            .c = c,
                            .placed = placed,
                            .shape = model_attention_shape(c),
                            .m = m,
                            .rank = s->rank,
                            .examples = s->batch,
                            .lora = &lora,
                            .sum = gpu_take(be, 4 * lora.trained_count)};
    const struct backend_needs needs = {.rows = m,
                                        .width = layer_width_max(c, 3 * s->rank),
                                        .shape = b.shape,
                                        .segment_rows = s->tokens,
                                        .label_rows = m,
                                        .vocabulary = c->vocabulary,
                                        .d_model = c->d_model,
                                        .arena = lora.trained_count,
                                        .units = s->batch,
                                        .noise = true};
    gpu_check(be->ops->reserve(be, &needs, &err), &err);
    b.compute = (struct compute){.be = be, .placed = placed, .config = c, .lora = &lora, .use = GROUP_TRAIN};
    b.x = take_rows(be, m, c->d_model, 0);
    b.add = take_rows(be, m, c->d_model, 0);
    b.xn = take_rows(be, m, c->d_model, 3 * s->rank);
    b.dxn = take_rows(be, m, c->d_model, 0);
    b.hidden = take_rows(be, m, c->d_model, 0);
    b.dhidden = take_rows(be, m, c->d_model, s->rank);
    b.q = take_rows(be, m, heads + 2 * kv, 0);
    b.k = rows_from(be, b.q, heads);
    b.v = rows_from(be, b.k, kv);
    b.dq = take_rows(be, m, heads + 2 * kv, 3 * s->rank);
    b.dk = rows_from(be, b.dq, heads);
    b.dv = rows_from(be, b.dk, kv);
    b.o = take_rows(be, m, heads, s->rank);
    b.do_ = take_rows(be, m, heads, 0);
    b.gate = take_rows(be, m, 2 * c->d_ff, 2 * s->rank);
    b.up = rows_from(be, b.gate, c->d_ff);
    b.act = take_rows(be, m, c->d_ff, s->rank);
    b.dact = take_rows(be, m, c->d_ff, 0);
    b.rstd = gpu_take(be, 2 * (size_t)m);
    b.rstd_heads = gpu_take(be, 2 * (size_t)m * (size_t)c->head_count);
    b.losses = gpu_take(be, 2 * (size_t)m);
    b.weights = gpu_take(be, 2 * (size_t)m);
    b.lse = gpu_take(be, 2 * (size_t)m * (size_t)c->head_count);
    b.ints = gpu_take(be, 4 * (size_t)m);
    b.stride = (lora.trained_count + 63) / 64 * 64;
    b.gradients = gpu_take(be, 2 * b.stride * (size_t)(s->batch > 3 ? s->batch : 3));
    int32_t *ints = malloc(2 * (size_t)m * sizeof *ints), *offsets = malloc(((size_t)s->batch + 1) * sizeof *offsets);
    if (!ints || !offsets)
        abort();
    gpu_check(place_rope_table(&b.compute, model, s->tokens, gpu_take(be, 2 * rope_table_floats(c, s->tokens)), &err),
              &err);
    for (int32_t i = 0; i < m; i++) {
        ints[i] = i % s->tokens;
        ints[m + i] = i % c->vocabulary;
    }
    for (int32_t e = 0; e <= s->batch; e++)
        offsets[e] = e * s->tokens;
    be->ops->upload(be, b.ints, ints, 2 * (size_t)m * sizeof *ints);
    gpu_check(be->ops->segments_new(be, m, s->batch, &b.segments, &err), &err);
    be->ops->segments_set(be, &b.segments, s->batch, offsets);
    if (s->json)
        printf("{\"program\":\"bench_gpu\",\"kind\":\"ops\",\"shape\":\"%s\",\"batch\":%d,\"tokens\":%d,\"ops\":[",
               s->shape->name, s->batch, s->tokens);
    else
        printf("%-24s %10s %10s %8s %10s %10s   (ceilings %.0f TFLOP/s, %.2f TB/s)\n", s->shape->name, "floor us", "us",
               "of floor", "TFLOP/s", "GB/s", peak / 1e12, copy / 1e12);
    load_lora(&b.compute);
    for (b.op = 0; b.op < OP_COUNT; b.op++) {
        double flops, bytes;
        if (!c->qk_norm && (b.op == OP_HEADS_F || b.op == OP_HEADS_B))
            continue;
        op_cost(&b, b.op, &flops, &bytes);
        const double floor = flops / peak > bytes / copy ? flops / peak : bytes / copy;
        const double seconds = gpu_time(s, be, 5, call_op, &b);
        if (s->json)
            printf("%s{\"name\":\"%s\",\"floor_us\":%.2f,\"measured_us\":%.2f,\"flops\":%.4e,\"bytes\":%.4e}",
                   b.op ? "," : "", op_names[b.op], 1e6 * floor, 1e6 * seconds, flops, bytes);
        else
            printf("%-24s %10.1f %10.1f %8.2f %10.1f %10.1f\n", op_names[b.op], 1e6 * floor, 1e6 * seconds,
                   floor / seconds, flops / seconds / 1e12, bytes / seconds / 1e9);
    }
    if (s->json)
        printf("]}\n");
    exit(0); /* the process's end releases the card's memory */
}
