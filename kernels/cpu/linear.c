/* The products of a LoRA layer, each one call of gemm. */
#include "kernels/cpu/simd.h"

/* Whether low is added on the way; a thick one is added afterwards. */
static bool thin(const struct low_rank *low)
{
    return low && low->rank <= GEMM_LOW_RANK_MAX;
}

void ISA(linear_forward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const float *bias,
                         const struct low_rank *low, const float *x, float *y, bool accumulate)
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
                     .rounded = may_round(run),
                     .low = thin(low) ? low : NULL};
    ISA(gemm)(run, &g);
    if (low && !thin(low))
        ISA(lora_up)(run, m, w->out, low->rank, low->scale, low->columns, low->rows, low->stride, y);
}

void ISA(linear_backward)(const struct kernel_run *run, int32_t m, const struct tensor *w, const struct low_rank *low,
                          const float *dy, float *dx, bool accumulate)
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
                     .rounded = may_round(run),
                     .low = thin(low) ? low : NULL};
    ISA(gemm)(run, &g);
    if (low && !thin(low)) {
        const struct gemm thick = {.m = m,
                                   .n = w->in,
                                   .k = low->rank,
                                   .a = low->rows,
                                   .a_row = low->stride,
                                   .a_k = 1,
                                   .b = low->columns,
                                   .ldb = w->in,
                                   .alpha = low->scale,
                                   .accumulate = true,
                                   .c = dx,
                                   .ldc = w->in};
        ISA(gemm)(run, &thick);
    }
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

#define GRAD_ROWS 16

struct grad_b {
    int32_t tokens, out, r;
    float s;
    const float *dy, *h;
    int32_t h_stride;
    float *gb;
};

/* GEMM_NR outputs: (r, outputs) = hᵀ·dy reads dy once and in its order; turned over as it is added. */
static void grad_b_item(void *ctx, int item, int thread)
{
    const struct grad_b *j = ctx;
    const int32_t o0 = item * GEMM_NR, columns = j->out - o0 < GEMM_NR ? j->out - o0 : GEMM_NR;
    float tile[GRAD_ROWS][GEMM_NR];
    (void)thread;
    for (int32_t r0 = 0; r0 < j->r; r0 += GRAD_ROWS) {
        const int32_t rows = j->r - r0 < GRAD_ROWS ? j->r - r0 : GRAD_ROWS;
        const struct gemm_panel p = {.m = rows,
                                     .k = j->tokens,
                                     .columns = columns,
                                     .a = j->h + r0,
                                     .a_row = 1,
                                     .a_k = j->h_stride,
                                     .b = j->dy + o0,
                                     .ldb = j->out,
                                     .alpha = j->s,
                                     .c = tile[0],
                                     .ldc = GEMM_NR};
        ISA(gemm_panel)(&p);
        for (int32_t o = 0; o < columns; o++)
            for (int32_t r = 0; r < rows; r++)
                j->gb[(ptrdiff_t)(o0 + o) * j->r + r0 + r] += tile[r][o];
    }
}

void ISA(lora_grad_b)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t out, int32_t r, float s,
                      const float *dy, const float *h, int32_t h_stride, float *gb)
{
    if (t1 <= t0)
        return;
    struct grad_b j = {.tokens = t1 - t0,
                       .out = out,
                       .r = r,
                       .s = s,
                       .dy = dy + (ptrdiff_t)t0 * out,
                       .h = h + (ptrdiff_t)t0 * h_stride,
                       .h_stride = h_stride,
                       .gb = gb};
    pool_run(run->pool, (out + GEMM_NR - 1) / GEMM_NR, grad_b_item, &j);
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
