#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets: make_corpus.py tests/fuzz/corpus gives corpus/<target>/<seed>.

What is committed in corpus/ are the inputs that together reach what fuzzing has reached so far, these seeds among what
they grew from: scripts/fuzz.sh --merge made it. Run this for a new target or seed, fuzz for a while, then --merge.

The targets of fuzz_protocol.c edit genuine messages that they make themselves; their seeds only say which."""
import json
import os
import struct
import sys

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q4_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 10, 12, 14, 30
BLOCKS = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q5_0: (32, 22), Q5_1: (32, 24),
          Q8_0: (32, 34), Q2_K: (256, 84), Q4_K: (256, 144), Q6_K: (256, 210)}


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def u32(key, value):
    return pair(key, 4, struct.pack("<I", value))


def string(key, value):
    return pair(key, 8, text(value))


def strings(values):
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def gguf(pairs, tensors):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    data = b""
    for name, kind, dims in tensors:
        block, size = BLOCKS[kind]
        for d in dims:
            size *= d
        size //= block
        head += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        head += struct.pack("<IQ", kind, len(data))
        data += bytes((size + 31) // 32 * 32)
    return head + bytes(-len(head) % 32) + data


def llama(width, ff, more=()):
    return [string("general.architecture", "llama"), u32("llama.block_count", 1), u32("llama.context_length", 8),
            u32("llama.embedding_length", width), u32("llama.feed_forward_length", ff),
            u32("llama.attention.head_count", 1),
            pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)), *more]


def tokenizer():
    return [string("tokenizer.ggml.model", "gpt2"), string("tokenizer.ggml.pre", "smollm"),
            pair("tokenizer.ggml.tokens", 9, strings(["<|im_end|>", "a", "b", "ab"])),
            pair("tokenizer.ggml.token_type", 9, struct.pack("<IQ4i", 5, 4, 3, 1, 1, 1)),
            pair("tokenizer.ggml.merges", 9, strings(["a b"])), u32("tokenizer.ggml.eos_token_id", 0)]


def model(pairs, width, ff, kinds):
    """kinds: of the embedding and the seven matrices."""
    rows = [("attn_q", width, width), ("attn_k", width, width), ("attn_v", width, width), ("attn_output", width, width),
            ("ffn_gate", width, ff), ("ffn_up", width, ff), ("ffn_down", ff, width)]
    tensors = [("token_embd.weight", kinds[0], [width, 4]), ("output_norm.weight", F32, [width]),
               ("blk.0.attn_norm.weight", F32, [width]), ("blk.0.ffn_norm.weight", F32, [width])]
    return gguf(pairs, tensors + [(f"blk.0.{n}.weight", k, [i, o]) for (n, i, o), k in zip(rows, kinds[1:])])


def gguf_seeds():
    rope = [string("llama.rope.scaling.type", "linear"),
            pair("llama.rope.scaling.factor", 6, struct.pack("<f", 2)), u32("llama.rope.dimension_count", 32),
            u32("llama.attention.head_count_kv", 1), u32("llama.attention.key_length", 32),
            u32("llama.attention.value_length", 32), u32("llama.vocab_size", 4), u32("general.alignment", 64)]
    every = [pair(f"k{kind}", kind, bytes(size)) for kind, size in enumerate([1, 1, 2, 2, 4, 4, 4, 1])]
    every += [string("k8", "x"), pair("k9", 9, struct.pack("<IQ", 7, 2) + b"\0\1"), pair("k10", 10, bytes(8)),
              pair("k11", 11, bytes(8)), pair("k12", 12, bytes(8))]
    seeds = {"gguf/model": model(llama(16, 1) + tokenizer(), 16, 1, [F16] * 8),
             "gguf/quantised": model(llama(32, 32, rope), 32, 32, [Q8_0, Q4_0, Q4_1, F16, BF16, Q8_0, Q5_0, Q5_1]),
             "gguf/every-type-of-value": gguf(every, []), "gguf/four-dimensions": gguf([], [("t", F16, [3, 2, 1, 2])])}
    for kind in (Q2_K, Q4_K, Q6_K):
        seeds[f"gguf/embedding-{kind}"] = gguf(llama(256, 8), [("token_embd.weight", kind, [256, 2])])
    return seeds


def other_seeds():
    """gemma3 and glm4, whose metadata and tensors differ most from llama's."""
    seeds = {}
    for name in ("gemma3", "glm4"):
        pairs = [string("general.architecture", name)]
        pairs += [u32(f"{name}.{k}", v) for k, v in (
            ("block_count", 2), ("context_length", 8), ("embedding_length", 16), ("feed_forward_length", 8),
            ("attention.head_count", 1))]
        pairs += [pair(f"{name}.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-6))]
        if name == "gemma3":
            pairs += [u32("gemma3.attention.sliding_window", 4), u32("gemma3.attention.sliding_window_pattern", 2),
                      pair("gemma3.rope.freq_base_swa", 6, struct.pack("<f", 1e4))]
        else:
            pairs += [u32("glm4.rope.dimension_count", 8)]
        tensors = [("token_embd.weight", F16, [16, 4]), ("output_norm.weight", F32, [16])]
        for layer in range(2):
            rows = [(f"{m}.weight", F16, [16, 16]) for m in ("attn_q", "attn_k", "attn_v", "attn_output")]
            rows += [(f"{m}.weight", F32, [16]) for m in ("attn_norm", "ffn_norm", "post_attention_norm",
                                                          "post_ffw_norm")]
            rows += [("ffn_down.weight", F16, [8, 16]), ("ffn_up.weight", F16, [16, 8 if name == "gemma3" else 16])]
            if name == "gemma3":
                rows += [("ffn_gate.weight", F16, [16, 8]), ("attn_q_norm.weight", F32, [16]),
                         ("attn_k_norm.weight", F32, [16])]
            else:
                rows += [(f"attn_{x}.bias", F32, [16]) for x in "qkv"]
            tensors += [(f"blk.{layer}.{n}", k, d) for n, k, d in rows]
        seeds[f"gguf/{name}"] = gguf(pairs, tensors)
    return seeds


def tensors_of(named, metadata=None):
    header = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, kind, shape in named:
        size = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}[kind]
        for d in shape:
            size *= d
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(offset)


def factors(kind):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_%s.weight"
    return tensors_of([(name % "A", kind, [1, 32]), (name % "B", kind, [32, 1])])


def adapter_seeds():
    def peft(kind, **more):
        config = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2, **more}).encode()
        return struct.pack(">H", len(config)) + config + factors(kind)

    pairs = [string("general.type", "adapter"), string("general.architecture", "llama"),
             string("adapter.type", "lora"), pair("adapter.lora.alpha", 6, struct.pack("<f", 2))]
    both = [("blk.0.attn_q.weight.lora_a", F16, [32, 1]), ("blk.0.attn_q.weight.lora_b", F32, [1, 32])]
    options = dict(use_rslora=True, bias="none", lora_dropout=0.1, use_dora=False, rank_pattern={})
    return {"adapter/peft": peft("F32"), "adapter/peft-options": peft("BF16", **options),
            "adapter/gguf": bytes(2) + gguf(pairs, both)}


def folder_seeds():
    sizes = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
                 head_dim=16, vocab_size=4, max_position_embeddings=8, rms_norm_eps=1e-6, tie_word_embeddings=True)

    def layer(i, name):
        rows = [(f"self_attn.{x}_proj.weight", [16, 16]) for x in "qkvo"] + [("mlp.down_proj.weight", [16, 8])]
        rows += [("input_layernorm.weight", [16]), ("post_attention_layernorm.weight", [16])]
        if name in ("qwen2", "glm4"):
            rows += [(f"self_attn.{x}_proj.bias", [16]) for x in "qkv"]
        if name in ("qwen3", "gemma3_text"):
            rows += [(f"self_attn.{x}_norm.weight", [16]) for x in "qk"]
        if name == "glm4":
            rows += [("mlp.gate_up_proj.weight", [16, 16])]
            rows += [("post_self_attn_layernorm.weight", [16]), ("post_mlp_layernorm.weight", [16])]
        else:
            rows += [("mlp.gate_proj.weight", [8, 16]), ("mlp.up_proj.weight", [8, 16])]
        if name == "gemma3_text":
            rows += [("pre_feedforward_layernorm.weight", [16]), ("post_feedforward_layernorm.weight", [16])]
        return [(f"model.layers.{i}.{n}", "BF16", d) for n, d in rows]

    def padded(data, size):
        length = struct.unpack("<Q", data[:8])[0]
        spaces = b" " * (size - len(data))
        return struct.pack("<Q", length + len(spaces)) + data[8:8 + length] + spaces + data[8 + length:]

    def seed(config, files, index=None):
        config, index = json.dumps(config).encode(), json.dumps(index).encode() if index else b""
        size = max(map(len, files))
        return struct.pack(">HH", len(config), len(index)) + config + index + b"".join(padded(f, size) for f in files)

    more = {
        "llama": dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                        original_max_position_embeddings=4)),
        "qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=0),
        "qwen3": dict(rope_theta=1e6, rope_scaling=dict(type="linear", factor=2.0)),
        "gemma3_text": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"],
                            query_pre_attn_scalar=16, rope_parameters=dict(
                                full_attention=dict(rope_type="default", rope_theta=1e6),
                                sliding_attention=dict(rope_type="default", rope_theta=1e4))),
        "glm4": dict(attention_bias=True, partial_rotary_factor=0.5),
    }
    top = [("model.embed_tokens.weight", "F16", [4, 16]), ("model.norm.weight", "F32", [16])]
    seeds = {}
    for name, options in more.items():
        config = dict(model_type=name, **sizes, **options)
        parts = [top + layer(0, name), layer(1, name)]
        seeds[f"folder/{name}"] = seed(config, [tensors_of(parts[0] + parts[1])])
        if name == "qwen2":
            names = ["model-1.safetensors", "model-2.safetensors"]
            index = {"weight_map": {t[0]: n for part, n in zip(parts, names) for t in part}}
            seeds["folder/shards"] = seed(config, [tensors_of(p) for p in parts], index)
    return seeds


def dataset_seeds():
    def line(unit, *messages):
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages], "unit": unit}) + "\n"

    good = line(1, ("user", "q"), ("assistant", "a")) + line("x", ("system", "s"), ("user", "q"), ("assistant", "b"))
    bad = '{"messages":[]}\n[]\n\n{"messages":[{"role":"user","content":"\\ud83d\\ude00"}]}\n'
    bad += line(None, ("user", "<|im_end|>"))
    return {"dataset/records": good.encode() * 2,
            "dataset/faults": b"\xef\xbb\xbf" + (good + bad).encode() + b"\xff\r\n"}


PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


def tokenizer_seeds():
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
    return {"tokenizer/" + name: data for name, data in out.items()}


def main():
    job = struct.pack("<I", 4) + b"demo" + struct.pack("<QI", 1, 1) + struct.pack("<I", 3) + b"abc"
    seeds = gguf_seeds() | other_seeds() | adapter_seeds() | folder_seeds() | dataset_seeds() | tokenizer_seeds()
    types = [("a", "F16", [2, 1]), ("b", "BF16", [3]), ("c", "I64", []), ("d", "U8", [0])]
    seeds |= {"safetensors/factors": factors("F32"), "safetensors/types": tensors_of(types, {"format": "pt"})}
    seeds |= {"session/event": struct.pack("<QQB", 1, 2, 1) + job, "session/message": b"\x01" + job}
    seeds |= {f"stages/m{m}-{again}": bytes([m, again]) + b"\x25\0\0\1" for m in range(11) for again in (0, 128)}
    seeds |= {f"certificate/{kind}": bytes([kind]) + b"\x10\0\0\1" for kind in range(4)}
    seeds |= {f"{target}/edit": b"\x10\0\0\1\x20\0\4\0" for target in ("roster", "plan")}
    seeds |= {"cosign/proof": b"\x00\x10\0\0\1", "cosign/statement": b"\x80\x10\0\0\1"}
    for name, data in seeds.items():
        path = os.path.join(sys.argv[1], name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as out:
            out.write(data)


if __name__ == "__main__":
    main()
