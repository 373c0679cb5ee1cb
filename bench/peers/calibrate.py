#!/usr/bin/env python3
"""The demo's learning problem in PyTorch: majority, base, federated with and without DP, best hospital alone.

    calibrate.py --model GGUF --data FOLDER [--rounds 8 --steps 2 ...] [--seed 1 2 3] [--compare]

FOLDER is what scripts/demo-data.py wrote. LoRA in `ffa` mode (A frozen, uniform in +-1/sqrt(in); B trained from zero) on the
upper layers; at every site record-level DP-SGD (Poisson sampling, per-example clip, Gaussian noise on the sum, denominator
q N) for some local steps a round; deltas averaged uniformly; the server applies FedAvg or FedAvgM. Everything below the
lowest adapted layer is frozen, so its output is computed once and kept in memory as bfloat16.
"""

import argparse
import hashlib
import json
import os
import time

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

import rdp

TARGETS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
           "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


class Model:
    """SmolLM2 from its GGUF file, dequantised to bfloat16. GGUF stores q and k for rotary pairs (2i, 2i + 1)."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        number = lambda key: float(reader.fields["llama." + key].contents())
        self.layers, self.width = int(number("block_count")), int(number("embedding_length"))
        self.heads, self.kv_heads = int(number("attention.head_count")), int(number("attention.head_count_kv"))
        self.eps, self.base = number("attention.layer_norm_rms_epsilon"), number("rope.freq_base")
        self.head = self.width // self.heads
        self.w = {}
        for tensor in reader.tensors:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            self.w[tensor.name.removesuffix(".weight")] = torch.from_numpy(np.ascontiguousarray(array)).bfloat16()
        self.unembedding = self.w.get("output", self.w["token_embd"])
        frequency = self.base ** (-torch.arange(0, self.head, 2).float() / self.head)
        angle = torch.arange(512).float()[:, None] * frequency
        self.cos, self.sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def norm(self, x, name):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).bfloat16() * self.w[name]

    def rotate(self, x):  # (batch, heads, tokens, head)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def linear(self, x, layer, name, lora):
        y = x @ self.w["blk.%d.%s" % (layer, name)].T
        if lora and (layer, name) in lora:
            a, b, scale = lora[layer, name]  # (rank, in), (batch, out, rank)
            y = y + scale * ((x @ a.T) @ b.transpose(1, 2))
        return y

    def run(self, x, first, last, lora=None):
        """Layers first .. last - 1 over x (batch, tokens, width)."""
        batch, tokens, _ = x.shape
        for i in range(first, last):
            y = self.norm(x, "blk.%d.attn_norm" % i)
            q = self.linear(y, i, "attn_q", lora).view(batch, tokens, self.heads, self.head).transpose(1, 2)
            k = self.linear(y, i, "attn_k", lora).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2)
            v = self.linear(y, i, "attn_v", lora).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2)
            groups = self.heads // self.kv_heads
            k, v = self.rotate(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            y = F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
            x = x + self.linear(y.transpose(1, 2).reshape(batch, tokens, self.width), i, "attn_output", lora)
            y = self.norm(x, "blk.%d.ffn_norm" % i)
            y = F.silu(self.linear(y, i, "ffn_gate", lora)) * self.linear(y, i, "ffn_up", lora)
            x = x + self.linear(y, i, "ffn_down", lora)
        return x

    def logits(self, x):
        return (self.norm(x, "output_norm") @ self.unembedding.T).float()


class Rows:
    """Tokenised examples and, once cached, the hidden states below the lowest adapted layer."""

    def __init__(self, tokenizer, path, system, limit=None):
        self.prompt, self.answer, self.labels = [], [], []
        with open(path, encoding="utf-8") as file:
            for line in list(file)[:limit]:
                user, assistant = json.loads(line)["messages"]
                text = "%s<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n" % (SYSTEM if system else "", user["content"])
                self.prompt.append(tokenizer(text, add_special_tokens=False).input_ids)
                self.answer.append(tokenizer(assistant["content"], add_special_tokens=False).input_ids)
                self.labels.append(assistant["content"])
        self.hidden = None

    def __len__(self):
        return len(self.prompt)

    def tokens(self, end):
        """Prompt, answer and the end-of-turn token: what the trainer sees."""
        return [p + a + end for p, a in zip(self.prompt, self.answer)]

    def cache(self, model, layer, sequences):
        self.sequences = sequences
        self.hidden = [None] * len(self)
        order = sorted(range(len(self)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            x = F.embedding(padded([torch.tensor(sequences[i]) for i in part]), model.w["token_embd"])
            x = model.run(x, 0, layer)
            for i, row in zip(part, x):
                self.hidden[i] = row[: len(sequences[i])].clone()


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class Trainer:
    def __init__(self, args, model, sites, evaluation, labels, end):
        self.args, self.model, self.sites, self.eval, self.labels, self.end = args, model, sites, evaluation, labels, end
        self.first = args.first_layer
        self.scale = args.alpha / args.rank
        self.names = [(i, TARGETS[t]) for i in range(self.first, args.last_layer) for t in args.targets]
        self.shapes = [tuple(model.w["blk.%d.%s" % name].shape) for name in self.names]  # (out, in)
        self.d = sum(out * args.rank for out, _ in self.shapes)

    def frozen_a(self, generator):
        return [((torch.rand(self.args.rank, inputs, generator=generator) * 2 - 1) / inputs**0.5).bfloat16()
                for _, inputs in self.shapes]

    def adapters(self, a, flat):
        """flat (batch, d) -> the dictionary Model.linear wants."""
        lora, at = {}, 0
        for name, (out, _), frozen in zip(self.names, self.shapes, a):
            b = flat[:, at : at + out * self.args.rank].view(len(flat), out, self.args.rank)
            lora[name] = (frozen, b.bfloat16(), self.scale)
            at += out * self.args.rank
        return lora

    def gradients(self, a, rows, params):
        """Per-example gradients (batch, d) of the mean loss over each example's label tokens. rows: [(Rows, index)]"""
        model, flat = self.model, params.clone().requires_grad_(True)
        x = model.run(padded([r.hidden[i] for r, i in rows]), self.first, model.layers, self.adapters(a, flat))
        losses = []
        at, which, target, weight = [], [], [], []
        for n, (r, i) in enumerate(rows):
            begin, ids = len(r.prompt[i]), r.sequences[i]
            if not self.args.train_end:
                ids = ids[: begin + len(r.answer[i])]
            for t in range(begin, len(ids)):
                which.append(n), at.append(t - 1), target.append(ids[t]), weight.append(1.0 / (len(ids) - begin))
        loss = F.cross_entropy(model.logits(x[which, at]), torch.tensor(target), reduction="none")
        loss = loss * torch.tensor(weight)
        (gradient,) = torch.autograd.grad(loss.sum(), flat)
        return gradient, float(loss.detach().sum()) / len(rows)

    @torch.no_grad()
    def accuracy(self, a, flat):
        """Share of evaluation rows whose own label has the highest mean log-likelihood; and share per label."""
        model, rows = self.model, self.eval
        scores = torch.full((len(rows), len(self.labels)), -1e9)
        for start in range(0, len(rows), 96):
            part = list(range(start, min(start + 96, len(rows))))
            lora = self.adapters(a, flat.expand(len(part), -1))
            heads = {}
            for n, ids in enumerate(self.labels.values()):
                heads.setdefault(tuple(ids[:-1]), []).append(n)
            for head, members in heads.items():
                hidden = [rows.hidden_for(model, self.first, i, head) for i in part]
                x = model.run(padded(hidden), self.first, model.layers, lora)
                begin = torch.tensor([len(rows.prompt[i]) for i in part])
                z = [model.logits(x[torch.arange(len(part)), begin + t - 1]).log_softmax(-1) for t in range(len(head) + 1)]
                for n in members:
                    ids = list(self.labels.values())[n]
                    scores[part, n] = sum(z[t][:, token] for t, token in enumerate(ids)) / len(ids)
        names = list(self.labels)
        guess = [names[i] for i in scores.argmax(1).tolist()]
        hit = [g == l for g, l in zip(guess, rows.labels)]
        each = {l: round(100 * sum(h for h, r in zip(hit, rows.labels) if r == l) / max(1, rows.labels.count(l))) for l in names}
        return 100 * sum(hit) / len(hit), each

    def train(self, seed, dp, federated, trace=False):
        """Runs all rounds; returns the flat parameters (one row; one per site when not federated)."""
        args, n_sites = self.args, len(self.sites)
        generator = torch.Generator().manual_seed(seed)
        a = self.frozen_a(torch.Generator().manual_seed(1000 + seed))
        state = torch.zeros(1 if federated else n_sites, self.d)
        momentum = torch.zeros_like(state)
        norms, seen, tokens = [], 0, 0
        for round_number in range(args.rounds):
            local = state.expand(n_sites, -1).clone()
            velocity, first, second = torch.zeros_like(local), torch.zeros_like(local), torch.zeros_like(local)
            for step in range(args.steps):
                batch, owner = [], []
                for s, rows in enumerate(self.sites):
                    q = args.q if args.q else args.batch / rows.declared
                    rate = q * rows.declared / len(rows)  # a subset of the rows stands in for all of them
                    for i in (torch.rand(len(rows), generator=generator) < rate).nonzero().flatten().tolist():
                        batch.append((rows, i)), owner.append(s)
                owner = torch.tensor(owner)
                gradient, loss = self.gradients(a, batch, local[owner])
                norm = gradient.norm(dim=1)
                norms += norm.tolist()
                seen, tokens = seen + len(batch), tokens + sum(len(r.sequences[i]) for r, i in batch)
                gradient *= (args.clip / norm.clamp_min(1e-12)).clamp_max(1.0)[:, None]
                total = torch.zeros_like(local).index_add_(0, owner, gradient)
                if dp:
                    total += args.z * args.clip * torch.randn(total.shape, generator=generator)
                denominators = torch.tensor([args.q * r.declared if args.q else args.batch for r in self.sites])
                mean = total / denominators[:, None]
                progress = (round_number * args.steps + step) / (args.rounds * args.steps)
                lr = args.lr * (1 - args.decay * progress)
                if args.optimizer == "adam":
                    first.mul_(0.9).add_(mean, alpha=0.1)
                    second.mul_(0.99).addcmul_(mean, mean, value=0.01)
                    local -= lr * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
                else:
                    velocity = args.momentum * velocity + mean
                    local -= lr * velocity
            delta = local - state.expand(n_sites, -1)
            delta = delta.mean(0, keepdim=True) if federated else delta
            momentum = args.server_momentum * momentum + delta
            state = state + args.server_lr * momentum
            if trace and (round_number + 1) % 3 == 0:
                print("  round %d loss %.3f gradient norm median %.3f accuracy %.1f" % (round_number + 1, loss,
                      float(np.median(norms[-len(batch):])), self.accuracy(a, state[:1])[0]), flush=True)
        return a, state, {"examples": seen, "tokens": tokens, "norms": norms}


def hidden_for(self, model, layer, i, head):
    """Hidden states of prompt + the first tokens of an answer; computed once."""
    store = self.__dict__.setdefault("evaluation", {})
    if (i, head) not in store:
        x = F.embedding(torch.tensor([self.prompt[i] + list(head)]), model.w["token_embd"])
        store[i, head] = model.run(x, 0, layer)[0]
    return store[i, head]


Rows.hidden_for = hidden_for


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True), add("--data", required=True), add("--cache", help="folder for cached hidden states")
    add("--system", action="store_true", help="with SmolLM2's default system message")
    add("--pool", type=int, default=700, help="rows a site actually used (0: all); q and N stay those of all rows")
    add("--first-layer", type=int, default=24), add("--last-layer", type=int, default=30)
    add("--targets", nargs="+", default=["q", "v"], choices=list(TARGETS))
    add("--rank", type=int, default=8), add("--alpha", type=float, default=16)
    add("--rounds", type=int, default=8), add("--steps", type=int, default=2)
    add("--batch", type=float, default=29), add("--q", type=float, default=0, help="one sampling rate for all, instead of --batch")
    add("--optimizer", choices=["sgd", "adam"], default="sgd"), add("--momentum", type=float, default=0.0)
    add("--lr", type=float, default=1.0), add("--decay", type=float, default=0.0)
    add("--server-lr", type=float, default=1.0), add("--server-momentum", type=float, default=0.0)
    add("--clip", type=float, default=1.0), add("--epsilon", type=float, default=7.9), add("--delta", type=float, default=1e-5)
    add("--no-train-end", dest="train_end", action="store_false", help="no loss on the end-of-turn token")
    add("--score-end", action="store_true", help="the compared answers include the end-of-turn token")
    add("--seed", type=int, nargs="+", default=[1]), add("--compare", action="store_true")
    add("--modes", nargs="*", default=None, help="of: base dp nodp solo"), add("--trace", action="store_true")
    add("--threads", type=int, default=2), add("--sweep", nargs="*", default=[""], help="each: 'lr=2 clip=0.5 ...'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    modes = args.modes or (["base", "dp", "nodp", "solo"] if args.compare else ["base", "dp"])

    started = time.time()
    model = Model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(args.model), gguf_file=os.path.basename(args.model))
    end = tokenizer("<|im_end|>", add_special_tokens=False).input_ids
    names = sorted(n for n in os.listdir(args.data) if n.startswith("site-") and n.endswith(".jsonl"))
    sites = []
    for name in names:
        path = os.path.join(args.data, name)
        rows = Rows(tokenizer, path, args.system, args.pool or None)
        with open(path, "rb") as file:
            rows.declared = sum(1 for _ in file)
        sites.append(rows)
    evaluation = Rows(tokenizer, os.path.join(args.data, "eval.jsonl"), args.system)
    labels = {l: tokenizer(l, add_special_tokens=False).input_ids for l in sorted(set(evaluation.labels))}
    if args.score_end:
        labels = {label: ids + end for label, ids in labels.items()}
    lengths = [len(t) for rows in sites for t in rows.tokens(end)]
    print("tokens an example: mean %.1f, max %d; labels %s" % (sum(lengths) / len(lengths), max(lengths),
          {l: len(t) for l, t in labels.items()}), flush=True)
    for n, rows in enumerate(sites):
        sequences = rows.tokens(end)
        key = hashlib.sha256(repr((sequences, args.first_layer)).encode()).hexdigest()[:24]
        path = args.cache and os.path.join(args.cache, key + ".pt")
        if path and os.path.exists(path):
            rows.sequences, rows.hidden = sequences, torch.load(path)
        else:
            with torch.no_grad():
                rows.cache(model, args.first_layer, sequences)
            if path:
                os.makedirs(args.cache, exist_ok=True)
                torch.save(rows.hidden, path)
    print("ready after %.0f s" % (time.time() - started), flush=True)

    majority = 100 * max(evaluation.labels.count(l) for l in labels) / len(evaluation)
    done_base = False
    for setting in args.sweep:
        for pair in setting.split():
            key, value = pair.split("=")
            old = getattr(args, key.replace("-", "_"))
            if key == "targets":
                value = value.split(",")
            elif key == "optimizer":
                pass
            else:
                value = type(old)(float(value))
            setattr(args, key.replace("-", "_"), value)
        trainer = Trainer(args, model, sites, evaluation, labels, end)
        rates = [args.q if args.q else args.batch / r.declared for r in sites]
        total_steps = args.rounds * args.steps
        args.z = rdp.noise_multiplier(max(rates), total_steps, args.epsilon, args.delta)
        if setting:
            print("[%s]" % setting)
        print("d %d  q %s  steps %d  z %.4f (epsilon %.2f)" % (trainer.d, " ".join("%.5f" % q for q in rates), total_steps,
              args.z, args.epsilon))
        if "base" in modes and not done_base:
            a = trainer.frozen_a(torch.Generator().manual_seed(1))
            base, each = trainer.accuracy(a, torch.zeros(1, trainer.d))
            print("majority %.1f  base %.1f %s" % (majority, base, each), flush=True)
            done_base = True
        for seed in args.seed:
            began, line = time.time(), []
            for mode in modes:
                if mode == "base":
                    continue
                a, state, info = trainer.train(seed, mode != "nodp", mode != "solo", trace=args.trace and mode != "solo")
                results = [trainer.accuracy(a, row[None]) for row in state]
                line.append("%s %s" % (mode, " ".join("%.1f" % r[0] for r in results)))
                if mode == "dp":
                    each = results[0][1]
                    line.append("(examples %d tokens %d |B| %.2f norm p50 first/last %.2f/%.2f)" % (info["examples"], info["tokens"],
                        float(state.norm()), np.median(info["norms"][: 100]), np.median(info["norms"][-100:])))
            print("seed %d: %s [%.0f s]" % (seed, "  ".join(line), time.time() - began), flush=True)
            if "dp" in modes and args.trace:
                print("   ", each)


if __name__ == "__main__":
    main()
