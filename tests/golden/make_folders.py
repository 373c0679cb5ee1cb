#!/usr/bin/env python3
"""Writes folders/<architecture>/: a tiny random model as transformers saves it, a LoRA adapter as PEFT saves it, and
what they compute.

    python make_folders.py OUTPUT_FOLDER        (needs torch, transformers, peft; OUTPUT_FOLDER is tests/golden)

config.json, model*.safetensors (llama: in shards with an index) and adapter/ come from save_pretrained as they are.
expected.json: ids, the logits of every position of the base model ("base") and with the adapter ("adapted"), from the
saved weights, in float64 (the norms, softmax and rotary tables of transformers round to float32 inside).

Between them the folders use what differs from file to file: BF16 and F16, a tied head and one of its own, llama 3's and
linear scaling of positions, sliding windows, partial rotation, both scalings of LoRA.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, Glm4Config, Glm4ForCausalLM, LlamaConfig,
    LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

COMMON = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, torch.bfloat16, ALL, dict(use_rslora=True), dict(
        rope_theta=10000.0, tie_word_embeddings=False,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=32))),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, torch.bfloat16, ALL, {}, dict(
        rope_theta=1000000.0, tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, torch.float16, ["q_proj", "v_proj"], {}, dict(
        head_dim=32, rope_theta=10000.0, rope_scaling=dict(rope_type="linear", factor=2.0))),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, torch.bfloat16, ALL, {}, dict(
        head_dim=16, query_pre_attn_scalar=24, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
                             sliding_attention=dict(rope_type="default", rope_theta=10000.0)))),
    "glm4": (Glm4Config, Glm4ForCausalLM, torch.bfloat16,
             ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], {}, dict(
                 head_dim=16, attention_bias=True, tie_word_embeddings=False)),
}


def randomise(model, gemma):
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = torch.randn_like(p) * 0.2 + (0 if gemma else 1)
        else:
            p.data = torch.randn_like(p) * (0.7 if "embed" in name or "lm_head" in name else 0.25)


def logits(model, ids):
    with torch.no_grad():
        return [[float(f"{v:.9g}") for v in row] for row in model(torch.tensor([ids])).logits[0].tolist()]


def write(name, folder):
    config_class, model_class, dtype, targets, extra, options = CASES[name]
    torch.manual_seed(len(name) * 1000 + ord(name[-1]))
    shutil.rmtree(folder, ignore_errors=True)
    config = config_class(**COMMON, **options)
    model = model_class(config)
    randomise(model, name == "gemma3")
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if name == "llama" else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    ids = torch.randint(0, 48, (14,)).tolist()
    expected = {"ids": ids, "base": logits(base, ids)}
    adapted = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=targets, **extra))
    for n, p in adapted.named_parameters():
        if "lora_" in n:
            p.data = torch.randn_like(p) * 0.2
    for n, m in adapted.named_modules():
        if hasattr(m, "lora_A"):
            m.float()
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").double()
    expected["adapted"] = logits(adapted, ids)
    (folder / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    print(name, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for case in CASES:
        write(case, Path(sys.argv[1], "folders", case))
