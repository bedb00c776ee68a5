"""Reading tiles in portable Triton: what the decode and the fused kernel share.

A program decodes TILES tiles, a warp each. States are [TILES, 32], the weights of half a unit [TILES, 32 lanes, 2 rows,
8 columns]. Only `tl` is used, so this runs on any GPU that Triton has a backend for, and under the interpreter.
"""

import triton
import triton.language as tl

TILES = 4
"""Tiles, and warps, of a program."""


@triton.jit
def open_tiles(heads, offsets, tile, N, K, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """What it takes to decode some tiles, all but `state` [TILES, 1]; UNITS: of a tile, at most those of a panel.

    ROWS: of a unit in a head.

    state: uint32 [TILES, 32]. raw: the tile's raw planes. word, end: its words. n, k: first row and column; stop: the
    column behind its last. A tile beyond the matrix has no columns and no words. across: its number along K.
    """
    tile = tile.to(tl.int64)
    panel_units = (K + 63) // 64
    tiles_k = (panel_units + UNITS - 1) // UNITS
    panel, across = tile // tiles_k, tile % tiles_k
    inside = panel * 16 < N
    row = panel * (tiles_k + panel_units * ROWS) + across * (1 + UNITS * ROWS)
    state = tl.load(heads + row * 32 + tl.arange(0, 32)[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
    word = tl.load(offsets + tile, mask=inside, other=0).to(tl.int64) * 8
    end = tl.load(offsets + tile + 1, mask=inside, other=0).to(tl.int64) * 8
    k = across * UNITS * 64
    stop = tl.where(inside, tl.minimum(k + UNITS * 64, K), k)
    return state, heads + (row + 1) * 32, word, end, panel * 16, k, stop, across


@triton.jit
def next_symbol(words, table, state, word, end, PROBABILITY_BITS: tl.constexpr):
    """One rANS step of every lane: states, the tiles' next words [TILES, 1], symbols.

    Lanes that run short take the next words in ascending order. A word beyond the tile's end reads as zero, so that a
    damaged stream decodes to something but touches nothing outside.
    """
    slot = state & ((1 << PROBABILITY_BITS) - 1)
    entry = tl.load(table + slot).to(tl.uint32, bitcast=True)
    following = (((entry >> 8) & 0xFFF) + 1) * (state >> PROBABILITY_BITS) + (entry >> 20)
    short = following < 65536
    at = word + tl.cumsum(short.to(tl.int32), 1) - 1
    read = tl.load(words.to(tl.pointer_type(tl.uint16)) + at, mask=short & (at < end), other=0).to(tl.uint32)
    state = tl.where(short, (following << 16) | read, following)
    return state, word + tl.sum(short.to(tl.int32), 1, keep_dims=True), entry & 0xFF


@triton.jit
def coded_bits(words, table, state, word, end, CODED: tl.constexpr, PROBABILITY_BITS: tl.constexpr):
    """Coded bits of the next 8 weights of every lane, packed lowest first: states, next words, uint64 [TILES, 32]."""
    packed = tl.zeros_like(state).to(tl.uint64)
    for s in range(CODED):
        state, word, symbol = next_symbol(words, table, state, word, end, PROBABILITY_BITS)
        packed |= symbol.to(tl.uint64) << (8 * s)
    return state, word, packed


@triton.jit
def raw_word(plane, lane, v, live, RAW: tl.constexpr):
    """Word v of a lane's RAW words of a raw plane, in groups of 4, 2 and 1 lane by lane."""
    at = 32 * (RAW - 1) + lane
    if RAW & 2:
        at = tl.where(v < RAW // 2 * 2, 32 * (RAW & 4) + 2 * lane + v - (RAW & 4), at)
    if RAW & 4:
        at = tl.where(v < 4, 4 * lane + v, at)
    return tl.load(plane + at, mask=live, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def raw_bits(plane, half, live, RAW: tl.constexpr, TURN: tl.constexpr = 0):
    """Raw bits of half a unit from its raw plane [TILES, 1]: uint32, broadcasts to [TILES, 32, 2, 8].

    TURN gives a weight those of the one so much further in its quad.
    """
    plane, live = plane[:, :, None, None], live[:, :, None, None]
    lane = tl.arange(0, 32)[None, :, None, None]
    row = tl.arange(0, 2)[None, None, :, None]
    column = tl.arange(0, 8)[None, None, None, :]
    j, i = 4 * half + 2 * row + column // 4, (column + TURN) % 4
    bits = tl.zeros([1, 1, 1, 1], tl.uint32)
    if RAW > 0:
        WHOLE: tl.constexpr = 8 // RAW
        LEFT: tl.constexpr = 8 - WHOLE * RAW
        word = raw_word(plane, lane, j // WHOLE, live & (j < WHOLE * RAW), RAW)
        bits = (word >> (8 * i + j % WHOLE * RAW)) & ((1 << RAW) - 1)
        if LEFT > 0:
            for b in tl.static_range(RAW):
                at = (j - WHOLE * RAW) * RAW + b
                word = raw_word(plane, lane, at // LEFT, live & (j >= WHOLE * RAW), RAW)
                bits = bits | (((word >> (8 * i + WHOLE * RAW + at % LEFT)) & 1) << b)
    return bits


@triton.jit
def next_codes(
    words, table, plane, state, word, end, half, live,
    CODED: tl.constexpr, RAW: tl.constexpr, PROBABILITY_BITS: tl.constexpr,
):  # fmt: skip
    """Half a unit: states, next words, coded and raw bits, uint32 [TILES, 32, 2, 8]."""
    state, word, upper = coded_bits(words, table, state, word, end, CODED, PROBABILITY_BITS)
    state, word, lower = coded_bits(words, table, state, word, end, CODED, PROBABILITY_BITS)
    column = tl.arange(0, 8)[None, None, None, :]
    packed = tl.join(upper, lower)[:, :, :, None] >> (CODED * column).to(tl.uint64)
    coded = packed.to(tl.uint32) & ((1 << CODED) - 1)
    return state, word, coded, raw_bits(plane, half, live, RAW)


@triton.jit
def next_weights(
    words, table, raw, state, word, end, unit, half, live,
    CODED: tl.constexpr, RAW: tl.constexpr, PROBABILITY_BITS: tl.constexpr,
):  # fmt: skip
    """Half a unit: states, next words, and weights int32 [TILES, 32, 2, 8] (format.Split)."""
    plane = raw + unit * 32 * RAW
    state, word, coded, bits = next_codes(
        words, table, plane, state, word, end, half, live, CODED, RAW, PROBABILITY_BITS
    )
    if CODED == 1:
        HALF_RANGE: tl.constexpr = 1 << (RAW - 1)
        value = ((bits + HALF_RANGE) ^ (coded * HALF_RANGE)).to(tl.int32) - 2 * HALF_RANGE
    else:
        value = ((coded << RAW) | bits).to(tl.int32) - (1 << (CODED + RAW - 1))
    return state, word, value


@triton.jit
def next_floats(
    words, table, raw, state, word, end, unit, half, live,
    CODED: tl.constexpr, RAW: tl.constexpr, PROBABILITY_BITS: tl.constexpr,
):  # fmt: skip
    """Half a unit: states, next words, and the bits of floats, int32 [TILES, 32, 2, 8] (TileLayout.float_codes)."""
    plane = raw + unit * 32 * (RAW + 8)
    state, word, coded, bits = next_codes(
        words, table, plane, state, word, end, half, live, CODED, RAW, PROBABILITY_BITS
    )
    u = (coded << RAW) | bits
    sign = u & 1
    if RAW > 0:
        # raw signs stand with the next weight of the four
        sign = raw_bits(plane, half, live, RAW, 1) & 1
    lane = tl.arange(0, 32)[None, :, None, None]
    row = tl.arange(0, 2)[None, None, :, None]
    column = tl.arange(0, 8)[None, None, None, :]
    at = 32 * RAW + 128 * half + 4 * lane + 2 * row + column // 4
    low = tl.load(plane[:, :, None, None] + at, mask=live[:, :, None, None], other=0).to(tl.uint32, bitcast=True)
    high = tl.load(table + ((1 << PROBABILITY_BITS) + (u ^ (u & 1) ^ sign))).to(tl.uint32, bitcast=True)
    value = (high << 8) | ((low >> (8 * (column % 4))) & 0xFF)
    return state, word, value.to(tl.int32)


@triton.jit
def places(n, k, unit, half):
    """Rows [TILES, 32, 2, 1] and columns [TILES, 32, 1, 8] of half a unit's weights, given the tiles' first ones."""
    lane = tl.arange(0, 32)[None, :, None, None]
    rows = n[:, :, None, None] + lane // 4 + 8 * tl.arange(0, 2)[None, None, :, None]
    first = k[:, :, None, None] + 64 * unit + 32 * half
    return rows, first + 8 * (lane % 4) + tl.arange(0, 8)[None, None, None, :]
