"""The CPU decoder: compiled, parallel over runs of tiles, bounds-checked. Shares only the format with the encoder."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rans_kernels.format import (
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
_TOO_SHORT, _NOT_AT_START, _WORDS_LEFT = 1, 2, 3
_FAULTS = {
    _TOO_SHORT: "its words end before its symbols do",
    _NOT_AT_START: "it does not end in the start state",
    _WORDS_LEFT: "words are left over",
}


def decode_tiles(
    layout: TileLayout,
    heads: NDArray[np.int32],
    words: NDArray[np.int16],
    offsets: NDArray[np.int32],
    freqs: NDArray[np.int16],
    workers: int | None = None,
) -> NDArray[np.int8] | NDArray[np.uint16]:
    """Decode a weight matrix: int8 [N, K], or of floats their bits, uint16.

    Args:
        layout: shape, split, units, precision, dtype and fold.
        heads: int32 [layout.head_rows, 32].
        words: int16 [rows, 8].
        offsets: int32 [tiles + 1].
        freqs: int16 [256].
        workers: threads; None takes every core.

    Raises:
        FormatError: something is damaged; nothing outside the arrays was read.
    """
    if heads.dtype != np.int32 or heads.ndim != 2 or heads.shape[1] != LANES:
        raise FormatError(f"heads are int32 [rows, {LANES}], got {heads.dtype} {heads.shape}")
    if words.dtype != np.int16 or words.ndim != 2 or words.shape[1] != ROW_WORDS:
        raise FormatError(f"words are int16 [rows, {ROW_WORDS}], got {words.dtype} {words.shape}")
    layout.check(len(heads), len(words), offsets, freqs)
    out = np.empty(layout.coded_shape, np.int8)
    rows = offsets.astype(np.int64)
    # weights 4 j to 4 j + 3 of a lane stand side by side, a quad of 32 bits
    quads = np.ascontiguousarray((lane_positions()[:, ::4] @ [UNIT_COLUMNS, 1]).T // 4)
    heads, words = np.ascontiguousarray(heads), np.ascontiguousarray(words)
    args = (
        heads.view(np.uint32).reshape(-1), words.view(np.uint16).reshape(-1), _slots(freqs), layout.probability_bits,
        layout.most_units, layout.split.coded_bits, layout.split.raw_bits, layout.unit_rows, layout.is_float,
        *raw_pieces(layout.split.raw_bits), quads,
        _values(layout), out,
    )  # fmt: skip

    def decode(run: range) -> tuple[int, int]:
        places = [[*divmod(t, layout.grid[1]), layout.tile_units(t), layout.head_row(t), *rows[t : t + 2]] for t in run]
        fault, index = _decode_run(np.array(places), *args)
        return fault, run[index]

    step = max(1, RUN_UNITS // layout.units)
    runs = [range(t, min(t + step, layout.tiles)) for t in range(0, layout.tiles, step)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for fault, tile in pool.map(decode, runs):
            if fault:
                raise FormatError(f"the stream of tile {tile} is damaged: {_FAULTS[fault]}")
        return _join_low(layout, heads, out.view(np.uint8), pool) if layout.is_float else out.reshape(layout.shape)


def _join_low(
    layout: TileLayout, heads: NDArray[np.int32], high: NDArray[np.uint8], pool: ThreadPoolExecutor
) -> NDArray[np.uint16]:
    """Bits of floats from their high bytes [N, K] and the low ones in the heads, some panels at a time."""
    out = np.empty(layout.shape, np.uint16)
    if not layout.tiles:
        return out
    panels, units, rows = layout.grid[0], layout.panel_units, layout.low_rows()
    heads = heads.reshape(panels, -1, LANES)
    step = max(1, RUN_UNITS // units)

    def join(first: int) -> None:
        target = out[first * UNIT_ROWS : (first + step) * UNIT_ROWS]
        # [panel, unit, h, lane // 4, lane % 4, r]: the eight columns of a lane's row at once (lane_positions)
        eights = heads[first : first + step, rows].view(np.uint64).reshape(-1, units, 2, 8, 4, 2)
        low = np.ascontiguousarray(eights.transpose(0, 5, 3, 1, 2, 4)).view(np.uint8)
        low = low.reshape(-1, units * UNIT_COLUMNS)[: target.shape[0], : target.shape[1]]
        target[:] = high[first * UNIT_ROWS : (first + step) * UNIT_ROWS]
        target <<= 8
        target |= low

    list(pool.map(join, range(0, panels, step)))
    return out


def _slots(freqs: NDArray[np.int16]) -> NDArray[np.int64]:
    """Symbol, frequency << 8 and offset within the symbol << 24, of every slot."""
    freq = freqs.astype(np.int64)
    symbol = np.repeat(np.arange(256), freq)
    start = np.cumsum(freq) - freq
    return symbol | freq[symbol] << 8 | (np.arange(len(symbol)) - start[symbol]) << 24


def _values(layout: TileLayout) -> NDArray[np.int8]:
    """Weight, or the high byte of a float, for coded << raw_bits | raw."""
    c, r = layout.split.coded_bits, layout.split.raw_bits
    code = np.arange(1 << (c + r))
    if layout.is_float:
        return layout.float_bytes().view(np.int8)
    if c > 1:
        return (code - (1 << (c + r - 1))).astype(np.int8)
    half = 1 << (r - 1)
    coded, raw = code >> r, code & (2 * half - 1)
    return (((raw + half) ^ (coded * half)) - 2 * half).astype(np.int8)


@njit(nogil=True, cache=True)
def _decode_symbols(state, words, slots, probability_bits, symbols):
    """Decode [symbols, 32] from their states and words; returns how many words were due.

    Without branches, which would be mispredicted as often as a word is due: a word is always loaded. Only the third
    loop over the lanes is sequential: they share the stream.
    """
    mask = (1 << probability_bits) - 1
    entry, word = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    place = 0
    for s in range(len(symbols)):
        for lane in range(LANES):
            entry[lane] = slots[state[lane] & mask]
        for lane in range(LANES):
            symbols[s, lane] = entry[lane]
            state[lane] = (entry[lane] >> 8 & 0xFFFF) * (state[lane] >> probability_bits) + (entry[lane] >> 24)
        for lane in range(LANES):
            word[lane] = words[place]
            place += state[lane] < STATE_LOW
        for lane in range(LANES):
            x = state[lane]
            state[lane] = x << 16 | word[lane] if x < STATE_LOW else x
    return place


@njit(nogil=True, cache=True)
def _unit_quads(symbols, plane, coded_bits, raw_bits, piece_quad, shifts, widths, bits, piece_word, quad):
    """The quads of a unit, [8, 32], coded and raw bits of a weight in a byte."""
    per_symbol, mask = 8 // coded_bits, (1 << coded_bits) - 1
    quad[:] = 0
    for e in range(LANE_WEIGHTS):
        bit, shift = e % per_symbol * coded_bits, e % 4 * 8 + raw_bits
        # not LANES: a short loop of known length is unrolled, one of unknown length vectorised
        for lane in range(quad.shape[1]):
            quad[e // 4, lane] |= (np.int64(symbols[e // per_symbol, lane]) >> bit & mask) << shift
    for p in range(len(piece_quad)):
        # four weights, 8 bits apart there as well, at a time
        j, mask = piece_quad[p], 0x01010101 * ((1 << widths[p]) - 1)
        for lane in range(quad.shape[1]):
            quad[j, lane] |= (np.int64(plane[piece_word[p, lane]]) >> bits[p] & mask) << shifts[p]


@njit(nogil=True, cache=True)
def _return_signs(quad):
    """Move the lowest bit of every byte of a unit's quads to the byte before it, that of the first to the last."""
    for j in range(quad.shape[0]):
        for lane in range(quad.shape[1]):
            signs = quad[j, lane] & 0x01010101
            quad[j, lane] ^= signs ^ (signs >> 8 | (signs << 24 & 0xFFFFFFFF))


@njit(nogil=True, cache=True)
def _store(block, values, out):
    """Weights of a unit, cut off at the edges of the matrix."""
    for r in range(out.shape[0]):
        source, target = block[r * UNIT_COLUMNS : r * UNIT_COLUMNS + out.shape[1]], out[r]
        for c in range(len(source)):
            target[c] = values[source[c]]


@njit(nogil=True, cache=True)
def _decode_run(
    places, heads, words, slots, probability_bits, units, coded_bits, raw_bits, unit_rows, is_float,
    piece_quad, shifts, widths, bits, piece_word, quads, values, out,
):  # fmt: skip
    """Decode tiles into `out`; (fault, index of the tile), fault 0 if all is well."""
    unit_symbols, plane = LANE_WEIGHTS * coded_bits // 8, raw_bits * LANES
    state, quad = np.empty(LANES, np.int64), np.empty(quads.shape, np.int64)
    symbols = np.empty((units * unit_symbols, LANES), np.uint8)
    # a symbol takes at most a word: whatever the words are, none beyond this is loaded
    stream = np.empty(symbols.size + 1, np.uint16)
    block = np.empty(UNIT_ROWS * UNIT_COLUMNS, np.uint8)
    block_quads = block.view(np.uint32)
    for i in range(len(places)):
        panel, across, live, head_row, begin, end = places[i]
        count = (end - begin) * ROW_WORDS
        stream[:count] = words[begin * ROW_WORDS : end * ROW_WORDS]
        head = head_row * LANES
        state[:] = heads[head : head + LANES]
        used = _decode_symbols(state, stream, slots, probability_bits, symbols[: live * unit_symbols])
        if used > count:
            return _TOO_SHORT, i
        if np.any(state != STATE_LOW):
            return _NOT_AT_START, i
        if -(-used // ROW_WORDS) != end - begin:
            return _WORDS_LEFT, i
        row = panel * UNIT_ROWS
        for u in range(live):
            head += unit_rows * LANES if u else LANES
            _unit_quads(
                symbols[u * unit_symbols : (u + 1) * unit_symbols], heads[head : head + plane], coded_bits, raw_bits,
                piece_quad, shifts, widths, bits, piece_word, quad,
            )  # fmt: skip
            if is_float and raw_bits:
                _return_signs(quad)
            for j in range(quads.shape[0]):
                for lane in range(quads.shape[1]):
                    block_quads[quads[j, lane]] = quad[j, lane]
            column = (across * units + u) * UNIT_COLUMNS
            _store(block, values, out[row : row + UNIT_ROWS, column : column + UNIT_COLUMNS])
    return 0, 0
