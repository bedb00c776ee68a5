"""Figures about the integers of a weight."""

import math

import pytest
import torch
from torch import Tensor, nn

from qat.config import Granularity, Profile, QuantConfig, RateConfig, RatePrice, ScaleRule
from qat.errors import UserError
from qat.quant import clipped_fraction, entropy, prepare, quantized_modules, weight_statistics
from qat.quant.rate import (
    RateTerm,
    integer_shares,
    logistic_spread,
    prior_bits,
    pull_rate,
    rate_loss,
    rate_terms,
    share_entropy,
    table_bits,
    table_prices,
)


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
    # -3 to 3: of 101 weights a row one is 3, one -2, the others 0
    assert figures["counts"] == [0, 21, 0, 21 * 99, 0, 0, 21]


def gaussian_layer(step: float, rows: int = 64, columns: int = 1024) -> nn.Linear:
    """Fake-quantised, with learned steps of so many standard deviations."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight)
    return prepare(layer, QuantConfig(scale=ScaleRule.learned, init=ScaleRule.std, k=step))


def test_table_price_of_integers_is_the_entropy_of_their_histogram():
    torch.manual_seed(0)
    # no integer so rare that a single slot of the codec's table is too much for it
    q = torch.randn(64, 1000).mul(3).round().clamp(-9, 9)
    # on the grid there is nothing to interpolate; at both ends of the range too
    q[0, :50], q[1, :70] = 127, -127
    shares = integer_shares(q.to(torch.int8))
    bits = table_bits(q.double(), torch.ones(1, 1), table_prices(shares), 127)
    assert float(bits) / q.numel() == pytest.approx(float(share_entropy(shares)), rel=1e-6)


@pytest.mark.parametrize("price", [RatePrice.table, RatePrice.prior])
@pytest.mark.parametrize("group_size", [None, 32])
def test_gradients_are_the_slopes_of_the_price(price: RatePrice, group_size: int | None):
    torch.manual_seed(0)
    columns = 70
    weight = torch.randn(4, columns, dtype=torch.float64).mul(3)
    # away from integers, where the interpolation has a corner
    weight = (weight.floor() + 0.1 + 0.8 * torch.rand_like(weight)).requires_grad_()
    scale = torch.full((4, 1 if group_size is None else 3), 1.0, dtype=torch.float64, requires_grad=True)
    shares = integer_shares(weight.detach().round().to(torch.int8))
    noise = torch.rand(4, columns, dtype=torch.float64) - 0.5

    def bits(weight: Tensor, scale: Tensor) -> Tensor:
        if price is RatePrice.table:
            return table_bits(weight, scale, table_prices(shares), 127, group_size)
        return prior_bits(weight, scale, logistic_spread(shares), 127, group_size, noise)

    assert torch.autograd.gradcheck(bits, (weight, scale), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("price", [RatePrice.table, RatePrice.prior])
def test_the_price_draws_weights_to_cheaper_integers_and_steps_up(price: RatePrice):
    layer = gaussian_layer(0.5)
    term = RateTerm({"layer": layer}, RateConfig(price=price))
    before = term.refresh().entropy
    term.bits().backward()
    assert layer.weight_log2_scale is not None
    # an octave is a bit: each of 64 rows has its share
    assert layer.weight_log2_scale.grad.sum() == pytest.approx(-1, abs=0.1)
    assert (layer.weight_log2_scale.grad < 0).all()
    with torch.no_grad():
        layer.weight -= 0.05 * layer.weight.grad.sign()
    assert term.refresh().entropy < before - 0.02


@pytest.mark.parametrize("price", [RatePrice.table, RatePrice.prior])
def test_beyond_the_clip_there_is_no_pull(price: RatePrice):
    layer = gaussian_layer(0.5)
    with torch.no_grad():
        layer.weight[:, 0] = 1e3
    term = RateTerm({"layer": layer}, RateConfig(price=price))
    term.refresh()
    term.bits().backward()
    assert not layer.weight.grad[:, 0].any()
    assert (layer.weight.grad != 0).double().mean() > 0.9


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [ScaleRule.learned, ScaleRule.std])
@pytest.mark.parametrize("granularity", Granularity)
def test_a_backward_can_add_the_gradient_of_the_price(granularity: Granularity, scale: ScaleRule, compiled: bool):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = QuantConfig(bits=4, scale=scale, init=ScaleRule.std, k=0.3, granularity=granularity, group_size=32)
    layer = prepare(nn.Linear(70, 12), config)
    term = RateTerm({"layer": layer}, RateConfig(price=RatePrice.table))
    term.refresh()
    x = torch.randn(5, 70)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer

    def gradients() -> list[Tensor]:
        found = [parameter.grad for parameter in layer.parameters()]
        layer.zero_grad()
        return found

    run(x).square().sum().backward()
    (300 * term.bits()).backward()
    expected = gradients()
    # by two micro-batches; a price that was is forgotten
    for weight in (40.0, 150.0):
        term.pull(weight)
    for part in (x[:2], x[2:]):
        run(part).square().sum().backward()
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)
    term.pull(0.0)
    run(x).square().sum().backward()
    plain = gradients()
    assert (plain[0] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("step", [0.129, 0.259, 0.522])
def test_both_prices_of_a_gaussian_are_its_entropy_within_a_twentieth(step: float):
    layer = gaussian_layer(step, rows=256)
    for price in (RatePrice.table, RatePrice.prior):
        term = RateTerm({"layer": layer}, RateConfig(price=price))
        bits = term.refresh().entropy
        assert term.bits().item() == pytest.approx(bits, rel=0.05)


def test_tensors_weigh_as_many_as_they_have_weights_and_shared_ones_once():
    large, small = gaussian_layer(0.25, rows=96), gaussian_layer(0.5, rows=32)
    term = RateTerm({"a": large, "b": small, "again": small}, RateConfig(price=RatePrice.table))
    alone = [weight_statistics(layer)["entropy"] for layer in (large, small)]
    assert term.refresh().entropy == pytest.approx((3 * alone[0] + alone[1]) / 4)


def test_histograms_remember_their_past():
    layer = gaussian_layer(0.5)
    term = RateTerm({"layer": layer}, RateConfig(price=RatePrice.table, ema=0.75))
    term.refresh()
    first = term.shares["layer"]
    with torch.no_grad():
        layer.weight.zero_()
    assert term.refresh().entropy == 0
    assert torch.allclose(term.shares["layer"], 0.75 * first + 0.25 * (torch.arange(256) == 128))


def test_histograms_of_large_tensors_are_of_rows_from_all_over(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer = nn.Linear(64, 640, bias=False)
    # rows that differ, from the first to the last
    layer.weight.data = torch.randn(640, 64) * torch.linspace(0.5, 2, 640)[:, None]
    model = prepare(nn.Sequential(layer), QuantConfig(scale=ScaleRule.learned, granularity=Granularity.per_tensor))
    term = RateTerm({"layer": model[0]}, RateConfig(price=RatePrice.table))
    exact = term.refresh().entropy
    assert exact == pytest.approx(term.content().entropy)
    monkeypatch.setattr("qat.quant.rate.SAMPLE", 10_000)
    assert exact != term.refresh().entropy == pytest.approx(exact, abs=0.05)
    # but where one weight can widen the range of all, that one is seen
    term.config.profile = Profile.fast
    # integers up to 8
    term.shift(4)
    for row in (1, 2, 3):
        before = term.refresh().coded
        layer.weight.data[row, 0] = 2.3 * layer.weight.data.abs().max()
        assert term.refresh().coded > before + 0.5


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("stack", [1, 5000, 1 << 24])
def test_histograms_are_each_tensors_own_however_many_are_taken_together(
    monkeypatch: pytest.MonkeyPatch, granularity: Granularity, stack: int
):
    torch.manual_seed(0)
    monkeypatch.setattr("qat.quant.rate.STACK", stack)
    # alike but for the spread, and some of other shapes between them
    layers = [nn.Linear(k, n, bias=False) for n, k in [(63, 40), (1, 40), (63, 40), (40, 63), (63, 40)]]
    for spread, layer in enumerate(layers, 1):
        nn.init.normal_(layer.weight, std=spread)
    config = QuantConfig(scale=ScaleRule.learned, init=ScaleRule.std, k=0.5, granularity=granularity, group_size=32)
    model = prepare(nn.Sequential(*layers), config)
    for spread, layer in enumerate(model, 1):
        # other steps in standard deviations, so that every histogram differs
        layer.weight_log2_scale.data += spread / 4
    term = RateTerm(quantized_modules(model), RateConfig(price=RatePrice.table))
    term.refresh()
    assert list(term.shares) == list(term.modules)
    for name, layer in term.modules.items():
        assert torch.equal(term.shares[name], integer_shares(layer.integers()))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_a_group_where_they_have_a_target(tiny, tied: bool):
    model = prepare(tiny(tied), QuantConfig(embeddings=True, lm_head=True))
    together, apart = (rate_terms(model, RateConfig(target_bits=3.0, embedding_bits=bits)) for bits in (None, 4.0))
    assert {group: set(term.modules) for group, term in apart.items()} == {
        "rate": {"up", "down"},
        "rate/embedding": {"embed"} if tied else {"embed", "lm_head"},
    }
    assert [term.config.target_bits for term in apart.values()] == [3, 4]
    assert sum(term.weights for term in apart.values()) == together["rate"].weights


@pytest.mark.parametrize("options", [{"embeddings": True, "include": []}, {}])
def test_a_group_without_weights_is_refused(tiny, options):
    model = prepare(tiny(), QuantConfig(**options))
    with pytest.raises(UserError, match=r"rate\.embedding_bits"):
        rate_terms(model, RateConfig(target_bits=3.0, embedding_bits=4.0))


def test_a_bit_costs_what_it_would_in_one_group_times_the_weight_of_its_own(tiny):
    config = QuantConfig(embeddings=True, scale=ScaleRule.learned, init=ScaleRule.std)
    gradients = []
    for bits, weights in [
        (None, {"rate": 1.0}),
        (4.0, {"rate": 1.0, "rate/embedding": 1.0}),
        (4.0, {"rate": 0.5, "rate/embedding": 3.0}),
    ]:
        model = prepare(tiny(), config)
        terms = rate_terms(model, RateConfig(price=RatePrice.table, target_bits=3.0, embedding_bits=bits))
        for term in terms.values():
            term.refresh()
        rate_loss(terms, weights).backward()
        gradients.append((model.embed.weight.grad, model.up.weight.grad))
    together, apart, weighted = gradients
    for factor, one, same, own in zip((3.0, 0.5), together, apart, weighted, strict=True):
        torch.testing.assert_close(same, one)
        torch.testing.assert_close(own, factor * one)


@pytest.mark.parametrize("tied", [True, False])
def test_groups_pull_in_the_gradient_of_the_loss(tiny, tied: bool):
    config = QuantConfig(embeddings=True, lm_head=True, scale=ScaleRule.learned, init=ScaleRule.std)
    model = prepare(tiny(tied), config)
    terms = rate_terms(model, RateConfig(price=RatePrice.table, target_bits=3.0, embedding_bits=4.0))
    for term in terms.values():
        term.refresh()
    weights = {"rate": 30.0, "rate/embedding": 200.0}
    ids = torch.arange(8).reshape(4, 2)

    def gradients(*batches: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            model(batch).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients(ids)
    rate_loss(terms, weights).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    # by two micro-batches
    pull_rate(terms, weights, 1 / 2)
    torch.testing.assert_close(gradients(ids[:2], ids[2:]), expected, rtol=1e-4, atol=1e-4)
    for name in ("embed.weight", "up.weight", "embed.weight_log2_scale", "up.weight_log2_scale"):
        assert (expected[name] - plain[name]).abs().max() > 0.01, name
    # a group without a weight adds nothing
    pull_rate(terms, {"rate": 30.0})
    found = gradients(ids)
    torch.testing.assert_close(found["embed.weight"], plain["embed.weight"])
    torch.testing.assert_close(found["up.weight"], expected["up.weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("price", [RatePrice.table, RatePrice.prior])
def test_the_price_compiles_in_one_graph(price: RatePrice):
    torch._dynamo.reset()
    layer = gaussian_layer(0.5, rows=16, columns=96)
    shares = integer_shares(layer.integers())
    arguments = layer.weight, layer.weight_log2_scale.exp2()
    if price is RatePrice.table:
        arguments, bits = (*arguments, table_prices(shares), 127), table_bits
    else:
        arguments, bits = (*arguments, logistic_spread(shares), 127, None, torch.rand(16, 96) - 0.5), prior_bits
    results = []
    for function in (bits, torch.compile(bits, fullgraph=True, backend="aot_eager")):
        value = function(*arguments)
        results.append((value, *torch.autograd.grad(value, [layer.weight, layer.weight_log2_scale], retain_graph=True)))
    torch.testing.assert_close(*results)
