"""Models of many families go through export, loading and the plain format with equal logits; what cannot says so."""

import json

import pytest
import rans_kernels
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qat.config import Lossless, QuantConfig
from qat.errors import UserError
from qat.interop import to_compressed_tensors, to_plain
from qat.quant import prepare
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


def test_transposed_layers_are_refused_and_can_be_left_out(make, tmp_path):
    source = make("gpt2")
    with pytest.raises(UserError, match="transformer.h.0.attn.c_attn is a Conv1D.*quant.exclude") as error:
        run(source, tmp_path / "compressed")
    assert "\n" not in str(error.value)
    quant = QuantConfig(embeddings=True, include=[])
    folder = run(source, tmp_path / "compressed", quant=quant)
    assert torch.equal(logits(load(folder)), logits(prepare(load(source), quant)))
