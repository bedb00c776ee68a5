"""Round a whole model after training, and search a method's knob for the bits that its container shall have."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from rans_kernels.coder import encode_tiles, entropy, weight_histogram
from rans_kernels.coder.plan import can_fold, choose_layout
from rans_kernels.dense import dequantize
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.ptq.calibration import walk
from qat.ptq.methods import Method, Rounded
from qat.quant import exact_modules

TOLERANCE = 0.02
"""Bits a weight by which a search may miss its target."""
TRIES = 30


@dataclass(frozen=True)
class Cost:
    """What the rounded layers take.

    Attributes:
        bits: stored bits a weight, everything in the container and the scales counted.
        entropy: empirical, bits a weight, mean over weights of that of each layer.
    """

    bits: float
    entropy: float


class Trained:
    """A model whose linear layers, but for the head, are rounded in place, again and again from the same weights."""

    def __init__(self, model: PreTrainedModel, batches: list[Tensor], profile: str = "compact"):
        """Take a model over.

        Args:
            model: in eval mode.
            batches: token ids to calibrate on, int64 [B, T] each; may be empty where no method needs them.
            profile: of the container.
        """
        self.model, self.batches, self.profile = model, batches, profile
        head = model.get_output_embeddings()
        self.layers: dict[str, nn.Linear] = {
            name: module
            for name, module in exact_modules(model, ends_only=False).items()
            if isinstance(module, nn.Linear) and module is not head
        }
        self.known: dict[Method, dict[float, float]] = {}
        self.masters = {name: module.weight.detach().clone() for name, module in self.layers.items()}

    def restore(self) -> None:
        """Put the trained weights back."""
        for name, module in self.layers.items():
            module.weight.data.copy_(self.masters[name])

    def round(self, method: Method, knob: float = 1.0) -> dict[str, Rounded]:
        """Round every layer; the model then computes with what the integers stand for.

        Raises:
            UserError: weights or activations that are not finite, or no text for a method that needs it.
        """
        self.restore()
        if method.calibrated and not self.batches:
            raise UserError("this method rounds by what enters a layer: give it calibration text")
        hessians = walk(self.model, self.layers, self.batches) if method.calibrated else [dict.fromkeys(self.layers)]
        rounded: dict[str, Rounded] = {}
        for block in hessians:
            for name, hessian in block.items():
                layer = method.round(self.masters[name], knob, hessian)
                weight, bias = self.layers[name].weight, self.layers[name].bias
                rounded[name] = replace(layer, bias=bias is not None)
                weight.data.copy_(dequantize(layer.q, layer.scale, weight.dtype, layer.group_size))
        return rounded

    def cost(self, rounded: dict[str, Rounded]) -> Cost:
        """What these layers take."""
        return stored_cost(rounded.values(), self.profile)

    def at_bits(self, method: Method, target: float) -> tuple[float, Cost]:
        """Round to so many stored bits a weight, within `TOLERANCE`.

        Returns:
            The knob that does it, and the cost; the model is left rounded so.

        Raises:
            UserError: the method has no knob, or none of its range gives these bits.
        """
        if method.knob is None:
            raise UserError("this method has no knob, and takes the bits it takes")
        found: list[Cost] = []

        def bits(knob: float) -> float:
            found.append(self.cost(self.round(method, knob)))
            return found[-1].bits

        knob = find_knob(bits, target, method.knob, self.known.setdefault(method, {}))
        return knob, found[-1]


def stored_cost(layers: Iterable[Rounded], profile: str = "compact") -> Cost:
    """Code every layer as export does and weigh it."""
    stored, information, weights = 0, 0.0, 0
    for layer in layers:
        q = layer.q.cpu().numpy()
        counts = weight_histogram(q)
        foldable = can_fold(layer.scale.numel(), layer.bias)
        layout = choose_layout(counts, (q.shape[0], q.shape[1]), profile, foldable)
        stored += encode_tiles(np.ascontiguousarray(q), layout).nbytes + layer.scale.nbytes
        information += entropy(counts) * q.size
        weights += q.size
    return Cost(8 * stored / weights, information / weights)


def find_knob(
    bits: Callable[[float], float], target: float, span: tuple[float, float], known: dict[float, float] | None = None
) -> float:
    """Where a function that falls with the knob meets a target within `TOLERANCE`; it was asked for this knob last.

    Bisection in octaves, but cut where a straight line through both ends meets the target, at least a tenth from
    either: bits fall nearly straight, about one for each octave of the step.

    Args:
        bits: of a knob.
        target: to be met.
        span: lowest and highest knob.
        known: bits by knob from searches for other targets, to start from; what is found out is added.

    Raises:
        UserError: the target is outside what the span gives, or the function jumps over it.
    """
    known = {} if known is None else known
    for knob in span:
        if knob not in known:
            known[knob] = bits(knob)
    if not known[span[1]] <= target <= known[span[0]]:
        raise UserError(f"{target:g} bits a weight cannot be met: {known[span[1]]:.3f} to {known[span[0]]:.3f} can")
    high = min(knob for knob, value in known.items() if value <= target and knob > span[0])
    low = max(knob for knob, value in known.items() if value >= target and knob < high)
    for _ in range(TRIES):
        share = (known[low] - target) / max(known[low] - known[high], TOLERANCE)
        middle = low * (high / low) ** min(max(share, 0.1), 0.9)
        known[middle] = bits(middle)
        if abs(known[middle] - target) <= TOLERANCE:
            return middle
        low, high = (middle, high) if known[middle] > target else (low, middle)
    raise UserError(
        f"{target:g} bits a weight cannot be met within {TOLERANCE}: the nearest are {known[high]:.3f} and "
        f"{known[low]:.3f}"
    )
