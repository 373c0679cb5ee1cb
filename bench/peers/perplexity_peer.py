#!/usr/bin/env python3
"""Perplexity of GGUF models: this program's beside llama.cpp's, on the same tokens of a public-domain text.

    perplexity_peer.py --bench build/release/bench/perplexity --icd icd10c-tabular.xml MODEL.gguf...
                       [--chunks 16] [--context 512] [--precision f32|bf16] [--one-by-one] [--json]

--one-by-one --precision bf16: with inputs rounded to 8 bits, as llama.cpp rounds them, where this CPU has VNNI.

The text is the descriptions in the tabular list of ICD-10-CM (public domain; scripts/fetch-model.sh fetches it), one a
line. llama.cpp's own tokens of the text are compared with ours as well. Needs: llama-cpp-python, numpy.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import llama_cpp
import numpy as np


def make_text(icd, path, characters):
    lines, size = [], 0
    for element in ElementTree.parse(icd).iter("desc"):
        line = "".join(element.itertext()).strip()
        lines.append(line)
        size += len(line) + 1
        if size >= characters:
            break
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def nats(model, chunks):
    """Mean of −log p over all tokens but each chunk's first, in float64 from llama.cpp's float32 logits."""
    total = 0.0
    for ids in chunks:
        model.reset()
        model.eval(ids.tolist())
        logits = model.scores[: len(ids) - 1].astype(np.float64)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        total += (log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).sum()
    return total / (chunks.shape[0] * (chunks.shape[1] - 1))


def compare(args, path, work):
    text = work / "text.txt"
    ids_file = work / "ids.bin"
    make_text(args.icd, text, args.chunks * args.context * 8)
    ours = json.loads(subprocess.run(
        [args.bench, "--model", path, "--text", text, "--context", str(args.context), "--chunks", str(args.chunks),
         "--precision", args.precision, "--ids", ids_file, "--json"] + ["--one-by-one"] * args.one_by_one, check=True, stdout=subprocess.PIPE).stdout)
    chunks = np.fromfile(ids_file, dtype="<i4").reshape(-1, args.context)
    model = llama_cpp.Llama(model_path=path, n_ctx=args.context, n_batch=args.context, n_threads=args.threads,
                            logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0)
    theirs = nats(model, chunks)
    bos = model.token_bos() if chunks[0, 0] == model.token_bos() else None
    mine = chunks[:, 1 if bos is not None else 0:].ravel()
    tokens = model.tokenize(text.read_bytes(), add_bos=False, special=False)
    same = tokens[: len(mine)] == mine.tolist()
    return {"model": Path(path).name, "backend": ours["backend"], "precision": args.precision, "chunks": len(chunks),
            "context": args.context, "tokens_equal": same, "consilium": float(np.exp(ours["mean_nats"])),
            "llama_cpp": float(np.exp(theirs)), "ratio": float(np.exp(ours["mean_nats"] - theirs))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--bench", required=True)
    parser.add_argument("--icd", required=True)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    worst = 0.0
    for path in args.models:
        with tempfile.TemporaryDirectory() as work:
            row = compare(args, path, Path(work))
        worst = max(worst, abs(row["ratio"] - 1))
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{row['model']:40} {row['backend']:12} {row['precision']}  perplexity {row['consilium']:.4f}"
                  f"  llama.cpp {row['llama_cpp']:.4f}  ratio {row['ratio']:.5f}"
                  f"  tokens {'equal' if row['tokens_equal'] else 'DIFFER'}", flush=True)
    sys.exit(0 if worst <= 0.002 else 1)


if __name__ == "__main__":
    main()
