#!/usr/bin/env python3
"""LoRA training in PyTorch, transformers and PEFT on the CPU: the peer of build/release/bench/train.

    cpu_peer.py --shape smollm2-135m --seq 512 --threads 2 --modes f32,f32-compile,bf16,bf16-compile --json

Needs torch, transformers and peft (bench/peers/setup.sh), for the compiled modes a C++ compiler; no network and no files:
models are built from the shapes of gpu_peer.py with random weights. The same work as `train`: rank 16 on all seven
linears, every token labelled, AdamW over the factors at the end of the batch, whose sequences are passed `--micro` at a
time with their gradients accumulated (the sum, without differential privacy). One line a mode: tokens a second, the
median over the micro-batches after a warm-up, and the most memory resident so far in this process: for a mode's own
figure run it alone.

f32, bf16                    eager; bf16 has bfloat16 weights and factors
f32-compile, bf16-compile    torch.compile of each layer by itself and of the head with its loss
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

import turns
from gpu_peer import SHAPES, flops_per_token

MODES = ("f32", "f32-compile", "bf16", "bf16-compile")


def build(shape, rank, dtype):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # The library's SDPA attention under a name for which it makes no mask: the causal flag is faster.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    config = LlamaConfig(hidden_size=shape.d, intermediate_size=shape.ff, num_hidden_layers=shape.layers,
                         num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                         head_dim=shape.head_size, vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
                         max_position_embeddings=32768, rms_norm_eps=1e-5,
                         rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
                         attention_dropout=0.0, use_cache=False, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa_causal")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM",
                                             target_modules=targets), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:  # no product by zero
                torch.nn.init.normal_(parameter.data, 0, 0.005)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == shape.lora_weights(rank)
    return model.get_base_model(), trained


def measure(args, shape, mode):
    import torch

    dtype = torch.bfloat16 if mode.startswith("bf16") else torch.float32
    base, trained = build(shape, args.rank, dtype)

    def head_loss(hidden, weight, targets):
        logits = torch.nn.functional.linear(hidden, weight)
        return torch.nn.functional.cross_entropy(logits.float().view(-1, weight.shape[0]), targets.reshape(-1))

    if mode.endswith("compile"):
        torch._dynamo.reset()
        for part in (*base.model.layers, base.model.norm):
            part.compile(dynamic=False)
        head_loss = torch.compile(head_loss, dynamic=False)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def micro():
        turns.wait(args)
        ids, targets = (torch.randint(shape.vocabulary, (args.micro, args.seq)) for _ in range(2))
        start = time.perf_counter()
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
        head_loss(hidden, base.lm_head.weight, targets).backward()
        return time.perf_counter() - start

    for _ in range(2):
        micro()
    seconds = statistics.median(micro() for _ in range(args.steps))
    start = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds += (time.perf_counter() - start) * args.micro / args.batch
    return args.micro * args.seq / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="sequences of an optimiser step")
    parser.add_argument("--micro", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="micro-batches that are timed")
    parser.add_argument("--modes", default=",".join(MODES))
    turns.add_option(parser)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import peft
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    shape = SHAPES[args.shape]
    versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    for mode in args.modes.split(","):
        line = {"program": "cpu_peer", "mode": mode, "shape": args.shape, "seq": args.seq, "threads": args.threads,
                "rank": args.rank, "micro": args.micro, "versions": versions,
                "flops_per_token": flops_per_token(shape, args.seq, args.rank, 1.0)}
        try:
            if mode not in MODES:
                raise ValueError(f"no mode {mode}; there are {', '.join(MODES)}")
            line["tokens_per_second"] = measure(args, shape, mode)
        except Exception as error:  # a compiler that fails must not take the other modes with it
            line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        line["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if args.json:
            print(json.dumps(line), flush=True)
        else:
            print("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
