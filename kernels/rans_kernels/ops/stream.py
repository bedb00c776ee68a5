"""Reading a tile's streams in portable Triton: what the decode and the fused kernel share.

A program handles one tile, with one element of every block for each of the tile's lanes. Only `tl` is used, so this
runs on any GPU that Triton has a backend for, and under the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def open_tile(stream, offsets, tile, N, K, tiles_k, RAW: tl.constexpr, GROUPS: tl.constexpr):
    """State, raw row, word row and end of every lane of a tile, and the rows and columns its group begins at.

    Rows are counted in 64 bytes, as in the file. A group outside the matrix has nothing stored: its lanes never go
    live.
    """
    BLOCKS: tl.constexpr = 16 // GROUPS if GROUPS < 16 else 1
    ACROSS: tl.constexpr = 8 if GROUPS < 32 else 4
    tid = tl.arange(0, 32 * GROUPS)
    group, lane = tid // 32, tid % 32
    row = tl.load(offsets + tile * GROUPS + group).to(tl.int64)
    end = tl.load(offsets + tile * GROUPS + group + 1).to(tl.int64)
    n0 = (tile // tiles_k) * 256 + (group // (8 // ACROSS)) * BLOCKS * 16
    k0 = (tile % tiles_k) * 256 + (group % (8 // ACROSS)) * ACROSS * 32
    state = tl.load(stream + row * 16 + lane, mask=end > row, other=0).to(tl.uint32, bitcast=True)
    rows = tl.minimum(tl.maximum((N - n0 + 15) // 16, 0), BLOCKS)
    columns = tl.minimum(tl.maximum((K - k0 + 31) // 32, 0), ACROSS)
    # units pair up down the rows, or along the columns where a group spans one block of rows
    pairs = (rows + 1) // 2 * columns if BLOCKS > 1 else rows * ((columns + 1) // 2)
    raw = row + 2
    return state, raw, raw + 2 * RAW * pairs, end, n0, k0


@triton.jit
def next_symbol(stream, table, state, word, end, lane, live, PROBABILITY_BITS: tl.constexpr):
    """One rANS step of every live lane: state, word row and symbol.

    A word beyond the group's end reads as zero, so that a damaged stream decodes to something but touches nothing
    outside.
    """
    slot = state & ((1 << PROBABILITY_BITS) - 1)
    entry = tl.load(table + slot).to(tl.uint32, bitcast=True)
    following = (((entry >> 8) & 0xFFF) + 1) * (state >> PROBABILITY_BITS) + (entry >> 20)
    short = live & (following < 65536)
    words = stream.to(tl.pointer_type(tl.uint16))
    read = tl.load(words + word * 32 + lane, mask=short & (word < end), other=0).to(tl.uint32)
    following = tl.where(short, (following << 16) | read, following)
    return tl.where(live, following, state), word + short.to(tl.int64), entry & 0xFF


@triton.jit
def raw_bits(stream, raw, lane, live, half, weight, RAW: tl.constexpr):
    """Raw bits of weight 4 j + i in unit `half` of the pair whose raw plane starts at row `raw`."""
    j, i = weight // 4, weight % 4
    plane = stream + raw * 16 + lane
    bits = tl.zeros_like(lane).to(tl.uint32)
    if RAW & 4:
        packed = tl.load(plane + (2 * half + j // 2) * 32, mask=live, other=0).to(tl.uint32, bitcast=True)
        bits = (packed >> (8 * i + 4 * (j % 2))) & 15
    if RAW & 2:
        packed = tl.load(plane + ((RAW & 4) + half) * 32, mask=live, other=0).to(tl.uint32, bitcast=True)
        bits = bits | (((packed >> (8 * i + 2 * j)) & 3) << (RAW & 4))
    if RAW & 1:
        packed = tl.load(plane + (RAW - 1) * 32, mask=live, other=0).to(tl.uint32, bitcast=True)
        bits = bits | (((packed >> (8 * i + 4 * half + j)) & 1) << (RAW - 1))
    return bits


@triton.jit
def weight_value(symbol, raw, PLACE: tl.constexpr, CODED: tl.constexpr, RAW: tl.constexpr):
    """The weight at PLACE of a symbol, from its coded and raw bits (format.Split)."""
    coded = (symbol >> (PLACE * CODED)) & ((1 << CODED) - 1)
    if CODED == 1:
        HALF_RANGE: tl.constexpr = 1 << (RAW - 1)
        return ((raw + HALF_RANGE) ^ (coded << (RAW - 1))).to(tl.int32) - 2 * HALF_RANGE
    else:
        return ((coded << RAW) | raw).to(tl.int32) - (1 << (CODED + RAW - 1))
