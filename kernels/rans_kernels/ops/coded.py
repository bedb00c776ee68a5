"""A coded weight as the kernels take it, and which kernels a device has."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rans_kernels.errors import ABSENT, DeviceError
from rans_kernels.format import DTYPES, LANES, Split, TileLayout
from rans_kernels.ops.table import slot_table, warp_table

OLDEST = (7, 0)
"""Compute capability that Triton begins with."""


@lru_cache
def backend_of(device: torch.device) -> str:
    """Kernels of a device: `gluon` on NVIDIA GPUs since Ampere, `triton` (portable) on others, `cpu`.

    Raises:
        DeviceError: there are none.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise DeviceError(f"compressed layers have no kernels for {device.type}: use the CPU, or an NVIDIA or AMD GPU")
    if importlib.util.find_spec("triton") is None:
        raise DeviceError("compressed layers need triton on a GPU: pip install triton, or use the CPU")
    if torch.version.hip is not None:
        return "triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise DeviceError(
            f"{name} has compute capability {major}.{minor} and the kernels need {OLDEST[0]}.{OLDEST[1]}: use the CPU, "
            "or a newer GPU"
        )
    return "gluon" if capability >= (8, 0) else "triton"


def require_device(device: torch.device | str | int) -> None:
    """Make sure that a device is there and has kernels, before anything is read for it.

    Raises:
        DeviceError: it is not, or has none.
    """
    try:
        found = torch.empty(0, device=device).device
    except ABSENT as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise DeviceError(f"{device} is not there ({reason}): use the CPU, or a torch built for its GPU") from error
    backend_of(found)


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """True for NVIDIA GPUs of compute capability 9, which multiply by warpgroups."""
    return backend_of(device) == "gluon" and torch.cuda.get_device_capability(device)[0] == 9


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def decoder_table(freqs: Tensor, layout: TileLayout, device: torch.device) -> Tensor:
    """What the kernels of a device look slots up in, made where the frequencies are; on the CPU these themselves."""
    match backend_of(device):
        case "cpu":
            return freqs
        case "gluon":
            return warp_table(freqs, layout)
        case _:
            return slot_table(freqs, layout)


def round_rows(rows: int) -> int:
    """Rows of words in few sizes, lest kernels and torch.compile take every weight for another kind."""
    step = 32 if rows <= 128 else 64
    return max(1, -(-rows // step)) * step


@dataclass(frozen=True)
class CodedWeight:
    """The arrays of one weight on one device, checked, with what the kernels derive from them.

    Attributes:
        heads: int32 [layout.head_rows, 32].
        words: int16 [rows, 8].
        offsets: int32 [tiles + 1].
        table: what the device's kernels look slots up in, see `table.py`; on the CPU the frequencies, int16 [256].
        layout: shape, split, units, precision and fold.
        word_rows: rows of words of the largest tile, rounded up by `round_rows`.
    """

    heads: Tensor
    words: Tensor
    offsets: Tensor
    table: Tensor
    layout: TileLayout
    word_rows: int

    @classmethod
    def check(cls, heads: Tensor, words: Tensor, offsets: Tensor, freqs: Tensor, layout: TileLayout) -> "CodedWeight":
        """Check what the kernels rely on, on the host, and make the table.

        Raises:
            FormatError: a decoder could leave heads or words.
        """
        rows = offsets.cpu().numpy()
        layout.check(len(heads), len(words), rows, freqs.cpu().numpy())
        table = decoder_table(freqs, layout, heads.device)
        largest = int((rows[1:] - rows[:-1]).max(initial=0))
        return cls(heads, words, offsets, table, layout, round_rows(largest))

    @property
    def dtype(self) -> torch.dtype:
        """What it decodes to: int8, bfloat16 or float16."""
        return getattr(torch, self.layout.dtype)

    @property
    def numbers(self) -> list[int]:
        """Everything that is no tensor, as custom operators take it."""
        layout = self.layout
        # of a length that does not depend on how many there are
        windows = sum(1 << start for start in layout.windows)
        return [
            *layout.shape, layout.fold, layout.split.coded_bits, layout.split.raw_bits, layout.units,
            layout.probability_bits, DTYPES.index(layout.dtype),
            *(windows >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)), self.word_rows,
        ]  # fmt: skip

    @classmethod
    def of(cls, heads: Tensor, words: Tensor, offsets: Tensor, table: Tensor, numbers: list[int]) -> "CodedWeight":
        """Put together again what a custom operator was given."""
        return cls(heads, words, offsets, table, layout_of(*numbers[:-1]), numbers[-1])


@lru_cache(maxsize=4096)
def layout_of(
    n: int, k: int, fold: int, coded: int, raw: int, units: int, precision: int, dtype: int, *masks: int
) -> TileLayout:
    """The layout that `CodedWeight.numbers` tells of; made anew it takes a CPU longer than to call the operator."""
    windows = tuple(32 * i + bit for i, mask in enumerate(masks) for bit in range(32) if mask >> bit & 1)
    return TileLayout((n, k), Split(coded, raw), units, precision, DTYPES[dtype], windows, fold)


def overrun_bytes(layout: TileLayout) -> int:
    """How far the cursor of a damaged tile can run: a word for every symbol of every lane."""
    return 2 * LANES * layout.most_units * layout.unit_symbols
