"""Weights inside the range of profile fast: few move, and once."""

import numpy as np
import pytest
import torch
from rans_kernels.coder import weight_histogram
from rans_kernels.coder.plan import choose_split
from rans_kernels.format import Split
from torch import nn

from qat.config import Granularity, QuantConfig, ScaleRule
from qat.quant import prepare
from qat.quant.fit import fit_integers, fit_weight, fitted_split


def gaussian(spread: float, size: int = 100_000) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(size).mul(spread).round().clamp(-127, 127).to(torch.int8)


def histogram(q: torch.Tensor) -> np.ndarray:
    return weight_histogram(q.numpy())


def test_outliers_do_not_widen_the_range_that_most_weights_have():
    q = gaussian(2.2)
    q[:3] = torch.tensor([100, -100, 90], dtype=torch.int8)
    assert choose_split(histogram(q), "fast") == Split(1, 7)
    assert fitted_split(histogram(q)) == Split(1, 3)
    fitted = fit_integers(q)
    assert (fitted != q).double().mean() < 0.002
    assert fitted[:3].tolist() == [7, -8, 7]


def test_a_range_that_many_weights_need_stays():
    q = gaussian(2.2)
    q[::10] = 40
    assert torch.equal(fit_integers(q), q)


@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0, 2.5, 3.1, 7.0, 25.0, 200.0])
def test_what_fits_is_not_moved_again(spread: float):
    once = fit_integers(gaussian(spread))
    assert torch.equal(fit_integers(once), once)
    assert choose_split(histogram(once), "fast").raw_bits <= fitted_split(histogram(once)).raw_bits


@pytest.mark.parametrize("granularity", Granularity)
def test_weights_go_where_their_integers_go(granularity: Granularity):
    torch.manual_seed(0)
    stock = nn.Linear(101, 63, bias=False)
    nn.init.normal_(stock.weight)
    config = QuantConfig(granularity=granularity, group_size=32, scale=ScaleRule.learned, init=ScaleRule.std, k=0.4)
    layer = prepare(stock, config)
    q, weight = layer.integers(), layer.weight.detach().clone()
    low = fitted_split(histogram(q)).low
    fit_weight(layer)
    assert torch.equal(layer.integers(), fit_integers(q))
    inside = (q >= low) & (q < -low)
    assert not inside.all()
    # but for the half step at either end
    assert torch.equal(layer.weight[inside & (q.abs() < -low - 1)], weight[inside & (q.abs() < -low - 1)])
