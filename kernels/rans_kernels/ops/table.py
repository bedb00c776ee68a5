"""The slot table that kernels look symbols up in."""

import torch
from torch import Tensor


def slot_table(freqs: Tensor) -> Tensor:
    """Pack what a decoder needs of every slot into 32 bits: symbol | (frequency - 1) << 8 | offset in the symbol << 20.

    Args:
        freqs: int16 [256], adding up to 2 ** probability_bits.

    Returns:
        int32 [2 ** probability_bits], on the same device.
    """
    freq = freqs.to(torch.int64)
    symbol = torch.repeat_interleave(torch.arange(256, device=freqs.device), freq)
    start = freq.cumsum(0) - freq
    offset = torch.arange(len(symbol), device=freqs.device) - start[symbol]
    packed = symbol | (freq[symbol] - 1) << 8 | offset << 20
    # two's complement: the top bit of an offset is the sign
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def table_frequencies(table: Tensor) -> Tensor:
    """The frequencies int16 [256] that a slot table was made from."""
    return torch.bincount(table & 0xFF, minlength=256).to(torch.int16)
