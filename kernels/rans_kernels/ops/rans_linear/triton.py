"""Portable Triton kernels: decode, dequantise and multiply in one pass, the weights never written to memory.

A program decodes some tiles and multiplies them with the matching columns of up to BLOCK_M rows of x, in float32. The
sums of the tiles along K go to a buffer each, and a second kernel adds them in ascending order. No atomics, and no
reduction whose order the compiler picks: a row's result depends neither on scheduling nor on the rows beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rans_kernels.format import TileLayout
from rans_kernels.ops.stream import TILES, next_weights, open_tiles, places

BLOCK_M = 4
"""Rows of x a program takes at most: a lane keeps 16 sums for each."""
BLOCK_SUMS = 256
"""Outputs of a program of the second kernel."""


@triton.jit
def add_neighbours(x):
    """Sum over the last dimension of x [A, B], a power of two: neighbours first, then their sums."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return first + second


@triton.jit
def rans_linear_kernel(
    x, heads, words, offsets, table, scale, partial, M, N, K, scale_groups,
    UNITS: tl.constexpr, CODED: tl.constexpr, RAW: tl.constexpr, PROBABILITY_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write partial[across, m, n] for tiles program_id(0) * TILES ... and rows program_id(1) * BLOCK_M ... of x [M, K].

    Scales per group multiply each weight; others are left to the second kernel.
    """
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    state, raw, word, end, n0, k0, stop, across = open_tiles(heads, offsets, tile, N, K, UNITS, RAW)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    x_rows, m_inside = x + m[None, None, None, None, :] * K, m[None, None, None, None, :] < M
    total = tl.zeros([TILES, 32, 2, 8, BLOCK_M], tl.float32)
    for unit in range(UNITS):
        live = k0 + unit * 64 < stop
        # loops stay loops: unrolled, a kernel takes half a minute to compile
        for half in range(2):
            state, word, value = next_weights(
                words, table, raw, state, word, end, unit, half, live, CODED, RAW, PROBABILITY_BITS
            )
            weight = value.to(tl.float32)
            n, k = places(n0, k0, unit, half)
            inside = k < stop[:, :, None, None]
            if GROUP_SIZE > 0:
                weight *= tl.load(scale + n * scale_groups + k // GROUP_SIZE, mask=(n < N) & inside, other=0.0)
            columns = tl.load(x_rows + k[:, :, :, :, None], mask=inside[:, :, :, :, None] & m_inside, other=0.0)
            total += weight[:, :, :, :, None] * columns.to(tl.float32)
    # 4 lanes of 8 columns hold a row: [tile, row % 8, 0 or 8, m, columns]
    sums = tl.permute(tl.reshape(total, [TILES, 8, 4, 2, 8, BLOCK_M]), (0, 1, 3, 5, 2, 4))
    sums = tl.reshape(sums, [TILES * 16 * BLOCK_M, 32])
    for _ in tl.static_range(5):
        sums = add_neighbours(sums)
    sums = tl.reshape(sums, [TILES, 8, 2, BLOCK_M])
    row = tl.arange(0, 8)[None, :, None, None] + 8 * tl.arange(0, 2)[None, None, :, None]
    n, m = n0[:, :, None, None] + row, m[None, None, None, :]
    tl.store(partial + (across[:, :, None, None] * M + m) * N + n, sums, mask=(n < N) & (m < M))


@triton.jit
def add_partial_kernel(
    partial, scale, y, size, N, scale_rows,
    SLICES: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write outputs program_id(0) * BLOCK ... of y [size]: the sum of the slices of partial, times the scale."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros([BLOCK], tl.float32)
    part = partial + index
    for _ in range(SLICES):
        total += tl.load(part, mask=inside, other=0.0)
        part += size
    if SCALED:
        total *= tl.load(scale + tl.where(scale_rows > 1, index % N, 0), mask=inside, other=0.0)
    tl.store(y + index, total, mask=inside)


def rans_linear_triton(
    x: Tensor,
    heads: Tensor,
    words: Tensor,
    offsets: Tensor,
    table: Tensor,
    scale: Tensor,
    layout: TileLayout,
    group_size: int | None,
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype on a GPU; arguments as `rans_linear`."""
    m, (n, k), slices = x.shape[0], layout.coded_shape, layout.grid[1]
    partial = torch.empty(slices, m, n, dtype=torch.float32, device=x.device)
    block_m = min(triton.next_power_of_2(m), BLOCK_M)
    rans_linear_kernel[(triton.cdiv(layout.tiles, TILES), triton.cdiv(m, block_m))](
        x.contiguous(), heads, words, offsets, table, scale, partial, m, n, k, scale.shape[1],
        UNITS=layout.most_units, CODED=layout.split.coded_bits, RAW=layout.split.raw_bits,
        PROBABILITY_BITS=layout.probability_bits, GROUP_SIZE=group_size or 0, BLOCK_M=block_m, TILES=TILES,
        num_warps=TILES,
    )  # fmt: skip
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    add_partial_kernel[(triton.cdiv(m * n, BLOCK_SUMS),)](
        partial, scale, y, m * n, n, scale.shape[0], SLICES=slices, SCALED=group_size is None, BLOCK=BLOCK_SUMS
    )
    return y
