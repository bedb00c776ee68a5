"""What a compressed folder holds: sizes, bits, and its weights counted against the model that codes them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rans_kernels.checkpoint import iterate_weights, read_tensor, shard_of
from rans_kernels.coder import byte_histogram, entropy, high_bytes, weight_histogram
from rans_kernels.format import TileLayout

from qat.commands.inspect import describe

LOW_BITS = 8
"""Of a 16-bit float, stored as they are; what is counted and coded is the byte above."""


def describe_weights(folder: Path) -> dict[str, Any]:
    """Decode and count every compressed weight of a folder.

    Returns:
        summary, modules: as `qat.commands.inspect.describe`. Of a module `entropy` is that of the weights as they are
            stored, and `coded_bits` the bits a weight that its table gives them, both of the high byte, and 8, of
            floats.
        histograms: of all modules of one role and dtype, {"role", "dtype", "modules", "entropy", "coded_bits",
            "first", "counts", "coded"}: means over their weights, and occurrences of first, first + 1, ... and those
            the coder expects, of integers or the high bytes of floats.

    Raises:
        UserError: no such folder.
        rans_kernels.format.FormatError: it is damaged.
    """
    found = describe(str(folder))
    rows = {row["name"]: row for row in found["modules"]}
    shards = shard_of(folder)
    sums: dict[tuple[str, str], NDArray[np.float64]] = {}
    members: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, entry, weights, _ in iterate_weights(folder):
        floats = entry.layout.is_float
        counts = byte_histogram(high_bytes(weights)) if floats else weight_histogram(weights)
        coded = coded_distribution(entry.layout, read_tensor(f"{name}.weight_freqs", shards).numpy())
        there, verbatim = counts > 0, LOW_BITS if floats else 0
        cost = -float(counts[there] @ np.log2(coded[there])) / max(1, weights.size)
        rows[name] |= {"entropy": round(entropy(counts) + verbatim, 4), "coded_bits": round(cost + verbatim, 4)}
        key = role(name), entry.layout.dtype
        sums[key] = sums.get(key, np.zeros((2, 256))) + [counts, weights.size * coded]
        members.setdefault(key, []).append(rows[name])
    histograms = [
        {"role": name, "dtype": dtype, "modules": len(members[name, dtype]), **_means(members[name, dtype])}
        | _window(both, -128 if dtype == "int8" else 0)
        for (name, dtype), both in sums.items()
    ]
    return {"summary": found["summary"], "modules": list(rows.values()), "histograms": histograms}


def coded_distribution(layout: TileLayout, freqs: NDArray[np.integer]) -> NDArray[np.float64]:
    """How probable a layer's table makes each weight: its coded bits as the table has them, all raw bits alike.

    Args:
        layout: how the layer is coded.
        freqs: frequency of every symbol, [256].

    Returns:
        [256]: of the integers from -128 to 127; of floats, of the high bytes, which add up to less than 1 where codes
        stand for none.
    """
    split = layout.split
    shares = np.zeros(1 << split.coded_bits)
    # the weights of a symbol lie in it side by side, and are alike
    for shift in range(0, 8, split.coded_bits):
        shares += np.bincount(np.arange(256) >> shift & len(shares) - 1, weights=freqs, minlength=len(shares))
    shares /= shares.sum()
    if layout.is_float:
        codes = layout.float_codes()
        held, coded = codes >= 0, codes.clip(0) >> split.raw_bits
    else:
        integers = np.arange(-128, 128)
        held = (integers >= split.low) & (integers < -split.low)
        coded = np.where(held, split.parts(integers)[0], 0)
    return np.where(held, shares[coded], 0.0) / (1 << split.raw_bits)


def role(name: str) -> str:
    """What a module is in its block, `mlp.up_proj` of `model.layers.3.mlp.up_proj`; its last name outside of blocks."""
    *_, inside = re.split(r"\.\d+\.", name)
    return inside if inside != name else name.rpartition(".")[2]


def _means(modules: list[dict[str, Any]]) -> dict[str, float]:
    """Entropy and coded bits a weight over several modules."""
    total = max(1, sum(module["weights"] for module in modules))
    return {
        key: round(sum(module[key] * module["weights"] for module in modules) / total, 4)
        for key in ("entropy", "coded_bits")
    }


def _window(both: NDArray[np.float64], first: int) -> dict[str, Any]:
    """Counts and expected ones, [2, 256], from the first to the last that occurs."""
    there = np.flatnonzero(both[0])
    low, high = (int(there[0]), int(there[-1])) if len(there) else (0, 0)
    counts, coded = both[:, low : high + 1]
    return {"first": first + low, "counts": counts.astype(int).tolist(), "coded": coded.round(2).tolist()}
