/*
 * libFuzzer entry of the parsers in model/formats. One source, one program for each FUZZ_ value (see CMakeLists.txt).
 *
 *     fuzz_gguf CORPUS_FOLDER        with a seed corpus from tests/fuzz/make_corpus.py
 */
#include "model/formats/adapter.h"
#include "model/formats/chat.h"
#include "model/formats/dataset.h"
#include "model/formats/gguf_write.h"
#include "model/formats/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#if defined(FUZZ_GGUF)
/* A model, and its tokenizer run over the file's own bytes. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *gguf = NULL;
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    struct token_list list = {.max = 1 << 16};
    if (gguf_parse(span_of(data, size), "fuzz", &gguf, &err) < 0)
        return 0;
    struct model *model = calloc(1, sizeof *model);
    int loaded = gguf_load_model(gguf, model, &err);
    if (loaded == 0 && model->config.layer_count < 1)
        abort();
    if (tokenizer_new(gguf, &tokenizer, &err) == 0 &&
        tokenizer_encode(tokenizer, span_of(data, size), TOKENIZER_CONTROL, &list, &err) == 0)
        for (size_t i = 0; i < list.count; i++)
            if (list.ids[i] < 0 || list.ids[i] >= tokenizer_vocabulary(tokenizer))
                abort();
    token_list_release(&list);
    tokenizer_free(tokenizer);
    free(model);
    gguf_close(gguf);
    return 0;
}
#elif defined(FUZZ_TOKENIZER)
/* The first two bytes are the length of tokenizer_config.json; tokenizer.json follows it. What loads encodes the file's
 * own bytes, and a question if it knows a chat format. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tokenizer *tokenizer = NULL;
    struct token_list list = {.max = 1 << 17};
    struct error err = {0};
    if (size < 2)
        return 0;
    size_t config = (size_t)data[0] << 8 | data[1];
    data += 2;
    size -= 2;
    config = config < size ? config : size;
    const struct span json = span_of(data + config, size - config);
    const struct chat_message question = {CHAT_USER, json};
    const struct chat_options options = {.generation_prompt = true};
    if (tokenizer_from_json(json, span_of(data, config), "fuzz", &tokenizer, &err) < 0)
        return 0;
    (void)!tokenizer_encode(tokenizer, json, TOKENIZER_CONTROL, &list, &err);
    (void)!chat_encode(tokenizer, &options, &question, 1, &list, &err);
    for (size_t i = 0; i < list.count; i++)
        if (list.ids[i] < 0 || list.ids[i] >= tokenizer_vocabulary(tokenizer))
            abort();
    token_list_release(&list);
    tokenizer_free(tokenizer);
    return 0;
}
#elif defined(FUZZ_SAFETENSORS)
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *file = NULL;
    struct error err = {0};
    if (safetensors_parse(span_of(data, size), "fuzz", &file, &err) == 0)
        for (size_t i = 0; i < safetensors_count(file); i++)
            for (size_t j = 0; j < safetensors_at(file, i)->data.len; j++)
                if (safetensors_at(file, i)->data.ptr + j >= data + size)
                    abort();
    safetensors_close(file);
    return 0;
}
#elif defined(FUZZ_DATASET)
/* A vocabulary of the printable ASCII bytes and ChatML's two control tokens. */
static struct tokenizer *make_tokenizer(void)
{
    struct span tokens[96];
    int32_t types[96] = {3, 3};
    char bytes[94];
    struct gguf_writer w;
    struct buffer out;
    struct gguf *gguf = NULL;
    struct tokenizer *tokenizer = NULL;
    tokens[0] = span_str("<|im_start|>");
    tokens[1] = span_str("<|im_end|>");
    for (int i = 0; i < 94; i++) {
        bytes[i] = (char)('!' + i);
        tokens[i + 2] = span_of(&bytes[i], 1);
        types[i + 2] = 1;
    }
    gguf_writer_init(&w, 1 << 16);
    gguf_writer_string(&w, "tokenizer.ggml.model", span_str("gpt2"));
    gguf_writer_string(&w, "tokenizer.ggml.pre", span_str("smollm"));
    gguf_writer_strings(&w, "tokenizer.ggml.tokens", tokens, 96);
    gguf_writer_i32s(&w, "tokenizer.ggml.token_type", types, 96);
    gguf_writer_strings(&w, "tokenizer.ggml.merges", NULL, 0);
    buffer_init(&out, 1 << 16);
    if (gguf_writer_finish(&w, &out, NULL) < 0 || gguf_parse(buffer_span(&out), "fuzz", &gguf, NULL) < 0 ||
        tokenizer_new(gguf, &tokenizer, NULL) < 0)
        abort();
    gguf_close(gguf);
    gguf_writer_release(&w);
    buffer_release(&out);
    return tokenizer;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tokenizer *tokenizer = make_tokenizer();
    const struct dataset_options options = {.tokenizer = tokenizer, .tokens_max = 256, .privacy_unit = "unit"};
    struct dataset *dataset = NULL;
    struct error err = {0};
    if (dataset_parse(span_of(data, size), "fuzz", &options, &dataset, &err) == 0)
        for (size_t i = 0; i < dataset_count(dataset); i++)
            if (dataset_unit(dataset, i) >= dataset_unit_count(dataset))
                abort();
    dataset_free(dataset);
    tokenizer_free(tokenizer);
    return 0;
}
#elif defined(FUZZ_ADAPTER)
/* The first two bytes are the length of adapter_config.json; 0: a GGUF adapter. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const struct model_config model = {.architecture = MODEL_LLAMA,
                                       .layer_count = 2,
                                       .d_model = 32,
                                       .head_count = 2,
                                       .kv_head_count = 1,
                                       .head_size = 16,
                                       .d_ff = 64,
                                       .vocabulary = 48,
                                       .context_length = 64,
                                       .rope_order = ROPE_NORM,
                                       .rope_base = 1e4,
                                       .rope_scale = 1,
                                       .norm_eps = 1e-5f};
    struct lora lora = {0};
    struct error err = {0};
    if (size < 2)
        return 0;
    size_t config = (size_t)data[0] << 8 | data[1];
    data += 2;
    size -= 2;
    config = config < size ? config : size;
    int rc = config == 0 ? adapter_decode_gguf(span_of(data, size), "fuzz", &model, LORA_JOINT, &lora, &err)
                         : adapter_decode_peft(span_of(data, config), span_of(data + config, size - config), "fuzz",
                                               &model, LORA_FFA, &lora, &err);
    if (rc == 0)
        lora_release(&lora);
    return 0;
}
#endif
