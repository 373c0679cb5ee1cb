#!/usr/bin/env python3
"""Writes llama_*.golden: losses, logits and LoRA gradients of tiny llamas, from transformers and PEFT in float64
(the norms and the softmax of transformers round to float32 inside: about 1e-7).

    python make_llama.py OUTPUT_FOLDER          (needs torch, transformers, peft)

Weights are not stored: both sides compute them with value(), so a file stays small. They are drawn in GGUF's layout; the
Hugging Face model gets its q and k rows un-permuted from GGUF's NORM rotary order (the pair (2i, 2i+1) of a head becomes
(i, i + head_size/2)), and the gradients of the lora_B rows of q and k are permuted back.

File, little-endian: magic "CGL1"; i32 x 16: layers, d_model, heads, kv_heads, head_size, d_ff, vocabulary, tied, mode (1
joint, 2 B only), rank, alpha, layer_first, layer_count, targets, examples, tokens; i32 offsets[examples + 1]; i32
ids[tokens]; u8 learn[tokens]; f64 losses[examples]; f32 logits[tokens][vocabulary]; f32 gradients[examples][trained], in
the canonical order of model/lora.h.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORM_GAIN, MATRIX, EMBEDDING = 0.25, 0.125, 0.5
ROPE_BASE, EPS = 100000.0, 1e-5


def value(tensor, count, scale):
    """scale * v / 32768 with v a signed 16-bit hash of (tensor, index): exact in float32."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(tensor) * np.uint64(0x9E3779B9)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint64(shift)
        x = (x * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return ((x >> np.uint64(16)).astype(np.float64) - 32768.0) / 32768.0 * scale


def to_hf(rows, heads):
    n = rows.shape[0] // heads
    return rows.reshape(heads, n // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def to_gguf(rows, heads):
    n = rows.shape[0] // heads
    return rows.reshape(heads, 2, n // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def tensor_id(layer, which):
    """0 embedding, 1 output norm, 2 head; then 32 for each layer: 0-6 the targets, 7-8 norms, 10-16 A, 20-26 B."""
    return which if layer is None else 32 * (layer + 1) + which


class Case:
    def __init__(self, name, mode, rank, alpha, first, count, targets, tied, lengths):
        self.name, self.mode, self.rank, self.alpha = name, mode, rank, alpha
        self.first, self.count, self.targets, self.tied, self.lengths = first, count, targets, tied, lengths
        self.layers, self.d, self.heads, self.kv, self.size, self.ff, self.vocabulary = 3, 64, 4, 2, 16, 96, 128

    def heads_of(self, target):
        return {0: self.heads, 1: self.kv}.get(target)

    def linear(self, layer, target):
        return getattr(layer.self_attn if target < 4 else layer.mlp, TARGETS[target])

    def base(self):
        config = LlamaConfig(vocab_size=self.vocabulary, hidden_size=self.d, intermediate_size=self.ff,
                             num_hidden_layers=self.layers, num_attention_heads=self.heads,
                             num_key_value_heads=self.kv, head_dim=self.size, rms_norm_eps=EPS, rope_theta=ROPE_BASE,
                             max_position_embeddings=64, tie_word_embeddings=self.tied, attn_implementation="eager")
        model = LlamaForCausalLM(config).double()
        assert abs(model.model.rotary_emb.inv_freq[1].item() - ROPE_BASE ** (-2 / self.size)) < 1e-7

        def put(parameter, tensor, scale, heads=None, offset=0.0):
            w = value(tensor, parameter.numel(), scale).reshape(tuple(parameter.shape)) + offset
            parameter.data.copy_(torch.from_numpy(to_hf(w, heads) if heads else w))

        put(model.model.embed_tokens.weight, tensor_id(None, 0), EMBEDDING)
        put(model.model.norm.weight, tensor_id(None, 1), NORM_GAIN, offset=1.0)
        if not self.tied:
            put(model.lm_head.weight, tensor_id(None, 2), EMBEDDING)
        for i, layer in enumerate(model.model.layers):
            for target in range(7):
                put(self.linear(layer, target).weight, tensor_id(i, target), MATRIX, self.heads_of(target))
            put(layer.input_layernorm.weight, tensor_id(i, 7), NORM_GAIN, offset=1.0)
            put(layer.post_attention_layernorm.weight, tensor_id(i, 8), NORM_GAIN, offset=1.0)
        # inv_freq is float32 in transformers whatever the model's type; make the reference exact.
        exact = torch.tensor([ROPE_BASE ** (-2 * i / self.size) for i in range(self.size // 2)], dtype=torch.float64)
        model.model.rotary_emb.inv_freq = exact
        model.model.rotary_emb.forward = lambda x, position_ids: rotary(exact, position_ids)
        return model

    def adapted(self):
        for i in range(self.first, self.first + self.count):
            for target in range(7):
                if self.targets >> target & 1:
                    yield i, target

    def build(self):
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, bias="none",
                            target_modules=[TARGETS[t] for t in range(7) if self.targets >> t & 1],
                            layers_to_transform=list(range(self.first, self.first + self.count)))
        model = get_peft_model(self.base(), config).double()
        layers = model.base_model.model.model.layers
        for i, target in self.adapted():
            module = self.linear(layers[i], target)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data.copy_(torch.from_numpy(value(tensor_id(i, 10 + target), a.numel(), MATRIX).reshape(tuple(a.shape))))
            w = value(tensor_id(i, 20 + target), b.numel(), MATRIX).reshape(tuple(b.shape))
            b.data.copy_(torch.from_numpy(to_hf(w, self.heads_of(target)) if self.heads_of(target) else w))
        return model, layers

    def gradient(self, layers):
        a, b = [], []
        for i, target in self.adapted():
            module = self.linear(layers[i], target)
            a.append(module.lora_A["default"].weight.grad.numpy().ravel())
            g = module.lora_B["default"].weight.grad.numpy()
            b.append((to_gguf(g, self.heads_of(target)) if self.heads_of(target) else g).ravel())
        return np.concatenate((a if self.mode == 1 else []) + b)

    def write(self, folder):
        model, layers = self.build()
        ids, learn, losses, logits, gradients, offsets = [], [], [], [], [], [0]
        for e, length in enumerate(self.lengths):
            mine = ((value(900 + e, length, 1.0) + 1) / 2 * (self.vocabulary - 1)).astype(np.int64)
            mask = (np.arange(length) >= length - 4 - e) & (np.arange(length) != length - 2)
            model.zero_grad()
            out = model(torch.from_numpy(mine)[None]).logits[0]
            rows = np.nonzero(mask)[0]
            loss = torch.nn.functional.cross_entropy(out[rows - 1], torch.from_numpy(mine[rows]))
            loss.backward()
            ids += mine.tolist()
            learn += mask.astype(np.uint8).tolist()
            losses.append(loss.item())
            logits.append(out.detach().numpy())
            gradients.append(self.gradient(layers))
            offsets.append(offsets[-1] + length)
        header = [self.layers, self.d, self.heads, self.kv, self.size, self.ff, self.vocabulary, int(self.tied),
                  self.mode, self.rank, self.alpha, self.first, self.count, self.targets, len(self.lengths), len(ids)]
        data = b"CGL1" + struct.pack("<16i", *header) + struct.pack(f"<{len(offsets)}i", *offsets)
        data += struct.pack(f"<{len(ids)}i", *ids) + bytes(learn) + struct.pack(f"<{len(losses)}d", *losses)
        data += np.concatenate(logits).astype("<f4").tobytes() + np.stack(gradients).astype("<f4").tobytes()
        Path(folder, f"llama_{self.name}.golden").write_bytes(data)
        print(f"{self.name}: {len(data)} bytes, losses {losses}")


def rotary(inv_freq, position_ids):
    angles = position_ids[..., None].double() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for case in (
        Case("joint_all", 1, 4, 8, 0, 3, 0x7F, True, [9, 14]),
        Case("ffa_qv", 2, 8, 16, 1, 2, 0x05, False, [20, 6, 11]),
        Case("joint_middle", 1, 3, 3, 1, 1, 0x48, True, [12, 7]),
    ):
        case.write(sys.argv[1])
