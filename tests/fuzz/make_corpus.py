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
    seeds = {"gguf/model": model(llama(16, 8) + tokenizer(), 16, 8, [F32] * 8),
             "gguf/quantised": model(llama(32, 32, rope), 32, 32, [Q8_0, Q4_0, Q4_1, F16, BF16, Q8_0, Q5_0, Q5_1]),
             "gguf/every-type-of-value": gguf(every, []), "gguf/four-dimensions": gguf([], [("t", F16, [3, 2, 1, 2])])}
    for kind in (Q2_K, Q4_K, Q6_K):
        seeds[f"gguf/embedding-{kind}"] = gguf(llama(256, 8), [("token_embd.weight", kind, [256, 2])])
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
    options = dict(use_rslora=True, bias="none", lora_dropout=0.1, use_dora=False, rank_pattern={}, modules_to_save=None)
    return {"adapter/peft": peft("F32"), "adapter/peft-options": peft("BF16", **options),
            "adapter/gguf": bytes(2) + gguf(pairs, both)}


def dataset_seeds():
    def line(unit, *messages):
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages], "unit": unit}) + "\n"

    good = line(1, ("user", "q"), ("assistant", "a")) + line("x", ("system", "s"), ("user", "q"), ("assistant", "b"))
    bad = '{"messages":[]}\n[]\n\n{"messages":[{"role":"user","content":"\\ud83d\\ude00"}]}\n'
    bad += line(None, ("user", "<|im_end|>"))
    return {"dataset/records": good.encode() * 2,
            "dataset/faults": b"\xef\xbb\xbf" + (good + bad).encode() + b"\xff\r\n"}


def main():
    job = struct.pack("<I", 4) + b"demo" + struct.pack("<QI", 1, 1) + struct.pack("<I", 3) + b"abc"
    seeds = gguf_seeds() | adapter_seeds() | dataset_seeds()
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
