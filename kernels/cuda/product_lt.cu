/* Matrix products by cuBLASLt. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/product.h"

#include <cublasLt.h>

#define WORKSPACE_BYTES ((size_t)32 << 20)
#define CHOICES_MAX 256
#define CANDIDATES 8

/* What an algorithm is chosen for: everything of a product but m. */
struct choice {
    int32_t n, k, lda, ldb, ldc;
    bool a_transposed, b_transposed, accumulate;
    enum tensor_type c_type;
    cublasLtMatmulAlgo_t algorithm;
};

struct products {
    cublasLtHandle_t handle;
    enum tensor_type type;
    int32_t m_reference;
    void *workspace;
    int32_t count;
    struct choice choices[CHOICES_MAX];
};

struct products *products_new(enum tensor_type type, struct error *err)
{
    struct products *p = static_cast<struct products *>(calloc(1, sizeof *p));
    if (!p) {
        error_set(err, ERR_RESOURCES, "no memory for the matrix products");
        return NULL;
    }
    p->type = type;
    p->m_reference = 4096;
    if (cublasLtCreate(&p->handle) != CUBLAS_STATUS_SUCCESS || device_alloc(WORKSPACE_BYTES, &p->workspace) < 0) {
        products_free(p);
        error_set(err, ERR_RESOURCES, "cuBLASLt cannot start: is the device's memory full?");
        return NULL;
    }
    return p;
}

void products_free(struct products *p)
{
    if (!p)
        return;
    if (p->handle)
        cublasLtDestroy(p->handle);
    device_release(p->workspace);
    free(p);
}

void products_reference(struct products *p, int32_t m)
{
    if (m == p->m_reference)
        return;
    p->m_reference = m;
    p->count = 0;
}

static cudaDataType_t data_type(enum tensor_type type)
{
    return type == TENSOR_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* cuBLASLt is column-major: it computes cᵀ = op(b)ᵀ·op(a)ᵀ over the same memory. */
struct layouts {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t first, second, result; /* b, a and c, transposed */
};

static bool layouts_init(struct layouts *l, const struct products *p, const struct product *x, int32_t m)
{
    const cublasOperation_t op_first = x->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_second = x->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cudaDataType_t type = data_type(p->type);
    memset(l, 0, sizeof *l);
    return cublasLtMatmulDescCreate(&l->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatmulDescSetAttribute(l->operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_first, sizeof op_first) ==
               CUBLAS_STATUS_SUCCESS &&
           cublasLtMatmulDescSetAttribute(l->operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_second, sizeof op_second) ==
               CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutCreate(&l->first, type, x->b_transposed ? x->k : x->n, x->b_transposed ? x->n : x->k,
                                      x->ldb) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutCreate(&l->second, type, x->a_transposed ? m : x->k, x->a_transposed ? x->k : m,
                                      x->lda) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutCreate(&l->result, data_type(x->c_type), x->n, m, x->ldc) == CUBLAS_STATUS_SUCCESS;
}

static void layouts_release(struct layouts *l)
{
    if (l->operation)
        cublasLtMatmulDescDestroy(l->operation);
    if (l->first)
        cublasLtMatrixLayoutDestroy(l->first);
    if (l->second)
        cublasLtMatrixLayoutDestroy(l->second);
    if (l->result)
        cublasLtMatrixLayoutDestroy(l->result);
}

static const struct choice *find(const struct products *p, const struct product *x)
{
    for (int32_t i = 0; i < p->count; i++) {
        const struct choice *c = &p->choices[i];
        if (c->n == x->n && c->k == x->k && c->lda == x->lda && c->ldb == x->ldb && c->ldc == x->ldc &&
            c->a_transposed == x->a_transposed && c->b_transposed == x->b_transposed &&
            c->accumulate == (x->beta != 0) && c->c_type == x->c_type)
            return c;
    }
    return NULL;
}

/* The heuristic's first algorithm for the reference m that does not split k: a split's partial sums would be added in
 * an order that depends on the grid. */
static const struct choice *choose(struct products *p, const struct product *x)
{
    struct layouts l;
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    const uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
    const size_t workspace = WORKSPACE_BYTES;
    int count = 0;
    struct choice *c = NULL;
    if (p->count == CHOICES_MAX)
        p->count = 0; /* a program with that many shapes chooses anew, which gives the same again */
    if (layouts_init(&l, p, x, x->a_transposed ? x->m : p->m_reference) &&
        cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                             sizeof workspace) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_reduction,
                                             sizeof no_reduction) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulAlgoGetHeuristic(p->handle, l.operation, l.first, l.second, l.result, l.result, preference,
                                       CANDIDATES, found, &count) == CUBLAS_STATUS_SUCCESS) {
        for (int i = 0; i < count && !c; i++) {
            int32_t split = 1;
            size_t written = 0;
            if (found[i].state != CUBLAS_STATUS_SUCCESS ||
                cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split,
                                                     sizeof split, &written) != CUBLAS_STATUS_SUCCESS ||
                split > 1)
                continue;
            c = &p->choices[p->count++];
            *c = {x->n,         x->k,      x->lda,       x->ldb, x->ldc, x->a_transposed, x->b_transposed,
                  x->beta != 0, x->c_type, found[i].algo};
        }
    }
    cublasLtMatmulPreferenceDestroy(preference);
    layouts_release(&l);
    return c;
}

int product_run(struct products *p, stream_t s, const struct product *x)
{
    struct layouts l;
    if (x->m == 0 || x->n == 0)
        return 0;
    const struct choice *c = find(p, x);
    if (!c && !(c = choose(p, x)))
        return ERR_FAILED;
    cublasStatus_t status = CUBLAS_STATUS_ALLOC_FAILED;
    if (layouts_init(&l, p, x, x->m))
        status = cublasLtMatmul(p->handle, l.operation, &x->alpha, x->b, l.first, x->a, l.second, &x->beta, x->c,
                                l.result, x->c, l.result, &c->algorithm, p->workspace, WORKSPACE_BYTES, s);
    layouts_release(&l);
    return status == CUBLAS_STATUS_SUCCESS ? 0 : ERR_FAILED;
}
