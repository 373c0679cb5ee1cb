/*
 * The parts of bench_gpu: what it was asked for, calls and their time, and the card's ceilings. bench_gpu.c has the
 * program, training and decoding, gpu_ops.c the operations one by one. All of it ends the program where something
 * fails.
 */
#ifndef BENCH_GPU_H
#define BENCH_GPU_H

#include "bench/synthetic.h"
#include "kernels/backend.h"
#include "model/placed.h"

struct gpu_ceilings {
    double flops, bytes; /* a second */
};

struct gpu_settings {
    const struct synthetic_shape *shape;
    const char *base, *labels;
    int batch, tokens, rank, steps, level, context;
    bool brief, dp, keep_quantised, decode, ops, floors, json, quantise_kv;
    struct gpu_ceilings given; /* with floors */
};

void gpu_check(int rc, const struct error *err);
void gpu_wait(struct backend *be);

/* Seconds of one call, the median of several timed runs of `repeat` calls each. */
double gpu_time(const struct gpu_settings *s, struct backend *be, int repeat, void (*call)(void *ctx), void *ctx);

/* The card's memory, values of two bytes each, and random bfloat16 values of about unit size for it: products run
 * slower on random data than on zeros. */
void *gpu_take(struct backend *be, size_t values);
void gpu_fill(struct backend *be, void *at, size_t values);

/* The model and, of the rank, random LoRA factors of all its linears; host must outlive lora. */
void gpu_place(const struct gpu_settings *s, struct backend *be, const struct model *model,
               struct placed_model **placed, struct lora *host, struct lora *lora);

double gpu_peak(const struct gpu_settings *s, struct backend *be);      /* FLOP/s of a large product */
double gpu_copy_rate(const struct gpu_settings *s, struct backend *be); /* bytes read and written a second */

/* Prints every operation's floor, from the ceilings that were given. */
void gpu_floors(const struct gpu_settings *s);
/* Measures every operation and prints it beside its floor. */
void gpu_ops(const struct gpu_settings *s, struct backend *be, const struct model *model);

#endif
