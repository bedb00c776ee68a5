"""Dense INT8 kernel for NVIDIA GPUs: the arithmetic and the order of the fused kernel, with the weights stored plainly.

It is the reference of the numerics contract (docs/architecture.md, level 2).
"""

# tuples grow in loops that are unrolled
# mypy: disable-error-code="assignment"

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.ops.launch import MAX_ROWS, Launch, choose_launch
from rans_kernels.ops.panel import finish_panel, load_x, multiply_half, only, pad_columns, span_tiles, store_partial
from rans_kernels.ops.simt import (
    block_barrier,
    close_block,
    copy_async,
    execute,
    load_shared,
    open_block,
    shared_pieces,
    wait_text,
)


@gluon.jit
def stage_pair(address, weight, row0, column, lane, end, N, K):
    """Begin to copy 16 rows x 128 columns, two units, a row's 128 bytes by eight lanes; nothing beyond `end` or N.

    The 16-byte chunks of a row stand in an order of its own, lest reading a column strikes a bank eight times.
    """
    row = (lane // 8).to(gl.int32)
    chunk = lane % 8
    inside = column + chunk.to(gl.int32) * 16 < end
    for i in gl.static_range(4):
        r = row + 4 * i
        to = address + (r * 128).to(gl.uint32) + (chunk ^ (r % 8).to(gl.uint32)) * 16
        source = (weight + (row0 + r).to(gl.int64) * K + column + chunk.to(gl.int32) * 16).to(gl.uint64)
        copy_async(to, source, (inside & (row0 + r < N)).to(gl.uint32), 16)
    execute(lane, "cp.async.commit_group;")


@gluon.jit
def half_unit(address, lane, HALF: gl.constexpr):
    """Codes of the HALF-th 32 columns of a stage: weights plus 128, words in the order of a tile's."""
    row, t = lane // 4, lane % 4
    at = address + row * 128 + ((2 * HALF + t // 2) ^ row) * 16 + (t % 2) * 8
    upper = load_shared(at, 2)
    lower = load_shared(at + 1024, 2)
    return upper[0] ^ 0x80808080, upper[1] ^ 0x80808080, lower[0] ^ 0x80808080, lower[1] ^ 0x80808080


@gluon.jit
def int8_linear_kernel(
    weight, scale, bias, x, y, M, N, K, units, panel_units, scale_stride, TILES: gl.constexpr,
    SPAN: gl.constexpr, COLUMN_BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, BFLOAT16: gl.constexpr,
    WARPS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, SHARED0: gl.constexpr, SHARED1: gl.constexpr,
    SHARED2: gl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] @ weight.T for panel program_id(0); weight int8 [N, K], K a multiple of 64."""
    DTYPE: gl.constexpr = "bf16" if BFLOAT16 else "f16"
    STAGE_BYTES: gl.constexpr = 2048
    tid, lane, warp, pieces, base = open_block(WARPS, SHARED0, SHARED1, SHARED2)
    ring = base + (warp * (STAGES * STAGE_BYTES)).to(gl.uint32)
    partial = base + WARPS * STAGES * STAGE_BYTES
    panel = gl.program_id(0)
    row = (lane // 4).to(gl.int32)
    rows_on = ()
    for n in gl.static_range(COLUMN_BLOCKS):
        rows_on = rows_on + ((8 * n + row < M).to(gl.uint32),)
    x_lane = (x + row.to(gl.int64) * K + (lane % 4).to(gl.int32) * 8).to(gl.uint64)
    for first in range(0, TILES, WARPS):
        tile = first + warp
        begin = tile * units * 64
        end = gl.minimum(panel_units - tile * units, units) * 64 + begin
        # all lanes have read the tile before
        execute(tid, "bar.warp.sync 0xffffffff;")
        for s in gl.static_range(STAGES - 1):
            stage_pair(ring + s * STAGE_BYTES, weight, panel * 16, begin + s * 128, lane, end, N, K)
        if OVERLAP and first == 0:
            # weights are nobody's result; x is
            execute(tid, "griddepcontrol.wait;")
        zero = gl.full_like(tid, 0).to(gl.float32)
        c = ((zero, zero, zero, zero),) * COLUMN_BLOCKS
        take = ring
        give = ring + (STAGES - 1) * STAGE_BYTES
        x_at = x_lane + (begin * 2).to(gl.uint64)
        x0 = load_x(x_at, only(rows_on, begin < end, COLUMN_BLOCKS), COLUMN_BLOCKS, K * 2)
        for pair in range(0, (units + 1) // 2):
            column = begin + pair * 128
            execute(tid, wait_text(STAGES - 2))
            # a lane reads what others copied, and overwrites what others have read
            execute(tid, "bar.warp.sync 0xffffffff;")
            stage_pair(give, weight, panel * 16, column + (STAGES - 1) * 128, lane, end, N, K)
            for half in gl.static_range(4):
                x_at += 64
                on = only(rows_on, column + 32 * half + 32 < end, COLUMN_BLOCKS)
                x1 = load_x(x_at, on, COLUMN_BLOCKS, K * 2)
                # beyond the tile's end the stage holds what it held; x is zero there, and weights are finite
                c = multiply_half(c, half_unit(take, lane, half), x0, COLUMN_BLOCKS, 8, 0, DTYPE)
                x0 = x1
            give = take
            take += STAGE_BYTES
            take = gl.where(take == ring + STAGES * STAGE_BYTES, ring, take)
        store_partial(partial + (tile * (512 * COLUMN_BLOCKS)).to(gl.uint32), c, lane, COLUMN_BLOCKS)
    if OVERLAP:
        execute(tid, "griddepcontrol.launch_dependents;")
    block_barrier()
    finish_panel(partial, scale, bias, y, tid, panel, M, N, scale_stride, TILES, SPAN, COLUMN_BLOCKS, WARPS,
                 HAS_BIAS)  # fmt: skip
    close_block(pieces, tid, WARPS)


def int8_linear_gluon(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, units: int, launch: Launch | None = None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype.

    Args:
        x: float16 or bfloat16.
        weight: int8 [N, K].
        scale: float32 [1, 1] or [N, 1].
        bias: [N] or None.
        units: of a tile: sums are those of a weight coded in tiles of so many units.
        launch: configuration; None takes the default.
    """
    n = len(weight)
    x, weight = pad_columns(x), pad_columns(weight)
    panel_units = x.shape[1] // 64
    units = min(units, panel_units)
    tiles = -(-panel_units // units)
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    for first in range(0, len(x), MAX_ROWS):
        part = x[first : first + MAX_ROWS]
        column_blocks = triton.next_power_of_2(-(-len(part) // 8))
        warps, stages, overlap = launch or choose_launch(x.device, (n, x.shape[1]), column_blocks, tiles)
        stages = max(3, stages)
        pieces = shared_pieces(warps * stages * 2048 + -(-tiles // warps) * warps * 512 * column_blocks)
        int8_linear_kernel[(-(-n // 16),)](
            weight, scale, scale if bias is None else bias, part, y[first:], len(part), n, x.shape[1], units,
            panel_units, int(scale.shape[0] > 1), TILES=tiles, SPAN=span_tiles(n, tiles), COLUMN_BLOCKS=column_blocks,
            HAS_BIAS=bias is not None, BFLOAT16=x.dtype is torch.bfloat16, WARPS=warps, STAGES=stages, OVERLAP=overlap,
            SHARED0=pieces[0], SHARED1=pieces[1], SHARED2=pieces[2], num_warps=warps, launch_pdl=overlap,
        )  # fmt: skip
    return y
