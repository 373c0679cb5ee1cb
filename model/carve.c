#include "model/carve.h"

#include "base/checked.h"

static bool count_piece(size_t *total, size_t rows, size_t row_bytes, size_t *ret_at)
{
    size_t bytes;
    *ret_at = *total;
    return checked_mul(rows, row_bytes, &bytes) && checked_align(bytes, 256, &bytes) &&
           checked_add(*total, bytes, total);
}

void *carve(struct carver *c, size_t rows, size_t row_bytes)
{
    size_t at;
    if (!count_piece(&c->device_bytes, rows, row_bytes, &at))
        c->overflow = true;
    return c->device && !c->overflow ? c->device + at : NULL;
}

float *carve_floats(struct carver *c, size_t rows, size_t width)
{
    return carve(c, rows, width * sizeof(float));
}

void *carve_host(struct carver *c, size_t rows, size_t row_bytes)
{
    size_t bytes;
    if (!checked_mul(rows, row_bytes, &bytes) || !checked_align(bytes, ARENA_ALIGNMENT, &bytes) ||
        !checked_add(c->host_bytes, bytes, &c->host_bytes))
        c->overflow = true;
    return c->host && !c->overflow ? arena_take(c->host, bytes) : NULL;
}

struct rows carve_rows(struct carver *c, size_t rows, int32_t width, int32_t ranks)
{
    const int32_t stride = width + (c->be->fused ? backend_lora_columns(ranks) : 0);
    return (struct rows){carve(c, rows, (size_t)stride * backend_element_bytes(c->be)), stride};
}

void carve_outputs(struct carver *c, size_t rows, int count, const int32_t width[], int32_t ranks,
                   struct rows *const to[])
{
    int32_t total = 0;
    if (!c->be->fused) {
        for (int i = 0; i < count; i++)
            *to[i] = carve_rows(c, rows, width[i], 0);
        return;
    }
    for (int i = 0; i < count; i++)
        total += width[i];
    struct rows all = carve_rows(c, rows, total, ranks);
    for (int i = 0; i < count; i++) {
        *to[i] = all;
        if (all.at)
            all = rows_from(c->be, all, width[i]);
    }
}

struct rows carve_lora(struct carver *c, size_t rows, struct rows x, int32_t width, int32_t ranks)
{
    if (ranks == 0)
        return (struct rows){NULL, 0};
    if (!c->be->fused)
        return carve_rows(c, rows, ranks, 0);
    return x.at ? rows_from(c->be, x, width) : x;
}
