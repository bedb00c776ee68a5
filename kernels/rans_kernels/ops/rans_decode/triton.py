"""Portable Triton kernel: decode a matrix to INT8, one program a tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rans_kernels.format import TileLayout
from rans_kernels.ops.stream import next_symbol, open_tile, raw_bits, weight_value


@triton.jit
def rans_decode_kernel(
    stream, offsets, table, out, N, K, tiles_k,
    CODED: tl.constexpr, RAW: tl.constexpr, GROUPS: tl.constexpr, PROBABILITY_BITS: tl.constexpr,
):  # fmt: skip
    """Write tile program_id(0) of int8 `out` [N, K]."""
    BLOCKS: tl.constexpr = 16 // GROUPS if GROUPS < 16 else 1
    UNITS: tl.constexpr = 128 // GROUPS
    PLACES: tl.constexpr = 8 // CODED
    tile = tl.program_id(0)
    lane = tl.arange(0, 32 * GROUPS) % 32
    state, raw, word, end, n0, k0 = open_tile(stream, offsets, tile, N, K, tiles_k, RAW, GROUPS)
    for pair in range(UNITS // 2):
        any_live = lane < 0
        # loops stay loops: unrolled, a kernel takes half a minute to compile
        for half in range(2):
            unit = 2 * pair + half
            unit_n, unit_k = n0 + unit % BLOCKS * 16, k0 + unit // BLOCKS * 32
            live = (unit_n < N) & (unit_k < K)
            any_live = any_live | live
            for s in range(2 * CODED):
                state, word, symbol = next_symbol(stream, table, state, word, end, lane, live, PROBABILITY_BITS)
                for b in tl.static_range(PLACES):
                    e = s * PLACES + b
                    value = weight_value(symbol, raw_bits(stream, raw, lane, live, half, e, RAW), b, CODED, RAW)
                    n = unit_n + lane // 4 + 8 * (e % 4 // 2)
                    k = unit_k + 2 * (lane % 4) + e // 4 * 8 + e % 2
                    tl.store(out + n.to(tl.int64) * K + k, value.to(tl.int8), mask=live & (n < N) & (k < K))
        raw += 2 * RAW * any_live.to(tl.int64)


def rans_decode_triton(stream: Tensor, offsets: Tensor, table: Tensor, layout: TileLayout) -> Tensor:
    """Decode to int8 [N, K] on the stream's device. Arguments as `rans_decode`."""
    n, k = layout.shape
    out = torch.empty(n, k, dtype=torch.int8, device=stream.device)
    if layout.tiles:
        rans_decode_kernel[(layout.tiles,)](
            stream, offsets, table, out, n, k, layout.tile_grid[1],
            CODED=layout.split.coded_bits, RAW=layout.split.raw_bits, GROUPS=layout.groups,
            PROBABILITY_BITS=layout.probability_bits, num_warps=min(layout.groups, 8),
        )  # fmt: skip
    return out
