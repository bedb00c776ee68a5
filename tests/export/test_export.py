"""What export writes loads to the same logits as the fake-quantised model, for every setting; a failure leaves
nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import rans_kernels
import torch
from rans_kernels.checkpoint import iterate_weights
from rans_kernels.format import FormatError
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.config import Granularity, LoggerConfig, Profile, QuantConfig, Rounding, ScaleRule, from_plain
from qat.errors import UserError
from qat.export import parse_size
from qat.quant import prepare
from tests.export.helpers import logits, run


def fake_quantised(source, folder):
    quant = json.loads((folder / "config.json").read_text())["quantization_config"]["quant"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return prepare(model, from_plain(QuantConfig, quant))


# rows enough for panels of folded ones
NARROW = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 320}
SETTINGS = {
    "absmax": ({}, {}, {}),
    "std 3 bits auto": ({}, {"scale": ScaleRule.std, "k": 0.52}, {"profile": Profile.auto}),
    "fast, small tiles": ({}, {"bits": 4}, {"profile": Profile.fast, "units": 1}),
    "per tensor": ({}, {"granularity": Granularity.per_tensor}, {"units": 3}),
    "per group": ({}, {"granularity": Granularity.per_group, "group_size": 32}, {"probability_bits": 10}),
    "embeddings": ({}, {"embeddings": True}, {}),
    "tied embeddings": ({"tie_word_embeddings": True}, {"embeddings": True}, {}),
    "tied but not quantised": ({"tie_word_embeddings": True}, {}, {}),
    "head": ({}, {"lm_head": True}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {"embeddings": True}, {}),
    "shards": ({}, {}, {"shard_size": "20KB"}),
    "folded": (NARROW, {"bits": 4, "granularity": Granularity.per_tensor, "embeddings": True}, {}),
    "folded, biases": (NARROW | {"attention_bias": True}, {"granularity": Granularity.per_tensor}, {}),
    "folded, small tiles": (NARROW, {"granularity": Granularity.per_tensor}, {"units": 3}),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.replace(" ", "-"))
def test_compressed_model_equals_the_fake_quantised_one(setting, tiny_llama, tmp_path):
    model, quant, changes = SETTINGS[setting]
    source = tiny_llama(**model)
    folder = run(source, tmp_path / "out", quant=QuantConfig(**quant), **changes)
    compressed = rans_kernels.load(folder, dtype=torch.float32)
    assert torch.equal(logits(compressed), logits(fake_quantised(source, folder)))
    # and by the way users load models
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(plain), logits(compressed))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"


def test_narrow_weights_of_one_scale_and_no_bias_are_folded_in_compact(tiny_llama, tmp_path):
    source = tiny_llama(**NARROW, attention_bias=True)
    quant = QuantConfig(granularity=Granularity.per_tensor, embeddings=True)
    folder = run(source, tmp_path / "out", quant=quant)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    folds = {name: entry.get("fold", 1) for name, entry in config["layers"].items()}
    assert len(folds) == 15
    for name, fold in folds.items():
        expected = 1 if "self_attn" in name else 4
        if "gate_proj" in name or "up_proj" in name:
            expected = 8
        assert fold == expected
    assert all(row.get("fold", 1) == folds.get(row["name"], 1) for row in report_of(folder))
    for changes in ({"profile": Profile.auto}, {"quant": QuantConfig()}):
        plain = run(source, tmp_path / f"plain {len(changes)} {next(iter(changes))}", **({"quant": quant} | changes))
        assert all(row.get("fold", 1) == 1 for row in report_of(plain))


def report_of(folder):
    return json.loads((folder / "export_report.json").read_text())["layers"]


@pytest.mark.parametrize("tie", [False, True])
def test_a_loaded_model_saves_to_the_same_model(tie, tiny_llama, tmp_path):
    folder = run(tiny_llama(tie_word_embeddings=tie), tmp_path / "out", quant=QuantConfig(embeddings=True))
    model = rans_kernels.load(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(rans_kernels.load(tmp_path / "again")), logits(model))


def test_a_layer_of_one_integer_has_no_words_and_loads(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "zero")
    folder = run(tmp_path / "zero", tmp_path / "out")
    compressed = rans_kernels.load(folder)
    assert compressed.model.layers[0].mlp.up_proj.weight_words.shape == (0, 8)
    assert torch.equal(logits(compressed), logits(fake_quantised(tmp_path / "zero", folder)))


def test_tensors_that_are_not_compressed_are_kept_or_rounded_as_told(tiny_llama, tmp_path):
    source = tiny_llama()
    trained = AutoModelForCausalLM.from_pretrained(source).model.embed_tokens.weight
    kept = rans_kernels.load(run(source, tmp_path / "kept"))
    rounded = rans_kernels.load(run(source, tmp_path / "rounded", dtype="bfloat16"))
    assert torch.equal(kept.model.embed_tokens.weight, trained)
    assert torch.equal(rounded.model.embed_tokens.weight, trained.to(torch.bfloat16))
    assert torch.equal(kept.model.layers[0].mlp.up_proj.weight_int8, rounded.model.layers[0].mlp.up_proj.weight_int8)


def test_greedy_tokens_equal_with_and_without_cache(tiny_llama, tmp_path):
    source = tiny_llama()
    folder = run(source, tmp_path / "out", quant=QuantConfig(bits=4))
    compressed, reference = rans_kernels.load(folder), fake_quantised(source, folder).eval()
    ids = torch.randint(0, 300, (3, 7))
    texts = [
        model.generate(ids, do_sample=False, min_new_tokens=24, max_new_tokens=24, pad_token_id=0, **options)
        for model in (compressed, reference)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_what_a_model_is_loaded_by_names_no_place_on_this_machine(tiny_llama, tmp_path):
    source = tiny_llama()
    config = (run(source, tmp_path / "out") / "config.json").read_text()
    assert str(source) not in config and str(tmp_path) not in config


def test_report_adds_up_and_names_each_layer(tiny_llama, tmp_path):
    folder = run(tiny_llama(), tmp_path / "out", quant=QuantConfig(bits=4, scale=ScaleRule.std, k=0.2))
    report = json.loads((folder / "export_report.json").read_text())
    stored = sum(t.nbytes for t in rans_kernels.load(folder).state_dict().values())
    assert report["summary"]["model_bytes"] == stored
    coded = [row for row in report["layers"] if row["kind"] == "linear"]
    assert len(coded) == 14
    # at k = 0.2 a Gaussian row reaches beyond 7 steps for one weight in six
    assert all(0.1 < row["clipped"] < 0.25 for row in coded)
    assert all(row["bits"] > row["entropy"] > 3 for row in coded)


def test_exported_integers_are_those_of_the_quantiser(tiny_llama, tmp_path):
    source = tiny_llama()
    folder = run(source, tmp_path / "out", quant=QuantConfig(bits=6))
    weights = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    seen = 0
    for name, _, q, scale in iterate_weights(folder):
        w = weights[f"{name}.weight"]
        assert torch.equal(torch.from_numpy(q), (w / scale).round().clamp(-31, 31).to(torch.int8))
        seen += 1
    assert seen == 14


def test_without_rans_kernels_transformers_refuses_the_folder(tiny_llama, tmp_path):
    folder = run(tiny_llama(), tmp_path / "out")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "mismatch" in result.stderr.lower()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere"}, "neither a .ckpt file nor a folder"),
        ({"shard_size": "5 apples"}, "shard_size"),
        ({"shard_size": "-1GB"}, "shard_size"),
        ({"units": 0}, "units is 0"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"probability_bits": 9}, "probability_bits is 9"),
        ({"quant": QuantConfig(bits=9)}, "bits"),
        ({"quant": QuantConfig(include=["nothing"])}, "nothing"),
        ({"quant": QuantConfig(columns=0.5)}, "quant.columns: only training"),
        ({"quant": QuantConfig(scale=ScaleRule.learned, rounding=Rounding.gptq)}, "quant.rounding: only training"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(changes, message, tiny_llama, tmp_path):
    values = {"source": tiny_llama()} | changes
    with pytest.raises((UserError, FormatError), match=message):
        run(output=tmp_path / "out", **values)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told(tiny_llama, tmp_path):
    folder = run(tiny_llama(), tmp_path / "out")
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match="overwrite=true"):
        run(tiny_llama(), tmp_path / "out")
    run(tiny_llama(), tmp_path / "out", overwrite=True, quant=QuantConfig(bits=3))
    assert (folder / "config.json").read_text() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite_are_named(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj"):
        run(tmp_path / "nan", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_errs_stops_the_export(tiny_llama, tmp_path, monkeypatch):
    import qat.export

    real = qat.export.decode_tiles

    def wrong(layout, *args):
        q = real(layout, *args)
        q[0, 0] += 1
        return q

    monkeypatch.setattr(qat.export, "decode_tiles", wrong)
    with pytest.raises(FormatError, match="differ"):
        run(tiny_llama(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tiny_llama, tmp_path):
    source = tiny_llama(hidden_size=256, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=4)
    output = tmp_path / "out"
    command = [sys.executable, "export.py", f"source={source}", f"output={output}"]
    # what runs the tests in the background may have its children ignore Ctrl-C
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(text) for text in ("5GB", "200MB", "1.5kb")] == [5 * 10**9, 200 * 10**6, 1500]


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    import errno

    import rans_kernels.checkpoint
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(rans_kernels.checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        run(tiny_llama(), tmp_path / "out")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_figures_and_folder_go_to_wandb_and_leave_the_folder_as_it_is(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    plain = run(tiny_llama(), tmp_path / "plain")
    assert not (tmp_path / "wandb").exists()
    logged = run(tiny_llama(), tmp_path / "logged", logger=LoggerConfig(artifact=True))
    files = {path.name for path in plain.iterdir()}
    assert {path.name for path in logged.iterdir()} == files
    (offline,) = tmp_path.glob("wandb/offline-run-*")
    assert {path.name for path in (offline / "artifact").iterdir()} == files
    rans_kernels.load(offline / "artifact")
    (table,) = offline.glob("files/media/table/layers_*.table.json")
    layers = json.loads((logged / "export_report.json").read_text())["layers"]
    assert len(json.loads(table.read_text())["data"]) == sum(row["kind"] != "plain" for row in layers)
