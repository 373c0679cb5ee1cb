/* Data sets: JSON lines, chat messages, privacy units. */
#include "model/formats/dataset.h"
#include "model/formats/gguf_write.h"
#include "tests/fuzz/fuzz.h"

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
    FUZZ_NEED(gguf_writer_finish(&w, &out, NULL) == 0 && gguf_parse(buffer_span(&out), "fuzz", &gguf, NULL) == 0 &&
              tokenizer_new(gguf, &tokenizer, NULL) == 0);
    gguf_close(gguf);
    gguf_writer_release(&w);
    buffer_release(&out);
    return tokenizer;
}

static void check_record(const struct dataset *d, size_t i, const struct tokenizer *tokenizer)
{
    struct batch_example e;
    dataset_example(d, i, &e);
    FUZZ_NEED(dataset_unit(d, i) < dataset_unit_count(d));
    FUZZ_NEED(dataset_prompt_length(d, i) >= 0 && dataset_prompt_length(d, i) < e.length && e.learn[e.length - 1]);
    for (int32_t t = 0; t < e.length; t++)
        FUZZ_NEED(e.ids[t] >= 0 && e.ids[t] < tokenizer_vocabulary(tokenizer));
    FUZZ_NEED(dataset_answer_of(d, i) < (int32_t)dataset_answer_count(d));
}

/* With and without a privacy unit, and with limits that a small file reaches. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct tokenizer *tokenizer;
    if (!tokenizer)
        tokenizer = make_tokenizer();
    for (int unit = 0; unit < 2; unit++) {
        const struct dataset_options options = {.tokenizer = tokenizer,
                                                .tokens_max = 256,
                                                .line_bytes_max = unit ? 2048 : 0,
                                                .messages_max = unit ? 4 : 0,
                                                .privacy_unit = unit ? "unit" : NULL};
        struct dataset *dataset = NULL;
        struct error err = {0};
        if (dataset_parse(span_of(data, size), "fuzz", &options, &dataset, &err) < 0) {
            FUZZ_NEED(err.message[0]);
            continue;
        }
        FUZZ_NEED(dataset_count(dataset) > 0);
        for (size_t i = 0; i < dataset_count(dataset); i++)
            check_record(dataset, i, tokenizer);
        dataset_free(dataset);
    }
    return 0;
}
