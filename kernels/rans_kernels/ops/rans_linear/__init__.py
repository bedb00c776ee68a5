"""x @ W.T straight from the compressed W."""

from rans_kernels.ops.rans_linear.grouped import rans_linear_grouped
from rans_kernels.ops.rans_linear.op import rans_linear

__all__ = ["rans_linear", "rans_linear_grouped"]
