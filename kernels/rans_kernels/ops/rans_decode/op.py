"""`rans_decode`: compressed weights to plain INT8 or floats, or to the weights they stand for."""

import torch
from torch import Tensor

from rans_kernels.coder import decode_tiles
from rans_kernels.dense import dequantize
from rans_kernels.ops.coded import CodedWeight, backend_of, on_device


def rans_decode(weight: CodedWeight, out: Tensor | None = None) -> Tensor:
    """Decode to [N, K] on the weight's device, in the dtype that was coded: int8, bfloat16 or float16.

    Args:
        weight: of one matrix.
        out: contiguous [N, K] of that dtype to write to, or None.

    Raises:
        FormatError: on the CPU, a damaged stream. Kernels on a GPU stay inside the tensors but do not report.
    """
    match backend_of(weight.heads.device):
        case "cpu":
            heads, words, offsets = weight.heads.numpy(), weight.words.numpy(), weight.offsets.numpy()
            decoded = decode_tiles(weight.layout, heads, words, offsets, weight.table.numpy())
            found = torch.from_numpy(decoded).view(weight.dtype)
        case "gluon":
            from rans_kernels.ops.rans_decode.gluon import rans_decode_gluon

            with on_device(weight.heads):
                return rans_decode_gluon(weight, dtype=weight.dtype, out=out)
        case _:
            from rans_kernels.ops.rans_decode.triton import rans_decode_triton

            with on_device(weight.heads):
                found = rans_decode_triton(weight.heads, weight.words, weight.offsets, weight.table, weight.layout)
    return found if out is None else out.copy_(found)


def rans_dequantize(
    weight: CodedWeight, scale: Tensor, dtype: torch.dtype, group_size: int | None = None, out: Tensor | None = None
) -> Tensor:
    """The weights a layer computes with, [N, K] in `dtype`: `dense.dequantize` of the integers, to the bit; or floats.

    Args:
        weight: of one matrix.
        scale: float32, see `dense.expand_scale`; that of floats is 1.
        dtype: of the result.
        group_size: columns that share a scale, or None.
        out: contiguous [N, K] of `dtype` to write to, or None.
    """
    if weight.layout.is_float:
        found = rans_decode(weight, out if dtype == weight.dtype else None).to(dtype)
        return found if out is None or out is found else out.copy_(found)
    if fused_scale(weight, scale, dtype, group_size):
        from rans_kernels.ops.rans_decode.gluon import rans_decode_gluon

        with on_device(weight.heads):
            return rans_decode_gluon(weight, scale, dtype, out)
    found = dequantize(rans_decode(weight), scale, dtype, group_size)
    return found if out is None else out.copy_(found)


def fused_scale(weight: CodedWeight, scale: Tensor | None, dtype: torch.dtype, group_size: int | None) -> bool:
    """Whether a kernel multiplies by the scale as it decodes; scale: None for integers."""
    gluon = backend_of(weight.heads.device) == "gluon"
    # a row of a folded weight's coded matrix has the scales of several
    gluon = gluon and (scale is None or len(scale) == 1 or weight.layout.fold == 1)
    return gluon and group_size is None and dtype != torch.float32 and not weight.layout.is_float
