"""The reference decoder: docs/format.md line by line in plain numpy, a group at a time. Slow, and meant to be read.

It takes the parameters of a layer and its arrays and shares no table, no index computation and no code with the
encoder or with the compiled decoder, which are tested against it.
"""

import numpy as np
from numpy.typing import NDArray

from rans_kernels.format import FormatError, TileLayout


def decode_reference(
    layout: TileLayout, stream: NDArray[np.int32], offsets: NDArray[np.int32], freqs: NDArray[np.int16]
) -> NDArray[np.int8]:
    """Decode a weight matrix: int8 [N, K]. Arguments and errors as `decode_tiles`."""
    layout.check(len(stream), offsets, freqs)
    n, k = layout.shape
    tiles_n, tiles_k = (n + 255) // 256, (k + 255) // 256
    padded = np.zeros((tiles_n * 256, tiles_k * 256), np.int8)
    groups = layout.lanes // 32
    for index in range(tiles_n * tiles_k * groups):
        tile, group = divmod(index, groups)
        tile_row, tile_column = tile // tiles_k * 256, tile % tiles_k * 256
        block = stream[offsets[index] : offsets[index + 1]]
        origins = [
            (row + tile_row, column + tile_column)
            for row, column in _unit_origins(group, groups)
            if row + tile_row < n and column + tile_column < k
        ]
        if not origins:
            continue
        raw, words = _raw_plane(block, layout, group, groups, tile_row, tile_column)
        coded = _coded_bits(block[:2].view(np.uint32).reshape(32), words, len(origins), layout, freqs)
        weights = _combine(coded, raw, layout)
        lane = np.arange(32)
        for unit, (row, column) in enumerate(origins):
            for e in range(16):
                j, i = divmod(e, 4)
                r = row + lane // 4 + 8 * (i // 2)
                c = column + 16 * (j // 2) + 8 * (j % 2) + 2 * (lane % 4) + i % 2
                padded[r, c] = weights[unit, e]
    return padded[:n, :k].copy()


def _unit_origins(group: int, groups: int) -> list[tuple[int, int]]:
    """First row and column in the tile of each unit of a group, in stream order."""
    if groups == 32:
        return [(group // 2 * 16, group % 2 * 128 + 32 * u) for u in range(4)]
    blocks = 16 // groups
    return [((group * blocks + u % blocks) * 16, u // blocks * 32) for u in range(8 * blocks)]


def _raw_plane(
    block: NDArray[np.int32], layout: TileLayout, group: int, groups: int, tile_row: int, tile_column: int
) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Raw bits [live units, 16, 32] and the words [rows, 32] that follow them."""
    bits = layout.split.raw_bits
    origins = _unit_origins(group, groups)
    live = [tile_row + r < layout.shape[0] and tile_column + c < layout.shape[1] for r, c in origins]
    planes, row = [], 2
    for pair in range(0, len(origins), 2):
        if not (live[pair] or live[pair + 1]):
            continue
        packed = block[row : row + 2 * bits].view(np.uint32).reshape(bits, 32).astype(np.int64)
        row += 2 * bits
        for h in range(2):
            if not live[pair + h]:
                continue
            raw = np.zeros((16, 32), np.int64)
            for e in range(16):
                j, i = divmod(e, 4)
                first, shift = 0, 0
                if bits & 4:
                    raw[e] |= (packed[2 * h + j // 2] >> (8 * i + 4 * (j % 2))) & 15
                    first, shift = 4, 4
                if bits & 2:
                    raw[e] |= ((packed[first + h] >> (8 * i + 2 * j)) & 3) << shift
                    first, shift = first + 2, shift + 2
                if bits & 1:
                    raw[e] |= ((packed[first] >> (8 * i + 4 * h + j)) & 1) << shift
            planes.append(raw)
    return np.array(planes), np.ascontiguousarray(block[row:]).view(np.uint16).reshape(-1, 32)


def _coded_bits(
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
    units: int,
    layout: TileLayout,
    freqs: NDArray[np.int16],
) -> NDArray[np.int64]:
    """Coded bits of every weight of a group: [units, 16, 32]."""
    c, precision = layout.split.coded_bits, layout.probability_bits
    freq = freqs.astype(np.int64)
    start = np.cumsum(freq) - freq
    symbol_of_slot = np.repeat(np.arange(256), freq)
    x, lane, used = states.astype(np.int64), np.arange(32), np.zeros(32, np.int64)
    coded = np.empty((units, 2 * c, 8 // c, 32), np.int64)
    for unit in range(units):
        for s in range(2 * c):
            slot = x % (1 << precision)
            symbol = symbol_of_slot[slot]
            x = freq[symbol] * (x >> precision) + slot - start[symbol]
            short = x < 1 << 16
            if np.any(used[short] >= len(words)):
                raise FormatError("a stream's words end before its symbols do")
            x[short] = (x[short] << 16) + words[used[short], lane[short]]
            used += short
            for b in range(8 // c):
                coded[unit, s, b] = (symbol >> (b * c)) & ((1 << c) - 1)
    if np.any(x != 1 << 16):
        raise FormatError("a stream does not end in the start state")
    if used.max() != len(words):
        raise FormatError("words of a stream are left over")
    return coded.reshape(units, 16, 32)


def _combine(coded: NDArray[np.int64], raw: NDArray[np.int64], layout: TileLayout) -> NDArray[np.int8]:
    """Weights from their coded and raw bits."""
    c, r = layout.split.coded_bits, layout.split.raw_bits
    if c > 1:
        return (((coded << r) | raw) - (1 << (c + r - 1))).astype(np.int8)
    half = 1 << (r - 1)
    # outside [-half, half) lie [half, 2 half) and [-2 half, -half): raw is the weight modulo 2 half
    outside = np.where(raw >= half, raw, raw - 2 * half)
    return np.where(coded == 1, outside, raw - half).astype(np.int8)
