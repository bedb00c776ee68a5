"""`int8_linear_tiled`: what `rans_linear` computes, from plain INT8 weights."""

from functools import partial

import torch
from torch import Tensor

from rans_kernels.dense import int8_linear
from rans_kernels.ops.coded import backend_of, on_device
from rans_kernels.ops.fold import multiplies_folded, multiply_folded
from rans_kernels.ops.rans_linear.op import fused_rows, uses_fused_kernel


@torch.library.custom_op("rans_kernels::int8_linear", mutates_args=())
def int8_linear_tiled(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    units: int,
    group_size: int | None = None,
    fold: int = 1,
) -> Tensor:
    """Multiply by an INT8 weight, each sum added up as `rans_linear` adds it, to the bit.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight: int8 [N, K].
        scale: float32 [1, 1], [N, 1] or [N, ceil(K / group_size)].
        bias: [N] or None.
        units: of a tile of the coded weight.
        group_size: columns that share a scale; None unless per group.
        fold: rows of the weight in one of the coded matrix.

    Returns:
        [..., N] in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    fused = weight.numel() > 0 and uses_fused_kernel(len(rows), x.device, x.dtype, group_size)
    fused = fused and multiplies_folded(fold, scale, bias, group_size)
    if fused and backend_of(x.device) == "gluon":
        from rans_kernels.ops.int8_linear.gluon import int8_linear_gluon

        with on_device(x):
            coded = weight.reshape(len(weight) // fold, -1)
            multiply = partial(int8_linear_gluon, weight=coded, scale=scale, bias=bias, units=units)
            y = multiply_folded(multiply, rows, fold, fused_rows(x.device))
    else:
        y = int8_linear(rows, weight, scale, bias, group_size)
    return y.reshape(*x.shape[:-1], len(weight))


@int8_linear_tiled.register_fake
def _(x, weight, scale, bias, units, group_size=None, fold=1):
    return x.new_empty(*x.shape[:-1], len(weight))
