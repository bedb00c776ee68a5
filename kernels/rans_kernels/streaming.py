"""Models larger than the memory they run in: weights wait in host memory or on disk and pass through staging slots.

    Streamer(model, budget=3.0, device="cuda").enable()

keeps on the device what the budget holds (placement.py). The weights of the other linear layers, compressed as they are
stored, are copied into one of a few slots on a side stream while the layers before compute, and the kernels of a
resident layer run on the slot: results are those of the resident model, to the bit. Chunks are fetched in the order in
which they followed one another last, the first again behind the last; another order is right too, but waits. Two events
order a slot: it is read after `ready`, written after `free`. `record` makes a CUDA graph of a pass, copies and all.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from rans_kernels.linear import CompressedLinear, CompressedWeight
from rans_kernels.ops.coded import CodedWeight, decoder_table
from rans_kernels.placement import GB, BudgetError, Span, own, place
from rans_kernels.staging import Slot, keep_for

OFFLOADS = ("host", "disk")
HIDDEN = ("forward", "_apply", "_load_from_state_dict", "extra_repr")
"""Methods of a streamed layer that functions stand for."""
PAGE = 4096
"""Bytes of host memory that are pinned at once."""


class Weights(NamedTuple):
    """A layer's streamed tensors in one place, and what the kernels take them as."""

    tensors: dict[str, Tensor]
    coded: CodedWeight | None


class Staging(Slot):
    """A slot, the views of every chunk that was in it, and how it is filled from disk.

    Attributes:
        pinned: where the reader puts a chunk before it is copied; none on a CPU, or if chunks wait in host memory.
        pending: the reader's work, until someone has waited for it.
        views: of every chunk's layers in the slot's memory.
    """

    def __init__(self, size: int, device: torch.device, pinned: Tensor | None):
        """Args: size: in bytes. device: that computes. pinned: as above."""
        super().__init__(size, device)
        self.pinned = pinned
        self.pending: Future[None] | None = None
        self.views: dict[int, list[Weights]] = {}


class Streamer:
    """Slots, a side stream, and the weights that wait.

    A streamed model computes, and no more: gradients do not pass its layers, it is not compiled or copied, and `record`
    alone captures it in a CUDA graph.

    Attributes:
        placement: what stays on the device and what is streamed.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float,
        device: torch.device | str,
        offload: str = "host",
        slots: int = 3,
        spread: bool = True,
    ):
        """Decide what stays; nothing is moved yet.

        Args:
            model: on any device. The weights of a `CompressedLinear` may be streamed, and that of an `nn.Linear` if no
                other module has it; all else stays.
            budget: GB (1e9 bytes) that weights may take on the device, slots and what is decoded and kept included.
            device: that computes.
            offload: where the others wait: `host`, in memory, pinned for a GPU; `disk`, where they are, which after
                loading is the memory-mapped file, read by a thread.
            slots: chunks on the device at once, from 2.
            spread: whether layers that stay are spread evenly, or the first.

        Raises:
            BudgetError: the budget is too small; says which would do.
            ValueError: no such offload, or fewer slots.
        """
        if offload not in OFFLOADS or slots < 2:
            raise ValueError(f"offload={offload!r} and slots={slots}: give one of {', '.join(OFFLOADS)}, and 2 or more")
        self.model, self.offload, self.device = model, offload, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.placement = place(model, budget, self.device, slots, spread)
        self.chunks = self.placement.chunks
        self.where = {id(layer): (c, i) for c, chunk in enumerate(self.chunks) for i, layer in enumerate(chunk.layers)}
        # how chunks followed one another when they were last used; before that, as modules do
        self.behind = [(c + 1) % len(self.chunks) for c in range(len(self.chunks))]
        self.last: int | None = None
        self.rest: list[list[Weights]] = []
        self.memory: list[Tensor] = []
        self.coded: dict[int, CodedWeight] = {}
        self.slots: list[Staging] = []
        self.at: dict[int, Staging] = {}
        self.side: torch.cuda.Stream | None = None
        self.reader: ThreadPoolExecutor | None = None
        # chunks that a recording has copied
        self.recorded: set[int] | None = None

    def enable(self) -> "Streamer":
        """Move everything to where it belongs; from now on the model runs on the device.

        Raises:
            BudgetError: the device has less memory free, or that of the host cannot be pinned.
            ValueError: the model is streamed already, or decodes ahead.
        """
        try:
            # what is made here is used in any mode
            with torch.inference_mode(False), torch.no_grad():
                self.move()
        except torch.OutOfMemoryError as error:
            size = f"{self.placement.needed / GB:.3g} GB"
            raise BudgetError(f"weights take {size}, {self.device} has less free: give a smaller budget") from error
        return self

    def move(self) -> None:
        """What `enable` does."""
        layers = [layer for chunk in self.chunks for layer in chunk.layers]
        if getattr(self.model, "streamer", None) is not None or any(getattr(m, "ahead", None) for m in layers):
            raise ValueError("the model is streamed already, or its weights are decoded ahead: disable that first")
        on_gpu = self.device.type == "cuda"
        for c in range(len(self.chunks)):
            self.put_to_rest(c)
        for module in self.model.modules():
            if id(module) not in self.where:
                module._apply(lambda tensor: bring(tensor, self.device), recurse=False)
                if isinstance(module, CompressedWeight):
                    module.prepare()
        if not self.chunks:
            return
        self.side = torch.cuda.Stream(self.device) if on_gpu else None
        self.reader = ThreadPoolExecutor(1, "rans-reader") if self.offload == "disk" else None
        size = self.placement.slot_bytes
        for _ in range(self.placement.slots):
            pinned = host_memory(size, True) if self.reader is not None and on_gpu else None
            self.slots.append(Staging(size, self.device, pinned))
            keep_for(self.slots[-1].memory, self.side)
        if self.side is not None:
            # who had the slots' memory before may still use it
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        for layer in layers:
            self.hide_methods(layer)
        self.mark(True)

    def hide_methods(self, layer: nn.Module) -> None:
        """Put functions into the layer's own dict, where they hide methods of the same names."""

        def stay(*args: Any, **kwargs: Any) -> nn.Module:
            return layer

        def refuse(state: Any, prefix: str, *args: Any) -> None:
            args[-1].append(f"{prefix.removesuffix('.')} is streamed: its weights cannot be changed")

        shown = f"{layer.extra_repr()}, streamed to {self.device}"
        hidden = {
            "forward": torch.compiler.disable(partial(self.run, layer, layer.forward)),
            "_apply": stay, "_load_from_state_dict": refuse, "extra_repr": lambda: shown,
        }  # fmt: skip
        vars(layer).update(hidden)

    def put_to_rest(self, chunk: int) -> None:
        """Bring a chunk's weights to where they wait, and what its layers keep beside them to the device."""
        layers, spans, size = self.chunks[chunk]
        memory = None if self.offload == "disk" else host_memory(size, self.device.type == "cuda")
        self.rest.append([])
        for layer, parts in zip(layers, spans, strict=True):
            tensors = {name: tensor.detach() for name, tensor in own(layer).items()}
            if memory is None:
                tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            else:
                tensors = {name: parts[name].view(memory).copy_(tensor) for name, tensor in tensors.items()}
            coded = None
            if isinstance(layer, CompressedLinear):
                layer.weight_offsets, layer.weight_freqs = layer.weight_offsets.cpu(), layer.weight_freqs.cpu()
                coded = CodedWeight.check(
                    tensors["weight"], tensors["weight_words"], layer.weight_offsets, layer.weight_freqs, layer.layout
                )
                table = decoder_table(layer.weight_freqs, layer.layout, self.device).to(self.device)
                self.coded[id(layer)] = replace(coded, offsets=coded.offsets.to(self.device), table=table)
                layer.weight_scale = layer.weight_scale.to(self.device)
            else:
                tensors["weight"] = like(layer.weight, tensors["weight"])
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.data = bring(layer.bias.data, self.device)
            self.rest[chunk].append(Weights(tensors, coded))
            put(layer, self.rest[chunk][-1])
        if memory is not None:
            self.memory.append(memory)

    def disable(self) -> None:
        """Free the slots; streamed weights stay where they wait, and `model.to(device)` fetches them for good."""
        if not self.slots:
            return
        for slot in self.slots:
            settle(slot)
        if self.reader is not None:
            self.reader.shutdown()
        if self.side is not None:
            torch.cuda.synchronize(self.device)
        for chunk in self.chunks:
            for layer in chunk.layers:
                for name in HIDDEN:
                    del vars(layer)[name]
        self.mark(False)
        self.rest, self.memory, self.coded, self.slots, self.at, self.last = [], [], {}, [], {}, None
        self.reader = self.side = None

    def mark(self, streamed: bool) -> None:
        """Tell the model and its quantizer."""
        vars(self.model)["streamer"] = self if streamed else None
        if (quantizer := getattr(self.model, "hf_quantizer", None)) is not None:
            quantizer.is_streamed = streamed

    def run(self, layer: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The layer's forward while its weights are in a slot; a backward pass through it raises.

        Raises:
            RuntimeError: x is on another device, or the stream is being captured.
        """
        slot = self.use(layer, x)
        try:
            with torch.no_grad():
                y = forward(x)
        finally:
            chunk, position = self.where[id(layer)]
            put(layer, self.rest[chunk][position])
            if slot.free is not None:
                stream = torch.cuda.current_stream(self.device)
                # `free` comes to mean this use and, should it have run on another stream, the one before
                stream.wait_event(slot.free)
                slot.free.record(stream)
        return Gone.apply(y, x, *layer._parameters.values()) if torch.is_grad_enabled() else y

    def use(self, layer: nn.Module, x: Tensor) -> Staging:
        """Put the layer's weights in place and begin to fetch those behind them; returns the slot they are in."""
        if x.device != self.device:
            raise RuntimeError(f"weights are streamed to {self.device} and x is on {x.device}: load the model for that")
        if self.side is not None and self.recorded is None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a streamed model is captured in a CUDA graph by rans_kernels.streaming.record alone")
        chunk, position = self.where[id(layer)]
        if chunk != self.last:
            self.fetch(chunk)
        slot = self.at[chunk]
        settle(slot)
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        put(layer, self.views(chunk, slot)[position])
        return slot

    def fetch(self, chunk: int) -> None:
        """Begin to copy a chunk, and those expected behind it, into slots that hold none of these."""
        if self.last is not None:
            self.behind[self.last] = chunk
        self.last = chunk
        wanted, done = [chunk], self.recorded or set()
        while len(wanted) < len(self.slots) and (following := self.behind[wanted[-1]]) not in {*wanted, *done}:
            wanted.append(following)
        spare = [slot for slot in self.slots if slot.holds not in wanted]
        for c in wanted:
            if c in self.at:
                continue
            slot = spare.pop()
            # the reader may be at a chunk that was fetched and not used
            settle(slot)
            if slot.holds is not None:
                del self.at[slot.holds]
            self.at[c], slot.holds = slot, c
            if self.recorded is not None:
                self.recorded.add(c)
            if self.reader is None:
                self.copy(c, self.memory[c], slot)
            else:
                slot.pending = self.reader.submit(self.read, c, slot)

    def forget(self) -> None:
        """From now on nothing is in the slots, which what the current stream has been given may still use."""
        stream = torch.cuda.current_stream(self.device)
        for slot in self.slots:
            # another event: one of a capture means nothing outside of it, and the other way round
            slot.holds, slot.ready, slot.free = None, torch.cuda.Event(), torch.cuda.Event()
            slot.free.record(stream)
        self.at, self.last = {}, None

    def wait(self) -> None:
        """Let the current stream wait for all copies and readers."""
        assert self.side is not None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.side)
        for slot in self.slots:
            if slot.free is not None:
                stream.wait_event(slot.free)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While a graph is captured: it begins with nothing in the slots and leaves nothing there."""
        assert self.side is not None
        self.forget()
        # what the side does belongs to the capture from here on, whatever happens
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        self.recorded = set()
        try:
            yield
        finally:
            self.recorded = None
            self.wait()

    def read(self, chunk: int, slot: Staging) -> None:
        """Read a chunk from disk into a slot, in the reader's thread; for a GPU by way of pinned memory."""
        target = slot.memory if slot.pinned is None else slot.pinned
        if slot.ready is not None:
            # the copy before it has left
            slot.ready.synchronize()
        for parts, weights in zip(self.chunks[chunk].spans, self.rest[chunk], strict=True):
            for name, tensor in weights.tensors.items():
                parts[name].view(target).copy_(tensor.detach())
        if slot.pinned is not None:
            self.copy(chunk, slot.pinned, slot)

    def copy(self, chunk: int, source: Tensor, slot: Staging) -> None:
        """Begin to copy a chunk's bytes into a slot."""
        size = self.chunks[chunk].size
        if self.side is None or slot.free is None or slot.ready is None:
            slot.memory[:size].copy_(source[:size])
            return
        if self.recorded is not None:
            source = DeviceView(source).tensor(self.device)
        with torch.cuda.stream(self.side):
            self.side.wait_event(slot.free)
            slot.memory[:size].copy_(source[:size], non_blocking=True)
            slot.ready.record(self.side)

    def views(self, chunk: int, slot: Staging) -> list[Weights]:
        """A chunk's layers in a slot, made once."""
        if chunk not in slot.views:
            layers, spans, _ = self.chunks[chunk]
            slot.views[chunk] = [self.view(layer, parts, slot) for layer, parts in zip(layers, spans, strict=True)]
        return slot.views[chunk]

    def view(self, layer: nn.Module, parts: dict[str, Span], slot: Staging) -> Weights:
        """A layer in a slot."""
        tensors = {name: span.view(slot.memory) for name, span in parts.items()}
        coded = self.coded.get(id(layer))
        if coded is None:
            tensors["weight"] = like(layer.weight, tensors["weight"])
        else:
            coded = replace(coded, heads=tensors["weight"], words=tensors["weight_words"])
        return Weights(tensors, coded)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a streamed model cannot be copied or pickled: load it again, or save_pretrained")


class Gone(torch.autograd.Function):
    """A streamed layer's result to autograd, which then knows that it depends on x and that there is no way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *sources: Tensor | None) -> Tensor:
        """A copy, which may be written over."""
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        """Raise RuntimeError."""
        raise RuntimeError("no gradient passes a streamed layer, whose weights are gone: load the model without budget")


def record(model: nn.Module, run: Callable[[], None]) -> Callable[[], None]:
    """Capture what `run` does in a CUDA graph, whether or not the model is streamed; calling the result does it again.

    Of a streamed model the graph copies every chunk into a slot itself, so that it may be replayed at any time; what it
    had fetched ahead is fetched anew.

    Args:
        model: on a GPU. It has run before, twice if it is streamed: kernels are compiled, and the order is known.
        run: computes with the model from tensors that stay where they are into such tensors.

    Raises:
        RuntimeError: the model is streamed from disk, which takes a thread; or what torch raises of what it cannot
            capture.
    """
    streamer: Streamer | None = getattr(model, "streamer", None)
    graph = torch.cuda.CUDAGraph()
    if streamer is None or not streamer.slots:
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    if streamer.reader is not None:
        raise RuntimeError("a model streamed from disk cannot be captured in a CUDA graph: give offload='host'")
    streamer.wait()
    torch.cuda.synchronize(streamer.device)
    try:
        with torch.cuda.graph(graph), streamer.recording():
            run()
    finally:
        streamer.forget()

    def replay() -> None:
        if not streamer.slots:
            raise RuntimeError("the model is streamed no more: record it again")
        streamer.wait()
        graph.replay()
        streamer.forget()

    return replay


def put(layer: nn.Module, weights: Weights) -> None:
    """Let a layer compute from tensors that are elsewhere."""
    tensors: Any = layer._buffers
    if isinstance(layer, CompressedLinear):
        layer._coded, layer._decoded = weights.coded, None
    else:
        tensors = layer._parameters
    # setattr takes longer
    tensors.update(weights.tensors)


def like(parameter: Any, tensor: Tensor) -> nn.Parameter:
    """A parameter that wants gradients if another does: torch multiplies by one in another way, with no_grad too."""
    return nn.Parameter(tensor, parameter.requires_grad)


def bring(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor to the device: one of inference mode stays one, as the parameter that gets it for its data is."""
    with torch.inference_mode(tensor.is_inference()):
        return tensor.to(device)


def settle(slot: Staging) -> None:
    """Wait until the reader is done with a slot, and raise what it raised."""
    if slot.pending is not None:
        slot.pending.result()
        slot.pending = None


def host_memory(size: int, pinned: bool) -> Tensor:
    """Host memory, uint8 [size], in pages of its own.

    Raises:
        BudgetError: it cannot be pinned.
    """
    memory = torch.empty(size + 2 * PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE
    memory = memory[begin : begin + size]
    if pinned:
        # what torch itself pins is a power of two long
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
        if status:
            told = f"{size / GB:.2g} GB of host memory cannot be pinned (CUDA error {status})"
            raise BudgetError(f"{told}: give offload='disk', or make room")
        weakref.finalize(memory, unpin, memory.data_ptr()).atexit = False
    return memory


class DeviceView:
    """Pinned host memory as the device addresses it: only so torch captures copies of what others have pinned."""

    def __init__(self, memory: Tensor):
        """Args: memory: uint8 [bytes] of `host_memory`."""
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape), "typestr": "|u1", "data": (memory.data_ptr(), False), "version": 3,
        }  # fmt: skip

    def tensor(self, device: torch.device) -> Tensor:
        """The same bytes; it keeps the memory."""
        return torch.as_tensor(self, device=device)


def unpin(address: int) -> None:
    """Give pinned pages back, once no copy reads them."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
