"""The encoder: tiles of a weight matrix to rANS streams, compiled by numba, parallel over runs of tiles.

rANS works like a stack, so symbols are encoded last to first and words written from the back; the decoder then reads
both forwards. See Duda, "Asymmetric numeral systems" (2013), and Giesen, "Interleaved entropy coders" (2014).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rans_kernels.coder.tables import cumulative, normalise_frequencies
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
"""Tiles a thread encodes before it hands on: a megabyte of weights, which fits the caches."""


@dataclass(frozen=True)
class EncodedTensor:
    """A weight matrix as stored.

    Attributes:
        layout: what the decoder must know.
        stream: int32 [rows, 16]; the last row is a guard of zeros, so that decoders may load one row ahead.
        offsets: int32 [tiles * groups + 1], first row of every group.
        freqs: int16 [256].
    """

    layout: TileLayout
    stream: NDArray[np.int32]
    offsets: NDArray[np.int32]
    freqs: NDArray[np.int16]

    @property
    def nbytes(self) -> int:
        """Everything stored, but for the scales."""
        return self.stream.nbytes + self.offsets.nbytes + self.freqs.nbytes


def encode_tiles(weights: NDArray[np.int8], layout: TileLayout, workers: int | None = None) -> EncodedTensor:
    """Encode a weight matrix.

    Args:
        weights: int8 [N, K], within the range of the layout's split.
        layout: of the same shape.
        workers: threads; None takes every core.

    Raises:
        FormatError: wrong dtype or shape, a weight out of range, or more than 2^31 rows.
    """
    if weights.dtype != np.int8 or weights.shape != layout.shape:
        raise FormatError(f"expected int8 weights of shape {layout.shape}, got {weights.dtype} {weights.shape}")
    if weights.size and not layout.split.holds(int(weights.min()), int(weights.max())):
        low = layout.split.low
        raise FormatError(
            f"weights from {weights.min()} to {weights.max()} do not fit split {layout.split} ({low} to {-low - 1})"
        )
    weights = np.ascontiguousarray(weights)
    tables = _SplitTables(layout)
    runs = [(t, min(t + RUN_TILES, layout.tiles)) for t in range(0, layout.tiles, RUN_TILES)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        counts = sum(pool.map(lambda run: tables.count(weights, run), runs), np.zeros(256, np.int64))
        freqs = normalise_frequencies(counts, layout.probability_bits)
        encoded = list(pool.map(lambda run: tables.encode(weights, run, freqs), runs))
    sizes = np.concatenate([np.zeros(1, np.int64), *(size for _, size in encoded)])
    offsets = np.cumsum(sizes)
    if offsets[-1] >= 2**31:
        raise FormatError(f"a layer of shape {layout.shape} needs more than 2^31 rows")
    stream = np.concatenate([*(rows for rows, _ in encoded), np.zeros((1, ROW_INTS), np.int32)])
    return EncodedTensor(layout, stream, offsets.astype(np.int32), freqs)


class _SplitTables:
    """Look-up tables of one layout, in the form the compiled loops take."""

    def __init__(self, layout: TileLayout):
        self.layout = layout
        coded, raw = layout.split.parts(np.arange(-128, 128))
        # indexed by the weight's byte
        self.coded, self.raw = np.roll(coded, 128), np.roll(raw, 128)
        positions = lane_positions()
        # lane-minor, the order symbols are produced in
        self.position = np.ascontiguousarray((positions[..., 0] * TILE + positions[..., 1]).T)
        self.fields = raw_fields(layout.split.raw_bits)

    def _symbol_args(self) -> tuple:
        split = self.layout.split
        return self.layout.unit_origin, self.position, self.coded, split.coded_bits, self.layout.unit_symbols

    def count(self, weights: NDArray[np.int8], run: tuple[int, int]) -> NDArray[np.int64]:
        """Histogram of the symbols of tiles run[0] to run[1]."""
        return _count_symbols(weights, *run, self.layout.tile_grid[1], *self._symbol_args())

    def encode(
        self, weights: NDArray[np.int8], run: tuple[int, int], freqs: NDArray[np.int16]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Rows of tiles run[0] to run[1], [rows, 16], and the rows of every group."""
        layout, (begin, end) = self.layout, run
        group_symbols = layout.units * layout.unit_symbols
        head = layout.head_rows[begin * layout.groups : end * layout.groups]
        # no symbol needs more than probability_bits; one row to spare for the store that is not counted
        words = -(-group_symbols * layout.probability_bits // 16) + 2
        out = np.empty((int(head.sum()) + len(head) * words, ROW_INTS), np.int32)
        f, precision = freqs.astype(np.int64), layout.probability_bits
        inverse = 1.0 / np.maximum(f, 1)
        sizes = np.empty(len(head), np.int64)
        rows = _encode_run(  # type: ignore[call-arg]
            weights, begin, end, layout.tile_grid[1], *self._symbol_args(), self.raw, layout.split.raw_bits,
            *self.fields,
            f << (32 - precision), cumulative(freqs)[:256], (1 << precision) - f, inverse, words,
            out.view(np.uint32), out.view(np.uint16), sizes,
        )  # fmt: skip
        return out[:rows].copy(), sizes


@njit(nogil=True, cache=True)
def _copy_tile(weights, tile, tiles_k, out):
    """Copy a tile, padded with zeros, and give its rows and columns."""
    first_n, first_k = tile // tiles_k * TILE, tile % tiles_k * TILE
    rows = min(TILE, weights.shape[0] - first_n)
    columns = min(TILE, weights.shape[1] - first_k)
    if rows < TILE or columns < TILE:
        out[:] = 0
    for r in range(rows):
        for c in range(columns):
            out[r * TILE + c] = np.uint8(weights[first_n + r, first_k + c])
    return rows, columns


@njit(nogil=True, cache=True)
def _unit_symbols(tile, origin, position, coded, coded_bits, unit_symbols, out):
    """Symbols [unit_symbols, 32] of one unit."""
    per_symbol = UNIT_WEIGHTS // unit_symbols
    for s in range(unit_symbols):
        for lane in range(GROUP_LANES):
            symbol = 0
            for b in range(per_symbol):
                w = tile[origin + position[s * per_symbol + b, lane]]
                symbol |= coded[w] << (b * coded_bits)
            out[s, lane] = symbol


@njit(nogil=True, cache=True)
def _count_symbols(weights, begin, end, tiles_k, unit_origin, position, coded, coded_bits, unit_symbols):
    counts = np.zeros(256, np.int64)
    tile = np.empty(TILE * TILE, np.uint8)
    symbols = np.empty((unit_symbols, GROUP_LANES), np.uint8)
    for t in range(begin, end):
        rows, columns = _copy_tile(weights, t, tiles_k, tile)
        for g in range(unit_origin.shape[0]):
            for u in range(unit_origin.shape[1]):
                row, column = unit_origin[g, u, 0], unit_origin[g, u, 1]
                if row < rows and column < columns:
                    _unit_symbols(tile, row * TILE + column, position, coded, coded_bits, unit_symbols, symbols)
                    for s in range(unit_symbols):
                        for lane in range(GROUP_LANES):
                            counts[symbols[s, lane]] += 1
    return counts


@njit(nogil=True, cache=True)
def _pack_raw(tile, origin, position, raw, half, field_shift, field_width, field_word, field_bit, out):
    """Or the raw bits of one unit, `half` 0 or 1 of its pair, into the pair's words [raw_bits, 32]."""
    for f in range(len(field_shift)):
        mask = (1 << field_width[f]) - 1
        for e in range(UNIT_WEIGHTS):
            word, bit = field_word[f, half, e], field_bit[f, half, e]
            for lane in range(GROUP_LANES):
                field = (raw[tile[origin + position[e, lane]]] >> field_shift[f]) & mask
                out[word, lane] |= np.uint32(field << bit)


@njit(nogil=True, cache=True)
def _encode_group(symbols, count, limits, starts, complements, inverse, buffer, states, used):
    """Encode `count` symbols a lane, last to first; words fill `buffer` from its end.

    Without branches, which would be mispredicted as often as a word is written: the word is always stored, and counted
    if it was due. x' = (x // f << precision) + x % f + start = x + x // f * (2 ** precision - f) + start.
    """
    last = len(buffer) - 1
    for lane in range(GROUP_LANES):
        states[lane] = STATE_LOW
        used[lane] = 0
    for s in range(count - 1, -1, -1):
        for lane in range(GROUP_LANES):
            symbol, x = symbols[s, lane], states[lane]
            due = np.int64(x >= limits[symbol])
            buffer[last - used[lane], lane] = np.uint16(x & 0xFFFF)
            used[lane] += due
            x >>= due << 4
            # exact: x < 2^32, and (x + 0.5) / f is at least 0.5 / 4096 away from an integer
            quotient = np.int64((x + 0.5) * inverse[symbol])
            states[lane] = x + quotient * complements[symbol] + starts[symbol]


@njit(nogil=True, cache=True)
def _encode_run(
    weights, begin, end, tiles_k, unit_origin, position, coded, coded_bits, unit_symbols, raw, raw_bits,
    field_shift, field_width, field_word, field_bit, limits, starts, complements, inverse, words, out, out16, sizes,
):  # fmt: skip
    """Encode tiles begin to end into `out` (uint32) and its view `out16`; returns the rows written."""
    groups, units = unit_origin.shape[0], unit_origin.shape[1]
    tile = np.empty(TILE * TILE, np.uint8)
    symbols = np.empty((units * unit_symbols, GROUP_LANES), np.uint8)
    pair_raw = np.empty((raw_bits, GROUP_LANES), np.uint32)
    buffer = np.empty((words, GROUP_LANES), np.uint16)
    states, used = np.empty(GROUP_LANES, np.int64), np.empty(GROUP_LANES, np.int64)
    row = 0
    for t in range(begin, end):
        rows, columns = _copy_tile(weights, t, tiles_k, tile)
        for g in range(groups):
            first, count, head = row, 0, row + STATE_ROWS
            for pair in range(0, units, 2):
                pair_raw[:] = 0
                live = False
                for half in range(2):
                    r, c = unit_origin[g, pair + half, 0], unit_origin[g, pair + half, 1]
                    if r < rows and c < columns:
                        live = True
                        origin = r * TILE + c
                        unit = symbols[count : count + unit_symbols]
                        _unit_symbols(tile, origin, position, coded, coded_bits, unit_symbols, unit)
                        count += unit_symbols
                        _pack_raw(
                            tile, origin, position, raw, half,
                            field_shift, field_width, field_word, field_bit, pair_raw,
                        )  # fmt: skip
                if live:
                    for word in range(raw_bits):
                        for lane in range(GROUP_LANES):
                            out[head + lane // ROW_INTS, lane % ROW_INTS] = pair_raw[word, lane]
                        head += 2
            if count:
                _encode_group(symbols, count, limits, starts, complements, inverse, buffer, states, used)
                longest = 0
                for lane in range(GROUP_LANES):
                    out[row + lane // ROW_INTS, lane % ROW_INTS] = np.uint32(states[lane])
                    longest = max(longest, used[lane])
                for i in range(longest):
                    for lane in range(GROUP_LANES):
                        n = used[lane]
                        out16[head + i, lane] = buffer[words - n + i, lane] if i < n else 0
                row = head + longest
            sizes[(t - begin) * groups + g] = row - first
    return row
