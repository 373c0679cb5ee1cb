#!/usr/bin/env python3
"""LoRA training in PyTorch, transformers and PEFT on one GPU: the peer of build/gpu/bench/bench_gpu.

    gpu_peer.py --shape llama-3.2-1b --modes eager,compile,graph --json

Needs torch, transformers and peft, no network and no files: models are built from their shapes with random weights. The
shapes are those of bench/synthetic.c. Measured, each as one line (one JSON object a line with --json):

machine  the card and the versions of what is measured
copy     a device-to-device copy, bytes read plus bytes written: the memory's ceiling
gemm     bf16 matrix products through torch: 8192^3, and those of this shape's training step (rows: batch times tokens)
         each alone and weighted by their FLOPs: the arithmetic's ceilings
train    tokens a second of a whole step (forward, backward, AdamW over the factors), median over steps after a warm-up

The settings are the peer's fast ones: bf16 base and factors (PEFT's own default keeps factors in float32), SDPA
attention without a mask, no dropout, no checkpointing, no cache, the head on labelled rows only, fused AdamW. Modes:

eager          as most people run it
compile        torch.compile of each layer by itself (one compilation serves all layers) and of the head with its loss
graph          the same, and a whole step recorded in a CUDA graph: no launch overhead
compile-model  torch.compile of the whole model
autotune       like compile, with max-autotune-no-cudagraphs: slow to start
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    layers: int
    d: int
    heads: int
    kv_heads: int
    head_size: int
    ff: int
    vocabulary: int
    tied: bool
    rope_base: float
    batch: int  # what is measured by default
    tokens: int
    architecture: str = "llama"  # llama, glm4, qwen3 or gemma3
    window: int = 0  # gemma3's, which all layers but each sixth look back

    def linears(self):
        """(products that share an input, in, outs) of one layer. glm4 has gate and up as one matrix, with one LoRA."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        gate_up = (2 * self.ff,) if self.architecture == "glm4" else (self.ff, self.ff)
        return [("qkv", self.d, (q, kv, kv)), ("o", q, (self.d,)), ("gate_up", self.d, gate_up),
                ("down", self.ff, (self.d,))]

    def layer_weights(self):
        return sum(k * sum(ns) for _, k, ns in self.linears())

    def lora_weights(self, rank):
        return self.layers * rank * sum(k + n for _, k, ns in self.linears() for n in ns)

    def lora_targets(self):
        feed = ["gate_up_proj"] if self.architecture == "glm4" else ["gate_proj", "up_proj"]
        return ["q_proj", "k_proj", "v_proj", "o_proj", *feed, "down_proj"]

    def config(self):
        from transformers import Gemma3TextConfig, Glm4Config, LlamaConfig, Qwen3Config

        rope = {"rope_type": "default", "rope_theta": self.rope_base}
        common = {"hidden_size": self.d, "intermediate_size": self.ff, "num_hidden_layers": self.layers,
                  "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_size,
                  "vocab_size": self.vocabulary, "tie_word_embeddings": self.tied, "max_position_embeddings": 32768,
                  "attention_dropout": 0.0, "use_cache": False, "bos_token_id": None, "eos_token_id": None,
                  "pad_token_id": None}
        if self.architecture == "glm4":
            return Glm4Config(**common, rms_norm_eps=1e-5, attention_bias=True,
                              rope_parameters={**rope, "partial_rotary_factor": 0.5})
        if self.architecture == "qwen3":
            return Qwen3Config(**common, rms_norm_eps=1e-6, rope_parameters=rope)
        if self.architecture == "gemma3":
            kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(self.layers)]
            return Gemma3TextConfig(**common, rms_norm_eps=1e-6, sliding_window=self.window, layer_types=kinds,
                                    query_pre_attn_scalar=self.head_size,
                                    rope_parameters={"full_attention": rope,
                                                     "sliding_attention": {**rope, "rope_theta": 1e4}})
        return LlamaConfig(**common, rms_norm_eps=1e-5, rope_parameters=rope)


SHAPES = {
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, True, 1e5, 16, 1024),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, True, 5e5, 4, 2048),
    "glm-4-9b": Shape(40, 4096, 32, 2, 128, 13696, 151552, False, 1e4, 2, 2048, "glm4"),
    "qwen3-0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936, True, 1e6, 8, 2048, "qwen3"),
    "gemma-3-270m": Shape(18, 640, 4, 1, 256, 2048, 262144, True, 1e6, 32, 512, "gemma3", 512),
    "tiny": Shape(2, 128, 2, 1, 64, 256, 256, False, 1e4, 2, 64),
    "tiny-glm4": Shape(2, 128, 2, 1, 64, 256, 256, False, 1e4, 2, 64, "glm4"),
    "tiny-qwen3": Shape(2, 128, 2, 1, 128, 256, 256, True, 1e4, 2, 64, "qwen3"),
    "tiny-gemma3": Shape(2, 128, 2, 1, 256, 256, 256, True, 1e4, 2, 64, "gemma3", 512),
}


def flops_per_token(shape, tokens, rank, labelled):
    """4 a weight that a token meets (2 forward, 2 for the input's gradient), the head on the labelled share; causal
    attention forward (2·tokens·heads·head_size a layer) and 2.5 times that backward; 6 a LoRA weight."""
    weights = shape.layers * shape.layer_weights() + labelled * shape.d * shape.vocabulary
    attention = 2 * tokens * shape.heads * shape.head_size * shape.layers
    return 4 * weights + 3.5 * attention + 6 * shape.lora_weights(rank)


class Timer:
    """Times between marks, in seconds: events on a GPU, so that nothing waits; a clock without one."""

    def __init__(self, torch, device):
        self.torch, self.cuda, self.marks = torch, device == "cuda", []

    def mark(self):
        if self.cuda:
            event = self.torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals(self):
        if not self.cuda:
            return [b - a for a, b in zip(self.marks, self.marks[1:])]
        self.torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:])]


class Bench:
    def __init__(self, args):
        import torch

        self.torch, self.args, self.cuda = torch, args, args.device == "cuda"
        self.compiled = None, None  # what is compiled at present, and the loss over it

    def emit(self, kind, **values):
        line = {"program": "gpu_peer", "kind": kind, **values}
        if self.args.json:
            print(json.dumps(line), flush=True)
        else:
            words = (f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
            print("  ".join(words), flush=True)

    def sync(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def median(self, run, seconds):
        """Seconds of one run(): groups of at least a millisecond, until the time is up."""
        for _ in range(2):
            run()
        self.sync()
        start = time.perf_counter()
        for _ in range(3):
            run()
        self.sync()
        one = max((time.perf_counter() - start) / 3, 1e-7)
        group = max(1, int(1e-3 / one))
        timer = Timer(self.torch, self.args.device)
        timer.mark()
        for _ in range(max(5, int(seconds / (one * group)))):
            for _ in range(group):
                run()
            timer.mark()
        return statistics.median(timer.intervals()) / group

    # --- ceilings

    def machine(self):
        import peft
        import transformers

        line = {"torch": self.torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
                "python": sys.version.split()[0], "cuda": self.torch.version.cuda, "gpu": self.args.device}
        if self.cuda:
            properties = self.torch.cuda.get_device_properties(0)
            line.update(gpu=properties.name, gpu_memory_bytes=properties.total_memory,
                        multiprocessors=properties.multi_processor_count, driver=driver_version())
        self.emit("machine", **line)

    def copy(self):
        values = (1 << 30) if self.cuda else (1 << 20)
        a = self.torch.zeros(values, dtype=self.torch.float32, device=self.args.device)
        b = self.torch.ones_like(a)
        seconds = self.median(lambda: b.copy_(a), self.args.gemm_seconds)
        self.emit("copy", gb_per_second=2 * 4 * values / seconds / 1e9)

    def product(self, m, k, n, backward=False):
        """TFLOP/s of x (m, k) times w (n, k) transposed, or of dy (m, n) times w."""
        options = {"dtype": self.torch.bfloat16, "device": self.args.device}
        w = self.torch.randn(n, k, **options) * 0.02
        x = self.torch.randn(m, n if backward else k, **options)
        y = self.torch.empty(m, k if backward else n, **options)
        other = w if backward else w.t()
        seconds = self.median(lambda: self.torch.mm(x, other, out=y), self.args.gemm_seconds)
        return 2 * m * k * n / seconds / 1e12

    def gemm(self, shape, batch, tokens, labelled):
        size = 8192 if self.cuda else 256
        m, products, flops, seconds = batch * tokens, [], 0.0, 0.0
        for name, k, ns in shape.linears() + [("head", shape.d, (shape.vocabulary,))]:
            rows = m if name != "head" else max(1, round(m * labelled))
            times = shape.layers if name != "head" else 1
            for backward in (False, True):
                rate = self.product(rows, k, sum(ns), backward)
                work = 2e-12 * times * rows * k * sum(ns)
                flops, seconds = flops + work, seconds + work / rate
                products.append({"name": name + (" dgrad" if backward else ""), "m": rows, "k": k, "n": sum(ns),
                                 "tflops": rate})
        peak = self.product(size, size, size)
        self.emit("gemm", shape=self.args.shape, batch=batch, tokens=tokens, labels=self.args.labels, peak=peak,
                  peak_size=size, weighted=flops / seconds, products=products)

    # --- training

    def build(self, shape):
        from peft import LoraConfig, get_peft_model
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        torch, args = self.torch, self.args
        # The library's own SDPA attention under a name for which it makes no mask: by the name "sdpa" it looks for
        # packed sequences at each step, which waits for the GPU, and while compiling or recording it makes a full mask.
        # Without one, no window is looked through either: sequences must not be longer.
        AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
        with torch.device(args.device):  # the weights are drawn where they stay: seconds, not minutes
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa_causal")
            lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, task_type="CAUSAL_LM",
                              target_modules=shape.lora_targets())
            model = get_peft_model(model, lora, autocast_adapter_dtype=args.adapter == "float32")
        if args.adapter == "bfloat16":
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        model.train()
        base = model.get_base_model()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == shape.lora_weights(args.rank)
        assert not base.lm_head.weight.requires_grad and base.lm_head.weight.dtype == torch.bfloat16
        with torch.no_grad():  # no product by zero: PEFT starts with B = 0
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.005)
        return base, trained

    def loss(self, base, mode):
        """Compiles what the mode asks for, unless it is; returns loss(ids, targets of the last rows)."""
        torch, functional = self.torch, self.torch.nn.functional
        what = "compile" if mode == "graph" else mode
        if self.compiled[0] == what:
            return self.compiled[1]

        def head_loss(hidden, weight, targets):
            logits = functional.linear(hidden, weight)
            return functional.cross_entropy(logits.float().view(-1, weight.shape[0]), targets.reshape(-1))

        torch._dynamo.reset()
        options = {"mode": "max-autotune-no-cudagraphs"} if what == "autotune" else {}
        body, parts = base.model, [*base.model.layers, base.model.norm]
        for part in parts:
            part._compiled_call_impl = None  # undoes an earlier compile()
        if what in ("compile", "autotune"):
            for part in parts:
                part.compile(dynamic=False, **options)
        if what == "compile-model":
            body = torch.compile(base.model, dynamic=False)
        if what != "eager":
            head_loss = torch.compile(head_loss, dynamic=False, **options)

        def loss_of(ids, targets):
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
            return head_loss(hidden[:, -targets.shape[1]:], base.lm_head.weight, targets)

        self.compiled = what, loss_of
        return loss_of

    def steps(self, base, trained, shape, mode, batch, tokens, labels):
        torch, args = self.torch, self.args
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True, capturable=mode == "graph" and self.cuda)
        loss_of = self.loss(base, mode)
        inputs = [[torch.randint(shape.vocabulary, (batch, n), device=args.device) for n in (tokens, labels)]
                  for _ in range(4)]
        ids, targets = inputs[0][0].clone(), inputs[0][1].clone()

        def step():
            loss = loss_of(ids, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        self.sync()
        start = time.perf_counter()
        loss = step()
        self.sync()
        first = time.perf_counter() - start
        run = step
        if mode == "graph":
            run, loss = self.record(step)
        for _ in range(args.warmup):
            run()
        self.sync()
        start = time.perf_counter()
        run()
        self.sync()
        count = max(3, min(args.steps, int(args.seconds / (time.perf_counter() - start))))
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        timer = Timer(torch, args.device)
        timer.mark()
        for i in range(count):
            ids.copy_(inputs[i % 4][0])
            targets.copy_(inputs[i % 4][1])
            last = run()
            timer.mark()
        seconds = statistics.median(timer.intervals())
        loss = float(loss if mode == "graph" else last)
        if not loss < 1e4:
            raise RuntimeError(f"the loss is {loss}")
        memory = 0
        if self.cuda:  # a recording's memory is its own pool's
            memory = torch.cuda.max_memory_reserved() if mode == "graph" else torch.cuda.max_memory_allocated()
        return {"step_ms": 1e3 * seconds, "tokens_per_second": batch * tokens / seconds, "steps": count,
                "first_step_seconds": first, "memory_bytes": memory, "loss": loss}

    def record(self, step):
        """Records a step; returns what replays it and where its loss appears."""
        torch = self.torch
        if not self.cuda:
            return step, step()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        return graph.replay, loss

    def train(self, base, trained, shape, mode, batch, tokens, labels):
        args = self.args
        common = {"shape": args.shape, "mode": mode, "tokens": tokens, "labels": args.labels, "rank": args.rank,
                  "adapter": args.adapter,
                  "flops_per_token": flops_per_token(shape, tokens, args.rank, labels / tokens)}
        error = None
        while batch and error is None:
            try:
                result = self.steps(base, trained, shape, mode, batch, tokens, labels)
                self.emit("train", **common, batch=batch, **result)
                return
            except self.torch.cuda.OutOfMemoryError:
                print(f"gpu_peer: {mode}: out of memory at {batch} x {tokens} tokens", file=sys.stderr)
            except Exception as other:  # a compiler that fails must not take the other modes with it
                error = f"{type(other).__name__}: {other}".splitlines()[0][:300]
            self.clean(trained)  # here the frames that held the activations are gone
            batch //= 2
        self.emit("train", **common, error=error or "out of memory with one sequence")

    def clean(self, trained):
        import gc

        for parameter in trained:
            parameter.grad = None
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()

    def run(self):
        args, shape = self.args, SHAPES[self.args.shape]
        batch, tokens = args.batch or shape.batch, args.tokens or shape.tokens
        labels = tokens if args.labels == "all" else max(1, tokens // 4)
        if shape.window and tokens > shape.window:
            sys.exit(f"gpu_peer: {args.shape} has windows of {shape.window} tokens, and sequences are {tokens} long: "
                     "the attention used here has no windows")
        self.torch.manual_seed(1)
        self.machine()
        if not args.no_ceilings:
            self.copy()
            self.clean([])
            self.gemm(shape, batch, tokens, labels / tokens)
            self.clean([])
        if args.modes:
            start = time.perf_counter()
            base, trained = self.build(shape)
            self.sync()
            print(f"gpu_peer: model built in {time.perf_counter() - start:.1f} s", file=sys.stderr)
            for mode in args.modes.split(","):
                self.train(base, trained, shape, mode, batch, tokens, labels)
                self.clean(trained)


def driver_version():
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], check=True,
                              capture_output=True, text=True, timeout=20)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


MODES = ("eager", "compile", "graph", "compile-model", "autotune")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--batch", type=int, help="sequences a step; halved until they fit (default: the shape's)")
    parser.add_argument("--tokens", type=int, help="tokens a sequence (default: the shape's)")
    parser.add_argument("--labels", choices=("all", "quarter"), default="all", help="rows learnt: all or the last 1/4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapter", choices=("bfloat16", "float32"), default="bfloat16", help="type of the factors")
    parser.add_argument("--modes", default="eager,compile", help="of " + ", ".join(MODES) + "; empty: ceilings only")
    parser.add_argument("--steps", type=int, default=20, help="timed steps at most")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="for the timed steps of one mode, about")
    parser.add_argument("--gemm-seconds", type=float, default=0.2, help="for each product, about")
    parser.add_argument("--no-ceilings", action="store_true", help="only train")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for mode in filter(None, args.modes.split(",")):
        if mode not in MODES:
            parser.error(f"no mode {mode}; there are {', '.join(MODES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    Bench(args).run()


if __name__ == "__main__":
    main()
