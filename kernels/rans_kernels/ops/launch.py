"""How the warp-level kernels are launched: a rule, and exceptions that were measured."""

from functools import lru_cache
from typing import NamedTuple

import torch

from rans_kernels.ops.tuned import TUNED

MAX_ROWS = 32
"""Rows of x that one launch takes; more are so many launches."""


class Launch(NamedTuple):
    """Configuration of one launch. It changes the speed, never a bit of the result."""

    warps: int
    """Of a block; a power of two."""
    stages: int
    """Of the ring that weights pass through."""
    overlap: bool
    """Whether the next kernel of the stream may begin while this one ends."""


@lru_cache
def choose_launch(device: torch.device, shape: tuple[int, int], column_blocks: int, tiles: int) -> Launch:
    """Launch of a fused or dense product.

    Args:
        device: a CUDA device.
        shape: (N, K) of the weight.
        column_blocks: blocks of 8 rows of x.
        tiles: of a panel.
    """
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    if tuned := TUNED.get((torch.cuda.get_device_name(device), *shape, column_blocks)):
        return Launch(min(tuned[0], 1 << (tiles.bit_length() - 1)), tuned[1], overlap)
    return Launch(min(16, 1 << (tiles.bit_length() - 1)), 3, overlap)
