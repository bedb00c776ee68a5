"""The reference decoder: docs/format.md line by line in plain numpy, a tile at a time. Slow, and meant to be read.

It takes the parameters of a layer and its arrays and shares no table, no index computation and no code with the
encoder or with the compiled decoder, which are tested against it.
"""

import numpy as np
from numpy.typing import NDArray

from rans_kernels.format import FormatError, TileLayout


def decode_reference(
    layout: TileLayout,
    heads: NDArray[np.int32],
    words: NDArray[np.int16],
    offsets: NDArray[np.int32],
    freqs: NDArray[np.int16],
) -> NDArray[np.int8] | NDArray[np.uint16]:
    """Decode a weight matrix: int8 [N, K], or of floats their bits, uint16. Arguments and errors as `decode_tiles`."""
    layout.check(len(heads), len(words), offsets, freqs)
    # of the matrix that is coded
    n, k = layout.shape[0] // layout.fold, layout.shape[1] * layout.fold
    panels, panel_units = (n + 15) // 16, (k + 63) // 64
    padded = np.zeros((panels * 16, panel_units * 64), np.uint16 if layout.is_float else np.int8)
    lane, head, tile = np.arange(32), 0, 0
    for panel in range(panels):
        for first in range(0, panel_units, layout.units):
            units = min(layout.units, panel_units - first)
            states = heads[head].view(np.uint32)
            unit_rows = layout.split.raw_bits + (8 if layout.is_float else 0)
            rows = heads[head + 1 : head + 1 + units * unit_rows].view(np.uint32).reshape(units, -1)
            planes, low = rows[:, : 32 * layout.split.raw_bits], rows[:, 32 * layout.split.raw_bits :]
            stream = words[offsets[tile] : offsets[tile + 1]].view(np.uint16).reshape(-1)
            coded = _coded_bits(states, stream, units, layout, freqs)
            raw = _raw_bits(planes, layout.split.raw_bits)
            weights = _combine_floats(coded, raw, low, layout) if layout.is_float else _combine(coded, raw, layout)
            for u in range(units):
                for e in range(32):
                    h, r, c = e // 16, e // 8 % 2, e % 8
                    row = 16 * panel + lane // 4 + 8 * r
                    column = 64 * (first + u) + 32 * h + 8 * (lane % 4) + c
                    padded[row, column] = weights[u, e]
            head += 1 + units * unit_rows
            tile += 1
    return padded[:n, :k].copy().reshape(layout.shape)


def _raw_bits(planes: NDArray[np.uint32], raw_bits: int) -> NDArray[np.int64]:
    """Raw bits of every weight of a tile, [units, 32 weights, 32 lanes], from its planes [units, raw_bits * 32]."""
    lane = np.arange(32)
    raw = np.zeros((len(planes), 32, 32), np.int64)
    if not raw_bits:
        return raw
    # the words of a lane, group by group
    words, first = [], 0
    for group in (4, 2, 1):
        if raw_bits & group:
            words += [planes[:, 32 * first + group * lane + v].astype(np.int64) for v in range(group)]
            first += group
    whole = 8 // raw_bits
    for e in range(32):
        j, i = divmod(e, 4)
        if j < whole * raw_bits:
            raw[:, e] = words[j // whole] >> (8 * i + j % whole * raw_bits) & ((1 << raw_bits) - 1)
            continue
        for b in range(raw_bits):
            v, above = divmod((j - whole * raw_bits) * raw_bits + b, 8 - whole * raw_bits)
            raw[:, e] |= (words[v] >> (8 * i + whole * raw_bits + above) & 1) << b
    return raw


def _coded_bits(
    states: NDArray[np.uint32],
    stream: NDArray[np.uint16],
    units: int,
    layout: TileLayout,
    freqs: NDArray[np.int16],
) -> NDArray[np.int64]:
    """Coded bits of every weight of a tile: [units, 32 weights, 32 lanes]."""
    c, precision = layout.split.coded_bits, layout.probability_bits
    freq = freqs.astype(np.int64)
    start = np.cumsum(freq) - freq
    symbol_of_slot = np.repeat(np.arange(256), freq)
    x, taken = states.astype(np.int64), 0
    coded = np.empty((units, 4 * c, 8 // c, 32), np.int64)
    for unit in range(units):
        for s in range(4 * c):
            slot = x % (1 << precision)
            symbol = symbol_of_slot[slot]
            x = freq[symbol] * (x >> precision) + slot - start[symbol]
            short = np.flatnonzero(x < 1 << 16)
            if taken + len(short) > len(stream):
                raise FormatError("a tile's words end before its symbols do")
            x[short] = (x[short] << 16) + stream[taken : taken + len(short)]
            taken += len(short)
            for b in range(8 // c):
                coded[unit, s, b] = (symbol >> (b * c)) & ((1 << c) - 1)
    if np.any(x != 1 << 16):
        raise FormatError("a lane does not end in the start state")
    if len(stream) - taken >= 8:
        raise FormatError("words of a tile are left over")
    return coded.reshape(units, 32, 32)


def _combine(coded: NDArray[np.int64], raw: NDArray[np.int64], layout: TileLayout) -> NDArray[np.int8]:
    """Weights from their coded and raw bits."""
    c, r = layout.split.coded_bits, layout.split.raw_bits
    if c > 1:
        return (((coded << r) | raw) - (1 << (c + r - 1))).astype(np.int8)
    half = 1 << (r - 1)
    # outside [-half, half) lie [half, 2 half) and [-2 half, -half): raw is the weight modulo 2 half
    outside = np.where(raw >= half, raw, raw - 2 * half)
    return np.where(coded == 1, outside, raw - half).astype(np.int8)


def _combine_floats(
    coded: NDArray[np.int64], raw: NDArray[np.int64], low: NDArray[np.uint32], layout: TileLayout
) -> NDArray[np.uint16]:
    """Bits of floats, [units, 32 weights, 32 lanes], from their coded and raw bits and the words of their low bytes."""
    r, lane = layout.split.raw_bits, np.arange(32)
    bits, windows = np.empty(coded.shape, np.uint16), np.zeros(256, np.int64)
    windows[: len(layout.windows)] = layout.windows
    for e in range(32):
        j, i = divmod(e, 4)
        u = coded[:, e] << r | raw[:, e]
        # raw signs stand with the next weight of the four
        sign = raw[:, 4 * j + (i + 1) % 4] % 2 if r else u % 2
        word = low[:, 128 * (j // 4) + 4 * lane + j % 4]
        window, place = np.divmod(u // 2, 2 ** max(0, r - 1))
        bits[:, e] = sign << 15 | (windows[window] + place) % 128 << 8 | word >> (8 * i) & 0xFF
    return bits
