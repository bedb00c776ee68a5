"""Gate, then time the ways to multiply a batch: `python -m benchmarks.regimes`. Writes results/regimes-<gpu>.json.

From a few rows of x to thousands: a panel a block, warpgroups in the same order of the sums ("wide"), warpgroups with
all tiles in one chain ("chain"), decoding and then the library; beside cuBLAS in float16. `rans_linear` chooses among
them by what this measures (ops/launch.py, ops/rans_linear/op.py). Gate: panel and wide give the dense INT8 kernel's
result to the bit, the others float64's within rounding. Also how far the ways that add up in another order are from the
first: the share of results that differ, and by how much of their norm. Times as in benchmarks/linear.py.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rans_kernels.ops.coded import CodedWeight, is_hopper
from rans_kernels.ops.int8_linear import int8_linear_tiled
from rans_kernels.ops.launch import WideLaunch
from rans_kernels.ops.rans_decode import rans_dequantize
from rans_kernels.ops.rans_linear.gluon import rans_linear_gluon
from rans_kernels.ops.rans_linear.hopper import rans_linear_hopper
from torch import Tensor
from torch.nn import functional as F

from benchmarks.linear import RESULTS, SHAPES, WEIGHTS, Layer, copies, microseconds, parse_shape
from qat.report import device_slug, environment, print_table, write_json

BATCHES = (8, 16, 32, 64, 128, 256, 512, 2048)
CHAIN = WideLaunch(256, 8, None, True)
Way = Callable[[Tensor, CodedWeight, Tensor], Tensor]


def library(x: Tensor, weight: CodedWeight, scale: Tensor) -> Tensor:
    """Decoded, then multiplied by cuBLAS."""
    return F.linear(x, rans_dequantize(weight, scale, x.dtype))


def ways(batch: int) -> dict[str, Way]:
    """Those that make sense for a batch."""
    found: dict[str, Way] = {"library": library}
    if batch <= 64:
        found["panel"] = lambda x, w, s: rans_linear_gluon(x, w, s, None)
    if batch <= 128:
        found["wide"] = lambda x, w, s: rans_linear_hopper(x, w, s, None)
    if batch >= 128:
        found["chain"] = lambda x, w, s: rans_linear_hopper(x, w, s, None, CHAIN)
    return found


def differences(y: Tensor, first: Tensor) -> dict[str, float]:
    """Share of results that differ, and the norm of the difference over that of the result."""
    apart = (y != first).float().mean().item()
    return {
        "share": round(apart, 5),
        "norm": float(f"{((y - first).float().norm() / first.float().norm()).item():.3g}"),
    }


def gate(layer: Layer, batch: int) -> dict[str, dict[str, float]]:
    """Raise unless every way gives what it should; how far the others are from the shared order."""
    x = torch.randn(batch, layer.half.shape[1], device="cuda", dtype=torch.float16)
    exact = x.double() @ (layer.weights.double() * layer.scale.double()).T
    first = int8_rows(layer, x)
    apart = {}
    for name, way in ways(batch).items():
        y = way(x, layer.coded, layer.scale)
        if ((y.double() - exact).norm() / exact.norm()).item() > torch.finfo(torch.float16).eps / 2:
            raise SystemExit(f"error: {name} of {layer.coded.layout} at batch {batch} is off; no figures written")
        if name in ("panel", "wide") and not torch.equal(y, first):
            raise SystemExit(f"error: {name} of {layer.coded.layout} at batch {batch} differs from INT8")
        if name in ("chain", "library"):
            apart[name] = differences(y, first)
    return apart


def int8_rows(layer: Layer, x: Tensor) -> Tensor:
    """The dense INT8 kernel's product, in the order that all batches share, whatever the batch."""
    parts = [
        int8_linear_tiled(part, layer.weights, layer.scale, None, layer.coded.layout.units) for part in x.split(64)
    ]
    return torch.cat(parts)


def main() -> None:
    """Gate and time what was asked for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--gate-only", action="store_true", help="check, compile what the times need, write nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not is_hopper(torch.device("cuda", torch.cuda.current_device())):
        raise SystemExit("error: this benchmark times kernels for Hopper GPUs, and there is none here")
    split, sigma, profile, _ = WEIGHTS["4 bits"]
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        layer = Layer(shape, split, sigma, profile)
        w = layer.coded
        coded = copies(w, w.heads.nbytes + w.words.nbytes, lambda w: replace(w, heads=+w.heads, words=+w.words))
        half = copies(layer.half, layer.half.nbytes, torch.clone)
        for batch in args.batches:
            apart = gate(layer, batch)
            if args.gate_only:
                continue
            x = torch.randn(batch, shape[1], device="cuda", dtype=torch.float16)
            us = {"cublas_fp16": microseconds([partial(lambda w, x: F.linear(x, w), w) for w in half], x)}
            for name, way in ways(batch).items():
                calls: list[Callable[[Tensor], Any]] = [
                    partial(lambda f, s, w, x: f(x, w, s), way, layer.scale, w) for w in coded
                ]
                us[name] = microseconds(calls, x)
            rows.append(
                {
                    "shape": list(shape), "batch": batch, "split": str(split), "bits": round(layer.bits, 3),
                    "us": {name: round(time, 2) for name, time in us.items()}, "apart": apart,
                }
            )  # fmt: skip
        del coded, half
    if args.gate_only:
        return
    write_json(RESULTS / f"regimes-{device_slug()}.json", {"environment": environment(), "rows": rows})
    names = ("cublas_fp16", "panel", "wide", "chain", "library")
    lines = []
    for row in rows:
        best = min(time for name, time in row["us"].items() if name != "cublas_fp16")
        times = [row["us"].get(name) for name in names]
        lines.append(["x".join(map(str, row["shape"])), row["batch"], *times, row["us"]["cublas_fp16"] / best])
    print_table("microseconds", ["shape", "batch", *names, "x cuBLAS, best"], lines)


if __name__ == "__main__":
    main()
