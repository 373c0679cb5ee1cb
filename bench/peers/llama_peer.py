#!/usr/bin/env python3
"""llama.cpp's speed on a GGUF file through llama-cpp-python: the peer of build/release/bench/infer.

    llama_peer.py --model FILE.gguf --seq 512 --tokens 64 --threads 2 [--json]
    llama_peer.py --quantise Q8_0 --from FILE.gguf --to OUT.gguf      makes another type of a file

Needs llama-cpp-python (bench/peers/setup.sh; built from source it uses this machine's instructions), no network. The same
work as `infer`: a prompt of random tokens in one call, with the logits of its last token, then tokens one by one with
their logits. The median over the rounds counts.

--quantise: Q4_1, Q8_0 or Q4_K_M, by llama.cpp's own quantiser; a quantised file may be the source (the weights are then
rounded twice, which changes answers a little and speed not at all).
"""

import argparse
import json
import random
import statistics
import sys
import time

import llama_cpp as lib

import turns

FILE_TYPES = {"Q4_1": lib.LLAMA_FTYPE_MOSTLY_Q4_1, "Q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0,
              "Q4_K_M": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def quantise(source, target, name):
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[name]
    params.allow_requantize = True
    if lib.llama_model_quantize(source.encode(), target.encode(), params) != 0:
        sys.exit(f"llama_peer: llama.cpp could not make {target}")


def decode(context, ids, start):
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i] = token
        batch.pos[i] = start + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = i == len(ids) - 1
    if lib.llama_decode(context, batch) != 0:
        sys.exit("llama_peer: llama_decode failed")
    lib.llama_get_logits_ith(context, len(ids) - 1)[0]  # waits for them
    lib.llama_batch_free(batch)


def measure(args):
    model = lib.llama_model_load_from_file(args.model.encode(), lib.llama_model_default_params())
    if not model:
        sys.exit(f"llama_peer: llama.cpp cannot load {args.model}")
    params = lib.llama_context_default_params()
    params.n_ctx = args.seq + args.tokens + 8
    params.n_batch = params.n_ubatch = args.seq
    params.n_threads = params.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, params)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rng = random.Random(5)
    prompt = [rng.randrange(vocabulary) for _ in range(args.seq)]
    prompt_seconds, decode_seconds = [], []
    for _ in range(args.rounds + 1):  # one to warm up
        turns.wait(args)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(context, prompt, 0)
        middle = time.perf_counter()
        for i in range(args.tokens):
            decode(context, prompt[i % args.seq:i % args.seq + 1], args.seq + i)
        prompt_seconds.append(middle - start)
        decode_seconds.append(time.perf_counter() - middle)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return (args.seq / statistics.median(prompt_seconds[1:]), args.tokens / statistics.median(decode_seconds[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    turns.add_option(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quantise", choices=FILE_TYPES)
    parser.add_argument("--from", dest="source")
    parser.add_argument("--to")
    args = parser.parse_args()
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    if args.quantise:
        quantise(args.source, args.to, args.quantise)
        return 0
    prompt, tokens = measure(args)
    line = {"program": "llama_peer", "model": args.model.rsplit("/", 1)[-1], "threads": args.threads, "seq": args.seq,
            "tokens": args.tokens, "prompt_tokens_per_second": prompt, "decode_tokens_per_second": tokens,
            "versions": f"llama-cpp-python {lib.__version__}"}
    print(json.dumps(line) if args.json else f"{line['model']}: prompt {prompt:.1f}, decoding {tokens:.1f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
