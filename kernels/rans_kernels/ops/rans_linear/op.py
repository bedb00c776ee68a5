"""`rans_linear`: x @ W.T straight from the compressed W."""

import torch
from torch import Tensor

from rans_kernels.format import TileLayout
from rans_kernels.ops.rans_linear.naive import rans_linear_naive

FUSED_ROWS = 16
"""Rows of x up to which the fused kernel is used on a GPU. Above it decodes into scratch and multiplies with the
library: the two round differently, so a row's last bits may differ between the two regimes (docs/architecture.md)."""


def uses_fused_kernel(rows: int, device_type: str) -> bool:
    """True if `rans_linear` on so many rows runs the fused kernel."""
    return device_type != "cpu" and rows <= FUSED_ROWS


@torch.compiler.disable
def rans_linear(
    x: Tensor,
    stream: Tensor,
    offsets: Tensor,
    table: Tensor,
    scale: Tensor,
    layout: TileLayout,
    group_size: int | None = None,
) -> Tensor:
    """Multiply by a compressed weight matrix on the device it is on.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        stream: int32 [rows, 16].
        offsets: int32 [tiles * groups + 1].
        table: int32 [2 ** probability_bits], from `slot_table`.
        scale: float32 [1, 1], [N, 1] or [N, ceil(K / group_size)].
        layout: shape, split, lanes and precision.
        group_size: columns that share a scale; None unless per group.

    Returns:
        [..., N] in x's dtype; sums are float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if uses_fused_kernel(len(rows), x.device.type) and layout.tiles and len(rows):
        from rans_kernels.ops.rans_linear.triton import rans_linear_triton

        y = rans_linear_triton(rows, stream, offsets, table, scale, layout, group_size).to(x.dtype)
    else:
        y = rans_linear_naive(rows, stream, offsets, table, scale, layout, group_size)
    return y.reshape(*x.shape[:-1], layout.shape[0])
