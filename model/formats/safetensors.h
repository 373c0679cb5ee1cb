/*
 * safetensors (format: the safetensors project's README): u64 header length, JSON header, tensor bytes without holes.
 *
 * Reading checks everything before any use: header at most 100 MB (SAFETENSORS_HEADER_MAX) and with no more values than
 * its tensors need, no duplicate keys, known
 * element types, shape × element size = bytes, offsets that tile the data section exactly. Data is borrowed from the
 * bytes and has no promised alignment. Immutable once opened.
 *
 *     struct safetensors *file;
 *     if (safetensors_open(path, &file, err) < 0) ...
 *     const struct safetensors_tensor *t = safetensors_find(file, "base_model.model...lora_A.weight");
 */
#ifndef FORMATS_SAFETENSORS_H
#define FORMATS_SAFETENSORS_H

#include "base/buffer.h"
#include "base/error.h"

#define SAFETENSORS_HEADER_MAX 100000000u
#define SAFETENSORS_TENSORS_MAX 65536u
#define SAFETENSORS_DIMS_MAX 8u

enum safetensors_type { SAFETENSORS_F32, SAFETENSORS_F16, SAFETENSORS_BF16, SAFETENSORS_OTHER };

struct safetensors_tensor {
    const char *name; /* borrowed */
    enum safetensors_type type;
    uint32_t dim_count; /* 0: a scalar */
    uint64_t dims[SAFETENSORS_DIMS_MAX];
    struct span data;
};

struct safetensors;

int MUST_USE safetensors_open(const char *path, struct safetensors **ret_file, struct error *err);
int MUST_USE safetensors_parse(struct span bytes, const char *name, struct safetensors **ret_file, struct error *err);
void safetensors_close(struct safetensors *file); /* accepts NULL */

const char *safetensors_name(const struct safetensors *file); /* as messages call it */
size_t safetensors_count(const struct safetensors *file);
const struct safetensors_tensor *safetensors_at(const struct safetensors *file, size_t i);
const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name); /* or NULL */
/* Converts all values (F32, F16 or BF16) to float; false for another type. out holds the product of the dims. */
bool MUST_USE safetensors_floats(const struct safetensors_tensor *tensor, float *out);

/* Appends a file with these tensors, in this order, and {"format": "pt"} as its metadata. ERR_RESOURCES past out's max.
 */
int MUST_USE safetensors_write(const struct safetensors_tensor *tensors, size_t count, struct buffer *out,
                               struct error *err);

#endif
