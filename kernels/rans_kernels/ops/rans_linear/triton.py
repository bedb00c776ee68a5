"""Portable Triton kernel: decode, dequantise and multiply in one pass, the weights never written to memory.

A program decodes one tile and multiplies it with the matching 256 columns of up to BLOCK_M rows of x, in float32.
Partial sums go to a buffer with a slice for every tile along K and are added in one fixed order: no atomics, so a
result does not depend on scheduling.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rans_kernels.format import TileLayout
from rans_kernels.ops.stream import next_symbol, open_tile, raw_bits, weight_value


@triton.jit
def rans_linear_kernel(
    x, stream, offsets, table, scale, partial, M, N, K, tiles_k, scale_groups,
    CODED: tl.constexpr, RAW: tl.constexpr, GROUPS: tl.constexpr, PROBABILITY_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write partial[slice, m, n] for tile program_id(0) and rows program_id(1) * BLOCK_M ... of x [M, K]."""
    BLOCKS: tl.constexpr = 16 // GROUPS if GROUPS < 16 else 1
    SLICES: tl.constexpr = 2 if GROUPS == 32 else 1
    UNITS: tl.constexpr = 128 // GROUPS
    PLACES: tl.constexpr = 8 // CODED
    tile = tl.program_id(0)
    lane = tl.arange(0, 32 * GROUPS) % 32
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = x + m.to(tl.int64)[None, :] * K
    state, raw, word, end, n0, k0 = open_tile(stream, offsets, tile, N, K, tiles_k, RAW, GROUPS)
    # [lane, m, block of rows, row + 0 or + 8]
    total = tl.zeros([32 * GROUPS, BLOCK_M, BLOCKS, 2], tl.float32)
    block = tl.arange(0, BLOCKS)[None, None, :, None]
    for pair in range(UNITS // 2):
        any_live = lane < 0
        # loops stay loops: unrolled, a kernel takes half a minute to compile
        for half in range(2):
            unit = 2 * pair + half
            unit_n, unit_k = n0 + unit % BLOCKS * 16, k0 + unit // BLOCKS * 32
            live = (unit_n < N) & (unit_k < K)
            any_live = any_live | live
            upper = tl.zeros([32 * GROUPS, BLOCK_M], tl.float32)
            lower = tl.zeros([32 * GROUPS, BLOCK_M], tl.float32)
            for s in range(2 * CODED):
                state, word, symbol = next_symbol(stream, table, state, word, end, lane, live, PROBABILITY_BITS)
                for b in tl.static_range(PLACES):
                    e = s * PLACES + b
                    value = weight_value(symbol, raw_bits(stream, raw, lane, live, half, e, RAW), b, CODED, RAW)
                    value = tl.where(live, value, 0).to(tl.float32)
                    k = unit_k + 2 * (lane % 4) + e // 4 * 8 + e % 2
                    if GROUP_SIZE > 0:
                        n = unit_n + lane // 4 + 8 * (e % 4 // 2)
                        at = scale + n.to(tl.int64) * scale_groups + k // GROUP_SIZE
                        value *= tl.load(at, mask=(n < N) & (k < K), other=0.0)
                    mask = (m[None, :] < M) & (k[:, None] < K)
                    product = value[:, None] * tl.load(x_row + k[:, None], mask=mask, other=0.0).to(tl.float32)
                    upper += tl.where(e % 4 < 2, product, 0.0)
                    lower += tl.where(e % 4 < 2, 0.0, product)
            both = tl.join(upper, lower)[:, :, None, :]
            total += tl.where(block == unit % BLOCKS, both, 0.0)
        raw += 2 * RAW * any_live.to(tl.int64)
    # the four lanes that hold columns of one row: [group, row % 8, m, block, 0 or 8]
    sums = tl.sum(tl.reshape(total, [GROUPS, 8, 4, BLOCK_M, BLOCKS, 2]), axis=2)
    group = tl.arange(0, GROUPS)[:, None, None, None, None]
    row = tl.arange(0, 8)[None, :, None, None, None]
    rows_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, None, :, None, None]
    blocks = tl.arange(0, BLOCKS)[None, None, None, :, None]
    eight = tl.arange(0, 2)[None, None, None, None, :] * 8
    n = (tile // tiles_k) * 256 + (group // SLICES * BLOCKS + blocks) * 16 + eight + row
    part = (tile % tiles_k) * SLICES + group % SLICES
    tl.store(partial + (part.to(tl.int64) * M + rows_m) * N + n, sums, mask=(n < N) & (rows_m < M))


def rans_linear_triton(
    x: Tensor, stream: Tensor, offsets: Tensor, table: Tensor, scale: Tensor, layout: TileLayout, group_size: int | None
) -> Tensor:
    """x [M, K] -> float32 [M, N] on a GPU; arguments as `rans_linear`."""
    m, (n, k) = x.shape[0], layout.shape
    slices = layout.tile_grid[1] * (2 if layout.groups == 32 else 1)
    partial = torch.empty(slices, m, n, dtype=torch.float32, device=x.device)
    # a lane keeps BLOCK_M sums for each of its rows: bound the registers
    block_m = min(triton.next_power_of_2(m), 8 if layout.row_blocks <= 2 else 2)
    rans_linear_kernel[(layout.tiles, triton.cdiv(m, block_m))](
        x.contiguous(), stream, offsets, table, scale, partial, m, n, k, layout.tile_grid[1], scale.shape[1],
        CODED=layout.split.coded_bits, RAW=layout.split.raw_bits, GROUPS=layout.groups,
        PROBABILITY_BITS=layout.probability_bits, GROUP_SIZE=group_size or 0, BLOCK_M=block_m,
        num_warps=min(layout.groups, 8),
    )  # fmt: skip
    y = partial.sum(0)
    return y if group_size else y * scale.T
