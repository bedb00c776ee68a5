"""Methods on a whole model: their bits are export's, targets are met, the model computes with the integers."""

import json
from dataclasses import replace

import pytest
import torch
from rans_kernels.dense import dequantize
from transformers import AutoModelForCausalLM, GPT2Config

from qat.cli import compose
from qat.config import QuantConfig
from qat.errors import UserError
from qat.export import export
from qat.model import load_model
from qat.ptq import METHODS, Trained, find_knob
from qat.ptq.calibration import walk
from qat.ptq.methods import STEPS, priced
from qat.quant import prepare, quantized_modules, weight_scale

KNOBS = {"rtn": 0.5, "gptq": 0.5, "rtn-layer": 0.5, "gptq-layer": 0.5, "entquant": 12.0}


@pytest.fixture
def batches():
    return list(torch.randint(300, (6, 40), generator=torch.Generator().manual_seed(0)).split(4))


@pytest.fixture
def trained(tiny_llama, batches):
    return Trained(load_model(tiny_llama()), batches)


@pytest.mark.parametrize(
    "method, overrides",
    [
        ("rtn", ["quant=std", "quant.k=0.5"]),
        ("rtn-layer", ["quant=std", "quant.k=0.5", "quant.granularity=per_tensor"]),
        ("int8", []),
        ("int4", ["quant.bits=4"]),
        ("int4-g128", ["quant.bits=4", "quant.granularity=per_group"]),
    ],
)
def test_bits_are_those_that_export_stores(trained, tiny_llama, tmp_path, method, overrides):
    words = [f"source={tiny_llama()}", f"output={tmp_path / 'out'}", "progress_bar=false", *overrides]
    summary = json.loads((export(compose("export", *words)) / "export_report.json").read_text())["summary"]
    cost = trained.cost(trained.round(METHODS[method], 0.5))
    assert cost.bits == pytest.approx(summary["bits"], abs=1e-4)
    assert cost.entropy == pytest.approx(summary["entropy"], abs=1e-4)


def test_bits_of_folded_weights_are_those_that_export_stores(tiny_llama, tmp_path):
    # layers with a bias are not folded
    source = tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True)
    words = ["quant=std", "quant.k=0.5", "quant.granularity=per_tensor", "progress_bar=false"]
    folder = export(compose("export", f"source={source}", f"output={tmp_path / 'out'}", *words))
    report = json.loads((folder / "export_report.json").read_text())
    assert {row["fold"] for row in report["layers"] if row["kind"] == "linear"} == {1, 4, 8}
    trained = Trained(load_model(source), [])
    cost = trained.cost(trained.round(METHODS["rtn-layer"], 0.5))
    assert cost.bits == pytest.approx(report["summary"]["bits"], abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_computes_with_the_integers(trained, name):
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    rounded = trained.round(METHODS[name], KNOBS.get(name, 1.0))
    assert rounded.keys() == trained.layers.keys() and len(rounded) == 14
    after = trained.model.state_dict()
    for key, layer in rounded.items():
        expected = dequantize(layer.q, layer.scale, torch.float32, layer.group_size)
        assert torch.equal(after[f"{key}.weight"], expected)
    trained.restore()
    assert all(torch.equal(before[key], value) for key, value in trained.model.state_dict().items())


@pytest.mark.parametrize("name", KNOBS)
def test_rounding_again_gives_the_same(trained, name):
    first, second = (trained.round(METHODS[name], KNOBS[name]) for _ in range(2))
    assert all(torch.equal(first[key].q, second[key].q) for key in first)


@pytest.mark.parametrize("name", KNOBS)
def test_targets_are_met(trained, name):
    # so small a model stores two bits a weight beside its integers
    knob, cost = trained.at_bits(METHODS[name], 5.5)
    assert abs(cost.bits - 5.5) <= 0.02
    assert trained.cost(trained.round(METHODS[name], knob)) == cost


def test_hessians_are_of_what_the_rounded_model_lets_through(trained, batches):
    model, seen = trained.model, {}
    for block in walk(model, trained.layers, batches):
        seen |= block
        for name in block:
            trained.layers[name].weight.data.mul_(0.5)
    inputs = {}
    down = {name: layer for name, layer in trained.layers.items() if name.endswith("q_proj")}
    for name, layer in down.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for name in down:
        x = torch.cat([part.flatten(0, 1) for part in inputs[name]])
        torch.testing.assert_close(seen[name], x.T @ x / len(x))


def test_blocks_that_take_their_mask_by_position_get_it():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    shape = GPT2Config(**sizes, initializer_range=0.3)
    # sdpa would be causal without a mask
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").eval()
    prepare(model, QuantConfig())
    layers, batch = quantized_modules(model), torch.randint(300, (4, 40))
    inputs = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        model(input_ids=batch)
    # the hooks stay, and see what walk runs too
    expected = {name: x.T @ x / len(x) for name, x in inputs.items()}
    blocks = list(walk(model, layers, [batch]))
    assert [sorted(block) for block in blocks] == [sorted(n for n in layers if f".h.{i}." in n) for i in range(2)]
    for name, moment in (item for block in blocks for item in block.items()):
        torch.testing.assert_close(moment, expected[name])


def test_a_price_buys_coarser_steps_and_none_is_the_finest():
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)[:, None]
    steps = [priced(weight, knob).scale for knob in (0.0, 1.0, 10.0, 100.0)]
    assert all((finer <= coarser).all() for finer, coarser in zip(steps, steps[1:], strict=False))
    assert not torch.equal(steps[0], steps[-1])


def test_a_searched_step_is_no_worse_than_any_common_one():
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))

    def loss(scale):
        q = (weight / scale).round().clamp(-127, 127)
        return (q * scale - weight).abs().sum(1) / weight.abs().sum() + 10 * q.abs().sum(1) / 128 / weight.numel()

    ours, unit = loss(priced(weight, 10.0).scale), weight_scale(weight, replace(STEPS, k=1.0))
    for k in torch.logspace(-4, 2, 60, base=2):
        assert (ours <= 1.02 * loss(k * unit)).all()


def test_find_knob_meets_targets_and_says_what_cannot_be_met():
    def bits(knob):
        return 8 / (1 + knob)

    known: dict[float, float] = {}
    for target in (3.0, 2.0, 5.0):
        assert bits(find_knob(bits, target, (0.01, 100.0), known)) == pytest.approx(target, abs=0.02)
    assert all(bits(knob) == value for knob, value in known.items())
    with pytest.raises(UserError, match="9 bits"):
        find_knob(bits, 9.0, (0.01, 100.0))
    with pytest.raises(UserError, match="nearest"):
        find_knob(lambda knob: 4.0 if knob < 1 else 2.0, 3.0, (0.01, 100.0))


def test_a_search_starts_from_what_others_found():
    asked = []

    def bits(knob):
        asked.append(knob)
        return 8 / (1 + knob)

    known: dict[float, float] = {}
    knob = find_knob(bits, 3.0, (0.01, 100.0), known)
    before = len(asked)
    assert find_knob(bits, 3.001, (0.01, 100.0), known) == pytest.approx(knob, rel=0.02)
    # asked once more, so that what was asked last is what is returned
    assert len(asked) == before + 1


def test_what_is_missing_is_named(tiny_llama):
    bare = Trained(load_model(tiny_llama()), [])
    with pytest.raises(UserError, match="calibration"):
        bare.round(METHODS["gptq"], 0.5)
    layers = {"odd": torch.nn.Linear(3, 3)}
    with pytest.raises(UserError, match="odd is in no decoder block"):
        next(walk(bare.model, layers, [torch.zeros(1, 4, dtype=torch.long)]))
    with pytest.raises(UserError, match="no knob"):
        bare.at_bits(METHODS["int8"], 4.0)
