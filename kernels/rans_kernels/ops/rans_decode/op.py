"""`rans_decode`: compressed weights to plain INT8 or floats, or to the weights they stand for."""

import torch
from torch import Tensor

from rans_kernels.coder import decode_tiles
from rans_kernels.dense import dequantize
from rans_kernels.ops.coded import CodedWeight, backend_of, on_device


def rans_decode(weight: CodedWeight) -> Tensor:
    """Decode to [N, K] on the weight's device, in the dtype that was coded: int8, bfloat16 or float16.

    Raises:
        FormatError: on the CPU, a damaged stream. Kernels on a GPU stay inside the tensors but do not report.
    """
    match backend_of(weight.heads.device):
        case "cpu":
            heads, words, offsets = weight.heads.numpy(), weight.words.numpy(), weight.offsets.numpy()
            decoded = decode_tiles(weight.layout, heads, words, offsets, weight.table.numpy())
            return torch.from_numpy(decoded).view(weight.dtype)
        case "gluon":
            from rans_kernels.ops.rans_decode.gluon import rans_decode_gluon

            with on_device(weight.heads):
                return rans_decode_gluon(weight, dtype=weight.dtype)
        case _:
            from rans_kernels.ops.rans_decode.triton import rans_decode_triton

            with on_device(weight.heads):
                return rans_decode_triton(weight.heads, weight.words, weight.offsets, weight.table, weight.layout)


def rans_dequantize(weight: CodedWeight, scale: Tensor, dtype: torch.dtype, group_size: int | None = None) -> Tensor:
    """The weights a layer computes with, [N, K] in `dtype`: `dense.dequantize` of the integers, to the bit; or floats.

    Args:
        weight: of one matrix.
        scale: float32, see `dense.expand_scale`; that of floats is 1.
        dtype: of the result.
        group_size: columns that share a scale, or None.
    """
    if weight.layout.is_float:
        return rans_decode(weight).to(dtype)
    if group_size is None and dtype != torch.float32 and backend_of(weight.heads.device) == "gluon":
        from rans_kernels.ops.rans_decode.gluon import rans_decode_gluon

        with on_device(weight.heads):
            return rans_decode_gluon(weight, scale, dtype)
    return dequantize(rans_decode(weight), scale, dtype, group_size)
