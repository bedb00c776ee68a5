"""vLLM's plugin against a minimal stand-in for the parts of vLLM that it touches; no real vLLM has run it."""

import importlib
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import rans_kernels
import torch
from rans_kernels.checkpoint import iterate_plain, read_tensor, shard_of
from rans_kernels.format import FormatError
from torch import nn

from qat.config import QuantConfig
from tests.export.helpers import run

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
SIZES = {"qkv_proj": [48, 24, 24], "gate_up_proj": [80, 80], "o_proj": [48], "down_proj": [48]}
INPUTS = {"qkv_proj": 48, "gate_up_proj": 48, "o_proj": 48, "down_proj": 80}


class LinearBase(nn.Module):
    """As vLLM's: makes its weights by the quantisation's method, and hands it the bias."""

    def __init__(self, config, prefix, sizes, inputs, bias=False, parallel=1):
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        rows = [size // parallel for size in sizes]
        self.quant_method.create_weights(self, inputs, rows, inputs, sum(sizes), torch.bfloat16, weight_loader=None)
        self.bias = nn.Parameter(torch.zeros(sum(sizes))) if bias else None

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


@pytest.fixture
def plugin(monkeypatch):
    """rans_kernels.vllm, imported with the stand-in, and what it has registered there."""
    registered = {}

    def register_quantization_config(name):
        return lambda kind: registered.setdefault(name, kind)

    class QuantizationConfig:
        def __init__(self):
            self.packed_modules_mapping = {}

    plain = type("UnquantizedLinearMethod", (), {})
    names = {
        "linear": {"LinearBase": LinearBase, "LinearMethodBase": object, "UnquantizedLinearMethod": plain},
        "quantization": {"register_quantization_config": register_quantization_config},
        "quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vocab_parallel_embedding": {"VocabParallelEmbedding": type("VocabParallelEmbedding", (nn.Module,), {})},
    }  # fmt: skip
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in names.items():
        module = ModuleType(f"vllm.model_executor.layers.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "rans_kernels.vllm", raising=False)
    module = importlib.import_module("rans_kernels.vllm")
    module.register()
    yield registered["codecllm"], module
    sys.modules.pop("rans_kernels.vllm")


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return run(tiny_llama(attention_bias=True), tmp_path_factory.mktemp("vllm") / "model", quant=QuantConfig(bits=4))


def config_of(kind, folder, **changes):
    block = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    config = kind.from_config(block)
    # vLLM takes it from the model's class
    config.packed_modules_mapping = PACKED
    return config


def load(layers, folder):
    """As vLLM's models do: a part's tensors go to the fused layer's parameter with the part's number."""
    parameters = {f"{prefix}.{name}": p for prefix, layer in layers.items() for name, p in layer.named_parameters()}
    shards = shard_of(folder)
    biases = dict(iterate_plain(folder))
    for key in shards:
        module, _, buffer = key.rpartition(".")
        parent, _, child = module.rpartition(".")
        fused = next((name for name, parts in PACKED.items() if child in parts), None)
        target = f"{parent}.{fused or child}.{buffer}"
        if target not in parameters:
            continue
        parameter = parameters[target]
        if buffer == "bias":
            names = PACKED.get(fused, [child])
            parameter.data.copy_(torch.cat([biases[f"{parent}.{name}.bias"] for name in names]))
        elif fused:
            parameter.weight_loader(parameter, read_tensor(key, shards), SHARDS[child])
        else:
            parameter.weight_loader(parameter, read_tensor(key, shards))
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_compute_what_their_parts_do(dtype, plugin, folder):
    config = config_of(plugin[0], folder)
    blocks = {"self_attn": ["qkv_proj", "o_proj"], "mlp": ["gate_up_proj", "down_proj"]}
    prefixes = [
        f"model.layers.{i}.{block}.{name}" for i in range(2) for block, names in blocks.items() for name in names
    ]
    layers = {}
    for prefix in prefixes:
        child = prefix.rpartition(".")[2]
        layers[prefix] = LinearBase(config, prefix, SIZES[child], INPUTS[child], bias="self_attn" in prefix)
    load(layers, folder)
    model = rans_kernels.load(folder, dtype=dtype)
    for prefix, layer in layers.items():
        parent, _, child = prefix.rpartition(".")
        x = torch.randn(3, INPUTS[child]).to(dtype)
        parts = [model.get_submodule(f"{parent}.{name}") for name in PACKED.get(child, [child])]
        with torch.no_grad():
            assert torch.equal(layer(x), torch.cat([part(x) for part in parts], dim=-1))
        # the parameters that were loaded into are given back
        assert {name for name, _ in layer.named_parameters()} <= {"bias"}


def test_layers_that_are_not_compressed_are_vllms_own(plugin, tiny_llama, tmp_path):
    kind, module = plugin
    attention = [f"*.{name}_proj" for name in "qkvo"]
    config = config_of(kind, run(tiny_llama(), tmp_path / "mlp", quant=QuantConfig(exclude=attention)))
    linear, prefix = LinearBase.__new__(LinearBase), "model.layers.0.self_attn.qkv_proj"
    assert isinstance(config.get_quant_method(linear, prefix), module.UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Identity(), "model.layers.0.attn") is None
    assert config.get_quant_method(module.VocabParallelEmbedding(), "lm_head") is None
    part = config_of(kind, run(tiny_llama(), tmp_path / "part", quant=QuantConfig(exclude=["*.k_proj"])))
    with pytest.raises(ValueError, match="self_attn.k_proj is not compressed: export all parts or none"):
        part.get_quant_method(linear, prefix)


def test_what_vllm_cannot_have_is_one_line(plugin, folder, tiny_llama, tmp_path):
    kind, module = plugin
    config, prefix = config_of(kind, folder), "model.layers.0.self_attn.qkv_proj"
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        LinearBase(config, prefix, SIZES["qkv_proj"], 48, parallel=2)
    with pytest.raises(ValueError, match="q_proj is .*48, 48.*40, 48"):
        LinearBase(config, prefix, [40, 24, 24], 48)
    embedding = run(tiny_llama(), tmp_path / "embedding", quant=QuantConfig(embeddings=True))
    with pytest.raises(ValueError, match="embed_tokens is an embedding"):
        config_of(kind, embedding)
    head = config_of(kind, run(tiny_llama(), tmp_path / "head", quant=QuantConfig(lm_head=True)))
    with pytest.raises(ValueError, match="lm_head is compressed"):
        head.get_quant_method(module.VocabParallelEmbedding(), "lm_head")
    with pytest.raises(FormatError, match="format_version is 9"):
        config_of(kind, folder, format_version=9)


def test_a_tensor_that_was_altered_or_swapped_is_noticed(plugin, folder):
    prefix = "model.layers.0.mlp.down_proj"
    layers = {prefix: LinearBase(config_of(plugin[0], folder), prefix, [48], 80)}
    with pytest.raises(FormatError, match="altered"):
        # nothing was loaded
        layers[prefix].quant_method.process_weights_after_loading(layers[prefix])
    layer = LinearBase(config_of(plugin[0], folder), prefix, [48], 80)
    with pytest.raises(ValueError, match="a stored tensor is"):
        layer.weight.weight_loader(layer.weight, torch.zeros(48, 80))


def test_the_entry_point_names_the_plugin(plugin):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    name, _, function = project["entry-points"]["vllm.general_plugins"]["codecllm"].partition(":")
    assert name == plugin[1].__name__ and callable(getattr(plugin[1], function))
