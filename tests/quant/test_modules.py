"""QAT layers against the stock layers they replace and the INT8 layers they become."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from qat.config import Granularity, QuantConfig, ScaleRule
from qat.quant import (
    QATEmbedding,
    QATLinear,
    convert,
    freeze,
    prepare,
    quantized_modules,
    set_fake_quant,
    settle,
    stock_state_dict,
)

SETTINGS = list(itertools.product(ScaleRule, Granularity))


def config_of(rule, granularity, **more):
    return QuantConfig(bits=4, scale=rule, granularity=granularity, group_size=32, **more)


@pytest.mark.parametrize("rule, granularity", SETTINGS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_converted_layers_compute_the_same_bits(rule, granularity, bfloat16):
    for (rows, columns), bias in itertools.product([(1, 1), (63, 257), (3, 64)], [True, False]):
        linear = prepare(nn.Linear(columns, rows, bias), config_of(rule, granularity))
        embedding = QATEmbedding.from_float(nn.Embedding(rows, columns), config_of(rule, granularity))
        x, ids = torch.randn(2, 5, columns), torch.randint(rows, (2, 5))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            before = linear(x), embedding(ids)
            after = convert(linear)(x), convert(embedding)(ids)
        assert before[0].dtype is (torch.bfloat16 if bfloat16 else torch.float32)
        assert before[1].dtype is torch.float32
        for one, other in zip(before, after, strict=True):
            assert one.dtype is other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("rule", ScaleRule)
def test_disabled_layers_compute_like_the_stock_ones(tiny, ids, rule):
    model = prepare(tiny(), QuantConfig(bits=2, scale=rule, embeddings=True, lm_head=True))
    stock = tiny()
    assert not torch.equal(model(ids), stock(ids))
    set_fake_quant(model, False)
    assert torch.equal(model(ids), stock(ids))
    set_fake_quant(model, True)
    assert not torch.equal(model(ids), stock(ids))


def test_disabled_layers_give_every_parameter_a_gradient(tiny, ids):
    model = prepare(tiny(), QuantConfig(scale=ScaleRule.learned, embeddings=True, lm_head=True))
    set_fake_quant(model, False)
    model(ids).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) is not name.endswith("weight_log2_scale")


def test_padding_row_gets_no_gradient():
    embedding = QATEmbedding.from_float(nn.Embedding(5, 3, padding_idx=2), QuantConfig())
    embedding(torch.tensor([0, 2, 2, 4])).sum().backward()
    assert torch.equal(embedding.weight.grad.sum(1), torch.tensor([3.0, 0, 0, 0, 3]))


@pytest.mark.parametrize("rule", ScaleRule)
@pytest.mark.parametrize("tied", [False, True])
def test_stock_state_dict_loads_both_ways(tiny, ids, rule, tied):
    config = QuantConfig(bits=3, scale=rule, init=ScaleRule.std, embeddings=True, lm_head=True)
    other = tiny(tied)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    model = prepare(tiny(tied), config)
    model.load_state_dict(other.state_dict(), strict=True)
    # the learned scales start from the weights just loaded
    assert torch.equal(model(ids), prepare(copy.deepcopy(other), config)(ids))
    stock = tiny(tied)
    stock.load_state_dict(stock_state_dict(model), strict=True)
    assert torch.equal(stock(ids), other(ids))


def test_stock_state_dict_loads_into_a_model_on_meta(tiny, ids):
    config = QuantConfig(scale=ScaleRule.learned)
    with torch.device("meta"):
        model = prepare(tiny(), config)
    model.load_state_dict(tiny().state_dict(), strict=True, assign=True)
    assert torch.equal(model(ids), prepare(tiny(), config)(ids))


def test_learned_scales_survive_saving_and_copying(tiny, ids):
    config = QuantConfig(bits=4, scale=ScaleRule.learned, embeddings=True)
    model = prepare(tiny(True), config)
    with torch.no_grad():
        for module in quantized_modules(model).values():
            module.log2_scale.add_(0.3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = prepare(tiny(True), config)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    twin = copy.deepcopy(model)
    expected = model(ids)
    assert torch.equal(loaded(ids), expected)
    with torch.no_grad():
        model.embed.weight_log2_scale.add_(1)
    assert torch.equal(twin(ids), expected)


@pytest.mark.parametrize("rule, granularity", SETTINGS)
def test_tied_weights_stay_tied_and_share_one_scale(tiny, ids, rule, granularity):
    model = prepare(tiny(True), config_of(rule, granularity, lm_head=True))
    assert isinstance(model.embed, QATEmbedding) and isinstance(model.lm_head, QATLinear)
    assert model.lm_head.weight is model.embed.weight
    names = {n for n, _ in model.named_parameters() if n.endswith("weight_log2_scale")}
    learned = {"embed.weight_log2_scale", "up.weight_log2_scale", "down.weight_log2_scale"}
    assert names == (learned if rule is ScaleRule.learned else set())
    with torch.no_grad():
        # a scale that came to differ from the initial one must reach both ends
        for module in quantized_modules(model).values():
            if module.weight_log2_scale is not None:
                module.weight_log2_scale.add_(0.4)
    tables = model.embed.fake_quantized_weight(torch.float32), model.lm_head.fake_quantized_weight(torch.float32)
    assert torch.equal(*tables)
    expected = model(ids)
    dense = convert(model)
    assert dense.lm_head.weight_int8 is dense.embed.weight_int8
    assert torch.equal(dense(ids), expected)


def test_both_uses_of_a_tied_weight_reach_weight_and_scale(tiny, ids):
    config = QuantConfig(bits=4, scale=ScaleRule.learned, embeddings=True)
    one = prepare(tiny(True), config)
    one(ids).square().sum().backward()
    two = prepare(tiny(False), QuantConfig(bits=4, scale=ScaleRule.learned, embeddings=True, lm_head=True))
    with torch.no_grad():
        two.lm_head.weight.copy_(two.embed.weight)
        two.lm_head.weight_log2_scale.copy_(two.embed.weight_log2_scale)
    for parameter in ("up.weight", "up.bias", "down.weight"):
        two.get_parameter(parameter).data.copy_(one.get_parameter(parameter))
    for name in ("up", "down"):
        two.get_submodule(name).weight_log2_scale.data.copy_(one.get_submodule(name).weight_log2_scale)
    two(ids).square().sum().backward()
    torch.testing.assert_close(one.embed.weight.grad, two.embed.weight.grad + two.lm_head.weight.grad)
    got, parts = (
        one.embed.weight_log2_scale.grad,
        (two.embed.weight_log2_scale.grad, two.lm_head.weight_log2_scale.grad),
    )
    torch.testing.assert_close(got, parts[0] + parts[1])


def test_repr_names_bits_granularity_and_rule():
    layer = prepare(nn.Linear(3, 5), config_of(ScaleRule.std, Granularity.per_group))
    assert repr(layer) == "QATLinear(in_features=3, out_features=5, bias=True, 4 bits per_group(32) std)"
    set_fake_quant(layer, False)
    assert repr(layer).endswith("std, fake_quant=off)")


@pytest.mark.parametrize("tied", [False, True])
def test_rounding_a_settled_weight_gives_the_frozen_integers_at_any_scale(tiny, ids, tied):
    model = prepare(tiny(tied), QuantConfig(scale=ScaleRule.learned, lm_head=True, embeddings=True))
    before = {name: m.integers() for name, m in quantized_modules(model).items()}
    freeze(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter)
            assert parameter.isfinite().all(), name
    computed = model(ids)
    settle(model)
    assert torch.equal(model(ids), computed)
    for name, module in quantized_modules(model).items():
        assert torch.equal(module.integers(), before[name])
