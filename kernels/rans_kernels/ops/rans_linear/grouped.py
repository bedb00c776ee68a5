"""`rans_linear_grouped`: one x times several weights in one launch, as one operator."""

import torch
from torch import Tensor

from rans_kernels.format import TileLayout
from rans_kernels.ops.coded import CodedWeight, backend_of, on_device
from rans_kernels.ops.rans_linear.op import rans_linear, uses_fused_kernel, uses_wide_kernel

MOST = 3
"""Weights of one launch: query, key and value."""


def rans_linear_grouped(
    x: Tensor, weights: list[CodedWeight], scales: list[Tensor], biases: list[Tensor] | None = None
) -> list[Tensor]:
    """Multiply by several compressed weights: to the bit what `rans_linear` gives for each.

    Weights of one `group_key`, at most MOST, share a launch of the fused kernel where that is used; others, and folded
    ones, do not.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weights: of one matrix each, all with K columns.
        scales: float32 [1, 1] or [N, 1], of every weight.
        biases: [N] of every weight, or None.

    Returns:
        [..., N] in x's dtype, of every weight.
    """
    numbers = [number for weight in weights for number in weight.numbers]
    heads, words, offsets, tables = (
        [getattr(weight, name) for weight in weights] for name in ("heads", "words", "offsets", "table")
    )
    return _rans_linear_grouped(x, heads, words, offsets, tables, scales, biases or [], numbers)


def group_key(layout: TileLayout) -> tuple[int | str, ...]:
    """Equal for weights that can share a launch."""
    split = layout.split
    return layout.shape[1], split.coded_bits, split.raw_bits, layout.units, layout.probability_bits, layout.dtype


@torch.library.custom_op("rans_kernels::rans_linear_grouped", mutates_args=())
def _rans_linear_grouped(
    x: Tensor,
    heads: list[Tensor],
    words: list[Tensor],
    offsets: list[Tensor],
    tables: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    numbers: list[int],
) -> list[Tensor]:
    each = len(numbers) // len(heads)
    weights = [
        CodedWeight.of(*arrays, numbers[each * i : each * (i + 1)])
        for i, arrays in enumerate(zip(heads, words, offsets, tables, strict=True))
    ]
    rows = x.reshape(-1, x.shape[-1])
    # scales of one row are those of a tensor
    kinds = {(group_key(w.layout), scale.shape[0] > 1) for w, scale in zip(weights, scales, strict=True)}
    alike = len(kinds) == 1 and len({bias.dtype for bias in biases}) <= 1
    alike = alike and all(w.layout.tiles and w.layout.fold == 1 for w in weights)
    dtype, device = weights[0].dtype, x.device
    fused = uses_fused_kernel(len(rows), device, x.dtype, None, dtype) and backend_of(device) == "gluon"
    fused = fused and not uses_wide_kernel(len(rows), device, dtype)
    if alike and fused and 1 < len(weights) <= MOST:
        from rans_kernels.ops.rans_linear.gluon_grouped import rans_linear_grouped_gluon

        with on_device(x):
            found = rans_linear_grouped_gluon(rows, weights, scales, biases)
        return [y.reshape(*x.shape[:-1], y.shape[1]) for y in found]
    every: list[Tensor | None] = [*biases] or [None] * len(weights)
    return [rans_linear(x, w, s, b) for w, s, b in zip(weights, scales, every, strict=True)]


@_rans_linear_grouped.register_fake
def _(x, heads, words, offsets, tables, scales, biases, numbers):
    each = len(numbers) // len(heads)
    return [x.new_empty(*x.shape[:-1], rows) for rows in numbers[::each]]
