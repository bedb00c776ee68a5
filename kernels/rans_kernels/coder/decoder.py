"""The CPU decoder: compiled, parallel over tiles, bounds-checked. Shares nothing with the encoder but the format."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rans_kernels.format import (
    GROUP_LANES,
    ROW_INTS,
    STATE_LOW,
    STATE_ROWS,
    TILE,
    UNIT_WEIGHTS,
    FormatError,
    TileLayout,
    lane_positions,
    raw_fields,
)

RUN_TILES = 16
_TOO_SHORT, _NOT_AT_START, _WORDS_LEFT = 1, 2, 3
_FAULTS = {
    _TOO_SHORT: "its words end before its symbols do",
    _NOT_AT_START: "it does not end in the start state",
    _WORDS_LEFT: "words are left over",
}


def decode_tiles(
    layout: TileLayout,
    stream: NDArray[np.int32],
    offsets: NDArray[np.int32],
    freqs: NDArray[np.int16],
    workers: int | None = None,
) -> NDArray[np.int8]:
    """Decode a weight matrix: int8 [N, K].

    Args:
        layout: shape, split, lanes and precision.
        stream: int32 [rows, 16].
        offsets: int32 [tiles * groups + 1].
        freqs: int16 [256].
        workers: threads; None takes every core.

    Raises:
        FormatError: the stream is damaged; nothing outside it was read.
    """
    if stream.dtype != np.int32 or stream.ndim != 2 or stream.shape[1] != ROW_INTS or not len(stream):
        raise FormatError(f"a stream is int32 [rows, {ROW_INTS}], got {stream.dtype} {stream.shape}")
    layout.check(len(stream), offsets, freqs)
    stream = np.ascontiguousarray(stream)
    out = np.empty(layout.shape, np.int8)
    slots = _slots(freqs)
    values = _values(layout)
    positions = lane_positions()
    args = (
        stream.view(np.uint32), stream.view(np.uint16), offsets.astype(np.int64), *slots, layout.probability_bits,
        layout.tile_grid[1], layout.unit_origin, positions, layout.split.coded_bits, layout.split.raw_bits, values,
        *raw_fields(layout.split.raw_bits), out,
    )  # fmt: skip
    runs = [(t, min(t + RUN_TILES, layout.tiles)) for t in range(0, layout.tiles, RUN_TILES)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for fault, tile in pool.map(lambda run: _decode_run(*run, *args), runs):  # type: ignore[call-arg]
            if fault:
                raise FormatError(f"the stream of tile {tile} is damaged: {_FAULTS[fault]}")
    return out


def _slots(freqs: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Symbol, frequency and offset within the symbol, of every slot."""
    wide = freqs.astype(np.int64)
    symbol = np.repeat(np.arange(256), wide)
    start = np.cumsum(wide) - wide
    return symbol.astype(np.uint8), wide[symbol], np.arange(len(symbol)) - start[symbol]


def _values(layout: TileLayout) -> NDArray[np.int8]:
    """Weight for coded << raw_bits | raw."""
    c, r = layout.split.coded_bits, layout.split.raw_bits
    code = np.arange(1 << (c + r))
    if c > 1:
        return (code - (1 << (c + r - 1))).astype(np.int8)
    half = 1 << (r - 1)
    coded, raw = code >> r, code & (2 * half - 1)
    return (((raw + half) ^ (coded * half)) - 2 * half).astype(np.int8)


@njit(nogil=True, cache=True)
def _decode_run(
    begin, end, stream, stream16, offsets, slot_symbol, slot_freq, slot_offset, probability_bits,
    tiles_k, unit_origin, position, coded_bits, raw_bits, values,
    field_shift, field_width, field_word, field_bit, out,
):  # fmt: skip
    """Decode tiles begin to end into `out`; (fault, tile), fault 0 if all is well."""
    groups, units = unit_origin.shape[0], unit_origin.shape[1]
    per_symbol = 8 // coded_bits
    unit_symbols = UNIT_WEIGHTS // per_symbol
    coded_mask = (1 << coded_bits) - 1
    slot_mask = (1 << probability_bits) - 1
    state, next_row = np.empty(GROUP_LANES, np.int64), np.empty(GROUP_LANES, np.int64)
    code = np.empty((UNIT_WEIGHTS, GROUP_LANES), np.uint8)
    for tile in range(begin, end):
        first_n, first_k = tile // tiles_k * TILE, tile % tiles_k * TILE
        rows, columns = min(TILE, out.shape[0] - first_n), min(TILE, out.shape[1] - first_k)
        for g in range(groups):
            row, end_row = offsets[tile * groups + g], offsets[tile * groups + g + 1]
            if row == end_row:
                continue
            raw_row, pairs = row + STATE_ROWS, 0
            for p in range(0, units, 2):
                for half in range(2):
                    if unit_origin[g, p + half, 0] < rows and unit_origin[g, p + half, 1] < columns:
                        pairs += 1
                        break
            for lane in range(GROUP_LANES):
                state[lane] = stream[row + lane // ROW_INTS, lane % ROW_INTS]
                next_row[lane] = raw_row + 2 * raw_bits * pairs
            for u in range(units):
                r0, c0 = unit_origin[g, u, 0], unit_origin[g, u, 1]
                if r0 < rows and c0 < columns:
                    for s in range(unit_symbols):
                        for lane in range(GROUP_LANES):
                            x = state[lane]
                            slot = x & slot_mask
                            symbol = slot_symbol[slot]
                            x = slot_freq[slot] * (x >> probability_bits) + slot_offset[slot]
                            # no branch, it would be mispredicted: a word is always loaded, the guard row's at worst
                            due = np.int64(x < STATE_LOW)
                            word = np.int64(stream16[min(next_row[lane], end_row), lane])
                            state[lane] = (x << (due << 4)) | (word & -due)
                            next_row[lane] += due
                            for b in range(per_symbol):
                                coded = (symbol >> (b * coded_bits)) & coded_mask
                                code[s * per_symbol + b, lane] = coded << raw_bits
                    for f in range(len(field_shift)):
                        mask = (1 << field_width[f]) - 1
                        for e in range(UNIT_WEIGHTS):
                            word, bit = field_word[f, u % 2, e], field_bit[f, u % 2, e]
                            for lane in range(GROUP_LANES):
                                packed = stream[raw_row + 2 * word + lane // ROW_INTS, lane % ROW_INTS]
                                code[e, lane] |= ((packed >> bit) & mask) << field_shift[f]
                    inside = r0 + 16 <= rows and c0 + 32 <= columns
                    for lane in range(GROUP_LANES):
                        for e in range(UNIT_WEIGHTS):
                            r, c = r0 + position[lane, e, 0], c0 + position[lane, e, 1]
                            if inside or (r < rows and c < columns):
                                out[first_n + r, first_k + c] = values[code[e, lane]]
                if u % 2:
                    r1, c1 = unit_origin[g, u - 1, 0], unit_origin[g, u - 1, 1]
                    if (r0 < rows and c0 < columns) or (r1 < rows and c1 < columns):
                        raw_row += 2 * raw_bits
            longest = raw_row
            for lane in range(GROUP_LANES):
                if next_row[lane] > end_row:
                    return _TOO_SHORT, tile
                if state[lane] != STATE_LOW:
                    return _NOT_AT_START, tile
                longest = max(longest, next_row[lane])
            if longest != end_row:
                return _WORDS_LEFT, tile
    return 0, 0
