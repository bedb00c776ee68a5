"""Several processes train as one does, sharded or not, and a run goes from one to two processes and back."""

import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qat.checkpoint import load_fake_quant
from qat.config import Granularity, Hold, Profile, Rounding, ScaleRule, TrainConfig
from qat.errors import UserError
from qat.lit import build
from qat.quant import quantized_modules
from tests.train import test_rate
from tests.train.test_run import ENVIRONMENT, MakeConfig, assert_same_end, command, metrics, state

MakeRateConfig = Callable[..., TrainConfig]


def on_two(config: TrainConfig, strategy: str = "fsdp") -> TrainConfig:
    config.trainer.devices, config.trainer.strategy = 2, strategy
    return config


def launch(config: TrainConfig, name: str = "two") -> Path:
    """Train in processes of their own, in a run folder of its own unless it goes on."""
    config.name = name
    done = subprocess.run(command(config), env=ENVIRONMENT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if config.trainer.resume:
        return Path(config.trainer.resume).parent.parent
    (folder,) = Path(config.paths.output_root, name).glob("2*")
    return folder


def sweep(config: TrainConfig, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train with every choice, each in a process of its own."""
    words = [*command(config), "hydra/launcher=local", *overrides, "-m"]
    return subprocess.run(words, env=ENVIRONMENT, timeout=300, capture_output=True, text=True)


def assert_near(one: Path, other: Path, rel: float = 1e-3) -> None:
    """Every figure of every step, but of generated text, which shards do not make."""
    together, alone = figures(one), figures(other)
    assert together.keys() == alone.keys()
    for step in alone:
        assert together[step] == pytest.approx(alone[step], rel=rel, abs=1e-9), step


def figures(run: Path) -> dict[int, dict[str, float]]:
    """By step and name."""
    generated = ("val/first_divergence", "val/identical")
    return {step: {k: v for k, v in line.items() if k not in generated} for step, line in metrics(run).items()}


def assert_same_integers(one: Path, other: Path) -> None:
    """But for a few weights that stand between two of them."""
    models = [load_fake_quant(folder / "checkpoints" / "last.ckpt") for folder in (one, other)]
    together, alone = (
        torch.cat([m.integers().flatten() for m in quantized_modules(model).values()]) for model in models
    )
    assert (together == alone).double().mean() > 0.999


@pytest.fixture
def alike(make_config: MakeConfig) -> Callable[..., TrainConfig]:
    """Makes configs that agree on all steps that they share."""

    def make(steps: int, resume: Path | None = None) -> TrainConfig:
        config = make_config()
        config.trainer.max_steps, config.trainer.valid_every = steps, 1
        config.trainer.resume = str(resume / "checkpoints" / "last.ckpt") if resume else None
        config.quant.start_step = 1
        config.optim.warmup_steps, config.optim.min_lr_ratio, config.optim.frozen_lr_ratio = 0, 1.0, 1.0
        return config

    return make


@pytest.mark.slow
def test_shards_train_as_one_process_does_and_save_what_it_saves(make_config: MakeConfig, unbroken: Path) -> None:
    folder = launch(on_two(make_config()))
    assert_near(folder, unbroken)
    assert_same_integers(folder, unbroken)
    together, alone = state(folder), state(unbroken)
    assert list(together["state_dict"]) == list(alone["state_dict"])
    for key, tensor in alone["state_dict"].items():
        assert together["state_dict"][key].dtype == tensor.dtype == torch.float32
        torch.testing.assert_close(together["state_dict"][key], tensor, rtol=1e-3, atol=1e-3)
    for one, other in zip(together["optimizer_states"], alone["optimizer_states"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        assert one["state"].keys() == other["state"].keys()
        for key, moments in other["state"].items():
            torch.testing.assert_close(one["state"][key], moments, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_shards_and_back(alike: Callable[..., TrainConfig]) -> None:
    unbroken = build.train(alike(6))
    config = alike(2)
    config.name = "moved"
    folder = launch(on_two(alike(4, resume=build.train(config))))
    assert state(folder)["global_step"] == 4
    assert build.train(alike(6, resume=folder)) == folder
    assert_near(folder, unbroken)


@pytest.mark.slow
def test_shards_that_stop_and_go_on_end_as_unbroken_ones(alike: Callable[..., TrainConfig]) -> None:
    unbroken = launch(on_two(alike(6)), "unbroken")
    broken = launch(on_two(alike(3)), "broken")
    assert_same_end(launch(on_two(alike(6, resume=broken))), unbroken)


@pytest.mark.slow
def test_shards_are_prepared_steered_and_frozen_as_one_process_is(make_rate_config: MakeRateConfig) -> None:
    def prepared() -> TrainConfig:
        rate = {"target_bits": 10.2, "embedding_bits": 7.0, "freeze": 0.5, "ramp": 0.2, "lead": 0.2, "weight": None}
        config = make_rate_config(6, hold=Hold.steps, profile=Profile.fast, fit=True, **rate)
        config.quant.embeddings = True
        config.quant.rounding, config.quant.columns = Rounding.gptq, 0.5
        return config

    alone = build.train(prepared())
    together = launch(on_two(prepared()))
    assert_near(together, alone, 1e-2)
    assert_same_integers(together, alone)


# what is priced besides rows with a learned step: groups, the table that head and embedding share, steps that follow
@pytest.mark.slow
@pytest.mark.parametrize("scale", [ScaleRule.learned, ScaleRule.std])
def test_shards_pay_the_price_that_one_process_pays(make_rate_config: MakeRateConfig, scale: ScaleRule) -> None:
    def priced() -> TrainConfig:
        # as large as the loss, so that a wrong gradient shows
        config = make_rate_config(6, weight=1.0)
        config.quant.scale, config.quant.embeddings = scale, True
        config.quant.granularity, config.quant.group_size = Granularity.per_group, 32
        config.trainer.gradient_clip = 0.5
        return config

    alone = build.train(priced())
    assert_near(launch(on_two(priced())), alone)


@pytest.mark.parametrize(
    ("group", "key", "value"), [("model", "compile", True), ("quant", "granularity", Granularity.per_tensor)]
)
def test_what_cannot_be_sharded_is_named(make_config: MakeConfig, group: str, key: str, value: object) -> None:
    config = on_two(make_config())
    setattr(getattr(config, group), key, value)
    with pytest.raises(UserError, match=f"{group}.{key}=.*trainer.strategy=fsdp"):
        build.check_config(config)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_follow_the_losses_of_one(make_rate_config: MakeRateConfig, strategy: str) -> None:
    def on_gpu() -> TrainConfig:
        config = make_rate_config(50)
        config.trainer.accelerator = "gpu"
        return config

    alone = test_rate.metrics(build.train(on_gpu()), "train/loss")
    assert len(alone) > 5
    assert test_rate.metrics(launch(on_two(on_gpu(), strategy)), "train/loss") == pytest.approx(alone, rel=2e-2)


def test_a_launcher_that_is_not_installed_is_named(make_config: MakeConfig) -> None:
    if find_spec("submitit"):
        pytest.skip("hydra-submitit-launcher is installed")
    done = sweep(make_config(), "quant.k=0.3,0.5")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "pip install 'codecllm[sweep]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_sweep_trains_every_run_in_a_process_of_its_own(make_config: MakeConfig) -> None:
    pytest.importorskip("submitit", reason="needs hydra-submitit-launcher")
    config = make_config()
    # the second run is refused, and the sweep says so at its end
    done = sweep(config, "loss.temperature=1,0,2")
    assert done.returncode == 2
    assert "error: loss.temperature=0.0" in done.stderr
    (root,) = Path(config.paths.output_root, "tiny").glob("sweep_*")
    assert sorted(path.parent.name for path in root.glob("[0-9]/metrics.jsonl")) == ["0", "2"]
    # a process left what it printed
    assert len(list(root.glob(".submitit/*/*_log.out"))) == 3
