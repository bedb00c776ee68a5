"""Choosing how a layer is coded: the split of its bits and the size of its tiles, for a profile."""

import numpy as np
from numpy.typing import NDArray

from rans_kernels.coder.tables import entropy
from rans_kernels.format import SPLITS, UNIT_COLUMNS, UNIT_ROWS, Split, TileLayout

WEIGHT_RATE = {8: 0.94e12, 4: 1.5e12, 2: 2.3e12, 1: 3.8e12}
"""Weights a second that the fused kernel decodes on an H200, by coded bits (docs/kernels.md)."""
BANDWIDTH = 4.3e12
"""Bytes a second that an H200 reads."""
FILLING = 1024
"""Tiles, a warp each, that fill a GPU: 8 a multiprocessor of an H200."""
MOST_TILES = 16
"""Tiles of a panel where not storage but speed counts: the warps of the largest block."""
FOLDED_UNITS = 32
"""Units that a panel of a narrow matrix is folded to in `compact`: states then cost 24 / (32 * 32) bits or less."""
COMPACT_BITS = 0.02
"""Bits a weight, of an ideal code, that `compact` may spend to look up two weights at once: twice as fast to decode."""
AUTO_BITS = 0.1
"""Bits a weight that `auto` may spend over the smallest to be faster."""


def split_bits(counts: NDArray[np.int64], split: Split) -> float:
    """Bits a weight of a split under an ideal code, the weights of a symbol taken as independent.

    Args:
        counts: histogram of the weights from -128 to 127, [256].
        split: that holds all of them.
    """
    coded, _ = split.parts(np.arange(-128, 128))
    return entropy(np.bincount(coded, weights=counts, minlength=2)) + split.raw_bits


def seconds_per_weight(split: Split, bits: float) -> float:
    """Time of a weight on an H200 as the slower of decoding it and reading it: a roofline, not a measurement."""
    return max(1 / WEIGHT_RATE[split.coded_bits], bits / 8 / BANDWIDTH)


def choose_split(counts: NDArray[np.int64], profile: str) -> Split:
    """The split for a layer.

    compact: fewest bits, or `COMPACT_BITS` more for more weights a symbol. fast: least time by `seconds_per_weight`,
    fewer bits where equal. auto: least time among those within `AUTO_BITS` of the fewest bits.

    Args:
        counts: histogram of the weights from -128 to 127, [256].
        profile: compact, fast or auto.
    """
    present = np.flatnonzero(counts) - 128
    low, high = (int(present[0]), int(present[-1])) if len(present) else (0, 0)
    return _best_split({split: split_bits(counts, split) for split in SPLITS if split.holds(low, high)}, profile)


def _best_split(bits: dict[Split, float], profile: str) -> Split:
    """The split for a profile, from the bits a weight that each would cost."""
    fewest = min(bits.values())
    if profile == "compact":
        near = (split for split, b in bits.items() if b <= fewest + COMPACT_BITS)
        return min(near, key=lambda s: (s.coded_bits, bits[s]))
    if profile == "auto":
        bits = {split: b for split, b in bits.items() if b <= fewest + AUTO_BITS}
    return min(bits, key=lambda s: (seconds_per_weight(s, bits[s]), bits[s]))


def is_small(shape: tuple[int, int]) -> bool:
    """Whether a matrix is cut finer than others, lest it leave a GPU empty.

    Args:
        shape: (N, K) of the weight.
    """
    units = -(-shape[1] // UNIT_COLUMNS)
    tiles = _fast_tiles(units)
    return units > 8 and tiles <= 4 and -(-shape[0] // UNIT_ROWS) * tiles < FILLING


def _fast_tiles(units: int) -> int:
    """Tiles of a panel of so many units, of at least 8 each: a power of two, at most `MOST_TILES`."""
    return min(MOST_TILES, 1 << (max(1, units // 8).bit_length() - 1))


def choose_fold(shape: tuple[int, int]) -> int:
    """Rows of a narrow weight in one of the coded matrix: a power of two, as few as make `FOLDED_UNITS` units.

    Fewer where there are no whole panels of so many rows: folding adds no weight outside the matrix.

    Args:
        shape: (N, K) of the weight.
    """
    # the largest power of two that divides N
    most, fold = shape[0] & -shape[0], 1
    while 0 < fold * shape[1] <= (FOLDED_UNITS - 1) * UNIT_COLUMNS and 2 * fold * UNIT_ROWS <= most:
        fold *= 2
    return fold


def can_fold(scales: int, bias: bool) -> bool:
    """Whether a weight can be folded: rows of its coded matrix, each several of its own, have one scale and no bias.

    Args:
        scales: number of them.
        bias: whether the layer has one.
    """
    return scales == 1 and not bias


def choose_probability_bits(split: Split, shape: tuple[int, int]) -> int:
    """Precision of the frequencies: 12 where most of a weight is coded, for 0.07 bits a weight less than 10.

    Otherwise 10: what is coded is few bits a weight, and smaller tables leave shared memory to warps. 11, for 0.01 bits
    less, where a matrix is small and its states cost more.

    Args:
        split: of the bits.
        shape: (N, K) of the weight.
    """
    return 12 if split.coded_bits >= 4 else 11 if is_small(shape) else 10


def choose_units(shape: tuple[int, int], profile: str) -> int:
    """Units of a tile.

    compact: a power of two tiles a panel, so that blocks of so many warps are full, of at least 13 units, 416 weights a
    state. fast and auto: a power of two tiles a panel,
    at most 16, for the warps that fill a GPU, of at least 8 units where the panel has them: 256 weights a state. Where
    such tiles are not more than `FILLING`, 8 units if 16 tiles can be so short, and of a small matrix 7.

    Args:
        shape: (N, K) of the weight.
        profile: compact, fast or auto.
    """
    units = max(1, -(-shape[1] // UNIT_COLUMNS))
    if profile == "compact":
        return -(-units // (1 << (max(1, units // 13).bit_length() - 1)))
    if is_small(shape):
        return 7
    tiles = _fast_tiles(units)
    few = -(-shape[0] // UNIT_ROWS) * tiles <= FILLING
    return min(units, max(8, -(-units // MOST_TILES))) if few else -(-units // tiles)


def choose_layout(
    counts: NDArray[np.int64], shape: tuple[int, int], profile: str, foldable: bool = False
) -> TileLayout:
    """Everything about how a layer is coded.

    Args:
        counts: histogram of the weights from -128 to 127, [256].
        shape: (N, K) of the weight.
        profile: compact, fast or auto.
        foldable: whether the weight may be folded, see `can_fold`.
    """
    split = choose_split(counts, profile)
    fold = choose_fold(shape) if foldable and profile == "compact" else 1
    coded = shape[0] // fold, shape[1] * fold
    # all units of a folded panel are one tile
    units = choose_units(coded, profile) if fold == 1 else -(-coded[1] // UNIT_COLUMNS)
    return TileLayout(shape, split, units, choose_probability_bits(split, coded), fold=fold)


def choose_float_layout(counts: NDArray[np.int64], shape: tuple[int, int], profile: str, dtype: str) -> TileLayout:
    """Everything about how a layer of 16-bit floats is coded; profiles as for integers.

    Args:
        counts: histogram of the high bytes, [256].
        shape: (N, K) of the weight.
        profile: compact, fast or auto.
        dtype: bfloat16 or float16.
    """
    found = ((split, float_layout(counts, shape, profile, dtype, split)) for split in SPLITS if split.coded_bits > 1)
    layouts = {split: layout for split, layout in found if layout}
    return layouts[_best_split({split: float_bits(counts, layout) for split, layout in layouts.items()}, profile)]


def float_layout(
    counts: NDArray[np.int64], shape: tuple[int, int], profile: str, dtype: str, split: Split
) -> TileLayout | None:
    """The cheapest layout of floats with a split, None if it cannot hold them; arguments as `choose_float_layout`."""
    windows = choose_windows(counts.reshape(2, 128).sum(0), split)
    if windows is None:
        return None
    return TileLayout(shape, split, choose_units(shape, profile), choose_probability_bits(split, shape), dtype, windows)


def float_bits(counts: NDArray[np.int64], layout: TileLayout) -> float:
    """Bits a weight of a layout of floats under an ideal code; counts: histogram of the high bytes, [256]."""
    coded = layout.float_codes().clip(0) >> layout.split.raw_bits
    # a row a unit is a bit a weight
    return entropy(np.bincount(coded, weights=counts)) + layout.unit_rows


def choose_windows(counts: NDArray[np.int64], split: Split) -> tuple[int, ...] | None:
    """The windows of the shortest code for floats, where each begins, or None if the split cannot hold them.

    Args:
        counts: histogram of the high bytes without their signs, [128].
        split: says how many windows there can be, and how wide they are.
    """
    values = np.flatnonzero(counts).tolist() or [0]
    most, width = 1 << split.coded_bits - (split.raw_bits == 0), 1 << max(0, split.raw_bits - 1)
    if width == 1:
        return tuple(values) if len(values) <= most else None
    before = np.concatenate([[0], np.cumsum(counts[values])]).tolist()

    def saved(first: int, last: int) -> float:
        count = before[last] - before[first]
        return count * float(np.log2(max(1, count)))

    # by the number of values that are covered: what is saved, and the windows
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(most):
        longer = dict(best)
        for first, (sum_saved, windows) in best.items():
            for last in range(first + 1, len(values) + 1):
                if values[last - 1] - values[first] >= width:
                    break
                found = sum_saved + saved(first, last), (*windows, values[first])
                longer[last] = max(longer.get(last, found), found)
        best = longer
    return best[len(values)][1] if len(values) in best else None
