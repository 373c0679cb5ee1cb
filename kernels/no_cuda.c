/* What a build without CUDA answers. */
#include "kernels/backend.h"

bool backend_cuda_built(void)
{
    return false;
}

int backend_cuda_new(const struct backend_cuda_options *options, struct backend **ret_backend, struct error *err)
{
    (void)options;
    (void)ret_backend;
    return error_set(err, ERR_NOT_FOUND, "this program was built without CUDA (cmake --preset cuda builds it with)");
}
