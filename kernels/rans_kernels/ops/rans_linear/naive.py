"""What `rans_linear` computes: decode, dequantise, multiply."""

from torch import Tensor

from rans_kernels.dense import int8_linear
from rans_kernels.format import TileLayout
from rans_kernels.ops.rans_decode import rans_decode


def rans_linear_naive(
    x: Tensor, stream: Tensor, offsets: Tensor, table: Tensor, scale: Tensor, layout: TileLayout, group_size: int | None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; arguments as `rans_linear`."""
    return int8_linear(x, rans_decode(stream, offsets, table, layout), scale, group_size=group_size)
