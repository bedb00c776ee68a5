"""The range of a code that knows little but a range: profile `fast` codes one bit of a weight and stores the rest raw.

A weight of a layer costs R raw bits and, coded, whether it lies in the inner half of the range [-2^R, 2^R - 1] (docs/
format.md). A few outliers widen the range, and every weight pays a bit for them. To put them at the end of a narrower
range is an error too; what it is worth follows from rounding, whose error d^2 / 12 falls by 2 ln2 of itself a bit.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from rans_kernels.coder.plan import split_bits
from rans_kernels.dense import expand_scale
from rans_kernels.format import Split
from torch import Tensor

from qat.quant.modules import QATModule
from qat.quant.scales import grid, weight_scale
from qat.quant.shards import held

BIT = 2 * math.log(2) / 12
"""Error, in squared steps, that a weight's next bit takes off."""
INTEGERS = np.arange(-128, 128)
RANGES = [Split(1, raw_bits) for raw_bits in range(1, 8)]


def integer_counts(q: Tensor) -> Tensor:
    """How often every integer from -128 to 127 occurs in q, int8 of any shape: int64 [256] on its device."""
    return stacked_counts(q.reshape(1, -1, q.shape[-1] if q.ndim > 1 else 1))[0]


def stacked_counts(q: Tensor) -> Tensor:
    """`integer_counts` of each of several matrices, int8 [T, N, K]: int64 [T, 256]."""
    # not bincount, which makes the host wait for the GPU. A count a column: few integers occur often, and a GPU adds to
    # one place at a time
    places = q.long() + 128
    one = torch.ones((), dtype=torch.int32, device=q.device)
    counts = torch.zeros(len(q), 256, q.shape[2], dtype=torch.int32, device=q.device)
    return counts.scatter_add_(1, places, one.expand_as(places)).sum(2)


def fitted_split(counts: NDArray[np.int64]) -> Split:
    """Of the splits of profile `fast`, the one with least bits and error of what is put at the end of its range.

    Moved weights give the same split again.

    Args:
        counts: histogram of the weights from -128 to 127, [256].
    """
    split, before = _cheapest(counts), None
    while split != before:
        split, before = _cheapest(_moved(counts, split)), split
    return split


def fit_integers(q: Tensor) -> Tensor:
    """The integers, int8 of any shape, put inside the range of their `fitted_split`."""
    low = fitted_split(integer_counts(q).cpu().numpy()).low
    return q.clamp(low, -low - 1)


@torch.no_grad()
def fit_weight(module: QATModule) -> None:
    """Put a layer's weights where `fit_integers` puts its integers, in place."""
    low = fitted_split(integer_counts(module.integers()).cpu().numpy()).low
    weight = held(module.weight)
    log2_scale = None if module.log2_scale is None else held(module.log2_scale)
    scale = weight_scale(weight, module.quant_config, log2_scale)
    step = expand_scale(scale, weight.shape[1], grid(module.quant_config)[1])
    weight.copy_(weight.clamp(low * step, (-low - 1) * step))


def _cheapest(counts: NDArray[np.int64]) -> Split:
    return min(RANGES, key=lambda split: split_bits(_moved(counts, split), split) + _error(counts, split) / BIT)


def _error(counts: NDArray[np.int64], split: Split) -> float:
    """Mean squared way to the range, in steps."""
    return float((counts * (INTEGERS - _inside(split)) ** 2).sum()) / max(1, counts.sum())


def _moved(counts: NDArray[np.int64], split: Split) -> NDArray[np.int64]:
    """The histogram once all are in the range."""
    return np.bincount(_inside(split) + 128, weights=counts, minlength=256).astype(np.int64)


def _inside(split: Split) -> NDArray[np.int64]:
    return INTEGERS.clip(split.low, -split.low - 1)
