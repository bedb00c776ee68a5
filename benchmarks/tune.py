"""Measure launches of the fused kernel: `python -m benchmarks.tune`. Writes kernels/rans_kernels/ops/tuned.py.

For every shape and batch: the rule's launch, then the neighbours of the best so far, in warps and in stages, until none
is faster. Weights of 4.05 bits of entropy in one coded bit and four raw ones; graphs over copies that exceed the L2, as
in `benchmarks.linear`. Gate: every launch gives the dense INT8 kernel's result to the bit. The table gets what beats
the rule by more than 2 %, and keeps what it holds of other shapes and GPUs. Shapes other than `benchmarks.linear`'s are
those of layers that share a launch, one upon the other.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rans_kernels.ops import tuned
from rans_kernels.ops.int8_linear import int8_linear_tiled
from rans_kernels.ops.launch import Launch, launch_rule, most_warps
from rans_kernels.ops.rans_linear.gluon import rans_linear_gluon
from rans_kernels.ops.tuned import TUNED
from torch import Tensor

from benchmarks.linear import SHAPES, WEIGHTS, Layer, copies, microseconds, parse_shape
from qat.report import print_table

GROUPS = ((2560, 2048), (11264, 2048), (6144, 4096), (28672, 4096))
"""Query, key and value, and gate and up, of TinyLlama and of Llama-3-8B."""
GAIN = 1.02
Table = dict[tuple[str, int, int, int], tuple[int, int]]


def render(table: Table) -> str:
    """Source of tuned.py."""
    lines = [f'    ("{name}", {n}, {k}, {blocks}): {launch},' for (name, n, k, blocks), launch in sorted(table.items())]
    entries = "{\n" + "\n".join(lines) + "\n}" if lines else "{}"
    return (
        '"""Measured launches; written by `python -m benchmarks.tune`."""\n\n'
        f"TUNED: dict[tuple[str, int, int, int], tuple[int, int]] = {entries}\n"
        '"""(device, N, K, blocks of 8 rows of x) -> (warps, stages)."""\n'
    )


def update(table: Table, measured: Iterable[tuple[tuple[str, int, int, int], Launch, float, Launch, float]]) -> Table:
    """The table with what was measured: key, rule and its time, best launch and its time.

    An entry that no longer beats the rule by GAIN goes.
    """
    new = dict(table)
    for key, _, rule_time, best, best_time in measured:
        new.pop(key, None)
        if rule_time > GAIN * best_time:
            new[key] = (best.warps, best.stages)
    return new


def neighbours(launch: Launch, column_blocks: int) -> list[Launch]:
    """Launches of half and twice the warps, and of one stage more and less."""
    warps = [w for w in (launch.warps // 2, launch.warps * 2) if 1 <= w <= most_warps(column_blocks)]
    stages = [s for s in (launch.stages - 1, launch.stages + 1) if 1 <= s <= 4]
    return [launch._replace(warps=w) for w in warps] + [launch._replace(stages=s) for s in stages]


def search(time: Callable[[Launch], float], rule: Launch, column_blocks: int) -> tuple[Launch, float, float]:
    """The best launch that steps from the rule's lead to, its time, and the rule's.

    Args:
        time: microseconds of a launch.
        rule: to begin with.
        column_blocks: blocks of 8 rows of x.
    """
    times = {rule: time(rule)}
    best = rule
    while True:
        for launch in neighbours(best, column_blocks):
            if launch not in times:
                times[launch] = time(launch)
        faster = min(times, key=lambda launch: times[launch])
        if faster == best:
            return best, times[best], times[rule]
        best = faster


def tune(layer: Layer, batches: list[int]) -> list[tuple[tuple[str, int, int, int], Launch, float, Launch, float]]:
    """Measure a layer; arguments of `update`.

    Raises:
        SystemExit: a launch gives another result than the dense INT8 kernel.
    """
    w, layout = layer.coded, layer.coded.layout
    coded = copies(w, w.heads.nbytes + w.words.nbytes, lambda w: replace(w, heads=+w.heads, words=+w.words))
    found = []
    for batch in batches:
        x = torch.randn(batch, layout.shape[1], device="cuda", dtype=torch.float16)
        expected = int8_linear_tiled(x, layer.weights, layer.scale, None, layout.units)
        blocks = triton.next_power_of_2(-(-batch // 8))

        def time(launch: Launch, x: Tensor = x, expected: Tensor = expected) -> float:
            if not torch.equal(rans_linear_gluon(x, w, layer.scale, None, launch), expected):
                raise SystemExit(f"error: {layout} at {launch} differs from INT8")
            calls: list[Callable[[Tensor], Any]] = [
                partial(lambda w, x: rans_linear_gluon(x, w, layer.scale, None, launch), each) for each in coded
            ]
            return microseconds(calls, x)

        rule = launch_rule(x.device, layout.shape, blocks, layout.grid[1])
        best, best_time, rule_time = search(time, rule, blocks)
        key = (torch.cuda.get_device_properties(x.device).name, *layout.shape, blocks)
        found.append((key, rule, rule_time, best, best_time))
    return found


def main() -> None:
    """Measure what was asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES + GROUPS, metavar="NxK")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16], choices=range(1, 33), metavar="1..32")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this times GPU kernels, and there is no GPU here")
    measured = []
    for shape in args.shapes:
        split, sigma, profile, _ = WEIGHTS["4 bits"]
        measured += tune(Layer(shape, split, sigma, profile), args.batches)
        Path(str(tuned.__file__)).write_text(render(update(TUNED, measured)))
    lines = [
        [f"{n}x{k}", blocks, rule.warps, rule.stages, rule_time, best.warps, best.stages, best_time]
        for (_, n, k, blocks), rule, rule_time, best, best_time in measured
    ]
    print_table("launches", ["shape", "blocks", "warps", "stages", "us", "best warps", "stages", "us"], lines)


if __name__ == "__main__":
    main()
