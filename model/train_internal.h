/* Internal to model/: the state of a training step. See train.h. */
#ifndef MODEL_TRAIN_INTERNAL_H
#define MODEL_TRAIN_INTERNAL_H

#include "base/arena.h"
#include "model/layer.h"
#include "model/train.h"

/* What the backward pass of one layer needs; all memory of the backend. M is the batch's rows; in the top layer all
 * behind the attention has only the label rows ("inner" rows below), R of them: no other row's output is ever looked
 * at. Which of them are this layer's own and which are shared by all layers and computed anew in the backward pass is
 * the checkpoint level's matter (train.h). */
struct activations {
    struct rows x;              /* (M, d) the layer's input: the residual stream */
    struct rows xn1;            /* (M, d) normalised: input of q, k, v */
    float *rstd1;               /* (M) */
    struct rows q;              /* (M, heads·size) rotated */
    struct rows k, v;           /* (M, kv·size), k rotated */
    struct rows q_raw, k_raw;   /* as projected, where they are normalised; otherwise q and k themselves */
    float *rstd_q, *rstd_k;     /* (M, heads), (M, kv heads); NULL where they are not normalised */
    struct rows o;              /* (M, heads·size) attention's output */
    float *lse;                 /* (M, heads) */
    struct rows o_out;          /* (R, d) as projected, where it is normalised; otherwise mid itself */
    float *rstd_o;              /* (R) or NULL */
    struct rows mid;            /* (R, d) the residual stream after the attention block */
    struct rows xn2;            /* (R, d) normalised: input of gate, up */
    float *rstd2;               /* (R) */
    struct rows gate;           /* (R, ff); the backward pass turns it into its gradient in place */
    struct rows up;             /* (R, ff); likewise */
    struct rows act;            /* (R, ff) act(gate)·up: input of down */
    struct rows down_out;       /* (R, d) as projected, where it is normalised; kept at all levels. Otherwise at NULL */
    float *rstd_down;           /* (R) or NULL */
    struct rows h[GROUP_COUNT]; /* (M or R, group_rank) x·Aᵀ of each group; at NULL if the layer adapts none of it */
};

/* The batch on the device, one upload. */
struct staged {
    int32_t *ids;        /* (rows) */
    int32_t *positions;  /* (rows) */
    int32_t *row_label;  /* (rows) label of each row, or −1 */
    int32_t *label_rows; /* (rows) row of each label, or −1 past the last */
    int32_t *targets;    /* (rows) */
    float *weights;      /* (rows) */
};

struct train {
    struct train_options options;
    struct compute compute;
    struct placed_model *own_placed; /* if the caller gave none */
    struct lora_config lora_config;  /* the shape it was made for */
    int32_t lowest;                  /* lowest adapted layer */
    enum group lowest_group;         /* and its first adapted group */
    int level;                       /* checkpoint level, 0 to 2 */
    bool keep_inputs;                /* xn1, xn2 and act are kept where the level keeps the rest of theirs */
    size_t gradient_stride;          /* floats between examples' gradients */
    size_t trained_count;            /* the largest of the modes that may come */
    size_t device_bytes;
    void *device;      /* one block of the backend's memory */
    struct arena host; /* and one of the host's, for what follows here up to `labels` */

    struct activations *layers; /* (layer_count - lowest + 1): [0] is shared by the layers below `lowest` */
    struct staged host_batch, batch_arrays;
    double *losses;      /* (examples) */
    float *label_losses; /* (rows) host copy */

    struct placed_segments tokens, labels; /* rows of each example; its label rows */
    float *rope_table;
    struct rows compact;   /* (M, heads·size) gathered rows: input of the top layer's o */
    struct rows compact_x; /* (M, d) */
    struct rows last;      /* (M, d) the residual stream above the top layer */
    struct rows hidden;    /* (M, d) normalised, for the head */
    float *rstd_final;     /* (M) */
    float *losses_dev;     /* (M) */
    struct rows dx;        /* (M, d) gradient of the residual stream */
    struct rows dx_inner;  /* (M, d) the same at the top layer's inner rows */
    struct rows dxn;       /* (M, d) */
    struct rows dblock;    /* (M, d) gradient of a block's output before its norm; at NULL without such norms */
    struct rows dact;      /* (M, ff) */
    struct rows dq, dk, dv;
    struct rows do_;      /* (M, heads·size) */
    struct rows do_inner; /* (M, heads·size) at the top layer's inner rows */
    struct rows dh;       /* (M, 3·rank) where the backend is not fused */
    float *gradients;     /* (examples or 1, gradient_stride) dev */

    struct graph_cache *graphs;
    int32_t rows, inner_rows; /* padded counts of tokens and labels, during a run */
    int32_t scored;           /* label losses of the last run that are still on the device; 0: fetched */
    int32_t label_offsets_count;
    int32_t *label_offsets; /* (examples + 1) host, of the last run */
};

static inline struct activations *train_layer(struct train *t, int32_t layer)
{
    return &t->layers[layer < t->lowest ? 0 : layer - t->lowest + 1];
}

/* Forward pieces that the backward pass repeats at checkpoint levels 1 and 2. `below` is added to x first, unless its
 * pointer is NULL; the residual rows to be added to mid come back. */
struct rows train_forward_attention(struct train *t, int32_t layer, struct rows below);
/* From mid (residual added first unless NULL) to act. */
void train_forward_gate(struct train *t, int32_t layer, int32_t rows, struct rows residual);
/* The outputs of the group GATE_UP as group_forward takes them. */
struct gate_up {
    struct rows rows[2];
};
static inline struct gate_up train_gate_up(const struct activations *a)
{
    return (struct gate_up){{a->gate, a->up}};
}

/* From the loss's gradient in dxn (inner rows) down to the lowest adapted layer, filling the gradients. */
void train_backward(struct train *t);

#endif
