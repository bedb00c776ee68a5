"""Portable Triton kernel: decode a matrix to INT8, or to the floats that were coded."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rans_kernels.format import TileLayout
from rans_kernels.ops.stream import TILES, next_floats, next_weights, open_tiles, places


@triton.jit
def rans_decode_kernel(
    heads, words, offsets, table, out, N, K,
    UNITS: tl.constexpr, CODED: tl.constexpr, RAW: tl.constexpr, PROBABILITY_BITS: tl.constexpr, TILES: tl.constexpr,
    FLOAT: tl.constexpr = False,
):  # fmt: skip
    """Write tiles program_id(0) * TILES ... of `out` [N, K], int8, or int16, the bits of FLOAT weights."""
    ROWS: tl.constexpr = RAW + 8 if FLOAT else RAW
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    state, raw, word, end, n0, k0, stop, _ = open_tiles(heads, offsets, tile, N, K, UNITS, ROWS)
    for unit in range(UNITS):
        live = k0 + unit * 64 < stop
        # loops stay loops: unrolled, a kernel takes half a minute to compile
        for half in range(2):
            if FLOAT:
                state, word, value = next_floats(
                    words, table, raw, state, word, end, unit, half, live, CODED, RAW, PROBABILITY_BITS
                )
            else:
                state, word, value = next_weights(
                    words, table, raw, state, word, end, unit, half, live, CODED, RAW, PROBABILITY_BITS
                )
            n, k = places(n0, k0, unit, half)
            mask = (n < N) & (k < stop[:, :, None, None])
            tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=mask)


def rans_decode_triton(heads: Tensor, words: Tensor, offsets: Tensor, table: Tensor, layout: TileLayout) -> Tensor:
    """Decode to [N, K] in the dtype that was coded, on the heads' device. Arguments as `rans_decode`."""
    n, k = layout.coded_shape
    out = torch.empty(n, k, dtype=torch.int16 if layout.is_float else torch.int8, device=heads.device)
    if layout.tiles:
        rans_decode_kernel[(triton.cdiv(layout.tiles, TILES),)](
            heads, words, offsets, table, out, n, k, UNITS=layout.most_units,
            CODED=layout.split.coded_bits, RAW=layout.split.raw_bits, PROBABILITY_BITS=layout.probability_bits,
            TILES=TILES, FLOAT=layout.is_float, num_warps=TILES,
        )  # fmt: skip
    return out.view(getattr(torch, layout.dtype)).view(layout.shape)
