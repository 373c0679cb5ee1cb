#include "model/formats/chat_templates.h"

/* What all of ChatML have in common. */
#define CHATML                                                                                                         \
    .open = "<|im_start|>", .roles = {"system", "user", "assistant"}, .gap = "\n", .end = "<|im_end|>", .after = "\n"

static const struct chat_template smollm2 = {
    .name = "SmolLM2",
    CHATML,
    .default_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"};
static const struct chat_template qwen2 = {.name = "Qwen2", CHATML, .default_system = "You are a helpful assistant."};
static const struct chat_template qwen25 = {.name = "Qwen2.5",
                                            CHATML,
                                            .default_system =
                                                "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."};
static const struct chat_template qwen3 = {.name = "Qwen3", CHATML, .thinks = true};
static const struct chat_template chatml = {.name = "ChatML", CHATML};

static const struct chat_template llama3 = {
    .name = "Llama 3",
    .begin = {"<|begin_of_text|>"},
    .open = "<|start_header_id|>",
    .close = "<|end_header_id|>",
    .roles = {"system", "user", "assistant"},
    .gap = "\n\n",
    .end = "<|eot_id|>",
    .after = "",
    .trims = true,
};

static const struct chat_template gemma3 = {
    .name = "Gemma 3",
    .begin = {"<bos>"},
    .open = "<start_of_turn>",
    .roles = {"system", "user", "model"},
    .gap = "\n",
    .end = "<end_of_turn>",
    .after = "\n",
    .trims = true,
    .system_joins_user = true,
};

static const struct chat_template glm4 = {
    .name = "GLM-4",
    .begin = {"[gMASK]", "<sop>"},
    .roles = {"<|system|>", "<|user|>", "<|assistant|>"},
    .gap = "\n",
    .after = "",
    .next = "<|user|>",
    .role_tokens = true,
};

static bool has(const struct tokenizer *t, const char *token)
{
    return !token || tokenizer_control(t, token) >= 0;
}

static bool has_all(const struct tokenizer *t, const struct chat_template *c)
{
    bool all = has(t, c->begin[0]) && has(t, c->begin[1]) && has(t, c->open) && has(t, c->close) && has(t, c->end);
    for (size_t i = 0; c->role_tokens && i < ARRAY_LEN(c->roles); i++)
        all &= has(t, c->roles[i]);
    return all;
}

/* The ChatML models have the same two tokens; what else is in the vocabulary tells them apart. Qwen3 has the tokens of
 * thinking in all its vocabularies, but only the models whose template has a switch for it want the empty block. */
static const struct chat_template *chatml_of(const struct tokenizer *t)
{
    if (tokenizer_pretokenizer(t) == PRETOKENIZE_SMOLLM)
        return &smollm2;
    if (tokenizer_pretokenizer(t) != PRETOKENIZE_QWEN2)
        return &chatml;
    if (tokenizer_marker(t, "<think>") >= 0)
        return !tokenizer_has_template(t) || tokenizer_template_holds(t, "enable_thinking") ? &qwen3 : &chatml;
    return tokenizer_marker(t, "<tool_call>") >= 0 ? &qwen25 : &qwen2;
}

const struct chat_template *chat_template_of(const struct tokenizer *tokenizer)
{
    static const struct chat_template *const others[] = {&llama3, &gemma3, &glm4};
    if (has_all(tokenizer, &chatml))
        return chatml_of(tokenizer);
    for (size_t i = 0; i < ARRAY_LEN(others); i++)
        if (has_all(tokenizer, others[i]))
            return others[i];
    return NULL;
}
