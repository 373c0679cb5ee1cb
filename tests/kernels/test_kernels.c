/* Every operation of every table of this machine against the scalar table, over ragged sizes. */
#include "tests/kernels/support.h"

static struct pool *pool;

static const enum tensor_type all_types[] = {
    TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0,
    TENSOR_Q5_1, TENSOR_Q8_0, TENSOR_Q2_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K,
};

static void check_linear(const struct kernel_ops *ops, enum kernel_precision precision, enum tensor_type type,
                         int32_t m, int32_t out, int32_t in)
{
    const struct kernel_ops *reference = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = support_run(pool, kernels_linear_scratch(pool_threads(pool), m, out, in > 131 ? in : 131));
    struct tensor w = support_tensor(type, out, in);
    size_t ny = (size_t)m * (size_t)out, nx = (size_t)m * (size_t)in;
    float *x = support_floats(nx), *bias = support_floats((size_t)out), *y = support_floats(ny);
    float *want = support_copy(y, ny), *dx = support_floats(nx), *want_dx = support_copy(dx, nx);
    double tolerance = precision == KERNEL_F32 || ops->isa < KERNEL_AVX512_VNNI ? 2e-5
                       : ops->isa == KERNEL_AVX512_VNNI                         ? 4e-3 /* exactly: test_rounded.c */
                                                                                : 1e-2;
    /* A thin product on the way, or one that is too thick for it. */
    const int32_t rank = out % 2 ? 19 : 131, stride = rank + 3;
    float *h = support_floats((size_t)m * (size_t)stride), *a = support_floats((size_t)rank * (size_t)in);
    float *b = support_floats((size_t)rank * (size_t)out);
    const struct low_rank forward = {rank, 0.25f, h, stride, b}, backward = {rank, -0.5f, h, stride, a};
    run.precision = precision;
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        for (int low = 0; low < 2; low++) {
            const struct low_rank *f = low ? &forward : NULL, *g = low ? &backward : NULL;
            ops->linear_forward(&run, m, &w, accumulate ? NULL : bias, f, x, y, accumulate);
            reference->linear_forward(&run, m, &w, accumulate ? NULL : bias, f, x, want, accumulate);
            CHECK_CLOSE(y, want, ny, tolerance);
            ops->linear_backward(&run, m, &w, g, want, dx, accumulate);
            reference->linear_backward(&run, m, &w, g, want, want_dx, accumulate);
            CHECK_CLOSE(dx, want_dx, nx, tolerance);
        }
    }
    free(h);
    free(a);
    free(b);
    if (m <= KERNEL_DECODE_ROWS) {
        const struct served_linear fast = {&w, bias, y}, plain = {&w, bias, want};
        ops->linear_decode(&run, m, 1, &fast, x);
        reference->linear_decode(&run, m, 1, &plain, x);
        CHECK_CLOSE(y, want, ny, 2e-5);
    }
    free(run.scratch);
    free((void *)(uintptr_t)w.data);
    free(x);
    free(bias);
    free(y);
    free(want);
    free(dx);
    free(want_dx);
}

static void test_linear(void)
{
    FOR_EACH_TABLE(ops)
    {
        for (size_t i = 0; i < ARRAY_LEN(all_types); i++) {
            int32_t in = tensor_type_block(all_types[i]) == 256 ? 512 : 96;
            check_linear(ops, KERNEL_F32, all_types[i], 13, 77, in);
            check_linear(ops, KERNEL_BF16, all_types[i], 7, 130, in);
            check_linear(ops, KERNEL_F32, all_types[i], 1, 33, in);
        }
        for (int32_t n = 1; n <= 70; n += 3) {
            check_linear(ops, KERNEL_F32, TENSOR_F32, n % 8 + 1, n, 71 - n);
            check_linear(ops, KERNEL_BF16, TENSOR_F32, n % 8 + 1, n, 71 - n);
        }
        check_linear(ops, KERNEL_F32, TENSOR_Q8_0, 6, 64, 4160); /* deeper than one panel */
        check_linear(ops, KERNEL_BF16, TENSOR_Q8_0, 6, 64, 4160);
        check_linear(ops, KERNEL_F32, TENSOR_F32, 5, 4100, 40);
        check_linear(ops, KERNEL_BF16, TENSOR_F32, 5, 4101, 40);
        check_linear(ops, KERNEL_F32, TENSOR_Q4_1, 400, 40, 64); /* rows cut between threads */
        check_linear(ops, KERNEL_BF16, TENSOR_Q4_1, 400, 40, 64);
    }
}

static void check_lora(const struct kernel_ops *ops, int32_t m, int32_t out, int32_t in, int32_t r, int32_t stride)
{
    const struct kernel_ops *reference = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = support_run(pool, kernels_linear_scratch(pool_threads(pool), m, out, in > r ? in : r));
    size_t nh = (size_t)m * (size_t)stride, ny = (size_t)m * (size_t)out, nx = (size_t)m * (size_t)in;
    size_t na = (size_t)r * (size_t)in, nb = (size_t)out * (size_t)r;
    float *x = support_floats(nx), *a = support_floats(na), *b = support_floats(nb), *h = support_floats(nh);
    float *y = support_floats(ny), *hw = support_copy(h, nh), *yw = support_copy(y, ny), *xw = support_copy(x, nx);
    float *ga = support_floats(na), *gb = support_floats(nb), *gaw = support_copy(ga, na), *gbw = support_copy(gb, nb);
    float *dense = support_floats((size_t)m * (size_t)r), *dense_want = support_copy(dense, (size_t)m * (size_t)r);
    ops->lora_down(&run, m, in, r, a, x, dense);
    reference->lora_down(&run, m, in, r, a, x, dense_want);
    CHECK_CLOSE(dense, dense_want, (size_t)m * (size_t)r, 1e-5);
    ops->lora_up(&run, m, out, r, 0.75f, b, h, stride, y);
    reference->lora_up(&run, m, out, r, 0.75f, b, h, stride, yw);
    CHECK_CLOSE(y, yw, ny, 1e-5);
    ops->lora_up_backward(&run, m, out, r, 0.75f, b, y, h, stride);
    reference->lora_up_backward(&run, m, out, r, 0.75f, b, y, hw, stride);
    CHECK_CLOSE(h, hw, nh, 1e-5);
    int32_t t0 = m / 3, t1 = m - m / 4;
    ops->lora_grad_b(&run, t0, t1, out, r, 0.5f, y, hw, stride, gb);
    reference->lora_grad_b(&run, t0, t1, out, r, 0.5f, y, hw, stride, gbw);
    CHECK_CLOSE(gb, gbw, nb, 1e-5);
    ops->lora_grad_a(&run, t0, t1, in, r, hw, stride, x, ga);
    reference->lora_grad_a(&run, t0, t1, in, r, hw, stride, x, gaw);
    CHECK_CLOSE(ga, gaw, na, 1e-5);
    ops->lora_grad_a(&run, t0, t0, in, r, hw, stride, x, ga); /* no rows: unchanged */
    CHECK_CLOSE(ga, gaw, na, 1e-5);
    ops->lora_down_backward(&run, m, in, r, a, dense_want, x);
    reference->lora_down_backward(&run, m, in, r, a, dense_want, xw);
    CHECK_CLOSE(x, xw, nx, 1e-5);
    float *all[] = {x, a, b, h, y, hw, yw, xw, ga, gb, gaw, gbw, dense, dense_want, run.scratch};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        free(all[i]);
}

static void test_lora(void)
{
    FOR_EACH_TABLE(ops)
    {
        check_lora(ops, 37, 70, 96, 16, 16);
        check_lora(ops, 61, 129, 48, 4, 7);
        check_lora(ops, 12, 64, 130, 64, 192);
        check_lora(ops, 1, 5, 3, 2, 2);
        check_lora(ops, 9, 33, 65, 9, 11);
    }
}

static void check_norm(const struct kernel_ops *ops, int32_t m, int32_t n, bool with_add)
{
    const struct kernel_ops *reference = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = {.pool = pool};
    size_t all = (size_t)m * (size_t)n;
    float *x = support_floats(all), *xw = support_copy(x, all), *add = support_floats(all), *y = support_floats(all);
    float *yw = support_floats(all), *gain = support_floats((size_t)n), *rstd = support_floats((size_t)m);
    float *rstdw = support_floats((size_t)m);
    ops->rmsnorm_forward(&run, m, n, 1e-5f, gain, x, with_add ? add : NULL, y, rstd);
    reference->rmsnorm_forward(&run, m, n, 1e-5f, gain, xw, with_add ? add : NULL, yw, rstdw);
    CHECK_CLOSE(x, xw, all, 0);
    CHECK_CLOSE(y, yw, all, 2e-6);
    CHECK_CLOSE(rstd, rstdw, (size_t)m, 2e-6);
    ops->rmsnorm_backward(&run, m, n, gain, xw, rstdw, add, y, true);
    reference->rmsnorm_backward(&run, m, n, gain, xw, rstdw, add, yw, true);
    CHECK_CLOSE(y, yw, all, 4e-6);
    ops->rmsnorm_backward(&run, m, n, gain, xw, rstdw, y, y, false); /* in place */
    reference->rmsnorm_backward(&run, m, n, gain, xw, rstdw, yw, yw, false);
    CHECK_CLOSE(y, yw, all, 1e-5);
    float *pieces[] = {x, xw, add, y, yw, gain, rstd, rstdw};
    for (size_t i = 0; i < ARRAY_LEN(pieces); i++)
        free(pieces[i]);
}

static void test_norm(void)
{
    FOR_EACH_TABLE(ops)
    {
        check_norm(ops, 37, 64, true);
        check_norm(ops, 1, 1, false);
        check_norm(ops, 18, 577, true);
        check_norm(ops, 5, 13, false);
    }
}

static void test_rope(void)
{
    enum { M = 19, HEADS = 3, D = 32, ROTATED = 24, POSITIONS = 50, N = M * HEADS * D };
    float *table = support_floats(POSITIONS * ROTATED), *x = support_floats(N), *start = support_copy(x, N);
    float *want = support_copy(x, N);
    int32_t positions[M];
    struct kernel_run run = {.pool = pool};
    kernels_rope_table(POSITIONS, ROTATED, 1e4, 1, NULL, table);
    CHECK_NEAR(table[7 * ROTATED + 4], cos(7 * pow(1e4, -4.0 / ROTATED)), 1e-7);
    CHECK_NEAR(table[7 * ROTATED + 5], sin(7 * pow(1e4, -4.0 / ROTATED)), 1e-7);
    for (int i = 0; i < M; i++)
        positions[i] = (i * 7) % POSITIONS;
    FOR_EACH_TABLE(ops)
    {
        for (int order = ROPE_NORM; order <= ROPE_NEOX; order++) {
            memcpy(x, start, N * sizeof(float));
            memcpy(want, start, N * sizeof(float));
            ops->rope(&run, M, HEADS, D, ROTATED, (enum rope_order)order, false, table, positions, x);
            kernels_cpu(KERNEL_SCALAR)
                ->rope(&run, M, HEADS, D, ROTATED, (enum rope_order)order, false, table, positions, want);
            CHECK_CLOSE(x, want, N, 1e-6);
            CHECK(x[2 * HEADS * D + ROTATED] == start[2 * HEADS * D + ROTATED]);
            ops->rope(&run, M, HEADS, D, ROTATED, (enum rope_order)order, true, table, positions, x);
            CHECK_CLOSE(x, start, N, 1e-6);
        }
    }
    free(table);
    free(x);
    free(start);
    free(want);
}

static void test_gate(void)
{
    enum { M = 21, N = 45, STRIDE = 100 };
    const struct kernel_ops *reference = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = {.pool = pool};
    FOR_EACH_TABLE(ops)
    {
        for (int kind = GATE_SILU; kind <= GATE_GELU_TANH; kind++) {
            float *both = support_floats(M * STRIDE), *out = support_floats(M * N), *want = support_floats(M * N);
            for (int i = 0; i < M * STRIDE; i++)
                both[i] *= 12;
            both[3] = 300;
            both[4] = -300;
            float *both_want = support_copy(both, M * STRIDE), *dout = support_floats(M * N);
            ops->gated_forward(&run, M, N, (enum gate_kind)kind, both, both + N, STRIDE, out);
            reference->gated_forward(&run, M, N, (enum gate_kind)kind, both, both + N, STRIDE, want);
            CHECK_CLOSE(out, want, M * N, 1e-6);
            ops->gated_backward(&run, M, N, (enum gate_kind)kind, both, both + N, STRIDE, dout);
            reference->gated_backward(&run, M, N, (enum gate_kind)kind, both_want, both_want + N, STRIDE, dout);
            CHECK_CLOSE(both, both_want, M * STRIDE, 1e-6);
            free(both);
            free(out);
            free(want);
            free(both_want);
            free(dout);
        }
    }
}

static void check_head(const struct kernel_ops *ops, enum tensor_type type, int32_t vocabulary, int32_t in, int32_t m,
                       int32_t count)
{
    const struct kernel_ops *reference = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = support_run(pool, kernels_head_scratch(pool_threads(pool), count, in));
    struct tensor w = support_tensor(type, vocabulary, in);
    size_t n = (size_t)m * (size_t)in;
    float *x = support_floats(n), *dx = support_floats(n), *want = support_copy(dx, n), *weights = support_floats(600);
    float losses[600], losses_want[600];
    int32_t rows[600], targets[600];
    for (int32_t i = 0; i < count; i++) {
        rows[i] = m - 1 - i;
        targets[i] = (int32_t)(support_bits() % (uint64_t)vocabulary);
    }
    struct labels labels = {count, rows, targets, weights};
    ops->cross_entropy(&run, &w, &labels, x, losses, dx);
    reference->cross_entropy(&run, &w, &labels, x, losses_want, want);
    CHECK_CLOSE(losses, losses_want, (size_t)count, 1e-5);
    CHECK_CLOSE(dx, want, n, 1e-5);
    ops->cross_entropy(&run, &w, &labels, x, losses, NULL);
    CHECK_CLOSE(losses, losses_want, (size_t)count, 1e-5);
    free(run.scratch);
    free((void *)(uintptr_t)w.data);
    free(x);
    free(dx);
    free(want);
    free(weights);
}

/* Labels that are all but certain, in each block of the vocabulary: loss and gradient are small and keep their digits.
 * Row r of x is sure·W[target], and W's rows are nearly at right angles. */
static void check_sure_head(const struct kernel_ops *ops, enum kernel_precision precision, double tolerance)
{
    enum { WORDS = 4500, IN = 128, ROWS = 6 };
    const float sure = 0.7f;
    struct kernel_run run = support_run(pool, kernels_head_scratch(pool_threads(pool), ROWS, IN));
    run.precision = precision;
    struct tensor w = support_tensor(TENSOR_F32, WORDS, IN);
    const float *words = w.data;
    float *x = support_floats(ROWS * IN), *dx = support_floats(ROWS * IN), losses[ROWS];
    int32_t targets[ROWS];
    for (int32_t r = 0; r < ROWS; r++) {
        targets[r] = r * (WORDS - 1) / (ROWS - 1);
        for (int32_t i = 0; i < IN; i++)
            x[r * IN + i] = sure * words[targets[r] * IN + i];
    }
    struct labels labels = {.count = ROWS, .targets = targets};
    ops->cross_entropy(&run, &w, &labels, x, losses, dx);
    for (int32_t r = 0; r < ROWS; r++) {
        double gradient[IN] = {0}, others = 0, top = 0, error = 0, size = 0;
        for (int32_t i = 0; i < IN; i++)
            top += (double)x[r * IN + i] * (double)words[targets[r] * IN + i];
        for (int32_t v = 0; v < WORDS; v++) {
            double z = 0;
            for (int32_t i = 0; i < IN; i++)
                z += (double)x[r * IN + i] * (double)words[v * IN + i];
            const double e = v == targets[r] ? 0 : exp(z - top);
            others += e;
            for (int32_t i = 0; i < IN; i++)
                gradient[i] += e * (double)(words[v * IN + i] - words[targets[r] * IN + i]);
        }
        CHECK(others < 1e-5 && others > 1e-30);
        for (int32_t i = 0; i < IN; i++) {
            const double want = gradient[i] / (1 + others);
            error += (want - (double)dx[r * IN + i]) * (want - (double)dx[r * IN + i]);
            size += want * want;
        }
        CHECK(fabs((double)losses[r] - log1p(others)) <= tolerance * log1p(others));
        CHECK(sqrt(error) <= tolerance * sqrt(size));
    }
    free(run.scratch);
    free((void *)(uintptr_t)w.data);
    free(x);
    free(dx);
}

static void test_head(void)
{
    FOR_EACH_TABLE(ops)
    {
        check_sure_head(ops, KERNEL_F32, 1e-4);
        check_sure_head(ops, KERNEL_BF16, 0.05);
        check_head(ops, TENSOR_F32, 101, 24, 20, 7);
        check_head(ops, TENSOR_Q8_0, 2500, 64, 560, 530); /* more rows and words than are held at once */
        check_head(ops, TENSOR_Q4_1, 5001, 96, 9, 9);
        check_head(ops, TENSOR_Q6_K, 300, 256, 5, 5);
    }
}

static void test_embed_and_arenas(void)
{
    enum { N = 40003 };
    const struct kernel_ops *reference = kernels_cpu(KERNEL_SCALAR);
    struct kernel_run run = {.pool = pool};
    struct adamw_params params = {1e-2f, 0.9f, 0.99f, 1e-8f, 0.1f, 3};
    FOR_EACH_TABLE(ops)
    {
        struct tensor w = support_tensor(TENSOR_Q4_1, 31, 64);
        int32_t ids[] = {30, 0, 7, 7};
        float y[4 * 64], want[4 * 64];
        ops->embed(&run, 4, &w, ids, 2.5f, y);
        reference->embed(&run, 4, &w, ids, 2.5f, want);
        CHECK_SAME(y, want, ARRAY_LEN(y));
        free((void *)(uintptr_t)w.data);
        float *g = support_floats(N), *m = support_floats(N), *v = support_floats(N), *p = support_floats(N);
        for (int i = 0; i < N; i++)
            v[i] = fabsf(v[i]);
        float *mw = support_copy(m, N), *vw = support_copy(v, N), *pw = support_copy(p, N);
        ops->adamw(&run, N, &params, g, m, v, p);
        reference->adamw(&run, N, &params, g, mw, vw, pw);
        CHECK_SAME(m, mw, N);
        CHECK_SAME(v, vw, N);
        CHECK_CLOSE(p, pw, N, 1e-6);
        ops->sgd_momentum(&run, N, 0.1f, 0.9f, g, m, p);
        reference->sgd_momentum(&run, N, 0.1f, 0.9f, g, mw, pw);
        ops->add(&run, N, g, p);
        reference->add(&run, N, g, pw);
        CHECK_SAME(m, mw, N);
        CHECK_CLOSE(p, pw, N, 1e-6);
        float *all[] = {g, m, v, p, mw, vw, pw};
        for (size_t i = 0; i < ARRAY_LEN(all); i++)
            free(all[i]);
    }
}

static void test_names(void)
{
    enum kernel_isa isa = KERNEL_SCALAR;
    for (int i = KERNEL_SCALAR; i <= KERNEL_AVX512_BF16; i++) {
        CHECK(kernel_isa_parse(kernel_isa_name((enum kernel_isa)i), &isa) && (int)isa == i);
        CHECK((int)kernels_cpu((enum kernel_isa)i)->isa <= i);
        if ((int)kernels_cpu((enum kernel_isa)i)->isa < i)
            fprintf(stderr, "[ skip ] %s: this CPU or build has no such instructions\n",
                    kernel_isa_name((enum kernel_isa)i));
    }
    CHECK(!kernel_isa_parse("sse9", &isa));
}

int main(void)
{
    struct error err = {0};
    int failures = 0;
    RUN(test_names);
    for (int threads = 1; threads <= 3; threads += 2) {
        if (pool_new(threads, &pool, &err) < 0) {
            fprintf(stderr, "%s\n", err.message);
            return 1;
        }
        RUN(test_linear);
        RUN(test_lora);
        failures += tests_attention(pool);
        RUN(test_norm);
        RUN(test_rope);
        RUN(test_gate);
        RUN(test_head);
        RUN(test_embed_and_arenas);
        failures += tests_decode(pool);
        pool_free(pool);
    }
    failures += tests_independence() + tests_attention_long() + tests_gradients() + tests_tensor() + tests_clip() +
                tests_rounded();
    return check_report() || failures ? 1 : 0;
}
