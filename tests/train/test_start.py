"""What is done before the first step: weights moved to where GPTQ rounds them from, columns rescaled, bits set."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qat.checkpoint import read_checkpoint
from qat.cli import compose
from qat.config import Granularity, Rounding, TrainConfig
from qat.errors import UserError
from qat.export import export
from qat.lit import build

MakeRateConfig = Callable[..., TrainConfig]


def at_rest(make_rate_config: MakeRateConfig, **quant: object) -> tuple[Path, float]:
    """A run that does not train, and its KL before the first step."""
    config = make_rate_config(1, target_bits=11.0, lead=0.0, every=1)
    config.name = "-".join(["start", *quant])
    config.optim.lr = config.optim.scale_lr = 0.0
    for key, value in quant.items():
        setattr(config.quant, key, value)
    folder = build.train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, next(line["start/kl"] for line in lines if "start/kl" in line)


@pytest.mark.parametrize("granularity", [Granularity.per_channel, Granularity.per_tensor])
def test_gptq_starts_nearer_at_the_same_bits(
    make_rate_config: MakeRateConfig, tmp_path: Path, granularity: Granularity
) -> None:
    _, nearest = at_rest(make_rate_config, granularity=granularity)
    folder, gptq = at_rest(make_rate_config, granularity=granularity, rounding=Rounding.gptq, columns=0.5)
    assert gptq < 0.9 * nearest
    checkpoint = folder / "checkpoints" / "last.ckpt"
    # one step a layer goes through export as well, and begins where it should
    export(compose("export", f"source={checkpoint}", f"output={tmp_path / 'out'}"))
    summary = json.loads((tmp_path / "out" / "export_report.json").read_text())["summary"]
    assert summary["bits"] == pytest.approx(11, abs=0.1)


def test_a_resumed_run_is_not_prepared_again(make_rate_config: MakeRateConfig) -> None:
    folder, _ = at_rest(make_rate_config, rounding=Rounding.gptq)
    before = read_checkpoint(folder / "checkpoints" / "last.ckpt").weights
    config = make_rate_config(2, target_bits=11.0, lead=0.0, every=1)
    config.quant.rounding = Rounding.gptq
    config.optim.lr = config.optim.scale_lr = 0.0
    config.trainer.resume = str(folder / "checkpoints" / "last.ckpt")
    build.train(config)
    after = read_checkpoint(folder / "checkpoints" / "last.ckpt").weights
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("key", "value"), [("columns", -1.0), ("calibration_windows", 0), ("granularity", Granularity.per_group)]
)
def test_a_value_without_meaning_is_named(make_rate_config: MakeRateConfig, key: str, value: object) -> None:
    config = make_rate_config(2)
    config.quant.rounding = Rounding.gptq
    setattr(config.quant, key, value)
    with pytest.raises(UserError, match="quant.(rounding|columns|calibration_windows)"):
        build.train(config)
