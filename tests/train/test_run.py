"""Whole runs: what they leave behind, and that stopping and going on changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from transformers import AutoTokenizer

from qat.checkpoint import load_fake_quant, read_checkpoint
from qat.cli import CONFIG_DIR, run_dir
from qat.config import (
    Hold,
    LoggerMode,
    Profile,
    QuantConfig,
    RatePrice,
    Rounding,
    TrainConfig,
    register_schemas,
    to_plain,
)
from qat.errors import UserError
from qat.lit import build
from qat.lit.callbacks import Checkpoints
from qat.lit.module import QATModule

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CLOCK = ("tokens/s", "start/seconds")
MakeConfig = Callable[[], TrainConfig]


class Crash(Exception):
    """Stands for a power cut."""


def run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch | None = None, after: int = -1, do: Any = None) -> Path:
    """Train; call `do` when micro-batch `after` is done."""
    if monkeypatch is None:
        return build.train(config)

    class Intrude(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx == after:
                do()

    original = build.build_trainer

    def with_intruder(config: TrainConfig, folder: Path) -> pl.Trainer:
        trainer = original(config, folder)
        trainer.callbacks.append(Intrude())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(build, "build_trainer", with_intruder)
        return build.train(config)


def command(config: TrainConfig) -> list[str]:
    """train.py with every value of `config`."""
    plain = to_plain(config)
    groups = [(group, values) for group, values in plain.items() if isinstance(values, dict)]
    overrides = [f"{group}.{key}={json.dumps(value)}" for group, values in groups for key, value in values.items()]
    return [sys.executable, str(CONFIG_DIR.parent / "train.py"), f"name={config.name}", *overrides]


def crash() -> None:
    raise Crash


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """By step, of which each has one line, without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: {k: v for k, v in line.items() if k not in CLOCK} for line in lines}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimiser, schedule and callbacks equal to the bit, best and last; metrics and figures of layers too."""
    for name in ("last", "best"):
        a, b = state(one, name), state(other, name)
        assert a["global_step"] == b["global_step"]
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
            assert_same(a[key], b[key])
    assert metrics(one) == metrics(other)
    assert (one / "layers.jsonl").read_bytes() == (other / "layers.jsonl").read_bytes()


# mid-accumulation, after a step, before and after a validation, before quantisation starts
@pytest.mark.parametrize("micro_batch", [2, 3, 4, 7, 8, 11])
def test_a_crashed_and_resumed_run_ends_as_the_unbroken_one(
    make_config: MakeConfig, unbroken: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    config = make_config()
    with pytest.raises(Crash):
        run(config, monkeypatch, micro_batch, crash)
    (folder,) = Path(config.paths.output_root, "tiny").glob("2*")
    assert state(folder)["global_step"] == micro_batch // 2
    config = make_config()
    # by way of `latest`, as a user would
    config.trainer.resume = str(folder.parent / "latest" / "checkpoints" / "last.ckpt")
    assert run(config) == folder
    assert_same_end(folder, unbroken)


# with a target, noise, frozen integers: before and after the freeze at step 8, with and without a histogram
@pytest.mark.parametrize("price", [RatePrice.table, RatePrice.prior])
@pytest.mark.parametrize("embedding_bits", [None, 7.0])
@pytest.mark.parametrize("micro_batch", [3, 10, 15, 20])
def test_a_resumed_run_with_a_rate_ends_as_the_unbroken_one(
    make_rate_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    price: RatePrice,
    embedding_bits: float | None,
    micro_batch: int,
) -> None:
    rate = {"price": price, "target_bits": 12.0, "embedding_bits": embedding_bits, "freeze": 0.34, "every": 3}
    if price is RatePrice.prior:
        rate |= {"hold": Hold.steps, "weight": None, "lead": 0.5}
    elif embedding_bits is not None:
        rate |= {"profile": Profile.fast, "fit": True}

    def prepared(name: str) -> TrainConfig:
        config = make_rate_config(12, **rate)
        config.name, config.quant.embeddings = name, embedding_bits is not None
        config.optim.anchor, config.data.noise = 5.0, 0.2
        return config

    unbroken = build.train(prepared("unbroken"))
    with pytest.raises(Crash):
        run(prepared("broken"), monkeypatch, micro_batch, crash)
    config = prepared("broken")
    (folder,) = Path(config.paths.output_root, "broken").glob("2*")
    config.trainer.resume = str(folder / "checkpoints" / "last.ckpt")
    run(config)
    assert_same_end(folder, unbroken)


def test_an_extended_run_has_the_learning_rates_of_one_that_long(
    make_config: MakeConfig, unbroken: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            rates[trainer.global_step] = [group["lr"] for group in optimizer.param_groups]

    original = build.build_trainer

    def with_rates(config: TrainConfig, folder: Path) -> pl.Trainer:
        trainer = original(config, folder)
        trainer.callbacks.append(Rates())
        return trainer

    monkeypatch.setattr(build, "build_trainer", with_rates)
    folder = Path(shutil.copytree(unbroken, tmp_path / "extended"))
    found = []
    for resume in (None, str(folder / "checkpoints" / "last.ckpt")):
        config, rates = make_config(), {}
        config.trainer.max_steps, config.trainer.resume = 10, resume
        build.train(config)
        found.append(rates)
    whole, extended = found
    assert list(whole) == list(range(10)) and list(extended) == list(range(6, 10))
    assert extended == {step: whole[step] for step in extended}


def test_a_run_resumed_from_its_best_checkpoint_repeats_the_rest(
    make_config: MakeConfig, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    with pytest.raises(Crash):
        run(config, monkeypatch, 10, crash)
    (folder,) = Path(config.paths.output_root, "tiny").glob("2*")
    config = make_config()
    config.trainer.resume = str(folder / "checkpoints" / "best.ckpt")
    assert state(folder, "best")["global_step"] in (2, 4)
    run(config)
    assert_same_end(folder, unbroken)


def test_ctrl_c_saves_tells_how_to_go_on_and_loses_nothing(
    make_config: MakeConfig, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    config.trainer.checkpoint_every = 100
    handler = signal.getsignal(signal.SIGINT)
    # in the middle of an accumulation
    with pytest.raises(KeyboardInterrupt) as stop:
        run(config, monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is handler
    (folder,) = Path(config.paths.output_root, "tiny").glob("2*")
    last = folder / "checkpoints" / "last.ckpt"
    assert f"trainer.resume={last}" in str(stop.value)
    assert state(folder)["global_step"] == 3
    config = make_config()
    config.trainer.resume = str(last)
    run(config)
    assert_same_end(folder, unbroken)


@pytest.mark.slow
def test_a_killed_process_loses_no_checkpoint_and_resumes(make_config: MakeConfig, unbroken: Path) -> None:
    config = make_config()
    # long enough to be hit
    config.trainer.max_steps = 100_000
    process = subprocess.Popen(command(config), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    root = Path(config.paths.output_root, "tiny")
    deadline = time.monotonic() + 60
    while not list(root.glob("2*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = root.glob("2*")
    step = state(folder)["global_step"]
    config = make_config()
    config.trainer.max_steps = step + 2
    config.trainer.resume = str(folder / "checkpoints" / "last.ckpt")
    assert run(config) == folder
    assert state(folder)["global_step"] == step + 2
    # the schedule of the killed run was that of a longer one, so only its own steps can be compared
    assert sorted(metrics(folder)) == list(range(1, step + 3))


@pytest.mark.slow
def test_two_processes_train_as_one_does(make_config: MakeConfig, unbroken: Path) -> None:
    config = make_config()
    config.trainer.devices, config.trainer.strategy = 2, "ddp"
    subprocess.run(command(config), env=ENVIRONMENT, check=True, timeout=120, capture_output=True)
    (folder,) = Path(config.paths.output_root, "tiny").glob("2*")
    together, alone = metrics(folder), metrics(unbroken)
    assert together.keys() == alone.keys()
    for step in alone:
        assert together[step] == pytest.approx(alone[step], rel=1e-3)
    # whoever has the checkpoint needs no second process
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt").step == 6


@pytest.mark.slow
def test_two_processes_steer_and_freeze_as_one_does(make_rate_config: Callable[..., TrainConfig]) -> None:
    def prepared() -> TrainConfig:
        rate = {"target_bits": 10.2, "embedding_bits": 7.0, "freeze": 0.5, "ramp": 0.2, "lead": 0.2, "weight": None}
        config = make_rate_config(6, hold=Hold.steps, **rate)
        config.quant.embeddings = True
        config.quant.rounding, config.quant.columns = Rounding.gptq, 0.5
        return config

    alone = metrics(build.train(prepared()))
    config = prepared()
    config.name, config.trainer.devices, config.trainer.strategy = "two", 2, "ddp"
    subprocess.run(command(config), env=ENVIRONMENT, check=True, timeout=120, capture_output=True)
    (folder,) = Path(config.paths.output_root, "two").glob("2*")
    together = metrics(folder)
    assert together.keys() == alone.keys()
    for step in alone:
        assert together[step] == pytest.approx(alone[step], rel=1e-2)


def test_a_run_leaves_all_that_is_needed_to_use_it(make_config: MakeConfig, unbroken: Path, tiny: Path) -> None:
    names = {str(path.relative_to(unbroken)) for path in unbroken.rglob("*") if path.is_file()}
    assert names == {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "hf/config.json",
        "hf/generation_config.json",
        "hf/tokenizer.json",
        "hf/tokenizer_config.json",
        "layers.jsonl",
        "metrics.jsonl",
    }
    assert (unbroken.parent / "latest").resolve() == unbroken.resolve()
    config = make_config()
    assert yaml.safe_load((unbroken / "config.yaml").read_text())["optim"] == to_plain(config)["optim"]
    assert AutoTokenizer.from_pretrained(unbroken / "hf").encode("abc") == (
        AutoTokenizer.from_pretrained(tiny / "model").encode("abc")
    )


def test_every_step_has_one_line_of_metrics(unbroken: Path) -> None:
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    train = {"step", "train/loss", "train/kl", "train/ce", "lr", "tokens/s"}
    valid = {f"val/{key}" for key in ("ce", "ppl", "kl", "top1", "first_divergence", "identical")}
    valid |= {"quant/entropy", "quant/clipped_fraction"}
    assert all(set(line) == (train | valid if line["step"] % 2 == 0 else train) for line in lines)
    assert all(0 < line["quant/entropy"] < 8 for line in lines[1::2])


def test_the_best_checkpoint_is_the_best_quantised_one(make_config: MakeConfig, unbroken: Path) -> None:
    by_step = {step: line["val/kl"] for step, line in metrics(unbroken).items() if "val/kl" in line}
    assert by_step[state(unbroken, "best")["global_step"]] == min(by_step.values())
    # a state that is not quantised yet is nearest to the teacher, and of no use
    config = make_config()
    config.quant.start_step = 5
    folder = run(config)
    assert state(folder, "best")["global_step"] == 6
    assert metrics(folder)[2]["val/kl"] < metrics(folder)[6]["val/kl"]


def test_a_run_ends_with_a_validation_and_a_checkpoint(make_config: MakeConfig) -> None:
    config = make_config()
    config.trainer.max_steps, config.trainer.valid_every, config.trainer.checkpoint_every = 3, 100, 100
    folder = run(config)
    assert state(folder)["global_step"] == 3
    assert "val/kl" in metrics(folder)[3]


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint_of_it(make_config: MakeConfig) -> None:
    config = make_config()
    config.optim.lr, config.trainer.gradient_clip = 1e30, 0.0
    with pytest.raises(UserError, match="not finite after step 2.*optim.lr"):
        run(config)
    (folder,) = Path(config.paths.output_root, "tiny").glob("2*")
    assert state(folder)["global_step"] == 1


@pytest.mark.parametrize(
    ("group", "key", "value"), [("quant", "k", 0.7), ("quant", "bits", 4), ("data", "batch_size", 8)]
)
def test_going_on_with_other_settings_is_refused(
    make_config: MakeConfig, unbroken: Path, group: str, key: str, value: Any
) -> None:
    config = make_config()
    config.trainer.resume, config.trainer.max_steps = str(unbroken / "checkpoints" / "last.ckpt"), 8
    setattr(getattr(config, group), key, value)
    with pytest.raises(UserError, match=f"{group}.{key}={value}"):
        run(config)


def test_going_on_with_a_finished_run_is_refused(make_config: MakeConfig, unbroken: Path) -> None:
    config = make_config()
    config.trainer.resume = str(unbroken / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="trainer.max_steps=6"):
        run(config)


def test_windows_longer_than_the_model_takes_are_refused(make_config: MakeConfig) -> None:
    config = make_config()
    config.data.seq_len = 65
    with pytest.raises(UserError, match="data.seq_len=65"):
        run(config)


def test_devices_that_are_not_there_are_a_users_error(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    config.trainer.accelerator, config.trainer.devices = "cpu", "none"
    with pytest.raises(UserError, match="trainer"):
        build.build_trainer(config, tmp_path)


def test_a_sweep_in_which_lightning_starts_processes_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    config.trainer.devices, config.trainer.strategy = 2, "ddp"
    assert build.build_trainer(config, tmp_path).world_size == 2
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("train", ["hydra.mode=MULTIRUN"], return_hydra_config=True)
    try:
        HydraConfig.instance().set_config(composed)
        with pytest.raises(UserError, match="sweep"):
            build.build_trainer(config, tmp_path)
        config.trainer.devices, config.trainer.strategy = 1, "auto"
        assert build.build_trainer(config, tmp_path).world_size == 1
    finally:
        HydraConfig.instance().cfg = None


def test_wandb_offline_writes_into_the_run_folder(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    # lightning sets it for the whole process
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config()
    config.logger.mode, config.trainer.max_steps = LoggerMode.offline, 1
    config.quant = QuantConfig()
    folder = run(config)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    import wandb

    assert wandb.run is None


def test_run_dir_is_that_of_the_checkpoint_or_a_fresh_one(unbroken: Path) -> None:
    last = unbroken.parent / "latest" / "checkpoints" / "last.ckpt"
    assert run_dir(str(last), "fresh") == str(unbroken.resolve())
    assert run_dir(None, "fresh") == run_dir("no/checkpoints/last.ckpt", "fresh") == "fresh"


def test_a_loaded_checkpoint_computes_what_the_module_computed(make_config: MakeConfig, unbroken: Path) -> None:
    module = QATModule(to_plain(make_config()))
    module.load_state_dict(state(unbroken)["state_dict"])
    ids = torch.arange(30).reshape(2, 15)
    model = load_fake_quant(unbroken / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, module.model.eval()(ids).logits)
    base = load_fake_quant(unbroken / "checkpoints" / "last.ckpt", torch.bfloat16)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert base.model.layers[0].mlp.up_proj.weight_log2_scale.dtype == torch.float32


def test_a_checkpoint_before_the_start_of_quantisation_computes_with_float_weights(make_config: MakeConfig) -> None:
    config = make_config()
    config.trainer.max_steps, config.quant.start_step = 3, 2
    config.trainer.checkpoint_every, config.trainer.valid_every = 1, 100
    path = run(config) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(path).fake_quant_on
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"global_step": 1}, path)
    assert not read_checkpoint(path).fake_quant_on
    ids = torch.arange(30).reshape(2, 15)
    early = load_fake_quant(path)
    torch.save(saved, path)
    assert not torch.equal(early(ids).logits, load_fake_quant(path)(ids).logits)


def test_read_checkpoint_gives_masters_under_hugging_face_names(make_config: MakeConfig, unbroken: Path) -> None:
    checkpoint = read_checkpoint(unbroken / "checkpoints" / "last.ckpt")
    assert checkpoint.step == 6
    assert to_plain(checkpoint.config)["quant"] == to_plain(make_config())["quant"]
    assert checkpoint.hf_folder == unbroken / "hf"
    saved = state(unbroken)["state_dict"]
    assert_same(checkpoint.weights, {k.removeprefix("model."): v for k, v in saved.items()})
    assert "model.layers.0.mlp.up_proj.weight_log2_scale" in checkpoint.weights


def test_a_bad_checkpoint_is_named(unbroken: Path, tmp_path: Path) -> None:
    good = (unbroken / "checkpoints" / "last.ckpt").read_bytes()
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, other)
    contents = {
        "truncated": good[: len(good) // 2],
        "header": good[:100],
        "empty": b"",
        "text": b"no checkpoint at all",
        "other": other.read_bytes(),
        "alone": good,
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            read_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "missing.ckpt")


def test_checkpoints_keep_what_is_there_when_a_write_fails(unbroken: Path, tmp_path: Path) -> None:
    from qat.lit.callbacks import AtomicCheckpointIO

    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "bad": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    callback = Checkpoints(tmp_path, every=1, valid_every=1, max_steps=1)
    callback._on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        callback._on_interrupt()
