/*
 * Output head and cross entropy over blocks of label rows and, within one, blocks of the vocabulary, so that logits
 * stay in cache and never exist for all words. Forward and backward go together: with a block's logits z, the sum of
 * exp(z − top) and the gradient's sum of exp(z − top)·W both grow by it, top being the largest logit so far; where that
 * rises, what was summed shrinks by exp(old − new) (the online softmax of Milakov and Gimelshein 2018).
 *
 * The label's own word stays out of both sums: its share of the gradient is −others/(others + own)·W[target], without
 * the cancellation of p − 1 where p is near 1.
 */
#include "kernels/cpu/simd.h"
#include "kernels/cpu/interleave.h"

static int32_t label_row(const struct labels *labels, int32_t i)
{
    return labels->rows ? labels->rows[i] : i;
}

/* Rows that a thread takes at once. */
#define ITEM_ROWS 8

_Static_assert(HEAD_WORDS % LANES == 0, "a block of words is whole groups of an interleaved copy");

struct job {
    const struct labels *labels;
    const struct tensor *w;
    int32_t first, count;  /* labels */
    int32_t word, words;   /* the vocabulary's block */
    float *logits;         /* (labels, HEAD_STRIDE) */
    struct head_row *rows; /* (labels) */
    float *sums, *dx;      /* (labels, in), (M, in); NULL: no gradient */
    float *losses;
};

/* Row r of logits: counts them in; for a gradient they become exp(z − top). */
static void count_in(const struct job *j, int32_t r)
{
    const int32_t n = j->words, target = j->labels->targets[j->first + r] - j->word;
    float *z = j->logits + (ptrdiff_t)r * HEAD_STRIDE;
    struct head_row *row = &j->rows[r];
    vec top = vec_set(row->top), sum = vec_zero();
    for (int32_t i = 0; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        top = vec_max(top, vec_keep(vec_load_mask(z + i, mask), mask, -INFINITY));
    }
    const float max = vec_top(top);
    if (max > row->top) {
        const float shrink = expf(row->top - max);
        row->others *= shrink;
        row->top = max;
        for (int32_t i = 0; j->sums && j->word > 0 && i < j->w->in; i += VL) {
            float *at = j->sums + (ptrdiff_t)r * j->w->in + i;
            vmask mask = vec_mask(j->w->in - i);
            vec_store_mask(at, vec_mul(vec_load_mask(at, mask), vec_set(shrink)), mask);
        }
    }
    if (target >= 0 && target < n) {
        row->target = z[target];
        z[target] = -INFINITY;
    }
    for (int32_t i = 0; i < n; i += VL) {
        vmask mask = vec_mask(n - i);
        vec e = vec_keep(vec_exp(vec_sub(vec_load_mask(z + i, mask), vec_set(max))), mask, 0);
        sum = vec_add(sum, e);
        if (j->sums)
            vec_store_mask(z + i, e, mask);
    }
    row->others += vec_sum(sum);
}

static void block_item(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    (void)thread;
    for (int32_t i = item * ITEM_ROWS; i < j->count && i < (item + 1) * ITEM_ROWS; i++)
        count_in(j, i);
}

/* After the last block. */
static void end_row(void *ctx, int item, int thread)
{
    const struct job *j = ctx;
    (void)thread;
    const int32_t label = j->first + item, in = j->w->in;
    const struct head_row *row = &j->rows[item];
    const float total = row->others + expf(row->target - row->top);
    j->losses[label] =
        row->target == row->top ? log1pf(row->others) : row->top - row->target + logf(total); /* small ones whole */
    if (!j->sums)
        return;
    const float weight = j->labels->weights ? j->labels->weights[label] : 1.0f;
    const float *sums = j->sums + (ptrdiff_t)item * in;
    float *dx = j->dx + (ptrdiff_t)label_row(j->labels, label) * in;
    ISA(dequantise)(j->w->type, tensor_row(j->w, j->labels->targets[label]), 0, (size_t)in, dx);
    const vec scale = vec_set(weight / total), own = vec_set(-weight * row->others / total);
    for (int32_t i = 0; i < in; i += VL) {
        vmask mask = vec_mask(in - i);
        vec_store_mask(dx + i, vec_fma(vec_load_mask(dx + i, mask), own, vec_mul(vec_load_mask(sums + i, mask), scale)),
                       mask);
    }
}

void ISA(cross_entropy)(const struct kernel_run *run, const struct tensor *w, const struct labels *labels,
                        const float *x, float *losses, float *dx)
{
    const int32_t chunk = labels->count < HEAD_ROWS ? labels->count : HEAD_ROWS, in = w->in;
    if (chunk <= 0)
        return;
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    const size_t row_floats = (size_t)chunk * (size_t)in;
    float *rows = scratch_take(&next, end, row_floats * sizeof(float));
    struct job j = {.labels = labels, .w = w, .losses = losses, .dx = dx};
    j.sums = dx ? scratch_take(&next, end, row_floats * sizeof(float)) : NULL;
    j.logits = scratch_take(&next, end, (size_t)chunk * HEAD_STRIDE * sizeof(float));
    j.rows = scratch_take(&next, end, (size_t)chunk * sizeof *j.rows);
    struct kernel_run inner = *run;
    inner.scratch = next;
    inner.scratch_bytes = (size_t)(end - next);
    for (; j.first < labels->count; j.first += chunk) {
        j.count = labels->count - j.first < chunk ? labels->count - j.first : chunk;
        for (int32_t i = 0; i < j.count; i++) {
            memcpy(rows + (ptrdiff_t)i * in, x + (ptrdiff_t)label_row(labels, j.first + i) * in,
                   (size_t)in * sizeof(float));
            j.rows[i] = (struct head_row){.top = -INFINITY};
        }
        for (j.word = 0; j.word < w->out; j.word += HEAD_WORDS) {
            j.words = w->out - j.word < HEAD_WORDS ? w->out - j.word : HEAD_WORDS;
            const struct tensor part = {.data = tensor_row(w, j.word),
                                        .type = w->type,
                                        .out = j.words,
                                        .in = in,
                                        .interleaved = w->interleaved ? ISA(interleaved_group)(w, j.word) : NULL};
            struct gemm g = {.m = j.count,
                             .n = j.words,
                             .k = in,
                             .a = rows,
                             .a_row = in,
                             .a_k = 1,
                             .w = &part,
                             .transposed = true,
                             .alpha = 1,
                             .c = j.logits,
                             .ldc = HEAD_STRIDE,
                             .rounded = may_round(run)};
            ISA(gemm)(&inner, &g);
            pool_run(run->pool, (j.count + ITEM_ROWS - 1) / ITEM_ROWS, block_item, &j);
            if (!dx)
                continue;
            g = (struct gemm){.m = j.count,
                              .n = in,
                              .k = j.words,
                              .a = j.logits,
                              .a_row = HEAD_STRIDE,
                              .a_k = 1,
                              .w = &part,
                              .alpha = 1,
                              .accumulate = j.word > 0,
                              .c = j.sums,
                              .ldc = in,
                              .rounded = may_round(run)};
            ISA(gemm)(&inner, &g);
        }
        pool_run(run->pool, j.count, end_row, &j);
    }
}
