#!/usr/bin/env python3
"""Writes ARCHITECTURE_CASE.golden: losses, logits and LoRA gradients of tiny random models of each architecture, from
transformers and PEFT in float64 (the norms and the softmax of transformers round to float32 inside: about 1e-7).

    python make_models.py OUTPUT_FOLDER [CASE...]          (needs torch, transformers, peft)

Weights are not stored: both sides compute them with value(), so a file stays small. They are drawn in GGUF's layout; the
Hugging Face llama gets its q and k rows un-permuted from GGUF's NORM rotary order (the pair (2i, 2i+1) of a head becomes
(i, i + head_size/2)), and the gradients of the lora_B rows of q and k are permuted back. The other architectures have
the same layout in both. Gemma's norms hold the gain less 1 in Hugging Face's models.

File, little-endian: magic "CGL2"; i32 x 24: layers, d_model, heads, kv_heads, head_size, d_ff, vocabulary, tied, mode (1
joint, 2 B only), rank, alpha, layer_first, layer_count, targets, examples, tokens, architecture, rotated, rope_order (0
NORM, 1 NEOX), window, window_period, gate (0 SiLU, 1 GELU), flags (1 qkv_bias, 2 qk_norm, 4 post_norms, 8 fused_gate_up),
0; f64 x 5: rope_base, rope_base_sliding, attention_scale, embedding_scale, norm_eps; i32 offsets[examples + 1]; i32
ids[tokens]; u8 learn[tokens]; f64 losses[examples]; f32 logits[tokens][vocabulary]; f32 gradients[examples][trained], in
the canonical order of model/lora.h.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORM_GAIN, MATRIX, EMBEDDING, BIAS = 0.25, 0.125, 0.5, 0.25
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3", "glm4"]
QKV_BIAS, QK_NORM, POST_NORMS, FUSED = 1, 2, 4, 8
# A layer's vectors: name in Hugging Face's layer, number, scale and offset of its values.
NORMS = {
    "llama": {"input_layernorm": 7, "post_attention_layernorm": 8},
    "gemma3": {"input_layernorm": 7, "post_attention_layernorm": 9, "pre_feedforward_layernorm": 8,
               "post_feedforward_layernorm": 17},
    "glm4": {"input_layernorm": 7, "post_self_attn_layernorm": 9, "post_attention_layernorm": 8, "post_mlp_layernorm": 17},
}


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
    """0 embedding, 1 output norm, 2 head; then 32 for each layer: 0-6 the targets, 7 and 8 the blocks' norms, 9 and 17
    the norms of their outputs, 18 and 19 those of q and k, 10-16 A, 20-26 B, 27-29 the biases of q, k, v."""
    return which if layer is None else 32 * (layer + 1) + which


class Case:
    def __init__(self, architecture, name, mode, rank, alpha, first, count, targets, lengths, tied=True, size=16, window=0,
                 period=0, flags=0):
        self.architecture, self.name, self.mode, self.rank, self.alpha = architecture, name, mode, rank, alpha
        self.first, self.count, self.targets, self.tied, self.lengths = first, count, targets, tied, lengths
        self.layers, self.d, self.heads, self.kv, self.size, self.ff, self.vocabulary = 3, 64, 4, 2, size, 96, 128
        self.window, self.period, self.flags = window, period, flags
        gemma, glm = architecture == "gemma3", architecture == "glm4"
        self.rotated = size // 2 if glm else size
        self.base, self.base_sliding = (1000000.0, 10000.0) if gemma else (100000.0, 0.0)
        self.eps = 1e-5 if architecture == "llama" else 1e-6
        self.attention_scale = 1 / 24**0.5 if gemma else 0.0  # query_pre_attn_scalar: not the head size here
        self.embedding_scale = self.d**0.5 if gemma else 0.0

    def permuted_heads(self, target):
        return {0: self.heads, 1: self.kv}.get(target) if self.architecture == "llama" else None

    def module_name(self, target):
        return "gate_up_proj" if self.flags & FUSED and target == 5 else TARGETS[target]

    def linear(self, layer, target):
        return getattr(layer.self_attn if target < 4 else layer.mlp, self.module_name(target))

    def target_list(self):
        return [t for t in range(7) if not (self.flags & FUSED and t == 4)]

    def config(self):
        common = dict(vocab_size=self.vocabulary, hidden_size=self.d, intermediate_size=self.ff, head_dim=self.size,
                      num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv,
                      rms_norm_eps=self.eps, max_position_embeddings=64, tie_word_embeddings=self.tied,
                      attn_implementation="eager", pad_token_id=None, bos_token_id=None, eos_token_id=1)
        rope = {"rope_type": "default", "rope_theta": self.base}
        if self.architecture == "gemma3":
            kinds = ["full_attention" if (i + 1) % self.period == 0 else "sliding_attention" for i in range(self.layers)]
            return transformers.Gemma3TextConfig(**common, sliding_window=self.window, layer_types=kinds,
                                                 query_pre_attn_scalar=24, rope_parameters={
                                                     "full_attention": rope,
                                                     "sliding_attention": {**rope, "rope_theta": self.base_sliding}})
        if self.architecture == "glm4":
            return transformers.Glm4Config(**common, attention_bias=bool(self.flags & QKV_BIAS),
                                           rope_parameters={**rope, "partial_rotary_factor": 0.5})
        kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config,
                "qwen3": transformers.Qwen3Config}[self.architecture]
        return kind(**common, rope_parameters=rope)

    def model(self):
        return {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM,
                "qwen3": transformers.Qwen3ForCausalLM, "gemma3": transformers.Gemma3ForCausalLM,
                "glm4": transformers.Glm4ForCausalLM}[self.architecture](self.config()).double()

    def put(self, parameter, tensor, scale, heads=None, offset=0.0):
        w = value(tensor, parameter.numel(), scale).reshape(tuple(parameter.shape)) + offset
        parameter.data.copy_(torch.from_numpy(to_hf(w, heads) if heads else w))

    def put_layer(self, i, layer):
        gain = 0.0 if self.architecture == "gemma3" else 1.0
        for target in self.target_list():
            self.put(self.linear(layer, target).weight, tensor_id(i, target), MATRIX, self.permuted_heads(target))
            if target < 3 and self.flags & QKV_BIAS:
                self.put(self.linear(layer, target).bias, tensor_id(i, 27 + target), BIAS)
            else:
                assert self.linear(layer, target).bias is None
        for name, which in NORMS.get(self.architecture, NORMS["llama"]).items():
            self.put(getattr(layer, name).weight, tensor_id(i, which), NORM_GAIN, offset=gain)
        if self.flags & QK_NORM:
            self.put(layer.self_attn.q_norm.weight, tensor_id(i, 18), NORM_GAIN, offset=gain)
            self.put(layer.self_attn.k_norm.weight, tensor_id(i, 19), NORM_GAIN, offset=gain)

    def base_model(self):
        model = self.model()
        gain = 0.0 if self.architecture == "gemma3" else 1.0
        known = {id(model.model.embed_tokens.weight), id(model.model.norm.weight), id(model.lm_head.weight)}
        self.put(model.model.embed_tokens.weight, tensor_id(None, 0), EMBEDDING)
        self.put(model.model.norm.weight, tensor_id(None, 1), NORM_GAIN, offset=gain)
        if not self.tied:
            self.put(model.lm_head.weight, tensor_id(None, 2), EMBEDDING)
        for i, layer in enumerate(model.model.layers):
            self.put_layer(i, layer)
            known |= {id(p) for p in layer.parameters()}
        assert known == {id(p) for p in model.parameters()}
        # Frequencies are float32 in transformers whatever the model's type; make the reference exact.
        bases = {None: self.base, "full_attention": self.base, "sliding_attention": self.base_sliding or self.base}
        n = self.rotated
        exact = {kind: torch.tensor([base ** (-2 * i / n) for i in range(n // 2)], dtype=torch.float64)
                 for kind, base in bases.items()}
        model.model.rotary_emb.forward = lambda x, position_ids, layer_type=None: rotary(exact[layer_type], position_ids)
        return model

    def adapted(self):
        for i in range(self.first, self.first + self.count):
            for target in self.target_list():
                if self.targets >> target & 1:
                    yield i, target

    def build(self):
        modules = [self.module_name(t) for t in self.target_list() if self.targets >> t & 1]
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, bias="none", target_modules=modules,
                            layers_to_transform=list(range(self.first, self.first + self.count)))
        model = get_peft_model(self.base_model(), config).double()
        layers = model.base_model.model.model.layers
        for i, target in self.adapted():
            module = self.linear(layers[i], target)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            self.put(a, tensor_id(i, 10 + target), MATRIX)
            self.put(b, tensor_id(i, 20 + target), MATRIX, self.permuted_heads(target))
        return model, layers

    def gradient(self, layers):
        a, b = [], []
        for i, target in self.adapted():
            module = self.linear(layers[i], target)
            a.append(module.lora_A["default"].weight.grad.numpy().ravel())
            g = module.lora_B["default"].weight.grad.numpy()
            heads = self.permuted_heads(target)
            b.append((to_gguf(g, heads) if heads else g).ravel())
        return np.concatenate((a if self.mode == 1 else []) + b)

    def header(self, tokens):
        neox = self.architecture in ("qwen2", "qwen3", "gemma3")
        ints = [self.layers, self.d, self.heads, self.kv, self.size, self.ff, self.vocabulary, int(self.tied), self.mode,
                self.rank, self.alpha, self.first, self.count, self.targets, len(self.lengths), tokens,
                ARCHITECTURES.index(self.architecture) + 1, self.rotated, int(neox), self.window, self.period,
                int(self.architecture == "gemma3"), self.flags, 0]
        return b"CGL2" + struct.pack("<24i5d", *ints, self.base, self.base_sliding, self.attention_scale,
                                     self.embedding_scale, self.eps)

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
        data = self.header(len(ids)) + struct.pack(f"<{len(offsets)}i", *offsets)
        data += struct.pack(f"<{len(ids)}i", *ids) + bytes(learn) + struct.pack(f"<{len(losses)}d", *losses)
        data += np.concatenate(logits).astype("<f4").tobytes() + np.stack(gradients).astype("<f4").tobytes()
        Path(folder, f"{self.architecture}_{self.name}.golden").write_bytes(data)
        print(f"{self.architecture} {self.name}: {len(data)} bytes, losses {losses}")


def rotary(inv_freq, position_ids):
    angles = position_ids[..., None].double() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


ALL = 0x7F
CASES = (
    Case("llama", "joint_all", 1, 4, 8, 0, 3, ALL, [9, 14]),
    Case("llama", "ffa_qv", 2, 8, 16, 1, 2, 0x05, [20, 6, 11], tied=False),
    Case("llama", "joint_middle", 1, 3, 3, 1, 1, 0x48, [12, 7]),
    Case("qwen2", "joint_all", 1, 2, 4, 0, 3, ALL, [9, 14], flags=QKV_BIAS),
    Case("qwen3", "joint_all", 1, 2, 4, 0, 3, ALL, [9, 14], size=32, flags=QK_NORM),
    Case("gemma3", "joint_all", 1, 2, 4, 0, 3, ALL, [19, 8], size=32, window=5, period=2, flags=QK_NORM | POST_NORMS),
    Case("gemma3", "ffa_ko", 2, 4, 4, 1, 2, 0x0A, [7, 15], window=4, period=3, flags=QK_NORM | POST_NORMS),
    Case("glm4", "joint_all", 1, 2, 4, 0, 3, ALL, [9, 14], tied=False, flags=QKV_BIAS | POST_NORMS | FUSED),
    Case("glm4", "joint_up", 1, 3, 6, 1, 2, 0x30, [10, 6], flags=POST_NORMS | FUSED),
)

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for case in CASES:
        if len(sys.argv) == 2 or f"{case.architecture}_{case.name}" in sys.argv[2:]:
            case.write(sys.argv[1])
