/*
 * Internal to kernels/cuda: matrix products, cuBLASLt's on a card (product_lt.cu) and plain loops under the shim
 * (shim/product_host.cpp).
 *
 * c (m, n) = alpha·op(a)·op(b) + beta·c, row-major, float32 sums. a is (m, k), or (k, m) if a_transposed; b is (k, n),
 * or (n, k) if b_transposed. Elements of a and b: `type`; of c: c_type.
 *
 * The augmented matrix of a group (backend.cu): W̃ (out + R, in + R) with rows in + R apart,
 *
 *     W̃ = [ W   sB ]     W: the group's members one under the other; sB: block-diagonal, member i's scale·Bᵢ in its
 * rows [ A   0  ]     and its own rank columns; A: the members' A one under the other; R: all ranks, rounded up.
 *
 * makes each step of a LoRA group one product:  h = x·Aᵀ;  y = [x h]·[W sB]ᵀ;  dh = dy·sB;  dx = [dy dh]·[W; A].
 */
#ifndef KERNELS_CUDA_PRODUCT_H
#define KERNELS_CUDA_PRODUCT_H

extern "C" {
#include "kernels/backend.h"
}
#include "kernels/cuda/cuda.h"

struct products; /* handle, workspace, chosen algorithms */

struct product {
    int32_t m, n, k;
    const void *a;
    int32_t lda;
    bool a_transposed;
    const void *b;
    int32_t ldb;
    bool b_transposed;
    float alpha, beta;
    void *c;
    int32_t ldc;
    enum tensor_type c_type;
};

/* It takes 32 MB of device memory. tune: algorithms are chosen by timing them on the first product of a kind, with its
 * own matrices, and not by the library's estimate for it. NULL and a message on failure. */
struct products *products_new(enum tensor_type type, bool tune, struct error *err);
void products_free(struct products *p);
/* An algorithm is chosen at the first product of each (n, k, layout), never splits k across blocks, and is used for
 * every m from then on: so a row of c has the same bits whatever m is. Returns 0 or a negative ERR_ code (nothing is
 * enqueued then). */
int product_run(struct products *p, stream_t s, const struct product *product);
const char *products_failure(const struct products *p); /* what failed last, for a message */

#endif
