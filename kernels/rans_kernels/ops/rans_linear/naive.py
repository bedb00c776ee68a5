"""What `rans_linear` computes: decode, dequantise, multiply."""

from torch import Tensor

from rans_kernels.dense import linear
from rans_kernels.ops.coded import CodedWeight
from rans_kernels.ops.rans_decode import rans_dequantize


def rans_linear_naive(
    x: Tensor, weight: CodedWeight, scale: Tensor, bias: Tensor | None, group_size: int | None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; arguments as `rans_linear`."""
    return linear(x, rans_dequantize(weight, scale, x.dtype, group_size), bias)
