"""Figures about the integers of a weight."""

import math

import pytest
import torch
from torch import nn

from qat.config import QuantConfig, ScaleRule
from qat.quant import clipped_fraction, entropy, prepare, weight_statistics


def test_entropy_of_known_distributions():
    assert entropy(torch.zeros(3, 5, dtype=torch.int8)) == 0
    assert entropy(torch.arange(-128, 128).to(torch.int8).repeat(3)) == pytest.approx(8, abs=1e-12)
    assert entropy(torch.tensor([-127, -127, -127, 127], dtype=torch.int8)) == pytest.approx(2 - 0.75 * math.log2(3))


def test_entropy_of_a_gaussian_follows_the_step():
    """Quantised finely, it is that of the density less log2 of the step: 2.05 - log2(k) bits."""
    torch.manual_seed(0)
    for k in (0.1, 0.25):
        layer = prepare(nn.Linear(1025, 257, bias=False), QuantConfig(scale=ScaleRule.std, k=k))
        nn.init.normal_(layer.weight)
        wanted = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(k)
        assert weight_statistics(layer)["entropy"] == pytest.approx(wanted, abs=0.01)


def test_clipped_fraction_counts_both_ends():
    q = torch.tensor([[-7, 7, 6], [0, -6, 7]], dtype=torch.int8)
    assert clipped_fraction(q, 7) == 0.5


def test_statistics_of_a_layer():
    layer = prepare(nn.Linear(101, 21, bias=False), QuantConfig(bits=3))
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 22.0)[:, None] * torch.tensor([3.0, -2.0] + [0.0] * 99) / 3)
    figures = weight_statistics(layer)
    assert figures["clipped_fraction"] == pytest.approx(1 / 101)
    ranks = {"scale_p05": 2, "scale_p50": 11, "scale_p95": 20}
    assert {key: figures[key] for key in ranks} == pytest.approx({key: rank / 3 for key, rank in ranks.items()})
