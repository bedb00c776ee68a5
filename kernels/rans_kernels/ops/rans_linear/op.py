"""`rans_linear`: x @ W.T straight from the compressed W, as one operator that torch.compile does not look into."""

import torch
from torch import Tensor

from rans_kernels.ops.coded import CodedWeight, backend_of, on_device
from rans_kernels.ops.rans_linear.naive import rans_linear_naive

FUSED_ROWS = {"gluon": 64, "triton": 16, "cpu": 0}
"""Rows of x up to which a backend's fused kernel is used. Above it decodes into scratch and multiplies with the
library: the two round differently, so a row's last bits may differ between the two regimes (docs/architecture.md)."""


def uses_fused_kernel(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int | None = None,
    weight_dtype: torch.dtype = torch.int8,
) -> bool:
    """True if `rans_linear` on so many rows of `dtype` runs a fused kernel."""
    backend = backend_of(device)
    if weight_dtype != torch.int8:
        # tensor cores multiply floats of one dtype
        fits = backend == "gluon" and dtype == weight_dtype
    else:
        fits = backend != "gluon" or (dtype != torch.float32 and group_size is None)
    return fits and 0 < rows <= FUSED_ROWS[backend]


def rans_linear(
    x: Tensor, weight: CodedWeight, scale: Tensor, bias: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """Multiply by a compressed weight matrix on the device it is on.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight: of one matrix.
        scale: float32 [1, 1], [N, 1] or [N, ceil(K / group_size)]; that of floats is 1.
        bias: [N] or None.
        group_size: columns that share a scale; None unless per group.

    Returns:
        [..., N] in x's dtype; sums are float32.
    """
    w = weight
    return _rans_linear(x, w.heads, w.words, w.offsets, w.table, scale, bias, w.numbers, group_size)


@torch.library.custom_op("rans_kernels::rans_linear", mutates_args=())
def _rans_linear(
    x: Tensor,
    heads: Tensor,
    words: Tensor,
    offsets: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    numbers: list[int],
    group_size: int | None,
) -> Tensor:
    weight = CodedWeight.of(heads, words, offsets, table, numbers)
    rows = x.reshape(-1, x.shape[-1])
    fused = uses_fused_kernel(len(rows), x.device, x.dtype, group_size, weight.dtype)
    if not fused or not weight.layout.tiles:
        y = rans_linear_naive(rows, weight, scale, bias, group_size)
    elif backend_of(x.device) == "gluon":
        from rans_kernels.ops.rans_linear.gluon import rans_linear_gluon

        with on_device(x):
            y = rans_linear_gluon(rows, weight, scale, bias)
    else:
        from rans_kernels.ops.rans_linear.triton import rans_linear_triton

        with on_device(x):
            y = rans_linear_triton(rows, heads, words, offsets, table, scale, weight.layout, group_size)
        y = y if bias is None else y + bias.to(y.dtype)
    return y.reshape(*x.shape[:-1], weight.layout.shape[0])


@_rans_linear.register_fake
def _(x, heads, words, offsets, table, scale, bias, numbers, group_size):
    return x.new_empty(*x.shape[:-1], numbers[0])
