"""Decode kernels for NVIDIA GPUs: a warp a tile, weights written once, whole lines of memory at once."""

# tuples grow in loops that are unrolled
# mypy: disable-error-code="assignment,misc"

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.format import STATE_LOW
from rans_kernels.ops.coded import CodedWeight, overrun_bytes
from rans_kernels.ops.launch import fit_shared
from rans_kernels.ops.simt import (
    align,
    block_barrier,
    close_block,
    execute,
    load_global,
    load_shared,
    open_block,
    shared_pieces,
    wait_text,
    word_buffer_bytes,
)
from rans_kernels.ops.warp import (
    can_sign,
    entry_words,
    factors_where,
    half_codes,
    join_bytes,
    load_low,
    load_raw,
    open_factors,
    open_ring,
    scaled,
    stage_table,
    stage_unit,
    stage_words,
    unit_bytes,
)

COLUMNS = {torch.int8: 16, torch.float16: 8, torch.bfloat16: 8}
"""Columns that a lane stores at once, by the dtype of the result: rows are a multiple of them."""


@gluon.constexpr_function
def store_asm(n, cache):
    """Vector store of n registers where the column is below the limit."""
    values = ", ".join(f"${i}" for i in range(2, n + 2))
    store = f"@p st.global{cache}.v{n}.u32 [$1], {{{values}}};"
    return f"{{ .reg .pred p; setp.lt.s32 p, ${n + 2}, ${n + 3}; {store} mov.u32 $0, 0; }}"


@gluon.jit
def store_below(pointer, values, column, limit, CACHE: gl.constexpr):
    """Two or four 32-bit values at a global address (uint64), where column < limit."""
    if len(values) == 2:
        gl.inline_asm_elementwise(
            store_asm(2, CACHE), "=r,l,r,r,r,r", [pointer, values[0], values[1], column, limit], dtype=gl.uint32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        gl.inline_asm_elementwise(
            store_asm(4, CACHE), "=r,l,r,r,r,r,r,r",
            [pointer, values[0], values[1], values[2], values[3], column, limit],
            dtype=gl.uint32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.constexpr_function
def put_asm(n):
    """Vector store of n registers to shared memory."""
    values = ", ".join(f"${i}" for i in range(2, n + 2))
    return f"st.shared.v{n}.u32 [$1], {{{values}}}; mov.u32 $0, 0;"


@gluon.jit
def put(address, values):
    """Two or four 32-bit values at a shared address."""
    if len(values) == 2:
        gl.inline_asm_elementwise(
            put_asm(2), "=r,r,r,r", [address, values[0], values[1]], dtype=gl.uint32, is_pure=False, pack=1
        )
    else:
        gl.inline_asm_elementwise(
            put_asm(4), "=r,r,r,r,r,r", [address, values[0], values[1], values[2], values[3]], dtype=gl.uint32,
            is_pure=False, pack=1,
        )  # fmt: skip


@gluon.constexpr_function
def signed_asm(coded, raw):
    """Codes of four weights to the weights, int8: each byte less the offset, by itself.

    With 128 added a byte borrows nothing of the next. The sum is a product with a factor that is 1 but no constant: the
    pipe of shifts and logic is the one that is full.
    """
    if coded + raw == 8:
        return "xor.b32 $0, $1, 0x80808080; // $2"
    add = 0x01010101 * (128 - (1 << (coded + raw - 1)))
    return f"{{ .reg .b32 m; mad.lo.u32 m, $1, $2, {add}; xor.b32 $0, m, 0x80808080; }}"


@gluon.jit
def signed(u, one, CODED: gl.constexpr, RAW: gl.constexpr):
    """Codes of four weights to the weights."""
    return gl.inline_asm_elementwise(signed_asm(CODED, RAW), "=r,r,r", [u, one], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def decode_tiles(
    first, heads, words, offsets, table, scale, out, N, K, tiles, units, panel_units, total, scale_stride, entry_bytes,
    word_base,
    DTYPE: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, LINES: gl.constexpr, CACHE: gl.constexpr, FLOAT: gl.constexpr,
    RAGGED: gl.constexpr, WORD_BYTES: gl.constexpr, WORD_RING: gl.constexpr,
    SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """Write tiles `first` to first + WARPS - 1 of a matrix at address `out`, [N, K] of DTYPE; `total`: its tiles.

    DTYPE "i8", or "f16" or "bf16" and then weight * scale in float32, rounded once; FLOAT weights as they are. STAGES:
    of the ring that raw planes pass through; 1 keeps them in registers, one unit ahead. LINES, 2 or 4: 64 times so many
    bytes of a row are collected in shared memory and stored at once; 0 stores what a lane has of a row. Shared memory:
    table | words | ring | lines. Words stand in front, so that a damaged stream, whose cursor runs on, reads what is
    behind and nothing outside. With WORD_RING, of many words, they pass through a ring of WORD_BYTES, and STAGES is 1.
    RAGGED says that the last tile of a panel has fewer units than the others.
    """
    SIZE: gl.constexpr = 1 if DTYPE == "i8" else 2
    TABLE_BYTES: gl.constexpr = 4 * entry_words(CODED) << PRECISION
    STAGE_BYTES: gl.constexpr = unit_bytes(RAW, FLOAT)
    RING: gl.constexpr = STAGES * STAGE_BYTES if STAGES > 1 else 0
    WRAP: gl.constexpr = WORD_BYTES if WORD_RING else 0
    SIGNED: gl.constexpr = can_sign(CODED, RAW) and SIZE == 1
    LINE: gl.constexpr = 64 * LINES
    LINE_UNITS: gl.constexpr = LINES // SIZE
    LINE_LANES: gl.constexpr = 4 * LINES
    # rows at once of a store
    LINE_ROWS: gl.constexpr = 8 // LINES if LINES else 8
    # parts of a line are exchanged by the row, lest rows share banks
    PART: gl.constexpr = 32 * SIZE
    TURNS: gl.constexpr = 4 // SIZE
    tid, lane, warp, pieces, base = open_block(WARPS, SHARED0, SHARED1, SHARED2)
    behind = base + TABLE_BYTES
    if WORD_RING:
        behind = align(behind, WORD_BYTES)
    word_buffer = behind + (warp * WORD_BYTES).to(gl.uint32)
    ring = behind + WARPS * WORD_BYTES + (warp * RING).to(gl.uint32)
    lines = behind + WARPS * (WORD_BYTES + RING)
    if LINES:
        lines = align(lines, LINE) + (warp * (16 * LINE)).to(gl.uint32)
    tile = first + warp
    panel, across = tile // tiles, tile % tiles
    left = gl.where(tile < total, gl.minimum(panel_units - across * units, units), 0)
    ROWS: gl.constexpr = STAGE_BYTES // 128
    head_row = panel.to(gl.int64) * (tiles + panel_units * ROWS) + across * (1 + units * ROWS)
    head = (heads + head_row * 32).to(gl.uint64)
    state = load_global(head + (lane * 4).to(gl.uint64), (left > 0).to(gl.uint32), 1)[0]
    stage_table(base, table, tid, TABLE_BYTES, WARPS)
    if WORD_RING:
        opened = open_ring(word_buffer, words, offsets, tile, total, lane, WORD_BYTES)
        cursor = gl.full_like(lane, 0)
    else:
        opened = ()
        stage_words(word_buffer, words, offsets, tile, total, lane, WORD_BYTES)
        execute(tid, "cp.async.commit_group;")
        cursor = word_buffer
    raw = head + 128
    planes = load_raw(raw, lane, (left > 0).to(gl.uint32), RAW if STAGES == 1 else 0, False)
    for s in gl.static_range(STAGES - 1):
        stage_unit(ring + s * STAGE_BYTES, raw + s * STAGE_BYTES, lane, (s < left).to(gl.uint32), RAW, FLOAT)
        execute(tid, "cp.async.commit_group;")
    execute(tid, wait_text(STAGES - 1))
    block_barrier()
    ones = gl.full_like(lane, 1)
    below = (ones << lane) - 1
    factors = factors_where(left > 0, open_factors(lane, entry_bytes, word_base))
    column = across * units * 64
    # columns of the tile that are inside the matrix end here
    end = gl.minimum(K, column + left * 64)
    own_row = panel * 16 + (lane // 4).to(gl.int32)
    if LINES:
        row = panel * 16 + (lane // LINE_LANES).to(gl.int32)
        column += (lane % LINE_LANES).to(gl.int32) * (16 // SIZE)
        to_line = lines + (lane // 4) * LINE + (lane // 4 % TURNS) * PART + (lane % 4) * (8 * SIZE)
        from_line = (
            lines + (lane // LINE_LANES) * LINE + ((lane % LINE_LANES) * 16 ^ (lane // LINE_LANES % TURNS * PART))
        )
    else:
        row = own_row
        column += (lane % 4).to(gl.int32) * 8
    step = (gl.full_like(lane, LINE_ROWS * SIZE) * K).to(gl.uint64)
    to = (out + (row.to(gl.int64) * K + column) * SIZE).to(gl.uint64)
    limits = ()
    for i in gl.static_range(16 // LINE_ROWS):
        limits = limits + (gl.where(row + LINE_ROWS * i < N, end, 0),)
    if SIZE == 2 and not FLOAT:
        upper_scale = gl.load(scale + own_row * scale_stride, mask=own_row < N, other=0.0)
        lower_scale = gl.load(scale + (own_row + 8) * scale_stride, mask=own_row + 8 < N, other=0.0)
    take = ring
    give = ring + (STAGES - 1) * STAGE_BYTES
    carry = state
    for unit in range(0, units):
        if STAGES == 1:
            plane = planes
            planes = load_raw(raw + STAGE_BYTES, lane, (unit + 1 < left).to(gl.uint32), RAW, False)
        else:
            execute(tid, wait_text(STAGES - 2))
            plane = load_raw(take, lane, ones, RAW, True)
            ahead = (unit + STAGES - 1 < left).to(gl.uint32)
            stage_unit(give, raw + (STAGES - 1) * STAGE_BYTES, lane, ahead, RAW, FLOAT)
            execute(tid, "cp.async.commit_group;")
            here = take
            give = take
            take += STAGE_BYTES
            take = gl.where(take == ring + STAGES * STAGE_BYTES, ring, take)
        low = ((), ())
        if FLOAT:
            on = (unit < left).to(gl.uint32)
            if STAGES == 1:
                low = (load_low(raw, lane, on, 0, RAW, False), load_low(raw, lane, on, 1, RAW, False))
            else:
                low = (load_low(here, lane, on, 0, RAW, True), load_low(here, lane, on, 1, RAW, True))
        raw += STAGE_BYTES
        u = ()
        live = factors_where(unit < left, factors) if RAGGED else factors
        for half in gl.static_range(2):
            state, cursor, opened, carry, four = half_codes(
                state, cursor, opened, base, below, live, word_buffer, lane, plane, carry, half, CODED, RAW,
                PRECISION, WRAP, FLOAT, SIGNED,
            )  # fmt: skip
            u = u + four
        for h in gl.static_range(2):
            if FLOAT:
                upper = join_bytes(u[4 * h], low[h][0]) + join_bytes(u[4 * h + 1], low[h][1])
                lower = join_bytes(u[4 * h + 2], low[h][2]) + join_bytes(u[4 * h + 3], low[h][3])
            elif SIGNED:
                upper = (u[4 * h], u[4 * h + 1])
                lower = (u[4 * h + 2], u[4 * h + 3])
            elif SIZE == 1:
                upper = (signed(u[4 * h], factors[2], CODED, RAW), signed(u[4 * h + 1], factors[2], CODED, RAW))
                lower = (signed(u[4 * h + 2], factors[2], CODED, RAW), signed(u[4 * h + 3], factors[2], CODED, RAW))
            else:
                upper = scaled(u[4 * h], upper_scale, CODED, RAW, DTYPE) + scaled(
                    u[4 * h + 1], upper_scale, CODED, RAW, DTYPE
                )
                lower = scaled(u[4 * h + 2], lower_scale, CODED, RAW, DTYPE) + scaled(
                    u[4 * h + 3], lower_scale, CODED, RAW, DTYPE
                )
            if LINES:
                at = to_line ^ (gl.full_like(lane, 2 * PART) * (unit % LINE_UNITS) + PART * h).to(gl.uint32)
                put(at, upper)
                put(at + 8 * LINE, lower)
            else:
                store_below(to + PART * h, upper, column, limits[0] - 32 * h, CACHE)
                store_below(to + PART * h + step, lower, column, limits[1] - 32 * h, CACHE)
        if LINES:
            whole = (unit + 1) % LINE_UNITS == 0
            if whole or unit + 1 == units:
                # lanes read what others wrote, and write over what others have read
                execute(tid, "bar.warp.sync 0xffffffff;")
                target = to
                for i in gl.static_range(16 // LINE_ROWS):
                    turned = (from_line ^ (LINE_ROWS * i % TURNS * PART)) + i * (LINE_ROWS * LINE)
                    store_below(target, load_shared(turned, 4), column, limits[i], CACHE)
                    target += step
                execute(tid, "bar.warp.sync 0xffffffff;")
            to += (gl.full_like(lane, LINE) * whole.to(gl.int32)).to(gl.uint64)
            column += (LINE // SIZE) * whole.to(gl.int32)
        else:
            to += 64 * SIZE
            column += 64
    close_block(pieces, tid, WARPS)


@gluon.jit
def rans_decode_kernel(
    heads, words, offsets, table, scale, out, N, K, tiles, units, panel_units, total, scale_stride, entry_bytes,
    word_base,
    DTYPE: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, LINES: gl.constexpr, CACHE: gl.constexpr, FLOAT: gl.constexpr,
    RAGGED: gl.constexpr, WORD_BYTES: gl.constexpr, WORD_RING: gl.constexpr,
    SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """`decode_tiles` from program_id(0) * WARPS on."""
    decode_tiles(
        gl.program_id(0) * WARPS, heads, words, offsets, table, scale, out.to(gl.int64), N, K, tiles, units,
        panel_units, total, scale_stride, entry_bytes, word_base, DTYPE, CODED, RAW, PRECISION, WARPS, STAGES,
        LINES, CACHE, FLOAT, RAGGED, WORD_BYTES, WORD_RING, SHARED0, SHARED1, SHARED2,
    )  # fmt: skip


@gluon.jit
def rans_decode_many_kernel(
    descriptors, blocks, entry_bytes, word_base,
    DTYPE: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, LINES: gl.constexpr, CACHE: gl.constexpr, FLOAT: gl.constexpr,
    RAGGED: gl.constexpr, WORD_BYTES: gl.constexpr, WORD_RING: gl.constexpr,
    DESCRIPTOR: gl.constexpr,
    SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """`decode_tiles` of many weights: blocks int32 [programs, 2] holds each one's weight and first tile."""
    program = gl.program_id(0)
    at = descriptors + gl.load(blocks + 2 * program) * DESCRIPTOR
    first = gl.load(blocks + 2 * program + 1)
    decode_tiles(
        first, gl.load(at).to(gl.pointer_type(gl.int32)), gl.load(at + 1).to(gl.pointer_type(gl.int16)),
        gl.load(at + 2).to(gl.pointer_type(gl.int32)), gl.load(at + 3).to(gl.pointer_type(gl.int32)),
        gl.load(at + 4).to(gl.pointer_type(gl.float32)), gl.load(at + 5), gl.load(at + 6).to(gl.int32),
        gl.load(at + 7).to(gl.int32), gl.load(at + 8).to(gl.int32), gl.load(at + 9).to(gl.int32),
        gl.load(at + 10).to(gl.int32), gl.load(at + 11).to(gl.int32), gl.load(at + 12).to(gl.int32), entry_bytes,
        word_base, DTYPE, CODED, RAW, PRECISION, WARPS, STAGES, LINES, CACHE, FLOAT, RAGGED,
        WORD_BYTES, WORD_RING, SHARED0, SHARED1, SHARED2,
    )  # fmt: skip


class DecodeLaunch(NamedTuple):
    """Configuration of a launch. It changes the speed, never a bit of the result."""

    warps: int
    """Of a block, a power of two."""
    stages: int
    """Of the ring that raw planes pass through; 1 keeps them in registers instead."""
    lines: int
    """Times 64 bytes of a row, 2 or 4, that are collected in shared memory and stored at once; or 0."""
    cache: str = ""
    """Suffix of the store: as .cs, what is written will not be read soon."""


MANY_TILES = 7000
"""Tiles of a launch from which an H200 is full even with the fewer warps that lines of 256 bytes leave it."""


def choose_launch(dtype: torch.dtype, tiles: int, word_ring: bool) -> DecodeLaunch:
    """Launch for so many tiles, measured on an H200 (docs/kernels.md).

    Args:
        dtype: of the result.
        tiles: of all weights of the launch.
        word_ring: whether words pass through a ring, as where most of a weight is coded.
    """
    if tiles < MANY_TILES or word_ring:
        return DecodeLaunch(4, 3, 2 if dtype is torch.int8 else 0)
    return DecodeLaunch(8 if dtype is torch.int8 else 4, 3, 4)


DTYPE_NAMES = {torch.int8: "i8", torch.float16: "f16", torch.bfloat16: "bf16"}


def describe(weight: CodedWeight, scale: Tensor | None, out: Tensor) -> list[Any]:
    """The kernel's arguments that belong to one weight, in their order; tensors stand for their addresses.

    Args:
        weight: of one matrix.
        scale: float32 [1, 1] or [N, 1]; None for INT8.
        out: of the shape of the coded matrix, but columns a multiple of COLUMNS.
    """
    layout = weight.layout
    factor = weight.table if scale is None else scale
    return [
        weight.heads, weight.words, weight.offsets, weight.table, factor, out, layout.coded_shape[0], out.shape[1],
        layout.grid[1], layout.most_units, layout.panel_units, layout.tiles, int(factor.shape[0] > 1),
    ]  # fmt: skip


def launch_options(weights: Sequence[CodedWeight], dtype: torch.dtype, launch: DecodeLaunch | None) -> dict[str, Any]:
    """Arguments of a launch that are common to weights of one split and precision."""
    first = weights[0]
    word_bytes, word_ring = word_buffer_bytes(max(weight.word_rows for weight in weights))
    launch = launch or choose_launch(dtype, sum(weight.layout.tiles for weight in weights), word_ring)
    split, lines = first.layout.split, launch.lines
    # a ring of words stands at a multiple of its size, and a cursor that runs on stays in it
    slack, overrun = (word_bytes, 0) if word_ring else (0, max(overrun_bytes(weight.layout) for weight in weights))
    stages = 1 if word_ring else launch.stages
    ring = 128 * first.layout.unit_rows * stages if stages > 1 else 0

    def shared_bytes(warps: int) -> int:
        behind = warps * (ring + lines * 16 * 64) + 64 * lines
        return first.table.nbytes + slack + warps * word_bytes + max(behind, overrun)

    device = first.heads.device
    warps = fit_shared(device, launch.warps, shared_bytes)
    pieces = shared_pieces(shared_bytes(warps))
    return {
        "entry_bytes": 4 * first.table.shape[1], "word_base": STATE_LOW,
        "DTYPE": DTYPE_NAMES[dtype], "CODED": split.coded_bits, "RAW": split.raw_bits,
        "PRECISION": first.layout.probability_bits, "WARPS": warps, "STAGES": stages, "LINES": lines,
        "CACHE": launch.cache, "FLOAT": first.layout.is_float,
        "RAGGED": any(weight.layout.panel_units % weight.layout.most_units for weight in weights),
        "WORD_BYTES": word_bytes, "WORD_RING": word_ring,
        "SHARED0": pieces[0], "SHARED1": pieces[1], "SHARED2": pieces[2], "num_warps": warps,
    }  # fmt: skip


def rans_decode_gluon(
    weight: CodedWeight,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    out: Tensor | None = None,
    launch: DecodeLaunch | None = None,
) -> Tensor:
    """Decode to [N, K]: the integers, or times the scale in float16 or bfloat16; or the floats that were coded.

    Args:
        weight: of one matrix.
        scale: float32 [1, 1] or, unless the weight is folded, [N, 1]; needed unless dtype is int8.
        dtype: int8, float16 or bfloat16.
        out: contiguous [N, K] of the dtype to write to, or None.
        launch: configuration; None takes the default.
    """
    n, k = weight.layout.coded_shape
    pitch = -(-k // COLUMNS[dtype]) * COLUMNS[dtype]
    # lanes store 16 bytes
    in_place = out is not None and pitch == k and out.data_ptr() % 16 == 0
    if out is not None and in_place:
        target = out.view(n, k)
    else:
        target = torch.empty(n, pitch, dtype=dtype, device=weight.heads.device)
    if weight.layout.tiles:
        options = launch_options([weight], dtype, launch)
        rans_decode_kernel[(-(-weight.layout.tiles // options["WARPS"]),)](*describe(weight, scale, target), **options)
    found = (target if pitch == k else target[:, :k].contiguous()).view(weight.layout.shape)
    if out is None:
        return found
    return out if in_place else out.copy_(found)


def plan_launch(
    parts: Sequence[tuple[CodedWeight, Tensor | None, Tensor]], launch: DecodeLaunch | None = None
) -> Callable[[], object]:
    """A function that decodes several weights in one launch; the caller keeps all the tensors.

    Args:
        parts: not empty, on the current GPU, of one split, precision and dtype: arguments of `describe`.
        launch: configuration; None takes the default.
    """
    weights, out = [weight for weight, _, _ in parts], parts[0][2]
    options = launch_options(weights, out.dtype, launch)
    rows, blocks = [], []
    for index, part in enumerate(parts):
        rows.append([a.data_ptr() if isinstance(a, Tensor) else a for a in describe(*part)])
        blocks += [(index, first) for first in range(0, part[0].layout.tiles, options["WARPS"])]
    descriptors = torch.tensor(rows, dtype=torch.int64, device=out.device)
    programs = torch.tensor(blocks, dtype=torch.int32, device=out.device)

    def run() -> None:
        rans_decode_many_kernel[(len(blocks),)](descriptors, programs, DESCRIPTOR=len(rows[0]), **options)

    return run
