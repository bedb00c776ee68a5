"""Compressed weights to plain INT8 or floats."""

from rans_kernels.ops.rans_decode.op import rans_decode, rans_dequantize

__all__ = ["rans_decode", "rans_dequantize"]
