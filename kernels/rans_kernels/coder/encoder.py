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

from rans_kernels.coder.tables import byte_histogram, cumulative, high_bytes, normalise_frequencies
from rans_kernels.format import (
    FLOATS,
    LANE_WEIGHTS,
    LANES,
    ROW_WORDS,
    STATE_LOW,
    UNIT_COLUMNS,
    UNIT_ROWS,
    FormatError,
    TileLayout,
    lane_positions,
    raw_pieces,
)

RUN_UNITS = 1024
"""Units a thread encodes before it hands on: a megabyte of weights, which fits the caches."""


@dataclass(frozen=True)
class EncodedTensor:
    """A weight matrix as stored.

    Attributes:
        layout: what the decoder must know.
        heads: int32 [layout.head_rows, 32], states and raw planes.
        words: int16 [rows, 8], every tile's words from a row of its own.
        offsets: int32 [tiles + 1], first row of every tile's words, and the end.
        freqs: int16 [256].
    """

    layout: TileLayout
    heads: NDArray[np.int32]
    words: NDArray[np.int16]
    offsets: NDArray[np.int32]
    freqs: NDArray[np.int16]

    @property
    def nbytes(self) -> int:
        """Everything stored, but for the scales."""
        return self.heads.nbytes + self.words.nbytes + self.offsets.nbytes + self.freqs.nbytes


def encode_tiles(weights: NDArray[np.integer], layout: TileLayout, workers: int | None = None) -> EncodedTensor:
    """Encode a weight matrix.

    Args:
        weights: int8 [N, K], or uint16, the bits of floats, within the range of the layout's split.
        layout: of the same shape; says whether the weight is folded.
        workers: threads; None takes every core.

    Raises:
        FormatError: wrong dtype or shape, a weight out of range, or 2^31 or more rows.
    """
    expected = np.dtype(np.uint16 if layout.is_float else np.int8)
    if weights.dtype != expected or weights.shape != layout.shape:
        raise FormatError(f"expected {expected} weights of shape {layout.shape}, got {weights.dtype} {weights.shape}")
    encoder = (_FloatEncoder if layout.is_float else _IntegerEncoder)(weights.reshape(layout.coded_shape), layout)
    step = max(1, RUN_UNITS // layout.units)
    runs = [range(t, min(t + step, layout.tiles)) for t in range(0, layout.tiles, step)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        counts = sum(pool.map(encoder.count, runs), np.zeros(256, np.int64))
        freqs = normalise_frequencies(counts, layout.probability_bits)
        encoded = list(pool.map(lambda run: encoder.encode(run, freqs), runs))
        encoder.store_low(pool)
    offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *(sizes for _, sizes in encoded)]))
    if offsets[-1] >= 2**31:
        raise FormatError(f"a layer of shape {layout.shape} needs more than 2^31 rows")
    words = np.concatenate([np.empty((0, ROW_WORDS), np.int16), *(rows for rows, _ in encoded)])
    return EncodedTensor(layout, encoder.heads, words, offsets.astype(np.int32), freqs)


class _Encoder:
    """A matrix of bytes, the heads of its tiles, and look-up tables in the form the compiled loops take."""

    def __init__(self, weights: NDArray[np.integer], layout: TileLayout, codes: NDArray[np.uint8], outside: int):
        """Args: weights: or high bytes. codes: of every byte. outside: the byte that stands around the matrix."""
        self.weights, self.layout = weights, layout
        self.units = layout.most_units
        self.heads = np.empty((layout.head_rows, LANES), np.int32)
        self.codes = np.append(codes, codes[outside])
        # weights 4 j to 4 j + 3 of a lane stand side by side, a quad of 32 bits
        row, column = np.moveaxis(lane_positions()[:, ::4], -1, 0)
        self.quads = np.ascontiguousarray((row * self.units * UNIT_COLUMNS + column).T // 4)
        self.pieces = raw_pieces(layout.split.raw_bits)

    def _run(self, run: range) -> tuple:
        """What the compiled loops need to know of a run's tiles."""
        layout, split = self.layout, self.layout.split
        places = np.array([[*divmod(t, layout.grid[1]), layout.tile_units(t)] for t in run])
        return self.weights, places, self.units, self.codes, self.quads, split.coded_bits, split.raw_bits

    def count(self, run: range) -> NDArray[np.int64]:
        """Histogram of the symbols of a run of tiles."""
        return _count_symbols(*self._run(run))

    def encode(self, run: range, freqs: NDArray[np.int16]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Words of a run of tiles, [rows, 8], and the rows of each; fills in the heads."""
        layout, f = self.layout, freqs.astype(np.int64)
        head_rows = np.array([layout.head_row(t) for t in run])
        # a symbol takes at most a word, and one row to spare for the store that is not counted
        most = self.units * layout.unit_symbols * LANES + ROW_WORDS
        out = np.empty((len(run) * most // ROW_WORDS, ROW_WORDS), np.int16)
        sizes = np.empty(len(run), np.int64)
        rows = _encode_run(  # type: ignore[call-arg]
            *self._run(run), *self.pieces, f, cumulative(freqs)[:256], 1 / np.maximum(f, 1), layout.probability_bits,
            most, head_rows, layout.unit_rows, layout.is_float,
            self.heads.view(np.uint32).reshape(-1), out.view(np.uint16).reshape(-1), sizes,
        )  # fmt: skip
        return out[:rows].copy(), sizes

    def store_low(self, pool: ThreadPoolExecutor) -> None:
        """Store the low bytes; integers have none."""


class _IntegerEncoder(_Encoder):
    """Of int8."""

    def __init__(self, weights: NDArray[np.integer], layout: TileLayout):
        split = layout.split
        if weights.size and not split.holds(int(weights.min()), int(weights.max())):
            raise FormatError(
                f"weights from {weights.min()} to {weights.max()} do not fit split {split} "
                f"({split.low} to {-split.low - 1})"
            )
        coded, raw = split.parts(np.arange(-128, 128))
        # by the weight's byte; what lies outside the split's range is never looked up
        codes = np.roll(coded << split.raw_bits | raw, 128)
        super().__init__(np.ascontiguousarray(weights), layout, codes, 0)


class _FloatEncoder(_Encoder):
    """Of 16-bit floats: their high bytes; low bytes go to the heads as they are."""

    def __init__(self, bits: NDArray[np.integer], layout: TileLayout):
        self.bits, high = bits, high_bytes(bits)
        counts = byte_histogram(high)
        codes = layout.float_codes()
        if outside := np.flatnonzero((counts > 0) & (codes < 0)).tolist():
            raise FormatError(
                f"weights with the high byte {outside[0] % 128} are in none of the windows {layout.windows} "
                f"of split {layout.split}"
            )
        # the cheapest, but finite: kernels multiply what is beyond the last column by 0
        finite = counts * (np.arange(256) % 128 < FLOATS[layout.dtype])
        usual = int(np.argmax(finite if finite.any() else counts))
        super().__init__(high.view(np.int8), layout, codes.astype(np.uint8), usual)

    def store_low(self, pool: ThreadPoolExecutor) -> None:
        """Store the low bytes, some panels at a time."""
        panels, units = self.layout.grid[0], self.layout.panel_units
        if not self.layout.tiles:
            return
        heads, rows = self.heads.reshape(panels, -1, LANES), self.layout.low_rows()
        step = max(1, RUN_UNITS // units)

        def store(first: int) -> None:
            target = heads[first : first + step]
            low = self.bits[first * UNIT_ROWS : (first + step) * UNIT_ROWS].astype(np.uint8)
            padded = np.zeros((len(target) * UNIT_ROWS, units * UNIT_COLUMNS), np.uint8)
            padded[: low.shape[0], : low.shape[1]] = low
            # [panel, r, lane // 4, unit, h, lane % 4]: the eight columns of a lane's row at once (lane_positions)
            eights = padded.view(np.uint64).reshape(-1, 2, 8, units, 2, 4).transpose(0, 3, 4, 2, 5, 1)
            target[:, rows] = np.ascontiguousarray(eights).view(np.int32).reshape(len(target), *rows.shape, LANES)

        list(pool.map(store, range(0, panels, step)))


@njit(nogil=True, cache=True)
def _copy_codes(weights, first_row, first_column, width, codes, out):
    """Coded and raw bits of a tile of `width` columns; the last of the codes stands outside the matrix."""
    rows = min(UNIT_ROWS, weights.shape[0] - first_row)
    columns = min(width, weights.shape[1] - first_column)
    if rows < UNIT_ROWS or columns < width:
        out[:] = codes[-1]
    for r in range(rows):
        source = weights[first_row + r, first_column : first_column + columns]
        target = out[r * width : r * width + columns]
        for c in range(columns):
            target[c] = codes[np.uint8(source[c])]


@njit(nogil=True, cache=True)
def _unit_quads(tile, unit, quads, out):
    """The quads of a unit: [8, 32]."""
    for j in range(quads.shape[0]):
        for lane in range(quads.shape[1]):
            out[j, lane] = tile[unit * (UNIT_COLUMNS // 4) + quads[j, lane]]


@njit(nogil=True, cache=True)
def _turn_signs(quad):
    """Move the lowest bit of every byte of a unit's quads to the byte after it, that of the last to the first."""
    for j in range(quad.shape[0]):
        for lane in range(quad.shape[1]):
            signs = quad[j, lane] & 0x01010101
            quad[j, lane] ^= signs ^ (signs << 8 & 0xFFFFFFFF | signs >> 24)


@njit(nogil=True, cache=True)
def _unit_symbols(quad, coded_bits, raw_bits, out):
    """Symbols of a unit, [symbols, 32], from its quads."""
    per_symbol, mask = 8 // coded_bits, (1 << coded_bits) - 1
    out[:] = 0
    for e in range(LANE_WEIGHTS):
        shift, bit = e % 4 * 8 + raw_bits, e % per_symbol * coded_bits
        # not LANES: a short loop of known length is unrolled, one of unknown length vectorised
        for lane in range(quad.shape[1]):
            out[e // per_symbol, lane] |= (quad[e // 4, lane] >> shift & mask) << bit


@njit(nogil=True, cache=True)
def _pack_raw(quad, piece_quad, shifts, widths, bits, piece_word, out):
    """Raw plane of a unit, [raw_bits * 32], from its quads: four weights, 8 bits apart there as well, at a time."""
    out[:] = 0
    for p in range(len(piece_quad)):
        j, mask = piece_quad[p], 0x01010101 * ((1 << widths[p]) - 1)
        for lane in range(quad.shape[1]):
            out[piece_word[p, lane]] |= (quad[j, lane] >> shifts[p] & mask) << bits[p]


@njit(nogil=True, cache=True)
def _count_symbols(weights, places, units, codes, quads, coded_bits, raw_bits):
    # lanes side by side often have the same symbol, and would wait for each other's count
    counts = np.zeros((4, 256), np.int64)
    width = units * UNIT_COLUMNS
    tile, quad = np.empty(UNIT_ROWS * width, np.uint8), np.empty(quads.shape, np.int64)
    symbols = np.empty((LANE_WEIGHTS * coded_bits // 8, LANES), np.uint8)
    for panel, across, live in places:
        _copy_codes(weights, panel * UNIT_ROWS, across * width, width, codes, tile)
        for u in range(live):
            _unit_quads(tile.view(np.uint32), u, quads, quad)
            _unit_symbols(quad, coded_bits, raw_bits, symbols)
            for s in range(len(symbols)):
                for lane in range(LANES):
                    counts[lane % 4, symbols[s, lane]] += 1
    return counts.sum(0)


@njit(nogil=True, cache=True)
def _encode_symbols(symbols, freq, start, inverse, probability_bits, words):
    """Encode [symbols, 32] last to first; words fill `words` from its end; returns the states and where they begin.

    Without branches, which would be mispredicted as often as a word is written: the word is always stored, and counted
    if it was due. Only the second loop over the lanes is sequential: they share the stream.
    """
    state = np.full(LANES, STATE_LOW, np.int64)
    f, base, reciprocal = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.float64)
    slots, limit = 1 << probability_bits, 32 - probability_bits
    place = len(words) - 1
    for s in range(len(symbols) - 1, -1, -1):
        for lane in range(LANES):
            symbol = symbols[s, lane]
            f[lane], base[lane], reciprocal[lane] = freq[symbol], start[symbol], inverse[symbol]
        for lane in range(LANES - 1, -1, -1):
            words[place] = state[lane]
            place -= state[lane] >> limit >= f[lane]
        for lane in range(LANES):
            x = state[lane]
            x = x >> 16 if x >> limit >= f[lane] else x
            # exact: x < 2^32, and (x + 0.5) / f is at least 0.5 / 4096 away from an integer
            quotient = np.int64((x + 0.5) * reciprocal[lane])
            # quotient * slots + remainder + base
            state[lane] = x + quotient * (slots - f[lane]) + base[lane]
    return state, place + 1


@njit(nogil=True, cache=True)
def _encode_run(
    weights, places, units, codes, quads, coded_bits, raw_bits, piece_quad, shifts, widths, bits, piece_word,
    freq, start, inverse, probability_bits, most, head_rows, unit_rows, is_float, heads, out, sizes,
):  # fmt: skip
    """Encode tiles into `heads` and `out`; returns the rows of words written."""
    width, unit_symbols = units * UNIT_COLUMNS, LANE_WEIGHTS * coded_bits // 8
    tile, quad = np.empty(UNIT_ROWS * width, np.uint8), np.empty(quads.shape, np.int64)
    symbols, words = np.empty((units * unit_symbols, LANES), np.uint8), np.empty(most, np.uint16)
    end = 0
    for i in range(len(places)):
        panel, across, live = places[i]
        _copy_codes(weights, panel * UNIT_ROWS, across * width, width, codes, tile)
        head = head_rows[i] * LANES
        for u in range(live):
            _unit_quads(tile.view(np.uint32), u, quads, quad)
            if is_float and raw_bits:
                _turn_signs(quad)
            _unit_symbols(quad, coded_bits, raw_bits, symbols[u * unit_symbols : (u + 1) * unit_symbols])
            plane = head + LANES + u * unit_rows * LANES
            _pack_raw(
                quad, piece_quad, shifts, widths, bits, piece_word, heads[plane : plane + raw_bits * LANES]
            )  # fmt: skip
        state, first = _encode_symbols(symbols[: live * unit_symbols], freq, start, inverse, probability_bits, words)
        heads[head : head + LANES] = state
        used = most - first
        rows = -(-used // ROW_WORDS)
        out[end : end + used] = words[first:]
        out[end + used : end + rows * ROW_WORDS] = 0
        end += rows * ROW_WORDS
        sizes[i] = rows
    return end // ROW_WORDS
