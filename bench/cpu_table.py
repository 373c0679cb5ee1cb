#!/usr/bin/env python3
"""Turns the lines that scripts/bench.sh cpu gathers into one table with ratios. Standard library only.

    cpu_table.py LINES.jsonl [--write docs/performance.md]      prints the table; --write puts it between the markers

A line, which bench/in_turns.py adds, is what bench/train, bench/infer or a program of bench/peers printed with --json, and
two keys more: "part" (train, infer, scaling) and "label". Instead of figures it may hold "error": why there are none.
"""

import json
import os
import platform
import re
import subprocess
import sys

BEGIN, END = "<!-- cpu:begin -->", "<!-- cpu:end -->"


def machine():
    text = open("/proc/cpuinfo", encoding="utf-8").read()
    name = re.search(r"model name\s*: (.*)", text).group(1)
    family, model = (re.search(rf"{key}\s*: (\d+)", text).group(1) for key in ("cpu family", "model"))
    flags = re.search(r"flags\s*: (.*)", text).group(1).split()
    has = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags]
    memory = int(re.search(r"MemTotal:\s*(\d+)", open("/proc/meminfo", encoding="utf-8").read()).group(1)) / 1e6
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return (f"{name} (family {family}, model {model}; {', '.join(has)}), {os.cpu_count()} CPUs as the system counts them, "
            f"{memory:.0f} GB, Linux {platform.release().split('-')[0]}, {compiler}")


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + [
        "| " + " | ".join(str(c) for c in row) + " |" for row in rows] + [""]


def ratio(a, b):
    return f"{a / b:.2f}" if a and b else ""


def train_tables(lines):
    rows, speeds = [], {}
    for line in lines:
        speeds[line["label"]] = line.get("tokens_per_second_without_dp", line.get("tokens_per_second"))
    best = {p: max((v for k, v in speeds.items() if v and k.startswith(f"PyTorch {p}")), default=None)
            for p in ("f32", "bf16")}
    for line in lines:
        label = line["label"]
        if "error" in line:
            rows.append((label, line["error"], "", "", "", "", "", ""))
            continue
        speed = speeds[label]
        precision = "bf16" if "bf16" in label else "f32"
        ceiling = line.get("ceiling_tokens_per_second")
        rows.append((label, f"{speed:.1f}", f"{ceiling:.0f}" if ceiling else "", ratio(speed, ceiling),
                     ratio(speed, speeds.get("PyTorch f32")), ratio(speed, best[precision]),
                     f"{100 * line['dp_cost']:.2f} %" if line.get("dp") else "", f"{line['peak_rss_bytes'] / 1e9:.2f}"))
        if ceiling:
            rows.append((f"· its products: own {line['own_gflops']:.0f} GFLOP/s, {line['blas']} {line['blas_gflops']:.0f}",
                         "", "", "", "", "", "", ""))
    return table(("training", "tokens/s", "ceiling", "of it", "× PyTorch f32", "× PyTorch's best, same precision",
                  "DP costs", "GB resident"), rows)


def infer_tables(lines):
    peers = {line["label"].split()[0]: line for line in lines if "llama.cpp" in line["label"] and "error" not in line}
    rows = []
    for line in lines:
        if "error" in line:
            rows.append((line["label"], line["error"], "", "", "", "", ""))
            continue
        peer = peers.get(line["label"].split()[0], {})
        prompt, decode = line["prompt_tokens_per_second"], line["decode_tokens_per_second"]
        bandwidth = line.get("bandwidth_bytes_per_second")
        rows.append((line["label"], f"{prompt:.0f}", ratio(prompt, peer.get("prompt_tokens_per_second")),
                     f"{decode:.1f}", ratio(decode, peer.get("decode_tokens_per_second")),
                     f"{line['bandwidth_fraction']:.2f}" if bandwidth else "",
                     f"{bandwidth * 1e-9:.1f}" if bandwidth else ""))
    return table(("inference", "prompt, tokens/s", "× llama.cpp", "decoding, tokens/s", "× llama.cpp",
                  "of the bandwidth", "GB/s read"), rows)


def scaling_tables(lines):
    rows = []
    for line in lines:
        if "error" in line:
            rows.append((line["label"], line["error"], "", "", ""))
        elif line["program"] == "infer":
            rows.append((f"{line['label']}, inference", f"prompt {line['prompt_tokens_per_second']:.0f}, decoding "
                         f"{line['decode_tokens_per_second']:.1f}", "", "", f"{line['peak_rss_bytes'] / 1e9:.2f}"))
        else:
            fraction = line.get("ceiling_fraction")
            rows.append((line["label"], f"{line['tokens_per_second']:.1f}",
                         f"{line['tokens_per_second'] * line['flops_per_token'] * 1e-9:.0f}",
                         f"{fraction:.2f}" if fraction else "", f"{line['peak_rss_bytes'] / 1e9:.2f}"))
    return table(("scaling (float32, synthetic Q4_1 base)", "tokens/s", "GFLOP/s", "of the ceiling", "GB resident"), rows)


def report(lines):
    versions = sorted({line["versions"] for line in lines if "versions" in line})
    text = [f"Machine: {machine()}. Peers: {'; '.join(versions) or 'none'}. Command: `scripts/bench.sh cpu`.", ""]
    for part, make in (("train", train_tables), ("infer", infer_tables), ("scaling", scaling_tables)):
        mine = [line for line in lines if line["part"] == part]
        if mine:
            text += make(mine)
    return "\n".join(text)


def main(args):
    if len(args) not in (1, 3) or (len(args) == 3 and args[1] != "--write"):
        print(__doc__, file=sys.stderr)
        return 2
    text = report([json.loads(t) for t in open(args[0], encoding="utf-8")])
    print(text)
    if len(args) == 3:
        page = open(args[2], encoding="utf-8").read()
        if page.count(BEGIN) != 1 or page.count(END) != 1:
            print(f"cpu_table: {args[2]} lacks the markers {BEGIN} and {END}", file=sys.stderr)
            return 1
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        open(args[2], "w", encoding="utf-8").write(f"{before}{BEGIN}\n{text}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
