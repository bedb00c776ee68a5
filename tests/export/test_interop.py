"""Folders that need nothing of ours hold the same weights: floats to the bit, or the same integers and scales."""

import json
import subprocess
import sys

import numpy as np
import pytest
import rans_kernels
import torch
from rans_kernels.checkpoint import iterate_weights
from rans_kernels.format import FormatError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.commands import main
from qat.config import Granularity, Lossless, QuantConfig
from qat.errors import UserError
from qat.interop import to_compressed_tensors, to_plain
from tests.export.helpers import logits, run

WRITERS = (to_plain, to_compressed_tensors)
GROUPS = {"granularity": Granularity.per_group, "group_size": 32}
WIDE = {"hidden_size": 64, "intermediate_size": 96}
ENDS = {"embeddings": True, "lm_head": True}
# the model, how it is quantised, and how many layers compressed-tensors holds as integers
SETTINGS = {
    "per channel": ({"attention_bias": True}, {}, 14),
    "odd columns": ({"intermediate_size": 77}, {"bits": 5}, 14),
    "per tensor, ends": ({}, {"granularity": Granularity.per_tensor} | ENDS, 14),
    "tied": ({"tie_word_embeddings": True}, ENDS, 14),
    "tied but not quantised": ({"tie_word_embeddings": True}, {}, 14),
    "per group": (WIDE, GROUPS, 14),
    "last group not whole": (WIDE | {"intermediate_size": 80}, GROUPS, 12),
    "some layers": ({}, {"exclude": ["*.q_proj"]}, 12),
}
settings = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.replace(" ", "-"))


def compressed(setting, tiny_llama, tmp_path):
    model, quant, _ = SETTINGS[setting]
    return run(tiny_llama(**model), tmp_path / "compressed", quant=QuantConfig(**quant))


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@settings
def test_a_plain_folder_computes_what_the_compressed_one_does(setting, tiny_llama, tmp_path):
    source = compressed(setting, tiny_llama, tmp_path)
    folder = to_plain(source, tmp_path / "plain", "float32")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] == SETTINGS[setting][0].get("tie_word_embeddings", False)
    assert torch.equal(logits(load(folder)), logits(rans_kernels.load(source, dtype=torch.float32)))
    half = to_plain(source, tmp_path / "half")
    assert torch.equal(logits(load(half, "auto")), logits(rans_kernels.load(source, dtype=torch.bfloat16)))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"
    assert (folder / "generation_config.json").is_file()


def test_weights_coded_without_loss_come_back_to_the_bit(tiny_llama, tmp_path):
    source = tiny_llama(dtype="bfloat16")
    folder = run(source, tmp_path / "compressed", quant=QuantConfig(enabled=False), lossless=Lossless.all)
    plain, original = load_file(to_plain(folder, tmp_path / "plain") / "model.safetensors"), load(source, "auto")
    assert plain.keys() == original.state_dict().keys()
    assert all(torch.equal(plain[key], tensor) for key, tensor in original.state_dict().items())
    with pytest.raises(UserError, match="no INT8 linear layers"):
        to_compressed_tensors(folder, tmp_path / "out")


def test_transformers_alone_loads_a_plain_folder(tiny_llama, tmp_path):
    source = run(tiny_llama(), tmp_path / "compressed", quant=QuantConfig(embeddings=True))
    folder, found = to_plain(source, tmp_path / "plain", "float32"), tmp_path / "logits.pt"
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval()
torch.save(model(torch.arange(31)[None]).logits.detach(), {str(found)!r})
assert not {{"rans_kernels", "qat"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        expected = rans_kernels.load(source)(torch.arange(31)[None]).logits
    assert torch.equal(torch.load(found, weights_only=True), expected)


@settings
def test_packed_tensors_hold_our_integers_and_scales(setting, tiny_llama, tmp_path):
    source = compressed(setting, tiny_llama, tmp_path)
    tensors = load_file(to_compressed_tensors(source, tmp_path / "packed") / "model.safetensors")
    seen = 0
    for name, _, weights, scale in iterate_weights(source):
        if f"{name}.weight_packed" not in tensors:
            assert tensors[f"{name}.weight"].dtype is torch.bfloat16
            continue
        n, k = weights.shape
        packed = tensors[f"{name}.weight_packed"]
        assert tensors[f"{name}.weight_shape"].tolist() == [n, k] and packed.shape == (n, -(-k // 4))
        columns = np.stack([packed.numpy() >> shift & 255 for shift in (0, 8, 16, 24)], axis=-1).reshape(n, -1)
        assert np.array_equal(columns[:, :k] - 128, weights)
        assert torch.equal(tensors[f"{name}.weight_scale"], scale.expand(n, -1))
        seen += 1
    assert seen == SETTINGS[setting][2]


@settings
def test_transformers_with_compressed_tensors_loads_the_same_model(setting, tiny_llama, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (pip install -e .[dev])")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    source = compressed(setting, tiny_llama, tmp_path)
    model = load(to_compressed_tensors(source, tmp_path / "packed", "float32"))
    seen = 0
    for name, _, weights, scale in iterate_weights(source):
        layer = model.get_submodule(name)
        if hasattr(layer, "weight_packed"):
            found = unpack_from_int32(layer.weight_packed, 8, layer.weight_shape)
            assert torch.equal(found, torch.from_numpy(weights))
            assert torch.equal(layer.weight_scale, scale.expand(len(weights), -1))
            seen += 1
    assert seen == SETTINGS[setting][2]
    assert torch.equal(logits(model), logits(rans_kernels.load(source, dtype=torch.float32)))


@pytest.mark.parametrize("write", WRITERS)
def test_shards_are_bounded_and_hold_the_same(write, tiny_llama, tmp_path):
    source = run(tiny_llama(), tmp_path / "compressed", shard_size="20KB")
    whole = load_file(write(source, tmp_path / "whole") / "model.safetensors")
    shards = sorted(write(source, tmp_path / "shards", shard_size="20KB").glob("*.safetensors"))
    assert len(shards) > 3
    parts = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert parts.keys() == whole.keys() and all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize("write", WRITERS)
def test_only_another_model_is_replaced(write, tiny_llama, tmp_path):
    source = run(tiny_llama(), tmp_path / "models" / "compressed")
    (tmp_path / "models" / "config.json").write_text("{}")
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    for output, message in ((other, "is no model"), (tmp_path / "models", "holds the source")):
        with pytest.raises(UserError, match=message):
            write(source, output, overwrite=True)
    assert (other / "letter.txt").read_text() == "dear" and (source / "config.json").is_file()
    old = write(source, tmp_path / "out")
    assert write(source, old, overwrite=True) == old


@pytest.mark.parametrize("write", WRITERS)
def test_mistakes_are_one_line_and_leave_nothing(write, tiny_llama, tmp_path):
    source = run(tiny_llama(), tmp_path / "compressed")
    output = tmp_path / "out"
    mistakes = [
        ((tmp_path / "nowhere", output), {}, "no config.json"),
        ((tiny_llama(), output), {}, "no quantization_config"),
        ((source, output), {"dtype": "int8"}, "dtype=int8"),
        ((source, output), {"shard_size": "5 apples"}, "shard_size"),
        ((source, source), {"overwrite": True}, "is the folder to read"),
    ]
    for paths, options, message in mistakes:
        with pytest.raises((UserError, FormatError), match=message) as error:
            write(*paths, **options)
        assert "\n" not in str(error.value)
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(FormatError, match="damaged or truncated"):
        write(source, output)
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


def test_the_command_has_the_exit_codes_of_the_others(tiny_llama, tmp_path, capsys):
    source, output = run(tiny_llama(), tmp_path / "compressed"), tmp_path / "out"

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(["interop", str(source), str(output), *words])
        return stop.value.code

    assert call("--to", "plain") == 0
    assert "0 weights as INT8, 14 as bfloat16" in capsys.readouterr().out
    assert call("--to", "plain", "--dtype", "float32") == 2
    assert capsys.readouterr().err == f"error: {output} exists: choose another name or say --overwrite\n"
    assert call("--to", "compressed-tensors", "--overwrite") == 0
    assert json.loads((output / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    assert call("--to", "onnx") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed", "out"]
