"""The `codecllm` command line: what its commands show is what the folder holds, and every mistake is one line."""

import errno
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rans_kernels
import rans_kernels.checkpoint
import rans_kernels.hf
import torch
from rans_kernels.checkpoint import shard_of
from rans_kernels.errors import DeviceError
from rans_kernels.placement import BudgetError, place
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qat.cli import exit_code
from qat.commands import COMMANDS, main
from qat.config import ExportConfig, Granularity, Lossless, Profile, QuantConfig
from qat.export import export
from qat.inference import generate_greedy
from qat.model import load_model, load_tokenizer

LAYER = "model.layers.0.mlp.up_proj"
PROMPT = "the 3 quick foxes"


@pytest.fixture(scope="session")
def source(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="session")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embedding and head, biases, several shards."""
    output = tmp_path_factory.mktemp("exported") / "model"
    quant = QuantConfig(bits=5, embeddings=True)
    config = ExportConfig(str(source), str(output), quant=quant, shard_size="30KB", progress_bar=False)
    return export(config)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture
def codecllm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, words)))
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def mistake(codecllm: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command line that must end with exit code 2 and one line, and gives the line."""

    def call(*words: object) -> str:
        code, out, err = codecllm(*words)
        (line,) = [line for line in err.splitlines() if "━" not in line]
        assert (code, out) == (2, "")
        assert line.startswith("error: ")
        return line

    return call


def edit_config(folder: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data["quantization_config"])
    (folder / "config.json").write_text(json.dumps(data))


def edit_shard(folder: Path, of: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of the shard that has the tensor `of`; the index follows."""
    shard = shard_of(folder)[of]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    others = {name: file for name, file in data["weight_map"].items() if file != shard.name}
    data["weight_map"] = others | dict.fromkeys(tensors, shard.name)
    index.write_text(json.dumps(data))


def flip(folder: Path, name: str) -> None:
    """Flip a bit in the middle of a tensor."""
    shard = shard_of(folder)[name]
    data = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + sum(json.loads(data[8:header])[name]["data_offsets"]) // 2] ^= 1
    shard.write_bytes(data)


def cut(folder: Path) -> None:
    shard = shard_of(folder)[f"{LAYER}.weight"]
    shard.write_bytes(shard.read_bytes()[:-100])


def forget(folder: Path) -> None:
    """The index no longer lists a tensor."""
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))


def spoil(folder: Path) -> None:
    """Words that end in no start state, with checksums that fit them."""
    name = f"{LAYER}.weight_words"
    edit_shard(folder, name, lambda tensors: tensors[name].zero_())
    sums = {"weight_words": rans_kernels.format.crc32(load_file(shard_of(folder)[name])[name].numpy())}
    edit_config(folder, lambda q: q["layers"][LAYER]["crc32"].update(sums))


NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
HEADERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (shutil.rmtree, ["is no folder", "give one"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json", "copy it again"]),
    "config cut": (lambda f: (f / "config.json").write_text('{"a": '), ["config.json is damaged", "copy it again"]),
    "config no table": (lambda f: (f / "config.json").write_text("[]"), ["not a compressed model"]),
    "block no table": (
        lambda f: (f / "config.json").write_text('{"quantization_config": 3}'),
        ["not a compressed model"],
    ),
    "layers no table": (lambda f: edit_config(f, lambda q: q.update(layers=[1])), ["layers", "is damaged"]),
    "newer version": (lambda f: edit_config(f, lambda q: q.update(format_version=9)), ["version is 9", "install"]),
    "older version": (lambda f: edit_config(f, lambda q: q.update(format_version=1)), ["version is 1", "install"]),
    "other method": (lambda f: edit_config(f, lambda q: q.update(quant_method="gptq")), ["gptq"]),
    "entry damaged": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].pop("units")), [LAYER, "units"]),
    "tied to nothing": (lambda f: edit_config(f, lambda q: q["tied"].update(lm_head=LAYER)), ["lm_head is tied"]),
    "shard lost": (lambda f: shard_of(f)[NORM].unlink(), ["lacks model-000", "copy the whole folder again"]),
    "shard cut": (cut, ["damaged or truncated", "copy it again"]),
    "stray shard": (lambda f: shutil.copy(shard_of(f)[NORM], f / "model.safetensors"), ["not in the index", "remove"]),
    "index cut": (lambda f: (f / INDEX).write_text("{"), [f"{INDEX} is damaged"]),
    "index lacks a tensor": (forget, ["unlike the index", NORM, "copy"]),
    "tensor of a layer lost": (
        lambda f: edit_shard(f, f"{LAYER}.weight", lambda t: t.pop(f"{LAYER}.weight_freqs")),
        [f"{LAYER}.weight_freqs is missing", "copy or export"],
    ),
}
WEIGHTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "byte altered": (
        lambda f: flip(f, f"{LAYER}.weight_words"),
        [f"{LAYER}.weight_words is altered", "copy or export"],
    ),
    "byte of a plain tensor altered": (lambda f: flip(f, NORM), [f"{NORM} is altered", "copy or export"]),
    "scale altered": (lambda f: flip(f, f"{LAYER}.weight_scale"), [f"{LAYER}.weight_scale is altered"]),
    "tile damaged": (spoil, [LAYER, "tile 0 is damaged"]),
    "plain tensor lost": (lambda f: edit_shard(f, NORM, lambda t: t.pop(NORM)), [f"missing {NORM}", "copy or export"]),
    "plain tensor unknown": (
        lambda f: edit_shard(f, NORM, lambda t: t.update(more=torch.zeros(3))),
        ["unexpected more", "copy or export"],
    ),
    "plain tensor of another shape": (
        lambda f: edit_shard(f, NORM, lambda t: t.update({NORM: torch.ones(3)})),
        [f"{NORM}", "mismatched"],
    ),
    "shape altered": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].update(shape=[80, 47])), [LAYER]),
    "rows altered": (lambda f: edit_config(f, lambda q: q["layers"][LAYER].update(word_rows=3)), [LAYER, "expected"]),
    "layer not listed": (lambda f: edit_config(f, lambda q: q["layers"].pop(LAYER)), [LAYER]),
    "head no longer tied": (lambda f: edit_config(f, lambda q: q.update(tied={})), ["missing lm_head.weight"]),
    "unknown architecture": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"llama"', '"lama"')),
        ["lama"],
    ),
}


@pytest.mark.parametrize("damage", HEADERS, ids=lambda d: d.replace(" ", "-"))
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_headers_tell_of_damage_is_one_line(
    command: str, damage: str, folder: Path, mistake: Callable[..., str]
) -> None:
    change, words = HEADERS[damage]
    change(folder)
    line = mistake(command, folder)
    assert all(word in line for word in words)


@pytest.mark.parametrize("damage", WEIGHTS, ids=lambda d: d.replace(" ", "-"))
def test_verify_finds_what_weights_and_architecture_tell(
    damage: str, folder: Path, mistake: Callable[..., str]
) -> None:
    change, words = WEIGHTS[damage]
    change(folder)
    line = mistake("verify", folder)
    assert all(word in line for word in words)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_plain_model_is_no_compressed_one(command: str, source: Path, mistake: Callable[..., str]) -> None:
    assert "not a compressed model" in mistake(command, source)


def test_verify_counts_what_is_whole(exported: Path, codecllm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = codecllm("verify", exported, "--workers", "1")
    entries = json.loads((exported / "config.json").read_text())["quantization_config"]["layers"]
    weights = sum(np.prod(entry["shape"]) for entry in entries.values())
    plain = len(shard_of(exported)) - 5 * len(entries)
    assert code == 0
    (line,) = out.splitlines()
    assert f"15 compressed modules of {weights:,} weights" in line
    assert f"{plain} other tensors" in line


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"tie_word_embeddings": True, "dtype": "bfloat16"}, {"lossless": Lossless.embeddings}),
        ({"tie_word_embeddings": True, "dtype": "bfloat16"}, {"lossless": Lossless.all, "quant": QuantConfig(False)}),
        ({"mlp_bias": True}, {"quant": QuantConfig(lm_head=True)}),
        ({"hidden_size": 64, "vocab_size": 320}, {"quant": QuantConfig(granularity=Granularity.per_tensor)}),
        ({}, {"quant": QuantConfig(granularity=Granularity.per_group, group_size=32), "profile": Profile.auto}),
    ],
    ids=["tied, plain", "tied, lossless", "all lossless", "head and biases", "folded", "groups"],
)
def test_whatever_export_writes_is_whole(
    model: dict[str, Any],
    settings: dict[str, Any],
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    codecllm: Callable[..., tuple[int, str, str]],
) -> None:
    config = ExportConfig(str(tiny_llama(**model)), str(tmp_path / "out"), progress_bar=False, **settings)
    assert codecllm("verify", export(config))[0] == 0


def test_verify_cannot_see_altered_bytes_of_plain_tensors_without_checksums(
    folder: Path, codecllm: Callable[..., tuple[int, str, str]]
) -> None:
    # docs/cli.md says so
    flip(folder, NORM)
    edit_config(folder, lambda q: q.pop("crc32"))
    assert codecllm("verify", folder)[0] == 0


def test_a_model_that_was_loaded_and_saved_again_is_whole(
    exported: Path, tmp_path: Path, codecllm: Callable[..., tuple[int, str, str]]
) -> None:
    rans_kernels.load(exported, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    assert codecllm("verify", tmp_path / "again")[0] == 0
    code, out, _ = codecllm("inspect", tmp_path / "again", "--json")
    assert code == 0
    # of which only export's report knows
    assert {row["entropy"] for row in json.loads(out)["modules"]} == {None}


def test_ctrl_c_during_verify_is_exit_code_130(
    exported: Path, codecllm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rans_kernels.checkpoint, "decode_tiles", interrupt)
    code, out, err = codecllm("verify", exported)
    assert (code, out) == (130, "")
    assert err.endswith("\ninterrupted\n")
    assert "Traceback" not in err


def test_inspect_tells_what_export_reported(exported: Path, codecllm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = codecllm("inspect", exported, "--json")
    found, report = json.loads(out), json.loads((exported / "export_report.json").read_text())
    assert code == 0
    rows = {row["name"]: row for row in report["layers"]}
    for row in found["modules"]:
        assert row.items() <= rows.pop(row["name"]).items()
    assert {row["name"]: row["bytes"] for row in found["plain"]} == {name: row["bytes"] for name, row in rows.items()}
    shared = report["summary"].keys() & found["summary"].keys()
    assert {"bits", "ratio", "model_bytes", "fp16_bytes", "profile"} <= shared
    assert all(report["summary"][key] == found["summary"][key] for key in shared)
    assert found["summary"]["tied"] == {"lm_head": "model.embed_tokens"}


def test_inspect_reads_no_weights(folder: Path, codecllm: Callable[..., tuple[int, str, str]]) -> None:
    before = codecllm("inspect", folder, "--json")[1]
    for shard in folder.glob("*.safetensors"):
        data = shard.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        shard.write_bytes(data[:header] + bytes(len(data) - header))
    assert codecllm("inspect", folder, "--json")[1] == before


def test_inspect_shows_every_module_and_the_totals(
    exported: Path, codecllm: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = codecllm("inspect", exported)
    found = json.loads(codecllm("inspect", exported, "--json")[1])
    assert code == 0
    assert all(row["name"] in out for row in found["modules"])
    assert f"{found['summary']['bits']:.3f} bits" in out
    assert "format 3, profile compact" in out


def test_compress_writes_what_export_writes(
    source: Path, exported: Path, tmp_path: Path, codecllm: Callable[..., tuple[int, str, str]]
) -> None:
    # characters that mean something to hydra, too
    output = tmp_path / "a=b, {c} [d] 'e' ${f}"
    words = ["--profile", "compact", "--workers", "1", "--set", "quant.bits=5", "--set", "quant.embeddings=true"]
    assert codecllm("compress", source, output, *words, "--set", "shard_size=30KB")[0] == 0
    names = {path.name for path in exported.iterdir()}
    assert {path.name for path in output.iterdir()} == names
    # the model card calls the folder by its name
    for name in names - {"export_report.json", "README.md"}:
        assert (output / name).read_bytes() == (exported / name).read_bytes()


def test_compress_without_loss_gives_the_same_text(
    tiny_llama: Callable[..., Path], tmp_path: Path, codecllm: Callable[..., tuple[int, str, str]]
) -> None:
    source = tiny_llama(dtype="bfloat16")
    assert codecllm("compress", source, tmp_path / "exact", "--lossless", "all", "--set", "quant=none")[0] == 0
    assert codecllm("verify", tmp_path / "exact")[0] == 0
    texts = [codecllm("generate", model, "--prompt", PROMPT, "--tokens", 12) for model in (source, tmp_path / "exact")]
    assert texts[0][:2] == texts[1][:2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "out"], ["source=nowhere", "neither"]),
        (["{exported}", "out"], ["quantised already"]),
        (["{source}", "{exported}"], ["exists", "--overwrite"]),
        (["{source}", "{source}", "--overwrite"], ["holds the source"]),
        (["{source}", ".", "--overwrite"], ["is no model"]),
        (["{source}", "out", "--profile", "tiny"], ["--profile", "compact", "--help"]),
        (["{source}", "out", "--workers", "0"], ["--workers", "from 1"]),
        (["{source}", "out", "--dtype", "int8"], ["dtype=int8"]),
        (["{source}", "out", "--set", "quant.bitz=3"], ["quant.bitz"]),
        (["{source}"], ["OUTPUT"]),
    ],
)
def test_mistakes_of_compress_are_one_line_and_cost_nothing(
    words: list[str],
    message: list[str],
    source: Path,
    exported: Path,
    tmp_path: Path,
    mistake: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in (*source.iterdir(), *exported.iterdir())}
    line = mistake("compress", *(word.format(source=source, exported=exported) for word in words))
    assert all(word in line for word in message)
    assert list(tmp_path.iterdir()) == []
    assert {path: path.read_bytes() for path in (*source.iterdir(), *exported.iterdir())} == before


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_keeps_the_old_folder(
    error: Exception, source: Path, folder: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise error

    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr(rans_kernels.checkpoint, "save_file", full)
    assert "No space left" in mistake("compress", source, folder, "--overwrite")
    assert (folder / "config.json").read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["compressed", "plain"])
def test_generate_prints_the_models_greedy_text(
    kind: str, exported: Path, source: Path, codecllm: Callable[..., tuple[int, str, str]]
) -> None:
    path = exported if kind == "compressed" else source
    model = rans_kernels.load(exported, dtype=torch.float32) if kind == "compressed" else load_model(source)
    tokenizer: Any = load_tokenizer(path)
    (tokens,), _ = generate_greedy(model, tokenizer(PROMPT, return_tensors="pt")["input_ids"], 20)
    until = tokens.tolist().index(0) if 0 in tokens else len(tokens)
    expected = tokenizer.decode(tokens[:until])
    assert codecllm("generate", path, "--prompt", PROMPT, "--tokens", 20) == (0, f"{expected}\n", "")
    with pytest.raises(BudgetError) as error:
        place(model, 1e-9, torch.device("cpu"), 3)
    for offload in ("host", "disk"):
        words = ("--prompt", PROMPT, "--tokens", 20, "--device", "cpu", "--offload", offload)
        words = (*words, "--budget", error.value.least / 1e9)
        assert codecllm("generate", path, *words) == (0, f"{expected}\n", "")


def test_generate_reads_standard_input_and_repeats_a_seed(
    exported: Path, codecllm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(seed: int, prompt: str = PROMPT) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
        words = ("--tokens", 16, "--temperature", 1.5, "--top-p", 0.95, "--seed", seed)
        code, out, _ = codecllm("generate", exported, "--prompt", prompt, *words)
        assert code == 0
        return out

    assert sample(1) == sample(1, "-")
    assert sample(1) != sample(2)
    greedy = codecllm("generate", exported, "--prompt", PROMPT, "--tokens", 16)
    assert codecllm("generate", exported, "--prompt", PROMPT, "--tokens", 16, "--temperature", 0) == greedy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], ["prompt is empty", "--prompt"]),
        (["--prompt", "\udcff"], ["no UTF-8"]),
        ([], ["--prompt"]),
        (["--prompt", "a", "--tokens", "0"], ["--tokens", "from 1"]),
        (["--prompt", "a", "--tokens", "128"], ["128 positions", "--tokens 127 or less"]),
        (["--prompt", "a " * 200], ["128 positions", "shorter prompt"]),
        (["--prompt", "a", "--temperature", "-1"], ["--temperature -1"]),
        (["--prompt", "a", "--temperature", "nan"], ["--temperature nan"]),
        (["--prompt", "a", "--top-p", "0"], ["--top-p 0"]),
        (["--prompt", "a", "--device", "tpu9"], ["device=tpu9", "auto"]),
        (["--prompt", "a", "--dtype", "int8"], ["dtype=int8", "bfloat16"]),
        (["--prompt", "a", "--budget", "none"], ["--budget", "GB above 0"]),
        (["--prompt", "a", "--budget", "1e-6"], ["budget of 1e-06 GB is too small", "give that or more"]),
    ],
)
def test_mistakes_of_generate_are_one_line(
    words: list[str], message: list[str], exported: Path, mistake: Callable[..., str]
) -> None:
    line = mistake("generate", exported, *words)
    assert all(word in line for word in message)


def test_generate_says_what_a_folder_lacks(folder: Path, mistake: Callable[..., str]) -> None:
    flip(folder, f"{LAYER}.weight")
    assert "altered" in mistake("generate", folder, "--prompt", "a")
    shutil.copy(folder / "config.json", folder / "kept")
    (folder / "config.json").write_text("{")
    line = mistake("generate", folder, "--prompt", "a")
    assert "config" in line and "JSON" in line
    (folder / "kept").rename(folder / "config.json")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "copy tokenizer.json" in mistake("generate", folder, "--prompt", "a")
    assert "no folder" in mistake("generate", folder / "nowhere", "--prompt", "a")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB"),
            ["2.00 GiB", "free"],
        ),
        (MemoryError(), ["too little memory"]),
        (DeviceError("an old GPU: use the CPU"), ["an old GPU"]),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(
    error: Exception, words: list[str], exported: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(rans_kernels.hf, "load", fail)
    line = mistake("generate", exported, "--prompt", "a")
    assert all(word in line for word in words)


def test_memory_that_the_machine_does_not_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: torch.empty(1 << 60, dtype=torch.uint8)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: too little memory: ") and "allocate" in line
    with pytest.raises(RuntimeError, match="of no user"):
        exit_code(lambda: fail_with(RuntimeError("of no user")))


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(exported: Path, mistake: Callable[..., str]) -> None:
    assert "device=cuda is not there" in mistake("generate", exported, "--prompt", "a", "--device", "cuda")


@pytest.mark.parametrize(
    ("word", "message"),
    [("compressed=nowhere", "nowhere is not a compressed model"), ("compresed=nowhere", "'compresed'")],
)
@pytest.mark.parametrize("program", ["consistency", "lm-eval"])
def test_eval_hands_its_words_over(
    program: str, word: str, message: str, tmp_path: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    assert message in mistake("eval", program, word, "output=reports")


@pytest.mark.parametrize(("passed", "code"), [(False, 3), (True, 0), (None, 0)])
@pytest.mark.parametrize("program", ["consistency", "lm-eval"])
def test_a_broken_promise_has_an_exit_code_of_its_own(
    program: str,
    passed: bool | None,
    code: int,
    tmp_path: Path,
    codecllm: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import eval.consistency
    import eval.harness

    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    for module, function in ((eval.consistency, "consistency"), (eval.harness, "harness")):
        monkeypatch.setattr(module, function, lambda config: {"passed": passed})
    found, _, err = codecllm("eval", program, "compressed=a", "output=reports")
    assert found == code
    assert err.startswith("failed: the compressed model") == (code == 3) and err.count("\n") == (code == 3)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, codecllm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = codecllm(command, "--help")
    assert code == 0
    assert f"\n  codecllm {command} " in out
    assert command in codecllm("--help")[1]


def test_help_needs_no_torch() -> None:
    code = "import sys, qat.commands; qat.commands.make_parser(); print({'torch', 'hydra', 'numba'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_reader_that_has_enough_gets_no_traceback(exported: Path) -> None:
    command = [sys.executable, "-m", "qat.commands", "inspect", str(exported), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
