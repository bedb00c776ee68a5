"""What of a model stays on a device of so much memory, and how the rest is cut into chunks that pass through slots.

Layers that stay are spread evenly between those that do not, so that while they compute a copy is under way.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rans_kernels.linear import CompressedEmbedding, CompressedLinear, CompressedWeight
from rans_kernels.staging import cut

ALIGNMENT = 512
"""Bytes that allocations on a GPU are multiples of."""
LINE = 64
"""Bytes of a CPU's cache line."""
GB = 1e9


class BudgetError(MemoryError):
    """There is less memory than the model needs.

    Attributes:
        least: bytes that would do, where the budget is what is too small.
    """

    def __init__(self, message: str, least: int = 0):
        """Args: message: one line that says what to do. least: as above."""
        super().__init__(message)
        self.least = least


class Span(NamedTuple):
    """Where a tensor is in a chunk."""

    begin: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """The tensor in a chunk's memory, uint8 [bytes]."""
        size = self.shape.numel() * self.dtype.itemsize
        return memory[self.begin : self.begin + size].view(self.dtype).view(self.shape)


class Chunk(NamedTuple):
    """Layers in a row whose weights are copied at once.

    Attributes:
        layers: in the order of modules. spans: of every layer's streamed tensors, by name. size: bytes.
    """

    layers: list[nn.Module]
    spans: list[dict[str, Span]]
    size: int


@dataclass(frozen=True)
class Placement:
    """What stays and what is streamed.

    Attributes:
        chunks: what is streamed, in the order of modules; none if all stays.
        slots: their number. slot_bytes: of one.
        needed: bytes that weights take on the device, at most the budget.
        streamed_bytes: copied in one pass over the model.
    """

    chunks: list[Chunk]
    slots: int
    slot_bytes: int
    needed: int
    streamed_bytes: int


def place(model: nn.Module, budget: float, device: torch.device, slots: int, spread: bool = True) -> Placement:
    """Decide what stays.

    Args:
        model: on any device.
        budget: GB (1e9 bytes) that weights may take, slots and what is decoded and kept included.
        device: that computes.
        slots: chunks on the device at once.
        spread: as `choose`.

    Raises:
        BudgetError: the budget is too small; says which would do.
    """
    shared = shared_parameters(model)
    layers = [m for m in model.modules() if shared.isdisjoint(map(id, own(m).values())) and chunk_of([m], device).size]
    sizes = [chunk_of([layer], device).size for layer in layers]
    costs = [size + kept_bytes(layer, device) for size, layer in zip(sizes, layers, strict=True)]
    fixed = fixed_bytes(model, layers, device)
    stays = choose(sizes, costs, budget * GB - fixed, slots, spread)
    if stays is None:
        least = fixed + min(need for _, need in openings(sizes, costs, slots))
        raise BudgetError(
            f"a budget of {budget:g} GB is too small: {fixed / GB:.4g} GB are embeddings, norms and the like, which "
            f"stay, and with the least staging it takes {math.ceil(least / 1e5) / 1e4:g} GB: give that or more",
            least,
        )
    streamed = [i for i, stay in enumerate(stays) if not stay]
    parts = cut([sizes[i] for i in streamed])
    chunks = [chunk_of([layers[streamed[i]] for i in part], device) for part in parts]
    slots = slots if chunks else 0
    slot_bytes = max((chunk.size for chunk in chunks), default=0)
    kept = sum(cost for cost, stay in zip(costs, stays, strict=True) if stay)
    return Placement(chunks, slots, slot_bytes, fixed + kept + slots * slot_bytes, sum(chunk.size for chunk in chunks))


def own(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a linear layer that may be streamed, by name; none of other modules."""
    if isinstance(module, CompressedLinear):
        names = ["weight", "weight_words"]
        if module.group_size is not None:
            # fewer scales are too small to bother
            names.append("weight_scale")
        return {name: module._buffers[name] for name in names}  # type: ignore[misc]
    # exactly: what is derived from it may use the weight without calling it
    return {"weight": module.weight} if type(module) is nn.Linear else {}


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules have."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def round_up(size: int) -> int:
    """Bytes that so many take on a device."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def chunk_of(layers: list[nn.Module], device: torch.device) -> Chunk:
    """Layers whose streamed tensors are one behind the other, aligned."""
    begin, spans = 0, list[dict[str, Span]]()
    for layer in layers:
        spans.append({})
        for name, tensor in own(layer).items():
            # the CPU's libraries add in an order that depends on where in a line a matrix begins; files do not align
            shift = tensor.data_ptr() % LINE if device.type == "cpu" else 0
            spans[-1][name] = Span(begin + shift, tensor.shape, tensor.dtype)
            begin += round_up(shift + tensor.nbytes)
    return Chunk(layers, spans, begin)


def kept_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes of what a module decodes once and keeps, as all compressed ones do on the CPU."""
    keeps = device.type == "cpu" or isinstance(module, CompressedEmbedding)
    if not (isinstance(module, CompressedWeight) and keeps):
        return 0
    n, k = module.layout.shape
    return round_up(n * k * getattr(torch, module.layout.dtype).itemsize)


def fixed_bytes(model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> int:
    """Bytes of what stays on the device whatever the budget: all but the streamed tensors of these layers."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for layer in layers:
        for tensor in own(layer).values():
            del tensors[id(tensor)]
    total = sum(round_up(tensor.nbytes) for tensor in tensors.values())
    for module in model.modules():
        if isinstance(module, CompressedEmbedding):
            total += kept_bytes(module, device)
        if isinstance(module, CompressedWeight) and device.type != "cpu":
            # at most, of the table that kernels look slots up in
            total += round_up(8 << module.layout.probability_bits)
    return total


def openings(sizes: Sequence[int], costs: Sequence[int], slots: int) -> Iterator[tuple[int, int]]:
    """Every size of a slot that makes a difference, ascending, and the bytes of the slots and of larger layers."""
    for slot in sorted({0, *sizes}):
        yield slot, slots * slot + sum(cost for size, cost in zip(sizes, costs, strict=True) if size > slot)


def choose(
    sizes: Sequence[int], costs: Sequence[int], room: float, slots: int, spread: bool = True
) -> list[bool] | None:
    """Which layers stay, in the order of modules; None if there is room for no choice.

    The smallest slots that do leave most room. Layers larger than these stay, and as many others as fit.

    Args:
        sizes: bytes in a slot.
        costs: bytes of a layer that stays.
        room: bytes for slots and layers that stay.
        slots: their number.
        spread: whether the others are spread evenly, by bytes, or the first that fit.
    """
    slot, need = next(((slot, need) for slot, need in openings(sizes, costs, slots) if need <= room), (0, -1))
    if need < 0:
        return None
    small = sum(cost for size, cost in zip(sizes, costs, strict=True) if size <= slot)
    share, credit = ((room - need) / max(1, small), 0.0) if spread else (0.0, room - need)
    stays = []
    for size, cost in zip(sizes, costs, strict=True):
        if size > slot:
            stays.append(True)
            continue
        credit += cost * share
        stays.append(cost <= credit)
        credit -= cost * stays[-1]
    return stays
