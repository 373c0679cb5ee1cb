/*
 * What this machine could do at best, measured in the same run: matrix products over a training step's exact shapes,
 * the better of our own and OpenBLAS's, and reading memory.
 *
 *     struct ceiling c;
 *     ceiling_init(&c, ops, pool, precision, model, rows);
 *     ceiling_round(&c);                    any number of times, between other measurements: the medians count
 *     double flops = ceiling_flops(&c);     a second, over all shapes weighted by their FLOPs
 *     ceiling_release(&c);
 *
 * OpenBLAS is opened at run time if it is there (Debian: libopenblas0-pthread). Version 0.3.21 takes newer CPUs for
 * older ones, so its core type is set to SkylakeX where the CPU has AVX-512, and what it says it is gets reported.
 */
#ifndef BENCH_CEILING_H
#define BENCH_CEILING_H

#include "model/model.h"

#define CEILING_SHAPES_MAX 12
#define CEILING_ROUNDS_MAX 64

struct ceiling_shape {
    int32_t n, k;  /* C (rows, n) = A (rows, k)·W, W (n, k) read transposed, or (k, n) */
    bool backward; /* the latter */
    double weight; /* how often a step does it */
    double own[CEILING_ROUNDS_MAX], blas[CEILING_ROUNDS_MAX]; /* seconds */
};

struct ceiling {
    const struct kernel_ops *ops;
    struct kernel_run run;
    int32_t rows;
    int count, rounds;
    struct ceiling_shape shapes[CEILING_SHAPES_MAX];
    float *a, *w, *c;
    struct blas *blas; /* NULL: no OpenBLAS */
    char blas_name[128];
};

/* The products of one sequence of so many rows, all of them labelled. */
void ceiling_init(struct ceiling *c, const struct kernel_ops *ops, struct pool *pool, enum kernel_precision precision,
                  const struct model *model, int32_t rows);
void ceiling_round(struct ceiling *c);
double ceiling_flops(struct ceiling *c);
double ceiling_own_flops(struct ceiling *c);  /* our products alone, dense weights */
double ceiling_blas_flops(struct ceiling *c); /* 0 without OpenBLAS */
void ceiling_release(struct ceiling *c);

/* Bytes a second that all threads of the pool together read from a buffer far larger than the caches. */
double ceiling_read_bandwidth(struct pool *pool);

#endif
