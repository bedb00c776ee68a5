"""Ways to round a trained weight, behind one interface: `METHODS`.

A method rounds one layer. Those with a knob have a family of grids, finer to coarser as it rises, so that a search
over it meets any number of bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.config import Granularity, QuantConfig, ScaleRule
from qat.ptq.layerwise import gptq
from qat.quant import grid, quantize, quantize_weight, weight_scale


@dataclass(frozen=True)
class Rounded:
    """A weight as integers.

    Attributes:
        q: int8 [N, K].
        scale: float32 [1, 1], [N, 1] or [N, G].
        group_size: columns that share a scale, or None.
        bias: whether the layer has one.
    """

    q: Tensor
    scale: Tensor
    group_size: int | None = None
    bias: bool = False


@dataclass(frozen=True)
class Method:
    """A way to round one layer.

    Attributes:
        round: (weight float [N, K], knob, Hessian [K, K]) to integers; what a method does not use it ignores.
        knob: the range in which its knob makes sense, to be searched in octaves; None for a method without one.
        calibrated: whether it needs the Hessian.
    """

    round: Callable[[Tensor, float, Tensor | None], Rounded]
    knob: tuple[float, float] | None = None
    calibrated: bool = False


STEPS = QuantConfig(scale=ScaleRule.std)
"""One step a row, k standard deviations, and integers of 8 bits, which at 2 to 4 bits of entropy clip nothing."""
LAYER_STEPS = replace(STEPS, granularity=Granularity.per_tensor)
"""One step a layer: rows that are small then take fewer bits."""
STEP_RANGE = (2.0**-4, 4.0)
"""Of k: about 6 bits to half a bit of entropy for Gaussian rows."""
PRICE_RANGE = (0.25, 1024.0)
"""Of EntQuant's lambda; its authors use 3.9 for 4 bits and 58 to 64 for 2."""


def nearest(config: QuantConfig) -> Callable[[Tensor, float, Tensor | None], Rounded]:
    """Round to nearest as export does; the knob is `config.k`, which only the std rule reads."""

    def round_layer(weight: Tensor, knob: float, _: Tensor | None) -> Rounded:
        return Rounded(*quantize_weight(weight, replace(config, k=knob)), grid(config)[1])

    return round_layer


def compensated(config: QuantConfig) -> Callable[[Tensor, float, Tensor | None], Rounded]:
    """GPTQ on the grid of `nearest(config)`: steps from the weight as trained, not in groups."""

    def round_layer(weight: Tensor, knob: float, hessian: Tensor | None) -> Rounded:
        assert hessian is not None
        scale = weight_scale(weight, replace(config, k=knob))
        return Rounded(gptq(weight, hessian, scale, grid(config)[0]), scale)

    return round_layer


@torch.no_grad()
def priced(weight: Tensor, knob: float, _: Tensor | None = None) -> Rounded:
    """Steps that minimise EntQuant's loss |W' - W|_1 / |W|_1 + knob * mean(|q| / 128) (arXiv 2601.22787, int8).

    Its authors descend by L-BFGS through a straight-through estimator. The loss is a sum over rows, so here every row
    searches its own step: each half octave first, then halves of that around the best, down to a sixteenth.
    """
    w = weight.float()
    qmax = grid(STEPS)[0]
    # as shares of the whole layer, not of the row
    distortion, rate = 1 / w.abs().sum().clamp_min(torch.finfo(torch.float32).tiny), knob / (128 * w.numel())

    def loss(scale: Tensor) -> Tensor:
        q = (w / scale).round_().clamp_(-qmax, qmax)
        price = rate * q.abs().sum(1, keepdim=True)
        return price + distortion * q.mul_(scale).sub_(w).abs_().sum(1, keepdim=True)

    unit = weight_scale(weight, replace(STEPS, k=1.0))
    best = unit * 2.0**-5
    lowest = loss(best)
    offsets = [torch.full_like(unit, 2.0 ** (i / 2 - 5)) for i in range(1, 17)]
    for scale in (unit * offset for offset in offsets):
        best, lowest = _better(best, lowest, scale, loss(scale))
    for octaves in (1 / 4, 1 / 8, 1 / 16):
        centre = best
        for scale in (centre * 2**-octaves, centre * 2**octaves):
            best, lowest = _better(best, lowest, scale, loss(scale))
    return Rounded(quantize(weight, best, qmax), best)


def _better(best: Tensor, lowest: Tensor, scale: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    # of equal losses the first, which is the finer step
    wins = loss < lowest
    return torch.where(wins, scale, best), torch.where(wins, loss, lowest)


METHODS: dict[str, Method] = {
    "int8": Method(nearest(QuantConfig())),
    "int4": Method(nearest(QuantConfig(bits=4))),
    "int4-g128": Method(nearest(QuantConfig(bits=4, granularity=Granularity.per_group, group_size=128))),
    "rtn": Method(nearest(STEPS), STEP_RANGE),
    "gptq": Method(compensated(STEPS), STEP_RANGE, calibrated=True),
    "rtn-layer": Method(nearest(LAYER_STEPS), STEP_RANGE),
    "gptq-layer": Method(compensated(LAYER_STEPS), STEP_RANGE, calibrated=True),
    "entquant": Method(priced, PRICE_RANGE),
}
"""INT8 and INT4 a row, INT4 a group; steps of k standard deviations of a row, or of a layer, rounded to nearest or by
GPTQ; steps by EntQuant's price."""
