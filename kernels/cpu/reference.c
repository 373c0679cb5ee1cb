/*
 * The scalar table: every operation as its formula says, one row after the other in the calling thread. It is what the
 * fast tables are tested against, and what runs where they do not exist; readable before fast.
 */
#include "kernels/cpu/reference.h"

#include <math.h>

/* y (m, n) += low: the factor of output o and rank j is at o·by_output + j·by_rank. */
static void add_low_rank(const struct low_rank *low, int32_t m, int32_t n, ptrdiff_t by_output, ptrdiff_t by_rank,
                         float *y)
{
    for (int32_t t = 0; low && t < m; t++) {
        for (int32_t o = 0; o < n; o++) {
            float sum = 0;
            for (int32_t j = 0; j < low->rank; j++)
                sum += low->rows[(ptrdiff_t)t * low->stride + j] * low->columns[o * by_output + j * by_rank];
            y[(ptrdiff_t)t * n + o] += low->scale * sum;
        }
    }
}

static void linear_forward(const struct kernel_run *run, int32_t m, const struct tensor *w, const float *bias,
                           const struct low_rank *low, const float *x, float *y, bool accumulate)
{
    float *row = run->scratch;
    assert(run->scratch_bytes >= (size_t)w->in * sizeof(float));
    for (int32_t o = 0; o < w->out; o++) {
        tensor_dequantise(w->type, tensor_row(w, o), (size_t)w->in, row);
        for (int32_t t = 0; t < m; t++) {
            float sum = 0;
            for (int32_t i = 0; i < w->in; i++)
                sum += row[i] * x[(ptrdiff_t)t * w->in + i];
            float *to = y + (ptrdiff_t)t * w->out + o;
            *to = sum + (bias ? bias[o] : 0.0f) + (accumulate ? *to : 0.0f);
        }
    }
    add_low_rank(low, m, w->out, low ? low->rank : 0, 1, y);
}

static void linear_backward(const struct kernel_run *run, int32_t m, const struct tensor *w, const struct low_rank *low,
                            const float *dy, float *dx, bool accumulate)
{
    float *row = run->scratch;
    assert(run->scratch_bytes >= (size_t)w->in * sizeof(float));
    if (!accumulate)
        memset(dx, 0, (size_t)m * (size_t)w->in * sizeof(float));
    for (int32_t o = 0; o < w->out; o++) {
        tensor_dequantise(w->type, tensor_row(w, o), (size_t)w->in, row);
        for (int32_t t = 0; t < m; t++) {
            for (int32_t i = 0; i < w->in; i++)
                dx[(ptrdiff_t)t * w->in + i] += dy[(ptrdiff_t)t * w->out + o] * row[i];
        }
    }
    add_low_rank(low, m, w->in, 1, w->in, dx);
}

static size_t interleaved_bytes(const struct tensor *w)
{
    (void)w;
    return 0;
}

static void lora_down(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a, const float *x,
                      float *h)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        for (int32_t j = 0; j < r; j++) {
            float sum = 0;
            for (int32_t i = 0; i < in; i++)
                sum += x[(ptrdiff_t)t * in + i] * a[(ptrdiff_t)j * in + i];
            h[(ptrdiff_t)t * r + j] = sum;
        }
    }
}

static void lora_up(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                    const float *h, int32_t h_stride, float *y)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        for (int32_t o = 0; o < out; o++) {
            float sum = 0;
            for (int32_t j = 0; j < r; j++)
                sum += h[(ptrdiff_t)t * h_stride + j] * b[(ptrdiff_t)o * r + j];
            y[(ptrdiff_t)t * out + o] += s * sum;
        }
    }
}

static void linear_decode(const struct kernel_run *run, int32_t m, int32_t count, const struct served_linear *linears,
                          const float *x)
{
    for (const struct served_linear *l = linears; l < linears + count; l++) {
        linear_forward(run, m, l->w, l->bias, NULL, x, l->y, false);
        if (l->b)
            lora_up(run, m, l->w->out, l->rank, l->scale, l->b, l->h, l->h_stride, l->y);
    }
}

static void lora_up_backward(const struct kernel_run *run, int32_t m, int32_t out, int32_t r, float s, const float *b,
                             const float *dy, float *dh, int32_t dh_stride)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        for (int32_t j = 0; j < r; j++) {
            float sum = 0;
            for (int32_t o = 0; o < out; o++)
                sum += dy[(ptrdiff_t)t * out + o] * b[(ptrdiff_t)o * r + j];
            dh[(ptrdiff_t)t * dh_stride + j] = s * sum;
        }
    }
}

static void lora_down_backward(const struct kernel_run *run, int32_t m, int32_t in, int32_t r, const float *a,
                               const float *dh, float *dx)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        for (int32_t i = 0; i < in; i++) {
            float sum = 0;
            for (int32_t j = 0; j < r; j++)
                sum += dh[(ptrdiff_t)t * r + j] * a[(ptrdiff_t)j * in + i];
            dx[(ptrdiff_t)t * in + i] += sum;
        }
    }
}

static void lora_grad_b(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t out, int32_t r, float s,
                        const float *dy, const float *h, int32_t h_stride, float *gb)
{
    (void)run;
    for (int32_t o = 0; o < out; o++) {
        for (int32_t j = 0; j < r; j++) {
            float sum = 0;
            for (int32_t t = t0; t < t1; t++)
                sum += dy[(ptrdiff_t)t * out + o] * h[(ptrdiff_t)t * h_stride + j];
            gb[(ptrdiff_t)o * r + j] += s * sum;
        }
    }
}

static void lora_grad_a(const struct kernel_run *run, int32_t t0, int32_t t1, int32_t in, int32_t r, const float *dh,
                        int32_t dh_stride, const float *x, float *ga)
{
    (void)run;
    for (int32_t j = 0; j < r; j++) {
        for (int32_t i = 0; i < in; i++) {
            float sum = 0;
            for (int32_t t = t0; t < t1; t++)
                sum += dh[(ptrdiff_t)t * dh_stride + j] * x[(ptrdiff_t)t * in + i];
            ga[(ptrdiff_t)j * in + i] += sum;
        }
    }
}

static void rmsnorm_forward(const struct kernel_run *run, int32_t m, int32_t n, float eps, const float *gain, float *x,
                            const float *add, float *y, float *rstd)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        float *row = x + (ptrdiff_t)t * n, squares = 0;
        for (int32_t i = 0; i < n; i++) {
            if (add)
                row[i] += add[(ptrdiff_t)t * n + i];
            squares += row[i] * row[i];
        }
        float scale = 1.0f / sqrtf(squares / (float)n + eps);
        for (int32_t i = 0; i < n; i++)
            y[(ptrdiff_t)t * n + i] = row[i] * scale * gain[i];
        if (rstd)
            rstd[t] = scale;
    }
}

static void rmsnorm_backward(const struct kernel_run *run, int32_t m, int32_t n, const float *gain, const float *x,
                             const float *rstd, const float *dy, float *dx, bool accumulate)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        ptrdiff_t at = (ptrdiff_t)t * n;
        float along = 0;
        for (int32_t i = 0; i < n; i++)
            along += gain[i] * dy[at + i] * x[at + i];
        along *= rstd[t] * rstd[t] * rstd[t] / (float)n;
        for (int32_t i = 0; i < n; i++) {
            float d = rstd[t] * gain[i] * dy[at + i] - x[at + i] * along;
            dx[at + i] = accumulate ? dx[at + i] + d : d;
        }
    }
}

static void rope(const struct kernel_run *run, int32_t m, int32_t heads, int32_t head_size, int32_t rotated,
                 enum rope_order order, bool inverse, const float *table, const int32_t *positions, float *x)
{
    (void)run;
    assert(rotated % 2 == 0 && rotated <= head_size);
    for (int32_t t = 0; t < m; t++) {
        const float *pairs = table + (ptrdiff_t)positions[t] * rotated;
        for (int32_t h = 0; h < heads; h++) {
            float *v = x + ((ptrdiff_t)t * heads + h) * head_size;
            for (int32_t i = 0; i < rotated / 2; i++) {
                int32_t first = order == ROPE_NORM ? 2 * i : i,
                        second = order == ROPE_NORM ? first + 1 : i + rotated / 2;
                float c = pairs[2 * i], s = inverse ? -pairs[2 * i + 1] : pairs[2 * i + 1];
                float a = v[first], b = v[second];
                v[first] = a * c - b * s;
                v[second] = a * s + b * c;
            }
        }
    }
}

static float activate(float x, enum gate_kind kind, float *ret_slope)
{
    if (kind == GATE_SILU) {
        float sigma = 1.0f / (1.0f + expf(-x));
        *ret_slope = sigma + x * sigma * (1.0f - sigma);
        return x * sigma;
    }
    const float c = 0.7978845608028654f; /* √(2/π) */
    float t = tanhf(c * (x + 0.044715f * x * x * x));
    *ret_slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * c * (1.0f + 3 * 0.044715f * x * x);
    return 0.5f * x * (1.0f + t);
}

static void gated_forward(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, const float *gate,
                          const float *up, int32_t gate_stride, float *out)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        for (int32_t i = 0; i < n; i++) {
            ptrdiff_t at = (ptrdiff_t)t * gate_stride + i;
            float slope;
            out[(ptrdiff_t)t * n + i] = activate(gate[at], kind, &slope) * up[at];
        }
    }
}

static void gated_backward(const struct kernel_run *run, int32_t m, int32_t n, enum gate_kind kind, float *gate,
                           float *up, int32_t gate_stride, const float *dout)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        for (int32_t i = 0; i < n; i++) {
            ptrdiff_t at = (ptrdiff_t)t * gate_stride + i;
            float slope, value = activate(gate[at], kind, &slope), d = dout[(ptrdiff_t)t * n + i];
            gate[at] = d * up[at] * slope;
            up[at] = d * value;
        }
    }
}

static void embed(const struct kernel_run *run, int32_t m, const struct tensor *w, const int32_t *ids, float scale,
                  float *y)
{
    (void)run;
    for (int32_t t = 0; t < m; t++) {
        float *row = y + (ptrdiff_t)t * w->in;
        tensor_dequantise(w->type, tensor_row(w, ids[t]), (size_t)w->in, row);
        for (int32_t i = 0; i < w->in; i++)
            row[i] *= scale;
    }
}

static void add(const struct kernel_run *run, size_t n, const float *b, float *a)
{
    (void)run;
    for (size_t i = 0; i < n; i++)
        a[i] += b[i];
}

static void adamw(const struct kernel_run *run, size_t n, const struct adamw_params *params, const float *g, float *m,
                  float *v, float *p)
{
    float correct1 = (float)(1.0 / (1.0 - pow(params->beta1, (double)params->step)));
    float correct2 = (float)(1.0 / (1.0 - pow(params->beta2, (double)params->step)));
    (void)run;
    assert(params->step >= 1);
    for (size_t i = 0; i < n; i++) {
        m[i] = params->beta1 * m[i] + (1.0f - params->beta1) * g[i];
        v[i] = params->beta2 * v[i] + (1.0f - params->beta2) * g[i] * g[i];
        float step = params->lr * (m[i] * correct1) / (sqrtf(v[i] * correct2) + params->eps);
        p[i] = p[i] * (1.0f - params->lr * params->weight_decay) - step;
    }
}

static void sgd_momentum(const struct kernel_run *run, size_t n, float lr, float momentum, const float *g, float *m,
                         float *p)
{
    (void)run;
    for (size_t i = 0; i < n; i++) {
        m[i] = momentum * m[i] + g[i];
        p[i] -= lr * m[i];
    }
}

const struct kernel_ops kernel_ops_scalar = {
    .name = "scalar",
    .isa = KERNEL_SCALAR,
    .linear_forward = linear_forward,
    .linear_backward = linear_backward,
    .linear_decode = linear_decode,
    .interleaved_bytes = interleaved_bytes,
    .lora_down = lora_down,
    .lora_up = lora_up,
    .lora_up_backward = lora_up_backward,
    .lora_down_backward = lora_down_backward,
    .lora_grad_b = lora_grad_b,
    .lora_grad_a = lora_grad_a,
    .rmsnorm_forward = rmsnorm_forward,
    .rmsnorm_backward = rmsnorm_backward,
    .rope = rope,
    .gated_forward = gated_forward,
    .gated_backward = gated_backward,
    .embed = embed,
    .add = add,
    .attention_forward = reference_attention_forward,
    .attention_backward = reference_attention_backward,
    .attention_decode = reference_attention_decode,
    .cross_entropy = reference_cross_entropy,
    .clip_accumulate = clip_accumulate,
    .adamw = adamw,
    .sgd_momentum = sgd_momentum,
};
