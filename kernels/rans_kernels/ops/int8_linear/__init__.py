"""x @ W.T from INT8 weights, in the order of the fused kernel."""

from rans_kernels.ops.int8_linear.op import int8_linear_tiled

__all__ = ["int8_linear_tiled"]
