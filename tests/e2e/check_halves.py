"""Checks an adapter trained in turns against the states that the aggregator stored, with nothing but the standard library.

    check_halves.py MODELS EXPORT          MODELS/000001.state ..., EXPORT-1/ ...: PEFT folders of the same versions
    check_halves.py --local ONE TWO        PEFT folders of `train --local` after one round and after two
    check_halves.py --same FIRST ONE TWO   two ways to the same adapter, and one with A still as it was drawn

A state is params and server momentum, float32, each A - A0 section then B section: layers upwards, targets in the order
below. Round 1 moves B, round 2 A, and so on; the other section, momentum included, must keep its bits. A0 is what version 1
exports. PEFT has the rows of q and k in another order than GGUF, so these are compared as sets.
"""
import array
import glob
import json
import struct
import sys

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def floats(data):
    values = array.array("f")
    values.frombytes(data)
    return values


def read_peft(folder):
    """{(layer, target, "A" or "B"): (rows, columns, values)}"""
    with open(folder + "/adapter_model.safetensors", "rb") as f:
        data = f.read()
    (size,) = struct.unpack("<Q", data[:8])
    factors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "F32", name
        begin, end = entry["data_offsets"]
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1])
        target = next(t for t in TARGETS if t in parts)
        half = "A" if "lora_A" in parts else "B"
        factors[layer, target, half] = (*entry["shape"], floats(data[8 + size + begin : 8 + size + end]))
    return factors


def canonical(factors, half):
    return sorted((k for k in factors if k[2] == half), key=lambda k: (k[0], TARGETS.index(k[1])))


def rows(values, columns):
    return sorted(tuple(values[i : i + columns]) for i in range(0, len(values), columns))


def check_export(version, factors, first, params, split):
    at = 0
    for key in canonical(factors, "A"):
        r, columns, have = factors[key]
        delta = params[at : at + r * columns]
        want = array.array("f", [a + d for a, d in zip(first[key][2], delta)])  # rounds once, to float32
        assert have == want, f"version {version}: {key} is not A0 and what the rounds added"
        at += r * columns
    assert at == split
    for key in canonical(factors, "B"):
        r, columns, have = factors[key]
        want = params[at : at + r * columns]
        same = rows(have, columns) == rows(want, columns) if key[1] in TARGETS[:2] else have == want
        assert same, f"version {version}: {key} is not the state's"
        at += r * columns
    assert at == len(params)


def moved(old, new):
    return sum(a != b for a, b in zip(old, new))


def check_federation(models, export):
    paths = sorted(glob.glob(models + "/*.state"))
    assert len(paths) >= 3
    first = read_peft(export + "-1")
    split = sum(len(first[key][2]) for key in canonical(first, "A"))
    words = split + sum(len(first[key][2]) for key in canonical(first, "B"))
    before = array.array("f", bytes(8 * words))
    for version, path in enumerate(paths, 1):
        with open(path, "rb") as f:
            state = floats(f.read())
        assert len(state) == 2 * words, path
        for name, at in (("parameters", 0), ("momentum", words)):
            a = moved(before[at : at + split], state[at : at + split])
            b = moved(before[at + split : at + words], state[at + split : at + words])
            trained, resting, size = (b, a, words - split) if version % 2 else (a, b, split)
            assert resting == 0, f"version {version}: {resting} {name} of the resting half moved"
            assert trained > 0.9 * size, f"version {version}: only {trained} of {size} {name} moved"
        check_export(version, read_peft(f"{export}-{version}"), first, state[:words], split)
        before = state


def check_local(one, two):
    one, two = read_peft(one), read_peft(two)
    for key in one:
        assert any(one[key][2]), f"{key} is zero after a round"
        if key[2] == "A":
            # Drawn within 1/sqrt(in): as long as nothing trained it.
            assert max(map(abs, one[key][2])) <= 1 / one[key][1] ** 0.5, f"{key} moved in the first round"
            assert moved(one[key][2], two[key][2]) > 0.9 * len(one[key][2]), f"{key} did not move in the second round"


def check_same(first, one, two):
    """What moved differs by less than a thousandth of how far it moved: updates were rounded to a grid on the way."""
    first, one, two = read_peft(first), read_peft(one), read_peft(two)
    for half in "AB":
        moved_by = apart = 0.0
        for key in canonical(one, half):
            start = first[key][2] if half == "A" else [0.0] * len(one[key][2])
            moved_by += sum((x - s) ** 2 for x, s in zip(one[key][2], start))
            apart += sum((x - y) ** 2 for x, y in zip(one[key][2], two[key][2]))
        measured = f"{half} moved by {moved_by**0.5:.4g}; the two ways end {apart**0.5:.3g} apart"
        print(measured)
        assert moved_by > 0 and apart <= 1e-6 * moved_by, measured


if sys.argv[1] == "--local":
    check_local(*sys.argv[2:])
elif sys.argv[1] == "--same":
    check_same(*sys.argv[2:])
else:
    check_federation(*sys.argv[1:])
