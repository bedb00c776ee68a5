"""The product of a panel, 16 rows of W, with up to 64 rows of x: what the fused and the dense kernel share.

Sums of a tile are one chain of MMAs; the tiles' sums of a span are added in ascending order, then the spans'. The order
depends on the layout alone, not on launch, batch or schedule: a row of x gets the same bits in any batch, and all
kernels agree to the bit.
"""

# tuples grow in loops that are unrolled
# mypy: disable-error-code="assignment"

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.ops.simt import load_global, load_shared, mma, store_shared2
from rans_kernels.ops.warp import join_bytes, operands


@gluon.jit
def load_x(pointer, on, COLUMN_BLOCKS: gl.constexpr, stride):
    """B operands of half a unit (32 columns): eight values of this lane's row of x in each block of 8 rows."""
    x = ()
    for n in gl.static_range(COLUMN_BLOCKS):
        x = x + (load_global(pointer + (8 * n * stride).to(gl.uint64), on[n], 4),)
    return x


@gluon.jit
def row_operands(u, CODED: gl.constexpr, RAW: gl.constexpr, DTYPE: gl.constexpr):
    """Codes of a lane's four words to the operands of rows g and g + 8."""
    g = operands(u[0], CODED, RAW, DTYPE) + operands(u[1], CODED, RAW, DTYPE)
    h = operands(u[2], CODED, RAW, DTYPE) + operands(u[3], CODED, RAW, DTYPE)
    return g, h


@gluon.jit
def multiply_half(c, u, x, COLUMN_BLOCKS: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr, DTYPE: gl.constexpr):
    """Add 16 rows x 32 columns: u holds the codes of this lane's words (row g, row g + 8) x (columns 0-3, 4-7)."""
    g, h = row_operands(u, CODED, RAW, DTYPE)
    return multiply_pairs(c, g, h, x, COLUMN_BLOCKS, DTYPE)


@gluon.jit
def multiply_float_half(c, high, low, x, COLUMN_BLOCKS: gl.constexpr, DTYPE: gl.constexpr):
    """As `multiply_half`, of floats given by their high and low bytes."""
    g = join_bytes(high[0], low[0]) + join_bytes(high[1], low[1])
    h = join_bytes(high[2], low[2]) + join_bytes(high[3], low[3])
    return multiply_pairs(c, g, h, x, COLUMN_BLOCKS, DTYPE)


@gluon.jit
def multiply_pairs(c, g, h, x, COLUMN_BLOCKS: gl.constexpr, DTYPE: gl.constexpr):
    """Add 16 rows x 32 columns: g and h hold registers of pairs of rows g and g + 8."""
    sums = ()
    for n in gl.static_range(COLUMN_BLOCKS):
        part = mma(c[n], (g[0], h[0], g[1], h[1]), x[n][0], x[n][1], DTYPE)
        sums = sums + (mma(part, (g[2], h[2], g[3], h[3]), x[n][2], x[n][3], DTYPE),)
    return sums


@gluon.jit
def keep_where(condition, new, old, COLUMN_BLOCKS: gl.constexpr):
    """The new sums where the condition holds, else the old ones."""
    sums = ()
    for n in gl.static_range(COLUMN_BLOCKS):
        part = ()
        for i in gl.static_range(4):
            part = part + (gl.where(condition, new[n][i], old[n][i]),)
        sums = sums + (part,)
    return sums


@gluon.jit
def store_partial(address, c, lane, COLUMN_BLOCKS: gl.constexpr):
    """A tile's sums to shared memory as [16, 8 * COLUMN_BLOCKS] float32."""
    ROW: gl.constexpr = 32 * COLUMN_BLOCKS
    at = address + (lane // 4) * ROW + (lane % 4) * 8
    for n in gl.static_range(COLUMN_BLOCKS):
        store_shared2(at + 32 * n, c[n][0], c[n][1])
        store_shared2(at + 32 * n + 8 * ROW, c[n][2], c[n][3])


@gluon.jit
def load_sum(address):
    """A float32 at a shared address."""
    return load_shared(address, 1)[0].to(gl.float32, bitcast=True)


@gluon.jit
def finish_panel(
    partial, scale, bias, y, tid, panel, M, N, scale_stride, TILES: gl.constexpr, SPAN: gl.constexpr,
    COLUMN_BLOCKS: gl.constexpr, WARPS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Add the sums of the tiles of each span, and of the spans, in ascending order, scale, add the bias, store y."""
    SIZE: gl.constexpr = 128 * COLUMN_BLOCKS
    THREADS: gl.constexpr = 32 * WARPS
    for i in gl.static_range((SIZE + THREADS - 1) // THREADS):
        at = i * THREADS + tid
        n = panel * 16 + at % SIZE // (8 * COLUMN_BLOCKS)
        m = at % (8 * COLUMN_BLOCKS)
        inside = (at < SIZE) & (m < M) & (n < N)
        factor = gl.load(scale + n * scale_stride, mask=inside, other=0.0)
        address = partial + ((at % SIZE) * 4).to(gl.uint32)
        total = load_sum(address)
        if TILES <= 32:
            for t in gl.static_range(1, min(SPAN, TILES)):
                total += load_sum(address + t * (4 * SIZE))
            for first in gl.static_range(SPAN, TILES, SPAN):
                span = load_sum(address + first * (4 * SIZE))
                for t in gl.static_range(first + 1, min(first + SPAN, TILES)):
                    span += load_sum(address + t * (4 * SIZE))
                total += span
        else:
            for t in range(1, min(SPAN, TILES)):
                total += load_sum(address + t * (4 * SIZE))
            for first in range(SPAN, TILES, SPAN):
                span = load_sum(address + first * (4 * SIZE))
                for t in range(first + 1, gl.minimum(first + SPAN, TILES)):
                    span += load_sum(address + t * (4 * SIZE))
                total += span
        total *= factor
        if HAS_BIAS:
            total += gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)
        gl.store(y + m.to(gl.int64) * N + n, total.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def only(flags, condition, COUNT: gl.constexpr):
    """The flags where the condition holds, else 0."""
    out = ()
    for n in gl.static_range(COUNT):
        out = out + (flags[n] * condition.to(gl.uint32),)
    return out


FILLING = 256
"""Blocks that fill a GPU, two a multiprocessor of a large one. Part of the order of the sums: no device changes it."""


def span_tiles(rows: int, tiles: int) -> int:
    """Tiles of a span: as many as leave `FILLING` blocks of 128 rows by a span, where a panel has so many tiles.

    Args:
        rows: N of the weight.
        tiles: of a panel.
    """
    return max(1, -(-tiles * -(-rows // 128) // FILLING))


def pad_columns(tensor: Tensor) -> Tensor:
    """The tensor with columns of zeros up to a multiple of 64, contiguous and 16-byte aligned; itself where it is."""
    missing = -tensor.shape[1] % 64
    if missing or not tensor.is_contiguous() or tensor.data_ptr() % 16:
        return torch.nn.functional.pad(tensor, (0, missing)).contiguous()
    return tensor
