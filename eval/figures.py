"""The figures of the report page, drawn from the plain data of report.json."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from eval.charts import Axis, bar, legend, linear_axis, log_axis, plot, shares, steps
from eval.tables import TITLES, natural

SERIES = {"floor": "s3", "library": "s3", "base": "s1", "fake_quant": "s2", "own": "s2"}
"""Colours of the pairs; what hides the other comes first."""


def survival(pairs: dict[str, Any]) -> str:
    """Share of prompts without a divergence so far, of every pair."""
    curves = {name: pairs[name]["generation"]["survival"] for name in SERIES if name in pairs}
    x = linear_axis(0, max(map(len, curves.values())))
    y = Axis(0, 1, [(part / 4, f"{25 * part} %") for part in range(5)])
    lines = [steps(x, y, 0, curve, SERIES[name]) for name, curve in curves.items()]
    named = legend((SERIES[name], TITLES[name]) for name in curves)
    return named + plot("share of prompts without a divergence", x, y, lines, "generated tokens")


def sizes(summary: dict[str, Any]) -> str:
    """Bytes of the whole model, beside those in FP16."""
    coded, plain, whole = (summary[f"{kind}_bytes"] for kind in ("compressed", "other", "fp16"))
    half = 2 * summary["compressed_weights"]
    named = legend([("s1", "compressed weights"), ("s1l", "everything else")])
    stored = f"{megabytes(coded + plain)} = {megabytes(coded)} + {megabytes(plain)}"
    return named + shares([
        ("in FP16", megabytes(whole), [("s1", half), ("s1l", whole - half)]),
        ("stored", stored, [("s1", coded), ("s1l", plain)]),
    ])  # fmt: skip


def layer_bits(modules: Iterable[dict[str, Any]]) -> str:
    """Stored bits a weight of every layer, and of them the entropy; a gap lies between blocks."""
    blocks = [(block, list(group)) for block, group in groupby(natural(list(modules)), key=_block)]
    places, ticks, at = [], [], 0.0
    for block, group in blocks:
        if block is not None:
            ticks.append((at + len(group) / 2, block))
        for module in group:
            places.append((at, module))
            at += 1
        at += 1
    every = -(-len(ticks) // 12)
    x = Axis(0, at - 1, ticks[:: max(1, every)])
    y = linear_axis(0, 1.05 * max(module["bits"] for _, module in places))
    bars = []
    for left, module in places:
        tip = f"{module['name']}: {module['bits']:.3f} bits stored, entropy {module['entropy']:.3f}"
        right, entropy = left + 0.85, min(module["entropy"], module["bits"])
        bars += [
            bar(x, y, left, right, entropy, module["bits"], "s1l", tip),
            bar(x, y, left, right, 0, entropy, "s1", tip),
        ]
    named = legend([("s1", "entropy of the weights"), ("s1l", "what is stored over it")])
    return named + plot("bits of every layer", x, y, bars, "block", "bits a weight")


def histogram(found: dict[str, Any]) -> str:
    """Counts of a role's weights as bars, what the coder expects as a line, both as shares on a logarithmic axis."""
    total, first, counts = sum(found["counts"]), found["first"], found["counts"]
    if not total:
        return ""
    # integers stand in the middle of their bars
    x = linear_axis(first - 0.5, first + len(counts) - 0.5)
    y = log_axis(0.5 / total, 1)
    bars = [
        bar(x, y, value - 0.42, value + 0.42, y.low, count / total, "s1l", f"{value}: {count:,}")
        for value, count in enumerate(counts, first)
        if count
    ]
    line = steps(x, y, x.low, [expected / total for expected in found["coded"]], "s2")
    what = "integer" if found["dtype"] == "int8" else f"high byte of a {found['dtype']}"
    return plot(f"weights of {found['role']}", x, y, [*bars, line], what)


def megabytes(size: float) -> str:
    """A size in words."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


def _block(module: dict[str, Any]) -> str | None:
    """Number of the block that a module is in."""
    return next((part for part in module["name"].split(".") if part.isdigit()), None)
