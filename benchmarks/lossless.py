"""Gate, then measure 16-bit floats coded without loss: `python -m benchmarks.lossless [--model FOLDER]`.

Bits a weight, everything stored, of Gaussian bfloat16 weights and of the matrices of a model. On a GPU then times: the
gate is that decoded weights are the encoded ones to the bit, that the fused product is float64's within rounding, and
that a row's is the same in any batch; times are taken as in benchmarks/linear.py, beside cuBLAS in bfloat16. Writes
benchmarks/results/lossless-<gpu>.json, or lossless-cpu.json with the bits and the codec's speed alone.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rans_kernels.checkpoint import open_shard, shard_of
from rans_kernels.coder import EncodedTensor, byte_histogram, decode_tiles, encode_tiles, entropy, high_bytes
from rans_kernels.coder.plan import choose_float_layout, float_layout
from rans_kernels.format import FLOATS, Split, TileLayout
from rans_kernels.ops.coded import CodedWeight
from rans_kernels.ops.rans_decode import rans_decode
from rans_kernels.ops.rans_linear import rans_linear
from torch import Tensor
from torch.nn import functional as F

from benchmarks.codec import median_seconds
from benchmarks.linear import RESULTS, copies, microseconds, parse_shape, to_gpu
from qat.report import device_slug, environment, print_table, write_json

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
SPLITS = (Split(2, 3), Split(4, 1), Split(8, 0))
PROFILES = ("compact", "auto", "fast")
BATCHES = (1, 2, 4, 8)
SIGMA = 0.02


def gaussian(shape: tuple[int, int]) -> np.ndarray:
    """Bits of Gaussian bfloat16 weights; drawn in float64, since a float32 draw has exact zeros."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(shape[1], dtype=torch.float64, generator=generator) * SIGMA for _ in range(shape[0])]
    return torch.stack([row.to(torch.bfloat16) for row in rows]).view(torch.uint16).numpy()


def matrices(folder: Path) -> dict[str, Tensor]:
    """Every 16-bit matrix of a Hugging Face folder."""
    found = {}
    for name, path in shard_of(folder).items():
        with open_shard(path) as shard:
            tensor = shard.get_tensor(name)
        if tensor.ndim == 2 and str(tensor.dtype).removeprefix("torch.") in FLOATS:
            found[name] = tensor
    return found


def checked(bits: np.ndarray, layout: TileLayout) -> EncodedTensor:
    """The weights encoded; raises unless they decode to what they were."""
    e = encode_tiles(bits, layout)
    if not np.array_equal(decode_tiles(layout, e.heads, e.words, e.offsets, e.freqs), bits):
        raise SystemExit(f"error: {layout} is not decoded to what was encoded; no figures written")
    return e


def bits_row(weights: str, layout: str, parts: list[tuple[np.ndarray, TileLayout]]) -> dict[str, Any]:
    """Entropy (of the high bytes, and 8) and bits a weight of some matrices together."""
    count = sum(bits.size for bits, _ in parts)
    stored = sum(8 * (checked(bits, layout).nbytes + 4) for bits, layout in parts)
    information = sum(bits.size * (entropy(byte_histogram(high_bytes(bits))) + 8) for bits, _ in parts)
    return {
        "weights": weights, "count": count, "layout": layout, "entropy": round(information / count, 3),
        "bits": round(stored / count, 3),
    }  # fmt: skip


def bench_bits(shapes: tuple[tuple[int, int], ...], model: Path | None) -> list[dict[str, Any]]:
    """Bits of Gaussian weights by profile and split, and of a model's by profile."""
    rows = []
    for shape in shapes:
        bits = gaussian(shape)
        counts = byte_histogram(high_bytes(bits))
        name = f"Gaussian {shape[0]} x {shape[1]}"
        for profile in PROFILES:
            layout = choose_float_layout(counts, shape, profile, "bfloat16")
            rows.append(bits_row(name, f"{profile}, {layout.split}", [(bits, layout)]))
        for split in SPLITS:
            layouts = {float_layout(counts, shape, profile, "bfloat16", split) for profile in ("compact", "fast")}
            rows += [bits_row(name, f"{split}, {each.units} units", [(bits, each)]) for each in layouts if each]
    if model is not None:
        tensors = {name: (t.view(torch.uint16).numpy(), str(t.dtype)[6:]) for name, t in matrices(model).items()}
        for profile in PROFILES:
            parts = [
                (bits, choose_float_layout(byte_histogram(high_bytes(bits)), bits.shape, profile, dtype))
                for bits, dtype in tensors.values()
            ]
            rows.append(bits_row(model.resolve().name, profile, parts))
    return rows


def bench_codec(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Weights a second that this CPU encodes and decodes."""
    bits, rows = gaussian(shape), []
    for profile in PROFILES:
        layout = choose_float_layout(byte_histogram(high_bytes(bits)), shape, profile, "bfloat16")
        e = checked(bits, layout)
        encode = median_seconds(partial(encode_tiles, bits, layout))
        decode = median_seconds(partial(decode_tiles, layout, e.heads, e.words, e.offsets, e.freqs))
        rows.append(
            {
                "shape": list(shape), "profile": profile, "split": str(layout.split),
                "encode_Mw_s": round(bits.size / encode / 1e6, 1), "decode_Mw_s": round(bits.size / decode / 1e6, 1),
            }
        )  # fmt: skip
    return rows


class Layer:
    """One weight on the GPU, plain and coded, in bfloat16."""

    def __init__(self, bits: np.ndarray, split: Split):
        """Args: bits: uint16 [N, K]. split: that holds them."""
        counts = byte_histogram(high_bytes(bits))
        layout = float_layout(counts, (bits.shape[0], bits.shape[1]), "fast", "bfloat16", split)
        if layout is None:
            raise SystemExit(f"error: {split} does not hold these weights; no figures written")
        e = encode_tiles(bits, layout)
        self.coded = CodedWeight.check(to_gpu(e.heads), to_gpu(e.words), to_gpu(e.offsets), to_gpu(e.freqs), layout)
        self.plain = to_gpu(bits).view(torch.bfloat16)
        self.one = torch.ones(1, 1, device="cuda")
        self.entropy, self.bits = entropy(counts) + 8, 8 * (e.nbytes + 4) / bits.size

    def gate(self) -> None:
        """Raise unless decode and product give what they should."""
        what = f"{self.coded.layout.shape} in {self.coded.layout.split}"
        if not torch.equal(rans_decode(self.coded).view(torch.int16), self.plain.view(torch.int16)):
            raise SystemExit(f"error: {what} is not decoded to what was encoded; no figures written")
        x = torch.randn(max(BATCHES), self.plain.shape[1], device="cuda", dtype=torch.bfloat16)
        y, exact = rans_linear(x, self.coded, self.one), x.double() @ self.plain.double().T
        if ((y.double() - exact).norm() / exact.norm()).item() > torch.finfo(torch.bfloat16).eps / 2:
            raise SystemExit(f"error: the product of {what} is off; no figures written")
        for batch in range(1, len(x) + 1):
            if not torch.equal(rans_linear(x[:batch], self.coded, self.one), y[:batch]):
                raise SystemExit(f"error: the product of {what} depends on the batch; no figures written")

    def rows(self) -> list[dict[str, Any]]:
        """Times at every batch."""
        w = self.coded
        coded = copies(w, w.heads.nbytes + w.words.nbytes, lambda w: replace(w, heads=+w.heads, words=+w.words))
        plain = copies(self.plain, self.plain.nbytes, torch.clone)
        functions: dict[str, list[Callable[[Tensor], Any]]] = {
            "ours": [partial(lambda w, x: rans_linear(x, w, self.one), w) for w in coded],
            "cublas_bf16": [partial(lambda w, x: F.linear(x, w), w) for w in plain],
            "decode_then_matmul": [partial(lambda w, x: F.linear(x, rans_decode(w)), w) for w in coded],
        }
        rows = []
        for batch in BATCHES:
            x = torch.randn(batch, self.plain.shape[1], device="cuda", dtype=torch.bfloat16)
            us = {way: round(microseconds(calls, x), 2) for way, calls in functions.items()}
            rows.append(
                {
                    "shape": list(self.plain.shape), "batch": batch, "split": str(w.layout.split),
                    "entropy": round(self.entropy, 3), "bits": round(self.bits, 3), "us": us,
                    "Tweights_s": round(self.plain.numel() / us["ours"] / 1e6, 3),
                }
            )  # fmt: skip
        return rows


def main() -> None:
    """Measure what this machine can, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--model", type=Path, help="Hugging Face folder whose bits are counted too")
    parser.add_argument("--gate-only", action="store_true", help="check on the GPU, write nothing")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if args.gate_only and not gpu:
        raise SystemExit("error: --gate-only checks GPU kernels, and there is no GPU here")
    times = []
    for shape in args.shapes if gpu else ():
        bits = gaussian(shape)
        for split in SPLITS:
            layer = Layer(bits, split)
            layer.gate()
            times += [] if args.gate_only else layer.rows()
    if args.gate_only:
        return
    found: dict[str, Any] = {"environment": environment(), "bits": bench_bits(tuple(args.shapes), args.model)}
    found |= {"rows": times} if gpu else {"codec": bench_codec(args.shapes[0])}
    write_json(RESULTS / f"lossless-{device_slug() if gpu else 'cpu'}.json", found)
    print_table("bits a weight", list(found["bits"][0]), [list(row.values()) for row in found["bits"]])
    if gpu:
        lines = [
            ["x".join(map(str, r["shape"])), r["batch"], r["split"], r["bits"], *r["us"].values(), r["Tweights_s"],
             round(r["us"]["cublas_bf16"] / r["us"]["ours"], 2)]
            for r in times
        ]  # fmt: skip
        ways = ("ours", "cublas_bf16", "decode_then_matmul")
        print_table("microseconds", ["shape", "batch", "split", "bits", *ways, "1e12/s", "x cuBLAS"], lines)
    else:
        print_table("codec", list(found["codec"][0]), [list(row.values()) for row in found["codec"]])


if __name__ == "__main__":
    main()
