"""The tables that kernels look a state's slot up in."""

import torch
from torch import Tensor

from rans_kernels.format import TileLayout


def has_top_bits(coded_bits: int, raw_bits: int) -> bool:
    """Whether the patterns of `warp_table` have the top bits of the bytes set: where there is room for them."""
    return coded_bits == 1 and 2 <= raw_bits <= 6


def slot_table(freqs: Tensor, layout: TileLayout) -> Tensor:
    """Pack what a decoder needs of every slot into 32 bits: symbol | (frequency - 1) << 8 | offset in the symbol << 20.

    Args:
        freqs: int16 [256], adding up to 2 ** probability_bits.
        layout: says what symbols stand for.

    Returns:
        int32 [2 ** probability_bits], on the same device; of floats with the high byte of every code behind it.
    """
    freq = freqs.to(torch.int64)
    symbol = torch.repeat_interleave(torch.arange(256, device=freqs.device), freq)
    start = freq.cumsum(0) - freq
    offset = torch.arange(len(symbol), device=freqs.device) - start[symbol]
    packed = symbol | (freq[symbol] - 1) << 8 | offset << 20
    if layout.is_float:
        packed = torch.cat([packed, torch.from_numpy(layout.float_bytes()).to(packed)])
    # two's complement: the top bit of an offset is the sign
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def warp_table(freqs: Tensor, layout: TileLayout) -> Tensor:
    """What a rANS step of the warp-level kernels needs of every slot, coded bits where a weight has them.

    Args:
        freqs: int16 [256], adding up to 2 ** probability_bits.
        layout: its split says where coded bits go, its dtype and windows what they stand for.

    Returns:
        int32 [slots, 2]: frequency << 16 | offset in the symbol, and the coded bits in the bytes of their weights
        (C = 1: of weights 4 to 7 one bit higher, and where R leaves them free bits 7 and 0 set, see `codes` in warp.py;
        floats: as high bytes, to which low bits and sign are yet to be added). For coded_bits 8 int32 [slots, 1]:
        frequency << 20 | offset << 8 | the weight's byte.
    """
    split = layout.split
    high_bytes = torch.from_numpy(layout.float_bytes()).to(freqs.device, torch.int64) if layout.is_float else None
    freq = freqs.to(torch.int64)
    symbol = torch.repeat_interleave(torch.arange(256, device=freqs.device), freq)
    start = freq.cumsum(0) - freq
    offset = torch.arange(len(symbol), device=freqs.device) - start[symbol]
    if split.coded_bits == 8:
        byte = symbol if high_bytes is None else high_bytes[symbol]
        # a frequency of 2 ** 12 overflows to 0: it is that of the only symbol, which any state finds
        entries = [(freq[symbol] & 0xFFF) << 20 | offset << 8 | byte]
    else:
        place = torch.zeros_like(symbol)
        for weight in range(split.symbol_weights):
            coded = symbol >> (weight * split.coded_bits) & ((1 << split.coded_bits) - 1)
            if high_bytes is not None:
                place |= high_bytes[coded << split.raw_bits] << 8 * weight
                continue
            bit = (
                8 * weight + split.raw_bits
                if split.coded_bits > 1
                else 8 * (weight % 4) + split.raw_bits - 1 + weight // 4
            )
            place |= coded << bit
        if has_top_bits(split.coded_bits, split.raw_bits):
            place |= 0x81818181
        entries = [freq[symbol] << 16 | offset, place]
    table = torch.stack(entries, dim=1)
    # two's complement: the top bit is the sign
    return torch.where(table >= 1 << 31, table - (1 << 32), table).to(torch.int32)
