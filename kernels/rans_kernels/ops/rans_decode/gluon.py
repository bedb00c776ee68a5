"""Decode kernel for NVIDIA GPUs: a warp a tile, weights written once, eight bytes of a row at a time."""

# tuples grow in loops that are unrolled
# mypy: disable-error-code="assignment"

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.format import STATE_LOW
from rans_kernels.ops.coded import CodedWeight
from rans_kernels.ops.launch import fit_shared
from rans_kernels.ops.simt import (
    block_barrier,
    close_block,
    execute,
    load_global,
    open_block,
    shared_pieces,
    store_global,
    wait_text,
    word_buffer_bytes,
)
from rans_kernels.ops.warp import (
    codes,
    entry_words,
    join_bytes,
    load_low,
    load_raw,
    next_word,
    raw_bits,
    scaled,
    signed,
    stage_table,
    stage_unit,
    stage_words,
    unit_bytes,
)


@gluon.jit
def rans_decode_kernel(
    heads, words, offsets, table, scale, out, N, K, tiles, units, panel_units, total, scale_stride, entry_bytes,
    word_base,
    CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    WORD_BYTES: gl.constexpr, SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
    FLOAT: gl.constexpr = False,
):  # fmt: skip
    """Write tiles program_id(0) * WARPS ... of `out` [N, K]; K a multiple of 8. `total`: tiles of the matrix.

    `out` is int8, or float16 or bfloat16 and then weight * scale in float32, rounded once; FLOAT weights as they are.
    """
    TABLE_BYTES: gl.constexpr = 4 * entry_words(CODED) << PRECISION
    STAGE_BYTES: gl.constexpr = unit_bytes(RAW, FLOAT)
    tid, lane, warp, pieces, base = open_block(WARPS, SHARED0, SHARED1, SHARED2)
    cursor = base + TABLE_BYTES + (warp * WORD_BYTES).to(gl.uint32)
    ring = base + TABLE_BYTES + WARPS * WORD_BYTES + (warp * (STAGES * STAGE_BYTES)).to(gl.uint32)
    tile = gl.program_id(0) * WARPS + warp
    panel, across = tile // tiles, tile % tiles
    left = gl.where(tile < total, gl.minimum(panel_units - across * units, units), 0)
    ROWS: gl.constexpr = STAGE_BYTES // 128
    head_row = panel.to(gl.int64) * (tiles + panel_units * ROWS) + across * (1 + units * ROWS)
    head = (heads + head_row * 32).to(gl.uint64)
    state = load_global(head + (lane * 4).to(gl.uint64), (left > 0).to(gl.uint32), 1)[0]
    stage_table(base, table, tid, TABLE_BYTES, WARPS)
    stage_words(cursor, words, offsets, tile, total, lane, WORD_BYTES)
    execute(tid, "cp.async.commit_group;")
    raw = head + 128
    for s in gl.static_range(STAGES - 1):
        stage_unit(ring + s * STAGE_BYTES, raw + s * STAGE_BYTES, lane, (s < left).to(gl.uint32), RAW, FLOAT)
        execute(tid, "cp.async.commit_group;")
    execute(tid, wait_text(STAGES - 1))
    block_barrier()
    one = gl.full_like(lane, 1)
    below = (one << lane) - 1
    factors = (gl.full_like(lane, 1) * entry_bytes, gl.full_like(lane, 1) * word_base)
    row = panel * 16 + (lane // 4).to(gl.int32)
    column = across * units * 64 + (lane % 4).to(gl.int32) * 8
    SIZE: gl.constexpr = out.dtype.element_ty.primitive_bitwidth // 8
    to = (out + row.to(gl.int64) * K + column).to(gl.uint64)
    lower = (gl.full_like(lane, 8 * SIZE) * K).to(gl.uint64)
    if SIZE == 2 and not FLOAT:
        DTYPE: gl.constexpr = "bf16" if out.dtype.element_ty == gl.bfloat16 else "f16"
        upper_scale = gl.load(scale + row * scale_stride, mask=row < N, other=0.0)
        lower_scale = gl.load(scale + (row + 8) * scale_stride, mask=row + 8 < N, other=0.0)
    take = ring
    give = ring + (STAGES - 1) * STAGE_BYTES
    carry = state
    for unit in range(0, units):
        execute(tid, wait_text(STAGES - 2))
        here = take
        plane = load_raw(here, lane, one, RAW, True)
        stage_unit(give, raw + (STAGES - 1) * STAGE_BYTES, lane, (unit + STAGES - 1 < left).to(gl.uint32), RAW, FLOAT)
        execute(tid, "cp.async.commit_group;")
        give = take
        take += STAGE_BYTES
        take = gl.where(take == ring + STAGES * STAGE_BYTES, ring, take)
        raw += STAGE_BYTES
        u = ()
        for j in gl.static_range(8):
            state, cursor, coded, carry = next_word(
                state, cursor, base, below, factors, j, carry, CODED, RAW, PRECISION
            )
            u = u + (codes(coded, raw_bits(plane, j, RAW, FLOAT), CODED, RAW, FLOAT),)
        for h in gl.static_range(2):
            inside = (unit < left) & (column + 32 * h < K)
            upper_on = (inside & (row < N)).to(gl.uint32)
            lower_on = (inside & (row + 8 < N)).to(gl.uint32)
            at = to + 32 * SIZE * h
            if FLOAT:
                low = load_low(here, lane, one, h, RAW, True)
                store_global(at, join_bytes(u[4 * h], low[0]) + join_bytes(u[4 * h + 1], low[1]), upper_on)
                store_global(at + lower, join_bytes(u[4 * h + 2], low[2]) + join_bytes(u[4 * h + 3], low[3]), lower_on)
            elif SIZE == 1:
                store_global(at, (signed(u[4 * h], CODED, RAW), signed(u[4 * h + 1], CODED, RAW)), upper_on)
                store_global(at + lower, (signed(u[4 * h + 2], CODED, RAW), signed(u[4 * h + 3], CODED, RAW)), lower_on)
            else:
                store_global(at, scaled(u[4 * h], upper_scale, CODED, RAW, DTYPE)
                             + scaled(u[4 * h + 1], upper_scale, CODED, RAW, DTYPE), upper_on)  # fmt: skip
                store_global(at + lower, scaled(u[4 * h + 2], lower_scale, CODED, RAW, DTYPE)
                             + scaled(u[4 * h + 3], lower_scale, CODED, RAW, DTYPE), lower_on)  # fmt: skip
        to += 64 * SIZE
        column += 64
    close_block(pieces, tid, WARPS)


def rans_decode_gluon(
    weight: CodedWeight, scale: Tensor | None = None, dtype: torch.dtype = torch.int8, warps: int = 4, stages: int = 3
) -> Tensor:
    """Decode to [N, K]: the integers, or times the scale in float16 or bfloat16; or the floats that were coded.

    Args:
        weight: of one matrix.
        scale: float32 [1, 1] or [N, 1]; needed for integers unless dtype is int8.
        dtype: int8, float16 or bfloat16; for floats their own.
        warps: of a block.
        stages: of the ring that raw bits pass through.
    """
    layout, (n, k) = weight.layout, weight.layout.shape
    coded, raw = layout.split.coded_bits, layout.split.raw_bits
    word_bytes = word_buffer_bytes(weight.word_rows)

    def shared_bytes(warps: int) -> int:
        return (
            weight.table.nbytes
            + warps * word_bytes
            + max(warps * stages * 128 * layout.unit_rows, weight.overrun_bytes)
        )

    warps = fit_shared(weight.heads.device, warps, shared_bytes)
    pieces = shared_pieces(shared_bytes(warps))
    # eight columns are stored at once
    out = torch.empty(n, -(-k // 8) * 8, dtype=dtype, device=weight.heads.device)
    factor = weight.table if scale is None else scale
    if layout.tiles:
        rans_decode_kernel[(-(-layout.tiles // warps),)](
            weight.heads, weight.words, weight.offsets, weight.table, factor, out, n, out.shape[1], layout.grid[1],
            layout.most_units, layout.panel_units, layout.tiles, int(factor.shape[0] > 1),
            4 * weight.table.shape[1], STATE_LOW,
            CODED=coded, RAW=raw, PRECISION=layout.probability_bits, WARPS=warps, STAGES=stages, WORD_BYTES=word_bytes,
            SHARED0=pieces[0], SHARED1=pieces[1], SHARED2=pieces[2], FLOAT=layout.is_float, num_warps=warps,
        )  # fmt: skip
    return out if out.shape[1] == k else out[:, :k].contiguous()
