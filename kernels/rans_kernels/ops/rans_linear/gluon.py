"""Fused kernel for NVIDIA GPUs: rANS decode straight into the operands of tensor-core MMAs.

A block computes one panel; a warp decodes every WARPS-th tile of it, unit by unit, and multiplies with x as it goes.
Nothing is written but y. panel.py has the arithmetic and its order.
"""

# tuples grow in loops that are unrolled
# mypy: disable-error-code="assignment"

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.format import STATE_LOW, TileLayout
from rans_kernels.ops.coded import CodedWeight, overrun_bytes
from rans_kernels.ops.launch import MAX_ROWS, Launch, choose_launch, fit_shared
from rans_kernels.ops.panel import (
    finish_panel,
    keep_where,
    load_x,
    multiply_float_half,
    multiply_half,
    only,
    pad_columns,
    span_tiles,
    store_partial,
)
from rans_kernels.ops.simt import (
    align,
    block_barrier,
    close_block,
    execute,
    load_global,
    open_block,
    shared_pieces,
    wait_text,
    word_buffer_bytes,
)
from rans_kernels.ops.warp import (
    entry_words,
    factors_where,
    half_codes,
    load_low,
    load_raw,
    open_factors,
    open_ring,
    stage_table,
    stage_unit,
    stage_words,
    unit_bytes,
)


@gluon.jit
def begin_tile(
    heads, tile, units, panel_units, ring, lane, RAW: gl.constexpr, STAGES: gl.constexpr, FLOAT: gl.constexpr
):
    """Begin to load a tile; returns its units, the states, where its units stand, and what registers hold of the first.

    STAGES 1 keeps raw planes in registers, one unit ahead: fewest instructions, for a GPU that is full of warps. More
    go through a ring in shared memory, which hides latency where warps are few.
    """
    STAGE_BYTES: gl.constexpr = unit_bytes(RAW, FLOAT)
    left = gl.minimum(panel_units - tile * units, units)
    head = (heads + tile.to(gl.int64) * (32 + units * (STAGE_BYTES // 4))).to(gl.uint64)
    state = load_global(head + (lane * 4).to(gl.uint64), (left > 0).to(gl.uint32), 1)[0]
    raw = head + 128
    on = (left > 0).to(gl.uint32)
    planes = load_raw(raw, lane, on, RAW if STAGES == 1 else 0, False)
    low = ((), ())
    if FLOAT and STAGES == 1:
        low = (load_low(raw, lane, on, 0, RAW, False), load_low(raw, lane, on, 1, RAW, False))
    for s in gl.static_range(STAGES - 1):
        stage_unit(ring + s * STAGE_BYTES, raw + s * STAGE_BYTES, lane, (s < left).to(gl.uint32), RAW, FLOAT)
        execute(lane, "cp.async.commit_group;")
    return left, state, raw, planes, low


@gluon.jit
def multiply_tile(
    begun, units, word_buffer, opened, ring, table, factors, x_at, rows_on, K, lane, COLUMN_BLOCKS: gl.constexpr,
    CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    DTYPE: gl.constexpr, FLOAT: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Sums of this warp's tile, a chain of MMAs from zero."""
    left, state, raw, planes, low = begun
    STAGE_BYTES: gl.constexpr = unit_bytes(RAW, FLOAT)
    one = gl.full_like(lane, 1)
    below = (one << lane) - 1
    factors = factors_where(left > 0, factors)
    on = only(rows_on, left > 0, COLUMN_BLOCKS)
    x = (load_x(x_at, on, COLUMN_BLOCKS, K * 2), load_x(x_at + 64, on, COLUMN_BLOCKS, K * 2))
    zero = gl.full_like(lane, 0).to(gl.float32)
    c = ((zero, zero, zero, zero),) * COLUMN_BLOCKS
    take = ring
    give = ring + (STAGES - 1) * STAGE_BYTES
    cursor = gl.full_like(lane, 0) if RING else word_buffer
    for unit in range(0, units):
        on = only(rows_on, unit + 1 < left, COLUMN_BLOCKS)
        if STAGES == 1:
            plane = planes
            planes = load_raw(raw + STAGE_BYTES, lane, (unit + 1 < left).to(gl.uint32), RAW, False)
        else:
            execute(lane, wait_text(STAGES - 2))
            here = take
            plane = load_raw(here, lane, one, RAW, True)
            ahead = (unit + STAGES - 1 < left).to(gl.uint32)
            stage_unit(give, raw + (STAGES - 1) * STAGE_BYTES, lane, ahead, RAW, FLOAT)
            execute(lane, "cp.async.commit_group;")
            give = take
            take += STAGE_BYTES
            take = gl.where(take == ring + STAGES * STAGE_BYTES, ring, take)
        raw += STAGE_BYTES
        x_at += 128
        before = c
        carry = state
        live = factors_where(unit < left, factors) if RAGGED else factors
        for half in gl.static_range(2):
            state, cursor, opened, carry, u = half_codes(
                state, cursor, opened, table, below, live, word_buffer, lane, plane, carry, half, CODED, RAW,
                PRECISION, RING, FLOAT,
            )  # fmt: skip
            if FLOAT and STAGES == 1:
                c = multiply_float_half(c, u, low[half], x[half], COLUMN_BLOCKS, DTYPE)
                following = load_low(raw, lane, (unit + 1 < left).to(gl.uint32), half, RAW, False)
                low = (following, low[1]) if half == 0 else (low[0], following)
            elif FLOAT:
                c = multiply_float_half(c, u, load_low(here, lane, one, half, RAW, True), x[half], COLUMN_BLOCKS, DTYPE)
            else:
                c = multiply_half(c, u, x[half], COLUMN_BLOCKS, CODED, RAW, DTYPE)
            if FLOAT and RAGGED and half == 1:
                # x is 0 beyond the tile's end, but what is decoded there may be no number
                c = keep_where(unit < left, c, before, COLUMN_BLOCKS)
            following = load_x(x_at + 64 * half, on, COLUMN_BLOCKS, K * 2)
            x = (following, x[1]) if half == 0 else (x[0], following)
    return c


@gluon.jit
def multiply_panel(
    panel, heads, words, offsets, table, scale, bias, x, y, M, N, K, units, panel_units, scale_stride, entry_bytes,
    word_base,
    TILES: gl.constexpr, SPAN: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr,
    COLUMN_BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, BFLOAT16: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, WORD_BYTES: gl.constexpr, WORD_RING: gl.constexpr, OVERLAP: gl.constexpr,
    FLOAT: gl.constexpr, RAGGED: gl.constexpr,
    SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] @ W.T for one panel, by the whole block; K a multiple of 64, x contiguous, 16-byte aligned.

    Shared memory: table | words, two buffers a warp if it has several tiles | ring of raw planes | sums of every tile.
    Words stand in front, so that a damaged stream, whose cursor runs on, reads what is behind and nothing outside.
    With WORD_RING, of many words, they pass through a ring of WORD_BYTES, and STAGES is 1.
    FLOAT weights are of x's dtype; RAGGED says that their last tile of a panel has fewer units than the others.
    OVERLAP lets the next kernel of the stream begin while this one ends (programmatic dependent launch).
    """
    DTYPE: gl.constexpr = "bf16" if BFLOAT16 else "f16"
    TABLE_BYTES: gl.constexpr = 4 * entry_words(CODED) << PRECISION
    WORDS: gl.constexpr = WORD_BYTES if WORD_RING or TILES <= WARPS else 2 * WORD_BYTES
    RING: gl.constexpr = STAGES * unit_bytes(RAW, FLOAT)
    WRAP: gl.constexpr = WORD_BYTES if WORD_RING else 0
    tid, lane, warp, pieces, base = open_block(WARPS, SHARED0, SHARED1, SHARED2)
    behind = base + TABLE_BYTES
    if WORD_RING:
        behind = align(behind, WORD_BYTES)
    word_buffer = behind + (warp * WORDS).to(gl.uint32)
    ring = behind + WARPS * WORDS + (warp * RING).to(gl.uint32)
    partial = behind + WARPS * (WORDS + RING)
    heads += panel.to(gl.int64) * (TILES * 32 + panel_units * (unit_bytes(RAW, FLOAT) // 4))
    offsets += panel * TILES

    stage_table(base, table, tid, TABLE_BYTES, WARPS)
    if WORD_RING:
        opened = open_ring(word_buffer, words, offsets, warp, TILES, lane, WORD_BYTES)
    else:
        opened = ()
        stage_words(word_buffer, words, offsets, warp, TILES, lane, WORD_BYTES)
        execute(tid, "cp.async.commit_group;")
    begun = begin_tile(heads, warp, units, panel_units, ring, lane, RAW, STAGES, FLOAT)
    if OVERLAP:
        # weights are nobody's result; x is
        execute(tid, "griddepcontrol.wait;")
    factors = open_factors(lane, entry_bytes, word_base)
    row = (lane // 4).to(gl.int32)
    rows_on = ()
    for n in gl.static_range(COLUMN_BLOCKS):
        rows_on = rows_on + ((8 * n + row < M).to(gl.uint32),)
    x_lane = (x + row.to(gl.int64) * K + (lane % 4).to(gl.int32) * 8).to(gl.uint64)
    x_at = x_lane + (warp.to(gl.int64) * units * 128).to(gl.uint64)
    execute(tid, wait_text(STAGES - 1))
    block_barrier()
    if TILES > WARPS and not WORD_RING:
        stage_words(word_buffer + WORD_BYTES, words, offsets, warp + WARPS, TILES, lane, WORD_BYTES)
        if STAGES == 1:
            # otherwise the first unit's copies commit them
            execute(tid, "cp.async.commit_group;")
    c = multiply_tile(begun, units, word_buffer, opened, ring, base, factors, x_at, rows_on, K, lane, COLUMN_BLOCKS,
                      CODED, RAW, PRECISION, STAGES, WRAP, DTYPE, FLOAT, RAGGED)  # fmt: skip
    store_partial(partial + (warp * (512 * COLUMN_BLOCKS)).to(gl.uint32), c, lane, COLUMN_BLOCKS)
    for first in range(WARPS, TILES, WARPS):
        tile = first + warp
        buffer = word_buffer
        if WORD_RING:
            opened = open_ring(word_buffer, words, offsets, tile, TILES, lane, WORD_BYTES)
        begun = begin_tile(heads, tile, units, panel_units, ring, lane, RAW, STAGES, FLOAT)
        execute(tid, wait_text(STAGES - 1))
        execute(tid, "bar.warp.sync 0xffffffff;")
        if not WORD_RING:
            odd = (first // WARPS % 2 * WORD_BYTES).to(gl.uint32)
            buffer = word_buffer + odd
            other = word_buffer + (WORD_BYTES - odd)
            stage_words(other, words, offsets, tile + WARPS, TILES, lane, WORD_BYTES)
            if STAGES == 1:
                execute(tid, "cp.async.commit_group;")
        x_at += (gl.full_like(lane, 128 * WARPS) * units).to(gl.uint64)
        c = multiply_tile(begun, units, buffer, opened, ring, base, factors, x_at, rows_on, K, lane, COLUMN_BLOCKS,
                          CODED, RAW, PRECISION, STAGES, WRAP, DTYPE, FLOAT, RAGGED)  # fmt: skip
        store_partial(partial + (tile * (512 * COLUMN_BLOCKS)).to(gl.uint32), c, lane, COLUMN_BLOCKS)
    if OVERLAP:
        execute(tid, "griddepcontrol.launch_dependents;")
    block_barrier()
    finish_panel(partial, scale, bias, y, tid, panel, M, N, scale_stride, TILES, SPAN, COLUMN_BLOCKS, WARPS,
                 HAS_BIAS)  # fmt: skip
    close_block(pieces, tid, WARPS)


@gluon.jit
def rans_linear_kernel(
    heads, words, offsets, table, scale, bias, x, y, M, N, K, units, panel_units, scale_stride, entry_bytes, word_base,
    TILES: gl.constexpr, SPAN: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr,
    COLUMN_BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, BFLOAT16: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, WORD_BYTES: gl.constexpr, WORD_RING: gl.constexpr, OVERLAP: gl.constexpr,
    FLOAT: gl.constexpr, RAGGED: gl.constexpr,
    SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """`multiply_panel` of panel program_id(0)."""
    multiply_panel(
        gl.program_id(0), heads, words, offsets, table, scale, bias, x, y, M, N, K, units, panel_units, scale_stride,
        entry_bytes, word_base, TILES, SPAN, CODED, RAW, PRECISION, COLUMN_BLOCKS, HAS_BIAS, BFLOAT16, WARPS, STAGES,
        WORD_BYTES, WORD_RING, OVERLAP, FLOAT, RAGGED, SHARED0, SHARED1, SHARED2,
    )  # fmt: skip


def rans_linear_gluon(
    x: Tensor, weight: CodedWeight, scale: Tensor, bias: Tensor | None, launch: Launch | None = None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype.

    Args:
        x: float16 or bfloat16; of the weight's dtype if that is a float.
        weight: of one matrix.
        scale: float32 [1, 1] or [N, 1].
        bias: [N] or None.
        launch: configuration; None takes the table's.
    """
    x = pad_columns(x)
    y = torch.empty(len(x), weight.layout.coded_shape[0], dtype=x.dtype, device=x.device)
    for first in range(0, len(x), MAX_ROWS):
        multiply_rows(x[first : first + MAX_ROWS], weight, scale, bias, y[first:], launch)
    return y


def launch_options(device: torch.device, weights: Sequence[CodedWeight], rows: int, launch: Launch | None) -> dict:
    """Constants of a launch for so many rows of x, at most MAX_ROWS.

    The weights have one layout but for their N, and sums in one order.
    """
    layouts, word_rows = tuple(weight.layout for weight in weights), max(weight.word_rows for weight in weights)
    return _launch_options(device, layouts, word_rows, weights[0].table.nbytes, rows, launch)


# worked out anew it takes a CPU as long as the launch itself
@lru_cache(maxsize=4096)
def _launch_options(
    device: torch.device,
    layouts: tuple[TileLayout, ...],
    word_rows: int,
    table_bytes: int,
    rows: int,
    launch: Launch | None,
) -> dict:
    layout = layouts[0]
    tiles, coded, raw = layout.grid[1], layout.split.coded_bits, layout.split.raw_bits
    word_bytes, ring = word_buffer_bytes(word_rows)
    column_blocks = triton.next_power_of_2(-(-rows // 8))
    shape = sum(each.coded_shape[0] for each in layouts), layout.coded_shape[1]
    warps, stages, overlap = launch or choose_launch(device, shape, column_blocks, tiles)
    stages = 1 if ring else stages

    def shared_bytes(warps: int) -> int:
        buffers = 1 if ring or tiles <= warps else 2
        behind = warps * stages * 128 * layout.unit_rows + -(-tiles // warps) * warps * 512 * column_blocks
        # a ring stands at a multiple of its size, and a cursor that runs on stays in it
        slack, overrun = (word_bytes, 0) if ring else (0, overrun_bytes(layout))
        return table_bytes + slack + warps * buffers * word_bytes + max(behind, overrun)

    warps = fit_shared(device, warps, shared_bytes)
    pieces = shared_pieces(shared_bytes(warps))
    return {
        "TILES": tiles, "SPAN": span_tiles(layout.coded_shape[0], tiles), "CODED": coded, "RAW": raw,
        "PRECISION": layout.probability_bits, "COLUMN_BLOCKS": column_blocks, "WARPS": warps, "STAGES": stages,
        "WORD_BYTES": word_bytes, "WORD_RING": ring, "OVERLAP": overlap, "FLOAT": layout.is_float,
        "RAGGED": layout.panel_units % layout.most_units > 0,
        "SHARED0": pieces[0], "SHARED1": pieces[1], "SHARED2": pieces[2], "num_warps": warps, "launch_pdl": overlap,
        # with the many steps between two products the compiler takes more, which halves the warps: slower by a third
        "maxnreg": 64 if ring and column_blocks == 1 else None,
    }  # fmt: skip


def multiply_rows(
    x: Tensor, weight: CodedWeight, scale: Tensor, bias: Tensor | None, y: Tensor, launch: Launch | None
) -> None:
    """One launch, into the first rows of y."""
    layout, (m, k) = weight.layout, x.shape
    rans_linear_kernel[(layout.grid[0],)](
        weight.heads, weight.words, weight.offsets, weight.table, scale, scale if bias is None else bias, x, y, m,
        layout.coded_shape[0], k, layout.most_units, layout.panel_units, int(scale.shape[0] > 1),
        4 * weight.table.shape[1], STATE_LOW, HAS_BIAS=bias is not None, BFLOAT16=x.dtype is torch.bfloat16,
        **launch_options(x.device, [weight], m, launch),
    )  # fmt: skip
