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

/*
 * Gradients: few rows (the rank) times activations or their gradients, (tokens, n) in memory, which to read takes the
 * time. An item takes up to GRAD_PANELS panels' columns of some tokens, then of the next ones: reads that go along the
 * rows are faster than down a panel. More rows make it worth to add to the result less often.
 */
#define GRAD_PANELS 8
#define GRAD_ROWS 16 /* of B's gradient at once */
#define GRAD_TOKENS(rows) ((rows) <= GRAD_ROWS ? 32 : 64)

struct gradient {
    int32_t tokens, n, r;
    float s;
    const float *y; /* (tokens, n) */
    const float *h; /* (tokens, r), h_stride apart */
    int32_t h_stride;
    float *g;
    int32_t width; /* columns of an item */
};

static void gradient_run(const struct kernel_run *run, struct gradient *j,
                         void (*item)(void *ctx, int item, int thread))
{
    const int32_t panels = (j->n + GEMM_NR - 1) / GEMM_NR, threads = pool_threads(run->pool);
    const int32_t each = (panels + threads - 1) / threads;
    j->width = (each < GRAD_PANELS ? each : GRAD_PANELS) * GEMM_NR;
    pool_run(run->pool, (j->n + j->width - 1) / j->width, item, j);
}

/* c (rows, end − begin) (+)= s·hᵀ·y of `rows` columns of h from r0 on and columns begin .. end − 1 of y. */
static void gradient_block(const struct gradient *j, int32_t r0, int32_t rows, int32_t begin, int32_t end, float *c,
                           ptrdiff_t ldc, bool accumulate)
{
    const int32_t tokens = GRAD_TOKENS(rows);
    for (int32_t t = 0; t < j->tokens; t += tokens) {
        for (int32_t at = begin; at < end; at += GEMM_NR) {
            const struct gemm_panel p = {.m = rows,
                                         .k = j->tokens - t < tokens ? j->tokens - t : tokens,
                                         .columns = end - at < GEMM_NR ? end - at : GEMM_NR,
                                         .a = j->h + (ptrdiff_t)t * j->h_stride + r0,
                                         .a_row = 1,
                                         .a_k = j->h_stride,
                                         .b = j->y + (ptrdiff_t)t * j->n + at,
                                         .ldb = j->n,
                                         .alpha = j->s,
                                         .accumulate = accumulate || t > 0,
                                         .c = c + (at - begin),
                                         .ldc = ldc};
            ISA(gemm_panel)(&p);
        }
    }
}

/* g is (n, r): hᵀ·y, which reads y in its order, is turned over as it is added. */
static void grad_b_item(void *ctx, int item, int thread)
{
    const struct gradient *j = ctx;
    const int32_t begin = item * j->width, end = j->n - begin < j->width ? j->n : begin + j->width;
    float tile[GRAD_ROWS][GRAD_PANELS * GEMM_NR];
    (void)thread;
    for (int32_t r0 = 0; r0 < j->r; r0 += GRAD_ROWS) {
        const int32_t rows = j->r - r0 < GRAD_ROWS ? j->r - r0 : GRAD_ROWS;
        gradient_block(j, r0, rows, begin, end, tile[0], GRAD_PANELS * GEMM_NR, false);
        for (int32_t o = begin; o < end; o++)
            for (int32_t r = 0; r < rows; r++)
                j->g[(ptrdiff_t)o * j->r + r0 + r] += tile[r][o - begin];
    }
}

void ISA(lora_grad_b)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t out, int32_t r, float s,
                      const float *dy, const float *h, int32_t h_stride, float *gb)
{
    if (t1 <= t0)
        return;
    struct gradient j = {.tokens = t1 - t0,
                         .n = out,
                         .r = r,
                         .s = s,
                         .y = dy + (ptrdiff_t)t0 * out,
                         .h = h + (ptrdiff_t)t0 * h_stride,
                         .h_stride = h_stride,
                         .g = gb};
    gradient_run(run, &j, grad_b_item);
}

static void grad_a_item(void *ctx, int item, int thread)
{
    const struct gradient *j = ctx;
    const int32_t begin = item * j->width, end = j->n - begin < j->width ? j->n : begin + j->width;
    (void)thread;
    gradient_block(j, 0, j->r, begin, end, j->g + begin, j->n, true);
}

void ISA(lora_grad_a)(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t in, int32_t r, const float *dh,
                      int32_t dh_stride, const float *x, float *ga)
{
    if (t1 <= t0)
        return;
    struct gradient j = {.tokens = t1 - t0,
                         .n = in,
                         .r = r,
                         .s = 1,
                         .y = x + (ptrdiff_t)t0 * in,
                         .h = dh + (ptrdiff_t)t0 * dh_stride,
                         .h_stride = dh_stride,
                         .g = ga};
    gradient_run(run, &j, grad_a_item);
}
