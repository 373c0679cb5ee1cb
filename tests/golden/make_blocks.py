#!/usr/bin/env python3
"""Writes blocks.golden: blocks of every tensor type and the values that the ggml project's Python package reads there.

    python make_blocks.py OUTPUT_FOLDER          (needs gguf, numpy)

The bytes are random but for the float16 scales and minima, and the floats of F32, F16 and BF16, which are finite: any
sign, zero, subnormal or large. Every byte of a block takes part, so every nibble, high bit and packed scale does.

File, little-endian: magic "CGB1"; u32 number of types; for each: u32 GGUF type, u32 values, u32 bytes, the bytes of the
blocks, f32 values.
"""

import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

VALUES = 1024
# Where the float16 fields of a block stand.
HALVES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q4_K: [0, 2],
          T.Q5_K: [0, 2], T.Q6_K: [208]}


def finite(rng, count, mantissa_bits):
    """16-bit floats: sign and mantissa random, the exponent anything but all ones; up to half are -0, 0 and subnormal."""
    exponents = (1 << (15 - mantissa_bits)) - 1
    bits = rng.integers(0, 2, count) << 15 | rng.integers(0, exponents, count) << mantissa_bits
    bits |= rng.integers(0, 1 << mantissa_bits, count)
    special = [0x8000, 0x83FF, 0x0001, 0x0000][:count // 2]
    bits[:len(special)] = special
    return bits.astype(np.uint16)


def blocks(rng, kind):
    per_block, size = GGML_QUANT_SIZES[kind]
    count = VALUES // per_block
    if kind == T.F32:
        upper = finite(rng, count, 7).astype(np.uint32) << 16
        return (upper | rng.integers(0, 1 << 16, count, dtype=np.uint32)).view(np.uint8)
    if kind in (T.F16, T.BF16):
        return finite(rng, count, 10 if kind == T.F16 else 7).view(np.uint8)
    data = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[kind]:
        data[:, at:at + 2] = rng.permutation(finite(rng, count, 10)).reshape(-1, 1).view(np.uint8)
    return data.reshape(-1)


def main():
    rng = np.random.default_rng(20240817)
    kinds = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q4_K, T.Q5_K, T.Q6_K]
    out = b"CGB1" + struct.pack("<I", len(kinds))
    for kind in kinds:
        data = blocks(rng, kind)
        values = data.view(np.float32) if kind == T.F32 else dequantize(data, kind).astype(np.float32)
        assert values.size == VALUES and np.isfinite(values).all()
        out += struct.pack("<III", kind, VALUES, data.size) + data.tobytes() + values.tobytes()
    (Path(sys.argv[1]) / "blocks.golden").write_bytes(out)


if __name__ == "__main__":
    main()
