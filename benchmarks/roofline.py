"""Draw where the kernels stand between memory and instructions: `python -m benchmarks.roofline`.

Reads benchmarks/results/{linear-h200,instructions-sm90}.json, writes docs/roofline.svg, prints docs/kernels.md's table.

Model: a weight takes the longest of reading its bits from memory, its instructions of the ALU pipe (64 lanes a clock
and multiprocessor) and all its instructions (128), each at the share of its peak that the H200 run reached. For other
GPUs that is a prediction: same instructions, their memory, multiprocessors and clock.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from qat.report import print_table

matplotlib.use("Agg")
# the same figure, the same file
matplotlib.rcParams["svg.hashsalt"] = "roofline"
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {"3 bits": "#4477aa", "4 bits": "#228833", "5 bits": "#ccbb44", "int8": "#ee6677", "compact": "#aa3377",
           "one a symbol": "#882255"}  # fmt: skip


class Gpu(NamedTuple):
    """What the model needs of a GPU; clocks and bandwidths of others are the vendors' figures."""

    bandwidth: float
    """Bytes a second."""
    multiprocessors: int
    clock: float
    """Hertz."""


GPUS = {
    "H200": Gpu(4.3e12, 132, 1.8e9),
    "L40S": Gpu(0.864e12, 142, 2.52e9),
    "RTX 4090": Gpu(1.008e12, 128, 2.52e9),
    "RTX 5090": Gpu(1.792e12, 170, 2.41e9),
}
"""H200: bandwidth and clock as measured. Of the others memory reaches nine tenths of the vendor's figure, say."""


def rates(gpu: Gpu, bits: float, instructions: float, alu: float) -> dict[str, float]:
    """Most weights a second that memory, ALU pipe and issue allow."""
    clocks = gpu.multiprocessors * gpu.clock
    return {"memory": 8 * gpu.bandwidth / bits, "ALU": 64 * clocks / alu, "issue": 128 * clocks / instructions}


def draw(rows: list[dict[str, Any]], counts: dict[str, dict[str, Any]], path: Path) -> None:
    """Weights a second against bits stored, at batch 1, with the limits."""
    figure, axes = plt.subplots(figsize=(8, 5))
    bits = [2.5 + 0.1 * i for i in range(140)]
    h200 = GPUS["H200"]
    axes.plot(bits, [8 * h200.bandwidth / b / 1e12 for b in bits], color="black", label="memory, 4.3 TB/s")
    drawn = set()
    for row in rows:
        rate = row["shape"][0] * row["shape"][1] / row["us"]["ours"] / 1e6
        label = None if row["profile"] in drawn else f"fused, {row['profile']} ({row['split']})"
        axes.plot(row["bits"], rate, "o", color=COLOURS[row["profile"]], label=label)
        drawn.add(row["profile"])
    for profile in COLOURS:
        found = [r for r in rows if r["profile"] == profile and r["split"] in counts]
        if not found:
            continue
        row = found[0]
        count = counts[row["split"]]
        limit = rates(h200, row["bits"], count["per_weight"], count["alu_per_weight"])
        y = min(limit["ALU"], limit["issue"]) / 1e12
        axes.plot([row["bits"] - 0.35, row["bits"] + 0.35], [y, y], color=COLOURS[profile], linewidth=2)
    for name, marker, stored in (("cublas_fp16", "s", 16.0), ("dense_int8", "^", 8.0)):
        chosen = [row for row in rows if row["profile"] == "4 bits"]
        ys = [row["shape"][0] * row["shape"][1] / row["us"][name] / 1e6 for row in chosen]
        axes.plot([stored] * len(ys), ys, marker, color="grey", label=name.replace("_", " "))
    axes.set(xlabel="bits stored a weight", ylabel="10$^{12}$ weights a second", ylim=(0, 9), xlim=(2.5, 16.5))
    axes.set_title("One row of x on an H200; a bar is what the instructions of a split allow")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw the figure and print the predictions."""
    rows = [r for r in json.loads((RESULTS / "linear-h200.json").read_text())["rows"] if r["batch"] == 1]
    found = json.loads((RESULTS / "instructions-sm90.json").read_text())["rows"]
    counts = {row["split"]: row for row in found if row["stages"] == 1}
    draw(rows, counts, ROOT / "docs" / "roofline.svg")
    table = []
    for profile in ("3 bits", "4 bits", "5 bits", "int8"):
        row = next(r for r in rows if r["profile"] == profile and r["shape"] == [8192, 28672])
        count = counts[row["split"]]
        weights = row["shape"][0] * row["shape"][1]
        limit = rates(GPUS["H200"], row["bits"], count["per_weight"], count["alu_per_weight"])
        reached = weights / row["us"]["ours"] * 1e6 / min(limit.values())
        predicted = []
        for name, gpu in GPUS.items():
            ours = min(rates(gpu, row["bits"], count["per_weight"], count["alu_per_weight"]).values()) * reached
            half = gpu.bandwidth / 2 * (weights * 2 / row["us"]["cublas_fp16"] * 1e6 / GPUS["H200"].bandwidth)
            predicted.append(row["us"]["cublas_fp16"] / row["us"]["ours"] if name == "H200" else ours / half)
        table.append([profile, row["bits"], *(limit[key] / 1e12 for key in limit), reached, *predicted])
    limits = ("memory", "ALU", "issue")
    print_table("8192 x 28672, batch 1", ["weights", "bits", *limits, "share reached", *GPUS], table)


if __name__ == "__main__":
    main()
