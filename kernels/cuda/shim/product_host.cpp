/* product.h by plain loops: sums over k in order, float32. */
#include <mutex>
#include <set>
#include <tuple>

#include "kernels/cuda/product.h"

#include <stdlib.h>

struct products {
    enum tensor_type type;
};

static std::mutex lock;
static std::set<std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t, bool, bool, bool, int>> kinds;

static int32_t backwards_from = INT32_MAX;

void shim_products_backwards(int rows)
{
    std::lock_guard<std::mutex> guard(lock);
    backwards_from = rows > 0 ? rows : INT32_MAX;
}

size_t shim_product_kinds(void)
{
    std::lock_guard<std::mutex> guard(lock);
    return kinds.size();
}

struct products *products_new(enum tensor_type type, bool tune, struct error *err)
{
    (void)tune;
    assert(type == TENSOR_F32 || type == TENSOR_BF16);
    struct products *p = static_cast<struct products *>(calloc(1, sizeof *p));
    if (!p) {
        error_set(err, ERR_RESOURCES, "no memory for the matrix products");
        return NULL;
    }
    p->type = type;
    std::lock_guard<std::mutex> guard(lock);
    kinds.clear();
    return p;
}

void products_free(struct products *p)
{
    free(p);
}

static float element(enum tensor_type type, const void *at, ptrdiff_t i)
{
    return type == TENSOR_BF16 ? bf16_to_float(static_cast<const bf16 *>(at)[i]) : static_cast<const float *>(at)[i];
}

/* to (rows, columns) = the matrix at `at`, or its transpose, whose rows lie ld apart. */
static void gather(enum tensor_type type, const void *at, int32_t ld, bool transposed, int32_t rows, int32_t columns,
                   float *to)
{
    for (ptrdiff_t i = 0; i < rows; i++) {
        for (ptrdiff_t j = 0; j < columns; j++)
            to[i * columns + j] = element(type, at, transposed ? j * ld + i : i * ld + j);
    }
}

static int multiply(struct products *p, const struct product *product)
{
    const bool backwards = product->m >= backwards_from;
    int32_t m = product->m, n = product->n, k = product->k;
    assert(m >= 0 && n >= 0 && k >= 0);
    assert(product->lda >= (product->a_transposed ? m : k) && product->ldb >= (product->b_transposed ? k : n));
    assert(product->ldc >= n && (product->c_type == TENSOR_F32 || product->c_type == TENSOR_BF16));

    /* a (m, k), b (k, n) and one row of sums: a column's sums run in the order of k whatever n and m are. */
    float *a = static_cast<float *>(malloc(((size_t)m * k + 1) * sizeof(float)));
    float *b = static_cast<float *>(malloc(((size_t)k * n + 1) * sizeof(float)));
    float *sums = static_cast<float *>(malloc((size_t)n * sizeof(float)));
    int code = a && b && sums ? 0 : ERR_RESOURCES;
    if (code == 0) {
        gather(p->type, product->a, product->lda, product->a_transposed, m, k, a);
        gather(p->type, product->b, product->ldb, product->b_transposed, k, n, b);
        for (ptrdiff_t i = 0; i < m; i++) {
            memset(sums, 0, (size_t)n * sizeof(float));
            for (ptrdiff_t step = 0; step < k; step++) {
                const ptrdiff_t l = backwards ? k - 1 - step : step;
                for (ptrdiff_t j = 0; j < n; j++)
                    sums[j] += a[i * k + l] * b[l * n + j];
            }
            for (ptrdiff_t j = 0; j < n; j++) {
                ptrdiff_t at = i * product->ldc + j;
                float x = product->alpha * sums[j];
                if (product->beta != 0)
                    x += product->beta * element(product->c_type, product->c, at);
                if (product->c_type == TENSOR_BF16)
                    static_cast<bf16 *>(product->c)[at] = bf16_from_float(x);
                else
                    static_cast<float *>(product->c)[at] = x;
            }
        }
    }
    free(a);
    free(b);
    free(sums);
    return code;
}

int product_run(struct products *p, stream_t s, const struct product *x)
{
    if (x->m == 0 || x->n == 0)
        return 0;
    {
        std::lock_guard<std::mutex> guard(lock);
        kinds.insert({x->n, x->k, x->lda, x->ldb, x->ldc, x->a_transposed, x->b_transposed, x->beta != 0, x->c_type});
    }
    if (shim_launch_fails())
        return ERR_FAILED;
    const struct product kept = *x;
    return shim_record(s, [=] { (void)multiply(p, &kept); }) ? 0 : multiply(p, x);
}

const char *products_failure(const struct products *p)
{
    (void)p;
    return "a matrix product";
}
