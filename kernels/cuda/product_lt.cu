/* Matrix products by cuBLASLt. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/product.h"

#include <cublasLt.h>

#define WORKSPACE_BYTES ((size_t)32 << 20)
#define CANDIDATES 8
#define POINTER_ALIGNMENT 16 /* of a product's matrices, which may begin at any eighth bfloat16 of a row */
#define TIMED_RUNS 3
#define MANY_ROWS 4096

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
    bool tune;
    void *workspace;
    struct device_mark *start, *end;
    int32_t count, room;
    struct choice *choices;
    char failure[128];
};

struct products *products_new(enum tensor_type type, bool tune, struct error *err)
{
    struct products *p = static_cast<struct products *>(calloc(1, sizeof *p));
    if (!p) {
        error_set(err, ERR_RESOURCES, "no memory for the matrix products");
        return NULL;
    }
    p->type = type;
    p->tune = tune;
    if (cublasLtCreate(&p->handle) != CUBLAS_STATUS_SUCCESS || device_alloc(WORKSPACE_BYTES, &p->workspace) < 0 ||
        !(p->start = device_mark_new()) || !(p->end = device_mark_new())) {
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
    device_mark_free(p->start);
    device_mark_free(p->end);
    free(p->choices);
    free(p);
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

static cublasStatus_t multiply(struct products *p, stream_t s, const struct product *x, const struct layouts *l,
                               const cublasLtMatmulAlgo_t *algorithm)
{
    return cublasLtMatmul(p->handle, l->operation, &x->alpha, x->b, l->first, x->a, l->second, &x->beta, x->c,
                          l->result, x->c, l->result, algorithm, p->workspace, WORKSPACE_BYTES, s);
}

/* Milliseconds of one product; infinity if the algorithm does not run. c is written again and again. */
static float time_algorithm(struct products *p, stream_t s, const struct product *x, const struct layouts *l,
                            const cublasLtMatmulAlgo_t *algorithm)
{
    if (multiply(p, s, x, l, algorithm) != CUBLAS_STATUS_SUCCESS)
        return INFINITY;
    device_mark_set(p->start, s);
    for (int i = 0; i < TIMED_RUNS; i++)
        if (multiply(p, s, x, l, algorithm) != CUBLAS_STATUS_SUCCESS)
            return INFINITY;
    device_mark_set(p->end, s);
    device_mark_wait(p->end);
    return device_mark_elapsed_ms(p->start, p->end);
}

/* An algorithm that splits k adds partial sums in an order that depends on the grid. */
static bool splits(const cublasLtMatmulAlgo_t *algorithm)
{
    int32_t split = 1;
    size_t written = 0;
    return cublasLtMatmulAlgoConfigGetAttribute(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split, sizeof split,
                                                &written) != CUBLAS_STATUS_SUCCESS ||
           split > 1;
}

/* Whether an algorithm takes other numbers of rows than the one it was proposed for. */
static bool suits_all_rows(const struct products *p, const struct product *x, const cublasLtMatmulAlgo_t *algorithm)
{
    static const int32_t rows[] = {9, 17, 64, 100, 1024, 16384};
    bool suits = true;
    for (size_t i = 0; suits && i < ARRAY_LEN(rows); i++) {
        struct layouts l;
        cublasLtMatmulHeuristicResult_t result;
        suits = layouts_init(&l, p, x, rows[i]) &&
                cublasLtMatmulAlgoCheck(p->handle, l.operation, l.first, l.second, l.result, l.result, algorithm,
                                        &result) == CUBLAS_STATUS_SUCCESS &&
                result.workspaceSize <= WORKSPACE_BYTES;
        layouts_release(&l);
    }
    return suits;
}

/* The best of what the library proposes: its own first, or the one that is fastest now. An accumulating product cannot
 * be repeated, so it takes the first. */
static int pick(struct products *p, stream_t s, const struct product *x, const struct layouts *l,
                const cublasLtMatmulHeuristicResult_t *found, int count)
{
    float least = INFINITY;
    int best = -1;
    for (int i = 0; i < count; i++) {
        if (found[i].state != CUBLAS_STATUS_SUCCESS || splits(&found[i].algo) || !suits_all_rows(p, x, &found[i].algo))
            continue;
        if (!p->tune || x->beta != 0)
            return i;
        const float ms = time_algorithm(p, s, x, l, &found[i].algo);
        if (ms < least) {
            least = ms;
            best = i;
        }
    }
    return best;
}

/* What the library proposes for these layouts; returns how many. */
static int propose(const struct products *p, const struct layouts *l, cublasLtMatmulHeuristicResult_t *found)
{
    cublasLtMatmulPreference_t preference = NULL;
    const uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
    const size_t workspace = WORKSPACE_BYTES;
    const uint32_t alignment = POINTER_ALIGNMENT;
    static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    bool set = true;
    int count = 0;
    if (cublasLtMatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS)
        return 0;
    for (size_t i = 0; i < ARRAY_LEN(alignments); i++)
        set = set && cublasLtMatmulPreferenceSetAttribute(preference, alignments[i], &alignment, sizeof alignment) ==
                         CUBLAS_STATUS_SUCCESS;
    if (!set ||
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                             sizeof workspace) != CUBLAS_STATUS_SUCCESS ||
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_reduction,
                                             sizeof no_reduction) != CUBLAS_STATUS_SUCCESS ||
        cublasLtMatmulAlgoGetHeuristic(p->handle, l->operation, l->first, l->second, l->result, l->result, preference,
                                       CANDIDATES, found, &count) != CUBLAS_STATUS_SUCCESS)
        count = 0;
    cublasLtMatmulPreferenceDestroy(preference);
    return count;
}

static const struct choice *choose(struct products *p, stream_t s, const struct product *x, const struct layouts *l)
{
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    int best;
    if (p->count == p->room) {
        const int32_t room = p->room ? 2 * p->room : 64;
        struct choice *more = static_cast<struct choice *>(realloc(p->choices, sizeof *more * (size_t)room));
        if (!more)
            return NULL;
        p->choices = more;
        p->room = room;
    }
    best = pick(p, s, x, l, found, propose(p, l, found));
    if (best < 0) { /* for few rows it may know only ways that split k: then one that is meant for many */
        struct layouts many;
        if (layouts_init(&many, p, x, MANY_ROWS))
            best = pick(p, s, x, l, found, propose(p, &many, found));
        layouts_release(&many);
    }
    if (best < 0)
        return NULL;
    struct choice *c = &p->choices[p->count++];
    *c = {x->n,         x->k,      x->lda,          x->ldb, x->ldc, x->a_transposed, x->b_transposed,
          x->beta != 0, x->c_type, found[best].algo};
    return c;
}

const char *products_failure(const struct products *p)
{
    return p->failure;
}

int product_run(struct products *p, stream_t s, const struct product *x)
{
    struct layouts l;
    const char *why = "no memory";
    if (x->m == 0 || x->n == 0)
        return 0;
    if (layouts_init(&l, p, x, x->m)) {
        const struct choice *c = find(p, x);
        if (!c)
            c = choose(p, s, x, &l);
        const cublasStatus_t status = c ? multiply(p, s, x, &l, &c->algorithm) : CUBLAS_STATUS_NOT_SUPPORTED;
        why = status == CUBLAS_STATUS_SUCCESS ? NULL : c ? cublasLtGetStatusName(status) : "no way to compute it";
    }
    layouts_release(&l);
    if (!why)
        return 0;
    snprintf(p->failure, sizeof p->failure, "a matrix product of %d x %d x %d (%s)", x->m, x->n, x->k, why);
    return ERR_FAILED;
}
