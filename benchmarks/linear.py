"""Gate, then time the GPU kernels: `python -m benchmarks.linear`. Writes benchmarks/results/{linear,decode}-<gpu>.json.

Weights are Gaussian integers clipped to what their split holds, as `quant.bits` clips them in training. Gate: the fused
product equals the dense INT8 kernel's to the bit and float64's within rounding, decoded weights are the encoded
ones; otherwise no figure is written. Times are of CUDA graphs that go through copies of the weights which together
are several times the L2, so that no weight is found there. Baselines of the same run: cuBLAS in float16, our
dense INT8 kernel, decoding and then cuBLAS, and with --torchao the compiled INT8 weight-only product of torchao, at
batches 1 and 8 (seconds of compilation each).
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rans_kernels.coder import encode_tiles, entropy, weight_histogram
from rans_kernels.coder.plan import choose_probability_bits, choose_units
from rans_kernels.format import Split, TileLayout
from rans_kernels.ops.coded import CodedWeight
from rans_kernels.ops.int8_linear import int8_linear_tiled
from rans_kernels.ops.rans_decode import rans_decode, rans_dequantize
from rans_kernels.ops.rans_linear import rans_linear
from torch import Tensor
from torch.nn import functional as F

from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
WEIGHTS = {
    "3 bits": (Split(1, 3), 2.0, "fast", (1, 2, 4, 8)),
    "4 bits": (Split(1, 4), 4.0, "fast", (1, 2, 4, 8, 16, 32, 64, 512, 2048)),
    "5 bits": (Split(1, 5), 8.0, "fast", (1, 2, 4, 8)),
    "int8": (Split(1, 7), 28.0, "fast", (1, 8)),
    "compact": (Split(4, 1), 4.0, "compact", (1, 8)),
    "one a symbol": (Split(8, 0), 4.0, "compact", (1, 8)),
}
"""Split, standard deviation, profile that chooses the tiles, and batches."""
ROTATED_BYTES = 400 << 20
REPLAYS = 10


class Layer:
    """One weight in every form, and copies of each that together exceed the L2 several times."""

    def __init__(self, shape: tuple[int, int], split: Split, sigma: float, profile: str):
        """Args: shape: (N, K). split: of the bits. sigma: standard deviation in steps. profile: chooses the tiles."""
        torch.manual_seed(0)
        w = torch.empty(shape, device="cuda").normal_(0, sigma).round_()
        self.weights = w.clamp_(max(-127, split.low), -split.low - 1).to(torch.int8)
        host = self.weights.cpu().numpy()
        layout = TileLayout(shape, split, choose_units(shape, profile), choose_probability_bits(split, shape))
        encoded = encode_tiles(host, layout)
        heads, words, offsets, freqs = encoded.heads, encoded.words, encoded.offsets, encoded.freqs
        self.coded = CodedWeight.check(to_gpu(heads), to_gpu(words), to_gpu(offsets), to_gpu(freqs), layout)
        self.scale = torch.rand(shape[0], 1, device="cuda") * 0.01 + 0.001
        self.half = rans_dequantize(self.coded, self.scale, torch.float16)
        self.entropy = entropy(weight_histogram(host))
        self.bits = 8 * (encoded.nbytes + self.scale.nbytes) / host.size

    def gate(self, batches: tuple[int, ...]) -> None:
        """Raise unless every kernel gives what it should."""
        reference = self.weights.double() * self.scale.double()
        if not torch.equal(rans_decode(self.coded), self.weights):
            raise SystemExit(f"error: {self.coded.layout} is not decoded to what was encoded; no figures written")
        for batch in batches:
            x = torch.randn(batch, reference.shape[1], device="cuda", dtype=torch.float16)
            y = rans_linear(x, self.coded, self.scale)
            exact = x.double() @ reference.T
            if ((y.double() - exact).norm() / exact.norm()).item() > torch.finfo(torch.float16).eps / 2:
                raise SystemExit(f"error: {self.coded.layout} at batch {batch} is off; no figures written")
            same = torch.equal(y, int8_linear_tiled(x, self.weights, self.scale, None, self.coded.layout.units))
            if batch <= 64 and not same:
                raise SystemExit(f"error: {self.coded.layout} at batch {batch} differs from INT8; no figures written")

    def products(self, torchao: bool) -> dict[str, list[Callable[[Tensor], Any]]]:
        """Every way to compute x @ W.T, a function for each copy of the weight; torchao's if asked for."""
        w, units = self.coded, self.coded.layout.units
        coded = copies(w, w.heads.nbytes + w.words.nbytes, lambda w: replace(w, heads=+w.heads, words=+w.words))
        dense = copies(self.weights, self.weights.nbytes, torch.clone)
        half = copies(self.half, self.half.nbytes, torch.clone)
        functions: dict[str, list[Callable[[Tensor], Any]]] = {
            "ours": [partial(lambda w, x: rans_linear(x, w, self.scale), w) for w in coded],
            "cublas_fp16": [partial(lambda w, x: F.linear(x, w), w) for w in half],
            "dense_int8": [partial(lambda w, x: int8_linear_tiled(x, w, self.scale, None, units), w) for w in dense],
            "decode_then_matmul": [
                partial(lambda w, x: F.linear(x, rans_dequantize(w, self.scale, x.dtype)), w) for w in coded
            ],
        }
        if torchao:
            functions["torchao_int8"] = torchao_linears(half)
        return functions


def to_gpu(array: np.ndarray) -> Tensor:
    """The array on the GPU."""
    return torch.from_numpy(array).cuda()


def copies(first: Any, size: int, clone: Callable[[Any], Any]) -> list[Any]:
    """`first` and so many clones that a pass over all reads ROTATED_BYTES."""
    return [first, *(clone(first) for _ in range(ROTATED_BYTES // size))]


def torchao_linears(weights: list[Tensor]) -> list[Callable[[Tensor], Any]]:
    """Compiled INT8 weight-only layers of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # every shape and batch is another graph
    torch.compiler.reset()
    linears = []
    for weight in weights:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda", dtype=torch.float16)
        linear.weight.data.copy_(weight)
        quantize_(linear, Int8WeightOnlyConfig())
        linears.append(torch.compile(linear, dynamic=False))
    return linears


def microseconds(functions: list[Callable[[Tensor], Any]], x: Tensor) -> float:
    """Median time of one call, from replays of a graph of at least 20 calls."""
    calls = [functions[i % len(functions)] for i in range(max(20, len(functions)))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0](x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def bench_decode(layer: Layer, name: str) -> dict[str, Any]:
    """Time of decoding a layer to INT8 and to float16."""
    w = layer.coded
    coded = copies(w, w.heads.nbytes + w.words.nbytes, lambda w: replace(w, heads=+w.heads, words=+w.words))
    x = torch.empty(0, device="cuda")
    us = {
        "int8": microseconds([partial(lambda w, x: rans_decode(w), w) for w in coded], x),
        "float16": microseconds(
            [partial(lambda w, x: rans_dequantize(w, layer.scale, torch.float16), w) for w in coded], x
        ),
    }
    rate = {to: round(layer.weights.numel() / time / 1e6, 3) for to, time in us.items()}
    return {
        "shape": list(w.layout.shape), "profile": name, "split": str(w.layout.split), "bits": round(layer.bits, 3),
        "us": {to: round(time, 2) for to, time in us.items()}, "Tweights_s": rate,
    }  # fmt: skip


def geometric_mean(ratios: list[float]) -> float:
    """Of at least one ratio."""
    return float(torch.tensor(ratios, dtype=torch.float64).log().mean().exp())


def summarise(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """For every profile and batch: geometric mean and least of cuBLAS' time over ours, over the shapes."""
    table = []
    for profile in WEIGHTS:
        for batch in sorted({row["batch"] for row in rows}):
            chosen = [row for row in rows if row["profile"] == profile and row["batch"] == batch]
            if chosen:
                ratios = [row["us"]["cublas_fp16"] / row["us"]["ours"] for row in chosen]
                over = max(row["bits"] - row["entropy"] for row in chosen)
                table.append([profile, batch, geometric_mean(ratios), min(ratios), over])
    return table


def parse_shape(text: str) -> tuple[int, int]:
    """(N, K) of "NxK"."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not NxK, as 4096x14336")
    return int(found[1]), int(found[2])


def main() -> None:
    """Gate and time what was asked for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--torchao", action="store_true", help="time torchao's INT8 weight-only product too")
    parser.add_argument("--gate-only", action="store_true", help="check, compile what the times need, write nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark times GPU kernels, and there is no GPU here")
    rows, decode_rows = [], []
    for shape in args.shapes:
        for name in args.weights:
            split, sigma, profile, batches = WEIGHTS[name]
            layer = Layer(shape, split, sigma, profile)
            layer.gate(batches)
            if args.gate_only:
                continue
            # before the products: for a moment after those of many rows the clock is lower
            decode_rows.append(bench_decode(layer, name))
            products = layer.products(args.torchao)
            for batch in batches:
                x = torch.randn(batch, shape[1], device="cuda", dtype=torch.float16)
                timed = [way for way in products if way != "torchao_int8" or batch in (1, 8)]
                us = {way: round(microseconds(products[way], x), 2) for way in timed}
                rows.append(
                    {
                        "shape": list(shape), "batch": batch, "profile": name, "split": str(split),
                        "entropy": round(layer.entropy, 3), "bits": round(layer.bits, 3), "us": us,
                    }
                )  # fmt: skip
            del products
    if args.gate_only:
        return
    for name, found in (("linear", rows), ("decode", decode_rows)):
        write_json(RESULTS / f"{name}-{device_slug()}.json", {"environment": environment(), "rows": found})
    ways = ("ours", "cublas_fp16", "dense_int8", "decode_then_matmul", "torchao_int8")
    lines = [
        ["x".join(map(str, r["shape"])), r["batch"], r["profile"], r["entropy"], r["bits"],
         *(r["us"].get(way) for way in ways), round(r["us"]["cublas_fp16"] / r["us"]["ours"], 2)]
        for r in rows
    ]  # fmt: skip
    print_table("microseconds", ["shape", "batch", "weights", "entropy", "bits", *ways, "x cuBLAS"], lines)
    print_table(
        "cuBLAS over ours", ["weights", "batch", "geometric mean", "least", "bits over entropy"], summarise(rows)
    )
    decoded = [
        ["x".join(map(str, r["shape"])), r["profile"], r["bits"], *r["us"].values(), *r["Tweights_s"].values()]
        for r in decode_rows
    ]
    header = ["shape", "weights", "bits", "int8, us", "float16, us", "int8, 1e12/s", "float16, 1e12/s"]
    print_table("decoding", header, decoded)


if __name__ == "__main__":
    main()
