#!/usr/bin/env python3
"""Writes a small seed corpus for the fuzz targets: make_corpus.py FOLDER gives FOLDER/<target>/.

The targets of fuzz_protocol.c edit genuine messages that they make themselves; their seeds only say which."""
import json
import os
import struct
import sys


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def strings(values):
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def gguf(pairs, tensors):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    data = b""
    for name, dims in tensors:
        size = 4
        for d in dims:
            size *= d
        head += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        head += struct.pack("<IQ", 0, len(data))
        data += bytes((size + 31) // 32 * 32)
    return head + bytes(-len(head) % 32) + data


def model():
    u32 = lambda key, value: pair(key, 4, struct.pack("<I", value))
    pairs = [pair("general.architecture", 8, text("llama")), u32("llama.block_count", 1), u32("llama.context_length", 8),
             u32("llama.embedding_length", 16), u32("llama.feed_forward_length", 8), u32("llama.attention.head_count", 1),
             pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
             pair("tokenizer.ggml.model", 8, text("gpt2")), pair("tokenizer.ggml.pre", 8, text("smollm")),
             pair("tokenizer.ggml.tokens", 9, strings(["<|im_end|>", "a", "b", "ab"])),
             pair("tokenizer.ggml.token_type", 9, struct.pack("<IQ4i", 5, 4, 3, 1, 1, 1)),
             pair("tokenizer.ggml.merges", 9, strings(["a b"]))]
    blk = [("attn_norm", [16]), ("attn_q", [16, 16]), ("attn_k", [16, 16]), ("attn_v", [16, 16]),
           ("attn_output", [16, 16]), ("ffn_norm", [16]), ("ffn_gate", [16, 8]), ("ffn_up", [16, 8]), ("ffn_down", [8, 16])]
    return gguf(pairs, [("token_embd.weight", [16, 4]), ("output_norm.weight", [16])] +
                [(f"blk.0.{n}.weight", d) for n, d in blk])


def safetensors():
    names = {"A": [1, 32], "B": [32, 1]}
    header = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{n}.weight":
              {"dtype": "F32", "shape": s, "data_offsets": [i * 128, i * 128 + 128]} for i, (n, s) in enumerate(names.items())}
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(256)


PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


def tokenizers():
    """A small tokenizer.json of each kind, behind the length and the text of a tokenizer_config.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = lambda numbers: {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": PATTERN.replace("NUMBERS", numbers)}, "behavior": "Isolated", "invert": False},
        byte_level]}
    smollm = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]}
    ascii_ = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "Ã", "Ì", "ģ"]
    merges = [["a", "b"], ["Ġ", "t"], ["Ġt", "ab"]]

    def whole(control, user, pre, normalizer=None, vocab=None, merges=merges, **model):
        vocab = {t: i for i, t in enumerate(vocab or ascii_ + ["".join(m) for m in merges])}
        added = [{"id": len(vocab) + i, "content": t, "special": i < len(control), "normalized": False}
                 for i, t in enumerate(control + user)]
        return {"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre,
                "model": {"type": "BPE", "vocab": vocab, "merges": merges, **model}}
    plain = [["a", "b"], ["Ġ", "t"]]
    kinds = {
        "smollm": whole(["<|im_start|>", "<|im_end|>"], [], smollm, merges=[" ".join(m) for m in plain],
                        vocab=ascii_ + ["ab", "Ġt"]),
        "qwen3": whole(["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], split(r"\p{N}"), {"type": "NFC"}, merges=plain),
        "llama3": whole(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [], split(r"\p{N}{1,3}"),
                        merges=plain, ignore_merges=True),
        "gemma": whole(["<bos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "▁▁"], None,
                       {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                       [f"<0x{b:02X}>" for b in range(256)] + ["a", "b", "▁", "ab", "▁ab"], [["a", "b"], ["▁", "ab"]],
                       byte_fallback=True),
    }
    config = json.dumps({"eos_token": "<|im_end|>", "chat_template": "enable_thinking"}).encode()
    out = {name: b"\0\0" + json.dumps(file, ensure_ascii=False).encode() for name, file in kinds.items()}
    out["configured"] = struct.pack(">H", len(config)) + config + out["qwen3"][2:]
    return out


def main():
    config = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}).encode()
    adapter = gguf([pair("general.type", 8, text("adapter")), pair("general.architecture", 8, text("llama")),
                    pair("adapter.type", 8, text("lora")), pair("adapter.lora.alpha", 6, struct.pack("<f", 2))],
                   [("blk.0.attn_q.weight.lora_a", [32, 1]), ("blk.0.attn_q.weight.lora_b", [1, 32])])
    record = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "unit": 1})
    seeds = {"gguf/model": model(), "safetensors/peft": safetensors(), "dataset/record": (record + "\n").encode() * 2,
             "adapter/peft": struct.pack(">H", len(config)) + config + safetensors(), "adapter/gguf": bytes(2) + adapter}
    seeds |= {"tokenizer/" + name: data for name, data in tokenizers().items()}
    job = struct.pack("<I", 4) + b"demo" + struct.pack("<QI", 1, 1) + struct.pack("<I", 3) + b"abc"
    seeds |= {"session/event": struct.pack("<QQB", 1, 2, 1) + job, "session/message": b"\x01" + job}
    seeds |= {f"stages/m{m}-{again}": bytes([m, again]) + b"\x25\0\0\1" for m in range(11) for again in (0, 128)}
    seeds |= {f"certificate/{kind}": bytes([kind]) + b"\x10\0\0\1" for kind in range(4)}
    for name, data in seeds.items():
        path = os.path.join(sys.argv[1], name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as out:
            out.write(data)


if __name__ == "__main__":
    main()
