/* The scalar table's functions that live outside reference.c. Private. */
#ifndef KERNELS_CPU_REFERENCE_H
#define KERNELS_CPU_REFERENCE_H

#include "kernels/cpu/internal.h"

void reference_attention_forward(const struct kernel_run *run, const struct attention_shape *shape,
                                 const struct segments *segments, const float *q, const float *k, const float *v,
                                 float *o, float *lse);
void reference_attention_backward(const struct kernel_run *run, const struct attention_shape *shape,
                                  const struct segments *segments, const float *q, const float *k, const float *v,
                                  const float *o, const float *lse, const float *do_, float *dq, float *dk, float *dv);
void reference_attention_decode(const struct kernel_run *run, const struct attention_shape *shape, int32_t rows,
                                int32_t length, const float *q, const float *k, const float *v, int32_t kv_stride,
                                float *o);
void reference_cross_entropy(const struct kernel_run *run, const struct tensor *w, const struct labels *labels,
                             const float *x, float *losses, float *dx);

#endif
