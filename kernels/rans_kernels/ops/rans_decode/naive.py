"""What `rans_decode` computes: the reference decoder on the tensors' bytes."""

import torch
from torch import Tensor

from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import TileLayout
from rans_kernels.ops.table import table_frequencies


def rans_decode_naive(stream: Tensor, offsets: Tensor, table: Tensor, layout: TileLayout) -> Tensor:
    """Decode to int8 [N, K] on the CPU, one group of lanes at a time."""
    arrays = (tensor.cpu().numpy() for tensor in (stream, offsets, table_frequencies(table)))
    return torch.from_numpy(decode_reference(layout, *arrays))
