/* Attention and cross entropy of the scalar table, straight from the formulas. */
#include "kernels/cpu/reference.h"

#include <math.h>

static float dot(const float *a, const float *b, int32_t n)
{
    float sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static int32_t first_key(const struct attention_shape *shape, int32_t i)
{
    return shape->window > 0 && i >= shape->window ? i - shape->window + 1 : 0;
}

/* One query at position i of its sequence: p[first..i] = probabilities, o (d) their mix of v; returns the log-sum-exp.
 */
static float attend(const struct attention_shape *shape, int32_t i, const float *q, const float *k, const float *v,
                    ptrdiff_t stride, float *p, float *o)
{
    int32_t lo = first_key(shape, i), d = shape->head_size;
    float top = -INFINITY, sum = 0;
    for (int32_t t = lo; t <= i; t++) {
        p[t] = shape->scale * dot(q, k + t * stride, d);
        top = fmaxf(top, p[t]);
    }
    for (int32_t t = lo; t <= i; t++) {
        p[t] = expf(p[t] - top);
        sum += p[t];
    }
    for (int32_t c = 0; c < d; c++)
        o[c] = 0;
    for (int32_t t = lo; t <= i; t++) {
        p[t] /= sum;
        for (int32_t c = 0; c < d; c++)
            o[c] += p[t] * v[t * stride + c];
    }
    return top + logf(sum);
}

void reference_attention_forward(const struct kernel_run *run, const struct attention_shape *shape,
                                 const struct segments *segments, const float *q, const float *k, const float *v,
                                 float *o, float *lse)
{
    int32_t d = shape->head_size, group = shape->heads / shape->kv_heads;
    ptrdiff_t q_stride = (ptrdiff_t)shape->heads * d, stride = (ptrdiff_t)shape->kv_heads * d;
    for (int32_t s = 0; s < segments->count; s++) {
        int32_t start = segments->offsets[s], n = segments->offsets[s + 1] - start;
        assert(run->scratch_bytes >= (size_t)n * sizeof(float));
        for (int32_t i = 0; i < n; i++) {
            for (int32_t h = 0; h < shape->heads; h++) {
                ptrdiff_t at = (start + i) * q_stride + (ptrdiff_t)h * d, kv = start * stride + h / group * d;
                float l = attend(shape, i, q + at, k + kv, v + kv, stride, run->scratch, o + at);
                if (lse)
                    lse[(ptrdiff_t)(start + i) * shape->heads + h] = l;
            }
        }
    }
}

void reference_attention_backward(const struct kernel_run *run, const struct attention_shape *shape,
                                  const struct segments *segments, const float *q, const float *k, const float *v,
                                  const float *o, const float *lse, const float *do_, float *dq, float *dk, float *dv)
{
    int32_t d = shape->head_size, group = shape->heads / shape->kv_heads;
    ptrdiff_t q_stride = (ptrdiff_t)shape->heads * d, stride = (ptrdiff_t)shape->kv_heads * d;
    size_t rows = (size_t)segments->offsets[segments->count];
    (void)run;
    memset(dq, 0, rows * (size_t)q_stride * sizeof(float));
    memset(dk, 0, rows * (size_t)stride * sizeof(float));
    memset(dv, 0, rows * (size_t)stride * sizeof(float));
    for (int32_t s = 0; s < segments->count; s++) {
        int32_t start = segments->offsets[s], n = segments->offsets[s + 1] - start;
        for (int32_t h = 0; h < shape->heads; h++) {
            for (int32_t i = 0; i < n; i++) {
                ptrdiff_t at = (start + i) * q_stride + (ptrdiff_t)h * d;
                float delta = dot(do_ + at, o + at, d), l = lse[(ptrdiff_t)(start + i) * shape->heads + h];
                for (int32_t t = first_key(shape, i); t <= i; t++) {
                    ptrdiff_t kv = (start + t) * stride + h / group * d;
                    float p = expf(shape->scale * dot(q + at, k + kv, d) - l);
                    float ds = p * (dot(do_ + at, v + kv, d) - delta) * shape->scale;
                    for (int32_t c = 0; c < d; c++) {
                        dv[kv + c] += p * do_[at + c];
                        dk[kv + c] += ds * q[at + c];
                        dq[at + c] += ds * k[kv + c];
                    }
                }
            }
        }
    }
}

void reference_attention_decode(const struct kernel_run *run, const struct attention_shape *shape, int32_t rows,
                                int32_t length, const float *q, const float *k, const float *v, int32_t kv_stride,
                                float *o)
{
    int32_t d = shape->head_size, group = shape->heads / shape->kv_heads;
    assert(rows <= length && run->scratch_bytes >= (size_t)length * sizeof(float));
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t h = 0; h < shape->heads; h++) {
            ptrdiff_t at = ((ptrdiff_t)i * shape->heads + h) * d, kv = h / group * d;
            attend(shape, length - rows + i, q + at, k + kv, v + kv, kv_stride, run->scratch, o + at);
        }
    }
}

/* The logits are computed twice, so that no row of them is kept. */
void reference_cross_entropy(const struct kernel_run *run, const struct tensor *w, const struct labels *labels,
                             const float *x, float *losses, float *dx)
{
    size_t in = (size_t)w->in;
    uint8_t *next = run->scratch, *end = next + run->scratch_bytes;
    float *row = scratch_take(&next, end, in * sizeof(float));
    for (int32_t l = 0; l < labels->count; l++) {
        const size_t at = (size_t)(labels->rows ? labels->rows[l] : l) * in;
        const int32_t target = labels->targets[l];
        const float *hidden = x + at;
        float top = -INFINITY, own = 0;
        double others = 0; /* Σ exp(z − top) without the target */
        for (int32_t o = 0; o < w->out; o++) {
            tensor_dequantise(w->type, tensor_row(w, o), in, row);
            const float z = dot(row, hidden, w->in);
            if (z > top) {
                others *= exp((double)top - (double)z);
                top = z;
            }
            if (o == target)
                own = z;
            else
                others += exp((double)z - (double)top);
        }
        const double sum = others + exp((double)own - (double)top);
        losses[l] = (float)((double)top - (double)own + log(sum));
        if (own == top) /* a small one keeps its digits */
            losses[l] = (float)log1p(others);
        if (!dx)
            continue;
        float *to = dx + at, weight = labels->weights ? labels->weights[l] : 1.0f;
        memset(to, 0, in * sizeof(float));
        for (int32_t o = 0; o < w->out; o++) {
            tensor_dequantise(w->type, tensor_row(w, o), in, row);
            const double e = o == target ? -others : exp((double)dot(row, hidden, w->in) - (double)top);
            const float d = weight * (float)(e / sum);
            for (size_t i = 0; i < in; i++)
                to[i] += d * row[i];
        }
    }
}
