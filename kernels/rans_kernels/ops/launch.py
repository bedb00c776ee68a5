"""How the warp-level kernels are launched: a rule, and exceptions that were measured."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from triton.runtime import driver

from rans_kernels.ops.tuned import TUNED

MAX_ROWS = 32
"""Rows of x that one launch takes; more are so many launches."""
FEW_BLOCKS = 192
"""Blocks of 8 warps of the wide kernel below which an H200 is filled more evenly by twice as many of 4."""
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


class WideLaunch(NamedTuple):
    """Configuration of the kernels for many rows of x (rans_linear/hopper.py)."""

    columns: int
    """Rows of x that a block takes: a power of two, 8 to 256."""
    warps: int
    """Of a block, 4 or more; a power of two."""
    registers: int | None
    """Most that a thread may have, or None."""
    chain: bool
    """Whether all tiles are one chain of MMAs: as fast for more columns, but another order of the sums."""


def choose_wide_launch(rows: int, panels: int, spans: int) -> WideLaunch:
    """Launch of so many rows of x in the order of the sums that all kernels share.

    Args:
        rows: of x.
        panels: of the weight.
        spans: of a panel.
    """
    columns = min(128, max(16, 1 << (rows - 1).bit_length()))
    if columns == 128:
        return WideLaunch(columns, 8, None, False)
    # two blocks of 8 warps a multiprocessor, four of 4
    return WideLaunch(columns, 4 if -(-panels // 8) * spans < FEW_BLOCKS else 8, 128, False)


@lru_cache
def choose_chain_launch(device: torch.device, shape: tuple[int, int], coded_bits: int, rows: int) -> WideLaunch | None:
    """Launch of many rows of x where it is faster than to decode and multiply by the library, else None.

    A block decodes its weights for 256 rows of x at most: with more such blocks of rows, or a decoder that takes
    longer than the product, decoding once is less work. Measured on an H200 (docs/kernels.md).

    Args:
        device: a CUDA device.
        shape: (N, K) of the weight.
        coded_bits: of its split.
        rows: of x.
    """
    properties = torch.cuda.get_device_properties(device)
    blocks = -(-shape[0] // 128) * -(-rows // 256)
    full = blocks >= 0.8 * properties.multi_processor_count
    if properties.major == 9 and coded_bits <= 2 and 128 < rows <= 512 and full:
        return WideLaunch(256, 8, None, True)
    return None


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
