/* safetensors: the tensors tile the data, and all values can be read. */
#include "model/formats/safetensors.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *file = NULL;
    struct error err = {0};
    size_t bytes = 0;
    if (safetensors_parse(span_of(data, size), "fuzz", &file, &err) < 0) {
        FUZZ_NEED(err.message[0]);
        return 0;
    }
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const struct safetensors_tensor *t = safetensors_at(file, i);
        size_t values = 1;
        for (uint32_t d = 0; d < t->dim_count; d++)
            values *= t->dims[d];
        bytes += t->data.len;
        FUZZ_NEED(bytes <= size && t->data.ptr >= data && t->data.ptr + t->data.len <= data + size);
        FUZZ_NEED(values <= t->data.len); /* the smallest element has one byte */
        float *out = malloc(values * sizeof *out + 1);
        FUZZ_NEED(out && safetensors_floats(t, out) == (t->type != SAFETENSORS_OTHER));
        free(out);
        FUZZ_NEED(safetensors_find(file, t->name) == t);
    }
    safetensors_close(file);
    return 0;
}
