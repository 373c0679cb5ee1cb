/* The scalar table's backward passes against central differences of the forward formulas, computed in double. */
#include "tests/kernels/support.h"

#define STEP 1e-5

/* d loss/d x[i] numerically, x in double. */
static double slope(double (*loss)(const double *x, void *ctx), double *x, int i, void *ctx)
{
    double kept = x[i];
    x[i] = kept + STEP;
    double above = loss(x, ctx);
    x[i] = kept - STEP;
    double below = loss(x, ctx);
    x[i] = kept;
    return (above - below) / (2 * STEP);
}

static void check_slopes(double (*loss)(const double *x, void *ctx), void *ctx, const float *x, const float *got, int n)
{
    double *wide = malloc((size_t)n * sizeof(double));
    if (!wide)
        abort();
    for (int i = 0; i < n; i++)
        wide[i] = x[i];
    for (int i = 0; i < n; i++)
        CHECK_NEAR(got[i], slope(loss, wide, i, ctx), 2e-5);
    free(wide);
}

enum { N = 12, ROWS = 3 };

struct context {
    float *gain, *weight, *other;
    int kind, wanted;
};

static double norm_loss(const double *x, void *ctx)
{
    const struct context *c = ctx;
    double loss = 0;
    for (int t = 0; t < ROWS; t++) {
        double squares = 0;
        for (int i = 0; i < N; i++)
            squares += x[t * N + i] * x[t * N + i];
        for (int i = 0; i < N; i++)
            loss += c->weight[t * N + i] * c->gain[i] * x[t * N + i] / sqrt(squares / N + 1e-5);
    }
    return loss;
}

static void test_norm(void)
{
    const struct kernel_ops *ops = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = {0};
    struct context c = {.gain = support_floats(N), .weight = support_floats(ROWS * N)};
    float *x = support_floats(ROWS * N), y[ROWS * N], rstd[ROWS], dx[ROWS * N];
    ops->rmsnorm_forward(&run, ROWS, N, 1e-5f, c.gain, x, NULL, y, rstd);
    ops->rmsnorm_backward(&run, ROWS, N, c.gain, x, rstd, c.weight, dx, false);
    check_slopes(norm_loss, &c, x, dx, ROWS * N);
    free(x);
    free(c.gain);
    free(c.weight);
}

static double gate_loss(const double *x, void *ctx) /* x: gates then ups */
{
    const struct context *c = ctx;
    double loss = 0;
    for (int i = 0; i < N; i++) {
        double g = x[i], t = tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g));
        double act = c->kind == GATE_SILU ? g / (1 + exp(-g)) : 0.5 * g * (1 + t);
        loss += c->weight[i] * act * x[N + i];
    }
    return loss;
}

static void test_gate(void)
{
    const struct kernel_ops *ops = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = {0};
    for (int kind = GATE_SILU; kind <= GATE_GELU_TANH; kind++) {
        struct context c = {.weight = support_floats(N), .kind = kind};
        float *x = support_floats(2 * N), *slopes = support_copy(x, 2 * N);
        ops->gated_backward(&run, 1, N, (enum gate_kind)kind, slopes, slopes + N, 2 * N, c.weight);
        check_slopes(gate_loss, &c, x, slopes, 2 * N);
        free(x);
        free(slopes);
        free(c.weight);
    }
}

enum { TOKENS = 7, HEADS = 2, D = 16, Q = TOKENS * HEADS * D, K = TOKENS * D };
static const int32_t offsets[] = {0, 2, TOKENS};

/* x: q, k, v one after the other. Two query heads share one key head; window 4. */
static double attention_loss(const double *x, void *ctx)
{
    const struct context *c = ctx;
    const double *q = x, *k = x + Q, *v = x + Q + K;
    double loss = 0;
    for (int s = 0; s < 2; s++) {
        for (int i = offsets[s]; i < offsets[s + 1]; i++) {
            for (int h = 0; h < HEADS; h++) {
                double p[TOKENS], sum = 0;
                int lo = i - 3 > offsets[s] ? i - 3 : offsets[s];
                for (int t = lo; t <= i; t++) {
                    double score = 0;
                    for (int d = 0; d < D; d++)
                        score += q[(i * HEADS + h) * D + d] * k[t * D + d];
                    sum += p[t] = exp(0.4f * score);
                }
                for (int t = lo; t <= i; t++) {
                    for (int d = 0; d < D; d++)
                        loss += c->weight[(i * HEADS + h) * D + d] * p[t] / sum * v[t * D + d];
                }
            }
        }
    }
    return loss;
}

static void test_attention(void)
{
    const struct kernel_ops *ops = kernels_cpu(KERNEL_SCALAR);
    struct attention_shape shape = {HEADS, 1, D, 4, 0.4f};
    struct segments segments = {2, offsets};
    struct kernel_run run = support_run(NULL, kernels_attention_scratch(1, &shape, TOKENS, TOKENS));
    struct context c = {.weight = support_floats(Q)};
    float *x = support_floats(Q + 2 * K), o[Q], lse[TOKENS * HEADS], dx[Q + 2 * K];
    ops->attention_forward(&run, &shape, &segments, x, x + Q, x + Q + K, o, lse);
    ops->attention_backward(&run, &shape, &segments, x, x + Q, x + Q + K, o, lse, c.weight, dx, dx + Q, dx + Q + K);
    check_slopes(attention_loss, &c, x, dx, Q + 2 * K);
    free(x);
    free(c.weight);
    free(run.scratch);
}

enum { VOCABULARY = 9 };

static double head_loss(const double *x, void *ctx)
{
    const struct context *c = ctx;
    double z[VOCABULARY], sum = 0;
    for (int o = 0; o < VOCABULARY; o++) {
        z[o] = 0;
        for (int i = 0; i < N; i++)
            z[o] += x[i] * c->weight[o * N + i];
        sum += exp(z[o]);
    }
    return 0.7f * (log(sum) - z[c->wanted]);
}

static void test_head(void)
{
    struct context c = {.weight = support_floats(VOCABULARY * N), .wanted = 4};
    struct tensor w = {c.weight, TENSOR_F32, VOCABULARY, N};
    struct kernel_run run = support_run(NULL, kernels_head_scratch(1, 1, N));
    int32_t row = 0, target = 4;
    float *x = support_floats(N), loss, dx[N], weight = 0.7f;
    double wide[N];
    struct labels labels = {1, &row, &target, &weight};
    kernels_cpu(KERNEL_SCALAR)->cross_entropy(&run, &w, &labels, x, &loss, dx);
    for (int i = 0; i < N; i++)
        wide[i] = x[i];
    CHECK_NEAR(loss * 0.7f, head_loss(wide, &c), 1e-6);
    check_slopes(head_loss, &c, x, dx, N);
    free(x);
    free(c.weight);
    free(run.scratch);
}

int tests_gradients(void)
{
    RUN(test_norm);
    RUN(test_gate);
    RUN(test_attention);
    RUN(test_head);
    return check_report();
}
