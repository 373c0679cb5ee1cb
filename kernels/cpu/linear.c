/* The products of a LoRA layer, each one call of gemm. */
#include "kernels/cpu/simd.h"

/* bfloat16 needs the instructions and is asked for by the run. */
INLINE bool use_bf16(const struct kernel_run *run)
{
#ifdef __AVX512BF16__
    return run->precision == KERNEL_BF16;
#else
    (void)run;
    return false;
#endif
}

void ISA(linear_forward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const float *bias,
                         const float *x, float *y, bool accumulate)
{
    struct gemm g = {.m = m,
                     .n = w->out,
                     .k = w->in,
                     .a = x,
                     .a_row = w->in,
                     .a_k = 1,
                     .w = w,
                     .transposed = true,
                     .alpha = 1,
                     .bias = bias,
                     .accumulate = accumulate,
                     .c = y,
                     .ldc = w->out,
                     .bf16 = use_bf16(run)};
    ISA(gemm)(run, &g);
}

void ISA(linear_backward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const float *dy, float *dx,
                          bool accumulate)
{
    struct gemm g = {.m = m,
                     .n = w->in,
                     .k = w->out,
                     .a = dy,
                     .a_row = w->out,
                     .a_k = 1,
                     .w = w,
                     .alpha = 1,
                     .accumulate = accumulate,
                     .c = dx,
                     .ldc = w->in,
                     .bf16 = use_bf16(run)};
    ISA(gemm)(run, &g);
}

void ISA(lora_down)(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a, const float *x,
                    float *h)
{
    struct tensor w = {.data = a, .type = TENSOR_F32, .out = r, .in = in};
    struct gemm g = {.m = m,
                     .n = r,
                     .k = in,
                     .a = x,
                     .a_row = in,
                     .a_k = 1,
                     .w = &w,
                     .transposed = true,
                     .alpha = 1,
                     .c = h,
                     .ldc = r};
    ISA(gemm)(run, &g);
}

void ISA(lora_up)(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                  const float *h, int32_t h_stride, float *y)
{
    struct tensor w = {.data = b, .type = TENSOR_F32, .out = out, .in = r};
    struct gemm g = {.m = m,
                     .n = out,
                     .k = r,
                     .a = h,
                     .a_row = h_stride,
                     .a_k = 1,
                     .w = &w,
                     .transposed = true,
                     .alpha = s,
                     .accumulate = true,
                     .c = y,
                     .ldc = out};
    ISA(gemm)(run, &g);
}

void ISA(lora_up_backward)(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                           const float *dy, float *dh, int32_t dh_stride)
{
    struct gemm g = {.m = m,
                     .n = r,
                     .k = out,
                     .a = dy,
                     .a_row = out,
                     .a_k = 1,
                     .b = b,
                     .ldb = r,
                     .alpha = s,
                     .c = dh,
                     .ldc = dh_stride};
    ISA(gemm)(run, &g);
}

void ISA(lora_down_backward)(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a,
                             const float *dh, float *dx)
{
    struct gemm g = {.m = m,
                     .n = in,
                     .k = r,
                     .a = dh,
                     .a_row = r,
                     .a_k = 1,
                     .b = a,
                     .ldb = in,
                     .alpha = 1,
                     .accumulate = true,
                     .c = dx,
                     .ldc = in};
    ISA(gemm)(run, &g);
}

void ISA(lora_grad_b)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t out, int32_t r, float s,
                      const float *dy, const float *h, int32_t h_stride, float *gb)
{
    if (t1 <= t0)
        return;
    struct gemm g = {.m = out,
                     .n = r,
                     .k = t1 - t0,
                     .a = dy + (ptrdiff_t)t0 * out,
                     .a_row = 1,
                     .a_k = out,
                     .b = h + (ptrdiff_t)t0 * h_stride,
                     .ldb = h_stride,
                     .alpha = s,
                     .accumulate = true,
                     .c = gb,
                     .ldc = r};
    ISA(gemm)(run, &g);
}

void ISA(lora_grad_a)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t in, int32_t r, const float *dh,
                      int32_t dh_stride, const float *x, float *ga)
{
    if (t1 <= t0)
        return;
    struct gemm g = {.m = r,
                     .n = in,
                     .k = t1 - t0,
                     .a = dh + (ptrdiff_t)t0 * dh_stride,
                     .a_row = 1,
                     .a_k = dh_stride,
                     .b = x + (ptrdiff_t)t0 * in,
                     .ldb = in,
                     .alpha = 1,
                     .accumulate = true,
                     .c = ga,
                     .ldc = in};
    ISA(gemm)(run, &g);
}
