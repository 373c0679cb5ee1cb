/*
 * A small GGUF v3 writer: adapters, and the files of the tests.
 *
 * Pairs and tensors stand in the order of the calls. Tensor data is borrowed until gguf_writer_finish. Failures are
 * sticky and come out of finish. One thread at a time.
 *
 *     struct gguf_writer w;
 *     gguf_writer_init(&w, 64 << 20);
 *     gguf_writer_string(&w, "general.type", span_str("adapter"));
 *     gguf_writer_tensor(&w, "blk.0.attn_q.weight.lora_a", TENSOR_F32, 2, (uint64_t[]){576, 8}, data);
 *     rc = gguf_writer_finish(&w, &out, err);
 *     gguf_writer_release(&w);
 */
#ifndef FORMATS_GGUF_WRITE_H
#define FORMATS_GGUF_WRITE_H

#include "base/buffer.h"
#include "model/formats/gguf.h"

struct gguf_writer {
    struct buffer pairs;   /* encoded metadata */
    struct buffer tensors; /* encoded tensor table */
    struct buffer data;    /* struct span of each tensor's data */
    uint64_t pair_count, tensor_count;
    uint64_t offset; /* of the next tensor, from the data section */
};

void gguf_writer_init(struct gguf_writer *w, size_t header_bytes_max);
void gguf_writer_release(struct gguf_writer *w);

void gguf_writer_u32(struct gguf_writer *w, const char *key, uint32_t value);
void gguf_writer_f32(struct gguf_writer *w, const char *key, float value);
void gguf_writer_bool(struct gguf_writer *w, const char *key, bool value);
void gguf_writer_string(struct gguf_writer *w, const char *key, struct span text);
void gguf_writer_strings(struct gguf_writer *w, const char *key, const struct span *texts, size_t count);
void gguf_writer_i32s(struct gguf_writer *w, const char *key, const int32_t *values, size_t count);
void gguf_writer_f32s(struct gguf_writer *w, const char *key, const float *values, size_t count);
/* dims[0] is contiguous. data is not checked against the shape: the tests write broken files with it. */
void gguf_writer_tensor(struct gguf_writer *w, const char *name, enum tensor_type type, uint32_t dim_count,
                        const uint64_t *dims, struct span data);

/* Appends the whole file to out, whose maximum bounds it. ERR_RESOURCES. */
int MUST_USE gguf_writer_finish(const struct gguf_writer *w, struct buffer *out, struct error *err);

#endif
