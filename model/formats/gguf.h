/*
 * GGUF v3 reader (format: the ggml project's docs/gguf.md) over a read-only map or any borrowed bytes.
 *
 * The bytes are hostile until proven otherwise: gguf_open and gguf_parse check every length, count and offset against
 * what is left of the file before using it, refuse duplicate keys and tensor names, overlapping tensors and unknown
 * element types, and never read outside the bytes. What a metadata value means is checked by whoever asks for it: the
 * getters insist on the exact type and on bounds, and name key and file when they refuse.
 *
 * Immutable once opened: any number of threads may read one. Spans and tensor data are borrowed from the file and live
 * until gguf_close; so does a struct model that was loaded from it.
 *
 *     struct gguf *gguf;
 *     struct model model;
 *     if (gguf_open(path, &gguf, err) < 0 || gguf_load_model(gguf, &model, err) < 0) ...
 *     gguf_close(gguf);
 */
#ifndef FORMATS_GGUF_H
#define FORMATS_GGUF_H

#include "base/error.h"
#include "base/span.h"
#include "kernels/tensor.h"
#include "model/model.h"

#define GGUF_VERSION 3u
#define GGUF_ALIGNMENT_DEFAULT 32u
#define GGUF_ALIGNMENT_MAX 65536u
#define GGUF_DIMS_MAX 4u
#define GGUF_PAIRS_MAX 4096u             /* metadata pairs */
#define GGUF_TENSORS_MAX 16384u          /* tensors */
#define GGUF_NAME_BYTES_MAX 255u         /* keys and tensor names */
#define GGUF_STRING_BYTES_MAX (1u << 20) /* string values (chat templates are the long ones) */
#define GGUF_ARRAY_MAX (4u << 20)        /* elements of an array (merges are the long ones) */

/* Numbers of the format. */
enum gguf_type {
    GGUF_U8 = 0,
    GGUF_I8 = 1,
    GGUF_U16 = 2,
    GGUF_I16 = 3,
    GGUF_U32 = 4,
    GGUF_I32 = 5,
    GGUF_F32 = 6,
    GGUF_BOOL = 7,
    GGUF_STRING = 8,
    GGUF_ARRAY = 9,
    GGUF_U64 = 10,
    GGUF_I64 = 11,
    GGUF_F64 = 12,
};

struct gguf_tensor {
    struct span name;
    enum tensor_type type;
    uint32_t dim_count;           /* 1 to GGUF_DIMS_MAX */
    uint64_t dims[GGUF_DIMS_MAX]; /* dims[0] is contiguous; the rest 1 */
    const void *data;             /* borrowed, `bytes` long; any alignment but the file's own is not promised */
    size_t bytes;
};

/* An array value: count elements of one type, packed in `bytes` (strings each behind a u64 length). */
struct gguf_array {
    enum gguf_type type;
    uint64_t count;
    struct span bytes;
};

struct gguf;

/* Maps the file. ERR_NOT_FOUND, ERR_INTEGRITY (malformed), ERR_RESOURCES. */
int MUST_USE gguf_open(const char *path, struct gguf **ret_gguf, struct error *err);
/* The same over borrowed bytes, which must outlive it; name stands in messages (copied). The bytes should be aligned to
 * 8, or the tensors will not be aligned either. */
int MUST_USE gguf_parse(struct span bytes, const char *name, struct gguf **ret_gguf, struct error *err);
void gguf_close(struct gguf *gguf); /* accepts NULL */

const char *gguf_name(const struct gguf *gguf);  /* as messages call it: the file's name without its folder */
struct span gguf_bytes(const struct gguf *gguf); /* the whole file, for hashing */
struct span gguf_map(const struct gguf *gguf);   /* the same if gguf_open mapped it, else empty */

/* Metadata. ERR_NOT_FOUND if the key is absent, ERR_INTEGRITY if its type or value is not as asked for. */
bool gguf_has(const struct gguf *gguf, const char *key);
int MUST_USE gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t low, uint32_t high, uint32_t *ret_value,
                          struct error *err);
int MUST_USE gguf_get_f32(const struct gguf *gguf, const char *key, float *ret_value, struct error *err); /* finite */
int MUST_USE gguf_get_bool(const struct gguf *gguf, const char *key, bool *ret_value, struct error *err);
int MUST_USE gguf_get_string(const struct gguf *gguf, const char *key, struct span *ret_text, struct error *err);
int MUST_USE gguf_get_array(const struct gguf *gguf, const char *key, enum gguf_type type, uint64_t count_max,
                            struct gguf_array *ret_array, struct error *err);
/* The next string of an array that gguf_get_array returned; start with *cursor = 0 and ask `count` times at most. */
struct span gguf_array_string(const struct gguf_array *array, size_t *cursor);
int32_t gguf_array_i32(const struct gguf_array *array, uint64_t i); /* of a GGUF_I32 array; i < count */

size_t gguf_tensor_count(const struct gguf *gguf);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t i);
const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name); /* NULL if absent */

/* Fills a model (llama, qwen2, qwen3, gemma3 or glm4) from metadata and tensors and validates it: every shape against
 * the hyper-parameters, every block scale finite (which reads the whole file once). Unexpected tensors are refused: a
 * bias that nobody adds would give wrong answers silently. ERR_INTEGRITY names the file and the field. */
int MUST_USE gguf_load_model(const struct gguf *gguf, struct model *ret_model, struct error *err);

#endif
