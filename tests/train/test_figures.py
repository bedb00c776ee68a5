"""What a run reports beside its losses: layers, generated text, the model itself; and that nothing of it is felt."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.checkpoint import load_fake_quant, read_checkpoint
from qat.config import LoggerMode, TrainConfig
from qat.data import load_tokens, spread_prompts
from qat.divergence import first_divergence
from qat.errors import UserError
from qat.inference import generate_greedy
from qat.lit import build
from qat.lit.loggers import StepFile
from qat.model import load_model, load_tokenizer

MakeConfig = Callable[[], TrainConfig]
MakeRateConfig = Callable[..., TrainConfig]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B as a process without network finds it."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    # where it stages tables
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    yield


@pytest.fixture
def reported(make_rate_config: MakeRateConfig, offline: None) -> Path:
    """Folder of a run that reports all there is."""
    config = make_rate_config(4)
    config.logger.mode, config.logger.artifact = LoggerMode.offline, True
    return build.train(config)


def test_a_run_that_reports_everything_ends_as_one_that_reports_nothing(
    make_rate_config: MakeRateConfig, reported: Path
) -> None:
    config = make_rate_config(4)
    config.name, config.data.valid_prompts, config.logger.layers = "silent", 0, False
    silent = build.train(config)
    assert not (silent / "layers.jsonl").exists() and not (silent / "wandb").exists()
    states = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (reported, silent))
    a, b = (state["state_dict"] for state in states)
    assert all(torch.equal(a[key], b[key]) for key in a)
    extra = {"tokens/s", "val/first_divergence", "val/identical"}
    one, other = (
        [{key: line[key] for key in line.keys() - extra} for line in read(folder, "metrics.jsonl")]
        for folder in (reported, silent)
    )
    assert one == other


def test_the_table_adds_up_to_the_metrics(reported: Path) -> None:
    metrics = {line["step"]: line for line in read(reported, "metrics.jsonl")}
    rows = read(reported, "layers.jsonl")
    assert sorted({row["step"] for row in rows}) == [2, 4]
    for step in (2, 4):
        table = [row for row in rows if row["step"] == step]
        assert len({row["name"] for row in table}) == len(table) == 14
        weights = [row["weights"] for row in table]
        for key, metric in {"entropy": "rate/entropy", "bits": "rate/container"}.items():
            mean = np.average([row[key] for row in table], weights=weights)
            assert mean == pytest.approx(metrics[step][metric], abs=1e-9)
        for row in table:
            assert math.prod(row["shape"]) == row["weights"] == sum(row["counts"])
            shares = np.array([count for count in row["counts"] if count]) / row["weights"]
            assert row["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())
            assert row["scale_p05"] <= row["scale_p50"] <= row["scale_p95"]


def test_an_offline_run_holds_table_histograms_and_model(reported: Path, wandb_log: Callable[[Path], bytes]) -> None:
    (run,) = reported.glob("wandb/offline-run-*")
    tables = sorted(run.glob("files/media/table/layers_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[-1].read_text())
    names = {row["name"] for row in read(reported, "layers.jsonl")}
    assert {row[table["columns"].index("name")] for row in table["data"]} == names
    log = wandb_log(run)
    assert all(f"integers/{name}".encode() in log for name in names)
    assert b"artifact/checkpoints/" in log and b"hf/config.json" in log
    # a later run may replace the checkpoint in its folder, and the artifact can be used like a run
    (checkpoint,) = (run / "artifact" / "checkpoints").iterdir()
    assert checkpoint.read_bytes() == (reported / "checkpoints" / checkpoint.name).read_bytes()
    load_fake_quant(checkpoint)
    step = read_checkpoint(reported / "checkpoints" / checkpoint.name).step
    (bits,) = [line["rate/container"] for line in read(reported, "metrics.jsonl") if line["step"] == step]
    assert f'"bits":{bits},"ratio":{16 / bits},"step":{step}'.encode() in log


def generated(config: TrainConfig, model: Any) -> torch.Tensor:
    data = config.data
    tokens = load_tokens(data.valid, load_tokenizer(config.model.path), config.paths.cache)
    return generate_greedy(model, spread_prompts(tokens, data.valid_prompts, data.prompt_tokens), data.new_tokens)[0]


def test_divergence_is_that_of_the_two_models_generated_text(make_config: MakeConfig) -> None:
    config = make_config()
    config.data.valid_prompts, config.data.prompt_tokens, config.data.new_tokens = 5, 7, 12
    folder = build.train(config)
    last = read(folder, "metrics.jsonl")[-1]
    student, teacher = load_fake_quant(folder / "checkpoints" / "last.ckpt"), load_model(config.model.path)
    first = first_divergence(generated(config, teacher), generated(config, student)).double()
    assert last["val/first_divergence"] == first.mean().item() < 12
    assert last["val/identical"] == (first == 12).double().mean().item()


def test_a_model_never_diverges_from_itself(make_config: MakeConfig) -> None:
    config = make_config()
    config.quant.enabled, config.optim.lr, config.trainer.max_steps = False, 0.0, 2
    folder = build.train(config)
    last = read(folder, "metrics.jsonl")[-1]
    assert last["val/first_divergence"] == config.data.new_tokens
    assert last["val/identical"] == last["val/top1"] == 1
    # without quantised layers there is no table
    assert not (folder / "layers.jsonl").exists()


@pytest.mark.parametrize("off", ["teacher", "prompts"])
def test_nothing_is_generated_without_teacher_or_prompts(make_config: MakeConfig, off: str) -> None:
    config = make_config()
    config.trainer.max_steps, config.quant.start_step = 2, 0
    if off == "teacher":
        config.loss.kl, config.loss.ce = 0.0, 1.0
    else:
        config.data.valid_prompts = 0
    last = read(build.train(config), "metrics.jsonl")[-1]
    assert "val/ce" in last and not {"val/first_divergence", "val/identical"} & set(last)


@pytest.mark.parametrize(
    ("key", "value"), [("valid_prompts", -1), ("prompt_tokens", 0), ("new_tokens", 0), ("new_tokens", 33)]
)
def test_prompts_that_mean_nothing_or_do_not_fit_are_refused(make_config: MakeConfig, key: str, value: int) -> None:
    config = make_config()
    setattr(config.data, key, value)
    with pytest.raises(UserError, match=f"data.{key}={value}"):
        build.train(config)


def test_a_text_shorter_than_a_prompt_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    (tmp_path / "short.txt").write_text("abcdefgh")
    config.data.valid, config.data.seq_len, config.data.prompt_tokens = str(tmp_path / "short.txt"), 2, 30
    with pytest.raises(UserError, match="data.prompt_tokens=30"):
        build.train(config)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_file_that_is_gone_on_with_has_no_step_twice(tmp_path: Path, step: int) -> None:
    path = tmp_path / "file.jsonl"
    first = StepFile(path)
    for number in (1, 2, 3):
        first.append([{"step": number, "run": 1}] * 2)
    with open(path, "a") as file:
        file.write('{"step": 4, "ru')
    second = StepFile(path)
    second.append([{"step": step, "run": 2}])
    second.append([{"step": 5, "run": 2}])
    old = [{"step": number, "run": 1} for number in (1, 2, 3) if number < step for _ in range(2)]
    assert read(tmp_path, "file.jsonl") == [*old, {"step": step, "run": 2}, {"step": 5, "run": 2}]
