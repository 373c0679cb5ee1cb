/*
 * Internal to model/: one block of the backend's memory and one of the host's, handed out piece by piece. The same
 * function that hands out is run first only to count, so that sizes are written once.
 */
#ifndef MODEL_CARVE_H
#define MODEL_CARVE_H

#include "base/arena.h"
#include "kernels/backend.h"

struct carver {
    const struct backend *be;
    uint8_t *device;    /* NULL: count */
    struct arena *host; /* NULL: count */
    size_t device_bytes, host_bytes;
    bool overflow;
};

void *carve(struct carver *c, size_t rows, size_t row_bytes);
float *carve_floats(struct carver *c, size_t rows, size_t width);
void *carve_host(struct carver *c, size_t rows, size_t row_bytes);
/* A matrix of `width` columns, and where the backend is fused of LoRA's `ranks` columns behind them. */
struct rows carve_rows(struct carver *c, size_t rows, int32_t width, int32_t ranks);
/* Several matrices: columns of one where fused, on their own where not. */
void carve_outputs(struct carver *c, size_t rows, int count, const int32_t width[], int32_t ranks,
                   struct rows *const to[]);
/* LoRA's columns: behind x's `width` where fused, a matrix of their own where not; at NULL without ranks. */
struct rows carve_lora(struct carver *c, size_t rows, struct rows x, int32_t width, int32_t ranks);

#endif
