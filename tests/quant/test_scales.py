"""Scale rules: their formulas, granularities, and rows that have no spread or no finite values."""

import pytest
import torch

from qat.config import Granularity, QuantConfig, ScaleRule
from qat.quant import fake_quantize, grid, quantize, quantize_weight, weight_scale

RULES = list(ScaleRule)
GRANULARITIES = list(Granularity)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (63, 257)])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_rules_follow_their_formulas_in_every_granularity(shape, bits):
    weight = torch.randn(shape) + 0.3
    qmax = 2 ** (bits - 1) - 1
    for granularity in GRANULARITIES:
        parts = {
            Granularity.per_tensor: [weight.reshape(1, -1)],
            Granularity.per_channel: [weight],
            Granularity.per_group: weight.split(32, dim=1),
        }[granularity]
        absmax = torch.stack([part.abs().amax(1) for part in parts], 1) / qmax
        got = weight_scale(weight, QuantConfig(bits=bits, granularity=granularity, group_size=32))
        torch.testing.assert_close(got, absmax, rtol=1e-6, atol=0)
        std = 0.7 * torch.stack([part.double().std(1, correction=0) for part in parts], 1).float()
        config = QuantConfig(bits=bits, granularity=granularity, group_size=32, scale=ScaleRule.std, k=0.7)
        has_spread = std > 0
        torch.testing.assert_close(weight_scale(weight, config)[has_spread], std[has_spread], rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("columns", [1, 63, 128])
def test_one_group_equals_per_channel(rule, columns):
    weight = torch.randn(17, columns)
    group = QuantConfig(scale=rule, granularity=Granularity.per_group, group_size=128)
    channel = QuantConfig(scale=rule)
    assert torch.equal(weight_scale(weight, group), weight_scale(weight, channel))
    assert torch.equal(quantize_weight(weight, group)[0], quantize_weight(weight, channel)[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_without_spread_keep_their_values_on_normal_scales(rule, granularity):
    for value in (0.0, 1.0, -0.3, 1e-30, 1e-45, 1e15):
        for shape in ((1, 1), (5, 1), (3, 257)):
            weight = torch.full(shape, value)
            config = QuantConfig(scale=rule, init=ScaleRule.std, granularity=granularity, group_size=32)
            scale = weight_scale(weight, config)
            assert (scale >= torch.finfo(torch.float32).tiny).all() and scale.isfinite().all()
            qmax, group_size = grid(config)
            weight.requires_grad_()
            out = fake_quantize(weight, scale, qmax, torch.float32, group_size)
            torch.testing.assert_close(out, weight, rtol=1e-5, atol=1e-36)
            out.sum().backward()
            assert (weight.grad == 1).all()


def test_no_weight_is_outside_the_range_of_absmax():
    weight = torch.randn(1000, 17).requires_grad_()
    for bits in range(2, 9):
        scale = weight_scale(weight, QuantConfig(bits=bits))
        weight.grad = None
        fake_quantize(weight, scale, 2 ** (bits - 1) - 1, torch.float32).sum().backward()
        assert (weight.grad == 1).all()


def test_dynamic_scales_carry_no_gradient_and_learned_ones_the_lsq_gradient_in_log2():
    weight = torch.randn(5, 63, requires_grad=True)
    assert not weight_scale(weight, QuantConfig(scale=ScaleRule.std)).requires_grad
    log2_scale = torch.full((5, 1), -3.0, requires_grad=True)
    scale = weight_scale(weight, QuantConfig(scale=ScaleRule.learned), log2_scale)
    assert torch.equal(scale, torch.full((5, 1), 0.125))
    fake_quantize(weight, scale, 7, torch.float32).sum().backward()
    steps = weight.detach() * 8
    lsq = torch.where(steps.abs() <= 7, steps.round() - steps, 7 * steps.sign()).sum(1, keepdim=True)
    torch.testing.assert_close(log2_scale.grad, lsq * 0.125 * torch.log(torch.tensor(2.0)))


def test_learned_scales_far_out_stay_normal_numbers():
    log2_scale = torch.tensor([[-300.0], [-127.0], [3.0]], requires_grad=True)
    scale = weight_scale(torch.ones(3, 5), QuantConfig(scale=ScaleRule.learned), log2_scale)
    assert torch.equal(scale.detach(), torch.tensor([[2.0**-126], [2.0**-126], [8.0]]))
    fake_quantize(torch.ones(3, 5), scale, 7, torch.float32).sum().backward()
    assert log2_scale.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [ScaleRule.absmax, ScaleRule.std])
def test_a_bad_weight_spoils_its_row_and_no_other(rule, bad):
    weight = torch.randn(3, 63)
    weight[1, 5] = bad
    scale = weight_scale(weight, QuantConfig(scale=rule))
    out = fake_quantize(weight, scale, 127, torch.float32)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_do_not_depend_on_the_number_of_threads(rule, granularity):
    weights = [torch.randn(300, columns) for columns in (127, 1024, 1027)] + [torch.rand(17, 4099)]
    config = QuantConfig(scale=rule, init=ScaleRule.std, granularity=granularity, group_size=96)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([weight_scale(weight, config) for weight in weights])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_half_precision_weights_are_quantised_in_float32():
    weight = torch.randn(5, 63).bfloat16()
    config = QuantConfig(scale=ScaleRule.std)
    scale = weight_scale(weight, config)
    assert scale.dtype is torch.float32
    assert torch.equal(quantize(weight, scale, 127), quantize(weight.float(), scale, 127))
    assert torch.equal(quantize_weight(weight, config)[1], scale)
