#!/usr/bin/env bash
# bench_gpu on the kernels' host build, and the table made of what it prints: no figure means anything, but each is there.
#   test_gpu.sh BENCH_GPU_SHIM GPU_TABLE PYTHON
set -euo pipefail
program=$1 table=$2 python=$3
work=$(mktemp -d "${TMPDIR:-/tmp}/consilium-bench-gpu-XXXXXX")
trap 'rm -rf "$work"' EXIT
fail() { echo "FAILED: $*" >&2; cat "$work/table.txt" >&2 || true; exit 1; }

for shape in tiny tiny-glm4 tiny-qwen3 tiny-gemma3; do
    "$program" --shape $shape --brief --batch 2 --tokens 5 --ops --json >>"$work/lines"
    "$program" --shape $shape --brief --batch 2 --tokens 5 --steps 1 --json >>"$work/lines"
done
for kept in '' '--keep-quantised --quantise-kv'; do
    # shellcheck disable=SC2086 # two options or none
    "$program" --shape tiny --brief --batch 2 --tokens 5 --ops --base q4_1 $kept --json >>"$work/lines"
done
"$program" --shape tiny --brief --batch 4 --tokens 4 --steps 1 --dp on --json >>"$work/lines"
"$program" --shape tiny --brief --batch 1 --tokens 4 --steps 1 --base q4_1 --json >>"$work/lines"
"$program" --shape tiny --brief --batch 1 --tokens 4 --steps 1 --base q4_1 --keep-quantised --json >>"$work/lines"
for base in bf16 q4_1; do
    "$program" --shape tiny --brief --context 5 --decode --base $base --json >>"$work/lines"
done
"$python" "$table" "$work/lines" --json "$work/result.json" >"$work/table.txt"
"$python" - "$work/result.json" <<'PYTHON' || fail "the result lacks what it should have"
import json, math, sys
result = json.load(open(sys.argv[1]))
shapes = {s["shape"]: s for s in result["shapes"]}
assert list(shapes) == ["tiny", "tiny-glm4", "tiny-qwen3", "tiny-gemma3"], list(shapes)
for name, shape in shapes.items():
    ours = [row for row in shape["train"] if row["label"] == "consilium"]
    assert ours and ours[0]["tokens_per_second"] > 0, (name, ours)
    # Random weights: no better and hardly worse than guessing among 256 words.
    assert abs(ours[0]["loss"] - math.log(256)) < 1.5, (name, ours[0]["loss"])
    # The table has what base bf16 lacks from q4_1's line, where there is one.
    assert ("dequantise (a layer)" in [op["name"] for op in shape["ops"]]) == (name == "tiny"), (name, shape["ops"])
ops = {(line["shape"], line["base"]): line["ops"] for line in result["lines"] if line["kind"] == "ops"}
assert sorted(base for _, base in ops) == 4 * ["bf16"] + ["q4_1", "q4_1 kept"], list(ops)
everywhere = {"head and loss", "gather label rows", "decode linear (a layer)", "decode store", "decode store, attention",
              "likeliest token"}
somewhere = {"norms of heads": {"tiny-qwen3", "tiny-gemma3"}, "norms of heads backward": {"tiny-qwen3", "tiny-gemma3"},
             "bias of q, k, v": {"tiny-glm4"}}
for (shape, base), found in ops.items():
    names = [op["name"] for op in found]
    assert len(names) == len(set(names)) and everywhere <= set(names), (shape, base, names)
    for name, where in somewhere.items():
        assert (name in names) == (shape in where), (shape, base, name)
    assert ("dequantise (a layer)" in names) == (base != "bf16"), (shape, base, names)
    assert all(op["floor_us"] > 0 and op["measured_us"] > 0 and op["bytes"] > 0 for op in found), (shape, base, found)
# One token: the weights of a layer are what is read, and quantised ones are fewer bytes; so are 8-bit keys and values.
cost = {base: {op["name"]: op for op in found} for (shape, base), found in ops.items() if shape == "tiny"}
weights = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 256
for base, bytes_each in (("bf16", 2), ("q4_1", 2), ("q4_1 kept", 20 / 32)):
    linear = cost[base]["decode linear (a layer)"]
    assert linear["flops"] == round(2 * weights, -1), linear
    assert 0 < linear["bytes"] - bytes_each * weights < 2 * weights / 20, (base, linear)
assert cost["q4_1 kept"]["decode store, attention"]["bytes"] < cost["bf16"]["decode store, attention"]["bytes"]
tiny = shapes["tiny"]
for key in ("dp_on_over_off", "q4_1_over_bf16", "q4_1_kept_over_bf16", "decode_q4_1_over_bf16"):
    assert tiny[key] and tiny[key] > 0, (key, tiny[key])
PYTHON
# Floors by themselves: the same operations, at once, whatever the model's size.
for shape in tiny tiny-glm4 tiny-qwen3; do
    "$program" --shape $shape --batch 2 --tokens 5 --ops --floors 650e12:4.25e12 --json
done >"$work/floors"
timeout 20 "$program" --shape glm-4-9b --batch 2 --tokens 2048 --ops --base q4_1 --floors 650e12:4.25e12 --json \
    >>"$work/floors" || fail "the floors of a large shape take long: is it placed?"
"$python" - "$work/result.json" "$work/floors" <<'PYTHON' || fail "the floors are not what they should be"
import json, sys
lines = json.load(open(sys.argv[1]))["lines"]
ops = {(line["shape"], line["base"]): line["ops"] for line in lines if line["kind"] == "ops"}
floors = {line["shape"]: line for line in map(json.loads, open(sys.argv[2]))}
for shape, line in floors.items():
    assert line["kind"] == "floors" and not any("measured_us" in op for op in line["ops"]), line
    for op in line["ops"]:
        floor = 1e6 * max(op["flops"] / 650e12, op["bytes"] / 4.25e12)
        assert abs(op["floor_us"] - floor) < 1e-4 * (1 + floor), op
    if (shape, "bf16") in ops:
        costs = [[(op["name"], op["flops"], op["bytes"]) for op in of] for of in (line["ops"], ops[shape, "bf16"])]
        assert costs[0] == costs[1], (shape, costs)
glm = {op["name"]: op["floor_us"] for op in floors["glm-4-9b"]["ops"]}
weights = 4096 * (4096 + 2 * 256) + 4096 * 4096 + 3 * 4096 * 13696
assert abs(glm["decode linear (a layer)"] / (1e6 * 2 * weights / 4.25e12) - 1) < 0.01, glm
assert abs(glm["dequantise (a layer)"] / (1e6 * (2 + 20 / 32) * weights / 4.25e12) - 1) < 0.01, glm
PYTHON
grep -q 'not measured: no such line' "$work/table.txt" || fail "what was not measured is not said"
"$program" --shape nowhere --json >"$work/out" 2>"$work/err" && fail "an unknown shape was taken"
grep -q 'no such shape' "$work/err" || fail "an unknown shape is refused without saying so"
echo "all figures are there"
