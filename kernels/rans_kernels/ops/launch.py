"""How the warp-level kernels are launched: a rule, and exceptions that were measured."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from triton.runtime import driver

from rans_kernels.ops.tuned import TUNED

MAX_ROWS = 32
"""Rows of x that one launch takes; more are so many launches."""
FULL = 48
"""Warps a multiprocessor from which latency hides itself and a ring in shared memory costs more than it brings."""


class Launch(NamedTuple):
    """Configuration of one launch. It changes the speed, never a bit of the result."""

    warps: int
    """Of a block; a power of two."""
    stages: int
    """Of the ring that weights pass through; 1 keeps them in registers instead."""
    overlap: bool
    """Whether the next kernel of the stream may begin while this one ends."""


def most_warps(column_blocks: int) -> int:
    """Of a block: a thread may have no more than 128 registers in a block of 16."""
    return 16 if column_blocks <= 2 else 8


@lru_cache
def launch_rule(device: torch.device, shape: tuple[int, int], column_blocks: int, tiles: int) -> Launch:
    """Launch of a fused or dense product that nobody has measured; arguments as `choose_launch`."""
    properties = torch.cuda.get_device_properties(device)
    warps = min(most_warps(column_blocks), 1 << max(0, tiles - 1).bit_length())
    resident = -(-shape[0] // 16) * tiles / properties.multi_processor_count
    return Launch(warps, 1 if resident >= FULL else 3, properties.major >= 9)


@lru_cache
def choose_launch(device: torch.device, shape: tuple[int, int], column_blocks: int, tiles: int) -> Launch:
    """Launch of a fused or dense product.

    Args:
        device: a CUDA device.
        shape: (N, K) of the weight.
        column_blocks: blocks of 8 rows of x.
        tiles: of a panel.
    """
    rule = launch_rule(device, shape, column_blocks, tiles)
    if tuned := TUNED.get((torch.cuda.get_device_properties(device).name, *shape, column_blocks)):
        return Launch(min(tuned[0], most_warps(column_blocks)), tuned[1], rule.overlap)
    return rule


@lru_cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def fit_shared(device: torch.device, warps: int, shared_bytes: Callable[[int], int]) -> int:
    """As many warps, at most so many and a power of two, as a block's shared memory on the device holds."""
    while warps > 1 and shared_bytes(warps) + 1024 > shared_limit(device):
        warps //= 2
    return warps
