/* GGUF: metadata, tensors and, if the file is one, a model and its tokenizer, which is run over the file's own bytes.
 */
#include "model/formats/gguf.h"
#include "model/formats/tokenizer.h"
#include "tests/fuzz/fuzz.h"

#include <math.h>
#include <string.h>

#define PIECE 256 /* a multiple of every block */

/* Decodes every value of a tensor: the sanitizer sees what lies outside the file. */
static void decode(const struct gguf_tensor *t, bool finite)
{
    size_t row = 0, block = tensor_type_block(t->type), block_bytes = tensor_type_block_bytes(t->type);
    float out[PIECE];
    FUZZ_NEED(tensor_type_row_bytes(t->type, t->dims[0], &row));
    for (size_t r = 0; r < t->bytes / row; r++) {
        for (size_t at = 0; at < t->dims[0]; at += PIECE) {
            size_t n = t->dims[0] - at < PIECE ? t->dims[0] - at : PIECE;
            const uint8_t *from = (const uint8_t *)t->data + r * row + at / block * block_bytes;
            uint8_t copy[PIECE * sizeof(float)]; /* the data of a file that is no model may have any alignment */
            memcpy(copy, from, n / block * block_bytes);
            tensor_dequantise(t->type, copy, n, out);
            for (size_t i = 0; finite && i < n; i++)
                FUZZ_NEED(isfinite(out[i]));
        }
    }
}

static void read_metadata(const struct gguf *g)
{
    struct error err = {0};
    struct span text;
    struct gguf_array list;
    size_t cursor = 0;
    uint32_t u = 0;
    float f = 0;
    bool b = false;
    if (gguf_get_string(g, "general.architecture", &text, &err) == 0 && text.len > 0)
        FUZZ_NEED(memchr(text.ptr, text.ptr[text.len - 1], text.len) != NULL);
    if (gguf_get_array(g, "tokenizer.ggml.tokens", GGUF_STRING, UINT32_MAX, &list, &err) == 0)
        for (uint64_t i = 0; i < list.count; i++) {
            text = gguf_array_string(&list, &cursor);
            FUZZ_NEED(cursor <= list.bytes.len &&
                      (text.len == 0 || memchr(text.ptr, text.ptr[text.len - 1], text.len)));
        }
    if (gguf_get_array(g, "tokenizer.ggml.token_type", GGUF_I32, UINT32_MAX, &list, &err) == 0)
        for (uint64_t i = 0; i < list.count; i++)
            (void)gguf_array_i32(&list, i);
    if (gguf_get_u32(g, "general.alignment", 1, GGUF_ALIGNMENT_MAX, &u, &err) == 0)
        FUZZ_NEED(u > 0 && (u & (u - 1)) == 0);
    if (gguf_get_f32(g, "adapter.lora.alpha", &f, &err) == 0)
        FUZZ_NEED(isfinite(f));
    (void)!gguf_get_bool(g, "tokenizer.ggml.add_bos_token", &b, &err);
}

static void run_tokenizer(const struct gguf *g, struct span text)
{
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    struct token_list list = {.max = 1 << 16};
    if (tokenizer_new(g, &tokenizer, &err) == 0 &&
        tokenizer_encode(tokenizer, text, TOKENIZER_CONTROL, &list, &err) == 0)
        for (size_t i = 0; i < list.count; i++)
            FUZZ_NEED(list.ids[i] >= 0 && list.ids[i] < tokenizer_vocabulary(tokenizer));
    token_list_release(&list);
    tokenizer_free(tokenizer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *gguf = NULL;
    struct error err = {0};
    if (gguf_parse(span_of(data, size), "fuzz", &gguf, &err) < 0) {
        FUZZ_NEED(err.message[0]);
        return 0;
    }
    struct model *model = calloc(1, sizeof *model);
    const bool loaded = gguf_load_model(gguf, model, &err) == 0;
    FUZZ_NEED(loaded || err.message[0]);
    FUZZ_NEED(!loaded || model->config.layer_count > 0);
    read_metadata(gguf);
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) /* a model has all tensors of its file */
        decode(gguf_tensor_at(gguf, i), loaded);
    run_tokenizer(gguf, span_of(data, size));
    free(model);
    gguf_close(gguf);
    return 0;
}
