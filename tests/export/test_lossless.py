"""Models coded without loss compute what they computed before, to the bit; bits a weight are those of the format."""

import json
import os
from pathlib import Path

import pytest
import rans_kernels
import torch
from rans_kernels.checkpoint import iterate_weights
from rans_kernels.format import FormatError
from rans_kernels.linear import CompressedEmbedding, CompressedLinear, TiedLinear
from transformers import AutoModelForCausalLM

from qat.config import Lossless, Profile, QuantConfig
from qat.errors import UserError
from tests.export.helpers import logits, run

PLAIN = QuantConfig(enabled=False)
HALVES = ("bfloat16", "float16")
MODELS = [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]


def compressed_names(model):
    kinds = (CompressedLinear, CompressedEmbedding, TiedLinear)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_whole_model_computes_what_it_did(changes, dtype, profile, tiny_llama, tmp_path):
    source = tiny_llama(dtype=dtype, **changes)
    folder = run(source, tmp_path / "out", quant=PLAIN, lossless=Lossless.all, profile=profile)
    compressed, original = rans_kernels.load(folder), AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert compressed.dtype == original.dtype == getattr(torch, dtype)
    assert len(compressed_names(compressed)) == 16
    assert torch.equal(logits(compressed), logits(original))
    # and in another dtype, to which either is cast without loss
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(wide), logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)))
    compressed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(rans_kernels.load(tmp_path / "again")), logits(original))


def test_decoded_weights_are_the_stored_ones(tiny_llama, tmp_path):
    source = tiny_llama(dtype="bfloat16")
    folder = run(source, tmp_path / "out", quant=PLAIN, lossless=Lossless.all)
    weights = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    found = {name: torch.from_numpy(bits).view(torch.bfloat16) for name, _, bits, _ in iterate_weights(folder)}
    assert len(found) == 16
    assert all(torch.equal(w, weights[f"{name}.weight"]) for name, w in found.items())


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_without_loss_beside_integers(tie, tiny_llama, tmp_path):
    source = tiny_llama(dtype="bfloat16", tie_word_embeddings=tie)
    plain = rans_kernels.load(run(source, tmp_path / "plain"))
    folder = run(source, tmp_path / "out", lossless=Lossless.embeddings)
    compressed = rans_kernels.load(folder)
    assert compressed_names(compressed) - compressed_names(plain) == {"model.embed_tokens", "lm_head"}
    assert torch.equal(logits(compressed), logits(plain))
    summary = json.loads((folder / "export_report.json").read_text())["summary"]
    assert summary["lossless_weights"] == (1 if tie else 2) * 300 * 48
    card = (folder / "README.md").read_text()
    assert "INT8 weights" in card and f"{summary['lossless_weights']:,} weights in 16 bits" in card


def test_what_quantisation_leaves_out_is_coded_without_loss(tiny_llama, tmp_path):
    quant = QuantConfig(exclude=["*.down_proj"])
    folder = run(tiny_llama(dtype="bfloat16"), tmp_path / "out", quant=quant, lossless=Lossless.all)
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    exact = {name for name, entry in layers.items() if "dtype" in entry}
    assert exact == {"model.embed_tokens", "lm_head"} | {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


def test_float32_is_refused_unless_it_is_to_be_rounded(tiny_llama, tmp_path):
    source = tiny_llama()
    with pytest.raises(UserError, match="is float32, and lossless=all takes 16 bits: say dtype=bfloat16"):
        run(source, tmp_path / "out", quant=PLAIN, lossless=Lossless.all)
    assert list(tmp_path.iterdir()) == []
    folder = run(source, tmp_path / "out", quant=PLAIN, lossless=Lossless.all, dtype="bfloat16")
    rounded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert torch.equal(logits(rans_kernels.load(folder)), logits(rounded))


def test_nothing_to_compress_is_said(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="quant=none lossless=none leaves nothing to compress"):
        run(tiny_llama(), tmp_path / "out", quant=PLAIN)


def test_layers_say_what_they_are(tiny_llama, tmp_path):
    model = rans_kernels.load(run(tiny_llama(dtype="bfloat16"), tmp_path / "out", quant=PLAIN, lossless=Lossless.all))
    layer = model.model.layers[0].mlp.up_proj
    assert "bfloat16, split=c" in repr(layer) and "backend=cpu-bfloat16" in repr(layer)
    with pytest.raises(TypeError, match="no integers"):
        layer.to_int8()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "no weights of dtype 'float8'"),
        ({"windows": [60, 128]}, "windows"),
        ({"windows": None}, "damaged"),
        ({"dtype": "int8"}, "do not fit"),
        ({"scale_shape": [80, 1]}, "scales of shape"),
    ],
)
def test_a_damaged_entry_is_one_clear_line(change, message, tiny_llama, tmp_path):
    folder = run(tiny_llama(dtype="bfloat16"), tmp_path / "out", quant=PLAIN, lossless=Lossless.all)
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"] |= change
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message) as error:
        rans_kernels.load(folder)
    assert "\n" not in str(error.value)


def test_an_altered_byte_is_noticed(tiny_llama, tmp_path):
    folder = run(tiny_llama(dtype="bfloat16"), tmp_path / "out", quant=PLAIN, lossless=Lossless.all)
    shard = folder / "model.safetensors"
    good = shard.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    begin, end = json.loads(good[8:header])["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    # the last row of a head is of low bytes, which no stream checks
    shard.write_bytes(good[: header + end - 1] + bytes([good[header + end - 1] ^ 1]) + good[header + end :])
    with pytest.raises(FormatError, match="checksum"):
        rans_kernels.load(folder)


@pytest.mark.parametrize(("profile", "most"), [(Profile.compact, 10.9), (Profile.auto, 11.0), (Profile.fast, 11.4)])
def test_a_trained_model_takes_eleven_bits(profile, most, tmp_path):
    folder = os.environ.get("CODECLLM_BF16_MODEL")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CODECLLM_BF16_MODEL names no folder of a bfloat16 model")
    output = run(folder, tmp_path / "out", quant=PLAIN, lossless=Lossless.all, profile=profile)
    summary = json.loads((output / "export_report.json").read_text())["summary"]
    assert summary["entropy"] < summary["bits"] < most
    original = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(logits(rans_kernels.load(output)), logits(original))
