/*
 * What the programs train and infer share: their options, the model to run, and what they say of memory.
 *
 *     struct bench_options o = BENCH_DEFAULTS;
 *     bench_parse(argc, argv, &o);
 *     struct bench_model m;
 *     bench_model_open(&m, &o);        ends the program with a reason if it cannot
 */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#include "bench/synthetic.h"

struct gguf;

struct bench_options {
    const char *shape;     /* of synthetic.h */
    const char *file;      /* a GGUF instead; NULL: none */
    enum tensor_type type; /* of a synthetic model's matrices */
    int threads, seq, batch, rank, layers, tokens, rounds, level;
    bool dp, ceiling, json, turns;
    enum kernel_precision precision;
    enum kernel_isa isa;
};
#define BENCH_DEFAULTS                                                                                                 \
    {                                                                                                                  \
        .shape = "smollm2-135m", .type = TENSOR_Q4_1, .threads = 2, .seq = 512, .batch = 32, .rank = 16, .tokens = 64, \
        .rounds = 3, .level = 0, .ceiling = true, .precision = KERNEL_F32, .isa = KERNEL_ISA_BEST                      \
    }

/* Ends the program on --help (status 0) and on what it does not know (2). */
void bench_parse(int argc, char **argv, struct bench_options *options);

struct bench_model {
    const struct model *model;
    const char *name;
    struct synthetic synthetic;
    struct gguf *gguf;
    struct model loaded;
};
void bench_model_open(struct bench_model *m, const struct bench_options *options);
void bench_model_close(struct bench_model *m);
/* Bytes of all matrices that a token meets: the embedding's only where it is the head too. */
size_t bench_weight_bytes(const struct model *model);

/* The most that was resident so far, mapped files included. */
size_t bench_peak_rss_bytes(void);
/* Calls of malloc and its like so far (the programs are linked with --wrap). */
long bench_allocations(void);
/* With --turns: says "turn" on standard output, then waits for a line on standard input, so that bench/in_turns.py can
 * let programs run one at a time. Ends the program when there is no more input. */
void bench_turn(const struct bench_options *options);
double bench_median(double *values, int count); /* sorts them */
void bench_fail(const char *message);           /* prints it and ends the program */

#endif
