"""What `rans_linear` computes: decode, dequantise, multiply."""

from torch import Tensor
from torch.nn import functional as F

from rans_kernels.dense import dequantize
from rans_kernels.format import TileLayout
from rans_kernels.ops.rans_decode import rans_decode


def rans_linear_naive(
    x: Tensor, stream: Tensor, offsets: Tensor, table: Tensor, scale: Tensor, layout: TileLayout, group_size: int | None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; arguments as `rans_linear`."""
    weight = rans_decode(stream, offsets, table, layout)
    return F.linear(x, dequantize(weight, scale, x.dtype, group_size))
