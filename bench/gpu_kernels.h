/*
 * Kernels of kernels/cuda that no operation of the backend runs by itself: bench_gpu measures them beside the
 * operations that they are part of. `be` is a CUDA backend.
 */
#ifndef BENCH_GPU_KERNELS_H
#define BENCH_GPU_KERNELS_H

#include "kernels/backend.h"

/* y (m, n) += bias (n, dev): what group_forward does for a member that has one. */
void gpu_add_bias(struct backend *be, int32_t m, int32_t n, const float *bias, struct rows y);
/* to (out, in) = w decoded; blocks (dev): a copy of its data. What is done when a matrix is placed with a dense copy,
 * or at each use of one without. */
void gpu_dequantise(struct backend *be, const struct tensor *w, const void *blocks, struct rows to);

#endif
