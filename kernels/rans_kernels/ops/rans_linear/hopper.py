"""Fused kernel for Hopper and more than a few rows of x: rANS decode straight into the operands of wgmma.

A block computes 16 * WARPS rows of W over one span of tiles, a warp decodes its panel, and the rows of x, which all
warps share, pass through shared memory once. Sums have the order of panel.py. One kernel before it arranges x, one
after it adds the spans.
"""

# tuples grow in loops that are unrolled
# mypy: disable-error-code="assignment, misc"

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.format import STATE_LOW
from rans_kernels.ops.coded import CodedWeight, overrun_bytes
from rans_kernels.ops.launch import WideLaunch, choose_wide_launch
from rans_kernels.ops.panel import pad_columns, row_operands, span_tiles
from rans_kernels.ops.simt import (
    align,
    block_barrier,
    close_block,
    execute,
    load_global,
    open_block,
    shared_pieces,
    thread_layout,
    wait_text,
    word_buffer_bytes,
)
from rans_kernels.ops.warp import (
    entry_words,
    factors_where,
    half_codes,
    load_raw,
    open_factors,
    open_ring,
    stage_raw,
    stage_table,
    stage_words,
)
from rans_kernels.ops.wgmma import (
    begin_product,
    copy_stage,
    finish_products,
    open_barrier,
    release_stage,
    stage_bytes,
    store_word,
    wait_products,
    wait_stage,
    x_descriptor,
)

STAGES = 4
"""Of the rings of raw planes and of x; a power of two. Warps may be a unit apart, so two units of x are in use."""


@gluon.jit
def arrange_x_kernel(x, out, M, K, COLUMNS: gl.constexpr, OVERLAP: gl.constexpr):
    """Rows of x as wgmma wants them: [M / COLUMNS, K / 64, 8, COLUMNS / 8, 8, 8], from [M, K]; zeros beyond M.

    A warp arranges 8 rows x 32 columns: lane 4 r + t has 8 columns of row r, and register 2 s + p of it, two halves, is
    that lane's part of matrix 2 s + p, where lane t of an MMA holds columns 2 t and 2 t + 1.
    """
    tid = gl.arange(0, 128, layout=thread_layout(4))
    lane = tid % 32
    if OVERLAP:
        execute(tid, "griddepcontrol.launch_dependents;")
        execute(tid, "griddepcontrol.wait;")
    half = gl.program_id(0) * 4 + tid // 32
    row = gl.program_id(1) * 8 + lane // 4
    inside = half * 32 < K
    at = (x + row.to(gl.int64) * K + half * 32 + lane % 4 * 8).to(gl.uint64)
    values = load_global(at, (inside & (row < M)).to(gl.uint32), 4)
    block = gl.program_id(1) // (COLUMNS // 8)
    eight = gl.program_id(1) % (COLUMNS // 8)
    unit = block.to(gl.int64) * (K // 64) + half // 2
    to = (unit * 8 + half % 2 * 4) * (COLUMNS // 8) + eight
    for i in gl.static_range(4):
        pointer = (out + (to + i * (COLUMNS // 8)) * 64 + lane * 2).to(gl.uint64)
        store_word(pointer, values[i], inside.to(gl.uint32))


@gluon.jit
def rans_linear_hopper_kernel(
    heads, words, offsets, table, scale, bias, x, y, M, N, panels, units, panel_units, scale_stride, entry_bytes,
    word_base,
    TILES: gl.constexpr, SPAN: gl.constexpr, CHAIN: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr,
    PRECISION: gl.constexpr, COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, BFLOAT16: gl.constexpr,
    WARPS: gl.constexpr, STAGES: gl.constexpr, WORD_BYTES: gl.constexpr,
    WORD_RING: gl.constexpr, OVERLAP: gl.constexpr,
    SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """Rows 16 * WARPS * program_id(0) ... of W over span program_id(1), with COLUMNS rows of x from program_id(2).

    y is [M, N], or, of several spans, their sums, [spans, M, N] float32, for `add_spans_kernel`. With CHAIN the tiles
    of a span are one chain of MMAs, another order than that of panel.py. x as `arrange_x_kernel` leaves it.
    Shared memory: table | words, two buffers or a ring (WORD_RING) a warp | ring of raw planes | ring of x. Words stand
    in front, so that a damaged stream, whose cursor runs on, reads what is behind and nothing outside.
    """
    DTYPE: gl.constexpr = "bf16" if BFLOAT16 else "f16"
    TABLE_BYTES: gl.constexpr = 4 * entry_words(CODED) << PRECISION
    STAGE_BYTES: gl.constexpr = 128 * RAW
    RING: gl.constexpr = STAGES * STAGE_BYTES
    X_BYTES: gl.constexpr = COLUMNS * 128
    X_STAGE: gl.constexpr = stage_bytes(X_BYTES)
    TURN: gl.constexpr = STAGES.bit_length() - 1
    tid, lane, warp, pieces, base = open_block(WARPS, SHARED0, SHARED1, SHARED2)
    WORDS: gl.constexpr = WORD_BYTES if WORD_RING else 2 * WORD_BYTES
    WRAP: gl.constexpr = WORD_BYTES if WORD_RING else 0
    behind = base + TABLE_BYTES
    if WORD_RING:
        behind = align(behind, WORD_BYTES)
    word_buffer = behind + (warp * WORDS).to(gl.uint32)
    ring = behind + WARPS * WORDS + (warp * RING).to(gl.uint32)
    x_ring = align(behind + WARPS * (WORDS + RING), 128)
    one = gl.full_like(lane, 1)
    zero = gl.full_like(lane, 0)

    # this warp's panel; one beyond the matrix decodes nothing that is stored
    panel = gl.program_id(0) * WARPS + warp
    inside = (panel < panels).to(gl.uint32)
    panel = gl.minimum(panel, panels - 1)
    first = gl.program_id(1) * SPAN
    last = gl.minimum(first + SPAN, TILES)
    unit_end = gl.minimum(last * units, panel_units)
    left = unit_end - first * units
    # a tile's head: its states, then raw planes; the next tile's follow
    head = (heads + (panel.to(gl.int64) * (TILES + panel_units * RAW) + first * (1 + units * RAW)) * 32).to(gl.uint64)
    offsets += panel * TILES
    stage_table(base, table, tid, TABLE_BYTES, WARPS)
    # a panel beyond the matrix has no tiles
    tiles = last * inside.to(gl.int32)
    if not WORD_RING:
        stage_words(word_buffer, words, offsets, first + 0 * warp, tiles, lane, WORD_BYTES)
    execute(tid, "cp.async.commit_group;")
    state = load_global(head + (lane * 4).to(gl.uint64), inside, 1)[0]
    raw = head + 128
    tile_left = units
    for s in gl.static_range(STAGES - 1):
        stage_raw(ring + s * STAGE_BYTES, raw, lane, inside * (left > s).to(gl.uint32), RAW)
        execute(tid, "cp.async.commit_group;")
        raw += STAGE_BYTES
        tile_left -= 1
        raw += gl.where(tile_left == 0, 128, 0)
        tile_left = gl.where(tile_left == 0, units, tile_left)

    # one thread brings the units of x, all warps say when they are done with one
    first_thread = (tid == 0).to(gl.uint32)
    first_lane = (lane == 0).to(gl.uint32)
    for s in gl.static_range(STAGES):
        open_barrier(x_ring + s * X_STAGE + X_BYTES, 1, first_thread)
        open_barrier(x_ring + s * X_STAGE + X_BYTES + 8, WARPS, first_thread)
    execute(tid, "fence.mbarrier_init.release.cluster;")
    execute(tid, wait_text(STAGES - 1))
    block_barrier()
    if OVERLAP:
        # weights are nobody's result; x is
        execute(tid, "griddepcontrol.wait;")
    first_unit = gl.program_id(2).to(gl.int64) * panel_units + first * units
    x_from = (x + first_unit * (64 * COLUMNS)).to(gl.uint64) + (0 * lane).to(gl.uint64)
    for s in gl.static_range(STAGES - 2):
        on = ((left > s) & (warp == 0)).to(gl.uint32)
        copy_stage(x_ring, x_from, zero + s, on, first_lane, X_BYTES, STAGES)

    below = (one << lane) - 1
    factors = factors_where(inside > 0, open_factors(lane, entry_bytes, word_base))
    none = zero.to(gl.float32)
    total = (none,) * (COLUMNS // 2)
    c = total
    g1 = (zero,) * 4
    h1 = (zero,) * 4
    cursor = word_buffer
    other = word_buffer + WORD_BYTES
    for tile in range(first, last):
        if not CHAIN:
            c = (none,) * (COLUMNS // 2)
        following_state = load_global(
            head + ((1 + units * RAW) * 128 + lane * 4).to(gl.uint64), inside * (tile + 1 < last).to(gl.uint32), 1
        )[0]
        head += ((1 + units * RAW) * 128 + 0 * lane).to(gl.uint64)
        if WORD_RING:
            opened = open_ring(word_buffer, words, offsets, tile + 0 * warp, tiles, lane, WORD_BYTES)
            cursor = zero
            begin_cursor = cursor
            execute(tid, wait_text(0))
        else:
            opened = ()
            begin_cursor = cursor
            if units < STAGES:
                # otherwise the words came with a raw plane that was waited for
                execute(tid, wait_text(0))
            else:
                execute(tid, wait_text(STAGES - 1))
        execute(tid, "bar.warp.sync 0xffffffff;")
        if not WORD_RING:
            stage_words(other, words, offsets, tile + 1 + 0 * warp, tiles, lane, WORD_BYTES)
        for unit in range(0, gl.minimum(units, panel_units - tile * units)):
            # rings of raw planes and of x turn alike; x goes into the stage of two units ago
            unit_at = (tile - first) * units + unit
            slot = unit_at & (STAGES - 1)
            slot_before = (unit_at + STAGES - 1) & (STAGES - 1)
            ahead = unit_at + STAGES - 2
            # warps take turns, for none to be slower than the others
            on = ((ahead < left) & (warp == unit_at & (WARPS - 1))).to(gl.uint32)
            copy_stage(x_ring, x_from, zero + ahead.to(gl.uint32), on, first_lane, X_BYTES, STAGES)
            execute(tid, wait_text(STAGES - 2))
            plane = load_raw(ring + (slot * STAGE_BYTES).to(gl.uint32), lane, one, RAW, True)
            stage_raw(ring + (slot_before * STAGE_BYTES).to(gl.uint32), raw, lane,
                      inside * gl.where(ahead + 1 < left, 1, 0).to(gl.uint32), RAW)  # fmt: skip
            execute(tid, "cp.async.commit_group;")
            raw += STAGE_BYTES
            tile_left -= 1
            raw += gl.where(tile_left == 0, 128, 0)
            tile_left = gl.where(tile_left == 0, units, tile_left)
            x_at = x_ring + (slot * X_STAGE).to(gl.uint32)
            descriptor = x_descriptor(x_at, COLUMNS)
            state, cursor, opened, carry, u = half_codes(
                state, cursor, opened, base, below, factors, word_buffer, lane, plane, zero, 0, CODED, RAW, PRECISION,
                WRAP,
            )  # fmt: skip
            g0, h0 = row_operands(u, CODED, RAW, DTYPE)
            wait_stage(x_at, zero + (unit_at >> TURN & 1).to(gl.uint32), X_BYTES)
            c = begin_product(c, g0, h0, descriptor, COLUMNS, DTYPE)
            wait_products(g1, h1, 1)
            # the products of the unit before are over
            release_stage(x_ring + (slot_before * X_STAGE).to(gl.uint32),
                          first_lane * gl.where(unit_at > 0, 1, 0).to(gl.uint32), X_BYTES)  # fmt: skip
            state, cursor, opened, carry, u = half_codes(
                state, cursor, opened, base, below, factors, word_buffer, lane, plane, carry, 1, CODED, RAW, PRECISION,
                WRAP,
            )  # fmt: skip
            g1, h1 = row_operands(u, CODED, RAW, DTYPE)
            c = begin_product(c, g1, h1, descriptor + 2 * (COLUMNS * 32 // 16), COLUMNS, DTYPE)
            wait_products(g0, h0, 1)
        if not CHAIN:
            c = finish_products(c, COLUMNS)
            if SPAN == 1:
                total = c
            else:
                sums = ()
                for i in gl.static_range(COLUMNS // 2):
                    sums = sums + (gl.where(tile == first, c[i], total[i] + c[i]),)
                total = sums
        state = following_state
        cursor = other
        other = begin_cursor
    if CHAIN:
        total = finish_products(c, COLUMNS)
    if OVERLAP:
        execute(tid, "griddepcontrol.launch_dependents;")
    n = (gl.program_id(0) * WARPS + warp) * 16 + (lane // 4).to(gl.int32)
    m = gl.program_id(2) * COLUMNS + (lane % 4 * 2).to(gl.int32)
    at = y + (gl.program_id(1).to(gl.int64) * M + m) * N + n
    for h in gl.static_range(2):
        row = n + 8 * h
        if SPAN >= TILES:
            factor = gl.load(scale + row * scale_stride, mask=row < N, other=0.0)
            offset = gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32) if HAS_BIAS else none
        for j in gl.static_range(COLUMNS // 8):
            for e in gl.static_range(2):
                value = total[4 * j + 2 * h + e]
                if SPAN >= TILES:
                    value = value * factor
                    if HAS_BIAS:
                        value += offset
                on = (m + 8 * j + e < M) & (row < N)
                gl.store(at + (8 * j + e) * N + 8 * h, value.to(y.dtype.element_ty), mask=on)
    close_block(pieces, tid, WARPS)


@gluon.jit
def add_spans_kernel(
    partial, scale, bias, y, M, N, scale_stride, SPANS: gl.constexpr, HAS_BIAS: gl.constexpr, WARPS: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """y [M, N]: the spans' sums in ascending order, times the scale, plus the bias, for row program_id(1) of x."""
    tid = gl.arange(0, 32 * WARPS, layout=thread_layout(WARPS))
    n = gl.program_id(0) * (32 * WARPS) + tid
    inside = n < N
    factor = gl.load(scale + n * scale_stride, mask=inside, other=0.0)
    at = partial + gl.program_id(1).to(gl.int64) * N + n
    if OVERLAP:
        execute(tid, "griddepcontrol.wait;")
    total = gl.load(at, mask=inside, other=0.0)
    for s in gl.static_range(1, SPANS):
        total += gl.load(at + s * M.to(gl.int64) * N, mask=inside, other=0.0)
    total *= factor
    if HAS_BIAS:
        total += gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)
    if OVERLAP:
        execute(tid, "griddepcontrol.launch_dependents;")
    gl.store(y + gl.program_id(1).to(gl.int64) * N + n, total.to(y.dtype.element_ty), mask=inside)


def rans_linear_hopper(
    x: Tensor, weight: CodedWeight, scale: Tensor, bias: Tensor | None, launch: WideLaunch | None = None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype: as `rans_linear_gluon`, to the bit unless the launch chains the tiles.

    Args:
        x: float16 or bfloat16.
        weight: of one matrix.
        scale: float32 [1, 1] or [N, 1].
        bias: [N] or None.
        launch: configuration; None takes the table's.
    """
    x = pad_columns(x)
    layout, (m, k) = weight.layout, x.shape
    n = layout.coded_shape[0]
    panels, tiles = layout.grid
    span = tiles if launch and launch.chain else span_tiles(n, tiles)
    spans = -(-tiles // span)
    columns, warps, registers, chain = launch or choose_wide_launch(m, panels, spans)
    blocks = -(-m // columns)
    coded, raw = layout.split.coded_bits, layout.split.raw_bits
    word_bytes, ring = word_buffer_bytes(weight.word_rows)
    words = (warps + 1 if ring else 2 * warps) * word_bytes
    behind = STAGES * (warps * 128 * raw + stage_bytes(128 * columns)) + 128
    pieces = shared_pieces(weight.table.nbytes + words + max(behind, 0 if ring else overrun_bytes(weight.layout)))
    arranged = torch.empty(blocks * columns, k, dtype=x.dtype, device=x.device)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    out = torch.empty(spans, m, n, dtype=torch.float32, device=x.device) if spans > 1 else y
    factors, scale_stride = (scale, scale if bias is None else bias), int(scale.shape[0] > 1)
    arrange_x_kernel[(-(-k // 128), blocks * (columns // 8))](
        x, arranged, m, k, COLUMNS=columns, OVERLAP=True, num_warps=4, launch_pdl=True
    )
    rans_linear_hopper_kernel[(-(-panels // warps), spans, blocks)](
        weight.heads, weight.words, weight.offsets, weight.table, *factors, arranged, out, m, n, panels,
        layout.most_units, layout.panel_units, scale_stride, 4 * weight.table.shape[1], STATE_LOW,
        TILES=tiles, SPAN=span, CHAIN=chain, CODED=coded, RAW=raw, PRECISION=layout.probability_bits, COLUMNS=columns,
        HAS_BIAS=bias is not None, BFLOAT16=x.dtype is torch.bfloat16, WARPS=warps, STAGES=STAGES,
        WORD_BYTES=word_bytes, WORD_RING=ring, OVERLAP=True,
        SHARED0=pieces[0], SHARED1=pieces[1], SHARED2=pieces[2], num_warps=warps, maxnreg=registers, launch_pdl=True,
    )  # fmt: skip
    if spans > 1:
        add_spans_kernel[(-(-n // 128), m)](
            out, *factors, y, m, n, scale_stride, SPANS=spans, HAS_BIAS=bias is not None, WARPS=4, OVERLAP=True,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return y
