"""Every YAML composes into its dataclass, and every mistake is one line that names it."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from qat.cli import CONFIG_DIR, compose, entry_point
from qat.config import (
    EvalConfig,
    ExportConfig,
    ScaleRule,
    TrainConfig,
    from_plain,
    to_plain,
)
from qat.errors import UserError

GIVEN = ["model.path=m", "data.train=t", "data.valid=v"]
GROUPS = ["model", "data", "quant", "loss", "rate", "optim", "trainer", "logger", "paths"]
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONFIG_DIR / group).glob("*.yaml"))]


def run_cli(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, root: str = "train", task: Any = None
) -> tuple[int, list[Any]]:
    """The exit code, and the configs that reached the task."""
    seen: list[Any] = []
    monkeypatch.setattr(sys, "argv", [f"{root}.py", *arguments])
    monkeypatch.chdir(tmp_path)
    # entry_point sets both
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with pytest.raises(SystemExit) as stop:
        entry_point(root, task or seen.append)
    GlobalHydra.instance().clear()
    return int(stop.value.code or 0), seen


def test_every_group_has_its_files() -> None:
    assert {group for group, _ in CHOICES} == set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes(group: str, choice: str) -> None:
    config = compose("train", f"{group}={choice}", *GIVEN)
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize("experiment", [path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")])
def test_every_experiment_composes_under_its_own_name(experiment: str) -> None:
    config = compose("train", f"experiment={experiment}", *GIVEN)
    assert config.name == experiment


def test_experiments_change_what_they_say() -> None:
    config = compose("train", "experiment=bookllama_qat", *GIVEN)
    assert (config.quant.scale, config.quant.k) == (ScaleRule.std, 0.522)
    assert (config.trainer.max_steps, config.data.batch_size, config.data.seq_len) == (600, 64, 512)
    assert (config.loss.kl, config.loss.ce, config.optim.lr) == (1.0, 0.0, 5e-4)
    assert not (config.quant.embeddings or config.quant.lm_head)
    tiny = compose("train", "experiment=tinyllama_qat")
    assert (tiny.data.seq_len, tiny.model.gradient_checkpointing) == (2048, True)
    assert compose("train", "experiment=tinyllama_qat", "model.path=here").model.path == "here"


def test_the_other_roots_compose() -> None:
    assert isinstance(compose("export", "source=s", "output=o"), ExportConfig)
    assert isinstance(compose("eval", "compressed=c", "output=o"), EvalConfig)


@pytest.mark.parametrize("root", ["train", "export", "eval"])
def test_plain_data_goes_there_and_back(root: str) -> None:
    given = {"train": GIVEN, "export": ["source=s", "output=o"], "eval": ["compressed=c", "output=o"]}
    config = compose(root, *given[root])
    plain = to_plain(config)
    assert from_plain(type(config), plain) == config
    leaves = [value for group in plain.values() for value in (group.values() if isinstance(group, dict) else [group])]
    assert {type(leaf) for leaf in leaves} <= {str, int, float, bool, list, type(None)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quant.bitz=8"], ["quant.bitz"]),
        (["+quant.bitz=8"], ["quant.bitz"]),
        (["lr=1"], ["lr"]),
        (["data.batch_size=many"], ["data.batch_size", "many", "Integer"]),
        (["trainer.max_steps=1.5"], ["trainer.max_steps", "1.5"]),
        (["quant.scale=median"], ["quant.scale", "median", "absmax", "std", "learned"]),
        (["quant.include=3"], ["quant.include"]),
        (["experiment=nope"], ["experiment/nope", "bookllama_qat, bookllama_rate, debug"]),
        (["quant=nope"], ["quant/nope", "int8, learned, none"]),
        (["rate.target_bit=3"], ["rate.target_bit"]),
        (["rate.target_bits=few"], ["rate.target_bits", "few"]),
        (["rate.price=entropy"], ["rate.price", "entropy", "none", "table", "prior"]),
        (["rate=nope"], ["rate/nope", "none, prior"]),
        (["model.path"], ["model.path"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    code, seen = run_cli(monkeypatch, tmp_path, *GIVEN, *arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert (code, seen) == (2, [])
    assert line.startswith("error: ")
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("quant: {bitz: 3}", ["mine", "quant.bitz"]),
        ("quant: {bits: some}", ["mine", "quant.bits", "some"]),
        ("defaults: [{override /quant: nope}]", ["quant/nope"]),
        ("quant: {bits: [3", ["mine.yaml", "line"]),
    ],
)
def test_a_mistake_in_an_experiment_of_the_users_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], yaml: str, words: list[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml}\n")
    code, seen = run_cli(monkeypatch, tmp_path, "--config-dir", str(tmp_path), "experiment=mine", *GIVEN)
    (line,) = capfd.readouterr().err.splitlines()
    assert (code, seen) == (2, [])
    assert all(word in line for word in words)


def test_values_that_are_not_given_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, seen = run_cli(monkeypatch, tmp_path, "data.train=t", "data.valid=v")
    assert (code, seen) == (2, [])
    assert capfd.readouterr().err == "error: no value given for: model.path (give it as model.path=...)\n"


def test_a_users_mistake_found_by_the_task_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def task(config: TrainConfig) -> None:
        raise UserError("no model at m")

    code, _ = run_cli(monkeypatch, tmp_path, *GIVEN, task=task)
    assert code == 2
    assert capfd.readouterr().err == "error: no model at m\n"


def test_ctrl_c_is_exit_code_130_with_its_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def task(config: TrainConfig) -> None:
        raise KeyboardInterrupt("add trainer.resume=x")

    code, _ = run_cli(monkeypatch, tmp_path, *GIVEN, task=task)
    assert code == 130
    assert capfd.readouterr().err.split() == ["add", "trainer.resume=x"]


def test_an_error_that_is_no_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def task(config: TrainConfig) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["train.py", *GIVEN])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(ZeroDivisionError):
        entry_point("train", task)
    GlobalHydra.instance().clear()


def test_a_sweep_runs_every_job_though_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ks: list[float] = []

    def task(config: TrainConfig) -> None:
        ks.append(config.quant.k)
        if config.quant.k == 0.5:
            raise UserError("bad luck")

    code, _ = run_cli(monkeypatch, tmp_path, "-m", "quant.k=0.25,0.5,1.0", *GIVEN, task=task)
    assert (code, ks) == (2, [0.25, 0.5, 1.0])
    assert capfd.readouterr().err == "error: bad luck\n"


@pytest.mark.parametrize("root", ["train", "export", "eval"])
def test_help_names_every_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], root: str
) -> None:
    code, seen = run_cli(monkeypatch, tmp_path, "--help", root=root)
    text = capfd.readouterr().out
    assert (code, seen) == (0, [])
    assert text.count(f"python {root}") == 3
    lines = [line.strip() for line in text.splitlines()]
    for group in {"train": GROUPS, "export": ["quant"], "eval": ["logger", "paths"]}[root]:
        (line,) = [line for line in lines if line.startswith(f"{group}: ")]
        assert all(choice in line for g, choice in CHOICES if g == group)
