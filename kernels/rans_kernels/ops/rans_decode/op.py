"""`rans_decode`: compressed weights to plain INT8."""

import torch
from torch import Tensor

from rans_kernels.coder import decode_tiles
from rans_kernels.format import TileLayout
from rans_kernels.ops.table import table_frequencies


@torch.compiler.disable
def rans_decode(stream: Tensor, offsets: Tensor, table: Tensor, layout: TileLayout) -> Tensor:
    """Decode a weight matrix on the device its stream is on.

    Args:
        stream: int32 [rows, 16].
        offsets: int32 [tiles * groups + 1].
        table: int32 [2 ** probability_bits], from `slot_table`.
        layout: shape, split, lanes and precision.

    Returns:
        int8 [N, K].

    Raises:
        FormatError: on the CPU, a damaged stream. Kernels on a GPU stay inside the stream but do not report.
    """
    if stream.device.type == "cpu":
        freqs = table_frequencies(table)
        return torch.from_numpy(decode_tiles(layout, stream.numpy(), offsets.numpy(), freqs.numpy()))
    from rans_kernels.ops.rans_decode.triton import rans_decode_triton

    return rans_decode_triton(stream, offsets, table, layout)
