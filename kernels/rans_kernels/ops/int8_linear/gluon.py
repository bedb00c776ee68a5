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
from rans_kernels.ops.panel import finish_panel, load_x, multiply_half, only, pad_columns, store_partial
from rans_kernels.ops.simt import (
    block_barrier,
    copy_async,
    execute,
    load_shared,
    shared_base,
    shared_pieces,
    thread_layout,
    wait_text,
)


@gluon.jit
def stage_unit(address, pointer, lane, on, lower_on, stride):
    """Begin to copy what this lane reads of 16 rows x 64 columns: rows g and g + 8, columns 8 t and 32 + 8 t."""
    copy_async(address + lane * 8, pointer, on, 8)
    copy_async(address + 256 + lane * 8, pointer + 8 * stride, lower_on, 8)
    copy_async(address + 512 + lane * 8, pointer + 32, on, 8)
    copy_async(address + 768 + lane * 8, pointer + 8 * stride + 32, lower_on, 8)
    execute(lane, "cp.async.commit_group;")


@gluon.jit
def half_unit(address, lane):
    """Codes of half a unit: weights plus 128, words in the order of a tile's."""
    upper = load_shared(address + lane * 8, 2)
    lower = load_shared(address + 256 + lane * 8, 2)
    return upper[0] ^ 0x80808080, upper[1] ^ 0x80808080, lower[0] ^ 0x80808080, lower[1] ^ 0x80808080


@gluon.jit
def int8_linear_kernel(
    weight, scale, bias, x, y, M, N, K, tiles, units, panel_units, scale_stride,
    COLUMN_BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, BFLOAT16: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] @ weight.T for panel program_id(0); weight int8 [N, K], K a multiple of 64."""
    DTYPE: gl.constexpr = "bf16" if BFLOAT16 else "f16"
    L: gl.constexpr = thread_layout(WARPS)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    STAGE_BYTES: gl.constexpr = 1024
    tid = gl.arange(0, 32 * WARPS, layout=L)
    lane = (tid % 32).to(gl.uint32)
    warp = tid // 32
    piece0 = gl.allocate_shared_memory(gl.int32, [SHARED0], SHARED)
    piece1 = gl.allocate_shared_memory(gl.int32, [SHARED1], SHARED)
    piece2 = gl.allocate_shared_memory(gl.int32, [SHARED2], SHARED)
    base = shared_base(tid)
    ring = base + (warp * (STAGES * STAGE_BYTES)).to(gl.uint32)
    partial = base + WARPS * STAGES * STAGE_BYTES
    panel = gl.program_id(0)
    row = (lane // 4).to(gl.int32)
    rows_on = ()
    for n in gl.static_range(COLUMN_BLOCKS):
        rows_on = rows_on + ((8 * n + row < M).to(gl.uint32),)
    column = (lane % 4).to(gl.int32) * 8
    x_lane = (x + row.to(gl.int64) * K + column).to(gl.uint64)
    w_lane = (weight + (panel * 16 + row).to(gl.int64) * K + column).to(gl.uint64)
    stride = (gl.full_like(lane, 0) + K).to(gl.uint64)
    upper_on = (panel * 16 + row < N).to(gl.uint32)
    lower_on = (panel * 16 + row + 8 < N).to(gl.uint32)
    for first in range(0, tiles, WARPS):
        tile = first + warp
        left = gl.minimum(panel_units - tile * units, units)
        at = w_lane + (tile.to(gl.int64) * units * 64).to(gl.uint64)
        for s in gl.static_range(STAGES - 1):
            live = (s < left).to(gl.uint32)
            stage_unit(ring + s * STAGE_BYTES, at + s * 64, lane, upper_on * live, lower_on * live, stride)
        if OVERLAP and first == 0:
            execute(tid, "griddepcontrol.wait;")
        x_at = x_lane + (tile.to(gl.int64) * units * 128).to(gl.uint64)
        on = only(rows_on, left > 0, COLUMN_BLOCKS)
        x0 = load_x(x_at, on, COLUMN_BLOCKS, K * 2)
        x1 = load_x(x_at + 64, on, COLUMN_BLOCKS, K * 2)
        zero = gl.full_like(tid, 0).to(gl.float32)
        c = ((zero, zero, zero, zero),) * COLUMN_BLOCKS
        take = ring
        give = ring + (STAGES - 1) * STAGE_BYTES
        for unit in range(0, units):
            execute(tid, wait_text(STAGES - 2))
            u = half_unit(take, lane)
            v = half_unit(take + 512, lane)
            live = (unit + STAGES - 1 < left).to(gl.uint32)
            stage_unit(give, at + (STAGES - 1) * 64, lane, upper_on * live, lower_on * live, stride)
            give = take
            take += STAGE_BYTES
            take = gl.where(take == ring + STAGES * STAGE_BYTES, ring, take)
            at += 64
            x_at += 128
            on = only(rows_on, unit + 1 < left, COLUMN_BLOCKS)
            c = multiply_half(c, u, x0, COLUMN_BLOCKS, 8, 0, DTYPE)
            x0 = load_x(x_at, on, COLUMN_BLOCKS, K * 2)
            c = multiply_half(c, v, x1, COLUMN_BLOCKS, 8, 0, DTYPE)
            x1 = load_x(x_at + 64, on, COLUMN_BLOCKS, K * 2)
        store_partial(partial + (tile * (512 * COLUMN_BLOCKS)).to(gl.uint32), c, lane, COLUMN_BLOCKS)
    if OVERLAP:
        execute(tid, "griddepcontrol.launch_dependents;")
    block_barrier()
    finish_panel(partial, tiles, scale, bias, y, tid, panel, M, N, scale_stride, COLUMN_BLOCKS, WARPS, HAS_BIAS)
    block_barrier()
    # the one store that Gluon sees: it declares the shared memory that the assembly above addresses
    piece0.slice(0, 32 * WARPS).store(tid)
    piece1._keep_alive()
    piece2._keep_alive()


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
    tiles = -(-panel_units // units)
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    for first in range(0, len(x), MAX_ROWS):
        part = x[first : first + MAX_ROWS]
        column_blocks = triton.next_power_of_2(-(-len(part) // 8))
        warps, stages, overlap = launch or choose_launch(x.device, (n, x.shape[1]), column_blocks, tiles)
        pieces = shared_pieces(warps * stages * 1024 + -(-tiles // warps) * warps * 512 * column_blocks)
        int8_linear_kernel[(-(-n // 16),)](
            weight, scale, scale if bias is None else bias, part, y[first:], len(part), n, x.shape[1], tiles, units,
            panel_units, int(scale.shape[0] > 1), COLUMN_BLOCKS=column_blocks, HAS_BIAS=bias is not None,
            BFLOAT16=x.dtype is torch.bfloat16, WARPS=warps, STAGES=stages, OVERLAP=overlap,
            SHARED0=pieces[0], SHARED1=pieces[1], SHARED2=pieces[2], num_warps=warps, launch_pdl=overlap,
        )  # fmt: skip
    return y
