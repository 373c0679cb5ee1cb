#!/usr/bin/env python3
"""Turns the lines that scripts/bench.sh gpu gathers into one table and one JSON file. Standard library only.

    gpu_table.py LINES.jsonl [--json RESULT.json]     prints the table
    gpu_table.py --line program=bench_gpu kind=train shape=tiny error=why     prints one such line

Each line is a JSON object; what does not start with a brace is skipped, and of lines about the same thing the last
counts. "program" says who wrote it and "kind" what it is. Instead of its figures a line may hold "error": why there are
none.

gpu_peer (bench/peers/gpu_peer.py): machine, copy, gemm, train.
tests, bench.sh (scripts/bench.sh): test (name, result: passed, skipped or failed), machine (gpu, driver, nvcc).

bench_gpu (build/gpu/bench/bench_gpu) measures whole steps on the shapes of bench/synthetic.c with LoRA of --rank on all
seven linears (joint, alpha twice the rank), on random tokens, after a warm-up. If it cannot, it ends with another
status than 0 and the reason as the last line of stderr.

bench_gpu --shape NAME --batch B --tokens T --rank R --labels all|quarter --dp on|off --base bf16|q4_1 --steps N --json
    {"program": "bench_gpu", "kind": "train", "shape", "batch", "tokens", "rank", "labels", "dp", "base" (as given),
     "steps", "level": activation checkpoint level, "step_ms": median of a whole step (upload of the tokens, forward,
     backward, per-example clipping and noise where dp is on, optimizer), "tokens_per_second": batch·tokens over it,
     "memory_bytes": of the device, "flops_per_token": as below, "loss",
     "gemm_tflops": {"peak": 8192^3 bf16, "weighted": this step's products weighted by FLOPs}}
    base "q4_1 kept" (--base q4_1 --keep-quantised): no dense copies, blocks decoded at each use.
    dp on: a step is a logical batch of 32 sequences, each an example with a clipped gradient of its own, in micro-batches
    of B; "tokens_per_second_without_dp" are the same steps without, in the same run. dp off: one sum over a batch of B.
    labels quarter: the last quarter of each sequence's rows is learnt.
bench_gpu --decode --shape NAME --base bf16|q4_1 [--batch B] --json
    {"program": "bench_gpu", "kind": "decode", "shape", "base", "batch": sequences at once (1), "context": tokens that
     are there already, "decode_tokens_per_second", "memory_bytes"}
bench_gpu --ops --shape NAME [--batch B --tokens T --base bf16|q4_1 --context N] --json    (without --json: for people)
    {"program": "bench_gpu", "kind": "ops", "shape", "batch", "tokens", "base" (as above), "context", "ops": [{"name",
     "floor_us": predicted from FLOPs and bytes over the card's measured ceilings, "measured_us", "flops", "bytes"}, ...]}
    What a shape or a base lacks (norms of heads, biases, quantised matrices) is left out. Operations of a step: B·T rows
    of one layer, gather: as if every row had a label. "decode ...": one token in one layer, of many in a recorded pass,
    without LoRA; the attention is to N tokens before it and itself, over keys and values that it stores first.
    "likeliest token": the head and the search, and the wait for the number. The table takes what base bf16 has, and of
    q4_1 what is there only. With --floors FLOPS:BYTES (a second) kind is "floors" and there is no "measured_us": what
    such a card could do at best; no card is needed.

FLOPs a token: 4 for each weight that a token meets (forward, and the gradient of the input; the head counts by the
share of rows that are labelled), 3.5 times the causal attention's forward (2·T·heads·head_size a layer; backward is 2.5
of them), 6 for each LoRA weight.
"""

import argparse
import json
import sys


def read_lines(paths):
    lines = []
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, 1):
                if not text.lstrip().startswith("{"):
                    continue
                try:
                    line = json.loads(text)
                except ValueError:
                    print(f"gpu_table: {path}:{number} is no JSON object, skipped", file=sys.stderr)
                    continue
                if isinstance(line, dict):
                    lines.append(line)
    return lines


def number(line, key):
    """A figure that can be used: a finite positive number, or None."""
    value = (line or {}).get(key)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    return float(value) if usable else None


def ratio(a, b, scale=1.0):
    return scale * a / b if a is not None and b else None


def text_of(value, form, suffix=""):
    return "-" if value is None else format(value, form) + suffix


class Lines:
    def __init__(self, lines):
        self.lines = lines

    def last(self, **wanted):
        found = None
        for line in self.lines:
            if all(line.get(key) == value for key, value in wanted.items()):
                found = line
        return found

    def reason(self, line, program, shape):
        """Why there is no figure: the line's own error, or that of the program as a whole."""
        whole = [other["error"] for other in self.lines
                 if other.get("program") == program and other.get("shape") == shape and other.get("kind") == "train"
                 and "error" in other and not {"mode", "dp", "base"} & set(other)]
        return (line or {}).get("error") or (whole[-1] if whole else "no such line")

    def shapes(self):
        names = [line["shape"] for line in self.lines if isinstance(line.get("shape"), str)]
        return list(dict.fromkeys(names))


PEER_MODES = {"eager": "PyTorch + PEFT eager", "compile": "PyTorch + PEFT compile", "graph": "PyTorch + PEFT graph",
              "compile-model": "PyTorch + PEFT whole", "autotune": "PyTorch + PEFT autotune"}
OURS = {("off", "bf16"): "consilium", ("on", "bf16"): "consilium, DP", ("off", "q4_1"): "consilium, 4-bit base",
        ("off", "q4_1 kept"): "consilium, 4-bit, no copy", ("on", "q4_1"): "consilium, 4-bit base, DP"}


def ceilings(found, shape):
    """(peak, weighted, who measured): TFLOP/s of bf16 products; the peer's library first."""
    gemm = found.last(program="gpu_peer", kind="gemm", shape=shape)
    if number(gemm, "peak"):
        return number(gemm, "peak"), number(gemm, "weighted"), "torch"
    ours = found.last(program="bench_gpu", kind="train", shape=shape, dp="off", base="bf16")
    own = (ours or {}).get("gemm_tflops")
    own = own if isinstance(own, dict) else {}
    return number(own, "peak"), number(own, "weighted"), "bench_gpu"


def train_rows(found, shape):
    """The rows of a shape's table in order, with what is derived."""
    wanted = [(label, found.last(program="gpu_peer", kind="train", shape=shape, mode=mode), {"mode": mode})
              for mode, label in PEER_MODES.items()]
    wanted = [row for row in wanted if row[1] or row[2]["mode"] in ("eager", "compile")]
    for (dp, base), label in OURS.items():
        line = found.last(program="bench_gpu", kind="train", shape=shape, dp=dp, base=base)
        if line or (dp, base) not in (("on", "q4_1"), ("off", "q4_1 kept")):
            wanted.append((label, line, {"dp": dp, "base": base}))
    lines = [line for _, line, _ in wanted if line]
    flops = {}  # for a line that does not count its own
    for line in lines:
        if number(line, "flops_per_token"):
            flops[line.get("tokens"), line.get("labels")] = number(line, "flops_per_token")
    peak, weighted, _ = ceilings(found, shape)
    speeds = {setting["mode"]: number(line, "tokens_per_second") for _, line, setting in wanted if "mode" in setting}
    rows = []
    for label, line, setting in wanted:
        row = {"label": label, **setting}
        speed = number(line, "tokens_per_second")
        if speed is None:
            row["reason"] = found.reason(line, "bench_gpu" if "dp" in setting else "gpu_peer", shape)
        else:
            work = number(line, "flops_per_token") or flops.get((line.get("tokens"), line.get("labels")))
            tflops = ratio(speed, 1e12, work) if work else None
            row.update(batch=line.get("batch"), tokens=line.get("tokens"), labels=line.get("labels"),
                       level=line.get("level"), tokens_per_second=speed, step_ms=number(line, "step_ms"),
                       memory_bytes=number(line, "memory_bytes"), loss=line.get("loss"), flops_per_token=work,
                       tflops=tflops, of_peak=ratio(tflops, peak), of_weighted=ratio(tflops, weighted),
                       over_eager=ratio(speed, speeds.get("eager")), over_compile=ratio(speed, speeds.get("compile")),
                       over_graph=ratio(speed, speeds.get("graph")),
                       first_step_seconds=number(line, "first_step_seconds"))
        rows.append(row)
    return rows


def ops_of(found, shape):
    """The line of base bf16, and all operations: of q4_1's line those that the other lacks."""
    lines = [found.last(program="bench_gpu", kind="ops", shape=shape, base=base) for base in ("bf16", "q4_1")]
    by_name = {}
    for line in lines:
        for op in (line or {}).get("ops") or []:
            if isinstance(op, dict):
                by_name.setdefault(op.get("name"), op)
    return lines[0], list(by_name.values())


def shape_result(found, shape):
    rows = train_rows(found, shape)
    speed = {(row.get("dp"), row.get("base")): row.get("tokens_per_second") for row in rows}
    peak, weighted, source = ceilings(found, shape)
    decode = []
    for base in ("bf16", "q4_1"):
        line = found.last(program="bench_gpu", kind="decode", shape=shape, base=base)
        entry = {"base": base, "tokens_per_second": number(line, "decode_tokens_per_second")}
        if entry["tokens_per_second"] is None:
            entry["reason"] = found.reason(line, "bench_gpu", shape)
        else:
            entry.update(batch=line.get("batch"), context=line.get("context"),
                         memory_bytes=number(line, "memory_bytes"))
        decode.append(entry)
    ops, listed = ops_of(found, shape)
    with_dp = found.last(program="bench_gpu", kind="train", shape=shape, dp="on", base="bf16")
    return {"shape": shape, "train": rows, "decode": decode,
            "gemm": {"peak_tflops": peak, "weighted_tflops": weighted, "measured_by": source},
            "dp_on_over_off": ratio(number(with_dp, "tokens_per_second"),
                                    number(with_dp, "tokens_per_second_without_dp")),
            "q4_1_kept_over_bf16": ratio(speed.get(("off", "q4_1 kept")), speed.get(("off", "bf16"))),
            "q4_1_over_bf16": ratio(speed.get(("off", "q4_1")), speed.get(("off", "bf16"))),
            "decode_q4_1_over_bf16": ratio(decode[1]["tokens_per_second"], decode[0]["tokens_per_second"]),
            "ops_error": (ops or {}).get("error"), "ops": listed}


def warnings(result):
    """What makes two rows hard to compare."""
    rows = [row for row in result["train"] if "reason" not in row]
    for key, what in (("tokens", "tokens a sequence"), ("batch", "sequences a step"), ("labels", "labelled rows")):
        if len({row[key] for row in rows}) > 1:
            yield f"the rows differ in {what}"
    work = [row["flops_per_token"] for row in rows if row["flops_per_token"]]
    if work and max(work) > 1.01 * min(work):
        yield f"the programs count {min(work):.4g} to {max(work):.4g} FLOPs a token"


def print_shape(result):
    rows, gemm = result["train"], result["gemm"]
    print(f"\n{result['shape']}")
    print(f"  bf16 products ({gemm['measured_by']}): {text_of(gemm['peak_tflops'], '.0f')} TFLOP/s at 8192^3, "
          f"{text_of(gemm['weighted_tflops'], '.0f')} in this step's sizes")
    print(f"  {'train':26}{'batch':>10}{'tokens/s':>10}{'step ms':>9}{'TFLOP/s':>9}{'of 8192^3':>10}{'of sizes':>10}"
          f"{'x eager':>9}{'x compile':>10}{'x graph':>9}{'GB':>7}")
    for row in rows:
        if "reason" in row:
            print(f"  {row['label']:26}not measured: {row['reason']}")
            continue
        cells = (("step_ms", ".1f", 9), ("tflops", ".0f", 9), ("of_peak", ".1%", 10), ("of_weighted", ".1%", 10),
                 ("over_eager", ".2f", 9), ("over_compile", ".2f", 10), ("over_graph", ".2f", 9))
        size = f"{row['batch']} x {row['tokens']}"
        print(f"  {row['label']:26}{size:>10}{row['tokens_per_second']:>10.0f}"
              + "".join(f"{text_of(row[key], form):>{width}}" for key, form, width in cells)
              + f"{text_of(ratio(row['memory_bytes'], 1e9), '.1f'):>7}")
    starts = [f"{row['mode']} {row['first_step_seconds']:.1f} s" for row in rows if row.get("first_step_seconds")]
    if starts:
        print(f"  the peer's first step, compilation included: {', '.join(starts)}")
    print(f"  DP on over off {text_of(result['dp_on_over_off'], '.3f')}   "
          f"4-bit over bf16 base {text_of(result['q4_1_over_bf16'], '.3f')}, decoded at each use "
          f"{text_of(result['q4_1_kept_over_bf16'], '.3f')}")
    for entry in result["decode"]:
        if "reason" in entry:
            print(f"  decode, {entry['base']:18}not measured: {entry['reason']}")
        else:
            print(f"  decode, {entry['base']:18}{entry['tokens_per_second']:10.1f} tokens/s  "
                  f"batch {entry.get('batch')}  context {entry.get('context')}")
    for warning in warnings(result):
        print(f"  note: {warning}")


def print_ops(result):
    if not result["ops"]:
        if result["ops_error"]:
            print(f"\n{result['shape']}: kernels not measured: {result['ops_error']}")
        return
    print(f"\n{result['shape']}: kernels, floor (predicted) and measured")
    for op in result["ops"]:
        floor, measured = number(op, "floor_us"), number(op, "measured_us")
        print(f"  {str(op.get('name')):44}{text_of(floor, '.1f'):>10} us{text_of(measured, '.1f'):>10} us"
              f"{text_of(ratio(floor, measured), '.0%'):>8}")


def print_head(found, tests):
    machine = machine_of(found)
    known = ("gpu", "driver", "nvcc", "cuda", "torch", "transformers", "peft")
    print("  ".join(f"{key} {machine[key]}" for key in known if key in machine) or "machine: not recorded")
    copy = found.last(program="gpu_peer", kind="copy")
    print(f"device-to-device copy {text_of(number(copy, 'gb_per_second'), '.0f')} GB/s (read and written)")
    if tests:
        results = list(tests.values())
        counts = (f"{results.count(kind)} {kind}" for kind in ("passed", "skipped", "failed"))
        print("correctness first: " + ", ".join(counts))
        for name, result in tests.items():
            if result != "passed":
                print(f"  {name}: {result}")


def machine_of(found):
    machine = {}
    for line in found.lines:
        if line.get("kind") == "machine":
            machine.update((key, value) for key, value in line.items() if value and key not in ("program", "kind"))
    return machine


def table(lines, json_path):
    found = Lines(lines)
    tests = {line.get("name"): line.get("result") for line in lines if line.get("kind") == "test"}
    results = [shape_result(found, shape) for shape in found.shapes()]
    print_head(found, tests)
    for result in results:
        print_shape(result)
    for result in results:
        print_ops(result)
    if not results:
        print("not measured: no line about any shape")
    if json_path:
        copy = found.last(program="gpu_peer", kind="copy")
        whole = {"machine": machine_of(found), "copy_gb_per_second": number(copy, "gb_per_second"), "tests": tests,
                 "shapes": results, "lines": lines}
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1)
            file.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", metavar="LINES.jsonl")
    parser.add_argument("--json", metavar="FILE", help="writes everything there too")
    parser.add_argument("--line", nargs="+", metavar="KEY=VALUE", help="prints one line of these instead")
    args = parser.parse_args()
    if args.line:
        print(json.dumps(dict(pair.split("=", 1) for pair in args.line)))
    elif args.lines:
        table(read_lines(args.lines), args.json)
    else:
        parser.error("no file of lines is named")


if __name__ == "__main__":
    main()
