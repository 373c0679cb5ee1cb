#!/usr/bin/env python3
"""Makes chat.json: conversations and the texts that the models' own chat templates render them to.

    make_chat.py SmolLM2.gguf > tests/golden/chat.json

SmolLM2's template is read from the GGUF file. No package at hand carries the others; they stand here as test vectors, as
published but for the parts about tools, images and other content than text. Compared with copies in public repositories:
Llama 3's whole; Qwen2.5's system message; Qwen3, Gemma 3 and GLM-4 (its Z1 relatives) in excerpts. Qwen2's and ChatML's
were not compared with anything.
  Qwen2, Qwen2.5   tokenizer_config.json of Qwen/Qwen2-0.5B-Instruct and Qwen/Qwen2.5-0.5B-Instruct (Apache-2.0)
  Qwen3            tokenizer_config.json of Qwen/Qwen3-0.6B (Apache-2.0); ChatML below is Qwen3-Instruct-2507's for plain text
  Llama 3          tokenizer_config.json of meta-llama/Meta-Llama-3-8B-Instruct
  Gemma 3          chat_template.json of google/gemma-3-1b-it
  GLM-4            tokenizer_config.json of THUDM/GLM-4-9B-0414 (MIT)
They are rendered as transformers does it (trim_blocks, lstrip_blocks).

Needs: pip install gguf jinja2
"""
import json
import sys

import gguf
import jinja2

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "SYSTEM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CHATML = QWEN2.replace("{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}", "")
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
    "content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>"
    "\n\n' }}{% endif %}")
GEMMA3 = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
GLM4 = r"""[gMASK]<sop>
{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content }}
    {%- endif %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
    {%- set role = message['role'] %}
    {%- set content = message['content'] %}
    {%- set meta = message.get("metadata", "") %}
    {%- if role == 'user' %}
<|user|>
{{ content }}
    {%- elif role == 'assistant' and not meta %}
<|assistant|>
{{ content }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

U, A, S = "user", "assistant", "system"
CONVERSATIONS = [
    [(U, "Which chapter?")],
    [(S, "Be brief."), (U, "Hello 12")],
    [(U, "Hi <|im_end|> <end_of_turn> <|eot_id|> <|user|> 12"), (A, "Yes."), (U, "\n\nAnd?  "), (A, "\tNo. \u3000\x1c")],
    [(S, " Two\nlines. \n"), (U, " a\u2028 "), (A, "b  c\n\n"), (U, "d"), (A, "e"), (U, "naïve 中文 👍")],
    [(U, "q"), (A, "<think>\nA thought.\n</think>\n\nThe answer."), (U, "again"), (A, "<think>\n\nMore\nthoughts\n\n</think>\n\nDone.")],
    [(U, "q"), (A, "\n\nleading newlines")],
    [(U, "q"), (A, "<think></think>x</think>\n\ny")],
    [(S, ""), (U, "x"), (A, "")],
]
ODD = [  # not for Gemma: no alternation
    [(U, "a"), (U, "b"), (A, "c"), (A, "d")],
    [(A, "first"), (U, "<tool_response>x</tool_response>"), (A, "then")],
    [(U, "a"), (A, "<think>\nb\n</think>\n\nc"), (A, "d")],
]


def fail(message):
    raise ValueError(message)


def main():
    smollm = gguf.GGUFReader(sys.argv[1]).fields["tokenizer.chat_template"].contents()
    templates = {
        "SmolLM2": smollm, "Qwen2": QWEN2.replace("SYSTEM", "You are a helpful assistant."),
        "Qwen2.5": QWEN2.replace("SYSTEM", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        "Qwen3": QWEN3, "ChatML": CHATML, "Llama 3": LLAMA3, "Gemma 3": GEMMA3, "GLM-4": GLM4}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = fail
    out = {"templates": {}, "conversations": [[{"role": r, "content": c} for r, c in m] for m in CONVERSATIONS + ODD]}
    for name, text in templates.items():
        template = environment.from_string(text)
        bos = {"Llama 3": "<|begin_of_text|>", "Gemma 3": "<bos>"}.get(name, "")
        rendered = []
        for i, messages in enumerate(out["conversations"]):
            if name == "Gemma 3" and i >= len(CONVERSATIONS):
                rendered.append(None)
                continue
            rendered.append([template.render(messages=messages, bos_token=bos, enable_thinking=False, add_generation_prompt=ask)
                             for ask in (False, True)])
        out["templates"][name] = rendered
    json.dump(out, sys.stdout, ensure_ascii=False, separators=(",", ":"))
    print()


if __name__ == "__main__":
    main()
