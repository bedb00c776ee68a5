"""Whatever happens to a compressed folder, loading it is right or says in one line what is wrong."""

import json
import shutil

import numpy as np
import pytest
import rans_kernels
import torch
from rans_kernels.checkpoint import iterate_weights
from rans_kernels.dense import dequantize
from rans_kernels.errors import DeviceError
from rans_kernels.format import FormatError
from transformers import AutoModelForCausalLM

from eval.references import own_integers
from qat.config import ExportConfig, Profile, QuantConfig
from qat.export import export
from tests.export.helpers import logits, run

CPU = torch.device("cpu")
EMBEDDINGS = QuantConfig(embeddings=True)
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def exported(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "model"
    config = ExportConfig(
        source=str(tiny_llama()), output=str(output), quant=QuantConfig(bits=5), profile=Profile.auto,
        shard_size="30KB", progress_bar=False,
    )  # fmt: skip
    return export(config)


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def edit_config(folder, change):
    data = json.loads((folder / "config.json").read_text())
    change(data["quantization_config"])
    (folder / "config.json").write_text(json.dumps(data))


def edit_model(folder, **values):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | values))


def first_shard(folder):
    """The first that holds a compressed layer."""
    return next(f for f in sorted(folder.glob("*.safetensors")) if b".weight_offsets" in f.read_bytes())


def cut(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1000])


def empty(folder):
    first_shard(folder).write_bytes(b"")


def lose_shard(folder):
    first_shard(folder).unlink()


def lose_layer(folder):
    edit_config(folder, lambda q: q["layers"].pop(LAYER))


def foreign_layer(folder):
    edit_config(folder, lambda q: q["layers"].update(x=q["layers"][LAYER]))


DAMAGE = {
    "no folder": (shutil.rmtree, "no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut": (lambda f: (f / "config.json").write_text('{"a": '), "damaged"),
    "not compressed": (lambda f: (f / "config.json").write_text("{}"), "no quantization_config"),
    "other method": (lambda f: edit_config(f, lambda q: q.update(quant_method="gptq")), "not a codecllm folder"),
    "newer version": (lambda f: edit_config(f, lambda q: q.update(format_version=4)), "format_version is 4"),
    "older version": (lambda f: edit_config(f, lambda q: q.update(format_version=1)), "format_version is 1"),
    "entry damaged": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].pop("units")), "units"),
    "rows altered": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].update(word_rows=-1)), "-1 rows of words"),
    "fold altered": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].update(fold=0)), "up_proj: fold is 0"),
    "fold no divisor": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].update(fold=7)), "fold is 7"),
    "fold of other tiles": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].update(fold=16)), "do not fit"),
    "shape altered": (
        lambda f: edit_config(f, lambda q: q["layers"][LAYER].update(shape=[80, 49])),
        "listed with shape",
    ),
    "tied to nothing": (lambda f: edit_config(f, lambda q: q["tied"].update(lm_head=LAYER)), "no compressed embedding"),
    "shard cut": (cut, "damaged or truncated"),
    "shard empty": (empty, "damaged or truncated"),
    "shard lost": (lose_shard, "lacks model-0000"),
    "index cut": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
    "unknown architecture": (lambda f: edit_model(f, model_type="lama"), "lama"),
    "another architecture": (lambda f: edit_model(f, architectures=["GPT2LMHeadModel"], model_type="gpt2"), "does not"),
    "layer not listed": (lose_layer, "do not fit"),
    "layer of another model": (foreign_layer, "x, which a LlamaForCausalLM does not have"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.replace(" ", "-"))
def test_damage_is_one_clear_line(damage, folder):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(FormatError, match=message) as error:
        rans_kernels.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["newer version", "shard cut", "shard empty", "shard lost", "shape altered"])
def test_from_pretrained_tells_of_damage_as_load_does(damage, folder):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(FormatError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_tensors_that_are_missing_are_named_and_counted(folder):
    edit_model(folder, num_hidden_layers=4)
    with pytest.raises(FormatError, match="missing model.layers.2.input_layernorm.weight and 17 more; copy or export"):
        rans_kernels.load(folder)


@pytest.mark.parametrize("device", ["cuda:99", "mps", "nowhere"])
def test_a_device_that_is_not_there_is_one_line_before_anything_is_read(device, folder):
    first_shard(folder).unlink()
    with pytest.raises(DeviceError, match=f"{device} is not there .*: use the CPU") as error:
        rans_kernels.load(folder, device)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device_map", ["cuda:99", {"": "cuda:99"}, {"model": "cpu", "lm_head": 99}])
def test_so_it_is_in_a_device_map(device_map, folder):
    with pytest.raises(DeviceError, match="99 is not there .*: use the CPU") as error:
        AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert "\n" not in str(error.value)


def test_layers_that_accelerate_offloads_keep_their_weights_where_they_compute(folder, tmp_path):
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    options = {"device_map": dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert torch.equal(logits(model), logits(rans_kernels.load(folder)))
    with pytest.raises(DeviceError, match="model.layers.1.*was offloaded.*leave offload_buffers out") as error:
        AutoModelForCausalLM.from_pretrained(folder, **options, offload_buffers=True)
    assert "\n" not in str(error.value)


def test_a_folder_of_version_2_loads(folder):
    expected = rans_kernels.load(folder).model.layers[0].mlp.up_proj.weight_int8
    edit_config(folder, lambda q: q.update(format_version=2))
    assert torch.equal(rans_kernels.load(folder).model.layers[0].mlp.up_proj.weight_int8, expected)


def test_any_altered_byte_of_a_coded_tensor_is_noticed(folder):
    rng = np.random.default_rng(0)
    shard = first_shard(folder)
    good = shard.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    spans = json.loads(good[8:header])
    layers = {name.rpartition(".")[0] for name in spans if name.endswith(".weight_offsets")}
    coded = [s["data_offsets"] for name, s in spans.items() if name.rpartition(".")[0] in layers]
    assert len(coded) == 5 * len(layers)
    for _ in range(12):
        begin, end = coded[rng.integers(len(coded))]
        bad = bytearray(good)
        bad[header + rng.integers(begin, end)] ^= 1 << rng.integers(8)
        shard.write_bytes(bad)
        with pytest.raises(FormatError, match="checksum"):
            rans_kernels.load(folder)
        with pytest.raises(FormatError, match="checksum"):
            list(iterate_weights(folder))


def test_half_written_folders_do_not_load(folder):
    # what is on disk just before the last step of the writer
    (folder / "config.json").unlink()
    with pytest.raises(FormatError):
        rans_kernels.load(folder)


def test_repr_tells_backend_and_size(folder):
    text = repr(rans_kernels.load(folder).model.layers[0].mlp.up_proj)
    assert "split=c" in text and "backend=cpu-int8" in text and "bits=" in text


def test_compressed_weights_follow_the_model_to_another_dtype_untouched(folder):
    model = rans_kernels.load(folder, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float32 and layer.weight.dtype == torch.int32
    assert layer.weight_words.dtype == torch.int16
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_cast_is_about_activations_and_leaves_scales_as_they_are(embeddings, tiny_llama, tmp_path):
    folder = run(tiny_llama(), tmp_path / "out", quant=QuantConfig(embeddings=embeddings))
    for make in (rans_kernels.load, own_integers):
        model, x = make(folder, CPU, torch.float32), torch.randn(3, 48)
        layers = [m for m in model.modules() if hasattr(m, "weight_scale")]
        scales = [layer.weight_scale.clone() for layer in layers]
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            model.to(dtype)
            assert all(torch.equal(layer.weight_scale, s) for layer, s in zip(layers, scales, strict=True))
            assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == dtype
        projection = model.model.layers[0].mlp.up_proj
        expected = make(folder, CPU, torch.float32).model.layers[0].mlp.up_proj(x.half())
        assert torch.equal(projection.half()(x.half()), expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_means_what_it_means_to_a_linear_layer(enabled, tiny_llama, tmp_path):
    model = rans_kernels.load(run(tiny_llama(tie_word_embeddings=True), tmp_path / "out", quant=EMBEDDINGS))
    x = torch.randn(3, 48, requires_grad=True)
    projection = model.model.layers[0].mlp.up_proj
    for layer, weight in ((projection, projection), (projection.to_int8(), projection), (model.lm_head, None)):
        coded = weight or model.model.embed_tokens
        plain = torch.nn.Linear(48, coded.layout.shape[0], bias=False)
        plain.weight.data = dequantize(coded.weight_int8, coded.weight_scale, torch.float32)
        found, expected = [], []
        for module, out in ((layer, found), (plain, expected)):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out.append(module(x))
            out += torch.autograd.grad(out[0].float().sum(), x)
        assert found[0].dtype == (torch.bfloat16 if enabled else torch.float32)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
