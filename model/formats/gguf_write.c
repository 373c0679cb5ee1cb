#include "model/formats/gguf_write.h"

#include "base/checked.h"

void gguf_writer_init(struct gguf_writer *w, size_t header_bytes_max)
{
    memset(w, 0, sizeof *w);
    buffer_init(&w->pairs, header_bytes_max);
    buffer_init(&w->tensors, header_bytes_max);
    buffer_init(&w->data, header_bytes_max);
}

void gguf_writer_release(struct gguf_writer *w)
{
    buffer_release(&w->pairs);
    buffer_release(&w->tensors);
    buffer_release(&w->data);
}

static void put_string(struct buffer *b, struct span text)
{
    buffer_u64(b, text.len);
    buffer_append(b, text.ptr, text.len);
}

static void put_key(struct gguf_writer *w, const char *key, enum gguf_type type)
{
    put_string(&w->pairs, span_str(key));
    buffer_u32(&w->pairs, type);
    w->pair_count++;
}

void gguf_writer_u32(struct gguf_writer *w, const char *key, uint32_t value)
{
    put_key(w, key, GGUF_U32);
    buffer_u32(&w->pairs, value);
}

void gguf_writer_f32(struct gguf_writer *w, const char *key, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_key(w, key, GGUF_F32);
    buffer_u32(&w->pairs, bits);
}

void gguf_writer_bool(struct gguf_writer *w, const char *key, bool value)
{
    put_key(w, key, GGUF_BOOL);
    buffer_u8(&w->pairs, value);
}

void gguf_writer_string(struct gguf_writer *w, const char *key, struct span text)
{
    put_key(w, key, GGUF_STRING);
    put_string(&w->pairs, text);
}

void gguf_writer_strings(struct gguf_writer *w, const char *key, const struct span *texts, size_t count)
{
    put_key(w, key, GGUF_ARRAY);
    buffer_u32(&w->pairs, GGUF_STRING);
    buffer_u64(&w->pairs, count);
    for (size_t i = 0; i < count; i++)
        put_string(&w->pairs, texts[i]);
}

void gguf_writer_i32s(struct gguf_writer *w, const char *key, const int32_t *values, size_t count)
{
    put_key(w, key, GGUF_ARRAY);
    buffer_u32(&w->pairs, GGUF_I32);
    buffer_u64(&w->pairs, count);
    for (size_t i = 0; i < count; i++)
        buffer_u32(&w->pairs, (uint32_t)values[i]);
}

void gguf_writer_f32s(struct gguf_writer *w, const char *key, const float *values, size_t count)
{
    put_key(w, key, GGUF_ARRAY);
    buffer_u32(&w->pairs, GGUF_F32);
    buffer_u64(&w->pairs, count);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        buffer_u32(&w->pairs, bits);
    }
}

void gguf_writer_tensor(struct gguf_writer *w, const char *name, enum tensor_type type, uint32_t dim_count,
                        const uint64_t *dims, struct span data)
{
    size_t end = 0;
    put_string(&w->tensors, span_str(name));
    buffer_u32(&w->tensors, dim_count);
    for (uint32_t i = 0; i < dim_count; i++)
        buffer_u64(&w->tensors, dims[i]);
    buffer_u32(&w->tensors, type);
    buffer_u64(&w->tensors, w->offset);
    buffer_append(&w->data, &data, sizeof data);
    w->tensor_count++;
    bool fits = checked_add((size_t)w->offset, data.len, &end) && checked_align(end, GGUF_ALIGNMENT_DEFAULT, &end);
    if (!fits)
        w->tensors.failed = true;
    w->offset = end;
}

static void pad(struct buffer *out, size_t start)
{
    static const uint8_t zeroes[GGUF_ALIGNMENT_DEFAULT];
    size_t used = (out->len - start) % GGUF_ALIGNMENT_DEFAULT;
    if (used != 0)
        buffer_append(out, zeroes, GGUF_ALIGNMENT_DEFAULT - used);
}

int gguf_writer_finish(const struct gguf_writer *w, struct buffer *out, struct error *err)
{
    size_t start = out->len;
    bool ok = buffer_ok(&w->pairs) && buffer_ok(&w->tensors) && buffer_ok(&w->data);
    if (ok) {
        buffer_append(out, "GGUF", 4);
        buffer_u32(out, GGUF_VERSION);
        buffer_u64(out, w->tensor_count);
        buffer_u64(out, w->pair_count);
        buffer_append(out, w->pairs.data, w->pairs.len);
        buffer_append(out, w->tensors.data, w->tensors.len);
        pad(out, start);
    }
    for (size_t i = 0; ok && i < w->tensor_count; i++) {
        struct span data;
        memcpy(&data, w->data.data + i * sizeof data, sizeof data);
        buffer_append(out, data.ptr, data.len);
        pad(out, start);
    }
    if (!ok || !buffer_ok(out))
        return error_set(err, ERR_RESOURCES,
                         "writing GGUF: the header or the file is larger than allowed, or memory "
                         "ran out");
    return 0;
}
