/* Output head and cross entropy, over chunks of label rows so that the logits never exist for the whole batch. */
#include "kernels/cpu/simd.h"

static int32_t label_row(const struct labels *labels, int32_t i)
{
    return labels->rows ? labels->rows[i] : i;
}

struct job {
    const struct labels *labels;
    int32_t first, vocabulary;
    float *logits, *losses;
    bool gradient;
};

/* Row of logits: the loss, and the logits become weight·(softmax − onehot). */
static void loss_row(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    (void)thread;
    int32_t label = j->first + item, n = j->vocabulary, target = j->labels->targets[label];
    float *z = j->logits + (ptrdiff_t)item * head_row_stride(n), at_target = z[target];
    vec top = vec_set(-INFINITY), sum = vec_zero();
    for (int32_t i = 0; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        top = vec_max(top, vec_keep(vec_load_mask(z + i, mask), mask, -INFINITY));
    }
    float max = vec_top(top);
    for (int32_t i = 0; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        vec e = vec_keep(vec_exp(vec_sub(vec_load_mask(z + i, mask), vec_set(max))), mask, 0);
        sum = vec_add(sum, e);
        vec_store_mask(z + i, e, mask);
    }
    float total = vec_sum(sum);
    j->losses[label] = max - at_target + logf(total);
    if (!j->gradient)
        return;
    float weight = j->labels->weights ? j->labels->weights[label] : 1.0f;
    vec scale = vec_set(weight / total);
    for (int32_t i = 0; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        vec_store_mask(z + i, vec_mul(vec_load_mask(z + i, mask), scale), mask);
    }
    z[target] -= weight;
}

void ISA(cross_entropy)(const struct kernel_run *run, const struct tensor *w, const struct labels *labels,
                        const float *x, float *losses, float *dx)
{
    int32_t chunk = head_chunk_rows(labels->count, w->out), in = w->in;
    if (chunk <= 0)
        return;
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    float *rows = scratch_take(&next, end, (size_t)chunk * (size_t)in * sizeof(float));
    const ptrdiff_t stride = head_row_stride(w->out);
    float *logits = scratch_take(&next, end, (size_t)chunk * (size_t)stride * sizeof(float));
    struct kernel_run inner = *run;
    inner.scratch = next;
    inner.scratch_bytes = (size_t)(end - next);
    for (int32_t first = 0; first < labels->count; first += chunk) {
        int32_t count = labels->count - first < chunk ? labels->count - first : chunk;
        for (int32_t i = 0; i < count; i++)
            memcpy(rows + (ptrdiff_t)i * in, x + (ptrdiff_t)label_row(labels, first + i) * in,
                   (size_t)in * sizeof(float));
        struct gemm g = {.m = count,
                         .n = w->out,
                         .k = in,
                         .a = rows,
                         .a_row = in,
                         .a_k = 1,
                         .w = w,
                         .transposed = true,
                         .alpha = 1,
                         .c = logits,
                         .ldc = stride,
                         .rounded = may_round(run)};
        ISA(gemm)(&inner, &g);
        struct job j = {.labels = labels,
                        .first = first,
                        .vocabulary = w->out,
                        .logits = logits,
                        .losses = losses,
                        .gradient = dx != NULL};
        pool_run(run->pool, count, loss_row, &j);
        if (!dx)
            continue;
        g = (struct gemm){.m = count,
                          .n = in,
                          .k = w->out,
                          .a = logits,
                          .a_row = stride,
                          .a_k = 1,
                          .w = w,
                          .alpha = 1,
                          .c = rows,
                          .ldc = in,
                          .rounded = may_round(run)};
        ISA(gemm)(&inner, &g);
        for (int32_t i = 0; i < count; i++)
            memcpy(dx + (ptrdiff_t)label_row(labels, first + i) * in, rows + (ptrdiff_t)i * in,
                   (size_t)in * sizeof(float));
    }
}
