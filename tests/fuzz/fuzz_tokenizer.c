/*
 * tokenizer.json. The first two bytes are the length of tokenizer_config.json; tokenizer.json follows it. What loads
 * encodes the file's own bytes, and a question if it knows a chat format.
 */
#include "model/formats/chat.h"
#include "tests/fuzz/fuzz.h"

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
    if (tokenizer_from_json(&(struct tokenizer_files){json, span_of(data, config), {0}}, "fuzz", &tokenizer, &err) <
        0) {
        FUZZ_NEED(err.message[0]);
        return 0;
    }
    (void)!tokenizer_encode(tokenizer, json, TOKENIZER_CONTROL, &list, &err);
    (void)!chat_encode(tokenizer, &options, &question, 1, &list, &err);
    for (size_t i = 0; i < list.count; i++)
        FUZZ_NEED(list.ids[i] >= 0 && list.ids[i] < tokenizer_vocabulary(tokenizer));
    token_list_release(&list);
    tokenizer_free(tokenizer);
    return 0;
}
