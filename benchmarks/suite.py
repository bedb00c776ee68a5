"""Everything that is measured on a GPU, in one run: `python -m benchmarks.suite`; and what it was to reach.

First every gate, several at once, which also fills the compiler's cache; then the benchmarks one after the other, alone
on the GPU: linear, regimes, lossless, generate. Each writes its results; a table of goals is made from the files.
`--goals h200` makes the table from those that are there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from benchmarks.linear import RESULTS, SHAPES, geometric_mean
from qat.report import device_slug, print_table

GATED = ("linear", "regimes")
TIMED = ("linear", "regimes", "lossless", "generate")
Row = dict[str, Any]


class Goal(NamedTuple):
    """A figure to reach."""

    what: str
    asked: float
    found: float | None
    most: bool = False
    """Whether it is the most that it may be, not the least."""

    @property
    def met(self) -> str:
        """yes, no, or nothing where it was not measured."""
        if self.found is None:
            return ""
        return "yes" if (self.found <= self.asked if self.most else self.found >= self.asked) else "no"


def ratio(row: Row) -> float:
    """Times of cuBLAS over ours."""
    return row["us"].get("cublas_fp16", row["us"].get("cublas_bf16")) / row["us"]["ours"]


def pick(function: Callable[[list[float]], float], values: Iterable[float]) -> float | None:
    """The function of the values, None of none."""
    found = list(values)
    return function(found) if found else None


def goals(linear: list[Row], decode: list[Row], lossless: list[Row], generate: list[Row]) -> list[Goal]:
    """Goals and what rows of the results files say of them."""
    few = [r for r in linear if r["profile"] in ("3 bits", "4 bits", "5 bits") and r["batch"] <= 8]
    large = [r for r in few if r["shape"] in ([4096, 14336], [8192, 28672])]
    int8 = [r for r in linear if r["profile"] == "int8" and r["shape"][0] * r["shape"][1] >= 4096 * 4096]
    found = [
        Goal("batch 1 to 8, 3 to 5 bits: geometric mean", 1.5, pick(geometric_mean, map(ratio, few))),
        Goal("batch 1 to 8, 3 to 5 bits: least", 1.0, pick(min, map(ratio, few))),
        Goal("bits over the entropy: most", 0.4, pick(max, (r["bits"] - r["entropy"] for r in few)), True),
        Goal("4096 x 14336 and 8192 x 28672: least", 1.7, pick(min, map(ratio, large))),
        Goal("full INT8, 4096 x 4096 and larger: least", 1.4, pick(min, map(ratio, int8))),
    ]
    for profile in ("compact", "one a symbol"):
        rates = (rate(r) for r in linear if r["profile"] == profile and r["batch"] == 1)
        found.append(Goal(f"{profile}, 1e12 weights/s: most of a shape", 1.2, pick(max, rates)))
    for batch, asked in ((16, 1.2), (32, 1.0), (64, 1.0), (512, 0.9), (2048, 0.9)):
        ratios = [ratio(r) for r in linear if r["profile"] == "4 bits" and r["batch"] == batch]
        found.append(Goal(f"batch {batch}: geometric mean", asked, pick(geometric_mean, ratios)))
        found.append(Goal(f"batch {batch}: least", asked, pick(min, ratios)))
    for profile in ("3 bits", "4 bits", "5 bits"):
        rates = (r["Tweights_s"]["int8"] for r in decode if r["profile"] == profile and r["shape"] == [8192, 28672])
        found.append(Goal(f"decoding to INT8, {profile}, 8192 x 28672, 1e12 weights/s", 2.2, pick(max, rates)))
    at_one = [r for r in lossless if r.get("batch") == 1 and r["shape"] == [4096, 14336] and r["bits"] <= 11.3]
    found.append(Goal("bfloat16 without loss, 11.3 bits at most, batch 1", 1.0, pick(max, map(ratio, at_one))))
    for shape, asked in (("tinyllama-1.1b", 1.2), ("llama-3-8b", 1.4)):
        chosen = [r for r in generate if r["shape"] == shape]
        found.append(Goal(f"generation, {shape}: least", asked, pick(min, (r["over_fp16"] for r in chosen))))
        found.append(
            Goal(f"weights of FP16, {shape}: most", 0.35, pick(max, (r["of_fp16_bytes"] for r in chosen)), True)
        )
    return found


def rate(row: Row) -> float:
    """1e12 weights a second of a product."""
    return row["shape"][0] * row["shape"][1] / row["us"]["ours"] / 1e6


def read(name: str) -> list[Row]:
    """Rows of a results file of this GPU, none if it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def run(name: str, *options: str) -> None:
    """One benchmark, in a process of its own; raises if it fails."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options])
    if done.returncode:
        raise SystemExit(f"error: benchmarks.{name} {' '.join(options)} failed; what was written before stays")


def main() -> None:
    """Gates, benchmarks, goals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", metavar="GPU", help="only the table, from results of this GPU, as h200")
    args = parser.parse_args()
    if args.goals is None:
        if not torch.cuda.is_available():
            raise SystemExit("error: this benchmark times GPU kernels, and there is no GPU here; see --goals h200")
        jobs = [(name, "--gate-only", "--shapes", f"{n}x{k}") for name in GATED for n, k in SHAPES]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
            list(pool.map(lambda job: run(*job), jobs))
        for name in TIMED:
            run(name)
    slug = args.goals or device_slug()
    table = goals(*(read(f"{name}-{slug}") for name in ("linear", "decode", "lossless", "generate")))
    lines = [[goal.what, goal.asked, goal.found, goal.met] for goal in table]
    print_table(f"goals, {slug}", ["goal", "asked", "found", "met"], lines)


if __name__ == "__main__":
    main()
