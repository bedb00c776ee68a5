"""The container's share of the stored bits, against whole tensors coded as export does."""

import pytest
import torch
from rans_kernels.coder import encode_tiles, weight_histogram
from rans_kernels.coder.plan import choose_layout
from torch import nn

from qat.config import Granularity, Profile, QuantConfig, RateConfig, ScaleRule
from qat.quant import prepare, weight_scale, weight_statistics
from qat.quant.container import container_overhead, overhead_bits
from qat.quant.modules import QATModule
from qat.quant.rate import RateTerm


def make_layer(
    rows: int, columns: int, scale: ScaleRule = ScaleRule.std, one: bool = False, bias: bool = False
) -> QATModule:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=bias)
    nn.init.normal_(layer.weight)
    granularity = Granularity.per_tensor if one else Granularity.per_channel
    return prepare(layer, QuantConfig(scale=scale, init=ScaleRule.std, k=0.5, granularity=granularity))


def stored_bits(layer: QATModule, profile: str) -> float:
    """As `qat.export` reports them."""
    q = layer.integers().numpy()
    scale = weight_scale(layer.weight, layer.quant_config, layer.log2_scale)
    foldable = scale.numel() == 1 and layer.bias is None
    encoded = encode_tiles(q, choose_layout(weight_histogram(q), q.shape, profile, foldable))
    return 8 * (encoded.nbytes + 4 * scale.numel()) / q.size


@pytest.mark.parametrize("profile", ["compact", "fast", "auto"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 300), (64, 1100)])
def test_of_a_tensor_that_is_coded_whole_it_is_exact(profile: str, rows: int, columns: int) -> None:
    layer = make_layer(rows, columns, ScaleRule.absmax if rows == 1 else ScaleRule.std)
    bits = weight_statistics(layer)["entropy"] + container_overhead({"layer": layer}, profile, panels=99)
    assert bits == pytest.approx(stored_bits(layer, profile), rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_of_a_folded_tensor_too(bias: bool) -> None:
    layer = make_layer(256, 384, one=True, bias=bias)
    entropy, stored = weight_statistics(layer)["entropy"], stored_bits(layer, "compact")
    whole = entropy + container_overhead({"layer": layer}, "compact", panels=99)
    assert whole == pytest.approx(stored, rel=1e-6)
    # 2 panels of 8 rows folded
    sampled = entropy + container_overhead({"layer": layer}, "compact", panels=1)
    assert sampled == pytest.approx(stored, abs=0.02)
    assert (stored < entropy + 0.1) == (not bias)


@pytest.mark.parametrize("profile", Profile)
def test_what_is_added_to_an_ideal_code_stays_while_steps_move(profile: Profile) -> None:
    layers = {"a": make_layer(256, 384, ScaleRule.learned), "b": make_layer(304, 1024, ScaleRule.learned)}
    term = RateTerm(layers, RateConfig(profile=profile))
    over = []
    for octaves in (0.0, 0.7, 0.8):
        term.shift(octaves)
        content = term.content()
        over.append(content.entropy + container_overhead(layers, profile.value, panels=99) - content.coded)
    assert max(over) - min(over) < 0.03


@pytest.mark.parametrize("profile", ["compact", "fast", "auto"])
def test_a_sample_tells_the_stored_bits_to_a_hundredth(profile: str) -> None:
    layers = {"a": make_layer(512, 384), "b": make_layer(304, 1024)}
    sizes = [layer.weight.numel() for layer in layers.values()]
    exact = sum(stored_bits(layer, profile) * n for layer, n in zip(layers.values(), sizes, strict=True)) / sum(sizes)
    entropies = [weight_statistics(layer)["entropy"] for layer in layers.values()]
    entropy = sum(bits * n for bits, n in zip(entropies, sizes, strict=True)) / sum(sizes)
    assert entropy + container_overhead(layers, profile, panels=4) == pytest.approx(exact, abs=0.01)
    for name, bits in overhead_bits(layers, profile, panels=4).items():
        alone = weight_statistics(layers[name])["entropy"] + bits / layers[name].weight.numel()
        assert alone == pytest.approx(stored_bits(layers[name], profile), abs=0.015)
