/* Internal to model/: the state of a training step. See train.h. */
#ifndef MODEL_TRAIN_INTERNAL_H
#define MODEL_TRAIN_INTERNAL_H

#include "base/arena.h"
#include "model/layer.h"
#include "model/train.h"

/* What the backward pass of one layer needs. M is the batch's rows; in the top layer all behind the attention has only
 * the label rows ("inner" rows below), R of them: no other row's output is ever looked at. */
struct activations {
    float *x;              /* (M, d) the layer's input: the residual stream */
    float *rstd1;          /* (M) */
    float *q;              /* (M, heads·size) rotated */
    float *k, *v;          /* (M, kv·size), k rotated */
    float *o;              /* (M, heads·size) attention's output */
    float *lse;            /* (M, heads) */
    float *mid;            /* (R, d) the residual stream after the attention block */
    float *rstd2;          /* (R) */
    float *gate;           /* (R, ff); the backward pass turns it into its gradient in place */
    float *up;             /* (R, ff); likewise */
    float *h[GROUP_COUNT]; /* x·Aᵀ of each group; NULL if the layer adapts none of it */
};

struct train {
    struct train_options options;
    struct compute compute;
    struct lora_config lora_config; /* the shape it was made for */
    int32_t lowest;                 /* lowest adapted layer */
    enum group lowest_group;        /* and its first adapted group */
    size_t gradient_stride;         /* floats between examples' gradients */
    struct arena arena;
    size_t bytes; /* of the arena */

    struct activations *layers; /* (layer_count - lowest + 1): [0] is shared by the layers below `lowest` */
    float *rope_table;
    float *xn;      /* (M, d) normalised input */
    float *act;     /* (M, ff) */
    float *hidden;  /* (M, d) final hidden rows of the inner rows */
    float *compact; /* (M, max(d, heads·size)) gathered rows */
    float *compact_x;
    float *rstd_final; /* (M) */
    float *last;       /* (M, d) the residual stream above the top layer */
    float *dx;         /* (M, d) gradient of the residual stream */
    float *dxn;        /* (M, d) */
    float *dact;       /* (M, ff) */
    float *dq, *dk, *dv, *do_;
    float *dh;                 /* (M, 3·rank) */
    float *label_losses;       /* (M) */
    int32_t *identity;         /* (M) 0, 1, 2 … */
    double *losses;            /* (examples) */
    float *gradients;          /* (examples or 1, gradient_stride) */
    uint8_t *gradient_scratch; /* one piece per thread */
    size_t gradient_scratch_bytes;

    const struct batch *batch; /* during a run */
};

static inline struct activations *train_layer(struct train *t, int32_t layer)
{
    return &t->layers[layer < t->lowest ? 0 : layer - t->lowest + 1];
}

/* From the loss's gradient in dx (inner rows) down to the lowest adapted layer, filling the gradients. */
void train_backward(struct train *t);

#endif
