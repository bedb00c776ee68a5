"""`rans_linear`: x @ W.T straight from the compressed W, as one operator that torch.compile does not look into."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rans_kernels.format import TileLayout
from rans_kernels.ops.coded import CodedWeight, backend_of, is_hopper, on_device
from rans_kernels.ops.fold import multiplies_folded, multiply_folded
from rans_kernels.ops.rans_decode import rans_dequantize
from rans_kernels.ops.rans_linear.naive import rans_linear_naive

if TYPE_CHECKING:
    from rans_kernels.ops.launch import WideLaunch

FUSED_ROWS = {"gluon": 64, "triton": 16, "cpu": 0}
"""Rows of x up to which a backend's fused kernels give a row the same bits in any batch. Above, the weight is decoded
into scratch and multiplied with the library, or its tiles are chained (`chain_launch`): these round differently, so a
row's last bits may differ between the regimes (docs/architecture.md)."""
HOPPER_ROWS = 128
"""The same for Hopper, whose wide kernel takes more."""
PANEL_ROWS = 16
"""Rows of x up to which the panel kernel is the faster one on Hopper."""


def uses_fused_kernel(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int | None = None,
    weight_dtype: torch.dtype = torch.int8,
) -> bool:
    """True if `rans_linear` on so many rows of `dtype` runs a fused kernel in the order that all batches share."""
    backend = backend_of(device)
    if weight_dtype != torch.int8:
        # tensor cores multiply floats of one dtype
        return backend == "gluon" and dtype == weight_dtype and 0 < rows <= FUSED_ROWS[backend]
    fits = backend != "gluon" or (dtype != torch.float32 and group_size is None)
    return fits and 0 < rows <= fused_rows(device)


def fused_rows(device: torch.device) -> int:
    """The most rows of x that the fused kernels of a device take in the order that all batches share."""
    return HOPPER_ROWS if is_hopper(device) else FUSED_ROWS[backend_of(device)]


def uses_wide_kernel(rows: int, device: torch.device, weight_dtype: torch.dtype = torch.int8) -> bool:
    """True if the fused kernel of so many rows is the one that multiplies by warpgroups, not a panel a block."""
    return is_hopper(device) and rows > PANEL_ROWS and weight_dtype == torch.int8


def chain_launch(
    layout: TileLayout, rows: int, device: torch.device, dtype: torch.dtype, group_size: int | None = None
) -> "WideLaunch | None":
    """Launch of the fused kernel that chains the tiles, where `rans_linear` on so many rows uses it."""
    if not is_hopper(device) or dtype == torch.float32 or group_size is not None:
        return None
    # placing so many rows of x would be more work than decoding
    if layout.is_float or layout.fold > 1:
        return None
    from rans_kernels.ops.launch import choose_chain_launch

    return choose_chain_launch(device, layout.shape, layout.split.coded_bits, rows)


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
    rows, fold = x.reshape(-1, x.shape[-1]), weight.layout.fold
    fused = uses_fused_kernel(len(rows), x.device, x.dtype, group_size, weight.dtype)
    fused = fused and multiplies_folded(fold, scale, bias, group_size)
    chain = None if fused else chain_launch(weight.layout, len(rows), x.device, x.dtype, group_size)
    if not weight.layout.tiles or not (fused or chain):
        y = rans_linear_naive(rows, weight, scale, bias, group_size)
    else:
        with on_device(x):
            multiply = partial(_multiply, weight=weight, scale=scale, bias=bias, group_size=group_size, chain=chain)
            y = multiply_folded(multiply, rows, fold, fused_rows(x.device))
    return y.reshape(*x.shape[:-1], weight.layout.shape[0])


def _multiply(
    x: Tensor,
    weight: CodedWeight,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int | None,
    chain: "WideLaunch | None",
) -> Tensor:
    """Multiply x, placed if the weight is folded, by the coded matrix in the fused kernel of so many rows."""
    if chain or uses_wide_kernel(len(x), x.device, weight.dtype):
        from rans_kernels.ops.rans_linear.hopper import rans_linear_hopper

        return rans_linear_hopper(x, weight, scale, bias, chain)
    if backend_of(x.device) == "gluon":
        from rans_kernels.ops.rans_linear.gluon import rans_linear_gluon

        return rans_linear_gluon(x, weight, scale, bias)
    from rans_kernels.ops.rans_linear.triton import rans_linear_triton

    arrays = (weight.heads, weight.words, weight.offsets, weight.table)
    y = rans_linear_triton(x, *arrays, scale, weight.layout, group_size)
    return y if bias is None else y + bias.to(y.dtype)


@_rans_linear.register_fake
def _(x, heads, words, offsets, table, scale, bias, numbers, group_size):
    return x.new_empty(*x.shape[:-1], numbers[0])


@torch.library.custom_op("rans_kernels::rans_linear_backward", mutates_args=())
def _rans_linear_backward(
    grad: Tensor,
    heads: Tensor,
    words: Tensor,
    offsets: Tensor,
    table: Tensor,
    scale: Tensor,
    numbers: list[int],
    group_size: int | None,
) -> Tensor:
    """The gradient of x: [..., N] -> [..., K]; the weight is decoded again, and kept by nobody."""
    weight = CodedWeight.of(heads, words, offsets, table, numbers)
    return grad @ rans_dequantize(weight, scale, grad.dtype, group_size)


@_rans_linear_backward.register_fake
def _(grad, heads, words, offsets, table, scale, numbers, group_size):
    return grad.new_empty(*grad.shape[:-1], numbers[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *arrays, bias, numbers, group_size = inputs
    ctx.save_for_backward(*arrays)
    ctx.numbers, ctx.group_size, ctx.bias_dtype = numbers, group_size, None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x = bias = None
    if ctx.needs_input_grad[0]:
        x = _rans_linear_backward(grad, *ctx.saved_tensors, ctx.numbers, ctx.group_size)
    if ctx.needs_input_grad[6]:
        bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return x, None, None, None, None, None, bias, None, None


_rans_linear.register_autograd(_gradients, setup_context=_keep)
