"""One launch of the fused kernel for up to three weights: a block finds out whose panel it is, and does the same."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.format import STATE_LOW
from rans_kernels.ops.coded import CodedWeight
from rans_kernels.ops.launch import MAX_ROWS, Launch
from rans_kernels.ops.panel import pad_columns, span_tiles
from rans_kernels.ops.rans_linear.gluon import launch_options, multiply_panel, rans_linear_gluon


@gluon.jit
def pick(panel, begin1, begin2, a, b, c):
    """What belongs to the panel's weight: the second's panels start at begin1, the third's at begin2."""
    return gl.where(panel < begin1, a, gl.where(panel < begin2, b, c))


# groups differ in these: one kernel for all
@gluon.jit(do_not_specialize=["N0", "N1", "N2", "begin1", "begin2"])
def rans_linear_grouped_kernel(
    heads0, heads1, heads2, words0, words1, words2, offsets0, offsets1, offsets2, table0, table1, table2,
    scale0, scale1, scale2, bias0, bias1, bias2, y0, y1, y2, N0, N1, N2, begin1, begin2, x, M, K, units, panel_units,
    scale_stride, entry_bytes, word_base,
    TILES: gl.constexpr, SPAN: gl.constexpr, CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr,
    COLUMN_BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, BFLOAT16: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, WORD_BYTES: gl.constexpr, WORD_RING: gl.constexpr, OVERLAP: gl.constexpr,
    FLOAT: gl.constexpr, RAGGED: gl.constexpr,
    SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr,
):  # fmt: skip
    """`multiply_panel` of panel program_id(0) of the weights' panels, one weight after the other."""
    at = gl.program_id(0)
    panel = at - gl.where(at < begin1, 0, gl.where(at < begin2, begin1, begin2))
    heads = pick(at, begin1, begin2, heads0, heads1, heads2)
    words = pick(at, begin1, begin2, words0, words1, words2)
    offsets = pick(at, begin1, begin2, offsets0, offsets1, offsets2)
    table = pick(at, begin1, begin2, table0, table1, table2)
    scale = pick(at, begin1, begin2, scale0, scale1, scale2)
    bias = pick(at, begin1, begin2, bias0, bias1, bias2)
    y = pick(at, begin1, begin2, y0, y1, y2)
    N = pick(at, begin1, begin2, N0, N1, N2)
    multiply_panel(
        panel, heads, words, offsets, table, scale, bias, x, y, M, N, K, units, panel_units, scale_stride, entry_bytes,
        word_base, TILES, SPAN, CODED, RAW, PRECISION, COLUMN_BLOCKS, HAS_BIAS, BFLOAT16, WARPS, STAGES, WORD_BYTES,
        WORD_RING, OVERLAP, FLOAT, RAGGED, SHARED0, SHARED1, SHARED2,
    )  # fmt: skip


def rans_linear_grouped_gluon(
    x: Tensor,
    weights: Sequence[CodedWeight],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    launch: Launch | None = None,
) -> list[Tensor]:
    """x [M, K] -> [M, N] in x's dtype, of each weight.

    Args:
        x: float16 or bfloat16.
        weights: two or three of one `group_key`.
        scales: float32, all [1, 1] or all [N, 1].
        biases: [N] of every weight and all of one dtype, or none at all.
        launch: configuration; None takes the table's.
    """
    if len({span_tiles(w.layout.shape[0], w.layout.grid[1]) for w in weights}) > 1:
        # each is added up in an order of its own
        every: list[Tensor | None] = [*biases] or [None] * len(weights)
        return [rans_linear_gluon(x, w, s, b, launch) for w, s, b in zip(weights, scales, every, strict=True)]
    x = pad_columns(x)
    found = [torch.empty(len(x), w.layout.shape[0], dtype=x.dtype, device=x.device) for w in weights]
    layout = weights[0].layout
    begins = list(accumulate(w.layout.grid[0] for w in weights))
    # two weights: no block belongs to the third, which is the second once more
    columns = [
        [*values, values[-1]][:3]
        for values in (
            [w.heads for w in weights], [w.words for w in weights], [w.offsets for w in weights],
            [w.table for w in weights], list(scales), list(biases or scales),
        )
    ]  # fmt: skip
    sizes = [w.layout.shape[0] for w in weights]
    for first in range(0, len(x), MAX_ROWS):
        part = x[first : first + MAX_ROWS]
        y = [rows[first:] for rows in found]
        pointers = [tensor for column in (*columns, [*y, y[-1]][:3]) for tensor in column]
        rans_linear_grouped_kernel[(begins[-1],)](
            *pointers, *[*sizes, sizes[-1]][:3], begins[0], begins[1], part, len(part), x.shape[1], layout.most_units,
            layout.panel_units, int(scales[0].shape[0] > 1), 4 * weights[0].table.shape[1], STATE_LOW,
            HAS_BIAS=bool(biases), BFLOAT16=x.dtype is torch.bfloat16,
            **launch_options(x.device, weights, len(part), launch),
        )  # fmt: skip
    return found
