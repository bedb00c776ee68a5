"""Compressed weights to plain INT8 or floats."""

from rans_kernels.ops.rans_decode.many import DecodePlan, rans_decode_many
from rans_kernels.ops.rans_decode.op import rans_decode, rans_dequantize

__all__ = ["DecodePlan", "rans_decode", "rans_decode_many", "rans_dequantize"]
