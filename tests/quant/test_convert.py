"""Which layers prepare chooses, and the user's mistakes, each one line that names its cause."""

import pytest
import torch
from rans_kernels.dense import Int8Embedding, Int8Linear
from torch import nn

from qat.config import QuantConfig, ScaleRule
from qat.errors import UserError
from qat.quant import convert, prepare, quantize_weight, quantized_modules


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"up", "down"}),
        ({"include": ["*p"]}, {"up"}),
        ({"include": ["up", "down"], "exclude": ["d*"]}, {"up"}),
        ({"lm_head": True}, {"up", "down", "lm_head"}),
        ({"embeddings": True, "include": []}, {"embed"}),
        ({"embeddings": True, "lm_head": True}, {"embed", "up", "down", "lm_head"}),
    ],
)
def test_globs_choose_linear_layers_and_flags_the_two_ends(tiny, options, expected):
    assert set(quantized_modules(prepare(tiny(), QuantConfig(**options)))) == expected


@pytest.mark.parametrize("flag", ["lm_head", "embeddings"])
def test_tied_ends_go_together(tiny, flag):
    model = prepare(tiny(True), QuantConfig(**{flag: True}))
    assert set(quantized_modules(model)) == {"embed", "up", "down", "lm_head"}


def test_a_model_without_named_ends_has_only_linear_layers():
    model = prepare(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)), QuantConfig())
    assert set(quantized_modules(model)) == {"0", "2"}


def test_a_layer_used_twice_is_swapped_in_both_places():
    layer = nn.Linear(3, 3)
    model = prepare(nn.Sequential(layer, layer), QuantConfig())
    assert model[0] is model[1] and len(quantized_modules(model)) == 1
    dense = convert(model)
    assert dense[0] is dense[1] and isinstance(dense[0], Int8Linear)


def test_two_calls_prepare_two_parts_differently(tiny):
    model = prepare(tiny(), QuantConfig(include=["up"], bits=3))
    prepare(model, QuantConfig(include=["down"], bits=5))
    assert {n: m.quant_config.bits for n, m in quantized_modules(model).items()} == {"up": 3, "down": 5}


def test_prepare_keeps_parameters_and_mode(tiny):
    model = tiny().eval()
    model.up.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    prepare(model, QuantConfig(embeddings=True, lm_head=True))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    assert not any(module.training for module in model.modules())


def test_converted_model_holds_integers_and_trains_nothing(tiny):
    dense = convert(prepare(tiny(), QuantConfig(bits=5, embeddings=True, lm_head=True)))
    assert isinstance(dense.embed, Int8Embedding) and isinstance(dense.lm_head, Int8Linear)
    assert dense.up.weight_int8.dtype is torch.int8 and dense.up.weight_int8.abs().max() == 15
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    assert "weight" not in {name.rpartition(".")[2] for name in dense.state_dict()}


@pytest.mark.parametrize(
    "options, key",
    [
        ({"bits": 1}, "quant.bits=1"),
        ({"bits": 9}, "quant.bits=9"),
        ({"group_size": 0}, "quant.group_size=0"),
        ({"group_size": 48}, "quant.group_size=48"),
        ({"group_size": -32}, "quant.group_size=-32"),
        ({"init": ScaleRule.learned}, "quant.init=learned"),
        ({"k": 0.0}, "quant.k=0.0"),
        ({"k": float("nan")}, "quant.k=nan"),
        ({"start_step": -1}, "quant.start_step=-1"),
        ({"include": ["mlp.*"], "exclude": ["x"]}, r"include=\['mlp.\*'\] .*exclude=\['x'\] .*up, down"),
    ],
)
def test_a_mistake_in_the_config_is_one_line_that_names_it(tiny, options, key):
    with pytest.raises(UserError, match=key) as error:
        prepare(tiny(), QuantConfig(**options))
    assert "\n" not in str(error.value)


def test_ends_of_another_class_are_refused(tiny):
    class Scaled(nn.Embedding):
        pass

    model = tiny()
    model.embed = Scaled(257, 63)
    with pytest.raises(UserError, match=r"quant.embeddings=true needs a plain nn.Embedding.*Scaled"):
        prepare(model, QuantConfig(embeddings=True))
    with pytest.raises(UserError, match="quant.embeddings=true .* names no such layer"):
        prepare(nn.Linear(3, 3), QuantConfig(embeddings=True))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tiny, bad):
    model = prepare(tiny(), QuantConfig(scale=ScaleRule.learned))
    with torch.no_grad():
        model.down.weight[1, 2] = bad
    with pytest.raises(UserError, match="down.weight .*NaN or infinite"):
        convert(model)


def test_scales_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize_weight(torch.ones(3, 5), QuantConfig(scale=ScaleRule.learned), torch.full((3, 1), float("nan")))
