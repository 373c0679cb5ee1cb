/* LoRA adapters. The first two bytes are the length of adapter_config.json; 0: a GGUF adapter. */
#include "model/formats/adapter.h"
#include "tests/fuzz/fuzz.h"

#include <math.h>

static const struct model_config model = {.architecture = MODEL_LLAMA,
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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
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
    if (rc < 0) {
        FUZZ_NEED(err.message[0]);
        return 0;
    }
    FUZZ_NEED(isfinite(lora.scale) && lora.entry_count > 0);
    for (size_t i = 0; i < lora.trained_count; i++)
        FUZZ_NEED(isfinite(lora.trained[i]));
    for (size_t i = 0; i < lora.frozen_count; i++)
        FUZZ_NEED(isfinite(lora.frozen[i]));
    lora_release(&lora);
    return 0;
}
