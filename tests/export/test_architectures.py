"""Models of many families go through export, loading and the plain format with equal logits; what cannot says so."""

import json
import shutil

import pytest
import rans_kernels
import torch
from rans_kernels.format import FormatError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qat.config import Lossless, QuantConfig, ScaleRule
from qat.errors import UserError
from qat.interop import to_compressed_tensors, to_plain
from qat.quant import is_transposed, prepare, quantized_modules, stock_state_dict
from tests.export.helpers import logits, run

SMALL = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 12}, "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12}, "gpt_neox": {}, "phi": {}, "olmo2": {},
}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    def make(family, **changes):
        torch.manual_seed(0)
        values = SMALL | FAMILIES.get(family, {}) | changes
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
        # biases begin as zeros
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_and_plain_models_equal_the_fake_quantised_one(family, make, tmp_path):
    source = make(family)
    folder = run(source, tmp_path / "compressed")
    expected = logits(prepare(load(source), QuantConfig()))
    assert torch.equal(logits(rans_kernels.load(folder, dtype=torch.float32)), expected)
    assert torch.equal(logits(load(to_plain(folder, tmp_path / "plain", "float32"))), expected)
    half = to_plain(folder, tmp_path / "half")
    assert torch.equal(logits(load(half, "auto")), logits(load(folder, torch.bfloat16)))


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_loads_every_family(family, make, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (pip install -e .[dev])")
    source = make(family)
    folder = run(source, tmp_path / "compressed")
    packed = load(to_compressed_tensors(folder, tmp_path / "packed", "float32"))
    assert torch.equal(logits(packed), logits(prepare(load(source), QuantConfig())))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_tied_embeddings_in_int8_are_tied_again(family, make, tmp_path):
    quant = QuantConfig(embeddings=True)
    source = make(family, tie_word_embeddings=True)
    folder = run(source, tmp_path / "compressed", quant=quant)
    expected = logits(prepare(load(source), quant))
    assert torch.equal(logits(rans_kernels.load(folder, dtype=torch.float32)), expected)
    plain = load(to_plain(folder, tmp_path / "plain", "float32"))
    assert torch.equal(logits(plain), expected)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight


def test_an_embedding_of_a_class_of_its_own_and_its_head_stay_plain(make, tmp_path):
    source = make("gemma", tie_word_embeddings=True)
    with pytest.raises(UserError, match="quant.embeddings=true needs a plain nn.Embedding"):
        run(source, tmp_path / "compressed", quant=QuantConfig(embeddings=True))
    quant = QuantConfig(enabled=False)
    folder = run(source, tmp_path / "compressed", quant=quant, lossless=Lossless.all, dtype="bfloat16")
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert len(layers) == 14
    assert torch.equal(logits(load(folder, torch.bfloat16)), logits(load(source, torch.bfloat16)))


@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig(bits=4, embeddings=True, scale=ScaleRule.std)])
def test_the_transposed_weights_of_gpt2_go_through_and_come_back(quant, make, tmp_path):
    source = make("gpt2", n_inner=80)
    folder = run(source, tmp_path / "compressed", quant=quant)
    reference = prepare(load(source), quant)
    compressed = rans_kernels.load(folder, dtype=torch.float32)
    assert isinstance(compressed.transformer.h[0].attn.c_attn, rans_kernels.CompressedLinear)
    assert torch.equal(logits(compressed), logits(reference)) and torch.equal(logits(load(folder)), logits(reference))
    plain = load(to_plain(folder, tmp_path / "plain", "float32"))
    assert torch.allclose(logits(plain), logits(compressed), atol=1e-5)
    for name, module in quantized_modules(reference).items():
        weight = module.fake_quantized_weight(torch.float32)
        assert torch.equal(plain.get_submodule(name).weight, weight.t() if is_transposed(module) else weight)
    compressed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(rans_kernels.load(tmp_path / "again")), logits(reference))
    with pytest.raises(UserError, match="no INT8 linear layers"):
        to_compressed_tensors(folder, tmp_path / "packed")


def test_transposed_weights_are_coded_without_loss(make, tmp_path):
    source = make("gpt2", n_inner=80)
    folder = run(source, tmp_path / "out", quant=QuantConfig(enabled=False), lossless=Lossless.all, dtype="bfloat16")
    plain, original = load(to_plain(folder, tmp_path / "plain"), "auto"), load(source, torch.bfloat16)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in original.state_dict().items())


def test_a_prepared_gpt2_saves_and_loads_stock_weights(make):
    model = load(make("gpt2", n_inner=80))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stored = stock_state_dict(prepare(model, QuantConfig(scale=ScaleRule.learned)))
    assert before.keys() == stored.keys()
    assert all(torch.equal(before[key], value) for key, value in stored.items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(stored | before, strict=False)
    assert all(torch.equal(before[key], value) for key, value in stock_state_dict(model).items())


def test_an_altered_shape_of_a_transposed_layer_is_noticed(make, tmp_path):
    folder = run(make("gpt2", n_inner=80), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["layers"]["transformer.h.0.attn.c_attn"]["transposed"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"c_attn is listed with shape \(144, 48\), the model has \(48, 144\)"):
        rans_kernels.load(folder)


def test_gpt2_with_the_names_it_has_on_the_hub(make, tmp_path):
    source = make("gpt2", n_inner=80)
    tensors = load_file(source / "model.safetensors")
    named = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    # a mask, which old versions stored
    named["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    (tmp_path / "hub").mkdir()
    shutil.copy(source / "config.json", tmp_path / "hub")
    save_file(named, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    folders = [run(model, tmp_path / f"from {model.name}") for model in (source, tmp_path / "hub")]
    found, expected = (load_file(folder / "model.safetensors") for folder in folders)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(*(logits(rans_kernels.load(folder)) for folder in folders))
