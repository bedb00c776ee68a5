"""Large batches: the weights of the layers to come are decoded on a side stream while one multiplies.

Above the batches that the fused kernel takes, a layer is decoded and then multiplied by the library. With

    DecodeAhead(model.modules(), model.dtype).enable()

the first of these hides behind the second. There are two buffers, allocated once. Layers in a row that fit a buffer
together are a *chunk*, decoded in one launch; chunk c has buffer c % 2. Two events order a buffer: it is read after
`ready`, written after `free`. Results are those without, to the bit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rans_kernels.dense import linear
from rans_kernels.linear import CompressedLinear
from rans_kernels.ops.rans_decode import DecodePlan
from rans_kernels.ops.rans_linear.op import chain_launch, uses_fused_kernel

ALIGNMENT = 256
"""Bytes that weights in a buffer are aligned to, as allocations are."""


class Slot:
    """A buffer, the chunk it holds, and the events that say when."""

    def __init__(self, size: int, device: torch.device):
        """Args: size: in bytes. device: of the layers."""
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        cuda = device.type == "cuda"
        self.ready = torch.cuda.Event() if cuda else None
        self.free = torch.cuda.Event() if cuda else None


class DecodeAhead:
    """Two buffers and a side stream for the layers of a model, in the order of their use.

    Another order is right too, but decodes in line. Not staged, and computed as ever: batches for the fused kernels,
    layers with scales per group or of floats, inputs that need gradients, and what is compiled or captured in a CUDA
    graph.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype):
        """Take the layers.

        Args:
            modules: those that are no CompressedLinear on the device of the first are left out.
            dtype: of activations.
        """
        linear_layers = [m for m in modules if isinstance(m, CompressedLinear)]
        layers = [m for m in linear_layers if m.group_size is None and not m.layout.is_float]
        self.layers = [m for m in layers if m.weight.device == layers[0].weight.device]
        self.dtype = dtype
        self.chunks = cut([self.size(layer) for layer in self.layers])
        self.place = {id(self.layers[i]): (c, i - chunk[0]) for c, chunk in enumerate(self.chunks) for i in chunk}
        self.slots: list[Slot] = []
        self.side: torch.cuda.Stream | None = None
        self.plans: dict[int, DecodePlan] = {}

    def size(self, layer: CompressedLinear) -> int:
        """Bytes of a layer's weights in a buffer."""
        n, k = layer.layout.shape
        return -(-n * k * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def enable(self) -> "DecodeAhead":
        """Allocate the buffers; the layers use them from now on."""
        if self.layers and not self.slots:
            device = self.layers[0].weight.device
            size = max(sum(self.size(self.layers[i]) for i in chunk) for chunk in self.chunks)
            self.slots = [Slot(size, device) for _ in range(2)]
            self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
            for slot in self.slots:
                keep_for(slot.memory, self.side)
        for layer in self.layers:
            layer.ahead = self
        return self

    def disable(self) -> None:
        """Free the buffers; the layers decode for themselves again."""
        for layer in self.layers:
            layer.ahead = None
        self.forget()
        self.slots = []

    def forget(self) -> None:
        """Drop everything decoded, as after the weights have changed."""
        if self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)
        self.plans.clear()
        for slot in self.slots:
            slot.holds = None

    def takes(self, layer: CompressedLinear, x: Tensor) -> bool:
        """Whether the layer's product with x is one to decode ahead for."""
        if torch.compiler.is_compiling() or x.dtype is not self.dtype or x.device != self.slots[0].memory.device:
            return False
        capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        gradients = torch.is_grad_enabled() and x.requires_grad
        rows = x.numel() // max(1, x.shape[-1])
        decodes = not (
            uses_fused_kernel(rows, x.device, x.dtype) or chain_launch(layer.layout, rows, x.device, x.dtype)
        )
        return decodes and not (capturing or gradients)

    def multiply(self, layer: CompressedLinear, x: Tensor) -> Tensor:
        """The layer's result; the next chunk is begun before.

        Args:
            layer: one of those given.
            x: [..., K] that `takes` accepts.
        """
        chunk, position = self.place[id(layer)]
        if chunk in self.plans and self.plans[chunk].weights[position] is not layer.prepare():
            self.forget()
        weight = self.fill(chunk).out[position]
        if chunk + 1 < len(self.chunks):
            self.fill(chunk + 1)
        rows, slot = x.reshape(-1, x.shape[-1]), self.slots[chunk % 2]
        if slot.ready is None or slot.free is None:
            y = linear(rows, weight, layer.bias)
        else:
            stream = torch.cuda.current_stream(x.device)
            stream.wait_event(slot.ready)
            # `free` comes to mean this product and, should it have run on another stream, the one before
            stream.wait_event(slot.free)
            y = linear(rows, weight, layer.bias)
            slot.free.record(stream)
        return y.reshape(*x.shape[:-1], layer.out_features)

    def fill(self, chunk: int) -> DecodePlan:
        """Begin to decode a chunk into its buffer, unless it is there."""
        slot = self.slots[chunk % 2]
        plan = self.plans.get(chunk) or self.plan(chunk)
        if slot.holds != chunk:
            if self.side is None or slot.free is None or slot.ready is None:
                plan.run()
            else:
                with torch.cuda.stream(self.side):
                    self.side.wait_event(slot.free)
                    plan.run()
                    slot.ready.record(self.side)
            slot.holds = chunk
        return plan

    def plan(self, chunk: int) -> DecodePlan:
        """How a chunk is decoded: made once."""
        layers = [self.layers[i] for i in self.chunks[chunk]]
        weights, out, begin = [layer.prepare() for layer in layers], [], 0
        for layer, weight in zip(layers, weights, strict=True):
            n, k = layer.layout.shape
            memory = self.slots[chunk % 2].memory[begin : begin + n * k * self.dtype.itemsize]
            out.append(memory.view(self.dtype).view(n, k))
            begin += self.size(layer)
            for tensor in (weight.heads, weight.words, weight.offsets, weight.table, layer.weight_scale):
                keep_for(tensor, self.side)
        if self.side is not None:
            # what it reads may have been written just now
            self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            self.plans[chunk] = DecodePlan(weights, [layer.weight_scale for layer in layers], self.dtype, out)
        return self.plans[chunk]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # a copy of a layer is not staged
        return type(None), ()


def cut(sizes: list[int]) -> list[range]:
    """Runs of layers, each no larger than the largest layer."""
    chunks: list[range] = []
    room = 0
    for i, size in enumerate(sizes):
        if size > room:
            chunks.append(range(i, i))
            room = max(sizes)
        chunks[-1] = range(chunks[-1].start, i + 1)
        room -= size
    return chunks


def keep_for(tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
    """Tell the allocator that a stream uses the tensor's memory: freed, it is not handed out before that is done."""
    if stream is not None:
        tensor.record_stream(stream)
