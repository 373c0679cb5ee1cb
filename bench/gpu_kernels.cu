extern "C" {
#include "bench/gpu_kernels.h"
}
#include "kernels/cuda/backend.h"

extern "C" void gpu_add_bias(struct backend *be, int32_t m, int32_t n, const float *bias, struct rows y)
{
    rows_add_bias(cuda_of(be)->stream, be->element, m, n, bias, y);
}

extern "C" void gpu_dequantise(struct backend *be, const struct tensor *w, const void *blocks, struct rows to)
{
    size_t row_bytes = 0;
    if (!tensor_type_row_bytes(w->type, (size_t)w->in, &row_bytes))
        abort();
    dequantise_matrix(cuda_of(be)->stream, be->element, w->out, w->in, w->type, blocks, row_bytes, to);
}
