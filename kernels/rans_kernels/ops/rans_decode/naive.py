"""What `rans_decode` computes: the reference decoder on the tensors' bytes."""

import torch
from torch import Tensor

from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import TileLayout


def rans_decode_naive(heads: Tensor, words: Tensor, offsets: Tensor, freqs: Tensor, layout: TileLayout) -> Tensor:
    """Decode to [N, K] in the dtype that was coded, on the CPU, a tile at a time."""
    arrays = (tensor.cpu().numpy() for tensor in (heads, words, offsets, freqs))
    return torch.from_numpy(decode_reference(layout, *arrays)).view(getattr(torch, layout.dtype))
